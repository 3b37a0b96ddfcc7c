//! Security groups on the fast path against the VPC: random groups, pods and flows; what reaches the other pod with the fast
//! path on is what reaches it with everything hairpinned.
//!
//! The node is the host build of the product's decisions over the tables that its compiler made, with a clock that the test
//! sets (`tests/equivalence.rs` holds the kernel programs to that build), or the kernel programs themselves under
//! BPF_PROG_TEST_RUN. The VPC is the lab's evaluator. `ENIWAY_SEED` repeats a run (the seed is printed), `ENIWAY_RULE_SETS`
//! is the number of cases; `cargo xtask test equivalence` sets both.

use std::{
    cell::RefCell,
    env,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use eniway_tests::equivalence::{Case, Dice, Difference, HostNode, KernelNode, Size, Tally, run, shrink};

/// Cases, unless said otherwise.
const RULE_SETS: u64 = 60;
/// Cases for the kernel programs, unless said otherwise: one in so many of the others.
const KERNEL_ONE_IN: u64 = 4;
/// Flows of a case.
const FLOWS: usize = 200;

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

fn seed() -> u64 {
    number("ENIWAY_SEED").unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_nanos() as u64)
    })
}

/// Each case has a seed of its own, so that one can be repeated alone.
fn seed_of(seed: u64, case: u64) -> u64 {
    seed.wrapping_add(case)
}

fn rule_sets() -> u64 {
    number("ENIWAY_RULE_SETS").unwrap_or(RULE_SETS)
}

fn on_the_host(case: &Case) -> Result<Tally, Difference> {
    run(case, &mut HostNode::new(true), &mut HostNode::new(false))
}

/// Runs the cases; a difference ends the test with the smallest case that shows one.
fn compare(name: &str, rule_sets: u64, size: Size, world: impl Fn(&Case) -> Result<Tally, Difference>) {
    let seed = seed();
    println!("{name}: ENIWAY_SEED={seed}");
    let started = Instant::now();
    let mut tally = Tally::default();
    for number in 0..rule_sets {
        let seed = seed_of(seed, number);
        let case = Dice(seed).case(size);
        match world(&case) {
            Ok(seen) => tally += seen,
            Err(first) => {
                let small = shrink(&case, |case| world(case).is_err());
                let difference = world(&small).err().unwrap_or(first);
                panic!("case {number} (ENIWAY_SEED={seed} ENIWAY_RULE_SETS=1): {difference}\n{small}");
            }
        }
    }
    println!(
        "{name}: {rule_sets} rule sets, {} flows each, in {:.1} s: {tally:?}, no difference",
        size.flows,
        started.elapsed().as_secs_f32()
    );
    // A test that sees only one way would show nothing.
    let all = tally.local + tally.wire + tally.refused + tally.lost;
    for (what, seen) in [("fast path", tally.local), ("wire", tally.wire), ("refused", tally.refused)] {
        assert!(seen * 100 > all || rule_sets < 50, "{what}: {seen} of {all} packets are too few");
    }
}

#[test]
fn decisions_agree_with_the_vpc() {
    let size = Size { flows: FLOWS, waits: true, changes: true };
    compare("host build", rule_sets(), size, on_the_host);
}

#[test]
fn decisions_agree_with_the_vpc_while_nothing_changes() {
    let size = Size { flows: FLOWS, waits: true, changes: false };
    compare("host build, no changes", rule_sets().div_ceil(2), size, on_the_host);
}

#[test]
fn kernel_programs_agree_with_the_vpc() {
    let node = RefCell::new(KernelNode::load().expect("the programs load"));
    let size = Size { flows: FLOWS, waits: false, changes: true };
    compare("kernel programs", rule_sets().div_ceil(KERNEL_ONE_IN), size, |case| {
        let mut node = node.borrow_mut();
        node.clear();
        run(case, &mut *node, &mut HostNode::new(false))
    });
}

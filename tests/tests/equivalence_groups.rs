//! Security groups on the fast path against the VPC: random groups, pods and flows; what reaches the other pod with the fast
//! path on is what reaches it with everything hairpinned.
//!
//! The node is the host build of the product's decisions over the tables that its compiler made, with a clock that the test
//! sets (`tests/equivalence.rs` holds the kernel programs to that build), or the kernel programs themselves under
//! BPF_PROG_TEST_RUN. The VPC is the lab's evaluator. `ENIWAY_SEED` repeats a run (the seed is printed), `ENIWAY_RULE_SETS`
//! is the number of cases; `cargo xtask test equivalence` sets both.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    env,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use datapath_common::abi::policy::timeout;
use eniway_policy::model::{
    Action, Direction, GroupId, GroupList, Groups, Priority, Protocol, Remote, Rule, SecurityGroup,
};
use eniway_tests::{
    equivalence::{Case, Dice, Difference, HostNode, KernelNode, PODS, Pod, Size, Step, Tally, run, shrink},
    lab::groups::packet::{
        ICMP, Packet, Part, TCP, Transport,
        flag::{ACK, SYN},
    },
};

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

/// Pods with these groups and their rules (direction of the rule that allows all traffic), and what happens.
fn small(pods: [&str; 2], rules: &Rules, steps: Vec<Step>) -> Case {
    let pods = PODS.into_iter().zip(pods);
    let pods = pods.map(|(address, group)| Pod { address, list: list(group), stale: false });
    Case { groups: groups(rules), hidden: BTreeSet::new(), pods: pods.collect(), steps }
}

/// For each group, the directions that it allows everything in.
type Rules<'r> = [(&'r str, &'r [Direction])];

fn list(group: &str) -> GroupList {
    let ids: Vec<GroupId> = group.split_whitespace().map(|id| id.parse().expect("an id")).collect();
    ids.try_into().expect("a few groups")
}

fn groups(rules: &Rules) -> Groups {
    let all = rules.iter().map(|(id, directions)| {
        let rule = |direction: &Direction| Rule {
            direction: *direction,
            action: Action::Allow,
            priority: Priority::FIRST,
            protocol: Protocol::Any,
            remote: Remote::Any,
        };
        SecurityGroup { id: id.parse().expect("an id"), rules: directions.iter().map(rule).collect() }
    });
    Groups::new(1, all.collect(), Vec::new()).expect("groups")
}

/// A packet between the two pods.
fn packet(from: usize, proto: u8, transport: Transport) -> Step {
    let (src, dst) = (PODS[from], PODS[1 - from]);
    Step::Send(Packet { src, dst, proto, ident: 7, part: Part::Whole, transport }, 0)
}

fn tcp(from: usize, flags: u8) -> Step {
    let (src, dst) = if from == 0 { (4000, 80) } else { (80, 4000) };
    packet(from, TCP, Transport::Tcp { src, dst, flags })
}

fn query(from: usize, kind: u8) -> Step {
    packet(from, ICMP, Transport::Icmp { kind, code: 0, ident: 7, quote: None })
}

/// Runs a case on the host build and on the kernel programs, and says how often the fast path was taken.
fn both(case: &Case) -> u64 {
    let host = on_the_host(case).unwrap_or_else(|difference| panic!("host build: {difference}\n{case}"));
    let mut node = KernelNode::load().expect("the programs load");
    // Its clock is its own.
    let mut case = case.clone();
    case.steps.retain(|step| !matches!(step, Step::Wait(_)));
    let kernel = run(&case, &mut node, &mut HostNode::new(false));
    let kernel = kernel.unwrap_or_else(|difference| panic!("kernel programs: {difference}\n{case}"));
    assert_eq!(host.local, kernel.local, "{case}");
    host.local
}

const EGRESS: &[Direction] = &[Direction::Egress];
const INGRESS: &[Direction] = &[Direction::Ingress];
const ALL: &[Direction] = &[Direction::Egress, Direction::Ingress];

/// A pod that could not be judged is replaced by one that can: of its flows nothing is remembered.
#[test]
fn an_address_comes_to_another_pod() {
    let rules: &Rules = &[("g4", INGRESS), ("g5", EGRESS)];
    let flow = || vec![tcp(1, ACK), tcp(0, ACK)];
    let mut steps = flow();
    steps.push(Step::Replace(1, list("g5")));
    steps.extend(flow());
    assert_eq!(both(&small(["g4", ""], rules, steps)), 2);
}

/// A connection that began while a pod could not be judged stays with the VPC, which needs to see both directions.
#[test]
fn a_connection_of_the_wire_stays_there() {
    let rules: &Rules = &[("g4", INGRESS), ("g5", EGRESS)];
    let mut steps = vec![tcp(1, SYN), Step::List(1, list("g5"))];
    for _ in 0..3 {
        steps.extend([tcp(1, ACK), Step::Wait(timeout::TCP_TRANSITORY - 1)]);
    }
    steps.push(tcp(0, SYN | ACK));
    assert_eq!(both(&small(["g4", ""], rules, steps)), 0);
}

/// The rules of a flow go, and come back.
#[test]
fn a_flow_that_a_change_ended_does_not_come_back() {
    let rules: &Rules = &[("g4", INGRESS), ("g5", EGRESS)];
    let none: &Rules = &[("g4", &[]), ("g5", &[])];
    let there_and_back = || vec![Step::Groups(groups(none)), Step::Groups(groups(rules))];
    for (ask, answer) in [(query(0, 13), query(1, 14)), (tcp(0, SYN), tcp(1, SYN | ACK))] {
        let steps = [vec![ask.clone()], there_and_back(), vec![answer.clone()], vec![ask, answer]].concat();
        // The first, and then the two that begin it anew.
        assert_eq!(both(&small(["g5", "g4"], rules, steps)), 3);
    }
    // A pod that takes another class of the same rules.
    let steps = vec![tcp(0, SYN), Step::List(0, list("g4")), Step::List(0, list("g5")), tcp(1, SYN | ACK)];
    assert_eq!(both(&small(["g5", "g4"], rules, steps)), 1);
}

/// While everything is allowed nobody remembers a flow, and who opened it may change.
#[test]
fn a_flow_does_not_sleep_through_a_time_without_memory() {
    let check: &Rules = &[("g0", EGRESS), ("g5", ALL)];
    let open: &Rules = &[("g0", ALL), ("g5", ALL)];
    let steps = vec![
        tcp(0, SYN),
        Step::Groups(groups(open)),
        tcp(1, SYN),
        Step::Groups(groups(check)),
        tcp(0, SYN | ACK),
        tcp(1, SYN | ACK),
    ];
    both(&small(["g0", "g5"], check, steps));
}

/// A flow is over when its limit is reached.
#[test]
fn a_flow_is_over_at_its_limit() {
    let rules: &Rules = &[("g4", INGRESS), ("g5", EGRESS)];
    for (wait, local) in [(timeout::ICMP - 1, 2), (timeout::ICMP, 1)] {
        let case = small(["g5", "g4"], rules, vec![query(0, 8), Step::Wait(wait), query(1, 0)]);
        // The kernel's clock is its own.
        let tally = on_the_host(&case).unwrap_or_else(|difference| panic!("{difference}\n{case}"));
        assert_eq!(tally.local, local);
    }
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

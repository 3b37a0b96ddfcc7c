//! Every program loads with every configuration, under the licence and the names it should have, and the verifier's
//! work does not grow unseen: `tests/verifier-budget.json` holds how many instructions it went through, by kernel.
//! `ENIWAY_BLESS=1` writes the numbers of the running kernel.

use std::{collections::BTreeMap, env, fs};

use datapath_common::abi::maps;
use datapath_user::{
    config::{FastPath, Limits, Xdp},
    object::Constants,
};
use eniway_tests::programs::{Hook, Programs};

const BUDGET: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/verifier-budget.json");
/// What the kernel keeps of a name (`BPF_OBJ_NAME_LEN` with its end).
const NAME_LEN: usize = 15;

/// By kernel ("6.18"), program and configuration: instructions that the verifier went through.
type Budget = BTreeMap<String, BTreeMap<String, u32>>;

fn configurations() -> Vec<Constants> {
    let mut all = vec![];
    for fast_path in [FastPath::Off, FastPath::SecurityGroups] {
        for xdp in [Xdp::Guard, Xdp::Redirect] {
            for parent in [0, maps::MAX_PARENTS as u16 - 1] {
                all.push(Constants { fast_path, parent, xdp });
            }
        }
    }
    all
}

/// A program, with the constants that change it.
fn label(hook: Hook, constants: Constants) -> String {
    match (hook, constants.fast_path, constants.xdp) {
        (Hook::PodEgress, FastPath::Off, _) => "pod_egress fast_path=off".to_owned(),
        (Hook::PodEgress, _, _) => "pod_egress".to_owned(),
        (Hook::EniXdp, _, Xdp::Redirect) => "eni_xdp xdp=redirect".to_owned(),
        (Hook::EniXdp, _, _) => "eni_xdp xdp=guard".to_owned(),
        _ => hook.name().to_owned(),
    }
}

fn kernel() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("/proc is mounted");
    release.split('.').take(2).collect::<Vec<_>>().join(".")
}

#[test]
fn every_program_loads_within_its_budget() {
    let limits = Limits { endpoints: 16, flows: 1024 };
    let mut counts = BTreeMap::new();
    for constants in configurations() {
        let programs =
            Programs::load(constants, &limits).unwrap_or_else(|error| panic!("{constants:?}: {error}"));
        for hook in Hook::ALL {
            let program = programs.ebpf().program(hook.name()).unwrap();
            let info = program.info().unwrap();
            assert_eq!(info.name_as_str(), Some(hook.name()));
            assert_eq!(
                info.gpl_compatible(),
                Some(true),
                "{}: bpf_redirect_peer is for the GPL only",
                hook.name()
            );
            if let Some(instructions) = info.verified_instruction_count() {
                let most = counts.entry(label(hook, constants)).or_insert(0);
                *most = instructions.max(*most);
            }
        }
    }
    println!("verified instructions on {}: {counts:#?}", kernel());
    check_budget(&counts);
}

fn check_budget(counts: &BTreeMap<String, u32>) {
    let text = fs::read_to_string(BUDGET).unwrap_or_else(|_| "{}".to_owned());
    let mut budget: Budget = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{BUDGET}: {error}"));
    if env::var_os("ENIWAY_BLESS").is_some_and(|value| value == "1") {
        budget.insert(kernel(), counts.clone());
        let text = serde_json::to_string_pretty(&budget).expect("plain data") + "\n";
        fs::write(BUDGET, text).unwrap_or_else(|error| panic!("cannot write {BUDGET}: {error}"));
        return;
    }
    let Some(known) = budget.get(&kernel()) else {
        println!("{BUDGET} has no numbers for {}; ENIWAY_BLESS=1 writes them", kernel());
        return;
    };
    let mut complaints = vec![];
    for (program, instructions) in counts {
        match known.get(program) {
            None => complaints.push(format!("{program}: {instructions}, and no budget")),
            Some(&allowed) if *instructions > allowed + allowed / 10 => {
                complaints.push(format!("{program}: {instructions}, more than 10 % over {allowed}"));
            }
            Some(_) => {}
        }
    }
    assert!(
        complaints.is_empty(),
        "the verifier has more to do on {} than tests/verifier-budget.json allows (if that is worth it, ENIWAY_BLESS=1 \
         writes the new numbers):\n{}",
        kernel(),
        complaints.join("\n")
    );
}

/// The kernel cuts names off, and what is cut off cannot be told apart.
#[test]
fn names_are_kept_whole() {
    for name in Hook::ALL.map(Hook::name).into_iter().chain(maps::ALL) {
        assert!(name.len() <= NAME_LEN, "{name}: longer than {NAME_LEN}");
    }
}

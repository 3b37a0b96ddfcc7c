//! The layout that kernel programs, agents and pinned maps agree on, against the snapshot in `tests/abi.txt`.
//! `ENIWAY_BLESS=1` writes the snapshot anew.

use std::{collections::BTreeSet, env, fmt::Write as _, fs};

use datapath_common::abi::{
    self, Direction, Door, Origin, Outcome,
    endpoint::flag,
    layout::{self, Record, Table},
    maps::{self, host_dst},
    outcome::OUTCOMES,
    policy::{ALLOW, DENY, NOTHING, State, Verdict},
};

const SNAPSHOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/abi.txt");

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(out, "{text}").expect("a string takes all");
}

fn snapshot() -> String {
    let mut text = format!("version {}\n", abi::VERSION);
    let out = &mut text;
    for Record { name, size, fields } in layout::RECORDS {
        line(out, format_args!("struct {name}: {size} bytes"));
        for field in fields {
            line(out, format_args!("struct {name}.{}: {} at {}", field.name, field.size, field.offset));
        }
    }
    for Table { map, key, value } in layout::TABLES.into_iter().chain([layout::CARRIED]) {
        line(out, format_args!("map {map}: {} ({}) -> {} ({})", key.name, key.size, value.name, value.size));
    }
    for constant in [maps::FAST_PATH, maps::PARENT_INDEX, maps::XDP_REDIRECT] {
        line(out, format_args!("constant {constant}"));
    }
    line(out, format_args!("SUBENI: {} VLANs of {} parents", maps::VLANS, maps::MAX_PARENTS));
    line(
        out,
        format_args!(
            "HOST_DST flags: host {}, deny {}, service {}, preferred {}",
            host_dst::HOST,
            host_dst::DENY,
            host_dst::SERVICE,
            host_dst::PREFERRED
        ),
    );
    line(
        out,
        format_args!(
            "endpoint flags: off {}, groups {}, observe {}, limited {}",
            flag::OFF,
            flag::GROUPS,
            flag::OBSERVE,
            flag::LIMITED
        ),
    );
    for verdict in Verdict::ALL {
        line(out, format_args!("verdict {}: {}", verdict as u8, verdict.name()));
    }
    line(out, format_args!("a group says: nothing {NOTHING}, deny {DENY}, allow {ALLOW}"));
    for state in [State::New, State::Established, State::Closing] {
        line(out, format_args!("state {}: {state:?}", state as u8));
    }
    line(out, format_args!("mark of a packet to a Service: {:#x}", maps::SERVICE_MARK));
    for door in [Door::Wire, Door::Local, Door::Host] {
        line(out, format_args!("door {}: {}", door as u8, door.name()));
    }
    for origin in [Origin::Inbound, Origin::HostForwarded] {
        line(out, format_args!("origin {}: {origin:?}", origin as u8));
    }
    for direction in Direction::ALL {
        line(
            out,
            format_args!(
                "direction {}: {}, counters from {}",
                direction as u8,
                direction.name(),
                direction as usize * OUTCOMES
            ),
        );
    }
    for outcome in Outcome::ALL {
        line(out, format_args!("outcome {}: {} ({:?})", *outcome as u8, outcome.name(), outcome.kind()));
    }
    text
}

#[test]
fn layout_is_as_released() {
    let now = snapshot();
    if env::var_os("ENIWAY_BLESS").is_some_and(|value| value == "1") {
        fs::write(SNAPSHOT, &now).unwrap_or_else(|error| panic!("cannot write {SNAPSHOT}: {error}"));
    }
    let released = fs::read_to_string(SNAPSHOT)
        .unwrap_or_else(|error| panic!("cannot read {SNAPSHOT}: {error}; ENIWAY_BLESS=1 writes it"));
    if now == released {
        return;
    }
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let (old, new) = (lines(&released), lines(&now));
    let mut difference = String::new();
    for gone in old.difference(&new) {
        line(&mut difference, format_args!("- {gone}"));
    }
    for added in new.difference(&old) {
        line(&mut difference, format_args!("+ {added}"));
    }
    let same_version = released.lines().next() == now.lines().next();
    // A further outcome takes a number that nobody used: older readers show it as a number.
    let only_outcomes = old.difference(&new).next().is_none()
        && new.difference(&old).all(|added| added.starts_with("outcome "));
    let what_to_do = if same_version && !only_outcomes {
        "raise datapath_common::abi::VERSION, then run this test with ENIWAY_BLESS=1"
    } else {
        "run this test with ENIWAY_BLESS=1 and commit tests/abi.txt"
    };
    panic!("the layout is not the one of tests/abi.txt: {what_to_do}\n{difference}");
}

/// Numbers are never used again: each one belongs to one outcome, and none stands in the place of another direction.
#[test]
fn outcomes_have_numbers_of_their_own() {
    let numbers: BTreeSet<u8> = Outcome::ALL.iter().map(|outcome| *outcome as u8).collect();
    assert_eq!(numbers.len(), Outcome::ALL.len());
    assert!(numbers.iter().all(|number| usize::from(*number) < OUTCOMES && *number != 0));
}

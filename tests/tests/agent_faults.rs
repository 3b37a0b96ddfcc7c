//! A short version of `eniway-bench-faults`: allocators and agents are killed while pods come and go, etcd is stopped while packets flow.

use std::path::Path;

use eniway_tests::faults::{self, Options, forwarding};

fn options(id: &str) -> Options {
    // `ENIWAY_SEED` repeats the choices of a run.
    let seed = std::env::var("ENIWAY_SEED").ok().and_then(|seed| seed.parse().ok());
    Options {
        program: Path::new(env!("CARGO_BIN_EXE_eniway-bench-faults")).to_owned(),
        id: id.to_owned(),
        seed: seed.unwrap_or_else(|| fastrand::u64(..)),
        kills_allocator: 28,
        kills_agent: 12,
    }
}

#[test]
fn kills_of_allocators_and_agents_lose_nothing() -> anyhow::Result<()> {
    let report = faults::run(&options("ewrf"))?;
    assert!(report.wrong.is_empty(), "{report:#?}");
    assert_eq!((report.kills_allocator, report.kills_agent), (28, 12));
    assert!(report.allocations > 0 && report.vpc_lost_replies > 0, "{report:#?}");
    Ok(())
}

#[test]
fn forwarding_goes_on_while_etcd_is_away() -> anyhow::Result<()> {
    let report = forwarding::run(&options("ewrg"), 2)?;
    assert_eq!((report.etcd_stops, report.packets_lost), (2, 0), "{report:?}");
    assert!(report.packets_sent > 1_000, "{report:?}");
    Ok(())
}

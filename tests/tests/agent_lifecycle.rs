//! A short version of `cargo xtask bench lifecycle`: packets flow by the wire, the fast path and the ELB while agents are killed and
//! upgraded.

use eniway_tests::{
    lab::{
        XdpMode,
        agent::{eniway_binary, next_agent},
    },
    lifecycle::{self, Action, Options, Programs},
};

/// `ENIWAY_SEED` repeats the choices of a run.
fn seed() -> u64 {
    let seed = std::env::var("ENIWAY_SEED").ok().and_then(|seed| seed.parse().ok());
    seed.unwrap_or_else(|| fastrand::u64(..))
}

fn no_packet_notices(id: &str, actions: &[Action], xdp: XdpMode) -> anyhow::Result<()> {
    let agent = eniway_binary()?;
    let dir = tempfile::tempdir()?;
    let other = dir.path().join("eniway");
    std::fs::copy(&agent, &other)?;
    let next = if actions.contains(&Action::Abi) { Some(next_agent()?) } else { None };
    let options = Options {
        id: id.to_owned(),
        programs: Programs { agent, other, next },
        actions: actions.to_vec(),
        xdp,
        rate: 5_000.0,
        rounds: 2,
        seed: seed(),
    };
    println!("ENIWAY_SEED={}", options.seed);
    let report = lifecycle::run(&options, |line| println!("{line}"))?;
    println!("{}", report.table());
    for case in &report.cases {
        assert_eq!(case.rounds, 2, "{:?}: rounds are void: {:?}", case.action, case.void);
        for (path, tally) in &case.paths {
            assert!(tally.sent > 1_000, "{:?} by {path}: only {} packets", case.action, tally.sent);
            assert_eq!(tally.unexplained(), 0, "{:?} by {path}: {:#?}", case.action, case.missing);
        }
    }
    assert!(report.connections > 0);
    assert_eq!(report.survived, report.connections, "{:?}", report.ended);
    Ok(())
}

#[test]
fn no_packet_notices_a_kill_or_an_upgrade() -> anyhow::Result<()> {
    no_packet_notices("a-lifecycle", &[Action::Kill, Action::Upgrade, Action::Abi], XdpMode::Off)
}

#[test]
fn no_packet_notices_them_with_xdp() -> anyhow::Result<()> {
    no_packet_notices("a-lifecycle-xdp", &[Action::Kill, Action::Upgrade], XdpMode::Redirect)
}

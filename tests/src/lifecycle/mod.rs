//! Packets while the agents are killed, restarted and upgraded: none is lost, and no connection ends.
//!
//! ```text
//!            ┌── node n1: pod a ══ 50,000 requests/s ══► pod b      (fast path)
//!            │            pod a ══ 50,000 requests/s ══╗
//!   fabric ──┤                                         ║
//!            └── node n2: pod c ◄══════════════════════╝            (wire)
//!            └── VIPs:    pod a ══ 25,000 requests/s ══► VIP ══► pod b, and as many by another VIP to pod c   (ELB)
//! ```
//!
//! Every request is answered, and requests and answers are numbered: what has not arrived when nothing is under way any more is
//! lost. A receiver whose socket was full says so itself; a round in which packets are missing for that reason alone is void, is
//! told, and is repeated. Everything else that is missing is a loss, and every counter that has risen is told with it.

mod action;
mod document;
mod load;
mod report;
mod socket;
mod talk;
mod tally;
mod witness;
mod world;

use std::{thread, time::Duration};

pub use self::{
    action::{Action, Programs},
    document::document,
    load::Path,
    report::{Case, Report},
    tally::Tally,
};
use self::{
    load::{Carried, Load},
    talk::Talks,
    witness::Witness,
    world::Doors,
};
use crate::lab::{Error, Lab, Result, XdpMode};

/// Packets flow for so long before anything happens.
const BEFORE: Duration = Duration::from_millis(200);
/// After the agents are ready: what they put off until their next look at the tables is part of the round.
const AFTER: Duration = Duration::from_millis(1_300);

/// Of the control.
const OUTAGE: Duration = Duration::from_millis(20);

/// What is measured, and how hard.
#[derive(Clone, Debug)]
pub struct Options {
    /// The lab's id.
    pub id: String,
    /// The agents.
    pub programs: Programs,
    /// What is done, in this order.
    pub actions: Vec<Action>,
    /// How the agents use XDP.
    pub xdp: XdpMode,
    /// Requests a second on each path; each is answered.
    pub rate: f64,
    /// Rounds of each action that count.
    pub rounds: u32,
    /// Decides when agents are killed while they start.
    pub seed: u64,
}

/// Builds the lab, does everything, and takes the lab down. `progress` gets a line for each round.
///
/// # Errors
///
/// When the lab cannot be built, or an agent does not become ready. Lost packets are no error: the report tells them.
pub fn run(options: &Options, mut progress: impl FnMut(&str)) -> Result<Report> {
    let lab = world::build(&options.id, options.xdp)?;
    let report = measure(&lab, options, &mut progress)?;
    lab.shutdown()?;
    Ok(report)
}

fn measure(lab: &Lab, options: &Options, progress: &mut impl FnMut(&str)) -> Result<Report> {
    let ends = world::ends(lab)?;
    let mut load = Load::open(&ends)?;
    let talks = Talks::open(&ends)?;
    expect_doors(lab, &mut load, options.rate)?;
    expect_loss(lab, &mut load, options.rate)?;
    let mut report = Report::new(options.rate, talks.count());
    let mut random = fastrand::Rng::with_seed(options.seed);
    for action in &options.actions {
        let mut case = Case::new(*action);
        let doors = Doors::look(lab)?;
        let mut witness = Witness::look(lab)?;
        for number in 0.. {
            if case.rounds == options.rounds || case.void.len() > options.rounds as usize {
                break;
            }
            let backlog = witness::backlog_drops()?;
            let (mut ready, mut done) = (Duration::ZERO, String::new());
            let carried = load.carry(options.rate, || {
                thread::sleep(BEFORE);
                (ready, done) = action::act(lab, &options.programs, *action, number, &mut random)?;
                thread::sleep(AFTER);
                Ok(())
            })?;
            let backlog = witness::backlog_drops()?.saturating_sub(backlog);
            let head = format!("{} {}/{}", action.name(), case.rounds + 1, options.rounds);
            let missing = if carried.iter().any(|carried| carried.tally.lost > 0) {
                let now = Witness::look(lab)?;
                let risen = now.risen(&witness);
                witness = now;
                carried.iter().flat_map(|carried| carried.gaps.iter().cloned()).chain(risen).collect()
            } else {
                Vec::new()
            };
            match void(&carried, backlog) {
                Some(why) => {
                    progress(&format!("{head}: void, will be repeated: {why}"));
                    missing.iter().for_each(|line| progress(&format!("    {line}")));
                    case.void.push(why);
                }
                None => {
                    progress(&format!("{head}: {}", told(&carried, ready, &done)));
                    missing.iter().for_each(|line| progress(&format!("    {line}")));
                    case.count(&carried, ready, missing);
                }
            }
        }
        case.hairpinned = Doors::look(lab)?.hairpin.saturating_sub(doors.hairpin);
        report.cases.push(case);
    }
    report.note_talks(talks.finish());
    Ok(report)
}

/// Before anything happens: the fast path is taken, and by the ELB it is not.
fn expect_doors(lab: &Lab, load: &mut Load, rate: f64) -> Result<()> {
    let before = Doors::look(lab)?;
    let carried = load.carry(rate, || {
        thread::sleep(BEFORE);
        Ok(())
    })?;
    let after = Doors::look(lab)?;
    let (local, wire) = (after.local - before.local, after.wire - before.wire);
    let sent = |path| carried.iter().filter(|c| c.path == path).map(|c| c.tally.sent).sum::<u64>();
    // On the first node: all requests that do not take the fast path, and the answers of the pod behind the VIP.
    let by_wire = (sent(Path::Wire) + sent(Path::Elb)) / 2;
    if local < sent(Path::FastPath) || wire < by_wire {
        return Err(Error::Protocol(format!(
            "packets take other ways than they should: {local} by the fast path and {wire} by the wire, of {carried:?}"
        )));
    }
    Ok(())
}

/// The control: while the VPC does not know pod `c` for a moment, packets to it are lost, are found to be lost, and no others.
fn expect_loss(lab: &Lab, load: &mut Load, rate: f64) -> Result<()> {
    let pod = lab.pod("c")?;
    let carried = load.carry(rate, || {
        thread::sleep(BEFORE);
        lab.fabric().detach_nic(&pod.port, pod.vlan)?;
        thread::sleep(OUTAGE);
        lab.fabric().attach_nic(&pod.port, pod.vlan, pod.ip, pod.mac, pod.eip)?;
        thread::sleep(BEFORE);
        Ok(())
    })?;
    let found = |carried: &Carried| (carried.tally.unexplained() > 0) == (carried.path != Path::FastPath);
    if !carried.iter().all(found) {
        return Err(Error::Protocol(format!(
            "the control finds other losses than it makes, to pod c by the VPC: {carried:?}"
        )));
    }
    Ok(())
}

/// Why a round proves nothing, if packets are missing that the machine had no room for, and no others.
fn void(carried: &[Carried], backlog: u64) -> Option<String> {
    let sum = |of: fn(&Tally) -> u64| carried.iter().map(|carried| of(&carried.tally)).sum::<u64>();
    let (full, unexplained) = (sum(|tally| tally.full.min(tally.lost)), sum(Tally::unexplained));
    if unexplained > 0 && backlog >= unexplained {
        return Some(format!(
            "a processor's queue was full {backlog} times, {unexplained} packets are missing"
        ));
    }
    (unexplained == 0 && full > 0).then(|| format!("sockets were full: {full} packets"))
}

fn told(carried: &[Carried], ready: Duration, done: &str) -> String {
    let sent: u64 = carried.iter().map(|carried| carried.tally.sent).sum();
    let lost: u64 = carried.iter().map(|carried| carried.tally.unexplained()).sum();
    let rate = carried.iter().map(|carried| carried.rate).fold(f64::INFINITY, f64::min);
    format!(
        "{done}, ready after {} ms; {sent} packets, {rate:.0} requests/s on the slowest path, {lost} lost",
        ready.as_millis()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carried(lost: u64, full: u64) -> Carried {
        let tally = Tally { sent: 100, lost, full, ..Tally::default() };
        Carried { path: Path::Wire, tally, rate: 1.0, gaps: Vec::new() }
    }

    #[test]
    fn only_what_the_machine_had_no_room_for_makes_a_round_void() {
        assert_eq!(void(&[carried(0, 0), carried(0, 0)], 9), None);
        assert!(void(&[carried(0, 0), carried(3, 3)], 0).is_some());
        // One packet that nothing explains is a loss, whatever else happened.
        assert_eq!(void(&[carried(1, 0), carried(3, 3)], 0), None);
        assert_eq!(void(&[carried(4, 3)], 0), None);
        assert!(void(&[carried(4, 0)], 4).is_some());
        assert_eq!(void(&[carried(4, 0)], 3), None);
    }
}

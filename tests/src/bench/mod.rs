//! Benchmarks: one load after the other over each system, all systems standing at once, in rounds of random order.
//!
//! Every figure is a cost: instructions in the counting virtual machine, nanoseconds on a machine's own clock, for each
//! transaction, MiB or datagram. Ratios are of figures of one round, so that what disturbs a while disturbs both.

use std::{net::Ipv4Addr, time::Duration};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

mod attack;
mod case;
pub mod feed;
pub mod floor;
pub mod flows;
mod labs;
pub mod load;
mod netkit;
pub mod ovs;
pub mod plot;
pub mod report;
mod scale;
mod sys;
pub mod system;
mod targets;
mod unchecked;

pub use case::{Case, Group, Place};

use crate::lab::{Error, Netns, Result};
use feed::Feed;
use flows::Flows;
use load::{Client, Limit, Load};
use report::{Ratio, Report, Run, Spread};
use system::{Ends, Kind, System, Way};

/// A client's namespace, a server's, and the server's address.
#[derive(Clone, Debug)]
pub struct Pair {
    /// Where the client runs.
    pub client: Netns,
    /// Where the server runs.
    pub server: Netns,
    /// What the client connects to.
    pub to: Ipv4Addr,
}

/// How is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The clock counts instructions: few rounds are enough.
    Counted,
    /// The clock is a clock: many rounds, and a system measured twice to see what a difference is worth.
    Wall,
}

impl Engine {
    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Counted => "counted",
            Self::Wall => "wall",
        }
    }

    const fn unit(self) -> &'static str {
        match self {
            Self::Counted => "instructions",
            Self::Wall => "ns",
        }
    }

    const fn rounds(self, load: Load) -> usize {
        match (self, load) {
            (Self::Counted, _) => 15,
            // Some of what a machine does lasts longer than a round: many short rounds tell what few long ones leave open.
            (Self::Wall, Load::TcpStream) => 155,
            (Self::Wall, _) => 31,
        }
    }

    const fn limit(self, load: Load) -> Limit {
        match (self, load) {
            (Self::Counted, _) => Limit::Count(load.round().0),
            (Self::Wall, _) => Limit::Time(Duration::from_millis(200)),
        }
    }
}

/// The ratio of the control pair may not be further from 1 than this, or nothing of the run is worth anything.
const CONTROL: std::ops::RangeInclusive<f64> = 0.97..=1.03;
const CONTROL_NAME: &str = "control";

/// A system's client for one case, and its figures by round.
struct Line<'s> {
    name: String,
    way: &'s Way,
    client: Client,
    costs: Vec<f64>,
}

/// Measures all cases over all systems, in so many rounds, or as many as the engine needs.
///
/// # Errors
///
/// When a system cannot be set up, or something is lost on the way.
pub fn run(engine: Engine, cases: &[Case], kinds: &[Kind], rounds: Option<usize>) -> Result<Report> {
    // Both ends and what is between them on one processor: wake-ups across processors cost more than what is compared.
    let mut cpus = CpuSet::new();
    cpus.set(0).map_err(Error::errno("the set of processors"))?;
    sched_setaffinity(Pid::from_raw(0), &cpus).map_err(Error::errno("pinning to processor 0"))?;
    let mut report = Report::new(engine.name());
    for group in Group::ALL {
        let cases: Vec<Case> = cases.iter().copied().filter(|case| case.place.group() == group).collect();
        if cases.is_empty() {
            continue;
        }
        let asked = |kind: &Kind| cases.iter().any(|case| kind.has(case.place));
        let kinds: Vec<Kind> = kinds.iter().copied().filter(asked).collect();
        let systems = build(engine, group, &kinds)?;
        for case in cases {
            let rounds = rounds.unwrap_or(engine.rounds(case.load));
            measure(engine, case, &systems, rounds, &mut report)?;
        }
    }
    report.compare_above(Kind::Eniway.name(), Kind::Loopback.name());
    Ok(report)
}

/// Sets all systems of a group up.
fn build(engine: Engine, group: Group, kinds: &[Kind]) -> Result<Vec<(Kind, System)>> {
    let mut systems = Vec::new();
    for kind in kinds {
        let system = match kind.build(group) {
            Ok(None) => continue,
            Ok(Some(system)) => system,
            // The machine's own kernel may lack what a system is made of; the virtual machine's does not.
            Err(error) if engine == Engine::Wall => {
                eprintln!("{} is left out: {error}", kind.name());
                continue;
            }
            Err(error) => return Err(error),
        };
        eprintln!("{} stands", kind.name());
        // Ways of one system may share a server.
        let mut served = Vec::new();
        for way in &system.ways {
            let (Ends::Pair(pair) | Ends::Flows(pair, _)) = &way.ends else { continue };
            let Pair { client, server, .. } = pair;
            load::widen_ports(client)?;
            if !served.contains(&server) {
                load::serve(server)?;
                served.push(server);
            }
        }
        systems.push((*kind, system));
    }
    Ok(systems)
}

fn measure(
    engine: Engine,
    case: Case,
    systems: &[(Kind, System)],
    rounds: usize,
    report: &mut Report,
) -> Result<()> {
    let mut lines = Vec::new();
    for (kind, system) in systems {
        for way in system.ways.iter().filter(|way| way.place == case.place && way.ends.fit(case.load)) {
            let name = way.name.clone().unwrap_or_else(|| kind.name().to_owned());
            lines.push(Line::start(name, way, case)?);
        }
    }
    // The control is what the others are compared with once more, or whatever comes first.
    let reference = Reference::of(case.place.group());
    let again = lines.iter().find(|line| line.name == reference.name).or(lines.first()).map(|line| line.way);
    if let Some(way) = again {
        lines.push(Line::start(CONTROL_NAME.to_owned(), way, case)?);
    }
    for line in &mut lines {
        line.round(Limit::Count(case.load.round().1))?;
        line.way.proof.as_ref().map_or(Ok(()), |proof| proof())?;
    }
    // The first round is warm-up as well.
    for line in &mut lines {
        line.costs.clear();
    }
    let mut order: Vec<usize> = (0..lines.len()).collect();
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..rounds {
        random.shuffle(&mut order);
        for at in &order {
            lines[*at].round(engine.limit(case.load))?;
        }
    }
    let unit = format!("{}/{}", engine.unit(), case.load.unit());
    for line in &lines {
        let Spread { median, min, max } = Spread::of(&line.costs);
        eprintln!("{case}: {} {median:.0} {unit}", line.name);
        report.runs.push(Run {
            engine: engine.name().to_owned(),
            kernel: report.kernel.clone(),
            case: case.to_string(),
            system: line.name.clone(),
            endpoints: line.way.endpoints,
            flows: line.way.ends.flows(),
            unit: unit.clone(),
            median,
            min,
            max,
            n: line.costs.len(),
        });
    }
    ratios(case, reference, &lines, report);
    Ok(())
}

/// What the lines of a group's cases are compared with.
#[derive(Clone, Copy)]
struct Reference {
    name: &'static str,
    /// Whether a ratio is its cost over that of another, instead of the other's over its own.
    above: bool,
}

impl Reference {
    const fn of(group: Group) -> Self {
        match group {
            Group::Traffic => Self { name: Kind::Eniway.name(), above: true },
            // The ratio of the costs is that of the rates, the other way round: how much of the bare drop's rate is reached.
            Group::Attack => Self { name: Kind::Drop.name(), above: true },
            // The smallest size has the system's name; how much more the others cost.
            Group::Scale => Self { name: Kind::Eniway.name(), above: false },
        }
    }
}

fn ratios(case: Case, reference: Reference, lines: &[Line<'_>], report: &mut Report) {
    let find = |name: &str| lines.iter().find(|line| line.name == name);
    let Some(reference_line) = find(reference.name) else { return };
    for line in lines.iter().filter(|line| line.name != reference.name) {
        let (of, to) = if reference.above { (reference_line, line) } else { (line, reference_line) };
        let ratio = Ratio::paired(case.to_string(), &of.name, &to.name, &of.costs, &to.costs);
        if line.name == CONTROL_NAME && !(CONTROL.contains(&ratio.low) && CONTROL.contains(&ratio.high)) {
            report.void.push(case.to_string());
        }
        report.ratios.push(ratio);
    }
}

impl<'s> Line<'s> {
    fn start(name: String, way: &'s Way, case: Case) -> Result<Self> {
        let ends = &way.ends;
        let client = ends
            .client()
            .run(|| match ends {
                Ends::Pair(pair) => Client::connect(case.load, pair.to),
                Ends::Flows(pair, flows) => {
                    Flows::open(pair.to, *flows).map(|flows| Client::Flows(Box::new(flows)))
                }
                Ends::Feed(_, source) => Feed::open(source).map(|feed| Client::Feed(Box::new(feed))),
            })?
            .map_err(Error::io(format!("{case} over {name}")))?;
        Ok(Self { name, way, client, costs: Vec::new() })
    }

    fn round(&mut self, limit: Limit) -> Result<()> {
        let client = &mut self.client;
        let (done, took) = self
            .way
            .ends
            .client()
            .run(|| client.measure(limit))?
            .map_err(Error::io(format!("measuring {}", self.name)))?;
        self.costs.push(took.as_nanos() as f64 / done as f64);
        Ok(())
    }
}

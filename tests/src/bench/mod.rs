//! Benchmarks: one load after the other over each system, all systems standing at once, in rounds of random order.
//!
//! Every figure is a cost: instructions in the counting virtual machine, nanoseconds on a machine's own clock, for each
//! transaction, MiB or datagram. Ratios are of figures of one round, so that what disturbs a while disturbs both.

use std::{fmt, net::Ipv4Addr, time::Duration};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

pub mod floor;
pub mod load;
pub mod ovs;
pub mod plot;
pub mod report;
pub mod system;

use crate::lab::{Error, Netns, Result};
use load::{Client, Limit, Load};
use report::{Ratio, Report, Run, Spread};
use system::{Kind, System};

/// Where a server is, as its client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// On the client's node.
    SameNode,
    /// On another one.
    CrossNode,
}

impl Place {
    /// Both.
    pub const ALL: [Self; 2] = [Self::SameNode, Self::CrossNode];

    /// Its name in cases.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SameNode => "same-node",
            Self::CrossNode => "cross-node",
        }
    }
}

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

/// What is sent where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Case {
    /// Where.
    pub place: Place,
    /// What.
    pub load: Load,
}

impl Case {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        Load::ALL.into_iter().flat_map(|load| Place::ALL.map(|place| Self { place, load }))
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.place.name(), self.load.name())
    }
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
            (Self::Wall, Load::TcpStream) => 15,
            (Self::Wall, _) => 31,
        }
    }

    const fn limit(self, load: Load) -> Limit {
        match (self, load) {
            (Self::Counted, _) => Limit::Count(load.round().0),
            (Self::Wall, Load::TcpStream) => Limit::Time(Duration::from_secs(1)),
            (Self::Wall, _) => Limit::Time(Duration::from_millis(200)),
        }
    }
}

/// The ratio of the control pair may not be further from 1 than this, or nothing of the run is worth anything.
const CONTROL: std::ops::RangeInclusive<f64> = 0.97..=1.03;
const CONTROL_NAME: &str = "control";

/// A system's client for one case, and its figures by round.
struct Line<'s> {
    name: &'static str,
    pair: &'s Pair,
    client: Client,
    costs: Vec<f64>,
}

/// Measures all cases over all systems.
///
/// # Errors
///
/// When a system cannot be set up, or something is lost on the way.
pub fn run(engine: Engine, cases: &[Case], kinds: &[Kind]) -> Result<Report> {
    // Both ends and what is between them on one processor: wake-ups across processors cost more than what is compared.
    let mut cpus = CpuSet::new();
    cpus.set(0).map_err(Error::errno("the set of processors"))?;
    sched_setaffinity(Pid::from_raw(0), &cpus).map_err(Error::errno("pinning to processor 0"))?;
    let mut systems = Vec::new();
    for kind in kinds {
        eprintln!("setting up {}", kind.name());
        let system = match kind.build() {
            Ok(system) => system,
            // The machine's own kernel may lack what a system is made of; the virtual machine's does not.
            Err(error) if engine == Engine::Wall => {
                eprintln!("{} is left out: {error}", kind.name());
                continue;
            }
            Err(error) => return Err(error),
        };
        for (_, pair) in &system.pairs {
            // Pairs of one system may share a server.
            match load::serve(pair) {
                Err(error) if !error.to_string().contains("in use") => return Err(error),
                _ => {}
            }
        }
        systems.push((*kind, system));
    }
    let mut report = Report::new(engine.name());
    for case in cases {
        measure(engine, *case, &systems, &mut report)?;
    }
    report.compare_above(Kind::Eniway.name(), Kind::Loopback.name());
    Ok(report)
}

fn measure(engine: Engine, case: Case, systems: &[(Kind, System)], report: &mut Report) -> Result<()> {
    let with_pair: Vec<_> = systems
        .iter()
        .filter_map(|(kind, system)| {
            let (_, pair) = system.pairs.iter().find(|(place, _)| *place == case.place)?;
            Some((*kind, pair))
        })
        .collect();
    let mut lines = Vec::new();
    for (kind, pair) in &with_pair {
        lines.push(Line::start(kind.name(), pair, case)?);
    }
    // The control is our own system once more, or whatever comes first.
    let of = with_pair.iter().find(|(kind, _)| *kind == Kind::Eniway).or(with_pair.first());
    if let Some((_, pair)) = of {
        lines.push(Line::start(CONTROL_NAME, pair, case)?);
    }
    for line in &mut lines {
        line.round(Limit::Count(case.load.round().1))?;
    }
    // The first round is warm-up as well.
    for line in &mut lines {
        line.costs.clear();
    }
    let mut order: Vec<usize> = (0..lines.len()).collect();
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..engine.rounds(case.load) {
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
            system: line.name.to_owned(),
            endpoints: 2,
            unit: unit.clone(),
            median,
            min,
            max,
            n: line.costs.len(),
        });
    }
    ratios(case, &lines, report);
    Ok(())
}

fn ratios(case: Case, lines: &[Line<'_>], report: &mut Report) {
    let find = |name: &str| lines.iter().find(|line| line.name == name);
    let Some(ours) = find(Kind::Eniway.name()) else { return };
    for line in lines.iter().filter(|line| line.name != ours.name) {
        let ratio = Ratio::paired(case.to_string(), ours.name, line.name, &ours.costs, &line.costs);
        if line.name == CONTROL_NAME && !(CONTROL.contains(&ratio.low) && CONTROL.contains(&ratio.high)) {
            report.void.push(case.to_string());
        }
        report.ratios.push(ratio);
    }
}

impl<'s> Line<'s> {
    fn start(name: &'static str, pair: &'s Pair, case: Case) -> Result<Self> {
        let client = pair
            .client
            .run(|| Client::connect(case.load, pair.to))?
            .map_err(Error::io(format!("{case} over {name}")))?;
        Ok(Self { name, pair, client, costs: Vec::new() })
    }

    fn round(&mut self, limit: Limit) -> Result<()> {
        let client = &mut self.client;
        let (done, took) = self
            .pair
            .client
            .run(|| client.measure(limit))?
            .map_err(Error::io(format!("measuring {}", self.name)))?;
        self.costs.push(took.as_nanos() as f64 / done as f64);
        Ok(())
    }
}

//! What is, against what should be: each check is described once, and asked by `eniway audit`, by the agent itself now and
//! then, and by CNI CHECK.
//!
//! A check compares one thing and changes nothing. What differs is a [`Finding`]: what, where, expected and found; and
//! [`Target`] says whose repair sets it right.

pub mod expected;
mod leftovers;
pub mod parent;
pub mod pod;
mod programs;
mod tables;

use std::{
    collections::{HashMap, HashSet},
    fmt::Display,
    net::Ipv4Addr,
};

use futures_util::{StreamExt as _, stream};
use serde::{Deserialize, Serialize};

pub use self::expected::{Expected, ExpectedError, ExpectedParent, ExpectedPod, LiveRecord};
pub(crate) use self::programs::is_first;
use crate::{
    attach,
    feature::TcKind,
    netlink::{HostState, Link, Neighbour, Netlink, NetlinkError, Route},
    pin::{PinError, Pins},
    tables::{Maps, TablesError},
};

/// So many pods are looked into at once.
const AT_ONCE: usize = 8;

/// Why the node cannot be audited.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The node's interfaces, neighbours, routes or rules cannot be listed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The tables cannot be read.
    #[error(transparent)]
    Tables(#[from] TablesError),
    /// The pins cannot be listed.
    #[error(transparent)]
    Pin(#[from] PinError),
}

/// What a check is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// An interface: that it is there, its state, MAC, alias.
    Link,
    /// An interface's MTU.
    Mtu,
    /// Whether a parent ENI has a carrier, which nothing on the node can give it.
    Carrier,
    /// Whether a parent ENI carries what its pods send, which is set where the ENI is.
    ParentMtu,
    /// A program on its hook.
    Attachment,
    /// An offload.
    Offload,
    /// An address.
    Address,
    /// A permanent neighbour.
    Neighbour,
    /// A route.
    Route,
    /// A rule of the routing policy.
    Rule,
    /// A setting of the kernel.
    Sysctl,
    /// An entry of a map.
    Map,
    /// A pin on the BPF file system.
    Pin,
}

impl Kind {
    /// As text.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Link => "link",
            Self::Mtu => "mtu",
            Self::Carrier => "carrier",
            Self::ParentMtu => "parent-mtu",
            Self::Attachment => "attachment",
            Self::Offload => "offload",
            Self::Address => "address",
            Self::Neighbour => "neighbour",
            Self::Route => "route",
            Self::Rule => "rule",
            Self::Sysctl => "sysctl",
            Self::Map => "map",
            Self::Pin => "pin",
        }
    }

    /// Whether the agent can do something about it.
    pub const fn is_repairable(self) -> bool {
        !matches!(self, Self::Carrier | Self::ParentMtu)
    }
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Difference {
    /// Of what kind.
    pub kind: Kind,
    /// What.
    pub what: String,
    /// What it should be.
    pub expected: String,
    /// What it is.
    pub found: String,
}

impl Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: expected {}, found {}", self.what, self.expected, self.found)
    }
}

/// Checks that were made, and what they found.
#[derive(Debug, Default)]
pub struct Checks {
    /// How many were made.
    pub done: usize,
    /// What differs.
    pub differences: Vec<Difference>,
}

impl Checks {
    /// Two values that should be equal.
    pub fn equal<T: PartialEq + Display>(&mut self, kind: Kind, what: impl Display, expected: T, found: T) {
        let same = expected == found;
        self.holds(same, kind, what, expected, found);
    }

    /// Something that should hold.
    pub fn holds(
        &mut self,
        holds: bool,
        kind: Kind,
        what: impl Display,
        expected: impl Display,
        found: impl Display,
    ) {
        self.done += 1;
        if !holds {
            let (what, expected, found) = (what.to_string(), expected.to_string(), found.to_string());
            self.differences.push(Difference { kind, what, expected, found });
        }
    }
}

/// Whose repair sets a finding right.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// A pod, by its owner.
    Pod(u64),
    /// A parent ENI.
    Parent(String),
    /// The tables.
    Tables,
    /// What nobody needs any more.
    Leftovers,
    /// Nobody's on this node.
    Nobody,
}

impl Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pod(owner) => write!(f, "pod {owner:016x}"),
            Self::Parent(name) => write!(f, "parent ENI {name}"),
            Self::Tables => f.write_str("tables"),
            Self::Leftovers => f.write_str("leftovers"),
            Self::Nobody => f.write_str("nothing"),
        }
    }
}

impl Target {
    /// The pod, if it is one.
    pub const fn owner(&self) -> Option<u64> {
        match self {
            Self::Pod(owner) => Some(*owner),
            _ => None,
        }
    }
}

/// A difference with its place.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Finding {
    /// Where.
    pub place: String,
    /// What differs there.
    #[serde(flatten)]
    pub difference: Difference,
    /// Whose repair sets it right.
    pub repair: Target,
}

impl Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}: {}", self.place, self.difference.kind.name(), self.difference)
    }
}

/// What an audit found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Pods that were looked at.
    pub pods: usize,
    /// Parent ENIs that were looked at.
    pub parents: usize,
    /// Checks that were made.
    pub checks: usize,
    /// What is not as it should be.
    pub findings: Vec<Finding>,
}

impl Report {
    fn add(&mut self, repair: &Target, place: &str, checks: Checks) {
        self.checks += checks.done;
        self.findings.extend(checks.differences.into_iter().map(|difference| Finding {
            place: place.to_owned(),
            repair: if difference.kind.is_repairable() { repair.clone() } else { Target::Nobody },
            difference,
        }));
    }
}

/// How much is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// What other programs of the node meet: links, programs, neighbours, routes, rules, tables, pins.
    Node,
    /// Inside of pods and their interfaces' settings, too.
    Everything,
}

/// What the node's namespace holds, by what it is looked up by.
pub struct Seen<'h> {
    links: HashMap<&'h str, &'h Link>,
    neighbours: HashMap<(u32, Ipv4Addr), &'h Neighbour>,
    routes: HashSet<(u32, ipnet::Ipv4Net, u32, Option<Ipv4Addr>)>,
    host: &'h HostState,
}

impl<'h> Seen<'h> {
    /// Sorts what was read.
    pub fn of(host: &'h HostState) -> Self {
        let route = |route: &Route| (route.table, route.destination, route.output, route.gateway);
        Self {
            links: host.links.iter().map(|link| (link.name.as_str(), link)).collect(),
            neighbours: host.neighbours.iter().map(|it| ((it.output, it.address), it)).collect(),
            routes: host.routes.iter().map(route).collect(),
            host,
        }
    }

    fn neighbour(&self, checks: &mut Checks, output: u32, address: Ipv4Addr, mac: [u8; 6]) {
        let found = self.neighbours.get(&(output, address));
        pod::check_neighbour(checks, address, mac, found.copied());
    }
}

/// Compares the node with what should be. To be called in the node's network namespace.
///
/// # Errors
///
/// When something cannot be read at all. What cannot be looked at in a single pod is a finding.
pub async fn audit(expected: &Expected, pins: &Pins, depth: Depth) -> Result<Report, AuditError> {
    let kind = if expected.clsact { TcKind::Clsact } else { TcKind::Tcx };
    let host = HostState::read().await?;
    let seen = Seen::of(&host);
    let netlink = Netlink::open()?;
    let mut report = Report::default();

    for parent in &expected.parents {
        let mut checks = parent::checks(parent, &seen);
        if let Some(ifindex) = parent.ifindex {
            programs::parent(&mut checks, &netlink, kind, pins, parent, ifindex, &seen).await;
        }
        report.parents += 1;
        report.add(&Target::Parent(parent.interface.clone()), &parent.interface, checks);
    }
    let mut stale = Checks::default();
    parent::stale_rules(&mut stale, &expected.parents, &seen);
    let any = expected.parents.first().map_or(Target::Nobody, |it| Target::Parent(it.interface.clone()));
    report.add(&any, "routing policy", stale);

    for pod in &expected.pods {
        report.pods += 1;
        let mut checks = Checks::default();
        let state = pod.fault.as_deref().unwrap_or("not in the tables");
        checks.holds(pod.live.is_some() && pod.fault.is_none(), Kind::Map, "state", "forwarded for", state);
        if let Some(live) = &pod.live
            && !pod.is_exclusive()
        {
            pod::host_side(&mut checks, pod, &live.record, &seen, depth);
            if seen.links.contains_key(pod.host_interface.as_str()) {
                let (interface, ifindex) = (pod.host_interface.as_str(), live.record.ifindex);
                programs::pod(&mut checks, &netlink, kind, pins, attach::POD, interface, ifindex).await;
            }
        }
        report.add(&Target::Pod(pod.owner), &pod.name, checks);
    }
    if depth == Depth::Everything {
        let inside = expected.pods.iter().filter(|pod| pod.live.is_some());
        let inside = inside.map(|pod| async move { (pod, pod::whole_inside(pod, kind, pins).await) });
        let mut inside = stream::iter(inside).buffered(AT_ONCE);
        while let Some((pod, checks)) = inside.next().await {
            report.add(&Target::Pod(pod.owner), &pod.name, checks);
        }
    }
    match Maps::open(pins) {
        Ok(maps) => report.add(&Target::Tables, "tables", tables::checks(expected, &maps)?),
        // Its pin is missed below.
        Err(TablesError::Missing { .. }) if pins.maps_dir().exists() => {}
        Err(error) => return Err(error.into()),
    }
    report.add(&Target::Tables, "tables", leftovers::missing(pins));
    report.add(&Target::Leftovers, "leftovers", leftovers::checks(expected, pins, &seen)?);
    report.findings.sort_by(|a, b| (&a.repair, &a.place).cmp(&(&b.repair, &b.place)));
    Ok(report)
}

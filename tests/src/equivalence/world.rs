//! Two worlds in which the same happens: a node whose fast path judges, with a VPC that sees only what comes by the wire, and
//! a node without a fast path, with a VPC that sees everything.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt,
    net::Ipv4Addr,
    time::Duration,
};

use datapath_common::{
    abi::{Admitted, Outcome},
    testing::GATEWAY_MAC,
};

use super::{Case, Step, case::State};
use crate::lab::groups::{Packet, Verdict, Vpc, packet::Part};

/// A node under test.
pub trait Node {
    /// Puts a state in force, as the agent does before it acknowledges. `replaced`: the pod that is another one now.
    fn enforce(&mut self, state: &State, replaced: Option<usize>);
    /// Pairs of pods, the lower number first, between which everything is allowed, so that no flows are remembered.
    fn open_pairs(&self) -> BTreeSet<(usize, usize)>;
    /// A pod sends a frame.
    fn send(&mut self, pod: usize, frame: &[u8]) -> Sent;
    /// The VPC hands in a packet for a pod (IP header first). Whether the pod gets it.
    fn receive(&mut self, pod: usize, packet: &[u8]) -> bool;
    /// Seconds pass. A node that cannot have that says so.
    fn wait(&mut self, seconds: u32) -> bool;
}

/// What becomes of a frame that a pod sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It reaches another pod by the fast path.
    Local(usize),
    /// It goes to the VPC.
    Wire,
    /// It ends on the node.
    Dropped(Option<Outcome>),
}

/// What reached whom, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The fast path took it there.
    Local,
    /// The VPC did.
    Wire,
    /// The VPC refused it.
    Refused(String),
    /// It ended on the node, or is too large for the receiver.
    Lost(String),
}

impl Fate {
    const fn arrived(&self) -> bool {
        matches!(self, Self::Local | Self::Wire)
    }
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("arrives by the fast path"),
            Self::Wire => f.write_str("arrives by the wire"),
            Self::Refused(why) => write!(f, "is refused by the VPC: {why}"),
            Self::Lost(why) => write!(f, "is lost: {why}"),
        }
    }
}

/// Two worlds that differ.
#[derive(Clone, Debug)]
pub struct Difference {
    /// The step.
    pub step: usize,
    /// With the fast path.
    pub fast: Fate,
    /// With everything hairpinned.
    pub slow: Fate,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, fast, slow } = self;
        write!(f, "step {step}: with the fast path it {fast}; with everything hairpinned it {slow}")
    }
}

/// What a run saw.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Packets that the fast path delivered.
    pub local: u64,
    /// Packets that the VPC delivered although there is a fast path.
    pub wire: u64,
    /// Packets that the VPC refused.
    pub refused: u64,
    /// Packets that ended otherwise.
    pub lost: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.local += other.local;
        self.wire += other.wire;
        self.refused += other.refused;
        self.lost += other.lost;
    }
}

/// The MTU of a pod: that of the last one is smaller.
pub const fn mtu(pod: usize) -> usize {
    if pod == 3 { 1400 } else { 1500 }
}

/// The MAC of a pod.
pub const fn mac(pod: usize) -> [u8; 6] {
    [0xfa, 0x16, 0x3e, 0, 2, pod as u8]
}

struct World<'n> {
    node: &'n mut dyn Node,
    vpc: Vpc,
    now: Duration,
}

impl<'n> World<'n> {
    fn new(node: &'n mut dyn Node, state: &State) -> Self {
        node.enforce(state, None);
        Self { node, vpc: vpc(state), now: Duration::from_secs(1000) }
    }

    /// The VPC first, then the agent.
    fn change(&mut self, state: &State, step: &Step) {
        change(&mut self.vpc, state, step);
        self.node.enforce(state, replaced(step));
    }

    fn wait(&mut self, seconds: u32) {
        if self.node.wait(seconds) {
            self.now += Duration::from_secs(seconds.into());
        }
    }

    fn send(&mut self, from: usize, to: usize, packet: &Packet, bytes: &[u8]) -> Fate {
        let frame = [&GATEWAY_MAC[..], &mac(from), &[8, 0], bytes].concat();
        let fits = bytes.len() <= mtu(to);
        match self.node.send(from, &frame) {
            Sent::Local(pod) if pod == to && fits => Fate::Local,
            Sent::Local(pod) => Fate::Lost(format!("by the fast path to pod {pod}, {} bytes", bytes.len())),
            Sent::Dropped(outcome) => Fate::Lost(outcome.map_or("on the node", Outcome::name).to_owned()),
            Sent::Wire => match self.vpc.see(self.now, packet) {
                Verdict::Pass if !fits => Fate::Lost("too large for the receiver".to_owned()),
                Verdict::Pass if self.node.receive(to, bytes) => Fate::Wire,
                Verdict::Pass => Fate::Lost("on the receiver's node".to_owned()),
                Verdict::Drop(why) | Verdict::Undecidable(why) => Fate::Refused(why.to_string()),
            },
        }
    }
}

const fn replaced(step: &Step) -> Option<usize> {
    if let Step::Replace(pod, _) = step { Some(*pod) } else { None }
}

/// So much before its time the fast path may end a flow: it notes when one was seen only that often, and in whole seconds.
pub const EARLY: Duration = Duration::from_secs(Admitted::REFRESH as u64 + 1);

/// A VPC at the beginning of a case.
pub fn vpc(state: &State) -> Vpc {
    let mut vpc = Vpc::default();
    vpc.set_groups(state.groups.clone());
    for (address, membership) in state.members() {
        vpc.set_member(address, membership);
    }
    vpc
}

/// Has a VPC do the step that led to a state.
pub fn change(vpc: &mut Vpc, state: &State, step: &Step) {
    if let Some(pod) = replaced(step) {
        vpc.remove_member(state.pods[pod].address);
    }
    vpc.set_groups(state.groups.clone());
    for (address, membership) in state.members() {
        vpc.set_member(address, membership);
    }
}

/// Runs a case in both worlds, on nodes that know nothing yet. The same must arrive in both,
/// except where a VPC without a fast path and one that has forgotten what it [cannot know](new_to_the_vpc) behind a fast path, and
/// ends idle flows early (`EARLY`), disagree: there either is right.
///
/// # Errors
///
/// The first difference.
pub fn run(case: &Case, fast: &mut dyn Node, slow: &mut dyn Node) -> Result<Tally, Difference> {
    let mut state = case.state();
    let mut worlds = [World::new(fast, &state), World::new(slow, &state)];
    let mut forgetful = vpc(&state).ending_early(EARLY);
    // What is too large for the receiver goes by the wire, where the VPC takes it for the first packet of a flow. Who has opened
    // the flow, it cannot know, and that matters when rules change.
    let changes = case.steps.iter().any(|step| !matches!(step, Step::Send(..) | Step::Wait(_)));
    let number: BTreeMap<Ipv4Addr, usize> =
        case.pods.iter().enumerate().map(|(number, pod)| (pod.address, number)).collect();
    let mut datagrams = Datagrams::default();
    let mut tally = Tally::default();
    for (at, step) in case.steps.iter().enumerate() {
        let (packet, more) = match step {
            Step::Send(packet, more) => (packet, *more),
            Step::Wait(seconds) => {
                worlds.iter_mut().for_each(|world| world.wait(*seconds));
                continue;
            }
            Step::Groups(_) | Step::List(..) | Step::Replace(..) => {
                let before = state.clone();
                state.apply(step);
                let open = worlds[0].node.open_pairs();
                worlds.iter_mut().for_each(|world| world.change(&state, step));
                change(&mut forgetful, &state, step);
                for (a, b) in new_to_the_vpc(&before, &state, &open, &worlds[0].node.open_pairs()) {
                    forgetful.forget_between(a, b);
                }
                datagrams.changed();
                continue;
            }
        };
        let (from, to) = (number[&packet.src], number[&packet.dst]);
        let bytes = packet.write(more);
        let fits = bytes.len() <= mtu(from) && (bytes.len() <= mtu(to) || !changes);
        if !fits || !datagrams.is_whole(packet) {
            continue;
        }
        let must = forgetful.see(worlds[0].now, packet) == Verdict::Pass;
        let [fast, slow] = worlds.each_mut().map(|world| world.send(from, to, packet, &bytes));
        if fast.arrived() && !slow.arrived() && !must || !fast.arrived() && slow.arrived() && must {
            return Err(Difference { step: at, fast, slow });
        }
        match fast {
            Fate::Local => tally.local += 1,
            Fate::Wire => tally.wire += 1,
            Fate::Refused(_) => tally.refused += 1,
            Fate::Lost(_) => tally.lost += 1,
        }
    }
    Ok(tally)
}

/// Pairs of pods whose flows of the fast path go on by the wire after a change, where the VPC has not seen them: those of a pod
/// that the agent could judge and cannot any more, and those between pods where everything was allowed and is not any more, as
/// nobody remembers them. No node can mend that.
pub fn new_to_the_vpc(
    before: &State,
    after: &State,
    open_before: &BTreeSet<(usize, usize)>,
    open_after: &BTreeSet<(usize, usize)>,
) -> Vec<(Ipv4Addr, Ipv4Addr)> {
    let handed_over =
        |pod: usize| before.is_decidable(&before.pods[pod]) && !after.is_decidable(&after.pods[pod]);
    let all = (0..after.pods.len()).flat_map(|a| (a + 1..after.pods.len()).map(move |b| (a, b)));
    all.filter(|pair @ (a, b)| {
        handed_over(*a) || handed_over(*b) || open_before.contains(pair) && !open_after.contains(pair)
    })
    .map(|(a, b)| (after.pods[a].address, after.pods[b].address))
    .collect()
}

/// Datagrams in the middle of which there was a change: who changes rules then may lose the rest of them.
#[derive(Debug, Default)]
pub struct Datagrams {
    begun: HashSet<(Ipv4Addr, Ipv4Addr, u8, u16)>,
    cut: HashSet<(Ipv4Addr, Ipv4Addr, u8, u16)>,
}

impl Datagrams {
    /// There was a change.
    pub fn changed(&mut self) {
        self.cut.extend(self.begun.drain());
    }

    /// Whether the packet is of a datagram without a change since its first fragment.
    pub fn is_whole(&mut self, packet: &Packet) -> bool {
        let datagram = (packet.src, packet.dst, packet.proto, packet.ident);
        match packet.part {
            Part::Whole => true,
            Part::First => {
                self.cut.remove(&datagram);
                self.begun.insert(datagram);
                true
            }
            Part::Later => !self.cut.contains(&datagram),
        }
    }
}

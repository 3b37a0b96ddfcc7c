//! Programs: what one group says of traffic with one kind of peer, as disjoint intervals.

use std::{collections::HashMap, ops::Range};

use datapath_common::abi::policy::{
    ALLOW, DENY, KEYS, MAX_INTERVALS, NOTHING, PAGE_WORDS, PAGES, interval, traffic_key,
};

use super::bits::Bits;
use crate::model::{Action, IcmpMatch, Protocol, Rule};

/// Intervals by rising key, the first of key 0: [`interval`] words. Equal neighbours are one.
pub(super) type Program = Vec<u32>;

/// The rules of one group in one direction, with the key space cut into segments where any of them begins or ends.
pub(super) struct Decider {
    /// Where segments begin, the first at 0.
    cuts: Vec<u32>,
    /// In the order in which they decide.
    rules: Vec<Segmented>,
    /// What of a peer the rules look at.
    relevant: Bits,
}

struct Segmented {
    says: u8,
    /// What a peer must have; `None` = every peer has it.
    needs: Option<usize>,
    segments: Vec<Range<usize>>,
}

impl Decider {
    /// `needs` says what a rule's remote asks of a peer: `Err` for what no peer can have.
    pub(super) fn new<'a>(
        rules: impl Iterator<Item = &'a Rule>,
        needs: impl Fn(&Rule) -> Result<Option<usize>, ()>,
    ) -> Self {
        let mut chosen: Vec<(&Rule, Option<usize>, Vec<Range<u32>>)> =
            rules.filter_map(|rule| Some((rule, needs(rule).ok()?, keys_of(&rule.protocol)))).collect();
        chosen.sort_by_key(|(rule, ..)| (rule.priority, rule.action));
        let mut cuts: Vec<u32> = chosen
            .iter()
            .flat_map(|(_, _, keys)| keys.iter().flat_map(|range| [range.start, range.end]))
            .chain([0])
            .filter(|cut| *cut < KEYS)
            .collect();
        cuts.sort_unstable();
        cuts.dedup();
        let segment = |key: u32| cuts.partition_point(|cut| *cut < key);
        let mut relevant = Bits::default();
        let rules = chosen
            .into_iter()
            .map(|(rule, needs, keys)| {
                if let Some(bit) = needs {
                    relevant.set(bit);
                }
                Segmented {
                    says: match rule.action {
                        Action::Allow => ALLOW as u8,
                        Action::Deny => DENY as u8,
                    },
                    needs,
                    segments: keys.iter().map(|range| segment(range.start)..segment(range.end)).collect(),
                }
            })
            .collect();
        Self { cuts, rules, relevant }
    }

    /// What matters of a peer.
    pub(super) fn relevant(&self, peer: &Bits) -> Bits {
        peer.and(&self.relevant)
    }

    /// What the group says of traffic with such a peer. `scratch` is for reuse.
    pub(super) fn decide(&self, peer: &Bits, scratch: &mut Vec<u8>) -> Program {
        scratch.clear();
        scratch.resize(self.cuts.len(), NOTHING as u8);
        for rule in self.rules.iter().filter(|rule| rule.needs.is_none_or(|bit| peer.has(bit))) {
            for segments in &rule.segments {
                for says in &mut scratch[segments.clone()] {
                    if *says == NOTHING as u8 {
                        *says = rule.says;
                    }
                }
            }
        }
        let mut program = Program::new();
        let mut last = None;
        for (key, says) in self.cuts.iter().zip(scratch.iter()) {
            if last != Some(*says) {
                program.push(interval(*key, u32::from(*says)));
                last = Some(*says);
            }
        }
        program
    }
}

/// The traffic of a rule as ranges of [`traffic_key`].
fn keys_of(protocol: &Protocol) -> Vec<Range<u32>> {
    let all_of = |proto: u8| traffic_key(proto, 0)..traffic_key(proto, u16::MAX) + 1;
    let ports = |proto: u8, ports: &crate::model::Ports| {
        if ports.is_all() {
            return vec![all_of(proto)];
        }
        let range = |range: &crate::model::PortRange| {
            traffic_key(proto, range.first())..traffic_key(proto, range.last()) + 1
        };
        ports.ranges().iter().map(range).collect()
    };
    let icmp = |proto: u8, of: IcmpMatch| match of {
        IcmpMatch::Any => vec![all_of(proto)],
        IcmpMatch::Type(icmp_type) => {
            let first = traffic_key(proto, u16::from(icmp_type) << 8);
            vec![first..first + 0x100]
        }
        IcmpMatch::Code(icmp_type, code) => {
            let key = traffic_key(proto, u16::from_be_bytes([icmp_type, code]));
            vec![key..key + 1]
        }
    };
    match protocol {
        Protocol::Any => vec![0..KEYS],
        Protocol::Tcp(of) => ports(Protocol::TCP, of),
        Protocol::Udp(of) => ports(Protocol::UDP, of),
        Protocol::Icmp(of) => icmp(Protocol::ICMP, *of),
        Protocol::Icmpv6(of) => icmp(Protocol::ICMPV6, *of),
        Protocol::Number(number) => vec![all_of(*number)],
    }
}

/// What a side says over all traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    AllowsAll,
    DeniesAll,
    Mixed,
}

/// All distinct programs, as the words the kernel reads.
pub(super) struct Store {
    pub(super) words: Vec<u32>,
    known: HashMap<Program, u32>,
    said: HashMap<u32, Said>,
    sides: HashMap<Vec<u32>, Side>,
}

/// There is no room for a program.
pub(super) struct OverBudget;

impl Store {
    pub(super) fn new() -> Self {
        Self { words: vec![0], known: HashMap::new(), said: HashMap::new(), sides: HashMap::new() }
    }

    /// Where a program begins; 0 = it says nothing. Equal programs are there once.
    pub(super) fn add(&mut self, program: Program) -> Result<u32, OverBudget> {
        if program == [interval(0, NOTHING)] {
            return Ok(0);
        }
        if let Some(at) = self.known.get(&program) {
            return Ok(*at);
        }
        if program.len() > MAX_INTERVALS {
            return Err(OverBudget);
        }
        let left = PAGE_WORDS - self.words.len() % PAGE_WORDS;
        if left <= program.len() {
            self.words.resize(self.words.len() + left, 0);
        }
        if self.words.len() + 1 + program.len() > PAGE_WORDS * PAGES as usize {
            return Err(OverBudget);
        }
        let at = self.words.len() as u32;
        self.words.push(program.len() as u32);
        self.words.extend_from_slice(&program);
        self.said.insert(at, Said::of(&program));
        self.known.insert(program, at);
        Ok(at)
    }

    fn program(&self, at: u32) -> &[u32] {
        if at == 0 {
            return const { &[interval(0, NOTHING)] };
        }
        let len = self.words[at as usize] as usize;
        &self.words[at as usize + 1..][..len]
    }

    /// What several groups say together, in their order; what none says anything of is denied.
    pub(super) fn side(&mut self, programs: &[u32]) -> Side {
        // Most are told by the first group that says anything: what it says stands.
        let Some(place) = programs.iter().position(|at| *at != 0) else { return Side::DeniesAll };
        let programs = &programs[place..];
        match self.said[&programs[0]] {
            Said { allow: true, deny: true, .. } => return Side::Mixed,
            Said { allow: true, nothing: false, .. } => return Side::AllowsAll,
            Said { deny: true, nothing: false, .. } => return Side::DeniesAll,
            _ => {}
        }
        if let Some(side) = self.sides.get(programs) {
            return *side;
        }
        let mut whole = self.program(programs[0]).to_vec();
        for next in &programs[1..] {
            whole = overlay(&whole, self.program(*next));
        }
        let side = match Said::of(&whole) {
            Said { allow: true, deny: false, nothing: false } => Side::AllowsAll,
            Said { allow: true, .. } => Side::Mixed,
            Said { allow: false, .. } => Side::DeniesAll,
        };
        self.sides.insert(programs.to_vec(), side);
        side
    }
}

/// What a program says anywhere.
#[derive(Clone, Copy)]
struct Said {
    allow: bool,
    deny: bool,
    nothing: bool,
}

impl Said {
    fn of(program: &[u32]) -> Self {
        let has = |what: u32| program.iter().any(|word| word & 0xff == what);
        Self { allow: has(ALLOW), deny: has(DENY), nothing: has(NOTHING) }
    }
}

/// What `upper` says, and where it says nothing, what `lower` says.
fn overlay(upper: &[u32], lower: &[u32]) -> Program {
    let (mut up, mut low) = (0, 0);
    let mut whole = Program::new();
    let mut last = None;
    let key = |word: Option<&u32>| word.map_or(KEYS, |word| word >> 8);
    loop {
        let at = (upper[up] >> 8).max(lower[low] >> 8);
        let says = match upper[up] & 0xff {
            NOTHING => lower[low] & 0xff,
            says => says,
        };
        if last != Some(says) {
            whole.push(interval(at, says));
            last = Some(says);
        }
        let (next_up, next_low) = (key(upper.get(up + 1)), key(lower.get(low + 1)));
        match next_up.min(next_low) {
            KEYS => return whole,
            next => {
                up += usize::from(next_up == next);
                low += usize::from(next_low == next);
            }
        }
    }
}

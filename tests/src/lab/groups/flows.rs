//! The VPC's memory: flows, fragments, and what a change does to them.

use std::{collections::HashMap, net::Ipv4Addr, time::Duration};

use eniway_policy::{
    model::{Groups, Membership},
    timeout,
};

use super::{
    packet::{ICMP, Packet, Part, Quote, TCP, Transport, UDP, flag},
    rules::{self, Members, Verdict, Why},
};

/// A VPC that has groups: it sees packets one after the other and says which of them pass.
#[derive(Clone, Debug, Default)]
pub struct Vpc {
    groups: Groups,
    members: Members,
    flows: HashMap<Key, Flow>,
    /// What became of the first fragments, by what all fragments of a datagram share.
    fates: HashMap<(Ipv4Addr, Ipv4Addr, u8, u16), Verdict>,
    /// By how much flows end before their time.
    early: Duration,
}

/// What the packets of a flow have in common. Where they go both ways, the lesser end comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    /// TCP and UDP.
    Ports { proto: u8, ends: [(Ipv4Addr, u16); 2] },
    /// A query of ICMP and its answers.
    Query { from: Ipv4Addr, to: Ipv4Addr, kind: u8, ident: u16 },
    /// All other protocols.
    Pair { proto: u8, ends: [Ipv4Addr; 2] },
}

#[derive(Clone, Debug)]
struct Flow {
    /// The packet that opened it.
    first: Packet,
    /// Whether the end that did not open it has sent something.
    answered: bool,
    /// Whether there was a FIN or an RST.
    closing: bool,
    seen: Duration,
}

/// What a packet is to its flow.
enum Role {
    /// It opens the flow, also over a standing one.
    Opens(Key),
    /// It belongs to the flow, and opens it where there is none.
    MayOpen(Key),
    /// It may belong to the flow, but opens none.
    Follows(Key),
    /// It belongs to no flow.
    Alone,
}

impl Vpc {
    /// A VPC whose flows end so much before their time.
    #[must_use]
    pub fn ending_early(self, early: Duration) -> Self {
        Self { early, ..self }
    }

    /// Sees a packet and says whether it passes. `now`: since any moment that stays the same; it never goes back.
    pub fn see(&mut self, now: Duration, packet: &Packet) -> Verdict {
        let datagram = (packet.src, packet.dst, packet.proto, packet.ident);
        match packet.part {
            Part::Whole => self.see_whole(now, packet),
            Part::First => {
                let fate = self.see_whole(now, packet);
                self.fates.insert(datagram, fate.clone());
                fate
            }
            Part::Later => self.fates.get(&datagram).cloned().unwrap_or(Verdict::Drop(Why::NoFirstFragment)),
        }
    }

    fn see_whole(&mut self, now: Duration, packet: &Packet) -> Verdict {
        let role = Role::of(packet);
        let early = self.early;
        if let Role::MayOpen(key) | Role::Follows(key) = role {
            match self.flows.get_mut(&key) {
                Some(flow) if flow.lives(now + early) => {
                    flow.note(now, packet);
                    return Verdict::Pass;
                }
                _ => {
                    self.flows.remove(&key);
                }
            }
        }
        let verdict = rules::judge(&self.groups, &self.members, packet);
        if let (Verdict::Pass, Role::Opens(key) | Role::MayOpen(key)) = (&verdict, role) {
            let mut flow = Flow { first: *packet, answered: false, closing: false, seen: now };
            flow.note(now, packet);
            self.flows.insert(key, flow);
        }
        verdict
    }

    /// Replaces all groups. Flows that the new ones would not let open are over.
    pub fn set_groups(&mut self, groups: Groups) {
        self.groups = groups;
        self.judge_again();
    }

    /// Says which groups the pod with this address has; as [`set_groups`](Self::set_groups) for the flows.
    pub fn set_member(&mut self, address: Ipv4Addr, membership: Membership) {
        self.members.insert(address, membership);
        self.judge_again();
    }

    /// The pod with this address is gone, or has no rules from here on; its flows are over.
    pub fn remove_member(&mut self, address: Ipv4Addr) {
        self.members.remove(&address);
        self.flows.retain(|_, flow| flow.first.src != address && flow.first.dst != address);
        self.fates.retain(|(src, dst, ..), _| *src != address && *dst != address);
        self.judge_again();
    }

    /// Forgets all flows between two addresses.
    pub fn forget_between(&mut self, a: Ipv4Addr, b: Ipv4Addr) {
        self.flows.retain(|_, flow| ![(a, b), (b, a)].contains(&(flow.first.src, flow.first.dst)));
    }

    /// The groups.
    pub const fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Who has which groups.
    pub const fn members(&self) -> &Members {
        &self.members
    }

    /// Forgets what is over, for a VPC that runs long.
    pub fn tidy(&mut self, now: Duration) {
        let early = self.early;
        self.flows.retain(|_, flow| flow.lives(now + early));
        self.fates.clear();
    }

    fn judge_again(&mut self) {
        let Self { groups, members, flows, .. } = self;
        flows.retain(|_, flow| rules::judge(groups, members, &flow.first) == Verdict::Pass);
    }
}

impl Flow {
    fn note(&mut self, now: Duration, packet: &Packet) {
        self.seen = now;
        // An error is seen of the flow, but is no answer.
        let error = matches!(packet.transport, Transport::Icmp { quote: Some(_), .. });
        self.answered |= packet.src != self.first.src && !error;
        if let Transport::Tcp { flags, .. } = packet.transport {
            self.closing |= flags & (flag::FIN | flag::RST) != 0;
        }
    }

    fn lives(&self, now: Duration) -> bool {
        let limit = match self.first.proto {
            TCP if self.answered && !self.closing => timeout::TCP_ESTABLISHED,
            TCP => timeout::TCP_TRANSITORY,
            ICMP => timeout::ICMP,
            _ => timeout::UDP,
        };
        now.saturating_sub(self.seen) < Duration::from_secs(limit.into())
    }
}

impl Role {
    fn of(packet: &Packet) -> Self {
        let Packet { src, dst, proto, .. } = *packet;
        match packet.transport {
            Transport::Tcp { src: sport, dst: dport, flags } => {
                let key = Key::ports(proto, (src, sport), (dst, dport));
                match flags & (flag::SYN | flag::ACK | flag::RST) {
                    flag::SYN => Self::Opens(key),
                    flags if flags & flag::RST != 0 => Self::Follows(key),
                    _ => Self::MayOpen(key),
                }
            }
            Transport::Udp { src: sport, dst: dport } => {
                Self::MayOpen(Key::ports(proto, (src, sport), (dst, dport)))
            }
            Transport::Icmp { quote: Some(quote), .. } => {
                let theirs = quote.src == dst && quote.dst == src;
                Key::quoted(&quote).filter(|_| theirs).map_or(Self::Alone, Self::Follows)
            }
            Transport::Icmp { kind, ident, .. } if proto == ICMP => match kind {
                8 | 13 | 15 => Self::MayOpen(Key::Query { from: src, to: dst, kind, ident }),
                0 | 14 | 16 => Self::Follows(Key::answered(src, dst, kind, ident)),
                _ => Self::Alone,
            },
            _ => Self::MayOpen(Key::pair(proto, src, dst)),
        }
    }
}

impl Key {
    fn ports(proto: u8, a: (Ipv4Addr, u16), b: (Ipv4Addr, u16)) -> Self {
        Self::Ports { proto, ends: [a.min(b), a.max(b)] }
    }

    fn pair(proto: u8, a: Ipv4Addr, b: Ipv4Addr) -> Self {
        Self::Pair { proto, ends: [a.min(b), a.max(b)] }
    }

    /// The query that an answer from `src` is for.
    fn answered(src: Ipv4Addr, dst: Ipv4Addr, kind: u8, ident: u16) -> Self {
        let kind = match kind {
            0 => 8,
            answer => answer - 1,
        };
        Self::Query { from: dst, to: src, kind, ident }
    }

    /// The flow of a quoted packet.
    fn quoted(quote: &Quote) -> Option<Self> {
        let Quote { src, dst, proto, start } = *quote;
        let start = start?;
        let word = |at: usize| u16::from_be_bytes([start[at], start[at + 1]]);
        match proto {
            TCP | UDP => Some(Self::ports(proto, (src, word(0)), (dst, word(2)))),
            ICMP => match start[0] {
                kind @ (8 | 13 | 15) => Some(Self::Query { from: src, to: dst, kind, ident: word(4) }),
                kind @ (0 | 14 | 16) => Some(Self::answered(src, dst, kind, word(4))),
                _ => None,
            },
            _ => Some(Self::pair(proto, src, dst)),
        }
    }
}

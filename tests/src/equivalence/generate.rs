//! Cases by chance. Everything is drawn from small pools, so that rules overlap, ports are used again, and flows meet.

use std::{collections::BTreeSet, net::Ipv4Addr};

use eniway_policy::model::{
    Action, AddressGroup, Direction, GroupId, GroupList, Groups, IcmpMatch, PortRange, Ports, Priority,
    Protocol, Remote, Rule, SecurityGroup,
};

use super::{Case, Pod, Step};
use crate::{
    dice::Dice,
    lab::groups::{
        Packet,
        packet::{ICMP, Part, Quote, TCP, Transport, UDP, flag},
    },
};

/// How much there is of a case.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Flows.
    pub flows: usize,
    /// Whether time passes in great steps.
    pub waits: bool,
    /// Whether rules and pods change.
    pub changes: bool,
}

/// The addresses of the pods of every case.
pub const PODS: [Ipv4Addr; 4] = [
    Ipv4Addr::new(10, 1, 16, 10),
    Ipv4Addr::new(10, 1, 16, 200),
    Ipv4Addr::new(10, 1, 17, 20),
    Ipv4Addr::new(10, 1, 18, 30),
];
const GROUPS: [&str; 6] = ["g0", "g1", "g2", "g3", "g4", "g5"];
const ADDRESS_GROUPS: [&str; 3] = ["x0", "x1", "x2"];
const PREFIXES: [&str; 13] = [
    "0.0.0.0/0",
    "10.1.0.0/16",
    "10.1.16.0/22",
    "10.1.16.0/24",
    "10.1.16.0/25",
    "10.1.16.128/25",
    "10.1.17.0/24",
    "10.1.16.10/32",
    "10.1.16.200/32",
    "10.1.17.20/32",
    "10.1.18.30/32",
    "192.0.2.0/24",
    "::/0",
];
const PORTS: [u16; 10] = [53, 80, 443, 8080, 1, 65_535, 4000, 4001, 4002, 0];
const PRIORITIES: [u64; 6] = [1, 1, 2, 50, 99, 100];
const IDENTS: [u16; 3] = [7, 8, 9];
/// Seconds that pass at once: well within all time-outs, between them, beyond all.
const WAITS: [u32; 6] = [1, 5, 30, 100, 300, 8000];
/// One in so many packets comes with a change before it.
const CHANGE_EVERY: usize = 60;
const WAIT_EVERY: usize = 80;

impl Dice {
    /// A case.
    pub fn case(&mut self, size: Size) -> Case {
        let groups = self.groups();
        let mut hidden = BTreeSet::new();
        if self.percent(15) {
            let all: Vec<GroupId> =
                groups.security_groups.keys().chain(groups.address_groups.keys()).cloned().collect();
            hidden.insert(self.of(&all));
        }
        let pods = PODS.map(|address| {
            let list = if self.percent(4) { GroupList::default() } else { self.list() };
            Pod { address, list, stale: self.percent(3) }
        });
        let mut case = Case { groups, hidden, pods: pods.to_vec(), steps: Vec::new() };
        self.steps(&mut case, size);
        case
    }

    fn id(&mut self, of: &[&str]) -> GroupId {
        self.of(of).parse().expect("an id")
    }

    fn groups(&mut self) -> Groups {
        let mut groups = Groups { revision: 1, ..Groups::default() };
        // Of some, nearly everything is allowed, or flows would be rare.
        let kindness = self.of(&[20, 50, 80, 95, 95]);
        for id in GROUPS {
            let id: GroupId = id.parse().expect("an id");
            let count = self.of(&[0, 1, 2, 3, 5, 8, 12]);
            let mut rules: Vec<Rule> = (0..count).map(|_| self.rule(kindness)).collect();
            for direction in [Direction::Egress, Direction::Ingress] {
                if self.percent(kindness / 2) {
                    let priority = self.priority();
                    let (protocol, remote) = (Protocol::Any, Remote::Any);
                    rules.push(Rule { direction, action: Action::Allow, priority, protocol, remote });
                }
            }
            groups.security_groups.insert(id.clone(), SecurityGroup { id, rules });
        }
        for id in ADDRESS_GROUPS {
            let id: GroupId = id.parse().expect("an id");
            let count = self.below(4);
            let addresses = (0..count).map(|_| self.prefix()).collect();
            groups.address_groups.insert(id.clone(), AddressGroup { id, addresses });
        }
        groups
    }

    fn prefix(&mut self) -> ipnet::IpNet {
        self.of(&PREFIXES).parse().expect("a prefix")
    }

    fn priority(&mut self) -> Priority {
        self.of(&PRIORITIES).try_into().expect("a priority")
    }

    fn rule(&mut self, kindness: usize) -> Rule {
        let direction = self.of(&[Direction::Ingress, Direction::Egress]);
        let action = if self.percent(kindness) { Action::Allow } else { Action::Deny };
        let protocol = match self.below(10) {
            0 => Protocol::Any,
            1..=3 => Protocol::Tcp(self.ports()),
            4..=5 => Protocol::Udp(self.ports()),
            6..=7 => Protocol::Icmp(match self.below(4) {
                0 => IcmpMatch::Any,
                1 | 2 => IcmpMatch::Type(self.of(&[0, 3, 8, 8, 10, 13, 14])),
                _ => IcmpMatch::Code(self.of(&[0, 3, 8, 8, 13]), self.of(&[0, 0, 1])),
            }),
            8 => Protocol::Number(self.of(&[47, 47, 50, 132])),
            _ => Protocol::Icmpv6(IcmpMatch::Any),
        };
        let remote = match self.below(8) {
            0 | 1 => Remote::Any,
            2..=4 => Remote::Cidr(self.prefix()),
            5 | 6 => Remote::Group(self.id(&GROUPS)),
            _ => Remote::AddressGroup(self.id(&ADDRESS_GROUPS)),
        };
        Rule { direction, action, priority: self.priority(), protocol, remote }
    }

    fn ports(&mut self) -> Ports {
        let count = self.below(4);
        let range = |dice: &mut Self| {
            let (a, b) = (dice.of(&PORTS).max(1), dice.of(&PORTS).max(1));
            let last = if dice.percent(40) { a.max(b) } else { a };
            PortRange::new(a.min(last), last).expect("a range")
        };
        Ports::of((0..count).map(|_| range(self)).collect())
    }

    fn list(&mut self) -> GroupList {
        let mut ids: Vec<GroupId> = Vec::new();
        for _ in 0..self.of(&[1, 1, 2, 2, 3, 5]) {
            let id = self.id(&GROUPS);
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids.try_into().expect("a list")
    }

    /// Another version of the groups, and back again at times.
    fn changed(&mut self, groups: &Groups, first: &Groups) -> Groups {
        if self.percent(25) {
            return Groups { revision: groups.revision, ..first.clone() };
        }
        let mut groups = groups.clone();
        for _ in 0..self.of(&[1, 1, 2, 4]) {
            let new = self.rule(50);
            let which = self.id(&GROUPS);
            if self.percent(10) {
                let prefix = self.prefix();
                let group = self.id(&ADDRESS_GROUPS);
                let addresses = &mut groups.address_groups.get_mut(&group).expect("a group").addresses;
                if !addresses.remove(&prefix) {
                    addresses.insert(prefix);
                }
                continue;
            }
            let rules = &mut groups.security_groups.get_mut(&which).expect("a group").rules;
            match self.below(3) {
                0 => rules.push(new),
                _ if rules.is_empty() => rules.push(new),
                1 => {
                    rules.remove(self.below(rules.len()));
                }
                _ => {
                    let at = self.below(rules.len());
                    rules[at].action = match rules[at].action {
                        Action::Allow => Action::Deny,
                        Action::Deny => Action::Allow,
                    };
                }
            }
        }
        groups
    }

    fn steps(&mut self, case: &mut Case, size: Size) {
        let mut left = size.flows;
        let mut running: Vec<std::vec::IntoIter<(Packet, u16)>> = Vec::new();
        let mut groups = case.groups.clone();
        while left > 0 || !running.is_empty() {
            let together = self.of(&[1, 3, 6]);
            while left > 0 && running.len() < together {
                running.push(self.flow().into_iter());
                left -= 1;
            }
            let which = self.below(running.len());
            let Some((packet, more)) = running[which].next() else {
                running.swap_remove(which);
                continue;
            };
            if size.changes && self.below(CHANGE_EVERY) == 0 {
                let pod = self.below(PODS.len());
                let step = match self.below(6) {
                    0 => Step::List(pod, self.list()),
                    1 => Step::Replace(pod, self.list()),
                    _ => {
                        groups = self.changed(&groups, &case.groups);
                        Step::Groups(groups.clone())
                    }
                };
                case.steps.push(step);
            }
            if size.waits && self.below(WAIT_EVERY) == 0 {
                case.steps.push(Step::Wait(self.of(&WAITS)));
            }
            case.steps.push(Step::Send(packet, more));
        }
    }

    /// The packets of one flow, between two pods.
    fn flow(&mut self) -> Vec<(Packet, u16)> {
        let a = self.below(PODS.len());
        let b = (a + 1 + self.below(PODS.len() - 1)) % PODS.len();
        let ends = (PODS[a], PODS[b]);
        let ports = (self.of(&PORTS), self.of(&PORTS));
        let mut packets = match self.below(20) {
            0..=6 => self.tcp(ends, ports),
            7..=10 => self.udp(ends, ports),
            11..=13 => self.icmp_query(ends),
            14 => self.icmp_other(ends),
            15 | 16 => self.other(ends),
            _ => self.fragments(ends, ports),
        };
        // Somebody reports an error about one of them, mostly the right one.
        if self.percent(20) && !packets.is_empty() {
            let about = self.below(packets.len());
            let quoted = packets[about].0;
            if quoted.part != Part::Later
                && !matches!(quoted.transport, Transport::Icmp { quote: Some(_), .. })
            {
                let mut error = self.error(&quoted);
                if self.percent(10) {
                    error.0.src = self.of(&PODS);
                }
                if error.0.src != error.0.dst {
                    let at = self.below(packets.len() + 1);
                    packets.insert(at, error);
                }
            }
        }
        packets
    }

    fn payload(&mut self) -> u16 {
        self.of(&[0, 0, 0, 32, 1200, 1400])
    }

    fn tcp(&mut self, (a, b): (Ipv4Addr, Ipv4Addr), (sport, dport): (u16, u16)) -> Vec<(Packet, u16)> {
        use flag::{ACK, FIN, RST, SYN};
        let there = |flags| packet(a, b, TCP, Transport::Tcp { src: sport, dst: dport, flags });
        let back = |flags| packet(b, a, TCP, Transport::Tcp { src: dport, dst: sport, flags });
        let mut all = vec![there(SYN), back(SYN | ACK), there(ACK)];
        for _ in 0..self.below(4) {
            all.push(if self.percent(50) { there(ACK) } else { back(ACK) });
        }
        match self.below(6) {
            0 => all.extend([there(FIN | ACK), back(FIN | ACK), there(ACK)]),
            1 => all.extend([back(FIN | ACK), there(ACK), back(ACK)]),
            2 => all.push(there(RST)),
            3 => all.extend([back(RST | ACK), there(ACK)]),
            _ => {}
        }
        match self.below(10) {
            // Older than everybody's memory.
            0 | 1 => drop(all.drain(..2)),
            // Both at once.
            2 => all.insert(1, back(SYN)),
            // The other end opens, over the standing one.
            3 => all.push(back(SYN)),
            4 => all.push(there(SYN)),
            5 => all.insert(0, back(self.of(&[ACK, RST, SYN | ACK, FIN | ACK]))),
            _ => {}
        }
        let with_data = |dice: &mut Self, packet: Packet| {
            let opens = matches!(packet.transport, Transport::Tcp { flags, .. } if flags & (SYN | RST) != 0);
            (packet, if opens { 0 } else { dice.payload() })
        };
        all.into_iter().map(|packet| with_data(self, packet)).collect()
    }

    fn udp(&mut self, (a, b): (Ipv4Addr, Ipv4Addr), (sport, dport): (u16, u16)) -> Vec<(Packet, u16)> {
        let there = packet(a, b, UDP, Transport::Udp { src: sport, dst: dport });
        let back = packet(b, a, UDP, Transport::Udp { src: dport, dst: sport });
        self.talk(there, back)
    }

    fn other(&mut self, (a, b): (Ipv4Addr, Ipv4Addr)) -> Vec<(Packet, u16)> {
        let proto = self.of(&[47, 47, 50, 132]);
        self.talk(packet(a, b, proto, Transport::None), packet(b, a, proto, Transport::None))
    }

    /// A few packets, mostly beginning in one direction.
    fn talk(&mut self, there: Packet, back: Packet) -> Vec<(Packet, u16)> {
        let count = 1 + self.below(5);
        let first = if self.percent(85) { there } else { back };
        let rest: Vec<_> = (1..count).map(|_| if self.percent(40) { there } else { back }).collect();
        std::iter::once(first).chain(rest).map(|packet| (packet, self.payload())).collect()
    }

    fn icmp_query(&mut self, (a, b): (Ipv4Addr, Ipv4Addr)) -> Vec<(Packet, u16)> {
        let (query, answer) = self.of(&[(8, 0), (8, 0), (13, 14), (15, 16)]);
        let ident = self.of(&IDENTS);
        let message =
            |src, dst, kind| packet(src, dst, ICMP, Transport::Icmp { kind, code: 0, ident, quote: None });
        let (there, back) = (message(a, b, query), message(b, a, answer));
        let mut all = Vec::new();
        for _ in 0..=self.below(3) {
            all.extend([there, back]);
        }
        match self.below(8) {
            // Nobody asked.
            0 => drop(all.remove(0)),
            1 => all.insert(0, message(b, a, query)),
            2 => all.push(message(a, b, answer)),
            3 => all.push(message(b, a, 0)),
            _ => {}
        }
        all.into_iter().map(|packet| (packet, self.of(&[0, 56]))).collect()
    }

    fn icmp_other(&mut self, (a, b): (Ipv4Addr, Ipv4Addr)) -> Vec<(Packet, u16)> {
        let kind = self.of(&[10, 10, 17, 30, 42]);
        let transport = Transport::Icmp { kind, code: self.of(&[0, 1]), ident: 0, quote: None };
        vec![(packet(a, b, ICMP, transport), 0), (packet(b, a, ICMP, transport), 0)]
    }

    fn fragments(&mut self, ends: (Ipv4Addr, Ipv4Addr), ports: (u16, u16)) -> Vec<(Packet, u16)> {
        let mut whole = match self.below(4) {
            0 => self.tcp(ends, ports),
            1 => self.icmp_query(ends),
            _ => self.udp(ends, ports),
        };
        whole.truncate(3);
        let mut all = Vec::new();
        for (packet, more) in whole {
            let ident = 0x100 + self.below(0xf000) as u16;
            let first = Packet { part: Part::First, ident, ..packet };
            let later = Packet { part: Part::Later, ident, transport: Transport::None, ..packet };
            match self.below(6) {
                0 => all.extend([(later, 8), (first, more), (later, 8)]),
                1 => all.push((later, 8)),
                2 => all.push((packet, more)),
                _ => all.extend([(first, more), (later, 8)]),
            }
        }
        all
    }

    fn error(&mut self, about: &Packet) -> (Packet, u16) {
        let mut start = [0; 8];
        match about.transport {
            Transport::Tcp { src, dst, .. } | Transport::Udp { src, dst } => {
                start[..2].copy_from_slice(&src.to_be_bytes());
                start[2..4].copy_from_slice(&dst.to_be_bytes());
            }
            Transport::Icmp { kind, code, ident, .. } => {
                start[..2].copy_from_slice(&[kind, code]);
                start[4..6].copy_from_slice(&ident.to_be_bytes());
            }
            Transport::None => {}
        }
        let quote = Quote { src: about.src, dst: about.dst, proto: about.proto, start: Some(start) };
        let (kind, code) = self.of(&[(3, 1), (3, 3), (3, 0), (4, 0), (11, 0), (12, 0)]);
        let transport = Transport::Icmp { kind, code, ident: 0, quote: Some(quote) };
        (packet(about.dst, about.src, ICMP, transport), 0)
    }
}

fn packet(src: Ipv4Addr, dst: Ipv4Addr, proto: u8, transport: Transport) -> Packet {
    Packet { src, dst, proto, ident: 0, part: Part::Whole, transport }
}

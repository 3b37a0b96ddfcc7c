//! What the rules say of one packet, rule by rule: for people.

use std::{fmt, net::IpAddr};

use crate::{
    compile::PodFacts,
    model::{Action, Direction, GroupId, Groups, IcmpMatch, Protocol, Remote, Rule},
};

/// Traffic by its first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// IP protocol number.
    pub proto: u8,
    /// Destination port; type × 256 + code for ICMP; 0 for other protocols.
    pub port: u16,
}

/// A rule and what it says of the traffic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its group.
    pub group: GroupId,
    /// The rule.
    pub rule: Rule,
    /// Why it says nothing; `None`: it matches, and decides.
    pub passes: Option<String>,
}

/// What one side says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Side {
    /// The rules that were asked, in their order. The last one decides, if it matches.
    pub lines: Vec<Line>,
    /// Whether the side allows the traffic.
    pub allowed: bool,
}

/// Asks the rules of `own`, which must be decidable, about traffic with `peer`.
pub fn explain(
    groups: &Groups,
    own: &PodFacts,
    peer: &PodFacts,
    direction: Direction,
    traffic: Traffic,
) -> Side {
    let address = peer.ipv4.map(IpAddr::V4).or(peer.ipv6.map(IpAddr::V6));
    let mut lines = Vec::new();
    for id in own.membership.groups.as_slice() {
        let Some(group) = groups.security_groups.get(id) else { continue };
        let mut rules: Vec<&Rule> = group.rules.iter().filter(|rule| rule.direction == direction).collect();
        rules.sort_by_key(|rule| (rule.priority, rule.action));
        for rule in rules {
            let passes = other_traffic(&rule.protocol, traffic)
                .or_else(|| other_remote(groups, &rule.remote, peer, address));
            let decides = passes.is_none();
            lines.push(Line { group: id.clone(), rule: rule.clone(), passes });
            if decides {
                return Side { lines, allowed: rule.action == Action::Allow };
            }
        }
    }
    Side { lines, allowed: false }
}

fn other_traffic(protocol: &Protocol, traffic: Traffic) -> Option<String> {
    let [icmp_type, code] = traffic.port.to_be_bytes();
    let (number, fits) = match protocol {
        Protocol::Any => return None,
        Protocol::Tcp(ports) => (Protocol::TCP, ports.holds(traffic.port)),
        Protocol::Udp(ports) => (Protocol::UDP, ports.holds(traffic.port)),
        Protocol::Icmp(of) => (Protocol::ICMP, of.holds(icmp_type, code)),
        Protocol::Icmpv6(of) => (Protocol::ICMPV6, of.holds(icmp_type, code)),
        Protocol::Number(number) => (*number, true),
    };
    if number != traffic.proto {
        Some("another protocol".to_owned())
    } else if fits {
        None
    } else if matches!(protocol, Protocol::Icmp(_) | Protocol::Icmpv6(_)) {
        Some("another type or code".to_owned())
    } else {
        Some("another port".to_owned())
    }
}

fn other_remote(
    groups: &Groups,
    remote: &Remote,
    peer: &PodFacts,
    address: Option<IpAddr>,
) -> Option<String> {
    let (covered, what) = match remote {
        Remote::Any => return None,
        Remote::Cidr(prefix) => {
            (address.is_some_and(|address| prefix.contains(&address)), "the other pod's address is not in it")
        }
        Remote::Group(id) => {
            (peer.membership.groups.as_slice().contains(id), "the other pod is not in that group")
        }
        Remote::AddressGroup(id) => {
            let group = groups.address_groups.get(id);
            let holds = |address| group.is_some_and(|group| group.holds(address));
            (address.is_some_and(holds), "the other pod's address is not in that address group")
        }
    };
    if covered { None } else { Some(what.to_owned()) }
}

impl IcmpMatch {
    /// Whether a message is one of these.
    pub const fn holds(self, icmp_type: u8, code: u8) -> bool {
        match self {
            Self::Any => true,
            Self::Type(only) => only == icmp_type,
            Self::Code(only, only_code) => only == icmp_type && only_code == code,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let icmp = |f: &mut fmt::Formatter<'_>, name: &str, of: &IcmpMatch| match of {
            IcmpMatch::Any => f.write_str(name),
            IcmpMatch::Type(icmp_type) => write!(f, "{name} type {icmp_type}"),
            IcmpMatch::Code(icmp_type, code) => write!(f, "{name} type {icmp_type} code {code}"),
        };
        match self {
            Self::Any => f.write_str("any protocol"),
            Self::Tcp(ports) if ports.is_all() => f.write_str("tcp"),
            Self::Tcp(ports) => write!(f, "tcp {ports}"),
            Self::Udp(ports) if ports.is_all() => f.write_str("udp"),
            Self::Udp(ports) => write!(f, "udp {ports}"),
            Self::Icmp(of) => icmp(f, "icmp", of),
            Self::Icmpv6(of) => icmp(f, "icmpv6", of),
            Self::Number(Self::GRE) => f.write_str("gre"),
            Self::Number(number) => write!(f, "protocol {number}"),
        }
    }
}

impl fmt::Display for Rule {
    /// `allow tcp 80 from 10.0.0.0/8, priority 1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let action = match self.action {
            Action::Allow => "allow",
            Action::Deny => "deny",
        };
        let way = match self.direction {
            Direction::Ingress => "from",
            Direction::Egress => "to",
        };
        write!(f, "{action} {} {way} ", self.protocol)?;
        match &self.remote {
            Remote::Any => f.write_str("everybody")?,
            Remote::Cidr(prefix) => write!(f, "{prefix}")?,
            Remote::Group(id) => write!(f, "group {id}")?,
            Remote::AddressGroup(id) => write!(f, "address group {id}")?,
        }
        write!(f, ", priority {}", self.priority.get())
    }
}

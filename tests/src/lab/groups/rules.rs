//! What the rules alone say of a packet, group by group and rule by rule, as the page of `eniway-policy` puts it.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr},
};

use eniway_policy::model::{
    Action, Direction, GroupId, GroupList, Groups, IcmpMatch, Membership, Protocol, Remote, Rule,
};

use super::packet::{ICMP, ICMPV6, Packet, TCP, Transport, UDP};

/// The answer to a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It passes.
    Pass,
    /// It does not.
    Drop(Why),
    /// Nobody can say.
    Undecidable(Why),
}

/// Why a packet does not simply pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// A rule of this pod and group denies it.
    Rule(Ipv4Addr, GroupId, Box<Rule>),
    /// No rule of this pod in this direction matches.
    NoRule(Ipv4Addr, Direction),
    /// A fragment whose first one was not seen.
    NoFirstFragment,
    /// The pod has no groups.
    NoGroups(Ipv4Addr),
    /// The pod has a group, or one of its groups names an address group, that is not known.
    UnknownGroup(Ipv4Addr, GroupId),
    /// The groups are older than the pod asks for.
    Stale(Ipv4Addr),
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(pod, group, rule) => write!(f, "{group} of {pod}: {rule:?}"),
            Self::NoRule(pod, direction) => write!(f, "no rule of {pod} matches ({direction:?})"),
            Self::NoFirstFragment => f.write_str("a fragment without its first one"),
            Self::NoGroups(pod) => write!(f, "{pod} has no groups"),
            Self::UnknownGroup(pod, group) => write!(f, "{group} of {pod} is not known"),
            Self::Stale(pod) => write!(f, "the groups are older than {pod} asks for"),
        }
    }
}

/// Who has which groups, by address. Whoever is not there is no pod: there are no rules on its side.
pub type Members = BTreeMap<Ipv4Addr, Membership>;

/// Judges a packet as the first of its flow, by the rules of both ends.
pub fn judge(groups: &Groups, members: &Members, packet: &Packet) -> Verdict {
    let ends = [(packet.src, Direction::Egress, packet.dst), (packet.dst, Direction::Ingress, packet.src)];
    let verdicts = ends.map(|(pod, direction, remote)| match members.get(&pod) {
        None => Verdict::Pass,
        Some(membership) => {
            let remote_groups = members.get(&remote).map(|remote| &remote.groups);
            side(groups, (pod, membership), direction, (remote, remote_groups), packet)
        }
    });
    match verdicts {
        [Verdict::Drop(why), _] | [_, Verdict::Drop(why)] => Verdict::Drop(why),
        [Verdict::Undecidable(why), _] | [_, Verdict::Undecidable(why)] => Verdict::Undecidable(why),
        [Verdict::Pass, Verdict::Pass] => Verdict::Pass,
    }
}

/// What the rules of one end say.
fn side(
    groups: &Groups,
    (pod, membership): (Ipv4Addr, &Membership),
    direction: Direction,
    remote: (Ipv4Addr, Option<&GroupList>),
    packet: &Packet,
) -> Verdict {
    if membership.groups.is_empty() {
        return Verdict::Undecidable(Why::NoGroups(pod));
    }
    if groups.revision < membership.revision {
        return Verdict::Undecidable(Why::Stale(pod));
    }
    if let Some(unknown) = unknown(groups, &membership.groups) {
        return Verdict::Undecidable(Why::UnknownGroup(pod, unknown.clone()));
    }
    for id in membership.groups.as_slice() {
        let rules = groups.security_groups[id].rules.iter();
        let matching = rules.filter(|rule| {
            rule.direction == direction
                && names(&rule.protocol, packet)
                && covers(groups, &rule.remote, remote)
        });
        let order = |rule: &&Rule| (rule.priority.get(), rule.action == Action::Allow);
        match matching.min_by_key(order) {
            Some(rule) if rule.action == Action::Allow => return Verdict::Pass,
            Some(rule) => return Verdict::Drop(Why::Rule(pod, id.clone(), Box::new(rule.clone()))),
            None => {}
        }
    }
    Verdict::Drop(Why::NoRule(pod, direction))
}

/// The first group of the list, or address group of its rules, that is not known.
fn unknown<'g>(groups: &'g Groups, list: &'g GroupList) -> Option<&'g GroupId> {
    for id in list.as_slice() {
        let Some(group) = groups.security_groups.get(id) else { return Some(id) };
        for rule in &group.rules {
            if let Remote::AddressGroup(id) = &rule.remote
                && !groups.address_groups.contains_key(id)
            {
                return Some(id);
            }
        }
    }
    None
}

/// Whether the packet is of a protocol, ports or types.
fn names(protocol: &Protocol, packet: &Packet) -> bool {
    match (protocol, packet.transport) {
        (Protocol::Any, _) => true,
        (Protocol::Tcp(ports), Transport::Tcp { dst, .. }) => packet.proto == TCP && ports.holds(dst),
        (Protocol::Udp(ports), Transport::Udp { dst, .. }) => packet.proto == UDP && ports.holds(dst),
        (Protocol::Icmp(what), Transport::Icmp { kind, code, .. }) => {
            packet.proto == ICMP && names_icmp(*what, kind, code)
        }
        (Protocol::Icmpv6(what), Transport::Icmp { kind, code, .. }) => {
            packet.proto == ICMPV6 && names_icmp(*what, kind, code)
        }
        (Protocol::Number(number), _) => packet.proto == *number,
        _ => false,
    }
}

fn names_icmp(what: IcmpMatch, kind: u8, code: u8) -> bool {
    match what {
        IcmpMatch::Any => true,
        IcmpMatch::Type(wanted) => kind == wanted,
        IcmpMatch::Code(wanted, wanted_code) => (kind, code) == (wanted, wanted_code),
    }
}

/// Whether a rule's remote covers the other end.
fn covers(groups: &Groups, remote: &Remote, (address, list): (Ipv4Addr, Option<&GroupList>)) -> bool {
    match remote {
        Remote::Any => true,
        Remote::Cidr(prefix) => prefix.contains(&IpAddr::V4(address)),
        Remote::Group(id) => list.is_some_and(|list| list.as_slice().contains(id)),
        Remote::AddressGroup(id) => {
            groups.address_groups.get(id).is_some_and(|group| group.holds(IpAddr::V4(address)))
        }
    }
}

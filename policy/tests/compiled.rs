//! The compiled tables, judged by as the kernel does it, against rules read one by one as the page of the crate says.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use datapath_common::{
    abi::policy::{Verdict, traffic_key},
    decide::policy::{allows, verdict},
    testing::MemoryRules,
};
use eniway_policy::{
    compile::{Compiled, Family, PodFacts, Tables, Undecidable, compile},
    model::{
        Action, AddressGroup, Direction, GroupId, Groups, IcmpMatch, Membership, PortRange, Ports, Priority,
        Protocol, Remote, Rule, SecurityGroup,
    },
};
use proptest::{collection::vec, prelude::*};

fn id(name: &str) -> GroupId {
    name.parse().expect("what the test made")
}

fn sg(n: usize) -> GroupId {
    id(&format!("sg-{n}"))
}

fn ag(n: usize) -> GroupId {
    id(&format!("ag-{n}"))
}

const GROUPS: usize = 6;
const ADDRESS_GROUPS: usize = 2;

// Few values, close to each other: rules meet and overlap.
fn ports() -> impl Strategy<Value = Ports> {
    let range =
        prop_oneof![(78u16..84).prop_map(|p| (p, p)), (1u16..90, 0u16..40).prop_map(|(p, n)| (p, p + n))];
    prop_oneof![
        1 => Just(Ports::ALL),
        3 => vec(range, 1..4).prop_map(|list| {
            Ports::of(list.into_iter().map(|(first, last)| PortRange::new(first, last).expect("what the test made")).collect())
        }),
    ]
}

fn icmp() -> impl Strategy<Value = IcmpMatch> {
    prop_oneof![
        Just(IcmpMatch::Any),
        (prop_oneof![Just(0u8), Just(3), Just(8)]).prop_map(IcmpMatch::Type),
        (prop_oneof![Just(0u8), Just(3), Just(8)], 0u8..3).prop_map(|(t, c)| IcmpMatch::Code(t, c)),
    ]
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![
        2 => Just(Protocol::Any),
        4 => ports().prop_map(Protocol::Tcp),
        2 => ports().prop_map(Protocol::Udp),
        1 => icmp().prop_map(Protocol::Icmp),
        1 => icmp().prop_map(Protocol::Icmpv6),
        1 => Just(Protocol::Number(Protocol::GRE)),
    ]
}

fn remote() -> impl Strategy<Value = Remote> {
    let prefix = prop_oneof![
        Just("10.1.0.0/16"),
        Just("10.1.0.0/30"),
        Just("10.1.0.2/32"),
        Just("0.0.0.0/0"),
        Just("10.2.0.0/16"),
        Just("2001:db8::/64"),
        Just("2001:db8::2/128"),
        Just("::/0"),
    ];
    prop_oneof![
        2 => Just(Remote::Any),
        3 => prefix.prop_map(|text| Remote::Cidr(text.parse().expect("what the test made"))),
        // One group more than there is: nobody who can be judged is in it.
        3 => (0..=GROUPS).prop_map(|n| Remote::Group(sg(n))),
        1 => (0..ADDRESS_GROUPS).prop_map(|n| Remote::AddressGroup(ag(n))),
    ]
}

fn rule() -> impl Strategy<Value = Rule> {
    (
        prop_oneof![Just(Direction::Ingress), Just(Direction::Egress)],
        prop_oneof![1 => Just(Action::Deny), 3 => Just(Action::Allow)],
        1u64..5,
        protocol(),
        remote(),
    )
        .prop_map(|(direction, action, priority, protocol, remote)| Rule {
            direction,
            action,
            priority: Priority::try_from(priority).expect("what the test made"),
            protocol,
            remote,
        })
}

fn groups() -> impl Strategy<Value = Groups> {
    (vec(vec(rule(), 0..8), GROUPS), prop::bool::weighted(0.1)).prop_map(move |(lists, spoilt)| {
        let mut groups = Groups { revision: 5, ..Groups::default() };
        for (n, mut rules) in lists.into_iter().enumerate() {
            if n == 0
                && spoilt
                && let Some(rule) = rules.first_mut()
            {
                rule.remote = Remote::AddressGroup(ag(ADDRESS_GROUPS));
            }
            groups.security_groups.insert(sg(n), SecurityGroup { id: sg(n), rules });
        }
        let lists = [["10.1.0.1/32", "2001:db8::/127"], ["10.1.0.2/31", "10.2.0.0/16"]];
        for (n, list) in lists.iter().enumerate() {
            let addresses = list.iter().map(|text| text.parse().expect("what the test made")).collect();
            groups.address_groups.insert(ag(n), AddressGroup { id: ag(n), addresses });
        }
        groups
    })
}

fn pods() -> impl Strategy<Value = BTreeMap<u8, PodFacts>> {
    let list = prop::sample::subsequence((0..=GROUPS).collect::<Vec<_>>(), 0..=4).prop_shuffle();
    let pod = (list, prop_oneof![9 => Just(0u64), 1 => Just(6)], 0u32..4);
    vec(pod, 2..6).prop_map(|list| {
        list.into_iter()
            .zip(1u8..)
            .map(|((groups, revision, class), n)| {
                let groups: Vec<GroupId> = groups.into_iter().map(sg).collect();
                let pod = PodFacts {
                    ipv4: Some(Ipv4Addr::new(10, 1, 0, n)),
                    ipv6: Some(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n.into())),
                    membership: Membership {
                        groups: groups.try_into().expect("what the test made"),
                        revision,
                    },
                    class,
                };
                (n, pod)
            })
            .collect()
    })
}

fn traffic() -> impl Strategy<Value = (u8, u16)> {
    let icmp = |proto: u8| {
        (prop_oneof![Just(0u8), Just(3), Just(8)], 0u8..3)
            .prop_map(move |(t, c)| (proto, u16::from_be_bytes([t, c])))
    };
    prop_oneof![
        4 => prop_oneof![0u16..130, Just(u16::MAX)].prop_map(|port| (6, port)),
        2 => (0u16..130).prop_map(|port| (17, port)),
        1 => icmp(1),
        1 => icmp(58),
        1 => Just((47, 0)),
        1 => Just((50, 0)),
        1 => Just((255, 0)),
    ]
}

/// One side's rules, one by one.
fn side_allows(
    groups: &Groups,
    own: &PodFacts,
    peer: &PodFacts,
    direction: Direction,
    address: IpAddr,
    (proto, port): (u8, u16),
) -> bool {
    let matches = |rule: &Rule| {
        let [icmp_type, code] = port.to_be_bytes();
        let icmp = |of: IcmpMatch| match of {
            IcmpMatch::Any => true,
            IcmpMatch::Type(t) => t == icmp_type,
            IcmpMatch::Code(t, c) => (t, c) == (icmp_type, code),
        };
        let traffic = match &rule.protocol {
            Protocol::Any => true,
            Protocol::Tcp(ports) => proto == 6 && ports.holds(port),
            Protocol::Udp(ports) => proto == 17 && ports.holds(port),
            Protocol::Icmp(of) => proto == 1 && icmp(*of),
            Protocol::Icmpv6(of) => proto == 58 && icmp(*of),
            Protocol::Number(number) => proto == *number,
        };
        let covered = match &rule.remote {
            Remote::Any => true,
            Remote::Cidr(prefix) => prefix.contains(&address),
            Remote::Group(group) => peer.membership.groups.as_slice().contains(group),
            Remote::AddressGroup(group) => {
                groups.address_groups[group].addresses.iter().any(|prefix| prefix.contains(&address))
            }
        };
        rule.direction == direction && traffic && covered
    };
    for group in own.membership.groups.as_slice() {
        let matching = groups.security_groups[group].rules.iter().filter(|rule| matches(rule));
        if let Some(first) = matching.min_by_key(|rule| (rule.priority, rule.action)) {
            return first.action == Action::Allow;
        }
    }
    false
}

fn loaded(tables: &Tables) -> MemoryRules {
    let mut rules = MemoryRules::default();
    rules.epoch = 3;
    for (class, verdicts) in &tables.verdicts {
        rules.set_verdicts(*class, verdicts);
    }
    for (class, list) in &tables.lists {
        rules.set_class(*class, *list);
    }
    for ((group, egress), starts) in &tables.programs {
        rules.set_programs(*group, *egress, starts);
    }
    rules.set_words(&tables.words);
    rules
}

fn cannot_be_judged(groups: &Groups, pod: &PodFacts) -> bool {
    let list = pod.membership.groups.as_slice();
    let unknown_addresses = |id: &GroupId| {
        let unknown = |group: &Remote| matches!(group, Remote::AddressGroup(id) if !groups.address_groups.contains_key(id));
        groups.security_groups[id].rules.iter().any(|rule| unknown(&rule.remote))
    };
    list.is_empty()
        || pod.membership.revision > groups.revision
        || list.iter().any(|id| !groups.security_groups.contains_key(id) || unknown_addresses(id))
}

fn check(groups: &Groups, pods: &BTreeMap<u8, PodFacts>, family: Family, probes: &[(u8, u16)]) {
    let compiled: Compiled<u8> = compile(groups, pods, family, 64);
    let rules = loaded(&compiled.tables);
    for (key, pod) in pods {
        let cannot = cannot_be_judged(groups, pod);
        assert_eq!(compiled.undecidable.contains_key(key), cannot, "pod {key}");
        assert_eq!(compiled.classes.contains_key(key), !cannot, "pod {key}");
    }
    let address = |pod: &PodFacts| match family {
        Family::V4 => IpAddr::V4(pod.ipv4.expect("what the test made")),
        Family::V6 => IpAddr::V6(pod.ipv6.expect("what the test made")),
    };
    for (from, a) in pods {
        for (to, b) in pods.iter().filter(|(to, _)| *to != from) {
            let class = |key| compiled.classes.get(key).copied().unwrap_or(0);
            let (own, peer) = (class(from), class(to));
            let verdict = verdict(&rules, own, peer);
            assert_eq!(verdict, compiled.tables.verdict(own, peer) as u8);
            if own == 0 || peer == 0 {
                assert_eq!(verdict, Verdict::Wire as u8);
                continue;
            }
            for probe in probes {
                let really = side_allows(groups, a, b, Direction::Egress, address(b), *probe)
                    && side_allows(groups, b, a, Direction::Ingress, address(a), *probe);
                let judged = allows(&rules, 3, own, peer, traffic_key(probe.0, probe.1));
                assert_eq!(judged, really, "{probe:?} from {from} to {to}, verdict {verdict}");
                let swept = compiled.tables.allows(own, peer, traffic_key(probe.0, probe.1));
                assert_eq!(swept, really, "{probe:?} from {from} to {to}, by the agent's own reading");
                if verdict == Verdict::Open as u8 {
                    assert!(really, "{probe:?} from {from} to {to} is open");
                }
                if verdict == Verdict::Refused as u8 {
                    assert!(!really, "{probe:?} from {from} to {to} is refused");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn compiled_rules_say_what_the_rules_say(
        groups in groups(),
        pods in pods(),
        probes in vec(traffic(), 24),
    ) {
        for family in [Family::V4, Family::V6] {
            check(&groups, &pods, family, &probes);
        }
    }

    /// Compiled again with the classes it gave, nothing moves; and no class goes to pods that differ.
    #[test]
    fn classes_stay(groups in groups(), pods in pods()) {
        let first = compile(&groups, &pods, Family::V4, 64);
        let again: BTreeMap<u8, PodFacts> = pods
            .iter()
            .map(|(key, pod)| {
                let class = first.classes.get(key).copied().unwrap_or(0);
                (*key, PodFacts { class, ..pod.clone() })
            })
            .collect();
        let second = compile(&groups, &again, Family::V4, 64);
        prop_assert_eq!(&second.classes, &first.classes);
        prop_assert_eq!(&second.tables, &first.tables);
        for (a, class) in &first.classes {
            for (b, other) in &first.classes {
                if class == other {
                    prop_assert_eq!(&pods[a].membership.groups, &pods[b].membership.groups);
                }
            }
        }
    }
}

#[test]
fn more_than_there_is_room_for_is_left_to_the_vpc() {
    let allow = |ports: Ports| Rule {
        direction: Direction::Ingress,
        action: Action::Allow,
        priority: Priority::FIRST,
        protocol: Protocol::Tcp(ports),
        remote: Remote::Any,
    };
    let every_other =
        (0..5000u16).map(|n| PortRange::new(2 * n + 1, 2 * n + 1).expect("what the test made")).collect();
    let mut groups = Groups::default();
    for (name, ports) in [("big", Ports::of(every_other)), ("small", Ports::ALL)] {
        groups.security_groups.insert(id(name), SecurityGroup { id: id(name), rules: vec![allow(ports)] });
    }
    let pod = |n: u8, list: &[&str]| {
        let groups: Vec<GroupId> = list.iter().map(|name| id(name)).collect();
        let membership = Membership { groups: groups.try_into().expect("what the test made"), revision: 0 };
        (n, PodFacts { ipv4: Some([10, 0, 0, n].into()), membership, ..PodFacts::default() })
    };
    let pods = BTreeMap::from([pod(1, &["big"]), pod(2, &["small"]), pod(3, &["small", "big"])]);
    let compiled = compile(&groups, &pods, Family::V4, 64);
    assert_eq!(compiled.undecidable.keys().copied().collect::<Vec<_>>(), [1, 3]);
    assert!(compiled.undecidable.values().all(|why| *why == Undecidable::OverBudget));
    assert_eq!(compiled.classes.len(), 1);

    // Fewer classes than kinds of pods.
    let few = compile(&groups, &BTreeMap::from([pod(2, &["small"])]), Family::V4, 1);
    assert_eq!(few.undecidable[&2], Undecidable::OverBudget);
}

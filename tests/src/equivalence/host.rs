//! A node in memory: the host build of the decisions over what the product's compiler made of the groups.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use datapath_common::{
    abi::{
        Endpoint, Outcome,
        endpoint::flag,
        policy::{CLASSES, Verdict},
    },
    decide::{eni_ingress, pod_egress},
    packet::link::{TPID_8021Q, Tag},
    testing::{GATEWAY, GATEWAY_MAC, MemoryRules, MemoryTables, PARENT_IFINDEX},
};
use eniway_policy::compile::{Compiled, Family, PodFacts, Tables, compile};

use super::{
    case::State,
    world::{Node, Sent, mac, mtu},
};

/// A node in memory.
#[derive(Debug)]
pub struct HostNode {
    tables: MemoryTables,
    classes: BTreeMap<usize, u32>,
    rules: Tables,
    ids: u32,
}

/// The slot of a pod.
pub const fn slot(pod: usize) -> u32 {
    pod as u32 + 1
}

/// The VLAN id of a pod.
pub const fn vid(pod: usize) -> u16 {
    101 + pod as u16
}

/// The interface of a pod.
pub const fn ifindex(pod: usize) -> u32 {
    101 + pod as u32
}

/// What the compiler makes of a state, given the classes that pods have.
pub fn compiled(state: &State, classes: &BTreeMap<usize, u32>) -> Compiled<usize> {
    let facts = state.pods.iter().enumerate().map(|(number, pod)| {
        let class = classes.get(&number).copied().unwrap_or(0);
        let facts =
            PodFacts { ipv4: Some(pod.address), ipv6: None, membership: state.membership(pod), class };
        (number, facts)
    });
    compile(&state.of_the_agent(), &facts.collect(), Family::V4, CLASSES)
}

/// See [`Node::open_pairs`].
pub fn open_pairs(classes: &BTreeMap<usize, u32>, rules: &Tables) -> BTreeSet<(usize, usize)> {
    let mut open = BTreeSet::new();
    for (a, of_a) in classes {
        for (b, of_b) in classes.range(a + 1..) {
            if rules.verdict(*of_a, *of_b) == Verdict::Open {
                open.insert((*a, *b));
            }
        }
    }
    open
}

/// The record of a pod.
pub fn record(number: usize, address: Ipv4Addr, id: u32, class: u32) -> Endpoint {
    Endpoint {
        owner: 0xe000 + u64::from(id),
        id,
        generation: 1,
        ifindex: ifindex(number),
        parent_ifindex: PARENT_IFINDEX,
        policy_id: class,
        flags: flag::GROUPS,
        ipv4: address.octets(),
        gateway_ipv4: GATEWAY,
        mac: mac(number),
        wire_mac: mac(number),
        gateway_mac: GATEWAY_MAC,
        vid: vid(number),
        mtu: mtu(number) as u16,
        ..Endpoint::ZERO
    }
}

impl HostNode {
    /// A node without pods yet.
    pub fn new(fast_path: bool) -> Self {
        let mut tables = MemoryTables::default();
        tables.now = 1000;
        tables.fast_path = fast_path;
        Self { tables, classes: BTreeMap::new(), rules: Tables::default(), ids: 0 }
    }

    /// Forgets the flows and fragments of a pod, as the agent does when it releases one.
    fn forget(&mut self, id: u32, address: [u8; 4]) {
        let tables = &mut self.tables;
        tables.flows.retain(|key, _| key.id != id && key.remote != address);
        tables.fragments.retain(|key, _| key.id != id && key.dst != address);
        tables.pairs.retain(|key, _| key.low != id && key.high != id);
        tables.marks.remove(&id);
    }
}

impl Node for HostNode {
    fn enforce(&mut self, state: &State, replaced: Option<usize>) {
        if let Some(pod) = replaced {
            let Endpoint { id, ipv4, .. } = self.tables.endpoints[slot(pod) as usize];
            self.forget(id, ipv4);
            self.classes.remove(&pod);
        }
        let Compiled { classes, tables, .. } = compiled(state, &self.classes);
        self.classes = classes;
        if tables != self.rules {
            let mut rules = MemoryRules::default();
            rules.epoch = self.tables.rules.epoch + 1;
            for (class, verdicts) in &tables.verdicts {
                rules.set_verdicts(*class, verdicts);
            }
            for (class, list) in &tables.lists {
                rules.set_class(*class, *list);
            }
            for ((group, egress), programs) in &tables.programs {
                rules.set_programs(*group, *egress, programs);
            }
            rules.set_words(&tables.words);
            self.tables.rules = rules;
            self.rules = tables;
        }
        for (number, pod) in state.pods.iter().enumerate() {
            let class = self.classes.get(&number).copied().unwrap_or(0);
            let known = self.tables.endpoints.get(slot(number) as usize).copied();
            let id = match known {
                Some(known) if replaced != Some(number) => known.id,
                _ => {
                    self.ids += 1;
                    self.ids
                }
            };
            let record = record(number, pod.address, id, class);
            match known {
                Some(_) => self.tables.endpoints[slot(number) as usize] = record,
                None => assert_eq!(self.tables.add(record), slot(number)),
            }
        }
        let of = |id| self.tables.endpoints.iter().find(|record| record.id == id);
        self.tables.pairs.retain(|key, flow| {
            let both = of(key.low).zip(of(key.high));
            both.is_some_and(|(low, high)| self.rules.keeps(low, high, key, flow))
        });
    }

    fn open_pairs(&self) -> BTreeSet<(usize, usize)> {
        open_pairs(&self.classes, &self.rules)
    }

    fn send(&mut self, pod: usize, frame: &[u8]) -> Sent {
        let decision = pod_egress::decide(&self.tables, frame, None, ifindex(pod), 0);
        let sent = match decision.outcome {
            Outcome::Local => Sent::Local(decision.to.map_or(usize::MAX, |to| usize::from(to.vid - vid(0)))),
            Outcome::Wire => Sent::Wire,
            outcome => Sent::Dropped(Some(outcome)),
        };
        self.tables.settle();
        sent
    }

    fn receive(&mut self, pod: usize, packet: &[u8]) -> bool {
        let frame = [&mac(pod)[..], &GATEWAY_MAC, &[8, 0], packet].concat();
        let tag = Tag { tpid: TPID_8021Q, tci: vid(pod) };
        let decision = eni_ingress::decide(&self.tables, frame.as_slice(), Some(tag));
        let arrived = decision.outcome == Outcome::Wire;
        self.tables.settle();
        arrived
    }

    fn wait(&mut self, seconds: u32) -> bool {
        self.tables.now += seconds;
        true
    }
}

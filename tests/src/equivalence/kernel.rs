//! A node whose packets the kernel programs judge, by BPF_PROG_TEST_RUN, over maps that are written as the agent writes them.
//! Its clock is the kernel's: nothing ages.

use std::collections::{BTreeMap, BTreeSet};

use datapath_common::{
    abi::{Endpoint, maps::host_dst},
    packet::link::{TPID_8021Q, Tag},
    testing::{GATEWAY_MAC, MemoryTables, PARENT_IFINDEX},
};
use datapath_user::{
    config::{FastPath, Limits, Xdp},
    object::Constants,
    tables::{Index, Written},
};
use eniway_policy::compile::{Compiled, Tables};

use super::{
    case::State,
    generate::PODS,
    host::{compiled, ifindex, open_pairs, record, slot, vid},
    world::{Node, Sent, mac},
};
use crate::programs::{Hook, Input, Programs, ProgramsError, private_netns, tc};

/// Pods that may come one after the other in a case, and then again in the next one.
const IDS: u32 = 60;

/// The kernel programs and their maps. What a case leaves is forgotten at the beginning of the next one.
pub struct KernelNode {
    programs: Programs,
    /// What the maps hold.
    written: Written,
    rules: Tables,
    classes: BTreeMap<usize, u32>,
    records: BTreeMap<usize, Endpoint>,
    ids: u32,
}

impl KernelNode {
    /// Loads the programs, in a network namespace of this thread's own.
    ///
    /// # Errors
    ///
    /// When the kernel refuses one.
    pub fn load() -> Result<Self, ProgramsError> {
        let interfaces: Vec<u32> =
            (0..PODS.len()).map(ifindex).chain([PARENT_IFINDEX]).filter(|index| *index != 1).collect();
        private_netns(&interfaces);
        let constants = Constants { fast_path: FastPath::SecurityGroups, parent: 0, xdp: Xdp::Guard };
        let mut programs = Programs::load(constants, &Limits { endpoints: IDS, flows: 65_536 })?;
        // The node's own address, as on every node.
        let mut node = MemoryTables::default();
        node.host_dst = vec![([10, 1, 0, 167], 32, host_dst::HOST)];
        programs.fill(&node)?;
        Ok(Self {
            programs,
            written: Written::default(),
            rules: Tables::default(),
            classes: BTreeMap::new(),
            records: BTreeMap::new(),
            ids: 0,
        })
    }

    /// Forgets all pods and what was remembered of them.
    ///
    /// # Panics
    ///
    /// When a map cannot be written.
    pub fn clear(&mut self) {
        for id in 0..=IDS {
            self.programs.maps.forget(id).expect("the maps are written");
        }
        self.classes.clear();
        self.ids = 0;
    }

    fn put(&mut self, number: usize, record: Endpoint) {
        let maps = &mut self.programs.maps;
        let slot = slot(number);
        maps.set_record(slot, &record).expect("the record is written");
        if self.records.insert(number, record).is_none() {
            for index in [
                Index::Vlan { parent: 0, vid: record.vid },
                Index::Interface(record.ifindex),
                Index::Ipv4(record.ipv4),
            ] {
                maps.set_slot(index, slot).expect("the index is written");
            }
        }
    }
}

impl Node for KernelNode {
    fn enforce(&mut self, state: &State, replaced: Option<usize>) {
        if let Some(pod) = replaced {
            let Endpoint { id, ipv4, .. } = self.records[&pod];
            self.programs.maps.forget(id).expect("the maps are written");
            self.programs.maps.forget_remote(ipv4).expect("the maps are written");
            self.classes.remove(&pod);
        }
        let Compiled { classes, tables, .. } = compiled(state, &self.classes);
        self.classes = classes;
        if tables != self.rules {
            self.programs.maps.policy.enforce(&tables, &mut self.written).expect("the rules are written");
            self.rules = tables;
        }
        let first = self.ids == 0;
        for (number, pod) in state.pods.iter().enumerate() {
            let id = match self.records.get(&number) {
                Some(known) if !first && replaced != Some(number) => known.id,
                _ => {
                    // An id is used again only after the end of a case.
                    self.ids += 1;
                    assert!(self.ids < IDS, "more pods than ids");
                    self.ids
                }
            };
            let class = self.classes.get(&number).copied().unwrap_or(0);
            self.put(number, record(number, pod.address, id, class));
        }
        let swept = self.programs.maps.policy.sweep(&self.rules, self.records.values());
        swept.expect("the flows are written");
    }

    fn open_pairs(&self) -> BTreeSet<(usize, usize)> {
        open_pairs(&self.classes, &self.rules)
    }

    fn send(&mut self, pod: usize, frame: &[u8]) -> Sent {
        let output = self.programs.run(Hook::PodEgress, &Input::new(frame, ifindex(pod)));
        let output = output.expect("the kernel runs the packet");
        if output.action != tc::REDIRECT {
            return Sent::Dropped(None);
        }
        // To the gateway's MAC by the wire, to a pod's by the fast path.
        match (0..PODS.len()).find(|to| output.frame.starts_with(&mac(*to))) {
            Some(to) => Sent::Local(to),
            None => Sent::Wire,
        }
    }

    fn receive(&mut self, pod: usize, packet: &[u8]) -> bool {
        let frame = [&mac(pod)[..], &GATEWAY_MAC, &[8, 0], packet].concat();
        let tag = Some(Tag { tpid: TPID_8021Q, tci: vid(pod) });
        let input = Input { tag, ..Input::new(&frame, PARENT_IFINDEX) };
        let output = self.programs.run(Hook::EniIngress, &input).expect("the kernel runs the packet");
        output.action == tc::REDIRECT
    }

    fn wait(&mut self, _: u32) -> bool {
        false
    }
}

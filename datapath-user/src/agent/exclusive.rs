//! Pods with an ENI of their own: the NIC is moved into the pod, and the programs run there.

use std::collections::BTreeSet;

use datapath_common::abi::Endpoint;

use super::{
    Agent, AgentError,
    pods::{pod_spec, put},
};
use crate::{
    attach::{self, Target},
    feature::TcKind,
    netns::Namespace,
    nic::{self, Nic, NicError},
    object,
    pin::Hook,
    source::{Desired, Pod},
    sys,
};

/// Whether a record is of a pod with an ENI of its own.
pub(super) fn is_exclusive(record: &Endpoint) -> bool {
    record.vid == 0
}

fn key(owner: u64) -> String {
    format!("{owner:016x}")
}

impl Agent {
    /// Gives a pod its NIC, or finds that it has it, and repairs what is missing. After an error the NIC is back.
    pub(super) async fn wire_nic(&mut self, owner: u64, pod: &Pod) -> Result<(), AgentError> {
        let record = self.tables.pod(owner).map(|live| live.record);
        if let (Some(record), Some(ifindex)) = (record, self.nic_indexes.get(&owner))
            && record.ifindex == *ifindex
            && record.mtu == pod.mtu
            && record.ipv4 == pod.ipv4.octets()
            && record.mac == pod.mac.0
            && self.is_alive(*ifindex)
        {
            return Ok(());
        }
        self.nic_indexes.remove(&owner);
        let spec = pod_spec(pod);
        let parents: Vec<&str> = self.parents.iter().map(super::parent::Parent::name).collect();
        let found = nic::find(&spec, &parents).await?;
        let known = self.nics.get(&key(owner)).cloned();
        let before = known.as_ref().map_or(0, |nic| nic.index);
        // In the pod since a time of which nobody knows any more.
        let unknown = || Nic {
            mac: pod.mac,
            name: nic::name_by_mac(pod.mac),
            mtu: pod.mtu.into(),
            interface: pod.interface.to_string(),
            netns: pod.netns.clone().unwrap_or_default(),
            home_index: 0,
            index: 0,
        };
        let mut given = found.on_node.or(known).unwrap_or_else(unknown);
        let taken = found.taken.union(&self.indexes_of_others(owner)?).copied().collect();
        given.index = nic::choose_index(found.inside.into_iter().chain([before]), &taken);
        if let Some(inside) = found.inside.filter(|index| *index != given.index) {
            log::warn!(
                "pod {}: its ENI has index {inside} there, which the agent did not choose; it is taken out and comes back \
                 with {}",
                pod.full_name(),
                given.index
            );
            nic::take_back(&given).await?;
            // Links stay on an interface that changes its namespace.
            for stale in [Some(inside), record.map(|record| record.ifindex)].into_iter().flatten() {
                self.detach_nic(stale)?;
            }
        }
        // Written down before it is moved: whatever happens, it can be taken back.
        self.nics.put(&key(owner), given.clone())?;
        match nic::give(&spec, &given).await {
            Ok(()) => {
                log::debug!("pod {} has {}, the ENI {}", pod.full_name(), given.name, given.mac);
                self.nic_indexes.insert(owner, given.index);
                Ok(())
            }
            Err(error) => {
                if record.is_none() {
                    self.take_nic_back(owner).await?;
                }
                Err(error.into())
            }
        }
    }

    /// Interface indexes that other pods' records, links and ENIs go by.
    fn indexes_of_others(&self, owner: u64) -> Result<BTreeSet<u32>, AgentError> {
        let own = key(owner);
        let own_record = self.tables.pod(owner).map(|live| live.record.ifindex);
        let own_nic = self.nics.get(&own).map(|nic| nic.index);
        let nics =
            self.nics.keys().filter(|key| **key != own).filter_map(|key| Some(self.nics.get(key)?.index));
        let records = self.tables.pods().map(|pod| pod.record).filter(|record| record.owner != owner);
        let pinned = self.pins.pinned_pods()?;
        let pinned = pinned.into_iter().filter(|index| ![own_record, own_nic].contains(&Some(*index)));
        Ok(nics.chain(records.map(|record| record.ifindex)).chain(pinned).collect())
    }

    /// Attaches the programs inside the pod and writes its record. Returns how much changed.
    pub(super) async fn program_nic(
        &mut self,
        pod: &Pod,
        record: &Endpoint,
        moving: &BTreeSet<u64>,
    ) -> Result<usize, AgentError> {
        let owner = record.owner;
        let Some(&ifindex) = self.nic_indexes.get(&owner) else { return Ok(0) };
        let before = self.tables.pod(owner).copied();
        if before.is_none_or(|live| live.record.ifindex != ifindex) || !self.is_alive(ifindex) {
            self.attach_nic(owner, ifindex)?;
        }
        let put = put(&mut self.tables, &Endpoint { ifindex, ..*record }, moving).await?;
        let limited = self.limit(pod, put.id)?;
        if let Some(before) = before.filter(|live| live.record.ifindex != ifindex) {
            self.detach_pod(before.record.ifindex)?;
        }
        Ok(put.changes + limited)
    }

    /// Attaches the programs, or replaces those that are there. Where the pod is gone, nothing is to be done.
    pub(super) fn attach_nic(&mut self, owner: u64, ifindex: u32) -> Result<(), AgentError> {
        let Some(nic) = self.nics.get(&key(owner)).cloned() else { return Ok(()) };
        let Ok(namespace) = Namespace::open(&nic.netns) else { return Ok(()) };
        let Self { pods, pins, kind, grace, .. } = self;
        let _short = grace.expedite();
        for (name, hook) in attach::NIC.all() {
            let program = object::tc(pods, name)?;
            let pin = pins.pod_tc(ifindex, hook);
            let target = Target { interface: &nic.interface, ifindex };
            // Programs are attached in the namespace of the thread that does it.
            namespace.enter_for(|| attach::attach_tc(*kind, program, name, target, hook, &pin))??;
        }
        Ok(())
    }

    /// Whether the programs of a NIC are attached to it, wherever it is. Filters of clsact cannot be asked from here.
    pub(super) fn is_alive(&self, ifindex: u32) -> bool {
        self.kind == TcKind::Clsact
            || [Hook::In, Hook::Out].iter().all(|hook| {
                sys::link_info(&self.pins.pod_tc(ifindex, *hook)).is_ok_and(|info| info.ifindex == ifindex)
            })
    }

    /// Removes the links of a NIC, wherever it is. Filters of clsact go with the NIC's way to another namespace.
    fn detach_nic(&self, ifindex: u32) -> Result<(), AgentError> {
        for (_, hook) in attach::NIC.all() {
            self.pins.remove(&self.pins.pod_tc(ifindex, hook))?;
        }
        Ok(())
    }

    /// Takes a NIC back from its pod, if one was given.
    pub(super) async fn take_nic_back(&mut self, owner: u64) -> Result<(), AgentError> {
        self.nic_indexes.remove(&owner);
        let Some(nic) = self.nics.get(&key(owner)).cloned() else { return Ok(()) };
        nic::take_back(&nic).await?;
        self.detach_nic(nic.index)?;
        self.nics.remove(&key(owner));
        Ok(())
    }

    /// Owners that have a NIC, are in no table, and are not wanted any more.
    pub(super) fn nics_for_nothing(&self, desired: &Desired) -> Vec<u64> {
        let owners = self.nics.keys().filter_map(|key| u64::from_str_radix(key, 16).ok());
        let unwanted = |owner: &u64| {
            desired.pod(*owner).is_none_or(|pod| !pod.is_wanted())
                && !desired.refused.contains_key(owner)
                && self.tables.pod(*owner).is_none()
        };
        owners.filter(unwanted).collect()
    }
}

impl From<NicError> for AgentError {
    fn from(error: NicError) -> Self {
        Self::Nic(Box::new(error))
    }
}

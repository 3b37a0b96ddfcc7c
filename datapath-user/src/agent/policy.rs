//! Security groups: compiled for the node's pods, and put in force so that no packet is judged by a mixture of old and new.
//!
//! 1. Pods whose class or address changes lose their class first: what they send and receive takes the wire.
//! 2. The compiled tables are switched to ([`PolicyMaps::enforce`](crate::tables::PolicyMaps::enforce)).
//! 3. The flows end that would not be admitted any more ([`PolicyMaps::sweep`](crate::tables::PolicyMaps::sweep)).
//! 4. The pods get their new class with their records, as everything else of them changes.
//!
//! Between the steps the agent waits until no program runs that began before. A class keeps its number as long as most of its
//! pods stay in it, so that most changes move no pod.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use datapath_common::abi::{Endpoint, endpoint::flag};
use eniway_policy::{
    compile::{Compiled, Family, PodFacts, compile},
    model::Groups,
};

use super::{Agent, pods::put};
use crate::{
    config::{Config, FastPath},
    policy::PolicyState,
    source::{Desired, Pod},
    tables::{PolicyDigest, TablesError, Written},
};

/// What the agent knows of what is in force.
#[derive(Default)]
pub(super) struct Policy {
    /// What was compiled, and from what: the same need not be compiled again.
    from: Option<(Groups, BTreeMap<u64, PodFacts>)>,
    compiled: Compiled<u64>,
    written: Written,
    in_force: bool,
    /// Whether the flows are over that what is in force does not allow.
    swept: bool,
    /// The epoch that the groups were put in force by, and what stands in the maps since, in short.
    epoch: Option<u32>,
    digest: Option<PolicyDigest>,
    reported: Option<PolicyState>,
    /// Why the groups are not in force as they should be.
    pub(super) fault: Option<String>,
}

impl Policy {
    /// Puts everything in force anew, whatever stands in the maps.
    pub(super) fn write_anew(&mut self) {
        self.written = Written::default();
        self.in_force = false;
    }

    /// What stands in the maps, in short; none while the groups are not in force as they should be.
    pub(super) fn digest(&mut self, classes: usize) -> Option<PolicyDigest> {
        let epoch = self.epoch.filter(|_| self.in_force && self.fault.is_none())?;
        if self.digest.as_ref().is_none_or(|digest| digest.epoch != epoch) {
            self.digest = self.written.digest(epoch, classes);
        }
        self.digest.clone()
    }

    /// The class of a pod, and its flags.
    pub(super) fn of(&self, config: &Config, owner: u64, pod: &Pod) -> (u32, u32) {
        let flags = flags(config, pod);
        let judged = flags & (flag::GROUPS | flag::OBSERVE) != 0 && self.fault.is_none();
        let class = if judged { self.compiled.classes.get(&owner).copied().unwrap_or(0) } else { 0 };
        (class, flags)
    }

    /// Why a pod cannot be judged here.
    fn undecidable(&self, owner: u64) -> Option<String> {
        self.compiled.undecidable.get(&owner).map(ToString::to_string)
    }
}

fn flags(config: &Config, pod: &Pod) -> u32 {
    let observe = if config.observe { flag::OBSERVE } else { 0 };
    let of_groups = match pod.fast_path.unwrap_or(config.fast_path) {
        FastPath::Off => flag::OFF,
        FastPath::SecurityGroups => flag::GROUPS,
        FastPath::All => observe,
    };
    of_groups | pod.bandwidth.flag()
}

impl Agent {
    /// Compiles the groups for the pods that shall be, and puts the result in force. Returns the pods that get another class
    /// or flags than they have: their records are to be written.
    pub(super) async fn sync_policy(&mut self, desired: &Desired) -> BTreeSet<u64> {
        self.compile_policy(desired);
        let result = self.enforce_policy(desired).await;
        let fault = result.err().map(|error| format!("security groups are not in force: {error}"));
        if let Some(fault) = &fault
            && self.policy.fault.as_ref() != Some(fault)
        {
            log::error!("{fault}");
        }
        self.policy.fault = fault;
        self.unsettled(desired).into_iter().map(|(owner, _)| owner).collect()
    }

    fn compile_policy(&mut self, desired: &Desired) {
        let judged = |(owner, pod): (u64, &Pod)| {
            let wanted = pod.is_wanted() && flags(&self.config, pod) & (flag::GROUPS | flag::OBSERVE) != 0;
            wanted.then(|| (owner, self.facts(owner, pod)))
        };
        let pods: BTreeMap<u64, PodFacts> = match self.config.fast_path {
            FastPath::Off => BTreeMap::new(),
            _ => desired.pods().filter_map(judged).collect(),
        };
        let plain = |pods: &BTreeMap<u64, PodFacts>| -> Vec<PodFacts> {
            pods.values().map(|pod| PodFacts { class: 0, ..pod.clone() }).collect()
        };
        if let Some((groups, from)) = &self.policy.from
            && *groups == desired.groups
            && from.keys().eq(pods.keys())
            && plain(from) == plain(&pods)
        {
            return;
        }
        let began = Instant::now();
        let classes = self.tables.maps.policy.classes();
        self.policy.compiled = compile(&desired.groups, &pods, Family::V4, classes);
        self.policy.in_force = false;
        log::debug!(
            "security groups of revision {}: {} pods in {} classes, {} cannot be judged, compiled in {:.1} ms",
            desired.groups.revision,
            pods.len(),
            self.policy.compiled.tables.verdicts.len(),
            self.policy.compiled.undecidable.len(),
            began.elapsed().as_secs_f64() * 1000.0
        );
        self.policy.from = Some((desired.groups.clone(), pods));
    }

    fn facts(&self, owner: u64, pod: &Pod) -> PodFacts {
        PodFacts {
            ipv4: Some(pod.ipv4),
            ipv6: pod.ipv6,
            membership: pod.membership.clone(),
            class: self.tables.pod(owner).map_or(0, |live| live.record.policy_id),
        }
    }

    /// Live pods whose class, flags or address is not what it is to be, with their records.
    fn unsettled(&self, desired: &Desired) -> Vec<(u64, Endpoint)> {
        let settled = |record: &Endpoint| {
            let Some(pod) = desired.pod(record.owner) else {
                // Not to be judged any more: its groups are not known.
                return record.policy_id == 0;
            };
            let own = pod.ipv4.octets() == record.ipv4
                && pod.ipv6.map_or([0; 16], |address| address.octets()) == record.ipv6;
            let (class, flags) = self.policy.of(&self.config, record.owner, pod);
            // A limit that comes or goes is none of the groups' business.
            own && record.policy_id == class && (record.flags ^ flags) & !flag::LIMITED == 0
        };
        let live = self.tables.pods().map(|live| live.record);
        live.filter(|record| !settled(record)).map(|record| (record.owner, record)).collect()
    }

    async fn enforce_policy(&mut self, desired: &Desired) -> Result<(), TablesError> {
        self.policy.fault = None;
        let unsettled = self.unsettled(desired);
        if self.policy.in_force && unsettled.is_empty() && self.policy.swept {
            return Ok(());
        }
        self.policy.swept = false;
        let mut demoted = false;
        for (_, record) in unsettled.iter().filter(|(_, record)| record.policy_id != 0) {
            put(&mut self.tables, &Endpoint { policy_id: 0, ..*record }, &BTreeSet::new()).await?;
            demoted = true;
        }
        if demoted {
            self.tables.maps.policy.wait_for_programs();
        }
        let epoch = self.tables.maps.policy.epoch()?;
        self.policy.in_force |= self.policy.written.is(epoch, &self.policy.compiled.tables);
        if !self.policy.in_force {
            let policy = &mut self.policy;
            let rows = self.tables.maps.policy.enforce(&policy.compiled.tables, &mut policy.written)?;
            policy.in_force = true;
            policy.epoch = Some(self.tables.maps.policy.epoch()?);
            policy.digest = None;
            log::debug!("security groups of revision {}: {rows} rows written", desired.groups.revision);
        }
        let began = Instant::now();
        let records = self.settled_records(desired);
        let policy = &mut self.policy;
        let ended = self.tables.maps.policy.sweep(&policy.compiled.tables, records.iter())?;
        policy.swept = true;
        log::debug!("{ended} flows ended, in {:.1} ms", began.elapsed().as_secs_f64() * 1000.0);
        Ok(())
    }

    /// The records of live pods that are still wanted, with the classes and flags that they are to have.
    fn settled_records(&self, desired: &Desired) -> Vec<Endpoint> {
        let live = self.tables.pods().map(|live| live.record);
        let settled = live.filter_map(|record| {
            let (policy_id, flags) = self.policy.of(&self.config, record.owner, desired.pod(record.owner)?);
            Some(Endpoint { policy_id, flags, ..record })
        });
        settled.collect()
    }

    /// Writes down what is in force, for `eniway policy` and `eniway trace`, if it is not written already.
    pub(super) fn report_policy(&mut self, desired: &Desired) {
        let pods = desired.pods().filter(|(_, pod)| pod.is_wanted());
        let pods = pods.map(|(owner, pod)| (pod, self.policy.undecidable(owner)));
        let state = PolicyState::of(desired, pods, self.policy.fault.clone());
        if self.policy.reported.as_ref() == Some(&state) {
            return;
        }
        match state.write(&self.config.run_dir) {
            Ok(()) => self.policy.reported = Some(state),
            Err(error) => log::error!("{error}"),
        }
    }
}

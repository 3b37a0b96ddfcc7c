//! What the agent holds the node to, and what it does where the node is otherwise.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use datapath_common::abi::Endpoint;

use super::{Agent, AgentError, exclusive::is_exclusive, host_dsts, pod_spec, unix_seconds};
use crate::{
    attach::{self, Target as Hooked},
    audit::{self, Depth, Expected, ExpectedParent, ExpectedPod, LiveRecord, Target, is_first},
    feature::TcKind,
    net,
    netlink::Netlink,
    object,
    source::Pod,
    status::Event,
    wiring,
};

/// What happened is kept for the status, so many times.
const EVENTS: usize = 20;
/// Whoever undoes repairs gets so many within [`WINDOW`]; the rest is left to the next round of checks.
const PATIENCE: u32 = 5;
const WINDOW: Duration = Duration::from_secs(10);

/// How often something was repaired lately.
#[derive(Default)]
pub(super) struct Repairs(BTreeMap<Target, (Instant, u32)>);

impl Repairs {
    /// Counts one. Whether it may be done.
    fn may(&mut self, target: &Target) -> bool {
        self.0.retain(|_, (since, _)| since.elapsed() < WINDOW);
        let (_, count) = self.0.entry(target.clone()).or_insert((Instant::now(), 0));
        *count += 1;
        *count <= PATIENCE
    }
}

impl Agent {
    /// Says what happened: in the log, and in the status.
    pub(super) fn tell(&mut self, level: log::Level, what: String) {
        log::log!(level, "{what}");
        let events = &mut self.status.events;
        events.push(Event { at: unix_seconds(), what });
        let surplus = events.len().saturating_sub(EVENTS);
        events.drain(..surplus);
    }

    /// All that should be, for an audit.
    pub(super) fn expected(&mut self) -> Expected {
        let desired = self.desired.clone();
        let wanted: Vec<(u64, &Pod)> =
            desired.iter().flat_map(|all| all.pods()).filter(|(_, pod)| pod.is_wanted()).collect();
        let mut pods: Vec<ExpectedPod> =
            wanted.iter().map(|(owner, pod)| self.expected_pod(*owner, Some(pod))).collect();
        let named: BTreeSet<u64> = wanted.iter().map(|(owner, _)| *owner).collect();
        let others = self.tables.pods().map(|live| live.record.owner).filter(|owner| !named.contains(owner));
        pods.extend(others.map(|owner| self.expected_pod(owner, None)));
        let in_tables = |owner: &u64| self.tables.pod(*owner).is_some();
        let also_wired =
            self.wired.iter().filter(|(owner, _)| !in_tables(owner)).map(|(_, name)| name.clone()).collect();
        let vips = desired.as_ref().map(|all| {
            let vips = all.vips.iter().map(|vip| (vip.ip.octets(), vip.port, vip.protocol));
            vips.collect()
        });
        Expected {
            clsact: self.kind == TcKind::Clsact,
            parents: self.expected_parents(),
            pods,
            also_wired,
            host_dsts: host_dsts(&self.config.host, &self.addresses).into_iter().collect(),
            vips,
            policy: self.policy.digest(self.tables.maps.policy.classes()),
        }
    }

    pub(super) fn expected_parents(&self) -> Vec<ExpectedParent> {
        let mut parents: Vec<_> = self.parents.iter().map(super::Parent::expected).collect();
        let pods = || self.desired.iter().flat_map(|all| all.pods()).filter(|(_, pod)| pod.is_wanted());
        for parent in &mut parents {
            let on_it = pods()
                .filter(|(_, pod)| pod.parent.as_ref().is_some_and(|name| name.as_str() == parent.interface));
            parent.mtu = on_it.map(|(_, pod)| u32::from(pod.mtu)).max().unwrap_or(0);
        }
        parents
    }

    /// What should be of one pod.
    pub(super) fn expected_one(&self, owner: u64) -> ExpectedPod {
        self.expected_pod(owner, self.desired.as_ref().and_then(|all| all.pod(owner)))
    }

    fn expected_pod(&self, owner: u64, pod: Option<&Pod>) -> ExpectedPod {
        let live = self.tables.pod(owner).map(|live| LiveRecord { slot: live.slot, record: live.record });
        let exclusive = live.is_some_and(|live| is_exclusive(&live.record));
        let named = || self.wired.get(&owner).cloned().or_else(|| self.host_interface_of(owner));
        let known = || {
            let id = live.map(|live| live.record.id);
            let status = self.status.pods.iter().find(|pod| pod.id.is_some() && pod.id == id);
            status.map(|pod| format!("{}/{}", pod.namespace, pod.name))
        };
        let name = pod.map(Pod::full_name).or_else(known);
        ExpectedPod {
            name: name.unwrap_or_else(|| format!("owner {owner:016x}")),
            owner,
            spec: pod.map(pod_spec),
            host_interface: if exclusive { String::new() } else { named().unwrap_or_default() },
            live,
            fault: self.faults.get(&owner).cloned(),
        }
    }

    /// Writes down what should be, if it is not written already.
    pub(super) fn write_expected(&mut self) {
        let expected = self.expected();
        let text = match expected.to_text() {
            Ok(text) => text,
            Err(error) => return log::error!("what should be cannot be written: {error}"),
        };
        if self.expected_text == text {
            return;
        }
        match Expected::write(&self.config.run_dir, &text) {
            Ok(()) => self.expected_text = text,
            Err(error) => log::error!("{error}"),
        }
    }

    /// Looks at everything that others on the node may have changed, and repairs it.
    pub(super) async fn check_node(&mut self) {
        let expected = self.expected();
        let report = match audit::audit(&expected, &self.pins, Depth::Node).await {
            Ok(report) => report,
            Err(error) => return log::error!("{error}"),
        };
        let mut targets = BTreeSet::new();
        for finding in report.findings {
            // Pods with faults are tried again anyway, and what is nobody's to repair is in the notes.
            let at_fault = matches!(&finding.repair, Target::Pod(owner) if self.faults.contains_key(owner));
            if finding.repair == Target::Nobody || at_fault {
                continue;
            }
            self.tell(log::Level::Warn, format!("{finding}; repairing"));
            targets.insert(finding.repair);
        }
        for problem in self.mend(&targets).await {
            self.tell(log::Level::Error, problem);
        }
    }

    /// Repairs after an event, unless somebody keeps undoing it.
    pub(super) async fn mend_after(&mut self, target: Target, what: String) {
        if !self.repairs.may(&target) {
            return log::warn!(
                "{what}; repaired {PATIENCE} times within {WINDOW:?}, waiting for the next check"
            );
        }
        self.tell(log::Level::Warn, format!("{what}; repairing"));
        for problem in self.mend(&BTreeSet::from([target])).await {
            self.tell(log::Level::Error, problem);
        }
    }

    /// Makes what is said of these as it should be. Answers with what could not be.
    pub(super) async fn mend(&mut self, targets: &BTreeSet<Target>) -> Vec<String> {
        let mut problems = Vec::new();
        if targets.is_empty() {
            return problems;
        }
        let Some(desired) = self.desired.clone() else {
            problems.push("the source has not said yet what should be; nothing was repaired".to_owned());
            return problems;
        };
        let tables = targets.contains(&Target::Tables);
        if tables {
            problems.extend(object::pin_again(&self.pods, &self.pins).err().map(|error| error.to_string()));
            let mended = self.tables.mend().and_then(|_| self.sync_vips(&desired));
            let mended = mended.and_then(|_| self.sync_host_dst());
            problems.extend(mended.err().map(|error| error.to_string()));
            self.policy.write_anew();
        }
        for target in targets {
            let Target::Parent(name) = target else { continue };
            let Self { parents, pins, kind, settings, .. } = self;
            let Some(parent) = parents.iter_mut().find(|parent| parent.name() == name) else { continue };
            parent.prepare(&desired, settings).await;
            problems.extend(parent.settings_note.clone());
            problems.extend(parent.attach_again(pins, *kind).err().map(|error| error.to_string()));
        }
        let mut owners: BTreeSet<u64> = targets.iter().filter_map(Target::owner).collect();
        for owner in &owners {
            self.wired.remove(owner);
            self.nic_indexes.remove(owner);
            problems.extend(self.put_first(*owner).err().map(|error| error.to_string()));
        }
        if tables || !owners.is_empty() {
            self.widen(&mut owners);
            self.reconcile((!tables).then_some(&owners)).await;
            let faults = owners.iter().filter_map(|owner| self.faults.get(owner));
            problems.extend(faults.cloned());
        }
        if targets.contains(&Target::Leftovers) {
            self.remove_leftovers().await;
        }
        problems
    }

    /// Removes veths that an agent made, and that are of no pod any more.
    pub(super) async fn remove_stray_veths(&self) -> Result<(), AgentError> {
        let netlink = Netlink::open()?;
        let live: BTreeSet<u32> = self.tables.pods().map(|pod| pod.record.ifindex).collect();
        let wired: BTreeSet<&String> = self.wired.values().collect();
        for link in netlink.links().await? {
            if wiring::is_ours(&link) && !live.contains(&link.index) && !wired.contains(&link.name) {
                log::warn!(
                    "removing {}, `{}`: no pod has it",
                    link.name,
                    link.alias.as_deref().unwrap_or("?")
                );
                self.take_down(link.index).await?;
            }
        }
        Ok(())
    }

    /// Brings a pod's programs to their interface, before all others there, without a moment in which
    /// anything passes unchecked: [`attach::attach_first`].
    fn put_first(&mut self, owner: u64) -> Result<(), AgentError> {
        let Some(record) = self.tables.pod(owner).map(|live| live.record) else { return Ok(()) };
        if is_exclusive(&record) {
            // With another index, which somebody gave it, it gets its programs after its own index.
            return match self.is_alive(record.ifindex) {
                true => Ok(()),
                false => self.attach_nic(owner, record.ifindex),
            };
        }
        let Endpoint { ifindex, .. } = record;
        let Some(interface) = net::ifname(ifindex) else { return Ok(()) };
        if self.kind == TcKind::Clsact {
            return self.attach_pod(&interface, ifindex);
        }
        for (name, hook) in attach::POD.all() {
            let pin = self.pins.pod_tc(ifindex, hook);
            if is_first(&pin, ifindex, hook) {
                continue;
            }
            let program = object::tc(&mut self.pods, name)?;
            attach::attach_first(program, name, Hooked { interface: &interface, ifindex }, hook, &pin)?;
        }
        Ok(())
    }
}

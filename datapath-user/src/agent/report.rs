//! The status file.

use std::time::Instant;

use super::{Agent, AgentError, exclusive::is_exclusive};
use crate::{
    net,
    source::{Pod, State},
    status::PodStatus,
};

/// Writing the status may take this share of the time: with thousands of pods it takes longer than most changes do.
const STATUS_SHARE: u32 = 20;

impl Agent {
    /// Writes the status file, if it would say something new.
    pub(super) fn report(&mut self) {
        let began = Instant::now();
        self.status.parents = self.parents.iter().map(|parent| parent.status(self.kind)).collect();
        self.status.node_changes =
            self.parents.iter().flat_map(|parent| parent.changes.iter().cloned()).collect();
        if let Some(desired) = self.desired.clone() {
            let mut active: Vec<_> = desired.pods().filter(|(_, pod)| pod.state == State::Active).collect();
            active.sort_by_key(|(owner, _)| desired.place(*owner));
            self.status.pods = active.into_iter().map(|(owner, pod)| self.pod_status(owner, pod)).collect();
            self.status.refused =
                desired.refused.values().map(|pod| format!("{}: {}", pod.name, pod.reason)).collect();
            self.report_policy(&desired);
        }
        // First, so that who sees the status finds it.
        self.write_expected();
        if self.written.as_ref() != Some(&self.status) {
            match self.status.write(&self.config.run_dir) {
                Ok(()) => self.written = Some(self.status.clone()),
                Err(error) => log::error!("{error}"),
            }
        }
        self.next_report = Instant::now() + began.elapsed() * STATUS_SHARE;
    }

    /// The agent's state in a line, for a service manager.
    pub(super) fn summary(&self) -> String {
        let pods = self.tables.pods().count();
        let source = match (&self.status.source_error, self.status.source_down_since) {
            (Some(error), _) => error.as_str(),
            (None, Some(_)) => "unreachable",
            (None, None) if self.desired.is_none() => "has not told the pods yet",
            (None, None) => "ok",
        };
        let held =
            if self.status.held_back.is_some() { "; a snapshot waits for `eniway confirm`" } else { "" };
        format!("{pods} pods, {} with errors; source: {source}{held}", self.faults.len())
    }

    pub(super) fn host_interface_of(&self, owner: u64) -> Option<String> {
        let record = self.tables.pod(owner)?.record;
        if is_exclusive(&record) { None } else { net::ifname(record.ifindex) }
    }

    pub(super) fn pod_status(&self, owner: u64, pod: &Pod) -> PodStatus {
        let live = self.tables.pod(owner);
        let host_interface = self
            .wired
            .get(&owner)
            .cloned()
            .or_else(|| self.host_interface_of(owner))
            .or_else(|| pod.host_interface.as_ref().map(ToString::to_string));
        let waiting = pod.is_waiting().then(|| "waits for the runtime to bring its sandbox".to_owned());
        let lacks_vlan = pod.vlan.is_none() && !pod.is_exclusive();
        let unattached = lacks_vlan.then(|| "the source gives no VLAN id yet".to_owned()).or(waiting);
        PodStatus {
            uid: pod.uid.clone(),
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            container_id: pod.container_id.clone(),
            netns: pod.netns.as_ref().map(|path| path.display().to_string()),
            interface: pod.interface.to_string(),
            host_interface,
            id: live.map(|live| live.record.id),
            slot: live.map(|live| live.slot),
            parent: pod.parent.as_ref().map(ToString::to_string).unwrap_or_default(),
            vlan: pod.vlan.map_or(0, net::VlanId::get),
            mac: pod.mac,
            ipv4: pod.ipv4,
            generation: pod.generation,
            bandwidth: pod.bandwidth,
            error: self.faults.get(&owner).cloned().or(unattached),
        }
    }

    /// Whether everything is as the source says.
    pub(super) fn completeness(&self) -> Result<(), AgentError> {
        let faults =
            self.status.pods.iter().filter_map(|pod| {
                Some(format!("pod {}/{}: {}", pod.namespace, pod.name, pod.error.as_ref()?))
            });
        let notes = self.parents.iter().filter_map(|parent| parent.settings_note.clone());
        let whole = [&self.status.source_error, &self.status.held_back];
        let refused = self.status.refused.iter().map(|refused| format!("pod {refused}"));
        let problems: Vec<_> =
            whole.into_iter().flatten().cloned().chain(notes).chain(faults).chain(refused).collect();
        if problems.is_empty() { Ok(()) } else { Err(AgentError::Incomplete { problems }) }
    }
}

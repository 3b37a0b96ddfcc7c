//! Pods with a sub-ENI: their interfaces and the programs on them.

use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use datapath_common::abi::Endpoint;
use futures_util::{StreamExt as _, stream};
use tokio::time;

use super::{Agent, AgentError, exclusive::is_exclusive};
use crate::{
    attach::{self, AttachError, Target},
    feature::TcKind,
    net, object,
    pin::Hook,
    source::Pod,
    tables::{GRACE, Live, Put, Tables, TablesError},
    wiring::{self, PodSpec},
};

/// So many pods are wired at once: most of the time goes by in their namespaces, on threads of their own.
const WIRED_AT_ONCE: usize = 8;

impl Agent {
    /// Pods that an earlier agent programmed get the programs of this one, whatever the source says or does not say.
    pub(super) fn attach_known_pods(&mut self) {
        let known: Vec<Live> = self.tables.pods().copied().collect();
        for pod in known {
            let ifindex = pod.record.ifindex;
            let attached = if is_exclusive(&pod.record) {
                self.attach_nic(pod.record.owner, ifindex)
            } else {
                let Some(interface) = net::ifname(ifindex) else { continue };
                self.attach_pod(&interface, ifindex)
            };
            if let Err(error) = attached {
                log::error!("{error}");
            }
        }
    }

    pub(super) fn attach_pod(&mut self, interface: &str, ifindex: u32) -> Result<(), AgentError> {
        let grace = Rc::clone(&self.grace);
        let _short = grace.expedite();
        let target = Target { interface, ifindex };
        for (name, hook) in attach::POD.all() {
            let program = object::tc(&mut self.pods, name)?;
            attach::attach_tc(self.kind, program, name, target, hook, &self.pins.pod_tc(ifindex, hook))?;
        }
        Ok(())
    }

    pub(super) fn detach_pod(&self, ifindex: u32) -> Result<(), AttachError> {
        let interface = net::ifname(ifindex);
        for (name, hook) in attach::POD.all() {
            let pin = self.pins.pod_tc(ifindex, hook);
            attach::detach_tc(&self.pins, self.kind, name, interface.as_deref(), hook, &pin)?;
        }
        Ok(())
    }

    /// Takes a pod away: first no packet finds it, then its interface goes.
    pub(super) async fn release(&mut self, owner: u64) -> Result<(), AgentError> {
        let Some(live) = self.tables.release(owner)? else { return Ok(()) };
        self.wired.remove(&owner);
        self.closed.remove(&owner);
        if is_exclusive(&live.record) {
            self.take_nic_back(owner).await?;
            return Ok(self.detach_pod(live.record.ifindex)?);
        }
        self.take_down(live.record.ifindex).await
    }

    /// Removes a veth that the agent made, and only then its programs: without them it would be open to the host's
    /// stack.
    pub(super) async fn take_down(&self, ifindex: u32) -> Result<(), AgentError> {
        let _short = self.grace.expedite();
        if let Some(interface) = net::ifname(ifindex)
            && let Err(error) = wiring::unwire(&interface).await
        {
            log::error!("{error}");
        }
        Ok(self.detach_pod(ifindex)?)
    }

    /// Wires pods, several at a time; answers with those that cannot be.
    pub(super) async fn wire_all(
        &mut self,
        owners: &[u64],
        pods: &BTreeMap<u64, &Pod>,
    ) -> Vec<(u64, AgentError)> {
        let mut failed = Vec::new();
        let mut specs = Vec::new();
        for owner in owners {
            let pod = pods[owner];
            if pod.is_exclusive() {
                if let Err(error) = self.wire_nic(*owner, pod).await {
                    failed.push((*owner, error));
                }
            } else if !self.is_wired(*owner, pod) {
                self.wired.remove(owner);
                specs.push((*owner, pod_spec(pod)));
            }
        }
        let wiring = specs.into_iter().map(|(owner, spec)| async move { (owner, wiring::wire(&spec).await) });
        let mut wiring = stream::iter(wiring).buffer_unordered(WIRED_AT_ONCE);
        while let Some((owner, wired)) = wiring.next().await {
            match wired {
                Ok(wired) => {
                    log::debug!("pod {} is wired by {}", pods[&owner].full_name(), wired.host_interface);
                    self.wired.insert(owner, wired.host_interface);
                    self.closed.insert(owner);
                }
                Err(error) => failed.push((owner, error.into())),
            }
        }
        failed
    }

    /// Whether a pod was found wired since the start, and its interface is still there.
    pub(super) fn is_wired(&self, owner: u64, pod: &Pod) -> bool {
        let record = self.tables.pod(owner).map(|live| live.record);
        matches!((record, self.wired.get(&owner)), (Some(record), Some(interface))
            if net::ifindex(interface) == Some(record.ifindex)
                && record.mtu == pod.mtu
                && record.mac == pod.mac.0
                && record.gateway_mac == pod.gateway_mac.0
                && record.ipv4 == pod.ipv4.octets()
                && record.gateway_ipv4 == pod.gateway.octets()
                && pod.host_interface.as_ref().is_none_or(|named| named.as_str() == interface))
    }

    /// Attaches the programs of a wired pod, writes its record, and lets it speak. Returns how much changed.
    pub(super) async fn program(
        &mut self,
        pod: &Pod,
        record: &Endpoint,
        moving: &BTreeSet<u64>,
    ) -> Result<usize, AgentError> {
        if pod.is_exclusive() {
            return self.program_nic(pod, record, moving).await;
        }
        let owner = record.owner;
        // Wired a moment ago, or it would be stuck; if it went away since, the next check finds it.
        let Some(interface) = self.wired.get(&owner).cloned() else { return Ok(0) };
        let Some(ifindex) = net::ifindex(&interface) else { return Ok(0) };
        let record = Endpoint { ifindex, ..*record };
        let before = self.tables.pod(owner).copied();
        let moved = before.is_none_or(|live| live.record.ifindex != ifindex);
        if (moved || !self.is_attached(ifindex))
            && let Err(error) = self.attach_pod(&interface, ifindex)
        {
            // Without its programs the interface would be open to the host's stack.
            if before.is_none() {
                self.wired.remove(&owner);
                wiring::unwire(&interface).await?;
            }
            return Err(error);
        }
        let put = put(&mut self.tables, &record, moving).await?;
        let limited = self.limit(pod, put.id)?;
        if let Some(before) = before.filter(|live| live.record.ifindex != ifindex) {
            self.detach_pod(before.record.ifindex)?;
        }
        if self.closed.contains(&owner) {
            wiring::open(&pod_spec(pod), &interface).await?;
            self.closed.remove(&owner);
        }
        Ok(put.changes + limited)
    }

    pub(super) fn is_attached(&self, ifindex: u32) -> bool {
        self.kind == TcKind::Clsact
            || [Hook::In, Hook::Out].iter().all(|hook| self.pins.pod_tc(ifindex, *hook).exists())
    }

    /// Whether a pod's interface went away, or its programs.
    pub(super) fn lost_pods(&self) -> bool {
        self.tables.pods().any(|pod| {
            let ifindex = pod.record.ifindex;
            let gone = match is_exclusive(&pod.record) {
                true => !self.is_alive(ifindex),
                false => net::ifname(ifindex).is_none(),
            };
            gone || !self.is_attached(ifindex)
        })
    }
}

/// Writes a record, once there is a place for it that does not rest; owners that are moving give way.
pub(super) async fn put(
    tables: &mut Tables,
    record: &Endpoint,
    moving: &BTreeSet<u64>,
) -> Result<Put, TablesError> {
    let among = |owner| moving.contains(&owner);
    match tables.put_among(record, &among) {
        Err(TablesError::Resting) => {
            time::sleep(GRACE).await;
            tables.put_among(record, &among)
        }
        result => result,
    }
}

/// How a pod is wired.
pub(crate) fn pod_spec(pod: &Pod) -> PodSpec {
    PodSpec {
        owner_key: pod.container_id.clone(),
        netns: pod.netns.clone(),
        interface: pod.interface.to_string(),
        host_interface: pod.host_interface.as_ref().map(ToString::to_string),
        mac: pod.mac.0,
        ipv4: pod.ipv4,
        subnet: pod.subnet,
        gateway: pod.gateway,
        gateway_mac: pod.gateway_mac.0,
        mtu: pod.mtu,
        parent: pod.parent.as_ref().map(ToString::to_string).unwrap_or_default(),
        extras: pod.extras.clone(),
    }
}

//! The checks of the walk-through. Each proves what it says by looking at both ends and at the fabric between them.

mod allocator;
mod elb;
mod host;
mod pods;
mod refused;
mod upkeep;

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use super::evidence::{Place, Result, Trail};
use crate::lab::{self, Client, Lab, Netns, Node, Pod};

/// What a check found.
#[derive(Clone, Debug)]
pub struct Proof {
    /// How long what it looked at took.
    pub latency: Duration,
    /// What was seen, in a few words.
    pub detail: String,
}

/// A check.
#[derive(Clone, Copy)]
pub struct Check {
    /// Its name, `what` or `what/variant`.
    pub name: &'static str,
    /// The check itself.
    pub run: fn(&Cast<'_>) -> Result<Proof>,
}

/// All checks, in the order in which they run.
pub const ALL: &[Check] = &[
    Check { name: "allocated/static", run: allocator::allocated_static },
    Check { name: "pod-to-pod/same-node", run: pods::same_node },
    Check { name: "pod-to-pod/cross-node", run: pods::cross_node },
    Check { name: "vpc-to-pod", run: pods::vpc_to_pod },
    Check { name: "pod-to-vpc", run: pods::pod_to_vpc },
    Check { name: "eip-to-pod", run: pods::eip_to_pod },
    Check { name: "pod-to-internet", run: pods::pod_to_internet },
    Check { name: "elb-to-pod", run: elb::elb_to_pod },
    Check { name: "elb-health-checks", run: elb::health_checks },
    Check { name: "pod-to-elb/other-node", run: elb::other_node },
    Check { name: "pod-to-elb/same-node", run: elb::same_node },
    Check { name: "pod-to-elb/self", run: elb::to_self },
    Check { name: "node-to-elb", run: elb::node_to_elb },
    Check { name: "direct-and-elb-at-once", run: elb::direct_and_elb },
    Check { name: "host-to-pod", run: host::host_to_pod },
    Check { name: "pod-to-host", run: host::pod_to_host },
    Check { name: "nodeport-local", run: host::nodeport_local },
    Check { name: "pod-to-service", run: host::pod_to_service },
    Check { name: "metadata-denied", run: host::metadata_denied },
    Check { name: "spoof/ip", run: refused::spoof_ip },
    Check { name: "spoof/mac", run: refused::spoof_mac },
    Check { name: "spoof/arp", run: refused::spoof_arp },
    Check { name: "spoof/vlan", run: refused::spoof_vlan },
    Check { name: "unknown-vlan", run: refused::unknown_vlan },
    Check { name: "double-tag", run: refused::double_tag },
    Check { name: "large-transfer", run: upkeep::large_transfer },
    Check { name: "agent-killed", run: upkeep::agent_killed },
    Check { name: "allocator-killed", run: upkeep::allocator_killed },
    Check { name: "fabric-violations", run: upkeep::fabric_violations },
];

/// Who plays which part.
pub struct Cast<'l> {
    /// The lab, built as [`Lab::walkthrough`].
    pub lab: &'l Lab,
    /// Whether pods of one node talk by the fast path.
    pub fast_path: bool,
    /// The pod that most is about: `example-1`, with an EIP.
    pub a: &'l Pod,
    /// Another pod of its node.
    pub near: &'l Pod,
    /// A pod of another node.
    pub far: &'l Pod,
    /// The node of `a` and `near`.
    pub node: &'l Node,
    /// The virtual machine of the VPC.
    pub vm: &'l Client,
    /// The client in the outside network.
    pub outside: &'l Client,
    /// The ELB's listener in front of all pods.
    pub vip: SocketAddrV4,
}

impl<'l> Cast<'l> {
    /// The parts as they fall in the walk-through.
    ///
    /// # Errors
    ///
    /// When the lab is another one.
    pub fn of(lab: &'l Lab, fast_path: bool) -> lab::Result<Self> {
        let a = lab.pod("example-1")?;
        Ok(Self {
            lab,
            fast_path,
            a,
            near: lab.pod("example-4")?,
            far: lab.pod("example-2")?,
            node: lab.node_of(a)?,
            vm: lab.vm("vm")?,
            outside: lab.outside(),
            vip: lab.vip()?,
        })
    }
}

/// A pin of a client to a backend of the ELB, until the value is dropped.
struct Pinned<'l> {
    lab: &'l Lab,
    client: Ipv4Addr,
}

impl<'l> Pinned<'l> {
    fn new(lab: &'l Lab, client: Ipv4Addr, backend: &Pod) -> Result<Self> {
        lab.elb().pin(client, backend.ip)?;
        Ok(Self { lab, client })
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.lab.elb().unpin(self.client) {
            log::warn!("{error}");
        }
    }
}

/// Fails unless a connection from there gets nowhere, and tells how long that was tried.
fn gets_nowhere(netns: &Netns, from_port: u16, to: SocketAddrV4, limit: Duration) -> Result<Duration> {
    let start = Instant::now();
    let result = crate::lab::net::tcp_connect(netns, from_port, to, limit);
    crate::ensure!(result.is_err(), "{to} was reached");
    Ok(start.elapsed())
}

/// How the fabric saw the flow of a pod pair on one node: not at all on the fast path, else on both VLANs.
fn expect_direct(c: &Cast<'_>, from: &Pod, from_port: u16, to: &Pod) -> Result<&'static str> {
    let trail = Trail::between(c.lab, from.ip, to.ip, from_port)?;
    let client = SocketAddrV4::new(from.ip, from_port);
    if c.fast_path && from.node == to.node {
        trail.none()?;
        return Ok("the fabric saw no packet of it");
    }
    trail.both_ways(&Place::of_pod(to), client, to.http(), &Place::of_pod(from))?;
    Ok("both VLANs carried it both ways")
}

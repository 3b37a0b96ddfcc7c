//! What should be: the allocator's word as a checked value, whatever brought it.

pub mod file;

use std::{
    hash::{Hash, Hasher},
    net::{Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use datapath_common::abi::Endpoint;
use ipnet::Ipv4Net;

use crate::net::{InterfaceName, Mac, VlanId};

/// All pods of the node at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The source's number for this state; informative.
    pub revision: u64,
    /// Virtual addresses of load balancers.
    pub vips: Vec<Vip>,
    /// The pods.
    pub pods: Vec<Pod>,
}

/// A virtual address of a load balancer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Vip {
    /// The address.
    pub ip: Ipv4Addr,
    /// The port.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
}

/// What the allocator wants of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// It shall have its network.
    Active,
    /// It is going away: treated as if it were not listed.
    Releasing,
}

/// A pod and its sub-ENI.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pod {
    /// Kubernetes' uid.
    pub uid: String,
    /// Kubernetes' namespace.
    pub namespace: String,
    /// Kubernetes' name.
    pub name: String,
    /// The runtime's id of the sandbox.
    pub container_id: String,
    /// The pod's network namespace, if the agent shall wire the pod.
    pub netns: Option<PathBuf>,
    /// Its interface, inside.
    pub interface: InterfaceName,
    /// Its interface on the host's side, if somebody else wired the pod.
    pub host_interface: Option<InterfaceName>,
    /// What the allocator wants.
    pub state: State,
    /// The allocator's generation of the allocation.
    pub generation: u32,
    /// Interface of the parent ENI.
    pub parent: InterfaceName,
    /// VLAN id on the parent; none yet = the pod is listed, and not programmed.
    pub vlan: Option<VlanId>,
    /// MAC of the sub-ENI.
    pub mac: Mac,
    /// MAC on the wire.
    pub wire_mac: Mac,
    /// IPv4 address.
    pub ipv4: Ipv4Addr,
    /// IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// The subnet.
    pub subnet: Ipv4Net,
    /// Its gateway.
    pub gateway: Ipv4Addr,
    /// The gateway's MAC.
    pub gateway_mac: Mac,
    /// The IPv6 gateway.
    pub gateway_ipv6: Option<Ipv6Addr>,
    /// IP MTU of the pod's interface.
    pub mtu: u16,
    /// Set of security groups.
    pub policy: u32,
}

impl Pod {
    /// Who owns the record: the same for the same container of the same pod, at all times. Never 0.
    pub fn owner(&self) -> u64 {
        let mut hash = Fnv::default();
        hash.write(self.uid.as_bytes());
        // No uid or container id has a zero byte.
        hash.write(&[0]);
        hash.write(self.container_id.as_bytes());
        hash.finish().max(1)
    }

    /// Whether it shall be in the tables.
    pub fn is_wanted(&self) -> bool {
        self.state == State::Active && self.vlan.is_some()
    }

    /// As users call it.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Its record, without what wiring and tables fill in.
    pub fn record(&self, parent: u16, parent_ifindex: u32) -> Endpoint {
        Endpoint {
            owner: self.owner(),
            id: 0,
            generation: self.generation,
            ifindex: 0,
            parent_ifindex,
            policy_id: self.policy,
            flags: 0,
            ipv4: self.ipv4.octets(),
            gateway_ipv4: self.gateway.octets(),
            ipv6: self.ipv6.map_or([0; 16], |address| address.octets()),
            gateway_ipv6: self.gateway_ipv6.map_or([0; 16], |address| address.octets()),
            mac: self.mac.0,
            wire_mac: self.wire_mac.0,
            gateway_mac: self.gateway_mac.0,
            vid: self.vlan.map_or(0, VlanId::get),
            mtu: self.mtu,
            parent,
        }
    }
}

impl Snapshot {
    /// A number for what the snapshot says, apart from its revision.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = Fnv::default();
        self.vips.hash(&mut hash);
        self.pods.hash(&mut hash);
        hash.finish()
    }
}

/// FNV-1a: unlike the standard library's hasher it gives the same numbers with every version of Rust, and the owner
/// of a record outlives many of them.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

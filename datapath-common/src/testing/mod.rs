//! For tests, here and in other crates (feature `testing`): tables in memory, a packet builder, and a small node.

pub mod memory;
pub mod packet;
pub mod rules;

pub use memory::{Change, MemoryTables};
pub use packet::Packet;
pub use rules::MemoryRules;

use crate::abi::{Endpoint, maps::host_dst};

/// MAC of the gateway of every pod in [`node`].
pub const GATEWAY_MAC: [u8; 6] = [0xfa, 0xff, 0xff, 0, 0, 1];
/// Address of the gateway of every pod in [`node`].
pub const GATEWAY: [u8; 4] = [10, 1, 16, 1];
/// MAC of the node's side of the pods' veths, and of the parent ENI.
pub const NODE_MAC: [u8; 6] = [0xfa, 0x16, 0x3e, 0, 0, 0xee];
/// The node's own address.
pub const NODE: [u8; 4] = [10, 1, 0, 167];
/// An address of the VPC on another node.
pub const REMOTE: [u8; 4] = [10, 1, 18, 216];
/// An address of a Kubernetes Service that the node's stack serves.
pub const SERVICE: [u8; 4] = [10, 247, 0, 10];
/// A load balancer's address (TCP and UDP port 80) outside of what the node serves.
pub const VIP: [u8; 4] = [10, 1, 0, 200];
/// A load balancer's address (TCP port 80) within a prefix that the node serves.
pub const VIP_IN_SERVICES: [u8; 4] = [10, 247, 0, 200];
/// The cloud's metadata service, which is denied.
pub const METADATA: [u8; 4] = [169, 254, 169, 254];
/// The pods of [`node`], by slot.
pub const PODS: [Endpoint; 4] = [
    pod(1, 101, [10, 1, 18, 2]),
    pod(2, 102, [10, 1, 16, 125]),
    // A cloud where pods have the parent's MAC on the wire; and a smaller MTU.
    Endpoint { wire_mac: NODE_MAC, mtu: 1400, ..pod(3, 103, [10, 1, 17, 111]) },
    // On another parent, with the VLAN id of the first.
    Endpoint { parent: 1, parent_ifindex: 12, vid: 101, ..pod(4, 101, [10, 1, 17, 50]) },
];
/// The parent's interface index for the first three pods; the fourth's is 12.
pub const PARENT_IFINDEX: u32 = 1;

const fn pod(n: u8, vid: u16, ipv4: [u8; 4]) -> Endpoint {
    Endpoint {
        owner: 0xe000 + n as u64,
        id: 10 + n as u32,
        generation: 1,
        ifindex: 100 + n as u32,
        parent_ifindex: PARENT_IFINDEX,
        ipv4,
        gateway_ipv4: GATEWAY,
        mac: [0xfa, 0x16, 0x3e, 0, 1, n],
        wire_mac: [0xfa, 0x16, 0x3e, 0, 1, n],
        gateway_mac: GATEWAY_MAC,
        vid,
        mtu: 1500,
        ..Endpoint::ZERO
    }
}

/// A node with [`PODS`] in slots 1 to 4 as parent 0's programs see it, with the fast path on.
pub fn node() -> MemoryTables {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    let mut tables = MemoryTables::default();
    tables.now = 1000;
    tables.fast_path = true;
    for pod in PODS {
        tables.add(pod);
    }
    tables.host_dst = [
        (NODE, 32, host_dst::HOST | host_dst::PREFERRED),
        ([10, 1, 17, 172], 32, host_dst::HOST),
        ([10, 247, 0, 0], 16, host_dst::HOST | host_dst::SERVICE),
        (METADATA, 32, host_dst::DENY),
    ]
    .into();
    tables.vips = [(VIP, 80, TCP), (VIP, 80, UDP), (VIP_IN_SERVICES, 80, TCP)].into();
    tables
}

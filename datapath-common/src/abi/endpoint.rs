//! The record of one pod.

#[cfg(not(feature = "next-abi"))]
use core::mem::{offset_of, size_of};

/// Bits of [`Endpoint::flags`]. What stands for either pod of a pair holds for the pair, unless it says otherwise.
pub mod flag {
    /// No traffic of the pod takes the fast path.
    pub const OFF: u32 = 1;
    /// Traffic of the pod takes the fast path where security groups allow it.
    pub const GROUPS: u32 = 2;
    /// What security groups would say of the pod's traffic is counted, and not done.
    pub const OBSERVE: u32 = 4;
    /// The pod has a row in map `LIMITS`. It stands for the one pod, not for the pair.
    pub const LIMITED: u32 = 8;
}

/// Everything the datapath knows of a pod's sub-ENI: the value of map `ENDPOINT`, found by slot.
///
/// A record is written before any index map points at its slot and never changes while one does; a change takes a
/// fresh slot and swaps the index. [`id`](Self::id) stays the same through such changes, so that counters and
/// remembered flows, which are keyed by it, survive them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Zero.
    #[cfg(feature = "next-abi")]
    pub spare: u64,
    /// Who owns the record: a hash of pod uid and container id. Never 0 in a live record.
    pub owner: u64,
    /// The pod's number on this node, 1 to `MAX_ENDPOINTS`, for its whole life.
    pub id: u32,
    /// The allocator's generation of this allocation; an older one never replaces a newer one.
    pub generation: u32,
    /// Interface index of the host side of the pod's veth; for an ENI in the pod, the one that the agent gave it there, which no
    /// interface of the node has.
    pub ifindex: u32,
    /// Interface index of the parent ENI.
    pub parent_ifindex: u32,
    /// Class of pods whose security groups make them alike ([`policy`](super::policy)); 0 = cannot be judged here.
    pub policy_id: u32,
    /// [`flag`]s.
    pub flags: u32,
    /// The pod's address.
    pub ipv4: [u8; 4],
    /// The subnet's gateway, for which the datapath answers ARP.
    pub gateway_ipv4: [u8; 4],
    /// The pod's IPv6 address; all zero = none.
    pub ipv6: [u8; 16],
    /// The subnet's IPv6 gateway; all zero = none.
    pub gateway_ipv6: [u8; 16],
    /// The sub-ENI's MAC, which the pod's interface carries. MACs stand at multiples of four and are read as two words.
    pub mac: [u8; 6],
    /// VLAN id on the parent, 1 to 4094.
    pub vid: u16,
    /// The pod's MAC on the wire: its own, or the parent's for clouds that do it so.
    pub wire_mac: [u8; 6],
    /// IP MTU of the pod's interface, in bytes.
    pub mtu: u16,
    /// The gateway's MAC: destination of everything that leaves on the wire.
    pub gateway_mac: [u8; 6],
    /// Index of the parent, the upper part of an index into map `SUBENI`.
    pub parent: u16,
}

#[cfg(not(feature = "next-abi"))]
const _: () = {
    assert!(size_of::<Endpoint>() == 96);
    assert!(offset_of!(Endpoint, id) == 8);
    assert!(offset_of!(Endpoint, ifindex) == 16);
    assert!(offset_of!(Endpoint, ipv4) == 32);
    assert!(offset_of!(Endpoint, ipv6) == 40);
    assert!(offset_of!(Endpoint, mac) == 72);
    assert!(offset_of!(Endpoint, wire_mac) == 80);
    assert!(offset_of!(Endpoint, gateway_mac) == 88);
    assert!(offset_of!(Endpoint, parent) == 94);
};

impl Endpoint {
    /// An unused record.
    pub const ZERO: Self = Self {
        #[cfg(feature = "next-abi")]
        spare: 0,
        owner: 0,
        id: 0,
        generation: 0,
        ifindex: 0,
        parent_ifindex: 0,
        policy_id: 0,
        flags: 0,
        ipv4: [0; 4],
        gateway_ipv4: [0; 4],
        ipv6: [0; 16],
        gateway_ipv6: [0; 16],
        mac: [0; 6],
        wire_mac: [0; 6],
        gateway_mac: [0; 6],
        vid: 0,
        mtu: 0,
        parent: 0,
    };
}

//! The tables that decisions are made over.

use crate::{
    abi::{
        Admitted, Direction, Door, Endpoint, Flow, FlowKey, FragmentKey, Limits, PairKey,
        policy::{ClassGroups, Page, ProgramRow, VerdictRow},
    },
    decide::{limit, policy},
};

/// The tables that security groups are compiled to ([`policy`](crate::abi::policy)).
pub trait Rules {
    /// The epoch; its lowest bit says which half is in force.
    fn epoch(&self) -> u32;
    /// The verdicts of a class.
    fn verdicts(&self, class: u32) -> Option<&VerdictRow>;
    /// The groups of a class, by [`class_row`](crate::abi::policy::class_row).
    fn class_groups(&self, row: u32) -> Option<&ClassGroups>;
    /// A group's programs, by [`program_row`](crate::abi::policy::program_row).
    fn programs(&self, row: u32) -> Option<&ProgramRow>;
    /// A page of programs, by [`page_row`](crate::abi::policy::page_row).
    fn page(&self, row: u32) -> Option<&Page>;
    /// What one side of a pair says ([`policy::side_says`]): a method, so that the kernel programs can make it a function
    /// that the verifier walks once, whatever the packets that lead to it.
    #[inline(always)]
    fn side_says(&self, base: u32, own: u32, peer: u32, key: u32) -> u32 {
        policy::side_says(self, base, own, peer, key)
    }
}

/// A number that several CPUs change at the same time.
pub trait Shared {
    /// What it is.
    fn read(&self) -> u64;
    /// Sets it to `new` if it still is `old`.
    fn replace(&self, old: u64, new: u64);
    /// Adds to it, and returns what it was.
    fn add(&self, more: u64) -> u64;
}

#[cfg(target_has_atomic = "64")]
impl Shared for core::sync::atomic::AtomicU64 {
    fn read(&self) -> u64 {
        self.load(core::sync::atomic::Ordering::Relaxed)
    }

    fn replace(&self, old: u64, new: u64) {
        use core::sync::atomic::Ordering::Relaxed;
        // Whoever was first has set it.
        let _ = self.compare_exchange(old, new, Relaxed, Relaxed);
    }

    fn add(&self, more: u64) -> u64 {
        self.fetch_add(more, core::sync::atomic::Ordering::Relaxed)
    }
}

/// The tables as a decision sees them. The kernel programs answer from the BPF maps; the host answers from
/// in-memory tables (tests) or from the pinned maps (`eniway trace`).
pub trait Tables: Rules {
    /// How far a limit is used up, shared by all CPUs.
    type Spent: Shared;
    /// Whether plain packets are checked for belonging to whoever sends or receives them. Always, but in programs that are
    /// built to measure what the checks cost.
    const CHECKED: bool = true;

    /// Slot of the pod that has this VLAN id on the parent the program is attached to; 0 = none. `vid` is below 4096.
    fn subeni(&self, vid: u16) -> u32;
    /// The pod behind a host-side interface.
    fn pod_by_ifindex(&self, ifindex: u32) -> Option<&Endpoint>;
    /// The pod with this address on this node.
    fn pod_by_ipv4(&self, address: [u8; 4]) -> Option<&Endpoint>;
    /// The record in a slot.
    fn endpoint(&self, slot: u32) -> Option<&Endpoint>;
    /// Flags ([`host_dst`](crate::abi::maps::host_dst)) of the longest prefix that holds the address; 0 = none.
    fn host_dst(&self, address: [u8; 4]) -> u32;
    /// Whether a load balancer serves (address, port, protocol).
    fn is_vip(&self, address: [u8; 4], port: u16, proto: u8) -> bool;
    /// Whether the pod with this id has, or had, a remembered flow or fragment.
    fn marked(&self, id: u32) -> bool;
    /// The memory of a flow.
    fn flow(&self, key: &FlowKey) -> Option<&Flow>;
    /// Where the first fragment of a datagram went.
    fn fragment(&self, key: &FragmentKey) -> Option<Door>;
    /// Seconds of the monotonic clock.
    fn now(&self) -> u32;
    /// Remembers a flow, and marks its pod.
    fn remember(&self, key: &FlowKey, flow: &Flow);
    /// Forgets a flow.
    fn forget(&self, key: &FlowKey);
    /// Remembers where the first fragment of a datagram went, and marks its pod.
    fn remember_fragment(&self, key: &FragmentKey, door: Door);
    /// A flow that was admitted to the fast path.
    fn admitted(&self, key: &PairKey) -> Option<&Admitted>;
    /// Remembers a flow as admitted.
    fn admit(&self, key: &PairKey, flow: &Admitted);
    /// Forgets an admitted flow.
    fn retire(&self, key: &PairKey);
    /// The limits of the pod with this id.
    fn limits(&self, id: u32) -> Option<&Limits>;
    /// How far a pod's limit is used up ([`Spent`](crate::abi::Spent)).
    fn spent(&self, id: u32, direction: Direction) -> Option<&Self::Spent>;
    /// Nanoseconds of the monotonic clock. Asked for limited pods only.
    fn nanos(&self) -> u64;
    /// Charges a packet to a pod's limit ([`limit::charge`]): a method for the same reason as [`Rules::side_says`].
    #[inline(always)]
    fn charge(&self, id: u32, bytes: u32, how: u32) -> u64 {
        limit::charge(self, id, bytes, how)
    }
    /// Whether pod-to-pod traffic on the node may take the fast path at all.
    fn fast_path(&self) -> bool;
}

//! What can become of a packet, as one list of numbers: the doors it may take, remarks on the way, reasons to drop
//! it. Names for the CLI, metrics and the documentation come from this list alone.

use core::mem::size_of;

macro_rules! outcomes {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $text:literal, $kind:ident;)+) => {
        /// What became of a packet. Numbers are never reused.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Outcome {
            $($(#[doc = $doc])+ $name = $number,)+
        }

        impl Outcome {
            /// All outcomes, by number.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The name that users read: in `eniway counters`, in traces, in metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }

            /// Whether the outcome forwards, drops, or only remarks.
            pub const fn kind(self) -> Kind {
                match self { $(Self::$name => Kind::$kind,)+ }
            }

            /// One sentence on what it means.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+),)+ }
            }
        }
    };
}

/// What an [`Outcome`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The packet went on.
    Forward,
    /// Counted besides the packet's own outcome.
    Remark,
    /// The packet ended here.
    Drop,
}

outcomes! {
    /// The packet crossed the pod's VLAN on the parent ENI.
    Wire = 1, "wire", Forward;
    /// The packet took the fast path between two pods of this node.
    Local = 2, "local", Forward;
    /// The packet passed between the pod and the node's own stack.
    Host = 3, "host", Forward;
    /// An ARP request for the gateway was answered in place.
    ArpAnswered = 4, "arp-answered", Forward;
    /// A frame without a VLAN id on the parent ENI was left to the node's stack.
    Untagged = 5, "untagged", Forward;
    /// A reply of a connection that the node's stack had translated went back to the stack.
    HostReturn = 6, "host-return", Forward;
    /// ARP of the pod, other than for the gateway, went out on its VLAN.
    WireArp = 7, "wire-arp", Forward;

    /// A packet to a Service went to the node's stack, which translates it and forwards it in the pod's name.
    HostService = 12, "host-service", Forward;

    /// A flow's door was remembered, because its replies would have taken another one.
    FlowRemembered = 8, "flow-remembered", Remark;
    /// A packet in the middle of a connection found its memory gone; it was remembered anew.
    FlowRelearned = 9, "flow-relearned", Remark;
    /// A packet did not fit the MTU of its destination pod and took the wire.
    TooBigForLocal = 10, "too-big-for-local", Remark;

    /// The first packet of a flow was judged by security groups; the flow was admitted to the fast path.
    FlowAdmitted = 37, "flow-admitted", Remark;
    /// A packet in the middle of a connection found no state of it; it was judged as a first one, and admitted.
    FlowReadmitted = 38, "flow-readmitted", Remark;
    /// Hairpin: the pods' security groups cannot be judged on the node, so the VPC decides.
    PolicyWire = 39, "policy-wire", Remark;
    /// Hairpin: security groups do not allow the packet; the VPC refuses it, and logs.
    PolicyRefused = 40, "policy-refused", Remark;
    /// Hairpin: a packet in the middle of a connection found no state of it, and may not open one.
    PolicyNoFlow = 41, "policy-no-flow", Remark;
    /// Hairpin: the flow was admitted once, and is not allowed any more.
    PolicyRevoked = 42, "policy-revoked", Remark;
    /// Observed only: security groups would let the packet take the fast path.
    WouldFast = 43, "would-fast", Remark;
    /// Observed only: the packet would hairpin, because the pods' security groups cannot be judged on the node.
    WouldWire = 44, "would-wire", Remark;
    /// Observed only: the packet would hairpin, because security groups do not allow it.
    WouldRefuse = 45, "would-refuse", Remark;

    /// The frame ends before its headers do, or could not be rewritten.
    Truncated = 16, "truncated", Drop;
    /// The IPv4 header contradicts itself or the frame: version, header length or total length.
    BadIpv4Header = 17, "bad-ipv4-header", Drop;
    /// An 802.1ad tag or a second VLAN tag.
    DoubleTag = 18, "double-tag", Drop;
    /// No pod of this node has the frame's VLAN id on this parent ENI.
    UnknownVlan = 19, "unknown-vlan", Drop;
    /// The destination MAC is not the sub-ENI's.
    WrongMac = 20, "wrong-mac", Drop;
    /// The destination address is not the pod's.
    WrongAddress = 21, "wrong-address", Drop;
    /// ARP for an address that is not the pod's.
    ArpNotForPod = 22, "arp-not-for-pod", Drop;
    /// A load balancer sent the pod's own packet back to it.
    SelfHairpin = 23, "self-hairpin", Drop;
    /// IPv6, which this version does not forward.
    Ipv6 = 24, "ipv6", Drop;
    /// IPv6 neighbour or router discovery, which nothing answers in this version.
    Ipv6Discovery = 25, "ipv6-discovery", Drop;
    /// Neither ARP nor IP.
    UnknownEthertype = 26, "unknown-ethertype", Drop;
    /// A pod sent a frame with a VLAN tag of its own.
    TaggedByPod = 27, "tagged-by-pod", Drop;
    /// A pod sent from a MAC that is not its own.
    SourceMac = 28, "source-mac", Drop;
    /// A pod sent from an address that is not its own.
    SourceAddress = 29, "source-address", Drop;
    /// A pod sent ARP in another's name, or malformed ARP.
    ArpSpoof = 30, "arp-spoof", Drop;
    /// A pod answered as a DHCP server.
    DhcpServer = 31, "dhcp-server", Drop;
    /// A pod advertised itself as a router (ICMP type 9).
    RouterAdvertisement = 32, "router-advertisement", Drop;
    /// A pod sent an ICMP redirect (type 5).
    IcmpRedirect = 33, "icmp-redirect", Drop;
    /// Multicast or broadcast IPv4, which the VPC does not carry.
    Multicast = 34, "multicast", Drop;
    /// A destination that pods may not reach, such as the metadata service.
    DeniedDestination = 35, "denied-destination", Drop;
    /// A packet of an interface that is attached but has no record.
    UnknownPod = 36, "unknown-pod", Drop;
    /// The pod, or the other one that was meant, receives more than its limit of bandwidth.
    IngressLimit = 46, "ingress-limit", Drop;
    /// The pod sends more than its limit of bandwidth.
    EgressLimit = 47, "egress-limit", Drop;
    /// The pod sends more than its limit of bandwidth, and the share of its parent's queue that it may fill is full.
    EgressQueue = 48, "egress-queue", Drop;
}

/// One more than the largest number an outcome may have.
pub const OUTCOMES: usize = if cfg!(feature = "next-abi") { 128 } else { 64 };

/// Which way a packet goes, seen from the pod.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// Towards the pod.
    Ingress = 0,
    /// From the pod.
    Egress = 1,
}

impl Direction {
    /// Both directions.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// As users read it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// Packets and bytes of one outcome in one direction, on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets; the segments of a GSO packet count one by one.
    pub packets: u64,
    /// Bytes from the Ethernet header on, without the VLAN tag that the kernel keeps beside the frame.
    pub bytes: u64,
}

/// Value of map `COUNTERS`: all counters of one pod, or, in row 0, of packets without one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CounterRow {
    /// By [`CounterRow::index`].
    pub counters: [Counter; 2 * OUTCOMES],
}

/// Value of map `CARRIED`: what a pod's counters had come to in maps of other layouts. The pod's counters are this and those of
/// `COUNTERS` together.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carried {
    /// The kernel's id of the map that `pending` was read from.
    pub from: u64,
    /// What is final.
    pub base: CounterRow,
    /// What that map held when it was last read.
    pub pending: CounterRow,
}

const _: () = assert!(size_of::<Carried>() == 8 + 2 * size_of::<CounterRow>());

const _: () = {
    assert!(size_of::<Counter>() == 16);
    assert!(size_of::<CounterRow>() == 32 * OUTCOMES);
    let mut i = 0;
    while i < Outcome::ALL.len() {
        assert!((Outcome::ALL[i] as usize) < OUTCOMES);
        i += 1;
    }
};

impl CounterRow {
    /// All counters at zero.
    pub const ZERO: Self = Self { counters: [Counter { packets: 0, bytes: 0 }; 2 * OUTCOMES] };

    /// Where a counter stands in its row.
    #[inline(always)]
    pub const fn index(direction: Direction, outcome: Outcome) -> usize {
        direction as usize * OUTCOMES + outcome as usize
    }

    /// Adds another row's counters.
    pub fn add(&mut self, other: &Self) {
        for (sum, counter) in self.counters.iter_mut().zip(&other.counters) {
            sum.packets += counter.packets;
            sum.bytes += counter.bytes;
        }
    }

    /// The counter of one outcome.
    pub const fn get(&self, direction: Direction, outcome: Outcome) -> Counter {
        self.counters[Self::index(direction, outcome)]
    }
}

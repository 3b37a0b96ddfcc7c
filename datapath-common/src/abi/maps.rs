//! Names, keys and sizes of the maps, and names of the load-time constants.

use core::mem::size_of;

/// Records by slot. Array, `u32` → [`Endpoint`](super::Endpoint). Slot 0 is never used: an index of 0 means "none".
pub const ENDPOINT: &str = "ENDPOINT";
/// (parent index × [`VLANS`] + VLAN id) → slot. Array of `u32`.
pub const SUBENI: &str = "SUBENI";
/// Host-side interface index → slot. Hash, `u32` → `u32`.
pub const POD_IF: &str = "POD_IF";
/// Address of a pod on this node → slot. Hash, `[u8; 4]` → `u32`.
pub const POD_IP4: &str = "POD_IP4";
/// [`POD_IF`] by the low 16 bits of its keys, so that one array look-up replaces that of a hash map. Array of `u32`: the slot of
/// the one pod with such a key, whose record tells whether it is the pod in question; 0 = no pod; [`SHARED`] = look into
/// [`POD_IF`].
pub const POD_IF_DIRECT: &str = "POD_IF_DIRECT";
/// The same for [`POD_IP4`].
pub const POD_IP4_DIRECT: &str = "POD_IP4_DIRECT";
/// IPv6 address of a pod on this node → slot. Hash, `[u8; 16]` → `u32`. Filled, and not yet asked by the programs.
pub const POD_IP6: &str = "POD_IP6";
/// Destinations that are not left to the wire. LPM trie, prefix → [`host_dst`] flags.
pub const HOST_DST: &str = "HOST_DST";
/// Which addresses [`HOST_DST`] has to be asked about. Array of `u64`, bits by [`host_dst_bit`]: where an address's bit is 0, no
/// prefix holds it.
pub const HOST_DST_BITS: &str = "HOST_DST_BITS";
/// Virtual addresses of load balancers, which go to the wire whatever `HOST_DST` says. Hash, [`VipKey`] → `u32` (1).
pub const VIPS: &str = "VIPS";
/// Remembered flows. LRU hash, [`FlowKey`](super::FlowKey) → [`Flow`](super::Flow).
pub const FLOWS: &str = "FLOWS";
/// Whether a pod has, or had, a remembered flow or fragment. Array by endpoint id of `u32`, 0 or 1.
pub const FLOW_MARK: &str = "FLOW_MARK";
/// First fragments seen. LRU hash, [`FragmentKey`](super::FragmentKey) → [`Fragment`](super::Fragment).
pub const FRAGS: &str = "FRAGS";
/// Packets and bytes. Per-CPU array by endpoint id (0 = no pod) of [`CounterRow`](super::CounterRow).
pub const COUNTERS: &str = "COUNTERS";

/// Limits of bandwidth of the pods that have them. Array by endpoint id of [`Limits`](super::Limits).
pub const LIMITS: &str = "LIMITS";
/// How far limits are used up. Array by endpoint id of [`Spent`](super::Spent).
pub const SPENT: &str = "SPENT";

/// Epoch of the security groups' tables. Array with one `u32`: its lowest bit says which half is in force.
pub const EPOCH: &str = "EPOCH";
/// Verdicts. Array by class of [`VerdictRow`](super::policy::VerdictRow).
pub const VERDICT: &str = "VERDICT";
/// Groups of classes. Array by [`class_row`](super::policy::class_row) of
/// [`ClassGroups`](super::policy::ClassGroups).
pub const CLASS: &str = "CLASS";
/// Where programs begin. Array by [`program_row`](super::policy::program_row) of
/// [`ProgramRow`](super::policy::ProgramRow).
pub const PROGRAM: &str = "PROGRAM";
/// Programs. Array by [`page_row`](super::policy::page_row) of [`Page`](super::policy::Page).
pub const RULES: &str = "RULES";
/// Flows admitted to the fast path. LRU hash, [`PairKey`](super::PairKey) → [`Admitted`](super::Admitted).
pub const PAIRS: &str = "PAIRS";

/// Whether a pod has, or had, an entry in `PAIRS`. Array by endpoint id of `u32`, 0 or 1.
pub const PAIR_MARK: &str = "PAIR_MARK";

/// What the counters of earlier layouts had come to. Hash by endpoint id of [`Carried`](super::Carried), written and read by agents
/// only; it is there only where counters were carried over.
pub const CARRIED: &str = "CARRIED";
/// What the maps hold, for agents of other versions ([`layout`](super::layout)): frozen array with one value, which is JSON and zeros.
pub const LAYOUT: &str = "LAYOUT";

/// All maps of the programs, in the order of creation.
pub const ALL: [&str; 23] = [
    ENDPOINT,
    SUBENI,
    POD_IF,
    POD_IF_DIRECT,
    POD_IP4,
    POD_IP4_DIRECT,
    POD_IP6,
    HOST_DST,
    HOST_DST_BITS,
    VIPS,
    FLOWS,
    FLOW_MARK,
    FRAGS,
    COUNTERS,
    EPOCH,
    VERDICT,
    CLASS,
    PROGRAM,
    RULES,
    PAIRS,
    PAIR_MARK,
    LIMITS,
    SPENT,
];

/// Load-time constant (`u8`): 1 = pod-to-pod traffic on the node takes the fast path as far as the pods'
/// [`flag`](super::endpoint::flag)s and security groups let it, 0 = everything hairpins.
pub const FAST_PATH: &str = "FAST_PATH";
/// Load-time constant (`u32`): index of the parent ENI that the programs are attached to.
pub const PARENT_INDEX: &str = "PARENT_INDEX";
/// Load-time constant (`u8`): 1 = `eni_xdp` also delivers what it wins at, 0 = it only guards.
pub const XDP_REDIRECT: &str = "XDP_REDIRECT";

/// Bit that `pod_egress` sets in the mark of a pod's packet to a Service, so that a routing rule sends it, once translated,
/// out by the pod's parent. Everything else with a pod's source that the node's stack forwards is a reply that it is
/// about to translate back, perhaps of another node's pod, and belongs on the node's own routes. Clear of the bits that
/// kube-proxy (0x4000, 0x8000), Cilium (0x0f00) and the AWS VPC CNI (0x80) use.
pub const SERVICE_MARK: u32 = 0x1000;

/// Entries of `SUBENI` for each parent: all values of a 12-bit VLAN id.
pub const VLANS: u32 = 4096;
/// Entries of `POD_IF_DIRECT` and `POD_IP4_DIRECT`.
pub const DIRECT: u32 = 1 << 16;
/// Entry of `POD_IF_DIRECT` and `POD_IP4_DIRECT`: more than one pod has, or had, a key with these low 16 bits.
pub const SHARED: u32 = u32::MAX;
/// Entries of `HOST_DST_BITS`.
pub const HOST_DST_WORDS: u32 = 1 << 16;
/// Parent ENIs that a node may have.
pub const MAX_PARENTS: u32 = 8;
/// Pods that a node may have unless configured otherwise.
pub const DEFAULT_ENDPOINTS: u32 = 1024;
/// Slots for each pod: a change takes a second one, and the old one rests for a grace period.
pub const SLOTS_PER_ENDPOINT: u32 = 2;
/// Flows remembered unless configured otherwise.
pub const DEFAULT_FLOWS: u32 = 65_536;
/// Entries of `HOST_DST`.
pub const MAX_HOST_DST: u32 = 256;
/// Entries of `VIPS`.
pub const MAX_VIPS: u32 = 16_384;
/// Entries of `FRAGS`.
pub const MAX_FRAGS: u32 = 4096;

/// The entry of `POD_IF_DIRECT` for an interface index.
#[inline(always)]
pub const fn direct_ifindex(ifindex: u32) -> u32 {
    ifindex % DIRECT
}

/// The entry of `POD_IP4_DIRECT` for an address.
#[inline(always)]
pub const fn direct_ipv4(address: [u8; 4]) -> u32 {
    u32::from_be_bytes(address) % DIRECT
}

/// The entry and the bit of `HOST_DST_BITS` for an address: an entry for each second and third byte, and in it a bit for
/// four addresses. The node's own address is in the subnet of its pods: they do not share its bit, or few of them do.
#[inline(always)]
pub const fn host_dst_bit(address: [u8; 4]) -> (u32, u64) {
    let subnet = (u32::from_be_bytes(address) >> 8) % HOST_DST_WORDS;
    (subnet, 1 << (address[3] >> 2))
}

/// Flags of `HOST_DST`.
pub mod host_dst {
    /// The destination is served by the node's stack.
    pub const HOST: u32 = 1;
    /// Pods may not reach the destination at all (the cloud's metadata service, unless allowed).
    pub const DENY: u32 = 2;
    /// Together with [`HOST`]: the node's stack does not serve it but translates it, and forwards in the pod's name.
    pub const SERVICE: u32 = 4;
    /// The node's own address, or one that health checks come from: what a limited pod exchanges with it goes before.
    pub const PREFERRED: u32 = 8;
}

/// Key of map `VIPS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VipKey {
    /// The virtual address.
    pub addr: [u8; 4],
    /// The port; 0 where the protocol has none.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
}

const _: () = assert!(size_of::<VipKey>() == 8);

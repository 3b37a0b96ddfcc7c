//! All maps, and the decisions' view of them. Layouts, and what each is for: `datapath_common::abi::maps`. Sizes here are
//! the defaults; the loader sets the configured ones.

#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "aya-ebpf after 0.2 takes keys and values by reference only"
)]

use aya_ebpf::{
    helpers::generated::{bpf_ktime_get_coarse_ns, bpf_ktime_get_ns},
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, lpm_trie::Key},
};
use datapath_common::{
    abi::{
        Admitted, CounterRow, Direction, Door, Endpoint, Flow, FlowKey, Fragment, FragmentKey, Limits,
        PairKey, Spent,
        maps::{
            DEFAULT_ENDPOINTS, DEFAULT_FLOWS, DIRECT, HOST_DST_WORDS, MAX_FRAGS, MAX_HOST_DST, MAX_PARENTS,
            MAX_VIPS, SLOTS_PER_ENDPOINT, VLANS, VipKey, direct_ifindex, direct_ipv4, host_dst_bit,
        },
        policy::{ClassGroups, MAX_GROUPS, PAGES, Page, ProgramRow, VerdictRow},
    },
    decide::{limit, policy::side_says},
    tables::{Rules, Tables},
};

use crate::{config, shared};

/// Written by the agent, before any index points at the slot; read by every hook; lives as long as an index points at it.
#[map]
static ENDPOINT: Array<Endpoint> = Array::with_max_entries(DEFAULT_ENDPOINTS * SLOTS_PER_ENDPOINT + 1, 0);
/// Written by the agent; read by `eni_xdp` and `eni_ingress`; lives as long as the pod.
#[map]
static SUBENI: Array<u32> = Array::with_max_entries(MAX_PARENTS * VLANS, 0);
/// Written by the agent; read by `pod_egress` and `pod_ingress`; lives as long as the pod.
#[map]
static POD_IF: HashMap<u32, u32> = HashMap::with_max_entries(DEFAULT_ENDPOINTS, 0);
/// Written by the agent; read by `pod_egress` and `pod_ingress`; lives as long as the pod.
#[map]
static POD_IF_DIRECT: Array<u32> = Array::with_max_entries(DIRECT, 0);
/// Written by the agent; read by every hook; lives as long as the pod.
#[map]
static POD_IP4_DIRECT: Array<u32> = Array::with_max_entries(DIRECT, 0);
/// Written by the agent; read by every hook; lives as long as the pod.
#[map]
static POD_IP4: HashMap<[u8; 4], u32> = HashMap::with_max_entries(DEFAULT_ENDPOINTS, 0);
/// Written by the agent; read by none until IPv6 is forwarded; lives as long as the pod.
#[map]
static POD_IP6: HashMap<[u8; 16], u32> = HashMap::with_max_entries(DEFAULT_ENDPOINTS, 0);
/// Written by the agent; read by every hook but `eni_egress`; lives as long as the configuration names it.
#[map]
static HOST_DST: LpmTrie<[u8; 4], u32> = LpmTrie::with_max_entries(MAX_HOST_DST, BPF_F_NO_PREALLOC);
/// Written by the agent; read by every hook but `eni_egress`; lives as long as the configuration names its prefixes.
#[map]
static HOST_DST_BITS: Array<u64> = Array::with_max_entries(HOST_DST_WORDS, 0);
/// Written by the agent; read by `pod_egress`; lives as long as the load balancer.
#[map]
static VIPS: HashMap<VipKey, u32> = HashMap::with_max_entries(MAX_VIPS, BPF_F_NO_PREALLOC);
/// Written here when a flow's door changes, flushed by the agent with its pod; read by every hook; the least recently
/// used entry makes room.
#[map]
static FLOWS: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(DEFAULT_FLOWS, 0);
/// Set here, cleared by the agent with its pod; read by every hook.
#[map]
static FLOW_MARK: Array<u32> = Array::with_max_entries(DEFAULT_ENDPOINTS + 1, 0);
/// Written here by first fragments; read by `pod_egress` and `eni_ingress`; the least recently used entry makes room.
#[map]
static FRAGS: LruHashMap<FragmentKey, Fragment> = LruHashMap::with_max_entries(MAX_FRAGS, 0);
/// Written by the agent, after what it switches to; read by `pod_egress`; lives on.
#[map]
static EPOCH: Array<u32> = Array::with_max_entries(1, 0);
/// Written by the agent; read by `pod_egress`; lives as long as the rules.
#[map]
static VERDICT: Array<VerdictRow> = Array::with_max_entries(DEFAULT_ENDPOINTS + 1, 0);
/// Written by the agent in the half that is not in force; read by `pod_egress`; lives until the half is written again.
#[map]
static CLASS: Array<ClassGroups> = Array::with_max_entries(2 * (DEFAULT_ENDPOINTS + 1), 0);
/// As `CLASS`.
#[map]
static PROGRAM: Array<ProgramRow> = Array::with_max_entries(4 * MAX_GROUPS, 0);
/// As `CLASS`.
#[map]
static RULES: Array<Page> = Array::with_max_entries(2 * PAGES, 0);
/// Written here when a flow's state changes, flushed by the agent with its pods; read by `pod_egress`; the least recently
/// used entry makes room.
#[map]
static PAIRS: LruHashMap<PairKey, Admitted> = LruHashMap::with_max_entries(DEFAULT_FLOWS, 0);
/// Whether a pod has, or had, an entry in `PAIRS`. Set here, cleared by the agent with its pod; read by the agent.
#[map]
static PAIR_MARK: Array<u32> = Array::with_max_entries(DEFAULT_ENDPOINTS + 1, 0);
/// Written by the agent; read by the tc hooks but `eni_egress`, for pods with a limit; lives as long as the pod.
#[map]
static LIMITS: Array<Limits> = Array::with_max_entries(DEFAULT_ENDPOINTS + 1, 0);
/// Written here, for pods with a limit; zeroed by the agent with its pod, and when the limit changes.
#[map]
static SPENT: Array<Spent> = Array::with_max_entries(DEFAULT_ENDPOINTS + 1, 0);
/// Written here, zeroed by the agent with its pod.
#[map]
pub static COUNTERS: PerCpuArray<CounterRow> = PerCpuArray::with_max_entries(DEFAULT_ENDPOINTS + 1, 0);

const BPF_F_NO_PREALLOC: u32 = aya_ebpf::bindings::BPF_F_NO_PREALLOC;

/// The pinned maps as the decisions see them.
pub struct Kernel;

impl Rules for Kernel {
    #[inline(always)]
    fn epoch(&self) -> u32 {
        EPOCH.get(0).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn verdicts(&self, class: u32) -> Option<&VerdictRow> {
        VERDICT.get(class)
    }

    #[inline(always)]
    fn class_groups(&self, row: u32) -> Option<&ClassGroups> {
        CLASS.get(row)
    }

    #[inline(always)]
    fn programs(&self, row: u32) -> Option<&ProgramRow> {
        PROGRAM.get(row)
    }

    #[inline(always)]
    fn page(&self, row: u32) -> Option<&Page> {
        RULES.get(row)
    }

    #[inline(always)]
    fn side_says(&self, base: u32, own: u32, peer: u32, key: u32) -> u32 {
        policy_side(base, own, peer, key)
    }
}

/// A global function: the verifier walks it once and for all arguments.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn policy_side(base: u32, own: u32, peer: u32, key: u32) -> u32 {
    side_says(&Kernel, base, own, peer, key)
}

/// As [`policy_side`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn limit_charge(id: u32, bytes: u32, how: u32) -> u64 {
    limit::charge(&Kernel, id, bytes, how)
}

/// A flow's key in words, as the key that it is.
#[inline(always)]
fn of_words(words: &[u32; 4]) -> &FlowKey {
    // SAFETY: `FlowKey` is #[repr(C)], as long and aligned as the words, and without padding.
    unsafe { &*words.as_ptr().cast() }
}

impl Tables for Kernel {
    type Spent = shared::Word;
    const CHECKED: bool = cfg!(not(feature = "unchecked"));

    #[inline(always)]
    fn subeni(&self, vid: u16) -> u32 {
        SUBENI.get(config::PARENT_INDEX.load() * VLANS + u32::from(vid)).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn pod_by_ifindex(&self, ifindex: u32) -> Option<&Endpoint> {
        let slot = POD_IF_DIRECT.get(direct_ifindex(ifindex)).copied().unwrap_or(0);
        if slot == 0 {
            return None;
        }
        if let Some(pod) = ENDPOINT.get(slot)
            && pod.ifindex == ifindex
        {
            return Some(pod);
        }
        // SAFETY: the value is copied at once; the agent may replace, never free it under us (RCU).
        self.endpoint(unsafe { POD_IF.get(&ifindex) }.copied().unwrap_or(0))
    }

    #[inline(always)]
    fn pod_by_ipv4(&self, address: [u8; 4]) -> Option<&Endpoint> {
        let slot = POD_IP4_DIRECT.get(direct_ipv4(address)).copied().unwrap_or(0);
        if slot == 0 {
            return None;
        }
        if let Some(pod) = ENDPOINT.get(slot)
            && u32::from_ne_bytes(pod.ipv4) == u32::from_ne_bytes(address)
        {
            return Some(pod);
        }
        // SAFETY: as above.
        self.endpoint(unsafe { POD_IP4.get(&address) }.copied().unwrap_or(0))
    }

    #[inline(always)]
    fn endpoint(&self, slot: u32) -> Option<&Endpoint> {
        if slot == 0 { None } else { ENDPOINT.get(slot) }
    }

    #[inline(always)]
    fn host_dst(&self, address: [u8; 4]) -> u32 {
        let (word, bit) = host_dst_bit(address);
        if HOST_DST_BITS.get(word).is_none_or(|bits| bits & bit == 0) {
            return 0;
        }
        HOST_DST.get(&Key::new(32, address)).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn is_vip(&self, addr: [u8; 4], port: u16, proto: u8) -> bool {
        VIPS.get_ptr(&VipKey { addr, port, proto, pad: 0 }).is_some()
    }

    #[inline(always)]
    fn marked(&self, id: u32) -> bool {
        FLOW_MARK.get(id).copied().unwrap_or(0) != 0
    }

    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<&Flow> {
        // SAFETY: the memory stays mapped for the program's run. The kernel may reuse an LRU entry while it is read (it
        // does not wait for readers of preallocated entries): at worst this packet takes some other flow's door.
        unsafe { FLOWS.get(of_words(&key.words())) }
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<Door> {
        // SAFETY: as above.
        unsafe { FRAGS.get(key) }.and_then(|fragment| fragment.door_in(self.epoch()))
    }

    #[inline(always)]
    fn now(&self) -> u32 {
        // SAFETY: the helper takes no argument. Kernel 5.11 and later.
        (unsafe { bpf_ktime_get_coarse_ns() } / 1_000_000_000) as u32
    }

    // A full LRU map makes room by itself; what still fails leaves the flow its default door, as a lost entry does.
    #[inline(always)]
    fn remember(&self, key: &FlowKey, flow: &Flow) {
        mark(&FLOW_MARK, key.id);
        let _ = FLOWS.insert(of_words(&key.words()), flow, 0);
    }

    #[inline(always)]
    fn forget(&self, key: &FlowKey) {
        let _ = FLOWS.remove(of_words(&key.words()));
    }

    #[inline(always)]
    fn remember_fragment(&self, key: &FragmentKey, door: Door) {
        mark(&FLOW_MARK, key.id);
        let fragment = Fragment { door: door as u8, pad: [0; 3], epoch: self.epoch() };
        let _ = FRAGS.insert(key, &fragment, 0);
    }

    #[inline(always)]
    fn admitted(&self, key: &PairKey) -> Option<&Admitted> {
        // SAFETY: as for `flow`; an entry that is reused under us is at worst another flow that was allowed in some epoch,
        // and this one packet passes for it.
        unsafe { PAIRS.get(key) }
    }

    #[inline(always)]
    fn admit(&self, key: &PairKey, flow: &Admitted) {
        mark(&PAIR_MARK, key.low);
        mark(&PAIR_MARK, key.high);
        let _ = PAIRS.insert(key, flow, 0);
    }

    #[inline(always)]
    fn retire(&self, key: &PairKey) {
        let _ = PAIRS.remove(key);
    }

    #[inline(always)]
    fn limits(&self, id: u32) -> Option<&Limits> {
        LIMITS.get(id)
    }

    #[inline(always)]
    fn spent(&self, id: u32, direction: Direction) -> Option<&shared::Word> {
        let spent = SPENT.get_ptr_mut(id)?;
        // SAFETY: the pointer is valid for the program's run (an array map's entries are never freed), and the index is within
        // the two words.
        Some(unsafe { shared::Word::at((&raw mut (*spent).until).cast::<u64>().add(direction as usize)) })
    }

    #[inline(always)]
    fn nanos(&self) -> u64 {
        // SAFETY: the helper takes no argument. Its clock is the one that a fair queue goes by.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn charge(&self, id: u32, bytes: u32, how: u32) -> u64 {
        limit_charge(id, bytes, how)
    }

    #[inline(always)]
    fn fast_path(&self) -> bool {
        config::FAST_PATH.load() != 0
    }
}

#[inline(always)]
fn mark(marks: &Array<u32>, id: u32) {
    if let Some(mark) = marks.get_ptr_mut(id) {
        // SAFETY: the pointer is valid for the program's run (an array map's entries are never freed); every writer stores
        // the same aligned word.
        unsafe { mark.write(1) }
    }
}

//! The only file that touches packets: bounds-checked access for tc and XDP programs, and what they can do to a packet.

use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action, xdp_md},
    helpers::generated::{
        bpf_redirect, bpf_redirect_peer, bpf_skb_change_type, bpf_skb_pull_data, bpf_skb_set_tstamp,
        bpf_skb_store_bytes, bpf_skb_vlan_pop, bpf_skb_vlan_push, bpf_xdp_adjust_head, bpf_xdp_get_buff_len,
    },
    programs::{TcContext, XdpContext},
};
use datapath_common::packet::{
    Frame, Plain,
    link::{TPID_8021Q, Tag},
};

use crate::count::Load;

/// What a tc program says of a packet that it leaves to others: `TC_ACT_UNSPEC`, which is `TCX_NEXT` for TCX.
pub const NEXT: i32 = TC_ACT_UNSPEC;
/// What a tc program says of a packet that ends here.
pub const SHOT: i32 = TC_ACT_SHOT;
/// What an XDP program says of a frame that it leaves to the stack.
pub const XDP_PASS: u32 = xdp_action::XDP_PASS;
/// What an XDP program says of a frame that ends here.
pub const XDP_DROP: u32 = xdp_action::XDP_DROP;

/// Where the Ethernet header has its destination MAC.
pub const DST_MAC: usize = 0;
const SRC_MAC: usize = 6;
const MACS: usize = 12;
const TAG: usize = 4;

/// All that a decision may read: Ethernet 14 + tag 4 + IPv4 60 + ICMP 8 + quoted IPv4 60 + 8.
const HEADERS: u32 = 154;

/// Packet memory in words of four bytes, as every C program of this kind reads it: headers stand at odd multiples of two,
/// and the kernel accepts that on architectures with efficient unaligned access, the ones we support (verifier.c,
/// `check_pkt_ptr_alignment`). Told the truth, an alignment of one, LLVM would put each field together from bytes.
#[repr(C, align(4))]
struct Words<T>(T);

/// Reads `T` at `start + offset`, if it ends before `end`.
///
/// # Safety
///
/// `start..end` is packet memory.
#[inline(always)]
unsafe fn load<T: Plain>(start: usize, end: usize, offset: usize) -> Option<T> {
    let from = start + offset;
    if from + size_of::<T>() > end {
        return None;
    }
    // SAFETY: within packet memory, as just checked; any bytes are a T. See `Words` for the alignment.
    Some(unsafe { (*(from as *const Words<T>)).0 })
}

/// Writes `bytes` at `start + offset`, if they end before `end`.
///
/// # Safety
///
/// `start..end` is packet memory that the program may write.
#[inline(always)]
unsafe fn store<T: Plain>(start: usize, end: usize, offset: usize, bytes: T) -> Option<()> {
    let to = start + offset;
    if to + size_of::<T>() > end {
        return None;
    }
    // SAFETY: within packet memory, as just checked. See `Words` for the alignment.
    unsafe { (*(to as *mut Words<T>)).0 = bytes }
    Some(())
}

/// Copied as words: LLVM makes a call, and there a loop, of a copy of six bytes.
#[inline(always)]
const fn word(a: u8, b: u8, c: u8, d: u8) -> u32 {
    u32::from_ne_bytes([a, b, c, d])
}

/// A socket buffer at a tc hook.
pub struct Skb(*mut __sk_buff);

impl Skb {
    /// Takes the hook's argument. Only what the kernel has in place of the headers can be read: see [`Skb::pull`].
    #[inline(always)]
    pub fn new(ctx: &TcContext) -> Self {
        Self(ctx.skb.skb)
    }

    /// Makes all headers readable.
    #[inline(always)]
    pub fn pull(&self) {
        let wanted = if self.len() < HEADERS { self.len() } else { HEADERS };
        if self.end() - self.start() < wanted as usize {
            // SAFETY: the pointer is the hook's argument. On failure the headers count as cut off.
            let _ = unsafe { bpf_skb_pull_data(self.0, wanted) };
        }
    }

    /// The VLAN tag that the kernel took out of the frame.
    #[inline(always)]
    pub fn tag(&self) -> Option<Tag> {
        // SAFETY: the pointer is the hook's argument; the verifier checks each field.
        let (present, tpid, tci) =
            unsafe { ((*self.0).vlan_present, (*self.0).vlan_proto, (*self.0).vlan_tci) };
        (present != 0).then_some(Tag { tpid: u16::from_be(tpid as u16), tci: tci as u16 })
    }

    /// The interface that the hook is attached to.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).ifindex }
    }

    /// What the packet adds to a counter; `gso_size` is its [`Skb::gso_size`].
    #[inline(always)]
    pub fn load_of(&self, gso_size: u32) -> Load {
        let bytes = u64::from(self.len());
        if gso_size == 0 {
            return Load { packets: 1, bytes };
        }
        // SAFETY: as above. Who made the packet may not have counted them.
        let segments = unsafe { (*self.0).gso_segs };
        Load { packets: if segments == 0 { 1 } else { u64::from(segments) }, bytes }
    }

    /// Payload of one segment in bytes, if this is a GSO packet; else 0.
    #[inline(always)]
    pub fn gso_size(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).gso_size }
    }

    #[inline(always)]
    fn start(&self) -> usize {
        // SAFETY: as above.
        unsafe { (*self.0).data as usize }
    }

    #[inline(always)]
    fn end(&self) -> usize {
        // SAFETY: as above.
        unsafe { (*self.0).data_end as usize }
    }

    /// Writes at `offset`.
    #[inline(always)]
    pub fn store<T: Plain>(&self, offset: usize, bytes: T) -> Option<()> {
        // SAFETY: `start..end` is this packet's memory, which the kernel unshares before the program runs.
        unsafe { store(self.start(), self.end(), offset, bytes) }
    }

    /// Writes at `offset` by the kernel's hand, for what is rarely written. A program that writes packet memory itself begins
    /// with code that unshares it, and TCP's own packets are shared (tc_cls_act_prologue, net/core/filter.c): 70 instructions
    /// for each of them, written to or not.
    #[inline(always)]
    pub fn store_by_call<const N: usize>(&self, offset: usize, bytes: &[u8; N]) -> Option<()> {
        // SAFETY: the first pointer is the hook's argument, the other is to N bytes.
        let result =
            unsafe { bpf_skb_store_bytes(self.0, offset as u32, bytes.as_ptr().cast(), N as u32, 0) };
        (result == 0).then_some(())
    }

    /// Sets the source MAC.
    #[inline(always)]
    pub fn set_src_mac(&self, mac: [u8; 6]) -> Option<()> {
        let [a, b, c, d, e, f] = mac;
        self.store(SRC_MAC, word(a, b, c, d))?;
        self.store(SRC_MAC + 4, u16::from_ne_bytes([e, f]))
    }

    /// Sets both MACs.
    #[inline(always)]
    pub fn set_macs(&self, dst: [u8; 6], src: [u8; 6]) -> Option<()> {
        let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (dst, src);
        let (start, end) = (self.start(), self.end());
        if start + SRC_MAC + size_of_val(&src) > end {
            return None;
        }
        // SAFETY: within packet memory, as just checked; see `Skb::store` and `Words`. A record has each MAC as a word and its
        // half: written as such, nothing has to be shifted.
        unsafe {
            (*((start + DST_MAC) as *mut Words<u32>)).0 = word(a, b, c, d);
            (*((start + DST_MAC + 4) as *mut Words<u16>)).0 = u16::from_ne_bytes([e, f]);
            (*((start + SRC_MAC) as *mut Words<u32>)).0 = word(g, h, i, j);
            (*((start + SRC_MAC + 4) as *mut Words<u16>)).0 = u16::from_ne_bytes([k, l]);
        }
        Some(())
    }

    /// Sets both MACs, as [`Skb::store_by_call`] does.
    #[inline(always)]
    pub fn set_macs_by_call(&self, dst: [u8; 6], src: [u8; 6]) -> Option<()> {
        // Put together in registers: of twelve bytes on the stack each is written by itself.
        let half = |a, b| u64::from(u16::from_ne_bytes([a, b]));
        let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (dst, src);
        let first = u64::from(word(a, b, c, d)) | half(e, f) << 32 | half(g, h) << 48;
        let macs = [first, half(i, j) | half(k, l) << 16];
        // SAFETY: the first pointer is the hook's argument, the other is to 16 bytes, of which the first 12 are the MACs: the
        // programs are built for little-endian machines.
        let result =
            unsafe { bpf_skb_store_bytes(self.0, DST_MAC as u32, macs.as_ptr().cast(), MACS as u32, 0) };
        (result == 0).then_some(())
    }

    /// Takes the tag off.
    #[inline(always)]
    pub fn pop_tag(&self) -> Option<()> {
        // SAFETY: the pointer is the hook's argument.
        (unsafe { bpf_skb_vlan_pop(self.0) } == 0).then_some(())
    }

    /// Puts an 802.1Q tag on, with priority 0.
    #[inline(always)]
    pub fn push_tag(&self, vid: u16) -> Option<()> {
        // SAFETY: the pointer is the hook's argument.
        (unsafe { bpf_skb_vlan_push(self.0, TPID_8021Q.to_be(), vid) } == 0).then_some(())
    }

    /// Sets bits in the packet's mark.
    #[inline(always)]
    pub fn mark(&self, bits: u32) {
        // SAFETY: the pointer is the hook's argument; tc programs may write the field.
        unsafe { (*self.0).mark |= bits }
    }

    /// Has a fair queue on the way keep the packet until `nanos` of the monotonic clock.
    #[inline(always)]
    pub fn leave_at(&self, nanos: u64) {
        const DELIVERY_MONO: u32 = 1;
        // SAFETY: the pointer is the hook's argument. Kernel 5.18 and later. It refuses packets other than IP, which have no
        // limit; a packet that it refused would leave early, and is charged all the same.
        let _ = unsafe { bpf_skb_set_tstamp(self.0, nanos, DELIVERY_MONO) };
    }

    /// Lets the node's stack take a frame whose destination MAC is not the interface's.
    #[inline(always)]
    pub fn accept(&self) -> i32 {
        const PACKET_HOST: u32 = 0;
        // SAFETY: the pointer is the hook's argument. It fails for a packet of the node's own only, which need not be accepted.
        let _ = unsafe { bpf_skb_change_type(self.0, PACKET_HOST) };
        NEXT
    }
}

impl Frame for Skb {
    #[inline(always)]
    fn load<T: Plain>(&self, offset: usize) -> Option<T> {
        // SAFETY: `start..end` is this packet's memory.
        unsafe { load(self.start(), self.end(), offset) }
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        // SAFETY: the pointer is the hook's argument.
        unsafe { (*self.0).len }
    }
}

/// The action that drops a packet.
pub trait Shot {
    /// Its number.
    const SHOT: Self;
}

impl Shot for i32 {
    const SHOT: Self = SHOT;
}

impl Shot for u32 {
    const SHOT: Self = XDP_DROP;
}

/// Into the namespace of the pod behind this host side interface, as if it came out of the pod's own end.
#[inline(always)]
pub fn into_pod(ifindex: u32) -> i32 {
    // SAFETY: the helper takes numbers only. tc ingress only, flags must be 0. Kernel 5.10 and later.
    (unsafe { bpf_redirect_peer(ifindex, 0) }) as i32
}

/// Out of an interface of this namespace. At an XDP hook and towards the host side of a veth: into the pod.
#[inline(always)]
pub fn out_of(ifindex: u32) -> i64 {
    // SAFETY: the helper takes numbers only.
    unsafe { bpf_redirect(ifindex, 0) }
}

/// A frame at the XDP hook.
pub struct Buff(*mut xdp_md);

impl Buff {
    /// Takes the hook's argument.
    #[inline(always)]
    pub fn new(ctx: &XdpContext) -> Self {
        Self(ctx.ctx)
    }

    /// Volatile: LLVM would carry the field from one block to another as the 32 bits that it is declared with, and the verifier
    /// takes a pointer that is copied so for a number.
    #[inline(always)]
    fn start(&self) -> usize {
        // SAFETY: the pointer is the hook's argument; the verifier checks each field.
        unsafe { (&raw const (*self.0).data).read_volatile() as usize }
    }

    /// As [`Buff::start`].
    #[inline(always)]
    fn end(&self) -> usize {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).data_end).read_volatile() as usize }
    }

    /// What the frame adds to a counter.
    #[inline(always)]
    pub fn load_of(&self) -> Load {
        Load { packets: 1, bytes: self.bytes() }
    }

    /// The frame's length, further buffers of a large frame included. Kernel 5.18 and later.
    #[inline(always)]
    fn bytes(&self) -> u64 {
        // SAFETY: the pointer is the hook's argument.
        unsafe { bpf_xdp_get_buff_len(self.0) }
    }

    /// Sets the destination MAC.
    #[inline(always)]
    pub fn set_dst_mac(&self, mac: [u8; 6]) -> Option<()> {
        let [a, b, c, d, e, f] = mac;
        // SAFETY: `start..end` is this frame's memory.
        unsafe {
            store(self.start(), self.end(), DST_MAC, word(a, b, c, d))?;
            store(self.start(), self.end(), DST_MAC + 4, u16::from_ne_bytes([e, f]))
        }
    }

    /// Takes the tag out of the frame: the MACs move up over it.
    #[inline(always)]
    pub fn pop_tag(&self) -> Option<()> {
        let macs: [u8; MACS] = self.load(0)?;
        // SAFETY: `start..end` is this frame's memory; the pointer is the hook's argument.
        unsafe {
            store(self.start(), self.end(), TAG, macs)?;
            (bpf_xdp_adjust_head(self.0, TAG as i32) == 0).then_some(())
        }
    }
}

impl Frame for Buff {
    #[inline(always)]
    fn load<T: Plain>(&self, offset: usize) -> Option<T> {
        // SAFETY: `start..end` is this frame's memory.
        unsafe { load(self.start(), self.end(), offset) }
    }

    #[inline(always)]
    fn holds(&self, len: u32) -> bool {
        // The helper is for large frames only.
        self.start() + len as usize <= self.end() || self.len() >= len
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        self.bytes() as u32
    }
}

//! Security groups, compiled: what the agent writes for the programs to judge flows between pods of the node by.
//!
//! Pods that no rule tells apart share a **class**; [`Endpoint::policy_id`](super::Endpoint::policy_id) is its number, 0 is
//! for pods that cannot be judged here. For each ordered pair of classes there is a [`Verdict`]. Where it is
//! [`Verdict::Check`], the first packet of a flow is judged: the groups of the sender's class in their order, each by its
//! **program** for traffic to the receiver's class, then the same from the receiver's side. A program is a sorted list of
//! disjoint intervals of [`traffic_key`] with the group's say on each.
//!
//! Groups and programs stand twice. The lowest bit of the **epoch** says which half is in force; the other one is written, then
//! the epoch is counted up. A flow remembers the epoch in which it was allowed, and is judged again when that is over.
//!
//! Verdicts stand once, so that the way of an open pair is one look-up long. [`Verdict::Check`] is true of every pair, whatever
//! the rules: it asks them. A verdict that changes becomes that before the epoch is counted up, and what it is to be after.

use core::mem::{offset_of, size_of};

/// Classes that a row of a table has room for, the 0 of "cannot be judged" included.
pub const CLASSES: usize = 1024;
/// Security groups that the pods of a node may have between them.
pub const MAX_GROUPS: u32 = 128;
/// Groups of one pod.
pub const GROUPS_OF_A_POD: usize = 5;
/// Words of a page of programs.
pub const PAGE_WORDS: usize = 4096;
/// Pages of one half.
pub const PAGES: u32 = 64;
/// The longest program, in intervals: with its length it fits a page.
pub const MAX_INTERVALS: usize = PAGE_WORDS - 1;

/// What holds between two classes. Numbers are stored in maps: never renumber.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// Cannot be judged here: the VPC decides.
    Wire = 0,
    /// Everything is allowed, both ways: no state is kept.
    Open = 1,
    /// It depends on protocol and ports, or differs by direction: judged by the first packet, then remembered.
    Check = 2,
    /// Nothing is allowed, either way: the VPC refuses, and logs.
    Refused = 3,
}

impl Verdict {
    /// All verdicts.
    pub const ALL: [Self; 4] = [Self::Wire, Self::Open, Self::Check, Self::Refused];

    /// As users read it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Wire => "wire",
            Self::Open => "open",
            Self::Check => "check",
            Self::Refused => "refused",
        }
    }
}

/// A group says nothing of an interval: the next one is asked.
pub const NOTHING: u32 = 0;
/// A group denies an interval.
pub const DENY: u32 = 1;
/// A group allows an interval.
pub const ALLOW: u32 = 2;

/// Where traffic stands among intervals: protocol, then destination port, or type and code for ICMP; 24 bits.
#[inline(always)]
pub const fn traffic_key(proto: u8, port: u16) -> u32 {
    (proto as u32) << 16 | port as u32
}

/// One more than the highest [`traffic_key`].
pub const KEYS: u32 = 1 << 24;

/// A word of a program: an interval from `key` to the next word's key, and what is said on it.
#[inline(always)]
pub const fn interval(key: u32, says: u32) -> u32 {
    key << 8 | says
}

/// Value of map `VERDICT`, by class: its verdicts towards all others.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerdictRow {
    /// [`Verdict`] by class of the receiver.
    pub verdicts: [u8; CLASSES],
}

/// Value of map `CLASS`: the groups of a class in their order, numbered from 1; 0 = no more. Row `2 × class + half`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassGroups {
    /// The groups; places after [`GROUPS_OF_A_POD`] are 0.
    pub groups: [u16; 8],
}

/// Value of map `PROGRAM`: the programs of one group in one direction. Row `2 × (2 × group + direction) + half`, with 1 for
/// egress and 0 for ingress.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramRow {
    /// By class of the other end: where the program begins (page × [`PAGE_WORDS`] + word); 0 = it says nothing.
    pub programs: [u32; CLASSES],
}

/// Value of map `RULES`: a page of programs. A program is the number of its intervals, then so many [`interval`]s by rising
/// key, the first of key 0; it does not cross pages. The first word of the first page belongs to none. Row `2 × page + half`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// The words.
    pub words: [u32; PAGE_WORDS],
}

/// Key of map `PAIRS`: a flow between two pods of the node, the same from both ends.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PairKey {
    /// The lower [`Endpoint::id`](super::Endpoint::id).
    pub low: u32,
    /// The higher one.
    pub high: u32,
    /// Port of the pod with the lower id; the identifier for ICMP queries; 0 where the protocol has no ports.
    pub low_port: u16,
    /// Port of the pod with the higher id.
    pub high_port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// For ICMP queries: twice the type of the request, plus 1 if the pod with the higher id sends it. Else 0.
    pub query: u8,
    /// Zero.
    pub pad: [u8; 2],
}

/// Value of map `PAIRS`: a flow that was allowed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// [`Endpoint::id`](super::Endpoint::id) of the pod that opened it.
    #[cfg(feature = "next-abi")]
    pub opener: u32,
    /// The epoch in which it was last judged.
    pub epoch: u32,
    /// When it was last known to live, in seconds of the monotonic clock, within [`Admitted::REFRESH`].
    pub seen: u32,
    /// [`Endpoint::id`](super::Endpoint::id) of the pod that opened it.
    #[cfg(not(feature = "next-abi"))]
    pub opener: u32,
    /// A [`State`].
    pub state: u8,
    /// Code of an ICMP query.
    pub code: u8,
    /// Zero.
    pub pad: [u8; 2],
}

/// How far a flow has come. Numbers are stored in maps: never renumber.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// One direction was seen.
    New = 0,
    /// Both directions were seen.
    Established = 1,
    /// A FIN or an RST was seen.
    Closing = 2,
}

/// Idle times after which a flow is over, in seconds.
pub mod timeout {
    /// TCP, both directions seen (RFC 5382, REQ-5: no less than 2 hours 4 minutes).
    pub const TCP_ESTABLISHED: u32 = 7_440;
    /// TCP, one direction seen only, or a FIN or an RST seen (RFC 5382, REQ-5: no less than 4 minutes).
    pub const TCP_TRANSITORY: u32 = 240;
    /// UDP (RFC 4787, REQ-5: no less than 2 minutes), and protocols without ports.
    pub const UDP: u32 = 180;
    /// ICMP queries (RFC 5508, REQ-2: no less than 60 seconds).
    pub const ICMP: u32 = 60;
}

impl Admitted {
    /// An entry is written again for its time stamp's sake when it is older than this many seconds.
    pub const REFRESH: u32 = 16;

    /// Whether a flow of protocol `proto` still stands at `now`, in seconds of the monotonic clock: it is over when nothing
    /// was seen of it for as long as its limit.
    #[inline(always)]
    pub const fn alive(&self, proto: u8, now: u32) -> bool {
        const ICMP: u8 = 1;
        const TCP: u8 = 6;
        let limit = match proto {
            TCP if self.state == State::Established as u8 => timeout::TCP_ESTABLISHED,
            TCP => timeout::TCP_TRANSITORY,
            ICMP => timeout::ICMP,
            _ => timeout::UDP,
        };
        now.wrapping_sub(self.seen) < limit
    }

    /// The [`traffic_key`] of the packet that opened the flow of this key.
    #[inline(always)]
    pub const fn opening(&self, key: &PairKey) -> u32 {
        const ICMP: u8 = 1;
        if key.proto == ICMP {
            return traffic_key(ICMP, u16::from_be_bytes([key.query >> 1, self.code]));
        }
        let port = if self.opener == key.low { key.high_port } else { key.low_port };
        traffic_key(key.proto, port)
    }
}

const _: () = {
    assert!(size_of::<PairKey>() == 16);
    assert!(offset_of!(PairKey, proto) == 12);
    assert!(size_of::<Admitted>() == 16);
    assert!(offset_of!(Admitted, state) == 12);
    assert!(size_of::<VerdictRow>() == 1024);
    assert!(size_of::<ClassGroups>() == 16);
    assert!(size_of::<ProgramRow>() == 4096);
    assert!(size_of::<Page>() == 16384);
};

/// Index of a row of `CLASS`.
#[inline(always)]
pub const fn class_row(class: u32, epoch: u32) -> u32 {
    2 * class + (epoch & 1)
}

/// Index of a row of `RULES`, for the page that a program is in.
#[inline(always)]
pub const fn page_row(program: u32, epoch: u32) -> u32 {
    2 * (program / PAGE_WORDS as u32) + (epoch & 1)
}

/// Index of a row of `PROGRAM`.
#[inline(always)]
pub const fn program_row(group: u32, egress: bool, epoch: u32) -> u32 {
    2 * (2 * group + egress as u32) + (epoch & 1)
}

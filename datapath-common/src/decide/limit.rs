//! Limits of bandwidth: what is left of a decision once what a limited pod sends and receives is charged to it.
//!
//! Each direction of a pod is one number, the time until which all that has passed is paid for (the generic cell rate algorithm):
//! a packet moves it on by the time that its bytes take at the pod's rate, and is dropped where that would lead further ahead
//! of the clock than the burst. There is no state besides, and nothing to be refilled.
//!
//! Where the pod's parent ENI has a fair queue, what leaves on the wire beyond the burst gets a time to leave at in place of
//! being dropped, up to [`Limits::pace`]; the queue keeps it until then. All doors share the one
//! number, so that a pod whose packets wait for the wire is not cut off from the other doors.
//!
//! What is charged is IPv4, by the length of the frame without its tag; a GSO packet counts as it is, with one set of headers. ARP is
//! not charged. What is exchanged with the node itself, or with where health checks come from, may use a reserve beyond the
//! burst that nothing else can use up, and does not wait in a queue.

use super::Decision;
use crate::{
    abi::{Bucket, Direction, Endpoint, Limits, Outcome, endpoint::flag, maps::host_dst},
    packet::{self, Frame},
    tables::{Shared, Tables},
};

/// A packet that leaves at once: what [`charge`] says of most.
pub const AT_ONCE: u64 = 0;
/// A packet that is dropped, for it is more than the burst.
pub const FULL: u64 = u64::MAX;
/// A packet that is dropped, for it is more than may wait.
pub const LATE: u64 = u64::MAX - 1;

/// In the argument `how` of [`charge`]: what the pod sends; else what it receives.
pub const EGRESS: u32 = 1;
/// In the argument `how` of [`charge`]: the packet may use the reserve.
pub const PREFERRED: u32 = 2;

/// A decision on what a pod sends, and when.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Departure<'t> {
    /// What becomes of the packet.
    pub decision: Decision<'t>,
    /// When it may leave on the wire, in nanoseconds of the monotonic clock; [`AT_ONCE`] for most.
    pub at: u64,
}

/// Whether a pod has a limit: the only question that pods without one cost. What a limited pod sends or receives is never plain,
/// so that `decide_plain` asks it once.
#[inline(always)]
pub fn is_limited(pod: Option<&Endpoint>) -> bool {
    match pod {
        Some(pod) => pod.flags & flag::LIMITED != 0,
        None => false,
    }
}

/// What a pod sends, at the host side of its veth or by its own ENI: charged to it, and on the fast path to the pod that receives
/// it, too.
#[inline(always)]
pub fn egress<'t, T: Tables, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    decision: Decision<'t>,
) -> Departure<'t> {
    let as_it_is = Departure { decision, at: AT_ONCE };
    let (Some(pod), true) = (decision.pod, counts(frame, decision.outcome)) else { return as_it_is };
    let local = matches!(decision.outcome, Outcome::Local);
    let mut at = AT_ONCE;
    if is_limited(Some(pod)) {
        // The other pod of the node is never the node.
        let preferred = if local { 0 } else { preferred(tables, frame.load(IPV4_DST)) };
        at = tables.charge(pod.id, frame.len(), EGRESS | preferred);
        if at >= LATE {
            let reason = if at == FULL { Outcome::EgressLimit } else { Outcome::EgressQueue };
            return Departure { decision: Decision::new(reason, pod), at: AT_ONCE };
        }
    }
    if local
        && is_limited(decision.to)
        && let Some(to) = decision.to
        && tables.charge(to.id, frame.len(), 0) >= LATE
    {
        let refused = Decision { to: Some(to), ..Decision::new(Outcome::IngressLimit, pod) };
        return Departure { decision: refused, at: AT_ONCE };
    }
    // Only the parent's queue can keep a packet.
    Departure { decision, at: if matches!(decision.outcome, Outcome::Wire) { at } else { AT_ONCE } }
}

/// What a pod receives from the wire or from the node's stack. What the stack has yet to translate back is charged when it
/// comes to the pod.
#[inline(always)]
pub fn ingress<'t, T: Tables, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    decision: Decision<'t>,
) -> Decision<'t> {
    match decision.pod {
        Some(pod)
            if is_limited(Some(pod))
                && counts(frame, decision.outcome)
                && tables.charge(pod.id, frame.len(), preferred(tables, frame.load(IPV4_SRC))) >= LATE =>
        {
            Decision::new(Outcome::IngressLimit, pod)
        }
        _ => decision,
    }
}

/// Where a frame whose tag stands beside it has its EtherType and addresses.
const ETHERTYPE: usize = 12;
const IPV4_SRC: usize = 14 + 12;
const IPV4_DST: usize = 14 + 16;

/// Whether the packet goes on, and is IPv4.
#[inline(always)]
fn counts<F: Frame + ?Sized>(frame: &F, outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Wire | Outcome::Local | Outcome::Host | Outcome::HostService)
        && match frame.load::<[u8; 2]>(ETHERTYPE) {
            Some(ethertype) => u16::from_be_bytes(ethertype) == packet::IPV4,
            None => true,
        }
}

#[inline(always)]
fn preferred<T: Tables>(tables: &T, remote: Option<[u8; 4]>) -> u32 {
    match remote {
        Some(remote) if tables.host_dst(remote) & host_dst::PREFERRED != 0 => PREFERRED,
        _ => 0,
    }
}

/// Charges a packet of so many bytes to the pod with this id. Returns when it may leave, [`AT_ONCE`], [`FULL`] or [`LATE`].
#[inline(always)]
pub fn charge<T: Tables + ?Sized>(tables: &T, id: u32, bytes: u32, how: u32) -> u64 {
    let direction = if how & EGRESS == 0 { Direction::Ingress } else { Direction::Egress };
    let (Some(limits), Some(spent)) = (tables.limits(id), tables.spent(id, direction)) else {
        return AT_ONCE;
    };
    // Without a limit the clock is not asked.
    if limits.of(direction).cost == 0 { AT_ONCE } else { pay(limits, spent, tables.nanos(), bytes, how) }
}

/// As [`charge`], at the time `now`.
///
/// Concurrent callers: what passes is charged exactly, by one atomic addition, so that the rate holds whatever the number of CPUs.
/// Each of them may find room at the same time that only one of them has: the burst is exceeded by at most one packet for each
/// CPU but one, once, which the packets after that wait for. A pod that sends nothing for a while does not save up more than its
/// burst; of CPUs that find that at the same time one sets the number to the present, and the others may do with the little
/// that it was behind.
#[inline(always)]
pub fn pay<S: Shared>(limits: &Limits, spent: &S, now: u64, bytes: u32, how: u32) -> u64 {
    let (bucket, pace) = if how & EGRESS == 0 { (&limits.ingress, 0) } else { (&limits.egress, limits.pace) };
    let Bucket { cost, depth, reserve } = *bucket;
    let preferred = how & PREFERRED != 0;
    let time = (u64::from(bytes) * cost) >> Bucket::SHIFT;
    let until = spent.read();
    let ahead = if until > now {
        until - now
    } else {
        spent.replace(until, now);
        0
    };
    let room = if preferred { depth + pace + reserve } else { depth + pace };
    // A packet larger than the burst passes when there is nothing else.
    let wanted = if time < depth { time } else { depth };
    if ahead + wanted > room {
        return if pace == 0 { FULL } else { LATE };
    }
    let until = spent.add(time) + time;
    // What is within the burst leaves at once.
    if pace == 0 || preferred || until <= now + depth { AT_ONCE } else { until - depth }
}

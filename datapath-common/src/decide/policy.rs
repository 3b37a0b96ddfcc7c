//! Whether security groups let a packet between two pods of the node take the fast path. What the rules mean is written in
//! the crate `eniway-policy`; what they are compiled to, in [`abi::policy`](crate::abi::policy).
//!
//! The VPC is always right: only what is allowed for certain is fast, everything else takes the wire.

use super::same;
use crate::{
    abi::{
        Admitted, Endpoint, Outcome, PairKey,
        endpoint::flag,
        policy::{
            ALLOW, CLASSES, DENY, GROUPS_OF_A_POD, NOTHING, PAGE_WORDS, Page, State, Verdict, class_row,
            page_row, program_row, traffic_key,
        },
    },
    packet::{
        ipv4::{ICMP, Ipv4},
        l4::{ECHO_REPLY, ECHO_REQUEST, RST, Role},
    },
    tables::{Rules, Tables},
};

/// Whether a packet takes the fast path, and what to count besides.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ruling {
    pub(super) fast: bool,
    pub(super) remark: Option<Outcome>,
}

/// The wire, without a remark.
pub(super) const WIRE: Ruling = Ruling { fast: false, remark: None };
const FAST: Ruling = Ruling { fast: true, remark: None };

/// Rules on a packet from `pod` to `to`, which is not a later fragment, and keeps the state of its flow.
#[inline(always)]
pub(super) fn rule<T: Tables>(tables: &T, pod: &Endpoint, to: &Endpoint, ip: &Ipv4) -> Ruling {
    let flags = pod.flags | to.flags;
    if flags == 0 {
        return FAST;
    }
    let verdict = verdict(tables, pod.policy_id, to.policy_id);
    // First, and with as little asked as can be: what costs nothing but this.
    if verdict == Verdict::Open as u8 && flags == flag::GROUPS {
        return FAST;
    }
    if flags & flag::OFF != 0 {
        return WIRE;
    }
    if flags == flag::LIMITED {
        return FAST;
    }
    let ruling = by_groups(tables, verdict, pod, to, ip);
    if flags & flag::OBSERVE == 0 {
        return ruling;
    }
    let would = if ruling.fast {
        Outcome::WouldFast
    } else if matches!(ruling.remark, Some(Outcome::PolicyWire)) {
        Outcome::WouldWire
    } else {
        Outcome::WouldRefuse
    };
    Ruling { fast: true, remark: Some(would) }
}

/// Whether [`rule`] says "fast", and keeps no state, of any packet from `pod` to `to`.
#[inline(always)]
pub(super) fn plainly_open<T: Tables>(tables: &T, pod: &Endpoint, to: &Endpoint) -> bool {
    let flags = pod.flags | to.flags;
    flags == 0 || flags == flag::GROUPS && verdict(tables, pod.policy_id, to.policy_id) == Verdict::Open as u8
}

/// Whether a later fragment may follow its first one, which was judged in this epoch: a pod may have come in the place of
/// the one that was meant.
#[inline(always)]
pub(super) fn may_follow<T: Tables>(tables: &T, pod: &Endpoint, to: &Endpoint) -> bool {
    let flags = pod.flags | to.flags;
    if flags & flag::OFF != 0 {
        return false;
    }
    if flags & flag::GROUPS == 0 || flags & flag::OBSERVE != 0 {
        return true;
    }
    let verdict = verdict(tables, pod.policy_id, to.policy_id);
    verdict == Verdict::Open as u8 || verdict == Verdict::Check as u8
}

#[inline(always)]
fn by_groups<T: Tables>(tables: &T, verdict: u8, pod: &Endpoint, to: &Endpoint, ip: &Ipv4) -> Ruling {
    if verdict == Verdict::Open as u8 {
        return FAST;
    }
    if verdict == Verdict::Refused as u8 {
        return wire(Outcome::PolicyRefused);
    }
    // What does not fit the other pod's MTU would meet a VPC that does not know the flow.
    if verdict != Verdict::Check as u8 || pod.mtu != to.mtu {
        return wire(Outcome::PolicyWire);
    }
    check(tables, tables.epoch(), pod, to, ip)
}

/// What holds between two classes: a [`Verdict`]'s number.
#[inline(always)]
pub fn verdict<R: Rules + ?Sized>(rules: &R, from: u32, to: u32) -> u8 {
    let to = to as usize;
    match rules.verdicts(from) {
        Some(row) if to < CLASSES => row.verdicts[to & (CLASSES - 1)],
        _ => Verdict::Wire as u8,
    }
}

#[inline(always)]
const fn wire(why: Outcome) -> Ruling {
    Ruling { fast: false, remark: Some(why) }
}

/// Which flow a packet belongs to.
struct Flow {
    key: PairKey,
    /// Whether there is one: most ICMP messages have none.
    some: bool,
    /// Whether the packet may open it.
    opens: bool,
}

#[inline(always)]
fn check<T: Tables>(tables: &T, epoch: u32, pod: &Endpoint, to: &Endpoint, ip: &Ipv4) -> Ruling {
    let flow = flow_of(pod, to, ip);
    let mut known = if flow.some { tables.admitted(&flow.key) } else { None };
    // A SYN opens a connection, whatever stands.
    if let Some(flow_then) = known
        && (matches!(ip.l4.role, Role::Opens) || !flow_then.alive(flow.key.proto, tables.now()))
    {
        known = None;
    }
    // The first packet, as it was or as it is now.
    let (mut from, mut towards, mut traffic) = (pod.policy_id, to.policy_id, key_of(ip));
    if let Some(known) = known {
        if known.epoch == epoch {
            progress(tables, epoch, pod, ip, &flow, known);
            return FAST;
        }
        traffic = known.opening(&flow.key);
        if known.opener != pod.id {
            (from, towards) = (towards, from);
        }
    }
    let allowed = allows(tables, epoch, from, towards, traffic);
    if let Some(known) = known {
        if allowed {
            progress(tables, epoch, pod, ip, &flow, known);
            return FAST;
        }
        tables.retire(&flow.key);
        return wire(Outcome::PolicyRevoked);
    }
    let middle = matches!(ip.l4.role, Role::Continues | Role::Answers);
    if !allowed {
        return wire(if middle { Outcome::PolicyNoFlow } else { Outcome::PolicyRefused });
    }
    if !flow.opens {
        return FAST;
    }
    let state = if ip.l4.ends != 0 { State::Closing } else { State::New };
    let admitted = Admitted {
        epoch,
        seen: tables.now(),
        opener: pod.id,
        state: state as u8,
        code: ip.l4.icmp_code,
        pad: [0; 2],
    };
    tables.admit(&flow.key, &admitted);
    Ruling { fast: true, remark: Some(if middle { Outcome::FlowReadmitted } else { Outcome::FlowAdmitted }) }
}

#[inline(always)]
fn flow_of(pod: &Endpoint, to: &Endpoint, ip: &Ipv4) -> Flow {
    let reports = matches!(ip.l4.role, Role::Reports);
    let up = pod.id < to.id;
    let (low, high) = if up { (pod.id, to.id) } else { (to.id, pod.id) };
    let (low_port, high_port) =
        if up { (ip.l4.src_port, ip.l4.dst_port) } else { (ip.l4.dst_port, ip.l4.src_port) };
    let mut key = PairKey { low, high, low_port, high_port, proto: ip.l4.proto, query: 0, pad: [0; 2] };
    if ip.proto != ICMP {
        return Flow { key, some: true, opens: ip.l4.ends & RST == 0 };
    }
    // Of an error: what `to` had sent to `pod`.
    if reports && !(same(ip.l4.quoted_src, to.ipv4) && same(ip.l4.about, pod.ipv4)) {
        return Flow { key, some: false, opens: false };
    }
    if ip.l4.proto != ICMP {
        return Flow { key, some: true, opens: false };
    }
    let icmp_type = if reports { ip.l4.quoted_type } else { ip.l4.icmp_type };
    let (request, answers) = query(icmp_type);
    if request == 0 {
        return Flow { key, some: false, opens: false };
    }
    // Who asked: the sender of a request, the receiver of an answer; of a quoted message it is the other way round.
    let higher_asked = up == (answers != reports);
    key.query = request << 1 | u8::from(higher_asked);
    Flow { key, some: true, opens: !answers && !reports }
}

/// Where a first packet stands among the intervals of programs.
#[inline(always)]
fn key_of(ip: &Ipv4) -> u32 {
    if ip.proto == ICMP {
        traffic_key(ICMP, u16::from_be_bytes([ip.l4.icmp_type, ip.l4.icmp_code]))
    } else {
        traffic_key(ip.proto, ip.l4.dst_port)
    }
}

/// The type of the request that a query of a type belongs to, and whether it is the answer; 0 = it is no query.
#[inline(always)]
const fn query(icmp_type: u8) -> (u8, bool) {
    match icmp_type {
        ECHO_REPLY => (ECHO_REQUEST, true),
        14 => (13, true),
        16 => (15, true),
        ECHO_REQUEST | 13 | 15 => (icmp_type, false),
        _ => (0, false),
    }
}

/// Notes what a packet changes in its flow.
#[inline(always)]
fn progress<T: Tables>(tables: &T, epoch: u32, pod: &Endpoint, ip: &Ipv4, flow: &Flow, known: &Admitted) {
    // An error says nothing of how far the flow has come.
    let state = if matches!(ip.l4.role, Role::Reports) {
        known.state
    } else if ip.l4.ends != 0 {
        State::Closing as u8
    } else if known.state == State::New as u8 && known.opener != pod.id {
        State::Established as u8
    } else {
        known.state
    };
    let seen = tables.now();
    if state != known.state || epoch != known.epoch || seen.wrapping_sub(known.seen) >= Admitted::REFRESH {
        let now = Admitted { epoch, seen, opener: known.opener, state, code: known.code, pad: [0; 2] };
        tables.admit(&flow.key, &now);
    }
}

/// Whether rules allow a flow from a pod of class `from` to one of class `to` that begins with traffic `key`.
#[inline(always)]
pub fn allows<R: Rules + ?Sized>(rules: &R, epoch: u32, from: u32, to: u32, key: u32) -> bool {
    rules.side_says(program_row(0, true, epoch), from, to, key) == ALLOW
        && rules.side_says(program_row(0, false, epoch), to, from, key) == ALLOW
}

/// What the groups of class `own` say of traffic with class `peer`, in the direction and half of `base`: the row of
/// programs that a group numbered 0 would have. The end of the list denies.
#[inline(always)]
pub fn side_says<R: Rules + ?Sized>(rules: &R, base: u32, own: u32, peer: u32, key: u32) -> u32 {
    let half = base & 1;
    let peer = peer as usize;
    let Some(list) = rules.class_groups(class_row(own, half)) else { return DENY };
    if peer >= CLASSES {
        return DENY;
    }
    for group in list.groups.iter().take(GROUPS_OF_A_POD) {
        if *group == 0 {
            return DENY;
        }
        let Some(row) = rules.programs(base + program_row(u32::from(*group), false, 0)) else { return DENY };
        let program = row.programs[peer & (CLASSES - 1)];
        if program == 0 {
            continue;
        }
        let Some(page) = rules.page(page_row(program, half)) else { return DENY };
        let says = says(page, program, key);
        if says != NOTHING {
            return says;
        }
    }
    DENY
}

/// What a program says of traffic `key`.
#[inline(always)]
fn says(page: &Page, program: u32, key: u32) -> u32 {
    let word = |at: u32| page.words[at as usize & (PAGE_WORDS - 1)];
    let last = word(program) as i32 - 1;
    let first = program + 1;
    // The last interval that begins at or before the key. The first begins at 0. Each step is arithmetic without a branch:
    // of branches the verifier would walk every sequence there is.
    let mut at = 0;
    let mut step = PAGE_WORDS as u32 / 2;
    while step > 0 {
        let next = at + step;
        let begins = word(first + next) >> 8;
        let beyond = (last - next as i32) | (key as i32 - begins as i32);
        // Hidden from LLVM, which would make it a branch again: all ones where neither difference is negative.
        let within = core::hint::black_box(!(beyond >> 31)) as u32;
        at += step & within;
        step >>= 1;
    }
    word(first + at) & 0xff
}

//! XDP on the parent ENI: drops early what no pod may have, and in redirect mode delivers what it wins at. Everything else
//! goes on to `eni_ingress`, which decides by the same functions.

use aya_ebpf::{macros::xdp, programs::XdpContext};
use datapath_common::{
    abi::{Direction, Endpoint, Outcome, outcome::Kind},
    decide::{
        Decision,
        eni_ingress::{admit, admit_plain, admitted, plain_route, route},
        limit, same_mac,
    },
    packet::ipv4::{Part, TCP},
};

use crate::{
    config,
    count::counted,
    ctx::{self, Buff, out_of},
    maps::Kernel,
};

/// Bytes of the tag inside the frame.
const TAG: usize = 4;

#[xdp(frags)]
#[inline(always)]
pub fn eni_xdp(ctx: XdpContext) -> u32 {
    let frame = Buff::new(&ctx);
    let mut won = false;
    let plain = admit_plain(&Kernel, &frame, |pod, packet| {
        won = wins_at(packet.proto, Part::Whole);
        if won { plain_route::<TAG, _, _>(&Kernel, &frame, pod, packet) } else { Some(admitted(pod)) }
    });
    if let Some(decision) = plain {
        return finish(&frame, decision, won);
    }
    let mut won = false;
    let decision = admit(&Kernel, &frame, None, |pod, ip| {
        // tc charges a limited pod, of which nothing is plain.
        won = wins_at(ip.proto, ip.part) && !limit::is_limited(Some(pod));
        if won { Some(route(&Kernel, pod, ip)) } else { None }
    });
    finish(&frame, decision, won)
}

/// Counts and acts; a frame that tc is to deliver is counted there.
#[inline(always)]
fn finish(frame: &Buff, decision: Decision<'_>, won: bool) -> u32 {
    let load = frame.load_of();
    let action = match (decision.outcome, decision.pod) {
        (Outcome::Wire, Some(pod)) if won => deliver(frame, pod),
        (outcome, _) if outcome.kind() as u8 != Kind::Drop as u8 => return ctx::XDP_PASS,
        _ => Some(ctx::XDP_DROP),
    };
    counted(action, &decision, Direction::Ingress, load)
}

/// TCP is better off with GRO and the checksum state that a frame cannot carry; the rest may skip the skb on this side.
#[inline(always)]
fn wins_at(proto: u8, part: Part) -> bool {
    config::XDP_REDIRECT.load() != 0 && proto != TCP && matches!(part, Part::Whole)
}

#[inline(always)]
fn deliver(frame: &Buff, pod: &Endpoint) -> Option<u32> {
    if !same_mac(pod.wire_mac, pod.mac) {
        frame.set_dst_mac(pod.mac)?;
    }
    frame.pop_tag()?;
    Some(out_of(pod.ifindex) as u32)
}

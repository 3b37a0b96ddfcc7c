//! tc ingress of the host side of a pod's veth: from the pod.

use aya_ebpf::{macros::classifier, programs::TcContext};
use datapath_common::{
    abi::{Direction, Endpoint, Outcome, maps::SERVICE_MARK},
    decide::{
        Decision, limit,
        pod_egress::{Plain, decide_any, decide_plain},
    },
    packet::{Frame as _, arp},
};

use crate::{
    count::{count, counted},
    ctx::{self, Skb, into_pod, out_of},
    maps::Kernel,
};

#[classifier]
#[inline(always)]
pub fn pod_egress(ctx: TcContext) -> i32 {
    let skb = Skb::new(&ctx);
    let gso_size = skb.gso_size();
    if let Some(Plain { decision, free }) = decide_plain(&Kernel, &skb, skb.tag(), skb.ifindex(), gso_size) {
        // Apart from the others, the common ways know all the rest by heart.
        return match decision.outcome {
            Outcome::Local => match (decision.pod, decision.to) {
                (Some(pod), Some(to)) if !free && limit::is_limited(Some(to)) => {
                    local_limited(&skb, pod, to, decision.remark)
                }
                _ => finish(&skb, Decision { outcome: Outcome::Local, ..decision }, gso_size),
            },
            Outcome::Wire => finish(&skb, Decision { outcome: Outcome::Wire, ..decision }, gso_size),
            _ => finish(&skb, decision, gso_size),
        };
    }
    skb.pull();
    finish_limited(&skb, decide_any(&Kernel, &skb, skb.tag(), skb.ifindex(), gso_size))
}

/// As [`finish_limited`], to a pod with a limit: a function of its own, to leave the registers to those without.
#[inline(never)]
fn local_limited(skb: &Skb, pod: &Endpoint, to: &Endpoint, remark: Option<Outcome>) -> i32 {
    finish_limited(skb, Decision { outcome: Outcome::Local, remark, pod: Some(pod), to: Some(to) })
}

/// As [`finish`], once the packet is charged to the pods that it is from and for.
#[inline(always)]
fn finish_limited(skb: &Skb, decision: Decision<'_>) -> i32 {
    let limit::Departure { decision, at } = limit::egress(&Kernel, skb, decision);
    if at != limit::AT_ONCE {
        skb.leave_at(at);
    }
    let gso_size = skb.gso_size();
    finish(skb, decision, gso_size)
}

#[inline(always)]
fn finish(skb: &Skb, decision: Decision<'_>, gso_size: u32) -> i32 {
    let load = skb.load_of(gso_size);
    let action = act(skb, &decision);
    if let (Some(_), Some(to)) = (action, decision.to) {
        count(to.id, Direction::Ingress, decision.outcome, load);
    }
    counted(action, &decision, Direction::Egress, load)
}

#[inline(always)]
fn act(skb: &Skb, decision: &Decision<'_>) -> Option<i32> {
    match (decision.outcome, decision.pod, decision.to) {
        (Outcome::Wire, Some(pod), _) => {
            skb.set_macs(pod.gateway_mac, pod.wire_mac).and_then(|()| to_wire(skb, pod))
        }
        (Outcome::WireArp, Some(pod), _) => skb.set_src_mac(pod.wire_mac).and_then(|()| to_wire(skb, pod)),
        (Outcome::Local, _, Some(to)) => to_pod(skb, to),
        (Outcome::Host, _, _) => Some(skb.accept()),
        (Outcome::HostService, _, _) => {
            skb.mark(SERVICE_MARK);
            Some(skb.accept())
        }
        (Outcome::ArpAnswered, Some(pod), _) => answer_arp(skb, pod),
        _ => Some(ctx::SHOT),
    }
}

#[inline(always)]
fn to_wire(skb: &Skb, pod: &Endpoint) -> Option<i32> {
    skb.push_tag(pod.vid)?;
    Some(out_of(pod.parent_ifindex) as i32)
}

/// As the fabric would have delivered it: from the gateway's MAC.
#[inline(always)]
fn to_pod(skb: &Skb, to: &Endpoint) -> Option<i32> {
    skb.set_macs(to.mac, to.gateway_mac)?;
    Some(into_pod(to.ifindex))
}

/// Turns a request into its answer, "the gateway is at the gateway's MAC", and sends it back into the pod.
#[inline(always)]
fn answer_arp(skb: &Skb, pod: &Endpoint) -> Option<i32> {
    const OPERATION: usize = 14 + 6;
    const SENDER_MAC: usize = OPERATION + 2;
    const SENDER: usize = SENDER_MAC + 6;
    const TARGET_MAC: usize = SENDER + 4;
    const TARGET: usize = TARGET_MAC + 6;
    let asker: [u8; 4] = skb.load(SENDER)?;
    skb.set_macs(pod.mac, pod.gateway_mac)?;
    skb.store(OPERATION, arp::REPLY.to_be_bytes())?;
    skb.store(SENDER_MAC, pod.gateway_mac)?;
    skb.store(SENDER, pod.gateway_ipv4)?;
    skb.store(TARGET_MAC, pod.mac)?;
    skb.store(TARGET, asker)?;
    Some(into_pod(pod.ifindex))
}

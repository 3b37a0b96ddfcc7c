//! tc ingress of the parent ENI: from the fabric to the pods.

use aya_ebpf::{macros::classifier, programs::TcContext};
use datapath_common::{
    abi::{Direction, Endpoint, Outcome},
    decide::{
        Decision,
        eni_ingress::{decide_any, decide_plain},
        limit, same_mac,
    },
};

use crate::{
    count::counted,
    ctx::{self, Skb, into_pod},
    maps::Kernel,
};

#[classifier]
#[inline(always)]
pub fn eni_ingress(ctx: TcContext) -> i32 {
    let skb = Skb::new(&ctx);
    if let Some(decision) = decide_plain(&Kernel, &skb, skb.tag()) {
        // Apart from the others, the common way knows all the rest by heart.
        return match decision.outcome {
            Outcome::Wire => finish(&skb, Decision { outcome: Outcome::Wire, ..decision }),
            _ => finish(&skb, decision),
        };
    }
    skb.pull();
    finish(&skb, limit::ingress(&Kernel, &skb, decide_any(&Kernel, &skb, skb.tag())))
}

#[inline(always)]
fn finish(skb: &Skb, decision: Decision<'_>) -> i32 {
    let load = skb.load_of(skb.gso_size());
    counted(act(skb, &decision), &decision, Direction::Ingress, load)
}

#[inline(always)]
fn act(skb: &Skb, decision: &Decision<'_>) -> Option<i32> {
    match (decision.outcome, decision.pod) {
        (Outcome::Untagged, _) => Some(ctx::NEXT),
        (Outcome::Wire, Some(pod)) => deliver(skb, pod),
        (Outcome::HostReturn, Some(_)) => skb.pop_tag().map(|()| skb.accept()),
        _ => Some(ctx::SHOT),
    }
}

#[inline(always)]
fn deliver(skb: &Skb, pod: &Endpoint) -> Option<i32> {
    if !same_mac(pod.wire_mac, pod.mac) {
        skb.store_by_call(ctx::DST_MAC, &pod.mac)?;
    }
    skb.pop_tag()?;
    Some(into_pod(pod.ifindex))
}

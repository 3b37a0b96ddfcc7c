//! tc egress of the host side of a pod's veth: from the node's stack to the pod.

use aya_ebpf::{macros::classifier, programs::TcContext};
use datapath_common::{
    abi::{Direction, Outcome},
    decide::{
        Decision, limit,
        pod_ingress::{decide_any, decide_plain},
    },
};

use crate::{
    count::count_decision,
    ctx::{self, Skb},
    maps::Kernel,
};

#[classifier]
#[inline(always)]
pub fn pod_ingress(ctx: TcContext) -> i32 {
    let skb = Skb::new(&ctx);
    if let Some(decision) = decide_plain(&Kernel, &skb, skb.tag(), skb.ifindex()) {
        return finish(&skb, decision);
    }
    skb.pull();
    finish(&skb, limit::ingress(&Kernel, &skb, decide_any(&Kernel, &skb, skb.tag(), skb.ifindex())))
}

#[inline(always)]
fn finish(skb: &Skb, decision: Decision<'_>) -> i32 {
    count_decision(&decision, Direction::Ingress, skb.load_of(skb.gso_size()));
    match decision.outcome {
        Outcome::Host => ctx::NEXT,
        _ => ctx::SHOT,
    }
}

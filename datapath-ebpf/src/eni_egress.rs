//! tc egress of the parent ENI: what the node's stack sends in a pod's name is tagged.

use aya_ebpf::{macros::classifier, programs::TcContext};
use datapath_common::{
    abi::{Direction, Endpoint, Outcome},
    decide::{
        Decision,
        eni_egress::{decide_any, decide_plain},
    },
};

use crate::{
    count::counted,
    ctx::{self, Skb, out_of},
    maps::Kernel,
};

#[classifier]
#[inline(always)]
pub fn eni_egress(ctx: TcContext) -> i32 {
    let skb = Skb::new(&ctx);
    if let Some(decision) = decide_plain(&Kernel, &skb, skb.tag()) {
        return finish(&skb, decision);
    }
    skb.pull();
    finish(&skb, decide_any(&Kernel, &skb, skb.tag()))
}

#[inline(always)]
fn finish(skb: &Skb, decision: Decision<'_>) -> i32 {
    let (Outcome::Wire, Some(pod)) = (decision.outcome, decision.pod) else { return ctx::NEXT };
    let load = skb.load_of(skb.gso_size());
    counted(tag(skb, pod), &decision, Direction::Egress, load)
}

/// Tags the frame; one that was routed to another parent than its pod's moves there.
#[inline(always)]
fn tag(skb: &Skb, pod: &Endpoint) -> Option<i32> {
    skb.set_macs_by_call(pod.gateway_mac, pod.wire_mac)?;
    skb.push_tag(pod.vid)?;
    if pod.parent_ifindex == skb.ifindex() {
        Some(ctx::NEXT)
    } else {
        Some(out_of(pod.parent_ifindex) as i32)
    }
}

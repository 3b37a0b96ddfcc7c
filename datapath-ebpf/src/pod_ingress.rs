//! tc egress of the host side of a pod's veth: from the node's stack to the pod.

use aya_ebpf::{macros::classifier, programs::TcContext};
use datapath_common::{
    abi::{Direction, Outcome},
    decide::pod_ingress::decide,
};

use crate::{
    count::count_decision,
    ctx::{self, Skb},
    maps::Kernel,
};

#[classifier]
pub fn pod_ingress(ctx: TcContext) -> i32 {
    let skb = Skb::new(&ctx);
    let decision = decide(&Kernel, &skb, skb.tag(), skb.ifindex());
    count_decision(&decision, Direction::Ingress, skb.load_of());
    match decision.outcome {
        Outcome::Host => ctx::NEXT,
        _ => ctx::SHOT,
    }
}

//! tc ingress of an exclusive ENI inside its pod.

use aya_ebpf::{macros::classifier, programs::TcContext};
use datapath_common::{
    abi::{Direction, Outcome},
    decide::{limit, nic},
};

use crate::{
    count::count_decision,
    ctx::{self, Skb},
    maps::Kernel,
};

#[classifier]
#[inline(always)]
pub fn nic_ingress(ctx: TcContext) -> i32 {
    let skb = Skb::new(&ctx);
    let decision = limit::ingress(&Kernel, &skb, nic::ingress(&Kernel, skb.ifindex()));
    count_decision(&decision, Direction::Ingress, skb.load_of(skb.gso_size()));
    match decision.outcome {
        Outcome::Wire => ctx::NEXT,
        _ => ctx::SHOT,
    }
}

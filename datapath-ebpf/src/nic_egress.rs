//! tc egress of an exclusive ENI inside its pod.

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
pub fn nic_egress(ctx: TcContext) -> i32 {
    let skb = Skb::new(&ctx);
    let decision = nic::egress(&Kernel, &skb, skb.tag(), skb.ifindex());
    let limit::Departure { decision, .. } = limit::egress(&Kernel, &skb, decision);
    count_decision(&decision, Direction::Egress, skb.load_of(skb.gso_size()));
    match decision.outcome {
        Outcome::Wire | Outcome::WireArp => ctx::NEXT,
        _ => ctx::SHOT,
    }
}

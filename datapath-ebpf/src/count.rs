//! The one place that counts.

use datapath_common::{
    abi::{Counter, CounterRow, Direction, Outcome, outcome::OUTCOMES},
    decide::Decision,
};

use crate::{ctx::Shot, maps::COUNTERS};

/// What one counting adds.
#[derive(Clone, Copy)]
pub struct Load {
    /// Packets; a GSO packet counts as its segments.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Adds to the counter of (pod, direction, outcome); pod 0 stands for none.
#[inline(always)]
pub fn count(id: u32, direction: Direction, outcome: Outcome, load: Load) {
    if let Some(row) = COUNTERS.get_ptr_mut(id) {
        let index = CounterRow::index(direction, outcome) & (2 * OUTCOMES - 1);
        // SAFETY: the row is this CPU's own and BPF programs of one CPU do not run into each other at one hook point;
        // the index is masked to the row's length, a power of two.
        unsafe {
            let counter = (&raw mut (*row).counters).cast::<Counter>().add(index);
            (*counter).packets += load.packets;
            (*counter).bytes += load.bytes;
        }
    }
}

/// Counts a decision and its remark.
#[inline(always)]
pub fn count_decision(decision: &Decision<'_>, direction: Direction, load: Load) {
    count(decision.id(), direction, decision.outcome, load);
    if let Some(remark) = decision.remark {
        count(decision.id(), direction, remark, load);
    }
}

/// Counts a decision that was carried out with this action, and gives it back. Without one the packet is dropped for what made
/// it fail: a frame too short, or that the kernel had no memory to make writable.
///
/// Not one way that both take: of what was carried out, the compiler knows by heart which counter it is.
#[inline(always)]
pub fn counted<A: Shot>(action: Option<A>, decision: &Decision<'_>, direction: Direction, load: Load) -> A {
    let Some(action) = action else {
        count(decision.id(), direction, Outcome::Truncated, load);
        return A::SHOT;
    };
    count_decision(decision, direction, load);
    action
}

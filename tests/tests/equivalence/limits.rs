//! Pods with limits of bandwidth, so that what is charged does not depend on how fast the test is.
//!
//! A byte takes so long that a packet's share decides and not the time that passes while it is compared; where a moment decides all the same,
//! the caller looks at both ends of it. What is used up is always ahead of the clock, so that it is a sum, and the same
//! on both sides: programs set it to their own clock only where a pod is behind. That alone is left out here; it is tested where
//! the clock is given (`decide/limit_tests.rs`), and with traffic (`bandwidth.rs`).

use std::sync::atomic::Ordering::Relaxed;

use datapath_common::{
    abi::{Bucket, Limits, Spent},
    testing::{MemoryTables, PODS, memory::Until},
};
use datapath_user::tables::TablesError;
use eniway_tests::{
    dice::Dice,
    programs::{Programs, nanos},
};

/// Nanoseconds that a byte takes: four seconds and a bit.
const BYTE: u64 = 1 << 32;
/// Nanoseconds that a pod is ahead of its rate at least, when its state is written: more than a round takes.
const SLACK: u64 = 3600 * 1_000_000_000;
/// Bytes of burst, and reserve, and pace: a few packets each.
const BURST: u64 = 4000;
const RESERVE: u64 = 2000;
const PACE: u64 = 3000;

fn bucket(burst: u64, reserve: u64) -> Bucket {
    Bucket { cost: BYTE << Bucket::SHIFT, depth: SLACK + burst * BYTE, reserve: reserve * BYTE }
}

/// Gives limits to some of the pods: `which` is one of the ways to do so.
pub fn limit(node: &mut MemoryTables, which: usize) {
    let both = Limits { ingress: bucket(BURST, RESERVE), egress: bucket(BURST, RESERVE), pace: 0 };
    let paced = Limits { pace: PACE * BYTE, ..both };
    // Smaller than most packets: these pass while there is room for anything.
    let small = Bucket { depth: 64 * BYTE, reserve: SLACK + RESERVE * BYTE, ..both.ingress };
    let [a, b, c, d] = PODS.map(|pod| pod.id);
    match which {
        0 => {
            node.limit(b, both);
            node.limit(c, paced);
        }
        1 => {
            node.limit(a, paced);
            node.limit(c, Limits { ingress: small, egress: small, pace: SLACK + PACE * BYTE });
            // Only what it receives.
            node.limit(d, Limits { egress: Bucket::ZERO, ..both });
        }
        2 => node.limit(b, paced),
        _ => {
            node.limit(a, both);
            node.limit(b, Limits { ingress: Bucket::ZERO, ..paced });
        }
    }
}

/// All limits have something left.
pub fn renew(node: &mut MemoryTables, programs: &mut Programs) -> Result<(), TablesError> {
    let now = nanos();
    let pods: Vec<u32> = node.limits.keys().copied().collect();
    for id in pods {
        node.spend(id, now + SLACK);
    }
    programs.fill_limits(node)
}

/// Uses up one of the limits to some extent, as if something had passed before, on both sides.
pub fn plant(node: &mut MemoryTables, programs: &mut Programs, dice: &mut Dice) -> Result<(), TablesError> {
    let pods: Vec<u32> = node.limits.keys().copied().collect();
    let id = dice.of(&pods);
    let bytes = dice.below((BURST + PACE + RESERVE) as usize) as u64;
    // Mostly little: there must be something left to be used up.
    let bytes = if dice.one_in(3) { bytes } else { bytes / 8 };
    let until = nanos() + SLACK + bytes * BYTE;
    let direction = dice.below(2);
    if let Some((_, spent)) = node.limits.get_mut(&id) {
        *spent[direction].0.get_mut() = until;
    }
    programs.maps.set_spent(id, &spent_of(node, id))
}

fn spent_of(node: &MemoryTables, id: u32) -> Spent {
    let until = node.limits.get(&id).map(|(_, spent)| spent.each_ref().map(|spent| spent.0.load(Relaxed)));
    until.map_or(Spent::ZERO, |until| Spent { until })
}

/// How far limits are used up, by pod.
pub fn spent(node: &MemoryTables) -> Vec<(u32, Spent)> {
    node.limits.keys().map(|&id| (id, spent_of(node, id))).collect()
}

/// As [`spent`], in the kernel.
pub fn spent_in_kernel(node: &MemoryTables, programs: &Programs) -> Result<Vec<(u32, Spent)>, TablesError> {
    node.limits.keys().map(|&id| Ok((id, programs.maps.spent(id)?))).collect()
}

/// Sets the host's side to what it was.
pub fn restore(node: &mut MemoryTables, spent: &[(u32, Spent)]) {
    for (id, spent) in spent {
        if let Some((_, known)) = node.limits.get_mut(id) {
            *known = spent.until.map(|until| Until(until.into()));
        }
    }
}

//! How many interfaces a node's pool should gain or lose: pure arithmetic over counts.

use crate::model::Policy;

/// A node's interfaces by what they do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Belonging to pods, those being created for a pod included.
    pub pods: u32,
    /// Idle and available.
    pub idle: u32,
    /// Idle, not yet available.
    pub cooling: u32,
    /// Being created for the pool.
    pub coming: u32,
    /// Being detached or deleted; they still take up room.
    pub leaving: u32,
}

impl Counts {
    /// Interfaces that are on the node and not leaving it.
    pub fn bound(&self) -> u32 {
        self.pods + self.ahead()
    }

    /// Interfaces bound in advance.
    pub fn ahead(&self) -> u32 {
        self.idle + self.cooling + self.coming
    }

    /// How many more the node can take.
    pub fn room(&self, limit: u32) -> u32 {
        limit.saturating_sub(self.bound() + self.leaving)
    }
}

/// What to do with a pool. Creating and giving back never go together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Create this many at once.
    pub create: u32,
    /// Give this many idle ones back at once.
    pub discard: u32,
    /// Give one idle one back if the pace allows it.
    pub discard_paced: bool,
}

/// Compares a pool with its policy.
pub fn plan(policy: Policy, counts: Counts, limit: u32) -> Plan {
    let over_limit = counts.bound().saturating_sub(limit).min(counts.idle);
    if over_limit > 0 {
        return Plan { discard: over_limit, ..Plan::default() };
    }
    match policy {
        Policy::PreBound { minimum, maximum } => {
            let create = minimum.saturating_sub(counts.ahead()).min(counts.room(limit));
            Plan { create, discard: 0, discard_paced: counts.idle > 0 && counts.ahead() > maximum }
        }
        Policy::Targets { minimum, maximum, warm, reclaim_above } => {
            let bound = counts.bound();
            let available = counts.idle + counts.coming;
            let ceiling = if maximum == 0 || maximum < minimum { limit } else { maximum };
            let for_minimum = minimum.saturating_sub(bound);
            let for_warm = warm.saturating_sub(available).min(ceiling.saturating_sub(bound));
            let create = for_minimum.max(for_warm).min(counts.room(limit));
            let above = counts.idle > warm.saturating_add(reclaim_above) && bound > minimum;
            Plan { create, discard: 0, discard_paced: create == 0 && above }
        }
        Policy::OnDemand => Plan { discard: counts.idle, ..Plan::default() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRE_BOUND: Policy = Policy::PreBound { minimum: 3, maximum: 6 };

    #[test]
    fn pre_bound_creates_what_is_missing_within_the_limit() {
        let counts = Counts { pods: 4, idle: 1, ..Counts::default() };
        assert_eq!(plan(PRE_BOUND, counts, 100), Plan { create: 2, ..Plan::default() });
        assert_eq!(plan(PRE_BOUND, counts, 6), Plan { create: 1, ..Plan::default() });
        assert_eq!(plan(PRE_BOUND, counts, 5), Plan::default());
    }

    #[test]
    fn pre_bound_gives_back_at_a_pace_and_over_the_limit_at_once() {
        let counts = Counts { pods: 4, idle: 7, ..Counts::default() };
        assert_eq!(plan(PRE_BOUND, counts, 100), Plan { discard_paced: true, ..Plan::default() });
        assert_eq!(plan(PRE_BOUND, counts, 8), Plan { discard: 3, ..Plan::default() });
        assert_eq!(plan(PRE_BOUND, Counts { idle: 0, cooling: 7, ..counts }, 100), Plan::default());
    }

    #[test]
    fn targets_hold_the_minimum_then_the_warm_ones() {
        let create =
            |pods, idle| plan(Policy::TARGETS, Counts { pods, idle, ..Counts::default() }, 256).create;
        assert_eq!(create(0, 0), 10);
        assert_eq!(create(8, 2), 0);
        assert_eq!(create(9, 1), 1);
        assert_eq!(create(30, 0), 2);
    }

    #[test]
    fn targets_stop_at_the_maximum_and_reclaim_above_the_threshold() {
        let policy = Policy::Targets { minimum: 4, maximum: 6, warm: 2, reclaim_above: 2 };
        let plan = |pods, idle| plan(policy, Counts { pods, idle, ..Counts::default() }, 256);
        assert_eq!(plan(5, 0).create, 1);
        assert_eq!(plan(6, 0).create, 0);
        assert!(!plan(2, 4).discard_paced);
        assert!(plan(2, 5).discard_paced);
        assert!(!plan(0, 4).discard_paced);
    }
}

//! The difference between what should be and what is, as a pure function: no look-ups, no writes.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use datapath_common::abi::Endpoint;

use crate::tables::{Index, Live, is_older};

/// Fewer removals than this are never held back.
const BULK: usize = 10;

/// What to do, in this order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Owners to remove.
    pub release: Vec<u64>,
    /// Owners whose record is to be written, new or changed.
    pub put: Vec<u64>,
    /// Owners for whom nothing is to be done.
    pub keep: Vec<u64>,
    /// Owners whose wish is refused; what they have stays.
    pub refused: Vec<(u64, Refusal)>,
}

/// Why a pod's record is not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The tables know a newer allocation.
    #[error("generation {given} is older than {known}, which is in force; the allocator went back in time")]
    Stale {
        /// What the source says.
        given: u32,
        /// What is in force.
        known: u32,
    },
    /// Another pod is to get the same, by an older allocation.
    #[error(
        "{index} is given to another pod too (owner {owner:016x}); the allocator must take it from one of them"
    )]
    Twice {
        /// What.
        index: Index,
        /// The owner that gets it.
        owner: u64,
    },
    /// Another live pod has what it should get.
    #[error(
        "{index} still belongs to pod {id} (owner {owner:016x}); it is given away only once that pod is released"
    )]
    Conflict {
        /// What.
        index: Index,
        /// The pod that has it.
        id: u32,
        /// Its owner.
        owner: u64,
    },
}

/// Compares. Id and interface index of the wanted records are ignored. Where two want the same, it is given to the
/// one of the older generation, and the other is refused. Owners in `stuck` want something but cannot get it now (their pod cannot be wired): they keep what they
/// have.
pub fn plan(wanted: &BTreeMap<u64, Endpoint>, actual: &BTreeMap<u64, Live>, stuck: &BTreeSet<u64>) -> Plan {
    let mut plan = Plan {
        release: actual.keys().filter(|owner| !wanted.contains_key(owner)).copied().collect(),
        ..Plan::default()
    };
    let mut open = BTreeMap::new();
    // What is in force and will stay so.
    let mut held = Held::default();
    for (owner, record) in wanted {
        match actual.get(owner) {
            Some(live) if is_older(record.generation, live.record.generation) => {
                let refusal = Refusal::Stale { given: record.generation, known: live.record.generation };
                plan.refused.push((*owner, refusal));
                held.add(live);
            }
            Some(live) if stuck.contains(owner) => held.add(live),
            None if stuck.contains(owner) => {}
            Some(live) if live.missing == 0 && same(record, &live.record) => {
                plan.keep.push(*owner);
                held.add(live);
            }
            live => {
                open.insert(*owner, (record, live));
            }
        }
    }
    // Whoever is refused keeps what it has, which may be what another one waits for.
    while let Some((owner, refusal)) = open
        .iter()
        .find_map(|(owner, (record, _))| Some((*owner, held.conflict(*owner, record)?)))
        .or_else(|| asked_twice(open.values().map(|(record, _)| *record)))
    {
        plan.refused.push((owner, refusal));
        if let Some((_, Some(live))) = open.remove(&owner) {
            held.add(live);
        }
    }
    plan.put.extend(open.into_keys());
    plan
}

/// The first record that asks for what one of an older generation asks for too.
fn asked_twice<'a>(records: impl Iterator<Item = &'a Endpoint>) -> Option<(u64, Refusal)> {
    let mut first: HashMap<Index, &Endpoint> = HashMap::new();
    for record in records {
        for index in Index::of(record).filter(|index| !matches!(index, Index::Interface(_))) {
            let Some(other) = first.insert(index, record) else { continue };
            let later = is_older(other.generation, record.generation)
                || other.generation == record.generation && other.owner < record.owner;
            let (winner, loser) = if later { (other, record) } else { (record, other) };
            return Some((loser.owner, Refusal::Twice { index, owner: winner.owner }));
        }
    }
    None
}

/// Whether two records say the same, but for what the tables and the wiring fill in.
pub fn same(a: &Endpoint, b: &Endpoint) -> bool {
    let plain = |record: &Endpoint| Endpoint { id: 0, ifindex: 0, ..*record };
    plain(a) == plain(b)
}

/// Who has what.
#[derive(Default)]
struct Held(HashMap<Index, (u32, u64)>);

impl Held {
    fn add(&mut self, live: &Live) {
        let Endpoint { id, owner, .. } = live.record;
        self.0.extend(Index::of(&live.record).map(|index| (index, (id, owner))));
    }

    /// The first thing that the record asks for and another has. Interfaces are known only once a pod is wired.
    fn conflict(&self, owner: u64, record: &Endpoint) -> Option<Refusal> {
        Index::of(record).filter(|index| !matches!(index, Index::Interface(_))).find_map(|index| {
            let &(id, holder) = self.0.get(&index).filter(|(_, holder)| *holder != owner)?;
            Some(Refusal::Conflict { index, id, owner: holder })
        })
    }
}

/// Whether so many removals look like an allocator that lost its memory.
pub fn is_bulk(removals: usize, live: usize) -> bool {
    removals > BULK && removals * 2 > live
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(n: u8) -> Endpoint {
        Endpoint {
            owner: n.into(),
            ipv4: [10, 0, 0, n],
            vid: 100 + u16::from(n),
            generation: 5,
            ..Endpoint::ZERO
        }
    }

    fn wanted(records: &[Endpoint]) -> BTreeMap<u64, Endpoint> {
        records.iter().map(|record| (record.owner, *record)).collect()
    }

    fn actual(records: &[Endpoint]) -> BTreeMap<u64, Live> {
        let live = |record: &Endpoint| {
            let id = record.owner as u32;
            let record = Endpoint { id, ifindex: 50 + id, ..*record };
            Live { slot: id, record, missing: 0 }
        };
        records.iter().map(|record| (record.owner, live(record))).collect()
    }

    fn planned(wanted_: &[Endpoint], actual_: &[Endpoint]) -> Plan {
        plan(&wanted(wanted_), &actual(actual_), &BTreeSet::new())
    }

    #[test]
    fn nothing_is_done_when_nothing_changed() {
        let pods = [record(1), record(2)];
        assert_eq!(planned(&pods, &pods), Plan { keep: vec![1, 2], ..Plan::default() });
    }

    #[test]
    fn only_differences_are_written() {
        let moved = Endpoint { vid: 7, ..record(2) };
        let plan = planned(&[record(1), moved, record(4)], &[record(1), record(2), record(3)]);
        assert_eq!(plan, Plan { release: vec![3], put: vec![2, 4], keep: vec![1], refused: vec![] });
    }

    #[test]
    fn a_cut_short_record_is_written_again() {
        let mut actual = actual(&[record(1)]);
        actual.get_mut(&1).unwrap().missing = 1;
        assert_eq!(plan(&wanted(&[record(1)]), &actual, &BTreeSet::new()).put, [1]);
    }

    #[test]
    fn a_successor_gets_what_is_released_with_it() {
        let next = Endpoint { owner: 9, ..record(1) };
        assert_eq!(
            planned(&[next], &[record(1)]),
            Plan { release: vec![1], put: vec![9], ..Plan::default() }
        );
    }

    #[test]
    fn stale_generations_are_refused_and_keep_what_they_have() {
        let old = Endpoint { generation: 4, vid: 300, ..record(1) };
        let thief = Endpoint { vid: 101, ..record(2) };
        let plan = planned(&[old, thief], &[record(1)]);
        assert_eq!(plan.refused[0], (1, Refusal::Stale { given: 4, known: 5 }));
        assert!(matches!(plan.refused[1], (2, Refusal::Conflict { owner: 1, .. })));
        assert!(plan.put.is_empty());
    }

    #[test]
    fn pods_trade_places_only_when_both_can() {
        let trade = [Endpoint { vid: 102, ..record(1) }, Endpoint { vid: 101, ..record(2) }];
        assert_eq!(planned(&trade, &[record(1), record(2)]).put, [1, 2]);
        let stuck = plan(&wanted(&trade), &actual(&[record(1), record(2)]), &BTreeSet::from([2]));
        assert!(stuck.put.is_empty());
        assert!(matches!(stuck.refused[..], [(1, Refusal::Conflict { owner: 2, .. })]));
    }

    #[test]
    fn a_refusal_is_passed_on() {
        // 1 waits for 2's VLAN, 2 for 3's, and 3 cannot move.
        let chain = [
            Endpoint { vid: 102, ..record(1) },
            Endpoint { vid: 103, ..record(2) },
            Endpoint { vid: 104, ..record(3) },
        ];
        let actual = actual(&[record(1), record(2), record(3)]);
        assert_eq!(plan(&wanted(&chain), &actual, &BTreeSet::new()).put, [1, 2, 3]);
        let plan = plan(&wanted(&chain), &actual, &BTreeSet::from([3]));
        assert_eq!(plan.refused.len(), 2);
        assert!(plan.put.is_empty());
    }

    #[test]
    fn what_two_want_goes_to_the_older_allocation() {
        let twin = Endpoint { vid: 101, generation: 6, ..record(2) };
        let plan = planned(&[twin, record(1)], &[]);
        assert_eq!(plan.put, [1]);
        assert!(matches!(plan.refused[..], [(2, Refusal::Twice { owner: 1, .. })]), "{plan:?}");
    }

    #[test]
    fn generations_are_counted_in_a_circle() {
        let wrapped = Endpoint { generation: 3, vid: 7, ..record(1) };
        let old = Endpoint { generation: u32::MAX - 3, ..record(1) };
        assert_eq!(planned(&[wrapped], &[old]).put, [1]);
        assert!(matches!(planned(&[old], &[wrapped]).refused[..], [(1, Refusal::Stale { .. })]));
    }

    #[test]
    fn an_address_conflicts_like_a_vlan() {
        let thief = Endpoint { ipv4: [10, 0, 0, 1], ..record(2) };
        let held = Endpoint { generation: 4, ..record(1) };
        let plan = planned(&[held, thief], &[record(1)]);
        assert!(plan.refused.iter().any(|(owner, refusal)| *owner == 2
            && matches!(refusal, Refusal::Conflict { index: Index::Ipv4([10, 0, 0, 1]), .. })));
    }

    #[test]
    fn most_pods_at_once_are_bulk() {
        assert!(!is_bulk(10, 10));
        assert!(is_bulk(11, 11));
        assert!(!is_bulk(11, 22));
        assert!(is_bulk(12, 22));
    }
}

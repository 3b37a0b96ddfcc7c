//! The maps of security groups: written in the half that is not in force, then switched to.

use std::{
    collections::{self as hash, BTreeMap},
    hash::Hasher as _,
};

use aya::maps::{Array, HashMap, MapData};
use datapath_common::abi::{
    Admitted, Endpoint, PairKey, maps,
    policy::{
        CLASSES, ClassGroups, MAX_GROUPS, PAGE_WORDS, PAGES, Page, ProgramRow, Verdict, VerdictRow,
        class_row, page_row, program_row,
    },
};
use eniway_policy::compile::Tables as Rules;
use serde::{Deserialize, Serialize};

use super::{
    TablesError,
    handles::{Raw, entries, failed, found, gone, remove_where, typed},
};
use crate::{config::Limits, fnv::Fnv};

/// Handles to the maps of security groups.
pub struct PolicyMaps {
    epoch: Array<MapData, u32>,
    verdict: Array<MapData, Raw<VerdictRow>>,
    class: Array<MapData, Raw<ClassGroups>>,
    program: Array<MapData, Raw<ProgramRow>>,
    rules: Array<MapData, Raw<Page>>,
    pairs: HashMap<MapData, Raw<PairKey>, Raw<Admitted>>,
    pair_mark: Array<MapData, u32>,
}

/// What stands in the maps of security groups, in short.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyDigest {
    /// The epoch.
    pub epoch: u32,
    /// All verdicts.
    verdicts: u64,
    /// The groups of all classes, in the half that is in force.
    classes: u64,
    /// Which groups have programs there.
    groups: Vec<(u32, bool)>,
    /// Where they begin.
    programs: u64,
    /// Pages of programs there.
    pages: u32,
    /// What stands on them.
    rules: u64,
}

impl PolicyDigest {
    /// By map.
    pub fn parts(&self) -> [(&'static str, u64); 5] {
        [
            (maps::EPOCH, self.epoch.into()),
            (maps::VERDICT, self.verdicts),
            (maps::CLASS, self.classes),
            (maps::PROGRAM, self.programs),
            (maps::RULES, self.rules),
        ]
    }

    /// Of what a half should hold.
    fn of(epoch: u32, classes: u32, rules: &Rules, verdicts: &Verdicts) -> Self {
        let none = Vec::new();
        let verdicts =
            (1..classes).map(|class| full(verdicts.get(&class).unwrap_or(&none)).verdicts.to_vec());
        let lists = (1..classes).map(|class| rules.lists.get(&class).copied().unwrap_or_default());
        let starts = rules.programs.values().map(|starts| {
            let mut row = [0; CLASSES];
            row[..starts.len()].copy_from_slice(starts);
            words(row)
        });
        let pages = rules.words.chunks(PAGE_WORDS).map(|some| {
            let mut page = [0; PAGE_WORDS];
            page[..some.len()].copy_from_slice(some);
            words(page)
        });
        Self {
            epoch,
            verdicts: digest(verdicts),
            classes: digest(lists.map(|list| words(list.groups))),
            groups: rules.programs.keys().copied().collect(),
            programs: digest(starts),
            pages: rules.words.chunks(PAGE_WORDS).count() as u32,
            rules: digest(pages),
        }
    }
}

fn words<W: Into<u64>>(words: impl IntoIterator<Item = W>) -> Vec<u8> {
    words.into_iter().flat_map(|word| word.into().to_le_bytes()).collect()
}

fn digest(rows: impl Iterator<Item = Vec<u8>>) -> u64 {
    let mut hash = Fnv::default();
    rows.for_each(|row| hash.write(&row));
    hash.finish()
}

impl PolicyMaps {
    pub(super) fn build(
        open: impl Fn(&'static str) -> Result<MapData, TablesError>,
    ) -> Result<Self, TablesError> {
        Ok(Self {
            epoch: typed(maps::EPOCH, &open)?,
            verdict: typed(maps::VERDICT, &open)?,
            class: typed(maps::CLASS, &open)?,
            program: typed(maps::PROGRAM, &open)?,
            rules: typed(maps::RULES, &open)?,
            pairs: typed(maps::PAIRS, &open)?,
            pair_mark: typed(maps::PAIR_MARK, &open)?,
        })
    }

    pub(super) fn create(limits: &Limits) -> Result<Self, TablesError> {
        let make = "create";
        Ok(Self {
            epoch: Array::create(1, 0).map_err(failed(maps::EPOCH, make))?,
            verdict: Array::create(limits.classes(), 0).map_err(failed(maps::VERDICT, make))?,
            class: Array::create(2 * limits.classes(), 0).map_err(failed(maps::CLASS, make))?,
            program: Array::create(4 * MAX_GROUPS, 0).map_err(failed(maps::PROGRAM, make))?,
            rules: Array::create(2 * PAGES, 0).map_err(failed(maps::RULES, make))?,
            pairs: HashMap::create(limits.flows, 0).map_err(failed(maps::PAIRS, make))?,
            pair_mark: Array::create(limits.endpoints + 1, 0).map_err(failed(maps::PAIR_MARK, make))?,
        })
    }

    /// Classes that there is room for, the 0 of "cannot be judged" included.
    pub fn classes(&self) -> usize {
        self.class.len() as usize / 2
    }

    /// The epoch; its lowest bit says which half is in force.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn epoch(&self) -> Result<u32, TablesError> {
        self.epoch.get(&0, 0).map_err(failed(maps::EPOCH, "read"))
    }

    /// The verdicts of a class.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn verdicts(&self, class: u32) -> Result<VerdictRow, TablesError> {
        self.verdict.get(&class, 0).map(|raw| raw.0).map_err(failed(maps::VERDICT, "read"))
    }

    /// The groups of a class.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn class_groups(&self, row: u32) -> Result<ClassGroups, TablesError> {
        self.class.get(&row, 0).map(|raw| raw.0).map_err(failed(maps::CLASS, "read"))
    }

    /// A group's programs.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn programs(&self, row: u32) -> Result<ProgramRow, TablesError> {
        self.program.get(&row, 0).map(|raw| raw.0).map_err(failed(maps::PROGRAM, "read"))
    }

    /// A page of programs.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn page(&self, row: u32) -> Result<Page, TablesError> {
        self.rules.get(&row, 0).map(|raw| raw.0).map_err(failed(maps::RULES, "read"))
    }

    /// Writes the epoch.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn set_epoch(&mut self, epoch: u32) -> Result<(), TablesError> {
        self.epoch.set(0, epoch, 0).map_err(failed(maps::EPOCH, "write"))
    }

    /// Writes the verdicts of a class.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn set_verdicts(&mut self, class: u32, verdicts: &VerdictRow) -> Result<(), TablesError> {
        self.verdict.set(class, Raw(*verdicts), 0).map_err(failed(maps::VERDICT, "write"))
    }

    /// Writes the groups of a class.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn set_class_groups(&mut self, row: u32, groups: &ClassGroups) -> Result<(), TablesError> {
        self.class.set(row, Raw(*groups), 0).map_err(failed(maps::CLASS, "write"))
    }

    /// Writes a group's programs.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn set_programs(&mut self, row: u32, programs: &ProgramRow) -> Result<(), TablesError> {
        self.program.set(row, Raw(*programs), 0).map_err(failed(maps::PROGRAM, "write"))
    }

    /// Writes a page of programs.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn set_page(&mut self, row: u32, page: &Page) -> Result<(), TablesError> {
        self.rules.set(row, Raw(*page), 0).map_err(failed(maps::RULES, "write"))
    }

    /// A flow that was admitted to the fast path.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn pair(&self, key: &PairKey) -> Result<Option<Admitted>, TablesError> {
        Ok(found(maps::PAIRS, self.pairs.get(&Raw(*key), 0))?.map(|raw| raw.0))
    }

    /// All flows that were admitted to the fast path.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn pairs(&self) -> Result<Vec<(PairKey, Admitted)>, TablesError> {
        Ok(entries(maps::PAIRS, &self.pairs)?.into_iter().map(|(key, flow)| (key.0, flow.0)).collect())
    }

    /// Admits a flow, as the kernel programs do.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn set_pair(&mut self, key: &PairKey, flow: &Admitted) -> Result<(), TablesError> {
        for id in [key.low, key.high] {
            self.pair_mark.set(id, 1, 0).map_err(failed(maps::PAIR_MARK, "write"))?;
        }
        self.pairs.insert(Raw(*key), Raw(*flow), 0).map_err(failed(maps::PAIRS, "write"))
    }

    /// Forgets one flow. Returns whether it was there.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn remove_pair(&mut self, key: &PairKey) -> Result<bool, TablesError> {
        gone(maps::PAIRS, self.pairs.remove(&Raw(*key)))
    }

    /// Forgets all flows of a pod.
    pub(super) fn forget(&mut self, id: u32) -> Result<(), TablesError> {
        if self.pair_mark.get(&id, 0).map_err(failed(maps::PAIR_MARK, "read"))? == 0 {
            return Ok(());
        }
        remove_where(maps::PAIRS, &mut self.pairs, |key, _| key.0.low == id || key.0.high == id)?;
        self.pair_mark.set(id, 0, 0).map_err(failed(maps::PAIR_MARK, "write"))
    }

    /// What stands in the maps, as far as what should be there goes.
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    pub fn digest(&self, wanted: &PolicyDigest) -> Result<PolicyDigest, TablesError> {
        let epoch = self.epoch()?;
        let mut found = PolicyDigest { epoch, ..wanted.clone() };
        let classes = 1..self.classes() as u32;
        let verdicts: Result<Vec<_>, _> = classes.clone().map(|class| self.verdicts(class)).collect();
        found.verdicts = digest(verdicts?.into_iter().map(|row| row.verdicts.to_vec()));
        let lists: Result<Vec<_>, _> =
            classes.map(|class| self.class_groups(class_row(class, epoch))).collect();
        found.classes = digest(lists?.into_iter().map(|list| words(list.groups)));
        let rows = wanted.groups.iter().map(|(group, egress)| program_row(*group, *egress, epoch));
        let starts: Result<Vec<_>, _> = rows.map(|row| self.programs(row)).collect();
        found.programs = digest(starts?.into_iter().map(|row| words(row.programs)));
        let rows = (0..wanted.pages).map(|page| page_row(page * PAGE_WORDS as u32, epoch));
        let pages: Result<Vec<_>, _> = rows.map(|row| self.page(row)).collect();
        found.rules = digest(pages?.into_iter().map(|page| words(page.words)));
        Ok(found)
    }

    /// Puts rules in force:
    ///
    /// 1. verdicts that change become "check", which is true of every pair;
    /// 2. the half that is not in force is written, and the epoch counted up;
    /// 3. the verdicts become what they are to be.
    ///
    /// Between the steps, and at the end, no program runs any more that began before. Only rows that differ from what
    /// `written` says of them are written; it is brought up to date. Returns how many were.
    ///
    /// # Errors
    ///
    /// When a map cannot be written; what is in force then is the old rules or the new ones, and calling again continues.
    pub fn enforce(&mut self, rules: &Rules, written: &mut Written) -> Result<usize, TablesError> {
        // What is not known is written in full. On failure nothing is known.
        let Written { halves: [even, odd], verdicts } = written;
        let epoch = self.epoch()?.wrapping_add(1);
        let half = if epoch & 1 == 0 { even } else { odd };
        let (before, known) = (half.take(), verdicts.take());

        let changed = self.changed(rules, known.as_ref());
        for (class, row) in &changed {
            let old = known.as_ref().and_then(|known| known.get(class));
            self.set_verdicts(*class, &transitional(old, row))?;
        }
        let rows = self.write(epoch, rules, before.as_ref())?;
        if !changed.is_empty() {
            self.wait_for_programs();
        }
        self.set_epoch(epoch)?;
        self.wait_for_programs();
        for (class, row) in &changed {
            self.set_verdicts(*class, &full(row))?;
        }
        if !changed.is_empty() {
            self.wait_for_programs();
        }
        *half = Some(rules.clone());
        *verdicts = Some(rules.verdicts.clone());
        Ok(rows + changed.len())
    }

    /// Ends the flows that would not be admitted any more, given the pods' records as they are to be: a program judges a flow again
    /// only when its next packet comes, and by then it may be allowed again. To be called after [`enforce`](Self::enforce), and when
    /// no program judges any more by records that are to change. Returns how many flows ended.
    ///
    /// # Errors
    ///
    /// When the map cannot be read or written; calling again continues.
    pub fn sweep<'r>(
        &mut self,
        rules: &Rules,
        pods: impl Iterator<Item = &'r Endpoint>,
    ) -> Result<usize, TablesError> {
        let pods: hash::HashMap<u32, &Endpoint> = pods.map(|record| (record.id, record)).collect();
        remove_where(maps::PAIRS, &mut self.pairs, |Raw(key), Raw(flow)| {
            let both = pods.get(&key.low).zip(pods.get(&key.high));
            !both.is_some_and(|(low, high)| rules.keeps(low, high, key, flow))
        })
    }

    /// The verdicts that are to be, of classes of which they are not.
    fn changed(&self, rules: &Rules, known: Option<&Verdicts>) -> Verdicts {
        let wanted = |class: u32| rules.verdicts.get(&class).cloned().unwrap_or_default();
        let classes = 1..self.classes() as u32;
        match known {
            None => classes.map(|class| (class, wanted(class))).collect(),
            Some(known) => classes
                .filter(|class| known.get(class) != rules.verdicts.get(class))
                .map(|class| (class, wanted(class)))
                .collect(),
        }
    }

    /// Waits until every program has ended that runs now. They run as RCU readers, and `MEMBARRIER_CMD_GLOBAL` is
    /// `synchronize_rcu()` (kernel/sched/membarrier.c). Where it is not to be had (`nohz_full`), waits as long as slots rest.
    pub fn wait_for_programs(&self) {
        const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
        // SAFETY: the call takes numbers only.
        let done = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
        if done != 0 {
            std::thread::sleep(super::GRACE);
        }
    }

    fn write(&mut self, epoch: u32, rules: &Rules, before: Option<&Rules>) -> Result<usize, TablesError> {
        let mut rows = 0;
        let none = Rules::default();
        let known = before.unwrap_or(&none);
        // Classes that are no more are cleared; those of a half that is not known, too.
        for class in 1..self.classes() as u32 {
            if before.is_some() && known.lists.get(&class) == rules.lists.get(&class) {
                continue;
            }
            let list = rules.lists.get(&class).copied().unwrap_or_default();
            self.set_class_groups(class_row(class, epoch), &list)?;
            rows += 1;
        }
        rows += self.write_programs(epoch, &rules.programs, before.map(|known| &known.programs))?;
        let pages = |rules: &'_ Rules| -> Vec<Vec<u32>> {
            rules.words.chunks(PAGE_WORDS).map(<[u32]>::to_vec).collect()
        };
        let known = before.map(pages).unwrap_or_default();
        for (number, words) in pages(rules).into_iter().enumerate() {
            if known.get(number) == Some(&words) {
                continue;
            }
            let mut page = Page { words: [0; PAGE_WORDS] };
            page.words[..words.len()].copy_from_slice(&words);
            let at = page_row((number * PAGE_WORDS) as u32, epoch);
            self.set_page(at, &page)?;
            rows += 1;
        }
        Ok(rows)
    }

    fn write_programs(
        &mut self,
        epoch: u32,
        programs: &BTreeMap<(u32, bool), Vec<u32>>,
        before: Option<&BTreeMap<(u32, bool), Vec<u32>>>,
    ) -> Result<usize, TablesError> {
        let mut rows = 0;
        // A class names only groups that have rows.
        for (key @ (group, egress), starts) in programs {
            if before.is_some_and(|before| before.get(key) == Some(starts)) {
                continue;
            }
            let mut row = ProgramRow { programs: [0; CLASSES] };
            row.programs[..starts.len()].copy_from_slice(starts);
            let at = program_row(*group, *egress, epoch);
            self.set_programs(at, &row)?;
            rows += 1;
        }
        Ok(rows)
    }
}

/// Verdicts by class, then by class of the receiver.
type Verdicts = BTreeMap<u32, Vec<u8>>;

/// What is known of what stands in the maps.
#[derive(Default)]
pub struct Written {
    /// Groups and programs of the two halves.
    halves: [Option<Rules>; 2],
    verdicts: Option<Verdicts>,
}

impl Written {
    /// What should stand in the maps; none when it is not known.
    pub fn digest(&self, epoch: u32, classes: usize) -> Option<PolicyDigest> {
        let half = self.halves[epoch as usize & 1].as_ref()?;
        Some(PolicyDigest::of(epoch, classes as u32, half, self.verdicts.as_ref()?))
    }

    /// Whether these rules are in force.
    pub fn is(&self, epoch: u32, rules: &Rules) -> bool {
        self.halves[epoch as usize & 1].as_ref() == Some(rules)
            && self.verdicts.as_ref() == Some(&rules.verdicts)
    }
}

fn full(verdicts: &[u8]) -> VerdictRow {
    let mut row = VerdictRow { verdicts: [Verdict::Wire as u8; CLASSES] };
    row.verdicts[..verdicts.len()].copy_from_slice(verdicts);
    row
}

/// The new verdicts, with "check" wherever the old ones differ, or are not known.
fn transitional(old: Option<&Vec<u8>>, new: &[u8]) -> VerdictRow {
    let Some(old) = old else { return VerdictRow { verdicts: [Verdict::Check as u8; CLASSES] } };
    let (old, mut row) = (full(old), full(new));
    for (verdict, old) in row.verdicts.iter_mut().zip(old.verdicts) {
        if *verdict != old {
            *verdict = Verdict::Check as u8;
        }
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_is_asked_for_meanwhile() {
        let (wire, open, check) = (Verdict::Wire as u8, Verdict::Open as u8, Verdict::Check as u8);
        let row = transitional(Some(&vec![wire, open, open, check]), &[wire, open, check, open, open]);
        assert_eq!(row.verdicts[..6], [wire, open, check, check, check, wire]);
        assert!(transitional(None, &[open]).verdicts.iter().all(|verdict| *verdict == check));
    }
}

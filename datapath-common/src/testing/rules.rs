//! Tables of security groups in memory.

use std::{boxed::Box, collections::BTreeMap};

use crate::{
    abi::policy::{
        CLASSES, ClassGroups, PAGE_WORDS, Page, ProgramRow, VerdictRow, class_row, page_row, program_row,
    },
    tables::Rules,
};

/// Tables of security groups in memory. Rows are written for both halves.
#[derive(Clone, Debug, Default)]
pub struct MemoryRules {
    /// The epoch.
    pub epoch: u32,
    verdicts: BTreeMap<u32, Box<VerdictRow>>,
    classes: BTreeMap<u32, ClassGroups>,
    programs: BTreeMap<u32, Box<ProgramRow>>,
    pages: BTreeMap<u32, Box<Page>>,
}

impl MemoryRules {
    /// Writes the verdicts of a class, by class of the receiver from 0 on; the rest is the wire.
    pub fn set_verdicts(&mut self, class: u32, verdicts: &[u8]) {
        let mut row = Box::new(VerdictRow { verdicts: [0; CLASSES] });
        row.verdicts[..verdicts.len()].copy_from_slice(verdicts);
        for half in 0..2 {
            self.verdicts.insert(class_row(class, half), row.clone());
        }
    }

    /// Writes the groups of a class.
    pub fn set_class(&mut self, class: u32, groups: ClassGroups) {
        for half in 0..2 {
            self.classes.insert(class_row(class, half), groups);
        }
    }

    /// Writes a group's programs in one direction, by class of the other end.
    pub fn set_programs(&mut self, group: u32, egress: bool, programs: &[u32]) {
        let mut row = Box::new(ProgramRow { programs: [0; CLASSES] });
        row.programs[..programs.len()].copy_from_slice(programs);
        for half in 0..2 {
            self.programs.insert(program_row(group, egress, half), row.clone());
        }
    }

    /// Writes the programs.
    pub fn set_words(&mut self, words: &[u32]) {
        for (number, words) in words.chunks(PAGE_WORDS).enumerate() {
            let mut page = Box::new(Page { words: [0; PAGE_WORDS] });
            page.words[..words.len()].copy_from_slice(words);
            for half in 0..2 {
                self.pages.insert(page_row((number * PAGE_WORDS) as u32, half), page.clone());
            }
        }
    }
}

impl Rules for MemoryRules {
    fn epoch(&self) -> u32 {
        self.epoch
    }

    fn verdicts(&self, row: u32) -> Option<&VerdictRow> {
        self.verdicts.get(&row).map(|row| &**row)
    }

    fn class_groups(&self, row: u32) -> Option<&ClassGroups> {
        self.classes.get(&row)
    }

    fn programs(&self, row: u32) -> Option<&ProgramRow> {
        self.programs.get(&row).map(|row| &**row)
    }

    fn page(&self, row: u32) -> Option<&Page> {
        self.pages.get(&row).map(|page| &**page)
    }
}

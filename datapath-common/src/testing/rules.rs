//! Tables of security groups in memory.

use std::{boxed::Box, collections::BTreeMap, vec, vec::Vec};

use super::MemoryTables;
use crate::{
    abi::{
        endpoint::flag,
        policy::{
            ALLOW, CLASSES, ClassGroups, DENY, PAGE_WORDS, Page, ProgramRow, Verdict, VerdictRow, class_row,
            interval, page_row, program_row, traffic_key,
        },
    },
    packet::ipv4::{ICMP, TCP, UDP},
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
        self.verdicts.insert(class, row);
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
        for half in 0..2 {
            self.set_words_of(half, words);
        }
    }

    /// Writes the programs of one half.
    pub fn set_words_of(&mut self, half: u32, words: &[u32]) {
        for (number, words) in words.chunks(PAGE_WORDS).enumerate() {
            let mut page = Box::new(Page { words: [0; PAGE_WORDS] });
            page.words[..words.len()].copy_from_slice(words);
            self.pages.insert(page_row((number * PAGE_WORDS) as u32, half), page);
        }
    }

    /// All rows, by their maps.
    pub fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        let verdicts = self.verdicts.iter().map(|(at, row)| Row::Verdict(*at, row));
        let classes = self.classes.iter().map(|(at, row)| Row::Class(*at, row));
        let programs = self.programs.iter().map(|(at, row)| Row::Program(*at, row));
        let pages = self.pages.iter().map(|(at, row)| Row::Rules(*at, row));
        verdicts.chain(classes).chain(programs).chain(pages)
    }
}

/// A row of one of the maps, with its index.
#[derive(Clone, Copy, Debug)]
pub enum Row<'r> {
    /// Of `VERDICT`.
    Verdict(u32, &'r VerdictRow),
    /// Of `CLASS`.
    Class(u32, &'r ClassGroups),
    /// Of `PROGRAM`.
    Program(u32, &'r ProgramRow),
    /// Of `RULES`.
    Rules(u32, &'r Page),
}

/// [`node`](super::node) with security groups: pod 1 is a client (class 1), pod 2 a server (class 2) that may open nothing
/// towards the client. Pods 3 and 4 are open towards each other (class 3), and can neither reach nor be reached from classes
/// 1 and 2. The client may open [`SERVED`] in both halves; [`set_served`] changes that.
pub fn judged_node() -> MemoryTables {
    let mut node = super::node();
    for (slot, class) in [(1, 1), (2, 2), (3, 3), (4, 3)] {
        node.endpoints[slot].policy_id = class;
        node.endpoints[slot].flags = flag::GROUPS;
    }
    let (open, check, refused) = (Verdict::Open as u8, Verdict::Check as u8, Verdict::Refused as u8);
    node.rules.set_verdicts(1, &[0, open, check, refused]);
    node.rules.set_verdicts(2, &[0, check, open, refused]);
    node.rules.set_verdicts(3, &[0, refused, refused, open]);
    for class in 1..=2u16 {
        let mut groups = ClassGroups::default();
        groups.groups[0] = class;
        node.rules.set_class(class.into(), groups);
    }
    node.rules.epoch = 2;
    for half in 0..2 {
        set_served(&mut node.rules, half, &SERVED);
    }
    node
}

/// What the client of [`judged_node`] may open towards the server: TCP port 80, UDP port 53, echo requests.
pub const SERVED: [(u8, u16); 3] = [(TCP, 80), (UDP, 53), (ICMP, 8 << 8)];

/// Lets the client of [`judged_node`] open this traffic (protocol, and port or type and code) and nothing else, in one half.
pub fn set_served(rules: &mut MemoryRules, half: u32, traffic: &[(u8, u16)]) {
    let mut keys: Vec<u32> = traffic.iter().map(|(proto, port)| traffic_key(*proto, *port)).collect();
    keys.sort_unstable();
    let mut list = vec![interval(0, DENY)];
    for key in keys {
        list.extend([interval(key, ALLOW), interval(key + 1, DENY)]);
    }
    // At 1: all; after it, the list. The server's egress and the client's ingress say nothing, which denies.
    let mut words = vec![0, 1, interval(0, ALLOW), list.len() as u32];
    words.extend(list);
    rules.set_words_of(half, &words);
    rules.set_programs(1, true, &[0, 1, 1]);
    rules.set_programs(2, false, &[0, 3, 3]);
}

impl Rules for MemoryRules {
    fn epoch(&self) -> u32 {
        self.epoch
    }

    fn verdicts(&self, class: u32) -> Option<&VerdictRow> {
        self.verdicts.get(&class).map(|row| &**row)
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

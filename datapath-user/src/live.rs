//! The pinned tables as they are now, for `eniway trace` to decide over.
//!
//! [`LiveTables`] answers the look-ups of a decision as the kernel's programs would have them answered, and writes each
//! down. What a decision wants remembered is kept here, for the decisions after it, and never gets into the maps:
//! looking leaves no trace.

use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::{HashMap, HashSet},
    fmt::Display,
    net::Ipv4Addr,
    sync::atomic::AtomicU64,
};

use datapath_common::{
    abi::{
        Admitted, Direction, Door, Endpoint, Flow, FlowKey, Fragment, FragmentKey, Limits, Origin, PairKey,
        maps::{self, host_dst},
        policy::{ClassGroups, Page, ProgramRow, VerdictRow},
    },
    packet::ipv4::{ICMP, TCP, UDP},
    tables::{Rules, Tables},
};
use serde::Serialize;

use crate::tables::{Index, Maps, TablesError};

/// Something that a decision asked of the tables, or wants remembered in them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// The map, or the constant.
    pub table: &'static str,
    /// What was asked for, or what is to be remembered.
    pub key: String,
    /// What it answered.
    pub answer: String,
}

/// The tables of a node.
pub struct LiveTables {
    maps: Maps,
    fast_path: bool,
    /// Names of pods by id, for the steps.
    names: HashMap<u32, String>,
    /// Records by slot, each read once: decisions hold on to them.
    records: Vec<OnceCell<Option<Endpoint>>>,
    /// Flows that were handed out, for the same reason.
    handed_out: List<Flow>,
    rules: LiveRules,
    /// Index of the parent that the program in question is attached to.
    parent: Cell<u16>,
    steps: RefCell<Vec<Step>>,
    failure: RefCell<Option<TablesError>>,
    flows: RefCell<HashMap<FlowKey, Option<Flow>>>,
    fragments: RefCell<HashMap<FragmentKey, Door>>,
    marks: RefCell<HashSet<u32>>,
    flow_involved: Cell<bool>,
    limits: List<Limits>,
    spent: List<AtomicU64>,
}

impl LiveTables {
    /// Over these maps. `fast_path` is how the programs were loaded, which no map says; `names` gives pods by id.
    pub fn new(maps: Maps, fast_path: bool, names: HashMap<u32, String>) -> Self {
        let records = (0..maps.slots()).map(|_| OnceCell::new()).collect();
        Self {
            maps,
            fast_path,
            names,
            records,
            handed_out: List::default(),
            rules: LiveRules::default(),
            parent: Cell::new(0),
            steps: RefCell::default(),
            failure: RefCell::default(),
            flows: RefCell::default(),
            fragments: RefCell::default(),
            marks: RefCell::default(),
            flow_involved: Cell::new(false),
            limits: List::default(),
            spent: List::default(),
        }
    }

    /// Answers from now on as a program attached to the parent with this index.
    pub fn at_parent(&self, index: u16) {
        self.parent.set(index);
    }

    /// The steps since the last call.
    ///
    /// # Errors
    ///
    /// When a look-up failed, so that its answer was made up.
    pub fn take_steps(&self) -> Result<Vec<Step>, TablesError> {
        match self.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(self.steps.take()),
        }
    }

    /// Whether a remembered flow has been met, or one would be remembered, since the beginning.
    pub fn flow_involved(&self) -> bool {
        self.flow_involved.get()
    }

    /// The record of the pod with this address on this node. No step.
    ///
    /// # Errors
    ///
    /// When the maps cannot be read.
    pub fn pod(&self, address: Ipv4Addr) -> Result<Option<&Endpoint>, TablesError> {
        let slot = self.maps.slot(Index::Ipv4(address.octets()))?;
        let record = self.record(slot);
        match self.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(record),
        }
    }

    /// The maps themselves.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// The name of the pod with this id.
    pub fn name(&self, id: u32) -> String {
        self.names.get(&id).cloned().unwrap_or_else(|| format!("id {id}"))
    }

    fn record(&self, slot: u32) -> Option<&Endpoint> {
        // Slot 0 stands for "none".
        let cell = self.records.get(slot as usize).filter(|_| slot != 0)?;
        cell.get_or_init(|| self.answer(self.maps.record(slot).map(Some))).as_ref()
    }

    /// The answer; if there is none, that of an empty table, and the failure is kept for
    /// [`take_steps`](Self::take_steps).
    fn answer<V: Default>(&self, result: Result<V, TablesError>) -> V {
        result.unwrap_or_else(|failure| {
            self.failure.borrow_mut().get_or_insert(failure);
            V::default()
        })
    }

    fn step(&self, table: &'static str, key: impl Display, answer: impl Display) {
        let step = Step { table, key: key.to_string(), answer: answer.to_string() };
        self.steps.borrow_mut().push(step);
    }

    fn slot(&self, table: &'static str, key: impl Display, index: Index) -> u32 {
        let slot = self.answer(self.maps.slot(index));
        match slot {
            0 => self.step(table, key, "none"),
            slot => self.step(table, key, format_args!("slot {slot}")),
        }
        slot
    }

    fn pair_name(&self, key: &PairKey) -> String {
        let end = |id, port| format!("{}:{port}", self.name(id));
        let (low, high) = (end(key.low, key.low_port), end(key.high, key.high_port));
        format!("{} between {low} and {high}", proto_name(key.proto))
    }

    fn flow_name(&self, key: &FlowKey) -> String {
        let (proto, remote, pod) = (proto_name(key.proto), Ipv4Addr::from(key.remote), self.name(key.id));
        format!("{proto} {remote}:{} with {pod}:{}", key.remote_port, key.local_port)
    }
}

/// What was read of the security groups' tables: decisions hold on to it.
#[derive(Default)]
struct LiveRules {
    epoch: OnceCell<u32>,
    verdicts: List<VerdictRow>,
    classes: List<ClassGroups>,
    programs: List<ProgramRow>,
    pages: List<Page>,
    admitted: List<Admitted>,
    pairs: RefCell<HashMap<PairKey, Option<Admitted>>>,
}

impl Rules for LiveTables {
    fn epoch(&self) -> u32 {
        *self.rules.epoch.get_or_init(|| self.answer(self.maps.policy.epoch()))
    }

    fn verdicts(&self, class: u32) -> Option<&VerdictRow> {
        let value = self.answer(self.maps.policy.verdicts(class).map(Some))?;
        self.step(maps::VERDICT, format_args!("class {class}"), "its verdicts towards all classes");
        Some(self.rules.verdicts.push(value))
    }

    fn class_groups(&self, row: u32) -> Option<&ClassGroups> {
        let value = self.answer(self.maps.policy.class_groups(row).map(Some))?;
        Some(self.rules.classes.push(value))
    }

    fn programs(&self, row: u32) -> Option<&ProgramRow> {
        let value = self.answer(self.maps.policy.programs(row).map(Some))?;
        Some(self.rules.programs.push(value))
    }

    fn page(&self, row: u32) -> Option<&Page> {
        let value = self.answer(self.maps.policy.page(row).map(Some))?;
        Some(self.rules.pages.push(value))
    }
}

impl Tables for LiveTables {
    type Spent = AtomicU64;

    fn subeni(&self, vid: u16) -> u32 {
        let parent = self.parent.get();
        let key = format_args!("parent {parent}, VLAN {vid}");
        self.slot(maps::SUBENI, key, Index::Vlan { parent, vid })
    }

    fn pod_by_ifindex(&self, ifindex: u32) -> Option<&Endpoint> {
        self.endpoint(self.slot(maps::POD_IF, format_args!("interface {ifindex}"), Index::Interface(ifindex)))
    }

    fn pod_by_ipv4(&self, address: [u8; 4]) -> Option<&Endpoint> {
        self.endpoint(self.slot(maps::POD_IP4, Ipv4Addr::from(address), Index::Ipv4(address)))
    }

    fn endpoint(&self, slot: u32) -> Option<&Endpoint> {
        let record = self.record(slot);
        // Slot 0 is no look-up, only the answer "none" handed on.
        if slot != 0 {
            let answer = record.map_or_else(|| "none".to_owned(), |record| self.name(record.id));
            self.step(maps::ENDPOINT, format_args!("slot {slot}"), answer);
        }
        record
    }

    fn host_dst(&self, address: [u8; 4]) -> u32 {
        let flags = self.answer(self.maps.host_dst(address));
        let mut words = Vec::new();
        if flags & host_dst::HOST != 0 {
            words.push("served by the node's stack");
        }
        if flags & host_dst::SERVICE != 0 {
            words.push("which translates it");
        }
        if flags & host_dst::PREFERRED != 0 {
            words.push("goes before others at a limit of bandwidth");
        }
        if flags & host_dst::DENY != 0 {
            words.push("denied");
        }
        let answer = if words.is_empty() { "none".to_owned() } else { words.join(", ") };
        self.step(maps::HOST_DST, Ipv4Addr::from(address), answer);
        flags
    }

    fn is_vip(&self, address: [u8; 4], port: u16, proto: u8) -> bool {
        let vip = self.answer(self.maps.is_vip(address, port, proto));
        let key = format!("{} {}:{port}", proto_name(proto), Ipv4Addr::from(address));
        self.step(maps::VIPS, key, if vip { "a load balancer's" } else { "none" });
        vip
    }

    fn marked(&self, id: u32) -> bool {
        let marked = self.marks.borrow().contains(&id) || self.answer(self.maps.marked(id));
        let answer = if marked { "may have remembered flows" } else { "has no remembered flows" };
        self.step(maps::FLOW_MARK, self.name(id), answer);
        marked
    }

    fn flow(&self, key: &FlowKey) -> Option<&Flow> {
        let known = self.flows.borrow().get(key).copied();
        let flow = known.unwrap_or_else(|| self.answer(self.maps.flow(key)));
        let answer = flow.map_or_else(|| "none".to_owned(), |flow| memory_text(&flow, key.proto, self.now()));
        self.step(maps::FLOWS, self.flow_name(key), answer);
        if flow.is_some() {
            self.flow_involved.set(true);
        }
        flow.map(|flow| self.handed_out.push(flow))
    }

    fn fragment(&self, key: &FragmentKey) -> Option<Door> {
        let known = self.fragments.borrow().get(key).copied();
        let door = known.or_else(|| {
            let fragment: Option<Fragment> = self.answer(self.maps.fragment(key));
            fragment?.door_in(self.epoch())
        });
        self.step(maps::FRAGS, fragment_name(key), door.map_or("none", Door::name));
        door
    }

    fn now(&self) -> u32 {
        // The kernel's programs keep the lower 32 bits of its seconds, too.
        (self.nanos() / 1_000_000_000) as u32
    }

    fn remember(&self, key: &FlowKey, flow: &Flow) {
        let answer = format!("to be remembered: {}", memory_text(flow, key.proto, self.now()));
        self.step(maps::FLOWS, self.flow_name(key), answer);
        self.flow_involved.set(true);
        self.flows.borrow_mut().insert(*key, Some(*flow));
        self.marks.borrow_mut().insert(key.id);
    }

    fn forget(&self, key: &FlowKey) {
        self.step(
            maps::FLOWS,
            self.flow_name(key),
            "to be forgotten: the flow begins anew by its default door",
        );
        self.flows.borrow_mut().insert(*key, None);
    }

    fn remember_fragment(&self, key: &FragmentKey, door: Door) {
        let answer = format_args!("to be remembered: door `{}`", door.name());
        self.step(maps::FRAGS, fragment_name(key), answer);
        self.fragments.borrow_mut().insert(*key, door);
        self.marks.borrow_mut().insert(key.id);
    }

    fn admitted(&self, key: &PairKey) -> Option<&Admitted> {
        let known = self.rules.pairs.borrow().get(key).copied();
        let flow = known.unwrap_or_else(|| self.answer(self.maps.policy.pair(key)));
        let answer = match &flow {
            None => "not admitted".to_owned(),
            Some(flow) if !flow.alive(key.proto, self.now()) => {
                "admitted, but silent for too long".to_owned()
            }
            Some(flow) if flow.epoch != self.epoch() => {
                format!("admitted, opened by {}, by rules that changed since", self.name(flow.opener))
            }
            Some(flow) => format!("admitted, opened by {}", self.name(flow.opener)),
        };
        self.step(maps::PAIRS, self.pair_name(key), answer);
        flow.map(|flow| self.rules.admitted.push(flow))
    }

    fn admit(&self, key: &PairKey, flow: &Admitted) {
        self.step(maps::PAIRS, self.pair_name(key), "to be admitted, or brought up to date");
        self.rules.pairs.borrow_mut().insert(*key, Some(*flow));
    }

    fn retire(&self, key: &PairKey) {
        self.step(maps::PAIRS, self.pair_name(key), "to be forgotten: rules do not allow it any more");
        self.rules.pairs.borrow_mut().insert(*key, None);
    }

    fn limits(&self, id: u32) -> Option<&Limits> {
        let limits = self.answer(self.maps.limits(id).map(Some))?;
        Some(self.limits.push(limits))
    }

    /// A copy, which a packet that is only looked at may be charged to.
    fn spent(&self, id: u32, direction: Direction) -> Option<&AtomicU64> {
        let until = self.answer(self.maps.spent(id).map(Some))?.until[direction as usize];
        let ahead = until.saturating_sub(self.nanos());
        let key = format!("{}, {}", self.name(id), direction.name());
        self.step(maps::SPENT, key, format_args!("{} µs ahead of its rate", ahead / 1000));
        Some(self.spent.push(AtomicU64::new(until)))
    }

    fn nanos(&self) -> u64 {
        // The kernel's clock, of which the programs ask, and which cannot fail.
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
        now.map_or(0, |now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
    }

    fn fast_path(&self) -> bool {
        self.step(maps::FAST_PATH, "constant of the programs", if self.fast_path { "on" } else { "off" });
        self.fast_path
    }
}

/// A protocol as people write it.
pub fn proto_name(proto: u8) -> String {
    match proto {
        ICMP => "icmp".to_owned(),
        TCP => "tcp".to_owned(),
        UDP => "udp".to_owned(),
        other => format!("protocol {other}"),
    }
}

fn fragment_name(key: &FragmentKey) -> String {
    format!("{} to {}, identification {}", Ipv4Addr::from(key.src), Ipv4Addr::from(key.dst), key.ident)
}

fn memory_text(flow: &Flow, proto: u8, now: u32) -> String {
    let door = Door::from_u8(flow.door).map_or_else(|| flow.door.to_string(), |door| door.name().to_owned());
    let origin = match flow.origin {
        origin if origin == Origin::Inbound as u8 => format!("came in by door `{door}`"),
        origin if origin == Origin::HostForwarded as u8 => "sent out by the node's stack".to_owned(),
        origin => format!("origin {origin}, door `{door}`"),
    };
    if proto == TCP || flow.alive(now) {
        origin
    } else {
        format!("{origin}, but silent for too long to count")
    }
}

/// Values that stay where they are once they are in.
struct List<T> {
    first: OnceCell<Box<Entry<T>>>,
}

struct Entry<T> {
    value: T,
    next: OnceCell<Box<Entry<T>>>,
}

impl<T> Default for List<T> {
    fn default() -> Self {
        Self { first: OnceCell::new() }
    }
}

impl<T> List<T> {
    fn push(&self, value: T) -> &T {
        let mut end = &self.first;
        while let Some(entry) = end.get() {
            end = &entry.next;
        }
        &end.get_or_init(|| Box::new(Entry { value, next: OnceCell::new() })).value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memories_read_like_sentences() {
        let flow = Flow { door: Door::Wire as u8, origin: Origin::Inbound as u8, pad: [0; 2], seen: 100 };
        assert_eq!(memory_text(&flow, TCP, 10_000), "came in by door `wire`");
        assert_eq!(memory_text(&flow, UDP, 100), "came in by door `wire`");
        assert_eq!(
            memory_text(&flow, UDP, 10_000),
            "came in by door `wire`, but silent for too long to count"
        );
        let flow = Flow { origin: Origin::HostForwarded as u8, ..flow };
        assert_eq!(memory_text(&flow, TCP, 100), "sent out by the node's stack");
    }

    #[test]
    fn what_is_in_a_list_stays_in_place() {
        let list = List::default();
        let first = list.push(1);
        let second = list.push(2);
        assert_eq!((*first, *second, *list.push(3)), (1, 2, 3));
    }
}

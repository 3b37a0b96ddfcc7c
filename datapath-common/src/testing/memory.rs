//! Tables in memory.

use core::{
    cell::{Ref, RefCell},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    vec::Vec,
};

use crate::{
    abi::{
        Admitted, Direction, Door, Endpoint, Flow, FlowKey, Fragment, FragmentKey, Limits, PairKey,
        endpoint::flag,
        policy::{ClassGroups, Page, ProgramRow, VerdictRow},
    },
    tables::{Rules, Tables},
    testing::MemoryRules,
};

/// What a decision changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A flow was remembered, or its memory written again.
    Remember(FlowKey, Flow),
    /// A flow was forgotten.
    Forget(FlowKey),
    /// The first fragment of a datagram was remembered.
    Fragment(FragmentKey, Door),
    /// A flow was admitted to the fast path, or its entry written again.
    Admit(PairKey, Admitted),
    /// An admitted flow was forgotten.
    Retire(PairKey),
}

/// Tables in memory. Decisions leave them as they are and note what they change; [`MemoryTables::settle`] carries it out.
#[derive(Clone, Debug, Default)]
pub struct MemoryTables {
    /// Records by slot; slot 0 is not used.
    pub endpoints: Vec<Endpoint>,
    /// (Parent, VLAN id) → slot.
    pub subeni: BTreeMap<(u16, u16), u32>,
    /// Interface index → slot.
    pub pod_if: BTreeMap<u32, u32>,
    /// Address → slot.
    pub pod_ip4: BTreeMap<[u8; 4], u32>,
    /// Prefixes with their lengths and flags.
    pub host_dst: Vec<([u8; 4], u32, u32)>,
    /// Load balancers' addresses, ports and protocols.
    pub vips: BTreeSet<([u8; 4], u16, u8)>,
    /// Pods that have, or had, a remembered flow or fragment.
    pub marks: BTreeSet<u32>,
    /// Remembered flows.
    pub flows: HashMap<FlowKey, Flow>,
    /// First fragments.
    pub fragments: HashMap<FragmentKey, Fragment>,
    /// Flows admitted to the fast path.
    pub pairs: HashMap<PairKey, Admitted>,
    /// Security groups.
    pub rules: MemoryRules,
    /// Limits of bandwidth by pod, each with how far it is used up: see [`MemoryTables::limit`].
    pub limits: BTreeMap<u32, (Limits, [Until; 2])>,
    /// The clock.
    pub now: u32,
    /// The clock that limits go by, in nanoseconds.
    pub nanos: u64,
    /// Whether there is a fast path.
    pub fast_path: bool,
    /// The parent whose programs look at these tables.
    pub parent: u16,
    changes: RefCell<Vec<Change>>,
}

/// A number that a limit is used up to, copied with the tables.
#[derive(Debug, Default)]
pub struct Until(pub AtomicU64);

impl Clone for Until {
    fn clone(&self) -> Self {
        Self(AtomicU64::new(self.0.load(Relaxed)))
    }
}

impl MemoryTables {
    /// Limits the pod with this id, in its records, too.
    pub fn limit(&mut self, id: u32, limits: Limits) {
        self.limits.insert(id, (limits, <[Until; 2]>::default()));
        for pod in self.endpoints.iter_mut().filter(|pod| pod.id == id) {
            pod.flags |= flag::LIMITED;
        }
    }

    /// Puts a pod into the next slot, with all indexes; returns the slot.
    pub fn add(&mut self, pod: Endpoint) -> u32 {
        if self.endpoints.is_empty() {
            self.endpoints.push(Endpoint::ZERO);
        }
        let slot = self.endpoints.len() as u32;
        self.endpoints.push(pod);
        self.subeni.insert((pod.parent, pod.vid), slot);
        self.pod_if.insert(pod.ifindex, slot);
        self.pod_ip4.insert(pod.ipv4, slot);
        slot
    }

    /// Uses up both limits of a pod until a time.
    pub fn spend(&mut self, id: u32, until: u64) {
        for spent in self.limits.get_mut(&id).into_iter().flat_map(|(_, spent)| spent) {
            *spent.0.get_mut() = until;
        }
    }

    /// What was decided to be changed and is not yet.
    pub fn changes(&self) -> Ref<'_, Vec<Change>> {
        self.changes.borrow()
    }

    /// Undoes what was decided to be changed.
    pub fn discard(&self) {
        self.changes.borrow_mut().clear();
    }

    /// Carries out what was decided to be changed, and returns it.
    pub fn settle(&mut self) -> Vec<Change> {
        let changes = core::mem::take(&mut *self.changes.borrow_mut());
        for change in &changes {
            match *change {
                Change::Remember(key, flow) => {
                    self.marks.insert(key.id);
                    self.flows.insert(key, flow);
                }
                Change::Forget(key) => {
                    self.flows.remove(&key);
                }
                Change::Fragment(key, door) => {
                    self.marks.insert(key.id);
                    let epoch = self.rules.epoch;
                    self.fragments.insert(key, Fragment { door: door as u8, pad: [0; 3], epoch });
                }
                Change::Admit(key, flow) => {
                    self.pairs.insert(key, flow);
                }
                Change::Retire(key) => {
                    self.pairs.remove(&key);
                }
            }
        }
        changes
    }

    /// A decision that reads what it has just written would see the old value here and the new one in the kernel.
    fn check_unchanged(&self, is_it: impl Fn(&Change) -> bool) {
        assert!(!self.changes.borrow().iter().any(is_it), "read after write within one decision");
    }
}

impl Rules for MemoryTables {
    fn epoch(&self) -> u32 {
        self.rules.epoch
    }

    fn verdicts(&self, class: u32) -> Option<&VerdictRow> {
        self.rules.verdicts(class)
    }

    fn class_groups(&self, row: u32) -> Option<&ClassGroups> {
        self.rules.class_groups(row)
    }

    fn programs(&self, row: u32) -> Option<&ProgramRow> {
        self.rules.programs(row)
    }

    fn page(&self, row: u32) -> Option<&Page> {
        self.rules.page(row)
    }
}

impl Tables for MemoryTables {
    type Spent = AtomicU64;

    fn subeni(&self, vid: u16) -> u32 {
        self.subeni.get(&(self.parent, vid)).copied().unwrap_or(0)
    }

    fn pod_by_ifindex(&self, ifindex: u32) -> Option<&Endpoint> {
        self.endpoint(*self.pod_if.get(&ifindex)?)
    }

    fn pod_by_ipv4(&self, address: [u8; 4]) -> Option<&Endpoint> {
        self.endpoint(*self.pod_ip4.get(&address)?)
    }

    fn endpoint(&self, slot: u32) -> Option<&Endpoint> {
        if slot == 0 { None } else { self.endpoints.get(slot as usize) }
    }

    fn host_dst(&self, address: [u8; 4]) -> u32 {
        let holds = |prefix: [u8; 4], len: u32| {
            let mask = u32::MAX.checked_shl(32 - len).unwrap_or(0);
            (u32::from_be_bytes(prefix) ^ u32::from_be_bytes(address)) & mask == 0
        };
        self.host_dst
            .iter()
            .filter(|(prefix, len, _)| holds(*prefix, *len))
            .max_by_key(|(_, len, _)| *len)
            .map_or(0, |(_, _, flags)| *flags)
    }

    fn is_vip(&self, address: [u8; 4], port: u16, proto: u8) -> bool {
        self.vips.contains(&(address, port, proto))
    }

    fn marked(&self, id: u32) -> bool {
        self.marks.contains(&id)
    }

    fn flow(&self, key: &FlowKey) -> Option<&Flow> {
        self.check_unchanged(|change| match change {
            Change::Remember(changed, _) | Change::Forget(changed) => changed == key,
            _ => false,
        });
        self.flows.get(key)
    }

    fn fragment(&self, key: &FragmentKey) -> Option<Door> {
        self.check_unchanged(|change| matches!(change, Change::Fragment(changed, _) if changed == key));
        self.fragments.get(key).and_then(|fragment| fragment.door_in(self.rules.epoch))
    }

    fn now(&self) -> u32 {
        self.now
    }

    fn remember(&self, key: &FlowKey, flow: &Flow) {
        self.changes.borrow_mut().push(Change::Remember(*key, *flow));
    }

    fn forget(&self, key: &FlowKey) {
        self.changes.borrow_mut().push(Change::Forget(*key));
    }

    fn remember_fragment(&self, key: &FragmentKey, door: Door) {
        self.changes.borrow_mut().push(Change::Fragment(*key, door));
    }

    fn admitted(&self, key: &PairKey) -> Option<&Admitted> {
        self.check_unchanged(|change| match change {
            Change::Admit(changed, _) | Change::Retire(changed) => changed == key,
            _ => false,
        });
        self.pairs.get(key)
    }

    fn admit(&self, key: &PairKey, flow: &Admitted) {
        self.changes.borrow_mut().push(Change::Admit(*key, *flow));
    }

    fn retire(&self, key: &PairKey) {
        self.changes.borrow_mut().push(Change::Retire(*key));
    }

    fn limits(&self, id: u32) -> Option<&Limits> {
        self.limits.get(&id).map(|(limits, _)| limits)
    }

    fn spent(&self, id: u32, direction: Direction) -> Option<&AtomicU64> {
        self.limits.get(&id).map(|(_, spent)| &spent[direction as usize].0)
    }

    fn nanos(&self) -> u64 {
        self.nanos
    }

    fn fast_path(&self) -> bool {
        self.fast_path
    }
}

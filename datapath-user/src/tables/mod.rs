//! The tables of the datapath as typed handles, and the rules by which records come, change and go.
//!
//! [`Maps`] reads and writes single maps. [`Tables`] owns slots and ids: a record is written before any index points
//! at its slot and never changes while one does; a change takes a fresh slot and swaps the indexes; slots and ids
//! rest before they are used again, because a program that looked one up may still be running. Nothing is kept
//! beside the maps: what [`Tables::new`] finds in them is the state.

mod direct;
mod handles;
mod policy;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use aya::{maps::MapError, sys::SyscallError};
use datapath_common::abi::Endpoint;

pub(crate) use self::handles::{layout_of, map_data};
pub use self::{
    handles::{Direct, Maps},
    policy::{PolicyDigest, PolicyMaps, Written},
};
use crate::{error::whole, net};

/// How long a slot or id rests. A program runs for microseconds; a preempted one may sleep a while.
pub const GRACE: Duration = Duration::from_secs(1);

/// Why a table cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TablesError {
    /// A map is not there.
    #[error("map {map} is missing in {place}: {hint}")]
    Missing {
        /// The map.
        map: &'static str,
        /// Where it was looked for.
        place: String,
        /// What to do.
        hint: &'static str,
    },
    /// The kernel refused an operation on a map.
    #[error("cannot {action} map {map}: {}{}", whole(source), if is_denied(source) { "; this needs root" } else { "" })]
    Map {
        /// The map.
        map: &'static str,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: MapError,
    },
    /// The number of CPUs is unknown.
    #[error("cannot read the number of CPUs from {file}: {source}")]
    Cpus {
        /// Where it should be.
        file: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// Every id is taken.
    #[error(
        "all {limit} places for pods are taken; raise limits.endpoints (needs `eniway detach`) or remove pods"
    )]
    Full {
        /// The configured limit.
        limit: u32,
    },
    /// Every slot or id that is not taken was given up a moment ago.
    #[error("all free places for pods were given up less than {} ms ago; try again then", GRACE.as_millis())]
    Resting,
    /// Another pod has it.
    #[error("{what} belongs to {}", owner_text(*id, *owner))]
    Occupied {
        /// What is asked for twice.
        what: Index,
        /// The pod that has it.
        id: u32,
        /// Its owner.
        owner: u64,
    },
    /// A newer allocation is in force.
    #[error("generation {given} is older than {known}, which is in force")]
    Stale {
        /// The generation of the record that was refused.
        given: u32,
        /// The one in the tables.
        known: u32,
    },
}

fn is_denied(error: &MapError) -> bool {
    errno(error) == Some(libc::EPERM)
}

fn owner_text(id: u32, owner: u64) -> String {
    format!("pod {id} (owner {owner:016x})")
}

fn errno(error: &MapError) -> Option<i32> {
    match error {
        MapError::SyscallError(SyscallError { io_error, .. }) => io_error.raw_os_error(),
        _ => None,
    }
}

/// What only one pod may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Index {
    /// A VLAN id on a parent.
    Vlan {
        /// Index of the parent.
        parent: u16,
        /// The VLAN id.
        vid: u16,
    },
    /// An IPv4 address.
    Ipv4([u8; 4]),
    /// An IPv6 address.
    Ipv6([u8; 16]),
    /// A host-side interface.
    Interface(u32),
}

impl std::fmt::Display for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Vlan { parent, vid } => write!(f, "VLAN {vid} of parent {parent}"),
            Self::Ipv4(address) => write!(f, "address {}", std::net::Ipv4Addr::from(*address)),
            Self::Ipv6(address) => write!(f, "address {}", std::net::Ipv6Addr::from(*address)),
            Self::Interface(index) => match net::ifname(*index) {
                Some(name) => write!(f, "interface {name}"),
                None => write!(f, "interface {index}"),
            },
        }
    }
}

impl Index {
    /// All keys by which a record is found. That of an exclusive ENI, which has no VLAN id, is found by its interface
    /// only: packets for its address are none of the node's.
    pub fn of(record: &Endpoint) -> impl Iterator<Item = Self> + use<> {
        let on_parent = record.vid != 0;
        let ipv6 = (on_parent && record.ipv6 != [0; 16]).then_some(Self::Ipv6(record.ipv6));
        [
            Some(Self::Interface(record.ifindex)),
            on_parent.then_some(Self::Ipv4(record.ipv4)),
            ipv6,
            on_parent.then_some(Self::Vlan { parent: record.parent, vid: record.vid }),
        ]
        .into_iter()
        .flatten()
    }
}

/// Whether a generation came before another. They are counted in a circle, as the tables have room for the low half of
/// an allocator's number only: what lies up to half of it behind is older.
pub fn is_older(given: u32, known: u32) -> bool {
    known.wrapping_sub(given) as i32 > 0
}

/// A pod in the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Live {
    /// Where its record is.
    pub slot: u32,
    /// Its record.
    pub record: Endpoint,
    /// How many of its indexes do not point at the record: more than 0 after an operation that was cut short.
    pub missing: usize,
}

/// What [`Tables::put`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Put {
    /// The pod's id.
    pub id: u32,
    /// Where its record is now.
    pub slot: u32,
    /// Entries written or removed; 0 = everything was so already.
    pub changes: usize,
}

/// The tables with the owner's knowledge of which slots and ids are free.
pub struct Tables {
    /// The maps. Records and their indexes are better left to [`put`](Self::put) and [`release`](Self::release).
    pub maps: Maps,
    live: BTreeMap<u64, Live>,
    slots: Places,
    ids: Places,
    /// Addresses that were given up less than [`GRACE`] ago.
    left: BTreeMap<[u8; 4], Instant>,
}

impl Tables {
    /// Takes over what the maps hold.
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    pub fn new(maps: Maps) -> Result<Self, TablesError> {
        let mut slots = Places::new(maps.slots());
        let mut ids = Places::new(maps.ids());
        let mut live = BTreeMap::new();
        for pod in maps.pods()? {
            slots.0[pod.slot as usize] = Place::Taken;
            ids.0[pod.record.id as usize] = Place::Taken;
            live.insert(pod.record.owner, pod);
        }
        Ok(Self { maps, live, slots, ids, left: BTreeMap::new() })
    }

    /// All pods, by owner.
    pub fn pods(&self) -> impl Iterator<Item = &Live> {
        self.live.values()
    }

    /// The pod of an owner.
    pub fn pod(&self, owner: u64) -> Option<&Live> {
        self.live.get(&owner)
    }

    /// Adds a pod, or changes the one of the same owner. The record's `id` is chosen here. Nothing is written when
    /// everything is so already.
    ///
    /// # Errors
    ///
    /// When the VLAN id, an address or the interface belongs to another pod, when the generation is older than the
    /// one in force, when the tables are full, or when a map cannot be written. What was written is taken back.
    pub fn put(&mut self, record: &Endpoint) -> Result<Put, TablesError> {
        self.put_among(record, &|_| false)
    }

    /// As [`put`](Self::put), but takes a VLAN id or address from owners of whom `moving` is true: pods that trade
    /// places are all written by the caller in one go.
    ///
    /// # Errors
    ///
    /// As [`put`](Self::put).
    pub fn put_among(&mut self, record: &Endpoint, moving: &dyn Fn(u64) -> bool) -> Result<Put, TablesError> {
        self.check_free(record, moving)?;
        match self.live.get(&record.owner).copied() {
            None => self.add(record),
            Some(old) if is_older(record.generation, old.record.generation) => {
                Err(TablesError::Stale { given: record.generation, known: old.record.generation })
            }
            Some(old) if old.record == (Endpoint { id: old.record.id, ..*record }) => self.repair(old),
            Some(old) => self.change(old, record),
        }
    }

    /// The pod that has a VLAN id, an address or an interface.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn holder(&self, key: Index) -> Result<Option<&Live>, TablesError> {
        let slot = self.maps.slot(key)?;
        Ok(self.in_slot(slot))
    }

    fn in_slot(&self, slot: u32) -> Option<&Live> {
        if slot == 0 { None } else { self.live.values().find(|pod| pod.slot == slot) }
    }

    fn check_free(&self, record: &Endpoint, moving: &dyn Fn(u64) -> bool) -> Result<(), TablesError> {
        let own = self.live.get(&record.owner).map(|own| own.slot);
        for key in Index::of(record) {
            let slot = self.maps.slot(key)?;
            // What a pod has already needs no search among all others.
            if own != Some(slot)
                && let Some(Live { record: held, .. }) = self.in_slot(slot)
                && held.owner != record.owner
                && !moving(held.owner)
            {
                return Err(TablesError::Occupied { what: key, id: held.id, owner: held.owner });
            }
        }
        Ok(())
    }

    fn add(&mut self, record: &Endpoint) -> Result<Put, TablesError> {
        self.renew(record.ipv4)?;
        let id = self.take_id()?;
        let slot = match self.take_slot() {
            Ok(slot) => slot,
            Err(error) => {
                self.ids.give_back(id);
                return Err(error);
            }
        };
        let record = Endpoint { id, ..*record };
        let written = self.maps.set_record(slot, &record).and_then(|()| self.point(&record, slot, None));
        match written {
            Ok(changes) => {
                self.live.insert(record.owner, Live { slot, record, missing: 0 });
                Ok(Put { id, slot, changes: changes + 1 })
            }
            Err(error) => {
                for key in Index::of(&record) {
                    let _ = self.maps.clear_slot(key, slot);
                }
                self.slots.rest(slot);
                self.ids.rest(id);
                Err(error)
            }
        }
    }

    fn change(&mut self, old: Live, record: &Endpoint) -> Result<Put, TablesError> {
        if old.record.ipv4 != record.ipv4 {
            self.renew(record.ipv4)?;
        }
        let slot = self.take_slot()?;
        let id = old.record.id;
        let record = Endpoint { id, ..*record };
        let written =
            self.maps.set_record(slot, &record).and_then(|()| self.point(&record, slot, Some(&old)));
        let changes = match written {
            Ok(changes) => changes,
            Err(error) => {
                for key in Index::of(&old.record) {
                    let _ = self.maps.set_slot(key, old.slot);
                }
                for key in Index::of(&record) {
                    let _ = self.maps.clear_slot(key, slot);
                }
                self.slots.rest(slot);
                return Err(error);
            }
        };
        self.live.insert(record.owner, Live { slot, record, missing: 0 });
        let removed = self.unpoint(&old)?;
        if old.record.ipv4 != record.ipv4 {
            self.maps.forget_flows(id)?;
            self.leave(old.record.ipv4)?;
        }
        self.slots.rest(old.slot);
        Ok(Put { id, slot, changes: changes + removed + 1 })
    }

    fn repair(&mut self, old: Live) -> Result<Put, TablesError> {
        let Live { slot, record, missing } = old;
        let changes = if missing == 0 { 0 } else { self.point(&record, slot, None)? };
        self.live.insert(record.owner, Live { missing: 0, ..old });
        Ok(Put { id: record.id, slot, changes })
    }

    /// Points all indexes of a record at its slot, in the order in which packets may come to need them: nothing
    /// arrives from the wire before everything else stands. A hash map that is full has room for a changed key
    /// only after the old one went.
    fn point(&mut self, record: &Endpoint, slot: u32, old: Option<&Live>) -> Result<usize, TablesError> {
        let mut changes = 0;
        for key in Index::of(record) {
            if self.maps.slot(key)? == slot {
                continue;
            }
            match self.maps.set_slot(key, slot) {
                Err(TablesError::Map { source, .. })
                    if errno(&source) == Some(libc::E2BIG) && old.is_some() =>
                {
                    for (before, now) in old.into_iter().flat_map(|old| {
                        let kinds = std::mem::discriminant(&key);
                        Index::of(&old.record)
                            .filter(move |before| std::mem::discriminant(before) == kinds)
                            .map(move |before| (before, old.slot))
                    }) {
                        self.maps.clear_slot(before, now)?;
                    }
                    self.maps.set_slot(key, slot)?;
                }
                result => result?,
            }
            changes += 1;
        }
        Ok(changes)
    }

    /// Removes the indexes that still point at a slot: first those by which packets find it.
    fn unpoint(&mut self, old: &Live) -> Result<usize, TablesError> {
        let mut keys: Vec<_> = Index::of(&old.record).collect();
        keys.reverse();
        let mut removed = 0;
        for key in keys {
            removed += usize::from(self.maps.clear_slot(key, old.slot)?);
        }
        Ok(removed)
    }

    /// Removes a pod: first the indexes by which packets find it, then all that was remembered and counted for it.
    /// Returns what it was.
    ///
    /// # Errors
    ///
    /// When a map cannot be written; calling again continues.
    pub fn release(&mut self, owner: u64) -> Result<Option<Live>, TablesError> {
        let Some(old) = self.live.get(&owner).copied() else { return Ok(None) };
        self.unpoint(&old)?;
        self.maps.forget(old.record.id)?;
        self.leave(old.record.ipv4)?;
        self.live.remove(&owner);
        self.slots.rest(old.slot);
        self.ids.rest(old.record.id);
        Ok(Some(old))
    }

    /// Points all indexes of all pods at their records, where they do not. Returns how many did not.
    ///
    /// # Errors
    ///
    /// When a map cannot be read or written.
    pub fn point_all(&mut self) -> Result<usize, TablesError> {
        let pods: Vec<Live> = self.live.values().copied().collect();
        let mut changes = 0;
        for pod in pods {
            changes += self.point(&pod.record, pod.slot, None)?;
            self.live.insert(pod.record.owner, Live { missing: 0, ..pod });
        }
        Ok(changes)
    }

    /// Removes indexes that point at no pod: what an agent left that was killed within an operation. Returns how
    /// many there were. Looks at all of `SUBENI` and of the direct tables: for the start, not for every change.
    ///
    /// # Errors
    ///
    /// When a map cannot be read or written.
    pub fn sweep(&mut self) -> Result<usize, TablesError> {
        let mut removed = 0;
        for (key, slot) in self.maps.indexes()? {
            let stands = self
                .live
                .values()
                .any(|pod| pod.slot == slot && Index::of(&pod.record).any(|its| its == key));
            if !stands {
                removed += usize::from(self.maps.clear_slot(key, slot)?);
            }
        }
        self.maps.renew_direct()?;
        Ok(removed)
    }

    /// Makes the maps what was written to them: records that somebody changed are written anew, to a fresh slot, and every
    /// index points where it should. Returns how many entries changed.
    ///
    /// # Errors
    ///
    /// When a map cannot be read or written, or every slot rests.
    pub fn mend(&mut self) -> Result<usize, TablesError> {
        let mut changes = 0;
        let all: Vec<Live> = self.live.values().copied().collect();
        for live in all {
            let Live { slot, record, .. } = live;
            if self.maps.record(slot)? == record {
                changes += self.point(&record, slot, None)?;
                self.live.insert(record.owner, Live { missing: 0, ..live });
            } else {
                changes += self.change(live, &record)?.changes;
            }
        }
        Ok(changes + self.sweep()?)
    }

    /// Cleans slots and ids that have rested. To be called now and then, so that `ENDPOINT` shows no dead records.
    ///
    /// # Errors
    ///
    /// When a map cannot be written.
    pub fn tidy(&mut self) -> Result<(), TablesError> {
        for slot in self.slots.rested() {
            self.clean_slot(slot)?;
        }
        for id in self.ids.rested() {
            self.maps.forget(id)?;
            self.ids.0[id as usize] = Place::Free;
        }
        self.left.retain(|_, since| since.elapsed() < GRACE);
        Ok(())
    }

    /// Forgets what other pods remember of an address that was given up.
    fn leave(&mut self, address: [u8; 4]) -> Result<(), TablesError> {
        self.left.insert(address, Instant::now());
        self.maps.forget_remote(address)
    }

    /// The same before a pod gets an address: a program that was running may have remembered its last owner since, and an agent may
    /// have been killed before it forgot.
    fn renew(&mut self, address: [u8; 4]) -> Result<(), TablesError> {
        if self.left.remove(&address).is_some_and(|since| since.elapsed() < GRACE) {
            self.maps.policy.wait_for_programs();
        }
        self.maps.forget_remote(address)
    }

    fn clean_slot(&mut self, slot: u32) -> Result<(), TablesError> {
        self.maps.set_record(slot, &Endpoint::ZERO)?;
        self.slots.0[slot as usize] = Place::Free;
        Ok(())
    }

    fn take_slot(&mut self) -> Result<u32, TablesError> {
        let limit = self.maps.ids() - 1;
        let (slot, _) = self.slots.take(limit)?;
        Ok(slot)
    }

    fn take_id(&mut self) -> Result<u32, TablesError> {
        let limit = self.maps.ids() - 1;
        let (id, clean) = self.ids.take(limit)?;
        if !clean {
            self.maps.forget(id).inspect_err(|_| self.ids.give_back(id))?;
        }
        Ok(id)
    }
}

/// Places of an array, without the first.
struct Places(Vec<Place>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Clean.
    Free,
    /// Not known to be clean: what an earlier agent left.
    Unknown,
    /// Given up, and perhaps still in use by a running program.
    Resting(Instant),
    Taken,
}

impl Places {
    fn new(len: u32) -> Self {
        let mut places = vec![Place::Unknown; len as usize];
        if let Some(first) = places.first_mut() {
            *first = Place::Taken;
        }
        Self(places)
    }

    /// Takes the first place that is free, and says whether it is clean.
    fn take(&mut self, limit: u32) -> Result<(u32, bool), TablesError> {
        let usable = |place: &Place| match place {
            Place::Free | Place::Unknown => true,
            Place::Resting(since) => since.elapsed() >= GRACE,
            Place::Taken => false,
        };
        match self.0.iter().position(usable) {
            Some(i) => {
                let clean = self.0[i] == Place::Free;
                self.0[i] = Place::Taken;
                Ok((i as u32, clean))
            }
            None if self.0.iter().any(|place| matches!(place, Place::Resting(_))) => {
                Err(TablesError::Resting)
            }
            None => Err(TablesError::Full { limit }),
        }
    }

    fn rest(&mut self, i: u32) {
        self.0[i as usize] = Place::Resting(Instant::now());
    }

    fn give_back(&mut self, i: u32) {
        self.0[i as usize] = Place::Unknown;
    }

    fn rested(&self) -> Vec<u32> {
        let rested = |place: &Place| matches!(place, Place::Resting(since) if since.elapsed() >= GRACE);
        (0..self.0.len()).filter(|&i| rested(&self.0[i])).map(|i| i as u32).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use datapath_common::abi::{Flow, FlowKey};
    use ipnet::Ipv4Net;

    use super::*;
    use crate::config::Limits;

    fn record(n: u8) -> Endpoint {
        Endpoint {
            owner: n.into(),
            ifindex: 100 + u32::from(n),
            ipv4: [10, 0, 0, n],
            vid: 100 + u16::from(n),
            generation: 1,
            mac: [2, 0, 0, 0, 0, n],
            ..Endpoint::ZERO
        }
    }

    /// Maps need privileges; elsewhere these tests have nothing to look at.
    fn tables(endpoints: u32) -> Option<Tables> {
        match Maps::create(&Limits { endpoints, flows: 1024 }) {
            Ok(maps) => Some(Tables::new(maps).unwrap()),
            Err(error) => {
                assert!(!nix::unistd::geteuid().is_root(), "{error}");
                None
            }
        }
    }

    fn rested(tables: &mut Tables) {
        for places in [&mut tables.slots, &mut tables.ids] {
            for place in &mut places.0 {
                if let Place::Resting(since) = place {
                    *since -= GRACE;
                }
            }
        }
    }

    fn indexed(tables: &Tables, record: &Endpoint) -> Vec<u32> {
        Index::of(record).map(|key| tables.maps.slot(key).unwrap()).collect()
    }

    #[test]
    fn a_pod_comes_and_goes() {
        let Some(mut tables) = tables(4) else { return };
        let put = tables.put(&record(1)).unwrap();
        assert_eq!((put.id, put.slot, put.changes), (1, 1, 4));
        assert_eq!(indexed(&tables, &record(1)), [1, 1, 1]);
        assert_eq!(tables.maps.record(1).unwrap(), Endpoint { id: 1, ..record(1) });
        assert_eq!(tables.put(&record(1)).unwrap().changes, 0);

        let flow = Flow { door: 1, origin: 1, pad: [0; 2], seen: 0 };
        let key = |id| FlowKey { id, remote: [1; 4], remote_port: 1, local_port: 2, proto: 6, pad: [0; 3] };
        tables.maps.set_flow(&key(1), &flow).unwrap();
        tables.maps.set_flow(&key(2), &flow).unwrap();
        // Another pod's flows with this one go with it.
        let about = FlowKey { remote: record(1).ipv4, ..key(2) };
        tables.maps.set_flow(&about, &flow).unwrap();
        let gone = tables.release(1).unwrap().unwrap();
        assert_eq!(tables.maps.flow(&about).unwrap(), None);
        assert_eq!(gone.slot, 1);
        assert_eq!(indexed(&tables, &record(1)), [0, 0, 0]);
        assert_eq!(tables.maps.flow(&key(1)).unwrap(), None);
        assert_eq!(tables.maps.flow(&key(2)).unwrap(), Some(flow));
        assert!(!tables.maps.marked(1).unwrap());
        assert!(tables.release(1).unwrap().is_none());
    }

    #[test]
    fn nobody_remembers_a_pod_that_is_new() {
        let Some(mut tables) = tables(4) else { return };
        let flow = Flow { door: 1, origin: 1, pad: [0; 2], seen: 0 };
        let about = |n| FlowKey {
            id: 2,
            remote: record(n).ipv4,
            remote_port: 1,
            local_port: 2,
            proto: 6,
            pad: [0; 3],
        };
        let known =
            |tables: &Tables| [1, 3].map(|n| tables.maps.flow(&about(n)).expect("it is read").is_some());
        // As an agent leaves it that was killed while it released the pod.
        tables.maps.set_flow(&about(1), &flow).unwrap();
        tables.put(&record(1)).unwrap();
        assert_eq!(known(&tables), [false; 2]);
        // As a program does that was running then.
        tables.release(1).unwrap();
        tables.maps.set_flow(&about(1), &flow).unwrap();
        tables.put(&record(1)).unwrap();
        assert_eq!(known(&tables), [false; 2]);
        // A pod that gets another address is another one to everybody, and forgets itself.
        tables.maps.set_flow(&about(1), &flow).unwrap();
        tables.maps.set_flow(&about(3), &flow).unwrap();
        let own = FlowKey { id: tables.pod(1).unwrap().record.id, ..about(2) };
        tables.maps.set_flow(&own, &flow).unwrap();
        tables.put(&Endpoint { ipv4: record(3).ipv4, ..record(1) }).unwrap();
        assert_eq!(known(&tables), [false; 2]);
        assert_eq!(tables.maps.flow(&own).unwrap(), None);
    }

    #[test]
    fn a_change_takes_another_slot_and_keeps_the_id() {
        let Some(mut tables) = tables(4) else { return };
        tables.put(&record(1)).unwrap();
        let moved = Endpoint { vid: 200, ifindex: 300, ..record(1) };
        let put = tables.put(&moved).unwrap();
        assert_eq!((put.id, put.slot), (1, 2));
        assert_eq!(indexed(&tables, &moved), [2, 2, 2]);
        assert_eq!(tables.maps.slot(Index::Vlan { parent: 0, vid: 101 }).unwrap(), 0);
        assert_eq!(tables.maps.slot(Index::Interface(101)).unwrap(), 0);
        // The old slot rests, then is cleaned and used again.
        assert_eq!(tables.put(&record(2)).unwrap().slot, 3);
        rested(&mut tables);
        tables.tidy().unwrap();
        assert_eq!(tables.maps.record(1).unwrap(), Endpoint::ZERO);
        assert_eq!(tables.put(&record(3)).unwrap().slot, 1);
    }

    #[test]
    fn what_another_pod_has_is_refused() {
        let Some(mut tables) = tables(4) else { return };
        tables.put(&record(1)).unwrap();
        for taken in [
            Endpoint { vid: 101, ..record(2) },
            Endpoint { ipv4: [10, 0, 0, 1], ..record(2) },
            Endpoint { ifindex: 101, ..record(2) },
        ] {
            assert!(matches!(tables.put(&taken), Err(TablesError::Occupied { id: 1, .. })));
        }
        assert_eq!(tables.pods().count(), 1);
        assert_eq!(indexed(&tables, &record(1)), [1, 1, 1]);
    }

    #[test]
    fn an_older_generation_is_refused() {
        let Some(mut tables) = tables(4) else { return };
        tables.put(&Endpoint { generation: 5, ..record(1) }).unwrap();
        let older = Endpoint { generation: 4, vid: 9, ..record(1) };
        assert!(matches!(tables.put(&older), Err(TablesError::Stale { given: 4, known: 5 })));
        assert_eq!(tables.maps.slot(Index::Vlan { parent: 0, vid: 9 }).unwrap(), 0);
    }

    #[test]
    fn pods_trade_places() {
        let Some(mut tables) = tables(4) else { return };
        tables.put(&record(1)).unwrap();
        tables.put(&record(2)).unwrap();
        let (one, two) = (Endpoint { vid: 102, ..record(1) }, Endpoint { vid: 101, ..record(2) });
        tables.put_among(&one, &|owner| owner == 2).unwrap();
        tables.put_among(&two, &|owner| owner == 1).unwrap();
        let slot = |owner| tables.pod(owner).unwrap().slot;
        assert_eq!(indexed(&tables, &one), [slot(1); 3]);
        assert_eq!(indexed(&tables, &two), [slot(2); 3]);
    }

    #[test]
    fn full_tables_still_change() {
        let Some(mut tables) = tables(2) else { return };
        tables.put(&record(1)).unwrap();
        tables.put(&record(2)).unwrap();
        assert!(matches!(tables.put(&record(3)), Err(TablesError::Full { limit: 2 })));
        let moved = Endpoint { ipv4: [10, 0, 0, 9], ifindex: 900, vid: 90, ..record(1) };
        tables.put(&moved).unwrap();
        let slot = tables.pod(1).unwrap().slot;
        assert_eq!(indexed(&tables, &moved), [slot; 3]);
        assert_eq!(indexed(&tables, &record(1)), [0; 3]);
        // Ids that were given up a moment ago are not used.
        tables.release(2).unwrap();
        assert!(matches!(tables.put(&record(3)), Err(TablesError::Resting)));
        rested(&mut tables);
        assert_eq!(tables.put(&record(3)).unwrap().id, 2);
    }

    #[test]
    fn a_new_owner_of_the_tables_finds_and_mends_all() {
        let Some(mut tables) = tables(4) else { return };
        tables.put(&record(1)).unwrap();
        tables.put(&record(2)).unwrap();
        // Killed within an add, and within a release.
        tables.maps.set_slot(Index::Vlan { parent: 0, vid: 101 }, 0).unwrap();
        tables.maps.set_slot(Index::Vlan { parent: 3, vid: 77 }, 4).unwrap();
        tables.maps.set_slot(Index::Ipv4([10, 9, 9, 9]), 1).unwrap();
        let Tables { maps, .. } = tables;

        let mut tables = Tables::new(maps).unwrap();
        assert_eq!(tables.pods().map(|pod| pod.missing).collect::<Vec<_>>(), [1, 0]);
        assert_eq!(tables.sweep().unwrap(), 2);
        assert_eq!(tables.put(&record(1)).unwrap().changes, 1);
        assert_eq!(tables.put(&record(2)).unwrap().changes, 0);
        assert_eq!(tables.put(&record(3)).unwrap().id, 3);
        assert_eq!(tables.sweep().unwrap(), 0);
    }

    #[test]
    fn prefixes_and_vips_change_by_their_difference() {
        let Some(mut tables) = tables(2) else { return };
        let nets = |list: &[(&str, u32)]| {
            list.iter().map(|(net, flags)| (net.parse().unwrap(), *flags)).collect::<BTreeMap<Ipv4Net, u32>>()
        };
        let maps = &mut tables.maps;
        let first = nets(&[("10.0.0.0/8", 1), ("169.254.169.254/32", 2)]);
        assert_eq!(maps.set_host_dsts(&first).unwrap(), 2);
        assert_eq!(maps.set_host_dsts(&first).unwrap(), 0);
        assert_eq!(maps.host_dst([169, 254, 169, 254]).unwrap(), 2);
        assert_eq!(maps.host_dst([10, 1, 2, 3]).unwrap(), 1);
        assert_eq!(maps.set_host_dsts(&nets(&[("10.0.0.0/8", 1), ("10.9.0.1/32", 1)])).unwrap(), 2);
        assert_eq!(maps.host_dst([169, 254, 169, 254]).unwrap(), 0);

        let vip = ([10, 1, 0, 200], 80, 6);
        assert_eq!(maps.set_vips(&BTreeSet::from([vip])).unwrap(), 1);
        assert!(maps.is_vip(vip.0, vip.1, vip.2).unwrap());
        assert_eq!(maps.set_vips(&BTreeSet::new()).unwrap(), 1);
        assert!(!maps.is_vip(vip.0, vip.1, vip.2).unwrap());
    }
}

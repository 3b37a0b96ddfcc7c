//! The tables of the datapath as typed handles, and the rules by which records come, change and go.
//!
//! [`Maps`] reads and writes single maps. [`Tables`] owns slots and ids: a record is written before any index points
//! at its slot and never changes while one does; a change takes a fresh slot and swaps the indexes; slots and ids
//! rest before they are used again, because a program that looked one up may still be running. Nothing is kept
//! beside the maps: what [`Tables::new`] finds in them is the state.

mod direct;
mod handles;
mod places;
mod policy;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use aya::{maps::MapError, sys::SyscallError};
use datapath_common::abi::Endpoint;

pub(crate) use self::handles::{layout_of, map_data};
use self::places::Places;
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
            slots.occupy(pod.slot);
            ids.occupy(pod.record.id);
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
            self.ids.free(id);
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
        self.slots.free(slot);
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

//! From the pins of another ABI version to those of this one, up or down: no packet is lost, and nothing that was remembered.
//!
//! 1. Maps that are the same in both versions are pinned in both directories, and nothing happens to them. The others are made
//!    anew and filled field by field (by the description that lies beside them), in a draft that nobody uses; then it gets its name.
//! 2. Programs are swapped behind their links, one by one, and each link's pin moves to this version's directory. Readers of
//!    memories (pods' programs) come before most of their writers (parents' programs); between them, and at the end, memories
//!    that came into being meanwhile are copied after.
//! 3. The other directory goes, by one rename.
//!
//! An agent that dies on the way leaves both directories, complete, and every link in one of them. Whichever of the two
//! versions starts next goes on: it merges what the other's programs have written and swaps the links that are not its own. No
//! agent changes a record while both are there, so that records are the same in both.

mod counters;
mod description;
mod raw;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, io, os::fd::AsFd, path::PathBuf};

use aya::maps::{MapError, MapType};
use datapath_common::abi::maps;

use self::{
    description::{Description, Fields, Table, Translation},
    raw::RawMap,
};
use crate::{
    config::Limits,
    error::whole,
    pin::{MapLayout, PinError, Pins, layouts},
    sys,
};

/// Why the pins of another version are not taken over.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// Nobody knows what the maps hold.
    #[error(
        "{} holds the maps and links of another version of eniway, and no description by which this one could take them \
         over. Nothing was changed: run that version again, or `eniway detach` (pods lose their network until this agent is \
         started)",
        path.display()
    )]
    Undescribed {
        /// The version's directory.
        path: PathBuf,
    },
    /// Two other versions are there.
    #[error(
        "{} and {} are both there: an agent of one of these versions was ended while it took over from the other. Nothing \
         was changed: start either of them first, which goes on with it",
        one.display(), other.display()
    )]
    Unfinished {
        /// A version's directory.
        one: PathBuf,
        /// Another one's.
        other: PathBuf,
    },
    /// There is no room.
    #[error(
        "a pod has the {what} {number} in {}, and limits.endpoints leaves room for less than {limit}. Nothing was changed: \
         raise it",
        path.display()
    )]
    Room {
        /// `slot` or `id`.
        what: &'static str,
        /// Its number.
        number: u64,
        /// One more than the highest that fits.
        limit: u32,
        /// The other version's directory.
        path: PathBuf,
    },
    /// A number is larger than this version's.
    #[error(
        "an entry of the pinned map {} holds a number that this version has no room for. Nothing was changed: run the \
         version that wrote it, or `eniway detach` (pods lose their network until this agent is started)",
        path.display()
    )]
    Narrow {
        /// The pin.
        path: PathBuf,
    },
    /// A map is not what its description says.
    #[error(
        "the pinned map {} is not as the description beside it says. Nothing was changed: run `eniway detach` (pods lose their \
         network until the agent is started again)",
        path.display()
    )]
    Described {
        /// The pin.
        path: PathBuf,
    },
    /// A map cannot be opened or inspected.
    #[error("cannot inspect the pinned map {}: {}", path.display(), whole(source))]
    Inspect {
        /// The pin.
        path: PathBuf,
        /// What the kernel said.
        source: Box<MapError>,
    },
    /// A map cannot be read or written.
    #[error("cannot {action} map {}: {source}", path.display())]
    Map {
        /// The pin.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A link cannot be taken over.
    #[error("cannot swap the program behind the link {}: {source}", path.display())]
    Link {
        /// The pin.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The directories.
    #[error(transparent)]
    Pin(#[from] PinError),
}

/// What the agent alone writes, and cannot find out anew: copied once.
const RECORDS: [&str; 4] = [maps::ENDPOINT, maps::POD_IF, maps::VIPS, maps::LIMITS];
/// What programs write. Marks come after what they announce. `SPENT` is not among them: where its layout differs, each pod has its
/// burst once more.
const MEMORIES: [&str; 5] = [maps::FLOWS, maps::FLOW_MARK, maps::FRAGS, maps::PAIRS, maps::PAIR_MARK];
/// Of use only together. Where one differs all begin empty but the epoch, which flows refer to: then nothing can be judged, and
/// everything takes the wire, until the source has spoken.
const GROUPS: [&str; 5] = [maps::EPOCH, maps::VERDICT, maps::CLASS, maps::PROGRAM, maps::RULES];

/// A key and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    key: Vec<u8>,
    value: Vec<u8>,
}

/// Entries of the other version that were copied: values by key.
type Copied = HashMap<Vec<u8>, Vec<u8>>;

/// The other version.
struct Other {
    pins: Pins,
    description: Description,
}

/// How a start comes to its tables.
pub struct Takeover {
    pins: Pins,
    /// Where the maps are: in a draft, until it gets its name.
    at: Pins,
    other: Option<Other>,
    own: Description,
    /// What was copied of each memory so far.
    copied: HashMap<&'static str, Copied>,
}

impl Takeover {
    /// Looks at what is there, and prepares maps for this version, if it has none yet, in a draft. The caller holds the lock.
    ///
    /// # Errors
    ///
    /// When what is there cannot be taken over; then nothing was changed.
    pub fn begin(pins: &Pins, limits: &Limits) -> Result<Self, TakeoverError> {
        let mut others = pins.all_versions()?;
        others.retain(|other| other.version() != pins.version());
        if let [one, other, ..] = &others[..] {
            return Err(TakeoverError::Unfinished { one: one.version_dir(), other: other.version_dir() });
        }
        let own = Description::own();
        let other = others.pop().map(Other::open).transpose()?;
        let exist = pins.exist();
        if exist {
            pins.check_layouts(limits)?;
        } else if let Some(other) = &other {
            other.check_room(limits)?;
            other.check_records(&own)?;
        }
        pins.remove_remains()?;
        let at = if exist { pins.clone() } else { pins.draft() };
        let takeover = Self { pins: pins.clone(), at, other, own, copied: HashMap::new() };
        match takeover.prepare(exist, limits) {
            Ok(()) => Ok(takeover),
            Err(error) => {
                pins.remove_remains()?;
                Err(error)
            }
        }
    }

    fn prepare(&self, exist: bool, limits: &Limits) -> Result<(), TakeoverError> {
        self.at.make_dirs()?;
        self.own.write(&self.at)?;
        step();
        let Some(other) = self.other.as_ref().filter(|_| !exist) else { return Ok(()) };
        let layouts = layouts(limits);
        let same = |name: &str| other.same(&self.own, &layouts, name);
        let groups =
            GROUPS.iter().try_fold(true, |all, name| Ok::<_, TakeoverError>(all && same(name)?.is_some()))?;
        for (name, _) in &layouts {
            if let Some(map) = same(name)?.filter(|_| groups || !GROUPS.contains(name)) {
                map.share(&self.at, name)?;
            }
        }
        step();
        self.prepare_carried(other)
    }

    /// The pins of this version, once they are there.
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Where the maps are to be made or opened.
    pub fn place(&self) -> &Pins {
        &self.at
    }

    /// Whether there is another version to take over from.
    pub fn other(&self) -> Option<u32> {
        self.other.as_ref().map(|other| other.pins.version())
    }

    /// Fills this version's maps, which have been made by now, from those of the other one.
    ///
    /// # Errors
    ///
    /// When a map cannot be read or written.
    pub fn fill(&mut self) -> Result<(), TakeoverError> {
        let Some(other) = &self.other else { return Ok(()) };
        if self.is_draft() {
            for name in RECORDS.into_iter().chain([maps::EPOCH]) {
                let Some(pair) = self.pair(other, name)? else { continue };
                for entry in pair.from.entries()? {
                    if let Some(Entry { key, value }) = pair.translated(&entry) {
                        pair.to.set(&key, &value)?;
                    }
                }
                step();
            }
        }
        self.copy_memories()
    }

    /// Makes what was a draft this version's own.
    ///
    /// # Errors
    ///
    /// When it cannot be renamed.
    pub fn publish(&mut self) -> Result<(), TakeoverError> {
        if self.is_draft() {
            self.at = self.at.publish()?;
            step();
        }
        Ok(())
    }

    fn is_draft(&self) -> bool {
        self.at.version_dir() != self.pins.version_dir()
    }

    /// Copies what the other version's programs have remembered since the last time, and forgets what they forgot.
    ///
    /// # Errors
    ///
    /// When a map cannot be read or written.
    pub fn copy_memories(&mut self) -> Result<(), TakeoverError> {
        let Some(other) = &self.other else { return Ok(()) };
        for name in MEMORIES {
            if let Some(pair) = self.pair(other, name)? {
                pair.merge(self.copied.entry(name).or_default())?;
                step();
            }
        }
        Ok(())
    }

    /// Names of links that are still the other version's.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn links(&self) -> Result<Vec<String>, TakeoverError> {
        Ok(self.other.as_ref().map_or(Ok(Vec::new()), |other| other.pins.link_names())?)
    }

    /// Swaps the program behind a link of the other version and makes the link this one's. One whose interface is gone is
    /// removed.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn swap(&self, link: &str, program: impl AsFd) -> Result<(), TakeoverError> {
        let Some(other) = &self.other else { return Ok(()) };
        let path = other.pins.links_dir().join(link);
        match sys::open(&path).and_then(|link| sys::link_update(link, program)) {
            Ok(()) => {
                step();
                self.pins.adopt_link(&other.pins, link)?;
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => drop(self.pins.remove(&path)?),
            Err(source) => return Err(TakeoverError::Link { path, source }),
        }
        step();
        Ok(())
    }

    /// Removes a link of the other version, and with it the program.
    ///
    /// # Errors
    ///
    /// When it cannot be removed.
    pub fn remove_link(&self, link: &str) -> Result<(), TakeoverError> {
        if let Some(other) = &self.other {
            self.pins.remove(&other.pins.links_dir().join(link))?;
        }
        Ok(())
    }

    /// Removes the other version's pins, when none of its programs runs any more.
    ///
    /// # Errors
    ///
    /// When they cannot be removed.
    pub fn finish(self) -> Result<(), TakeoverError> {
        if let Some(other) = &self.other {
            other.pins.retire()?;
            step();
        }
        Ok(())
    }

    /// A map of both versions, unless it is one and the same, or the other one lacks it.
    fn pair(&self, other: &Other, name: &'static str) -> Result<Option<Pair>, TakeoverError> {
        let (from, to) = (other.map(name)?, RawMap::open(&self.at, name)?);
        let (Some((from, its)), Some(to), Some(own)) = (from, to, self.own.table(name)) else {
            return Ok(None);
        };
        if from.id == to.id {
            return Ok(None);
        }
        Ok(Some(Pair {
            from,
            to,
            key: its.key.translation(&own.key),
            value: its.value.translation(&own.value),
            seen: Some((its.value.clone(), own.value.clone()))
                .filter(|(its, own)| its.has(SEEN) && own.has(SEEN)),
        }))
    }
}

/// The field that says when a memory was last of use, in seconds of the monotonic clock.
const SEEN: &str = "seen";

/// A map in the other version's layout and in this one's.
struct Pair {
    from: RawMap,
    to: RawMap,
    key: Translation,
    value: Translation,
    seen: Option<(Fields, Fields)>,
}

impl Pair {
    fn translated(&self, entry: &Entry) -> Option<Entry> {
        let key = self.key.apply(&entry.key).filter(|key| self.has_room(key))?;
        Some(Entry { key, value: self.value.apply(&entry.value)? })
    }

    /// An array may be shorter here.
    fn has_room(&self, key: &[u8]) -> bool {
        let index = |key: &[u8]| key.try_into().map_or(u32::MAX, u32::from_ne_bytes);
        !self.is_array() || index(key) < self.to.layout.entries
    }

    /// Copies what is new there, or of later use than what is here; removes what came from there, is there no more, and was not
    /// touched here.
    fn merge(&self, copied: &mut Copied) -> Result<(), TakeoverError> {
        let mut before = std::mem::take(copied);
        for entry in self.from.entries()? {
            let known = before.remove(&entry.key).is_some_and(|known| known == entry.value);
            if !known && let Some(own) = self.translated(&entry) {
                match self.to.get(&own.key)? {
                    None => self.to.add(&own.key, &own.value)?,
                    Some(here) if self.is_array() || self.is_later(&entry.value, &here) => {
                        self.to.set(&own.key, &own.value)?;
                    }
                    Some(_) => {}
                }
            }
            copied.insert(entry.key, entry.value);
        }
        // A mark that was taken away there is taken away by whoever frees the id.
        if self.is_array() {
            return Ok(());
        }
        for (key, value) in before {
            if let Some(own) = self.translated(&Entry { key, value })
                && self.to.get(&own.key)?.is_some_and(|now| now == own.value)
            {
                self.to.remove(&own.key)?;
            }
        }
        Ok(())
    }

    fn is_array(&self) -> bool {
        self.to.layout.kind == MapType::Array
    }

    /// Whether a memory there was of use after the one here.
    fn is_later(&self, theirs: &[u8], here: &[u8]) -> bool {
        self.seen.as_ref().is_some_and(|(its, own)| {
            let seen = |fields: &Fields, value: &[u8]| fields.number(SEEN, value).unwrap_or(0) as u32;
            seen(its, theirs).wrapping_sub(seen(own, here)) as i32 > 0
        })
    }
}

impl Other {
    fn open(pins: Pins) -> Result<Self, TakeoverError> {
        let Some(description) = Description::read(&pins)? else {
            return Err(TakeoverError::Undescribed { path: pins.version_dir() });
        };
        let needed = ["owner", "id", "ifindex", "parent_ifindex", "parent", "vid", "ipv4", "mac"];
        let records = description.table(maps::ENDPOINT);
        if !records.is_some_and(|table| needed.iter().all(|name| table.value.has(name))) {
            return Err(TakeoverError::Undescribed { path: pins.version_dir() });
        }
        let other = Self { pins, description };
        for name in maps::ALL {
            other.map(name)?;
        }
        Ok(other)
    }

    /// A map and what it holds; none when that version has no such map.
    fn map(&self, name: &str) -> Result<Option<(RawMap, &Table)>, TakeoverError> {
        let Some(table) = self.description.table(name) else { return Ok(None) };
        let Some(map) = RawMap::open(&self.pins, name)? else { return Ok(None) };
        if (map.layout.key as usize, map.layout.value as usize) != (table.key.size, table.value.size) {
            return Err(TakeoverError::Described { path: self.pins.map(name) });
        }
        Ok(Some((map, table)))
    }

    /// The map, if it is what this version would make.
    fn same(
        &self,
        own: &Description,
        layouts: &[(&'static str, MapLayout)],
        name: &str,
    ) -> Result<Option<RawMap>, TakeoverError> {
        let Some((map, table)) = self.map(name)? else { return Ok(None) };
        let wanted = layouts.iter().find(|(known, _)| *known == name).map(|(_, layout)| *layout);
        let same = own.table(name) == Some(table) && wanted == Some(map.layout);
        Ok(same.then_some(map))
    }

    /// No pod may be left behind because a number of its record has no room here.
    fn check_records(&self, own: &Description) -> Result<(), TakeoverError> {
        for name in RECORDS {
            let (Some((map, table)), Some(own)) = (self.map(name)?, own.table(name)) else { continue };
            let (key, value) = (table.key.translation(&own.key), table.value.translation(&own.value));
            let fits = |entry: &Entry| key.apply(&entry.key).and(value.apply(&entry.value)).is_some();
            if !map.entries()?.iter().all(fits) {
                return Err(TakeoverError::Narrow { path: self.pins.map(name) });
            }
        }
        Ok(())
    }

    /// Slots and ids stay: all must fit.
    fn check_room(&self, limits: &Limits) -> Result<(), TakeoverError> {
        let Some((records, table)) = self.map(maps::ENDPOINT)? else { return Ok(()) };
        let entries = |wanted: &str| {
            layouts(limits).iter().find(|(name, _)| *name == wanted).map_or(0, |(_, layout)| layout.entries)
        };
        let (slots, ids) = (entries(maps::ENDPOINT), entries(maps::FLOW_MARK));
        for Entry { key, value } in records.entries()? {
            let slot = table.key.number("slot", &key).unwrap_or(0);
            let id = table.value.number("id", &value).unwrap_or(0);
            for (what, number, limit) in [("slot", slot, slots), ("id", id, ids)] {
                if number >= u64::from(limit) {
                    return Err(TakeoverError::Room { what, number, limit, path: self.pins.version_dir() });
                }
            }
        }
        Ok(())
    }
}

/// Host-side interfaces of all pods in the tables of a version, for those who only take down.
pub fn interfaces(pins: &Pins) -> Vec<u32> {
    let read = || -> Result<Vec<u32>, TakeoverError> {
        let Some(map) = RawMap::open(pins, maps::POD_IF)? else { return Ok(Vec::new()) };
        let described = Description::read(pins)?;
        let key = described.as_ref().and_then(|known| known.table(maps::POD_IF)).map(|table| &table.key);
        // Before there were descriptions a key was the number and nothing else.
        let number = |entry: &Entry| match key {
            Some(fields) => fields.number("ifindex", &entry.key).and_then(|number| number.try_into().ok()),
            None => entry.key[..].try_into().ok().map(u32::from_ne_bytes),
        };
        Ok(map.entries()?.iter().filter_map(number).collect())
    };
    read().unwrap_or_else(|error| {
        log::warn!("{error}");
        Vec::new()
    })
}

/// A point at which an agent may die. Those that are built for tests do, at the one that `ENIWAY_DIE_AT` counts to.
fn step() {
    #[cfg(debug_assertions)]
    {
        use std::sync::atomic::{AtomicU32, Ordering};

        static STEPS: AtomicU32 = AtomicU32::new(0);
        let now = STEPS.fetch_add(1, Ordering::Relaxed) + 1;
        if std::env::var("ENIWAY_DIE_AT").is_ok_and(|at| at == now.to_string()) {
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
        }
    }
}

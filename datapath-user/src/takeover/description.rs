//! What a version's maps hold, as any other version can read it: it lies beside the pins.

use std::{collections::BTreeMap, io, os::fd::AsFd as _};

use aya::maps::MapType;
use datapath_common::abi::{
    self,
    layout::{self, Record},
    maps,
};
use serde::{Deserialize, Serialize};

use super::{TakeoverError, raw::RawMap};
use crate::{
    pin::Pins,
    sys::{self, NewMap},
};

/// How it is written down.
const FORMAT: u32 = 1;

/// The fields of a key or value, by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fields {
    pub(super) size: usize,
    /// Offset and size.
    fields: BTreeMap<String, (usize, usize)>,
}

/// A map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Table {
    pub(super) key: Fields,
    pub(super) value: Fields,
}

/// All maps of a version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Description {
    format: u32,
    version: u32,
    tables: BTreeMap<String, Table>,
}

impl Description {
    /// That of this version.
    pub(super) fn own() -> Self {
        let tables = layout::TABLES.into_iter().chain([layout::CARRIED]).map(|table| {
            let described = Table { key: Fields::of(&table.key), value: Fields::of(&table.value) };
            (table.map.to_owned(), described)
        });
        Self { format: FORMAT, version: abi::VERSION, tables: tables.collect() }
    }

    /// The one beside the pins of a version, if there is one that can be understood.
    pub(super) fn read(pins: &Pins) -> Result<Option<Self>, TakeoverError> {
        let Some(map) = RawMap::open(pins, maps::LAYOUT)? else { return Ok(None) };
        if map.layout.kind != MapType::Array || map.layout.key != 4 {
            return Ok(None);
        }
        let Some(value) = map.get(&0_u32.to_ne_bytes())? else { return Ok(None) };
        let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
        let known = serde_json::from_slice::<Self>(text).ok();
        Ok(known.filter(|known| known.format == FORMAT && known.tables.values().all(Table::is_sound)))
    }

    /// Puts it beside the pins of a version, unless there is one.
    pub(super) fn write(&self, pins: &Pins) -> Result<(), TakeoverError> {
        let pin = pins.map(maps::LAYOUT);
        if pin.exists() {
            return Ok(());
        }
        let failed = |source| TakeoverError::Map { path: pin.clone(), action: "write", source };
        let mut text = serde_json::to_vec(self).map_err(io::Error::other).map_err(failed)?;
        // At least one zero ends it, and values are multiples of 8 bytes long.
        text.resize((text.len() / 8 + 1) * 8, 0);
        let new = NewMap {
            name: maps::LAYOUT,
            kind: MapType::Array,
            key: 4,
            value: text.len(),
            entries: 1,
            flags: 0,
        };
        let map = sys::map_create(new).map_err(failed)?;
        // SAFETY: the map was made with keys of 4 bytes and values of this length.
        unsafe { sys::map_update(&map, &0_u32.to_ne_bytes(), &text, 0) }.map_err(failed)?;
        sys::map_freeze(&map).map_err(failed)?;
        sys::pin(map.as_fd(), &pin).map_err(failed)
    }

    /// Makes a map's key mean something else.
    #[cfg(test)]
    pub(super) fn rename_key(&mut self, map: &str, name: &str) {
        let key = &mut self.tables.get_mut(map).expect("a map of this version").key;
        key.fields = [(name.to_owned(), (0, key.size))].into();
    }

    /// Makes a field of a map's value longer.
    #[cfg(test)]
    pub(super) fn widen(&mut self, map: &str, name: &str, size: usize) {
        let value = &mut self.tables.get_mut(map).expect("a map of this version").value;
        value.fields.get_mut(name).expect("a field of it").1 = size;
    }

    pub(super) fn table(&self, map: &str) -> Option<&Table> {
        self.tables.get(map)
    }
}

impl Table {
    fn is_sound(&self) -> bool {
        [&self.key, &self.value].into_iter().all(Fields::is_sound)
    }
}

impl Fields {
    fn of(record: &Record) -> Self {
        let fields = record.fields.iter().map(|field| (field.name.to_owned(), (field.offset, field.size)));
        Self { size: record.size, fields: fields.collect() }
    }

    fn is_sound(&self) -> bool {
        self.size > 0
            && self
                .fields
                .values()
                .all(|(offset, size)| offset.checked_add(*size).is_some_and(|end| end <= self.size))
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.fields.contains_key(name)
    }

    /// The bytes of a field.
    pub(super) fn field<'a>(&self, name: &str, record: &'a [u8]) -> Option<&'a [u8]> {
        let (offset, size) = *self.fields.get(name)?;
        record.get(offset..offset + size)
    }

    /// The bytes of a field, to be changed.
    pub(super) fn field_mut<'a>(&self, name: &str, record: &'a mut [u8]) -> Option<&'a mut [u8]> {
        let (offset, size) = *self.fields.get(name)?;
        record.get_mut(offset..offset + size)
    }

    /// A field that is a number of up to 8 bytes.
    pub(super) fn number(&self, name: &str, record: &[u8]) -> Option<u64> {
        let bytes = self.field(name, record)?;
        let mut number = [0; 8];
        number.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(u64::from_le_bytes(number))
    }

    /// How records like this one become records like another.
    pub(super) fn translation(&self, to: &Self) -> Translation {
        let parts = to.fields.iter().filter(|(name, _)| *name != "pad").filter_map(|(name, (at, room))| {
            let (from, size) = *self.fields.get(name)?;
            Some(Part { from, size, to: *at, room: *room })
        });
        Translation { size: to.size, parts: parts.collect() }
    }
}

/// The way of records into another layout, field by field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Translation {
    size: usize,
    parts: Vec<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    from: usize,
    size: usize,
    to: usize,
    room: usize,
}

impl Translation {
    /// A record in the other layout. `None` when a field has no room there for what it holds: numbers and rows grow and shrink at
    /// their end, where only zeros may be cut off.
    pub(super) fn apply(&self, record: &[u8]) -> Option<Vec<u8>> {
        let mut result = vec![0; self.size];
        for Part { from, size, to, room } in &self.parts {
            let field = record.get(*from..from + size)?;
            let (kept, cut) = field.split_at(*size.min(room));
            if cut.iter().any(|byte| *byte != 0) {
                return None;
            }
            result[*to..to + kept.len()].copy_from_slice(kept);
        }
        Some(result)
    }
}

// Numbers grow at their end.
const _: () = assert!(cfg!(target_endian = "little"));

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(size: usize, fields: &[(&str, usize, usize)]) -> Fields {
        let fields = fields.iter().map(|(name, offset, size)| ((*name).to_owned(), (*offset, *size)));
        Fields { size, fields: fields.collect() }
    }

    #[test]
    fn fields_keep_their_names_and_change_their_places() {
        let old = fields(8, &[("id", 0, 4), ("door", 4, 1), ("gone", 5, 1), ("pad", 6, 2)]);
        let new = fields(12, &[("pad", 0, 2), ("door", 2, 2), ("id", 4, 4), ("spare", 8, 4)]);
        let record = [1, 2, 3, 4, 5, 6, 7, 8];
        let there = old.translation(&new).apply(&record).unwrap();
        assert_eq!(there, [0, 0, 5, 0, 1, 2, 3, 4, 0, 0, 0, 0]);
        let back = new.translation(&old).apply(&there).unwrap();
        assert_eq!(back, [1, 2, 3, 4, 5, 0, 0, 0]);
        assert_eq!(new.translation(&old).apply(&[0, 0, 5, 1, 0, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(new.number("door", &there), Some(5));
    }

    #[test]
    fn this_version_is_described_soundly() {
        let own = Description::own();
        assert!(own.tables.values().all(Table::is_sound));
        assert_eq!(own.tables.len(), maps::ALL.len() + 1);
        let text = serde_json::to_string(&own).unwrap();
        assert_eq!(serde_json::from_str::<Description>(&text).unwrap(), own);
        for table in own.tables.values() {
            let record: Vec<u8> = (0..table.value.size).map(|i| i as u8).collect();
            let same = table.value.translation(&table.value).apply(&record).unwrap();
            for name in table.value.fields.keys().filter(|name| *name != "pad") {
                assert_eq!(table.value.field(name, &same), table.value.field(name, &record), "{name}");
            }
        }
    }

    #[test]
    fn what_reaches_beyond_its_record_is_not_sound() {
        assert!(!fields(4, &[("id", 2, 4)]).is_sound());
        assert!(!fields(4, &[("id", usize::MAX, 4)]).is_sound());
    }
}

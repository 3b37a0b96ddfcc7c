//! Counters, where their layout changes.
//!
//! Programs count without locks, each CPU in its own row, so nobody else may write there. What the other version's maps hold is
//! added up beside this version's: as long as its programs run it is `pending`, read again and again; with the next change it
//! becomes part of `base`. Nothing is counted twice, however often this is begun anew.

use std::os::fd::AsFd as _;

use aya::maps::MapType;
use datapath_common::abi::{layout, maps};

use super::{Entry, Fields, Other, Takeover, TakeoverError, raw::RawMap, step};
use crate::{
    pin::Pins,
    sys::{self, NewMap},
};

const NO_PREALLOC: u32 = 1;
const DIRECTIONS: [&str; 2] = ["ingress (packets, bytes)", "egress (packets, bytes)"];

impl Takeover {
    /// Makes or shares the map of carried counters, in a draft.
    pub(super) fn prepare_carried(&self, other: &Other) -> Result<(), TakeoverError> {
        let counters = RawMap::open(&self.at, maps::COUNTERS)?;
        let carried = other.map(maps::CARRIED)?;
        if counters.is_some() {
            // Counters are shared.
            let Some((map, table)) = carried else { return Ok(()) };
            if self.own.table(maps::CARRIED) == Some(table) {
                return map.share(&self.at, maps::CARRIED);
            }
            let own = create(&self.at, map.layout.entries)?;
            return self.carry_base(&map, &table.value, &own);
        }
        let Some((counters, _)) = other.map(maps::COUNTERS)? else { return Ok(()) };
        let own = create(&self.at, counters.layout.entries)?;
        match carried {
            Some((map, table)) => self.carry_base(&map, &table.value, &own),
            None => Ok(()),
        }
    }

    /// What was final there, and what was pending, is final here.
    fn carry_base(&self, from: &RawMap, its: &Fields, to: &RawMap) -> Result<(), TakeoverError> {
        let Some(own) = self.own.table(maps::CARRIED) else { return Ok(()) };
        for Entry { key, value } in from.entries()? {
            let mut row = vec![0; own.value.size];
            for part in ["base", "pending"] {
                add(&mut row, &own.value, "base", &value, its, part);
            }
            to.set(&key, &row)?;
        }
        step();
        Ok(())
    }

    /// Reads what the other version's programs have counted for these ids.
    ///
    /// # Errors
    ///
    /// When a map cannot be read or written.
    pub fn carry_counters(&self, ids: &[u32]) -> Result<(), TakeoverError> {
        let Some(other) = &self.other else { return Ok(()) };
        let Some((counters, table)) = other.map(maps::COUNTERS)? else { return Ok(()) };
        let here = RawMap::open(&self.at, maps::COUNTERS)?;
        if here.is_none_or(|here| here.id == counters.id) {
            return Ok(());
        }
        let to = match RawMap::open(&self.at, maps::CARRIED)? {
            Some(map) => map,
            // The other version was made from this one, whose counters were never carried.
            None => create(&self.at, counters.layout.entries)?,
        };
        let Some(own) = self.own.table(maps::CARRIED).map(|table| &table.value) else { return Ok(()) };
        for id in ids.iter().filter(|id| **id < counters.layout.entries) {
            let key = id.to_ne_bytes();
            let Some(rows) = counters.get(&key)? else { continue };
            let mut row = to.get(&key)?.unwrap_or_else(|| vec![0; own.size]);
            if own.number("from", &row) != Some(counters.id.into()) {
                let before = row.clone();
                add(&mut row, own, "base", &before, own, "pending");
            }
            set_pending(&mut row, own, counters.id);
            for cpu in rows.chunks(counters.row()) {
                add(&mut row, own, "pending", cpu, &table.value, "");
            }
            to.set(&key, &row)?;
        }
        step();
        Ok(())
    }
}

fn create(pins: &Pins, entries: u32) -> Result<RawMap, TakeoverError> {
    let path = pins.map(maps::CARRIED);
    let failed = |source| TakeoverError::Map { path: path.clone(), action: "create", source };
    let new = NewMap {
        name: maps::CARRIED,
        kind: MapType::Hash,
        key: layout::CARRIED.key.size,
        value: layout::CARRIED.value.size,
        entries,
        flags: NO_PREALLOC,
    };
    let map = sys::map_create(new).map_err(failed)?;
    sys::pin(map.as_fd(), &path).map_err(failed)?;
    RawMap::open(pins, maps::CARRIED)?.ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))
}

/// Adds counters of one row to those of another, outcome by outcome. A part is `base`, `pending`, or nothing for a whole row.
fn add(to: &mut [u8], own: &Fields, part: &str, from: &[u8], its: &Fields, its_part: &str) {
    for direction in DIRECTIONS {
        let name = |part: &str| format!("{part} {direction}").trim().to_owned();
        let Some(theirs) = its.field(&name(its_part), from) else { continue };
        let Some(ours) = own.field_mut(&name(part), to) else { continue };
        for (sum, number) in ours.chunks_exact_mut(8).zip(theirs.chunks_exact(8)) {
            let value = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_ne_bytes);
            let total = value(sum).wrapping_add(value(number));
            sum.copy_from_slice(&total.to_ne_bytes());
        }
    }
}

/// Begins to read from a map.
fn set_pending(row: &mut [u8], own: &Fields, from: u32) {
    for direction in DIRECTIONS {
        if let Some(pending) = own.field_mut(&format!("pending {direction}"), row) {
            pending.fill(0);
        }
    }
    if let Some(field) = own.field_mut("from", row)
        && field.len() == 8
    {
        field.copy_from_slice(&u64::from(from).to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use datapath_common::abi::{Carried, CounterRow};

    use super::{super::Description, *};

    #[test]
    fn rows_add_up_by_direction() {
        let own = Description::own();
        let carried = &own.table(maps::CARRIED).unwrap().value;
        let counters = &own.table(maps::COUNTERS).unwrap().value;
        let mut row = vec![0; size_of::<Carried>()];
        let cpu: Vec<u8> = (0..size_of::<CounterRow>() / 8).flat_map(|i| (i as u64).to_ne_bytes()).collect();
        set_pending(&mut row, carried, 7);
        for _ in 0..2 {
            add(&mut row, carried, "pending", &cpu, counters, "");
        }
        assert_eq!(carried.number("from", &row), Some(7));
        let number = |at: usize| u64::from_ne_bytes(row[at..at + 8].try_into().unwrap());
        let pending = 8 + size_of::<CounterRow>();
        assert_eq!((number(pending), number(pending + 8), number(pending + 2040)), (0, 2, 510));
        let before = row.clone();
        add(&mut row, carried, "base", &before, carried, "pending");
        set_pending(&mut row, carried, 8);
        let number = |at: usize| u64::from_ne_bytes(row[at..at + 8].try_into().unwrap());
        assert_eq!((number(8 + 8), number(pending + 8), number(0)), (2, 0, 8));
    }
}

//! Maps of which only a description says what they hold.

use std::{io, os::fd::AsFd as _, path::PathBuf};

use aya::maps::{MapData, MapError, MapInfo, MapType};

use super::{Entry, TakeoverError};
use crate::{
    pin::{MapLayout, Pins},
    sys,
};

const BPF_NOEXIST: u64 = 1;

/// A pinned map.
#[derive(Debug)]
pub(super) struct RawMap {
    data: MapData,
    path: PathBuf,
    /// The kernel's number of it.
    pub(super) id: u32,
    pub(super) layout: MapLayout,
}

impl RawMap {
    /// Opens a map of a version; none if there is none.
    pub(super) fn open(pins: &Pins, name: &str) -> Result<Option<Self>, TakeoverError> {
        let path = pins.map(name);
        if !path.exists() {
            return Ok(None);
        }
        let inspect =
            |source: MapError| TakeoverError::Inspect { path: path.clone(), source: Box::new(source) };
        let data = MapData::from_pin(&path).map_err(inspect)?;
        let info: MapInfo = data.info().map_err(inspect)?;
        let layout = MapLayout::of(&info).map_err(inspect)?;
        Ok(Some(Self { id: info.id(), data, path, layout }))
    }

    /// Gives the map a name among the pins of another version, too.
    pub(super) fn share(&self, pins: &Pins, name: &str) -> Result<(), TakeoverError> {
        sys::pin(self.data.fd().as_fd(), &pins.map(name)).map_err(self.failed("pin again"))
    }

    /// The value of a key: for a per-CPU map, one behind the other.
    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, TakeoverError> {
        assert_eq!(key.len(), self.layout.key as usize, "a key of {}", self.path.display());
        let size = match self.layout.kind {
            MapType::PerCpuArray => self.row() * self.cpus()?,
            _ => self.layout.value as usize,
        };
        let mut value = vec![0; size];
        // SAFETY: the key is as long as the map's, and the value as long as the kernel's answer for this kind of map.
        let found =
            unsafe { sys::map_lookup(self.data.fd(), key, &mut value) }.map_err(self.failed("read"))?;
        Ok(found.then_some(value))
    }

    /// Bytes between the values of two CPUs.
    pub(super) fn row(&self) -> usize {
        (self.layout.value as usize).next_multiple_of(8)
    }

    fn cpus(&self) -> Result<usize, TakeoverError> {
        aya::util::nr_cpus().map_err(|(_, source)| self.failed("count the CPUs of")(source))
    }

    /// Writes a value.
    pub(super) fn set(&self, key: &[u8], value: &[u8]) -> Result<(), TakeoverError> {
        self.update(key, value, 0).map_err(self.failed("write"))
    }

    /// Writes a value unless the key is there.
    pub(super) fn add(&self, key: &[u8], value: &[u8]) -> Result<(), TakeoverError> {
        match self.update(key, value, BPF_NOEXIST) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            result => result.map_err(self.failed("write")),
        }
    }

    fn update(&self, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
        assert_eq!(key.len(), self.layout.key as usize, "a key of {}", self.path.display());
        assert_eq!(value.len(), self.layout.value as usize, "a value of {}", self.path.display());
        // SAFETY: both are as long as the map's, which is none of per-CPU values.
        unsafe { sys::map_update(self.data.fd(), key, value, flags) }
    }

    /// Removes an entry, if it is there.
    pub(super) fn remove(&self, key: &[u8]) -> Result<(), TakeoverError> {
        assert_eq!(key.len(), self.layout.key as usize, "a key of {}", self.path.display());
        // SAFETY: the key is as long as the map's.
        unsafe { sys::map_delete(self.data.fd(), key) }.map(drop).map_err(self.failed("remove an entry of"))
    }

    /// All entries: of an array those that are not zero.
    pub(super) fn entries(&self) -> Result<Vec<Entry>, TakeoverError> {
        let mut all = Vec::new();
        if self.layout.kind == MapType::Array {
            for index in 0..self.layout.entries {
                let key = index.to_ne_bytes().to_vec();
                let value = self.get(&key)?.filter(|value| value.iter().any(|byte| *byte != 0));
                all.extend(value.map(|value| Entry { key, value }));
            }
            return Ok(all);
        }
        let (key, value) = (self.layout.key as usize, self.layout.value as usize);
        let each = |key: &[u8], value: &[u8]| all.push(Entry { key: key.to_vec(), value: value.to_vec() });
        // SAFETY: sizes as the kernel told them.
        let walked = unsafe { sys::for_each_entry(self.data.fd(), key, value, each) };
        walked.map_err(self.failed("walk"))?;
        Ok(all)
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> TakeoverError + use<> {
        let path = self.path.clone();
        move |source| TakeoverError::Map { path, action, source }
    }
}

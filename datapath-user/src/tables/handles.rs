//! The maps as typed handles: single reads and writes, without rules.

mod destinations;
mod indexes;
mod memories;

use std::{io, os::fd::AsFd as _};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, IterableMap as _, LpmTrie, Map, MapData, MapError, PerCpuArray},
    sys::SyscallError,
    util::nr_cpus,
};
use datapath_common::abi::{
    Admitted, Carried, CounterRow, Endpoint, Flow, FlowKey, Fragment, FragmentKey, Limits as Bandwidth,
    PairKey, Spent,
    maps::{self, SLOTS_PER_ENDPOINT, VLANS, VipKey},
    policy::{ClassGroups, Page, ProgramRow, VerdictRow},
};

pub use self::indexes::Direct;
use super::{PolicyMaps, TablesError, errno};
use crate::{
    config::Limits,
    pin::{MapLayout, Pins},
    sys,
};

/// An ABI type in a map. `aya::Pod` and the ABI types are both foreign to this crate.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(super) struct Raw<T>(pub(super) T);

macro_rules! raw {
    ($($abi:ty),+) => { $(
        // SAFETY: `#[repr(C)]`, without implicit padding and with every bit pattern valid: the ABI's rules.
        unsafe impl aya::Pod for Raw<$abi> {}
    )+ };
}
raw!(Endpoint, FlowKey, Flow, FragmentKey, Fragment, VipKey, CounterRow, Carried);
raw!(Bandwidth, Spent);
raw!(VerdictRow, ClassGroups, ProgramRow, Page, PairKey, Admitted);

/// Handles to all maps.
pub struct Maps {
    endpoint: Array<MapData, Raw<Endpoint>>,
    subeni: Array<MapData, u32>,
    pod_if: HashMap<MapData, u32, u32>,
    pod_if_direct: Array<MapData, u32>,
    pod_ip4: HashMap<MapData, [u8; 4], u32>,
    pod_ip4_direct: Array<MapData, u32>,
    pod_ip6: HashMap<MapData, [u8; 16], u32>,
    host_dst: LpmTrie<MapData, [u8; 4], u32>,
    host_dst_bits: Array<MapData, u64>,
    vips: HashMap<MapData, Raw<VipKey>, u32>,
    flows: HashMap<MapData, Raw<FlowKey>, Raw<Flow>>,
    flow_mark: Array<MapData, u32>,
    frags: HashMap<MapData, Raw<FragmentKey>, Raw<Fragment>>,
    counters: PerCpuArray<MapData, Raw<CounterRow>>,
    /// Where counters were carried over.
    carried: Option<HashMap<MapData, u32, Raw<Carried>>>,
    limits: Array<MapData, Raw<Bandwidth>>,
    spent: Array<MapData, Raw<Spent>>,
    /// Security groups.
    pub policy: PolicyMaps,
    cpus: usize,
}

pub(super) fn failed(map: &'static str, action: &'static str) -> impl FnOnce(MapError) -> TablesError {
    move |source| TablesError::Map { map, action, source }
}

pub(super) fn found<T>(map: &'static str, result: Result<T, MapError>) -> Result<Option<T>, TablesError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(source) => Err(failed(map, "read")(source)),
    }
}

pub(super) fn gone(map: &'static str, result: Result<(), MapError>) -> Result<bool, TablesError> {
    match result {
        Ok(()) => Ok(true),
        Err(MapError::KeyNotFound) => Ok(false),
        Err(source) if errno(&source) == Some(libc::ENOENT) => Ok(false),
        Err(source) => Err(failed(map, "remove an entry of")(source)),
    }
}

/// A map by its name, as what it is.
pub(super) fn typed<T: TryFrom<Map, Error = MapError>>(
    name: &'static str,
    open: impl Fn(&'static str) -> Result<MapData, TablesError>,
) -> Result<T, TablesError> {
    Map::from_map_data(open(name)?).and_then(T::try_from).map_err(failed(name, "use"))
}

/// All keys at one time. While the kernel adds and evicts entries the walk may start over; it ends all the same.
pub(super) fn keys<K>(
    map: &'static str,
    keys: impl Iterator<Item = Result<K, MapError>>,
    entries: u32,
) -> Result<Vec<K>, TablesError> {
    keys.take(2 * entries as usize).map(|key| key.map_err(failed(map, "walk"))).collect()
}

/// All entries of a hash map that programs write.
pub(super) fn entries<K: Pod, V: Pod>(
    map: &'static str,
    hash: &HashMap<MapData, K, V>,
) -> Result<Vec<(K, V)>, TablesError> {
    // SAFETY: aya has compared the sizes of the types with the map's.
    walked(map, unsafe { sys::map_entries(hash.map().fd()) })
}

/// All entries of an array.
fn array_entries<V: Pod>(
    map: &'static str,
    array: &Array<MapData, V>,
) -> Result<impl Iterator<Item = (u32, V)> + use<V>, TablesError> {
    // SAFETY: aya has compared the size of the value with the map's; keys of arrays have 4 bytes.
    walked(map, unsafe { sys::map_entries(array.map().fd()) }).map(Vec::into_iter)
}

fn walked<T>(map: &'static str, result: io::Result<T>) -> Result<T, TablesError> {
    result.map_err(|io_error| {
        failed(map, "walk")(SyscallError { call: "bpf_map_lookup_batch", io_error }.into())
    })
}

/// Removes entries of a hash map that programs write.
pub(super) fn remove_where<K: Pod, V: Pod>(
    map: &'static str,
    hash: &mut HashMap<MapData, K, V>,
    is_it: impl Fn(&K, &V) -> bool,
) -> Result<usize, TablesError> {
    let mut removed = 0;
    for (key, _) in entries(map, hash)?.into_iter().filter(|(key, value)| is_it(key, value)) {
        // It may be another one by now.
        if found(map, hash.get(&key, 0))?.is_some_and(|value| is_it(&key, &value)) {
            removed += usize::from(gone(map, hash.remove(&key))?);
        }
    }
    Ok(removed)
}

impl Maps {
    /// Opens the pinned maps.
    ///
    /// # Errors
    ///
    /// When one is missing or cannot be opened.
    pub fn open(pins: &Pins) -> Result<Self, TablesError> {
        let open = |map| match MapData::from_pin(pins.map(map)) {
            Ok(data) => Ok(data),
            Err(source) if errno(&source) == Some(libc::ENOENT) => Err(TablesError::Missing {
                map,
                place: pins.maps_dir().display().to_string(),
                hint: "no agent has run with this pin_dir; start `eniway agent`",
            }),
            Err(source) => Err(failed(map, "open")(source)),
        };
        let maps = Self::build(open)?;
        let carried = match typed(maps::CARRIED, open) {
            Ok(carried) => Some(carried),
            Err(TablesError::Missing { .. }) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { carried, ..maps })
    }

    /// Handles to the maps of a loaded object, pinned or not.
    ///
    /// # Errors
    ///
    /// When the object lacks one.
    pub fn of(ebpf: &Ebpf) -> Result<Self, TablesError> {
        Self::build(|name| {
            let data = ebpf.map(name).and_then(map_data).ok_or(TablesError::Missing {
                map: name,
                place: "the loaded object".to_owned(),
                hint: "the object was built from other sources than this program",
            })?;
            let fd = data
                .fd()
                .as_fd()
                .try_clone_to_owned()
                .map_err(|error| failed(name, "open")(MapError::IoError(error)))?;
            MapData::from_fd(fd).map_err(failed(name, "open"))
        })
    }

    /// Maps without programs, for tests and benchmarks of the tables themselves. `FLOWS` and `FRAGS` are plain hash
    /// maps here: nothing is evicted.
    ///
    /// # Errors
    ///
    /// When the kernel refuses one.
    pub fn create(limits: &Limits) -> Result<Self, TablesError> {
        const NO_PREALLOC: u32 = 1;
        let pods = limits.endpoints;
        let make = "create";
        Ok(Self {
            endpoint: Array::create(pods * SLOTS_PER_ENDPOINT + 1, 0)
                .map_err(failed(maps::ENDPOINT, make))?,
            subeni: Array::create(maps::MAX_PARENTS * VLANS, 0).map_err(failed(maps::SUBENI, make))?,
            pod_if: HashMap::create(pods, 0).map_err(failed(maps::POD_IF, make))?,
            pod_if_direct: Array::create(maps::DIRECT, 0).map_err(failed(maps::POD_IF_DIRECT, make))?,
            pod_ip4: HashMap::create(pods, 0).map_err(failed(maps::POD_IP4, make))?,
            pod_ip4_direct: Array::create(maps::DIRECT, 0).map_err(failed(maps::POD_IP4_DIRECT, make))?,
            pod_ip6: HashMap::create(pods, 0).map_err(failed(maps::POD_IP6, make))?,
            host_dst: LpmTrie::create(maps::MAX_HOST_DST, NO_PREALLOC)
                .map_err(failed(maps::HOST_DST, make))?,
            host_dst_bits: Array::create(maps::HOST_DST_WORDS, 0)
                .map_err(failed(maps::HOST_DST_BITS, make))?,
            vips: HashMap::create(maps::MAX_VIPS, 0).map_err(failed(maps::VIPS, make))?,
            flows: HashMap::create(limits.flows, 0).map_err(failed(maps::FLOWS, make))?,
            flow_mark: Array::create(pods + 1, 0).map_err(failed(maps::FLOW_MARK, make))?,
            frags: HashMap::create(maps::MAX_FRAGS, 0).map_err(failed(maps::FRAGS, make))?,
            counters: PerCpuArray::create(pods + 1, 0).map_err(failed(maps::COUNTERS, make))?,
            carried: None,
            limits: Array::create(pods + 1, 0).map_err(failed(maps::LIMITS, make))?,
            spent: Array::create(pods + 1, 0).map_err(failed(maps::SPENT, make))?,
            policy: PolicyMaps::create(limits)?,
            cpus: cpus()?,
        })
    }

    fn build(open: impl Fn(&'static str) -> Result<MapData, TablesError>) -> Result<Self, TablesError> {
        Ok(Self {
            endpoint: typed(maps::ENDPOINT, &open)?,
            subeni: typed(maps::SUBENI, &open)?,
            pod_if: typed(maps::POD_IF, &open)?,
            pod_if_direct: typed(maps::POD_IF_DIRECT, &open)?,
            pod_ip4: typed(maps::POD_IP4, &open)?,
            pod_ip4_direct: typed(maps::POD_IP4_DIRECT, &open)?,
            pod_ip6: typed(maps::POD_IP6, &open)?,
            host_dst: typed(maps::HOST_DST, &open)?,
            host_dst_bits: typed(maps::HOST_DST_BITS, &open)?,
            vips: typed(maps::VIPS, &open)?,
            flows: typed(maps::FLOWS, &open)?,
            flow_mark: typed(maps::FLOW_MARK, &open)?,
            frags: typed(maps::FRAGS, &open)?,
            counters: typed(maps::COUNTERS, &open)?,
            carried: None,
            limits: typed(maps::LIMITS, &open)?,
            spent: typed(maps::SPENT, &open)?,
            policy: PolicyMaps::build(open)?,
            cpus: cpus()?,
        })
    }

    /// Slots, the unused slot 0 included.
    pub fn slots(&self) -> u32 {
        self.endpoint.len()
    }

    /// Ids, the 0 of "no pod" included.
    pub fn ids(&self) -> u32 {
        self.flow_mark.len()
    }

    /// The record in a slot; zero when the slot is unused.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn record(&self, slot: u32) -> Result<Endpoint, TablesError> {
        self.endpoint.get(&slot, 0).map(|raw| raw.0).map_err(failed(maps::ENDPOINT, "read"))
    }

    /// Writes a record as it is. No index may point at the slot.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn set_record(&mut self, slot: u32, record: &Endpoint) -> Result<(), TablesError> {
        self.endpoint.set(slot, Raw(*record), 0).map_err(failed(maps::ENDPOINT, "write"))
    }
}

fn cpus() -> Result<usize, TablesError> {
    nr_cpus().map_err(|(file, source)| TablesError::Cpus { file, source })
}

/// What a map is opened by, whatever its kind.
pub(crate) fn map_data(map: &Map) -> Option<&MapData> {
    match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::LpmTrie(data)
        | Map::PerCpuArray(data) => Some(data),
        _ => None,
    }
}

/// The layout of a map of a loaded object.
pub(crate) fn layout_of(map: &Map) -> Result<MapLayout, MapError> {
    let data = map_data(map).ok_or(MapError::InvalidMapType { map_type: 0 })?;
    MapLayout::of(&data.info()?)
}

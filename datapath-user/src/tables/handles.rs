//! The maps as typed handles: single reads and writes, without rules.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::AsFd as _,
};

use aya::{
    Ebpf, Pod,
    maps::{
        Array, HashMap, IterableMap as _, LpmTrie, Map, MapData, MapError, PerCpuArray, PerCpuValues,
        lpm_trie::Key,
    },
    sys::SyscallError,
    util::nr_cpus,
};
use datapath_common::abi::{
    Admitted, Carried, CounterRow, Endpoint, Flow, FlowKey, Fragment, FragmentKey, Limits as Bandwidth,
    PairKey, Spent,
    maps::{self, SLOTS_PER_ENDPOINT, VLANS, VipKey},
    policy::{ClassGroups, Page, ProgramRow, VerdictRow},
};
use ipnet::Ipv4Net;

use super::{Index, Live, PolicyMaps, TablesError, direct, errno};
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

/// A direct table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direct {
    /// By interface index.
    Interface,
    /// By IPv4 address.
    Ipv4,
}

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
            Ok(data) => Ok(Some(data)),
            Err(source) if errno(&source) == Some(libc::ENOENT) => Ok(None),
            Err(source) => Err(failed(map, "open")(source)),
        };
        let maps = Self::build(|map| {
            open(map)?.ok_or_else(|| TablesError::Missing {
                map,
                place: pins.maps_dir().display().to_string(),
                hint: "no agent has run with this pin_dir; start `eniway agent`",
            })
        })?;
        let carried = match open(maps::CARRIED)? {
            Some(data) => {
                let map = Map::from_map_data(data).and_then(HashMap::try_from);
                Some(map.map_err(failed(maps::CARRIED, "use"))?)
            }
            None => None,
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
        fn typed<T: TryFrom<Map, Error = MapError>>(
            name: &'static str,
            data: MapData,
        ) -> Result<T, TablesError> {
            Map::from_map_data(data).and_then(T::try_from).map_err(failed(name, "use"))
        }
        Ok(Self {
            endpoint: typed(maps::ENDPOINT, open(maps::ENDPOINT)?)?,
            subeni: typed(maps::SUBENI, open(maps::SUBENI)?)?,
            pod_if: typed(maps::POD_IF, open(maps::POD_IF)?)?,
            pod_if_direct: typed(maps::POD_IF_DIRECT, open(maps::POD_IF_DIRECT)?)?,
            pod_ip4: typed(maps::POD_IP4, open(maps::POD_IP4)?)?,
            pod_ip4_direct: typed(maps::POD_IP4_DIRECT, open(maps::POD_IP4_DIRECT)?)?,
            pod_ip6: typed(maps::POD_IP6, open(maps::POD_IP6)?)?,
            host_dst: typed(maps::HOST_DST, open(maps::HOST_DST)?)?,
            host_dst_bits: typed(maps::HOST_DST_BITS, open(maps::HOST_DST_BITS)?)?,
            vips: typed(maps::VIPS, open(maps::VIPS)?)?,
            flows: typed(maps::FLOWS, open(maps::FLOWS)?)?,
            flow_mark: typed(maps::FLOW_MARK, open(maps::FLOW_MARK)?)?,
            frags: typed(maps::FRAGS, open(maps::FRAGS)?)?,
            counters: typed(maps::COUNTERS, open(maps::COUNTERS)?)?,
            carried: None,
            limits: typed(maps::LIMITS, open(maps::LIMITS)?)?,
            spent: typed(maps::SPENT, open(maps::SPENT)?)?,
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

    /// The slot that an index names; 0 = none.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn slot(&self, key: Index) -> Result<u32, TablesError> {
        let slot = match key {
            Index::Vlan { parent, vid } => {
                Some(self.subeni.get(&subeni_index(parent, vid), 0).map_err(failed(maps::SUBENI, "read"))?)
            }
            Index::Ipv4(address) => found(maps::POD_IP4, self.pod_ip4.get(&address, 0))?,
            Index::Ipv6(address) => found(maps::POD_IP6, self.pod_ip6.get(&address, 0))?,
            Index::Interface(ifindex) => found(maps::POD_IF, self.pod_if.get(&ifindex, 0))?,
        };
        Ok(slot.unwrap_or(0))
    }

    /// Points an index at a slot.
    ///
    /// # Errors
    ///
    /// When the map cannot be written, or is full.
    pub fn set_slot(&mut self, key: Index, slot: u32) -> Result<(), TablesError> {
        match key {
            Index::Vlan { parent, vid } => {
                self.subeni.set(subeni_index(parent, vid), slot, 0).map_err(failed(maps::SUBENI, "write"))
            }
            Index::Ipv4(address) => {
                self.pod_ip4.insert(address, slot, 0).map_err(failed(maps::POD_IP4, "write"))?;
                let entry = self.ipv4_entry(address)?;
                let now = direct::pointed(entry, slot, |slot| {
                    self.record(slot).is_ok_and(|record| record.ipv4 == address)
                });
                self.set_ipv4_entry(address, now)
            }
            Index::Ipv6(address) => {
                self.pod_ip6.insert(address, slot, 0).map_err(failed(maps::POD_IP6, "write"))
            }
            Index::Interface(ifindex) => {
                self.pod_if.insert(ifindex, slot, 0).map_err(failed(maps::POD_IF, "write"))?;
                let entry = self.interface_entry(ifindex)?;
                let now = direct::pointed(entry, slot, |slot| {
                    self.record(slot).is_ok_and(|record| record.ifindex == ifindex)
                });
                self.set_interface_entry(ifindex, now)
            }
        }
    }

    /// Removes an index if it points at `slot`. Returns whether it did.
    ///
    /// # Errors
    ///
    /// When the map cannot be read or written.
    pub fn clear_slot(&mut self, key: Index, slot: u32) -> Result<bool, TablesError> {
        if self.slot(key)? != slot {
            return Ok(false);
        }
        match key {
            Index::Vlan { .. } => self.set_slot(key, 0).map(|()| true),
            Index::Ipv4(address) => {
                let entry = self.ipv4_entry(address)?;
                self.set_ipv4_entry(address, direct::cleared(entry, slot))?;
                gone(maps::POD_IP4, self.pod_ip4.remove(&address))
            }
            Index::Ipv6(address) => gone(maps::POD_IP6, self.pod_ip6.remove(&address)),
            Index::Interface(ifindex) => {
                let entry = self.interface_entry(ifindex)?;
                self.set_interface_entry(ifindex, direct::cleared(entry, slot))?;
                gone(maps::POD_IF, self.pod_if.remove(&ifindex))
            }
        }
    }

    fn ipv4_entry(&self, address: [u8; 4]) -> Result<u32, TablesError> {
        let entry = self.pod_ip4_direct.get(&maps::direct_ipv4(address), 0);
        entry.map_err(failed(maps::POD_IP4_DIRECT, "read"))
    }

    fn set_ipv4_entry(&mut self, address: [u8; 4], entry: u32) -> Result<(), TablesError> {
        let set = self.pod_ip4_direct.set(maps::direct_ipv4(address), entry, 0);
        set.map_err(failed(maps::POD_IP4_DIRECT, "write"))
    }

    fn interface_entry(&self, ifindex: u32) -> Result<u32, TablesError> {
        let entry = self.pod_if_direct.get(&maps::direct_ifindex(ifindex), 0);
        entry.map_err(failed(maps::POD_IF_DIRECT, "read"))
    }

    fn set_interface_entry(&mut self, ifindex: u32, entry: u32) -> Result<(), TablesError> {
        let set = self.pod_if_direct.set(maps::direct_ifindex(ifindex), entry, 0);
        set.map_err(failed(maps::POD_IF_DIRECT, "write"))
    }

    /// Makes the direct tables what `POD_IF` and `POD_IP4` say: after an agent that was killed within an operation, and so that
    /// entries are no longer shared that were. Returns how many entries changed.
    ///
    /// # Errors
    ///
    /// When a map cannot be read or written.
    pub fn renew_direct(&mut self) -> Result<usize, TablesError> {
        fn renew(
            map: &'static str,
            table: &mut Array<MapData, u32>,
            wanted: &std::collections::HashMap<u32, u32>,
        ) -> Result<usize, TablesError> {
            let mut changes = 0;
            for (entry, slot) in array_entries(map, table)? {
                let wanted = wanted.get(&entry).copied().unwrap_or(0);
                if slot != wanted {
                    table.set(entry, wanted, 0).map_err(failed(map, "write"))?;
                    changes += 1;
                }
            }
            Ok(changes)
        }
        let (mut interfaces, mut addresses) = (Vec::new(), Vec::new());
        for ifindex in keys(maps::POD_IF, self.pod_if.keys(), self.ids())? {
            interfaces.push((maps::direct_ifindex(ifindex), self.slot(Index::Interface(ifindex))?));
        }
        for address in keys(maps::POD_IP4, self.pod_ip4.keys(), self.ids())? {
            addresses.push((maps::direct_ipv4(address), self.slot(Index::Ipv4(address))?));
        }
        let by_if = direct::all(interfaces.into_iter());
        let by_ip4 = direct::all(addresses.into_iter());
        Ok(renew(maps::POD_IF_DIRECT, &mut self.pod_if_direct, &by_if)?
            + renew(maps::POD_IP4_DIRECT, &mut self.pod_ip4_direct, &by_ip4)?)
    }

    /// The entries of a direct table that are not 0.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn direct_entries(&self, table: Direct) -> Result<Vec<(u32, u32)>, TablesError> {
        let (map, array) = match table {
            Direct::Interface => (maps::POD_IF_DIRECT, &self.pod_if_direct),
            Direct::Ipv4 => (maps::POD_IP4_DIRECT, &self.pod_ip4_direct),
        };
        array_entries(map, array).map(|all| all.filter(|(_, slot)| *slot != 0).collect())
    }

    /// Whether the bits of `HOST_DST_BITS` are those of these prefixes.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn host_dst_bits_are_of<'a>(
        &self,
        prefixes: impl Iterator<Item = &'a Ipv4Net>,
    ) -> Result<bool, TablesError> {
        let wanted = direct::host_dst_bits(prefixes);
        let mut found = array_entries(maps::HOST_DST_BITS, &self.host_dst_bits)?;
        Ok(found.all(|(i, word)| wanted.get(&i).copied().unwrap_or(0) == word))
    }

    /// Every index that is set, with its slot.
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    pub fn indexes(&self) -> Result<Vec<(Index, u32)>, TablesError> {
        let mut all = Vec::new();
        for (at, slot) in array_entries(maps::SUBENI, &self.subeni)?.filter(|(_, slot)| *slot != 0) {
            let key = Index::Vlan { parent: (at / VLANS) as u16, vid: (at % VLANS) as u16 };
            all.push((key, slot));
        }
        let pods = self.ids();
        let by_ip4 = keys(maps::POD_IP4, self.pod_ip4.keys(), pods)?.into_iter().map(Index::Ipv4);
        let by_ip6 = keys(maps::POD_IP6, self.pod_ip6.keys(), pods)?.into_iter().map(Index::Ipv6);
        let by_if = keys(maps::POD_IF, self.pod_if.keys(), pods)?.into_iter().map(Index::Interface);
        for key in by_ip4.chain(by_ip6).chain(by_if) {
            all.push((key, self.slot(key)?));
        }
        Ok(all)
    }

    /// All pods in the tables: every record that its interface's index points at.
    ///
    /// # Errors
    ///
    /// When a map cannot be read.
    pub fn pods(&self) -> Result<Vec<Live>, TablesError> {
        let mut pods = BTreeMap::<u64, Live>::new();
        for ifindex in keys(maps::POD_IF, self.pod_if.keys(), self.ids())? {
            let slot = self.slot(Index::Interface(ifindex))?;
            if slot == 0 || slot >= self.slots() {
                continue;
            }
            let record = self.record(slot)?;
            if record.owner == 0 || record.ifindex != ifindex || !(1..self.ids()).contains(&record.id) {
                continue;
            }
            let mut missing = 0;
            for key in Index::of(&record) {
                missing += usize::from(self.slot(key)? != slot);
            }
            let live = Live { slot, record, missing };
            // Two records of one pod are what a change leaves that was cut short: the one that packets find counts.
            pods.entry(record.owner)
                .and_modify(|known| {
                    if live.missing < known.missing {
                        *known = live;
                    }
                })
                .or_insert(live);
        }
        let mut pods: Vec<_> = pods.into_values().collect();
        pods.sort_unstable_by_key(|pod| pod.record.id);
        pods.dedup_by_key(|pod| pod.record.id);
        Ok(pods)
    }

    /// Flags of the longest prefix that holds the address; 0 = none.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn host_dst(&self, address: [u8; 4]) -> Result<u32, TablesError> {
        Ok(found(maps::HOST_DST, self.host_dst.get(&Key::new(32, address), 0))?.unwrap_or(0))
    }

    /// All prefixes that are not left to the wire, with their flags.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn host_dsts(&self) -> Result<BTreeMap<Ipv4Net, u32>, TablesError> {
        let mut all = BTreeMap::new();
        for key in keys(maps::HOST_DST, self.host_dst.keys(), maps::MAX_HOST_DST)? {
            let Ok(prefix) = Ipv4Net::new(key.data().into(), key.prefix_len() as u8) else { continue };
            if let Some(flags) = found(maps::HOST_DST, self.host_dst.get(&key, 0))? {
                all.insert(prefix, flags);
            }
        }
        Ok(all)
    }

    /// Makes the prefixes exactly these. Returns how many entries changed.
    ///
    /// # Errors
    ///
    /// When the map cannot be written, or is full.
    pub fn set_host_dsts(&mut self, wanted: &BTreeMap<Ipv4Net, u32>) -> Result<usize, TablesError> {
        let key = |prefix: &Ipv4Net| Key::new(prefix.prefix_len().into(), prefix.network().octets());
        let wanted: BTreeMap<Ipv4Net, u32> =
            wanted.iter().map(|(net, flags)| (net.trunc(), *flags)).collect();
        let known = self.host_dsts()?;
        // The programs ask about every address that a prefix holds, before it comes and until it is gone.
        let both = direct::host_dst_bits(known.keys().chain(wanted.keys()));
        self.set_host_dst_bits(&both)?;
        let mut changes = 0;
        for (prefix, flags) in &wanted {
            if known.get(prefix) != Some(flags) {
                self.host_dst.insert(&key(prefix), flags, 0).map_err(failed(maps::HOST_DST, "write"))?;
                changes += 1;
            }
        }
        for prefix in known.keys().filter(|prefix| !wanted.contains_key(prefix)) {
            changes += usize::from(gone(maps::HOST_DST, self.host_dst.remove(&key(prefix)))?);
        }
        if known.keys().any(|prefix| !wanted.contains_key(prefix)) {
            let wanted = direct::host_dst_bits(wanted.keys());
            let rest = both.into_keys().map(|entry| (entry, wanted.get(&entry).copied().unwrap_or(0)));
            self.set_host_dst_bits(&rest.collect())?;
        }
        Ok(changes)
    }

    fn set_host_dst_bits(&mut self, words: &BTreeMap<u32, u64>) -> Result<(), TablesError> {
        for (entry, word) in words {
            let known = self.host_dst_bits.get(entry, 0).map_err(failed(maps::HOST_DST_BITS, "read"))?;
            if known != *word {
                self.host_dst_bits.set(*entry, *word, 0).map_err(failed(maps::HOST_DST_BITS, "write"))?;
            }
        }
        Ok(())
    }

    /// All virtual addresses of load balancers.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn vips(&self) -> Result<BTreeSet<([u8; 4], u16, u8)>, TablesError> {
        let keys = keys(maps::VIPS, self.vips.keys(), maps::MAX_VIPS)?;
        Ok(keys.into_iter().map(|Raw(key)| (key.addr, key.port, key.proto)).collect())
    }

    /// Whether a load balancer serves (address, port, protocol).
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn is_vip(&self, addr: [u8; 4], port: u16, proto: u8) -> Result<bool, TablesError> {
        let key = Raw(VipKey { addr, port, proto, pad: 0 });
        Ok(found(maps::VIPS, self.vips.get(&key, 0))?.is_some())
    }

    /// Makes the virtual addresses exactly these (address, port, protocol). Returns how many entries changed.
    ///
    /// # Errors
    ///
    /// When the map cannot be written, or is full.
    pub fn set_vips(&mut self, wanted: &BTreeSet<([u8; 4], u16, u8)>) -> Result<usize, TablesError> {
        let key = |&(addr, port, proto): &([u8; 4], u16, u8)| Raw(VipKey { addr, port, proto, pad: 0 });
        let known = self.vips()?;
        for vip in known.difference(wanted) {
            gone(maps::VIPS, self.vips.remove(&key(vip)))?;
        }
        for vip in wanted.difference(&known) {
            self.vips.insert(key(vip), 1, 0).map_err(failed(maps::VIPS, "write"))?;
        }
        Ok(known.symmetric_difference(wanted).count())
    }

    /// The memory of a flow.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn flow(&self, key: &FlowKey) -> Result<Option<Flow>, TablesError> {
        Ok(found(maps::FLOWS, self.flows.get(&Raw(*key), 0))?.map(|raw| raw.0))
    }

    /// All remembered flows.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn flows(&self) -> Result<Vec<(FlowKey, Flow)>, TablesError> {
        Ok(entries(maps::FLOWS, &self.flows)?.into_iter().map(|(key, flow)| (key.0, flow.0)).collect())
    }

    /// Remembers a flow, as the kernel programs do, and marks its pod.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn set_flow(&mut self, key: &FlowKey, flow: &Flow) -> Result<(), TablesError> {
        self.set_mark(key.id, 1)?;
        self.flows.insert(Raw(*key), Raw(*flow), 0).map_err(failed(maps::FLOWS, "write"))
    }

    /// Where the first fragment of a datagram went.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn fragment(&self, key: &FragmentKey) -> Result<Option<Fragment>, TablesError> {
        Ok(found(maps::FRAGS, self.frags.get(&Raw(*key), 0))?.map(|raw| raw.0))
    }

    /// Remembers a first fragment, as the kernel programs do, and marks its pod.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn set_fragment(&mut self, key: &FragmentKey, fragment: &Fragment) -> Result<(), TablesError> {
        self.set_mark(key.id, 1)?;
        self.frags.insert(Raw(*key), Raw(*fragment), 0).map_err(failed(maps::FRAGS, "write"))
    }

    /// Whether a pod has, or had, a remembered flow or fragment.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn marked(&self, id: u32) -> Result<bool, TablesError> {
        Ok(self.flow_mark.get(&id, 0).map_err(failed(maps::FLOW_MARK, "read"))? != 0)
    }

    fn set_mark(&mut self, id: u32, mark: u32) -> Result<(), TablesError> {
        self.flow_mark.set(id, mark, 0).map_err(failed(maps::FLOW_MARK, "write"))
    }

    /// A pod's counters (id 0: packets without a pod), summed over the CPUs, with what was carried over.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn counters(&self, id: u32) -> Result<CounterRow, TablesError> {
        let rows = self.counters.get(&id, 0).map_err(failed(maps::COUNTERS, "read"))?;
        let mut sum = CounterRow::ZERO;
        rows.iter().for_each(|Raw(row)| sum.add(row));
        if let Some(carried) = &self.carried
            && let Some(Raw(carried)) = found(maps::CARRIED, carried.get(&id, 0))?
        {
            sum.add(&carried.base);
            sum.add(&carried.pending);
        }
        Ok(sum)
    }

    /// Counters of all ids that counted anything.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn all_counters(&self) -> Result<Vec<(u32, CounterRow)>, TablesError> {
        let mut all = Vec::new();
        for id in 0..self.ids() {
            let row = self.counters(id)?;
            if row != CounterRow::ZERO {
                all.push((id, row));
            }
        }
        Ok(all)
    }

    /// Sets a pod's counters to zero on all CPUs.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn reset_counters(&mut self, id: u32) -> Result<(), TablesError> {
        if let Some(carried) = &mut self.carried {
            gone(maps::CARRIED, carried.remove(&id))?;
        }
        let zeros = PerCpuValues::try_from(vec![Raw(CounterRow::ZERO); self.cpus])
            .map_err(|source| TablesError::Cpus { file: "the number of values", source })?;
        self.counters.set(id, zeros, 0).map_err(failed(maps::COUNTERS, "write"))
    }

    /// Forgets which doors flows with an address came in by, and where fragments to it went: another pod may come to have it.
    ///
    /// # Errors
    ///
    /// When a map cannot be written.
    pub fn forget_remote(&mut self, address: [u8; 4]) -> Result<(), TablesError> {
        remove_where(maps::FLOWS, &mut self.flows, |key, _| key.0.remote == address)?;
        remove_where(maps::FRAGS, &mut self.frags, |key, _| key.0.dst == address)?;
        Ok(())
    }

    /// Forgets the flows and fragments of an id, admitted flows among them.
    ///
    /// # Errors
    ///
    /// When a map cannot be written.
    pub fn forget_flows(&mut self, id: u32) -> Result<(), TablesError> {
        if self.marked(id)? {
            remove_where(maps::FLOWS, &mut self.flows, |key, _| key.0.id == id)?;
            remove_where(maps::FRAGS, &mut self.frags, |key, _| key.0.id == id)?;
            self.set_mark(id, 0)?;
        }
        self.policy.forget(id)
    }

    /// The limits of bandwidth of an id.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn limits(&self, id: u32) -> Result<Bandwidth, TablesError> {
        self.limits.get(&id, 0).map(|raw| raw.0).map_err(failed(maps::LIMITS, "read"))
    }

    /// How far the limits of an id are used up.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn spent(&self, id: u32) -> Result<Spent, TablesError> {
        self.spent.get(&id, 0).map(|raw| raw.0).map_err(failed(maps::SPENT, "read"))
    }

    /// Says how far the limits of an id are used up, as the kernel programs do.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn set_spent(&mut self, id: u32, spent: &Spent) -> Result<(), TablesError> {
        self.spent.set(id, Raw(*spent), 0).map_err(failed(maps::SPENT, "write"))
    }

    /// Limits an id. What changes begins anew, with the whole burst: at a lower rate than now what was spent would take ages
    /// to be paid for. Returns whether anything changed.
    ///
    /// # Errors
    ///
    /// When a map cannot be read or written.
    pub fn set_limits(&mut self, id: u32, wanted: &Bandwidth) -> Result<bool, TablesError> {
        let known = self.limits(id)?;
        if known == *wanted {
            return Ok(false);
        }
        self.limits.set(id, Raw(*wanted), 0).map_err(failed(maps::LIMITS, "write"))?;
        if (known.ingress, known.egress) != (wanted.ingress, wanted.egress) {
            self.set_spent(id, &Spent::ZERO)?;
        }
        Ok(true)
    }

    /// Forgets everything about an id: flows, admitted flows, fragments, marks, limits, counters.
    ///
    /// # Errors
    ///
    /// When a map cannot be written.
    pub fn forget(&mut self, id: u32) -> Result<(), TablesError> {
        self.forget_flows(id)?;
        self.limits.set(id, Raw(Bandwidth::ZERO), 0).map_err(failed(maps::LIMITS, "write"))?;
        self.set_spent(id, &Spent::ZERO)?;
        self.reset_counters(id)
    }
}

fn subeni_index(parent: u16, vid: u16) -> u32 {
    u32::from(parent) * VLANS + u32::from(vid)
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

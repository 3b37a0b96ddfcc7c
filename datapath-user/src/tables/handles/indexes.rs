//! By what packets find a record: the index maps, and the direct tables beside them.

use std::collections::{BTreeMap, HashMap};

use aya::maps::{Array, MapData};
use datapath_common::abi::maps::{self, VLANS};

use super::{
    super::{Index, Live, TablesError, direct},
    Maps, array_entries, failed, found, gone, keys,
};

/// A direct table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direct {
    /// By interface index.
    Interface,
    /// By IPv4 address.
    Ipv4,
}

impl Maps {
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
            wanted: &HashMap<u32, u32>,
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
}

fn subeni_index(parent: u16, vid: u16) -> u32 {
    u32::from(parent) * VLANS + u32::from(vid)
}

//! What is known of destinations that are no pods: those that are not left to the wire, and virtual addresses.

use std::collections::{BTreeMap, BTreeSet};

use aya::maps::lpm_trie::Key;
use datapath_common::abi::maps::{self, VipKey};
use ipnet::Ipv4Net;

use super::{
    super::{TablesError, direct},
    Maps, Raw, array_entries, failed, found, gone, keys,
};

impl Maps {
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
}

//! The arrays that spare the programs a look-up in a hash map or trie ([`maps::POD_IF_DIRECT`], [`maps::POD_IP4_DIRECT`],
//! [`maps::HOST_DST_BITS`]): what they have to hold. The maps beside them are the truth; each of these follows from its one.

use std::collections::{BTreeMap, HashMap};

use datapath_common::abi::maps::{self, SHARED};
use ipnet::Ipv4Net;

/// What an entry becomes as a key that belongs there is pointed at `slot`. `same_key` says whether a slot's record is found
/// by that key.
pub fn pointed(entry: u32, slot: u32, same_key: impl FnOnce(u32) -> bool) -> u32 {
    if entry == 0 || entry == slot || entry != SHARED && same_key(entry) { slot } else { SHARED }
}

/// What an entry becomes as a key that belongs there and that pointed at `slot` goes. A shared one stays so, for nobody
/// knows how many keys are left.
pub fn cleared(entry: u32, slot: u32) -> u32 {
    if entry == slot { 0 } else { entry }
}

/// All entries that are not 0, given the entry and the slot of every key.
pub fn all(keys: impl Iterator<Item = (u32, u32)>) -> HashMap<u32, u32> {
    let mut entries = HashMap::new();
    for (entry, slot) in keys {
        entries.entry(entry).and_modify(|known| *known = SHARED).or_insert(slot);
    }
    entries
}

/// The words of `HOST_DST_BITS` that are not 0 for these prefixes.
pub fn host_dst_bits<'a>(prefixes: impl Iterator<Item = &'a Ipv4Net>) -> BTreeMap<u32, u64> {
    /// Length of a prefix that has one bit, and of one that has a word; shorter ones than the last have all of them.
    const BIT: u32 = 30;
    const WORD: u32 = 24;
    const ALL: u32 = 8;
    let mut words = BTreeMap::new();
    for prefix in prefixes {
        let len = u32::from(prefix.prefix_len());
        let first = u32::from(prefix.network());
        let (step, count) = if len > WORD {
            (32 - BIT, 1 << (BIT - len.min(BIT)))
        } else {
            (32 - WORD, 1 << (WORD - len.max(ALL)))
        };
        for i in 0..count {
            let (word, bit) = maps::host_dst_bit(first.wrapping_add(i << step).to_be_bytes());
            *words.entry(word).or_insert(0) |= if len > WORD { bit } else { u64::MAX };
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_share_an_entry() {
        assert_eq!(pointed(0, 5, |_| false), 5);
        assert_eq!(pointed(5, 5, |_| false), 5);
        assert_eq!(pointed(4, 5, |slot| slot == 4), 5);
        assert_eq!(pointed(4, 5, |_| false), SHARED);
        assert_eq!(pointed(SHARED, 5, |_| true), SHARED);
        assert_eq!(cleared(5, 5), 0);
        assert_eq!(cleared(6, 5), 6);
        assert_eq!(cleared(SHARED, 5), SHARED);
        assert_eq!(all([(1, 5), (2, 6), (1, 7)].into_iter()), HashMap::from([(1, SHARED), (2, 6)]));
    }

    /// Every address that a prefix holds has its bit set, and not many others.
    #[test]
    fn bits_are_those_of_the_prefixes() {
        let set = |prefix: &str| -> u32 {
            let net: Ipv4Net = prefix.parse().unwrap();
            let words = host_dst_bits([net].iter());
            for address in [net.network(), net.broadcast()] {
                let (word, bit) = maps::host_dst_bit(address.octets());
                assert_ne!(words[&word] & bit, 0, "{address} of {prefix}");
            }
            words.values().map(|word| word.count_ones()).sum()
        };
        assert_eq!(set("10.247.0.0/16"), 64 << 8);
        assert_eq!(set("10.1.0.167/32"), 1);
        assert_eq!(set("10.1.0.164/30"), 1);
        assert_eq!(set("10.1.0.160/29"), 2);
        assert_eq!(set("10.1.0.128/25"), 32);
        assert_eq!(set("10.1.2.0/23"), 128);
        assert_eq!(set("255.255.255.0/24"), 64);
        assert_eq!(set("10.0.0.0/8"), 64 << 16);
        assert_eq!(set("0.0.0.0/0"), 64 << 16);
    }

    /// The node has an address in the subnet of its pods.
    #[test]
    fn neighbours_of_a_prefix_are_not_asked_for() {
        let node: Ipv4Net = "10.1.16.11/32".parse().unwrap();
        let words = host_dst_bits([node].iter());
        let asked = |last| {
            let (word, bit) = maps::host_dst_bit([10, 1, 16, last]);
            words.get(&word).is_some_and(|bits| bits & bit != 0)
        };
        assert_eq!((0..=255).filter(|last| asked(*last)).collect::<Vec<u8>>(), [8, 9, 10, 11]);
    }
}

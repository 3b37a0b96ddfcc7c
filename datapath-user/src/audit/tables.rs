//! The maps, against what the agent wrote to them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use datapath_common::abi::{
    Endpoint,
    maps::{self, SHARED},
};
use ipnet::Ipv4Net;

use super::{Checks, Expected, Kind, LiveRecord};
use crate::{
    net::Mac,
    tables::{Direct, Index, Maps, TablesError},
};

pub(super) fn checks(expected: &Expected, maps: &Maps) -> Result<Checks, TablesError> {
    let mut checks = Checks::default();
    let live: Vec<LiveRecord> = expected.pods.iter().filter_map(|pod| pod.live).collect();
    let mut known: HashMap<Index, u32> = HashMap::new();
    for LiveRecord { slot, record } in &live {
        check_record(&mut checks, *slot, record, &maps.record(*slot)?);
        known.extend(Index::of(record).map(|key| (key, *slot)));
    }
    let mut found: HashMap<Index, u32> = maps.indexes()?.into_iter().collect();
    for (key, slot) in &known {
        let text = |slot: u32| if slot == 0 { "none".to_owned() } else { format!("slot {slot}") };
        let there = found.remove(key).unwrap_or(0);
        checks.equal(Kind::Map, format_args!("{} of {key}", map_of(*key)), text(*slot), text(there));
    }
    for (key, slot) in found {
        let what = format!("{} of {key}", map_of(key));
        checks.holds(false, Kind::Map, what, "no entry", format_args!("slot {slot}"));
    }
    check_direct(&mut checks, &known, maps)?;
    check_host_dsts(&mut checks, expected, maps)?;
    if let Some(vips) = &expected.vips {
        let wanted: BTreeSet<_> = vips.iter().copied().collect();
        let found = maps.vips()?;
        checks.done += wanted.len();
        let text = |(address, port, protocol): ([u8; 4], u16, u8)| {
            format!("{}:{port} of protocol {protocol}", std::net::Ipv4Addr::from(address))
        };
        for vip in wanted.difference(&found) {
            checks.holds(false, Kind::Map, "VIPS", text(*vip), "no entry");
        }
        for vip in found.difference(&wanted) {
            checks.holds(false, Kind::Map, "VIPS", "no entry", text(*vip));
        }
    }
    if let Some(policy) = &expected.policy {
        let found = maps.policy.digest(policy)?;
        for ((map, wanted), (_, found)) in policy.parts().into_iter().zip(found.parts()) {
            checks.equal(Kind::Map, map, format!("{wanted:016x}"), format!("{found:016x}"));
        }
    }
    Ok(checks)
}

fn map_of(key: Index) -> &'static str {
    match key {
        Index::Vlan { .. } => maps::SUBENI,
        Index::Ipv4(_) => maps::POD_IP4,
        Index::Ipv6(_) => maps::POD_IP6,
        Index::Interface(_) => maps::POD_IF,
    }
}

/// Field by field: whoever has to find out who wrote it wants to know what.
fn check_record(checks: &mut Checks, slot: u32, wanted: &Endpoint, found: &Endpoint) {
    fn fields(record: &Endpoint) -> [(&'static str, String); 17] {
        let ipv4 = |address: [u8; 4]| std::net::Ipv4Addr::from(address).to_string();
        let ipv6 = |address: [u8; 16]| std::net::Ipv6Addr::from(address).to_string();
        let Endpoint { owner, id, generation, ifindex, parent_ifindex, policy_id, flags, .. } = record;
        [
            ("owner", format!("{owner:016x}")),
            ("id", id.to_string()),
            ("generation", generation.to_string()),
            ("ifindex", ifindex.to_string()),
            ("parent ifindex", parent_ifindex.to_string()),
            ("policy id", policy_id.to_string()),
            ("flags", format!("{flags:#x}")),
            ("ipv4", ipv4(record.ipv4)),
            ("gateway ipv4", ipv4(record.gateway_ipv4)),
            ("ipv6", ipv6(record.ipv6)),
            ("gateway ipv6", ipv6(record.gateway_ipv6)),
            ("mac", Mac(record.mac).to_string()),
            ("wire mac", Mac(record.wire_mac).to_string()),
            ("gateway mac", Mac(record.gateway_mac).to_string()),
            ("vlan", record.vid.to_string()),
            ("mtu", record.mtu.to_string()),
            ("parent", record.parent.to_string()),
        ]
    }
    if wanted == found {
        checks.done += 1;
        return;
    }
    for ((name, wanted), (_, found)) in fields(wanted).into_iter().zip(fields(found)) {
        checks.equal(Kind::Map, format_args!("ENDPOINT slot {slot}, {name}"), wanted, found);
    }
}

fn check_direct(checks: &mut Checks, known: &HashMap<Index, u32>, maps: &Maps) -> Result<(), TablesError> {
    for (map, table) in [(maps::POD_IF_DIRECT, Direct::Interface), (maps::POD_IP4_DIRECT, Direct::Ipv4)] {
        let mut wanted: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (key, slot) in known {
            let entry = match (table, key) {
                (Direct::Interface, Index::Interface(index)) => maps::direct_ifindex(*index),
                (Direct::Ipv4, Index::Ipv4(address)) => maps::direct_ipv4(*address),
                _ => continue,
            };
            wanted.entry(entry).or_default().push(*slot);
        }
        for (entry, found) in maps.direct_entries(table)? {
            let slots = wanted.remove(&entry).unwrap_or_default();
            // What was shared once stays so, and only costs a look-up.
            let holds = found == SHARED || matches!(slots.as_slice(), [slot] if *slot == found);
            let expected = match slots.as_slice() {
                [] => "0".to_owned(),
                [slot] => format!("slot {slot}"),
                _ => "shared".to_owned(),
            };
            checks.holds(holds, Kind::Map, format_args!("{map} entry {entry}"), expected, found);
        }
        for (entry, slots) in wanted {
            let expected = format!("slot {slots:?}");
            checks.holds(false, Kind::Map, format_args!("{map} entry {entry}"), expected, "0");
        }
    }
    Ok(())
}

fn check_host_dsts(checks: &mut Checks, expected: &Expected, maps: &Maps) -> Result<(), TablesError> {
    let mut found = maps.host_dsts()?;
    let text = |flags: Option<u32>| flags.map_or("none".to_owned(), |flags| format!("flags {flags:#x}"));
    let wanted: BTreeMap<Ipv4Net, u32> =
        expected.host_dsts.iter().map(|(prefix, flags)| (prefix.trunc(), *flags)).collect();
    for (prefix, flags) in &wanted {
        let there = found.remove(prefix);
        checks.equal(Kind::Map, format_args!("HOST_DST of {prefix}"), text(Some(*flags)), text(there));
    }
    for (prefix, flags) in found {
        checks.equal(Kind::Map, format_args!("HOST_DST of {prefix}"), text(None), text(Some(flags)));
    }
    let holds = maps.host_dst_bits_are_of(wanted.keys())?;
    checks.holds(holds, Kind::Map, maps::HOST_DST_BITS, "bits of HOST_DST's prefixes", "others");
    Ok(())
}

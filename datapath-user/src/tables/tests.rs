use std::collections::BTreeSet;

use datapath_common::abi::{Flow, FlowKey};
use ipnet::Ipv4Net;

use super::*;
use crate::config::Limits;

fn record(n: u8) -> Endpoint {
    Endpoint {
        owner: n.into(),
        ifindex: 100 + u32::from(n),
        ipv4: [10, 0, 0, n],
        vid: 100 + u16::from(n),
        generation: 1,
        mac: [2, 0, 0, 0, 0, n],
        ..Endpoint::ZERO
    }
}

/// Maps need privileges; elsewhere these tests have nothing to look at.
fn tables(endpoints: u32) -> Option<Tables> {
    match Maps::create(&Limits { endpoints, flows: 1024 }) {
        Ok(maps) => Some(Tables::new(maps).unwrap()),
        Err(error) => {
            assert!(!nix::unistd::geteuid().is_root(), "{error}");
            None
        }
    }
}

fn rested(tables: &mut Tables) {
    tables.slots.wait();
    tables.ids.wait();
}

fn indexed(tables: &Tables, record: &Endpoint) -> Vec<u32> {
    Index::of(record).map(|key| tables.maps.slot(key).unwrap()).collect()
}

#[test]
fn a_pod_comes_and_goes() {
    let Some(mut tables) = tables(4) else { return };
    let put = tables.put(&record(1)).unwrap();
    assert_eq!((put.id, put.slot, put.changes), (1, 1, 4));
    assert_eq!(indexed(&tables, &record(1)), [1, 1, 1]);
    assert_eq!(tables.maps.record(1).unwrap(), Endpoint { id: 1, ..record(1) });
    assert_eq!(tables.put(&record(1)).unwrap().changes, 0);

    let flow = Flow { door: 1, origin: 1, pad: [0; 2], seen: 0 };
    let key = |id| FlowKey { id, remote: [1; 4], remote_port: 1, local_port: 2, proto: 6, pad: [0; 3] };
    tables.maps.set_flow(&key(1), &flow).unwrap();
    tables.maps.set_flow(&key(2), &flow).unwrap();
    // Another pod's flows with this one go with it.
    let about = FlowKey { remote: record(1).ipv4, ..key(2) };
    tables.maps.set_flow(&about, &flow).unwrap();
    let gone = tables.release(1).unwrap().unwrap();
    assert_eq!(tables.maps.flow(&about).unwrap(), None);
    assert_eq!(gone.slot, 1);
    assert_eq!(indexed(&tables, &record(1)), [0, 0, 0]);
    assert_eq!(tables.maps.flow(&key(1)).unwrap(), None);
    assert_eq!(tables.maps.flow(&key(2)).unwrap(), Some(flow));
    assert!(!tables.maps.marked(1).unwrap());
    assert!(tables.release(1).unwrap().is_none());
}

#[test]
fn nobody_remembers_a_pod_that_is_new() {
    let Some(mut tables) = tables(4) else { return };
    let flow = Flow { door: 1, origin: 1, pad: [0; 2], seen: 0 };
    let about =
        |n| FlowKey { id: 2, remote: record(n).ipv4, remote_port: 1, local_port: 2, proto: 6, pad: [0; 3] };
    let known = |tables: &Tables| [1, 3].map(|n| tables.maps.flow(&about(n)).expect("it is read").is_some());
    // As an agent leaves it that was killed while it released the pod.
    tables.maps.set_flow(&about(1), &flow).unwrap();
    tables.put(&record(1)).unwrap();
    assert_eq!(known(&tables), [false; 2]);
    // As a program does that was running then.
    tables.release(1).unwrap();
    tables.maps.set_flow(&about(1), &flow).unwrap();
    tables.put(&record(1)).unwrap();
    assert_eq!(known(&tables), [false; 2]);
    // A pod that gets another address is another one to everybody, and forgets itself.
    tables.maps.set_flow(&about(1), &flow).unwrap();
    tables.maps.set_flow(&about(3), &flow).unwrap();
    let own = FlowKey { id: tables.pod(1).unwrap().record.id, ..about(2) };
    tables.maps.set_flow(&own, &flow).unwrap();
    tables.put(&Endpoint { ipv4: record(3).ipv4, ..record(1) }).unwrap();
    assert_eq!(known(&tables), [false; 2]);
    assert_eq!(tables.maps.flow(&own).unwrap(), None);
}

#[test]
fn a_change_takes_another_slot_and_keeps_the_id() {
    let Some(mut tables) = tables(4) else { return };
    tables.put(&record(1)).unwrap();
    let moved = Endpoint { vid: 200, ifindex: 300, ..record(1) };
    let put = tables.put(&moved).unwrap();
    assert_eq!((put.id, put.slot), (1, 2));
    assert_eq!(indexed(&tables, &moved), [2, 2, 2]);
    assert_eq!(tables.maps.slot(Index::Vlan { parent: 0, vid: 101 }).unwrap(), 0);
    assert_eq!(tables.maps.slot(Index::Interface(101)).unwrap(), 0);
    // The old slot rests, then is cleaned and used again.
    assert_eq!(tables.put(&record(2)).unwrap().slot, 3);
    rested(&mut tables);
    tables.tidy().unwrap();
    assert_eq!(tables.maps.record(1).unwrap(), Endpoint::ZERO);
    assert_eq!(tables.put(&record(3)).unwrap().slot, 1);
}

#[test]
fn what_another_pod_has_is_refused() {
    let Some(mut tables) = tables(4) else { return };
    tables.put(&record(1)).unwrap();
    for taken in [
        Endpoint { vid: 101, ..record(2) },
        Endpoint { ipv4: [10, 0, 0, 1], ..record(2) },
        Endpoint { ifindex: 101, ..record(2) },
    ] {
        assert!(matches!(tables.put(&taken), Err(TablesError::Occupied { id: 1, .. })));
    }
    assert_eq!(tables.pods().count(), 1);
    assert_eq!(indexed(&tables, &record(1)), [1, 1, 1]);
}

#[test]
fn an_older_generation_is_refused() {
    let Some(mut tables) = tables(4) else { return };
    tables.put(&Endpoint { generation: 5, ..record(1) }).unwrap();
    let older = Endpoint { generation: 4, vid: 9, ..record(1) };
    assert!(matches!(tables.put(&older), Err(TablesError::Stale { given: 4, known: 5 })));
    assert_eq!(tables.maps.slot(Index::Vlan { parent: 0, vid: 9 }).unwrap(), 0);
}

#[test]
fn pods_trade_places() {
    let Some(mut tables) = tables(4) else { return };
    tables.put(&record(1)).unwrap();
    tables.put(&record(2)).unwrap();
    let (one, two) = (Endpoint { vid: 102, ..record(1) }, Endpoint { vid: 101, ..record(2) });
    tables.put_among(&one, &|owner| owner == 2).unwrap();
    tables.put_among(&two, &|owner| owner == 1).unwrap();
    let slot = |owner| tables.pod(owner).unwrap().slot;
    assert_eq!(indexed(&tables, &one), [slot(1); 3]);
    assert_eq!(indexed(&tables, &two), [slot(2); 3]);
}

#[test]
fn full_tables_still_change() {
    let Some(mut tables) = tables(2) else { return };
    tables.put(&record(1)).unwrap();
    tables.put(&record(2)).unwrap();
    assert!(matches!(tables.put(&record(3)), Err(TablesError::Full { limit: 2 })));
    let moved = Endpoint { ipv4: [10, 0, 0, 9], ifindex: 900, vid: 90, ..record(1) };
    tables.put(&moved).unwrap();
    let slot = tables.pod(1).unwrap().slot;
    assert_eq!(indexed(&tables, &moved), [slot; 3]);
    assert_eq!(indexed(&tables, &record(1)), [0; 3]);
    // Ids that were given up a moment ago are not used.
    tables.release(2).unwrap();
    assert!(matches!(tables.put(&record(3)), Err(TablesError::Resting)));
    rested(&mut tables);
    assert_eq!(tables.put(&record(3)).unwrap().id, 2);
}

#[test]
fn a_new_owner_of_the_tables_finds_and_mends_all() {
    let Some(mut tables) = tables(4) else { return };
    tables.put(&record(1)).unwrap();
    tables.put(&record(2)).unwrap();
    // Killed within an add, and within a release.
    tables.maps.set_slot(Index::Vlan { parent: 0, vid: 101 }, 0).unwrap();
    tables.maps.set_slot(Index::Vlan { parent: 3, vid: 77 }, 4).unwrap();
    tables.maps.set_slot(Index::Ipv4([10, 9, 9, 9]), 1).unwrap();
    let Tables { maps, .. } = tables;

    let mut tables = Tables::new(maps).unwrap();
    assert_eq!(tables.pods().map(|pod| pod.missing).collect::<Vec<_>>(), [1, 0]);
    assert_eq!(tables.sweep().unwrap(), 2);
    assert_eq!(tables.put(&record(1)).unwrap().changes, 1);
    assert_eq!(tables.put(&record(2)).unwrap().changes, 0);
    assert_eq!(tables.put(&record(3)).unwrap().id, 3);
    assert_eq!(tables.sweep().unwrap(), 0);
}

#[test]
fn prefixes_and_vips_change_by_their_difference() {
    let Some(mut tables) = tables(2) else { return };
    let nets = |list: &[(&str, u32)]| {
        list.iter().map(|(net, flags)| (net.parse().unwrap(), *flags)).collect::<BTreeMap<Ipv4Net, u32>>()
    };
    let maps = &mut tables.maps;
    let first = nets(&[("10.0.0.0/8", 1), ("169.254.169.254/32", 2)]);
    assert_eq!(maps.set_host_dsts(&first).unwrap(), 2);
    assert_eq!(maps.set_host_dsts(&first).unwrap(), 0);
    assert_eq!(maps.host_dst([169, 254, 169, 254]).unwrap(), 2);
    assert_eq!(maps.host_dst([10, 1, 2, 3]).unwrap(), 1);
    assert_eq!(maps.set_host_dsts(&nets(&[("10.0.0.0/8", 1), ("10.9.0.1/32", 1)])).unwrap(), 2);
    assert_eq!(maps.host_dst([169, 254, 169, 254]).unwrap(), 0);

    let vip = ([10, 1, 0, 200], 80, 6);
    assert_eq!(maps.set_vips(&BTreeSet::from([vip])).unwrap(), 1);
    assert!(maps.is_vip(vip.0, vip.1, vip.2).unwrap());
    assert_eq!(maps.set_vips(&BTreeSet::new()).unwrap(), 1);
    assert!(!maps.is_vip(vip.0, vip.1, vip.2).unwrap());
}

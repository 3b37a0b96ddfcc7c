//! Whether the store, the VPC and the kernels agree with what callers were told.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    time::Duration,
};

use anyhow::Result;
use datapath_user::source::owner_of;
use eniway_ipam::{
    PodKey,
    model::{Interface, keys},
    vpc::Attachment,
};

use super::{
    ledger::{Ledger, Wrong},
    world::{Held, NodeStand, World, held, is_bound},
};

/// While everything goes on: nobody has what another one has, and what callers hold is in the store.
pub(super) async fn sample(world: &World, ledger: &Ledger) -> Result<()> {
    let before = ledger.books().held.clone();
    // Etcd may be away just now.
    if let Ok(records) = world.records().await {
        let after = ledger.books().held.clone();
        let bound: Vec<&Interface> = records.iter().filter(|record| is_bound(record)).collect();
        for what in doubles(&bound) {
            ledger.note(Wrong::Duplicate, what);
        }
        for (key, allocation) in &before {
            let is_there = bound.iter().any(|record| {
                record.claim.as_ref().is_some_and(|claim| claim.key == *key)
                    && record.vpc_id.as_ref() == Some(&allocation.vpc_id)
                    && record.addresses == Some(allocation.addresses)
            });
            if !is_there && after.get(key) == Some(allocation) {
                ledger.note(Wrong::Lost, format!("the store does not have {allocation:?}"));
            }
        }
    }
    let tables = world.nodes.iter().map(NodeStand::programmed).collect::<Result<Vec<_>>>()?;
    // A pod that was released may stay in the tables of a node whose agent is dead; two that were not may not.
    let live: HashSet<u64> =
        ledger.books().held.keys().map(|key| owner_of(&key.uid, &key.container_id)).collect();
    let all: Vec<(usize, &Held)> =
        tables.iter().enumerate().flat_map(|(node, pods)| pods.iter().map(move |pod| (node, pod))).collect();
    for (index, (node, a)) in all.iter().enumerate() {
        for (other, b) in &all[index + 1..] {
            let (both_live, same_node) = (live.contains(&a.0) && live.contains(&b.0), node == other);
            let same = a.1 == b.1 || a.3 == b.3 || same_node && a.2 == b.2;
            if same && a.0 != b.0 && (same_node || both_live) {
                ledger.note(Wrong::Duplicate, format!("node-{node} has {a:?}, node-{other} has {b:?}"));
            }
        }
    }
    Ok(())
}

fn doubles(bound: &[&Interface]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut seen = HashMap::new();
    for record in bound {
        let mut has = vec![format!("{:?}", record.vpc_id)];
        has.extend(record.addresses.map(|addresses| addresses.ipv4.to_string()));
        has.extend(record.mac.map(|mac| mac.to_string()));
        has.extend(record.claim.as_ref().map(|claim| claim.key.to_string()));
        has.extend(record.vlan.map(|vlan| format!("VLAN {vlan} on {:?}", record.parent)));
        for what in has {
            if let Some(other) = seen.insert(what.clone(), &record.id) {
                wrong.push(format!("{what} is with the interfaces {other} and {}", record.id));
            }
        }
    }
    wrong
}

/// After the faults: waits until all sides agree, and notes in what they do not when the time is over.
pub(super) async fn settle(world: &World, ledger: &Ledger, limit: Duration, empty: bool) -> Result<()> {
    let end = tokio::time::Instant::now() + limit;
    loop {
        let mut differences = differences(world, ledger).await?;
        if empty && !world.vpc.interfaces().is_empty() {
            differences.push((Wrong::Leak, format!("at the VPC: {:?}", world.vpc.interfaces())));
        }
        if differences.is_empty() {
            return Ok(());
        }
        if tokio::time::Instant::now() > end {
            for (kind, what) in differences {
                ledger.note(kind, what);
            }
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

async fn differences(world: &World, ledger: &Ledger) -> Result<Vec<(Wrong, String)>> {
    let mut wrong = Vec::new();
    let entries = world.entries().await?;
    let mut records = Vec::<Interface>::new();
    let mut pods = BTreeSet::new();
    for entry in &entries {
        if entry.key.starts_with("interface/") {
            records.push(serde_json::from_slice(&entry.value)?);
        } else if entry.key.starts_with("pod/") {
            pods.insert(entry.key.clone());
        } else if entry.key.starts_with("leak/") {
            wrong.push((Wrong::Leak, format!("{} waits for its collection", entry.key)));
        }
    }
    let books = ledger.books();

    // The store and the VPC.
    let at_vpc = world.vpc.interfaces();
    for record in records.iter().filter(|record| record.state.is_intent()) {
        wrong.push((Wrong::Leak, format!("unfinished: {record:?}")));
    }
    for interface in &at_vpc {
        let known = records.iter().find(|record| record.vpc_id.as_ref() == Some(&interface.id));
        let same = known.is_some_and(|record| {
            let attached = record.parent.clone().zip(record.vlan);
            let there = interface.attachment.as_ref().and_then(|attachment| match attachment {
                Attachment::Parent { id, vlan } => Some((id.clone(), *vlan)),
                Attachment::Instance { .. } => None,
            });
            record.addresses == Some(interface.addresses)
                && record.mac == Some(interface.mac)
                && attached == there
        });
        if !same {
            wrong.push((Wrong::Leak, format!("the VPC has {interface:?}, the store {known:?}")));
        }
    }
    for record in &records {
        if !at_vpc.iter().any(|interface| record.vpc_id.as_ref() == Some(&interface.id)) {
            wrong.push((Wrong::Lost, format!("the VPC does not have {record:?}")));
        }
    }

    // The store and the callers.
    let claims: BTreeSet<&PodKey> =
        records.iter().filter_map(|record| record.claim.as_ref()).map(|claim| &claim.key).collect();
    for key in claims.iter().filter(|key| !books.held.contains_key(**key)) {
        wrong.push((Wrong::Leak, format!("{key} has an interface and was released")));
    }
    for key in books.held.keys().filter(|key| !claims.contains(key)) {
        wrong.push((Wrong::Lost, format!("{key} has no interface any more")));
    }
    if pods != books.held.keys().map(keys::pod).collect() {
        wrong.push((Wrong::Leak, format!("the store's pods are {pods:?}")));
    }

    // The store and the kernels.
    for node in &world.nodes {
        let wanted: BTreeSet<Held> =
            books.held.values().filter(|allocation| allocation.node == node.name).map(held).collect();
        let tables = node.tables()?;
        let there = node.programmed()?;
        for pod in there.difference(&wanted) {
            wrong.push((Wrong::Leak, format!("the kernel of {} still has {pod:?}", node.name)));
        }
        for pod in wanted.difference(&there) {
            wrong.push((Wrong::Lost, format!("the kernel of {} does not have {pod:?}", node.name)));
        }
        let links = node.links()?;
        if (tables.len(), links) != (wanted.len(), wanted.len()) {
            let what =
                format!("{}: {} pods, {} records, {links} interfaces", node.name, wanted.len(), tables.len());
            wrong.push((Wrong::Leak, what));
        }
    }
    Ok(wrong)
}

/// What the VPC saw that must not be: as duplicates, and as losses.
pub(super) fn note_violations(world: &World, ledger: &Ledger) {
    let seen = world.vpc.violations();
    let doubles = seen.double_address + seen.double_vlan;
    let losses = seen.deleted_in_use + seen.detached_in_use + seen.over_limit + seen.token_reused;
    for (count, kind) in [(doubles, Wrong::Duplicate), (losses, Wrong::Lost)] {
        for _ in 0..count {
            ledger.note(kind, format!("the VPC was asked for what must not be: {seen:?}"));
        }
    }
}

//! The store's content in memory, as this allocator last saw it.
//!
//! Decisions are made on the view and carried out by transactions that fail when the view was behind; a failed
//! transaction brings the view up to date. So a stale view costs a second try, never a wrong result.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::Ipv4Addr,
    sync::Arc,
};

use eniway_policy::model::Groups;
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    clock::Instant,
    model::{Interface, Leak, Node, PodKey, Pool, State, StaticAddress, Subnet, keys},
    net::VlanId,
    plan::Counts,
    store::{Change, Revision, StoreError, Transaction},
};

/// The view. Kept under one lock, never held across an await.
#[derive(Default)]
pub(crate) struct View {
    /// All keys that are there, with the revision of their last change.
    revisions: HashMap<String, Revision>,
    /// Keys deleted at a revision that the watch has not reached yet: older news of them must not revive them.
    tombstones: HashMap<String, Revision>,
    /// The newest revision seen.
    pub(crate) latest: Revision,
    /// The store's id; empty before it has one.
    pub(crate) store: String,
    pub(crate) subnets: Vec<Subnet>,
    pub(crate) groups: Arc<Groups>,
    pub(crate) nodes: HashMap<String, Arc<Node>>,
    pub(crate) pools: HashMap<String, Pool>,
    pub(crate) interfaces: HashMap<String, Arc<Interface>>,
    pub(crate) pods: HashMap<PodKey, String>,
    pub(crate) statics: HashMap<String, StaticAddress>,
    pub(crate) resting_vlans: HashMap<String, HashMap<VlanId, Instant>>,
    pub(crate) leaks: HashMap<String, Leak>,
    pub(crate) intents: BTreeSet<String>,
    /// Nodes whose pool may need attention.
    pub(crate) dirty: BTreeSet<String>,
    /// Interfaces that a call of this process is about to take.
    pub(crate) reserved: HashSet<String>,
    by_node: HashMap<String, OnNode>,
    by_address: HashMap<Ipv4Addr, String>,
    /// Interfaces at rest by when their cool-down ends.
    cooling: BTreeSet<(Instant, String)>,
}

/// The interfaces on one node.
#[derive(Default)]
struct OnNode {
    all: BTreeMap<String, Arc<Interface>>,
    idle: BTreeMap<String, Arc<Interface>>,
}

/// What a change was about.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Touched {
    /// Known already, or of no interest to who waits.
    Nothing,
    /// An interface changed.
    Interface(String),
}

impl View {
    /// The revision of a key's last change, 0 when it is not there.
    pub(crate) fn revision(&self, key: &str) -> Revision {
        self.revisions.get(key).copied().unwrap_or(0)
    }

    /// All keys, for comparing with a fresh read.
    pub(crate) fn keys(&self) -> impl Iterator<Item = (&String, Revision)> {
        self.revisions.iter().map(|(key, revision)| (key, *revision))
    }

    /// The watch has reported everything up to this revision.
    pub(crate) fn watched(&mut self, revision: Revision) {
        self.tombstones.retain(|_, deleted| *deleted > revision);
    }

    /// Takes a change over unless something newer is known.
    pub(crate) fn apply(
        &mut self,
        key: &str,
        revision: Revision,
        value: Option<&[u8]>,
    ) -> Result<Touched, StoreError> {
        self.latest = self.latest.max(revision);
        let known = self.revision(key).max(self.tombstones.get(key).copied().unwrap_or(0));
        if revision <= known {
            return Ok(Touched::Nothing);
        }
        match value {
            Some(_) => {
                self.revisions.insert(key.to_owned(), revision);
                self.tombstones.remove(key);
            }
            None => {
                self.revisions.remove(key);
                self.tombstones.insert(key.to_owned(), revision);
            }
        }
        let (table, rest) = key.split_once('/').unwrap_or((key, ""));
        match table {
            keys::STORE => self.store = decode(key, value)?.unwrap_or_default(),
            keys::SUBNETS => {
                self.subnets = decode(key, value)?.unwrap_or_default();
                self.dirty.extend(self.nodes.keys().cloned());
            }
            keys::SECURITY_GROUPS => self.groups = Arc::new(decode_groups(key, revision, value)?),
            "node" => {
                put(&mut self.nodes, rest, decode(key, value)?.map(Arc::new));
                self.dirty.insert(rest.to_owned());
            }
            "pool" => put(&mut self.pools, rest, decode(key, value)?),
            "interface" => {
                self.put_interface(rest, decode(key, value)?);
                return Ok(Touched::Interface(rest.to_owned()));
            }
            "pod" => {
                let (uid, container_id) = rest.split_once('/').unwrap_or((rest, ""));
                let pod = PodKey { uid: uid.to_owned(), container_id: container_id.to_owned() };
                match decode(key, value)? {
                    Some(interface) => self.pods.insert(pod, interface),
                    None => self.pods.remove(&pod),
                };
            }
            "static" => put(&mut self.statics, rest, decode(key, value)?),
            "vlan" => {
                if let Some((parent, vlan)) = rest.rsplit_once('/')
                    && let Some(vlan) = vlan.parse().ok().and_then(VlanId::new)
                {
                    let vlans = self.resting_vlans.entry(parent.to_owned()).or_default();
                    match decode(key, value)? {
                        Some(until) => vlans.insert(vlan, until),
                        None => vlans.remove(&vlan),
                    };
                    if vlans.is_empty() {
                        self.resting_vlans.remove(parent);
                    }
                }
            }
            "leak" => put(&mut self.leaks, rest, decode(key, value)?),
            _ => log::warn!(
                "the store holds the key {key}, which this version does not know; it is left alone"
            ),
        }
        Ok(Touched::Nothing)
    }

    fn put_interface(&mut self, id: &str, interface: Option<Interface>) {
        if let Some(old) = self.interfaces.remove(id) {
            if let Some(there) = self.by_node.get_mut(&old.node) {
                there.all.remove(id);
                there.idle.remove(id);
                if there.all.is_empty() {
                    self.by_node.remove(&old.node);
                }
            }
            if let Some(addresses) = old.addresses
                && self.by_address.get(&addresses.ipv4).is_some_and(|by| by == id)
            {
                self.by_address.remove(&addresses.ipv4);
            }
            self.cooling.remove(&(old.available_at, id.to_owned()));
            self.intents.remove(id);
            self.dirty.insert(old.node.clone());
        }
        let Some(interface) = interface.map(Arc::new) else { return };
        if interface.is_on_node() {
            let there = self.by_node.entry(interface.node.clone()).or_default();
            there.all.insert(id.to_owned(), interface.clone());
            if interface.state == State::Idle {
                there.idle.insert(id.to_owned(), interface.clone());
            }
            self.dirty.insert(interface.node.clone());
        }
        if let Some(addresses) = interface.addresses
            && interface.vpc_id.is_some()
            && interface.state != State::Deleting
        {
            self.by_address.insert(addresses.ipv4, id.to_owned());
        }
        if interface.state == State::Idle && interface.available_at > Instant::default() {
            self.cooling.insert((interface.available_at, id.to_owned()));
        }
        if interface.is_intent() {
            self.intents.insert(id.to_owned());
        }
        self.interfaces.insert(id.to_owned(), interface);
    }

    /// The interfaces on a node.
    pub(crate) fn on_node(&self, node: &str) -> impl Iterator<Item = &Arc<Interface>> {
        self.by_node.get(node).into_iter().flat_map(|there| there.all.values())
    }

    /// The idle interfaces on a node, those that cool down included.
    pub(crate) fn idle_on_node(&self, node: &str) -> impl Iterator<Item = &Arc<Interface>> {
        self.by_node.get(node).into_iter().flat_map(|there| there.idle.values())
    }

    /// The interface, unless it is about to be deleted, that has this address at the VPC.
    pub(crate) fn with_address(&self, ipv4: Ipv4Addr) -> Option<&Arc<Interface>> {
        self.by_address.get(&ipv4).and_then(|id| self.interfaces.get(id))
    }

    /// Marks the nodes whose interfaces have finished their cool-down.
    pub(crate) fn finish_cooling(&mut self, now: Instant) {
        while let Some((until, _)) = self.cooling.first()
            && *until <= now
        {
            if let Some((_, id)) = self.cooling.pop_first()
                && let Some(interface) = self.interfaces.get(&id)
            {
                self.dirty.insert(interface.node.clone());
            }
        }
    }

    /// Interfaces that cool down.
    pub(crate) fn cooling(&self, now: Instant) -> impl Iterator<Item = &Arc<Interface>> {
        self.cooling
            .iter()
            .filter_map(|(_, id)| self.interfaces.get(id))
            .filter(move |interface| interface.is_cooling(now))
    }

    /// A node's interfaces by what they do.
    pub(crate) fn counts(&self, node: &str, now: Instant) -> Counts {
        let mut counts = Counts::default();
        for interface in self.on_node(node) {
            let count = match interface.state {
                State::Detaching | State::Deleting | State::Unbound => &mut counts.leaving,
                _ if interface.claim.is_some() => &mut counts.pods,
                State::Bound | State::Lost => &mut counts.pods,
                State::Idle if interface.is_cooling(now) => &mut counts.cooling,
                State::Idle => &mut counts.idle,
                // A static interface without its pod leaves as soon as it has arrived.
                State::Creating | State::Attaching if interface.static_for.is_some() => &mut counts.leaving,
                State::Creating | State::Attaching => &mut counts.coming,
            };
            *count += 1;
        }
        counts
    }

    /// Whether an idle interface is what the node's settings ask for now.
    pub(crate) fn fits(node: &Node, interface: &Interface) -> bool {
        let at_parent = match &node.kind {
            crate::model::NodeKind::SubEni { parents } => {
                parents.iter().any(|parent| Some(&parent.id) == interface.parent.as_ref())
            }
            crate::model::NodeKind::ExclusiveEni { instance, .. } => {
                Some(instance) == interface.parent.as_ref()
            }
        };
        interface.kind == node.kind.kind()
            && interface.regroup.is_none()
            && at_parent
            && interface.dual_stack == node.dual_stack
            && interface.security_groups == node.security_groups
            && (node.subnets.is_empty() || node.subnets.contains(&interface.subnet))
    }
}

fn put<T>(table: &mut HashMap<String, T>, key: &str, value: Option<T>) {
    match value {
        Some(value) => table.insert(key.to_owned(), value),
        None => table.remove(key),
    };
}

/// Reads a record.
pub(crate) fn decode<T: DeserializeOwned>(key: &str, value: Option<&[u8]>) -> Result<Option<T>, StoreError> {
    value
        .map(|value| {
            serde_json::from_slice(value).map_err(|error| StoreError::Broken {
                store: "the allocator's".to_owned(),
                reason: format!(
                    "the record {key} is not readable: {error}; it was written by another version or by hand"
                ),
            })
        })
        .transpose()
}

/// The security groups: their revision is that of the key.
pub(crate) fn decode_groups(
    key: &str,
    revision: Revision,
    value: Option<&[u8]>,
) -> Result<Groups, StoreError> {
    Ok(Groups { revision, ..decode(key, value)?.unwrap_or_default() })
}

/// A transaction on top of a view: every key it touches must be as the view knows it.
pub(crate) struct Draft<'v> {
    view: &'v View,
    transaction: Transaction,
}

impl<'v> Draft<'v> {
    pub(crate) fn new(view: &'v View) -> Self {
        Self { view, transaction: Transaction::default() }
    }

    /// The key must be as the view knows it, without being changed.
    pub(crate) fn guard(&mut self, key: &str) {
        if !self.transaction.expect.iter().any(|(guarded, _)| guarded == key) {
            self.transaction.expect.push((key.to_owned(), self.view.revision(key)));
        }
    }

    fn change(&mut self, key: String, value: Option<Vec<u8>>) {
        self.guard(&key);
        self.transaction.changes.retain(|change| change.key != key);
        self.transaction.changes.push(Change { key, value });
    }

    /// Writes a record.
    pub(crate) fn put<T: Serialize>(&mut self, key: String, record: &T) -> Result<(), StoreError> {
        let value = serde_json::to_vec(record).map_err(|error| StoreError::Broken {
            store: "the allocator's".to_owned(),
            reason: format!("the record {key} cannot be written: {error}"),
        })?;
        self.change(key, Some(value));
        Ok(())
    }

    /// Writes an interface.
    pub(crate) fn put_interface(&mut self, interface: &Interface) -> Result<(), StoreError> {
        self.put(keys::interface(&interface.id), interface)
    }

    /// Removes a record.
    pub(crate) fn delete(&mut self, key: String) {
        self.change(key, None);
    }

    pub(crate) fn len(&self) -> usize {
        self.transaction.expect.len()
    }

    pub(crate) fn build(self) -> Transaction {
        self.transaction
    }
}

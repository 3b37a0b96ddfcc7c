//! New interfaces: where, in which subnet, with which VLAN.

use std::{
    collections::{HashMap, HashSet},
    net::Ipv4Addr,
    sync::Arc,
    time::Duration,
};

use super::{Inner, Usage, lock};
use crate::{
    api::{Error, SubnetList, SubnetStatus},
    clock::Instant,
    model::{Claim, Interface, Node, NodeKind, Pool, State, StaticAddress, Subnet, keys},
    net::{Addresses, VlanId},
    store::Transaction,
    view::{Draft, View},
};

/// An interface wanted for a pod.
pub(super) struct Wanted {
    pub(super) claim: Claim,
    pub(super) security_groups: Vec<String>,
    /// For a static address: `namespace/name`, how long it is kept, and which it is to be.
    pub(super) fixed: Option<(String, Duration, Option<Addresses>)>,
}

/// Where the next interfaces of a node go.
struct Placer {
    /// Parent or instance, how many more it takes, VLANs that are not free.
    places: Vec<(String, u32, HashSet<u16>)>,
    tagged: bool,
    pool: Pool,
}

impl Placer {
    fn new(view: &View, node: &Node, now: Instant) -> Self {
        let room = |id: &str, limit: u32| {
            let there = on_parent(view, node, id).count();
            limit.saturating_sub(u32::try_from(there).unwrap_or(u32::MAX))
        };
        let places = match &node.kind {
            NodeKind::SubEni { parents } => parents
                .iter()
                .map(|parent| {
                    let used = on_parent(view, node, &parent.id).filter_map(|other| other.vlan);
                    let resting = view.resting_vlans.get(&parent.id).into_iter().flatten();
                    let resting = resting.filter(|(_, until)| **until > now).map(|(vlan, _)| *vlan);
                    let taken = used.chain(resting).map(VlanId::get).collect();
                    (parent.id.clone(), room(&parent.id, parent.limit), taken)
                })
                .collect(),
            NodeKind::ExclusiveEni { instance, .. } => {
                vec![(instance.clone(), room(instance, node.kind.limit()), HashSet::new())]
            }
        };
        let tagged = matches!(node.kind, NodeKind::SubEni { .. });
        Self { places, tagged, pool: view.pools.get(&node.name).copied().unwrap_or_default() }
    }

    /// The place with the most room, and the next VLAN in turn that is free there.
    fn next(&mut self) -> Option<(String, Option<VlanId>)> {
        let (id, room, taken) = self.places.iter_mut().max_by_key(|(_, room, _)| *room)?;
        if *room == 0 {
            return None;
        }
        let vlan = if self.tagged {
            let last = self.pool.last_vlan;
            let turn = |step: u16| (last + step - 1) % VlanId::MAX + 1;
            let vlan = (1..=VlanId::MAX).map(turn).find(|vlan| !taken.contains(vlan))?;
            taken.insert(vlan);
            self.pool.last_vlan = vlan;
            Some(VlanId::new(vlan)?)
        } else {
            None
        };
        *room -= 1;
        Some((id.clone(), vlan))
    }
}

impl Inner {
    /// A place for one interface on the node, and the pool record to be written with it.
    pub(super) fn place(&self, view: &View, node: &Node) -> Option<(String, Option<VlanId>, Pool)> {
        let mut placer = Placer::new(view, node, self.clock.now());
        let (parent, vlan) = placer.next()?;
        Some((parent, vlan, placer.pool))
    }

    /// Creates an interface for a pod. Returns when the intent is written.
    pub(super) async fn grow_claimed(self: &Arc<Self>, name: &str, wanted: &Wanted) -> Result<(), Error> {
        let growing = self.growing(name);
        let _growing = growing.lock().await;
        let drafted = {
            let view = self.view();
            // Whoever held the lock may have changed what was decided before: the caller looks again.
            let Some(node) = view.nodes.get(name).filter(|node| !node.draining) else { return Ok(()) };
            let taken = view.pods.contains_key(&wanted.claim.key)
                || wanted.fixed.as_ref().is_some_and(|(pod, ..)| view.statics.contains_key(pod));
            if taken || view.counts(name, self.clock.now()).room(node.kind.limit()) == 0 {
                return Ok(());
            }
            self.draft_growth(&view, node, 1, Some(wanted))?
        };
        let Some((transaction, interfaces)) = drafted else { return Ok(()) };
        self.begin(transaction, &interfaces).await.map(drop)
    }

    /// Writes intents and starts their calls. False when the transaction was in conflict with another change.
    pub(super) async fn begin(
        self: &Arc<Self>,
        transaction: Transaction,
        interfaces: &[String],
    ) -> Result<bool, Error> {
        let done = self.commit(transaction).await?.is_some();
        if done {
            for interface in interfaces {
                self.drive(interface);
            }
        }
        Ok(done)
    }

    /// The intents of up to `count` new interfaces. None when the node has no place for any.
    pub(super) fn draft_growth(
        &self,
        view: &View,
        node: &Node,
        count: u32,
        wanted: Option<&Wanted>,
    ) -> Result<Option<(Transaction, Vec<String>)>, Error> {
        let now = self.clock.now();
        let mut placer = Placer::new(view, node, now);
        let mut draft = Draft::new(view);
        draft.guard(&keys::node(&node.name));
        let mut interfaces = Vec::new();
        for _ in 0..count {
            let Some((parent, vlan)) = placer.next() else { break };
            let addresses =
                wanted.and_then(|wanted| wanted.fixed.as_ref()).and_then(|(_, _, addresses)| *addresses);
            let subnet = match self.choose_subnet(view, node, addresses.map(|addresses| addresses.ipv4)) {
                Ok(subnet) => subnet,
                Err(_) if !interfaces.is_empty() => break,
                Err(error) => return Err(error),
            };
            let id = format!("{:016x}", fastrand::u64(..));
            let interface = Interface {
                token: format!("{id}-1"),
                id,
                state: State::Creating,
                node: node.name.clone(),
                kind: node.kind.kind(),
                subnet: subnet.id.clone(),
                vpc_id: None,
                parent: Some(parent),
                vlan,
                mac: None,
                addresses,
                dual_stack: node.dual_stack,
                regroup: None,
                security_groups: wanted
                    .map_or(&node.security_groups, |wanted| &wanted.security_groups)
                    .clone(),
                available_at: Instant::default(),
                claim: wanted.map(|wanted| wanted.claim.clone()),
                static_for: wanted.and_then(|wanted| wanted.fixed.as_ref()).map(|(pod, ..)| pod.clone()),
                by: self.settings.name.clone(),
                since: now,
            };
            draft.put_interface(&interface)?;
            interfaces.push(interface.id);
        }
        let Some(id) = interfaces.first() else { return Ok(None) };
        if let Some(Wanted { claim, fixed, .. }) = wanted {
            draft.put(keys::pod(&claim.key), id)?;
            if let Some((pod, retention, _)) = fixed {
                let kept = StaticAddress { interface: id.clone(), retention: *retention, released: None };
                draft.put(keys::static_address(pod), &kept)?;
            }
        }
        draft.put(keys::pool(&node.name), &placer.pool)?;
        Ok(Some((draft.build(), interfaces)))
    }

    /// The subnet with the most available addresses, or the one that holds the address asked for. Counts the address as taken.
    pub(super) fn choose_subnet<'v>(
        &self,
        view: &'v View,
        node: &Node,
        address: Option<Ipv4Addr>,
    ) -> Result<&'v Subnet, Error> {
        let allowed = |subnet: &&Subnet| {
            (node.subnets.is_empty() || node.subnets.contains(&subnet.id))
                && (!node.dual_stack || subnet.ipv6.is_some())
        };
        if let Some(address) = address {
            return view
                .subnets
                .iter()
                .filter(allowed)
                .find(|subnet| subnet.ipv4.contains(&address))
                .ok_or_else(|| {
                    Error::Invalid(format!(
                        "{address} is in no subnet that node {} may use; add its subnet",
                        node.name
                    ))
                });
        }
        let mut usage = lock(&self.usage);
        let available = |usage: &HashMap<String, Usage>, subnet: &Subnet| {
            usage.get(&subnet.id).map_or_else(|| prefix_size(subnet), |usage| usage.available)
        };
        let best = view
            .subnets
            .iter()
            .filter(allowed)
            .max_by_key(|subnet| available(&usage, subnet))
            .filter(|subnet| available(&usage, subnet) > 0);
        match best {
            Some(subnet) => {
                if let Some(usage) = usage.get_mut(&subnet.id) {
                    usage.available -= 1;
                }
                Ok(subnet)
            }
            None => {
                drop(usage);
                let subnets = view
                    .subnets
                    .iter()
                    .filter(allowed)
                    .map(|subnet| self.subnet_status(view, subnet))
                    .collect();
                Err(Error::SubnetsExhausted { node: node.name.clone(), subnets: SubnetList(subnets) })
            }
        }
    }

    pub(super) fn subnet_status(&self, view: &View, subnet: &Subnet) -> SubnetStatus {
        let ours = view.interfaces.values().filter(|interface| interface.subnet == subnet.id).count();
        let usage = lock(&self.usage).get(&subnet.id).copied();
        SubnetStatus {
            id: subnet.id.clone(),
            subnet: subnet.ipv4,
            available: usage.map(|usage| usage.available),
            total: usage.map(|usage| usage.total),
            ours: ours as u64,
        }
    }

    /// A call showed that a subnet is full, whatever was thought before.
    pub(super) fn subnet_is_full(&self, id: &str) {
        lock(&self.usage).entry(id.to_owned()).or_insert(Usage { available: 0, total: 0 }).available = 0;
    }

    /// An interface in the subnet is gone.
    pub(super) fn address_is_free(&self, subnet: &str) {
        if let Some(usage) = lock(&self.usage).get_mut(subnet) {
            usage.available += 1;
        }
    }

    /// Asks the VPC how full the subnets are.
    pub(super) async fn refresh_usage(&self) -> Result<(), Error> {
        let ids: Vec<String> = self.view().subnets.iter().map(|subnet| subnet.id.clone()).collect();
        if ids.is_empty() {
            return Ok(());
        }
        let answers = self.vpc.usage(&ids).await?;
        let mut usage = lock(&self.usage);
        for answer in answers {
            usage.insert(answer.id, Usage { available: answer.available, total: answer.total });
        }
        Ok(())
    }

    pub(super) fn growing(&self, node: &str) -> Arc<tokio::sync::Mutex<()>> {
        lock(&self.growing).entry(node.to_owned()).or_default().clone()
    }
}

/// The node's interfaces on one parent or instance, those that come and go included.
fn on_parent<'v>(view: &'v View, node: &Node, parent: &'v str) -> impl Iterator<Item = &'v Arc<Interface>> {
    view.on_node(&node.name).filter(move |interface| interface.parent.as_deref() == Some(parent))
}

/// How many addresses a prefix has, for as long as the VPC has not told more exactly.
fn prefix_size(subnet: &Subnet) -> u64 {
    1 << (32 - subnet.ipv4.prefix_len())
}

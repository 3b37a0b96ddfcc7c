//! What happens with time: pools, cool-downs, retention, retries, draining.

use std::sync::Arc;
use std::time::Duration;

use super::{Inner, lock};
use crate::{
    api::Error,
    clock::Instant,
    model::{Event, Interface, Next, Node, NodeKind, PodKey, Pool, State, keys},
    plan::{Plan, plan},
    store::{MAX_KEYS, Transaction},
    view::{Draft, View},
};

/// How often every pool is looked at, whether something changed or not.
const ALL_POOLS: Duration = Duration::from_secs(5);
/// How often retention and resting VLANs are looked at.
const RETENTION: Duration = Duration::from_secs(1);
/// How often the VPC is asked how full the subnets are.
const USAGE: Duration = Duration::from_secs(60);
/// How often the store is asked to forget old changes.
const COMPACTION: Duration = Duration::from_secs(300);
/// The most interfaces in one transaction: each is one key.
const BATCH: usize = MAX_KEYS - 20;

/// When the periodic work was last done.
#[derive(Default)]
pub(super) struct Timers {
    all_pools: Instant,
    retention: Instant,
    usage: Instant,
    leaks: Instant,
    compaction: Instant,
}

impl Inner {
    pub(super) async fn tick(self: &Arc<Self>) -> Result<(), Error> {
        let now = self.clock.now();
        self.expire_waiters(now);
        self.retry(now);
        self.take_over(now).await?;
        if self.is_due(now, USAGE, |timers| &mut timers.usage) {
            self.refresh_usage().await.unwrap_or_else(|error| log::warn!("{error}"));
        }
        let nodes: Vec<String> = {
            let mut view = self.view();
            view.finish_cooling(now);
            if self.is_due(now, ALL_POOLS, |timers| &mut timers.all_pools) {
                view.dirty.clear();
                view.nodes.keys().cloned().collect()
            } else {
                std::mem::take(&mut view.dirty).into_iter().collect()
            }
        };
        for node in nodes {
            self.tend_node(&node).await?;
        }
        if self.is_due(now, RETENTION, |timers| &mut timers.retention) {
            self.end_retention(now).await?;
            self.end_vlan_rest(now).await?;
        }
        if self.is_due(now, self.settings.leak_interval, |timers| &mut timers.leaks) {
            self.scan_leaks().await?;
        }
        if self.is_due(now, COMPACTION, |timers| &mut timers.compaction) {
            let keep_from = self.view().latest.saturating_sub(self.settings.keep_revisions);
            if keep_from > 0 {
                self.store.compact(keep_from).await?;
            }
        }
        Ok(())
    }

    fn is_due(&self, now: Instant, every: Duration, timer: impl Fn(&mut Timers) -> &mut Instant) -> bool {
        let mut timers = lock(&self.timers);
        let last = timer(&mut timers);
        let due = last.after(every) <= now;
        if due {
            *last = now;
        }
        due
    }

    /// The next tick asks the VPC how full the subnets are.
    pub(super) fn refresh_usage_soon(&self) {
        lock(&self.timers).usage = Instant::default();
    }

    fn expire_waiters(&self, now: Instant) {
        lock(&self.waiters).retain(|_, waiters| {
            for waiter in waiters.extract_if(.., |waiter| waiter.deadline <= now || waiter.wake.is_closed()) {
                let _ = waiter.wake.send(Err(waiter.timeout));
            }
            !waiters.is_empty()
        });
    }

    fn retry(self: &Arc<Self>, now: Instant) {
        let due: Vec<String> = {
            let view = self.view();
            let mut retries = lock(&self.retries);
            retries.retain(|id, _| view.intents.contains(id));
            retries.iter().filter(|(_, retry)| retry.at <= now).map(|(id, _)| id.clone()).collect()
        };
        for id in due {
            self.drive(&id);
        }
    }

    /// At the start: continues our own unfinished calls, and in a store that no one else can have open, all of them.
    pub(super) fn take_up_intents(self: &Arc<Self>) {
        let ours: Vec<String> = {
            let view = self.view();
            view.intents
                .iter()
                .filter(|id| {
                    view.interfaces.get(*id).is_some_and(|interface| interface.by == self.settings.name)
                })
                .cloned()
                .collect()
        };
        for id in ours {
            self.drive(&id);
        }
    }

    /// Continues intents that no one seems to carry out.
    async fn take_over(self: &Arc<Self>, now: Instant) -> Result<(), Error> {
        let exclusive = self.store.exclusive();
        let orphans: Vec<Arc<Interface>> = {
            let view = self.view();
            let driven = lock(&self.driven);
            let retries = lock(&self.retries);
            view.intents
                .iter()
                .filter(|id| !driven.contains(*id) && !retries.contains_key(*id))
                .filter_map(|id| view.interfaces.get(id).cloned())
                .filter(|interface| {
                    interface.by == self.settings.name
                        || exclusive
                        || interface.since.after(self.settings.take_over_after) <= now
                })
                .collect()
        };
        for orphan in orphans {
            if orphan.by != self.settings.name {
                log::info!("interface {}: continuing what allocator `{}` has begun", orphan.id, orphan.by);
                let transaction = {
                    let view = self.view();
                    if view.interfaces.get(&orphan.id) != Some(&orphan) {
                        continue;
                    }
                    let mut draft = Draft::new(&view);
                    draft.put_interface(&Interface {
                        by: self.settings.name.clone(),
                        since: now,
                        ..Interface::clone(&orphan)
                    })?;
                    draft.build()
                };
                if self.commit(transaction).await?.is_none() {
                    continue;
                }
            }
            self.drive(&orphan.id);
        }
        Ok(())
    }

    /// Brings a node's pool closer to its policy.
    async fn tend_node(self: &Arc<Self>, name: &str) -> Result<(), Error> {
        let node = self.view().nodes.get(name).cloned();
        match node {
            // Interfaces of a node that is not there any more: nobody can use them.
            None => self.tend_leftovers(name).await,
            Some(node) if node.draining => self.drain(name).await,
            Some(_) => self.tend_pool(name).await,
        }
    }

    async fn tend_pool(self: &Arc<Self>, name: &str) -> Result<(), Error> {
        loop {
            let growing = self.growing(name);
            let growing = growing.lock().await;
            let now = self.clock.now();
            let quiet = lock(&self.problems).get(name).is_some_and(|problem| problem.quiet_until > now);
            let (transaction, interfaces) = {
                let view = self.view();
                let Some(node) = view.nodes.get(name).filter(|node| !node.draining) else { return Ok(()) };
                let misfits = misfits(&view, node, now);
                if !misfits.is_empty() {
                    self.draft_discard(&view, misfits)?
                } else {
                    let Plan { create, discard, discard_paced } =
                        plan(node.policy, view.counts(name, now), node.kind.limit());
                    let pool = view.pools.get(name).copied().unwrap_or_default();
                    if create > 0 && !quiet {
                        let count = create.min(u32::try_from(BATCH).unwrap_or(u32::MAX));
                        match self.draft_growth(&view, node, count, None) {
                            Ok(Some(growth)) => growth,
                            Ok(None) => return Ok(()),
                            Err(error) => {
                                drop(view);
                                self.refresh_usage_soon();
                                self.note_problem(name, &error, self.settings.refused_pause);
                                log::warn!("{error}");
                                return Ok(());
                            }
                        }
                    } else if discard > 0 {
                        self.draft_discard(&view, spare(&view, node, now, discard as usize))?
                    } else if discard_paced && pool.given_back.after(self.settings.give_back_every) <= now {
                        let (mut transaction, interfaces) =
                            self.draft_discard(&view, spare(&view, node, now, 1))?;
                        let mut paced = Draft::new(&view);
                        paced.put(keys::pool(name), &Pool { given_back: now, ..pool })?;
                        let paced = paced.build();
                        transaction.expect.extend(paced.expect);
                        transaction.changes.extend(paced.changes);
                        (transaction, interfaces)
                    } else {
                        return Ok(());
                    }
                }
            };
            if interfaces.is_empty() {
                return Ok(());
            }
            self.begin(transaction, &interfaces).await?;
            drop(growing);
        }
    }

    /// Gives idle interfaces back to the VPC. Those that are no longer idle stay.
    pub(super) async fn discard(self: &Arc<Self>, ids: &[String]) -> Result<(), Error> {
        for chunk in ids.chunks(BATCH) {
            loop {
                let now = self.clock.now();
                let (transaction, interfaces) = {
                    let view = self.view();
                    let idle = chunk
                        .iter()
                        .filter_map(|id| view.interfaces.get(id))
                        .filter(|interface| interface.state == State::Idle && !interface.is_cooling(now))
                        .cloned()
                        .collect();
                    self.draft_discard(&view, idle)?
                };
                if interfaces.is_empty() || self.begin(transaction, &interfaces).await? {
                    break;
                }
            }
        }
        Ok(())
    }

    fn draft_discard(
        &self,
        view: &View,
        interfaces: Vec<Arc<Interface>>,
    ) -> Result<(Transaction, Vec<String>), Error> {
        let mut draft = Draft::new(view);
        let mut ids = Vec::new();
        for interface in interfaces {
            if view.reserved.contains(&interface.id) || draft.len() >= BATCH {
                continue;
            }
            if let Next::To(state) = interface.next(Event::Discard)? {
                draft.put_interface(&Interface {
                    state,
                    since: self.clock.now(),
                    by: self.settings.name.clone(),
                    ..Interface::clone(&interface)
                })?;
                ids.push(interface.id.clone());
            }
        }
        Ok((draft.build(), ids))
    }

    /// Empties a draining node further; its record goes when nothing is left.
    pub(super) async fn drain(self: &Arc<Self>, name: &str) -> Result<(), Error> {
        let pods: Vec<PodKey> = {
            let view = self.view();
            view.on_node(name).filter_map(|interface| Some(interface.claim.as_ref()?.key.clone())).collect()
        };
        for pod in pods {
            self.release(&pod, None).await?;
        }
        self.tend_leftovers(name).await?;
        loop {
            let transaction = {
                let view = self.view();
                let draining = view.nodes.get(name).is_some_and(|node| node.draining);
                if !draining || view.on_node(name).next().is_some() {
                    return Ok(());
                }
                let mut draft = Draft::new(&view);
                draft.delete(keys::node(name));
                draft.delete(keys::pool(name));
                draft.build()
            };
            if self.commit(transaction).await?.is_some() {
                return Ok(());
            }
        }
    }

    async fn tend_leftovers(self: &Arc<Self>, name: &str) -> Result<(), Error> {
        let now = self.clock.now();
        let idle: Vec<String> = {
            let view = self.view();
            let idle = view.idle_on_node(name).filter(|interface| !interface.is_cooling(now));
            idle.map(|interface| interface.id.clone()).collect()
        };
        self.discard(&idle).await
    }

    /// Deletes static addresses whose time is over.
    async fn end_retention(self: &Arc<Self>, now: Instant) -> Result<(), Error> {
        let over: Vec<String> = {
            let view = self.view();
            view.statics
                .values()
                .filter(|kept| {
                    // The address rests like any other before someone else can get it.
                    let time = kept.retention.max(self.settings.cool_down);
                    !kept.retention.is_zero()
                        && kept.released.is_some_and(|released| released.after(time) <= now)
                })
                .map(|kept| kept.interface.clone())
                .collect()
        };
        for id in over {
            let (transaction, interfaces) = {
                let view = self.view();
                let unbound = view.interfaces.get(&id).filter(|interface| interface.state == State::Unbound);
                self.draft_discard(&view, unbound.cloned().into_iter().collect())?
            };
            if !interfaces.is_empty() {
                self.begin(transaction, &interfaces).await?;
            }
        }
        Ok(())
    }

    async fn end_vlan_rest(&self, now: Instant) -> Result<(), Error> {
        loop {
            let transaction = {
                let view = self.view();
                let mut draft = Draft::new(&view);
                let over = view.resting_vlans.iter().flat_map(|(parent, vlans)| {
                    vlans
                        .iter()
                        .filter(|(_, until)| **until <= now)
                        .map(move |(vlan, _)| keys::vlan(parent, *vlan))
                });
                for key in over.take(BATCH) {
                    draft.delete(key);
                }
                draft.build()
            };
            if transaction.changes.is_empty() || self.commit(transaction).await?.is_none() {
                return Ok(());
            }
        }
    }
}

/// Idle interfaces that the node's settings no longer ask for, and those on a parent that carries more than it may.
fn misfits(view: &View, node: &Node, now: Instant) -> Vec<Arc<Interface>> {
    let idle = |interface: &&Arc<Interface>| !interface.is_cooling(now);
    let mut misfits: Vec<_> = view
        .idle_on_node(&node.name)
        .filter(idle)
        .filter(|interface| !View::fits(node, interface))
        .cloned()
        .collect();
    if let NodeKind::SubEni { parents } = &node.kind {
        for parent in parents {
            let there = |interface: &&Arc<Interface>| interface.parent.as_ref() == Some(&parent.id);
            let count =
                view.on_node(&node.name).filter(there).filter(|there| there.state != State::Deleting).count();
            let excess = count.saturating_sub(parent.limit as usize);
            let idle = view.idle_on_node(&node.name).filter(idle).filter(there);
            misfits.extend(idle.filter(|idle| View::fits(node, idle)).take(excess).cloned());
        }
    }
    misfits
}

/// The idle interfaces that have rested longest.
fn spare(view: &View, node: &Node, now: Instant, count: usize) -> Vec<Arc<Interface>> {
    let mut idle: Vec<_> = view
        .idle_on_node(&node.name)
        .filter(|interface| !interface.is_cooling(now) && !view.reserved.contains(&interface.id))
        .cloned()
        .collect();
    idle.sort_by_key(|interface| interface.since);
    idle.truncate(count);
    idle
}

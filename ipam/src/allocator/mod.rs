//! The allocator.
//!
//! - this file: what callers use, and how the view follows the store
//! - `claim`: giving interfaces to pods and taking them back
//! - `grow`: new interfaces: where, in which subnet, with which VLAN
//! - `groups`: security groups, and which of them a pod has
//! - `drive`: the VPC calls of intents
//! - `tend`: what happens with time: pools, cool-downs, retention, retries, draining
//! - `leaks`: comparing the records with the VPC's list

mod claim;
mod drive;
mod groups;
mod grow;
mod leaks;
mod tend;

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use eniway_policy::model::Groups;
use tokio::{
    sync::{Notify, Semaphore, oneshot, watch},
    task::JoinSet,
};

use crate::{
    api::{
        Acknowledgement, AllocateRequest, Allocation, Confirm, CoolingStatus, Error, LeakStatus, PoolStatus,
        Released, SecurityGroupsPut, Settings, SubnetStatus, check_node,
    },
    clock::{Clock, Instant},
    feed::{Feed, Position, Watch},
    model::{Interface, Node, PodKey, State, Subnet, keys},
    store::{Change, Commit, Revision, Store, StoreError, Transaction, Watched},
    view::{Draft, Touched, View, decode, decode_groups},
    vpc::Vpc,
};

/// How often time-driven work is looked for.
const TICK: Duration = Duration::from_millis(200);
/// How long the watch may stay behind what a transaction has shown.
const CATCH_UP: Duration = Duration::from_secs(5);
/// The pause before the store is asked again after it failed.
const STORE_PAUSE: Duration = Duration::from_millis(500);

/// The allocator. Cheap to clone; when the last clone is dropped, all its work stops where it is, as in a crash.
#[derive(Clone)]
pub struct Allocator {
    inner: Arc<Inner>,
    _running: Arc<Running>,
}

/// Stops the work when the last [`Allocator`] is dropped.
struct Running(Arc<Inner>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.stop();
    }
}

struct Inner {
    settings: Settings,
    store: Arc<dyn Store>,
    vpc: Arc<dyn Vpc>,
    clock: Arc<dyn Clock>,
    view: Mutex<View>,
    feed: Arc<Feed>,
    /// How far the watch has come.
    followed: watch::Sender<Revision>,
    waiters: Mutex<HashMap<String, Vec<Waiter>>>,
    /// Interfaces whose intent a task of ours is carrying out.
    driven: Mutex<HashSet<String>>,
    idle: Notify,
    /// Intents whose call failed: when to try again.
    retries: Mutex<HashMap<String, Retry>>,
    usage: Mutex<HashMap<String, Usage>>,
    /// Serialises growth of one node within this process; between processes the node's pool record does.
    growing: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Per node: the VPC's last refusal or failure, and until when its pool does not ask again.
    problems: Mutex<HashMap<String, Problem>>,
    acknowledged: Mutex<HashMap<String, watch::Sender<Acknowledgement>>>,
    timers: Mutex<tend::Timers>,
    calls: Semaphore,
    tasks: Mutex<JoinSet<()>>,
    stopped: AtomicBool,
}

struct Waiter {
    wake: oneshot::Sender<Result<(), Error>>,
    deadline: Instant,
    timeout: Error,
}

#[derive(Clone, Copy)]
struct Retry {
    attempts: u32,
    at: Instant,
}

#[derive(Clone, Copy)]
struct Usage {
    available: u64,
    total: u64,
}

struct Problem {
    text: String,
    quiet_until: Instant,
}

impl Allocator {
    /// Reads the store and takes up what was left unfinished. Time-driven work begins with [`Allocator::start`].
    pub async fn open(
        settings: Settings,
        store: Arc<dyn Store>,
        vpc: Arc<dyn Vpc>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, Error> {
        let calls = Semaphore::new(settings.vpc_calls.max(1));
        let inner = Arc::new(Inner {
            settings,
            store,
            vpc,
            clock,
            view: Mutex::default(),
            feed: Arc::default(),
            followed: watch::Sender::new(0),
            waiters: Mutex::default(),
            driven: Mutex::default(),
            idle: Notify::new(),
            retries: Mutex::default(),
            usage: Mutex::default(),
            growing: Mutex::default(),
            problems: Mutex::default(),
            acknowledged: Mutex::default(),
            timers: Mutex::default(),
            calls,
            tasks: Mutex::default(),
            stopped: AtomicBool::new(false),
        });
        let allocator = Self { inner: inner.clone(), _running: Arc::new(Running(inner.clone())) };
        let revision = inner.load(true).await?;
        inner.spawn(inner.clone().follow(revision + 1));
        inner.name_store().await?;
        inner.take_up_intents();
        Ok(allocator)
    }

    /// Does the time-driven work in the background from now on. Without it, call [`Allocator::tick`].
    pub fn start(&self) {
        let inner = self.inner.clone();
        self.inner.spawn(async move {
            loop {
                if let Err(error) = inner.tick().await {
                    log::warn!("{error}");
                    inner.clock.sleep(STORE_PAUSE).await;
                }
                inner.clock.sleep(TICK).await;
            }
        });
    }

    /// Does the time-driven work that is due, once: pools, retries, retention, draining, leaks. VPC calls go on in the background.
    pub async fn tick(&self) -> Result<(), Error> {
        self.inner.tick().await
    }

    /// Returns when no VPC call for an interface is under way; failed ones that wait for their repetition do not count.
    pub async fn settle(&self) {
        loop {
            let idle = self.inner.idle.notified();
            tokio::pin!(idle);
            idle.as_mut().enable();
            if lock(&self.inner.driven).is_empty() {
                return;
            }
            idle.await;
        }
    }

    /// Stops all work where it is, and returns when nothing of it is left running.
    pub async fn close(self) {
        self.inner.stop();
        let mut tasks = std::mem::take(&mut *lock(&self.inner.tasks));
        while tasks.join_next().await.is_some() {}
    }

    /// Gives a pod an interface. With the same pod uid and container id it gives the same one again. Waits for the VPC
    /// when nothing suitable is ready.
    pub async fn allocate(&self, request: &AllocateRequest) -> Result<Allocation, Error> {
        self.inner.allocate(request).await
    }

    /// Takes a pod's interface back. May be repeated. With a generation, only that allocation is released.
    pub async fn release(&self, key: &PodKey, generation: Option<u64>) -> Result<Released, Error> {
        self.inner.release(key, generation).await
    }

    /// Gives a pod other security groups, at the VPC too. While the VPC is told, the pod's node leaves the pod to it. May be repeated.
    pub async fn set_security_groups(
        &self,
        key: &PodKey,
        groups: &[String],
        timeout: Option<Duration>,
    ) -> Result<Allocation, Error> {
        self.inner.set_security_groups(key, groups, timeout).await
    }

    /// All security groups and address groups, with their revision.
    pub fn security_groups(&self) -> Arc<Groups> {
        self.inner.view().groups.clone()
    }

    /// Puts security groups and address groups in place of those that are there. What changes nothing gets no new revision. A
    /// document that names a revision other than 0 replaces that one only.
    pub async fn put_security_groups(&self, groups: Groups) -> Result<SecurityGroupsPut, Error> {
        self.inner.put_security_groups(groups).await
    }

    /// The allocations of one node, or of all.
    pub fn list(&self, node: Option<&str>) -> Vec<Allocation> {
        let view = self.inner.view();
        let allocation = |interface: &Arc<Interface>| {
            allocation(&view, interface, view.revision(&keys::interface(&interface.id)))
        };
        match node {
            Some(node) => view.on_node(node).filter_map(allocation).collect(),
            None => view.interfaces.values().filter_map(allocation).collect(),
        }
    }

    /// The id of the store: what a revision is worth is known with it only.
    pub fn store_id(&self) -> String {
        self.inner.view().store.clone()
    }

    /// What a node's agent must know, from a snapshot on, or from the last notice it has seen. A position in another store
    /// leads to a snapshot.
    pub fn watch(&self, node: &str, from: Option<&Position>) -> Watch {
        let store = self.store_id();
        let from = from.filter(|position| position.store == store).map(|position| position.revision);
        self.inner.feed.watch(node, from)
    }

    /// A node's agent reports how far it has come. Kept in memory: agents report again after they reconnect. What it has of
    /// another store says nothing about this one.
    pub fn ack(&self, node: &str, acknowledgement: Acknowledgement) {
        if acknowledgement.store == self.store_id() {
            self.inner.acknowledgements(node).send_replace(acknowledgement);
        }
    }

    /// Returns when the node's agent has put the allocation into the kernel, or says that it could not.
    pub async fn programmed(&self, allocation: &Allocation, timeout: Duration) -> Result<(), Error> {
        let mut acknowledged = self.inner.acknowledgements(&allocation.node).subscribe();
        let reached = async {
            loop {
                {
                    let Acknowledgement { revision, refused, .. } = &*acknowledged.borrow_and_update();
                    if *revision >= allocation.revision {
                        let refusal = refused.iter().find(|refused| refused.key == allocation.key);
                        return refusal.map_or(Ok(()), |refused| {
                            Err(Error::RefusedByAgent {
                                node: allocation.node.clone(),
                                key: refused.key.clone(),
                                reason: refused.reason.clone(),
                            })
                        });
                    }
                }
                acknowledged.changed().await.map_err(|_| Error::Closed)?;
            }
        };
        tokio::select! {
            result = reached => result,
            () = self.inner.clock.sleep(timeout) => Err(Error::TimedOut {
                what: format!("programming {} on node {}", allocation.key, allocation.node),
                waited: timeout,
            }),
        }
    }

    /// The nodes' settings.
    pub fn nodes(&self) -> Vec<Node> {
        let mut nodes: Vec<Node> = self.inner.view().nodes.values().map(|node| Node::clone(node)).collect();
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        nodes
    }

    /// The nodes' pools.
    pub fn pools(&self) -> Vec<PoolStatus> {
        let now = self.inner.clock.now();
        let view = self.inner.view();
        let problems = lock(&self.inner.problems);
        let acknowledged = lock(&self.inner.acknowledged);
        let mut pools: Vec<PoolStatus> = view
            .nodes
            .values()
            .map(|node| {
                let counts = view.counts(&node.name, now);
                PoolStatus {
                    node: node.name.clone(),
                    kind: node.kind.kind(),
                    policy: node.policy,
                    limit: node.kind.limit(),
                    pods: counts.pods,
                    idle: counts.idle,
                    cooling: counts.cooling,
                    coming: counts.coming,
                    leaving: counts.leaving,
                    draining: node.draining,
                    problem: problems.get(&node.name).map(|problem| problem.text.clone()),
                    acknowledged: acknowledged
                        .get(&node.name)
                        .map(|state| state.borrow().revision)
                        .filter(|revision| *revision > 0),
                }
            })
            .collect();
        pools.sort_by(|a, b| a.node.cmp(&b.node));
        pools
    }

    /// What rests after a release: interfaces, and VLANs whose interface has moved on.
    pub fn cooling(&self) -> Vec<CoolingStatus> {
        let now = self.inner.clock.now();
        let view = self.inner.view();
        let interfaces = view.cooling(now).map(|interface| CoolingStatus {
            interface_id: Some(interface.id.clone()),
            node: Some(interface.node.clone()),
            parent: interface.parent.clone(),
            vlan: interface.vlan.map(Into::into),
            addresses: interface.addresses,
            until: interface.available_at,
            remaining_ms: remaining_ms(now, interface.available_at),
        });
        let vlans = view.resting_vlans.iter().flat_map(|(parent, vlans)| {
            vlans.iter().filter(|(_, until)| **until > now).map(move |(vlan, until)| CoolingStatus {
                interface_id: None,
                node: None,
                parent: Some(parent.clone()),
                vlan: Some(vlan.get()),
                addresses: None,
                until: *until,
                remaining_ms: remaining_ms(now, *until),
            })
        });
        let mut cooling: Vec<_> = interfaces.chain(vlans).collect();
        cooling.sort_by_key(|cooling| cooling.until);
        cooling
    }

    /// What only one side knows, ours or the VPC.
    pub fn leaks(&self) -> Vec<LeakStatus> {
        self.inner.leak_status()
    }

    /// The container subnets.
    pub fn subnets(&self) -> Vec<SubnetStatus> {
        let view = self.inner.view();
        view.subnets.iter().map(|subnet| self.inner.subnet_status(&view, subnet)).collect()
    }

    /// Adds a container subnet; it is used from the next new interface on. Adding the same one again changes nothing.
    pub async fn add_subnet(&self, subnet: Subnet) -> Result<(), Error> {
        if !subnet.ipv4.contains(&subnet.gateway) {
            let Subnet { id, ipv4, gateway, .. } = &subnet;
            return Err(Error::Invalid(format!("subnet {id}: the gateway {gateway} is not in {ipv4}")));
        }
        loop {
            let transaction = {
                let view = self.inner.view();
                if view.subnets.contains(&subnet) {
                    return Ok(());
                }
                if let Some(old) =
                    view.subnets.iter().find(|old| old.id == subnet.id || old.overlaps(&subnet))
                {
                    return Err(Error::SubnetOverlap {
                        new: subnet.id.clone(),
                        new_prefix: subnet.ipv4,
                        old: old.id.clone(),
                        old_prefix: old.ipv4,
                    });
                }
                let mut subnets = view.subnets.clone();
                subnets.push(subnet.clone());
                let mut draft = Draft::new(&view);
                draft.put(keys::SUBNETS.to_owned(), &subnets)?;
                draft.build()
            };
            if self.inner.commit(transaction).await?.is_some() {
                self.inner.refresh_usage_soon();
                return Ok(());
            }
        }
    }

    /// Registers a node or changes its settings. Lower limits take effect at once on idle interfaces.
    pub async fn put_node(&self, node: Node) -> Result<(), Error> {
        check_node(&node)?;
        let key = keys::node(&node.name);
        loop {
            let transaction = {
                let view = self.inner.view();
                let old = view.nodes.get(&node.name);
                if old.is_some_and(|old| old.draining) {
                    return Err(Error::Draining(node.name));
                }
                let confirmed = old.map_or(0, |old| old.confirmed);
                let node = Node { draining: false, confirmed, ..node.clone() };
                if old.is_some_and(|old| **old == node) {
                    return Ok(());
                }
                let mut draft = Draft::new(&view);
                draft.put(key.clone(), &node)?;
                draft.build()
            };
            if self.inner.commit(transaction).await?.is_some() {
                return Ok(());
            }
        }
    }

    /// Empties a node that is going away: no more pods, all allocations released, all interfaces deleted once they have
    /// cooled down; static addresses are kept for their time. The node's record goes when nothing is left.
    pub async fn drain_node(&self, name: &str) -> Result<(), Error> {
        loop {
            let transaction = {
                let view = self.inner.view();
                let node = view.nodes.get(name).ok_or_else(|| Error::UnknownNode(name.to_owned()))?;
                if node.draining {
                    break;
                }
                let mut draft = Draft::new(&view);
                draft.put(keys::node(name), &Node { draining: true, ..Node::clone(node) })?;
                draft.build()
            };
            if self.inner.commit(transaction).await?.is_some() {
                break;
            }
        }
        self.inner.drain(name).await
    }

    /// An operator's yes to something that was held back.
    pub async fn confirm(&self, what: &Confirm) -> Result<(), Error> {
        match what {
            Confirm::Leaks => self.inner.confirm_leaks().await,
            Confirm::Node(name) => loop {
                let transaction = {
                    let view = self.inner.view();
                    let node = view.nodes.get(name).ok_or_else(|| Error::UnknownNode(name.clone()))?;
                    let mut draft = Draft::new(&view);
                    draft.put(keys::node(name), &Node { confirmed: view.latest, ..Node::clone(node) })?;
                    draft.build()
                };
                if self.inner.commit(transaction).await?.is_some() {
                    return Ok(());
                }
            },
        }
    }
}

impl Inner {
    fn view(&self) -> MutexGuard<'_, View> {
        lock(&self.view)
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = lock(&self.tasks);
        if !self.stopped.load(Ordering::SeqCst) {
            tasks.spawn(task);
        }
        while tasks.try_join_next().is_some() {}
    }

    fn stop(&self) {
        let mut tasks = lock(&self.tasks);
        self.stopped.store(true, Ordering::SeqCst);
        tasks.abort_all();
        drop(tasks);
        lock(&self.waiters).clear();
        self.feed.close();
    }

    fn acknowledgements(&self, node: &str) -> watch::Sender<Acknowledgement> {
        lock(&self.acknowledged)
            .entry(node.to_owned())
            .or_insert_with(|| watch::Sender::new(Acknowledgement::default()))
            .clone()
    }

    /// Gives the store an id, if no allocator has done so yet.
    async fn name_store(&self) -> Result<(), Error> {
        loop {
            let transaction = {
                let view = self.view();
                if !view.store.is_empty() {
                    return Ok(());
                }
                let mut draft = Draft::new(&view);
                draft.put(keys::STORE.to_owned(), &format!("{:016x}", fastrand::u64(..)))?;
                draft.build()
            };
            self.commit(transaction).await?;
        }
    }

    /// Reads everything and brings the view and the feed in line with it.
    async fn load(&self, first: bool) -> Result<Revision, Error> {
        let range = self.store.range("").await?;
        let mut touched = Vec::new();
        {
            let mut view = self.view();
            let there: HashSet<&str> = range.entries.iter().map(|entry| entry.key.as_str()).collect();
            let gone: Vec<String> = view
                .keys()
                .filter(|(key, revision)| *revision <= range.revision && !there.contains(key.as_str()))
                .map(|(key, _)| key.clone())
                .collect();
            let mut feed = self.feed.lock();
            if first {
                feed.begin(range.revision);
            }
            for key in gone {
                collect(view.apply(&key, range.revision, None)?, &mut touched);
            }
            for entry in &range.entries {
                collect(view.apply(&entry.key, entry.revision, Some(&entry.value))?, &mut touched);
            }
            view.latest = view.latest.max(range.revision);
            view.watched(range.revision);
            let mut carrying = HashSet::new();
            for entry in &range.entries {
                if let Some(id) = entry.key.strip_prefix("interface/")
                    && let Some(interface) = decode::<Interface>(&entry.key, Some(&entry.value))?
                {
                    carrying.insert(id);
                    let allocation = allocation(&view, &interface, entry.revision).map(Arc::new);
                    feed.update(range.revision, id, allocation);
                }
            }
            let ended: Vec<String> =
                feed.carriers().filter(|id| !carrying.contains(id.as_str())).cloned().collect();
            for id in ended {
                feed.update(range.revision, &id, None);
            }
            feed.regroup(range.revision, view.groups.clone());
            for node in view.nodes.values() {
                feed.confirm(&node.name, range.revision, node.confirmed);
            }
        }
        self.followed.send_replace(range.revision);
        for id in touched {
            self.wake(&id);
        }
        Ok(range.revision)
    }

    /// Follows the store's changes for as long as the allocator lives.
    async fn follow(self: Arc<Self>, mut next: Revision) {
        loop {
            match self.follow_once(&mut next).await {
                Ok(()) => {
                    log::info!(
                        "the store has compacted the changes from revision {next} on; reading everything again"
                    );
                    match self.load(false).await {
                        Ok(revision) => next = revision + 1,
                        Err(error) => log::warn!("{error}"),
                    }
                }
                Err(error) => log::warn!("{error}"),
            }
            self.clock.sleep(STORE_PAUSE).await;
        }
    }

    /// Returns when the store has compacted what is needed next.
    async fn follow_once(&self, next: &mut Revision) -> Result<(), StoreError> {
        let mut watch = self.store.watch(*next).await?;
        loop {
            match watch.next().await? {
                Watched::Compacted => return Ok(()),
                Watched::Changes(changes) => {
                    if let Some((revision, _)) = changes.last() {
                        *next = revision + 1;
                    }
                    self.take_in(&changes);
                }
            }
        }
    }

    fn take_in(&self, changes: &[(Revision, Change)]) {
        let mut touched = Vec::new();
        {
            let mut view = self.view();
            for (revision, Change { key, value }) in changes {
                match view.apply(key, *revision, value.as_deref()) {
                    Ok(change) => collect(change, &mut touched),
                    Err(error) => log::error!("{error}"),
                }
            }
            if let Some((revision, _)) = changes.last() {
                view.watched(*revision);
            }
            let mut feed = self.feed.lock();
            for (revision, Change { key, value }) in changes {
                if let Some(id) = key.strip_prefix("interface/") {
                    let interface = decode::<Interface>(key, value.as_deref()).unwrap_or_default();
                    let allocation = interface.and_then(|interface| allocation(&view, &interface, *revision));
                    feed.update(*revision, id, allocation.map(Arc::new));
                } else if key == keys::SECURITY_GROUPS {
                    // What cannot be read was reported above.
                    if let Ok(groups) = decode_groups(key, *revision, value.as_deref()) {
                        feed.regroup(*revision, groups.into());
                    }
                } else if let Some(name) = key.strip_prefix("node/")
                    && let Some(node) = view.nodes.get(name)
                {
                    feed.confirm(name, *revision, node.confirmed);
                }
            }
        }
        if let Some((revision, _)) = changes.last() {
            self.followed.send_replace(*revision);
        }
        for id in touched {
            self.wake(&id);
        }
    }

    /// Makes a transaction and takes over what it says, either way. None when it was in conflict with another change.
    async fn commit(&self, transaction: Transaction) -> Result<Option<Revision>, Error> {
        let changes = transaction.changes.clone();
        let mut touched = Vec::new();
        let mut behind = 0;
        let done = match self.store.commit(transaction).await? {
            Commit::Done(revision) => {
                let mut view = self.view();
                for Change { key, value } in &changes {
                    collect(view.apply(key, revision, value.as_deref())?, &mut touched);
                }
                Some(revision)
            }
            Commit::Conflict { revision, current } => {
                let mut view = self.view();
                for (key, entry) in &current {
                    let change = match entry {
                        Some(entry) => {
                            behind = behind.max(entry.revision);
                            view.apply(key, entry.revision, Some(&entry.value))?
                        }
                        None => view.apply(key, revision, None)?,
                    };
                    collect(change, &mut touched);
                }
                None
            }
        };
        for id in touched {
            self.wake(&id);
        }
        if done.is_none() {
            self.catch_up(behind).await?;
        }
        Ok(done)
    }

    /// Returns when the watch has come this far. Keys that are newer than the rest of the view must not be decided on: a new
    /// pool record says that there are new interfaces, and they have to be seen with it.
    async fn catch_up(&self, revision: Revision) -> Result<(), Error> {
        let mut followed = self.followed.subscribe();
        let caught_up = followed.wait_for(|followed| *followed >= revision);
        match tokio::time::timeout(CATCH_UP, caught_up).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Error::Closed),
            Err(_) => Err(Error::Store(StoreError::Unavailable {
                store: "the allocator's".to_owned(),
                reason: format!("its changes up to revision {revision} did not arrive within {CATCH_UP:?}"),
            })),
        }
    }

    /// Whether the keys are really not there, in case others change the store too and the view is behind.
    async fn really_absent(&self, key: &str) -> Result<bool, Error> {
        if self.store.exclusive() {
            return Ok(true);
        }
        let transaction = Transaction { expect: vec![(key.to_owned(), 0)], changes: Vec::new() };
        Ok(self.commit(transaction).await?.is_some())
    }

    /// Registers for the next change of an interface. To be called under the view's lock, so that no change is missed.
    fn wait_for(&self, id: &str, deadline: Instant, timeout: Error) -> oneshot::Receiver<Result<(), Error>> {
        let (wake, woken) = oneshot::channel();
        if !self.stopped.load(Ordering::SeqCst) {
            lock(&self.waiters).entry(id.to_owned()).or_default().push(Waiter { wake, deadline, timeout });
        }
        woken
    }

    /// An interface has changed: who waits for it looks again. When its record is gone and a task of ours did that, the
    /// task says why.
    fn wake(&self, id: &str) {
        let gone = !self.view().interfaces.contains_key(id);
        if gone && lock(&self.driven).contains(id) {
            return;
        }
        self.answer(id, &Ok(()));
    }

    fn answer(&self, id: &str, result: &Result<(), Error>) {
        for waiter in lock(&self.waiters).remove(id).into_iter().flatten() {
            // Who no longer waits needs no answer.
            let _ = waiter.wake.send(result.clone());
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere leaves plain values behind; the store has the truth.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn collect(change: Touched, touched: &mut Vec<String>) {
    if let Touched::Interface(id) = change {
        touched.push(id);
    }
}

fn remaining_ms(now: Instant, until: Instant) -> u64 {
    until.0.saturating_sub(now.0)
}

/// The allocation that an interface carries.
fn allocation(view: &View, interface: &Interface, revision: Revision) -> Option<Allocation> {
    let claim = interface.claim.as_ref()?;
    let vlan = match (interface.state, interface.vlan) {
        (State::Bound, Some(vlan)) => vlan.get().into(),
        (State::Bound, None) => 0,
        (State::Lost, _) => -1,
        _ => return None,
    };
    let subnet = view.subnets.iter().find(|subnet| subnet.id == interface.subnet)?;
    let parent = interface.vlan.and(interface.parent.clone());
    let parent_interface = parent.as_ref().and_then(|id| {
        let crate::model::NodeKind::SubEni { parents } = &view.nodes.get(&interface.node)?.kind else {
            return None;
        };
        parents.iter().find(|parent| parent.id == *id).map(|parent| parent.interface.clone())
    });
    let addresses = interface.addresses?;
    Some(Allocation {
        key: claim.key.clone(),
        namespace: claim.namespace.clone(),
        name: claim.name.clone(),
        node: interface.node.clone(),
        netns: claim.netns.clone(),
        interface: claim.interface.clone(),
        generation: claim.generation,
        interface_id: interface.id.clone(),
        vpc_id: interface.vpc_id.clone()?,
        kind: interface.kind,
        parent,
        parent_interface,
        vlan,
        mac: interface.mac?,
        addresses,
        subnet_id: subnet.id.clone(),
        subnet: subnet.ipv4,
        gateway: subnet.gateway,
        gateway_mac: subnet.gateway_mac,
        subnet_ipv6: addresses.ipv6.and(subnet.ipv6),
        gateway_ipv6: addresses.ipv6.and(subnet.gateway_ipv6),
        mtu: subnet.mtu,
        security_groups: interface.security_groups.clone(),
        security_groups_revision: claim.security_groups_revision,
        regrouping: interface.regroup.is_some(),
        is_static: interface.static_for.is_some(),
        revision,
    })
}

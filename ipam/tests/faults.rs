//! Random operations with failing VPC calls and crashes at every boundary between the allocator and the world.
//!
//! A model of what callers were told is held against what the allocator and the VPC say. `IPAM_FAULT_SEEDS` runs more of them.

#![expect(clippy::unwrap_used, reason = "test code")]

mod common;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use common::{AtWork, MINUTE, SECOND, node, request, static_request, subnet};
use eniway_ipam::{
    AllocateRequest, Allocation, Allocator, Clock, EmbeddedStore, Error, ManualClock, MemoryVpc, Node,
    NodeKind, Parent, PodKey, Policy, Settings, Store, Vpc,
    clock::Instant,
    store::{Commit, Range, Revision, StoreError, StoreWatch, Transaction},
    vpc::{Attachment, CreateInterface, Faults, Page, SubnetUsage, Violations, VpcError, VpcInterface},
};

/// Counts down to a crash: from then on nothing that this incarnation of the allocator asks for happens or is answered.
struct Fuse(AtomicI64);

impl Fuse {
    /// One boundary; for ever after the crash.
    async fn boundary(&self) {
        if self.0.fetch_sub(1, Ordering::SeqCst) <= 0 {
            std::future::pending::<()>().await;
        }
    }

    fn has_blown(&self) -> bool {
        self.0.load(Ordering::SeqCst) < 0
    }
}

struct FusedStore {
    inner: Arc<EmbeddedStore>,
    fuse: Arc<Fuse>,
    busy: Arc<AtomicUsize>,
}

#[async_trait]
impl Store for FusedStore {
    async fn range(&self, prefix: &str) -> Result<Range, StoreError> {
        self.inner.range(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Commit, StoreError> {
        self.fuse.boundary().await;
        let at_work = AtWork::new(&self.busy);
        let result = self.inner.commit(transaction).await;
        drop(at_work);
        self.fuse.boundary().await;
        result
    }

    async fn watch(&self, from: Revision) -> Result<Box<dyn StoreWatch>, StoreError> {
        self.inner.watch(from).await
    }

    async fn compact(&self, revision: Revision) -> Result<(), StoreError> {
        self.inner.compact(revision).await
    }

    async fn size(&self) -> Result<u64, StoreError> {
        self.inner.size().await
    }

    fn exclusive(&self) -> bool {
        true
    }
}

struct FusedVpc {
    inner: Arc<MemoryVpc>,
    fuse: Arc<Fuse>,
}

impl FusedVpc {
    async fn call<T>(&self, call: impl Future<Output = T>) -> T {
        self.fuse.boundary().await;
        let result = call.await;
        self.fuse.boundary().await;
        result
    }
}

#[async_trait]
impl Vpc for FusedVpc {
    async fn create(&self, request: CreateInterface) -> Result<VpcInterface, VpcError> {
        self.call(self.inner.create(request)).await
    }

    async fn delete(&self, id: &str) -> Result<(), VpcError> {
        self.call(self.inner.delete(id)).await
    }

    async fn attach(&self, id: &str, to: Attachment) -> Result<VpcInterface, VpcError> {
        self.call(self.inner.attach(id, to)).await
    }

    async fn detach(&self, id: &str) -> Result<(), VpcError> {
        self.call(self.inner.detach(id)).await
    }

    async fn set_security_groups(&self, id: &str, groups: &[String]) -> Result<(), VpcError> {
        self.call(self.inner.set_security_groups(id, groups)).await
    }

    async fn list(&self, owner: &str, page: Option<String>) -> Result<Page, VpcError> {
        self.call(self.inner.list(owner, page)).await
    }

    async fn usage(&self, subnets: &[String]) -> Result<Vec<SubnetUsage>, VpcError> {
        self.call(self.inner.usage(subnets)).await
    }
}

/// What callers were told.
#[derive(Default)]
struct Model {
    live: BTreeMap<PodKey, Allocation>,
    /// Calls whose answer never came: the pod's next call decides.
    allocating: BTreeMap<PodKey, AllocateRequest>,
    releasing: HashSet<PodKey>,
    address_released: HashMap<Ipv4Addr, (Instant, Option<String>)>,
    vlan_released: HashMap<(String, i32), Instant>,
    statics: HashMap<String, Ipv4Addr>,
    last_generation: HashMap<String, u64>,
}

struct Run {
    random: fastrand::Rng,
    clock: Arc<ManualClock>,
    vpc: Arc<MemoryVpc>,
    store: Arc<EmbeddedStore>,
    fuse: Arc<Fuse>,
    busy: Arc<AtomicUsize>,
    allocator: Option<Allocator>,
    model: Model,
    pods: u64,
    crashes: u64,
    seed: u64,
}

const NODES: [&str; 4] = ["pool", "targets", "demand", "bms"];

impl Run {
    async fn new(seed: u64) -> Self {
        let clock = Arc::new(ManualClock::new());
        let vpc = Arc::new(MemoryVpc::new(clock.clone(), seed));
        let mut run = Self {
            random: fastrand::Rng::with_seed(seed),
            vpc,
            store: Arc::new(EmbeddedStore::in_memory().unwrap()),
            fuse: Arc::new(Fuse(AtomicI64::new(i64::MAX))),
            busy: Arc::default(),
            allocator: None,
            model: Model::default(),
            pods: 0,
            crashes: 0,
            seed,
            clock,
        };
        // The allocator's own choices, too, follow from the seed.
        fastrand::seed(seed);
        run.open().await;
        for (id, prefix) in [("net-a", "10.1.0.0/24"), ("net-b", "10.2.0.0/26")] {
            let subnet = subnet(id, prefix);
            run.vpc.add_subnet(id, subnet.ipv4, subnet.ipv6);
            run.allocator().add_subnet(subnet).await.unwrap();
        }
        run.vpc.add_parent("p1", 12);
        run.vpc.add_parent("p2", 8);
        run.vpc.add_parent("p3", 10);
        run.vpc.add_parent("p4", 12);
        run.vpc.add_instance("bms", 6);
        run.put_nodes().await;
        run
    }

    async fn put_nodes(&self) {
        let parent = |id: &str, limit| Parent { id: id.into(), interface: "eth1".into(), limit };
        let parents = vec![parent("p1", 12), parent("p2", 8)];
        let nodes = [
            Node { dual_stack: true, ..node("pool", parents, Policy::PreBound { minimum: 2, maximum: 4 }) },
            node(
                "targets",
                vec![parent("p3", 10)],
                Policy::Targets { minimum: 3, maximum: 0, warm: 1, reclaim_above: 1 },
            ),
            node("demand", vec![parent("p4", 12)], Policy::OnDemand),
            Node {
                kind: NodeKind::ExclusiveEni { instance: "bms".into(), bindable: 6 },
                ..node("bms", Vec::new(), Policy::PreBound { minimum: 1, maximum: 2 })
            },
        ];
        for node in nodes {
            match self.allocator().put_node(node).await {
                Ok(()) | Err(Error::Draining(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn allocator(&self) -> &Allocator {
        self.allocator.as_ref().unwrap()
    }

    async fn open(&mut self) {
        self.fuse = Arc::new(Fuse(AtomicI64::new(i64::MAX)));
        let store =
            FusedStore { inner: self.store.clone(), fuse: self.fuse.clone(), busy: self.busy.clone() };
        let vpc = FusedVpc { inner: self.vpc.clone(), fuse: self.fuse.clone() };
        let settings = Settings { leak_interval: 5 * MINUTE, ..Settings::default() };
        let allocator =
            Allocator::open(settings, Arc::new(store), Arc::new(vpc), self.clock.clone()).await.unwrap();
        self.allocator = Some(allocator);
    }

    /// After a crash: what was on its way to the store arrives or not, then a new allocator finds what is there.
    async fn recover(&mut self) {
        self.allocator.take().unwrap().close().await;
        // Transactions are made in their order: after this one, all that were on their way have arrived.
        self.store.commit(Transaction::default()).await.unwrap();
        self.crashes += 1;
        self.open().await;
    }

    /// Runs a call until it ends, time helps, or the allocator crashes: then none.
    async fn call<T: Send + 'static>(
        &mut self,
        call: impl FnOnce(Allocator) -> std::pin::Pin<Box<dyn Future<Output = T> + Send>>,
    ) -> Option<T> {
        let mut task = tokio::spawn(call(self.allocator().clone()));
        loop {
            let crashed = self.quiet().await;
            if task.is_finished() {
                return Some((&mut task).await.unwrap());
            }
            if crashed {
                task.abort();
                let _ = task.await;
                self.recover().await;
                return None;
            }
            self.clock.advance(SECOND);
            if self.tick().await.is_none() {
                task.abort();
                let _ = task.await;
                self.recover().await;
                return None;
            }
        }
    }

    /// Until nothing moves. True when the allocator has crashed.
    async fn quiet(&self) -> bool {
        let mut rounds = 0;
        while rounds < 10 {
            tokio::task::yield_now().await;
            if self.fuse.has_blown() {
                return true;
            }
            // A drive that hit the fuse never ends; one that did not, does.
            tokio::select! {
                biased;
                () = self.allocator().settle() => {}
                () = tokio::task::yield_now() => { rounds = 0; continue }
            }
            rounds = if self.busy.load(Ordering::SeqCst) == 0 { rounds + 1 } else { 0 };
        }
        self.fuse.has_blown()
    }

    /// None when the allocator has crashed.
    async fn tick(&self) -> Option<()> {
        let allocator = self.allocator().clone();
        let mut task = tokio::spawn(async move { allocator.tick().await });
        loop {
            let crashed = self.quiet().await;
            if task.is_finished() {
                (&mut task).await.unwrap().unwrap();
                return (!crashed).then_some(());
            }
            if crashed {
                task.abort();
                let _ = task.await;
                return None;
            }
        }
    }

    async fn pass(&mut self, time: Duration) {
        let step = if time >= 10 * MINUTE { 30 } else { 5 };
        for _ in 0..time.as_secs().div_ceil(step) {
            self.clock.advance(Duration::from_secs(step));
            if self.tick().await.is_none() {
                self.recover().await;
            }
        }
    }

    async fn allocate(&mut self, request: AllocateRequest) {
        let asked = request.clone();
        let result = self.call(|allocator| Box::pin(async move { allocator.allocate(&asked).await })).await;
        let key = request.key.clone();
        if trace() {
            println!("allocate {key} {}/{} on {}: {result:?}", request.namespace, request.name, request.node);
        }
        match result {
            None => {
                if !self.model.live.contains_key(&key) {
                    self.model.allocating.insert(key, request);
                }
            }
            Some(Ok(allocation)) => {
                self.model.allocating.remove(&key);
                self.allocated(allocation, &request);
            }
            Some(Err(Error::TimedOut { .. } | Error::Closed)) => {
                if !self.model.live.contains_key(&key) {
                    self.model.allocating.insert(key, request);
                }
            }
            Some(Err(error)) => {
                assert!(
                    !self.model.live.contains_key(&key),
                    "seed {}: {key} has an interface: {error}",
                    self.seed
                );
                let expected = matches!(
                    error,
                    Error::NodeFull { .. }
                        | Error::SubnetsExhausted { .. }
                        | Error::StaticInUse { .. }
                        | Error::Draining(_)
                        | Error::UnknownNode(_)
                );
                assert!(expected, "seed {}: {error}", self.seed);
                self.model.allocating.remove(&key);
            }
        }
    }

    fn allocated(&mut self, allocation: Allocation, request: &AllocateRequest) {
        let seed = self.seed;
        let now = self.clock.now();
        if let Some(known) = self.model.live.get(&allocation.key) {
            assert_eq!(*known, allocation, "seed {seed}: not idempotent");
            return;
        }
        let pod = format!("{}/{}", request.namespace, request.name);
        for other in self.model.live.values() {
            assert_ne!(other.addresses.ipv4, allocation.addresses.ipv4, "seed {seed}: double address");
            let place = |allocation: &Allocation| (allocation.parent.clone(), allocation.vlan);
            if allocation.parent.is_some() {
                assert_ne!(place(other), place(&allocation), "seed {seed}: double VLAN");
            }
        }
        if let Some((released, by)) = self.model.address_released.get(&allocation.addresses.ipv4)
            && by.as_ref() != Some(&pod)
        {
            assert!(
                released.after(MINUTE) <= now,
                "seed {seed}: {} used again too early",
                allocation.addresses
            );
        }
        if let Some(parent) = &allocation.parent
            && let Some(released) = self.model.vlan_released.get(&(parent.clone(), allocation.vlan))
        {
            assert!(
                released.after(MINUTE) <= now,
                "seed {seed}: VLAN {} used again too early",
                allocation.vlan
            );
        }
        if allocation.is_static
            && let Some(kept) = self.model.statics.insert(pod, allocation.addresses.ipv4)
            && let Some((released, Some(by))) = self.model.address_released.get(&kept)
            && *by == format!("{}/{}", request.namespace, request.name)
            && released.after(5 * MINUTE) > now
        {
            assert_eq!(kept, allocation.addresses.ipv4, "seed {seed}: static address lost");
        }
        let last = self.model.last_generation.insert(allocation.interface_id.clone(), allocation.generation);
        assert!(last.is_none_or(|last| last < allocation.generation), "seed {seed}: generation went back");
        self.vpc.set_in_use(&allocation.vpc_id, true);
        self.model.live.insert(allocation.key.clone(), allocation);
    }

    async fn release(&mut self, key: PodKey) {
        let now = self.clock.now();
        if let Some(allocation) = self.model.live.remove(&key) {
            self.vpc.set_in_use(&allocation.vpc_id, false);
            let by = allocation.is_static.then(|| format!("{}/{}", allocation.namespace, allocation.name));
            self.model.address_released.insert(allocation.addresses.ipv4, (now, by));
            if let Some(parent) = allocation.parent {
                self.model.vlan_released.insert((parent, allocation.vlan), now);
            }
        }
        self.model.allocating.remove(&key);
        let asked = key.clone();
        let result =
            self.call(|allocator| Box::pin(async move { allocator.release(&asked, None).await })).await;
        if trace() {
            println!("release {key}: {result:?}");
        }
        match result {
            None => self.model.releasing.insert(key),
            Some(Ok(_)) => self.model.releasing.remove(&key),
            Some(Err(error)) => panic!("seed {}: {error}", self.seed),
        };
    }

    fn any_live(&mut self) -> Option<PodKey> {
        let keys: Vec<_> = self.model.live.keys().cloned().collect();
        self.random.choice(keys)
    }

    async fn step(&mut self) {
        if trace() {
            println!(
                "{:?} {:?}",
                self.clock.now(),
                self.store
                    .range("static")
                    .await
                    .unwrap()
                    .entries
                    .iter()
                    .map(|e| format!("{} {}", e.key, String::from_utf8_lossy(&e.value)))
                    .collect::<Vec<_>>()
            );
        }
        if self.random.u32(..8) == 0 {
            self.fuse.0.store(self.random.i64(..30), Ordering::SeqCst);
        }
        match self.random.u32(..100) {
            0..35 => {
                self.pods += 1;
                let node = *self.random.choice(NODES.iter()).unwrap();
                self.allocate(request(node, &format!("pod-{}", self.pods))).await;
            }
            35..42 => {
                let name = format!("db-{}", self.random.u32(..4));
                self.pods += 1;
                let node = *self.random.choice(["pool", "demand"].iter()).unwrap();
                // One dual-stack node: a static interface stays what it was created as.
                let uid = format!("static-{}", self.pods);
                self.allocate(static_request(node, &name, &uid)).await;
            }
            42..50 => {
                // The same question again.
                if let Some(key) = self.any_live() {
                    let known = self.model.live[&key].clone();
                    let again = AllocateRequest {
                        key,
                        namespace: known.namespace.clone(),
                        ..request(&known.node, &known.name)
                    };
                    self.allocate(again).await;
                }
            }
            50..55 => {
                if let Some((_, request)) =
                    self.model.allocating.iter().next().map(|(k, r)| (k.clone(), r.clone()))
                {
                    self.allocate(request).await;
                }
            }
            55..60 => {
                let pending = self.model.releasing.iter().chain(self.model.allocating.keys()).next().cloned();
                if let Some(key) = pending {
                    self.release(key).await;
                }
            }
            60..88 => {
                if let Some(key) = self.any_live() {
                    self.release(key).await;
                }
            }
            88..99 => {
                let seconds = self.random.u64(1..100);
                self.pass(Duration::from_secs(seconds)).await;
            }
            _ => self.drain().await,
        }
    }

    async fn drain(&mut self) {
        let name = (*self.random.choice(NODES.iter()).unwrap()).to_owned();
        let now = self.clock.now();
        let pods: Vec<_> = self.model.live.values().filter(|pod| pod.node == name).cloned().collect();
        for pod in pods {
            self.model.live.remove(&pod.key);
            self.vpc.set_in_use(&pod.vpc_id, false);
            let by = pod.is_static.then(|| format!("{}/{}", pod.namespace, pod.name));
            self.model.address_released.insert(pod.addresses.ipv4, (now, by));
            if let Some(parent) = pod.parent {
                self.model.vlan_released.insert((parent, pod.vlan), now);
            }
        }
        self.model.allocating.retain(|_, request| request.node != name);
        let asked = name.clone();
        while let None | Some(Err(_)) = self
            .call(|allocator| {
                let asked = asked.clone();
                Box::pin(async move {
                    match allocator.drain_node(&asked).await {
                        Err(Error::UnknownNode(_)) => Ok(()),
                        other => other,
                    }
                })
            })
            .await
        {}
        self.fuse.0.store(i64::MAX, Ordering::SeqCst);
        for _ in 0..200 {
            if self.allocator().nodes().iter().all(|node| node.name != name) {
                break;
            }
            self.pass(5 * SECOND).await;
        }
        self.put_nodes().await;
    }

    /// All faults end; what was begun is finished; then everything must agree.
    async fn finish(&mut self) {
        let seed = self.seed;
        self.recover().await;
        self.vpc.set_faults(Faults::default());
        let releasing: Vec<_> = self.model.releasing.iter().cloned().collect();
        for key in releasing {
            self.release(key).await;
        }
        let allocating: Vec<_> = self.model.allocating.values().cloned().collect();
        for request in allocating {
            self.allocate(request).await;
        }
        self.pass(30 * MINUTE).await;
        assert_eq!(self.allocator().leaks(), [], "seed {seed}");
        let mut listed: Vec<_> = self.allocator().list(None);
        listed.sort_by(|a, b| a.key.cmp(&b.key));
        let expected: Vec<_> = self.model.live.values().cloned().collect();
        assert_eq!(listed, expected, "seed {seed}: lost or left allocations");
        for pod in &expected {
            let there = self.vpc.interfaces().into_iter().find(|interface| interface.id == pod.vpc_id);
            let there = there.unwrap_or_else(|| panic!("seed {seed}: the VPC lost {}", pod.key));
            assert_eq!((there.addresses, there.mac), (pod.addresses, pod.mac), "seed {seed}");
            assert!(there.attachment.is_some(), "seed {seed}");
        }
        assert_eq!(self.vpc.violations(), Violations::default(), "seed {seed}");
        // Everything goes: nothing may stay behind at the VPC, and nothing but the subnets in the store.
        for key in self.model.live.keys().cloned().collect::<Vec<_>>() {
            self.release(key).await;
        }
        for node in NODES {
            self.allocator().drain_node(node).await.unwrap();
        }
        self.pass(30 * MINUTE).await;
        assert_eq!(self.vpc.interfaces(), [], "seed {seed}");
        let left: Vec<_> =
            self.store.range("").await.unwrap().entries.into_iter().map(|entry| entry.key).collect();
        assert_eq!(left, ["store", "subnets"], "seed {seed}");
        assert_eq!(self.vpc.violations(), Violations::default(), "seed {seed}");
    }
}

fn trace() -> bool {
    std::env::var_os("IPAM_FAULT_TRACE").is_some()
}

#[tokio::test]
async fn random_faults_and_crashes_lose_and_duplicate_nothing() {
    let seeds = std::env::var("IPAM_FAULT_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(8);
    let steps = std::env::var("IPAM_FAULT_STEPS").ok().and_then(|steps| steps.parse().ok()).unwrap_or(600);
    let first = std::env::var("IPAM_FAULT_FIRST").ok().and_then(|first| first.parse().ok()).unwrap_or(0);
    let mut crashes = 0;
    for seed in first..first + seeds {
        let mut run = Run::new(seed).await;
        run.vpc.set_faults(Faults { error: 0.05, throttle: 0.03, reply_lost: 0.07, ..Faults::default() });
        for _ in 0..steps {
            run.step().await;
        }
        run.finish().await;
        crashes += run.crashes;
    }
    println!("{seeds} seeds, {steps} steps each, {crashes} crashes");
}

/// Every single boundary of one small story, in turn.
#[tokio::test]
async fn a_crash_at_every_boundary_loses_nothing() {
    let mut boundary = 0;
    loop {
        let mut run = Run::new(boundary).await;
        run.fuse.0.store(boundary.try_into().unwrap(), Ordering::SeqCst);
        let mut stories = Vec::new();
        for node in NODES {
            stories.push(request(node, &format!("on-{node}")));
        }
        stories.push(static_request("demand", "db-0", "one"));
        for story in &stories {
            run.allocate(story.clone()).await;
        }
        run.pass(10 * SECOND).await;
        for story in &stories[2..] {
            run.release(story.key.clone()).await;
        }
        run.allocate(static_request("pool", "db-1", "two")).await;
        run.pass(90 * SECOND).await;
        let crashed = run.crashes > 0;
        if trace() {
            println!("boundary {boundary}");
        }
        run.finish().await;
        if !crashed {
            break;
        }
        boundary += 1;
    }
    println!("{boundary} boundaries");
    assert!(boundary > 80);
}

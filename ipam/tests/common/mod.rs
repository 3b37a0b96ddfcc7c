//! A small world for tests: a clock that moves when told, a strict VPC, an embedded store in a temporary directory.

#![expect(clippy::unwrap_used, reason = "test code")]
#![allow(dead_code, reason = "each test file uses its part")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use eniway_ipam::{
    AddressRequest, AllocateRequest, Allocation, Allocator, Clock, EmbeddedStore, Error, ManualClock,
    MemoryVpc, Node, NodeKind, Parent, PodKey, Policy, Settings, Store, Subnet,
    api::PoolStatus,
    net::Mac,
    store::{Commit, Range, Revision, StoreError, StoreWatch, Transaction},
    vpc::Violations,
};

pub const SECOND: Duration = Duration::from_secs(1);
pub const MINUTE: Duration = Duration::from_secs(60);

/// Returns when nothing goes on any more that does not wait for time to pass.
pub async fn quiet(allocator: &Allocator, busy: &AtomicUsize) {
    let mut rounds = 0;
    while rounds < 20 {
        tokio::task::yield_now().await;
        allocator.settle().await;
        rounds = if busy.load(Ordering::SeqCst) == 0 { rounds + 1 } else { 0 };
    }
}

/// One call under way, counted until it ends or is dropped.
pub struct AtWork<'c>(&'c AtomicUsize);

impl<'c> AtWork<'c> {
    pub fn new(count: &'c AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A store that can tell whether it is at work.
pub struct BusyStore {
    pub inner: EmbeddedStore,
    pub busy: Arc<AtomicUsize>,
}

#[async_trait::async_trait]
impl Store for BusyStore {
    async fn range(&self, prefix: &str) -> Result<Range, StoreError> {
        self.inner.range(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Commit, StoreError> {
        let at_work = AtWork::new(&self.busy);
        let result = self.inner.commit(transaction).await;
        drop(at_work);
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

pub struct World {
    pub clock: Arc<ManualClock>,
    pub vpc: Arc<MemoryVpc>,
    pub settings: Settings,
    directory: tempfile::TempDir,
    busy: Arc<AtomicUsize>,
    allocator: Option<Allocator>,
}

impl World {
    /// One subnet, no node yet.
    pub async fn new() -> Self {
        Self::with(Settings::default()).await
    }

    pub async fn with(settings: Settings) -> Self {
        let clock = Arc::new(ManualClock::new());
        let vpc = Arc::new(MemoryVpc::new(clock.clone(), 7));
        let directory = tempfile::tempdir().unwrap();
        let mut world = Self { clock, vpc, settings, directory, busy: Arc::default(), allocator: None };
        world.open().await;
        world.add_subnet("net-a", "10.1.0.0/20").await.unwrap();
        world
    }

    pub fn allocator(&self) -> &Allocator {
        self.allocator.as_ref().unwrap()
    }

    async fn open(&mut self) {
        let store = EmbeddedStore::open(self.directory.path().join("ipam.redb")).unwrap();
        let store: Arc<dyn Store> = Arc::new(BusyStore { inner: store, busy: self.busy.clone() });
        let allocator = Allocator::open(self.settings.clone(), store, self.vpc.clone(), self.clock.clone())
            .await
            .unwrap();
        self.allocator = Some(allocator);
    }

    /// Ends the allocator where it is and starts a new one on what is left.
    pub async fn restart(&mut self) {
        self.allocator.take().unwrap().close().await;
        self.open().await;
    }

    pub async fn add_subnet(&self, id: &str, prefix: &str) -> Result<(), Error> {
        let subnet = subnet(id, prefix);
        self.vpc.add_subnet(id, subnet.ipv4, subnet.ipv6);
        self.allocator().add_subnet(subnet).await
    }

    /// A sub-ENI node with one parent.
    pub async fn add_node(&self, name: &str, limit: u32, policy: Policy) -> Node {
        let parent = format!("parent-{name}");
        self.vpc.add_parent(&parent, limit as usize);
        let node = node(name, vec![Parent { id: parent, interface: "eth1".into(), limit }], policy);
        self.allocator().put_node(node.clone()).await.unwrap();
        node
    }

    /// Lets time pass, a second at a time, with the work that becomes due.
    pub async fn pass(&self, time: Duration) {
        self.tick().await;
        for _ in 0..time.as_secs() {
            self.clock.advance(SECOND);
            self.tick().await;
        }
    }

    /// The work that is due now.
    pub async fn tick(&self) {
        self.allocator().tick().await.unwrap();
        self.allocator().settle().await;
    }

    pub async fn allocate(&self, node: &str, pod: &str) -> Result<Allocation, Error> {
        self.allocate_as(&request(node, pod)).await
    }

    /// Allocates while time passes.
    pub async fn allocate_as(&self, request: &AllocateRequest) -> Result<Allocation, Error> {
        let (allocator, request) = (self.allocator().clone(), request.clone());
        let mut allocation = tokio::spawn(async move { allocator.allocate(&request).await });
        loop {
            quiet(self.allocator(), &self.busy).await;
            if allocation.is_finished() {
                let result = (&mut allocation).await.unwrap();
                if let Ok(allocation) = &result {
                    self.vpc.set_in_use(&allocation.vpc_id, true);
                }
                return result;
            }
            self.clock.advance(SECOND);
            self.tick().await;
        }
    }

    pub async fn release(&self, allocation: &Allocation) {
        self.vpc.set_in_use(&allocation.vpc_id, false);
        self.allocator().release(&allocation.key, None).await.unwrap();
        self.allocator().settle().await;
    }

    pub fn pool(&self, node: &str) -> PoolStatus {
        self.allocator().pools().into_iter().find(|pool| pool.node == node).unwrap()
    }

    /// Interfaces at the VPC.
    pub fn at_vpc(&self) -> usize {
        self.vpc.interfaces().len()
    }

    pub fn assert_no_violations(&self) {
        assert_eq!(self.vpc.violations(), Violations::default());
    }

    pub fn now(&self) -> eniway_ipam::clock::Instant {
        self.clock.now()
    }
}

pub fn subnet(id: &str, prefix: &str) -> Subnet {
    let ipv4: ipnet::Ipv4Net = prefix.parse().unwrap();
    let gateway = std::net::Ipv4Addr::from(u32::from(ipv4.network()) + 1);
    let [a, b, c, _] = ipv4.network().octets();
    let ipv6 = format!("fd00:{a:x}:{b:x}:{c:x}::/64").parse().unwrap();
    Subnet {
        id: id.into(),
        ipv4,
        gateway,
        gateway_mac: Mac([0xfa, 0xff, 0xff, 0, 0, 1]),
        ipv6: Some(ipv6),
        gateway_ipv6: Some(format!("fd00:{a:x}:{b:x}:{c:x}::1").parse().unwrap()),
        mtu: 1500,
    }
}

pub fn node(name: &str, parents: Vec<Parent>, policy: Policy) -> Node {
    Node {
        name: name.into(),
        kind: NodeKind::SubEni { parents },
        policy,
        dual_stack: false,
        subnets: Vec::new(),
        security_groups: vec!["sg-default".into()],
        draining: false,
        confirmed: 0,
    }
}

pub fn request(node: &str, pod: &str) -> AllocateRequest {
    AllocateRequest {
        node: node.into(),
        key: PodKey { uid: format!("uid-{pod}"), container_id: format!("container-{pod}") },
        namespace: "default".into(),
        name: pod.into(),
        netns: None,
        interface: "eth0".into(),
        address: AddressRequest::Pool,
        security_groups: None,
        timeout: None,
    }
}

pub fn static_request(node: &str, pod: &str, uid: &str) -> AllocateRequest {
    AllocateRequest {
        key: PodKey { uid: uid.into(), container_id: format!("container-{uid}") },
        address: AddressRequest::Static { ipv4: None, ipv6: None, retention: None },
        ..request(node, pod)
    }
}

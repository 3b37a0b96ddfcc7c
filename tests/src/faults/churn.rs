//! Pods that come and go.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use eniway_ipam::{
    AddressRequest, AllocateRequest, PodKey, Released,
    api::Allocation,
    rpc::{Client, ClientError, proto::Reason},
};
use fastrand::Rng;
use tokio::time::sleep;

use super::{
    ledger::{Ledger, Wrong},
    world::{NODES, World, held},
};
use crate::lab::NetnsGuard;

/// How long a caller asks before it counts as never answered.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long an answer may wait for the agent.
const FOR_AGENT: Duration = Duration::from_secs(5);
/// The tables are read while they change; what is there must show within this time.
const READING: Duration = Duration::from_millis(200);

/// Which pods a caller makes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// On this node, with an interface of its pool.
    Pool(usize),
    /// Always one name, now on this node, now on that.
    Static(usize),
}

/// The callers' common ground.
pub(super) struct Churn {
    pub(super) world: Arc<World>,
    pub(super) ledger: Arc<Ledger>,
    /// No more new pods: those that are there stay.
    pub(super) enough: AtomicBool,
    /// By node: grows when something is asked for.
    pub(super) asked: [AtomicU64; NODES],
    id: String,
    pods: AtomicU64,
    /// The namespaces of the pods that stay.
    staying: Mutex<HashMap<PodKey, NetnsGuard>>,
}

impl Churn {
    pub(super) fn new(world: Arc<World>, ledger: Arc<Ledger>, id: &str) -> Self {
        Self {
            world,
            ledger,
            enough: AtomicBool::new(false),
            asked: Default::default(),
            id: id.to_owned(),
            pods: AtomicU64::new(0),
            staying: Mutex::default(),
        }
    }

    fn is_enough(&self) -> bool {
        self.enough.load(Ordering::Relaxed)
    }

    /// One pod after the other, until it is enough.
    pub(super) async fn caller(self: Arc<Self>, kind: Kind, mut random: Rng) -> Result<()> {
        while !self.is_enough() {
            let (netns, request) = self.pod(kind, &mut random)?;
            let node = node_of(&request)?;
            let Some(_) = self.allocate(&request, node, &mut random).await? else { continue };
            let until = Instant::now() + Duration::from_millis(random.u64(20..400));
            while !self.is_enough() && Instant::now() < until {
                sleep(Duration::from_millis(random.u64(20..150))).await;
                if random.f64() < 0.3 {
                    // The same question has the same answer, whatever has happened in between.
                    self.allocate(&request, node, &mut random).await?;
                }
            }
            if self.is_enough() {
                self.staying.lock().unwrap_or_else(PoisonError::into_inner).insert(request.key, netns);
                return Ok(());
            }
            // A sandbox may be gone before its interface is given back.
            let netns = random.bool().then_some(netns);
            self.release(&request.key, &mut random).await?;
            drop(netns);
        }
        Ok(())
    }

    fn pod(&self, kind: Kind, random: &mut Rng) -> Result<(NetnsGuard, AllocateRequest)> {
        let number = self.pods.fetch_add(1, Ordering::Relaxed);
        let netns = NetnsGuard::renew(format!("{}-p{number}", self.id))?;
        let (node, name, address) = match kind {
            Kind::Pool(node) => (node, format!("pod-{number}"), AddressRequest::Pool),
            Kind::Static(name) => (
                random.usize(..NODES),
                format!("static-{name}"),
                AddressRequest::Static { ipv4: None, ipv6: None, retention: None },
            ),
        };
        let request = AllocateRequest {
            node: format!("node-{node}"),
            key: PodKey { uid: format!("uid-{number}"), container_id: format!("container-{number}") },
            namespace: "default".to_owned(),
            name,
            netns: Some(netns.netns().path().display().to_string()),
            interface: "eth0".to_owned(),
            address,
            security_groups: None,
            timeout: None,
        };
        Ok((netns, request))
    }

    /// Asks until the allocation is answered and in the kernel. None: there is no room, and it is enough.
    async fn allocate(
        &self,
        request: &AllocateRequest,
        node: usize,
        random: &mut Rng,
    ) -> Result<Option<Allocation>> {
        let end = Instant::now() + PATIENCE;
        loop {
            let (client, of_agent) = self.client(node, random)?;
            self.asked[node].fetch_add(1, Ordering::Relaxed);
            match client.allocate(request, of_agent.then_some(FOR_AGENT)).await {
                Ok(allocation) => {
                    self.world.vpc.set_in_use(&allocation.vpc_id, true);
                    self.ledger.allocated(&allocation);
                    if of_agent {
                        self.check_programmed(&allocation, node).await?;
                        return Ok(Some(allocation));
                    }
                }
                Err(error) => {
                    let is_held = self.ledger.books().held.contains_key(&request.key);
                    self.judge(&error, is_held);
                    if self.is_enough() && error.reason() == Some(Reason::NodeFull) && !is_held {
                        self.release(&request.key, random).await?;
                        return Ok(None);
                    }
                    if Instant::now() > end {
                        bail!("no allocation for {} on node-{node} in {PATIENCE:?}: {error}", request.key);
                    }
                    sleep(Duration::from_millis(random.u64(5..60))).await;
                }
            }
        }
    }

    /// Notes an error that says that something is wrong, and not only that one has to wait.
    fn judge(&self, error: &ClientError, is_held: bool) {
        match error.reason() {
            Some(Reason::RefusedByAgent) => self.ledger.books().refused += 1,
            Some(Reason::Lost | Reason::Internal | Reason::StaleGeneration) => {
                self.ledger.note(Wrong::Lost, error.to_string());
            }
            Some(Reason::NodeFull | Reason::SubnetsExhausted) if is_held => {
                self.ledger.note(Wrong::Lost, format!("asked again for what it has: {error}"));
            }
            _ => {}
        }
    }

    /// The allocator has said that the pod's first packet is forwarded.
    async fn check_programmed(&self, allocation: &Allocation, node: usize) -> Result<()> {
        let end = Instant::now() + READING;
        while !self.world.nodes[node].programmed()?.contains(&held(allocation)) {
            if Instant::now() > end {
                let tables = self.world.nodes[node].programmed()?;
                let what = format!("said to be in the kernel: {allocation:?}; there is {tables:?}");
                self.ledger.note(Wrong::Lost, what);
                return Ok(());
            }
            sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    pub(super) async fn release(&self, key: &PodKey, random: &mut Rng) -> Result<()> {
        let allocation = self.ledger.releasing(key);
        if let Some(allocation) = &allocation {
            self.world.vpc.set_in_use(&allocation.vpc_id, false);
        }
        let end = Instant::now() + PATIENCE;
        let mut is_certain = allocation.is_some();
        loop {
            let (client, _) = self.client(random.usize(..NODES), random)?;
            match client.clone().patient(Duration::ZERO).release(key, None).await {
                Ok(Released::NotAllocated) if is_certain => {
                    self.ledger.note(Wrong::Lost, format!("the allocator does not know {allocation:?}"));
                    return Ok(());
                }
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > end => bail!("{key} is not released in {PATIENCE:?}: {error}"),
                Err(_) => {
                    // It may have been done.
                    is_certain = false;
                    sleep(Duration::from_millis(random.u64(5..60))).await;
                }
            }
        }
    }

    /// The allocator that the node's agent watches, or sometimes another one, which does not hear from that agent.
    fn client(&self, node: usize, random: &mut Rng) -> Result<(Client, bool)> {
        let own = self.world.nodes[node].allocator;
        let asked = if random.f64() < 0.2 { random.usize(..self.world.allocators.len()) } else { own };
        Ok((self.world.client(asked)?, asked == own))
    }

    /// Releases all that is held.
    pub(super) async fn release_all(&self, random: &mut Rng) -> Result<()> {
        let keys: Vec<PodKey> = self.ledger.books().held.keys().cloned().collect();
        for key in keys {
            self.release(&key, random).await?;
        }
        self.staying.lock().unwrap_or_else(PoisonError::into_inner).clear();
        Ok(())
    }
}

fn node_of(request: &AllocateRequest) -> Result<usize> {
    let number = request.node.rsplit_once('-').context("a node's name ends with its number")?.1;
    Ok(number.parse()?)
}

//! Measures the allocator and prints JSON.
//!
//! `bench embedded`: durable allocations per second in the embedded store, alone and with many callers at once.
//! `bench scale`: a whole cluster in etcd, which must be installed: filling the pools, then giving every pod its interface.
//!
//! Options, after the name: `--directory DIR` (where the store is; a temporary one), `--nodes N`, `--pods N` (per node),
//! `--allocators N`, `--callers N`.

use std::{
    collections::{HashMap, HashSet},
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use eniway_ipam::{
    AddressRequest, AllocateRequest, Allocation, Allocator, EmbeddedStore, EtcdSettings, EtcdStore,
    MemoryVpc, Node, NodeKind, Parent, PodKey, Policy, Settings, Store, Subnet, SystemClock, net::Mac,
};
use serde_json::{Value, json};

struct Options {
    directory: Option<String>,
    nodes: usize,
    pods: usize,
    allocators: usize,
    callers: usize,
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().context("what to measure: `embedded` or `scale`")?;
    let (nodes, pods, allocators) = if what == "scale" { (2000, 50, 3) } else { (200, 250, 1) };
    let mut options = Options { directory: None, nodes, pods, allocators, callers: 256 };
    while let Some(name) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--directory" => options.directory = Some(value),
            "--nodes" => options.nodes = value.parse()?,
            "--pods" => options.pods = value.parse()?,
            "--allocators" => options.allocators = value.parse()?,
            "--callers" => options.callers = value.parse()?,
            _ => bail!("unknown option {name}"),
        }
    }
    let temporary = tempfile::tempdir()?;
    let directory = options.directory.as_deref().map_or(temporary.path(), Path::new);
    let report = match what.as_str() {
        "embedded" => embedded(&options, directory).await?,
        "scale" => scale(&options, directory).await?,
        _ => bail!("`{what}` is not `embedded` or `scale`"),
    };
    println!("{report:#}");
    Ok(())
}

/// The pools of all nodes filled, ready to be given out.
struct Filled {
    allocators: Vec<Allocator>,
    vpc: Arc<MemoryVpc>,
    fill_seconds: f64,
}

async fn fill(options: &Options, stores: Vec<Arc<dyn Store>>) -> Result<Filled> {
    let clock = Arc::new(SystemClock);
    let vpc = Arc::new(MemoryVpc::new(clock.clone(), 1));
    let mut allocators = Vec::new();
    for (index, store) in stores.into_iter().enumerate() {
        let settings = Settings { name: format!("allocator-{index}"), vpc_calls: 512, ..Settings::default() };
        allocators.push(Allocator::open(settings, store, vpc.clone(), clock.clone()).await?);
    }
    let subnet = Subnet {
        id: "net".into(),
        ipv4: "10.0.0.0/8".parse()?,
        gateway: "10.0.0.1".parse()?,
        gateway_mac: Mac([0xfa, 0xff, 0xff, 0, 0, 1]),
        ipv6: None,
        gateway_ipv6: None,
        mtu: 1500,
    };
    vpc.add_subnet("net", subnet.ipv4, None);
    allocators[0].add_subnet(subnet).await?;
    let pods = u32::try_from(options.pods)?;
    let begin = Instant::now();
    for index in 0..options.nodes {
        let parent = format!("parent-{index}");
        vpc.add_parent(&parent, options.pods);
        let node = Node {
            name: format!("node-{index}"),
            kind: NodeKind::SubEni {
                parents: vec![Parent { id: parent, interface: "eth1".into(), limit: pods }],
            },
            policy: Policy::PreBound { minimum: pods, maximum: pods },
            dual_stack: false,
            subnets: Vec::new(),
            security_groups: vec!["sg-0123456789abcdef".into()],
            draining: false,
            confirmed: 0,
        };
        allocators[index % allocators.len()].put_node(node).await?;
    }
    for allocator in &allocators {
        allocator.start();
    }
    let wanted = options.nodes * options.pods;
    let mut idle = 0;
    while idle < wanted {
        tokio::time::sleep(Duration::from_millis(500)).await;
        idle = allocators[0].pools().iter().map(|pool| pool.idle as usize).sum();
        eprintln!("{idle} of {wanted} interfaces bound, {:.0} s", begin.elapsed().as_secs_f64());
    }
    Ok(Filled { allocators, vpc, fill_seconds: begin.elapsed().as_secs_f64() })
}

/// Gives `count` pods, spread over the nodes in random order, their interfaces.
async fn allocate(
    filled: &Filled,
    options: &Options,
    pods: Vec<usize>,
    callers: usize,
) -> Result<(f64, Vec<f64>, Vec<Allocation>)> {
    let pods = Arc::new(pods);
    let next = Arc::new(AtomicUsize::new(0));
    let begin = Instant::now();
    let mut tasks = Vec::new();
    for caller in 0..callers {
        let allocator = filled.allocators[caller % filled.allocators.len()].clone();
        let (pods, next, nodes) = (pods.clone(), next.clone(), options.nodes);
        tasks.push(tokio::spawn(async move {
            let mut times = Vec::new();
            let mut allocations = Vec::new();
            while let Some(pod) = pods.get(next.fetch_add(1, Ordering::Relaxed)) {
                let request = AllocateRequest {
                    node: format!("node-{}", pod % nodes),
                    key: PodKey {
                        uid: format!("{pod:08x}-0000-4000-8000-000000000000"),
                        container_id: format!("{pod:064x}"),
                    },
                    namespace: "default".into(),
                    name: format!("deployment-7d9f8c6b5-{pod:06}"),
                    netns: Some(format!("/var/run/netns/cni-{pod:08x}")),
                    interface: "eth0".into(),
                    address: AddressRequest::Pool,
                    security_groups: None,
                    timeout: None,
                };
                let begin = Instant::now();
                allocations.push(allocator.allocate(&request).await?);
                times.push(begin.elapsed().as_secs_f64() * 1e3);
            }
            Ok::<_, eniway_ipam::Error>((times, allocations))
        }));
    }
    let (mut times, mut allocations) = (Vec::new(), Vec::new());
    for task in tasks {
        let (some_times, some_allocations) = task.await??;
        times.extend(some_times);
        allocations.extend(some_allocations);
    }
    let seconds = begin.elapsed().as_secs_f64();
    times.sort_by(f64::total_cmp);
    Ok((seconds, times, allocations))
}

fn shuffled(range: std::ops::Range<usize>) -> Vec<usize> {
    let mut pods: Vec<usize> = range.collect();
    fastrand::Rng::with_seed(1).shuffle(&mut pods);
    pods
}

fn percentile(sorted: &[f64], share: f64) -> f64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index into the list")]
    let index = (sorted.len() as f64 * share) as usize;
    let value = sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or_default();
    (value * 1000.0).round() / 1000.0
}

fn duplicates(allocations: &[Allocation]) -> (usize, usize) {
    let addresses: HashSet<_> = allocations.iter().map(|pod| pod.addresses.ipv4).collect();
    let places: HashSet<_> = allocations.iter().map(|pod| (&pod.parent, pod.vlan)).collect();
    (allocations.len() - addresses.len(), allocations.len() - places.len())
}

async fn embedded(options: &Options, directory: &Path) -> Result<Value> {
    let path = directory.join("bench.redb");
    let begin = Instant::now();
    let store: Arc<dyn Store> = Arc::new(EmbeddedStore::open(&path)?);
    let open_seconds = begin.elapsed().as_secs_f64();
    eprintln!("store opened in {open_seconds:.3} s");
    let filled = fill(options, vec![store.clone()]).await?;
    let total = options.nodes * options.pods;
    let alone = (total / 50).min(500);
    let pods = shuffled(0..total);
    let (alone_seconds, alone_times, mut all) = allocate(&filled, options, pods[..alone].to_vec(), 1).await?;
    let (seconds, times, rest) = allocate(&filled, options, pods[alone..].to_vec(), options.callers).await?;
    let count = rest.len();
    all.extend(rest);
    let (addresses, vlans) = duplicates(&all);
    Ok(json!({
        "embedded_alloc_per_s": (count as f64 / seconds).round(),
        "embedded": {
            "allocations": count,
            "callers": options.callers,
            "p50_ms": percentile(&times, 0.5),
            "p99_ms": percentile(&times, 0.99),
            "alone_alloc_per_s": (alone as f64 / alone_seconds).round(),
            "alone_p50_ms": percentile(&alone_times, 0.5),
            "alone_p99_ms": percentile(&alone_times, 0.99),
            "duplicate_addresses": addresses,
            "duplicate_vlans": vlans,
            "store_bytes": store.size().await?,
            "fill_seconds": filled.fill_seconds,
        }
    }))
}

async fn scale(options: &Options, directory: &Path) -> Result<Value> {
    let etcd = Etcd::start(directory).await?;
    let mut stores: Vec<Arc<dyn Store>> = Vec::new();
    for _ in 0..options.allocators {
        stores.push(Arc::new(etcd.store()?));
    }
    let filled = fill(options, stores).await?;
    let total = options.nodes * options.pods;
    let (seconds, times, allocations) =
        allocate(&filled, options, shuffled(0..total), options.callers).await?;
    let (addresses, vlans) = duplicates(&allocations);
    let store = etcd.store()?;
    let before = store.size().await?;
    let revision = store.range("").await?.revision;
    store.compact(revision).await?;
    // etcd compacts in the background.
    tokio::time::sleep(Duration::from_secs(3)).await;
    store.defragment().await?;
    let begin = Instant::now();
    let (clock, settings) = (Arc::new(SystemClock), Settings { name: "late".into(), ..Settings::default() });
    let late = Allocator::open(settings, Arc::new(etcd.store()?), filled.vpc.clone(), clock).await?;
    let start_seconds = begin.elapsed().as_secs_f64();
    let known: HashMap<_, _> = late.list(None).into_iter().map(|pod| (pod.key.clone(), pod)).collect();
    let lost = allocations.iter().filter(|pod| known.get(&pod.key).is_none_or(|same| same != *pod)).count();
    Ok(json!({
        "scale": {
            "nodes": options.nodes,
            "pods": allocations.len(),
            "allocators": options.allocators,
            "callers": options.callers,
            "alloc_per_s": (allocations.len() as f64 / seconds).round(),
            "p50_ms": percentile(&times, 0.5),
            "p99_ms": percentile(&times, 0.99),
            "duplicate_addresses": addresses,
            "duplicate_vlans": vlans,
            "lost": lost,
            "vpc_violations": format!("{:?}", filled.vpc.violations()),
            "bind_per_s": (total as f64 / filled.fill_seconds).round(),
            "store_bytes": before,
            "store_bytes_compacted": store.size().await?,
            "allocator_start_seconds": start_seconds,
        }
    }))
}

/// An etcd of our own on loopback.
struct Etcd {
    process: Child,
    url: String,
}

impl Etcd {
    async fn start(directory: &Path) -> Result<Self> {
        let port = || anyhow::Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port());
        let (url, peer) = (format!("http://127.0.0.1:{}", port()?), format!("http://127.0.0.1:{}", port()?));
        let process = Command::new("etcd")
            .arg("--data-dir")
            .arg(directory.join("etcd"))
            .args(["--name", "bench", "--log-level", "error", "--quota-backend-bytes", "8589934592"])
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("bench={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("etcd cannot be started; install Debian's etcd-server (`cargo xtask setup`)")?;
        let etcd = Self { process, url };
        let store = etcd.store()?;
        for _ in 0..200 {
            if store.range("").await.is_ok() {
                return Ok(etcd);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("etcd does not answer on {}", etcd.url)
    }

    fn store(&self) -> Result<EtcdStore> {
        let mut settings = EtcdSettings::new(vec![self.url.clone()]);
        settings.timeout = Duration::from_secs(60);
        Ok(EtcdStore::connect(&settings)?)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // Ours, and its data are temporary.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

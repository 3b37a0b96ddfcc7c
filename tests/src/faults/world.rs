//! Nodes with agents, allocators on one store, and the VPC that they share.
//!
//! ```text
//!   this process: VPC ── unix socket ── allocator-0 (allocator-1) ── store: a file, or etcd
//!                 callers ── gRPC ────────┘  └── gRPC ── eniway agent, in the namespace of node-0, node-1, node-2
//! ```

use std::{
    collections::BTreeSet,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use datapath_user::{
    pin::Pins,
    source::owner_of,
    tables::{Live, Maps},
};
use eniway_ipam::{
    MemoryVpc, Node, NodeKind, Parent, Policy, Subnet, SystemClock,
    api::Allocation,
    model::{Interface, State},
    net::Mac,
    rpc::{Address, Client},
    store::Entry,
};
use nix::{sys::signal::Signal, unistd::Pid};

use super::{
    allocator::{Config, StoreConfig},
    etcd::Etcd,
    process::Process,
    vpc,
};
use crate::lab::{NetnsGuard, agent::eniway_binary};

pub(super) const NODES: usize = 3;
const LIMIT: u32 = 24;
/// How long the agents' first start may take.
const START: Duration = Duration::from_secs(20);

/// What a pod has, as every side can say it: owner, address, VLAN id, MAC.
pub(super) type Held = (u64, Ipv4Addr, u16, [u8; 6]);

pub(super) fn held(allocation: &Allocation) -> Held {
    let owner = owner_of(&allocation.key.uid, &allocation.key.container_id);
    let vlan = u16::try_from(allocation.vlan).unwrap_or_default();
    (owner, allocation.addresses.ipv4, vlan, allocation.mac.0)
}

pub(super) struct World {
    pub(super) nodes: Vec<NodeStand>,
    pub(super) allocators: Vec<Process>,
    pub(super) etcd: Option<tokio::sync::Mutex<Etcd>>,
    pub(super) vpc: Arc<MemoryVpc>,
    pub(super) server: Arc<vpc::Server>,
    store: StoreConfig,
    sockets: Vec<PathBuf>,
    dir: PathBuf,
}

/// A node: its namespace, and its agent.
pub(super) struct NodeStand {
    pub(super) name: String,
    pub(super) agent: Process,
    /// Its agent watches this allocator.
    pub(super) allocator: usize,
    pin_dir: PathBuf,
    config: PathBuf,
    netns: NetnsGuard,
}

impl NodeStand {
    fn new(dir: &Path, id: &str, number: usize, allocator: usize, socket: &Path) -> Result<Self> {
        let name = format!("node-{number}");
        let netns = NetnsGuard::renew(format!("{id}-n{number}"))?;
        let pin_dir = Path::new("/sys/fs/bpf").join(netns.netns().name());
        let _ = fs::remove_dir_all(&pin_dir);
        netns.netns().exec(&["ip", "link", "add", "eth1", "type", "veth", "peer", "name", "fabric"])?;
        netns.netns().exec(&["ip", "link", "set", "fabric", "up"])?;
        let config = dir.join(format!("{name}.toml"));
        fs::write(
            &config,
            format!(
                "node = {name:?}\npin_dir = {pin_dir:?}\nrun_dir = {:?}\nfast_path = \"all\"\nlog = \"warn\"\n\
                 [source]\nkind = \"grpc\"\naddress = \"unix:{}\"\n[[parent]]\ninterface = \"eth1\"\n\
                 [limits]\nendpoints = 256\n",
                dir.join(format!("{name}-run")),
                socket.display(),
            ),
        )?;
        let make = {
            let (netns, config) = (netns.netns().clone(), config.clone());
            move || {
                let mut command = netns.command(eniway_binary()?)?;
                command.args(["agent", "--config"]).arg(&config);
                Ok(command)
            }
        };
        let agent =
            Process::new(&format!("agent of {name}"), dir.join(format!("{name}.log")), Box::new(make));
        Ok(Self { name, agent, allocator, pin_dir, config, netns })
    }

    /// What its kernel's tables hold, as packets find it.
    pub(super) fn tables(&self) -> Result<Vec<Live>> {
        Ok(Maps::open(&Pins::new(&self.pin_dir))?.pods()?)
    }

    /// The same in the words of all sides. What is not complete counts as not there.
    pub(super) fn programmed(&self) -> Result<BTreeSet<Held>> {
        let pods = self.tables()?.into_iter().filter(|live| live.missing == 0);
        Ok(pods
            .map(|live| (live.record.owner, live.record.ipv4.into(), live.record.vid, live.record.mac))
            .collect())
    }

    /// The host's sides of the pods' interfaces.
    pub(super) fn links(&self) -> Result<usize> {
        let links = self.netns.netns().exec(&["ip", "-o", "link", "show", "type", "veth"])?;
        Ok(links.lines().filter(|line| line.contains(": eni")).count())
    }
}

impl Drop for NodeStand {
    fn drop(&mut self) {
        self.agent.kill();
        if let Ok(binary) = eniway_binary()
            && let Ok(mut detach) = self.netns.netns().command(binary)
        {
            let _ = detach.args(["detach", "--config"]).arg(&self.config).output();
        }
        let _ = fs::remove_dir_all(&self.pin_dir);
    }
}

impl World {
    /// A VPC, a store, and allocators that do not run yet, for nodes without agents. To be called on a tokio runtime.
    pub(super) async fn new(
        program: &Path,
        dir: &Path,
        seed: u64,
        with_etcd: bool,
        subnets: Vec<Subnet>,
        nodes: Vec<Node>,
    ) -> Result<Self> {
        let _ = fs::remove_dir_all(dir);
        fs::create_dir_all(dir)?;
        let vpc = Arc::new(MemoryVpc::new(Arc::new(SystemClock), seed));
        for subnet in &subnets {
            vpc.add_subnet(&subnet.id, subnet.ipv4, None);
        }
        for node in &nodes {
            if let NodeKind::SubEni { parents } = &node.kind {
                parents.iter().for_each(|parent| vpc.add_parent(&parent.id, parent.limit as usize));
            }
        }
        let server = vpc::Server::start(vpc.clone(), &dir.join("vpc.sock"))?;
        let etcd = if with_etcd { Some(Etcd::start().await) } else { None };
        let store = match &etcd {
            Some(etcd) => StoreConfig::Etcd(etcd.settings().endpoints.concat()),
            None => StoreConfig::Embedded(dir.join("ipam.redb")),
        };
        let mut allocators = Vec::new();
        let mut sockets = Vec::new();
        for number in 0..if with_etcd { 2 } else { 1 } {
            let name = format!("allocator-{number}");
            let socket = dir.join(format!("{name}.sock"));
            let config = Config {
                name: name.clone(),
                socket: socket.clone(),
                vpc: dir.join("vpc.sock"),
                store: store.clone(),
                subnets: subnets.clone(),
                nodes: nodes.clone(),
            };
            let path = dir.join(format!("{name}.json"));
            fs::write(&path, serde_json::to_vec(&config)?)?;
            let program = program.to_owned();
            let make = move || {
                let mut command = Command::new(&program);
                command.arg("allocator").arg(&path);
                Ok(command)
            };
            allocators.push(Process::new(&name, dir.join(format!("{name}.log")), Box::new(make)));
            sockets.push(socket);
        }
        let etcd = etcd.map(tokio::sync::Mutex::new);
        Ok(Self { nodes: Vec::new(), allocators, etcd, vpc, server, store, sockets, dir: dir.to_owned() })
    }

    /// The nodes with pools of all kinds, each with its agent.
    pub(super) async fn with_agents(
        program: &Path,
        dir: &Path,
        id: &str,
        seed: u64,
        with_etcd: bool,
    ) -> Result<Self> {
        let subnets = vec![subnet("net-a", [10, 1, 16, 0], 24)?, subnet("net-b", [10, 1, 17, 0], 25)?];
        let nodes = (0..NODES).map(node).collect();
        let mut world = Self::new(program, dir, seed, with_etcd, subnets, nodes).await?;
        for number in 0..NODES {
            let allocator = number % world.allocators.len();
            world.nodes.push(NodeStand::new(dir, id, number, allocator, &world.sockets[allocator])?);
        }
        Ok(world)
    }

    /// Starts everything and waits until there are tables. From then on they outlive all processes.
    pub(super) async fn start(&self) -> Result<()> {
        for process in self.allocators.iter().chain(self.nodes.iter().map(|node| &node.agent)) {
            process.start()?;
        }
        let end = tokio::time::Instant::now() + START;
        for node in &self.nodes {
            while let Err(error) = node.tables() {
                ensure!(
                    tokio::time::Instant::now() < end,
                    "{}: {error:#}; its log: {}",
                    node.name,
                    node.agent.log.display()
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        Ok(())
    }

    /// A client of an allocator. To be called on a tokio runtime.
    pub(super) fn client(&self, allocator: usize) -> Result<Client> {
        Ok(Client::new(Address::Unix(self.sockets[allocator].clone()), None)?.patient(Duration::from_secs(2)))
    }

    /// Where an allocator is.
    pub(super) fn address(&self, allocator: usize) -> Result<String> {
        let socket = self.sockets.get(allocator).context("there is no such allocator")?;
        Ok(format!("unix:{}", socket.display()))
    }

    /// etcd's process.
    pub(super) async fn etcd_pid(&self) -> Result<Pid> {
        let etcd = self.etcd.as_ref().context("this world has no etcd")?.lock().await;
        Ok(Pid::from_raw(etcd.pid().cast_signed()))
    }

    /// All records of the store as of one moment.
    pub(super) async fn entries(&self) -> Result<Vec<Entry>> {
        if let Some(etcd) = &self.etcd {
            let store = etcd.lock().await.store();
            return Ok(eniway_ipam::Store::range(&store, "").await?.entries);
        }
        let StoreConfig::Embedded(path) = &self.store else { return Ok(Vec::new()) };
        let copy = self.dir.join("copy.redb");
        // Its only writer stands still meanwhile: what is copied is what a crash would leave.
        let writer = &self.allocators[0];
        writer.signal(Signal::SIGSTOP);
        thread::sleep(Duration::from_millis(2));
        let copied = fs::copy(path, &copy);
        writer.signal(Signal::SIGCONT);
        copied.with_context(|| path.display().to_string())?;
        Ok(StoreConfig::Embedded(copy).open()?.range("").await?.entries)
    }

    /// The interfaces' records.
    pub(super) async fn records(&self) -> Result<Vec<Interface>> {
        let mut records = Vec::new();
        for entry in self.entries().await? {
            if entry.key.starts_with("interface/") {
                records.push(serde_json::from_slice(&entry.value).context(entry.key)?);
            }
        }
        Ok(records)
    }

    /// Kills etcd and starts it again on its data.
    pub(super) async fn restart_etcd(&self, pause: Duration) -> Result<()> {
        if let Some(etcd) = &self.etcd {
            let mut etcd = etcd.lock().await;
            etcd.kill();
            tokio::time::sleep(pause).await;
            etcd.resume().await;
        }
        Ok(())
    }
}

/// Whether a record stands for something that a pod has.
pub(super) fn is_bound(record: &Interface) -> bool {
    record.state == State::Bound && record.claim.is_some()
}

fn subnet(id: &str, network: [u8; 4], prefix: u8) -> Result<Subnet> {
    let [a, b, c, _] = network;
    Ok(Subnet {
        id: id.to_owned(),
        ipv4: ipnet::Ipv4Net::new(network.into(), prefix)?,
        gateway: [a, b, c, 1].into(),
        gateway_mac: Mac([0xfa, 0xff, 0xff, 0, 0, 1]),
        ipv6: None,
        gateway_ipv6: None,
        mtu: 1500,
    })
}

fn node(number: usize) -> Node {
    let parent = Parent { id: format!("eni-{number}"), interface: "eth1".to_owned(), limit: LIMIT };
    Node {
        name: format!("node-{number}"),
        kind: NodeKind::SubEni { parents: vec![parent] },
        policy: match number % 3 {
            0 => Policy::PreBound { minimum: 1, maximum: 2 },
            1 => Policy::Targets { minimum: 3, maximum: 0, warm: 1, reclaim_above: 1 },
            _ => Policy::OnDemand,
        },
        dual_stack: false,
        subnets: Vec::new(),
        security_groups: Vec::new(),
        draining: false,
        confirmed: 0,
    }
}

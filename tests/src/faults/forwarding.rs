//! Packets between pods while etcd, the allocators and the agents stop: none is lost.
//!
//! ```text
//!            ┌── node n1: pod a ── 500 packets a second ──► pod b      (fast path)
//!   fabric ──┤                └─── 500 packets a second ──┐
//!            └── node n2: pod c ◄─────────────────────────┘            (wire)
//!   etcd ── two allocators ── agents of n1 and n2
//! ```
//!
//! The pods' interfaces are allocated, and the fabric learns them; then the packets flow, and everything that is not the kernel is
//! stopped, killed and started again.

use std::{
    collections::HashSet,
    fs, io,
    net::{SocketAddrV4, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use eniway_ipam::{
    AddressRequest, AllocateRequest, Node, NodeKind, Parent, PodKey, Policy, Subnet, api::Allocation,
    net::Mac,
};
use nix::sys::signal::{Signal, kill};
use serde::Serialize;
use socket2::SockRef;

use super::{Options, world::World};
use crate::lab::{self, GATEWAY_MAC, Lab, Netns, Pod, PodSpec, agent::READY};

/// Between two packets of a stream.
const GAP: Duration = Duration::from_millis(2);
/// The receiver's buffer: it may not run for a while.
const BUFFER: usize = 8 << 20;
const ETCD_AWAY: Duration = Duration::from_millis(1_500);
const PORT: u16 = 7_000;

/// What happened.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// How often etcd was stopped, frozen and killed by turns.
    pub etcd_stops: u64,
    /// How many allocators and agents were killed meanwhile.
    pub forwarding_kills: u64,
    /// Packets between pods of one node and of two.
    pub packets_sent: u64,
    /// Those that did not arrive.
    pub packets_lost: u64,
}

/// Stops etcd so many times, and everything else in between.
///
/// # Errors
///
/// When something does not start, or does not come back.
pub fn run(options: &Options, etcd_stops: u32) -> Result<Report> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let spec = |name, node, last: u8| PodSpec::bare(name, node, [10, 1, 16, last], 3_000 + u16::from(last));
    let lab = Lab::builder(&format!("{}-fwd", options.id))
        .node("n1", [10, 1, 0, 11], [10, 1, 16, 11])
        .node("n2", [10, 1, 0, 12], [10, 1, 16, 12])
        .pod_spec(spec("a", "n1", 101))
        .pod_spec(spec("b", "n1", 102))
        .pod_spec(spec("c", "n2", 103))
        .build()?;
    let dir = std::env::temp_dir().join(format!("{}-forwarding", options.id));
    let nodes = ["n1", "n2"].map(node).to_vec();
    let world = World::new(&options.program, &dir, options.seed, true, vec![subnet()?], nodes);
    let world = runtime.block_on(world)?;
    let result = runtime.block_on(measure(&lab, &world, etcd_stops));
    lab.shutdown()?;
    drop(world);
    if result.is_ok() {
        let _ = fs::remove_dir_all(&dir);
    }
    result
}

async fn measure(lab: &Lab, world: &World, etcd_stops: u32) -> Result<Report> {
    world.start().await?;
    let mut allocated = Vec::new();
    for pod in lab.pods() {
        let allocation = allocate(world, pod).await?;
        let vlan = u16::try_from(allocation.vlan)?;
        lab.fabric().detach_nic(&pod.port, pod.vlan)?;
        lab.fabric().attach_nic(&pod.port, vlan, pod.ip, lab::Mac(allocation.mac.0), None)?;
        allocated.push(allocation);
    }
    for (number, node) in lab.nodes().iter().enumerate() {
        let agent = lab.agent(&node.name)?;
        follow_allocator(&agent.config(), &world.address(number)?)?;
        let wanted = lab.pods().iter().filter(|pod| pod.node == node.name).count();
        agent.start()?;
        agent.wait_status("its pods", READY, |status| {
            status["ready"] == true && status["pods"].as_array().is_some_and(|pods| pods.len() == wanted)
        })?;
    }
    let streams = ["b", "c"]
        .iter()
        .map(|to| {
            let (from, to) = (lab.pod("a")?, lab.pod(to)?);
            Stream::start(&from.netns, &to.netns, SocketAddrV4::new(to.ip, PORT))
        })
        .collect::<Result<Vec<_>>>()?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut report = Report::default();
    for stop in 0..etcd_stops {
        let victim = stop as usize % world.allocators.len();
        if stop.is_multiple_of(2) {
            let pid = world.etcd_pid().await?;
            kill(pid, Signal::SIGSTOP)?;
            tokio::time::sleep(ETCD_AWAY).await;
            kill(pid, Signal::SIGCONT)?;
        } else {
            world.restart_etcd(ETCD_AWAY).await?;
        }
        report.etcd_stops += 1;
        world.allocators[victim].kill();
        let agent = lab.agent(&lab.nodes()[victim].name)?;
        agent.stop(Signal::SIGKILL)?;
        report.forwarding_kills += 2;
        tokio::time::sleep(Duration::from_millis(200)).await;
        world.allocators[victim].start()?;
        agent.start()?;
        // The agent is ready when its allocator is, and that when etcd is.
        agent.wait_status("ready again", READY, |status| status["ready"] == true)?;
        for (pod, before) in lab.pods().iter().zip(&allocated) {
            let after = allocate(world, pod).await?;
            ensure!(after == *before, "{before:?} has become {after:?}");
        }
        eprintln!("forwarding: etcd was stopped {} of {etcd_stops} times", report.etcd_stops);
    }
    for stream in streams {
        let (sent, lost) = stream.stop()?;
        report.packets_sent += sent;
        report.packets_lost += lost;
    }
    ensure!(lab.fabric().violations()?.is_empty(), "the fabric complains: {:?}", lab.fabric().violations()?);
    Ok(report)
}

/// Asks the allocator of the pod's node until it answers.
async fn allocate(world: &World, pod: &Pod) -> Result<Allocation> {
    let request = AllocateRequest {
        node: pod.node.clone(),
        key: PodKey { uid: format!("uid-{}", pod.name), container_id: format!("container-{}", pod.name) },
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        netns: Some(pod.netns.path().display().to_string()),
        interface: "eth0".to_owned(),
        address: AddressRequest::Static { ipv4: Some(pod.ip), ipv6: None, retention: None },
        security_groups: None,
        timeout: None,
    };
    let client = world.client(usize::from(pod.node == "n2"))?;
    let end = Instant::now() + READY;
    loop {
        match client.allocate(&request, None).await {
            Ok(allocation) => return Ok(allocation),
            Err(error) if Instant::now() > end => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// The agent's source becomes the allocator.
fn follow_allocator(config: &std::path::Path, address: &str) -> Result<()> {
    let text = fs::read_to_string(config)?;
    let (before, rest) = text.split_once("[source]").context("no [source] in the agent's configuration")?;
    let after = rest.find("\n[").map_or("", |at| &rest[at..]);
    fs::write(config, format!("{before}[source]\nkind = \"grpc\"\naddress = {address:?}\n{after}"))?;
    Ok(())
}

fn subnet() -> Result<Subnet> {
    let pods = lab::Subnet::PODS;
    Ok(Subnet {
        id: "pods".to_owned(),
        ipv4: ipnet::Ipv4Net::new(pods.network, pods.prefix)?,
        gateway: pods.gateway,
        gateway_mac: Mac(GATEWAY_MAC.0),
        ipv6: None,
        gateway_ipv6: None,
        mtu: 1500,
    })
}

fn node(name: &str) -> Node {
    let parent = Parent { id: format!("eni-{name}"), interface: "eth1".to_owned(), limit: 8 };
    Node {
        name: name.to_owned(),
        kind: NodeKind::SubEni { parents: vec![parent] },
        policy: Policy::OnDemand,
        dual_stack: false,
        subnets: Vec::new(),
        security_groups: Vec::new(),
        draining: false,
        confirmed: 0,
    }
}

/// Numbered packets at a steady pace.
struct Stream {
    ended: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    sender: JoinHandle<io::Result<()>>,
    receiver: JoinHandle<io::Result<HashSet<u64>>>,
}

impl Stream {
    fn start(from: &Netns, to: &Netns, address: SocketAddrV4) -> Result<Self> {
        let receive = to.run(|| UdpSocket::bind(address))??;
        SockRef::from(&receive).set_recv_buffer_size(BUFFER)?;
        receive.set_read_timeout(Some(Duration::from_millis(500)))?;
        let send = from.run(|| UdpSocket::bind(("0.0.0.0", 0)))??;
        send.connect(address)?;
        let (ended, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let sender = {
            let (ended, sent) = (ended.clone(), sent.clone());
            std::thread::spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    let number = sent.load(Ordering::Relaxed);
                    send.send(&number.to_be_bytes())?;
                    sent.store(number + 1, Ordering::Relaxed);
                    std::thread::sleep(GAP);
                }
                Ok(())
            })
        };
        let receiver = {
            let ended = ended.clone();
            std::thread::spawn(move || {
                let mut seen = HashSet::new();
                let mut buffer = [0; 8];
                loop {
                    match receive.recv(&mut buffer) {
                        Ok(_) => drop(seen.insert(u64::from_be_bytes(buffer))),
                        // Nothing for a while: the end, or a gap that the count will show.
                        Err(error) if is_timeout(&error) => {
                            if ended.load(Ordering::Relaxed) {
                                return Ok(seen);
                            }
                        }
                        Err(error) => return Err(error),
                    }
                }
            })
        };
        Ok(Self { ended, sent, sender, receiver })
    }

    /// Packets sent, and those of them that did not arrive.
    fn stop(self) -> Result<(u64, u64)> {
        self.ended.store(true, Ordering::Relaxed);
        self.sender.join().map_err(|_| anyhow::anyhow!("the sender has panicked"))??;
        let seen = self.receiver.join().map_err(|_| anyhow::anyhow!("the receiver has panicked"))??;
        let sent = self.sent.load(Ordering::Relaxed);
        Ok((sent, (0..sent).filter(|number| !seen.contains(number)).count() as u64))
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

//! Measures how fast the agent brings what an allocator says into the kernel: `cargo xtask bench ipam`.
//!
//! ```text
//!   this process: a server that says what the bench wants said ── unix socket ── eniway agent, in a namespace
//!                                                                                 eth1, and 4,000 veths as pods' host sides
//! ```
//!
//! The veths are made beforehand and adopted: making them, and the pods' namespaces, is not measured. A time begins when
//! the notice is handed to the server's stream and ends when the agent's acknowledgement arrives, which it sends when
//! the kernel's tables are written. At the end of each part the tables are read and compared with what was said.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use datapath_user::{pin::Pins, tables::Maps, wiring::host_interface_name};
use eniway_ipam::rpc::proto::{self, ipam_server::IpamServer, watch_response::What};
use eniway_tests::{
    figures::{self, percentile, rounded},
    lab::{Netns, NetnsGuard, agent::eniway_binary},
};
use serde_json::{Value, json};
use tokio::{
    net::UnixListener,
    runtime::Runtime,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status};

const NAMESPACE: &str = "ewr-bench";
const NODE: &str = "bench";
const SNAPSHOTS: u32 = 7;
const WARM_UP: u32 = 2_000;
/// A slot and an id rest for a second before they are used again.
const REST: Duration = Duration::from_millis(1_500);
const PATIENCE: Duration = Duration::from_secs(600);

/// Measures the sync of the allocator's word into the kernel
#[derive(Parser)]
struct Args {
    /// Adds the figures to this JSON file
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Adds what this JSON file says to the report too
    #[arg(long, value_name = "FILE", requires = "report")]
    add: Vec<PathBuf>,
    /// Pods on the node
    #[arg(long, default_value_t = 4_000, value_parser = clap::value_parser!(u32).range(100..=4_000))]
    pods: u32,
    /// Single changes
    #[arg(long, default_value_t = 100_000)]
    changes: u32,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let figures = measure(&args)?;
    println!("{}", serde_json::to_string_pretty(&figures)?);
    if let Some(path) = &args.report {
        let mut report = if path.exists() { read(path)? } else { BTreeMap::new() };
        report.extend(figures);
        for path in &args.add {
            report.extend(read(path)?);
        }
        fs::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<BTreeMap<String, Value>> {
    let text = fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not a report", path.display()))
}

fn measure(args: &Args) -> Result<BTreeMap<String, Value>> {
    let mut bench = Bench::new(args.pods)?;
    let mut figures = BTreeMap::new();
    let mut note = |key: &str, value: Value| {
        eprintln!("{key}: {value}");
        figures.insert(key.to_owned(), value);
    };
    note("sync_endpoints", json!(args.pods));

    bench.start_agent()?;
    let few = 50.min(args.pods);
    let cold = bench.snapshot(few)?;
    note("sync_new_pod_ms", json!(rounded(cold / f64::from(few))));
    let all = bench.snapshot(args.pods)?;
    note("sync_snapshot_cold_ms", json!(rounded(all)));
    bench.verify()?;

    let mut times = Vec::new();
    for _ in 0..SNAPSHOTS {
        std::thread::sleep(REST);
        bench.move_all();
        times.push(bench.snapshot(args.pods)?);
        bench.verify()?;
    }
    note("sync_snapshot_ms", json!(rounded(percentile(&mut times, 50))));
    note("sync_snapshot_max_ms", json!(rounded(percentile(&mut times, 100))));

    std::thread::sleep(REST);
    for _ in 0..WARM_UP.min(args.changes) {
        bench.change()?;
    }
    let before = bench.rss_kib()?;
    let mut times = Vec::with_capacity(args.changes as usize);
    let begin = Instant::now();
    for change in 1..=args.changes {
        times.push(bench.change()?);
        if change % 20_000 == 0 {
            eprintln!("{change} of {} changes, {:.0} s", args.changes, begin.elapsed().as_secs_f64());
        }
    }
    let elapsed = begin.elapsed();
    let after = bench.rss_kib()?;
    bench.verify()?;
    note("sync_changes", json!(args.changes));
    note("sync_changes_per_s", json!((f64::from(args.changes) / elapsed.as_secs_f64()).round()));
    note("sync_change_p50_ms", json!(rounded(percentile(&mut times, 50))));
    note("sync_change_p99_ms", json!(rounded(percentile(&mut times, 99))));
    note("sync_change_max_ms", json!(rounded(percentile(&mut times, 100))));
    note("rss_kib", json!(after));
    note("rss_growth_kib", json!(after as i64 - before as i64));

    bench.stop_agent();
    bench.start_agent()?;
    let restart = bench.wait_for_watch_and_snapshot(args.pods)?;
    note("sync_restart_ms", json!(rounded(restart)));
    bench.verify()?;
    Ok(figures)
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

struct Bench {
    runtime: Runtime,
    server: Arc<Server>,
    acknowledged: watch::Receiver<(u64, usize)>,
    /// What the agent has been told.
    pods: Vec<proto::Allocation>,
    /// A VLAN id that no pod has.
    free_vlan: i32,
    next: usize,
    revision: u64,
    agent: Option<Child>,
    dir: PathBuf,
    // Last: the agent's interfaces go with it.
    netns: NetnsGuard,
}

impl Bench {
    fn new(pods: u32) -> Result<Self> {
        let dir = std::env::temp_dir().join(NAMESPACE);
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        let netns = NetnsGuard::renew(NAMESPACE)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (server, acknowledged) = Server::new();
        let server = Arc::new(server);
        {
            let _inside = runtime.enter();
            let listener = UnixListener::bind(dir.join("ipam.sock"))?;
            let service = IpamServer::from_arc(server.clone()).max_encoding_message_size(256 << 20);
            runtime.spawn(
                tonic::transport::Server::builder()
                    .add_service(service)
                    .serve_with_incoming(UnixListenerStream::new(listener)),
            );
        }
        let pods: Vec<_> = (0..pods).map(allocation).collect();
        make_links(netns.netns(), &pods)?;
        let bench = Self {
            runtime,
            server,
            acknowledged,
            pods,
            free_vlan: 4_094,
            next: 0,
            revision: 1,
            agent: None,
            dir,
            netns,
        };
        let _ = fs::remove_dir_all(bench.pin_dir());
        let text = format!(
            "node = {NODE:?}\npin_dir = {:?}\nrun_dir = {:?}\nlog = \"warn\"\n[source]\nkind = \"grpc\"\n\
             address = \"unix:{}\"\n[[parent]]\ninterface = \"eth1\"\n[limits]\nendpoints = 8192\n",
            bench.pin_dir(),
            bench.dir.join("run"),
            bench.dir.join("ipam.sock").display(),
        );
        fs::write(bench.dir.join("agent.toml"), text)?;
        Ok(bench)
    }

    fn pin_dir(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(NAMESPACE)
    }

    fn start_agent(&mut self) -> Result<()> {
        let mut command = self.netns.netns().command(eniway_binary()?)?;
        command.args(["agent", "--config"]).arg(self.dir.join("agent.toml"));
        self.agent = Some(command.stdout(Stdio::null()).spawn()?);
        Ok(())
    }

    fn stop_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        self.server.forget_watcher();
    }

    fn rss_kib(&self) -> Result<u64> {
        let pid = self.agent.as_ref().context("no agent")?.id();
        Ok(figures::rss_kib(pid)?)
    }

    /// Says something, waits until it is in the kernel, and tells how many milliseconds that took.
    fn say(&mut self, what: What) -> Result<f64> {
        self.revision += 1;
        let message = proto::WatchResponse {
            revision: self.revision,
            what: Some(what),
            ..proto::WatchResponse::default()
        };
        let (server, revision) = (self.server.clone(), self.revision);
        let acknowledged = &mut self.acknowledged;
        self.runtime.block_on(async {
            let stream = tokio::time::timeout(PATIENCE, server.watcher()).await?;
            let begin = Instant::now();
            stream.send(Ok(message)).await?;
            let reached = acknowledged.wait_for(|(known, _)| *known >= revision);
            let refused = tokio::time::timeout(PATIENCE, reached).await.context("no acknowledgement")??.1;
            let elapsed = ms(begin);
            ensure!(refused == 0, "the agent refuses {refused} pods");
            Ok(elapsed)
        })
    }

    fn snapshot(&mut self, pods: u32) -> Result<f64> {
        let allocations = self.pods[..pods as usize].to_vec();
        self.say(What::Snapshot(proto::Snapshot { allocations }))
    }

    /// As [`snapshot`](Self::snapshot), the time counted from the agent's request for it.
    fn wait_for_watch_and_snapshot(&mut self, pods: u32) -> Result<f64> {
        self.snapshot(pods)
    }

    /// All pods get another VLAN id, most of them the one that another pod has.
    fn move_all(&mut self) {
        for pod in &mut self.pods {
            pod.vlan = pod.vlan % 4_094 + 1;
            pod.generation += 1;
        }
        self.free_vlan = self.free_vlan % 4_094 + 1;
    }

    /// One pod gets the free VLAN id, and its own is free then.
    fn change(&mut self) -> Result<f64> {
        let pod = &mut self.pods[self.next];
        std::mem::swap(&mut pod.vlan, &mut self.free_vlan);
        pod.generation += 1;
        let change = proto::Change { what: Some(proto::change::What::Put(pod.clone())) };
        self.next = (self.next + 1) % self.pods.len();
        self.say(What::Changes(proto::Changes { changes: vec![change] }))
    }

    /// Fails unless the tables hold exactly what was said.
    fn verify(&self) -> Result<()> {
        let maps = Maps::open(&Pins::new(&self.pin_dir()))?;
        let mut live: BTreeMap<String, (u16, usize)> = BTreeMap::new();
        for pod in maps.pods()? {
            live.insert(std::net::Ipv4Addr::from(pod.record.ipv4).to_string(), (pod.record.vid, pod.missing));
        }
        ensure!(
            live.len() == self.pods.len(),
            "{} of {} pods are in the tables",
            live.len(),
            self.pods.len()
        );
        for pod in &self.pods {
            let Some((vid, 0)) = live.get(&pod.ipv4) else { bail!("{} is not in the tables", pod.ipv4) };
            ensure!(i32::from(*vid) == pod.vlan, "{} has VLAN {vid}, not {}", pod.ipv4, pod.vlan);
        }
        Ok(())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.stop_agent();
        // With the namespace the interfaces go, and with them what is attached: one by one would take minutes.
        let _ = fs::remove_dir_all(self.pin_dir());
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn allocation(number: u32) -> proto::Allocation {
    let [.., high, low] = number.to_be_bytes();
    let address = |base: u32| std::net::Ipv4Addr::from(0x0a01_0000 + base).to_string();
    proto::Allocation {
        key: Some(proto::PodKey {
            uid: format!("uid-{number}"),
            container_id: format!("container-{number}"),
        }),
        namespace: "bench".to_owned(),
        name: format!("pod-{number}"),
        node: NODE.to_owned(),
        netns: None,
        interface: "eth0".to_owned(),
        generation: 1,
        interface_id: format!("interface-{number}"),
        vpc_id: format!("vpc-{number}"),
        kind: proto::Kind::SubEni.into(),
        parent: Some("eni-1".to_owned()),
        parent_interface: Some("eth1".to_owned()),
        vlan: i32::try_from(number).unwrap_or(0) + 1,
        mac: format!("fa:16:3e:00:{high:02x}:{low:02x}"),
        ipv4: address(number + 256),
        subnet_id: "subnet-1".to_owned(),
        subnet: "10.1.0.0/16".to_owned(),
        gateway: address(1),
        gateway_mac: "fa:ff:ff:00:00:01".to_owned(),
        mtu: 1500,
        ..proto::Allocation::default()
    }
}

/// The parent, and a veth per pod, as somebody else would make them.
fn make_links(netns: &Netns, pods: &[proto::Allocation]) -> Result<()> {
    let mut batch = String::from("link add eth1 type veth peer name fabric\nlink set fabric up\n");
    for (number, pod) in pods.iter().enumerate() {
        let container = pod.key.as_ref().map(|key| key.container_id.as_str()).unwrap_or_default();
        let host = host_interface_name(container, "eth0");
        batch += &format!("link add {host} type veth peer name pod{number}\n");
    }
    let mut child = netns.command("ip")?.args(["-batch", "-"]).stdin(Stdio::piped()).spawn()?;
    child.stdin.take().context("no standard input")?.write_all(batch.as_bytes())?;
    ensure!(child.wait()?.success(), "cannot make the interfaces");
    Ok(())
}

type Sender = mpsc::Sender<Result<proto::WatchResponse, Status>>;

/// Says what the bench wants said to the one agent.
struct Server {
    watcher: watch::Sender<Option<Sender>>,
    acknowledged: watch::Sender<(u64, usize)>,
}

impl Server {
    fn new() -> (Self, watch::Receiver<(u64, usize)>) {
        let (acknowledged, receiver) = watch::channel((0, 0));
        (Self { watcher: watch::Sender::new(None), acknowledged }, receiver)
    }

    async fn watcher(&self) -> Sender {
        let mut watcher = self.watcher.subscribe();
        loop {
            if let Some(stream) = watcher.borrow_and_update().clone() {
                return stream;
            }
            if watcher.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn forget_watcher(&self) {
        self.watcher.send_replace(None);
    }
}

type Answer<T> = Result<Response<T>, Status>;

fn not_here<T>() -> Answer<T> {
    Err(Status::unimplemented("the bench has no allocator"))
}

#[tonic::async_trait]
impl proto::ipam_server::Ipam for Server {
    type WatchStream = ReceiverStream<Result<proto::WatchResponse, Status>>;

    async fn watch(&self, _: Request<proto::WatchRequest>) -> Answer<Self::WatchStream> {
        let (send, receive) = mpsc::channel(4);
        self.watcher.send_replace(Some(send));
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    async fn acknowledge(
        &self,
        request: Request<proto::AcknowledgeRequest>,
    ) -> Answer<proto::AcknowledgeResponse> {
        let proto::AcknowledgeRequest { revision, refused, .. } = request.into_inner();
        if let Some(first) = refused.first() {
            eprintln!("refused: {}", first.reason);
        }
        self.acknowledged.send_replace((revision, refused.len()));
        Ok(Response::new(proto::AcknowledgeResponse {}))
    }

    async fn allocate(&self, _: Request<proto::AllocateRequest>) -> Answer<proto::AllocateResponse> {
        not_here()
    }

    async fn release(&self, _: Request<proto::ReleaseRequest>) -> Answer<proto::ReleaseResponse> {
        not_here()
    }

    async fn list(&self, _: Request<proto::ListRequest>) -> Answer<proto::ListResponse> {
        not_here()
    }

    async fn pools(&self, _: Request<proto::PoolsRequest>) -> Answer<proto::PoolsResponse> {
        not_here()
    }

    async fn cooling(&self, _: Request<proto::CoolingRequest>) -> Answer<proto::CoolingResponse> {
        not_here()
    }

    async fn leaks(&self, _: Request<proto::LeaksRequest>) -> Answer<proto::LeaksResponse> {
        not_here()
    }

    async fn subnets(&self, _: Request<proto::SubnetsRequest>) -> Answer<proto::SubnetsResponse> {
        not_here()
    }

    async fn add_subnet(&self, _: Request<proto::AddSubnetRequest>) -> Answer<proto::AddSubnetResponse> {
        not_here()
    }

    async fn put_node(&self, _: Request<proto::PutNodeRequest>) -> Answer<proto::PutNodeResponse> {
        not_here()
    }

    async fn drain_node(&self, _: Request<proto::DrainNodeRequest>) -> Answer<proto::DrainNodeResponse> {
        not_here()
    }

    async fn put_security_groups(
        &self,
        _: Request<proto::PutSecurityGroupsRequest>,
    ) -> Answer<proto::PutSecurityGroupsResponse> {
        not_here()
    }

    async fn get_security_groups(
        &self,
        _: Request<proto::GetSecurityGroupsRequest>,
    ) -> Answer<proto::GetSecurityGroupsResponse> {
        not_here()
    }

    async fn set_security_groups(
        &self,
        _: Request<proto::SetSecurityGroupsRequest>,
    ) -> Answer<proto::SetSecurityGroupsResponse> {
        not_here()
    }

    async fn confirm(&self, _: Request<proto::ConfirmRequest>) -> Answer<proto::ConfirmResponse> {
        not_here()
    }
}

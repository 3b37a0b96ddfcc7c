//! The agent with an allocator as its source: over the allocator's socket, and with the allocator inside.
//!
//! ```text
//!   namespace n:  agent, eth1 ── fabric          namespaces a, b:  eth0 (wired by the agent)
//!   allocator:    a socket in a directory; pods reach each other by the fast path, so no VPC is needed
//! ```
//!
//! A pod is allocated, and its first packet arrives; the allocator goes and comes back, and nothing changes. Its security groups
//! change, and the next packet is judged by them.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use eniway_ipam::{
    AddressRequest, AllocateRequest, Allocation, Allocator, Confirm, EmbeddedStore, MemoryVpc, Node,
    NodeKind, Parent, PodKey, Policy, Settings, Subnet, SystemClock,
    net::Mac,
    rpc::{self, Address, Client, Listener, ServeError},
};
use eniway_tests::lab::{
    Netns, NetnsGuard,
    agent::eniway_binary,
    net::{UdpEcho, udp_exchange},
};
use serde_json::Value;
use tokio::{runtime::Runtime, sync::oneshot, task::JoinHandle};

type Result<T = (), E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const SOON: Duration = Duration::from_secs(20);
const UDP: Duration = Duration::from_secs(2);

struct Stand {
    node: NetnsGuard,
    pods: [NetnsGuard; 2],
    dir: PathBuf,
    runtime: Runtime,
    vpc: Arc<MemoryVpc>,
    agent: Option<Child>,
}

struct Server {
    allocator: Allocator,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), ServeError>>,
}

impl Stand {
    fn new(name: &str, source: &str) -> Result<Self> {
        let netns = |role: &str| NetnsGuard::renew(format!("ewr-{name}-{role}"));
        let dir = std::env::temp_dir().join(format!("ewr-{name}"));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        let vpc = Arc::new(MemoryVpc::new(Arc::new(SystemClock), 1));
        vpc.add_subnet("net-a", "10.1.16.0/22".parse()?, None);
        vpc.add_parent("eni-1", 64);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let stand =
            Self { node: netns("n")?, pods: [netns("a")?, netns("b")?], dir, runtime, vpc, agent: None };
        let _ = fs::remove_dir_all(stand.pin_dir());
        stand.netns().exec(&["ip", "link", "add", "eth1", "type", "veth", "peer", "name", "fabric"])?;
        stand.netns().exec(&["ip", "link", "set", "fabric", "up"])?;
        let text = format!(
            "node = \"n\"\npin_dir = {:?}\nrun_dir = {:?}\nfast_path = \"all\"\n[source]\n{}\n[[parent]]\ninterface = \"eth1\"\n",
            stand.pin_dir(),
            stand.path("run"),
            source.replace("DIR", &stand.dir.display().to_string()),
        );
        fs::write(stand.path("agent.toml"), text)?;
        Ok(stand)
    }

    fn netns(&self) -> &Netns {
        self.node.netns()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn pin_dir(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(self.netns().name())
    }

    fn start_agent(&mut self) -> Result {
        let mut command = self.netns().command(eniway_binary()?)?;
        command.args(["agent", "--config"]).arg(self.path("agent.toml"));
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("agent.log"))?;
        self.agent = Some(command.stdout(Stdio::null()).stderr(log).spawn()?);
        Ok(())
    }

    fn stop_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }

    fn serve(&self) -> Result<Server> {
        self.runtime.block_on(async {
            let store = Arc::new(EmbeddedStore::open(self.path("ipam.redb"))?);
            let settings = Settings::default();
            let allocator = Allocator::open(settings, store, self.vpc.clone(), Arc::new(SystemClock)).await?;
            allocator.add_subnet(subnet()).await?;
            allocator.put_node(node()).await?;
            allocator.start();
            let listener = Listener::unix(self.path("ipam.sock"))?;
            let (stop, stopped) = oneshot::channel::<()>();
            let task = tokio::spawn(rpc::serve(allocator.clone(), vec![listener], async {
                let _ = stopped.await;
            }));
            Ok(Server { allocator, stop, task })
        })
    }

    fn stop(&self, server: Server) -> Result {
        self.runtime.block_on(async {
            let _ = server.stop.send(());
            server.task.await??;
            server.allocator.close().await;
            Ok(())
        })
    }

    fn client(&self) -> Result<Client> {
        let _inside = self.runtime.enter();
        Ok(Client::new(Address::Unix(self.path("ipam.sock")), None)?.patient(SOON))
    }

    fn allocate(&self, pod: usize, generation: u32) -> Result<Allocation> {
        let (client, request) = (self.client()?, self.request(pod, generation));
        Ok(self.runtime.block_on(client.allocate(&request, Some(SOON)))?)
    }

    fn request(&self, pod: usize, sandbox: u32) -> AllocateRequest {
        AllocateRequest {
            node: "n".into(),
            key: PodKey { uid: format!("uid-{pod}"), container_id: format!("container-{pod}-{sandbox}") },
            namespace: "default".into(),
            name: format!("pod-{pod}"),
            netns: Some(self.pods[pod].netns().path().display().to_string()),
            interface: "eth0".into(),
            address: AddressRequest::Pool,
            security_groups: None,
            timeout: None,
        }
    }

    fn status(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&fs::read(self.path("run/status.json"))?)?)
    }

    #[track_caller]
    fn wait_for_status(&self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + SOON;
        loop {
            let status = self.status().unwrap_or_default();
            if is(&status) {
                return status;
            }
            let log = || fs::read_to_string(self.path("agent.log")).unwrap_or_default();
            assert!(Instant::now() < end, "{what}: {status:#}\n{}", log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// One datagram from the first pod to the other and back: no second attempt.
    fn exchange(&self, to: Ipv4Addr) -> Result {
        let to = SocketAddrV4::new(to, 7000);
        let reply = udp_exchange(self.pods[0].netns(), 0, to, b"first", UDP)?;
        assert_eq!(reply.payload, b"first");
        Ok(())
    }

    /// What the tables hold, by the pods' numbers in them.
    fn tables(&self) -> Result<Vec<String>> {
        let mut command = self.netns().command(eniway_binary()?)?;
        let output = command.args(["pods", "--json", "--config"]).arg(self.path("agent.toml")).output()?;
        let pods: Vec<Value> = serde_json::from_slice(&output.stdout)?;
        let columns = ["id", "ip", "vlan", "mac", "host_interface", "ready"];
        let mut rows: Vec<String> =
            pods.iter().map(|pod| columns.map(|column| pod[column].to_string()).join(" ")).collect();
        rows.sort();
        Ok(rows)
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        self.stop_agent();
        if let Ok(binary) = eniway_binary()
            && let Ok(mut detach) = self.netns().command(binary)
        {
            let _ = detach.args(["detach", "--config"]).arg(self.path("agent.toml")).output();
        }
        let _ = fs::remove_dir_all(self.pin_dir());
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn subnet() -> Subnet {
    Subnet {
        id: "net-a".into(),
        ipv4: "10.1.16.0/22".parse().expect("a prefix"),
        gateway: [10, 1, 16, 1].into(),
        gateway_mac: Mac([0xfa, 0xff, 0xff, 0, 0, 1]),
        ipv6: None,
        gateway_ipv6: None,
        mtu: 1500,
    }
}

fn node() -> Node {
    Node {
        name: "n".into(),
        kind: NodeKind::SubEni {
            parents: vec![Parent { id: "eni-1".into(), interface: "eth1".into(), limit: 64 }],
        },
        policy: Policy::PreBound { minimum: 2, maximum: 4 },
        dual_stack: false,
        subnets: vec![],
        security_groups: vec![],
        draining: false,
        confirmed: 0,
    }
}

#[test]
fn a_pods_first_packet_is_forwarded_and_an_absent_allocator_changes_nothing() -> Result {
    let mut stand = Stand::new("grpc", "kind = \"grpc\"\naddress = \"unix:DIR/ipam.sock\"")?;
    // The agent comes first: there is no allocator yet.
    stand.start_agent()?;
    let status = stand.wait_for_status("the source is away", |status| status["source_down_since"].is_u64());
    assert!(status["source_error"].as_str().unwrap_or_default().contains("ipam.sock"), "{status}");
    let server = stand.serve()?;

    stand.allocate(0, 1)?;
    let b = stand.allocate(1, 1)?;
    let echo = UdpEcho::start(stand.pods[1].netns(), SocketAddrV4::new(b.addresses.ipv4, 7000))?;
    stand.exchange(b.addresses.ipv4)?;
    let well = |status: &Value| {
        status["source_down_since"].is_null() && status["pods"].as_array().is_some_and(|pods| pods.len() == 2)
    };
    let before = stand.wait_for_status("both pods are known", well);
    let records = stand.tables()?;

    // Away: traffic goes on, also for an agent that starts then.
    stand.stop(server)?;
    stand.wait_for_status("the source is away", |status| status["source_down_since"].is_u64());
    stand.exchange(b.addresses.ipv4)?;
    stand.stop_agent();
    stand.exchange(b.addresses.ipv4)?;
    stand.start_agent()?;
    let status = stand.wait_for_status("the new agent sees no source", |status| {
        status["source_down_since"].is_u64() && status["pid"] != before["pid"]
    });
    assert_eq!(status["ready"], false, "{status}");
    stand.exchange(b.addresses.ipv4)?;

    // Back: nothing changes.
    let server = stand.serve()?;
    let after = stand.wait_for_status("the source is back", |status| well(status) && status["ready"] == true);
    let slots = |status: &Value| {
        let pods = status["pods"].as_array().cloned().unwrap_or_default();
        let mut slots: Vec<String> =
            pods.iter().map(|pod| format!("{} {}", pod["uid"], pod["slot"])).collect();
        slots.sort();
        slots
    };
    assert_eq!(slots(&after), slots(&before));
    assert_eq!(stand.tables()?, records);
    let log = fs::read_to_string(stand.path("agent.log"))?;
    let summary = log.lines().rfind(|line| line.contains(" operations")).unwrap_or_default();
    assert!(summary.contains("2 pods, 0 released, 0 operations, 0 faults"), "{log}");

    // A release takes the pod off the node; another sandbox of the pod works at once.
    let client = stand.client()?;
    stand.runtime.block_on(client.release(&b.key, Some(b.generation)))?;
    stand.wait_for_status("one pod is left", |status| {
        status["pods"].as_array().is_some_and(|pods| pods.len() == 1)
    });
    drop(echo);
    let links = stand.pods[1].netns().exec(&["ip", "-br", "link"])?;
    assert!(!links.contains("eth0"), "{links}");
    let b = stand.allocate(1, 2)?;
    let _echo = UdpEcho::start(stand.pods[1].netns(), SocketAddrV4::new(b.addresses.ipv4, 7000))?;
    stand.exchange(b.addresses.ipv4)?;
    stand.stop(server)
}

#[test]
fn an_allocator_that_has_lost_its_memory_takes_nothing_down() -> Result {
    let mut stand = Stand::new("empty", "kind = \"grpc\"\naddress = \"unix:DIR/ipam.sock\"")?;
    let server = stand.serve()?;
    stand.start_agent()?;
    // More than the few that may always go at once.
    let client = stand.client()?;
    for number in 0..12 {
        let mut request = stand.request(0, number);
        request.interface = format!("eth{number}");
        stand.runtime.block_on(client.allocate(&request, Some(SOON)))?;
    }
    let pods = |count: usize| {
        move |status: &Value| status["pods"].as_array().is_some_and(|pods| pods.len() == count)
    };
    stand.wait_for_status("all pods are known", pods(12));
    let records = stand.tables()?;
    stand.stop(server)?;
    fs::remove_file(stand.path("ipam.redb"))?;

    let server = stand.serve()?;
    let status = stand.wait_for_status("its snapshot is held back", |status| status["held_back"].is_string());
    assert!(status["held_back"].as_str().unwrap_or_default().contains("12 of 12"), "{status}");
    assert_eq!(stand.tables()?, records);
    // Saying it again is no confirmation; an operator's word is.
    stand.stop(server)?;
    stand.wait_for_status("it is away", |status| status["source_down_since"].is_u64());
    let server = stand.serve()?;
    stand.wait_for_status("it is back", |status| status["source_down_since"].is_null());
    thread::sleep(Duration::from_millis(300));
    assert_eq!(stand.tables()?, records);
    stand.runtime.block_on(client.confirm(&Confirm::Node("n".into())))?;
    stand.wait_for_status("the snapshot is in force", |status| {
        status["held_back"].is_null() && pods(0)(status)
    });
    stand.allocate(1, 1)?;
    stand.stop(server)
}

#[test]
fn what_the_agent_cannot_do_is_told_to_who_waits() -> Result {
    let mut stand = Stand::new("refused", "kind = \"grpc\"\naddress = \"unix:DIR/ipam.sock\"")?;
    let server = stand.serve()?;
    stand.start_agent()?;
    let client = stand.client()?;
    let request = AllocateRequest { netns: Some("/run/netns/ewr-no-such".into()), ..stand.request(0, 1) };
    let error = stand.runtime.block_on(client.allocate(&request, Some(SOON))).expect_err("no such namespace");
    assert!(error.to_string().contains("/run/netns/ewr-no-such"), "{error}");
    // The next one is none the worse for it.
    stand.allocate(1, 1)?;
    stand.stop(server)
}

/// Rules for datagrams to the echo, as far as `port` lets them; `free` lets everything through both ways.
fn groups(port: u16) -> Value {
    let all = |direction: &str| serde_json::json!({ "direction": direction, "action": "allow" });
    let echo = serde_json::json!({ "direction": "ingress", "action": "allow", "protocol": "udp",
        "ports": port.to_string(), "group": "client" });
    serde_json::json!({ "security_groups": [
        { "id": "client", "rules": [all("egress")] },
        { "id": "server", "rules": [echo] },
        { "id": "free", "rules": [all("ingress"), all("egress")] },
    ]})
}

#[test]
fn security_groups_of_the_allocator_are_in_force_when_they_are_acknowledged() -> Result {
    let mut stand = Stand::new("groups", "kind = \"grpc\"\naddress = \"unix:DIR/ipam.sock\"")?;
    let config = fs::read_to_string(stand.path("agent.toml"))?;
    fs::write(stand.path("agent.toml"), config.replace("\"all\"", "\"security-groups\""))?;
    let server = stand.serve()?;
    stand.start_agent()?;
    let client = stand.client()?;
    let allocate = |pod: usize, group: &str| -> Result<Allocation> {
        let request =
            AllocateRequest { security_groups: Some(vec![group.to_owned()]), ..stand.request(pod, 1) };
        Ok(stand.runtime.block_on(client.allocate(&request, Some(SOON)))?)
    };
    let (a, b) = (allocate(0, "client")?, allocate(1, "server")?);
    let _echo = UdpEcho::start(stand.pods[1].netns(), SocketAddrV4::new(b.addresses.ipv4, 7000))?;
    let eniway = |arguments: &[&str]| -> Result<Value> {
        let output = stand.netns().command(eniway_binary()?)?.args(arguments).output()?;
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {words}");
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    let socket = format!("unix:{}", stand.path("ipam.sock").display());
    let config = stand.path("agent.toml").display().to_string();
    // The report follows what is in force by a moment.
    let wait_for_verdict = |verdict: &str| -> Result {
        let end = Instant::now() + SOON;
        loop {
            let report = eniway(&["policy", "--json", "--config", &config])?;
            let pairs = report["pairs"].as_array().cloned().unwrap_or_default();
            let between = |pair: &&Value| {
                pair["from"].to_string().contains("pod-0") && pair["to"].to_string().contains("pod-1")
            };
            if pairs.iter().find(between).is_some_and(|pair| pair["verdict"] == verdict) {
                return Ok(());
            }
            assert!(Instant::now() < end, "{verdict}: {report:#}");
            thread::sleep(Duration::from_millis(20));
        }
    };
    let apply = |port: u16| -> Result {
        let file = stand.path("groups.json");
        fs::write(&file, groups(port).to_string())?;
        let file = file.display().to_string();
        let put = eniway(&["ipam", "security-groups", "apply", &file, "--server", &socket, "--json"])?;
        assert_eq!(put["changed"], true);
        let end = Instant::now() + SOON;
        while stand.runtime.block_on(client.pools())?[0].acknowledged < put["revision"].as_u64() {
            assert!(Instant::now() < end, "revision {put} is not acknowledged");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    };
    // There is no VPC: what takes the wire arrives nowhere.
    let arrives = || {
        let to = SocketAddrV4::new(b.addresses.ipv4, 7000);
        udp_exchange(stand.pods[0].netns(), 0, to, b"one", Duration::from_millis(300)).is_ok()
    };
    let set = |of: &Allocation, group: &str| -> Result<Value> {
        let PodKey { uid, container_id } = &of.key;
        let who = ["--uid", uid, "--container-id", container_id, "--wait", "20"];
        eniway(&[&["ipam", "set-groups", "--server", &socket, "--json"], &who[..], &[group]].concat())
    };

    // Nobody has said what the groups mean.
    wait_for_verdict("wire")?;
    assert!(!arrives());
    // Rules, other rules, and the first ones again.
    apply(7000)?;
    assert!(arrives());
    wait_for_verdict("check")?;
    apply(7001)?;
    assert!(!arrives());
    apply(7000)?;
    assert!(arrives());
    let shown = eniway(&["ipam", "security-groups", "show", "--server", &socket, "--json"])?;
    assert_eq!(shown["security_groups"].as_array().map(Vec::len), Some(3), "{shown}");

    // Other groups for pods that run; one that nobody knows is the VPC's.
    set(&b, "client")?;
    assert!(!arrives());
    set(&b, "free")?;
    assert!(arrives());
    let set_a = set(&a, "free")?;
    assert!(arrives());
    wait_for_verdict("open")?;
    assert_eq!(set_a["security_groups"], serde_json::json!(["free"]));
    let at_vpc = stand.vpc.interfaces();
    let of_a = at_vpc.iter().find(|one| one.id == a.vpc_id).expect("the VPC has it");
    assert_eq!(of_a.security_groups, ["free"]);
    set(&b, "unheard-of")?;
    assert!(!arrives());
    set(&b, "free")?;

    // Without its allocator the agent judges on, and so does the next agent, which has not heard of any groups yet.
    stand.stop(server)?;
    assert!(arrives());
    let server = stand.serve()?;
    let old = stand.status()?["pid"].clone();
    stand.stop_agent();
    stand.exchange(b.addresses.ipv4)?;
    stand.start_agent()?;
    stand.wait_for_status("the new agent is ready", |status| status["ready"] == true && status["pid"] != old);
    stand.exchange(b.addresses.ipv4)?;
    stand.stop(server)
}

#[test]
fn the_allocator_works_inside_the_agent() -> Result {
    let mut stand = Stand::new("embed", "kind = \"embedded\"\nconfig = \"DIR/ipam.toml\"")?;
    let text = "listen = [\"unix:DIR/ipam.sock\"]\n[store]\nkind = \"embedded\"\npath = \"DIR/embedded.redb\"\n\
                [[subnet]]\nid = \"net-a\"\nipv4 = \"10.1.16.0/22\"\ngateway = \"10.1.16.1\"\n\
                gateway_mac = \"fa:ff:ff:00:00:01\"\n[[node]]\nname = \"n\"\npolicy = \"on-demand\"\n\
                kind = { sub-eni = { parents = [{ id = \"eni-1\", interface = \"eth1\" }] } }\n";
    fs::write(stand.path("ipam.toml"), text.replace("DIR", &stand.dir.display().to_string()))?;
    stand.start_agent()?;
    stand.wait_for_status("it is ready", |status| status["ready"] == true);
    stand.allocate(0, 1)?;
    let b = stand.allocate(1, 1)?;
    let _echo = UdpEcho::start(stand.pods[1].netns(), SocketAddrV4::new(b.addresses.ipv4, 7000))?;
    stand.exchange(b.addresses.ipv4)?;

    // The command line asks the same allocator.
    let server = format!("unix:{}", stand.path("ipam.sock").display());
    for (command, word) in [("allocations", "default/pod-1"), ("pools", "on demand"), ("cooling", "nothing")]
    {
        let output = Command::new(eniway_binary()?).args(["ipam", command, "--server", &server]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains(word), "{command}: {text} {output:?}");
    }

    // A new agent finds its store, and what runs.
    let records = stand.tables()?;
    stand.stop_agent();
    stand.exchange(b.addresses.ipv4)?;
    stand.start_agent()?;
    stand.wait_for_status("it is ready again", |status| {
        status["ready"] == true && status["pods"].as_array().is_some_and(|pods| pods.len() == 2)
    });
    assert_eq!(stand.tables()?, records);
    stand.exchange(b.addresses.ipv4)
}

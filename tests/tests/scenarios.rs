//! The doors L1 to L8 (ARCHITECTURE.md, "Doors") and what else depends on the way a packet takes, played in the lab: by
//! TCP, and by UDP and ICMP where they differ; with the fast path on and off, without XDP and in both its modes.
//!
//! ```text
//!   vm 10.1.0.20 ───────┐            ┌── node-1  eth0 10.1.0.11
//!   outside ────────────┤            │          eth1 ─┬─ VLAN 101 ── a 10.1.16.101
//!   ELB 10.1.0.250 ─────┤            │                ├─ VLAN 102 ── b 10.1.16.102
//!     VIP1 10.1.0.200 ──┤   fabric   │                └─ VLAN 103 ── d 10.1.16.104 (MTU 1300 in its scenario)
//!     VIP2 10.1.0.201 ──┤            │
//!                       └────────────┴── node-2  eth0 10.1.0.12
//!                                               eth1 ─── VLAN 101 ── c 10.1.16.103
//! ```
//!
//! One lab for each setting serves all scenarios. A scenario that fails leaves a capture of the fabric's ports behind and
//! says where.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddrV4},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use eniway_tests::{
    demo::{
        evidence::{Failure, Place, Result, Session, Trail, Watch, ask, expect_seen},
        kube_proxy::{Rules, Source},
    },
    ensure,
    lab::{
        self, Client, ELB_IP, Lab, Netns, Node, Pod, Protocol, VipSpec, XdpMode,
        fabric::Kind,
        http::Request,
        net::{UdpEcho, UdpReply, ping, tcp_connect, udp_exchange},
    },
};
use libtest_mimic::{Arguments, Failed, Trial};

/// Where the pods' UDP servers are, and the ELB's UDP listener.
const ECHO: u16 = 7007;
const NODE_PORT: u16 = 30080;
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 247, 0, 10);
const VIP2: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 1, 0, 201), 80);
const LARGE: u64 = 20_000_000;
const SHORT: Duration = Duration::from_millis(300);
const LIMIT: Duration = Duration::from_secs(2);

type Scenario = (&'static str, fn(&World<'_>) -> Result<()>);

const SCENARIOS: &[Scenario] = &[
    ("direct/same-node", direct_same_node),
    ("direct/cross-node", direct_cross_node),
    ("l1/elb-to-another-node", l1),
    ("l2/elb-to-the-same-node", l2),
    ("l3/elb-to-itself", l3),
    ("l4/node-to-elb", l4),
    ("l5/one-5-tuple-twice", l5),
    ("l6/direct-and-elb-at-once", l6),
    ("l7/health-checks", l7),
    ("l8/node-port", l8),
    ("l8/node-port-from-afar", l8_from_afar),
    ("l8/node-port-without-the-client", node_port_cluster),
    ("host/service", service),
    ("host/probe-and-kubelet", host),
    ("fragments/same-node", fragments_same_node),
    ("fragments/cross-node", fragments_cross_node),
    ("fragments/elb", fragments_elb),
    ("mtu/smaller-at-the-destination", smaller_mtu),
    ("bulk/elb-to-the-same-node", bulk),
    ("rules-of-the-vpc", no_violations),
];

/// What the scenarios are played with.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Setting {
    fast_path: bool,
    xdp: XdpMode,
}

const SETTINGS: [Setting; 5] = [
    Setting { fast_path: true, xdp: XdpMode::Off },
    Setting { fast_path: false, xdp: XdpMode::Off },
    Setting { fast_path: true, xdp: XdpMode::Guard },
    Setting { fast_path: true, xdp: XdpMode::Redirect },
    Setting { fast_path: false, xdp: XdpMode::Redirect },
];

impl Setting {
    fn name(self) -> String {
        let path = if self.fast_path { "fast" } else { "hairpin" };
        format!("{path}-xdp-{}", self.xdp.name())
    }

    fn build(self) -> lab::Result<Lab> {
        let vip = |ip, port, protocol, health_check| VipSpec {
            ip,
            port,
            protocol,
            target_port: port,
            backends: Vec::new(),
            health_check,
        };
        let lab = Lab::builder("scenarios")
            .node("node-1", [10, 1, 0, 11], [10, 1, 16, 11])
            .node("node-2", [10, 1, 0, 12], [10, 1, 16, 12])
            .pod("a", "node-1", [10, 1, 16, 101])
            .pod("b", "node-1", [10, 1, 16, 102])
            .pod("d", "node-1", [10, 1, 16, 104])
            .pod("c", "node-2", [10, 1, 16, 103])
            .vm("vm", [10, 1, 0, 20])
            .http_vip([10, 1, 0, 200], 80)
            .vip(vip(*VIP2.ip(), VIP2.port(), Protocol::Tcp, true))
            .vip(vip(Ipv4Addr::new(10, 1, 0, 200), ECHO, Protocol::Udp, false))
            .fast_path(self.fast_path)
            .xdp(self.xdp)
            .build()?;
        lab.make_large_file(LARGE)?;
        lab.start_agents()?;
        lab.elb().wait_healthy(lab.pods().len(), Duration::from_secs(10))?;
        Ok(lab)
    }
}

/// The lab that stands, if any, and its setting.
type Stage = Arc<Mutex<Option<(Setting, Lab)>>>;

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let stage = Stage::default();
    let mut trials = Vec::new();
    for setting in SETTINGS {
        for scenario in SCENARIOS {
            let stage = Arc::clone(&stage);
            let name = format!("{}::{}", setting.name(), scenario.0);
            trials.push(Trial::test(name, move || play(&stage, setting, scenario)));
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(lock(&stage).take());
    conclusion.exit();
}

fn lock(stage: &Stage) -> std::sync::MutexGuard<'_, Option<(Setting, Lab)>> {
    stage.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Plays a scenario in the lab of its setting, with the capture running.
fn play(stage: &Stage, setting: Setting, (name, scenario): &Scenario) -> Result<(), Failed> {
    let mut stage = lock(stage);
    if stage.as_ref().is_none_or(|(standing, _)| *standing != setting) {
        // The old one first: both have the same names.
        *stage = None;
        *stage = Some((setting, setting.build().map_err(|error| error.to_string())?));
    }
    let Some((_, lab)) = &*stage else { return Err("no lab".into()) };
    let pcap = pcap_path(setting, name);
    let capture = lab.fabric().capture(&pcap).map_err(|error| error.to_string())?;
    let result = World::of(lab, setting).and_then(|world| {
        lab.fabric().clear_flows()?;
        scenario(&world)
    });
    capture.stop();
    match result {
        Ok(()) => {
            let _ = std::fs::remove_file(&pcap);
            Ok(())
        }
        Err(failure) => Err(format!("{failure}\ncapture of the fabric's ports: {}", pcap.display()).into()),
    }
}

fn pcap_path(setting: Setting, name: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    dir.join(format!("{}-{}.pcapng", setting.name(), name.replace('/', "-")))
}

/// Who plays.
struct World<'l> {
    lab: &'l Lab,
    setting: Setting,
    a: &'l Pod,
    b: &'l Pod,
    c: &'l Pod,
    d: &'l Pod,
    node: &'l Node,
    vm: &'l Client,
    vip: SocketAddrV4,
}

impl<'l> World<'l> {
    fn of(lab: &'l Lab, setting: Setting) -> Result<Self> {
        let [a, b, c, d] = [lab.pod("a")?, lab.pod("b")?, lab.pod("c")?, lab.pod("d")?];
        Ok(Self { lab, setting, a, b, c, d, node: lab.node("node-1")?, vm: lab.vm("vm")?, vip: lab.vip()? })
    }

    /// From now on this client's flows to the ELB go to that pod.
    fn pin(&self, client: Ipv4Addr, to: &Pod) -> Result<()> {
        Ok(self.lab.elb().pin(client, to.ip)?)
    }

    fn echo(&self, pod: &Pod) -> Result<UdpEcho> {
        Ok(UdpEcho::start(&pod.netns, SocketAddrV4::new(pod.ip, ECHO))?)
    }

    /// TCP from a place to a pod, directly or by a VIP: the pod must see the client, and both ways must be by its VLAN.
    fn tcp_by_vlan(&self, from: &From<'_>, to: SocketAddrV4, pod: &Pod) -> Result<()> {
        let client = SocketAddrV4::new(from.ip, self.lab.fresh_port());
        let (_, whoami) = ask(from.netns, to, client.port())?;
        expect_seen(&whoami, pod, client)?;
        self.by_vlan(from, client, to, SocketAddrV4::new(pod.ip, 80), pod)
    }

    /// As [`tcp_by_vlan`](Self::tcp_by_vlan), by UDP.
    fn udp_by_vlan(&self, from: &From<'_>, to: SocketAddrV4, pod: &Pod, length: usize) -> Result<()> {
        let server = self.echo(pod)?;
        let client = SocketAddrV4::new(from.ip, self.lab.fresh_port());
        let reply = echo(from.netns, client.port(), to, length)?;
        ensure!(reply.from == to, "the answer came from {}, not from {to}", reply.from);
        ensure!(server.seen() == [client], "{} saw {:?}, not {client}", pod.name, server.seen());
        self.by_vlan(from, client, to, SocketAddrV4::new(pod.ip, ECHO), pod)
    }

    fn by_vlan(
        &self,
        from: &From<'_>,
        client: SocketAddrV4,
        to: SocketAddrV4,
        server: SocketAddrV4,
        pod: &Pod,
    ) -> Result<()> {
        let trail = Trail::between(self.lab, *client.ip(), pod.ip, client.port())?;
        if to == server {
            return trail.both_ways(&Place::of_pod(pod), client, server, &from.place);
        }
        trail.both_ways(&Place::of_pod(pod), client, server, &Place::of_pod(pod))?;
        Trail::between(self.lab, *client.ip(), *to.ip(), client.port())?.at_client(&from.place, client, to)
    }

    /// How packets between two pods of one node must go when nothing else is remembered.
    fn direct(&self, from: &Pod, port: u16, server: SocketAddrV4, to: &Pod) -> Result<()> {
        let trail = Trail::between(self.lab, from.ip, to.ip, port)?;
        if self.setting.fast_path && from.node == to.node {
            return trail.none();
        }
        let client = SocketAddrV4::new(from.ip, port);
        trail.both_ways(&Place::of_pod(to), client, server, &Place::of_pod(from))
    }
}

/// A client: its namespace, its address, and where the fabric sees it.
struct From<'l> {
    netns: &'l Netns,
    ip: Ipv4Addr,
    place: Place,
}

fn pod(pod: &Pod) -> From<'_> {
    From { netns: &pod.netns, ip: pod.ip, place: Place::of_pod(pod) }
}

fn client(client: &Client) -> From<'_> {
    From { netns: &client.netns, ip: client.ip, place: Place::of_client(client) }
}

fn primary(node: &Node) -> From<'_> {
    From { netns: &node.netns, ip: node.ip, place: Place::of_node(node) }
}

/// Sends a datagram of so many bytes and expects it back unharmed.
fn echo(netns: &Netns, from_port: u16, to: SocketAddrV4, length: usize) -> Result<UdpReply> {
    let payload: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
    let reply = udp_exchange(netns, from_port, to, &payload, LIMIT)?;
    ensure!(
        reply.payload == payload,
        "{} bytes came back otherwise than they were sent",
        reply.payload.len()
    );
    Ok(reply)
}

fn expect_nowhere(netns: &Netns, from_port: u16, to: SocketAddrV4) -> Result<()> {
    ensure!(tcp_connect(netns, from_port, to, SHORT).is_err(), "{to} was reached by TCP");
    Ok(())
}

/// ```text
///   a ── VLAN 101 ─┐
///                  node-1        fast path: a <─> b;  hairpin: a ─ 101 ─> fabric ─ 102 ─> b
///   b ── VLAN 102 ─┘
/// ```
/// a talks to b, its neighbour: past the fabric on the fast path, else out on one VLAN and in on the other.
fn direct_same_node(w: &World<'_>) -> Result<()> {
    let door = if w.setting.fast_path { "local" } else { "wire" };
    let (asks, answers) = (Watch::pod(w.lab, w.a, "egress", door)?, Watch::pod(w.lab, w.b, "egress", door)?);
    let port = w.lab.fresh_port();
    let (_, whoami) = ask(&w.a.netns, w.b.http(), port)?;
    expect_seen(&whoami, w.b, SocketAddrV4::new(w.a.ip, port))?;
    w.direct(w.a, port, w.b.http(), w.b)?;
    asks.rose()?;
    answers.rose()?;

    let server = w.echo(w.b)?;
    let port = w.lab.fresh_port();
    echo(&w.a.netns, port, server.addr(), 100)?;
    w.direct(w.a, port, server.addr(), w.b)?;

    w.lab.fabric().clear_flows()?;
    ping(&w.a.netns, w.b.ip, LIMIT)?;
    let trail = Trail::between(w.lab, w.a.ip, w.b.ip, 0)?;
    if w.setting.fast_path { trail.none() } else { trail.conversation(&Place::of_pod(w.b), w.a.ip, w.b.ip) }
}

/// ```text
///   a ── VLAN 101 ── node-1 ── fabric ── node-2 ── VLAN 101 ── c
/// ```
/// a talks to c on another node, and both to the VM; the VLANs carry it both ways.
fn direct_cross_node(w: &World<'_>) -> Result<()> {
    w.tcp_by_vlan(&pod(w.a), w.c.http(), w.c)?;
    w.udp_by_vlan(&pod(w.a), SocketAddrV4::new(w.c.ip, ECHO), w.c, 100)?;
    w.tcp_by_vlan(&client(w.vm), w.a.http(), w.a)?;
    w.udp_by_vlan(&client(w.vm), SocketAddrV4::new(w.a.ip, ECHO), w.a, 1400)?;
    for (from, to) in [(&w.a.netns, w.c), (&w.vm.netns, w.a)] {
        w.lab.fabric().clear_flows()?;
        ping(from, to.ip, LIMIT)?;
        let from_ip = if *from == w.vm.netns { w.vm.ip } else { w.a.ip };
        Trail::between(w.lab, from_ip, to.ip, 0)?.conversation(&Place::of_pod(to), from_ip, to.ip)?;
    }
    Ok(())
}

/// ```text
///   a ── 101 ── node-1 ──> VIP1 ──> node-2 ── 101 ── c
///                           ELB
/// ```
/// a asks the ELB, which chooses c on another node: c sees a, and its answer leaves by its VLAN, back to the ELB.
fn l1(w: &World<'_>) -> Result<()> {
    w.pin(w.a.ip, w.c)?;
    w.tcp_by_vlan(&pod(w.a), w.vip, w.c)?;
    w.udp_by_vlan(&pod(w.a), SocketAddrV4::new(*w.vip.ip(), ECHO), w.c, 100)
}

/// ```text
///   a ── 101 ──┐          ┌──> VIP1 ──┐
///              node-1 ────┤           │ ELB
///   b ── 102 ──┘          └──<────────┘
/// ```
/// a asks the ELB, which chooses b, a's neighbour: what arrives on VLAN 102 has a as its source, and b's answer to a
/// must not take the short cut to a, who expects it from the VIP.
fn l2(w: &World<'_>) -> Result<()> {
    w.pin(w.a.ip, w.b)?;
    let short_cut = Watch::pod(w.lab, w.b, "egress", "local")?;
    let remembered = Watch::pod(w.lab, w.b, "ingress", "flow-remembered")?;
    w.tcp_by_vlan(&pod(w.a), w.vip, w.b)?;
    w.udp_by_vlan(&pod(w.a), SocketAddrV4::new(*w.vip.ip(), ECHO), w.b, 100)?;
    short_cut.rested()?;
    remembered.rose()?;
    Ok(())
}

/// ```text
///   a ── 101 ── node-1 ──> VIP1 ──┐
///        101 <────────────────────┘ ELB
/// ```
/// a asks the ELB, which chooses a itself: the packet comes back with a as source and destination, and ends there,
/// counted for a.
fn l3(w: &World<'_>) -> Result<()> {
    w.pin(w.a.ip, w.a)?;
    let dropped = Watch::pod(w.lab, w.a, "ingress", "self-hairpin")?;
    expect_nowhere(&w.a.netns, w.lab.fresh_port(), w.vip)?;
    let by_tcp = dropped.rose()?;
    let server = w.echo(w.a)?;
    let to = SocketAddrV4::new(*w.vip.ip(), ECHO);
    let result = udp_exchange(&w.a.netns, w.lab.fresh_port(), to, b"to myself", SHORT);
    ensure!(result.is_err(), "a got its own datagram answered: {result:?}");
    ensure!(server.seen().is_empty(), "a saw {:?}", server.seen());
    ensure!(dropped.rise()? == by_tcp + 1, "the datagram was not counted once");
    Ok(())
}

/// ```text
///   node-1 eth0 ──> VIP1 ──> eth1 ── 101 ── a
///                    ELB
/// ```
/// node-1 asks the ELB, which chooses a, a pod of that very node: a sees its node's address, and must answer by its VLAN
/// and not straight into the node's stack.
fn l4(w: &World<'_>) -> Result<()> {
    w.pin(w.node.ip, w.a)?;
    let by_host = Watch::pod(w.lab, w.a, "egress", "host")?;
    w.tcp_by_vlan(&primary(w.node), w.vip, w.a)?;
    w.udp_by_vlan(&primary(w.node), SocketAddrV4::new(*w.vip.ip(), ECHO), w.a, 100)?;
    by_host.rested()
}

/// ```text
///   a:P ──> VIP1 ──┐
///   a:P ──> VIP2 ──┴─ ELB ──> b:80     (a:P, b:80) twice
/// ```
/// a uses one source port towards two VIPs, and both choose b: on node-1 the two connections are one 5-tuple, which
/// nobody can tell apart. What happens is what would happen without us: b's stack knows one connection and the ELB
/// one way back. The datapath forwards everything by b's VLAN and remembers one flow.
fn l5(w: &World<'_>) -> Result<()> {
    w.pin(w.a.ip, w.b)?;
    let port = w.lab.fresh_port();
    let client = SocketAddrV4::new(w.a.ip, port);
    let short_cut = Watch::pod(w.lab, w.b, "egress", "local")?;
    let remembered = Watch::pod(w.lab, w.b, "ingress", "flow-remembered")?;
    let mut first = Session::open(&w.a.netns, port, w.vip)?;
    expect_seen(&first.ask()?, w.b, client)?;
    let second = tcp_connect(&w.a.netns, port, VIP2, LIMIT);
    let first_lives = first.ask().is_ok();
    ensure!(
        !(second.is_ok() && first_lives),
        "two connections of one 5-tuple both work: the ELB tells them apart, and this page is out of date"
    );
    short_cut.rested()?;
    ensure!(remembered.rise()? <= 2, "the 5-tuple was remembered {} times", remembered.rise()?);
    let trace = w.lab.agent(&w.b.node)?.cli(&[
        "trace",
        "--pod",
        "default/b",
        "--from",
        &client.to_string(),
        "--port",
        "80",
        "--via",
        "wire",
        "--no-syn",
    ])?;
    ensure!(
        trace.contains("came in by door `wire`"),
        "the trace does not show the remembered flow:\n{trace}"
    );
    Ok(())
}

/// ```text
///   a:P1 ───────────────────> b:80     direct
///   a:P2 ──> VIP1 ── ELB ───> b:80     by the ELB, at the same time
/// ```
/// a talks to b directly and by the ELB at once: the memory is of the flow, never of the pair.
fn l6(w: &World<'_>) -> Result<()> {
    w.pin(w.a.ip, w.b)?;
    let (direct, by_elb) = (w.lab.fresh_port(), w.lab.fresh_port());
    let mut sessions = [
        (direct, Session::open(&w.a.netns, direct, w.b.http())?),
        (by_elb, Session::open(&w.a.netns, by_elb, w.vip)?),
    ];
    for _ in 0..20 {
        for (port, session) in &mut sessions {
            expect_seen(&session.ask()?, w.b, SocketAddrV4::new(w.a.ip, *port))?;
        }
    }
    w.direct(w.a, direct, w.b.http(), w.b)?;
    let through_elb = SocketAddrV4::new(w.a.ip, by_elb);
    w.by_vlan(&pod(w.a), through_elb, w.vip, w.b.http(), w.b)?;

    let server = w.echo(w.b)?;
    let (direct, by_elb) = (w.lab.fresh_port(), w.lab.fresh_port());
    let vip = SocketAddrV4::new(*w.vip.ip(), ECHO);
    for _ in 0..10 {
        for (port, to) in [(direct, server.addr()), (by_elb, vip)] {
            let reply = echo(&w.a.netns, port, to, 100)?;
            ensure!(reply.from == to, "the answer came from {}, not from {to}", reply.from);
        }
    }
    w.direct(w.a, direct, server.addr(), w.b)?;
    w.by_vlan(&pod(w.a), SocketAddrV4::new(w.a.ip, by_elb), vip, server.addr(), w.b)
}

/// ```text
///   ELB 10.1.0.250 ──> fabric ──> each pod's VLAN
/// ```
/// The ELB's health checks are answered by the VLAN of each pod, without a memory.
fn l7(w: &World<'_>) -> Result<()> {
    let backends = w.lab.elb().backends();
    ensure!(backends.iter().all(|backend| backend.healthy), "not all are healthy: {backends:?}");
    let passed = |pod: &Pod| {
        let backends = w.lab.elb().backends();
        backends.iter().find(|backend| backend.addr == pod.http()).map_or(0, |backend| backend.passed)
    };
    let before: Vec<u64> = w.lab.pods().iter().map(passed).collect();
    let end = std::time::Instant::now() + LIMIT;
    while w.lab.pods().iter().zip(&before).any(|(pod, before)| passed(pod) < before + 2) {
        ensure!(std::time::Instant::now() < end, "health checks do not go on: {:?}", w.lab.elb().backends());
        std::thread::sleep(Duration::from_millis(10));
    }
    for pod in w.lab.pods() {
        let trail = Trail::between(w.lab, ELB_IP, pod.ip, 80)?;
        trail.conversation(&Place::of_pod(pod), ELB_IP, pod.ip)?;
    }
    Ok(())
}

/// ```text
///   vm ──> eth0 of node-1:30080 ── nftables ──> a:80       source kept (externalTrafficPolicy: Local)
/// ```
/// A client uses a node port: its packets reach a through the node's stack, and a's answers must go back through it, or
/// the client sees a stranger answering.
fn l8(w: &World<'_>) -> Result<()> {
    node_port(w, &client(w.vm))
}

/// ```text
///   c ── node-2 ── fabric ──> eth0 of node-1:30080 ── nftables ──> a:80       source kept
/// ```
/// As before with a client that is not in the node's own subnet: what the node translates back leaves by the NIC that it
/// came in by.
fn l8_from_afar(w: &World<'_>) -> Result<()> {
    node_port(w, &pod(w.c))
}

fn node_port(w: &World<'_>, from: &From<'_>) -> Result<()> {
    let _rules = Rules::install(w.node, w.node.ip, NODE_PORT, &[w.a], Source::Kept)?;
    let to = SocketAddrV4::new(w.node.ip, NODE_PORT);
    let (there, back) =
        (Watch::pod(w.lab, w.a, "ingress", "host")?, Watch::pod(w.lab, w.a, "egress", "host")?);
    let client = SocketAddrV4::new(from.ip, w.lab.fresh_port());
    let (_, whoami) = ask(from.netns, to, client.port())?;
    expect_seen(&whoami, w.a, client)?;
    there.rose()?;
    back.rose()?;
    Trail::between(w.lab, from.ip, w.a.ip, client.port())?.none()?;
    let trail = Trail::between(w.lab, from.ip, w.node.ip, client.port())?;
    trail.both_ways(&Place::of_node(w.node), client, to, &from.place)
}

/// ```text
///   vm, c ──> eth0 of node-1:30080 ── nftables ─┬──────────────────> a:80      source: node-1
///                                               └─ eth0 ── fabric ──> c:80
/// ```
/// With `externalTrafficPolicy: Cluster` the node puts its own address in the client's place, and may choose a pod of another
/// node. Nothing is to be remembered; but what it translates back must not be taken for a pod's own.
fn node_port_cluster(w: &World<'_>) -> Result<()> {
    let to = SocketAddrV4::new(w.node.ip, NODE_PORT);
    for server in [w.a, w.c] {
        let _rules = Rules::install(w.node, w.node.ip, NODE_PORT, &[server], Source::Node)?;
        for from in [client(w.vm), pod(w.c)] {
            let client = SocketAddrV4::new(from.ip, w.lab.fresh_port());
            let (_, whoami) = ask(from.netns, to, client.port())?;
            ensure!(whoami.pod == server.name, "{} answered instead of {}", whoami.pod, server.name);
            ensure!(*whoami.remote.ip() == w.node.ip, "{} saw {}, not its node", server.name, whoami.remote);
            let trail = Trail::between(w.lab, from.ip, w.node.ip, client.port())?;
            trail.both_ways(&Place::of_node(w.node), client, to, &from.place)?;
        }
    }
    Ok(())
}

/// ```text
///   a ──> 10.247.0.10:80 ── nftables of node-1 ─┬─ eth1, VLAN 101 ──> c
///                                               └──────────────────> b
/// ```
/// a uses a Service that the node's stack translates. What leaves for c does so in a's name on a's VLAN, and what comes
/// back there passes the stack again before a sees it.
fn service(w: &World<'_>) -> Result<()> {
    let _rules = Rules::install(w.node, SERVICE, 80, &[w.c, w.b], Source::Kept)?;
    let returned = Watch::pod(w.lab, w.a, "ingress", "host-return")?;
    let mut chosen = BTreeSet::new();
    for _ in 0..4 {
        let client = SocketAddrV4::new(w.a.ip, w.lab.fresh_port());
        let (_, whoami) = ask(&w.a.netns, SocketAddrV4::new(SERVICE, 80), client.port())?;
        let pod = w.lab.pod(&whoami.pod)?;
        expect_seen(&whoami, pod, client)?;
        let trail = Trail::between(w.lab, w.a.ip, pod.ip, client.port())?;
        if pod.node == w.a.node {
            trail.none()?;
        } else {
            trail.both_ways(&Place::of_pod(pod), client, pod.http(), &Place::of_pod(w.a))?;
        }
        chosen.insert(whoami.pod);
    }
    ensure!(chosen.len() == 2, "only {chosen:?} were chosen");
    returned.rose()?;
    Ok(())
}

/// ```text
///   node-1's stack <──> a
/// ```
/// kubelet probes a, and a talks to its node; the fabric has no part in it.
fn host(w: &World<'_>) -> Result<()> {
    let (response, whoami) = ask(&w.node.netns, w.a.http(), w.lab.fresh_port())?;
    expect_seen(&whoami, w.a, response.local)?;
    let server = UdpEcho::start(&w.node.netns, SocketAddrV4::new(w.node.ip, ECHO))?;
    let client = SocketAddrV4::new(w.a.ip, w.lab.fresh_port());
    echo(&w.a.netns, client.port(), server.addr(), 1000)?;
    ensure!(server.seen() == [client], "the node saw {:?}, not {client}", server.seen());
    ping(&w.node.netns, w.a.ip, LIMIT)?;
    ping(&w.a.netns, w.node.ip, LIMIT)?;
    for node in [w.node.ip, w.node.parent_ip] {
        Trail::between(w.lab, node, w.a.ip, 0)?.none()?;
    }
    Ok(())
}

/// ```text
///   a ══ 4000 bytes in 3 fragments ══> b        same node
/// ```
/// Fragments follow the first of them, which alone has ports.
fn fragments_same_node(w: &World<'_>) -> Result<()> {
    let server = w.echo(w.b)?;
    let port = w.lab.fresh_port();
    echo(&w.a.netns, port, server.addr(), 4000)?;
    // Later fragments have no ports: all that passed between the two must be looked at.
    let trail = Trail::between(w.lab, w.a.ip, w.b.ip, 0)?;
    if w.setting.fast_path {
        return trail.none();
    }
    trail.both_ways(&Place::of_pod(w.b), SocketAddrV4::new(w.a.ip, port), server.addr(), &Place::of_pod(w.a))
}

/// ```text
///   a ══ 4000 bytes in 3 fragments ══> node-1 ── fabric ── node-2 ══> c
/// ```
/// The same to another node: later fragments, which have no ports, pass both nodes.
fn fragments_cross_node(w: &World<'_>) -> Result<()> {
    w.udp_by_vlan(&pod(w.a), SocketAddrV4::new(w.c.ip, ECHO), w.c, 4000)?;
    w.udp_by_vlan(&client(w.vm), SocketAddrV4::new(w.a.ip, ECHO), w.a, 4000)
}

/// ```text
///   a ══ 4000 bytes in 3 fragments ══> VIP1 ── ELB ──> b
/// ```
/// The lab's ELB takes no fragments, as most do not. The datapath hands all three to it, and drops nothing itself.
fn fragments_elb(w: &World<'_>) -> Result<()> {
    w.pin(w.a.ip, w.b)?;
    let _server = w.echo(w.b)?;
    let refused = w.lab.fabric().count(Kind::Fragment)?;
    let sent = Watch::pod(w.lab, w.a, "egress", "wire")?;
    let to = SocketAddrV4::new(*w.vip.ip(), ECHO);
    let result = udp_exchange(&w.a.netns, w.lab.fresh_port(), to, &[1; 4000], SHORT);
    ensure!(result.is_err(), "the ELB forwarded fragments: {result:?}");
    ensure!(w.lab.fabric().count(Kind::Fragment)? == refused + 2, "the ELB did not see both later fragments");
    ensure!(sent.rise()? >= 3, "not all fragments left by the wire");
    Ok(())
}

/// ```text
///   a (MTU 1500) ── 1400 bytes ──> d (MTU 1300)        same node
/// ```
/// A packet that d's interface would not take is left to the VPC, which answers for MTUs; what fits stays on the fast
/// path. TCP agrees on segments that fit.
fn smaller_mtu(w: &World<'_>) -> Result<()> {
    let agent = w.lab.agent(&w.d.node)?;
    let set_mtu = |mtu: u16| -> Result<()> {
        agent.change(|document| {
            let pods = document["pods"].as_array_mut().into_iter().flatten();
            for pod in pods.filter(|pod| pod["name"] == "d") {
                pod["mtu"] = mtu.into();
            }
        })?;
        Ok(agent.wait_ready(LIMIT * 2)?)
    };
    set_mtu(1300)?;
    let result = with_small_mtu(w);
    set_mtu(1500)?;
    result
}

fn with_small_mtu(w: &World<'_>) -> Result<()> {
    let link = w.d.netns.exec(&["ip", "link", "show", "eth0"])?;
    ensure!(link.contains("mtu 1300"), "d's interface has another MTU: {link}");
    let server = w.echo(w.d)?;
    let too_big = Watch::pod(w.lab, w.a, "egress", "too-big-for-local")?;
    let port = w.lab.fresh_port();
    echo(&w.a.netns, port, server.addr(), 1272)?;
    w.direct(w.a, port, server.addr(), w.d)?;
    too_big.rested()?;

    // One byte more than fits.
    let client = SocketAddrV4::new(w.a.ip, w.lab.fresh_port());
    let reply = udp_exchange(&w.a.netns, client.port(), server.addr(), &[7; 1273], SHORT);
    let trail = Trail::between(w.lab, w.a.ip, w.d.ip, client.port())?;
    ensure!(trail.sent(&Place::of_pod(w.a), client, server.addr()) == 1, "it did not go to the VPC: {trail}");
    if w.setting.fast_path {
        too_big.rose()?;
    }
    drop(reply);

    let port = w.lab.fresh_port();
    let download = Request::get(w.d.http(), "/large").from_port(port).send_large(&w.a.netns)?;
    ensure!(download.bytes == LARGE && download.differs_at.is_none(), "TCP from d: {download:?}");
    w.direct(w.a, port, w.d.http(), w.d)
}

/// ```text
///   a <══ 20 MB ══ VIP1 <── ELB <── 102 ── b
/// ```
/// As L2, with bulk: every byte of it on b's VLAN. And the other way round at once.
fn bulk(w: &World<'_>) -> Result<()> {
    w.pin(w.a.ip, w.b)?;
    w.pin(w.b.ip, w.a)?;
    let download = |from: &Pod, to: SocketAddrV4| -> Result<u16> {
        let port = w.lab.fresh_port();
        let download = Request::get(to, "/large").from_port(port).send_large(&from.netns)?;
        ensure!(download.bytes == LARGE && download.differs_at.is_none(), "{to}: {download:?}");
        Ok(port)
    };
    let both = std::thread::scope(|scope| {
        let other = scope.spawn(|| download(w.b, w.vip));
        let one = download(w.a, w.vip);
        (one, other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    for (client, port, server) in [(w.a, both.0?, w.b), (w.b, both.1?, w.a)] {
        let trail = Trail::between(w.lab, client.ip, server.ip, port)?;
        let bytes = trail.bytes(&Place::of_pod(server));
        ensure!(bytes >= LARGE, "only {bytes} bytes on the VLAN of {}: {trail}", server.name);
    }
    Ok(())
}

/// Whatever was played before, the fabric saw no frame that breaks a rule of the VPC.
fn no_violations(w: &World<'_>) -> Result<()> {
    let violations = w.lab.fabric().violations()?;
    if violations.is_empty() { Ok(()) } else { Err(Failure::Wrong(format!("{violations:?}"))) }
}

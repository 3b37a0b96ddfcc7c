//! Limits of bandwidth, with traffic: what a limited pod sends and receives, by every door.
//!
//! ```text
//!   vm 10.1.0.20 ──────┐            ┌── node-1  eth0 10.1.0.11
//!   VIP 10.1.0.200 ────┤   fabric   │          eth1 ─┬─ VLAN 101 ── a 10.1.16.101, limited
//!                      │            │                └─ VLAN 102 ── b 10.1.16.102
//!                      └────────────┴── node-2  eth1 ─── VLAN 101 ── c 10.1.16.103
//! ```
//!
//! Datagrams are counted by who receives them, over a time that the sender measures; a stream by who reads it.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use datapath_common::abi::Limits;
use datapath_user::{pin::Pins, tables::Maps};
use eniway_tests::lab::{Agent, Lab, Netns, Protocol, VipSpec, agent::Signal};
use serde_json::{Value, json};

type Result<T = (), E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// What a limited pod may do in a second, in bits, and at once: so much that a machine which is busy elsewhere for a moment
/// takes nothing away from it.
const RATE: u64 = 8_000_000;
const BURST: u64 = 2_400_000;
/// How long datagrams are sent, at twice the rate.
const TIME: Duration = Duration::from_millis(2500);
const PAYLOAD: usize = 1400;
/// Ethernet, IPv4 and UDP.
const HEADERS: u64 = 14 + 20 + 8;
const VIP: [u8; 4] = [10, 1, 0, 200];
const PORT: u16 = 7007;
/// The reserve for the node.
const RESERVE: u64 = 64 << 10;

/// The bytes that the rate gives in a time.
fn earned(time: Duration) -> f64 {
    RATE as f64 / 8.0 * time.as_secs_f64()
}

fn lab(id: &str) -> Result<Lab> {
    let vip = |name: &str, port| VipSpec {
        ip: VIP.into(),
        port,
        protocol: Protocol::Udp,
        target_port: PORT,
        backends: vec![name.to_owned()],
        health_check: false,
    };
    let lab = Lab::builder(id)
        .node("node-1", [10, 1, 0, 11], [10, 1, 16, 11])
        .node("node-2", [10, 1, 0, 12], [10, 1, 16, 12])
        .pod("a", "node-1", [10, 1, 16, 101])
        .pod("b", "node-1", [10, 1, 16, 102])
        .pod("c", "node-2", [10, 1, 16, 103])
        .vm("vm", [10, 1, 0, 20])
        .vip(vip("a", 1))
        .vip(vip("c", 2))
        .build()?;
    Ok(lab)
}

/// Limits pod `a`, or sets it free.
fn limit(agent: &Agent, bandwidth: &Value) -> Result {
    agent.change(|document| {
        for pod in document["pods"].as_array_mut().into_iter().flatten() {
            if pod["name"] == "a" {
                pod["bandwidth"] = bandwidth.clone();
            }
        }
    })?;
    Ok(agent.wait_ready(Duration::from_secs(20))?)
}

fn limited() -> Value {
    json!({ "ingress_rate": RATE, "ingress_burst": BURST, "egress_rate": RATE, "egress_burst": BURST })
}

/// Receives datagrams, and counts them.
struct Sink {
    received: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sink {
    fn start(netns: &Netns) -> Result<Self> {
        let socket = netns.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)))??;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        let (received, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, stopped) = (Arc::clone(&received), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !stopped.load(Relaxed) {
                if socket.recv(&mut buffer).is_ok() {
                    counted.fetch_add(1, Relaxed);
                }
            }
        });
        Ok(Self { received, stop, thread: Some(thread) })
    }

    /// Datagrams since the last call, once none come any more.
    fn take(&self) -> u64 {
        let mut before = self.received.load(Relaxed);
        loop {
            thread::sleep(Duration::from_millis(300));
            match self.received.load(Relaxed) {
                now if now == before => return self.received.swap(0, Relaxed),
                now => before = now,
            }
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Sends datagrams at a rate in bits for a time, by several sockets in turn. Returns how many they were, and how long it took.
///
/// What waits in a queue counts against the buffer of the socket that sent it, and a socket whose buffer is full blocks: one alone
/// has about 130 KiB of these datagrams under way.
fn flood(
    from: &Netns,
    to: SocketAddrV4,
    rate: u64,
    time: Duration,
    sockets: usize,
) -> Result<(u64, Duration)> {
    let bind = || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0));
    let sockets = from.run(|| (0..sockets).map(|_| bind()).collect::<Result<Vec<_>, _>>())??;
    let payload = [0; PAYLOAD];
    let size = (PAYLOAD as u64 + HEADERS) as f64 * 8.0;
    let start = Instant::now();
    let mut sent = 0;
    while start.elapsed() < time {
        let due = (start.elapsed().as_secs_f64() * rate as f64 / size) as u64;
        while sent < due {
            sockets[sent as usize % sockets.len()].send_to(&payload, to)?;
            sent += 1;
        }
        thread::sleep(Duration::from_millis(3));
    }
    Ok((sent, start.elapsed()))
}

/// Floods, and compares what came with what should. `more` bytes may come beyond rate and burst. Returns how many datagrams were
/// lost.
fn compare(
    name: &str,
    from: &Netns,
    to: SocketAddrV4,
    sink: &Sink,
    sockets: usize,
    more: u64,
) -> Result<u64> {
    // The burst of the case before is paid for.
    thread::sleep(Duration::from_millis(400));
    let (sent, time) = flood(from, to, 2 * RATE, TIME, sockets)?;
    let came = sink.take();
    let received = (came * (PAYLOAD as u64 + HEADERS)) as f64;
    let wanted = earned(time) + BURST as f64 / 8.0;
    let ratio = received / wanted;
    println!("{name}: {sent} datagrams sent in {time:.2?}, {ratio:.3} of rate and burst received");
    let most = 1.05 * wanted + more as f64;
    assert!(received >= 0.95 * wanted && received <= most, "{name}: {received} bytes, {wanted} are right");
    Ok(sent - came)
}

/// Reads a stream for four seconds, from its second one on. Returns the bits of a second.
fn stream(from: &Netns, to: &Netns, at: SocketAddrV4) -> Result<f64> {
    const BEGINNING: Duration = Duration::from_secs(1);
    const WHOLE: Duration = Duration::from_secs(5);
    let listener = to.run(|| TcpListener::bind(at))??;
    let reader = thread::spawn(move || -> std::io::Result<f64> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut buffer = vec![0; 1 << 16];
        let start = Instant::now();
        let (mut begun, mut bytes) = (None, 0u64);
        loop {
            let length = stream.read(&mut buffer)?;
            let now = start.elapsed();
            match begun {
                None if now >= BEGINNING => begun = Some(now),
                None => {}
                Some(begun) => {
                    bytes += length as u64;
                    if now >= WHOLE {
                        stream.shutdown(Shutdown::Both)?;
                        return Ok(bytes as f64 * 8.0 / (now - begun).as_secs_f64());
                    }
                }
            }
        }
    });
    let mut writer = from.run(|| TcpStream::connect(at))??;
    writer.set_write_timeout(Some(Duration::from_secs(5)))?;
    let chunk = vec![0; 1 << 16];
    while writer.write_all(&chunk).is_ok() {}
    Ok(reader.join().map_err(|_| "the reader panicked")??)
}

#[test]
fn datagrams_keep_to_the_limit_by_every_door() -> Result {
    let lab = lab("bw-udp")?;
    lab.start_agents()?;
    let agent = lab.agent("node-1")?;
    limit(agent, &limited())?;
    let (a, b, c) = (lab.pod("a")?, lab.pod("b")?, lab.pod("c")?);
    let (node, vm) = (&lab.node("node-1")?.netns, &lab.vm("vm")?.netns);
    let [at_a, at_b, at_c] = [a, b, c].map(|pod| SocketAddrV4::new(pod.ip, PORT));
    let vip = |port| SocketAddrV4::new(VIP.into(), port);

    let (to_b, to_c, to_node) = (Sink::start(&b.netns)?, Sink::start(&c.netns)?, Sink::start(node)?);
    compare("a to c, by the wire", &a.netns, at_c, &to_c, 1, 0)?;
    compare("a to b, by the fast path", &a.netns, at_b, &to_b, 1, 0)?;
    compare("a to c, by the ELB", &a.netns, vip(2), &to_c, 1, 0)?;
    let own = SocketAddrV4::new(lab.node("node-1")?.ip, PORT);
    compare("a to its node", &a.netns, own, &to_node, 1, RESERVE)?;

    let to_a = Sink::start(&a.netns)?;
    compare("c to a, by the wire", &c.netns, at_a, &to_a, 1, 0)?;
    compare("b to a, by the fast path", &b.netns, at_a, &to_a, 1, 0)?;
    compare("vm to a, by the ELB", vm, vip(1), &to_a, 1, 0)?;
    compare("the node to a", node, at_a, &to_a, 1, RESERVE)?;
    for (direction, outcome) in [("egress", "egress-limit"), ("ingress", "ingress-limit")] {
        assert!(agent.counter("default/a", direction, outcome)? > 1000, "{outcome}");
    }

    // While the limit is used up the node still gets through, and so do its probes.
    let flooding = AtomicBool::new(true);
    thread::scope(|scope| -> Result {
        let floods = [(&a.netns, at_c), (&c.netns, at_a)].map(|(from, to)| {
            let flooding = &flooding;
            scope.spawn(move || {
                while flooding.load(Relaxed) {
                    flood(from, to, 2 * RATE, Duration::from_millis(200), 1).expect("datagrams are sent");
                }
            })
        });
        thread::sleep(Duration::from_secs(1));
        let probed = (0..50).try_for_each(|_| -> Result {
            let to = std::net::SocketAddr::from((a.ip, 80));
            node.run(|| TcpStream::connect_timeout(&to, Duration::from_millis(500)))??;
            Ok(())
        });
        flooding.store(false, Relaxed);
        floods.into_iter().for_each(|flood| flood.join().expect("it does not panic"));
        probed
    })?;
    Ok(())
}

#[test]
fn streams_come_near_the_limit() -> Result {
    const TCP_RATE: u64 = 40_000_000;
    let lab = lab("bw-tcp")?;
    lab.start_agents()?;
    let agent = lab.agent("node-1")?;
    // Bursts as they are when nobody has chosen.
    limit(agent, &json!({ "ingress_rate": TCP_RATE, "egress_rate": TCP_RATE }))?;
    let (a, b, c) = (lab.pod("a")?, lab.pod("b")?, lab.pod("c")?);
    for (name, from, to) in [
        ("a to c, by the wire", a, c),
        ("a to b, by the fast path", a, b),
        ("c to a, by the wire", c, a),
        ("b to a, by the fast path", b, a),
    ] {
        let at = SocketAddrV4::new(to.ip, lab.fresh_port());
        let ratio = stream(&from.netns, &to.netns, at)? / TCP_RATE as f64;
        println!("{name}: {ratio:.3} of the limit");
        assert!((0.8..=1.1).contains(&ratio), "{name}: {ratio:.3} of the limit");
    }
    Ok(())
}

#[test]
fn limits_of_running_pods_change_without_loss_and_go_with_them() -> Result {
    let lab = lab("bw-live")?;
    lab.start_agents()?;
    let agent = lab.agent("node-1")?;
    let (a, c) = (lab.pod("a")?, lab.pod("c")?);
    let at_c = SocketAddrV4::new(c.ip, PORT);
    // An eighth of the lowest limit, so that a sender that was held up may catch up at once, while limits come, change and go.
    let sent = thread::scope(|scope| -> Result<u64> {
        let sender =
            scope.spawn(|| flood(&a.netns, at_c, RATE / 8, Duration::from_secs(6), 1).expect("it sends"));
        for change in [
            limited(),
            json!({ "egress_rate": 3 * RATE }),
            limited(),
            json!({ "ingress_rate": RATE }),
            limited(),
        ] {
            limit(agent, &change)?;
        }
        agent.restart()?;
        limit(agent, &Value::Null)?;
        Ok(sender.join().expect("it does not panic").0)
    })?;
    // Nobody has to be as fast as to read them all.
    assert_eq!(agent.counter("default/a", "egress", "wire")?, sent);
    assert!(lab.agent("node-2")?.counter("default/c", "ingress", "wire")? >= sent);

    limit(agent, &limited())?;
    let shown: Value = serde_json::from_str(&agent.cli(&["pods", "--json"])?)?;
    let shown = shown.as_array().and_then(|pods| pods.iter().find(|pod| pod["name"] == "a")).ok_or("no a")?;
    assert_eq!(shown["bandwidth"]["egress"], json!({ "rate": RATE, "burst": BURST / 8 }));
    assert!(agent.cli(&["pods"])?.contains("8M/8M"));
    let traced = agent.cli(&["trace", "--pod", "default/a", "--to", &at_c.to_string(), "--proto", "udp"])?;
    assert!(traced.contains("SPENT"), "{traced}");
    let rows = || -> Result<usize> {
        let maps = Maps::open(&Pins::new(agent.pin_dir()))?;
        let mut rows = 0;
        for id in 0..maps.ids() {
            rows += usize::from(maps.limits(id)? != Limits::ZERO);
        }
        Ok(rows)
    };
    assert_eq!(rows()?, 1);
    agent.change(|document| {
        document["pods"].as_array_mut().into_iter().for_each(|pods| pods.retain(|pod| pod["name"] != "a"));
    })?;
    agent.wait_ready(Duration::from_secs(20))?;
    assert_eq!(rows()?, 0);
    Ok(())
}

/// Where the kernel has `fq`, what is beyond the burst waits on the parent in place of being dropped.
#[test]
fn a_fair_queue_spreads_what_the_wire_gets() -> Result {
    let lab = lab("bw-fq")?;
    let agent = lab.agent("node-1")?;
    let node = &lab.node("node-1")?.netns;
    let text = fs::read_to_string(agent.config())?;
    fs::write(
        agent.config(),
        text.replace("interface = \"eth1\"", "interface = \"eth1\"\nfair_queue = true"),
    )?;
    lab.start_agents()?;
    limit(agent, &limited())?;
    let status = agent.cli(&["status"])?;
    if node.exec(&["tc", "qdisc", "replace", "dev", "lo", "root", "fq"]).is_err() {
        println!("this kernel has no fq");
        assert!(status.contains("give eth1 the queue `fq`"), "{status}");
        return Ok(());
    }
    assert!(status.contains("eth1: fair queue (fq)"), "{status}");
    assert!(node.exec(&["tc", "qdisc", "show", "dev", "eth1"])?.contains("fq 2100:"));
    let (a, b, c) = (lab.pod("a")?, lab.pod("b")?, lab.pod("c")?);
    let to_c = Sink::start(&c.netns)?;
    let at_c = SocketAddrV4::new(c.ip, PORT);
    // All that may wait may come once more, when the sender has ended. One socket is held back, and loses nothing; eight have more
    // under way than may wait, and all that they lose is explained.
    let lost = compare("a to c, by the wire, one socket", &a.netns, at_c, &to_c, 1, 256 << 10)?;
    assert_eq!((lost, agent.counter("default/a", "egress", "egress-queue")?), (0, 0));
    let lost = compare("a to c, by the wire, eight sockets", &a.netns, at_c, &to_c, 8, 256 << 10)?;
    assert!(lost > 0);
    assert_eq!(agent.counter("default/a", "egress", "egress-queue")?, lost);
    assert_eq!(agent.counter("default/a", "egress", "egress-limit")?, 0);
    // More at once than the burst, and all of it comes, at the pace of the limit.
    thread::sleep(Duration::from_millis(700));
    let before = agent.counter("default/a", "egress", "egress-queue")?;
    let arrived = || lab.agent("node-2").and_then(|agent| agent.counter("default/c", "ingress", "wire"));
    let arrived_before = arrived()?;
    let start = Instant::now();
    let (sent, _) = flood(&a.netns, at_c, 40 * RATE, Duration::from_millis(12), 8)?;
    let few = sent * (PAYLOAD as u64 + HEADERS);
    assert!((BURST / 8..BURST / 8 + (256 << 10)).contains(&few), "{few} bytes");
    // Counted before the socket, which may have no room for so many at once.
    to_c.take();
    assert!(arrived()? - arrived_before >= sent);
    assert!(start.elapsed().as_secs_f64() >= (few - BURST / 8) as f64 * 8.0 / RATE as f64);
    assert_eq!(agent.counter("default/a", "egress", "egress-queue")?, before);

    limit(agent, &json!({ "ingress_rate": 5 * RATE, "egress_rate": 5 * RATE }))?;
    for (name, to) in [("a to c, by the wire", c), ("a to b, by the fast path", b)] {
        let at = SocketAddrV4::new(to.ip, lab.fresh_port());
        let ratio = stream(&a.netns, &to.netns, at)? / (5 * RATE) as f64;
        println!("{name}: {ratio:.3} of the limit");
        assert!((0.8..=1.1).contains(&ratio), "{name}: {ratio:.3} of the limit");
    }

    // Somebody takes the queue away: from then on what is beyond the burst is dropped.
    agent.stop(Signal::SIGTERM)?;
    agent.cli(&["detach"])?;
    assert!(!node.exec(&["tc", "qdisc", "show", "dev", "eth1"])?.contains("fq"));
    Ok(())
}

//! Limits of bandwidth, with traffic: what a limited pod sends and receives, by every door.
//!
//! ```text
//!   vm 10.1.0.20 ──────┐            ┌── node-1  eth0 10.1.0.11
//!   VIP 10.1.0.200 ────┤   fabric   │          eth1 ─┬─ VLAN 101 ── a 10.1.16.101, limited
//!                      │            │                └─ VLAN 102 ── b 10.1.16.102
//!                      └────────────┴── node-2  eth1 ─── VLAN 101 ── c 10.1.16.103
//! ```
//!
//! Datagrams are counted by who receives them, over a time that the sender measures; a stream by who reads it. A machine that is
//! busy elsewhere sends and reads later: what a sender misses by it is known by the times at which it has sent.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use datapath_common::abi::Limits;
use datapath_user::{pin::Pins, tables::Maps};
use eniway_tests::lab::{Agent, Lab, Netns, Pod, Protocol, VipSpec, agent::Signal, net};
use serde_json::{Value, json};

type Result<T = (), E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// What a limited pod may do in a second, in bits, and at once.
const RATE: u64 = 8_000_000;
const BURST: u64 = 2_400_000;
/// How long datagrams are sent, at twice the rate.
const TIME: Duration = Duration::from_millis(2500);
const PAYLOAD: usize = 1400;
/// Ethernet, IPv4 and UDP.
const HEADERS: u64 = 14 + 20 + 8;
/// A datagram, in bytes as they are charged.
const SIZE: u64 = PAYLOAD as u64 + HEADERS;
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

/// Receives datagrams, and keeps all of a case, so that it does not matter when they are read.
struct Sink(UdpSocket);

impl Sink {
    fn start(netns: &Netns) -> Result<Self> {
        let socket = netns.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)))??;
        net::patient(&socket)?;
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
        Ok(Self(socket))
    }

    /// How many have come since the last call, once none come any more, and when the last of them was read.
    fn take(&self) -> (u64, Instant) {
        let (mut count, mut last) = (0, Instant::now());
        while self.0.recv(&mut [0; PAYLOAD]).is_ok() {
            (count, last) = (count + 1, Instant::now());
        }
        (count, last)
    }
}

/// Sends datagrams by several sockets in turn.
///
/// What waits in a queue counts against the buffer of the socket that sent it, and a socket whose buffer is full blocks: one alone
/// has about 130 KiB of these datagrams under way.
struct Flood {
    sockets: Vec<UdpSocket>,
    to: SocketAddrV4,
    start: Instant,
    /// When each datagram was sent, since the start.
    times: Vec<Duration>,
}

impl Flood {
    fn new(from: &Netns, to: SocketAddrV4, sockets: usize) -> Result<Self> {
        let bind = || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0));
        let sockets = from.run(|| (0..sockets).map(|_| bind()).collect::<Result<Vec<_>, _>>())??;
        Ok(Self { sockets, to, start: Instant::now(), times: Vec::new() })
    }

    /// Sends until it was so many in all.
    fn send(&mut self, total: u64) -> Result {
        while self.sent() < total {
            self.sockets[self.times.len() % self.sockets.len()].send_to(&[0; PAYLOAD], self.to)?;
            self.times.push(self.start.elapsed());
        }
        Ok(())
    }

    fn sent(&self) -> u64 {
        self.times.len() as u64
    }

    /// Bytes that rate and burst let pass. While nothing is sent, no more than the burst is earned.
    fn allowed(&self) -> f64 {
        let (mut credit, mut passed, mut before) = (BURST as f64 / 8.0, 0.0, Duration::ZERO);
        for time in &self.times {
            credit = (credit + earned(*time - before)).min(BURST as f64 / 8.0);
            before = *time;
            if credit >= SIZE as f64 {
                credit -= SIZE as f64;
                passed += SIZE as f64;
            }
        }
        passed
    }
}

/// Sends datagrams at a rate in bits for a time. Says how long it took, too.
fn flood(
    from: &Netns,
    to: SocketAddrV4,
    rate: u64,
    time: Duration,
    sockets: usize,
) -> Result<(Flood, Duration)> {
    let mut flood = Flood::new(from, to, sockets)?;
    while flood.start.elapsed() < time {
        flood.send((flood.start.elapsed().as_secs_f64() * rate as f64 / (SIZE * 8) as f64) as u64)?;
        thread::sleep(Duration::from_millis(3));
    }
    let took = flood.start.elapsed();
    Ok((flood, took))
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
    let (flood, took) = flood(from, to, 2 * RATE, TIME, sockets)?;
    let (came, _) = sink.take();
    let received = (came * SIZE) as f64;
    let (least, most) = (flood.allowed(), earned(took) + BURST as f64 / 8.0);
    println!(
        "{name}: {} datagrams sent in {took:.2?}, {:.3} of rate and burst received",
        flood.sent(),
        received / most
    );
    assert!(received >= 0.95 * least, "{name}: {received} bytes, {least} are right");
    assert!(received <= 1.05 * most + more as f64, "{name}: {received} bytes, {most} are right");
    Ok(flood.sent() - came)
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

/// A stream comes near the limit, and never above it. One that the machine holds up may be far below: then another is tried.
fn near(name: &str, lab: &Lab, from: &Pod, to: &Pod, limit: u64) -> Result {
    let mut best = 0.0_f64;
    for _ in 0..3 {
        let at = SocketAddrV4::new(to.ip, lab.fresh_port());
        let ratio = stream(&from.netns, &to.netns, at)? / limit as f64;
        println!("{name}: {ratio:.3} of the limit");
        assert!(ratio <= 1.1, "{name}: {ratio:.3} of the limit");
        best = best.max(ratio);
        if best >= 0.8 {
            return Ok(());
        }
    }
    Err(format!("{name}: {best:.3} of the limit at the most").into())
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
    let mut sent = compare("a to c, by the wire", &a.netns, at_c, &to_c, 1, 0)?;
    sent += compare("a to b, by the fast path", &a.netns, at_b, &to_b, 1, 0)?;
    sent += compare("a to c, by the ELB", &a.netns, vip(2), &to_c, 1, 0)?;
    let own = SocketAddrV4::new(lab.node("node-1")?.ip, PORT);
    sent += compare("a to its node", &a.netns, own, &to_node, 1, RESERVE)?;

    let to_a = Sink::start(&a.netns)?;
    let mut received = compare("c to a, by the wire", &c.netns, at_a, &to_a, 1, 0)?;
    received += compare("b to a, by the fast path", &b.netns, at_a, &to_a, 1, 0)?;
    received += compare("vm to a, by the ELB", vm, vip(1), &to_a, 1, 0)?;
    received += compare("the node to a", node, at_a, &to_a, 1, RESERVE)?;
    for (direction, outcome, lost) in
        [("egress", "egress-limit", sent), ("ingress", "ingress-limit", received)]
    {
        let counted = agent.counter("default/a", direction, outcome)?;
        assert!(counted > 0 && counted <= lost, "{counted} {outcome}, {lost} lost");
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
    near("a to c, by the wire", &lab, a, c, TCP_RATE)?;
    near("a to b, by the fast path", &lab, a, b, TCP_RATE)?;
    near("c to a, by the wire", &lab, c, a, TCP_RATE)?;
    near("b to a, by the fast path", &lab, b, a, TCP_RATE)
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
        Ok(sender.join().expect("it does not panic").0.sent())
    })?;
    // Nobody has to be as fast as to read them all.
    assert_eq!(agent.counter("default/a", "egress", "wire")?, sent);
    assert!(lab.agent("node-2")?.counter("default/c", "ingress", "wire")? >= sent);

    limit(agent, &limited())?;
    let shown = agent.cli_json(&["pods"])?;
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
    let beyond = 128 << 10;
    let few = (BURST / 8 + beyond).div_ceil(SIZE);
    let mut flood = Flood::new(&a.netns, at_c, 8)?;
    flood.send(few)?;
    let (came, last) = to_c.take();
    assert_eq!(came, few);
    let spread = (last - flood.start).as_secs_f64();
    assert!(spread >= 0.99 * beyond as f64 * 8.0 / RATE as f64, "{spread} s");
    assert_eq!(agent.counter("default/a", "egress", "egress-queue")?, before);

    limit(agent, &json!({ "ingress_rate": 5 * RATE, "egress_rate": 5 * RATE }))?;
    near("a to c, by the wire", &lab, a, c, 5 * RATE)?;
    near("a to b, by the fast path", &lab, a, b, 5 * RATE)?;

    // The queue goes with eniway.
    agent.stop(Signal::SIGTERM)?;
    agent.cli(&["detach"])?;
    assert!(!node.exec(&["tc", "qdisc", "show", "dev", "eth1"])?.contains("fq"));
    Ok(())
}

//! Agents of two ABI versions take over from each other, up and down, under traffic.
//!
//! ```text
//!   node n: a ──┬── b      fast path: allowed by security groups in one direction only, so that answers need memory
//!           d ──┘   │
//!           a ── VIP ─ b   ELB: answers must leave on b's VLAN, which needs memory, too
//!           a ── fabric ── c (node m)
//! ```
//!
//! Each stream is one flow with a number in each datagram: all must come back. Then there are flows at rest: the next that is sent
//! on them is an answer, after versions have changed. Nothing but what is remembered makes it arrive.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use datapath_user::{pin::Pins, tables::Maps};
use eniway_policy::model::{GroupList, Groups};
use eniway_tests::lab::{
    Agent, Lab, Netns, Pod, PodSpec, Protocol, VipSpec, XdpMode,
    agent::{READY, Signal, eniway_binary, next_agent},
    net::{UdpEcho, patient, tcp_connect},
};
use serde_json::{Value, json};

type Result<T = (), E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const ECHO: u16 = 9;
const TALK: u16 = 7;
const REST: u16 = 11;
const VIP: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 200);
const SECOND: Duration = Duration::from_secs(1);
/// Between two datagrams of a stream.
const GAP: Duration = Duration::from_millis(1);

fn lab(id: &str, xdp: XdpMode) -> Result<Lab> {
    let allow = |protocol: &str, ports: &str| json!({"direction": "ingress", "action": "allow", "protocol": protocol, "ports": ports, "group": "client"});
    let groups: Groups = serde_json::from_value(json!({"security_groups": [
        {"id": "client", "rules": [{"direction": "egress", "action": "allow"}]},
        {"id": "server", "rules": [allow("udp", "7-11"), allow("tcp", "7-11")]},
    ]}))?;
    let list = |id: &str| -> Result<GroupList> { Ok(serde_json::from_value(json!([id]))?) };
    let vip = |protocol, port| VipSpec {
        ip: VIP,
        port,
        protocol,
        target_port: port,
        backends: vec!["b".into()],
        health_check: false,
    };
    let pod = |name, node, last: u8| PodSpec::bare(name, node, [10, 1, 18, last], 100 + u16::from(last));
    let lab = Lab::builder(id)
        .node("n", [10, 1, 0, 10], [10, 1, 16, 10])
        .node("m", [10, 1, 0, 11], [10, 1, 16, 11])
        .pod_spec(pod("a", "n", 1))
        .pod_spec(pod("b", "n", 2))
        .pod_spec(pod("d", "n", 4))
        .pod_spec(pod("c", "m", 3))
        .vip(vip(Protocol::Udp, ECHO))
        .vip(vip(Protocol::Udp, REST))
        .vip(vip(Protocol::Tcp, TALK))
        .security_groups(groups)
        .xdp(xdp)
        .groups_of("a", list("client")?)
        .groups_of("d", list("client")?)
        .groups_of("b", list("server")?)
        .groups_of("c", list("server")?)
        .build()?;
    lab.start_agents()?;
    Ok(lab)
}

/// One flow, with a number in each datagram.
struct Stream {
    name: &'static str,
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    sender: JoinHandle<std::io::Result<()>>,
    receiver: JoinHandle<HashSet<u64>>,
}

impl Stream {
    fn start(name: &'static str, from: &Netns, to: SocketAddrV4) -> Result<Self> {
        let socket = from.run(|| UdpSocket::bind("0.0.0.0:0"))??;
        socket.connect(to)?;
        patient(&socket)?;
        socket.set_read_timeout(Some(SECOND / 2))?;
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let receiver = {
            let (socket, stop) = (socket.try_clone()?, Arc::clone(&stop));
            thread::spawn(move || {
                let mut seen = HashSet::new();
                let mut number = [0; 8];
                loop {
                    match socket.recv(&mut number) {
                        Ok(_) => drop(seen.insert(u64::from_ne_bytes(number))),
                        Err(_) if stop.load(Ordering::Relaxed) => return seen,
                        Err(_) => {}
                    }
                }
            })
        };
        let sender = {
            let (stop, sent) = (Arc::clone(&stop), Arc::clone(&sent));
            thread::spawn(move || {
                let mut number = 0_u64;
                while !stop.load(Ordering::Relaxed) {
                    socket.send(&number.to_ne_bytes())?;
                    number += 1;
                    sent.store(number, Ordering::Relaxed);
                    thread::sleep(GAP);
                }
                Ok(())
            })
        };
        Ok(Self { name, stop, sent, sender, receiver })
    }

    /// Fails unless all came back. Returns how many were sent.
    fn end(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.sender.join().expect("no panic")?;
        let seen = self.receiver.join().expect("no panic");
        let sent = self.sent.load(Ordering::Relaxed);
        assert!(sent > 100, "{}: only {sent} datagrams", self.name);
        let lost: Vec<u64> = (0..sent).filter(|number| !seen.contains(number)).collect();
        assert!(lost.is_empty(), "{}: {} of {sent} lost: {lost:?}", self.name, lost.len());
        Ok(sent)
    }
}

/// A flow whose next datagram is an answer.
struct Rest {
    name: &'static str,
    client: UdpSocket,
    server: UdpSocket,
    back: std::net::SocketAddr,
}

impl Rest {
    fn begin(name: &'static str, from: &Pod, to: SocketAddrV4, server: &UdpSocket) -> Result<Self> {
        let client = from.netns.run(|| UdpSocket::bind("0.0.0.0:0"))??;
        client.connect(to)?;
        client.set_read_timeout(Some(SECOND))?;
        client.send(b"remember me")?;
        let (_, back) = server.recv_from(&mut [0; 64])?;
        Ok(Self { name, client, server: server.try_clone()?, back })
    }

    /// The server speaks; its words must arrive as from the address that was asked.
    fn answers(&self, what: &str) -> Result {
        self.server.send_to(what.as_bytes(), self.back)?;
        let mut heard = [0; 64];
        let length =
            self.client.recv(&mut heard).map_err(|error| format!("{}, {what}: {error}", self.name))?;
        assert_eq!(&heard[..length], what.as_bytes(), "{}", self.name);
        Ok(())
    }
}

/// A TCP connection on which a word goes there and back.
struct Talk {
    name: &'static str,
    stream: TcpStream,
}

impl Talk {
    fn begin(name: &'static str, from: &Pod, to: SocketAddrV4) -> Result<Self> {
        let stream = tcp_connect(&from.netns, 0, to, SECOND)?;
        stream.set_read_timeout(Some(5 * SECOND))?;
        Ok(Self { name, stream })
    }

    fn goes_on(&mut self) -> Result {
        let mut word = *b"still there?";
        self.stream.write_all(&word)?;
        self.stream.read_exact(&mut word).map_err(|error| format!("{}: {error}", self.name))?;
        Ok(())
    }
}

/// Answers every connection with what it says, until the process ends.
fn talker(pod: &Pod) -> Result {
    let listener = pod.netns.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, TALK)))??;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
        }
    });
    Ok(())
}

/// Traffic of all kinds.
struct Traffic {
    _servers: Vec<UdpEcho>,
    streams: Vec<Stream>,
    resting: Vec<Rest>,
    talks: Vec<Talk>,
}

impl Traffic {
    fn begin(lab: &Lab) -> Result<Self> {
        let [a, b, c, d] = [lab.pod("a")?, lab.pod("b")?, lab.pod("c")?, lab.pod("d")?];
        lab.elb().pin(a.ip, b.ip)?;
        let echo = |pod: &Pod| UdpEcho::start(&pod.netns, SocketAddrV4::new(pod.ip, ECHO));
        let servers = vec![echo(b)?, echo(c)?];
        talker(b)?;
        talker(c)?;
        let server = b.netns.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, REST)))??;
        server.set_read_timeout(Some(SECOND))?;
        let at = SocketAddrV4::new;
        let traffic = Self {
            _servers: servers,
            streams: vec![
                Stream::start("wire", &a.netns, at(c.ip, ECHO))?,
                Stream::start("fast path", &d.netns, at(b.ip, ECHO))?,
                Stream::start("ELB", &a.netns, at(VIP, ECHO))?,
            ],
            resting: vec![
                Rest::begin("fast path at rest", a, at(b.ip, REST), &server)?,
                Rest::begin("ELB at rest", a, at(VIP, REST), &server)?,
            ],
            talks: vec![
                Talk::begin("TCP by the wire", a, at(c.ip, TALK))?,
                Talk::begin("TCP by the fast path", a, at(b.ip, TALK))?,
                Talk::begin("TCP by the ELB", a, at(VIP, TALK))?,
            ],
        };
        thread::sleep(SECOND / 5);
        Ok(traffic)
    }

    /// Resting flows and connections still are what they were.
    fn stands(&mut self, what: &str) -> Result {
        self.resting.iter().try_for_each(|rest| rest.answers(what))?;
        self.talks.iter_mut().try_for_each(Talk::goes_on)
    }

    /// How many each stream has sent, of which none was lost.
    fn end(self) -> Result<BTreeMap<&'static str, u64>> {
        self.streams.into_iter().map(|stream| Ok((stream.name, stream.end()?))).collect()
    }
}

/// An agent's program and the directory of its pins.
struct Version {
    binary: PathBuf,
    number: u32,
}

impl Version {
    fn both() -> Result<[Self; 2]> {
        let number = datapath_common::abi::VERSION;
        Ok([Self { binary: eniway_binary()?, number }, Self { binary: next_agent()?, number: number + 1 }])
    }

    fn start(&self, agent: &Agent) -> Result {
        agent.start_as(&self.binary, &[])?;
        Ok(agent.wait_ready(READY)?)
    }

    /// Only this version's pins are there.
    fn is_alone(&self, agent: &Agent) -> Result {
        let mut names = Vec::new();
        for entry in fs::read_dir(agent.pin_dir())? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        assert_eq!(names, [format!("v{}", self.number)]);
        Ok(())
    }
}

/// What the version that runs has counted.
fn counters(agent: &Agent) -> Result<BTreeMap<String, u64>> {
    let count = |row: Value| {
        let name = format!("{} {} {}", row["pod"], row["direction"], row["outcome"]);
        (name, row["packets"].as_u64().unwrap_or(0))
    };
    Ok(agent.counters()?.into_iter().map(count).collect())
}

fn no_less(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) {
    for (name, count) in before {
        let now = after.get(name).copied().unwrap_or(0);
        assert!(now >= *count, "{name}: {now} after {count}");
    }
}

/// Names, ids and slots of all pods.
fn places(agent: &Agent) -> Result<Vec<String>> {
    let status = agent.status()?;
    let pods = status["pods"].as_array().ok_or("no pods")?;
    Ok(pods.iter().map(|pod| format!("{} id {} slot {}", pod["name"], pod["id"], pod["slot"])).collect())
}

#[test]
fn up_down_and_up_again_nothing_is_lost() -> Result {
    let lab = lab("abi-up", XdpMode::Off)?;
    let agent = lab.agent("n")?;
    let [this, next] = Version::both()?;
    let before = places(agent)?;
    let mut traffic = Traffic::begin(&lab)?;
    traffic.stands("before")?;
    let flows = |what: &str| -> Result<usize> {
        let maps = Maps::open(&Pins::new(agent.pin_dir()))?;
        let (doors, pairs) = (maps.flows()?.len(), maps.policy.pairs()?.len());
        assert!(doors >= 3 && pairs >= 3, "{what}: {doors} doors, {pairs} admitted");
        Ok(doors + pairs)
    };
    flows("before")?;
    let mut counted = counters(agent)?;
    for round in 0..2 {
        for (version, signal) in [(&next, Signal::SIGTERM), (&this, Signal::SIGKILL)] {
            agent.stop(signal)?;
            version.start(agent)?;
            version.is_alone(agent)?;
            assert_eq!(places(agent)?, before);
            traffic.stands(&format!("round {round}, version {}", version.number))?;
            let now = counters(agent)?;
            no_less(&counted, &now);
            counted = now;
            assert!(agent.status()?["refused"].as_array().is_none_or(Vec::is_empty));
        }
        flows("again")?;
    }
    agent.stop(Signal::SIGTERM)?;
    next.start(agent)?;
    traffic.stands("at the end")?;
    let sent = traffic.end()?;
    // Nothing else is of that pod on the fast path: each datagram was counted once.
    assert_eq!(counters(agent)?["\"default/d\" \"egress\" \"local\""], sent["fast path"]);
    // And nothing is left of either version.
    agent.stop(Signal::SIGTERM)?;
    agent.cli(&["detach"])?;
    assert!(!agent.pin_dir().exists());
    lab.shutdown()?;
    Ok(())
}

/// Starts an agent that is to die at a step. Returns whether it did.
fn dies(agent: &Agent, version: &Version, step: u32) -> Result<bool> {
    agent.start_as(&version.binary, &[("ENIWAY_DIE_AT", &step.to_string())])?;
    let limit = Instant::now() + READY;
    while agent.pid().is_some() {
        if agent
            .status()
            .is_ok_and(|status| status["pid"] == agent.pid().unwrap_or(0) && status["ready"] == true)
        {
            agent.stop(Signal::SIGKILL)?;
            return Ok(false);
        }
        assert!(Instant::now() < limit, "it neither died nor became ready");
        thread::sleep(Duration::from_millis(2));
    }
    agent.stop(Signal::SIGKILL)?;
    Ok(true)
}

#[test]
fn killed_at_any_step_either_version_goes_on() -> Result {
    let lab = lab("abi-kill", XdpMode::Off)?;
    let agent = lab.agent("n")?;
    let [this, next] = Version::both()?;
    let before = places(agent)?;
    let mut traffic = Traffic::begin(&lab)?;
    let mut counted = counters(agent)?;
    agent.stop(Signal::SIGKILL)?;
    let mut at = &this;
    let mut steps = 0;
    // Where each agent takes long, not at every step.
    let every = std::env::var("ENIWAY_KILL_EVERY").map_or(1, |every| every.parse().expect("a number"));
    for step in (1..).step_by(every) {
        let mut died = false;
        // From where it is, to the other version, which dies; the one goes on, then the other. So every step is one of the way up
        // or down, by turns.
        for back in [true, false] {
            let other = if at.number == this.number { &next } else { &this };
            died |= dies(agent, other, step)?;
            let going_on = if back { at } else { other };
            going_on.start(agent)?;
            going_on.is_alone(agent)?;
            assert_eq!(places(agent)?, before, "step {step}");
            traffic.stands(&format!("step {step}"))?;
            let now = counters(agent)?;
            no_less(&counted, &now);
            counted = now;
            agent.stop(Signal::SIGKILL)?;
            at = going_on;
        }
        if !died {
            break;
        }
        steps = step;
    }
    assert!(steps + every as u32 > 20, "only {steps} steps");
    traffic.end()?;
    lab.shutdown()?;
    Ok(())
}

#[test]
fn agents_of_two_versions_do_not_run_at_once() -> Result {
    let lab = lab("abi-two", XdpMode::Off)?;
    let agent = lab.agent("n")?;
    let pid = agent.pid();
    let [_, next] = Version::both()?;
    // Another run directory: only the pins are the same.
    let config = lab.dir().join("next.toml");
    let text = fs::read_to_string(agent.config())?;
    let run_dir = format!("{:?}", agent.run_dir());
    fs::write(&config, text.replace(&run_dir, &format!("{:?}", lab.dir().join("next"))))?;
    let before = tree(agent.pin_dir())?;
    let output = lab
        .node("n")?
        .netns
        .command(&next.binary)?
        .args(["agent", "--once", "--config"])
        .arg(&config)
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("another agent is running"), "{text}");
    assert_eq!(tree(agent.pin_dir())?, before);
    assert_eq!(agent.pid(), pid);
    lab.shutdown()?;
    Ok(())
}

fn tree(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            all.extend(tree(&path)?);
        }
        all.push(path);
    }
    all.sort();
    Ok(all)
}

#[test]
fn without_a_description_nothing_is_changed_and_with_one_xdp_goes_over() -> Result {
    let lab = lab("abi-none", XdpMode::Redirect)?;
    let agent = lab.agent("n")?;
    let [this, next] = Version::both()?;
    let mut traffic = Traffic::begin(&lab)?;
    agent.stop(Signal::SIGTERM)?;
    // As versions before descriptions have left it.
    fs::remove_file(agent.pin_dir().join(format!("v{}/maps/LAYOUT", this.number)))?;
    let before = tree(agent.pin_dir())?;
    agent.start_as(&next.binary, &[])?;
    let limit = Instant::now() + READY;
    while agent.pid().is_some() {
        assert!(Instant::now() < limit, "it runs");
        thread::sleep(Duration::from_millis(5));
    }
    agent.stop(Signal::SIGKILL)?;
    let log = fs::read_to_string(agent.log())?;
    let told = log.lines().rfind(|line| line.contains("another version")).ok_or("it does not say why")?;
    assert!(told.contains("Nothing was changed") && told.contains("eniway detach"), "{told}");
    assert_eq!(tree(agent.pin_dir())?, before);
    traffic.stands("refused")?;
    this.start(agent)?;
    traffic.stands("as before")?;
    // Started again it has left one. XDP goes over, too.
    for version in [&next, &this] {
        agent.stop(Signal::SIGTERM)?;
        version.start(agent)?;
        version.is_alone(agent)?;
        let links = tree(&agent.pin_dir().join(format!("v{}/links", version.number)))?;
        assert!(links.iter().any(|link| link.ends_with("parent-eth1-xdp")), "{links:?}");
        traffic.stands(&format!("version {}", version.number))?;
    }
    traffic.end()?;
    // The other version's detach removes this one's.
    agent.stop(Signal::SIGTERM)?;
    agent.cli_of(&next.binary, &["detach"])?;
    assert!(!agent.pin_dir().exists());
    lab.shutdown()?;
    Ok(())
}

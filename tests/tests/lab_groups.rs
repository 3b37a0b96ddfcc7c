//! Security groups with real packets: the agent's fast path on one node, the VPC behind it.
//!
//! ```text
//!   node n: pod a ─┐            fast path: what the groups allow for certain
//!           pod b ─┼─ parent ── fabric ── gate (the evaluator)      wire: everything else
//!           pod c ─┘
//! ```

use std::{
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use eniway_policy::model::{GroupList, Groups};
use eniway_tests::{
    equivalence::{
        self, Case, Datagrams, Dice, HostNode, Node as _, PODS, Size, State, Step, new_to_the_vpc,
    },
    lab::{
        Error, GATEWAY_MAC, Lab, LabBuilder, Mac, Netns, Pod, PodSpec, Result,
        agent::READY,
        groups::{Packet, Verdict, Vpc, packet::Part},
        raw::{Frame, Sender, Sniffer},
    },
};
use serde_json::{Value, json};

const SECOND: Duration = Duration::from_secs(1);

fn groups(value: Value) -> Groups {
    serde_json::from_value(value).expect("groups")
}

fn list(ids: &[&str]) -> GroupList {
    serde_json::from_value(json!(ids)).expect("a list")
}

fn pod(builder: LabBuilder, name: &str, ip: Ipv4Addr, vlan: u16) -> LabBuilder {
    builder.pod_spec(PodSpec::bare(name, "n", ip, vlan))
}

// ---- Changes during traffic.

/// `client` lets everything out; `server` lets UDP 9 of the group `client` in, if it does.
fn udp_9(allowed: bool) -> Groups {
    let rule = json!({"direction": "ingress", "action": "allow", "protocol": "udp", "ports": "9", "group": "client"});
    groups(json!({"security_groups": [
        {"id": "client", "rules": [{"direction": "egress", "action": "allow"}]},
        {"id": "stranger", "rules": [{"direction": "egress", "action": "allow"}]},
        {"id": "server", "rules": if allowed { vec![rule] } else { vec![] }},
        {"id": "closed", "rules": [
            {"direction": "ingress", "action": "allow", "protocol": "udp", "ports": "10"}
        ]}
    ]}))
}

/// Pod `a` is a client, `b` a server, `c` the server's successor, which is not there yet.
fn lab(id: &str) -> Result<Lab> {
    let mut builder = Lab::builder(id).node("n", [10, 1, 0, 10], [10, 1, 16, 10]);
    for (name, last, vlan) in [("a", 1, 101), ("b", 2, 102), ("c", 3, 103)] {
        builder = pod(builder, name, Ipv4Addr::new(10, 1, 18, last), vlan);
    }
    let lab = builder
        .security_groups(udp_9(true))
        .groups_of("a", list(&["client"]))
        .groups_of("b", list(&["server"]))
        .groups_of("c", list(&["closed"]))
        .build()?;
    lab.start_agents()?;
    Ok(lab)
}

/// Datagrams from one pod to an address, one after the other, each with its number.
struct Stream {
    /// The number of the next one.
    next: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Stream {
    fn start(from: &Netns, source: u16, to: SocketAddrV4) -> Result<Self> {
        let socket = from
            .run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, source)))?
            .map_err(Error::io("a socket to stream from"))?;
        let (next, over) = (Arc::new(AtomicU64::new(1)), Arc::new(AtomicBool::new(false)));
        let thread = {
            let (next, over) = (Arc::clone(&next), Arc::clone(&over));
            thread::spawn(move || {
                while !over.load(Ordering::SeqCst) {
                    let number = next.fetch_add(1, Ordering::SeqCst);
                    // What is not sent is not received: no matter here.
                    let _ = socket.send_to(&number.to_be_bytes(), to);
                    thread::sleep(Duration::from_micros(300));
                }
            })
        };
        Ok(Self { next, over, thread: Some(thread) })
    }

    /// All that are sent from now on have this number or a higher one.
    fn mark(&self) -> u64 {
        self.next.load(Ordering::SeqCst)
    }

    /// Waits until many more were sent than before this mark, and had the time to arrive.
    fn go_on(&self, mark: u64) {
        let end = Instant::now() + 10 * SECOND;
        while self.mark() < mark + 100 {
            assert!(Instant::now() < end, "nothing is sent");
            thread::sleep(Duration::from_millis(5));
        }
        thread::sleep(Duration::from_millis(30));
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What arrives at a port of a pod, by number.
struct Arrivals {
    highest: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Arrivals {
    fn start(at: &Netns, port: u16) -> Result<Self> {
        let socket = at
            .run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)))?
            .and_then(|socket| socket.set_read_timeout(Some(Duration::from_millis(20))).map(|()| socket))
            .map_err(Error::io("a socket to receive at"))?;
        let (highest, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let thread = {
            let (highest, over) = (Arc::clone(&highest), Arc::clone(&over));
            thread::spawn(move || {
                let mut number = [0; 8];
                while !over.load(Ordering::SeqCst) {
                    if let Ok((8, _)) = socket.recv_from(&mut number) {
                        highest.fetch_max(u64::from_be_bytes(number), Ordering::SeqCst);
                    }
                }
            })
        };
        Ok(Self { highest, over, thread: Some(thread) })
    }

    /// The highest number so far.
    fn highest(&self) -> u64 {
        self.highest.load(Ordering::SeqCst)
    }

    /// Waits until one arrives that was sent after this mark.
    fn wait(&self, mark: u64) -> bool {
        let end = Instant::now() + 2 * SECOND;
        while self.highest() < mark && Instant::now() < end {
            thread::sleep(Duration::from_millis(2));
        }
        self.highest() >= mark
    }
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Changes something back and forth while datagrams flow: none that was sent after the acknowledgement arrives.
fn back_and_forth(lab: &Lab, change: impl Fn(bool) -> Result<()>) -> Result<()> {
    let (a, b) = (lab.pod("a")?, lab.pod("b")?);
    let arrivals = Arrivals::start(&b.netns, 9)?;
    let stream = Stream::start(&a.netns, 4000, SocketAddrV4::new(b.ip, 9))?;
    for round in 0..8 {
        assert!(arrivals.wait(stream.mark()), "round {round}: nothing arrives");
        lab.security_groups()?.clear_refused();
        change(false)?;
        let mark = stream.mark();
        stream.go_on(mark);
        let highest = arrivals.highest();
        assert!(
            highest < mark,
            "round {round}: {highest} arrived, sent after the change was in force at {mark}"
        );
        assert!(!lab.security_groups()?.refused().is_empty(), "round {round}: the VPC had nothing to refuse");
        change(true)?;
    }
    assert!(arrivals.wait(stream.mark()), "nothing arrives in the end");
    drop(stream);
    let agent = lab.agent("n")?;
    assert!(agent.counter("default/b", "ingress", "local")? > 0, "nothing took the fast path");
    Ok(())
}

#[test]
fn a_rule_that_is_taken_away_holds_from_the_acknowledgement_on() -> Result<()> {
    let lab = lab("lg-rule")?;
    back_and_forth(&lab, |allowed| lab.set_groups(&udp_9(allowed)))?;
    lab.shutdown()
}

#[test]
fn a_pod_that_leaves_a_group_has_left_it_from_the_acknowledgement_on() -> Result<()> {
    let lab = lab("lg-member")?;
    let a = lab.pod("a")?.clone();
    back_and_forth(&lab, |member| lab.set_list(&a, &list(&[if member { "client" } else { "stranger" }])))?;
    lab.shutdown()
}

#[test]
fn an_address_that_another_pod_gets_brings_nothing_along() -> Result<()> {
    let lab = lab("lg-reuse")?;
    let (a, b, c) = (lab.pod("a")?, lab.pod("b")?, lab.pod("c")?);
    let agent = lab.agent("n")?;
    let entry_of = |document: &Value, pod: &Pod| {
        let uid = format!("uid-{}", pod.name);
        let entry = document["pods"].as_array().into_iter().flatten().find(|entry| entry["uid"] == uid);
        entry.cloned().expect("an entry")
    };
    let document = agent.document()?;
    let (old, new) = (entry_of(&document, b), entry_of(&document, c));
    let hand_over = |from: (&Pod, &Value), to: (&Pod, &Value), list: GroupList| -> Result<()> {
        let gate = lab.security_groups()?;
        gate.remove_member(b.ip);
        lab.fabric().detach_nic(&from.0.port, from.0.vlan)?;
        lab.fabric().attach_nic(&to.0.port, to.0.vlan, b.ip, to.0.mac, None)?;
        gate.set_member(b.ip, list);
        agent.change(|document| {
            if let Some(pods) = document["pods"].as_array_mut() {
                pods.retain(|entry| entry["uid"] != from.1["uid"]);
                let mut entry = to.1.clone();
                entry["ipv4"] = json!(b.ip);
                pods.push(entry);
            }
        })?;
        agent.wait_ready(READY)
    };
    // The successor waits for its turn without an interface.
    lab.fabric().detach_nic(&c.port, c.vlan)?;
    agent.change(|document| {
        if let Some(pods) = document["pods"].as_array_mut() {
            pods.retain(|entry| entry["uid"] != new["uid"]);
        }
    })?;
    agent.wait_ready(READY)?;

    let at_b = Arrivals::start(&b.netns, 9)?;
    let at_c = Arrivals::start(&c.netns, 9)?;
    let stream = Stream::start(&a.netns, 4000, SocketAddrV4::new(b.ip, 9))?;
    assert!(at_b.wait(stream.mark()), "nothing arrives at first");
    hand_over((b, &old), (c, &new), list(&["closed"]))?;
    stream.go_on(stream.mark());
    assert_eq!(at_c.highest(), 0, "the successor got what its groups forbid");
    // What its groups allow does arrive.
    let allowed = Arrivals::start(&c.netns, 10)?;
    let second = Stream::start(&a.netns, 4001, SocketAddrV4::new(b.ip, 10))?;
    assert!(allowed.wait(second.mark()), "nothing arrives at the successor");
    assert_eq!(at_c.highest(), 0);
    lab.shutdown()
}

// ---- Random cases.

const CASE: Size = Size { flows: 25, waits: false, changes: true };

/// Has nobody answer in a pod: what is sent there is only looked at.
fn silence(pod: &Pod) -> Result<()> {
    pod.netns.exec(&["ip", "rule", "add", "pref", "10", "blackhole"]).map(drop)
}

/// What the cases, one after the other, lead to.
struct Course {
    start: Instant,
    /// One that remembers everything, and one that remembers what a VPC behind a fast path can.
    vpcs: [Vpc; 2],
    /// It knows which pairs are open.
    node: HostNode,
    state: State,
    datagrams: Datagrams,
}

impl Course {
    /// The VPC, the agent, and those who know what shall come of it. `step`: what led to the state.
    fn change(&mut self, lab: &Lab, state: State, step: &Step) -> Result<()> {
        enforce(lab, &state)?;
        self.vpcs.iter_mut().for_each(|vpc| equivalence::change(vpc, &state, step));
        let open = self.node.open_pairs();
        self.node.enforce(&state, None);
        for (a, b) in new_to_the_vpc(&self.state, &state, &open, &self.node.open_pairs()) {
            self.vpcs[1].forget_between(a, b);
        }
        self.datagrams.changed();
        self.state = state;
        Ok(())
    }
}

/// Runs a case with real packets; what arrives is compared with what the evaluator, which sees every packet, lets pass. The
/// pods and their flows are those of the case before.
fn run(lab: &Lab, case: &Case, course: &mut Course, seed: u64) -> Result<[u64; 2]> {
    course.change(lab, case.state(), &Step::Groups(case.groups.clone()))?;
    let pods: Vec<&Pod> = lab.pods().iter().collect();
    let number = |ip: Ipv4Addr| PODS.iter().position(|pod| *pod == ip).expect("a pod");
    let senders = pods.iter().map(|pod| Sender::open(&pod.netns, "eth0")).collect::<Result<Vec<_>>>()?;
    let mut sniffers =
        pods.iter().map(|pod| Sniffer::open(&pod.netns, "eth0")).collect::<Result<Vec<_>>>()?;
    let (mut ident, mut seen) = (0, [0; 2]);
    for (at, step) in case.steps.iter().enumerate() {
        let Step::Send(packet, more) = step else {
            let mut state = course.state.clone();
            state.apply(step);
            course.change(lab, state, step)?;
            continue;
        };
        if !course.datagrams.is_whole(packet) {
            continue;
        }
        ident += 1;
        let packet = match packet.part {
            Part::Whole => Packet { ident, ..*packet },
            _ => *packet,
        };
        let (from, to) = (number(packet.src), number(packet.dst));
        let now = course.start.elapsed();
        let [may, must] = course.vpcs.each_mut().map(|vpc| vpc.see(now, &packet));
        let frame = Frame::new(GATEWAY_MAC, pods[from].mac).payload(0x0800, &packet.write(*more));
        senders[from].send(&frame)?;
        let limit =
            if may == Verdict::Pass && must == Verdict::Pass { SECOND } else { Duration::from_millis(15) };
        let arrived = sniffers[to].wait(limit, |frame| {
            let read =
                frame.payload().filter(|(kind, _)| *kind == 0x0800).and_then(|(_, ip)| Packet::read(ip));
            !frame.outgoing && read == Some(packet)
        })?;
        let agrees = match arrived {
            Some(_) => may == Verdict::Pass || must == Verdict::Pass,
            None => may != Verdict::Pass || must != Verdict::Pass,
        };
        assert!(
            agrees,
            "ENIWAY_SEED={seed}, step {at}: {packet}: {}, and the evaluator says {may:?}\n{case}",
            if arrived.is_some() { "it arrives" } else { "it does not arrive" }
        );
        seen[usize::from(arrived.is_some())] += 1;
    }
    Ok(seen)
}

/// The VPC, then the agent.
fn enforce(lab: &Lab, state: &State) -> Result<()> {
    let gate = lab.security_groups()?;
    gate.set_groups(state.groups.clone());
    for (address, membership) in state.members() {
        gate.set_member(address, membership.groups);
    }
    let agent = lab.agent("n")?;
    agent.change(|document| {
        eniway_tests::lab::agent::put_groups(document, &state.of_the_agent());
        for (number, pod) in state.pods.iter().enumerate() {
            let uid = format!("uid-p{number}");
            let entries = document["pods"].as_array_mut().into_iter().flatten();
            for entry in entries.filter(|entry| entry["uid"] == uid) {
                entry["security_groups"] = json!(pod.list);
                entry["security_groups_revision"] = json!(if pod.stale { u64::from(u32::MAX) } else { 0 });
            }
        }
    })?;
    agent.wait_ready(READY)
}

#[test]
fn real_packets_reach_whom_the_vpc_lets_them_reach() -> Result<()> {
    let mut builder = Lab::builder("lg-cases").node("n", [10, 1, 0, 10], [10, 1, 19, 10]);
    for (number, address) in PODS.into_iter().enumerate() {
        builder = pod(builder, &format!("p{number}"), address, 101 + number as u16);
    }
    let lab = builder.security_groups(Groups::default()).build()?;
    lab.start_agents()?;
    lab.pods().iter().try_for_each(silence)?;
    assert_eq!(lab.pods()[0].mac, Mac::of(PODS[0]));
    let seed = std::env::var("ENIWAY_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(20_260);
    let first = Dice(seed).case(CASE).state();
    let mut course = Course {
        start: Instant::now(),
        vpcs: [equivalence::vpc(&first), equivalence::vpc(&first)],
        node: HostNode::new(true),
        state: first,
        datagrams: Datagrams::default(),
    };
    let mut all = [0; 2];
    for number in 0..12 {
        let seed = seed + number;
        let mut case = Dice(seed).case(CASE);
        // Pods are exchanged in a test of their own.
        case.steps.retain(|step| !matches!(step, Step::Replace(..) | Step::Wait(_)));
        let [refused, arrived] = run(&lab, &case, &mut course, seed)?;
        all = [all[0] + refused, all[1] + arrived];
    }
    let fast = lab.agent("n")?.counter("default/p0", "ingress", "local")?;
    println!(
        "{} packets were refused, {} arrived, {fast} of them at one pod by the fast path",
        all[0], all[1]
    );
    assert!(all[0].min(all[1]).min(fast) > 20, "{all:?}, {fast} are too few");
    lab.shutdown()
}

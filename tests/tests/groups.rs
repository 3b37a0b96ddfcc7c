//! The fast path by security groups, live: rules, members and pods change under traffic, and nothing that the new state
//! forbids is fast after the agent has said that it is in force.

use std::{
    net::SocketAddrV4,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use eniway_tests::lab::{
    Agent, Lab,
    agent::READY,
    net::{UdpEcho, udp_exchange},
};
use serde_json::{Value, json};

type Result<T = (), E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const PORT: u16 = 7000;
const CLIENT: &str = "default/a";
const SERVER: &str = "default/b";

/// ```text
///   node n:  a ──UDP 7000──> b        a: sg-client (sends to sg-server)
///                                     b: sg-server (UDP 7000 from sg-client)
/// ```
fn lab(id: &str) -> Result<Lab> {
    let lab = Lab::builder(id)
        .node("n", [10, 1, 0, 10], [10, 1, 16, 10])
        .pod("a", "n", [10, 1, 18, 1])
        .pod("b", "n", [10, 1, 18, 2])
        .vm("vm", [10, 1, 0, 20])
        .http_vip([10, 1, 0, 200], 80)
        .build()?;
    lab.start_agents()?;
    change(lab.agent("n")?, |document| {
        for pod in document["pods"].as_array_mut().expect("what the test made") {
            pod["fast_path"] = json!("security-groups");
            pod["security_groups"] =
                if pod["name"] == "a" { json!(["sg-client"]) } else { json!(["sg-server"]) };
        }
        document["security_groups"] = json!([
            { "id": "sg-client", "rules": [
                { "direction": "egress", "action": "allow", "group": "sg-server" } ] },
            { "id": "sg-server", "rules": [served()] },
            { "id": "sg-shut" }
        ]);
    })?;
    Ok(lab)
}

fn served() -> Value {
    json!({ "direction": "ingress", "action": "allow", "protocol": "udp", "ports": PORT.to_string(), "group": "sg-client" })
}

/// Changes the document, and waits until the agent says that it is in force.
fn change(agent: &Agent, edit: impl FnOnce(&mut Value)) -> Result {
    agent.change(edit)?;
    let revision = agent.document()?["revision"].clone();
    agent.wait_status("the new revision", READY, |status| status["revision"] == revision)?;
    Ok(())
}

fn group<'d>(document: &'d mut Value, id: &str) -> &'d mut Value {
    document["security_groups"]
        .as_array_mut()
        .expect("what the test made")
        .iter_mut()
        .find(|group| group["id"] == id)
        .expect("what the test made")
}

fn pod<'d>(document: &'d mut Value, name: &str) -> &'d mut Value {
    document["pods"]
        .as_array_mut()
        .expect("what the test made")
        .iter_mut()
        .find(|pod| pod["name"] == name)
        .expect("what the test made")
}

/// Datagrams from one port of `a` to `b`, one a millisecond, until it is dropped.
struct Traffic {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Traffic {
    fn start(lab: &Lab) -> Result<Self> {
        let (netns, to) = (lab.pod("a")?.netns.clone(), SocketAddrV4::new(lab.pod("b")?.ip, PORT));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let send = || {
                let socket = std::net::UdpSocket::bind("0.0.0.0:5000").expect("the port is free");
                while !stopped.load(Ordering::Relaxed) {
                    // An error is ICMP's answer to an earlier datagram.
                    let _ = socket.send_to(b"x", to);
                    thread::sleep(Duration::from_millis(1));
                }
            };
            netns.run(send).expect("the namespace is there");
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What `a` sends during a quarter of a second: packets by the fast path, by the wire. It answers the ELB's health checks by
/// the wire all the time: a few.
fn doors(agent: &Agent) -> Result<(u64, u64)> {
    let count = || -> Result<(u64, u64)> {
        Ok((agent.counter(CLIENT, "egress", "local")?, agent.counter(CLIENT, "egress", "wire")?))
    };
    let before = count()?;
    thread::sleep(Duration::from_millis(250));
    let after = count()?;
    Ok((after.0 - before.0, after.1 - before.1))
}

#[track_caller]
fn all_fast(agent: &Agent) {
    let (fast, wire) = doors(agent).expect("counters are read");
    assert!(fast > 20 && wire < fast / 5, "fast {fast}, by the wire {wire}");
}

#[track_caller]
fn none_fast(agent: &Agent) {
    let (fast, wire) = doors(agent).expect("counters are read");
    assert!(fast == 0 && wire > 20, "fast {fast}, by the wire {wire}");
}

#[test]
fn changes_hold_for_running_flows_once_they_are_acknowledged() -> Result {
    let lab = lab("g-changes")?;
    let agent = lab.agent("n")?;
    let traffic = Traffic::start(&lab)?;
    all_fast(agent);

    // A rule goes, and comes back.
    let other = json!({ "direction": "ingress", "action": "allow", "protocol": "tcp" });
    change(agent, |document| group(document, "sg-server")["rules"] = json!([other]))?;
    none_fast(agent);
    assert!(agent.counter(CLIENT, "egress", "policy-revoked")? >= 1);
    assert!(agent.counter(CLIENT, "egress", "policy-refused")? >= 1);
    change(agent, |document| group(document, "sg-server")["rules"] = json!([served()]))?;
    all_fast(agent);

    // A denial of higher priority.
    change(agent, |document| {
        let deny =
            json!({ "direction": "ingress", "action": "deny", "protocol": "udp", "cidr": "10.1.18.1" });
        group(document, "sg-server")["rules"] = json!([deny, served()]);
    })?;
    none_fast(agent);
    change(agent, |document| group(document, "sg-server")["rules"] = json!([served()]))?;
    all_fast(agent);

    // A member leaves the group.
    change(agent, |document| pod(document, "a")["security_groups"] = json!(["sg-shut"]))?;
    none_fast(agent);
    // Groups that are not known, and none at all: the VPC decides.
    change(agent, |document| pod(document, "a")["security_groups"] = json!(["sg-client", "sg-nowhere"]))?;
    none_fast(agent);
    assert!(agent.counter(CLIENT, "egress", "policy-wire")? >= 1);
    change(agent, |document| pod(document, "a")["security_groups"] = json!([]))?;
    none_fast(agent);
    change(agent, |document| pod(document, "a")["security_groups"] = json!(["sg-client"]))?;
    all_fast(agent);

    // Groups newer than the rules.
    change(agent, |document| pod(document, "a")["security_groups_revision"] = json!(1_000_000))?;
    none_fast(agent);
    change(agent, |document| pod(document, "a")["security_groups_revision"] = json!(1))?;
    all_fast(agent);

    // Switched off for one pod.
    change(agent, |document| pod(document, "b")["fast_path"] = json!("off"))?;
    none_fast(agent);
    drop(traffic);
    Ok(())
}

/// A pod goes, and another with other groups gets its address, under traffic to that address.
#[test]
fn an_address_is_judged_by_the_groups_of_the_pod_that_has_it() -> Result {
    let lab = lab("g-reuse")?;
    let agent = lab.agent("n")?;
    let traffic = Traffic::start(&lab)?;
    all_fast(agent);
    change(agent, |document| {
        let successor = pod(document, "b");
        successor["uid"] = json!("uid-b2");
        successor["container_id"] = json!("container-b2");
        successor["generation"] = json!(2);
        successor["security_groups"] = json!(["sg-shut"]);
    })?;
    none_fast(agent);
    // And one that may have it again.
    change(agent, |document| {
        let successor = pod(document, "b");
        successor["uid"] = json!("uid-b3");
        successor["container_id"] = json!("container-b3");
        successor["generation"] = json!(3);
        successor["security_groups"] = json!(["sg-server"]);
    })?;
    all_fast(agent);
    drop(traffic);
    Ok(())
}

/// What is in force stays so through the agent's death, and the next one takes it over without a packet on the wire.
#[test]
fn an_agent_that_comes_back_finds_what_is_in_force() -> Result {
    let lab = lab("g-restart")?;
    let agent = lab.agent("n")?;
    let echo = UdpEcho::start(&lab.pod("b")?.netns, SocketAddrV4::new(lab.pod("b")?.ip, PORT))?;
    let ask =
        || udp_exchange(&lab.pod("a")?.netns, 0, SocketAddrV4::new(lab.pod("b")?.ip, PORT), b"x", READY);
    ask()?;
    assert!(agent.counter(SERVER, "egress", "local")? >= 1, "the answer follows its flow");
    agent.stop(eniway_tests::lab::agent::Signal::SIGKILL)?;
    ask()?;
    agent.start()?;
    agent.wait_ready(READY)?;
    ask()?;
    for pod in [CLIENT, SERVER] {
        for why in ["policy-wire", "policy-refused", "policy-no-flow", "policy-revoked"] {
            assert_eq!(agent.counter(pod, "egress", why)?, 0, "{pod}: {why}");
        }
    }
    drop(echo);
    Ok(())
}

#[test]
fn people_are_told_why() -> Result {
    let lab = lab("g-told")?;
    let agent = lab.agent("n")?;
    let policy = agent.cli_json(&["policy"])?;
    let verdicts: Vec<&str> = policy["pairs"]
        .as_array()
        .expect("what the test made")
        .iter()
        .map(|pair| pair["verdict"].as_str().expect("what the test made"))
        .collect();
    assert_eq!(verdicts, ["check", "check"], "{policy}");
    let told = agent.cli(&["trace", "--pod", "a", "--to", "10.1.18.2:7000", "--proto", "udp"])?;
    for words in [
        "sg-client of default/a: allow any protocol to group sg-server, priority 1: decides",
        "sg-server of default/b: allow udp 7000 from group sg-client, priority 1: decides",
        "straight into default/b",
        "straight into default/a",
    ] {
        assert!(told.contains(words), "no {words:?} in:\n{told}");
    }
    let told = agent.cli(&["trace", "--pod", "a", "--to", "10.1.18.2:80"])?;
    for words in [
        "says nothing: another protocol",
        "default/b: not: may receive, for no rule says anything",
        "policy-refused",
    ] {
        assert!(told.contains(words), "no {words:?} in:\n{told}");
    }
    change(agent, |document| pod(document, "b")["security_groups"] = json!(["sg-nowhere"]))?;
    let told = agent.cli(&["policy"])?;
    assert!(told.contains("default/b: security group sg-nowhere is not known"), "{told}");
    Ok(())
}

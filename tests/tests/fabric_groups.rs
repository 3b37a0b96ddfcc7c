//! The fabric's security groups, with real packets and without agents: machines stand in for pods.
//!
//! ```text
//!   vm a ──┐                       ┌── vm b
//!          ├─ fabric ─ gate ─ fabric ┤          every IPv4 packet passes the gate, where the evaluator judges it
//!   vm c ──┘                       └── outside, ELB
//! ```

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpListener},
    time::Duration,
};

use eniway_policy::model::{GroupList, Groups};
use eniway_tests::lab::{
    Client, Error, Lab, Result,
    fabric::{Count, Direction, Kind},
    groups::Why,
    net::{self, TcpServer, UdpEcho},
};
use serde_json::{Value, json};

const SECOND: Duration = Duration::from_secs(1);
const SHORT: Duration = Duration::from_millis(300);

fn groups(value: Value) -> Groups {
    serde_json::from_value(value).expect("groups")
}

fn list(ids: &[&str]) -> GroupList {
    serde_json::from_value(json!(ids)).expect("a list")
}

/// `client` lets everything out, `server` lets TCP 80 in.
fn web() -> Groups {
    groups(json!({"security_groups": [
        {"id": "client", "rules": [{"direction": "egress", "action": "allow"}]},
        {"id": "server", "rules": [
            {"direction": "ingress", "action": "allow", "protocol": "tcp", "ports": "80", "group": "client"}
        ]}
    ]}))
}

/// A has the group `client`, B `server`, C none.
fn lab(id: &str) -> Result<Lab> {
    let lab = Lab::builder(id)
        .node("n", [10, 1, 0, 10], [10, 1, 16, 10])
        .vm("a", [10, 1, 0, 21])
        .vm("b", [10, 1, 0, 22])
        .vm("c", [10, 1, 0, 23])
        .security_groups(web())
        .build()?;
    lab.security_groups()?.set_member(lab.vm("a")?.ip, list(&["client"]));
    lab.security_groups()?.set_member(lab.vm("b")?.ip, list(&["server"]));
    Ok(lab)
}

fn any(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port)
}

fn connects(from: &Client, to: &Client, port: u16) -> bool {
    net::tcp_connect(&from.netns, 0, SocketAddrV4::new(to.ip, port), SHORT).is_ok()
}

#[test]
fn lets_pass_what_both_ends_allow_and_counts_the_rest() -> Result<()> {
    let lab = lab("fg-rules")?;
    let (a, b, c) = (lab.vm("a")?, lab.vm("b")?, lab.vm("c")?);
    let _b80 = TcpServer::start(&b.netns, any(80))?;
    let _b81 = TcpServer::start(&b.netns, any(81))?;
    let _a80 = TcpServer::start(&a.netns, any(80))?;
    let _c80 = TcpServer::start(&c.netns, any(80))?;
    // Answers are of the flow: B may send nothing of its own.
    let mut stream = net::tcp_connect(&a.netns, 0, SocketAddrV4::new(b.ip, 80), SECOND)?;
    net::read_tcp_server(&mut stream, SECOND)?;
    assert_eq!(lab.fabric().count(Kind::SecurityGroup)?, 0);

    for (from, to, port) in [(a, b, 81), (b, a, 80), (c, b, 80), (b, c, 80), (c, a, 80)] {
        assert!(!connects(from, to, port), "{} > {}:{port}", from.name, to.name);
    }
    assert!(connects(a, c, 80), "nobody judges C");
    assert!(net::ping(&a.netns, b.ip, SHORT).is_err());
    let counts = lab.fabric().counts()?;
    let from_a = |count: &&Count| count.port == "a" && count.kind == Kind::SecurityGroup;
    assert!(counts.iter().find(from_a).is_some_and(|count| count.packets >= 2), "{counts:?}");
    assert_eq!(lab.fabric().violations()?, []);
    let refused = lab.security_groups()?.refused();
    assert!(
        refused
            .iter()
            .any(|r| r.packet.src == c.ip
                && r.why == Why::NoRule(b.ip, eniway_policy::model::Direction::Ingress)),
        "{refused:?}"
    );
    // The flow log has them where they came from, and nowhere else.
    let flows = lab.fabric().flows_between(a.ip, b.ip, 81)?;
    assert!(!flows.is_empty() && flows.iter().all(|flow| flow.direction == Direction::FromNic), "{flows:?}");
    lab.shutdown()
}

#[test]
fn a_change_holds_for_running_flows() -> Result<()> {
    let lab = lab("fg-change")?;
    let (a, b) = (lab.vm("a")?, lab.vm("b")?);
    let gate = lab.security_groups()?;
    let dns = |ports: &str| {
        let mut all = web();
        let rule = json!({"direction": "ingress", "action": "allow", "protocol": "udp", "ports": ports});
        let server = all.security_groups.get_mut(&"server".parse().expect("an id")).expect("a group");
        server.rules.push(serde_json::from_value(rule).expect("a rule"));
        all
    };
    let echo = UdpEcho::start(&b.netns, any(53))?;
    let port = lab.fresh_port();
    let asks = || net::udp_exchange(&a.netns, port, SocketAddrV4::new(b.ip, 53), b"?", SHORT).is_ok();
    assert!(!asks());
    gate.set_groups(dns("53"));
    assert!(asks());
    gate.set_groups(dns("54"));
    let seen = echo.seen().len();
    assert!(!asks());
    assert_eq!(echo.seen().len(), seen);
    gate.set_groups(dns("53-54"));
    assert!(asks());
    gate.set_member(a.ip, list(&["server"]));
    assert!(!asks(), "A may send nothing any more");
    gate.remove_member(a.ip);
    assert!(asks(), "A is no pod any more");
    lab.shutdown()
}

#[test]
fn large_packets_pass_in_one_piece_or_in_several() -> Result<()> {
    let lab = lab("fg-large")?;
    let (a, b) = (lab.vm("a")?, lab.vm("b")?);
    // What goes up is counted by hand: the lab's server only greets.
    let listener = b.netns.run(|| TcpListener::bind(any(80)))?.map_err(Error::io("bind"))?;
    const BYTES: usize = 4 << 20;
    let server = std::thread::spawn(move || -> std::io::Result<usize> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(10 * SECOND))?;
        let mut all = Vec::new();
        stream.read_to_end(&mut all)?;
        assert!(all.iter().enumerate().all(|(at, byte)| *byte == (at % 251) as u8));
        Ok(all.len())
    });
    let mut stream = net::tcp_connect(&a.netns, 0, SocketAddrV4::new(b.ip, 80), SECOND)?;
    let content: Vec<u8> = (0..BYTES).map(|at| (at % 251) as u8).collect();
    stream.write_all(&content).map_err(Error::io("write"))?;
    net::close(stream)?;
    let received = server.join().expect("the server").map_err(Error::io("read"))?;
    assert_eq!(received, BYTES);
    // A datagram in fragments.
    lab.security_groups()?.change(|groups| {
        let rule = json!({"direction": "ingress", "action": "allow", "protocol": "udp", "ports": "9"});
        let server = groups.security_groups.get_mut(&"server".parse().expect("an id")).expect("a group");
        server.rules.push(serde_json::from_value(rule).expect("a rule"));
    });
    let _echo = UdpEcho::start(&b.netns, any(9))?;
    let datagram = vec![7; 4000];
    let answer = net::udp_exchange(&a.netns, 0, SocketAddrV4::new(b.ip, 9), &datagram, SECOND)?;
    assert_eq!(answer.payload, datagram);
    lab.shutdown()
}

#[test]
fn judges_the_addresses_inside() -> Result<()> {
    let eip = Ipv4Addr::new(203, 0, 113, 7);
    let lab = Lab::builder("fg-inside")
        .node("n", [10, 1, 0, 10], [10, 1, 16, 10])
        .pod("p", "n", [10, 1, 18, 1])
        .vm("a", [10, 1, 0, 21])
        .vm("b", [10, 1, 0, 22])
        .http_vip([10, 1, 0, 200], 8080)
        .security_groups(groups(json!({"security_groups": [
            {"id": "a", "rules": [{"direction": "egress", "action": "allow", "protocol": "tcp", "ports": "80", "cidr": "10.1.18.1"}]},
            {"id": "p", "rules": [
                {"direction": "ingress", "action": "allow", "protocol": "tcp", "ports": "80", "cidr": "10.1.0.0/16"},
                {"direction": "egress", "action": "allow", "cidr": "198.51.100.0/24"}
            ]}
        ]})))
        .groups_of("p", list(&["p"]))
        .build()?;
    // The machine stands in for the pod.
    let (a, b, pod) = (lab.vm("a")?, lab.vm("b")?, lab.pod("p")?);
    lab.fabric().detach_nic(&pod.port, pod.vlan)?;
    lab.fabric().attach_nic("b", 0, pod.ip, b.mac, Some(eip))?;
    b.netns.exec(&["ip", "addr", "flush", "dev", "eth0"])?;
    b.netns.exec(&["ip", "addr", "add", "10.1.18.1/32", "dev", "eth0"])?;
    b.netns.exec(&["ip", "route", "add", "default", "via", "10.1.16.1", "dev", "eth0", "onlink"])?;
    lab.security_groups()?.set_member(a.ip, list(&["a"]));
    let _server = TcpServer::start(&b.netns, any(80))?;
    lab.elb().wait_backend("p", true, 2 * SECOND)?;
    let mut stream = net::tcp_connect(&a.netns, 0, lab.vip()?, SECOND)?;
    assert_eq!(*net::read_tcp_server(&mut stream, SECOND)?.1.ip(), a.ip);
    // The pod may reach the outside by its EIP, and the outside does not reach it.
    let outside = lab.outside();
    let outer = TcpServer::start(&outside.netns, any(443))?;
    let mut stream = net::tcp_connect(&b.netns, 0, SocketAddrV4::new(outside.ip, 443), SECOND)?;
    assert_eq!(*net::read_tcp_server(&mut stream, SECOND)?.1.ip(), eip);
    assert_eq!(outer.seen().len(), 1);
    assert!(net::tcp_connect(&outside.netns, 0, SocketAddrV4::new(eip, 80), SHORT).is_err());
    assert!(lab.fabric().count(Kind::SecurityGroup)? > 0);
    lab.shutdown()
}

//! The fabric alone, without agents: it is the judge of everything else, so it is tried first.
//!
//! ```text
//!   vm a ──┐          ┌── vm b1 (has the address of pod p1)     node n's agent is not started: frames on its
//!          ├─ fabric ─┤                                         parent ENI are made by hand
//!   elb ───┘          └── vm b2 (has the address of pod p2, EIP)
//! ```

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use eniway_tests::lab::{
    Client, Error, Lab, Mac, Protocol, Result, Subnet, VipSpec,
    fabric::{Direction, Kind},
    net::{self, TcpServer, UdpEcho},
    raw::{self, Arp, Frame, Sniffer},
    spec::{BROADCAST, GATEWAY_MAC},
};

const SECOND: Duration = Duration::from_secs(1);
const SHORT: Duration = Duration::from_millis(300);
const VIP: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 200);
const EIP: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);

fn lab(id: &str) -> Result<Lab> {
    let udp = VipSpec {
        ip: VIP,
        port: 53,
        protocol: Protocol::Udp,
        target_port: 5300,
        backends: Vec::new(),
        health_check: false,
    };
    let lab = Lab::builder(id)
        .node("n", [10, 1, 0, 10], [10, 1, 16, 10])
        .pod("p1", "n", [10, 1, 18, 1])
        .pod("p2", "n", [10, 1, 18, 2])
        .pod("p3", "n", [10, 1, 18, 3])
        .eip("p2", EIP.octets())
        .vm("a", [10, 1, 0, 20])
        .vm("b1", [10, 1, 0, 31])
        .vm("b2", [10, 1, 0, 32])
        .http_vip(VIP.octets(), 8080)
        .vip(udp)
        .build()?;
    Ok(lab)
}

/// Gives a virtual machine the address of a pod, as if the pod ran there.
fn stand_in(lab: &Lab, vm: &str, pod: &str) -> Result<Client> {
    let (vm, pod) = (lab.vm(vm)?, lab.pod(pod)?);
    lab.fabric().detach_nic(&pod.port, pod.vlan)?;
    lab.fabric().attach_nic(&vm.name, 0, pod.ip, vm.mac, pod.eip)?;
    vm.netns.exec(&["ip", "addr", "flush", "dev", "eth0"])?;
    vm.netns.exec(&["ip", "addr", "add", &format!("{}/32", pod.ip), "dev", "eth0"])?;
    let gateway = Subnet::PODS.gateway.to_string();
    vm.netns.exec(&["ip", "route", "add", "default", "via", &gateway, "dev", "eth0", "onlink"])?;
    Ok(Client { ip: pod.ip, ..vm.clone() })
}

fn any(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port)
}

#[test]
fn routes_between_nics_and_logs_flows() -> Result<()> {
    let lab = lab("f-route")?;
    let (a, node) = (lab.vm("a")?, lab.node("n")?);
    net::ping(&a.netns, node.ip, SECOND)?;
    net::ping(&a.netns, node.parent_ip, SECOND)?;
    net::ping(&node.netns, a.ip, SECOND)?;

    let server = TcpServer::start(&node.netns, any(9000))?;
    let port = lab.fresh_port();
    let mut stream = net::tcp_connect(&a.netns, port, SocketAddrV4::new(node.ip, 9000), SECOND)?;
    let (_, client) = net::read_tcp_server(&mut stream, SECOND)?;
    assert_eq!(client, SocketAddrV4::new(a.ip, port));
    assert_eq!(server.seen(), [client]);

    let flows = lab.fabric().flows_between(a.ip, node.ip, port)?;
    let crossed = |port: &str, direction| flows.iter().any(|f| f.port == port && f.direction == direction);
    assert_eq!(flows.len(), 4, "{flows:?}");
    for (port, direction) in [
        ("a", Direction::FromNic),
        ("n-e0", Direction::ToNic),
        ("n-e0", Direction::FromNic),
        ("a", Direction::ToNic),
    ] {
        assert!(crossed(port, direction), "{port} {direction:?}: {flows:?}");
    }
    assert_eq!(lab.fabric().violations()?, []);
    assert!(net::ping(&a.netns, Ipv4Addr::new(10, 1, 0, 77), SHORT).is_err());
    assert!(lab.fabric().count(Kind::NoRoute)? > 0);
    lab.shutdown()
}

#[test]
fn refuses_what_is_not_the_nics_own() -> Result<()> {
    let lab = lab("f-strict")?;
    let (node, pod, a) = (lab.node("n")?, lab.pod("p1")?, lab.vm("a")?);
    let (from, to) = (SocketAddrV4::new(pod.ip, 1000), SocketAddrV4::new(a.ip, 2000));
    let other = Mac([2, 0, 0, 0, 0, 9]);
    let good = || Frame::new(GATEWAY_MAC, pod.mac).vlan(pod.vlan);
    let spoofed = SocketAddrV4::new(lab.pod("p2")?.ip, 1000);
    let zero = Mac([0; 6]);
    let cases = [
        (Kind::UnknownVlan, 999, Frame::new(GATEWAY_MAC, pod.mac).vlan(999).udp(from, to, b"x")),
        (Kind::DoubleTag, pod.vlan, good().vlan(7).udp(from, to, b"x")),
        (
            Kind::DoubleTag,
            pod.vlan,
            Frame::new(GATEWAY_MAC, pod.mac).tag(0x88a8, pod.vlan).udp(from, to, b"x"),
        ),
        (Kind::SourceMac, pod.vlan, Frame::new(GATEWAY_MAC, other).vlan(pod.vlan).udp(from, to, b"x")),
        (Kind::SourceIp, pod.vlan, good().udp(spoofed, to, b"x")),
        (Kind::DestinationMac, pod.vlan, Frame::new(a.mac, pod.mac).vlan(pod.vlan).udp(from, to, b"x")),
        (Kind::ArpSender, pod.vlan, good().arp(1, (pod.mac, a.ip), (zero, Subnet::PODS.gateway))),
        (Kind::ArpSender, pod.vlan, good().arp(2, (other, pod.ip), (zero, Subnet::PODS.gateway))),
        (Kind::Ethertype, pod.vlan, good().payload(0x86dd, &[0x60; 40])),
        (Kind::Ethertype, 0, Frame::new(BROADCAST, node.parent_mac).payload(0x88cc, &[0; 46])),
        (Kind::SourceIp, 0, Frame::new(GATEWAY_MAC, node.parent_mac).udp(from, to, b"x")),
        (Kind::Malformed, pod.vlan, good().payload(0x0800, &[0x44; 40])),
    ];
    let mut sniffer = Sniffer::open(&a.netns, "eth0")?;
    for (kind, vlan, frame) in cases {
        lab.fabric().clear_counts()?;
        raw::send(&node.netns, "eth1", &frame)?;
        let violations = lab.fabric().violations()?;
        let [count] = violations.as_slice() else { panic!("{kind:?}: {violations:?}") };
        assert_eq!((count.kind, count.packets, count.vlan, &*count.port), (kind, 1, vlan, "n-e1"));
    }
    assert_eq!(sniffer.wait(SHORT, |frame| frame.ipv4().is_some())?, None);

    // And lets through what is: the tag is off at the other side, the MACs are rewritten.
    raw::send(&node.netns, "eth1", &good().udp(from, to, b"hello"))?;
    let frame = sniffer.wait(SECOND, |frame| frame.ipv4().is_some())?.expect("the good frame");
    assert_eq!((frame.vlan(), frame.src_mac(), frame.dst_mac()), (None, GATEWAY_MAC, a.mac));
    lab.shutdown()
}

#[test]
fn answers_arp_and_tags_towards_a_sub_eni() -> Result<()> {
    let lab = lab("f-arp")?;
    let (node, pod, a) = (lab.node("n")?, lab.pod("p1")?, lab.vm("a")?);
    let mut sniffer = Sniffer::open(&node.netns, "eth1")?;
    let ask = Frame::new(BROADCAST, pod.mac).vlan(pod.vlan);
    raw::send(&node.netns, "eth1", &ask.arp(1, (pod.mac, pod.ip), (Mac([0; 6]), Subnet::PODS.gateway)))?;
    let answer = sniffer.wait(SECOND, |f| !f.outgoing && f.arp().is_some())?.expect("an answer");
    assert_eq!(answer.vlan(), Some(pod.vlan));
    assert_eq!(answer.dst_mac(), pod.mac);
    assert_eq!(
        answer.arp(),
        Some(Arp { operation: 2, sender: (GATEWAY_MAC, Subnet::PODS.gateway), target: (pod.mac, pod.ip) })
    );

    let capture_file = lab.dir().join("test.pcapng");
    let capture = lab.fabric().capture(&capture_file)?;
    let _ = net::udp_exchange(&a.netns, 4000, SocketAddrV4::new(pod.ip, 5000), b"hello", SHORT);
    let frame =
        sniffer.wait(SECOND, |f| !f.outgoing && f.ipv4().is_some_and(|(src, _, _)| *src.ip() == a.ip))?;
    let frame = frame.expect("the datagram");
    assert_eq!((frame.vlan(), frame.dst_mac(), frame.src_mac()), (Some(pod.vlan), pod.mac, GATEWAY_MAC));
    capture.stop();
    let words = ["tcpdump", "-e", "-n", "-r", &capture_file.to_string_lossy(), "vlan 101 and udp"];
    match lab.fabric().netns().exec(&words) {
        Ok(text) => assert!(text.contains("10.1.0.20.4000 > 10.1.18.1.5000"), "{text}"),
        // Debian's tcpdump is not required.
        Err(Error::Io { .. }) => {}
        Err(error) => return Err(error),
    }
    lab.shutdown()
}

#[test]
fn balances_checks_health_and_keeps_client_addresses() -> Result<()> {
    let lab = lab("f-elb")?;
    let (b1, b2) = (stand_in(&lab, "b1", "p1")?, stand_in(&lab, "b2", "p2")?);
    let a = lab.vm("a")?;
    let vip = lab.vips()[0];
    assert!(net::tcp_connect(&a.netns, 0, vip, SHORT).is_err());
    assert!(lab.fabric().count(Kind::NoBackend)? > 0);

    let one = TcpServer::start(&b1.netns, any(80))?;
    lab.elb().wait_backend("p1", true, SECOND)?;
    let port = lab.fresh_port();
    let mut stream = net::tcp_connect(&a.netns, port, vip, SECOND)?;
    let (server, client) = net::read_tcp_server(&mut stream, SECOND)?;
    assert_eq!((server, client), (SocketAddrV4::new(b1.ip, 80), SocketAddrV4::new(a.ip, port)));
    assert_eq!(lab.elb().flow(client, vip, Protocol::Tcp)?, Some(server));
    drop(stream);

    // Two healthy ones take turns; a pinned client does not.
    let two = TcpServer::start(&b2.netns, any(80))?;
    lab.elb().wait_backend("p2", true, SECOND)?;
    let served = |count: usize| -> Result<Vec<Ipv4Addr>> {
        (0..count)
            .map(|_| {
                let mut stream = net::tcp_connect(&a.netns, 0, vip, SECOND)?;
                Ok(*net::read_tcp_server(&mut stream, SECOND)?.0.ip())
            })
            .collect()
    };
    let turns = served(4)?;
    assert_eq!(turns.iter().filter(|ip| **ip == b1.ip).count(), 2, "{turns:?}");
    lab.elb().pin(a.ip, b2.ip)?;
    assert_eq!(served(3)?, [b2.ip; 3]);
    // The same port again, and another backend.
    lab.elb().pin(a.ip, b1.ip)?;
    let mut stream = net::tcp_connect(&a.netns, port, vip, SECOND)?;
    assert_eq!(*net::read_tcp_server(&mut stream, SECOND)?.0.ip(), b1.ip);
    lab.elb().unpin(a.ip)?;

    // A direct connection beside it is not translated.
    let mut direct = net::tcp_connect(&a.netns, port + 1, SocketAddrV4::new(b1.ip, 80), SECOND)?;
    assert_eq!(*net::read_tcp_server(&mut direct, SECOND)?.0.ip(), b1.ip);

    drop(two);
    lab.elb().wait_backend("p2", false, 2 * SECOND)?;
    assert_eq!(served(3)?, [b1.ip; 3]);
    assert!(one.seen().iter().any(|from| *from.ip() == lab.elb_host().ip), "no health check came");

    // A client that is a backend itself: its own packet comes back with its own address as source.
    lab.elb().pin(b1.ip, b1.ip)?;
    let mut sniffer = Sniffer::open(&b1.netns, "eth0")?;
    let port = lab.fresh_port();
    assert!(net::tcp_connect(&b1.netns, port, vip, SHORT).is_err());
    let hairpin = sniffer
        .wait(SHORT, |frame| !frame.outgoing && frame.ipv4().is_some_and(|(s, _, _)| s.port() == port))?;
    let (source, destination, _) = hairpin.and_then(|frame| frame.ipv4()).expect("the hairpin");
    assert_eq!((*source.ip(), *destination.ip()), (b1.ip, b1.ip));

    // UDP, with another port behind the VIP.
    let echo = UdpEcho::start(&b1.netns, any(5300))?;
    lab.elb().pin(a.ip, b1.ip)?;
    let answer = net::udp_exchange(&a.netns, 0, lab.vips()[1], b"question", SECOND)?;
    assert_eq!((answer.from, &*answer.payload), (lab.vips()[1], &b"question"[..]));
    assert_eq!(echo.seen(), [SocketAddrV4::new(a.ip, answer.local_port)]);
    assert_eq!(lab.fabric().violations()?, []);
    lab.shutdown()
}

#[test]
fn translates_elastic_addresses() -> Result<()> {
    let lab = lab("f-eip")?;
    let (b1, b2) = (stand_in(&lab, "b1", "p1")?, stand_in(&lab, "b2", "p2")?);
    let outside = lab.outside();
    let inner = TcpServer::start(&b2.netns, any(80))?;
    let mut stream = net::tcp_connect(&outside.netns, 0, SocketAddrV4::new(EIP, 80), SECOND)?;
    let (server, client) = net::read_tcp_server(&mut stream, SECOND)?;
    assert_eq!((*server.ip(), *client.ip()), (b2.ip, outside.ip));
    assert!(inner.seen().contains(&client));

    let outer = TcpServer::start(&outside.netns, any(443))?;
    let mut stream = net::tcp_connect(&b2.netns, 0, SocketAddrV4::new(outside.ip, 443), SECOND)?;
    let (_, client) = net::read_tcp_server(&mut stream, SECOND)?;
    assert_eq!(*client.ip(), EIP);
    assert_eq!(outer.seen(), [client]);
    net::ping(&b2.netns, outside.ip, SECOND)?;

    assert!(net::ping(&b1.netns, outside.ip, SHORT).is_err());
    assert!(lab.fabric().count(Kind::NoEip)? > 0);
    // Nobody outside may claim to be inside.
    let spoof = Frame::new(GATEWAY_MAC, outside.mac).udp(
        SocketAddrV4::new(b1.ip, 1),
        SocketAddrV4::new(EIP, 80),
        b"x",
    );
    raw::send(&outside.netns, "eth0", &spoof)?;
    let violations = lab.fabric().violations()?;
    assert!(matches!(violations.as_slice(), [count] if count.kind == Kind::SourceIp), "{violations:?}");
    lab.shutdown()
}

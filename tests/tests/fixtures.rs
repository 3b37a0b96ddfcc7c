//! Every program, packet by packet: what comes in, what becomes of it, what is counted, what is remembered. The story of
//! each is its name; who is who: `datapath_common::testing`. (The kernel runs no program on an IPv4 frame without a tag that
//! ends within the IPv4 header; frames cut off anywhere are the matter of the property tests.)

use std::{cell::RefCell, collections::BTreeSet};

use datapath_common::{
    abi::{
        Admitted, Bucket,
        Direction::{self, Egress, Ingress},
        Door, Endpoint, Flow, FlowKey, Fragment, FragmentKey, Limits as Bandwidth, Origin,
        Outcome::{self, *},
        PairKey,
        endpoint::flag,
        maps::SERVICE_MARK,
    },
    packet::link::{TPID_8021AD, TPID_8021Q, Tag},
    testing::{
        GATEWAY, GATEWAY_MAC, METADATA, MemoryTables, NODE, NODE_MAC, PARENT_IFINDEX, PODS, Packet, REMOTE,
        SERVICE, VIP, VIP_IN_SERVICES, node,
        packet::{ACK, SYN, SYN_ACK, Socket},
        rules::judged_node,
    },
};
use datapath_user::{
    config::{FastPath, Limits, Xdp},
    object::Constants,
};
use eniway_tests::programs::{
    Counts, Hook, Input, Programs, hex, nanos, now, private_netns, tc, write_pcap, xdp,
};

const A: Endpoint = PODS[0];
const B: Endpoint = PODS[1];
/// Its MAC on the wire is the parent's, its MTU 1400.
const C: Endpoint = PODS[2];
/// On another parent.
const D: Endpoint = PODS[3];
const STRANGER: [u8; 6] = [2, 0, 0, 0, 0, 9];
const BROADCAST: [u8; 6] = [0xff; 6];
const CLIENT: Socket = ([203, 0, 113, 7], 40_000);
const MONOTONIC_HOUR: u32 = 3600;

/// What may be remembered of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    Nothing,
    /// Since this packet.
    New(Door, Origin),
    /// Since before.
    Old(Door, Origin),
}

/// A packet and what is to become of it.
#[derive(Clone)]
struct Fixture {
    name: &'static str,
    hook: Hook,
    ifindex: u32,
    packet: Vec<u8>,
    /// The tag beside the frame.
    beside: Option<Tag>,
    gso: (u32, u32),
    /// What is remembered before: the age is in seconds.
    flows: Vec<(FlowKey, Door, Origin, u32)>,
    fragments: Vec<(FragmentKey, Door)>,
    pairs: Vec<(PairKey, Admitted)>,
    action: i32,
    /// `None`: the packet as it was.
    out: Option<Vec<u8>>,
    /// The tag that it leaves with, beside the frame.
    tag_left: Option<u16>,
    mark: u32,
    counts: Vec<(u32, Direction, Outcome)>,
    /// What is remembered of a flow afterwards.
    flow_after: Option<(FlowKey, Memory)>,
    fragment_after: Option<(FragmentKey, Option<Door>)>,
}

fn fixture(name: &'static str, hook: Hook, packet: &Packet) -> Fixture {
    Fixture {
        name,
        hook,
        ifindex: PARENT_IFINDEX,
        packet: packet.bytes(),
        beside: None,
        gso: (0, 0),
        flows: vec![],
        fragments: vec![],
        pairs: vec![],
        action: 0,
        out: None,
        tag_left: None,
        mark: 0,
        counts: vec![],
        flow_after: None,
        fragment_after: None,
    }
}

impl Fixture {
    fn at(self, ifindex: u32) -> Self {
        Self { ifindex, ..self }
    }

    fn beside(self, tpid: u16, tci: u16) -> Self {
        Self { beside: Some(Tag { tpid, tci }), ..self }
    }

    /// Is admitted to the fast path.
    fn admitted(mut self, key: PairKey, flow: Admitted) -> Self {
        self.pairs.push((key, flow));
        self
    }

    /// A GSO packet, of segments with this payload.
    fn gso(self, size: u32, segments: u32) -> Self {
        Self { gso: (size, segments), ..self }
    }

    /// Is remembered, for so many seconds.
    fn knowing(mut self, key: FlowKey, door: Door, origin: Origin, age: u32) -> Self {
        self.flows.push((key, door, origin, age));
        self
    }

    fn knowing_fragment(mut self, key: FragmentKey, door: Door) -> Self {
        self.fragments.push((key, door));
        self
    }

    fn gives(self, action: i32) -> Self {
        Self { action, ..self }
    }

    fn dropped(self) -> Self {
        let action = if self.hook == Hook::EniXdp { xdp::DROP } else { tc::SHOT };
        self.gives(action)
    }

    /// The frame as it leaves.
    fn leaves(self, packet: &Packet) -> Self {
        Self { out: Some(packet.bytes()), ..self }
    }

    fn leaves_tagged(self, tag: u16) -> Self {
        Self { tag_left: Some(tag), ..self }
    }

    fn counts(mut self, pod: u32, direction: Direction, outcome: Outcome) -> Self {
        self.counts.push((pod, direction, outcome));
        self
    }

    fn remembers(self, key: FlowKey, door: Door, origin: Origin) -> Self {
        Self { flow_after: Some((key, Memory::New(door, origin))), ..self }
    }

    /// Is still remembered as it was.
    fn keeps(self, key: FlowKey, door: Door, origin: Origin) -> Self {
        Self { flow_after: Some((key, Memory::Old(door, origin))), ..self }
    }

    fn forgets(self, key: FlowKey) -> Self {
        Self { flow_after: Some((key, Memory::Nothing)), ..self }
    }

    fn remembers_fragment(self, key: FragmentKey, door: Option<Door>) -> Self {
        Self { fragment_after: Some((key, door)), ..self }
    }
}

fn key(pod: &Endpoint, remote: Socket, local_port: u16, proto: u8) -> FlowKey {
    FlowKey { id: pod.id, remote: remote.0, remote_port: remote.1, local_port, proto, pad: [0; 3] }
}

fn fragment_key(pod: &Endpoint, src: [u8; 4], dst: [u8; 4], ident: u16) -> FragmentKey {
    FragmentKey { src, dst, id: pod.id, ident, proto: 17, pad: 0 }
}

const NO_POD: u32 = 0;
const FIRST: Flow = Flow { door: 0, origin: 0, pad: [0; 2], seen: 0 };

// ---- From the fabric.

/// What both programs at the parent refuse alike.
fn refused_from_fabric(hook: Hook) -> Vec<Fixture> {
    let from = |packet: Packet| packet.macs(GATEWAY_MAC, A.mac);
    let to_a = |packet: Packet| from(packet).vlan(A.vid);
    let good = || Packet::tcp((REMOTE, 80), (A.ipv4, 4000), ACK);
    let drop =
        |name, packet: &Packet, reason| fixture(name, hook, packet).dropped().counts(A.id, Ingress, reason);
    let drop_unknown =
        |name, packet: &Packet, reason| fixture(name, hook, packet).dropped().counts(NO_POD, Ingress, reason);
    vec![
        drop_unknown("a frame that ends within its tag", &to_a(Packet::raw(0x0800, &[])), Truncated).cut(16),
        drop_unknown("a second tag", &to_a(good()).vlan(B.vid), DoubleTag),
        drop_unknown("an 802.1ad tag", &from(good()).tag(TPID_8021AD, A.vid), DoubleTag),
        drop_unknown("an 802.1ad tag inside", &to_a(good()).tag(TPID_8021AD, B.vid), DoubleTag),
        drop_unknown("a VLAN id that no pod has", &from(good()).vlan(999), UnknownVlan),
        drop_unknown("the largest VLAN id", &from(good()).vlan(0xffff), UnknownVlan),
        drop("another pod's MAC", &to_a(good()).macs(GATEWAY_MAC, B.mac), WrongMac),
        drop("another pod's address", &to_a(Packet::tcp((REMOTE, 80), (B.ipv4, 4000), ACK)), WrongAddress),
        drop("a multicast address", &to_a(Packet::udp((REMOTE, 80), ([224, 0, 0, 1], 4000))), WrongAddress),
        drop("a header cut off", &to_a(Packet::raw(0x0800, &[0x45; 19])), Truncated),
        drop("ports cut off", &to_a(Packet::ipv4(REMOTE, A.ipv4, 17, &[0; 7])), Truncated),
        drop("ARP cut off", &to_a(Packet::raw(0x0806, &[0; 27])), Truncated),
        drop("version 6 in IPv4", &to_a(good().ip(|ip| ip.version_and_length = Some(0x65))), BadIpv4Header),
        drop(
            "a header too short to be one",
            &to_a(good().ip(|ip| ip.version_and_length = Some(0x44))),
            BadIpv4Header,
        ),
        drop("longer than the frame", &to_a(good().ip(|ip| ip.total_len = Some(41))), BadIpv4Header),
        drop("shorter than its header", &to_a(good().ip(|ip| ip.total_len = Some(19))), BadIpv4Header),
        drop("no length at all", &to_a(good().ip(|ip| ip.total_len = Some(0))), BadIpv4Header),
        drop("ARP for another", &to_a(Packet::arp(1, GATEWAY_MAC, GATEWAY, B.ipv4)), ArpNotForPod),
        drop("ARP of an unknown kind", &to_a(Packet::arp(3, GATEWAY_MAC, GATEWAY, A.ipv4)), ArpSpoof),
        drop(
            "a load balancer chose the client itself",
            &to_a(Packet::tcp((A.ipv4, 1), (A.ipv4, 80), SYN)),
            SelfHairpin,
        ),
        drop("IPv6", &to_a(Packet::ipv6(6, &[0; 20])), Ipv6),
        drop("IPv6 cut off", &to_a(Packet::raw(0x86dd, &[0x60; 20])), Ipv6),
        drop("neighbour solicitation", &to_a(Packet::ipv6(58, &[135, 0, 0, 0])), Ipv6Discovery),
        drop("LLDP", &to_a(Packet::raw(0x88cc, &[0; 30])), UnknownEthertype),
    ]
}

impl Fixture {
    /// Cuts the frame off, before or behind its end.
    fn cut(mut self, len: usize) -> Self {
        self.packet.truncate(len);
        self
    }
}

fn eni_ingress() -> Vec<Fixture> {
    let hook = Hook::EniIngress;
    let to = |pod: Endpoint, packet: Packet| packet.macs(GATEWAY_MAC, pod.wire_mac);
    let on = |pod: Endpoint, packet: Packet| to(pod, packet).vlan(pod.vid);
    // Into the pod, on the tag inside the frame.
    let into = |name, pod: Endpoint, packet: Packet| {
        fixture(name, hook, &on(pod, packet.clone()))
            .gives(tc::REDIRECT)
            .leaves(&packet.macs(GATEWAY_MAC, pod.mac))
            .counts(pod.id, Ingress, Wire)
    };
    let syn = |src: Socket, dst: Socket| Packet::tcp(src, dst, SYN);
    let server = (A.ipv4, 80);
    let from_b = key(&A, (B.ipv4, 4000), 80, 6);
    let udp_from_b = key(&A, (B.ipv4, 4000), 53, 17);
    let asked_b = || Packet::udp((B.ipv4, 4000), (A.ipv4, 53));
    let backend = (REMOTE, 8080);
    let translated = key(&A, backend, 4000, 6);
    let answer = Packet::tcp(backend, (A.ipv4, 4000), SYN_ACK);
    // To the node's stack, without its tag.
    let returns = |name, packet: &Packet| {
        fixture(name, hook, &on(A, packet.clone()))
            .gives(tc::NEXT)
            .leaves(&to(A, packet.clone()))
            .counts(A.id, Ingress, HostReturn)
    };
    let part = |offset| Packet::udp(backend, (A.ipv4, 4000)).payload(64).fragment(9, offset, true);
    let datagram = fragment_key(&A, backend.0, A.ipv4, 9);

    let mut all = refused_from_fabric(hook);
    all.extend([
        fixture("the node's own traffic", hook, &to(A, syn((REMOTE, 1), server)).macs(GATEWAY_MAC, NODE_MAC))
            .gives(tc::NEXT)
            .counts(NO_POD, Ingress, Untagged),
        fixture("tagged for its priority only", hook, &to(A, syn((REMOTE, 1), server)).vlan(0xe000))
            .gives(tc::NEXT)
            .counts(NO_POD, Ingress, Untagged),
        into("a request from elsewhere (L1, L7)", A, syn((REMOTE, 1), server)).forgets(key(
            &A,
            (REMOTE, 1),
            80,
            6,
        )),
        into("with payload and options", A, syn((REMOTE, 1), server).options(3).payload(900)),
        into("to a pod with the parent's MAC on the wire", C, syn((REMOTE, 1), (C.ipv4, 80))),
        into("ARP", A, Packet::arp(1, GATEWAY_MAC, GATEWAY, A.ipv4)),
        into("an echo", A, Packet::icmp(0, REMOTE, A.ipv4, 7)),
        into("any protocol", A, Packet::ipv4(REMOTE, A.ipv4, 50, &[0; 30])),
        into(
            "padding behind the packet",
            A,
            Packet::ipv4(REMOTE, A.ipv4, 50, &[0; 30]).ip(|ip| ip.total_len = Some(30)),
        ),
        fixture(
            "ARP to everybody",
            hook,
            &Packet::arp(1, GATEWAY_MAC, GATEWAY, A.ipv4).macs(GATEWAY_MAC, BROADCAST).vlan(A.vid),
        )
        .gives(tc::REDIRECT)
        .leaves(&Packet::arp(1, GATEWAY_MAC, GATEWAY, A.ipv4).macs(GATEWAY_MAC, BROADCAST))
        .counts(A.id, Ingress, Wire),
        fixture(
            "priority bits beside the VLAN id",
            hook,
            &to(A, syn((REMOTE, 1), server)).vlan(0xf000 | A.vid),
        )
        .gives(tc::REDIRECT)
        .leaves(&to(A, syn((REMOTE, 1), server)))
        .counts(A.id, Ingress, Wire),
        // As the kernel delivers it: the tag beside the frame.
        fixture("a tag beside the frame", hook, &to(A, syn((REMOTE, 1), server)))
            .beside(TPID_8021Q, 0xe000 | A.vid)
            .gives(tc::REDIRECT)
            .leaves(&to(A, syn((REMOTE, 1), server)))
            .counts(A.id, Ingress, Wire),
        fixture("an 802.1ad tag beside the frame", hook, &to(A, syn((REMOTE, 1), server)))
            .beside(TPID_8021AD, A.vid)
            .dropped()
            .counts(NO_POD, Ingress, DoubleTag),
        fixture("a tag beside the frame and one inside", hook, &to(A, syn((REMOTE, 1), server)).vlan(B.vid))
            .beside(TPID_8021Q, A.vid)
            .dropped()
            .counts(NO_POD, Ingress, DoubleTag),
        fixture(
            "segments count one by one",
            hook,
            &on(A, Packet::tcp((REMOTE, 1), server, ACK).payload(2896)),
        )
        .gso(1448, 2)
        .gives(tc::REDIRECT)
        .leaves(&to(A, Packet::tcp((REMOTE, 1), server, ACK).payload(2896)))
        .counts(A.id, Ingress, Wire),
        // L2 and L4: replies would take another door.
        into("a local pod by a load balancer (L2)", A, syn((B.ipv4, 4000), server))
            .counts(A.id, Ingress, FlowRemembered)
            .remembers(from_b, Door::Wire, Origin::Inbound),
        into("the node by a load balancer (L4)", A, syn((NODE, 4000), server))
            .counts(A.id, Ingress, FlowRemembered)
            .remembers(key(&A, (NODE, 4000), 80, 6), Door::Wire, Origin::Inbound),
        into("the same flow goes on", A, Packet::tcp((B.ipv4, 4000), server, ACK))
            .knowing(from_b, Door::Wire, Origin::Inbound, MONOTONIC_HOUR)
            .keeps(from_b, Door::Wire, Origin::Inbound),
        into("in the middle, its memory gone", A, Packet::tcp((B.ipv4, 4000), server, ACK))
            .counts(A.id, Ingress, FlowRelearned)
            .remembers(from_b, Door::Wire, Origin::Inbound),
        into("a new request by another door than before", A, syn((B.ipv4, 4000), server))
            .knowing(from_b, Door::Host, Origin::Inbound, 0)
            .counts(A.id, Ingress, FlowRemembered)
            .remembers(from_b, Door::Wire, Origin::Inbound),
        into("in the middle of one that has another door", A, Packet::tcp((B.ipv4, 4000), server, ACK))
            .knowing(from_b, Door::Host, Origin::Inbound, 50)
            .keeps(from_b, Door::Host, Origin::Inbound),
        into("a new request by the default door", A, syn((REMOTE, 4000), server))
            .knowing(key(&A, (REMOTE, 4000), 80, 6), Door::Host, Origin::Inbound, 0)
            .forgets(key(&A, (REMOTE, 4000), 80, 6)),
        into("UDP, remembered a moment ago", A, asked_b())
            .knowing(udp_from_b, Door::Wire, Origin::Inbound, 5)
            .keeps(udp_from_b, Door::Wire, Origin::Inbound),
        into("UDP, remembered a while ago", A, asked_b())
            .knowing(udp_from_b, Door::Wire, Origin::Inbound, Flow::REFRESH + 10)
            .remembers(udp_from_b, Door::Wire, Origin::Inbound),
        into("UDP, remembered too long ago", A, asked_b())
            .knowing(udp_from_b, Door::Host, Origin::Inbound, Flow::IDLE + 10)
            .counts(A.id, Ingress, FlowRemembered)
            .remembers(udp_from_b, Door::Wire, Origin::Inbound),
        into(
            "an error is no request",
            A,
            Packet::icmp_error(3, B.ipv4, A.ipv4, &Packet::udp((A.ipv4, 53), (B.ipv4, 4000))),
        )
        .forgets(udp_from_b),
        into("a later fragment is no request", A, asked_b().payload(16).fragment(9, 5, false))
            .forgets(udp_from_b),
        // What the node's stack translated.
        returns("the answer to what the node had translated", &answer)
            .knowing(translated, Door::Host, Origin::HostForwarded, MONOTONIC_HOUR)
            .keeps(translated, Door::Host, Origin::HostForwarded),
        fixture("the same with the tag beside the frame", hook, &to(A, answer.clone()))
            .beside(TPID_8021Q, A.vid)
            .knowing(translated, Door::Host, Origin::HostForwarded, MONOTONIC_HOUR)
            .gives(tc::NEXT)
            .counts(A.id, Ingress, HostReturn),
        returns(
            "an error about what the node had translated",
            &Packet::icmp_error(3, REMOTE, A.ipv4, &Packet::tcp((A.ipv4, 4000), backend, ACK)),
        )
        .knowing(translated, Door::Host, Origin::HostForwarded, 0),
        returns(
            "the same from a router on the way",
            &Packet::icmp_error(3, GATEWAY, A.ipv4, &Packet::tcp((A.ipv4, 4000), backend, ACK)),
        )
        .knowing(translated, Door::Host, Origin::HostForwarded, 0),
        into("a request is no answer", A, syn(backend, (A.ipv4, 4000)))
            .knowing(translated, Door::Host, Origin::HostForwarded, 0)
            .forgets(translated),
        returns("the first fragment of an answer", &part(0))
            .knowing(key(&A, backend, 4000, 17), Door::Host, Origin::HostForwarded, 0)
            .remembers_fragment(datagram, Some(Door::Host)),
        returns("a later fragment of an answer", &part(5)).knowing_fragment(datagram, Door::Host),
        into("a later fragment without a first one", A, part(5)).remembers_fragment(datagram, None),
        into("a first fragment in place of an older datagram's", A, part(0))
            .knowing_fragment(datagram, Door::Host)
            .remembers_fragment(datagram, Some(Door::Wire)),
    ]);
    all
}

/// `eni_xdp` in mode guard: it drops what `eni_ingress` would drop, and passes the rest without counting.
fn eni_xdp_guard() -> Vec<Fixture> {
    let hook = Hook::EniXdp;
    let pass = |name, packet: Packet| fixture(name, hook, &packet.macs(GATEWAY_MAC, A.mac)).gives(xdp::PASS);
    let mut all = refused_from_fabric(hook);
    all.extend([
        pass("the node's own traffic", Packet::tcp((REMOTE, 1), (NODE, 22), ACK)),
        pass("a request", Packet::tcp((REMOTE, 1), (A.ipv4, 80), SYN).vlan(A.vid)),
        pass("UDP", Packet::udp((REMOTE, 1), (A.ipv4, 80)).vlan(A.vid)),
        pass(
            "a local pod by a load balancer, left to tc to remember",
            Packet::udp((B.ipv4, 1), (A.ipv4, 80)).vlan(A.vid),
        )
        .forgets(key(&A, (B.ipv4, 1), 80, 17)),
        pass("ARP", Packet::arp(1, GATEWAY_MAC, GATEWAY, A.ipv4).vlan(A.vid)),
    ]);
    all
}

/// `eni_xdp` in mode redirect: what is whole and not TCP goes into the pod at once.
fn eni_xdp_redirect() -> Vec<Fixture> {
    let hook = Hook::EniXdp;
    let on = |pod: Endpoint, packet: Packet| packet.macs(GATEWAY_MAC, pod.wire_mac).vlan(pod.vid);
    let into = |name, pod: Endpoint, packet: Packet| {
        fixture(name, hook, &on(pod, packet.clone()))
            .gives(xdp::REDIRECT)
            .leaves(&packet.macs(GATEWAY_MAC, pod.mac))
            .counts(pod.id, Ingress, Wire)
    };
    let pass = |name, packet: Packet| fixture(name, hook, &on(A, packet)).gives(xdp::PASS);
    let udp = Packet::udp((REMOTE, 53), (A.ipv4, 4000)).payload(40);
    let translated = key(&A, (REMOTE, 53), 4000, 17);
    let mut all = refused_from_fabric(hook);
    all.extend([
        into("UDP", A, udp.clone()),
        into("UDP to a pod with the parent's MAC on the wire", C, Packet::udp((REMOTE, 1), (C.ipv4, 80))),
        into("an echo", A, Packet::icmp(0, REMOTE, A.ipv4, 7)),
        into("a local pod by a load balancer", A, Packet::udp((B.ipv4, 1), (A.ipv4, 80)))
            .counts(A.id, Ingress, FlowRemembered)
            .remembers(key(&A, (B.ipv4, 1), 80, 17), Door::Wire, Origin::Inbound),
        pass("TCP, which tc carries better", Packet::tcp((REMOTE, 1), (A.ipv4, 80), SYN)),
        pass("a fragment", udp.clone().fragment(1, 0, true)),
        pass("the answer to what the node had translated, left to tc", udp).knowing(
            translated,
            Door::Host,
            Origin::HostForwarded,
            0,
        ),
        pass("ARP", Packet::arp(1, GATEWAY_MAC, GATEWAY, A.ipv4)),
        fixture(
            "the node's own traffic",
            hook,
            &Packet::udp((REMOTE, 1), (NODE, 53)).macs(GATEWAY_MAC, NODE_MAC),
        )
        .gives(xdp::PASS),
    ]);
    all
}

// ---- From a pod.

fn pod_egress_common() -> Vec<Fixture> {
    let hook = Hook::PodEgress;
    let sent = |packet: Packet| packet.macs(A.mac, GATEWAY_MAC);
    let from_a = |name, packet: Packet| fixture(name, hook, &sent(packet)).at(A.ifindex);
    let drop = |name, packet, reason| from_a(name, packet).dropped().counts(A.id, Egress, reason);
    let wire = |name, packet: Packet| {
        from_a(name, packet.clone())
            .gives(tc::REDIRECT)
            .leaves(&packet.macs(A.wire_mac, GATEWAY_MAC))
            .leaves_tagged(A.vid)
            .counts(A.id, Egress, Wire)
    };
    let host = |name, packet| from_a(name, packet).gives(tc::NEXT).counts(A.id, Egress, Host);
    let answered = |name, asker| {
        let answer = Packet::arp(2, GATEWAY_MAC, GATEWAY, asker);
        let answer = Packet { rest: with_target_mac(&answer.rest, A.mac), ..answer };
        from_a(name, Packet::arp(1, A.mac, asker, GATEWAY).macs(A.mac, BROADCAST))
            .gives(tc::REDIRECT)
            .leaves(&answer.macs(GATEWAY_MAC, A.mac))
            .counts(A.id, Egress, ArpAnswered)
    };
    let wire_arp = |name, packet: Packet, dst: [u8; 6]| {
        fixture(name, hook, &packet.clone().macs(A.mac, dst))
            .at(A.ifindex)
            .gives(tc::REDIRECT)
            .leaves(&packet.macs(A.wire_mac, dst))
            .leaves_tagged(A.vid)
            .counts(A.id, Egress, WireArp)
    };
    let host_service = |name, packet| Fixture {
        mark: SERVICE_MARK,
        ..from_a(name, packet).gives(tc::NEXT).counts(A.id, Egress, HostService)
    };
    let tcp = |dst: Socket| Packet::tcp((A.ipv4, 4000), dst, SYN);
    let udp = |dst: Socket| Packet::udp((A.ipv4, 4000), dst);
    let reply = |dst: Socket| Packet::tcp((A.ipv4, 80), dst, SYN_ACK);
    let part =
        |dst: [u8; 4], offset| Packet::udp((A.ipv4, 53), (dst, 53)).payload(64).fragment(9, offset, true);
    let to_service = fragment_key(&A, A.ipv4, SERVICE, 9);
    let from_client = key(&A, CLIENT, 80, 6);
    vec![
        fixture("an interface without a record", hook, &sent(tcp((REMOTE, 80))))
            .at(1)
            .dropped()
            .counts(NO_POD, Egress, UnknownPod),
        drop("ports cut off", Packet::ipv4(A.ipv4, REMOTE, 6, &[0; 19]), Truncated),
        drop("ARP cut off", Packet::raw(0x0806, &[0; 27]), Truncated),
        drop(
            "a header that contradicts itself",
            tcp((REMOTE, 80)).ip(|ip| ip.total_len = Some(39)).options(5),
            BadIpv4Header,
        ),
        drop("no length at all", tcp((REMOTE, 80)).ip(|ip| ip.total_len = Some(0)), BadIpv4Header),
        drop("a tag", tcp((REMOTE, 80)).vlan(B.vid), TaggedByPod),
        drop("its own tag", tcp((REMOTE, 80)).vlan(A.vid), TaggedByPod),
        drop("a priority tag", tcp((REMOTE, 80)).vlan(0), TaggedByPod),
        drop("two tags", tcp((REMOTE, 80)).vlan(1).vlan(2), TaggedByPod),
        drop("an 802.1ad tag", tcp((REMOTE, 80)).tag(TPID_8021AD, 1), TaggedByPod),
        drop("a tag beside the frame", tcp((REMOTE, 80)), TaggedByPod).beside(TPID_8021Q, B.vid),
        drop("a priority tag beside the frame", tcp((REMOTE, 80)), TaggedByPod).beside(TPID_8021Q, 0xe000),
        fixture("another pod's MAC", hook, &tcp((REMOTE, 80)).macs(B.mac, GATEWAY_MAC))
            .at(A.ifindex)
            .dropped()
            .counts(A.id, Egress, SourceMac),
        fixture("nobody's MAC", hook, &Packet::arp(1, A.mac, A.ipv4, GATEWAY).macs(STRANGER, BROADCAST))
            .at(A.ifindex)
            .dropped()
            .counts(A.id, Egress, SourceMac),
        drop("another pod's address", Packet::tcp((B.ipv4, 4000), (REMOTE, 80), SYN), SourceAddress),
        drop("no address, for DHCP", Packet::udp(([0; 4], 68), ([255; 4], 67)), SourceAddress),
        drop("ARP in another's name", Packet::arp(2, A.mac, GATEWAY, B.ipv4), ArpSpoof),
        drop("ARP with another's MAC", Packet::arp(2, B.mac, A.ipv4, B.ipv4), ArpSpoof),
        drop("ARP of an unknown kind", Packet::arp(4, A.mac, A.ipv4, B.ipv4), ArpSpoof),
        drop("a DHCP server", Packet::udp((A.ipv4, 67), (B.ipv4, 68)), DhcpServer),
        drop("a router", Packet::icmp(9, A.ipv4, B.ipv4, 0), RouterAdvertisement),
        drop("a redirect", Packet::icmp(5, A.ipv4, B.ipv4, 0), IcmpRedirect),
        drop("multicast", udp(([224, 0, 0, 251], 5353)), Multicast),
        drop("broadcast", udp(([255; 4], 67)), Multicast),
        drop("the metadata service", tcp((METADATA, 80)), DeniedDestination),
        drop("a fragment to the metadata service", part(METADATA, 5), DeniedDestination),
        drop("IPv6", Packet::ipv6(6, &[0; 20]), Ipv6),
        drop("router solicitation", Packet::ipv6(58, &[133, 0, 0, 0]), Ipv6Discovery),
        drop("IPX", Packet::raw(0x8137, &[0xff; 30]), UnknownEthertype),
        answered("ARP for the gateway", A.ipv4),
        answered("ARP for the gateway before it has an address", [0; 4]),
        wire_arp("ARP for a neighbour", Packet::arp(1, A.mac, A.ipv4, REMOTE), BROADCAST),
        wire_arp("an answer to the gateway", Packet::arp(2, A.mac, A.ipv4, GATEWAY), GATEWAY_MAC),
        wire("another node's pod", tcp((REMOTE, 80))),
        wire("the internet", tcp(CLIENT)),
        wire("a load balancer", tcp((VIP, 80))),
        wire("a load balancer within the node's prefix", tcp((VIP_IN_SERVICES, 80))),
        wire("itself, by its address", tcp((A.ipv4, 80))),
        wire("an echo", Packet::icmp(8, A.ipv4, REMOTE, 7)),
        wire("any protocol", Packet::ipv4(A.ipv4, REMOTE, 132, &[0; 40])),
        wire("a fragment", part(REMOTE, 0)),
        wire("a later fragment", part(REMOTE, 5)),
        wire("a later fragment to a local pod, without a first one", part(B.ipv4, 5)),
        wire("a later fragment to the node, without a first one", part(SERVICE, 5)),
        wire("to the gateway's MAC whatever the pod said", tcp((REMOTE, 80)).macs(A.mac, STRANGER))
            .sent_to(STRANGER),
        wire("segments count one by one", Packet::tcp((A.ipv4, 1), (REMOTE, 2), ACK).payload(3000))
            .gso(1000, 3),
        host("the node", tcp((NODE, 10_250))),
        host_service("a Service", tcp((SERVICE, 443))),
        host_service("another port of a load balancer within the node's prefix", tcp((VIP_IN_SERVICES, 443))),
        host_service(
            "another protocol of a load balancer within the node's prefix",
            udp((VIP_IN_SERVICES, 80)),
        ),
        host_service("a first fragment to a Service", part(SERVICE, 0))
            .remembers_fragment(to_service, Some(Door::Host)),
        host("a later fragment to a Service", part(SERVICE, 5)).knowing_fragment(to_service, Door::Host),
        host("a later fragment of a reply", part(CLIENT.0, 5))
            .knowing_fragment(fragment_key(&A, A.ipv4, CLIENT.0, 9), Door::Host),
        host("the reply to a NodePort's client (L8)", reply(CLIENT))
            .knowing(from_client, Door::Host, Origin::Inbound, MONOTONIC_HOUR)
            .keeps(from_client, Door::Host, Origin::Inbound),
        wire("the reply to a local pod's request by a load balancer (L2)", reply((B.ipv4, 4000))).knowing(
            key(&A, (B.ipv4, 4000), 80, 6),
            Door::Wire,
            Origin::Inbound,
            MONOTONIC_HOUR,
        ),
        wire("the reply to the node's request by a load balancer (L4)", reply((NODE, 4000))).knowing(
            key(&A, (NODE, 4000), 80, 6),
            Door::Wire,
            Origin::Inbound,
            0,
        ),
        host("another request of the node's", reply((NODE, 4001))).knowing(
            key(&A, (NODE, 4000), 80, 6),
            Door::Wire,
            Origin::Inbound,
            0,
        ),
        wire("a request like one that the node had translated", tcp(CLIENT)).knowing(
            key(&A, CLIENT, 4000, 6),
            Door::Host,
            Origin::HostForwarded,
            0,
        ),
        host("UDP, a reply a while later", Packet::udp((A.ipv4, 53), CLIENT))
            .knowing(key(&A, CLIENT, 53, 17), Door::Host, Origin::Inbound, Flow::REFRESH + 10)
            .remembers(key(&A, CLIENT, 53, 17), Door::Host, Origin::Inbound),
        wire("UDP, a reply too late", Packet::udp((A.ipv4, 53), CLIENT)).knowing(
            key(&A, CLIENT, 53, 17),
            Door::Host,
            Origin::Inbound,
            Flow::IDLE + 10,
        ),
        host(
            "an error about a NodePort's client",
            Packet::icmp_error(3, A.ipv4, CLIENT.0, &Packet::udp(CLIENT, (A.ipv4, 53))),
        )
        .knowing(key(&A, CLIENT, 53, 17), Door::Host, Origin::Inbound, 0),
        // The pod's MAC on the wire is another one.
        fixture(
            "from a pod with the parent's MAC on the wire",
            hook,
            &Packet::udp((C.ipv4, 1), (REMOTE, 2)).macs(C.mac, GATEWAY_MAC),
        )
        .at(C.ifindex)
        .gives(tc::REDIRECT)
        .leaves(&Packet::udp((C.ipv4, 1), (REMOTE, 2)).macs(NODE_MAC, GATEWAY_MAC))
        .leaves_tagged(C.vid)
        .counts(C.id, Egress, Wire),
        fixture(
            "from a pod of another parent",
            hook,
            &Packet::udp((D.ipv4, 1), (REMOTE, 2)).macs(D.mac, GATEWAY_MAC),
        )
        .at(D.ifindex)
        .gives(tc::REDIRECT)
        .leaves_tagged(D.vid)
        .counts(D.id, Egress, Wire),
    ]
}

impl Fixture {
    /// The destination MAC that the sender wrote.
    fn sent_to(mut self, mac: [u8; 6]) -> Self {
        self.packet[..6].copy_from_slice(&mac);
        self
    }
}

fn with_target_mac(arp: &[u8], mac: [u8; 6]) -> Vec<u8> {
    const TARGET_MAC: usize = 18;
    let mut arp = arp.to_vec();
    arp[TARGET_MAC..TARGET_MAC + 6].copy_from_slice(&mac);
    arp
}

fn pod_egress_fast_path() -> Vec<Fixture> {
    let hook = Hook::PodEgress;
    let from_a =
        |name, packet: &Packet| fixture(name, hook, &packet.clone().macs(A.mac, GATEWAY_MAC)).at(A.ifindex);
    let local = |name, to: Endpoint, packet: &Packet| {
        from_a(name, packet)
            .gives(tc::REDIRECT)
            .leaves(&packet.clone().macs(to.gateway_mac, to.mac))
            .counts(A.id, Egress, Local)
            .counts(to.id, Ingress, Local)
    };
    let too_big = |name, packet: &Packet| {
        from_a(name, packet).gives(tc::REDIRECT).leaves_tagged(A.vid).counts(A.id, Egress, Wire).counts(
            A.id,
            Egress,
            TooBigForLocal,
        )
    };
    let to = |pod: Endpoint| Packet::tcp((A.ipv4, 4000), (pod.ipv4, 80), SYN);
    let part = |offset| Packet::udp((A.ipv4, 53), (B.ipv4, 53)).payload(64).fragment(9, offset, true);
    let datagram = fragment_key(&A, A.ipv4, B.ipv4, 9);
    let from_a_key = key(&B, (A.ipv4, 4000), 80, 6);
    vec![
        local("a pod of this node", B, &to(B)),
        local("a pod of this node on another parent", D, &to(D)),
        local("a pod with another MAC on the wire", C, &to(C)),
        local("as large as the destination takes", C, &to(C).payload(1360)),
        too_big("larger than the destination takes", &to(C).payload(1361)),
        local("segments as large as the destination takes", C, &to(C).payload(2720)).gso(1360, 2),
        too_big("segments larger than the destination takes", &to(C).payload(2722)).gso(1361, 2),
        local("a new request forgets how the last one came", B, &to(B))
            .knowing(from_a_key, Door::Wire, Origin::Inbound, 0)
            .forgets(from_a_key),
        local("a first fragment", B, &part(0)).remembers_fragment(datagram, Some(Door::Local)),
        local("a later fragment", B, &part(5)).knowing_fragment(datagram, Door::Local),
        from_a("a first fragment in place of an older datagram's", &part(0))
            .knowing_fragment(datagram, Door::Local)
            .knowing(key(&A, (B.ipv4, 53), 53, 17), Door::Wire, Origin::Inbound, 0)
            .gives(tc::REDIRECT)
            .leaves_tagged(A.vid)
            .counts(A.id, Egress, Wire)
            .remembers_fragment(datagram, Some(Door::Wire)),
    ]
}

/// [`judged_node`]: A is a client, B a server, C and D are open towards each other.
fn pod_egress_by_groups() -> Vec<Fixture> {
    let from = |name, pod: &Endpoint, packet: &Packet| {
        fixture(name, Hook::PodEgress, &packet.clone().macs(pod.mac, GATEWAY_MAC)).at(pod.ifindex)
    };
    let fast = |name, pod: &Endpoint, to: &Endpoint, packet: &Packet| {
        from(name, pod, packet)
            .gives(tc::REDIRECT)
            .leaves(&packet.clone().macs(to.gateway_mac, to.mac))
            .counts(pod.id, Egress, Local)
            .counts(to.id, Ingress, Local)
    };
    let wire = |name, pod: &Endpoint, packet: &Packet, why| {
        from(name, pod, packet)
            .gives(tc::REDIRECT)
            .leaves_tagged(pod.vid)
            .counts(pod.id, Egress, Wire)
            .counts(pod.id, Egress, why)
    };
    let (client, server) = ((A.ipv4, 4000), (B.ipv4, 80));
    let ask = |flags| Packet::tcp(client, server, flags);
    let answer = |flags| Packet::tcp(server, client, flags);
    let pair =
        PairKey { low: A.id, high: B.id, low_port: 4000, high_port: 80, proto: 6, query: 0, pad: [0; 2] };
    let flow = |epoch| Admitted { epoch, seen: now(), opener: A.id, state: 1, code: 0, pad: [0; 2] };
    let other = PairKey { high_port: 81, ..pair };
    vec![
        fast("all is allowed", &C, &D, &Packet::tcp((C.ipv4, 1), (D.ipv4, 2), SYN)),
        fast("a first packet that is allowed", &A, &B, &ask(SYN)).counts(A.id, Egress, FlowAdmitted),
        fast("without state, but allowed", &A, &B, &ask(ACK)).counts(A.id, Egress, FlowReadmitted),
        fast("an answer of a flow that is allowed", &B, &A, &answer(ACK)).admitted(pair, flow(2)),
        fast("by other rules, but allowed still", &B, &A, &answer(ACK)).admitted(pair, flow(1)),
        wire(
            "by other rules, and not allowed any more",
            &B,
            &Packet::tcp((B.ipv4, 81), client, ACK),
            PolicyRevoked,
        )
        .admitted(other, flow(1)),
        wire("an answer without a flow", &B, &answer(ACK), PolicyNoFlow),
        wire("a first packet that is not allowed", &B, &answer(SYN), PolicyRefused),
        wire("nothing is allowed", &A, &Packet::udp(client, (C.ipv4, 80)), PolicyRefused),
    ]
}

/// As [`pod_egress_by_groups`], only observed, and B cannot be judged.
fn pod_egress_observed() -> Vec<Fixture> {
    let fast = |name, pod: &Endpoint, to: &Endpoint, port, would| {
        let packet = Packet::tcp((pod.ipv4, 4000), (to.ipv4, port), SYN);
        fixture(name, Hook::PodEgress, &packet.clone().macs(pod.mac, GATEWAY_MAC))
            .at(pod.ifindex)
            .gives(tc::REDIRECT)
            .leaves(&packet.macs(to.gateway_mac, to.mac))
            .counts(pod.id, Egress, Local)
            .counts(pod.id, Egress, would)
            .counts(to.id, Ingress, Local)
    };
    vec![
        fast("would be fast", &C, &D, 80, WouldFast),
        fast("would be refused", &A, &D, 80, WouldRefuse),
        fast("would be left to the VPC", &A, &B, 80, WouldWire),
    ]
}

fn pod_egress_hairpin() -> Vec<Fixture> {
    let packet = Packet::tcp((A.ipv4, 4000), (B.ipv4, 80), SYN).macs(A.mac, GATEWAY_MAC);
    vec![
        fixture("a pod of this node, without the fast path", Hook::PodEgress, &packet)
            .at(A.ifindex)
            .gives(tc::REDIRECT)
            .leaves_tagged(A.vid)
            .counts(A.id, Egress, Wire),
    ]
}

// ---- From the node's stack.

fn pod_ingress() -> Vec<Fixture> {
    let hook = Hook::PodIngress;
    let to_a = |name, packet: Packet| fixture(name, hook, &packet.macs(NODE_MAC, A.mac)).at(A.ifindex);
    let drop = |name, packet, reason| to_a(name, packet).dropped().counts(A.id, Ingress, reason);
    let pass = |name, packet| to_a(name, packet).gives(tc::NEXT).counts(A.id, Ingress, Host);
    let server = (A.ipv4, 80);
    let from_client = key(&A, CLIENT, 80, 6);
    let from_node = key(&A, (NODE, 4000), 80, 6);
    vec![
        fixture("an interface without a record", hook, &Packet::udp((NODE, 1), server).macs(NODE_MAC, A.mac))
            .at(1)
            .dropped()
            .counts(NO_POD, Ingress, UnknownPod),
        drop("another's address", Packet::udp((NODE, 1), (B.ipv4, 2)), WrongAddress),
        drop("ports cut off", Packet::ipv4(NODE, A.ipv4, 17, &[0; 7]), Truncated),
        drop("a header that contradicts itself", Packet::raw(0x0800, &[0; 40]), BadIpv4Header),
        drop("ARP for another", Packet::arp(1, NODE_MAC, NODE, B.ipv4), ArpNotForPod),
        drop("ARP of an unknown kind", Packet::arp(9, NODE_MAC, NODE, A.ipv4), ArpSpoof),
        drop("two tags", Packet::udp((NODE, 1), server).vlan(1).vlan(2), DoubleTag),
        drop("IPv6", Packet::ipv6(17, &[0; 20]), Ipv6),
        drop("neighbour solicitation", Packet::ipv6(58, &[135; 24]), Ipv6Discovery),
        drop("LLDP", Packet::raw(0x88cc, &[0; 30]), UnknownEthertype),
        pass("a probe", Packet::tcp((NODE, 4000), server, SYN)).forgets(from_node),
        pass("ARP", Packet::arp(1, NODE_MAC, NODE, A.ipv4)),
        pass("a Service's answer", Packet::tcp((SERVICE, 443), (A.ipv4, 4000), SYN_ACK)),
        pass("a NodePort's client (L8)", Packet::tcp(CLIENT, server, SYN))
            .counts(A.id, Ingress, FlowRemembered)
            .remembers(from_client, Door::Host, Origin::Inbound),
        pass("a local pod that kube-proxy translated", Packet::udp((B.ipv4, 1), (A.ipv4, 53)))
            .counts(A.id, Ingress, FlowRemembered)
            .remembers(key(&A, (B.ipv4, 1), 53, 17), Door::Host, Origin::Inbound),
        pass("in the middle, its memory gone", Packet::tcp(CLIENT, server, ACK))
            .counts(A.id, Ingress, FlowRelearned)
            .remembers(from_client, Door::Host, Origin::Inbound),
        pass("a probe by the port of a request by a load balancer", Packet::tcp((NODE, 4000), server, SYN))
            .knowing(from_node, Door::Wire, Origin::Inbound, 0)
            .forgets(from_node),
    ]
}

fn eni_egress() -> Vec<Fixture> {
    let hook = Hook::EniEgress;
    let alone = |name, packet: Packet| fixture(name, hook, &packet.macs(NODE_MAC, STRANGER)).gives(tc::NEXT);
    let tagged = |name, pod: Endpoint, packet: Packet| {
        fixture(name, hook, &packet.clone().macs(NODE_MAC, STRANGER))
            .gives(if pod.parent_ifindex == PARENT_IFINDEX { tc::NEXT } else { tc::REDIRECT })
            .leaves(&packet.macs(pod.wire_mac, GATEWAY_MAC))
            .leaves_tagged(pod.vid)
            .counts(pod.id, Egress, Wire)
    };
    let request = |dst| Packet::tcp((A.ipv4, 4000), dst, SYN);
    let to_remote = key(&A, (REMOTE, 80), 4000, 6);
    let udp_to_remote = key(&A, (REMOTE, 53), 4000, 17);
    vec![
        alone("the node's own traffic", Packet::tcp((NODE, 1), (REMOTE, 2), SYN)),
        alone("what cannot be read", Packet::ipv4(A.ipv4, REMOTE, 17, &[0; 7])),
        alone("ARP", Packet::arp(1, NODE_MAC, A.ipv4, GATEWAY)),
        alone("IPv6", Packet::ipv6(58, &[135; 24])),
        alone("a tag inside", request((REMOTE, 80)).vlan(7)),
        alone("what pod_egress has sent", request((REMOTE, 80))).beside(TPID_8021Q, A.vid).forgets(to_remote),
        tagged("a pod's request that the node translated", A, request((REMOTE, 80))).remembers(
            to_remote,
            Door::Host,
            Origin::HostForwarded,
        ),
        tagged("once more", A, request((REMOTE, 80)))
            .knowing(to_remote, Door::Host, Origin::HostForwarded, MONOTONIC_HOUR)
            .keeps(to_remote, Door::Host, Origin::HostForwarded),
        tagged("UDP, a while later", A, Packet::udp((A.ipv4, 4000), (REMOTE, 53)))
            .knowing(udp_to_remote, Door::Host, Origin::HostForwarded, Flow::REFRESH + 10)
            .remembers(udp_to_remote, Door::Host, Origin::HostForwarded),
        tagged("UDP, much later", A, Packet::udp((A.ipv4, 4000), (REMOTE, 53)))
            .knowing(udp_to_remote, Door::Host, Origin::Inbound, Flow::IDLE + 10)
            .remembers(udp_to_remote, Door::Host, Origin::HostForwarded),
        tagged("a pod's answer", A, Packet::tcp((A.ipv4, 80), CLIENT, SYN_ACK))
            .knowing(key(&A, CLIENT, 80, 6), Door::Host, Origin::Inbound, 0)
            .keeps(key(&A, CLIENT, 80, 6), Door::Host, Origin::Inbound),
        tagged(
            "a later fragment",
            A,
            Packet::udp((A.ipv4, 4000), (REMOTE, 53)).payload(8).fragment(1, 9, false),
        )
        .forgets(udp_to_remote),
        tagged("a pod with the parent's MAC on the wire", C, Packet::udp((C.ipv4, 1), (REMOTE, 2))),
        tagged("a pod of another parent moves there", D, Packet::udp((D.ipv4, 1), (REMOTE, 2))),
    ]
}

// ---- Limits of bandwidth.

/// Limits so low that what is used up stays so for the time of a test.
fn limit(pace: u64) -> Bandwidth {
    let bucket = Bucket::new(1000, 70_000);
    Bandwidth { ingress: bucket, egress: bucket, pace }
}

/// A and C may send and receive at a limit; C has a queue on its parent.
fn limited_node() -> MemoryTables {
    let mut node = node();
    node.limit(A.id, limit(0));
    node.limit(C.id, limit(1_000_000));
    node
}

/// The same, with nothing left but the reserve.
fn used_up_node() -> MemoryTables {
    let mut node = limited_node();
    for id in [A.id, C.id] {
        // Minutes beyond the burst, and minutes before the end of the reserve: all of it is asked within that time.
        node.spend(
            id,
            nanos() + limit(1_000_000).egress.depth + Bucket::new(1000, Bucket::RESERVE / 2).depth,
        );
    }
    node
}

/// What pods send and receive that have a limit, and are within it or beyond.
fn limited(within: bool) -> Vec<Fixture> {
    let send = |name, pod: Endpoint, dst: Socket| {
        fixture(name, Hook::PodEgress, &Packet::udp((pod.ipv4, 4000), dst).macs(pod.mac, GATEWAY_MAC))
            .at(pod.ifindex)
    };
    let to_a = |src: Socket| Packet::udp(src, (A.ipv4, 4000));
    let wire = |name, pod: Endpoint, beyond: Outcome| {
        let it = send(name, pod, (REMOTE, 53));
        if !within {
            return it.dropped().counts(pod.id, Egress, beyond);
        }
        it.gives(tc::REDIRECT).leaves_tagged(pod.vid).counts(pod.id, Egress, Wire)
    };
    let local = |name, from: Endpoint, to: Endpoint, beyond: Outcome| {
        let it = send(name, from, (to.ipv4, 53));
        if within {
            let leaves = Packet::udp((from.ipv4, 4000), (to.ipv4, 53)).macs(GATEWAY_MAC, to.mac);
            let it = it.gives(tc::REDIRECT).leaves(&leaves);
            it.counts(from.id, Egress, Local).counts(to.id, Ingress, Local)
        } else {
            let it = it.dropped().counts(from.id, Egress, beyond);
            if beyond == IngressLimit { it.counts(to.id, Ingress, beyond) } else { it }
        }
    };
    let receive = |it: Fixture, action, outcome: Outcome| {
        if within {
            it.gives(action).counts(A.id, Ingress, outcome)
        } else {
            it.dropped().counts(A.id, Ingress, IngressLimit)
        }
    };
    let from_fabric = to_a((REMOTE, 1)).macs(GATEWAY_MAC, A.wire_mac);
    let from_stack = to_a((REMOTE, 1)).macs(NODE_MAC, A.mac);
    // A client's packet by a node port, which is remembered unless it ends here.
    let mut from_stack =
        receive(fixture("from the stack", Hook::PodIngress, &from_stack).at(A.ifindex), tc::NEXT, Host);
    if within {
        from_stack = from_stack.counts(A.id, Ingress, FlowRemembered);
    }
    let own = |hook, packet: &Packet| fixture("an ENI of its own", hook, packet).at(A.ifindex);
    let sent = Packet::udp((A.ipv4, 4000), (REMOTE, 53)).macs(A.mac, GATEWAY_MAC);
    let asks = Packet::arp(1, A.mac, A.ipv4, B.ipv4);
    let probe = Packet::tcp((NODE, 1), (A.ipv4, 80), SYN);
    vec![
        wire("to the wire", A, EgressLimit),
        wire("to the wire, by a queue", C, EgressQueue),
        local("to a pod without a limit", A, B, EgressLimit),
        local("to a pod with a limit", B, A, IngressLimit),
        local("from a limit to another", A, C, EgressLimit),
        receive(
            fixture("from the wire", Hook::EniIngress, &from_fabric)
                .beside(TPID_8021Q, A.vid)
                .leaves(&from_fabric),
            tc::REDIRECT,
            Wire,
        ),
        from_stack,
        receive(own(Hook::NicIngress, &from_fabric), tc::NEXT, Wire),
        if within {
            own(Hook::NicEgress, &sent).gives(tc::NEXT).counts(A.id, Egress, Wire)
        } else {
            own(Hook::NicEgress, &sent).dropped().counts(A.id, Egress, EgressLimit)
        },
        // Used up or not.
        fixture("a probe of the node's", Hook::PodIngress, &probe.macs(NODE_MAC, A.mac))
            .at(A.ifindex)
            .gives(tc::NEXT)
            .counts(A.id, Ingress, Host),
        send("the answer to a probe", A, (NODE, 1)).gives(tc::NEXT).counts(A.id, Egress, Host),
        fixture("ARP", Hook::PodEgress, &asks.macs(A.mac, BROADCAST))
            .at(A.ifindex)
            .gives(tc::REDIRECT)
            .leaves_tagged(A.vid)
            .counts(A.id, Egress, WireArp),
        fixture(
            "ARP for it",
            Hook::EniIngress,
            &Packet::arp(1, GATEWAY_MAC, GATEWAY, A.ipv4).macs(GATEWAY_MAC, A.wire_mac),
        )
        .beside(TPID_8021Q, A.vid)
        .gives(tc::REDIRECT)
        .counts(A.id, Ingress, Wire),
        // What is refused anyway says why.
        fixture(
            "another's address",
            Hook::PodEgress,
            &Packet::udp((B.ipv4, 1), (REMOTE, 2)).macs(A.mac, GATEWAY_MAC),
        )
        .at(A.ifindex)
        .dropped()
        .counts(A.id, Egress, SourceAddress),
    ]
}

/// tc charges it.
fn limited_at_xdp() -> Fixture {
    let packet = Packet::udp((REMOTE, 1), (A.ipv4, 4000)).macs(GATEWAY_MAC, A.wire_mac).vlan(A.vid);
    fixture("UDP to a pod with a limit", Hook::EniXdp, &packet).gives(xdp::PASS)
}

// ---- Running them.

thread_local! {
    static DIFFERENCES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

fn differ(fixture: &Fixture, what: &str, expected: &str, found: &str) {
    let text = format!(
        "{} / {}: {what}\n  expected {expected}\n  found    {found}",
        fixture.hook.name(),
        fixture.name
    );
    DIFFERENCES.with_borrow_mut(|all| all.push(text));
}

fn is(flow: Flow, door: Door, origin: Origin) -> bool {
    flow.door == door as u8 && flow.origin == origin as u8 && flow.pad == [0; 2]
}

/// Runs a fixture, with nothing remembered but what it says.
fn run(programs: &mut Programs, node: &MemoryTables, fixture: &Fixture) {
    let mut remembered = node.clone();
    for (key, door, origin, age) in &fixture.flows {
        let seen = now().wrapping_sub(*age);
        remembered.flows.insert(*key, Flow { door: *door as u8, origin: *origin as u8, seen, ..FIRST });
    }
    let epoch = node.rules.epoch;
    let judged = |door| Fragment { door: door as u8, pad: [0; 3], epoch };
    remembered.fragments.extend(fixture.fragments.iter().map(|(key, door)| (*key, judged(*door))));
    remembered.pairs.extend(fixture.pairs.iter().copied());
    programs.reset(node).expect("the maps are written");
    programs.fill_memory(&remembered).expect("the maps are written");

    let (gso_size, gso_segs) = fixture.gso;
    let input =
        Input { frame: &fixture.packet, tag: fixture.beside, ifindex: fixture.ifindex, gso_size, gso_segs };
    let output = match programs.run(fixture.hook, &input) {
        Ok(output) => output,
        Err(error) => return differ(fixture, "run", "a run", &format!("{error:?}")),
    };
    if output.action != fixture.action {
        differ(fixture, "action", &fixture.action.to_string(), &output.action.to_string());
    }
    if output.mark != fixture.mark {
        differ(fixture, "mark of the packet", &fixture.mark.to_string(), &output.mark.to_string());
    }
    let expected = fixture.out.as_ref().unwrap_or(&fixture.packet);
    // Without a packet of its own, only the length is the matter where MACs are rewritten.
    let same = if fixture.out.is_some() || fixture.tag_left.is_none() {
        output.frame == *expected
    } else {
        output.frame.len() == expected.len() && output.frame[12..] == expected[12..]
    };
    if !same {
        differ(fixture, "frame", &hex(expected), &hex(&output.frame));
    }

    let bytes = fixture.packet.len() as u64;
    let packets = if gso_segs == 0 { 1 } else { u64::from(gso_segs) };
    let expected: Counts = fixture.counts.iter().map(|count| (*count, (packets, bytes))).collect();
    let counted = programs.counts(node).expect("the counters are read");
    if counted != expected {
        differ(fixture, "counters", &format!("{expected:?}"), &format!("{counted:?}"));
    }

    if let Some((key, expected)) = fixture.flow_after {
        let found = programs.maps.flow(&key).expect("the map is read");
        let known_age = fixture.flows.iter().find(|(known, ..)| *known == key).map_or(0, |known| known.3);
        let (same, age) = match (expected, found) {
            (Memory::Nothing, None) => (true, None),
            (Memory::New(door, origin), Some(flow)) => (is(flow, door, origin), Some((flow, 0))),
            (Memory::Old(door, origin), Some(flow)) => (is(flow, door, origin), Some((flow, known_age))),
            _ => (false, None),
        };
        // The clock may go on by a second meanwhile.
        let dated = age.is_none_or(|(flow, age)| now().wrapping_sub(flow.seen).abs_diff(age) <= 2);
        if !same || !dated {
            differ(fixture, "flow", &format!("{expected:?}"), &format!("{found:?} at {}", now()));
        }
        if found.is_some() && !programs.maps.marked(key.id).expect("the map is read") {
            differ(fixture, "mark", "1", "0");
        }
    }
    if let Some((key, expected)) = fixture.fragment_after {
        let found = programs.maps.fragment(&key).expect("the map is read").map(|fragment| fragment.door);
        if found != expected.map(|door| door as u8) {
            differ(fixture, "fragment", &format!("{expected:?}"), &format!("{found:?}"));
        }
    }
    if fixture.hook != Hook::EniXdp && fixture.beside.is_none() {
        let left = programs.tag_left(fixture.hook, &input).expect("the probe runs");
        if left != fixture.tag_left {
            differ(fixture, "tag beside the frame", &format!("{:?}", fixture.tag_left), &format!("{left:?}"));
        }
    }
}

fn load(fast_path: FastPath, xdp: Xdp, node: &MemoryTables) -> Programs {
    let constants = Constants { fast_path, parent: node.parent, xdp };
    let mut programs =
        Programs::load(constants, &Limits { endpoints: 32, flows: 1024 }).expect("the programs load");
    programs.fill(node).expect("the maps are written");
    programs
}

/// The interfaces that packets come from; the first is the loopback device, which serves as the parent.
const INTERFACES: [u32; 4] = [A.ifindex, B.ifindex, C.ifindex, D.ifindex];

fn pod_egress_not_judged() -> Vec<Fixture> {
    let packet = Packet::tcp((A.ipv4, 4000), (B.ipv4, 80), SYN).macs(A.mac, GATEWAY_MAC);
    vec![
        fixture("cannot be judged", Hook::PodEgress, &packet)
            .at(A.ifindex)
            .gives(tc::REDIRECT)
            .leaves_tagged(A.vid)
            .counts(A.id, Egress, Wire)
            .counts(A.id, Egress, PolicyWire),
    ]
}

fn all() -> Vec<(FastPath, Xdp, MemoryTables, Vec<Fixture>)> {
    let anywhere = || [eni_ingress(), pod_egress_common(), pod_ingress(), eni_egress()].concat();
    let mut unknown = judged_node();
    unknown.endpoints[2].policy_id = 0;
    let mut observed = unknown.clone();
    observed.endpoints.iter_mut().for_each(|pod| pod.flags = flag::OBSERVE);
    let judged = FastPath::SecurityGroups;
    vec![
        (FastPath::All, Xdp::Guard, node(), [anywhere(), pod_egress_fast_path(), eni_xdp_guard()].concat()),
        (
            FastPath::Off,
            Xdp::Redirect,
            node(),
            [anywhere(), pod_egress_hairpin(), eni_xdp_redirect()].concat(),
        ),
        (judged, Xdp::Guard, judged_node(), pod_egress_by_groups()),
        (judged, Xdp::Guard, unknown, pod_egress_not_judged()),
        (FastPath::All, Xdp::Guard, observed, pod_egress_observed()),
        (FastPath::All, Xdp::Guard, limited_node(), limited(true)),
        (FastPath::All, Xdp::Guard, used_up_node(), limited(false)),
        (FastPath::All, Xdp::Redirect, used_up_node(), vec![limited_at_xdp()]),
    ]
}

#[test]
fn fixtures() {
    private_netns(&INTERFACES);
    let mut number = 0;
    for (fast_path, xdp, node, fixtures) in all() {
        let mut programs = load(fast_path, xdp, &node);
        for fixture in &fixtures {
            run(&mut programs, &node, fixture);
            number += 1;
        }
    }
    let differences = DIFFERENCES.take();
    if !differences.is_empty() {
        let path = format!("{}/fixtures.pcap", env!("CARGO_TARGET_TMPDIR"));
        let fixtures = all();
        let frames: Vec<&[u8]> =
            fixtures.iter().flat_map(|all| &all.3).map(|fixture| &*fixture.packet).collect();
        write_pcap(&path, &frames).unwrap();
        panic!(
            "{} of {number} fixtures differ (packets in {path}):\n{}",
            differences.len(),
            differences.join("\n")
        );
    }
    println!("{number} fixtures");
}

/// Another parent's programs look at another part of the table.
#[test]
fn each_parent_has_its_own_vlans() {
    let node = MemoryTables::clone(&node());
    let mut other = node.clone();
    other.parent = D.parent;
    let mut programs = load(FastPath::All, Xdp::Guard, &other);
    let packet =
        |pod: Endpoint| Packet::tcp((REMOTE, 1), (pod.ipv4, 80), SYN).macs(GATEWAY_MAC, pod.wire_mac);
    let to_d = fixture("the pod of this parent", Hook::EniIngress, &packet(D).vlan(D.vid))
        .gives(tc::REDIRECT)
        .leaves(&packet(D))
        .counts(D.id, Ingress, Wire);
    let to_b = fixture("a VLAN id of the other parent", Hook::EniIngress, &packet(B).vlan(B.vid))
        .dropped()
        .counts(NO_POD, Ingress, UnknownVlan);
    run(&mut programs, &other, &to_d);
    run(&mut programs, &other, &to_b);
    let differences = DIFFERENCES.take();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// Pods whose addresses and interface indexes have the same low 16 bits share an entry of the direct tables and are told
/// apart by the hash maps; addresses that nobody has go out on the wire, whether the entry they fall on is shared or not.
#[test]
fn keys_that_share_an_entry_are_told_apart() {
    const FAR: u32 = 1 << 16;
    private_netns(&INTERFACES);
    let twin =
        Endpoint { id: 20, ifindex: A.ifindex + FAR, ipv4: [172, 16, B.ipv4[2], B.ipv4[3]], vid: 120, ..B };
    let nobody = [192, 168, B.ipv4[2], B.ipv4[3]];
    let packet = |to: [u8; 4]| Packet::tcp((A.ipv4, 4000), (to, 80), ACK).macs(A.mac, GATEWAY_MAC);
    let local = |to: Endpoint| {
        fixture("a pod of this node", Hook::PodEgress, &packet(to.ipv4))
            .at(A.ifindex)
            .gives(tc::REDIRECT)
            .leaves(&packet(to.ipv4).macs(GATEWAY_MAC, to.mac))
            .counts(A.id, Egress, Local)
            .counts(to.id, Ingress, Local)
    };
    let wire = || {
        fixture("nobody's address", Hook::PodEgress, &packet(nobody))
            .at(A.ifindex)
            .gives(tc::REDIRECT)
            .leaves_tagged(A.vid)
            .counts(A.id, Egress, Wire)
    };
    let mut tables = MemoryTables::clone(&node());
    let mut alone = load(FastPath::All, Xdp::Guard, &tables);
    run(&mut alone, &tables, &wire());
    tables.add(twin);
    let mut shared = load(FastPath::All, Xdp::Guard, &tables);
    for fixture in [wire(), local(B), local(twin)] {
        run(&mut shared, &tables, &fixture);
    }
    let differences = DIFFERENCES.take();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// Whoever adds an outcome adds a packet that comes to it.
#[test]
fn every_outcome_is_reached() {
    let reached: BTreeSet<Outcome> = all()
        .into_iter()
        .flat_map(|(_, _, _, fixtures)| fixtures)
        .flat_map(|fixture| fixture.counts)
        .map(|(_, _, outcome)| outcome)
        .collect();
    let missing: Vec<_> =
        Outcome::ALL.iter().filter(|outcome| !reached.contains(outcome)).map(|o| o.name()).collect();
    assert!(missing.is_empty(), "no fixture reaches {}", missing.join(", "));
}

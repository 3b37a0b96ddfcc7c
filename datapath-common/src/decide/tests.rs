use std::{collections::HashMap, vec, vec::Vec};

use proptest::prelude::*;

use super::{Decision, eni_egress, eni_ingress, pod_egress, pod_ingress};
use crate::{
    abi::{Direction, Door, Endpoint, Flow, FlowKey, Origin, Outcome, outcome::Kind},
    packet::link::{TPID_8021Q, Tag},
    tables::Tables as _,
    testing::{
        self, Change, GATEWAY, GATEWAY_MAC, METADATA, MemoryTables, NODE, NODE_MAC, PODS, Packet, REMOTE,
        SERVICE, VIP, VIP_IN_SERVICES, node,
        packet::{ACK, SYN, SYN_ACK, Socket},
    },
};

const A: Endpoint = PODS[0];
const B: Endpoint = PODS[1];
/// Its MAC on the wire is the parent's, its MTU 1400.
const C: Endpoint = PODS[2];
/// On another parent.
const D: Endpoint = PODS[3];

/// What a test looks at of a decision.
type Answer = (Outcome, Option<Outcome>);

fn answer(decision: &Decision<'_>) -> Answer {
    (decision.outcome, decision.remark)
}

/// The fabric delivers a packet on a pod's VLAN, from the gateway.
fn from_fabric(node: &mut MemoryTables, pod: &Endpoint, packet: Packet) -> Answer {
    let frame = packet.macs(GATEWAY_MAC, pod.wire_mac).bytes();
    let tag = Tag { tpid: TPID_8021Q, tci: pod.vid };
    let result = answer(&eni_ingress::decide(node, frame.as_slice(), Some(tag)));
    node.settle();
    result
}

/// A pod sends a packet to the gateway.
fn from_pod(node: &mut MemoryTables, pod: &Endpoint, packet: Packet) -> Answer {
    let frame = packet.macs(pod.mac, pod.gateway_mac).bytes();
    let result = answer(&pod_egress::decide(node, frame.as_slice(), None, pod.ifindex, 0));
    node.settle();
    result
}

/// The node's stack sends a packet to a pod.
fn from_host(node: &mut MemoryTables, pod: &Endpoint, packet: Packet) -> Answer {
    let frame = packet.macs(NODE_MAC, pod.mac).bytes();
    let result = answer(&pod_ingress::decide(node, frame.as_slice(), None, pod.ifindex));
    node.settle();
    result
}

/// The node's stack sends a packet out of the parent.
fn out_of_host(node: &mut MemoryTables, packet: Packet) -> Answer {
    let frame = packet.macs(NODE_MAC, GATEWAY_MAC).bytes();
    let result = answer(&eni_egress::decide(node, frame.as_slice(), None));
    node.settle();
    result
}

fn flow_key(pod: &Endpoint, remote: Socket, local_port: u16, proto: u8) -> FlowKey {
    FlowKey { id: pod.id, remote: remote.0, remote_port: remote.1, local_port, proto, pad: [0; 3] }
}

fn tcp(src: Socket, dst: Socket, flags: u8) -> Packet {
    Packet::tcp(src, dst, flags)
}

const fn only(outcome: Outcome) -> Answer {
    (outcome, None)
}

const REMEMBERED: Option<Outcome> = Some(Outcome::FlowRemembered);

// ---- The doors L1 to L8 of the design, each with its story.

/// L1: pod A → VIP → pod B of another node. B sees A, which is no pod of this node, and answers by its VLAN as it would
/// anyway: nothing is remembered.
#[test]
fn l1_a_load_balancers_client_elsewhere() {
    let mut node = node();
    let (client, server) = ((REMOTE, 4000), (B.ipv4, 80));
    assert_eq!(from_fabric(&mut node, &B, tcp(client, server, SYN)), only(Outcome::Wire));
    assert_eq!(from_pod(&mut node, &B, tcp(server, client, SYN_ACK)), only(Outcome::Wire));
    assert!(node.flows.is_empty() && node.marks.is_empty());
    // And the client's side: a VIP goes to the wire.
    assert_eq!(from_pod(&mut node, &A, tcp((A.ipv4, 4000), (VIP, 80), SYN)), only(Outcome::Wire));
    assert_eq!(from_fabric(&mut node, &A, tcp((VIP, 80), (A.ipv4, 4000), SYN_ACK)), only(Outcome::Wire));
    assert!(node.flows.is_empty());
}

/// L2: pod A → VIP → pod B of this node: B's answers leave on B's VLAN, not by the fast path, until the end.
#[test]
fn l2_a_load_balancers_client_on_this_node() {
    let mut node = node();
    let (client, server) = ((A.ipv4, 4000), (B.ipv4, 80));
    assert_eq!(from_fabric(&mut node, &B, tcp(client, server, SYN)), (Outcome::Wire, REMEMBERED));
    assert_eq!(from_pod(&mut node, &B, tcp(server, client, SYN_ACK)), only(Outcome::Wire));
    assert_eq!(from_fabric(&mut node, &B, tcp(client, server, ACK)), only(Outcome::Wire));
    assert_eq!(from_pod(&mut node, &B, tcp(server, client, ACK)), only(Outcome::Wire));
    // Even when hours passed in between: TCP has its own ends.
    node.now += 100_000;
    assert_eq!(from_pod(&mut node, &B, tcp(server, client, ACK)), only(Outcome::Wire));
}

/// L3: pod A → VIP → A itself.
#[test]
fn l3_a_load_balancers_client_is_its_backend() {
    let mut node = node();
    let packet = tcp((A.ipv4, 4000), (A.ipv4, 80), SYN).macs(GATEWAY_MAC, A.mac).vlan(A.vid);
    let frame = packet.bytes();
    let decision = eni_ingress::decide(&node, frame.as_slice(), None);
    assert_eq!((decision.outcome, decision.id()), (Outcome::SelfHairpin, A.id));
    assert!(node.settle().is_empty());
}

/// L4: node → VIP → pod A of that node: A's answers leave on A's VLAN, though the node's address is the host's.
#[test]
fn l4_the_node_asks_by_a_load_balancer() {
    let mut node = node();
    let (client, server) = ((NODE, 50_000), (A.ipv4, 80));
    assert_eq!(from_fabric(&mut node, &A, tcp(client, server, SYN)), (Outcome::Wire, REMEMBERED));
    assert_eq!(from_pod(&mut node, &A, tcp(server, client, SYN_ACK)), only(Outcome::Wire));
    // While a probe from the node comes and goes by the host's door.
    let probe = (NODE, 50_001);
    assert_eq!(from_host(&mut node, &A, tcp(probe, server, SYN)), only(Outcome::Host));
    assert_eq!(from_pod(&mut node, &A, tcp(server, probe, SYN_ACK)), only(Outcome::Host));
}

/// L6: A → B direct while A → VIP → B: the memory is of a flow, not of a pair.
#[test]
fn l6_direct_and_by_a_load_balancer_at_once() {
    let mut node = node();
    let server = (B.ipv4, 80);
    let (direct, balanced) = ((A.ipv4, 4001), (A.ipv4, 4000));
    assert_eq!(from_fabric(&mut node, &B, tcp(balanced, server, SYN)), (Outcome::Wire, REMEMBERED));
    assert_eq!(from_pod(&mut node, &A, tcp(direct, server, SYN)), only(Outcome::Local));
    assert_eq!(from_pod(&mut node, &B, tcp(server, direct, SYN_ACK)), only(Outcome::Local));
    assert_eq!(from_pod(&mut node, &B, tcp(server, balanced, SYN_ACK)), only(Outcome::Wire));
}

/// L7: health checks come from the VPC and are answered by the VLAN.
#[test]
fn l7_health_checks() {
    let mut node = node();
    let (checker, server) = (([10, 1, 0, 250], 30_000), (B.ipv4, 80));
    assert_eq!(from_fabric(&mut node, &B, tcp(checker, server, SYN)), only(Outcome::Wire));
    assert_eq!(from_pod(&mut node, &B, tcp(server, checker, SYN_ACK)), only(Outcome::Wire));
    assert!(node.flows.is_empty());
}

/// L8: client → NodePort with its address kept → A: came by the host, returns by the host.
#[test]
fn l8_node_port() {
    let mut node = node();
    let (client, server) = (([203, 0, 113, 7], 40_000), (A.ipv4, 80));
    assert_eq!(from_host(&mut node, &A, tcp(client, server, SYN)), (Outcome::Host, REMEMBERED));
    assert_eq!(from_pod(&mut node, &A, tcp(server, client, SYN_ACK)), only(Outcome::Host));
    assert_eq!(from_host(&mut node, &A, tcp(client, server, ACK)), only(Outcome::Host));
    // Another connection of the same client by the pod's VLAN is answered there.
    assert_eq!(from_fabric(&mut node, &A, tcp((client.0, 40_001), server, SYN)), only(Outcome::Wire));
    assert_eq!(from_pod(&mut node, &A, tcp(server, (client.0, 40_001), SYN_ACK)), only(Outcome::Wire));
}

// ---- The rules of the memory.

/// The same 5-tuple, once by the load balancer and later direct: the new request's door counts.
#[test]
fn a_new_request_by_the_default_door_forgets() {
    let mut node = node();
    let (client, server) = ((A.ipv4, 4000), (B.ipv4, 80));
    let key = flow_key(&B, client, 80, 6);
    from_fabric(&mut node, &B, tcp(client, server, SYN));
    assert!(node.flows.contains_key(&key));
    // In the middle of the connection nothing is forgotten, and it stays where it is.
    assert_eq!(from_pod(&mut node, &A, tcp(client, server, ACK)), only(Outcome::Wire));
    assert!(node.flows.contains_key(&key));
    assert_eq!(from_pod(&mut node, &A, tcp(client, server, SYN)), only(Outcome::Local));
    assert!(!node.flows.contains_key(&key));
    assert_eq!(from_pod(&mut node, &B, tcp(server, client, SYN_ACK)), only(Outcome::Local));
}

#[test]
fn a_new_request_by_another_door_is_remembered_instead() {
    let mut node = node();
    let (client, server) = (([203, 0, 113, 7], 40_000), (A.ipv4, 80));
    from_host(&mut node, &A, tcp(client, server, SYN));
    // By the wire, which is the default: forgotten.
    assert_eq!(from_fabric(&mut node, &A, tcp(client, server, SYN)), only(Outcome::Wire));
    assert!(node.flows.is_empty());

    let (client, server) = ((A.ipv4, 4000), (B.ipv4, 80));
    from_fabric(&mut node, &B, tcp(client, server, SYN));
    // kube-proxy translated A's next request: neither default nor what is remembered.
    assert_eq!(from_host(&mut node, &B, tcp(client, server, SYN)), (Outcome::Host, REMEMBERED));
    assert_eq!(from_pod(&mut node, &B, tcp(server, client, SYN_ACK)), only(Outcome::Host));
    // A packet of the old connection that was on its way changes nothing.
    assert_eq!(from_fabric(&mut node, &B, tcp(client, server, ACK)), only(Outcome::Wire));
    assert_eq!(from_pod(&mut node, &B, tcp(server, client, ACK)), only(Outcome::Host));
}

/// The LRU map lost the entry: the next packet of the client brings it back, and that is counted.
#[test]
fn a_lost_memory_is_learned_anew() {
    let mut node = node();
    let (client, server) = ((A.ipv4, 4000), (B.ipv4, 80));
    from_fabric(&mut node, &B, tcp(client, server, SYN));
    node.flows.clear();
    assert_eq!(from_pod(&mut node, &B, tcp(server, client, ACK)), only(Outcome::Local));
    let relearned = Some(Outcome::FlowRelearned);
    assert_eq!(from_fabric(&mut node, &B, tcp(client, server, ACK)), (Outcome::Wire, relearned));
    assert_eq!(from_fabric(&mut node, &B, tcp(client, server, ACK)), only(Outcome::Wire));
    assert_eq!(from_pod(&mut node, &B, tcp(server, client, ACK)), only(Outcome::Wire));
}

/// Protocols without a connection: the memory stands while the flow is alive, is not written for every packet, and is
/// void after the time that it is good for.
#[test]
fn memories_without_a_connection_age() {
    let mut node = node();
    let (client, server) = ((A.ipv4, 4000), (B.ipv4, 53));
    let ask = || Packet::udp(client, server);
    let reply = || Packet::udp(server, client);
    let key = flow_key(&B, client, 53, 17);
    assert_eq!(from_fabric(&mut node, &B, ask()), (Outcome::Wire, REMEMBERED));
    let seen = |node: &MemoryTables| node.flows[&key].seen;
    assert_eq!(seen(&node), node.now);

    node.now += Flow::REFRESH - 1;
    from_fabric(&mut node, &B, ask());
    assert_eq!(seen(&node), node.now - (Flow::REFRESH - 1));
    node.now += 1;
    assert_eq!(from_fabric(&mut node, &B, ask()), only(Outcome::Wire));
    assert_eq!(seen(&node), node.now);
    // A reply is a sign of life as good as a request.
    node.now += Flow::REFRESH;
    assert_eq!(from_pod(&mut node, &B, reply()), only(Outcome::Wire));
    assert_eq!(seen(&node), node.now);

    node.now += Flow::IDLE;
    assert_eq!(from_pod(&mut node, &B, reply()), only(Outcome::Wire));
    node.now += Flow::IDLE + 1;
    assert_eq!(from_pod(&mut node, &B, reply()), only(Outcome::Local));
    // It begins again as a new one, not as one that was lost.
    assert_eq!(from_fabric(&mut node, &B, ask()), (Outcome::Wire, REMEMBERED));
}

#[test]
fn the_clock_may_wrap() {
    let mut node = node();
    node.now = u32::MAX - 5;
    let (client, server) = ((A.ipv4, 4000), (B.ipv4, 53));
    from_fabric(&mut node, &B, Packet::udp(client, server));
    node.now = 20;
    assert_eq!(from_pod(&mut node, &B, Packet::udp(server, client)), only(Outcome::Wire));
    node.now = 20 + Flow::IDLE + 1;
    assert_eq!(from_pod(&mut node, &B, Packet::udp(server, client)), only(Outcome::Local));
}

#[test]
fn icmp_queries_are_flows_by_their_identifier() {
    let mut node = node();
    assert_eq!(from_fabric(&mut node, &B, Packet::icmp(8, A.ipv4, B.ipv4, 7)), (Outcome::Wire, REMEMBERED));
    assert_eq!(from_pod(&mut node, &B, Packet::icmp(0, B.ipv4, A.ipv4, 7)), only(Outcome::Wire));
    assert_eq!(from_pod(&mut node, &B, Packet::icmp(0, B.ipv4, A.ipv4, 8)), only(Outcome::Local));
}

#[test]
fn icmp_errors_follow_their_flow_and_are_not_remembered() {
    let mut node = node();
    let (client, server) = ((A.ipv4, 4000), (B.ipv4, 53));
    let request = Packet::udp(client, server);
    from_fabric(&mut node, &B, request.clone());
    let unreachable = Packet::icmp_error(3, B.ipv4, A.ipv4, &request);
    assert_eq!(from_pod(&mut node, &B, unreachable), only(Outcome::Wire));
    // About a flow that is not remembered: the default door, and no memory of it.
    let other = Packet::icmp_error(3, B.ipv4, A.ipv4, &Packet::udp((A.ipv4, 4001), server));
    assert_eq!(from_pod(&mut node, &B, other), only(Outcome::Local));
    let about_reply = Packet::icmp_error(3, A.ipv4, B.ipv4, &Packet::udp((B.ipv4, 1), (A.ipv4, 2)));
    assert_eq!(from_fabric(&mut node, &B, about_reply), only(Outcome::Wire));
    assert_eq!(node.flows.len(), 1);
}

/// Pod → Service → kube-proxy on the node → backend elsewhere: the answer comes by the pod's VLAN and goes to the node's
/// stack first, which knows whom the pod had asked.
#[test]
fn what_the_host_translated_returns_to_the_host() {
    let mut node = node();
    let (pod, backend) = ((A.ipv4, 4000), (REMOTE, 8080));
    assert_eq!(from_pod(&mut node, &A, tcp(pod, (SERVICE, 80), SYN)), only(Outcome::HostService));
    assert_eq!(out_of_host(&mut node, tcp(pod, backend, SYN)), only(Outcome::Wire));
    assert_eq!(from_fabric(&mut node, &A, tcp(backend, pod, SYN_ACK)), only(Outcome::HostReturn));
    assert_eq!(from_host(&mut node, &A, tcp((SERVICE, 80), pod, SYN_ACK)), only(Outcome::Host));
    // The pod's own packets to that backend are not the host's business.
    assert_eq!(from_pod(&mut node, &A, tcp(pod, backend, SYN)), only(Outcome::Wire));
    // A request of the backend's is no answer: it goes to the pod.
    assert_eq!(from_fabric(&mut node, &A, tcp(backend, pod, SYN)), only(Outcome::Wire));
    // Errors about the translated connection go to the host as well.
    let error = Packet::icmp_error(3, REMOTE, A.ipv4, &tcp(pod, backend, ACK));
    node.flows.clear();
    assert_eq!(out_of_host(&mut node, tcp(pod, backend, ACK)), only(Outcome::Wire));
    assert_eq!(from_fabric(&mut node, &A, error), only(Outcome::HostReturn));
    // Also when a router on the way reports them, and not when they are about another connection.
    let too_big = |about: &Packet| Packet::icmp_error(3, GATEWAY, A.ipv4, about);
    assert_eq!(from_fabric(&mut node, &A, too_big(&tcp(pod, backend, ACK))), only(Outcome::HostReturn));
    assert_eq!(from_fabric(&mut node, &A, too_big(&tcp(pod, (GATEWAY, 8080), ACK))), only(Outcome::Wire));
    assert_eq!(from_fabric(&mut node, &A, too_big(&tcp((A.ipv4, 4001), backend, ACK))), only(Outcome::Wire));
}

#[test]
fn what_the_host_translated_ages_like_the_rest() {
    let mut node = node();
    let (pod, backend) = ((A.ipv4, 4000), (REMOTE, 53));
    let key = flow_key(&A, backend, 4000, 17);
    out_of_host(&mut node, Packet::udp(pod, backend));
    assert_eq!(node.flows[&key].origin, Origin::HostForwarded as u8);
    node.now += Flow::REFRESH;
    out_of_host(&mut node, Packet::udp(pod, backend));
    assert_eq!(node.flows[&key].seen, node.now);
    node.now += Flow::REFRESH;
    assert_eq!(from_fabric(&mut node, &A, Packet::udp(backend, pod)), only(Outcome::HostReturn));
    assert_eq!(node.flows[&key].seen, node.now);
    node.now += Flow::IDLE + 1;
    assert_eq!(from_fabric(&mut node, &A, Packet::udp(backend, pod)), only(Outcome::Wire));
}

/// What the pod answers through the host leaves by the parent with the pod's address: no request, nothing new to learn.
#[test]
fn answers_through_the_host_are_not_taken_for_requests() {
    let mut node = node();
    let (client, server) = (([203, 0, 113, 7], 40_000), (A.ipv4, 80));
    from_host(&mut node, &A, tcp(client, server, SYN));
    assert_eq!(from_pod(&mut node, &A, tcp(server, client, SYN_ACK)), only(Outcome::Host));
    assert_eq!(out_of_host(&mut node, tcp(server, client, SYN_ACK)), only(Outcome::Wire));
    let flow = node.flows[&flow_key(&A, client, 80, 6)];
    assert_eq!((flow.origin, flow.door), (Origin::Inbound as u8, Door::Host as u8));
}

/// A pod without any remembered flow costs no look-up: the mark says so.
#[test]
fn pods_without_a_memory_are_not_asked_for_one() {
    let mut node = node();
    let (client, server) = ((A.ipv4, 4000), (B.ipv4, 80));
    let flow = Flow { door: Door::Wire as u8, origin: Origin::Inbound as u8, pad: [0; 2], seen: node.now };
    node.flows.insert(flow_key(&B, client, 80, 6), flow);
    assert_eq!(from_pod(&mut node, &B, tcp(server, client, ACK)), only(Outcome::Local));
    node.marks.insert(B.id);
    assert_eq!(from_pod(&mut node, &B, tcp(server, client, ACK)), only(Outcome::Wire));
}

/// The memory stands for the day when the fast path is switched on: replies of connections that hairpin keep doing so.
#[test]
fn without_the_fast_path_all_hairpins() {
    let mut node = node();
    node.fast_path = false;
    let (client, server) = ((A.ipv4, 4000), (B.ipv4, 80));
    assert_eq!(from_pod(&mut node, &A, tcp(client, server, SYN)), only(Outcome::Wire));
    assert_eq!(from_fabric(&mut node, &B, tcp(client, server, SYN)), (Outcome::Wire, REMEMBERED));
    node.fast_path = true;
    assert_eq!(from_pod(&mut node, &B, tcp(server, client, SYN_ACK)), only(Outcome::Wire));
}

// ---- Destinations.

#[test]
fn destinations_choose_the_door() {
    let mut node = node();
    let mut to = |dst: Socket| from_pod(&mut node, &A, tcp((A.ipv4, 4000), dst, SYN));
    assert_eq!(to((B.ipv4, 80)), only(Outcome::Local));
    assert_eq!(to((D.ipv4, 80)), only(Outcome::Local));
    assert_eq!(to((A.ipv4, 80)), only(Outcome::Wire));
    assert_eq!(to((REMOTE, 80)), only(Outcome::Wire));
    assert_eq!(to((GATEWAY, 80)), only(Outcome::Wire));
    assert_eq!(to((NODE, 10_250)), only(Outcome::Host));
    assert_eq!(to((SERVICE, 443)), only(Outcome::HostService));
    assert_eq!(to((VIP, 80)), only(Outcome::Wire));
    assert_eq!(to((METADATA, 80)), only(Outcome::DeniedDestination));
}

/// A load balancer's address within a prefix of the host's: its port and protocol are the load balancer's alone.
#[test]
fn a_vip_within_a_host_prefix() {
    let mut node = node();
    let client = (A.ipv4, 4000);
    assert_eq!(from_pod(&mut node, &A, tcp(client, (VIP_IN_SERVICES, 80), SYN)), only(Outcome::Wire));
    assert_eq!(from_pod(&mut node, &A, tcp(client, (VIP_IN_SERVICES, 81), SYN)), only(Outcome::HostService));
    assert_eq!(
        from_pod(&mut node, &A, Packet::udp(client, (VIP_IN_SERVICES, 80))),
        only(Outcome::HostService)
    );
    // An error about what came from there goes back there.
    let about = tcp((VIP_IN_SERVICES, 80), client, ACK);
    let error = Packet::icmp_error(3, A.ipv4, VIP_IN_SERVICES, &about);
    assert_eq!(from_pod(&mut node, &A, error), only(Outcome::Wire));
    // A later fragment does not say its port.
    let later = Packet::udp(client, (VIP_IN_SERVICES, 81)).fragment(1, 100, false);
    assert_eq!(from_pod(&mut node, &A, later), only(Outcome::Wire));
}

#[test]
fn denied_means_all_of_it() {
    let mut node = node();
    let fragment = |offset| Packet::udp((A.ipv4, 1), (METADATA, 80)).payload(8).fragment(3, offset, true);
    assert_eq!(from_pod(&mut node, &A, fragment(0)), only(Outcome::DeniedDestination));
    assert_eq!(from_pod(&mut node, &A, fragment(4)), only(Outcome::DeniedDestination));
    assert_eq!(
        from_pod(&mut node, &A, Packet::icmp(8, A.ipv4, METADATA, 1)),
        only(Outcome::DeniedDestination)
    );
    // The longest prefix says it: an exception within a denied prefix, and the other way round.
    node.host_dst.push(([169, 254, 0, 0], 16, 1));
    assert_eq!(
        from_pod(&mut node, &A, tcp((A.ipv4, 1), (METADATA, 80), SYN)),
        only(Outcome::DeniedDestination)
    );
    assert_eq!(from_pod(&mut node, &A, tcp((A.ipv4, 1), ([169, 254, 20, 10], 53), SYN)), only(Outcome::Host));
}

#[test]
fn what_does_not_fit_the_destination_takes_the_wire() {
    let mut node = node();
    let sized = |size: usize| tcp((A.ipv4, 1), (C.ipv4, 2), ACK).payload(size - 40);
    let too_big = (Outcome::Wire, Some(Outcome::TooBigForLocal));
    assert_eq!(from_pod(&mut node, &A, sized(1400)), only(Outcome::Local));
    assert_eq!(from_pod(&mut node, &A, sized(1401)), too_big);
    // Of a GSO packet each segment counts: with its headers, options included.
    let gso = |packet: Packet, gso_size| {
        let frame = packet.payload(20_000).macs(A.mac, GATEWAY_MAC).bytes();
        answer(&pod_egress::decide(&node, frame.as_slice(), None, A.ifindex, gso_size))
    };
    let plain = tcp((A.ipv4, 1), (C.ipv4, 2), ACK);
    assert_eq!(gso(plain.clone(), 1360), only(Outcome::Local));
    assert_eq!(gso(plain.clone(), 1361), too_big);
    assert_eq!(gso(plain.clone().options(2), 1352), only(Outcome::Local));
    assert_eq!(gso(plain.options(2), 1353), too_big);
    let mut timestamps = tcp((A.ipv4, 1), (C.ipv4, 2), ACK).payload(12);
    timestamps.rest[12] = 8 << 4;
    assert_eq!(gso(timestamps.clone(), 1348), only(Outcome::Local));
    assert_eq!(gso(timestamps, 1349), too_big);
    let udp = Packet::udp((A.ipv4, 1), (C.ipv4, 2));
    assert_eq!(gso(udp.clone(), 1372), only(Outcome::Local));
    assert_eq!(gso(udp, 1373), too_big);
}

/// Longer than the IPv4 header can say (BIG TCP).
#[test]
fn a_gso_packet_may_be_longer_than_64_kib() {
    let mut node = node();
    let packet = tcp((A.ipv4, 1), (B.ipv4, 2), ACK).payload(100_000).ip(|ip| ip.total_len = Some(0));
    let frame = packet.macs(A.mac, GATEWAY_MAC).bytes();
    let decision = pod_egress::decide(&node, frame.as_slice(), None, A.ifindex, 1448);
    assert_eq!(decision.outcome, Outcome::Local);
    node.settle();
}

// ---- Fragments.

#[test]
fn later_fragments_follow_the_first() {
    let mut node = node();
    let part = |dst: Socket, ident, offset| {
        Packet::udp((A.ipv4, 1), dst).payload(1000).fragment(ident, offset, offset < 200)
    };
    // Without a first one: the wire.
    assert_eq!(from_pod(&mut node, &A, part((B.ipv4, 2), 1, 200)), only(Outcome::Wire));
    assert_eq!(from_pod(&mut node, &A, part((B.ipv4, 2), 1, 0)), only(Outcome::Local));
    assert_eq!(from_pod(&mut node, &A, part((B.ipv4, 2), 1, 126)), only(Outcome::Local));
    assert_eq!(from_pod(&mut node, &A, part((B.ipv4, 2), 1, 200)), only(Outcome::Local));
    assert_eq!(from_pod(&mut node, &A, part((B.ipv4, 2), 2, 200)), only(Outcome::Wire));
    // The same to the host's addresses.
    assert_eq!(from_pod(&mut node, &A, part((SERVICE, 53), 3, 200)), only(Outcome::Wire));
    assert_eq!(from_pod(&mut node, &A, part((SERVICE, 53), 3, 0)), only(Outcome::HostService));
    assert_eq!(from_pod(&mut node, &A, part((SERVICE, 53), 3, 200)), only(Outcome::Host));
    // And to the wire, for which nothing needs to be remembered.
    let before = node.fragments.len();
    assert_eq!(from_pod(&mut node, &A, part((REMOTE, 2), 4, 0)), only(Outcome::Wire));
    assert_eq!(from_pod(&mut node, &A, part((REMOTE, 2), 4, 126)), only(Outcome::Wire));
    assert_eq!(node.fragments.len(), before);
}

#[test]
fn fragments_of_a_remembered_flow_follow_it() {
    let mut node = node();
    let (client, server) = (([203, 0, 113, 7], 40_000), (A.ipv4, 53));
    from_host(&mut node, &A, Packet::udp(client, server));
    let part = |offset| Packet::udp(server, client).payload(1000).fragment(9, offset, offset == 0);
    assert_eq!(from_pod(&mut node, &A, part(0)), only(Outcome::Host));
    assert_eq!(from_pod(&mut node, &A, part(126)), only(Outcome::Host));

    // By the wire where the fast path would be the default: without a memory of the first, later ones take the wire too.
    let (client, server) = ((A.ipv4, 4000), (B.ipv4, 53));
    from_fabric(&mut node, &B, Packet::udp(client, server));
    let part = |offset| Packet::udp(server, client).payload(1000).fragment(10, offset, offset == 0);
    assert_eq!(from_pod(&mut node, &B, part(0)), only(Outcome::Wire));
    assert_eq!(from_pod(&mut node, &B, part(126)), only(Outcome::Wire));
}

/// An identification comes round again, and the new datagram takes another way than the old one.
#[test]
fn a_first_fragment_replaces_what_an_older_one_left() {
    let mut node = node();
    let (client, server) = ((A.ipv4, 4000), (B.ipv4, 53));
    let part = |offset| Packet::udp(server, client).payload(1000).fragment(10, offset, offset == 0);
    assert_eq!(from_pod(&mut node, &B, part(0)), only(Outcome::Local));
    from_fabric(&mut node, &B, Packet::udp(client, server));
    assert_eq!(from_pod(&mut node, &B, part(0)), only(Outcome::Wire));
    assert_eq!(from_pod(&mut node, &B, part(126)), only(Outcome::Wire));
}

#[test]
fn fragments_that_return_to_the_host() {
    let mut node = node();
    let (pod, backend) = ((A.ipv4, 4000), (REMOTE, 53));
    out_of_host(&mut node, Packet::udp(pod, backend));
    let part = |offset| Packet::udp(backend, pod).payload(1000).fragment(5, offset, offset == 0);
    assert_eq!(from_fabric(&mut node, &A, part(126)), only(Outcome::Wire));
    assert_eq!(from_fabric(&mut node, &A, part(0)), only(Outcome::HostReturn));
    assert_eq!(from_fabric(&mut node, &A, part(126)), only(Outcome::HostReturn));
}

#[test]
fn later_fragments_teach_nothing() {
    let mut node = node();
    let later = |src: [u8; 4], dst| Packet::udp((src, 1), (dst, 2)).payload(8).fragment(5, 10, false);
    assert_eq!(from_fabric(&mut node, &B, later(A.ipv4, B.ipv4)), only(Outcome::Wire));
    assert_eq!(from_host(&mut node, &B, later(REMOTE, B.ipv4)), only(Outcome::Host));
    assert_eq!(out_of_host(&mut node, later(B.ipv4, REMOTE)), only(Outcome::Wire));
    assert!(node.flows.is_empty() && node.fragments.is_empty());
}

// ---- Who is who.

#[test]
fn vlan_mac_and_address_belong_together() {
    let node = node();
    let decide = |packet: &Packet| {
        let frame = packet.bytes();
        let decision = eni_ingress::decide(&node, frame.as_slice(), None);
        (decision.outcome, decision.id())
    };
    let good = tcp((REMOTE, 1), (A.ipv4, 2), SYN).macs(GATEWAY_MAC, A.mac);
    assert_eq!(decide(&good.clone().vlan(A.vid)), (Outcome::Wire, A.id));
    assert_eq!(decide(&good.clone().macs(GATEWAY_MAC, [0xff; 6]).vlan(A.vid)), (Outcome::Wire, A.id));
    assert_eq!(decide(&good.clone().vlan(B.vid)), (Outcome::WrongMac, B.id));
    assert_eq!(decide(&good.clone().macs(GATEWAY_MAC, B.mac).vlan(B.vid)), (Outcome::WrongAddress, B.id));
    assert_eq!(decide(&good.clone().vlan(77)), (Outcome::UnknownVlan, 0));
    assert_eq!(decide(&good.clone().vlan(4095)), (Outcome::UnknownVlan, 0));
    assert_eq!(decide(&good), (Outcome::Untagged, 0));
    // C has the parent's MAC on the wire, and its own no more.
    let to_c = tcp((REMOTE, 1), (C.ipv4, 2), SYN).vlan(C.vid);
    assert_eq!(decide(&to_c.clone().macs(GATEWAY_MAC, NODE_MAC)), (Outcome::Wire, C.id));
    assert_eq!(decide(&to_c.macs(GATEWAY_MAC, C.mac)), (Outcome::WrongMac, C.id));
    // A and D share a VLAN id, on different parents.
    let mut other = node.clone();
    other.parent = 1;
    let frame = tcp((REMOTE, 1), (D.ipv4, 2), SYN).macs(GATEWAY_MAC, D.mac).vlan(101).bytes();
    assert_eq!(eni_ingress::decide(&other, frame.as_slice(), None).id(), D.id);
    assert_eq!(eni_ingress::decide(&node, frame.as_slice(), None).outcome, Outcome::WrongMac);
}

#[test]
fn arp_from_a_pod() {
    let node = node();
    let say = |packet: Packet| {
        let frame = packet.macs(A.mac, [0xff; 6]).bytes();
        pod_egress::decide(&node, frame.as_slice(), None, A.ifindex, 0).outcome
    };
    assert_eq!(say(Packet::arp(1, A.mac, A.ipv4, GATEWAY)), Outcome::ArpAnswered);
    assert_eq!(say(Packet::arp(1, A.mac, [0; 4], GATEWAY)), Outcome::ArpAnswered);
    assert_eq!(say(Packet::arp(1, A.mac, A.ipv4, B.ipv4)), Outcome::WireArp);
    assert_eq!(say(Packet::arp(2, A.mac, A.ipv4, GATEWAY)), Outcome::WireArp);
    // An announcement (RFC 5227) names the sender twice.
    assert_eq!(say(Packet::arp(1, A.mac, A.ipv4, A.ipv4)), Outcome::WireArp);
    // In another's name, by address or by MAC; a reply without an address; a reverse request.
    assert_eq!(say(Packet::arp(1, A.mac, B.ipv4, GATEWAY)), Outcome::ArpSpoof);
    assert_eq!(say(Packet::arp(2, A.mac, GATEWAY, B.ipv4)), Outcome::ArpSpoof);
    assert_eq!(say(Packet::arp(1, B.mac, A.ipv4, GATEWAY)), Outcome::ArpSpoof);
    assert_eq!(say(Packet::arp(2, A.mac, [0; 4], GATEWAY)), Outcome::ArpSpoof);
    assert_eq!(say(Packet::arp(3, A.mac, A.ipv4, GATEWAY)), Outcome::ArpSpoof);
}

#[test]
fn what_only_servers_and_routers_may_say() {
    let mut node = node();
    let mut say = |packet| from_pod(&mut node, &A, packet).0;
    assert_eq!(say(Packet::udp((A.ipv4, 67), (REMOTE, 68))), Outcome::DhcpServer);
    assert_eq!(say(Packet::udp((A.ipv4, 68), (REMOTE, 67))), Outcome::Wire);
    assert_eq!(say(Packet::udp((A.ipv4, 67), (REMOTE, 67))), Outcome::Wire);
    assert_eq!(say(tcp((A.ipv4, 67), (REMOTE, 68), SYN)), Outcome::Wire);
    assert_eq!(say(Packet::icmp(5, A.ipv4, REMOTE, 1)), Outcome::IcmpRedirect);
    assert_eq!(say(Packet::icmp(9, A.ipv4, REMOTE, 1)), Outcome::RouterAdvertisement);
    assert_eq!(say(Packet::icmp(10, A.ipv4, REMOTE, 1)), Outcome::Wire);
    // An error that quotes a DHCP server's packet is an error.
    let about = Packet::udp((REMOTE, 68), (A.ipv4, 67));
    assert_eq!(say(Packet::icmp_error(3, A.ipv4, REMOTE, &about)), Outcome::Wire);
    for dst in [[224, 0, 0, 1], [239, 255, 255, 250], [240, 0, 0, 1], [255; 4]] {
        assert_eq!(say(Packet::udp((A.ipv4, 68), (dst, 67))), Outcome::Multicast);
    }
}

// ---- Properties.

fn addresses() -> impl Strategy<Value = [u8; 4]> {
    let known = [
        A.ipv4,
        B.ipv4,
        C.ipv4,
        D.ipv4,
        NODE,
        REMOTE,
        SERVICE,
        VIP,
        VIP_IN_SERVICES,
        METADATA,
        GATEWAY,
        [0; 4],
        [255; 4],
        [224, 0, 0, 251],
    ];
    prop_oneof![9 => prop::sample::select(known.to_vec()), 1 => any::<[u8; 4]>()]
}

fn macs() -> impl Strategy<Value = [u8; 6]> {
    let known = [A.mac, B.mac, C.mac, D.mac, NODE_MAC, GATEWAY_MAC, [0xff; 6]];
    prop_oneof![9 => prop::sample::select(known.to_vec()), 1 => any::<[u8; 6]>()]
}

/// Frames among the members of the node, right and wrong ones.
fn frames() -> impl Strategy<Value = Packet> {
    let port = || prop::sample::select(vec![53_u16, 67, 68, 80, 4000]);
    let flags = prop::sample::select(vec![SYN, SYN_ACK, ACK]);
    let body = (addresses(), addresses(), port(), port(), flags, 0..8_u8, macs()).prop_map(
        |(src, dst, sport, dport, flags, kind, mac)| match kind {
            0..=2 => Packet::tcp((src, sport), (dst, dport), flags),
            3 | 4 => Packet::udp((src, sport), (dst, dport)),
            5 => Packet::icmp(flags, src, dst, sport),
            6 => Packet::icmp_error(3, src, dst, &Packet::tcp((dst, dport), (src, sport), flags)),
            _ => Packet::arp(u16::from(flags & 3), mac, src, dst),
        },
    );
    let fragment = prop_oneof![4 => Just((0, false)), 1 => (0..3_u16, any::<bool>())];
    (body, macs(), macs(), fragment, 0..=10_usize, 0..100_usize).prop_map(
        |(packet, src, dst, (offset, more), words, payload)| {
            packet.macs(src, dst).fragment(7, offset, more).options(words).payload(payload)
        },
    )
}

fn tags() -> impl Strategy<Value = u16> {
    (0..16_u16, prop::sample::select(vec![0_u16, 101, 102, 103, 104, 4095]))
        .prop_map(|(bits, vid)| bits << 12 | vid)
}

/// A node that remembers something of everything.
fn experienced() -> MemoryTables {
    let mut node = node();
    from_fabric(&mut node, &B, tcp((A.ipv4, 4000), (B.ipv4, 80), SYN));
    from_fabric(&mut node, &A, Packet::udp((NODE, 4000), (A.ipv4, 53)));
    from_host(&mut node, &A, tcp((REMOTE, 4000), (A.ipv4, 80), SYN));
    out_of_host(&mut node, tcp((A.ipv4, 4000), (REMOTE, 53), SYN));
    out_of_host(&mut node, Packet::udp((C.ipv4, 53), (REMOTE, 53)));
    from_pod(&mut node, &A, Packet::udp((A.ipv4, 53), (B.ipv4, 53)).fragment(7, 0, true));
    from_pod(&mut node, &A, Packet::udp((A.ipv4, 53), (SERVICE, 53)).fragment(7, 0, true));
    node
}

fn passes(decision: &Decision<'_>) -> bool {
    decision.outcome.kind() == Kind::Forward
}

fn of(packet: &Packet) -> ([u8; 4], [u8; 4]) {
    packet.ip.as_ref().map_or(([0; 4], [0; 4]), |ip| (ip.src, ip.dst))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..120), tci in any::<u16>(), ifindex in 99..106_u32) {
        let node = experienced();
        let frame = bytes.as_slice();
        for tag in [None, Some(Tag { tpid: TPID_8021Q, tci })] {
            let _ = eni_ingress::decide(&node, frame, tag);
            let _ = eni_egress::decide(&node, frame, tag);
            let _ = pod_egress::decide(&node, frame, tag, ifindex, u32::from(tci));
            let _ = pod_ingress::decide(&node, frame, tag, ifindex);
            node.discard();
        }
    }

    /// What goes on to a pod is on its VLAN, for its MAC, for its address, and not from itself.
    #[test]
    fn the_triple_holds(packet in frames(), tci in tags()) {
        let node = experienced();
        let frame = packet.bytes();
        let decision = eni_ingress::decide(&node, frame.as_slice(), Some(Tag { tpid: TPID_8021Q, tci }));
        let vid = tci & 0xfff;
        prop_assert_eq!(decision.outcome == Outcome::Untagged, vid == 0);
        if passes(&decision) && vid != 0 {
            let pod = decision.pod.unwrap();
            prop_assert_eq!((pod.vid, pod.parent), (vid, 0));
            prop_assert!(packet.dst_mac == pod.wire_mac || packet.dst_mac == [0xff; 6]);
            if packet.ip.is_some() {
                let (src, dst) = of(&packet);
                prop_assert_eq!(dst, pod.ipv4);
                prop_assert_ne!(src, pod.ipv4);
            }
        }
    }

    /// What leaves a pod is in its own name.
    #[test]
    fn nobody_speaks_in_anothers_name(packet in frames(), n in 0..4_usize) {
        let node = experienced();
        let pod = PODS[n];
        let frame = packet.bytes();
        let decision = pod_egress::decide(&node, frame.as_slice(), None, pod.ifindex, 0);
        prop_assert_eq!(decision.id(), pod.id);
        if passes(&decision) {
            prop_assert_eq!(packet.src_mac, pod.mac);
            if packet.ip.is_some() {
                let (src, dst) = of(&packet);
                prop_assert_eq!(src, pod.ipv4);
                prop_assert!(dst[0] < 224 && dst != METADATA);
            } else {
                // ARP: sender MAC and sender address.
                prop_assert_eq!(&packet.rest[8..14], &pod.mac);
                prop_assert!(packet.rest[14..18] == pod.ipv4 || packet.rest[14..18] == [0; 4]);
            }
        }
        if decision.outcome == Outcome::Local {
            let to = decision.to.unwrap();
            prop_assert_eq!(to.ipv4, of(&packet).1);
            prop_assert_ne!(to.id, pod.id);
        } else {
            prop_assert!(decision.to.is_none());
        }
    }

    /// What the node's stack sends to a pod is for that pod; what it sends out is tagged only in a pod's name.
    #[test]
    fn the_hosts_side(packet in frames(), n in 0..4_usize) {
        let node = experienced();
        let frame = packet.bytes();
        let pod = PODS[n];
        let decision = pod_ingress::decide(&node, frame.as_slice(), None, pod.ifindex);
        if passes(&decision) && packet.ip.is_some() {
            prop_assert_eq!(of(&packet).1, pod.ipv4);
        }
        node.discard();
        let decision = eni_egress::decide(&node, frame.as_slice(), None);
        let owner = PODS.iter().find(|pod| packet.ip.is_some() && pod.ipv4 == of(&packet).0);
        prop_assert_eq!(decision.outcome, if owner.is_some() { Outcome::Wire } else { Outcome::Untagged });
        prop_assert_eq!(decision.id(), owner.map_or(0, |pod| pod.id));
    }

    /// A tag decides the same inside the frame (XDP) and beside it (tc); its priority decides nothing.
    #[test]
    fn where_the_tag_stands_does_not_matter(packet in frames(), tci in tags(), priority in 0..16_u16) {
        let node = experienced();
        let beside = packet.bytes();
        let inside = packet.vlan((tci & 0xfff) | priority << 12).bytes();
        let one = answer(&eni_ingress::decide(&node, beside.as_slice(), Some(Tag { tpid: TPID_8021Q, tci })));
        let changes = node.changes().clone();
        node.discard();
        let two = answer(&eni_ingress::decide(&node, inside.as_slice(), None));
        prop_assert_eq!(one, two);
        prop_assert_eq!(changes, node.changes().clone());
        prop_assert_eq!(pod_egress::decide(&node, inside.as_slice(), None, A.ifindex, 0).outcome, Outcome::TaggedByPod);
        prop_assert_eq!(eni_egress::decide(&node, inside.as_slice(), None).outcome, Outcome::Untagged);
    }

    /// A frame cut off anywhere goes nowhere, changes nothing, and is not tagged in a pod's name.
    #[test]
    fn frames_cut_off_go_nowhere(packet in frames(), tci in prop::sample::select(vec![101_u16, 102, 103]), n in 0..4_usize) {
        let node = experienced();
        let tag = Some(Tag { tpid: TPID_8021Q, tci });
        let needed = if packet.ip.is_some() { packet.bytes().len() } else { 14 + 28 };
        let frame = packet.bytes();
        for len in 0..needed {
            let cut = &frame[..len];
            prop_assert!(!passes(&eni_ingress::decide(&node, cut, tag)), "{}", len);
            prop_assert!(!passes(&pod_egress::decide(&node, cut, None, PODS[n].ifindex, 0)), "{}", len);
            prop_assert!(!passes(&pod_ingress::decide(&node, cut, None, PODS[n].ifindex)), "{}", len);
            prop_assert_eq!(eni_egress::decide(&node, cut, None).outcome, Outcome::Untagged);
        }
        prop_assert!(node.changes().is_empty());
    }

    /// What is dropped leaves no trace in the memory.
    #[test]
    fn only_what_goes_on_is_remembered(packet in frames(), tci in tags(), n in 0..4_usize) {
        let node = experienced();
        let frame = packet.bytes();
        if !passes(&eni_ingress::decide(&node, frame.as_slice(), Some(Tag { tpid: TPID_8021Q, tci }))) {
            prop_assert!(node.changes().is_empty());
        }
        node.discard();
        if !passes(&pod_egress::decide(&node, frame.as_slice(), None, PODS[n].ifindex, 0)) {
            prop_assert!(node.changes().is_empty());
        }
        node.discard();
        if !passes(&pod_ingress::decide(&node, frame.as_slice(), None, PODS[n].ifindex)) {
            prop_assert!(node.changes().is_empty());
        }
    }

    /// Options in the IPv4 header decide nothing but its length.
    #[test]
    fn options_decide_nothing(packet in frames(), tci in tags(), words in 0..=10_usize, n in 0..4_usize) {
        let node = experienced();
        let (plain, other) = (packet.clone().options(0).bytes(), packet.options(words).bytes());
        let tag = Some(Tag { tpid: TPID_8021Q, tci });
        let all = |frame: &[u8]| {
            let of = |decision: Decision<'_>| {
                let result = (answer(&decision), node.changes().clone());
                node.discard();
                result
            };
            [
                of(eni_ingress::decide(&node, frame, tag)),
                of(pod_egress::decide(&node, frame, None, PODS[n].ifindex, 0)),
                of(pod_ingress::decide(&node, frame, None, PODS[n].ifindex)),
                of(eni_egress::decide(&node, frame, None)),
            ]
        };
        prop_assert_eq!(all(&plain), all(&other));
    }
}

// ---- The memory against a model of it.

/// What happens to the flows of one pod.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// A packet of the client reaches the pod by a door: does it open the connection?
    Arrives(Door, bool),
    /// The pod sends to the client.
    Replies,
    /// Seconds pass.
    Waits(u32),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let door = prop::sample::select(vec![Door::Wire, Door::Local, Door::Host]);
    let event = prop_oneof![
        4 => (door, any::<bool>()).prop_map(|(door, opens)| Event::Arrives(door, opens)),
        4 => Just(Event::Replies),
        1 => (0..400_u32).prop_map(Event::Waits),
    ];
    prop::collection::vec(event, 1..40)
}

/// The rule in one's own words: a reply leaves by the door that the last request came in by. A connection is opened once
/// and stays where it was opened; without connections every packet is a request. Memories without a connection fade.
#[derive(Debug)]
struct Model {
    default: Door,
    connections: bool,
    /// The door that differs from the default, with the time until which it is certainly, and possibly, remembered.
    other: Option<(Door, u32, u32)>,
}

impl Model {
    fn touch(&mut self, door: Door, now: u32) {
        let sure = if self.connections { u32::MAX } else { now + Flow::IDLE - Flow::REFRESH + 1 };
        let most = if self.connections { u32::MAX } else { now + Flow::IDLE };
        self.other = Some((door, sure, most));
    }

    fn arrives(&mut self, door: Door, opens: bool, now: u32) {
        if opens || !self.connections {
            if door == self.default {
                self.other = None;
            } else {
                self.touch(door, now);
            }
        } else if self.other.is_none() && door != self.default {
            self.touch(door, now);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn replies_leave_by_the_door_of_their_request(events in events(), which in 0..4_usize, connections in any::<bool>()) {
        let mut node = node();
        let (remote, default) = [
            (A.ipv4, Door::Local),
            (NODE, Door::Host),
            (REMOTE, Door::Wire),
            (VIP_IN_SERVICES, Door::Wire),
        ][which];
        // A service's virtual address within a host prefix: arrivals do not ask whether it is one, so nothing differs
        // for a client that is not in it.
        let default = if which == 3 { Door::Host } else { default };
        let (client, server) = ((remote, 4000), (B.ipv4, 53));
        let mut model = Model { default, connections, other: None };
        for event in events {
            match event {
                Event::Waits(seconds) => node.now += seconds,
                Event::Arrives(Door::Local, _) if remote != A.ipv4 => {}
                Event::Arrives(door, opens) => {
                    let packet = if connections {
                        tcp(client, server, if opens { SYN } else { ACK })
                    } else {
                        Packet::udp(client, server)
                    };
                    let (outcome, _) = match door {
                        Door::Wire => from_fabric(&mut node, &B, packet),
                        Door::Host => from_host(&mut node, &B, packet),
                        // A's own door is not the matter here: it has no memory.
                        Door::Local => from_pod(&mut node, &A, packet),
                    };
                    // What continues a flow of the wire does not leave it for the fast path.
                    let wire = model.other.is_some_and(|(other, ..)| other == Door::Wire);
                    if connections && door == Door::Local && !opens && wire {
                        prop_assert_eq!(outcome.name(), Door::Wire.name());
                        continue;
                    }
                    prop_assert_eq!(outcome.name(), door.name());
                    model.arrives(door, opens, node.now);
                }
                Event::Replies => {
                    let packet = if connections { tcp(server, client, ACK) } else { Packet::udp(server, client) };
                    let outcome = match from_pod(&mut node, &B, packet).0 {
                        Outcome::HostService => Outcome::Host,
                        outcome => outcome,
                    };
                    let allowed: Vec<Door> = match model.other {
                        None => [model.default].into(),
                        Some((door, sure, _)) if node.now < sure => [door].into(),
                        Some((door, _, most)) if node.now <= most => [door, model.default].into(),
                        Some(_) => [model.default].into(),
                    };
                    prop_assert!(
                        allowed.iter().any(|door| door.name() == outcome.name()),
                        "left by {}, allowed {:?}, {:?}", outcome.name(), allowed, model
                    );
                    match model.other {
                        Some((door, ..)) if door.name() == outcome.name() => model.touch(door, node.now),
                        _ => model.other = None,
                    }
                }
            }
        }
    }
}

/// Every outcome has a name of its own, a meaning, and a place in the counters.
#[test]
fn outcomes_are_told_apart() {
    let mut names = HashMap::new();
    for outcome in Outcome::ALL {
        assert!(names.insert(outcome.name(), *outcome).is_none(), "{}", outcome.name());
        assert!(outcome.meaning().trim().ends_with('.'), "{}", outcome.name());
        assert!(
            outcome
                .name()
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        );
        for direction in Direction::ALL {
            let index = crate::abi::CounterRow::index(direction, *outcome);
            assert!(index < crate::abi::CounterRow::ZERO.counters.len());
        }
    }
}

/// The tables of this file's tests are not the subject: a look at what they say.
#[test]
fn the_node_of_the_tests() {
    let node = testing::node();
    assert_eq!(node.subeni(101), 1);
    assert_eq!(node.pod_ip4[&D.ipv4], 4);
    assert_eq!(node.host_dst([10, 247, 3, 4]), 5);
    assert_eq!(node.host_dst([10, 248, 3, 4]), 0);
    let key = flow_key(&A, (REMOTE, 1), 2, 6);
    let mut changed = node.clone();
    changed.remember(&key, &Flow { door: 1, origin: 1, pad: [0; 2], seen: 0 });
    assert!(matches!(changed.settle()[..], [Change::Remember(..)]));
    assert!(changed.marked(A.id) && changed.flow(&key).is_some());
}

//! The fast path by security groups: flows, their state, and what becomes of them when rules change.

use super::{eni_ingress, pod_egress};
use crate::{
    abi::{
        Endpoint, Outcome,
        endpoint::flag,
        policy::{ALLOW, ClassGroups, DENY, NOTHING, State, interval, timeout, traffic_key},
    },
    packet::{
        ipv4::TCP,
        link::{TPID_8021Q, Tag},
    },
    testing::{
        GATEWAY_MAC, MemoryTables, PODS, Packet,
        packet::{ACK, SYN, SYN_ACK, Socket},
        rules::{SERVED, judged_node, set_served},
    },
};

const FIN_ACK: u8 = 0x11;
const RST: u8 = 0x04;

type Answer = (Outcome, Option<Outcome>);

const FAST: Answer = (Outcome::Local, None);

fn fast(remark: Outcome) -> Answer {
    (Outcome::Local, Some(remark))
}

fn wire(remark: Outcome) -> Answer {
    (Outcome::Wire, Some(remark))
}

fn node() -> MemoryTables {
    judged_node()
}

/// Lets the client open this traffic towards the server, and nothing else, from now on.
fn allow(node: &mut MemoryTables, traffic: &[(u8, u16)]) {
    node.rules.epoch += 1;
    let half = node.rules.epoch & 1;
    set_served(&mut node.rules, half, traffic);
}

const CLIENT: Endpoint = PODS[0];
const SERVER: Endpoint = PODS[1];
const HTTP: (Socket, Socket) = ((CLIENT.ipv4, 4000), (SERVER.ipv4, 80));

fn send(node: &mut MemoryTables, pod: &Endpoint, packet: Packet) -> Answer {
    let frame = packet.macs(pod.mac, pod.gateway_mac).bytes();
    let decision = pod_egress::decide(node, frame.as_slice(), None, pod.ifindex, 0);
    let answer = (decision.outcome, decision.remark);
    node.settle();
    answer
}

fn ask(node: &mut MemoryTables, flags: u8) -> Answer {
    send(node, &CLIENT, Packet::tcp(HTTP.0, HTTP.1, flags))
}

fn answer(node: &mut MemoryTables, flags: u8) -> Answer {
    send(node, &SERVER, Packet::tcp(HTTP.1, HTTP.0, flags))
}

fn state(node: &MemoryTables) -> u8 {
    assert_eq!(node.pairs.len(), 1, "{:?}", node.pairs);
    node.pairs.values().next().unwrap().state
}

#[test]
fn a_connection_is_judged_by_its_first_packet() {
    let mut node = node();
    assert_eq!(ask(&mut node, SYN), fast(Outcome::FlowAdmitted));
    assert_eq!(state(&node), State::New as u8);
    assert_eq!(answer(&mut node, SYN_ACK), FAST);
    assert_eq!(state(&node), State::Established as u8);
    assert_eq!(ask(&mut node, ACK), FAST);
    assert_eq!(answer(&mut node, FIN_ACK), FAST);
    assert_eq!(state(&node), State::Closing as u8);
    assert_eq!(ask(&mut node, ACK), FAST);
}

#[test]
fn what_is_not_allowed_goes_to_the_vpc() {
    let mut node = node();
    let other_port = Packet::tcp(HTTP.0, (SERVER.ipv4, 81), SYN);
    assert_eq!(send(&mut node, &CLIENT, other_port), wire(Outcome::PolicyRefused));
    assert_eq!(answer(&mut node, SYN), wire(Outcome::PolicyRefused));
    assert_eq!(answer(&mut node, SYN_ACK), wire(Outcome::PolicyNoFlow));
    let refused = Packet::tcp(HTTP.0, (PODS[2].ipv4, 80), SYN);
    assert_eq!(send(&mut node, &CLIENT, refused), wire(Outcome::PolicyRefused));
    assert!(node.pairs.is_empty());
    node.endpoints[2].policy_id = 0;
    assert_eq!(ask(&mut node, SYN), wire(Outcome::PolicyWire));
    node.endpoints[2].policy_id = 5000;
    assert_eq!(ask(&mut node, SYN), wire(Outcome::PolicyWire));
}

#[test]
fn open_pairs_keep_no_state() {
    let mut node = node();
    node.endpoints[4].mtu = 1400;
    let (c, d) = (PODS[2], PODS[3]);
    assert_eq!(send(&mut node, &c, Packet::tcp((c.ipv4, 1), (d.ipv4, 2), ACK)), FAST);
    assert_eq!(send(&mut node, &d, Packet::icmp(3, d.ipv4, c.ipv4, 0)), FAST);
    assert!(node.pairs.is_empty());
}

/// A SYN from the side that answers opens a connection of its own.
#[test]
fn a_syn_is_judged_whatever_stands() {
    let mut node = node();
    ask(&mut node, SYN);
    answer(&mut node, SYN_ACK);
    assert_eq!(answer(&mut node, SYN), wire(Outcome::PolicyRefused));
    assert_eq!(state(&node), State::Established as u8);
    assert_eq!(ask(&mut node, SYN), fast(Outcome::FlowAdmitted));
}

#[test]
fn a_lost_entry_is_made_anew_by_the_side_that_opened() {
    let mut node = node();
    ask(&mut node, SYN);
    answer(&mut node, SYN_ACK);
    node.pairs.clear();
    assert_eq!(answer(&mut node, ACK), wire(Outcome::PolicyNoFlow));
    assert_eq!(ask(&mut node, ACK), fast(Outcome::FlowReadmitted));
    assert_eq!(answer(&mut node, ACK), FAST);
    // An RST opens nothing.
    node.pairs.clear();
    assert_eq!(ask(&mut node, RST), FAST);
    assert!(node.pairs.is_empty());
}

#[test]
fn a_rule_that_is_taken_away_ends_its_flows() {
    let mut node = node();
    ask(&mut node, SYN);
    answer(&mut node, SYN_ACK);
    // A change that leaves the flow allowed is noted by its next packet, of either direction.
    allow(&mut node, &[(TCP, 80), (TCP, 81)]);
    assert_eq!(answer(&mut node, ACK), FAST);
    assert_eq!(node.pairs.values().next().unwrap().epoch, node.rules.epoch);
    for side in [true, false] {
        allow(&mut node, &SERVED);
        ask(&mut node, SYN);
        answer(&mut node, SYN_ACK);
        allow(&mut node, &[(TCP, 81)]);
        let first = if side { ask(&mut node, ACK) } else { answer(&mut node, ACK) };
        assert_eq!(first, wire(Outcome::PolicyRevoked));
        assert!(node.pairs.is_empty());
        assert_eq!(ask(&mut node, ACK), wire(Outcome::PolicyNoFlow));
        assert_eq!(answer(&mut node, ACK), wire(Outcome::PolicyNoFlow));
    }
}

#[test]
fn idle_flows_are_over() {
    let mut node = node();
    ask(&mut node, SYN);
    node.now += timeout::TCP_TRANSITORY - 1;
    assert_eq!(answer(&mut node, SYN_ACK), FAST);
    node.now += timeout::TCP_ESTABLISHED - 1;
    assert_eq!(answer(&mut node, ACK), FAST);
    node.now += timeout::TCP_ESTABLISHED;
    assert_eq!(answer(&mut node, ACK), wire(Outcome::PolicyNoFlow));

    let (query, reply) = ((CLIENT.ipv4, 4000), (SERVER.ipv4, 53));
    assert_eq!(send(&mut node, &CLIENT, Packet::udp(query, reply)), fast(Outcome::FlowAdmitted));
    node.now += timeout::UDP - 1;
    assert_eq!(send(&mut node, &SERVER, Packet::udp(reply, query)), FAST);
    node.now += timeout::UDP;
    assert_eq!(send(&mut node, &SERVER, Packet::udp(reply, query)), wire(Outcome::PolicyRefused));
}

/// A connection that began while a pod could not be judged stays with the VPC, both ways, until it is opened anew.
#[test]
fn a_connection_of_the_wire_stays_there() {
    let mut node = node();
    node.endpoints[1].policy_id = 0;
    assert_eq!(ask(&mut node, SYN), wire(Outcome::PolicyWire));
    let syn = Packet::tcp(HTTP.0, HTTP.1, SYN).macs(GATEWAY_MAC, SERVER.mac).bytes();
    let tag = Tag { tpid: TPID_8021Q, tci: SERVER.vid };
    assert_eq!(eni_ingress::decide(&node, syn.as_slice(), Some(tag)).outcome, Outcome::Wire);
    node.settle();
    node.endpoints[1].policy_id = 1;
    let stays = (Outcome::Wire, None);
    assert_eq!(ask(&mut node, ACK), stays);
    assert_eq!(answer(&mut node, SYN_ACK), stays);
    let about = Packet::tcp(HTTP.1, HTTP.0, ACK);
    assert_eq!(send(&mut node, &CLIENT, Packet::icmp_error(3, CLIENT.ipv4, SERVER.ipv4, &about)), stays);
    assert!(node.pairs.is_empty());
    // Of another connection nothing is remembered.
    let other = Packet::tcp((CLIENT.ipv4, 4001), HTTP.1, ACK);
    assert_eq!(send(&mut node, &CLIENT, other), fast(Outcome::FlowReadmitted));
    assert_eq!(ask(&mut node, SYN), fast(Outcome::FlowAdmitted));
    assert_eq!(answer(&mut node, SYN_ACK), FAST);
}

#[test]
fn an_echo_is_answered_and_not_turned_round() {
    let mut node = node();
    let (a, b) = (CLIENT.ipv4, SERVER.ipv4);
    assert_eq!(send(&mut node, &SERVER, Packet::icmp(0, b, a, 7)), wire(Outcome::PolicyRefused));
    assert_eq!(send(&mut node, &CLIENT, Packet::icmp(8, a, b, 7)), fast(Outcome::FlowAdmitted));
    assert_eq!(send(&mut node, &SERVER, Packet::icmp(0, b, a, 7)), FAST);
    assert_eq!(send(&mut node, &SERVER, Packet::icmp(0, b, a, 8)), wire(Outcome::PolicyRefused));
    assert_eq!(send(&mut node, &SERVER, Packet::icmp(8, b, a, 7)), wire(Outcome::PolicyRefused));
    assert_eq!(send(&mut node, &CLIENT, Packet::icmp(0, a, b, 7)), wire(Outcome::PolicyRefused));
    // A change that allows it still, and one that does not.
    allow(&mut node, &SERVED);
    assert_eq!(send(&mut node, &SERVER, Packet::icmp(0, b, a, 7)), FAST);
    allow(&mut node, &[]);
    assert_eq!(send(&mut node, &SERVER, Packet::icmp(0, b, a, 7)), wire(Outcome::PolicyRevoked));
}

#[test]
fn errors_follow_the_flow_they_are_about() {
    let mut node = node();
    let (a, b) = (CLIENT.ipv4, SERVER.ipv4);
    let error = |about: &Packet| Packet::icmp_error(3, b, a, about);
    let query = Packet::udp((a, 4000), (b, 53));
    assert_eq!(send(&mut node, &SERVER, error(&query)), wire(Outcome::PolicyRefused));
    send(&mut node, &CLIENT, query.clone());
    assert_eq!(send(&mut node, &SERVER, error(&query)), FAST);
    // About another flow, about what the server itself sent, about what the client sent to another.
    assert_eq!(
        send(&mut node, &SERVER, error(&Packet::udp((a, 4001), (b, 53)))),
        wire(Outcome::PolicyRefused)
    );
    assert_eq!(
        send(&mut node, &SERVER, error(&Packet::udp((b, 53), (a, 4000)))),
        wire(Outcome::PolicyRefused)
    );
    let elsewhere = Packet::udp((a, 4000), (PODS[2].ipv4, 53));
    assert_eq!(send(&mut node, &SERVER, error(&elsewhere)), wire(Outcome::PolicyRefused));
    // The client's error about the answer.
    let answer = Packet::udp((b, 53), (a, 4000));
    assert_eq!(send(&mut node, &CLIENT, Packet::icmp_error(3, a, b, &answer)), FAST);
    // About an echo, and its answer.
    let (echo, reply) = (Packet::icmp(8, a, b, 9), Packet::icmp(0, b, a, 9));
    assert_eq!(send(&mut node, &SERVER, error(&echo)), wire(Outcome::PolicyRefused));
    send(&mut node, &CLIENT, echo.clone());
    assert_eq!(send(&mut node, &SERVER, error(&echo)), FAST);
    assert_eq!(send(&mut node, &CLIENT, Packet::icmp_error(3, a, b, &reply)), FAST);
    assert_eq!(send(&mut node, &CLIENT, Packet::icmp_error(3, a, b, &echo)), wire(Outcome::PolicyRefused));
    // Errors keep no flow alive, and follow none that rules ended.
    allow(&mut node, &[]);
    assert_eq!(send(&mut node, &SERVER, error(&echo)), wire(Outcome::PolicyRevoked));
}

#[test]
fn later_fragments_follow_the_first_as_long_as_its_rules_hold() {
    let mut node = node();
    let part =
        |offset| Packet::udp((CLIENT.ipv4, 4000), (SERVER.ipv4, 53)).payload(64).fragment(9, offset, true);
    assert_eq!(send(&mut node, &CLIENT, part(5)), (Outcome::Wire, None));
    assert_eq!(send(&mut node, &CLIENT, part(0)), fast(Outcome::FlowAdmitted));
    assert_eq!(send(&mut node, &CLIENT, part(5)), FAST);
    // A pod that cannot be judged came in the place of the one that was meant.
    node.endpoints[2].policy_id = 0;
    assert_eq!(send(&mut node, &CLIENT, part(5)), (Outcome::Wire, None));
    node.endpoints[2].policy_id = 2;
    allow(&mut node, &[]);
    assert_eq!(send(&mut node, &CLIENT, part(5)), (Outcome::Wire, None));
}

#[test]
fn pods_have_settings_of_their_own() {
    let mut node = node();
    node.endpoints[1].flags = 0;
    assert_eq!(ask(&mut node, SYN), fast(Outcome::FlowAdmitted));
    node.endpoints[2].flags = 0;
    let other_port = Packet::tcp(HTTP.0, (SERVER.ipv4, 81), SYN);
    assert_eq!(send(&mut node, &CLIENT, other_port), FAST);
    node.endpoints[1].flags = flag::OFF;
    assert_eq!(ask(&mut node, SYN), (Outcome::Wire, None));
}

#[test]
fn observing_counts_and_changes_nothing() {
    let mut node = node();
    for endpoint in &mut node.endpoints[1..] {
        endpoint.flags = flag::OBSERVE;
    }
    assert_eq!(ask(&mut node, SYN), fast(Outcome::WouldFast));
    assert_eq!(answer(&mut node, SYN_ACK), fast(Outcome::WouldFast));
    let other_port = Packet::tcp(HTTP.0, (SERVER.ipv4, 81), SYN);
    assert_eq!(send(&mut node, &CLIENT, other_port), fast(Outcome::WouldRefuse));
    node.endpoints[2].policy_id = 0;
    assert_eq!(ask(&mut node, ACK), fast(Outcome::WouldWire));
}

/// The answers of a VPC that is asked about packets of unequal MTU would be those of one that does not know the flow.
#[test]
fn pairs_of_unequal_mtu_are_left_to_the_vpc() {
    let mut node = node();
    node.endpoints[2].mtu = 9000;
    assert_eq!(ask(&mut node, SYN), wire(Outcome::PolicyWire));
}

#[test]
fn the_first_group_that_says_anything_decides() {
    let mut node = node();
    let mut groups = ClassGroups::default();
    groups.groups[..3].copy_from_slice(&[4, 5, 6]);
    node.rules.set_class(2, groups);
    // At 1: all; at 3: nothing but a denied port; at 8: all denied.
    let port = traffic_key(TCP, 80);
    let words = [
        0,
        1,
        interval(0, ALLOW),
        3,
        interval(0, NOTHING),
        interval(port, DENY),
        interval(port + 1, NOTHING),
        0,
        1,
        interval(0, DENY),
    ];
    node.rules.set_words(&words);
    node.rules.set_programs(4, false, &[0, 3, 0]);
    node.rules.set_programs(5, false, &[0, 1, 0]);
    node.rules.set_programs(6, false, &[0, 8, 0]);
    assert_eq!(ask(&mut node, SYN), wire(Outcome::PolicyRefused));
    let other_port = Packet::tcp(HTTP.0, (SERVER.ipv4, 81), SYN);
    assert_eq!(send(&mut node, &CLIENT, other_port), fast(Outcome::FlowAdmitted));
}

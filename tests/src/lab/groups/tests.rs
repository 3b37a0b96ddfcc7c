//! Each test is named after the sentence of the page of `eniway-policy` that it holds the evaluator to.

use std::{net::Ipv4Addr, time::Duration};

use eniway_policy::{
    model::{Groups, Membership},
    timeout,
};
use serde_json::{Value, json};

use super::{
    Packet, Verdict, Vpc, Why,
    packet::{ICMP, Part, Quote, TCP, Transport, UDP, flag},
};

const A: Ipv4Addr = Ipv4Addr::new(10, 1, 18, 1);
const B: Ipv4Addr = Ipv4Addr::new(10, 1, 18, 2);
const C: Ipv4Addr = Ipv4Addr::new(10, 1, 19, 3);
const NO_POD: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 20);
const SYN: u8 = flag::SYN;
const SYN_ACK: u8 = flag::SYN | flag::ACK;
const ACK: u8 = flag::ACK;

/// A VPC and its clock.
struct Scene {
    vpc: Vpc,
    now: Duration,
}

/// What lets everything out.
fn out() -> Value {
    json!({"direction": "egress", "action": "allow"})
}

fn groups(groups: Value) -> Groups {
    serde_json::from_value(groups).expect("groups")
}

fn list(ids: &[&str]) -> Membership {
    Membership { groups: serde_json::from_value(json!(ids)).expect("a list"), revision: 0 }
}

impl Scene {
    /// Pods A and B have group `a` and `b`, each with these rules.
    fn new(a: &[Value], b: &[Value]) -> Self {
        let mut scene = Self::with(json!({"security_groups": [
            {"id": "a", "rules": a}, {"id": "b", "rules": b}
        ]}));
        scene.vpc.set_member(A, list(&["a"]));
        scene.vpc.set_member(B, list(&["b"]));
        scene
    }

    fn with(document: Value) -> Self {
        let mut vpc = Vpc::default();
        vpc.set_groups(groups(document));
        Self { vpc, now: Duration::from_secs(1000) }
    }

    /// A lets everything out, B has these rules.
    fn into_b(rules: &[Value]) -> Self {
        Self::new(&[out()], rules)
    }

    fn see(&mut self, packet: Packet) -> Verdict {
        self.vpc.see(self.now, &packet)
    }

    fn passes(&mut self, packet: Packet) -> bool {
        self.see(packet) == Verdict::Pass
    }

    fn later(&mut self, seconds: u32) -> &mut Self {
        self.now += Duration::from_secs(seconds.into());
        self
    }
}

fn packet(src: Ipv4Addr, dst: Ipv4Addr, proto: u8, transport: Transport) -> Packet {
    Packet { src, dst, proto, ident: 7, part: Part::Whole, transport }
}

fn tcp(src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16), flags: u8) -> Packet {
    packet(src.0, dst.0, TCP, Transport::Tcp { src: src.1, dst: dst.1, flags })
}

fn udp(src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16)) -> Packet {
    packet(src.0, dst.0, UDP, Transport::Udp { src: src.1, dst: dst.1 })
}

fn icmp(src: Ipv4Addr, dst: Ipv4Addr, kind: u8, ident: u16) -> Packet {
    packet(src, dst, ICMP, Transport::Icmp { kind, code: 0, ident, quote: None })
}

fn error(src: Ipv4Addr, dst: Ipv4Addr, quoted: &Packet) -> Packet {
    let mut start = [0; 8];
    match quoted.transport {
        Transport::Tcp { src, dst, .. } | Transport::Udp { src, dst } => {
            start[..2].copy_from_slice(&src.to_be_bytes());
            start[2..4].copy_from_slice(&dst.to_be_bytes());
        }
        Transport::Icmp { kind, ident, .. } => {
            start[0] = kind;
            start[4..6].copy_from_slice(&ident.to_be_bytes());
        }
        Transport::None => {}
    }
    let quote = Quote { src: quoted.src, dst: quoted.dst, proto: quoted.proto, start: Some(start) };
    packet(src, dst, ICMP, Transport::Icmp { kind: 3, code: 1, ident: 0, quote: Some(quote) })
}

fn other(src: Ipv4Addr, dst: Ipv4Addr, proto: u8) -> Packet {
    packet(src, dst, proto, Transport::None)
}

/// A and a port of its.
fn a(port: u16) -> (Ipv4Addr, u16) {
    (A, port)
}

/// B and a port of its.
fn b(port: u16) -> (Ipv4Addr, u16) {
    (B, port)
}

fn allow(protocol: &str, ports: &str) -> Value {
    json!({"direction": "ingress", "action": "allow", "protocol": protocol, "ports": ports})
}

// ---- Who is judged.

#[test]
fn a_packet_passes_if_a_s_egress_rules_allow_it_and_b_s_ingress_rules_allow_it() {
    let to_80 = json!({"direction": "egress", "action": "allow", "protocol": "tcp", "ports": "80"});
    let mut both = Scene::new(std::slice::from_ref(&to_80), &[allow("tcp", "80-90")]);
    assert!(both.passes(tcp(a(1), b(80), SYN)));
    assert!(!both.passes(tcp(a(1), b(81), SYN)), "only B allows");
    let mut only_a = Scene::new(&[to_80], &[allow("tcp", "90")]);
    assert!(!only_a.passes(tcp(a(1), b(80), SYN)), "only A allows");
}

#[test]
fn for_a_s_rules_the_remote_is_b_for_b_s_rules_it_is_a() {
    let rule = |direction: &str, cidr: &str| json!({"direction": direction, "action": "allow", "cidr": cidr});
    let right = (rule("egress", "10.1.18.2"), rule("ingress", "10.1.18.1"));
    assert!(Scene::new(&[right.0], &[right.1]).passes(udp(a(1), b(2))));
    let wrong = (rule("egress", "10.1.18.1"), rule("ingress", "10.1.18.2"));
    assert!(!Scene::new(&[wrong.0, out()], &[wrong.1]).passes(udp(a(1), b(2))));
}

// ---- Which rules match.

#[test]
fn a_rule_matches_a_packet_of_its_direction() {
    let mut scene = Scene::into_b(&[out()]);
    assert!(!scene.passes(udp(a(1), b(2))));
    assert!(!scene.passes(udp(b(1), a(2))), "A lets nothing in");
}

#[test]
fn ports_are_destination_ports_in_both_directions() {
    let egress = json!({"direction": "egress", "action": "allow", "protocol": "udp", "ports": "53"});
    let mut scene = Scene::new(&[egress], &[allow("udp", "53")]);
    assert!(scene.passes(udp(a(4000), b(53))));
    assert!(!scene.passes(udp(a(53), b(4000))));
}

#[test]
fn a_cidr_and_an_address_group_cover_the_addresses_in_them() {
    let mut scene = Scene::with(json!({
        "security_groups": [{"id": "all", "rules": [out()]}, {"id": "b", "rules": [
            {"direction": "ingress", "action": "allow", "cidr": "10.1.18.0/24"},
            {"direction": "ingress", "action": "allow", "address_group": "far"}
        ]}],
        "address_groups": [{"id": "far", "addresses": ["10.1.19.3", "192.0.2.0/24"]}]
    }));
    for pod in [A, C, NO_POD] {
        scene.vpc.set_member(pod, list(&["all"]));
    }
    scene.vpc.set_member(B, list(&["b"]));
    assert!(scene.passes(udp(a(1), b(2))));
    assert!(scene.passes(udp((C, 1), b(2))));
    assert!(!scene.passes(udp((NO_POD, 1), b(2))));
}

#[test]
fn an_ipv4_prefix_matches_ipv4_packets_only() {
    let v6 = json!({"direction": "ingress", "action": "allow", "cidr": "::/0"});
    assert!(!Scene::into_b(&[v6]).passes(udp(a(1), b(2))));
    let v4 = json!({"direction": "ingress", "action": "allow", "cidr": "0.0.0.0/0"});
    assert!(Scene::into_b(&[v4]).passes(udp(a(1), b(2))));
}

#[test]
fn a_remote_group_covers_every_pod_that_has_the_group_anywhere_in_its_list() {
    let mut scene = Scene::with(json!({"security_groups": [
        {"id": "first", "rules": [out()]}, {"id": "last"},
        {"id": "b", "rules": [{"direction": "ingress", "action": "allow", "group": "last"}]}
    ]}));
    scene.vpc.set_member(B, list(&["b"]));
    scene.vpc.set_member(A, list(&["first", "last"]));
    scene.vpc.set_member(C, list(&["first"]));
    assert!(scene.passes(udp(a(1), b(2))));
    assert!(!scene.passes(udp((C, 1), b(2))));
    assert!(!scene.passes(udp((NO_POD, 1), b(2))), "no pod, no group");
}

#[test]
fn a_rule_without_a_remote_covers_everybody() {
    let mut scene = Scene::into_b(&[json!({"direction": "ingress", "action": "allow"})]);
    assert!(scene.passes(udp(a(1), b(2))) && scene.passes(udp((NO_POD, 1), b(2))));
}

#[test]
fn any_matches_every_protocol() {
    let mut scene = Scene::into_b(&[json!({"direction": "ingress", "action": "allow", "protocol": "any"})]);
    let all = [tcp(a(1), b(2), SYN), udp(a(1), b(2)), icmp(A, B, 5, 0), other(A, B, 47), other(A, B, 132)];
    for packet in all {
        assert!(scene.passes(packet), "{packet}");
    }
}

#[test]
fn icmp_is_protocol_1_with_an_optional_type_and_code() {
    let icmp_rule = |more: &str| -> Vec<Value> {
        let text = format!(r#"{{"direction": "ingress", "action": "allow", "protocol": "icmp" {more}}}"#);
        vec![serde_json::from_str(&text).expect("a rule")]
    };
    let unreachable = |code: u8| packet(A, B, ICMP, Transport::Icmp { kind: 5, code, ident: 0, quote: None });
    let mut any = Scene::into_b(&icmp_rule(""));
    assert!(any.passes(icmp(A, B, 8, 1)) && any.passes(unreachable(1)));
    assert!(!any.passes(other(A, B, 58)) && !any.passes(udp(a(1), b(2))));
    let mut typed = Scene::into_b(&icmp_rule(r#", "icmp_type": 5"#));
    assert!(typed.passes(unreachable(0)) && typed.passes(unreachable(1)) && !typed.passes(icmp(A, B, 8, 1)));
    let mut coded = Scene::into_b(&icmp_rule(r#", "icmp_type": 5, "icmp_code": 1"#));
    assert!(coded.passes(unreachable(1)) && !coded.passes(unreachable(0)));
}

#[test]
fn another_protocol_is_named_by_its_number() {
    let gre = json!({"direction": "ingress", "action": "allow", "protocol": "gre"});
    let mut scene = Scene::into_b(&[gre]);
    assert!(scene.passes(other(A, B, 47)) && !scene.passes(other(A, B, 50)));
}

// ---- Which rule decides.

#[test]
fn by_group_in_the_order_of_the_pod_s_list() {
    let mut scene = Scene::with(json!({"security_groups": [
        {"id": "all", "rules": [out()]},
        {"id": "yes", "rules": [{"direction": "ingress", "action": "allow", "priority": 100}]},
        {"id": "no", "rules": [{"direction": "ingress", "action": "deny", "priority": 1}]}
    ]}));
    scene.vpc.set_member(A, list(&["all"]));
    scene.vpc.set_member(B, list(&["yes", "no"]));
    assert!(scene.passes(udp(a(1), b(2))));
    scene.vpc.set_member(B, list(&["no", "yes"]));
    assert!(!scene.passes(udp(a(3), b(2))));
}

#[test]
fn within_a_group_by_priority_1_before_100() {
    let rule =
        |action: &str, priority: u8| json!({"direction": "ingress", "action": action, "priority": priority});
    assert!(Scene::into_b(&[rule("deny", 100), rule("allow", 99)]).passes(udp(a(1), b(2))));
    assert!(!Scene::into_b(&[rule("allow", 2), rule("deny", 1)]).passes(udp(a(1), b(2))));
}

#[test]
fn within_a_priority_deny_before_allow() {
    let rule = |action: &str| json!({"direction": "ingress", "action": action, "priority": 5});
    for rules in [[rule("deny"), rule("allow")], [rule("allow"), rule("deny")]] {
        assert!(!Scene::into_b(&rules).passes(udp(a(1), b(2))));
    }
}

#[test]
fn a_group_in_which_no_rule_matches_says_nothing_the_next_one_is_asked() {
    let mut scene = Scene::with(json!({"security_groups": [
        {"id": "all", "rules": [out()]}, {"id": "web", "rules": [allow("tcp", "80")]},
        {"id": "dns", "rules": [allow("udp", "53")]}
    ]}));
    scene.vpc.set_member(A, list(&["all"]));
    scene.vpc.set_member(B, list(&["web", "dns"]));
    assert!(scene.passes(udp(a(1), b(53))) && scene.passes(tcp(a(1), b(80), SYN)));
}

#[test]
fn where_no_rule_of_any_group_matches_the_packet_is_denied_in_both_directions() {
    let everything_in = json!({"direction": "ingress", "action": "allow"});
    assert!(!Scene::into_b(&[]).passes(udp(a(1), b(2))));
    assert!(!Scene::new(&[], &[everything_in]).passes(udp(a(1), b(2))));
}

#[test]
fn a_pod_without_any_group_is_not_decidable() {
    let mut scene = Scene::into_b(&[allow("udp", "2")]);
    scene.vpc.set_member(A, list(&[]));
    assert_eq!(scene.see(udp(a(1), b(2))), Verdict::Undecidable(Why::NoGroups(A)));
}

#[test]
fn a_pod_with_a_group_or_an_address_group_that_is_not_known_is_not_decidable() {
    let mut scene = Scene::into_b(&[allow("udp", "2")]);
    scene.vpc.set_member(B, list(&["b", "x"]));
    let Verdict::Undecidable(Why::UnknownGroup(B, id)) = scene.see(udp(a(1), b(2))) else { panic!("x") };
    assert_eq!(id.as_str(), "x");
    let far = json!({"direction": "ingress", "action": "deny", "priority": 100, "address_group": "far"});
    let mut scene = Scene::into_b(&[allow("udp", "2"), far]);
    let Verdict::Undecidable(Why::UnknownGroup(B, id)) = scene.see(udp(a(1), b(2))) else { panic!("far") };
    assert_eq!(id.as_str(), "far");
}

#[test]
fn a_pod_whose_groups_are_older_than_the_revision_it_asks_for_is_not_decidable() {
    let mut scene = Scene::into_b(&[allow("udp", "2")]);
    scene.vpc.set_member(B, Membership { revision: 3, ..list(&["b"]) });
    assert_eq!(scene.see(udp(a(1), b(2))), Verdict::Undecidable(Why::Stale(B)));
    let newer = Groups { revision: 3, ..scene.vpc.groups().clone() };
    scene.vpc.set_groups(newer);
    assert!(scene.passes(udp(a(1), b(2))));
}

// ---- Flows.

#[test]
fn what_belongs_to_a_flow_that_was_allowed_passes_in_both_directions() {
    let mut scene = Scene::into_b(&[allow("tcp", "80"), allow("udp", "53")]);
    assert!(!scene.passes(tcp(b(80), a(1), SYN_ACK)), "before there is a flow");
    assert!(scene.passes(tcp(a(1), b(80), SYN)));
    for (packet, what) in [
        (tcp(b(80), a(1), SYN_ACK), "the answer"),
        (tcp(a(1), b(80), ACK), "data"),
        (tcp(b(80), a(1), ACK | flag::FIN), "the end"),
    ] {
        assert!(scene.passes(packet), "{what}");
    }
    assert!(!scene.passes(tcp(b(80), a(2), ACK)), "another port: another flow");
    assert!(scene.passes(udp(a(1), b(53))) && scene.passes(udp(b(53), a(1))));
    assert!(!scene.passes(udp(b(80), a(1))), "another protocol: another flow");
}

#[test]
fn a_denied_packet_opens_no_flow() {
    let mut scene = Scene::into_b(&[]);
    assert!(!scene.passes(udp(a(1), b(53))) && !scene.passes(udp(b(53), a(1))));
}

#[test]
fn a_syn_is_judged_by_the_rules_of_its_own_direction_even_where_a_flow_stands() {
    let mut scene = Scene::into_b(&[allow("tcp", "80")]);
    assert!(scene.passes(tcp(a(1), b(80), SYN)));
    assert!(!scene.passes(tcp(b(80), a(1), SYN)), "A lets nothing in");
    assert!(scene.passes(tcp(b(80), a(1), SYN_ACK)), "the flow still stands");
}

#[test]
fn any_other_packet_without_a_flow_is_judged_as_a_first_one_and_opens_a_flow() {
    let mut scene = Scene::into_b(&[allow("tcp", "80")]);
    assert!(scene.passes(tcp(a(1), b(80), ACK)));
    assert!(scene.passes(tcp(b(80), a(1), ACK)));
}

#[test]
fn only_an_rst_opens_none() {
    let mut scene = Scene::into_b(&[allow("tcp", "80")]);
    assert!(scene.passes(tcp(a(1), b(80), flag::RST)));
    assert!(!scene.passes(tcp(b(80), a(1), ACK)));
    assert!(scene.passes(tcp(a(2), b(80), flag::FIN | ACK)));
    assert!(scene.passes(tcp(b(80), a(2), ACK)));
}

#[test]
fn an_icmp_query_opens_a_flow_of_its_type_identifier_and_direction() {
    let mut scene =
        Scene::into_b(&[json!({"direction": "ingress", "action": "allow", "protocol": "icmp"}), out()]);
    for (query, answer) in [(8, 0), (13, 14), (15, 16)] {
        assert!(!scene.passes(icmp(B, A, answer, 9)), "an answer that nobody asked for");
        assert!(scene.passes(icmp(A, B, query, 9)));
        assert!(scene.passes(icmp(B, A, answer, 9)));
        assert!(!scene.passes(icmp(B, A, answer, 8)), "another identifier");
        assert!(!scene.passes(icmp(B, A, query, 9)), "a query in the other direction");
    }
    assert!(!scene.passes(icmp(B, A, 5, 9)), "neither a query nor an answer");
}

#[test]
fn an_answer_without_a_flow_is_judged_as_what_it_is_and_opens_none() {
    let reply = json!({"direction": "ingress", "action": "allow", "protocol": "icmp", "icmp_type": 0});
    let mut scene = Scene::into_b(&[reply, out()]);
    assert!(scene.passes(icmp(A, B, 0, 9)));
    assert!(!scene.passes(icmp(B, A, 8, 9)) && !scene.passes(icmp(B, A, 0, 9)));
}

#[test]
fn an_icmp_error_belongs_to_the_flow_of_the_packet_it_quotes() {
    let mut scene = Scene::into_b(&[
        allow("tcp", "80"),
        allow("udp", "53"),
        json!({"direction": "ingress", "action": "allow", "protocol": "icmp", "icmp_type": 8}),
        json!({"direction": "ingress", "action": "allow", "protocol": "gre"}),
        out(),
    ]);
    let opened = [tcp(a(1), b(80), SYN), udp(a(1), b(53)), icmp(A, B, 8, 9), other(A, B, 47)];
    for packet in opened {
        assert!(!scene.passes(error(B, A, &packet)), "before: {packet}");
        assert!(scene.passes(packet));
        assert!(scene.passes(error(B, A, &packet)), "{packet}");
    }
    // And about the answers.
    for packet in [tcp(b(80), a(1), ACK), udp(b(53), a(1)), icmp(B, A, 0, 9), other(B, A, 47)] {
        assert!(scene.passes(error(A, B, &packet)), "{packet}");
    }
    assert!(!scene.passes(error(B, A, &udp(a(2), b(53)))), "another flow");
}

#[test]
fn an_icmp_error_goes_to_the_quoted_packet_s_sender_and_comes_from_its_destination() {
    let mut scene = Scene::into_b(&[allow("udp", "53"), out()]);
    scene.vpc.set_member(C, list(&["b"]));
    let query = udp(a(1), b(53));
    assert!(scene.passes(query));
    assert!(!scene.passes(error(C, A, &query)), "from a third");
    assert!(!scene.passes(error(A, B, &query)), "to the wrong end");
}

#[test]
fn an_icmp_error_that_belongs_to_no_flow_opens_none() {
    let any = json!({"direction": "ingress", "action": "allow", "protocol": "icmp"});
    let mut scene = Scene::into_b(&[any, out()]);
    let about = udp(b(1), a(53));
    assert!(scene.passes(error(A, B, &about)));
    assert!(!scene.passes(about), "the error did not open its flow");
}

#[test]
fn other_protocols_have_one_flow_for_each_pair_of_addresses_and_protocol() {
    let mut scene =
        Scene::into_b(&[json!({"direction": "ingress", "action": "allow", "protocol": "gre"}), out()]);
    assert!(!scene.passes(other(B, A, 47)));
    assert!(scene.passes(other(A, B, 47)) && scene.passes(other(B, A, 47)));
    assert!(!scene.passes(other(B, A, 50)));
}

#[test]
fn of_a_fragmented_datagram_later_fragments_share_the_first_one_s_fate() {
    let part = |packet: Packet, ident: u16, part: Part| Packet { ident, part, ..packet };
    let later = |ident: u16| part(packet(A, B, UDP, Transport::None), ident, Part::Later);
    let mut scene = Scene::into_b(&[allow("udp", "53")]);
    assert_eq!(scene.see(later(1)), Verdict::Drop(Why::NoFirstFragment));
    assert!(scene.passes(part(udp(a(1), b(53)), 1, Part::First)) && scene.passes(later(1)));
    assert!(!scene.passes(part(udp(a(1), b(54)), 2, Part::First)) && !scene.passes(later(2)));
}

#[test]
fn a_flow_ends_when_nothing_was_seen_of_it_for_the_time() {
    let mut scene = Scene::into_b(&[
        allow("tcp", "80"),
        allow("udp", "53"),
        json!({"direction": "ingress", "action": "allow", "protocol": "icmp"}),
        json!({"direction": "ingress", "action": "allow", "protocol": "gre"}),
        out(),
    ]);
    let cases = [
        (timeout::TCP_TRANSITORY, tcp(a(1), b(80), SYN), tcp(b(80), a(1), SYN_ACK)),
        (timeout::UDP, udp(a(1), b(53)), udp(b(53), a(1))),
        (timeout::UDP, other(A, B, 47), other(B, A, 47)),
        (timeout::ICMP, icmp(A, B, 8, 1), icmp(B, A, 0, 1)),
    ];
    for (limit, first, answer) in cases {
        assert!(scene.passes(first));
        assert!(!scene.later(limit).passes(answer), "{answer}: too late");
        assert!(scene.passes(first));
        assert!(scene.later(limit - 1).passes(answer), "{answer}: in time");
    }
    // What is seen keeps it alive, in both directions.
    assert!(scene.passes(udp(a(1), b(53))));
    for _ in 0..3 {
        assert!(scene.later(timeout::UDP - 1).passes(udp(b(53), a(1))));
    }
}

#[test]
fn a_tcp_flow_of_which_both_directions_were_seen_lives_longer_until_a_fin_or_an_rst() {
    let established = |end: Option<Packet>| {
        let mut scene = Scene::into_b(&[allow("tcp", "80")]);
        assert!(scene.passes(tcp(a(1), b(80), SYN)) && scene.passes(tcp(b(80), a(1), SYN_ACK)));
        assert!(end.is_none_or(|packet| scene.passes(packet)));
        scene
    };
    let data = tcp(b(80), a(1), ACK);
    assert!(established(None).later(timeout::TCP_ESTABLISHED - 1).passes(data));
    assert!(!established(None).later(timeout::TCP_ESTABLISHED).passes(data));
    for end in [tcp(a(1), b(80), flag::FIN | ACK), tcp(b(80), a(1), flag::RST)] {
        assert!(established(Some(end)).later(timeout::TCP_TRANSITORY - 1).passes(data), "{end}");
        assert!(!established(Some(end)).later(timeout::TCP_TRANSITORY).passes(data), "{end}");
    }
    // A new connection of the same ports is new.
    let mut again = established(Some(tcp(b(80), a(1), flag::RST)));
    assert!(again.passes(tcp(a(1), b(80), SYN)) && again.passes(tcp(b(80), a(1), SYN_ACK)));
    assert!(again.later(timeout::TCP_TRANSITORY).passes(data));
}

// ---- Changes.

fn flow_of_dns() -> Scene {
    let mut scene = Scene::into_b(&[allow("udp", "53"), out()]);
    assert!(scene.passes(udp(a(1), b(53))) && scene.passes(udp(b(53), a(1))));
    scene
}

fn rules_of_b(scene: &mut Scene, rules: &[Value]) {
    scene.vpc.set_groups(groups(json!({"security_groups": [
        {"id": "a", "rules": [out()]}, {"id": "b", "rules": rules}, {"id": "c", "rules": rules}
    ]})));
}

#[test]
fn a_change_of_rules_holds_for_running_flows_too() {
    let mut scene = flow_of_dns();
    rules_of_b(&mut scene, &[allow("udp", "54"), out()]);
    assert!(!scene.passes(udp(a(1), b(53))) && !scene.passes(udp(b(53), a(1))));
}

#[test]
fn a_flow_that_the_new_rules_allow_goes_on() {
    let mut scene = flow_of_dns();
    rules_of_b(&mut scene, &[allow("udp", "1-100"), out()]);
    assert!(scene.passes(udp(b(53), a(1))), "its answers need no rule");
}

#[test]
fn it_is_judged_by_the_rules_of_the_direction_in_which_it_was_opened() {
    let mut scene = flow_of_dns();
    // B may no longer send, but B did not open it.
    rules_of_b(&mut scene, &[allow("udp", "53")]);
    assert!(scene.passes(udp(b(53), a(1))));
}

#[test]
fn a_flow_that_ended_by_a_change_does_not_come_back_with_the_rule() {
    let mut scene = flow_of_dns();
    rules_of_b(&mut scene, &[out()]);
    rules_of_b(&mut scene, &[allow("udp", "53"), out()]);
    assert!(!scene.passes(udp(b(53), a(1))));
    assert!(scene.passes(udp(a(1), b(53))));
}

#[test]
fn a_change_of_a_group_s_members_or_of_a_pod_s_groups_holds_too() {
    let from_group = json!({"direction": "ingress", "action": "allow", "group": "c"});
    let mut scene = Scene::with(json!({"security_groups": [
        {"id": "a", "rules": [out()]}, {"id": "b", "rules": [from_group]}, {"id": "c"}
    ]}));
    scene.vpc.set_member(B, list(&["b"]));
    scene.vpc.set_member(A, list(&["a", "c"]));
    assert!(scene.passes(udp(a(1), b(2))) && scene.passes(udp(b(2), a(1))));
    scene.vpc.set_member(A, list(&["a"]));
    assert!(!scene.passes(udp(a(1), b(2))) && !scene.passes(udp(b(2), a(1))));
}

#[test]
fn an_address_that_another_pod_gets_brings_no_flows_along() {
    let mut scene = flow_of_dns();
    scene.vpc.remove_member(A);
    scene.vpc.set_member(A, list(&["a"]));
    assert!(!scene.passes(udp(b(53), a(1))));
}

// ---- Reading and writing.

#[test]
fn packets_are_read_as_they_were_written() {
    let all = [
        tcp(a(1), b(80), SYN),
        udp(a(1), b(53)),
        icmp(A, B, 8, 9),
        other(A, B, 47),
        error(B, A, &udp(a(1), b(53))),
        error(B, A, &other(A, B, 47)),
        Packet { part: Part::First, ..udp(a(1), b(53)) },
        Packet { part: Part::Later, ..packet(A, B, UDP, Transport::None) },
    ];
    for packet in all {
        let bytes = packet.write(16);
        let read = Packet::read(&bytes).expect("a packet");
        assert_eq!(read.to_string(), packet.to_string());
        assert_eq!(read, packet);
    }
}

#[test]
fn packets_are_read_as_the_lab_writes_them() {
    use crate::lab::{Mac, raw::Frame};
    use std::net::SocketAddrV4;

    let frame = || Frame::new(Mac([2; 6]), Mac([4; 6]));
    let (from, to) = (SocketAddrV4::new(A, 4000), SocketAddrV4::new(B, 80));
    let read = |frame: &[u8]| Packet { ident: 7, ..Packet::read(&frame[14..]).expect("a packet") };
    assert_eq!(read(&frame().tcp(from, to, SYN)), tcp(a(4000), b(80), SYN));
    assert_eq!(read(&frame().udp(from, to, b"x")), udp(a(4000), b(80)));
    assert_eq!(read(&frame().echo(A, B, 9)), icmp(A, B, 8, 9));
    assert_eq!(read(&frame().ipv4(A, B, 47, b"x")), other(A, B, 47));
    let quoted = frame().udp(from, to, b"x");
    let unreachable = [&[3, 1, 0, 0, 0, 0, 0, 0], &quoted[14..]].concat();
    let read = read(&frame().ipv4(B, A, ICMP, &unreachable));
    let Transport::Icmp { quote: Some(quote), .. } = read.transport else { panic!("{read}") };
    assert_eq!((quote.src, quote.dst, quote.proto), (A, B, UDP));
    assert_eq!(quote.start.map(|start| [start[0], start[1]]), Some(4000_u16.to_be_bytes()));
    for end in 0..42 {
        assert_eq!(Packet::read(&quoted[14..end.max(14)]), None, "{end}");
    }
}

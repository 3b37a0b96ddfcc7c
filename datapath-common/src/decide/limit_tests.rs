use core::sync::atomic::AtomicU64;
use std::{thread, vec::Vec};

use proptest::prelude::*;

use super::{
    eni_ingress,
    limit::{AT_ONCE, EGRESS, FULL, LATE, PREFERRED, charge, egress, pay},
    nic, pod_egress, pod_ingress,
};
use crate::{
    abi::{Bucket, Endpoint, Limits, Outcome},
    packet::link::{TPID_8021Q, Tag},
    testing::{
        GATEWAY, GATEWAY_MAC, MemoryTables, NODE, NODE_MAC, PODS, Packet, REMOTE, node,
        packet::{ACK, Socket},
    },
};

const A: Endpoint = PODS[0];
const B: Endpoint = PODS[1];
const SECOND: u64 = 1_000_000_000;
const MTU_FRAME: u32 = 1514;

/// Both directions alike.
fn both(rate: u64, burst: u64) -> Limits {
    let bucket = Bucket::new(rate, burst);
    Limits { ingress: bucket, egress: bucket, pace: 0 }
}

fn limited(limits: Limits) -> MemoryTables {
    let mut node = node();
    node.limit(A.id, limits);
    node.nanos = 1000 * SECOND;
    node
}

fn sent(node: &MemoryTables, bytes: u32) -> bool {
    charge(node, A.id, bytes, EGRESS) < LATE
}

proptest! {
    /// Whatever is sent, and whenever: within any span no more passes than the rate gives in it and the burst.
    #[test]
    fn never_more_than_the_rate_and_the_burst(
        rate in 1_000u64..100_000_000_000,
        burst in 70_000u64..1_000_000,
        packets in prop::collection::vec((60u32..65_600, 0u64..3_000_000), 1..400),
    ) {
        let mut node = limited(both(rate, burst));
        let mut passed = Vec::new();
        for (bytes, pause) in packets {
            node.nanos += pause;
            if sent(&node, bytes) {
                passed.push((node.nanos, u64::from(bytes)));
            }
        }
        for first in 0..passed.len() {
            let mut sum = 0;
            for (now, bytes) in &passed[first..] {
                sum += bytes;
                let time = now - passed[first].0;
                let most = (u128::from(rate) * u128::from(time) / 8_000_000_000) as u64 + burst;
                // Each packet's time is cut off to whole nanoseconds, and a byte's to a part of one.
                let rounding = 1 + sum / 1000;
                prop_assert!(sum <= most + rounding, "{sum} bytes in {time} ns, {most} allowed");
            }
        }
    }

    /// Who sends more than the limit without a pause gets at least 98 % of it, whatever the sizes of the packets.
    #[test]
    fn a_sender_gets_its_rate(
        rate in 1_000_000u64..10_000_000_000,
        sizes in prop::collection::vec(60u32..65_600, 1..50),
    ) {
        let mut node = limited(both(rate, 140_000));
        let start = node.nanos;
        let (mut passed, mut offered) = (0u64, 0u64);
        // Twice the limit, for as long as three thousand packets take.
        for bytes in sizes.iter().cycle().take(3000) {
            offered += u64::from(*bytes);
            node.nanos = start + offered * 8_000_000_000 / rate / 2;
            if sent(&node, *bytes) {
                passed += u64::from(*bytes);
            }
        }
        let allowed = (u128::from(rate) * u128::from(node.nanos - start) / 8_000_000_000) as u64;
        prop_assert!(passed * 100 >= allowed * 98, "{passed} of {allowed}");
    }
}

/// CPUs that charge one pod at the same time pass no more than the burst and a packet of each but one, and then nothing
/// until that is paid for.
#[test]
fn several_cpus_share_one_limit() {
    const CPUS: usize = 8;
    const BURST: u64 = 100 * MTU_FRAME as u64;
    let limits = both(8_000_000, BURST);
    for _ in 0..50 {
        let spent = AtomicU64::new(0);
        let pass = |now: u64| -> u64 {
            let one =
                || (0..200).filter(|_| pay(&limits, &spent, now, MTU_FRAME, EGRESS) < LATE).count() as u64;
            thread::scope(|scope| {
                let cpus: Vec<_> = (0..CPUS).map(|_| scope.spawn(one)).collect();
                cpus.into_iter().map(|cpu| cpu.join().unwrap()).sum()
            })
        };
        let first = pass(1000 * SECOND);
        assert!((100..100 + CPUS as u64).contains(&first), "{first}");
        // What was too much is missing later: 50 packets' worth was earned.
        let second = pass(1000 * SECOND + limits.egress.nanos(50 * u64::from(MTU_FRAME)));
        let total = first + second;
        assert!((149..150 + CPUS as u64).contains(&total), "{first}, then {second}");
    }
}

#[test]
fn what_was_not_used_is_not_saved_up() {
    let mut node = limited(both(8_000_000, 150_000));
    let burst = |node: &MemoryTables| (0..1000).filter(|_| sent(node, 1000)).count();
    assert_eq!(burst(&node), 150);
    node.nanos += 3600 * SECOND;
    assert_eq!(burst(&node), 150);
    node.nanos += SECOND / 100;
    assert_eq!(burst(&node), 10);
}

#[test]
fn the_largest_packet_passes_a_burst_that_is_smaller() {
    let mut node = limited(both(8_000_000, 1000));
    assert!(sent(&node, 500_000));
    assert!(!sent(&node, 60));
    node.nanos += SECOND / 2;
    assert!(sent(&node, 60));
}

#[test]
fn a_direction_without_a_limit_has_none() {
    let node = limited(Limits { ingress: Bucket::new(1000, 70_000), ..Limits::ZERO });
    assert!((0..1000).all(|_| sent(&node, 65_000)));
    assert_eq!((0..1000).filter(|_| charge(&node, A.id, 35_000, 0) != FULL).count(), 2);
    assert_eq!(charge(&node, B.id, 65_000, 0), AT_ONCE);
}

#[test]
fn the_lowest_and_the_highest_rate_are_told_apart() {
    for (rate, byte) in [(1_000, 8_000_000), (1_000_000, 8_000), (1_000_000_000, 8)] {
        assert_eq!(Bucket::new(rate, 1).nanos(1), byte);
    }
    // A hundred Gbit/s: twelve and a half bytes a nanosecond.
    assert!((79_999..=80_001).contains(&Bucket::new(100_000_000_000, 1).nanos(1_000_000)));
    assert!(Bucket::new(1_000_000_000_000_000, 1).cost > 0);
}

#[test]
fn the_reserve_is_for_those_who_are_preferred() {
    let node = limited(both(8_000_000, 70_000));
    while sent(&node, 1000) {}
    let reserved = (0..1000).filter(|_| charge(&node, A.id, 1000, EGRESS | PREFERRED) < LATE).count() as u64;
    // What the burst had no room for in the end is used up first.
    assert!((Bucket::RESERVE / 1000..Bucket::RESERVE / 1000 + 2).contains(&reserved), "{reserved}");
    assert!(!sent(&node, 1000));
}

#[test]
fn a_queue_spreads_what_the_burst_has_no_room_for() {
    let pace = Bucket::new(8_000_000, 0).nanos(10_000);
    let node = limited(Limits { pace, ..both(8_000_000, 70_000) });
    let times: Vec<u64> = (0..100).map(|_| charge(&node, A.id, 1000, EGRESS)).collect();
    assert!(times[..70].iter().all(|time| *time == AT_ONCE));
    let late: Vec<u64> = (1..=10).map(|n| node.nanos + n * SECOND / 1000).collect();
    assert_eq!(times[70..80], late);
    assert!(times[80..].iter().all(|time| *time == LATE));
    // What the pod receives does not wait.
    let received: Vec<u64> = (0..100).map(|_| charge(&node, A.id, 1000, 0)).collect();
    assert!(received[..70].iter().all(|time| *time == AT_ONCE));
    assert!(received[70..].iter().all(|time| *time == FULL));
}

// ---- Doors.

fn out_of(pod: &Endpoint, node: &MemoryTables, packet: &Packet) -> Outcome {
    let frame = packet.clone().macs(pod.mac, pod.gateway_mac).bytes();
    let outcome = pod_egress::decide(node, frame.as_slice(), None, pod.ifindex, 1200).outcome;
    node.discard();
    outcome
}

fn from_fabric(pod: &Endpoint, node: &MemoryTables, packet: &Packet) -> Outcome {
    let frame = packet.clone().macs(GATEWAY_MAC, pod.wire_mac).bytes();
    let tag = Tag { tpid: TPID_8021Q, tci: pod.vid };
    let outcome = eni_ingress::decide(node, frame.as_slice(), Some(tag)).outcome;
    node.discard();
    outcome
}

fn from_stack(pod: &Endpoint, node: &MemoryTables, packet: &Packet) -> Outcome {
    let frame = packet.clone().macs(NODE_MAC, pod.mac).bytes();
    let outcome = pod_ingress::decide(node, frame.as_slice(), None, pod.ifindex).outcome;
    node.discard();
    outcome
}

fn big(src: Socket, dst: Socket) -> Packet {
    Packet::udp(src, dst).payload(30_000)
}

/// Runs until something else comes of it than before, and says what.
fn used_up(mut step: impl FnMut() -> Outcome) -> (usize, Outcome) {
    let first = step();
    for n in 1..100 {
        let outcome = step();
        if outcome != first {
            return (n, outcome);
        }
    }
    (100, first)
}

#[test]
fn every_door_draws_on_the_same_limit() {
    let far = big((A.ipv4, 1), (REMOTE, 2));
    let near = big((A.ipv4, 1), (B.ipv4, 2));
    let service = big((A.ipv4, 1), ([10, 247, 0, 10], 2));
    for packet in [&far, &near, &service] {
        let node = limited(both(8_000_000, 70_000));
        assert_eq!(used_up(|| out_of(&A, &node, packet)), (2, Outcome::EgressLimit));
        for other in [&far, &near, &service] {
            assert_eq!(out_of(&A, &node, other), Outcome::EgressLimit);
        }
        // What others send, and what it receives, is another matter.
        assert_eq!(out_of(&B, &node, &big((B.ipv4, 1), (REMOTE, 2))), Outcome::Wire);
        assert_eq!(from_fabric(&A, &node, &big((REMOTE, 1), (A.ipv4, 2))), Outcome::Wire);
    }
    let far = big((REMOTE, 1), (A.ipv4, 2));
    let near = big((B.ipv4, 1), (A.ipv4, 2));
    let node = limited(both(8_000_000, 70_000));
    assert_eq!(used_up(|| from_fabric(&A, &node, &far)), (2, Outcome::IngressLimit));
    assert_eq!(from_stack(&A, &node, &far), Outcome::IngressLimit);
    assert_eq!(out_of(&B, &node, &near), Outcome::IngressLimit);
    assert_eq!(out_of(&A, &node, &big((A.ipv4, 1), (REMOTE, 2))), Outcome::Wire);
}

#[test]
fn the_fast_path_counts_for_both_pods() {
    let mut node = limited(both(8_000_000, 70_000));
    node.limit(B.id, both(8_000_000, 40_000));
    let near = big((A.ipv4, 1), (B.ipv4, 2));
    assert_eq!(used_up(|| out_of(&A, &node, &near)), (1, Outcome::IngressLimit));
    // What the receiver refused was sent all the same.
    assert_eq!(out_of(&A, &node, &near), Outcome::EgressLimit);
}

#[test]
fn the_node_and_arp_are_not_shut_out() {
    let node = limited(both(8_000_000, 70_000));
    assert_eq!(used_up(|| out_of(&A, &node, &big((A.ipv4, 1), (REMOTE, 2)))).1, Outcome::EgressLimit);
    assert_eq!(used_up(|| from_fabric(&A, &node, &big((REMOTE, 1), (A.ipv4, 2)))).1, Outcome::IngressLimit);
    let probe = Packet::tcp((NODE, 40_000), (A.ipv4, 80), ACK);
    let answer = Packet::tcp((A.ipv4, 80), (NODE, 40_000), ACK);
    assert_eq!(from_stack(&A, &node, &probe), Outcome::Host);
    assert_eq!(out_of(&A, &node, &answer), Outcome::Host);
    let asks = Packet::arp(1, A.mac, A.ipv4, B.ipv4);
    assert_eq!(out_of(&A, &node, &asks), Outcome::WireArp);
    let asked = Packet::arp(1, GATEWAY_MAC, GATEWAY, A.ipv4);
    assert_eq!(from_fabric(&A, &node, &asked), Outcome::Wire);
    assert_eq!(from_stack(&A, &node, &asked), Outcome::Host);
    // The node's reserve has an end, too.
    assert_eq!(used_up(|| from_stack(&A, &node, &big((NODE, 1), (A.ipv4, 2)))).1, Outcome::IngressLimit);
}

#[test]
fn what_is_refused_anyway_is_not_charged() {
    let node = limited(both(8_000_000, 70_000));
    let spoofed = big((B.ipv4, 1), (REMOTE, 2));
    assert!((0..10).all(|_| out_of(&A, &node, &spoofed) == Outcome::SourceAddress));
    assert_eq!(used_up(|| out_of(&A, &node, &big((A.ipv4, 1), (REMOTE, 2)))), (2, Outcome::EgressLimit));
}

#[test]
fn only_the_wire_has_a_queue() {
    let pace = Bucket::new(8_000_000, 0).nanos(100_000);
    let node = limited(Limits { pace, ..both(8_000_000, 70_000) });
    let at = |packet: &Packet| {
        let frame = packet.clone().macs(A.mac, A.gateway_mac).bytes();
        let decided = pod_egress::decide_any(&node, frame.as_slice(), None, A.ifindex, 1200);
        let departure = egress(&node, frame.as_slice(), decided);
        node.discard();
        (departure.decision.outcome, departure.at.saturating_sub(node.nanos))
    };
    let far = big((A.ipv4, 1), (REMOTE, 2));
    let near = big((A.ipv4, 1), (B.ipv4, 2));
    assert_eq!((at(&far).1, at(&far).1), (0, 0));
    let (outcome, wait) = at(&far);
    assert!(outcome == Outcome::Wire && (15_000_000..30_000_000).contains(&wait), "{wait}");
    assert_eq!(at(&near), (Outcome::Local, 0));
    assert_eq!(used_up(|| at(&far).0), (1, Outcome::EgressQueue));
    assert_eq!(at(&near).0, Outcome::EgressQueue);
}

#[test]
fn an_eni_of_its_own_is_limited_both_ways() {
    let node = limited(both(8_000_000, 70_000));
    let out = || {
        let frame = big((A.ipv4, 1), (REMOTE, 2)).macs(A.mac, A.gateway_mac).bytes();
        let decided = nic::egress(&node, frame.as_slice(), None, A.ifindex);
        egress(&node, frame.as_slice(), decided).decision.outcome
    };
    assert_eq!(used_up(out), (2, Outcome::EgressLimit));
    let within = || {
        let frame = big((REMOTE, 1), (A.ipv4, 2)).macs(GATEWAY_MAC, A.mac).bytes();
        super::limit::ingress(&node, frame.as_slice(), nic::ingress(&node, A.ifindex)).outcome
    };
    assert_eq!(used_up(within), (2, Outcome::IngressLimit));
}

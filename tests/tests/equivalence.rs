//! The same packets through the host build of the decisions and through the kernel programs: the same action, the same
//! frame, the same counters, the same memory.
//!
//! Packets are valid ones among the members of a small node, mutated. `ENIWAY_SEED` repeats a run (the seed is printed),
//! `ENIWAY_PACKETS` is the number of packets.

#[path = "equivalence/limits.rs"]
mod limits;

use std::{
    collections::BTreeMap,
    env,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use datapath_common::{
    abi::{
        Admitted, Direction, Door, Endpoint, Flow, FlowKey, Fragment, FragmentKey, Origin, Outcome, PairKey,
        Spent, endpoint::flag, maps::SERVICE_MARK, outcome::Kind, policy::State,
    },
    decide::{Decision, eni_egress, eni_ingress, limit, nic, pod_egress, pod_ingress},
    packet::{
        ipv4::{self, Part},
        link::{TPID_8021AD, TPID_8021Q, Tag},
    },
    testing::{
        Change, GATEWAY, GATEWAY_MAC, METADATA, MemoryTables, NODE, NODE_MAC, PARENT_IFINDEX, PODS, Packet,
        REMOTE, SERVICE, VIP, VIP_IN_SERVICES, node,
        packet::{ACK, SYN, SYN_ACK},
        rules::{SERVED, judged_node, set_served},
    },
};
use datapath_user::{
    config::{FastPath, Limits, Xdp},
    object::Constants,
};
use eniway_tests::{
    dice::Dice,
    programs::{
        Counts, Hook, Input, Output, Programs, ProgramsError, hex, nanos, now, private_netns, tc, write_pcap,
        xdp,
    },
};

/// Packets in all, unless said otherwise.
const PACKETS: u64 = 100_000;
/// All tables are compared as a whole after so many packets; then everything is forgotten.
const ROUND: u64 = 2_500;
/// An interface without a record.
const NOBODYS: u32 = 1;

// ---- Packets.

const ADDRESSES: [[u8; 4]; 15] = [
    PODS[0].ipv4,
    PODS[1].ipv4,
    PODS[2].ipv4,
    PODS[3].ipv4,
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
    [203, 0, 113, 7],
];
const MACS: [[u8; 6]; 8] = [
    PODS[0].mac,
    PODS[1].mac,
    PODS[2].mac,
    PODS[3].mac,
    NODE_MAC,
    GATEWAY_MAC,
    [0xff; 6],
    [0x01, 0x00, 0x5e, 0, 0, 0xfb],
];
const PORTS: [u16; 5] = [53, 67, 68, 80, 4000];
const IDENTS: [u16; 3] = [1, 2, 3];
const VIDS: [u16; 7] = [0, 101, 102, 103, 104, 7, 4095];
const ETHERTYPES: [u16; 7] = [0x0800, 0x0806, 0x86dd, TPID_8021Q, TPID_8021AD, 0x88cc, 0x0600];
const PROTOS: [u8; 7] = [1, 6, 17, 17, 50, 58, 132];
const FLAGS: [u8; 6] = [SYN, SYN_ACK, ACK, ACK, 0x04, SYN | 0xc0];
/// Payload of a segment; 0 = no GSO packet.
const GSO_SIZES: [u32; 4] = [0, 1000, 1360, 1448];

/// A packet as the hook gets it in good order.
struct Case {
    hook: Hook,
    frame: Vec<u8>,
    tag: Option<Tag>,
    ifindex: u32,
    gso_size: u32,
    gso_segs: u32,
}

impl Case {
    fn input(&self) -> Input<'_> {
        let Self { tag, ifindex, gso_size, gso_segs, .. } = *self;
        Input { frame: &self.frame, tag, ifindex, gso_size, gso_segs }
    }
}

fn between(dice: &mut Dice, src: [u8; 4], dst: [u8; 4]) -> Packet {
    let (sport, dport) = (dice.of(&PORTS), dice.of(&PORTS));
    let packet = match dice.below(12) {
        0..=4 => Packet::tcp((src, sport), (dst, dport), dice.of(&FLAGS)),
        5..=7 => Packet::udp((src, sport), (dst, dport)),
        8 => Packet::icmp(dice.of(&[0, 8, 5, 9, 13]), src, dst, sport),
        9 => {
            // From the other end, or from a router on the way to it.
            let far = if dice.one_in(3) { dice.of(&ADDRESSES) } else { src };
            let about = match dice.below(3) {
                0 => Packet::tcp((dst, dport), (far, sport), ACK),
                1 => Packet::udp((dst, dport), (far, sport)),
                _ => Packet::icmp(8, dst, far, sport),
            };
            Packet::icmp_error(dice.of(&[3, 4, 11, 12]), src, dst, &about)
        }
        10 => {
            let offset = dice.of(&[0, 0, 1, 185]);
            let last = offset != 0 && dice.one_in(2);
            Packet::udp((src, sport), (dst, dport)).payload(32).fragment(dice.of(&IDENTS), offset, !last)
        }
        _ => Packet::ipv4(src, dst, dice.of(&PROTOS), &[0x5a; 24]),
    };
    let packet = if dice.one_in(8) { packet.options(dice.below(11)) } else { packet };
    let payload = dice.of(&[0, 0, 1, 18, 100, 1400, 1460]);
    packet.payload(payload)
}

fn remote(dice: &mut Dice) -> [u8; 4] {
    // Between pods there is more to decide.
    if dice.one_in(3) {
        return dice.of(&PODS).ipv4;
    }
    dice.of(&ADDRESSES)
}

/// A packet in good order, for a hook and, mostly, a pod that it concerns.
fn valid(dice: &mut Dice) -> Case {
    let hook = dice.of(&Hook::ALL);
    // What comes for the last pod, on the other parent, is refused here.
    let pod = if dice.one_in(10) { PODS[3] } else { dice.of(&PODS[..3]) };
    let other = remote(dice);
    let mut case = Case { hook, frame: vec![], tag: None, ifindex: pod.ifindex, gso_size: 0, gso_segs: 0 };
    let packet = match hook {
        Hook::EniXdp | Hook::EniIngress => {
            case.ifindex = PARENT_IFINDEX;
            let packet = if dice.one_in(10) {
                Packet::arp(dice.of(&[1, 2]), GATEWAY_MAC, other, pod.ipv4)
            } else {
                between(dice, other, pod.ipv4)
            };
            let packet = packet.macs(GATEWAY_MAC, pod.wire_mac);
            if hook == Hook::EniIngress && dice.one_in(2) {
                case.tag = Some(Tag { tpid: TPID_8021Q, tci: pod.vid });
                packet
            } else {
                packet.vlan(pod.vid)
            }
        }
        Hook::EniEgress => {
            case.ifindex = PARENT_IFINDEX;
            let src = if dice.one_in(5) { other } else { pod.ipv4 };
            let dst = remote(dice);
            between(dice, src, dst).macs(NODE_MAC, GATEWAY_MAC)
        }
        Hook::PodEgress | Hook::NicEgress => {
            let packet = match dice.below(12) {
                0 => Packet::arp(1, pod.mac, pod.ipv4, dice.of(&[GATEWAY, other])),
                1 => Packet::ipv6(dice.of(&[6, 58]), &[133, 0, 0, 0, 0, 0, 0, 0]),
                _ => between(dice, pod.ipv4, other),
            };
            packet.macs(pod.mac, GATEWAY_MAC)
        }
        Hook::PodIngress | Hook::NicIngress => {
            let packet = if dice.one_in(10) {
                Packet::arp(1, NODE_MAC, NODE, pod.ipv4)
            } else {
                between(dice, other, pod.ipv4)
            };
            packet.macs(NODE_MAC, pod.mac)
        }
    };
    let packet = if dice.one_in(12) { packet.payload(1400) } else { packet };
    case.frame = packet.bytes();
    if hook != Hook::EniXdp && case.frame.len() > 1200 {
        case.gso_size = dice.of(&GSO_SIZES);
        case.gso_segs = if case.gso_size == 0 { 0 } else { 2 };
    }
    case
}

/// Between the two pods that rules are about.
fn conversation(dice: &mut Dice) -> Case {
    let (pod, to) = dice.of(&[(PODS[0], PODS[1]), (PODS[0], PODS[1]), (PODS[1], PODS[0])]);
    let frame = between(dice, pod.ipv4, to.ipv4).macs(pod.mac, GATEWAY_MAC).bytes();
    Case { hook: Hook::PodEgress, frame, tag: None, ifindex: pod.ifindex, gso_size: 0, gso_segs: 0 }
}

fn put(frame: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = frame.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// Changes one thing, mostly at a place where it matters.
fn mutate(dice: &mut Dice, case: &mut Case) {
    let ethertype = |frame: &[u8]| frame.get(12..14).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
    let ip = if ethertype(&case.frame) == Some(TPID_8021Q) { 18 } else { 14 };
    let frame = &mut case.frame;
    match dice.below(17) {
        0..=2 if !frame.is_empty() => {
            let reach = frame.len().min(80);
            let at = dice.below(reach);
            frame[at] ^= 1 << dice.below(8);
        }
        3 => frame.truncate(dice.below(frame.len() + 1)),
        4 => {
            let extra = dice.below(64);
            frame.extend((0..extra).map(|_| dice.roll() as u8));
        }
        5 => put(frame, dice.of(&[0, 6]), &dice.of(&MACS)),
        6 | 7 => {
            // Source, destination; sender and target of ARP.
            let at = dice.of(&[12, 16, 16, 14, 24]);
            put(frame, ip + at, &dice.of(&ADDRESSES));
        }
        8 => match &mut case.tag {
            Some(tag) => tag.tci = dice.of(&VIDS) | (dice.below(16) as u16) << 12,
            None => put(frame, 14, &dice.of(&VIDS).to_be_bytes()),
        },
        9 => put(frame, dice.of(&[12, ip - 2]), &dice.of(&ETHERTYPES).to_be_bytes()),
        10 => {
            let len =
                (frame.len() as i64 - ip as i64 + dice.of(&[-40, -20, -8, -1, 0, 1, 40])).clamp(0, 0xffff);
            put(frame, ip + 2, &(len as u16).to_be_bytes());
        }
        11 => put(frame, ip, &[dice.of(&[0x45, 0x46, 0x4f, 0x44, 0x65, 0x40])]),
        12 => put(frame, ip + 6, &(dice.of(&[0_u16, 0x2000, 0x4000, 0x2001, 1, 0x1fff])).to_be_bytes()),
        13 => put(frame, ip + 9, &[dice.of(&PROTOS)]),
        14 => put(frame, ip + 20 + dice.of(&[0, 2]), &dice.of(&PORTS).to_be_bytes()),
        15 => {
            // A tag, inside or beside.
            let tpid = dice.of(&[TPID_8021Q, TPID_8021Q, TPID_8021AD]);
            let tci = dice.of(&VIDS);
            if case.hook != Hook::EniXdp && case.tag.is_none() && dice.one_in(2) {
                case.tag = Some(Tag { tpid, tci });
            } else if frame.len() >= 12 {
                let tag = [tpid.to_be_bytes(), tci.to_be_bytes()].concat();
                frame.splice(12..12, tag);
            }
        }
        _ => {
            case.ifindex =
                dice.of(&[NOBODYS, PODS[0].ifindex, PODS[1].ifindex, PODS[2].ifindex, PODS[3].ifindex]);
        }
    }
}

fn generate(dice: &mut Dice) -> Case {
    let mut case = valid(dice);
    for _ in 0..dice.of(&[0, 0, 1, 1, 1, 2, 3]) {
        mutate(dice, &mut case);
    }
    case
}

// ---- What the host build says.

/// What a program is expected to do.
#[derive(Debug, PartialEq, Eq)]
struct Expected {
    output: Output,
    /// For each (pod, direction, outcome): packets, bytes.
    counts: Counts,
    changes: Vec<Change>,
    /// How far limits are used up, by pod.
    spent: Vec<(u32, Spent)>,
}

fn expect(constants: Constants, node: &MemoryTables, case: &Case) -> Expected {
    let Case { hook, ref frame, tag, ifindex, gso_size, .. } = *case;
    let bytes = frame.as_slice();
    let mut won = false;
    // By the parsers for everything: the programs ask `decide_plain` first, which must say the same.
    let decision = match hook {
        Hook::EniXdp => eni_ingress::admit(node, bytes, None, |pod, ip| {
            let may_win = ip.proto != ipv4::TCP && ip.part == Part::Whole && !limit::is_limited(Some(pod));
            won = constants.xdp == Xdp::Redirect && may_win;
            won.then(|| eni_ingress::route(node, pod, ip))
        }),
        Hook::EniIngress => eni_ingress::decide_any(node, bytes, tag),
        Hook::EniEgress => eni_egress::decide_any(node, bytes, tag),
        Hook::PodEgress => pod_egress::decide_any(node, bytes, tag, ifindex, gso_size),
        Hook::PodIngress => pod_ingress::decide_any(node, bytes, tag, ifindex),
        Hook::NicIngress => nic::ingress(node, ifindex),
        Hook::NicEgress => nic::egress(node, bytes, tag, ifindex),
    };
    let (decision, at) = match hook {
        // Charged elsewhere: at tc, and where the pod gave it to the node's stack.
        Hook::EniXdp | Hook::EniEgress => (decision, limit::AT_ONCE),
        Hook::EniIngress | Hook::PodIngress | Hook::NicIngress => {
            (limit::ingress(node, bytes, decision), limit::AT_ONCE)
        }
        Hook::PodEgress => {
            let limit::Departure { decision, at } = limit::egress(node, bytes, decision);
            (decision, at)
        }
        // Its queue is in the pod, and is not the node's.
        Hook::NicEgress => (limit::egress(node, bytes, decision).decision, limit::AT_ONCE),
    };
    let mut left = frame.clone();
    let mut mark = 0;
    let dropped = decision.outcome.kind() == Kind::Drop;
    let (action, direction) = match (hook, decision.outcome) {
        (Hook::EniXdp, _) if dropped => (xdp::DROP, Some(Direction::Ingress)),
        (Hook::EniXdp, Outcome::Wire) if won => {
            deliver(&mut left, &decision, None);
            (xdp::REDIRECT, Some(Direction::Ingress))
        }
        (Hook::EniXdp, _) => (xdp::PASS, None),
        (Hook::EniIngress, Outcome::Untagged) => (tc::NEXT, Some(Direction::Ingress)),
        (Hook::EniIngress, Outcome::Wire) => {
            deliver(&mut left, &decision, tag);
            (tc::REDIRECT, Some(Direction::Ingress))
        }
        (Hook::EniIngress, Outcome::HostReturn) => {
            pop(&mut left, tag);
            (tc::NEXT, Some(Direction::Ingress))
        }
        (Hook::EniEgress, Outcome::Wire) => {
            let pod = decision.pod.expect("a pod");
            set_macs(&mut left, pod.gateway_mac, pod.wire_mac);
            let here = pod.parent_ifindex == ifindex;
            (if here { tc::NEXT } else { tc::REDIRECT }, Some(Direction::Egress))
        }
        (Hook::EniEgress, _) => (tc::NEXT, None),
        (Hook::NicIngress, Outcome::Wire) => (tc::NEXT, Some(Direction::Ingress)),
        (Hook::NicEgress, Outcome::Wire | Outcome::WireArp) => (tc::NEXT, Some(Direction::Egress)),
        (Hook::NicEgress, _) => (tc::SHOT, Some(Direction::Egress)),
        (Hook::PodEgress, outcome) => {
            let action = match (outcome, decision.pod, decision.to) {
                (Outcome::Wire, Some(pod), _) => {
                    set_macs(&mut left, pod.gateway_mac, pod.wire_mac);
                    tc::REDIRECT
                }
                (Outcome::WireArp, Some(pod), _) => {
                    put(&mut left, 6, &pod.wire_mac);
                    tc::REDIRECT
                }
                (Outcome::Local, _, Some(to)) => {
                    set_macs(&mut left, to.mac, to.gateway_mac);
                    tc::REDIRECT
                }
                (Outcome::Host, ..) => tc::NEXT,
                (Outcome::HostService, ..) => {
                    mark = SERVICE_MARK;
                    tc::NEXT
                }
                (Outcome::ArpAnswered, Some(pod), _) => {
                    answer_arp(&mut left, pod);
                    tc::REDIRECT
                }
                _ => tc::SHOT,
            };
            (action, Some(Direction::Egress))
        }
        (Hook::PodIngress, Outcome::Host) => (tc::NEXT, Some(Direction::Ingress)),
        (Hook::EniIngress | Hook::PodIngress | Hook::NicIngress, _) => (tc::SHOT, Some(Direction::Ingress)),
    };
    let mut counts = Counts::new();
    if let Some(direction) = direction {
        let packets = u64::from(case.gso_segs.max(1));
        let load = (packets, frame.len() as u64);
        counts.insert((decision.id(), direction, decision.outcome), load);
        if let Some(remark) = decision.remark {
            counts.insert((decision.id(), direction, remark), load);
        }
        if let Some(to) = decision.to {
            counts.insert((to.id, Direction::Ingress, decision.outcome), load);
        }
    }
    Expected {
        output: Output { action, frame: left, mark, at },
        counts,
        changes: node.changes().clone(),
        spent: limits::spent(node),
    }
}

fn set_macs(frame: &mut [u8], dst: [u8; 6], src: [u8; 6]) {
    put(frame, 0, &dst);
    put(frame, 6, &src);
}

fn pop(frame: &mut Vec<u8>, beside: Option<Tag>) {
    if beside.is_none() {
        frame.drain(12..16);
    }
}

fn deliver(frame: &mut Vec<u8>, decision: &Decision<'_>, beside: Option<Tag>) {
    let pod = decision.pod.expect("a pod");
    if pod.mac != pod.wire_mac {
        put(frame, 0, &pod.mac);
    }
    pop(frame, beside);
}

fn answer_arp(frame: &mut [u8], pod: &Endpoint) {
    let asker: [u8; 4] = frame[28..32].try_into().expect("four bytes");
    let answer =
        Packet::arp(2, pod.gateway_mac, pod.gateway_ipv4, asker).macs(pod.gateway_mac, pod.mac).bytes();
    put(frame, 0, &answer);
    put(frame, 32, &pod.mac);
}

// ---- Comparing.

struct Side {
    constants: Constants,
    programs: Programs,
    /// What the host build remembers: the same as the maps.
    node: MemoryTables,
}

impl Side {
    fn load(fast_path: FastPath, xdp: Xdp, mut node: MemoryTables) -> Self {
        node.fast_path = fast_path != FastPath::Off;
        let constants = Constants { fast_path, parent: node.parent, xdp };
        let limits = Limits { endpoints: 32, flows: 65_536 };
        let mut programs = Programs::load(constants, &limits).expect("the programs load");
        programs.fill(&node).expect("the maps are written");
        limits::renew(&mut node, &mut programs).expect("the maps are written");
        Self { constants, programs, node }
    }

    fn forget_all(&mut self) {
        self.programs.reset(&self.node).expect("the maps are written");
        limits::renew(&mut self.node, &mut self.programs).expect("the maps are written");
        self.node.flows.clear();
        self.node.fragments.clear();
        self.node.marks.clear();
        self.node.pairs.clear();
    }

    /// Changes the rules, on both sides.
    fn change_rules(&mut self, dice: &mut Dice) {
        let rules = &mut self.node.rules;
        rules.epoch += 1;
        let served = dice.of(&[&SERVED[..], &SERVED[..2], &[(6, 4000), (17, 53)], &[]]);
        set_served(rules, rules.epoch & 1, served);
        self.programs.fill_rules(&self.node).expect("the maps are written");
    }

    /// Writes an admitted flow of some age on both sides.
    fn plant_pair(&mut self, dice: &mut Dice) {
        let proto = dice.of(&[6, 6, 17, 1, 50]);
        let ports = |dice: &mut Dice| if proto == 50 { 0 } else { dice.of(&PORTS) };
        let high_port = ports(dice);
        let key = PairKey {
            low: PODS[0].id,
            high: PODS[1].id,
            low_port: if proto == 1 { high_port } else { ports(dice) },
            high_port,
            proto,
            query: if proto == 1 { dice.of(&[16, 17, 26]) } else { 0 },
            pad: [0; 2],
        };
        let state = dice.of(&[State::New, State::Established, State::Closing]) as u8;
        let age = dice.of(&[0, 5, Admitted::REFRESH + 20, 40, 80, 160, 260, 7000, 8000]);
        let flow = Admitted {
            epoch: self.node.rules.epoch - dice.of(&[0, 0, 1]),
            seen: now().wrapping_sub(age),
            opener: dice.of(&[key.low, key.high]),
            state,
            code: 0,
            pad: [0; 2],
        };
        self.node.pairs.insert(key, flow);
        self.programs.maps.policy.set_pair(&key, &flow).expect("the map is written");
    }

    /// Writes a flow of some age on both sides, as if something had happened before.
    fn plant(&mut self, dice: &mut Dice) {
        let key = FlowKey {
            id: dice.of(&PODS).id,
            remote: dice.of(&ADDRESSES),
            remote_port: dice.of(&PORTS),
            local_port: dice.of(&PORTS),
            proto: dice.of(&[6, 6, 17, 1]),
            pad: [0; 3],
        };
        // Not near the limits, so that a second that passes between the two sides decides nothing.
        let age = dice.of(&[0, 5, Flow::REFRESH + 20, Flow::IDLE - 20, Flow::IDLE + 20, 100_000]);
        let flow = Flow {
            door: dice.of(&[Door::Wire, Door::Host]) as u8,
            origin: dice.of(&[Origin::Inbound, Origin::Inbound, Origin::HostForwarded]) as u8,
            pad: [0; 2],
            seen: now().wrapping_sub(age),
        };
        self.node.flows.insert(key, flow);
        self.node.marks.insert(key.id);
        self.programs.maps.set_flow(&key, &flow).expect("the map is written");
        if dice.one_in(3) {
            let key = FragmentKey {
                src: dice.of(&ADDRESSES),
                dst: dice.of(&ADDRESSES),
                id: dice.of(&PODS).id,
                ident: dice.of(&IDENTS),
                proto: 17,
                pad: 0,
            };
            let door = dice.of(&[Door::Wire, Door::Local, Door::Host]);
            let epoch = self.node.rules.epoch.wrapping_sub(dice.of(&[0, 0, 1]));
            let fragment = Fragment { door: door as u8, pad: [0; 3], epoch };
            self.node.fragments.insert(key, fragment);
            self.node.marks.insert(key.id);
            let mut only = MemoryTables::default();
            only.fragments.insert(key, fragment);
            self.programs.fill_memory(&only).expect("the map is written");
        }
    }

    /// What the kernel did, with the changes that the host build announced if the maps have them.
    fn found(&self, output: Output, before: &Counts, changes: &[Change]) -> (Expected, Counts) {
        let after = self.programs.counts(&self.node).expect("counters are read");
        let mut counts = Counts::new();
        for (key, (packets, bytes)) in &after {
            let old = before.get(key).copied().unwrap_or_default();
            if (*packets, *bytes) != old {
                counts.insert(*key, (packets - old.0, bytes - old.1));
            }
        }
        let maps = &self.programs.maps;
        let changes = changes
            .iter()
            .filter_map(|change| match *change {
                Change::Remember(key, _) => {
                    let flow = maps.flow(&key).expect("the map is read");
                    Some(flow.map_or(Change::Forget(key), |flow| Change::Remember(key, flow)))
                }
                Change::Forget(key) => {
                    let flow = maps.flow(&key).expect("the map is read");
                    Some(flow.map_or(Change::Forget(key), |flow| Change::Remember(key, flow)))
                }
                Change::Fragment(key, _) => {
                    let fragment = maps.fragment(&key).expect("the map is read")?;
                    Some(Change::Fragment(key, Door::from_u8(fragment.door)?))
                }
                Change::Admit(key, _) | Change::Retire(key) => {
                    let flow = maps.policy.pair(&key).expect("the map is read");
                    Some(flow.map_or(Change::Retire(key), |flow| Change::Admit(key, flow)))
                }
            })
            .collect();
        let spent = limits::spent_in_kernel(&self.node, &self.programs).expect("the map is read");
        (Expected { output, counts, changes, spent }, after)
    }

    /// All that both sides remember.
    fn compare_memory(&self) {
        let mut flows = BTreeMap::new();
        for (key, flow) in self.programs.maps.flows().expect("the map is read") {
            flows.insert(format!("{key:?}"), flow);
        }
        let known: BTreeMap<_, _> =
            self.node.flows.iter().map(|(key, flow)| (format!("{key:?}"), *flow)).collect();
        assert_eq!(flows, known, "flows: in the kernel, on the host");
        for (key, fragment) in &self.node.fragments {
            assert_eq!(
                self.programs.maps.fragment(key).expect("the map is read"),
                Some(*fragment),
                "{key:?}"
            );
        }
        let pairs = self.programs.maps.policy.pairs().expect("the map is read");
        let pairs: BTreeMap<_, _> = pairs.into_iter().map(|(key, flow)| (format!("{key:?}"), flow)).collect();
        let known: BTreeMap<_, _> =
            self.node.pairs.iter().map(|(key, flow)| (format!("{key:?}"), *flow)).collect();
        assert_eq!(pairs, known, "admitted flows: in the kernel, on the host");
        let spent = limits::spent_in_kernel(&self.node, &self.programs).expect("the map is read");
        assert_eq!(spent, limits::spent(&self.node), "limits used up: in the kernel, on the host");
        for pod in PODS {
            let marked = self.programs.maps.marked(pod.id).expect("the map is read");
            assert_eq!(marked, self.node.marks.contains(&pod.id), "mark of {}", pod.id);
        }
    }
}

fn number(name: &str, default: u64) -> u64 {
    match env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")),
        Err(_) => default,
    }
}

fn explain(
    seed: u64,
    i: u64,
    constants: Constants,
    case: &Case,
    expected: &Expected,
    found: &Expected,
) -> String {
    let path = format!("{}/equivalence.pcap", env!("CARGO_TARGET_TMPDIR"));
    let written = write_pcap(&path, &[&case.frame]).map_or_else(|error| error.to_string(), |()| path);
    format!(
        "packet {i} of seed {seed}: host and kernel differ\n{constants:?}\n{} tag {:?} ifindex {} gso {}x{}\n\
         frame  {}\npcap   {written}\nhost   {expected:#?}\nkernel {found:#?}",
        case.hook.name(),
        case.tag,
        case.ifindex,
        case.gso_segs,
        case.gso_size,
        hex(&case.frame),
    )
}

/// The kernel takes no frame without an Ethernet header, nor one whose IPv4 or IPv6 header is cut off.
fn is_refused(error: &ProgramsError) -> bool {
    use aya::{programs::ProgramError, sys::SyscallError};
    matches!(
        error,
        ProgramsError::Program { source: ProgramError::SyscallError(SyscallError { io_error, .. }), .. }
            if io_error.raw_os_error() == Some(libc::EINVAL)
    )
}

#[test]
fn host_and_kernel_decide_alike() {
    private_netns(&PODS.map(|pod| pod.ifindex));
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_micros() as u64);
    let seed = number("ENIWAY_SEED", clock);
    let packets = number("ENIWAY_PACKETS", PACKETS);
    println!("ENIWAY_SEED={seed} ENIWAY_PACKETS={packets}");
    let started = Instant::now();
    let mut dice = Dice(seed);
    let mut observed = judged_node();
    observed.endpoints.iter_mut().for_each(|pod| pod.flags = flag::OBSERVE);
    // Some cannot be judged.
    observed.endpoints[4].policy_id = 0;
    let mut judged = judged_node();
    judged.endpoints[4].policy_id = 0;
    let nodes = [
        (FastPath::All, Xdp::Redirect, node()),
        (FastPath::Off, Xdp::Guard, node()),
        (FastPath::SecurityGroups, Xdp::Guard, judged),
        (FastPath::All, Xdp::Guard, observed),
    ];
    let mut which = 0..;
    let mut sides = nodes.map(|(fast_path, xdp, mut node)| {
        limits::limit(&mut node, which.next().unwrap_or_default());
        Side::load(fast_path, xdp, node)
    });
    let mut counted = [const { Counts::new() }; 4];
    let mut refused = 0_u64;
    let mut outcomes: BTreeMap<Outcome, u64> = BTreeMap::new();
    for i in 0..packets {
        if i % ROUND == 0 {
            for (side, counted) in sides.iter_mut().zip(&mut counted) {
                side.compare_memory();
                side.forget_all();
                counted.clear();
            }
        }
        // The fast path has more to decide.
        let which = dice.of(&[0, 0, 0, 1, 2, 2, 2, 3]);
        let (side, before) = (&mut sides[which], &mut counted[which]);
        if dice.one_in(20) {
            side.plant(&mut dice);
        }
        if dice.one_in(4) {
            limits::plant(&mut side.node, &mut side.programs, &mut dice).expect("the map is written");
        }
        if which >= 2 && dice.one_in(5) {
            side.plant_pair(&mut dice);
        }
        if which >= 2 && dice.one_in(100) {
            side.change_rules(&mut dice);
        }
        let case = if which >= 2 && dice.one_in(3) { conversation(&mut dice) } else { generate(&mut dice) };

        let used = limits::spent(&side.node);
        let clock_before = (now(), nanos());
        let output = match side.programs.run(case.hook, &case.input()) {
            Ok(output) => output,
            Err(error) if is_refused(&error) => {
                refused += 1;
                continue;
            }
            Err(error) => panic!("packet {i} of seed {seed}: {error:?}\n{}", hex(&case.frame)),
        };
        let clock_after = (now(), nanos());

        (side.node.now, side.node.nanos) = clock_before;
        let mut expected = expect(side.constants, &side.node, &case);
        let (mut found, mut after) = side.found(output.clone(), before, &expected.changes);
        // Either clock may have moved on to where the kernel had to decide otherwise.
        let moved = [clock_after, (clock_before.0, clock_after.1), (clock_after.0, clock_before.1)];
        for clock in moved {
            if found == expected {
                break;
            }
            side.node.discard();
            limits::restore(&mut side.node, &used);
            (side.node.now, side.node.nanos) = clock;
            expected = expect(side.constants, &side.node, &case);
            (found, after) = side.found(output.clone(), before, &expected.changes);
        }
        assert!(found == expected, "{}", explain(seed, i, side.constants, &case, &expected, &found));
        for (_, _, outcome) in expected.counts.keys() {
            *outcomes.entry(*outcome).or_default() += 1;
        }
        side.node.settle();
        *before = after;
    }
    for side in &sides {
        side.compare_memory();
    }
    println!(
        "{packets} packets in {:.1} s; the kernel refused to run {refused}; outcomes: {}",
        started.elapsed().as_secs_f32(),
        outcomes.iter().map(|(outcome, n)| format!("{} {n}", outcome.name())).collect::<Vec<_>>().join(", ")
    );
    assert!(refused * 10 < packets, "too few packets were run");
    if packets >= PACKETS {
        let missing: Vec<_> =
            Outcome::ALL.iter().filter(|outcome| !outcomes.contains_key(outcome)).map(|o| o.name()).collect();
        assert!(missing.is_empty(), "no packet came to {}", missing.join(", "));
    }
}

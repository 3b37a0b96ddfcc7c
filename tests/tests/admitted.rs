//! What the kernel does with flows whose entry in `PAIRS` is gone: the documented policy, with its counters.

use datapath_common::{
    abi::{Direction::Egress, Endpoint, Outcome},
    testing::{
        MemoryTables, PODS, Packet,
        packet::{ACK, SYN, SYN_ACK},
        rules::judged_node,
    },
};
use datapath_user::{
    config::{FastPath, Limits, Xdp},
    object::Constants,
};
use eniway_tests::programs::{Hook, Input, Programs, private_netns};

const CLIENT: Endpoint = PODS[0];
const SERVER: Endpoint = PODS[1];
/// Entries of the map: the least that can be configured.
const FLOWS: u32 = 1024;

struct Kernel {
    programs: Programs,
    node: MemoryTables,
}

impl Kernel {
    fn send(&self, pod: &Endpoint, packet: Packet) {
        let frame = packet.macs(pod.mac, pod.gateway_mac).bytes();
        self.programs.run(Hook::PodEgress, &Input::new(&frame, pod.ifindex)).expect("the kernel runs it");
    }

    fn counted(&self, pod: &Endpoint, outcome: Outcome) -> u64 {
        let counts = self.programs.counts(&self.node).expect("the counters are read");
        counts.get(&(pod.id, Egress, outcome)).map_or(0, |(packets, _)| *packets)
    }
}

#[test]
fn evicted_flows_are_admitted_again_by_the_side_that_opened_them() {
    private_netns(&[CLIENT.ifindex, SERVER.ifindex]);
    let constants = Constants { fast_path: FastPath::SecurityGroups, parent: 0, xdp: Xdp::Off };
    let limits = Limits { endpoints: 32, flows: FLOWS };
    let mut kernel = Kernel {
        programs: Programs::load(constants, &limits).expect("the programs load"),
        node: judged_node(),
    };
    kernel.programs.fill(&kernel.node).expect("the maps are written");

    let server = (SERVER.ipv4, 80);
    let ask = |port, flags| Packet::tcp((CLIENT.ipv4, port), server, flags);
    let answer = |port, flags| Packet::tcp(server, (CLIENT.ipv4, port), flags);
    kernel.send(&CLIENT, ask(1, SYN));
    kernel.send(&SERVER, answer(1, SYN_ACK));
    assert_eq!(kernel.counted(&SERVER, Outcome::Local), 1);

    // A flow that was answered outlives any number that were not: what the kernel found once is active, and goes only when
    // more is active than is not (kernel/bpf/bpf_lru_list.c).
    for port in 2..2 + 8 * FLOWS as u16 {
        kernel.send(&CLIENT, ask(port, SYN));
    }
    kernel.send(&SERVER, answer(1, ACK));
    assert_eq!(kernel.counted(&SERVER, Outcome::Local), 2);
    let pairs = || kernel.programs.maps.policy.pairs().expect("the map is read");
    let mut ports = 10_000..60_000;
    while pairs().iter().any(|(key, _)| key.low_port == 1) {
        for port in ports.by_ref().take(FLOWS as usize) {
            kernel.send(&CLIENT, ask(port, SYN));
            kernel.send(&SERVER, answer(port, SYN_ACK));
        }
        assert!(ports.start < ports.end, "it is not evicted");
    }
    assert!(pairs().len() <= FLOWS as usize);

    // The side that answers cannot open one: the wire, and counted.
    kernel.send(&SERVER, answer(1, ACK));
    assert_eq!(kernel.counted(&SERVER, Outcome::PolicyNoFlow), 1);
    assert_eq!(kernel.counted(&SERVER, Outcome::Wire), 1);
    // The other one can, and then both are fast again.
    kernel.send(&CLIENT, ask(1, ACK));
    assert_eq!(kernel.counted(&CLIENT, Outcome::FlowReadmitted), 1);
    let before = kernel.counted(&SERVER, Outcome::Local);
    kernel.send(&SERVER, answer(1, ACK));
    assert_eq!(kernel.counted(&SERVER, Outcome::Local), before + 1);
}

//! What the kernel programs cost: nanoseconds a packet by BPF_PROG_TEST_RUN, beside programs that do nothing but the same
//! work on the packet, in interleaved rounds; medians.
//!
//! BPF_PROG_TEST_RUN repeats a program on what the run before has left, so only packets that come out as they went in can
//! be measured. Where a program pushes or pops a tag, another one (`fabric-ebpf/src/probe.rs`) undoes that first and then
//! calls the program by a tail call; the yardstick is the same pair with a second program that only pushes or pops. What
//! is left of the difference is what the program itself adds. Programs that leave the packet alone are measured as they
//! are, beside an empty program. One packet over and over finds all caches warm; `redirect`s are decided, not carried out.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use aya::TestRunOptions;
use clap::Parser;
use datapath_common::{
    abi::{Door, Endpoint, Flow, FlowKey, Origin},
    packet::link::{self, TPID_8021Q, Tag},
    testing::{
        GATEWAY_MAC, MemoryTables, NODE, NODE_MAC, PODS, Packet, REMOTE,
        packet::{ACK, SYN_ACK},
    },
};
use datapath_user::{
    config::{FastPath, Limits, Xdp},
    object::Constants,
};
use eniway_tests::programs::{Hook, Input, Probe, Programs, private_netns};
use serde::Serialize;

/// Measures what the kernel programs cost.
#[derive(Parser)]
struct Options {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Write JSON to this file.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Runs in one measurement.
    #[arg(long, default_value_t = 100_000)]
    repeat: u32,
    /// Measurements of each program and of its yardstick, of which the median counts.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Only cases whose program and packet hold this text, such as "pod_egress, to the wire".
    #[arg(long, default_value = "")]
    only: String,
    /// How many pods the node has: the one that is measured with one other, and many.
    #[arg(long, value_delimiter = ',', default_values_t = PODS_ON_NODE)]
    pods: Vec<u16>,
}

/// How many pods the node has: the one that is measured with one other, and many.
const PODS_ON_NODE: [u16; 2] = [2, 1000];

/// All are on one parent ENI, which has 4,094 VLAN ids.
const MOST_PODS: u16 = 4000;
const UNKNOWN_VLAN: u16 = 4000;

const A: Endpoint = PODS[0];
/// Says that its gateway has A's MAC, so that what A sends to it by the fast path comes out as it went in.
const B: Endpoint = Endpoint { gateway_mac: A.mac, ..PODS[1] };
const CLIENT: ([u8; 4], u16) = ([203, 0, 113, 7], 40_000);

/// How a packet is made again what it was.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Undo {
    /// The program leaves it as it is.
    Nothing,
    /// The program pops the tag.
    Pop,
    /// The program pushes a tag.
    Push,
}

struct Case {
    hook: Hook,
    xdp: Xdp,
    what: &'static str,
    packet: Packet,
    ifindex: u32,
    undo: Undo,
    /// Whether the pod has a remembered flow, and this packet is of it.
    remembered: bool,
    /// Whether the program counts the packet.
    counted: bool,
}

impl Case {
    fn name(&self) -> String {
        format!("{}, {}", self.hook.name(), self.what)
    }
}

fn cases() -> Vec<Case> {
    let parent = A.parent_ifindex;
    let inbound = |packet: Packet| packet.macs(GATEWAY_MAC, A.wire_mac);
    let outbound = |packet: Packet| packet.macs(A.mac, GATEWAY_MAC);
    let case = |hook, what, packet, ifindex, undo| Case {
        hook,
        xdp: Xdp::Guard,
        what,
        packet,
        ifindex,
        undo,
        remembered: false,
        counted: true,
    };
    let (pod, server) = ((A.ipv4, 4000), (A.ipv4, 80));
    let request = inbound(Packet::tcp((REMOTE, 4000), server, ACK));
    let from_client = inbound(Packet::tcp(CLIENT, server, ACK));
    let datagram = inbound(Packet::udp((REMOTE, 53), pod));
    let reply = outbound(Packet::tcp(server, CLIENT, SYN_ACK));
    vec![
        Case {
            counted: false,
            ..case(Hook::EniXdp, "guard: TCP, passed on", request.clone().vlan(A.vid), parent, Undo::Nothing)
        },
        case(
            Hook::EniXdp,
            "guard: unknown VLAN, dropped",
            request.clone().vlan(UNKNOWN_VLAN),
            parent,
            Undo::Nothing,
        ),
        Case {
            xdp: Xdp::Redirect,
            ..case(Hook::EniXdp, "redirect: UDP into the pod", datagram, parent, Undo::Pop)
        },
        case(Hook::EniIngress, "untagged, passed on", request.clone(), parent, Undo::Nothing),
        case(
            Hook::EniIngress,
            "unknown VLAN, dropped",
            request.clone().vlan(UNKNOWN_VLAN),
            parent,
            Undo::Nothing,
        ),
        case(Hook::EniIngress, "into the pod", request, parent, Undo::Pop),
        Case {
            remembered: true,
            ..case(Hook::EniIngress, "into a pod that remembers flows", from_client, parent, Undo::Pop)
        },
        case(
            Hook::PodEgress,
            "to the wire",
            outbound(Packet::tcp(pod, (REMOTE, 80), ACK)),
            A.ifindex,
            Undo::Push,
        ),
        case(
            Hook::PodEgress,
            "to a pod of the node",
            outbound(Packet::tcp(pod, (B.ipv4, 80), ACK)),
            A.ifindex,
            Undo::Nothing,
        ),
        case(
            Hook::PodEgress,
            "to the node",
            outbound(Packet::tcp(pod, (NODE, 80), ACK)),
            A.ifindex,
            Undo::Nothing,
        ),
        Case {
            remembered: true,
            ..case(Hook::PodEgress, "a reply by a remembered door", reply, A.ifindex, Undo::Nothing)
        },
        case(
            Hook::PodEgress,
            "another's address, dropped",
            outbound(Packet::tcp((REMOTE, 1), (NODE, 80), ACK)),
            A.ifindex,
            Undo::Nothing,
        ),
        case(
            Hook::PodIngress,
            "a probe",
            Packet::tcp((NODE, 4000), server, ACK).macs(NODE_MAC, A.mac),
            A.ifindex,
            Undo::Nothing,
        ),
        Case {
            counted: false,
            ..case(
                Hook::EniEgress,
                "the node's own",
                Packet::tcp((NODE, 4000), (REMOTE, 80), ACK).macs(NODE_MAC, GATEWAY_MAC),
                parent,
                Undo::Nothing,
            )
        },
        case(
            Hook::EniEgress,
            "a pod's, tagged",
            Packet::tcp(pod, (REMOTE, 80), ACK).macs(NODE_MAC, GATEWAY_MAC),
            parent,
            Undo::Push,
        ),
    ]
}

/// A node with `n` pods, the first of which are A and B.
fn node(n: u16) -> MemoryTables {
    let mut tables = datapath_common::testing::node();
    let known = MemoryTables::default();
    tables.endpoints = known.endpoints;
    tables.subeni = known.subeni;
    tables.pod_if = known.pod_if;
    tables.pod_ip4 = known.pod_ip4;
    tables.add(Endpoint { id: 1, ..A });
    tables.add(Endpoint { id: 2, ..B });
    let free = (1..link::VID).filter(|vid| ![A.vid, B.vid, UNKNOWN_VLAN].contains(vid));
    for (i, vid) in (3..=n).zip(free) {
        let [high, low] = i.to_be_bytes();
        tables.add(Endpoint {
            owner: u64::from(i),
            id: u32::from(i),
            ifindex: 10_000 + u32::from(i),
            ipv4: [10, 2, high, low],
            mac: [2, 0, 0, 0, high, low],
            wire_mac: [2, 0, 0, 0, high, low],
            vid,
            ..A
        });
    }
    tables
}

#[derive(Serialize)]
struct Row {
    program: &'static str,
    case: &'static str,
    endpoints: u16,
    ns: u64,
    yardstick: &'static str,
    yardstick_ns: u64,
    /// The median of the differences.
    over_ns: i64,
}

#[derive(Serialize)]
struct Report {
    kernel: String,
    repeat: u32,
    rounds: usize,
    rows: Vec<Row>,
}

/// A case made ready: the program, or the probe that calls it, and the yardstick.
struct Bench<'a> {
    case: &'a Case,
    endpoints: u16,
    programs: Programs,
    chained: Option<Chained>,
    empty: Probe,
    frame: Vec<u8>,
    samples: Vec<(u64, u64)>,
}

/// Probes that undo first: one calls the program, the other the yardstick.
struct Chained {
    name: &'static str,
    yardstick: &'static str,
    program: Probe,
    only: Probe,
}

impl<'a> Bench<'a> {
    fn new(case: &'a Case, endpoints: u16) -> Result<Self> {
        let mut node = node(endpoints);
        if case.remembered {
            // Origin and door of a node port's client: its packets come and go by the host.
            let key = FlowKey {
                id: 1,
                remote: CLIENT.0,
                remote_port: CLIENT.1,
                local_port: 80,
                proto: 6,
                pad: [0; 3],
            };
            let flow = Flow { door: Door::Host as u8, origin: Origin::Inbound as u8, pad: [0; 2], seen: 0 };
            node.flows.insert(key, flow);
        }
        let constants = Constants { fast_path: FastPath::All, parent: 0, xdp: case.xdp };
        let mut programs =
            Programs::load(constants, &Limits { endpoints: u32::from(endpoints).max(1024), flows: 65_536 })?;
        programs.fill(&node)?;

        let is_xdp = case.hook == Hook::EniXdp;
        let array = if is_xdp { "NEXT_XDP" } else { "NEXT" };
        let names = match (case.undo, is_xdp) {
            (Undo::Nothing, _) => None,
            (Undo::Pop, false) => Some((Probe::TAGGED, Probe::POP)),
            (Undo::Pop, true) => Some((Probe::TAGGED_XDP, Probe::POP_XDP)),
            (Undo::Push, _) => Some((Probe::UNTAGGED, Probe::PUSH)),
        };
        let empty = Probe::load(A.vid)?;
        let chained = match names {
            None => None,
            Some((name, yardstick)) => {
                let (mut program, mut only) = (Probe::load(A.vid)?, Probe::load(A.vid)?);
                program.chain(array, case.hook.name(), programs.fd(case.hook)?)?;
                only.chain(array, yardstick, empty.fd(yardstick)?)?;
                Some(Chained { name, yardstick, program, only })
            }
        };
        let frame = case.packet.bytes();
        let bench = Self { case, endpoints, programs, chained, empty, frame, samples: vec![] };
        bench.check(&node)?;
        Ok(bench)
    }

    fn input(&self) -> Input<'_> {
        let mut input = Input::new(&self.frame, self.case.ifindex);
        if self.case.undo != Undo::Nothing {
            input.tag = Some(Tag { tpid: TPID_8021Q, tci: A.vid });
        }
        input
    }

    fn yardstick(&self) -> &'static str {
        match &self.chained {
            Some(chained) => chained.yardstick,
            None if self.case.hook == Hook::EniXdp => Probe::EMPTY_XDP,
            None => Probe::EMPTY,
        }
    }

    fn run(&self, probe: &Probe, name: &'static str, repeat: u32) -> Result<Duration> {
        let context = self.input().context();
        let options = TestRunOptions {
            data_in: Some(&self.frame),
            ctx_in: (self.case.hook != Hook::EniXdp).then_some(&context),
            repeat,
            ..TestRunOptions::new()
        };
        Ok(probe.run(name, options)?.duration)
    }

    /// A measurement of the program.
    fn program(&self, repeat: u32) -> Result<Duration> {
        match &self.chained {
            Some(chained) => self.run(&chained.program, chained.name, repeat),
            None => Ok(self.programs.time(self.case.hook, &self.input(), repeat)?),
        }
    }

    /// A measurement of the yardstick.
    fn only(&self, repeat: u32) -> Result<Duration> {
        match &self.chained {
            Some(chained) => self.run(&chained.only, chained.name, repeat),
            None => self.run(&self.empty, self.yardstick(), repeat),
        }
    }

    /// The same becomes of the packet in the last run as in the first.
    fn check(&self, node: &MemoryTables) -> Result<()> {
        const RUNS: u32 = 100;
        self.program(RUNS)?;
        let counts = self.programs.counts(node)?;
        let same = counts.values().all(|(packets, _)| *packets == u64::from(RUNS));
        anyhow::ensure!(
            same && counts.is_empty() != self.case.counted,
            "{}: not the same became of the packet each time: {counts:?}",
            self.case.name()
        );
        Ok(())
    }

    fn measure(&mut self, repeat: u32) -> Result<()> {
        let only = self.only(repeat)?;
        let program = self.program(repeat)?;
        self.samples.push((program.as_nanos() as u64, only.as_nanos() as u64));
        Ok(())
    }

    fn row(&self) -> Row {
        let median = |values: Vec<i64>| {
            let mut values = values;
            values.sort_unstable();
            values[values.len() / 2]
        };
        let of = |pick: fn(&(u64, u64)) -> i64| median(self.samples.iter().map(pick).collect());
        Row {
            program: self.case.hook.name(),
            case: self.case.what,
            endpoints: self.endpoints,
            ns: of(|sample| sample.0 as i64) as u64,
            yardstick: self.yardstick(),
            yardstick_ns: of(|sample| sample.1 as i64) as u64,
            over_ns: of(|sample| sample.0 as i64 - sample.1 as i64),
        }
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    anyhow::ensure!(options.rounds > 0 && options.repeat > 0, "--rounds and --repeat are at least 1");
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "loading programs needs root");
    anyhow::ensure!(
        options.pods.iter().all(|pods| (2..=MOST_PODS).contains(pods)),
        "--pods: from 2 to {MOST_PODS}"
    );
    private_netns(&[A.ifindex, B.ifindex]);
    let cases = cases();
    let mut benches = vec![];
    for &endpoints in &options.pods {
        for case in cases.iter().filter(|case| case.name().contains(&options.only)) {
            let bench =
                Bench::new(case, endpoints).with_context(|| format!("{}, {endpoints} pods", case.name()))?;
            benches.push(bench);
        }
    }
    for _ in 0..options.rounds {
        for bench in &mut benches {
            bench.measure(options.repeat)?;
        }
    }
    let report = Report {
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        repeat: options.repeat,
        rounds: options.rounds,
        rows: benches.iter().map(Bench::row).collect(),
    };
    if let Some(path) = &options.report {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(())
}

fn print(report: &Report) {
    println!(
        "kernel {}, medians of {} times {} runs, ns a packet\n",
        report.kernel, report.rounds, report.repeat
    );
    println!(
        "{:<12} {:<34} {:>6} {:>7} {:>11} {:<10} {:>6}",
        "program", "packet", "pods", "ns", "beside", "", "adds"
    );
    for row in &report.rows {
        println!(
            "{:<12} {:<34} {:>6} {:>7} {:>11} {:<10} {:>6}",
            row.program, row.case, row.endpoints, row.ns, row.yardstick_ns, row.yardstick, row.over_ns
        );
    }
}

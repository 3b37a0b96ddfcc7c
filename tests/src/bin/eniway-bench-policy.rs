//! What security groups cost on the fast path: nanoseconds a packet by BPF_PROG_TEST_RUN, all cases in interleaved rounds,
//! medians; what a change costs the agent; and the memory of the maps.
//!
//! The packet comes out as it went in (the receiver's gateway has the sender's MAC), so that the kernel can repeat it. A SYN
//! is judged and written down each time, as if it were the first: that is what "first packet" repeats.

use std::{collections::BTreeMap, fs, path::PathBuf, time::Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use datapath_common::{
    abi::{
        Admitted, Direction, Endpoint, Outcome, PairKey,
        endpoint::flag,
        maps,
        policy::{CLASSES, State, Verdict},
    },
    testing::{
        MemoryTables, PODS, Packet,
        packet::{ACK, SYN},
    },
};
use datapath_user::{
    config::{FastPath, Limits, Xdp},
    object::Constants,
    tables::Written,
};
use eniway_policy::{
    compile::{Family, PodFacts, Tables, compile},
    model::{
        Action, Direction as Way, GroupId, Groups, Membership, PortRange, Ports, Priority, Protocol, Remote,
        Rule, SecurityGroup,
    },
};
use eniway_tests::programs::{Hook, Input, Programs, now, private_netns};
use serde_json::{Value, json};

/// Measures what security groups cost on the fast path.
#[derive(Parser)]
struct Options {
    /// Runs in one measurement.
    #[arg(long, default_value_t = 100_000)]
    repeat: u32,
    /// Rounds, of which the median counts.
    #[arg(long, default_value_t = 31)]
    rounds: usize,
    /// Adds the figures to this JSON file.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Adds what this JSON file says to the report too.
    #[arg(long, value_name = "FILE", requires = "report")]
    add: Vec<PathBuf>,
}

/// The node that the memory is told for.
const LIMITS: Limits = Limits { endpoints: 256, flows: 65_536 };
/// The port that is asked for: allowed by the last rule.
const PORT: u16 = 60_001;

const A: Endpoint = PODS[0];
const B: Endpoint = Endpoint { gateway_mac: A.mac, ..PODS[1] };

#[derive(Clone, Copy)]
enum Case {
    All,
    Open,
    Established,
    First(u16),
}

impl Case {
    const EACH: [(&str, Self); 6] = [
        ("all", Self::All),
        ("open", Self::Open),
        ("check_established", Self::Established),
        ("check_first_10", Self::First(10)),
        ("check_first_100", Self::First(100)),
        ("check_first_1000", Self::First(1000)),
    ];

    const fn rules(self) -> u16 {
        match self {
            Self::First(rules) => rules,
            _ => 10,
        }
    }
}

struct Bench {
    name: &'static str,
    programs: Programs,
    frame: Vec<u8>,
    samples: Vec<u64>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    private_netns(&[A.ifindex, B.ifindex]);
    let mut benches =
        Case::EACH.map(|(name, case)| ready(name, case)).into_iter().collect::<Result<Vec<_>>>()?;
    for round in 1..=options.rounds {
        for bench in &mut benches {
            let input = Input::new(&bench.frame, A.ifindex);
            let took = bench.programs.time(Hook::PodEgress, &input, options.repeat)?;
            bench.samples.push(took.as_nanos() as u64);
        }
        eprintln!("round {round} of {}", options.rounds);
    }
    let mut figures: BTreeMap<String, Value> = BTreeMap::new();
    let mut medians: BTreeMap<&str, u64> = BTreeMap::new();
    for bench in &mut benches {
        bench.samples.sort_unstable();
        medians.insert(bench.name, bench.samples[bench.samples.len() / 2]);
    }
    let ratio = |a: &str, b: &str| (medians[a] as f64 / medians[b] as f64 * 1000.0).round() / 1000.0;
    figures.insert("ns".to_owned(), json!(medians));
    figures.insert("open_over_all".to_owned(), json!(ratio("open", "all")));
    figures.insert("first_1000_over_10".to_owned(), json!(ratio("check_first_1000", "check_first_10")));
    figures.insert("map_kib".to_owned(), json!(map_kib()?));
    figures.insert("change_ms".to_owned(), json!(change_ms(options.rounds)?));
    for path in &options.add {
        let text = fs::read(path).with_context(|| path.display().to_string())?;
        figures.extend(serde_json::from_slice::<BTreeMap<String, Value>>(&text)?);
    }
    println!("{}", serde_json::to_string_pretty(&figures)?);
    if let Some(path) = &options.report {
        let mut report: BTreeMap<String, Value> =
            if path.exists() { serde_json::from_slice(&fs::read(path)?)? } else { BTreeMap::new() };
        report.extend(figures);
        fs::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    Ok(())
}

fn ready(name: &'static str, case: Case) -> Result<Bench> {
    let mut node = MemoryTables::default();
    node.host_dst = datapath_common::testing::node().host_dst;
    let flags = if matches!(case, Case::All) { 0 } else { flag::GROUPS };
    let classes = match case {
        Case::All | Case::Open => [3, 3],
        _ => [1, 2],
    };
    for (pod, (id, class)) in [A, B].into_iter().zip([1, 2].into_iter().zip(classes)) {
        node.add(Endpoint { id, policy_id: class, flags, ..pod });
    }
    let constants = Constants { fast_path: FastPath::SecurityGroups, parent: 0, xdp: Xdp::Off };
    let mut programs = Programs::load(constants, &LIMITS)?;
    programs.fill(&node)?;

    let groups = groups(case.rules())?;
    let compiled = compile(&groups, &facts()?, Family::V4, CLASSES);
    ensure!(compiled.classes.values().copied().eq([1, 2, 3]), "the classes are {:?}", compiled.classes);
    ensure!(
        compiled.tables.verdict(1, 2) == Verdict::Check && compiled.tables.verdict(3, 3) == Verdict::Open
    );
    programs.maps.policy.enforce(&compiled.tables, &mut Written::default())?;

    let (client, server) = ((A.ipv4, 4000), (B.ipv4, PORT));
    let syn = matches!(case, Case::First(_));
    if matches!(case, Case::Established) {
        let key =
            PairKey { low: 1, high: 2, low_port: client.1, high_port: PORT, proto: 6, query: 0, pad: [0; 2] };
        let epoch = programs.maps.policy.epoch()?;
        let flow =
            Admitted { epoch, seen: now(), opener: 1, state: State::Established as u8, code: 0, pad: [0; 2] };
        programs.maps.policy.set_pair(&key, &flow)?;
    }
    let frame = Packet::tcp(client, server, if syn { SYN } else { ACK }).macs(A.mac, A.gateway_mac).bytes();
    let bench = Bench { name, programs, frame, samples: vec![] };
    check(&bench, &node, syn)?;
    Ok(bench)
}

/// What is measured is what is meant.
fn check(bench: &Bench, node: &MemoryTables, admitted: bool) -> Result<()> {
    let output = bench.programs.run(Hook::PodEgress, &Input::new(&bench.frame, A.ifindex))?;
    ensure!(output.frame[6..] == bench.frame[6..], "{}: the frame changed", bench.name);
    let counts = bench.programs.counts(node)?;
    ensure!(counts.contains_key(&(1, Direction::Egress, Outcome::Local)), "{}: {counts:?}", bench.name);
    let admits = counts.contains_key(&(1, Direction::Egress, Outcome::FlowAdmitted));
    ensure!(admits == admitted, "{}: {counts:?}", bench.name);
    Ok(())
}

/// A server with so many rules, the last of which allows [`PORT`]; its client; and a group that is open within itself.
fn groups(rules: u16) -> Result<Groups> {
    let rule = |direction, protocol, remote| Rule {
        direction,
        action: Action::Allow,
        priority: Priority::FIRST,
        protocol,
        remote,
    };
    let port = |port| {
        Ok::<_, anyhow::Error>(Protocol::Tcp(Ports::of(vec![PortRange::new(port, port).context("a port")?])))
    };
    let mut server =
        (1..rules).map(|n| Ok(rule(Way::Ingress, port(2 * n)?, Remote::Any))).collect::<Result<Vec<_>>>()?;
    server.push(rule(Way::Ingress, port(PORT)?, Remote::Any));
    let both = |group: GroupId| {
        [Way::Ingress, Way::Egress].map(|way| rule(way, Protocol::Any, Remote::Group(group.clone()))).to_vec()
    };
    let group = |id: &str, rules| Ok::<_, anyhow::Error>(SecurityGroup { id: id.parse()?, rules });
    let all = vec![
        group("client", vec![rule(Way::Egress, Protocol::Any, Remote::Any)])?,
        group("server", server)?,
        group("open", both("open".parse()?))?,
    ];
    Ok(Groups::new(1, all, Vec::new())?)
}

fn facts() -> Result<BTreeMap<u32, PodFacts>> {
    let pod = |n: u32, group: &str| -> Result<(u32, PodFacts)> {
        let membership = Membership { groups: vec![group.parse()?].try_into()?, revision: 0 };
        Ok((
            n,
            PodFacts { ipv4: Some([10, 0, 0, n as u8].into()), membership, class: n, ..PodFacts::default() },
        ))
    };
    ["client", "server", "open"].into_iter().zip(1..).map(|(group, n)| pod(n, group)).collect()
}

/// Milliseconds that the agent takes for a change: one that changes a verdict, and so waits three times; the judgement of a full
/// table of flows that all stay; and of one that all end. Medians.
fn change_ms(rounds: usize) -> Result<BTreeMap<&'static str, f64>> {
    let constants = Constants { fast_path: FastPath::SecurityGroups, parent: 0, xdp: Xdp::Off };
    let maps = &mut Programs::load(constants, &LIMITS)?.maps.policy;
    let many = compile(&groups(1000)?, &facts()?, Family::V4, CLASSES).tables;
    let none = Tables::default();
    let pods = [(1, A), (2, B)].map(|(id, pod)| Endpoint { id, policy_id: id, flags: flag::GROUPS, ..pod });
    let mut written = Written::default();
    let mut samples: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut note = |name, since: Instant| {
        samples.entry(name).or_default().push(since.elapsed().as_secs_f64() * 1000.0);
    };
    for _ in 0..rounds {
        maps.enforce(&none, &mut written)?;
        let began = Instant::now();
        maps.enforce(&many, &mut written)?;
        note("verdicts", began);
        for _ in 0..3 {
            let began = Instant::now();
            maps.wait_for_programs();
            note("wait", began);
        }
        let epoch = maps.epoch()?;
        let flow = |n: u32| {
            let key = PairKey {
                low: 1,
                high: 2,
                low_port: n as u16,
                high_port: PORT,
                proto: 6,
                query: 0,
                pad: [0; 2],
            };
            (key, Admitted { epoch, seen: 1, opener: 1, state: State::New as u8, code: 0, pad: [0; 2] })
        };
        for (key, flow) in (0..LIMITS.flows).map(flow) {
            maps.set_pair(&key, &flow)?;
        }
        let stands = maps.pairs()?.len();
        ensure!(stands * 100 > LIMITS.flows as usize * 99, "{stands} flows");
        let began = Instant::now();
        ensure!(maps.sweep(&many, pods.iter())? == 0, "a flow ended");
        note("all_stay", began);
        let began = Instant::now();
        ensure!(maps.sweep(&none, pods.iter())? == stands, "a flow stayed");
        note("all_end", began);
    }
    Ok(samples
        .into_iter()
        .map(|(name, mut samples)| {
            samples.sort_unstable_by(f64::total_cmp);
            (name, (samples[samples.len() / 2] * 10.0).round() / 10.0)
        })
        .collect())
}

/// Memory of the maps of security groups, in KiB: what the arrays hold, all of which is there from the start, and what the
/// kernel says of the flows.
fn map_kib() -> Result<BTreeMap<&'static str, u64>> {
    let constants = Constants { fast_path: FastPath::SecurityGroups, parent: 0, xdp: Xdp::Off };
    let programs = Programs::load(constants, &LIMITS)?;
    let mut all = BTreeMap::new();
    for name in
        [maps::EPOCH, maps::VERDICT, maps::CLASS, maps::PROGRAM, maps::RULES, maps::PAIRS, maps::PAIR_MARK]
    {
        all.insert(name, programs.map_memory(name)?.div_ceil(1024));
    }
    all.insert("total", all.values().sum());
    Ok(all)
}

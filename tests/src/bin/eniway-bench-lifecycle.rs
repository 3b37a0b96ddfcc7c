//! Measures what a pod's coming costs, what the agent takes, and whether packets notice its life: `cargo xtask bench lifecycle`.
//!
//! ```text
//!   namespace of the node:  agent with the allocator inside, eth1      sandboxes: a new network namespace for each pod
//!   eniway-cni, and beside it Debian's ptp with host-local, in turn
//! ```
//!
//! A time of an ADD begins when the plugin is started and ends when it has ended, as a runtime sees it. Both plugins get
//! pods of their own in the same namespace of the node, one after the other in turn, then eight at a time in turn.
//! A start of the agent begins with exec and ends when its service says that it would add pods and that a pod which was
//! there before is forwarded for.
//!
//! What packets notice is measured in the lab: [`eniway_tests::lifecycle`].

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum};
use datapath_user::{
    attach::{self, Target},
    config::{FastPath, Limits, Xdp},
    feature::TcKind,
    grace::Grace,
    net,
    object::{self, Constants, program},
    pin::{Hook, Pins},
};
use eniway_tests::{
    demo::table::{Align, Table},
    figures,
    lab::{
        Netns, NetnsGuard, XdpMode,
        agent::{eniway_binary, next_agent},
    },
    lifecycle::{self, Action, Options, Programs},
    runtime::{Node, Said, Sandbox},
};
use serde_json::{Map, Value, json};

/// Pods of each plugin, one after another and at a time.
const AT_A_TIME: usize = 8;
/// Pods on the node when its memory is read.
const FULL: usize = 256;
const STARTS: usize = 10;
const ATTACHMENTS: usize = 40;

/// Measures pods' life: adding, memory, start, and packets while agents are killed and upgraded
#[derive(Parser)]
struct Args {
    /// What is measured; everything if nothing is named
    cases: Vec<Case>,
    /// Adds the figures to this JSON file
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// cni: pods of each plugin and each way
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(8..=200))]
    pods: u16,
    /// lost: rounds of each action
    #[arg(long, default_value_t = 20)]
    rounds: u32,
    /// lost: requests a second on each path, each of which is answered
    #[arg(long, default_value_t = 50_000)]
    rate: u32,
    /// lost: what is done
    #[arg(long, value_delimiter = ',', default_values = ["kill", "upgrade", "abi"])]
    actions: Vec<Action>,
    /// lost: how the agents use XDP
    #[arg(long, default_value = "off")]
    xdp: XdpMode,
    /// lost: decides when agents are killed while they start; a random one by default
    #[arg(long)]
    seed: Option<u64>,
    /// Measures nothing, and takes the figures from this JSON file
    #[arg(long, value_name = "FILE", requires = "plot")]
    read: Option<PathBuf>,
    /// Writes the figures as a document into this directory
    #[arg(long, value_name = "DIR", requires = "read")]
    plot: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Case {
    /// Packets and connections, while agents are killed, restarted and upgraded
    Lost,
    /// Pods that come and go
    Cni,
    /// The agent's memory and its start
    Agent,
}

type Figures = BTreeMap<String, Value>;

fn main() -> Result<()> {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let args = Args::parse();
    if let (Some(report), Some(dir)) = (&args.read, &args.plot) {
        let path = dir.join("lifecycle.md");
        let text = lifecycle::document(&read(report)?);
        return fs::write(&path, text).with_context(|| path.display().to_string());
    }
    let (figures, result) = measure(&args);
    // What was measured before something went wrong is measured.
    if let Some(path) = &args.report {
        let mut report = if path.exists() { read(path)? } else { Figures::new() };
        report.extend(figures);
        let text = serde_json::to_string_pretty(&report)? + "\n";
        fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    result
}

fn read(path: &Path) -> Result<Figures> {
    let text = fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| format!("{} is no report", path.display()))
}

fn measure(args: &Args) -> (Figures, Result<()>) {
    let mut figures = place();
    let wanted = |case| args.cases.is_empty() || args.cases.contains(&case);
    let mut all = || {
        if wanted(Case::Lost) {
            lost(args, &mut figures)?;
        }
        if wanted(Case::Cni) {
            cni(usize::from(args.pods), &mut figures)?;
        }
        if wanted(Case::Agent) {
            agent(&mut figures)?;
        }
        Ok(())
    };
    let result = all();
    (figures, result)
}

/// Where and when this is measured.
fn place() -> Figures {
    let file = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let of = |text: &str, key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.split_once(':'));
        line.map_or_else(|| "unknown".to_owned(), |(_, value)| value.trim().to_owned())
    };
    let processors = thread::available_parallelism().map_or(0, usize::from);
    let memory: u64 =
        of(&file("/proc/meminfo"), "MemTotal").trim_end_matches(" kB").parse().unwrap_or_default();
    let machine = format!(
        "{processors} processors ({}), {} GiB",
        of(&file("/proc/cpuinfo"), "model name"),
        memory.div_ceil(1 << 20)
    );
    let date = std::process::Command::new("date").arg("-I").output();
    let date = date.map(|date| String::from_utf8_lossy(&date.stdout).trim().to_owned()).unwrap_or_default();
    [("date", date), ("machine", machine), ("kernel", file("/proc/sys/kernel/osrelease").trim().to_owned())]
        .map(|(key, value)| (key.to_owned(), json!(value)))
        .into()
}

fn note(figures: &mut Figures, key: &str, value: Value) {
    println!("{key}: {value}");
    figures.insert(key.to_owned(), value);
}

fn lost(args: &Args, figures: &mut Figures) -> Result<()> {
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..));
    println!("packets and connections while agents are killed, restarted and upgraded; --seed {seed}");
    let agent = eniway_binary()?;
    let dir = tempfile::tempdir()?;
    let other = dir.path().join("eniway");
    fs::copy(&agent, &other).with_context(|| format!("copying {}", agent.display()))?;
    let next = next_agent();
    let mut actions = args.actions.clone();
    if actions.contains(&Action::Abi)
        && let Err(error) = &next
    {
        println!("abi: not measured: {error}");
        actions.retain(|action| *action != Action::Abi);
    }
    let options = Options {
        id: "bench-life".to_owned(),
        programs: Programs { agent, other, next: next.ok() },
        actions,
        xdp: args.xdp,
        rate: f64::from(args.rate),
        rounds: args.rounds,
        seed,
    };
    let report = lifecycle::run(&options, |line| println!("  {line}"))?;
    print!("{}", report.table());
    figures.extend(report.figures());
    for case in &report.cases {
        ensure!(
            case.rounds == args.rounds,
            "{}: only {} of {} rounds count; the machine is too busy: {}",
            case.action.name(),
            case.rounds,
            args.rounds,
            case.void.join("; ")
        );
    }
    Ok(())
}

/// Pods of both plugins that come and go.
fn cni(pods: usize, figures: &mut Figures) -> Result<()> {
    println!("attaching a pod's programs, {ATTACHMENTS} times in each way");
    note(figures, "attach_ms", attachments()?);
    println!("{pods} pods of each plugin, one after another and {AT_A_TIME} at a time");
    let mut node = Node::new("lifecycle", 300)?;
    node.start_agent()?;
    let plugins = [Plugin::Ours, Plugin::Reference];
    let mut stands = Vec::new();
    let mut one = [Vec::new(), Vec::new()];
    let mut eight = [Vec::new(), Vec::new()];
    for number in 0..pods {
        for (plugin, times) in plugins.iter().zip(&mut one) {
            let stand = Stand::new(*plugin, number)?;
            times.push(stand.add(&node)?);
            stands.push(stand);
        }
    }
    // The reference's pods of the first part go before the second, as ours do: both begin with as many as before.
    let mut gone = [Vec::new(), Vec::new()];
    for stand in stands.drain(..) {
        gone[stand.plugin as usize].push(stand.del(&node)?);
    }
    for batch in 0..pods.div_ceil(AT_A_TIME) {
        let numbers = batch * AT_A_TIME..pods.min((batch + 1) * AT_A_TIME);
        for (plugin, times) in plugins.iter().zip(&mut eight) {
            let new =
                numbers.clone().map(|number| Stand::new(*plugin, number)).collect::<Result<Vec<_>>>()?;
            let node = &node;
            let measured: Vec<Result<f64>> = thread::scope(|scope| {
                let adds: Vec<_> = new.iter().map(|stand| scope.spawn(|| stand.add(node))).collect();
                adds.into_iter()
                    .map(|add| add.join().unwrap_or_else(|_| Err(anyhow::anyhow!("it panicked"))))
                    .collect()
            });
            for time in measured {
                times.push(time?);
            }
            stands.extend(new);
        }
    }
    let mut table = Table::new(&[
        ("PLUGIN", Align::Left),
        ("ADD P50 MS", Align::Right),
        ("P99", Align::Right),
        ("EIGHT P50", Align::Right),
        ("P99", Align::Right),
        ("DEL P50", Align::Right),
    ]);
    let (mut add, mut del) = (Map::new(), Map::new());
    let measured = one.iter_mut().zip(&mut eight).zip(&mut gone);
    for ((name, prefix), ((one, eight), gone)) in
        [("eniway-cni", ""), ("ptp, host-local", "ptp_")].iter().zip(measured)
    {
        let values = [
            percentile(one, 50),
            percentile(one, 99),
            percentile(eight, 50),
            percentile(eight, 99),
            percentile(gone, 50),
        ];
        let [p50, p99, p50_8, p99_8, gone] = &values;
        for (key, value) in [("p50", p50), ("p99", p99), ("p50_8", p50_8), ("p99_8", p99_8)] {
            add.insert(format!("{prefix}{key}"), value.clone());
        }
        del.insert(format!("{prefix}p50"), gone.clone());
        let [a, b, c, d, e] = values.map(|value| value.to_string());
        table.row([(*name).to_owned(), a, b, c, d, e]);
    }
    print!("{}", table.render(""));
    figures.insert("cni_add_ms".to_owned(), Value::Object(add));
    figures.insert("cni_del_ms".to_owned(), Value::Object(del));
    end(&node, &stands)
}

/// The agent of a full node.
fn agent(figures: &mut Figures) -> Result<()> {
    println!("the agent with {FULL} pods, and {STARTS} starts");
    let mut node = Node::new("lifecycle", 300)?;
    node.start_agent()?;
    let mut stands = Vec::new();
    for number in 0..FULL {
        let stand = Stand::new(Plugin::Ours, number)?;
        stand.add(&node)?;
        stands.push(stand);
    }
    let pid = node.agent_pid().context("the agent has ended")?;
    note(figures, "agent_rss_kib", json!(rss_kib(pid)?));
    let mut times = Vec::new();
    for _ in 0..STARTS {
        node.kill_agent();
        times.push(node.time_start(&stands[0].sandbox)?.as_secs_f64() * 1e3);
    }
    note(figures, "start_ms", percentile(&mut times, 50));
    note(figures, "start_max_ms", percentile(&mut times, 100));
    let pid = node.agent_pid().context("the agent has ended")?;
    note(figures, "agent_restarted_rss_kib", json!(rss_kib(pid)?));
    end(&node, &stands)
}

/// Removes the pods, and expects that nothing of them is left.
fn end(node: &Node, stands: &[Stand]) -> Result<()> {
    for stand in stands {
        stand.del(node)?;
    }
    let left = node.traces()?;
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Plugin {
    Ours = 0,
    Reference = 1,
}

/// A pod of one of the plugins.
struct Stand {
    plugin: Plugin,
    sandbox: Sandbox,
    _netns: NetnsGuard,
}

impl Stand {
    fn new(plugin: Plugin, number: usize) -> Result<Self> {
        let name = format!("ewr-life-{}-{number}", if plugin == Plugin::Ours { "a" } else { "b" });
        let (_netns, sandbox) = Sandbox::create(&name, &name, &name)?;
        Ok(Self { plugin, sandbox, _netns })
    }

    fn run(&self, node: &Node, verb: &str) -> Result<Said> {
        Ok(match self.plugin {
            Plugin::Ours => node.plugin(verb, Some(&self.sandbox), json!({}))?,
            Plugin::Reference => {
                let conf = json!({
                    "type": "ptp",
                    "ipam": { "type": "host-local", "subnet": "10.99.0.0/16", "dataDir": node.path("host-local") }
                });
                let old = json!({ "cniVersion": "1.0.0" });
                node.program(Path::new("/usr/lib/cni/ptp"), conf, verb, Some(&self.sandbox), old)?
            }
        })
    }

    /// In milliseconds.
    fn timed(&self, node: &Node, verb: &str) -> Result<f64> {
        let begin = Instant::now();
        let said = self.run(node, verb)?;
        let time = begin.elapsed().as_secs_f64() * 1e3;
        ensure!(said.ok, "{verb}: {}", said.output);
        Ok(time)
    }

    fn add(&self, node: &Node) -> Result<f64> {
        self.timed(node, "ADD")
    }

    fn del(&self, node: &Node) -> Result<f64> {
        self.timed(node, "DEL")
    }
}

/// What attaching a pod's two programs takes, in each way: docs/adr/0008-wiring-cost.md.
fn attachments() -> Result<Value> {
    let guard = NetnsGuard::renew("ewr-life-attach")?;
    let dir = std::env::temp_dir().join("ewr-life-attach");
    fs::create_dir_all(&dir)?;
    let pins = Pins::new(Path::new("/sys/fs/bpf/ewr-life-attach"));
    pins.prepare()?;
    pins.make_dirs()?;
    let result = guard.netns().run(|| attach_in(guard.netns(), &pins, &Grace::new(&dir)))?;
    pins.remove_all()?;
    fs::remove_dir_all(&dir)?;
    result
}

fn attach_in(netns: &Netns, pins: &Pins, grace: &Grace) -> Result<Value> {
    let constants = Constants { fast_path: FastPath::All, parent: 0, xdp: Xdp::Off };
    let mut ebpf = object::open(constants, &Limits { endpoints: 16, flows: 1024 }, None)?;
    let ways = [
        ("tcx", TcKind::Tcx, false),
        ("tcx_expedited", TcKind::Tcx, true),
        ("clsact", TcKind::Clsact, false),
    ];
    let mut times = [const { Vec::new() }; 3];
    for _ in 0..ATTACHMENTS {
        for ((_, kind, short), times) in ways.iter().zip(&mut times) {
            netns.exec(&["ip", "link", "add", "a0", "type", "veth", "peer", "name", "b0"])?;
            let ifindex = net::ifindex("a0").context("the veth is gone")?;
            let begin = Instant::now();
            {
                let _short = short.then(|| grace.expedite());
                for (name, hook) in [(program::POD_EGRESS, Hook::In), (program::POD_INGRESS, Hook::Out)] {
                    let target = Target { interface: "a0", ifindex };
                    let program = object::tc(&mut ebpf, name)?;
                    attach::attach_tc(*kind, program, name, target, hook, &pins.pod_tc(ifindex, hook))?;
                }
            }
            times.push(begin.elapsed().as_secs_f64() * 1e3);
            netns.exec(&["ip", "link", "del", "a0"])?;
            for hook in [Hook::In, Hook::Out] {
                pins.remove(&pins.pod_tc(ifindex, hook))?;
            }
        }
    }
    Ok(ways
        .iter()
        .zip(&mut times)
        .map(|((name, ..), times)| ((*name).to_owned(), percentile(times, 50)))
        .collect())
}

/// Of times in milliseconds, rounded to microseconds.
fn percentile(times: &mut [f64], percent: usize) -> Value {
    json!(figures::rounded(figures::percentile(times, percent)))
}

fn rss_kib(pid: u32) -> Result<u64> {
    // An agent gives back what its start took when it has run for two seconds.
    thread::sleep(Duration::from_secs(4));
    Ok(figures::rss_kib(pid)?)
}

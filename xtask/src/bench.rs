//! `cargo xtask bench`: builds for speed and measures.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::{
    cmd, crates, lab,
    needs::{self, Scope},
    setup,
    vm::{self, Job, Kernel, Run},
};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Bench {
    /// The allocator, and the way from its word to the kernel; by the clock.
    Ipam,
    /// What security groups cost on the fast path; by the clock.
    Policy,
    /// Packets while agents are killed and upgraded; pods' coming, the agent's memory and its start; by the clock.
    Lifecycle,
    /// Each kernel program on one packet over and over, beside one that does nothing.
    Programs,
    /// Traffic between pods over eniway, and over what one would run instead.
    Paths,
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Engine {
    /// Instructions, in a virtual machine with one processor; a nanosecond in the figures is one instruction.
    Counted,
    /// Time, on this machine and its kernel.
    Wall,
}

/// Where figures go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Out<'a> {
    /// The JSON file. The figures of `ipam` and `lifecycle` are added to what is there, those of others replace it.
    pub(crate) report: &'a Path,
    /// The directory of tables and charts.
    pub(crate) plot: Option<&'a Path>,
}

/// Runs a benchmark.
pub(crate) fn run(
    bench: Bench,
    engine: Option<Engine>,
    kernel: &str,
    out: Option<Out<'_>>,
    args: &[String],
) -> Result<()> {
    let plot = out.and_then(|out| out.plot.map(|dir| (out.report, dir)));
    if engine == Some(Engine::Counted) && !matches!(bench, Bench::Programs | Bench::Paths) {
        bail!("this is measured by the clock; leave --engine out");
    }
    if plot.is_some() && !matches!(bench, Bench::Paths | Bench::Lifecycle) {
        bail!("there are no charts of this; leave --plot out");
    }
    if !args.is_empty() && matches!(bench, Bench::Ipam | Bench::Policy) {
        bail!("this has no cases to choose from; leave {args:?} out");
    }
    let measured = measure(bench, engine, kernel, out.map(|out| out.report), args);
    // Also what was measured before something went wrong.
    let drawn = plot.map_or(Ok(()), |(report, dir)| draw(bench, report, dir));
    measured.and(drawn)
}

fn measure(
    bench: Bench,
    engine: Option<Engine>,
    kernel: &str,
    report: Option<&Path>,
    args: &[String],
) -> Result<()> {
    match (bench, engine) {
        (Bench::Ipam, _) => ipam(report),
        (Bench::Policy, _) => policy(report),
        (Bench::Lifecycle, _) => lifecycle(report, args),
        // Each run takes as many instructions as the one before; the medians keep the timer's interrupts out.
        (Bench::Programs, None | Some(Engine::Counted)) => {
            let few = ["--rounds", "7", "--repeat", "500"].map(String::from);
            counted(kernel, "eniway-cost", &[&few[..], args].concat(), report)
        }
        (Bench::Programs, Some(Engine::Wall)) => wall("eniway-cost", args, report),
        (Bench::Paths, None | Some(Engine::Counted)) => {
            let engine = ["--engine", "counted"].map(String::from);
            counted(kernel, "eniway-bench", &[&engine[..], args].concat(), report)
        }
        (Bench::Paths, Some(Engine::Wall)) => wall("eniway-bench", args, report),
    }
}

/// Makes tables and charts of a report.
fn draw(bench: Bench, report: &Path, dir: &Path) -> Result<()> {
    let program = match bench {
        Bench::Lifecycle => release(&[LIFECYCLE])?.join(LIFECYCLE),
        _ => lab::bin_dir()?.join("eniway-bench"),
    };
    cmd::output(Command::new(program).arg("--read").arg(report).arg("--plot").arg(dir)).map(drop)
}

/// Open vSwitch, for virtual machines only: its kernel module is not on every machine.
const OVS: &str = "openvswitch-switch";
const OVS_FILES: [&str; 5] = [
    "/usr/sbin/ovsdb-server",
    "/usr/lib/openvswitch-switch/ovs-vswitchd",
    "/usr/bin/ovsdb-tool",
    "/usr/bin/ovs-vsctl",
    "/usr/share/openvswitch/vswitch.ovsschema",
];

/// What iptables loads.
const XTABLES: &str = "/usr/lib/x86_64-linux-gnu/xtables";

/// How long the virtual machine may take.
const LIMIT: Duration = Duration::from_secs(3600);

/// Runs a program that takes `--report FILE`, built for speed, on this machine.
fn wall(name: &str, args: &[String], report: Option<&Path>) -> Result<()> {
    lab::need_root("the benchmark")?;
    setup::run(Scope::Bench)?;
    lab::build()?;
    let bin = release(&["eniway", name])?;
    let mut program = Command::new(bin.join(name));
    program.args(args).env("ENIWAY_BIN", bin.join("eniway"));
    if let Some(report) = report {
        program.arg("--report").arg(report);
    }
    cmd::run(&mut program)
}

/// Builds programs for speed and says where they are.
fn release(programs: &[&str]) -> Result<PathBuf> {
    cmd::step("build for speed", || {
        let packages = ["--package", "datapath-user", "--package", PLUGIN, "--package", crates::LAB];
        let mut build = cmd::cargo(&["build", "--locked", "--release"]);
        build.args(packages).args(programs.iter().flat_map(|program| ["--bin", program]));
        cmd::run(&mut build)
    })?;
    let debug = lab::bin_dir()?;
    Ok(debug.parent().context("the target directory")?.join("release"))
}

/// Runs a program that takes `--report FILE` in the counting virtual machine.
fn counted(kernel: &str, name: &str, args: &[String], report: Option<&Path>) -> Result<()> {
    lab::need_root("the benchmark")?;
    setup::run(Scope::Bench)?;
    lab::build()?;
    let program = lab::bin_dir()?.join(name);
    let mut args = args.to_vec();
    let mut tools = vm::matrix::tools()?;
    for tool in needs::BENCH_TOOLS {
        tools.push(needs::find_tool(tool.program).with_context(|| format!("no program {}", tool.program))?);
    }
    let kernel = Kernel::find(kernel)?;
    let ovs = vm::packages::with_needs(OVS)?;
    let report = report.map(std::path::absolute).transpose()?;
    if let Some(report) = &report {
        args.extend(["--report".into(), report.display().to_string()]);
    }
    let dirs: Vec<PathBuf> = report.iter().filter_map(|path| path.parent()).map(Path::to_path_buf).collect();
    let job = Job {
        kernel: &kernel,
        runs: &[Run { name: name.into(), program, args }],
        programs: &[],
        tools: &tools,
        files: &[],
        packaged: &OVS_FILES.map(|file| (ovs.clone(), file)),
        trees: &[XTABLES.into()],
        dirs: &dirs,
        env: &[],
        back: report.as_slice(),
        limit: LIMIT,
    };
    for ran in vm::boot(&job, |line| println!("{line}"))? {
        if !ran.success {
            bail!("{}: {}", ran.name, ran.ended);
        }
    }
    Ok(())
}

fn policy(report: Option<&Path>) -> Result<()> {
    lab::need_root("the benchmark")?;
    setup::run(Scope::Tests)?;
    example(COMPILER, "compile")?;
    let bin = release(&["eniway-bench-policy"])?;
    let figures = bin.join("bench-policy-compile.json");
    cmd::step("the compiler", || {
        let text = cmd::output(&mut Command::new(bin.join("examples/compile")))?;
        print!("{text}");
        fs::write(&figures, text).with_context(|| figures.display().to_string())
    })?;
    let mut packets = Command::new(bin.join("eniway-bench-policy"));
    if let Some(report) = report {
        packets.arg("--report").arg(report).arg("--add").arg(figures);
    }
    cmd::step("the kernel programs", || cmd::run(&mut packets))
}

fn lifecycle(report: Option<&Path>, args: &[String]) -> Result<()> {
    lab::need_root("the benchmark")?;
    setup::run(Scope::Tests)?;
    lab::build_next("release")?;
    let bin = release(&["eniway", PLUGIN, LIFECYCLE])?;
    let mut bench = Command::new(bin.join(LIFECYCLE));
    bench.args(args).env("ENIWAY_BIN", bin.join("eniway"));
    if let Some(report) = report {
        bench.arg("--report").arg(report);
    }
    cmd::step("the agent's life", || cmd::run(&mut bench))
}

/// Builds a crate's benchmark for speed.
fn example(package: &str, name: &str) -> Result<()> {
    cmd::step(&format!("build the benchmark of {package} for speed"), || {
        let example = ["--package", package, "--example", name];
        cmd::run(cmd::cargo(&["build", "--locked", "--release"]).args(example))
    })
}

fn ipam(report: Option<&Path>) -> Result<()> {
    lab::need_root("the benchmark of the sync")?;
    setup::run(Scope::Tests)?;
    example(ALLOCATOR, "bench")?;
    let bin = release(&["eniway", "eniway-bench-ipam", "eniway-bench-faults"])?;
    let program = |name: &str| {
        let mut program = Command::new(bin.join(name));
        program.env("ENIWAY_BIN", bin.join("eniway"));
        if let Some(report) = report {
            program.arg("--report").arg(report);
        }
        program
    };
    let mut sync = program("eniway-bench-ipam");
    for part in ["embedded", "scale"] {
        let figures = bin.join(format!("bench-ipam-{part}.json"));
        cmd::step(&format!("the allocator: {part}"), || {
            let text = cmd::output(Command::new(bin.join("examples/bench")).arg(part))?;
            print!("{text}");
            fs::write(&figures, text).with_context(|| figures.display().to_string())
        })?;
        if report.is_some() {
            sync.arg("--add").arg(figures);
        }
    }
    cmd::step("from the allocator's word to the kernel", || cmd::run(&mut sync))?;
    cmd::step("kills of allocators and agents", || cmd::run(&mut program("eniway-bench-faults")))
}

const LIFECYCLE: &str = "eniway-bench-lifecycle";
const PLUGIN: &str = "eniway-cni";
const COMPILER: &str = "eniway-policy";
const ALLOCATOR: &str = "eniway-ipam";

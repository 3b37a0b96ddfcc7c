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
    needs::Scope,
    setup,
    vm::{self, Job, Kernel, Run},
};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Bench {
    /// The allocator, and the way from its word to the kernel; by the clock.
    Ipam,
    /// Each kernel program on one packet over and over, beside one that does nothing.
    Programs,
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Engine {
    /// Instructions, in a virtual machine with one processor; a nanosecond in the figures is one instruction.
    Counted,
    /// Time, on this machine and its kernel.
    Wall,
}

/// Runs a benchmark. The allocator's figures are added to the report, others are written anew.
pub(crate) fn run(bench: Bench, engine: Option<Engine>, kernel: &str, report: Option<&Path>) -> Result<()> {
    match (bench, engine) {
        (Bench::Ipam, Some(Engine::Counted)) => {
            bail!("the allocator is measured by the clock, with files and sockets; leave --engine out")
        }
        (Bench::Ipam, _) => ipam(report),
        (Bench::Programs, engine) => programs(engine.unwrap_or(Engine::Counted), kernel, report),
    }
}

/// How long the virtual machine may take.
const LIMIT: Duration = Duration::from_secs(1800);

fn programs(engine: Engine, kernel: &str, report: Option<&Path>) -> Result<()> {
    lab::need_root("loading the kernel programs")?;
    setup::run(Scope::Lab)?;
    lab::build()?;
    let program = lab::bin_dir()?.join("eniway-cost");
    let words = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
    match engine {
        Engine::Wall => {
            let mut cost = Command::new(program);
            if let Some(report) = report {
                cost.arg("--report").arg(report);
            }
            cmd::run(&mut cost)
        }
        // Each run takes as many instructions as the one before; the medians keep the timer's interrupts out.
        Engine::Counted => {
            counted(kernel, "cost", program, words(&["--rounds", "7", "--repeat", "500"]), report)
        }
    }
}

/// Runs a program that takes `--report FILE` in the counting virtual machine.
fn counted(
    kernel: &str,
    name: &str,
    program: PathBuf,
    mut args: Vec<String>,
    report: Option<&Path>,
) -> Result<()> {
    let kernel = Kernel::find(kernel)?;
    let report = report.map(std::path::absolute).transpose()?;
    if let Some(report) = &report {
        args.extend(["--report".into(), report.display().to_string()]);
    }
    let dirs: Vec<PathBuf> = report.iter().filter_map(|path| path.parent()).map(Path::to_path_buf).collect();
    let job = Job {
        kernel: &kernel,
        runs: &[Run { name: name.into(), program, args }],
        tools: &vm::matrix::tools()?,
        files: &[],
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

fn ipam(report: Option<&Path>) -> Result<()> {
    lab::need_root("the benchmark of the sync")?;
    setup::run(Scope::Tests)?;
    cmd::step("build for speed", || {
        cmd::run(&mut cmd::cargo(&[
            "build",
            "--locked",
            "--release",
            "--package",
            ALLOCATOR,
            "--example",
            "bench",
        ]))?;
        let packages = ["--package", "datapath-user", "--package", crates::LAB];
        let programs = ["--bin", "eniway", "--bin", "eniway-bench-ipam"];
        cmd::run(cmd::cargo(&["build", "--locked", "--release"]).args(packages).args(programs))
    })?;
    let debug = lab::bin_dir()?;
    let bin = debug.parent().context("the target directory")?.join("release");
    let mut sync = Command::new(bin.join("eniway-bench-ipam"));
    sync.env("ENIWAY_BIN", bin.join("eniway"));
    if let Some(report) = report {
        sync.arg("--report").arg(report);
    }
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
    cmd::step("from the allocator's word to the kernel", || cmd::run(&mut sync))
}

const ALLOCATOR: &str = "eniway-ipam";

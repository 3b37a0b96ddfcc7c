//! `cargo xtask bench`: builds for speed and measures.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use crate::{cmd, crates, lab, needs::Scope, setup};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Bench {
    /// The allocator, and the way from its word to the kernel.
    Ipam,
    /// Pods' coming, the agent's memory and its start.
    Lifecycle,
}

/// Runs a benchmark; its figures are added to the report.
pub(crate) fn run(bench: Bench, report: Option<&Path>) -> Result<()> {
    lab::need_root("a benchmark")?;
    setup::run(Scope::Tests)?;
    match bench {
        Bench::Ipam => ipam(report),
        Bench::Lifecycle => lifecycle(report),
    }
}

fn lifecycle(report: Option<&Path>) -> Result<()> {
    cmd::step("build for speed", || {
        let packages = ["--package", "datapath-user", "--package", "eniway-cni", "--package", crates::LAB];
        let programs = ["--bin", "eniway", "--bin", "eniway-cni", "--bin", "eniway-bench-lifecycle"];
        cmd::run(cmd::cargo(&["build", "--locked", "--release"]).args(packages).args(programs))
    })?;
    let debug = lab::bin_dir()?;
    let bin = debug.parent().context("the target directory")?.join("release");
    let mut bench = Command::new(bin.join("eniway-bench-lifecycle"));
    bench.env("ENIWAY_BIN", bin.join("eniway"));
    if let Some(report) = report {
        bench.arg("--report").arg(report);
    }
    cmd::step("pods, the agent's memory and its start", || cmd::run(&mut bench))
}

fn ipam(report: Option<&Path>) -> Result<()> {
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

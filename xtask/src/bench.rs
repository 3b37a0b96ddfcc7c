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
    /// What security groups cost on the fast path.
    Policy,
}

/// Runs a benchmark; its figures are added to the report.
pub(crate) fn run(bench: Bench, report: Option<&Path>) -> Result<()> {
    lab::need_root("the benchmark")?;
    setup::run(Scope::Tests)?;
    match bench {
        Bench::Ipam => ipam(report),
        Bench::Policy => policy(report),
    }
}

/// The kernel programs are built for speed in any case; the compiler is measured in a program of its own.
fn policy(report: Option<&Path>) -> Result<()> {
    cmd::step("build for speed", || {
        cmd::run(&mut cmd::cargo(&[
            "build",
            "--locked",
            "--release",
            "--package",
            COMPILER,
            "--example",
            "bench",
        ]))?;
        cmd::run(&mut cmd::cargo(&[
            "build",
            "--locked",
            "--package",
            crates::LAB,
            "--bin",
            "eniway-bench-policy",
        ]))
    })?;
    let debug = lab::bin_dir()?;
    let release = debug.parent().context("the target directory")?.join("release");
    let figures = release.join("bench-policy-compile.json");
    cmd::step("the compiler", || {
        let text = cmd::output(&mut Command::new(release.join("examples/bench")))?;
        print!("{text}");
        fs::write(&figures, text).with_context(|| figures.display().to_string())
    })?;
    let mut packets = Command::new(debug.join("eniway-bench-policy"));
    if let Some(report) = report {
        packets.arg("--report").arg(report).arg("--add").arg(figures);
    }
    cmd::step("the kernel programs", || cmd::run(&mut packets))
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
const COMPILER: &str = "eniway-policy";

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
}

/// Runs a benchmark; its figures are added to the report.
pub(crate) fn run(bench: Bench, report: Option<&Path>) -> Result<()> {
    let Bench::Ipam = bench;
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
        let programs = ["--bin", "eniway", "--bin", "eniway-bench-ipam", "--bin", "eniway-bench-faults"];
        cmd::run(cmd::cargo(&["build", "--locked", "--release"]).args(packages).args(programs))
    })?;
    let debug = lab::bin_dir()?;
    let bin = debug.parent().context("the target directory")?.join("release");
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

const ALLOCATOR: &str = "eniway-ipam";

//! `cargo xtask`: the front door of the repository. It does nothing itself; it runs other programs, says
//! which and how long each took, and prints the exact command when one fails.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
mod check;
mod cmd;
mod crates;
mod doctor;
mod lab;
mod links;
mod needs;
mod setup;
mod test;
mod vm;

/// Sets a machine up, runs the demo, the tests and the checks of eniway.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what building, the lab and the checks need (as root; the other tasks do it on their own).
    Setup {
        /// Install nothing, list what is missing; exit status 1 if anything is.
        #[arg(long)]
        check: bool,
    },
    /// Show what this machine has, what it lacks and how to get it.
    Doctor,
    /// Build everything, make the lab, run the walk-through and its checks (as root).
    Demo {
        /// Leave the lab standing and print the commands to look around.
        #[arg(long)]
        keep: bool,
        /// Write what was found as JSON.
        #[arg(long, value_name = "FILE")]
        report: Option<PathBuf>,
    },
    /// Drive the lab: `down` removes what a demo left standing, `--help` lists the rest.
    Lab {
        /// Handed to the lab as they are.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        args: Vec<String>,
    },
    /// Run the tests and count them.
    Test {
        /// Which tests; all of them when not given. All but the host tests need root.
        group: Option<test::Group>,
        /// The kernels of the tests in virtual machines.
        #[arg(long, value_name = "VERSIONS", value_delimiter = ',', default_values_t = vm::matrix::KERNELS.map(String::from))]
        kernels: Vec<String>,
        /// Repeat a run of `equivalence`, which prints its seed.
        #[arg(long, value_name = "N")]
        seed: Option<u64>,
        /// How many random rule sets `equivalence` runs.
        #[arg(long, value_name = "N", default_value_t = 2000)]
        rule_sets: u64,
        /// Only tests with this in their name, and whatever else the test runner understands.
        #[arg(last = true)]
        filter: Vec<String>,
    },
    /// Build the agent of the ABI version after this one, with other layouts, which tests of upgrades take turns with.
    NextAbi,
    /// Measure (as root); exit status 1 only if measuring failed.
    Bench {
        /// What.
        what: bench::Bench,
        /// What is counted; the benchmark's own choice when not given.
        #[arg(long)]
        engine: Option<bench::Engine>,
        /// The kernel of the counted engine.
        #[arg(long, value_name = "VERSION", default_value = "6.12")]
        kernel: String,
        /// Write the figures to this JSON file.
        #[arg(long, value_name = "FILE")]
        report: Option<PathBuf>,
        /// Write tables and charts into this directory (paths and lifecycle only).
        #[arg(long, value_name = "DIR", requires = "report")]
        plot: Option<PathBuf>,
        /// For the benchmark's own program: cases, `--systems`; `--help` lists them.
        #[arg(last = true)]
        args: Vec<String>,
    },
    /// Formatting, lints of the host crates and of the BPF crates, documentation, lock file.
    Check,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Task::Setup { check: false } => setup::run(needs::Scope::All).map(|()| true),
        Task::Setup { check: true } => setup::check(),
        Task::Doctor => doctor::run(),
        Task::Demo { keep, report } => lab::demo(keep, report.as_deref()).map(|()| true),
        Task::Lab { args } => lab::run(&args).map(|()| true),
        Task::Test { group: Some(test::Group::Equivalence), seed, rule_sets, .. } => {
            test::equivalence(test::Cases { seed, rule_sets })
        }
        Task::Test { group, kernels, filter, .. } => test::run(group, &kernels, &filter),
        Task::NextAbi => lab::build_next("dev").map(|()| true),
        Task::Bench { what, engine, kernel, report, plot, args } => {
            let out = report.as_deref().map(|report| bench::Out { report, plot: plot.as_deref() });
            bench::run(what, engine, &kernel, out, &args).map(|()| true)
        }
        Task::Check => check::run().map(|()| true),
    };
    finish(done)
}

fn finish(done: Result<bool>) -> ExitCode {
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

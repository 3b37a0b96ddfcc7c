//! `eniway-lab`: the walk-through as a demo, and the broom for what is left standing.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum};
use eniway_tests::{
    demo::{self, interrupt::Interrupt},
    lab::{self, XdpMode},
};

/// A VPC of network namespaces on this machine
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Replay the walk-through of Cloud Native Network 2.0 and check every way that its packets go
    Demo {
        /// Leave the lab standing and print the commands to look around
        #[arg(long)]
        keep: bool,
        /// Write pods and checks as JSON
        #[arg(long, value_name = "FILE")]
        report: Option<PathBuf>,
        /// Which pod-to-pod traffic on a node takes the fast path
        #[arg(long, value_enum, default_value_t = FastPath::All)]
        fast_path: FastPath,
        /// How the agents use XDP on the extended NICs
        #[arg(long, value_enum, default_value_t = Xdp::Off)]
        xdp: Xdp,
    },
    /// Remove a lab that was left standing, or what a crash left of one
    Down {
        /// The lab
        #[arg(default_value = demo::LAB)]
        lab: String,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FastPath {
    Off,
    All,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Xdp {
    Off,
    Guard,
    Redirect,
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    match run(Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Says whether all is well.
fn run(args: Args) -> anyhow::Result<bool> {
    match args.command {
        Command::Demo { keep, report, fast_path, xdp } => {
            let interrupt = Interrupt::watch().context("watching for Ctrl-C")?;
            let options = demo::Options {
                keep,
                report,
                fast_path: matches!(fast_path, FastPath::All),
                xdp: match xdp {
                    Xdp::Off => XdpMode::Off,
                    Xdp::Guard => XdpMode::Guard,
                    Xdp::Redirect => XdpMode::Redirect,
                },
            };
            Ok(demo::run(&options, &interrupt)?)
        }
        Command::Down { lab } => {
            let removed = lab::remove(&lab)?;
            println!("{}", if removed { "removed" } else { "nothing to remove" });
            Ok(true)
        }
    }
}

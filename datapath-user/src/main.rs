//! `eniway`: the agent, and the commands that show and end what it does.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};
use datapath_user::{
    agent::{self, Until},
    cli,
    config::{self, Config},
};

/// VPC-native networking for the pods of this node
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent
    Agent {
        /// The configuration file
        #[arg(long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
        config: PathBuf,
        /// Apply the source once and end; exit status 1 when something could not be applied
        #[arg(long)]
        once: bool,
    },
    /// Let a snapshot take effect that is held back because it removes most pods
    Confirm {
        /// The agent's configuration file
        #[arg(long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
        config: PathBuf,
    },
    Status(cli::status::Args),
    Pods(cli::pods::Args),
    Counters(cli::counters::Args),
    Policy(cli::policy::Args),
    Trace(cli::trace::Args),
    Audit(cli::audit::Args),
    Detach(cli::detach::Args),
    Ipam(Box<cli::ipam::Args>),
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    // Its exit status says more than success or failure.
    if let Command::Audit(args) = &command {
        return cli::audit::run(args);
    }
    match run(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("eniway: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Agent { config, once } => {
            let config = Config::load(&config)?;
            config::start_log(&config.log);
            // One thread: sockets are made in the network namespace of the thread that makes them.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(agent::run(config, if once { Until::Applied } else { Until::Stopped }))?;
        }
        Command::Confirm { config } => println!("confirmed: {}", agent::confirm(&Config::load(&config)?)?),
        Command::Status(args) => cli::status::run(&args)?,
        Command::Pods(args) => cli::pods::run(&args)?,
        Command::Counters(args) => cli::counters::run(&args)?,
        Command::Policy(args) => cli::policy::run(&args)?,
        Command::Trace(args) => cli::trace::run(&args)?,
        Command::Audit(_) => {}
        Command::Detach(args) => cli::detach::run(&args)?,
        Command::Ipam(args) => cli::ipam::run(&args)?,
    }
    Ok(())
}

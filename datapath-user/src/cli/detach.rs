//! `eniway detach`: the end of the datapath on this node.

use std::fmt::Write as _;

use serde::Serialize;

use super::{CliError, Target, print, print_json};
use crate::{
    config::Config,
    detach::{self, Detached},
};

/// Remove everything that the agent made on this node: pods lose their network
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    target: Target,
}

#[derive(Serialize)]
struct Report<'a> {
    pods: &'a [String],
    parents: &'a [String],
    left: &'a [String],
    problems: &'a [String],
}

/// Runs the command.
///
/// # Errors
///
/// When an agent runs, or something is left behind.
pub fn run(args: &Args) -> Result<(), CliError> {
    let config = Config::load(&args.target.config)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::Runtime)?;
    let Detached { pods, parents, left, problems } = runtime.block_on(detach::detach(&config))?;
    if args.target.json {
        print_json(&Report { pods: &pods, parents: &parents, left: &left, problems: &problems })?;
    } else {
        let mut out = String::new();
        for (what, names) in [("pods", &pods), ("parent ENIs", &parents)] {
            let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            // Writing to a string cannot fail.
            let _ = writeln!(out, "detached from {what}: {names}");
        }
        for what in &left {
            let _ = writeln!(out, "left: {what}");
        }
        print(&out)?;
    }
    if problems.is_empty() { Ok(()) } else { Err(CliError::LeftBehind(problems)) }
}

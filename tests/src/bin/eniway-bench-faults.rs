//! Kills allocators and agents while pods come and go, and measures that nothing is lost: `cargo xtask bench ipam`.

use std::{collections::BTreeMap, fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use eniway_tests::faults::{self, Options};
use serde_json::{Value, json};

/// Kills allocators and agents while pods come and go
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Adds the figures to this JSON file
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Kills of allocators
    #[arg(long, default_value_t = 700)]
    kills_allocator: u32,
    /// Kills of agents
    #[arg(long, default_value_t = 300)]
    kills_agent: u32,
    /// Stops of etcd while packets flow
    #[arg(long, default_value_t = 10)]
    etcd_stops: u32,
    /// Decides all choices; a random one by default
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Subcommand)]
enum Command {
    /// Runs an allocator; for this program's own use
    #[command(hide = true)]
    Allocator {
        /// Its configuration
        config: PathBuf,
    },
}

fn main() -> Result<()> {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let args = Args::parse();
    if let Some(Command::Allocator { config }) = &args.command {
        return faults::serve(config);
    }
    let options = Options {
        program: std::env::current_exe()?,
        id: "ewf".to_owned(),
        seed: args.seed.unwrap_or_else(|| fastrand::u64(..)),
        kills_allocator: args.kills_allocator,
        kills_agent: args.kills_agent,
    };
    let report = faults::run(&options)?;
    let forwarding = faults::forwarding::run(&options, args.etcd_stops)?;
    let mut figures = serde_json::to_value(&report)?;
    if let (Some(all), Value::Object(more)) = (figures.as_object_mut(), serde_json::to_value(&forwarding)?) {
        all.extend(more);
    }
    let figures = json!({ "faults": figures });
    println!("{figures:#}");
    if let Some(path) = &args.report {
        let mut report: BTreeMap<String, Value> = match fs::read(path) {
            Ok(text) => serde_json::from_slice(&text).with_context(|| path.display().to_string())?,
            Err(_) => BTreeMap::new(),
        };
        report.insert("faults".to_owned(), figures["faults"].clone());
        fs::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    ensure!(
        report.duplicates + report.lost + report.leaks + forwarding.packets_lost == 0,
        "something was wrong; the report says what"
    );
    Ok(())
}

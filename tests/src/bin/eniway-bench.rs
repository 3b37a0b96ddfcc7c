//! Measures what traffic between pods costs over eniway, and over what one would run instead.

use std::{fs, num::NonZeroUsize, path::PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use eniway_tests::bench::{self, Case, plot, report::Report, system::Kind};
use nix::fcntl::{Flock, FlockArg};

const LOCK: &str = "/run/eniway-bench.lock";

/// Measures what traffic between pods costs over eniway, and over what one would run instead.
#[derive(Parser)]
struct Options {
    /// What the clock is.
    #[arg(long, value_enum, default_value_t = Engine::Wall)]
    engine: Engine,
    /// Only cases with one of these in their name, such as `same-node/tcp-rr`.
    cases: Vec<String>,
    /// Only these systems.
    #[arg(long, value_delimiter = ',')]
    systems: Vec<String>,
    /// Rounds of each case, in place of 15 counted ones, or 31 by the clock: fewer for a look.
    #[arg(long, value_name = "N")]
    rounds: Option<NonZeroUsize>,
    /// Write all figures as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Write tables and a chart of each case into this directory.
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
    /// Measure nothing: take the figures of a report, or of several of one engine and kernel.
    #[arg(long, value_name = "FILE")]
    read: Vec<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Engine {
    /// One of instructions, in a virtual machine made so.
    Counted,
    /// One of time.
    Wall,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let report = if options.read.is_empty() { measure(&options)? } else { read(&options.read)? };
    if let Some(path) = &options.report {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    if let Some(dir) = &options.plot {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        plot::write(&report, dir).map_err(|error| anyhow::anyhow!("{}: {error}", dir.display()))?;
        let path = dir.join(format!("{}.md", report.name()));
        fs::write(&path, report.document()).with_context(|| path.display().to_string())?;
    }
    println!("kernel {}, {}\n{}", report.kernel, report.engine, report.markdown());
    let void = options.read.is_empty() && !report.void.is_empty();
    ensure!(!void, "void, the control pair differed: {}", report.void.join(", "));
    Ok(())
}

fn read(paths: &[PathBuf]) -> Result<Report> {
    let mut all: Option<Report> = None;
    for path in paths {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let report: Report = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        match &mut all {
            Some(all) => {
                ensure!(
                    all.name() == report.name(),
                    "{}: {}, not {}",
                    path.display(),
                    report.name(),
                    all.name()
                );
                all.runs.extend(report.runs);
                all.ratios.extend(report.ratios);
                all.void.extend(report.void);
            }
            None => all = Some(report),
        }
    }
    let mut all = all.context("no report")?;
    all.compare_above(Kind::Eniway.name(), Kind::Loopback.name());
    Ok(all)
}

fn measure(options: &Options) -> Result<Report> {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    ensure!(nix::unistd::geteuid().is_root(), "network namespaces and programs need root");
    let wanted = |case: &Case| {
        options.cases.is_empty() || options.cases.iter().any(|part| case.to_string().contains(part))
    };
    let cases: Vec<Case> = Case::all().filter(wanted).collect();
    let names = || Kind::ALL.map(Kind::name).join(", ");
    if let Some(unknown) =
        options.systems.iter().find(|name| Kind::ALL.iter().all(|kind| kind.name() != *name))
    {
        bail!("no system {unknown}: there are {}", names());
    }
    let kinds: Vec<Kind> = Kind::ALL
        .into_iter()
        .filter(|kind| options.systems.is_empty() || options.systems.iter().any(|name| name == kind.name()))
        .collect();
    if cases.is_empty() {
        let all: Vec<_> = Case::all().map(|case| case.to_string()).collect();
        bail!("no case with {:?} in its name: there are {}", options.cases, all.join(", "));
    }
    let lock = fs::File::create(LOCK).context(LOCK)?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("{LOCK}: another benchmark is running"))?;
    let engine = match options.engine {
        Engine::Counted => bench::Engine::Counted,
        Engine::Wall => bench::Engine::Wall,
    };
    Ok(bench::run(engine, &cases, &kinds, options.rounds.map(NonZeroUsize::get))?)
}

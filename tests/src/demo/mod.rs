//! The walk-through as a program: builds the lab, shows what is in it, runs the checks, shows the counters.

pub mod checks;
pub mod evidence;
pub mod interrupt;
pub mod kube_proxy;
pub mod report;
mod show;
pub mod table;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    time::{Duration, Instant},
};

use self::{
    checks::{Cast, Check, Proof},
    interrupt::Interrupt,
    report::{CheckLine, Report},
};
use crate::lab::{self, Lab, Source, XdpMode, large};

/// The lab that the demo builds, and `eniway-lab down` removes.
pub const LAB: &str = "demo";

/// Why the demo ended early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The lab.
    #[error(transparent)]
    Lab(#[from] lab::Error),
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// The report cannot be written.
    #[error("cannot write the report {}: {source}", path.display())]
    Report {
        /// Where to.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// A result of the demo.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the user may choose.
#[derive(Clone, Debug)]
pub struct Options {
    /// Leave the lab standing.
    pub keep: bool,
    /// Where to write the report.
    pub report: Option<PathBuf>,
    /// Whether pods of one node talk by the fast path.
    pub fast_path: bool,
    /// How the agents use XDP.
    pub xdp: XdpMode,
}

/// Runs the demo. Says whether all checks passed; an interrupted run has not.
///
/// # Errors
///
/// When the lab cannot be built, or what it consists of cannot be read.
pub fn run(options: &Options, interrupt: &Interrupt) -> Result<bool> {
    let start = Instant::now();
    let lab = build(options, interrupt)?;
    let result = walk(&lab, options, interrupt, start);
    if options.keep {
        show::commands(&lab)?;
        lab.keep();
        return result;
    }
    let down = Instant::now();
    let removed = lab.shutdown();
    println!(
        "\nremoved in {:.1} s; {:.1} s in all",
        down.elapsed().as_secs_f32(),
        start.elapsed().as_secs_f32()
    );
    let passed = result?;
    removed?;
    Ok(passed)
}

fn build(options: &Options, interrupt: &Interrupt) -> Result<Lab> {
    let start = Instant::now();
    let lab = Lab::walkthrough(LAB)
        .source(Source::ALLOCATOR)
        .fast_path(options.fast_path)
        .xdp(options.xdp)
        .build()?;
    interrupt.check()?;
    lab.make_large_file(large::LENGTH)?;
    lab.start_agents()?;
    interrupt.check()?;
    lab.elb().wait_healthy(lab.pods().len(), Duration::from_secs(5))?;
    show::headline(&lab, options, start.elapsed())?;
    Ok(lab)
}

fn walk(lab: &Lab, options: &Options, interrupt: &Interrupt, start: Instant) -> Result<bool> {
    show::pods(lab)?;
    show::sub_enis(lab)?;
    println!();
    let mut report = Report::of(lab)?;
    let cast = Cast::of(lab, options.fast_path)?;
    let mut all_ran = true;
    for check in checks::ALL {
        if interrupt.check().is_err() {
            all_ran = false;
            break;
        }
        show::running(check.name);
        let line = run_check(check, &cast);
        show::check(&line);
        report.add(line);
    }
    show::counters(lab)?;
    if let Some(path) = &options.report {
        report.write(path)?;
    }
    show::result(&report, all_ran, start.elapsed());
    Ok(all_ran && report.failed == 0)
}

/// A check that panics has failed like any other; the lab is removed all the same.
fn run_check(check: &Check, cast: &Cast<'_>) -> CheckLine {
    let start = Instant::now();
    let (ok, latency, detail) = match catch_unwind(AssertUnwindSafe(|| (check.run)(cast))) {
        Ok(Ok(Proof { latency, detail })) => (true, latency, detail),
        Ok(Err(failure)) => (false, start.elapsed(), failure.to_string()),
        Err(_) => (false, start.elapsed(), "it panicked, see above".to_owned()),
    };
    CheckLine { name: check.name, ok, detail, micros: latency.as_micros() as u64 }
}

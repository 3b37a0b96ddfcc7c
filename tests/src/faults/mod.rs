//! Random SIGKILLs of allocators and agents while pods come and go and the VPC fails.
//!
//! The allocators and the agents are processes; the VPC outlives them in this one. Callers ask until they are answered, and a
//! `ledger` knows what they were told. Three things are wrong, and counted: *duplicates* (two pods have one address, VLAN, MAC or
//! interface, at any side), *losses* (what a caller was told does not hold), *leaks* (something is left that nobody has).
//!
//! - `world`: the processes, the nodes, the VPC
//! - `vpc`: the VPC behind a socket; `allocator`: the process that asks it
//! - `churn`: the callers; `killer`: who kills, and when
//! - `check`: comparing all sides, while everything goes on and afterwards
//! - [`forwarding`]: packets between pods while etcd, allocators and agents stop

mod allocator;
mod check;
mod churn;
#[path = "../../../ipam/tests/common/etcd.rs"]
mod etcd;
pub mod forwarding;
mod killer;
mod ledger;
mod process;
mod vpc;
mod world;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use eniway_ipam::vpc::Faults;
use fastrand::Rng;
use serde::Serialize;

pub use allocator::serve;
use churn::{Churn, Kind};
use ledger::{Ledger, Wrong};
use world::{NODES, World};

/// How long everything may take to come to rest after the last kill.
const RECOVERY: Duration = Duration::from_secs(60);
/// How often all sides are looked at while they change.
const SAMPLE: Duration = Duration::from_millis(150);

/// What is to happen.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program that runs an allocator when called with `allocator FILE`.
    pub program: PathBuf,
    /// For the names of namespaces and directories: a few letters, digits and `-`.
    pub id: String,
    /// Decides all choices of the callers, the killers and the VPC; not the moments at which processes run.
    pub seed: u64,
    /// Kills of allocators, half of them with each store.
    pub kills_allocator: u32,
    /// Kills of agents, half of them with each store.
    pub kills_agent: u32,
}

/// What happened.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// What decided the choices.
    pub seed: u64,
    /// Kills of allocators.
    pub kills_allocator: u64,
    /// Kills of agents.
    pub kills_agent: u64,
    /// Restarts of etcd meanwhile.
    pub etcd_restarts: u64,
    /// Calls that the VPC failed.
    pub vpc_errors: u64,
    /// Calls that the VPC neither answered nor carried out.
    pub vpc_timeouts: u64,
    /// Calls that the VPC carried out without an answer.
    pub vpc_lost_replies: u64,
    /// Allocations that callers were told of.
    pub allocations: u64,
    /// Releases.
    pub releases: u64,
    /// Answers that the agent could not program an allocation; the caller has asked again.
    pub refused_by_agent: u64,
    /// Two pods had the same.
    pub duplicates: u64,
    /// What callers were told did not hold.
    pub lost: u64,
    /// Left behind after recovery.
    pub leaks: u64,
    /// The slower of the two recoveries after the last kill.
    pub recovery_seconds: f64,
    /// All of it.
    pub seconds: f64,
    /// The first things that were wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub wrong: Vec<String>,
}

/// Does it, first with the embedded store and one allocator, then with etcd and two. Says on standard error how far it has come.
///
/// # Errors
///
/// When something could not be started, or nobody was answered any more: what is wrong is in the report.
pub fn run(options: &Options) -> Result<Report> {
    let begin = Instant::now();
    let mut report = Report { seed: options.seed, ..Report::default() };
    eprintln!("faults: seed {}", options.seed);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    for with_etcd in [false, true] {
        let half = |kills: u32| if with_etcd { kills / 2 } else { kills.div_ceil(2) };
        let kills = (half(options.kills_allocator), half(options.kills_agent));
        runtime.block_on(one_store(options, with_etcd, kills, &mut report))?;
    }
    report.seconds = begin.elapsed().as_secs_f64();
    Ok(report)
}

async fn one_store(options: &Options, with_etcd: bool, kills: (u32, u32), report: &mut Report) -> Result<()> {
    let name = if with_etcd { "etcd" } else { "embedded" };
    let mut random = Rng::with_seed(options.seed ^ u64::from(with_etcd));
    let dir = std::env::temp_dir().join(format!("{}-{name}", options.id));
    let world = World::with_agents(&options.program, &dir, &options.id, random.u64(..), with_etcd).await?;
    let (world, ledger) = (Arc::new(world), Arc::new(Ledger::default()));
    let churn = Arc::new(Churn::new(world.clone(), ledger.clone(), &options.id));
    world.start().await?;
    world.vpc.set_faults(Faults {
        error: 0.12,
        throttle: 0.03,
        reply_lost: 0.08,
        latency: Duration::from_millis(1)..=Duration::from_millis(25),
    });
    let kinds = (0..NODES).flat_map(|node| [Kind::Pool(node); 3]).chain((0..4).map(Kind::Static));
    let mut callers: tokio::task::JoinSet<Result<()>> =
        kinds.map(|kind| churn.clone().caller(kind, random.fork())).collect();
    let (killed_allocators, killed_agents) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let killers =
        killer::all(killer::killers(&churn, kills, &mut random, (&killed_allocators, &killed_agents)));
    let mut etcd_restarts = 0;
    let mut pauses = random.fork();
    let watching = async {
        let mut round = 0u32;
        loop {
            tokio::time::sleep(SAMPLE).await;
            check::sample(&world, &ledger).await?;
            round += 1;
            if round.is_multiple_of(20) {
                let books = ledger.books();
                eprintln!(
                    "faults, {name}: {} of {} kills, {} allocations, {} wrong",
                    killed_allocators.load(Ordering::Relaxed) + killed_agents.load(Ordering::Relaxed),
                    kills.0 + kills.1,
                    books.allocations,
                    books.wrong.len(),
                );
            }
            if with_etcd && round.is_multiple_of(40) {
                world.restart_etcd(Duration::from_millis(pauses.u64(..500))).await?;
                etcd_restarts += 1;
            }
        }
    };
    let stopped = async {
        while let Some(ended) = callers.join_next().await {
            ended.context("a caller has failed")??;
        }
        anyhow::Ok(())
    };
    let result = async {
        tokio::pin!(stopped);
        tokio::select! {
            result = killers => result?,
            result = watching => return result,
            // Callers end when it is enough, which it is not.
            result = &mut stopped => return result,
        }
        churn.enough.store(true, Ordering::Relaxed);
        world.vpc.set_faults(Faults::default());
        let recovering = Instant::now();
        stopped.await?;
        check::settle(&world, &ledger, RECOVERY, false).await?;
        report.recovery_seconds = report.recovery_seconds.max(recovering.elapsed().as_secs_f64());
        // And nothing is left when everything is given back.
        churn.release_all(&mut random).await?;
        for node in &world.nodes {
            world.client(0)?.patient(RECOVERY).drain_node(&node.name).await?;
        }
        check::settle(&world, &ledger, RECOVERY, true).await
    }
    .await;
    check::note_violations(&world, &ledger);
    let injected = world.vpc.injected();
    let books = ledger.books();
    report.kills_allocator += killed_allocators.load(Ordering::Relaxed);
    report.kills_agent += killed_agents.load(Ordering::Relaxed);
    report.etcd_restarts += etcd_restarts;
    report.vpc_errors += injected.errors + injected.throttled;
    report.vpc_timeouts += injected.timeouts;
    report.vpc_lost_replies += injected.replies_lost;
    report.allocations += books.allocations;
    report.releases += books.releases;
    report.refused_by_agent += books.refused;
    report.duplicates += books.count(Wrong::Duplicate) as u64;
    report.lost += books.count(Wrong::Lost) as u64;
    report.leaks += books.count(Wrong::Leak) as u64;
    let first = books.wrong.iter().take(20).map(|(kind, what)| format!("{name}: {kind:?}: {what}"));
    report.wrong.extend(first);
    let is_well = books.wrong.is_empty() && result.is_ok();
    drop(books);
    if is_well {
        remove(&dir);
    } else {
        eprintln!("faults, {name}: the logs stay in {}", dir.display());
    }
    result
}

fn remove(dir: &Path) {
    // Nothing of value: logs and the store of a run without a fault.
    let _ = fs::remove_dir_all(dir);
}

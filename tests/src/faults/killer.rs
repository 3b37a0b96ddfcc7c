//! Kills processes, at any moment and at the worst.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use fastrand::Rng;
use nix::sys::signal::{Signal, kill};

use super::{churn::Churn, process::Process, vpc::Moment};

/// How long a killer waits for the moment that it has chosen.
const WAIT: Duration = Duration::from_millis(800);

fn milliseconds(random: &mut Rng, up_to: u64) -> Duration {
    Duration::from_micros(random.u64(..up_to * 1000))
}

/// Kills an allocator so many times; afterwards it runs.
pub(super) fn of_allocator(
    churn: &Churn,
    index: usize,
    kills: u32,
    mut random: Rng,
    killed: &AtomicU64,
) -> Result<()> {
    let process = &churn.world.allocators[index];
    let server = &churn.world.server;
    repeat(process, kills, killed, || {
        let moment = match random.u8(..10) {
            // Any, its start included.
            0..4 => {
                thread::sleep(milliseconds(&mut random, 500));
                return;
            }
            4..6 => Moment::Arrived,
            6..8 => Moment::Effective,
            _ => Moment::Answered,
        };
        thread::sleep(milliseconds(&mut random, 300));
        let Some(pid) = process.pid() else { return };
        let (reached, wait) = mpsc::channel();
        let at_once = moment != Moment::Answered;
        let action = Box::new(move || {
            if at_once {
                // Not waited for before this thread has heard of it, so it is this process and no other.
                let _ = kill(pid, Signal::SIGKILL);
            }
            let _ = reached.send(());
        });
        server.at(&process.name, moment, action);
        if wait.recv_timeout(WAIT).is_err() && !server.disarm(&process.name) {
            // Reached in between: heard of now.
            let _ = wait.recv();
        }
        if !at_once {
            // Somewhere between the answer and what is written because of it.
            thread::sleep(milliseconds(&mut random, 4));
        }
    })
}

/// Kills an agent so many times; afterwards it runs.
pub(super) fn of_agent(
    churn: &Churn,
    node: usize,
    kills: u32,
    mut random: Rng,
    killed: &AtomicU64,
) -> Result<()> {
    repeat(&churn.world.nodes[node].agent, kills, killed, || {
        if random.u8(..10) < 4 {
            thread::sleep(milliseconds(&mut random, 1_500));
            return;
        }
        // It has come up, and something is asked for: in the middle of wiring.
        thread::sleep(milliseconds(&mut random, 2_000));
        let asked = &churn.asked[node];
        let before = asked.load(Ordering::Relaxed);
        let end = Instant::now() + WAIT;
        while asked.load(Ordering::Relaxed) == before && Instant::now() < end {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(milliseconds(&mut random, 60));
    })
}

fn repeat(process: &Process, kills: u32, killed: &AtomicU64, mut wait: impl FnMut()) -> Result<()> {
    let mut left = kills;
    while left > 0 {
        process.start()?;
        wait();
        // What has ended by itself was not killed, unless by the VPC's action.
        if !process.has_ended() || process.was_killed() {
            left -= 1;
            killed.fetch_add(1, Ordering::Relaxed);
        }
        process.kill();
    }
    process.start()
}

/// Runs killers on threads of their own; returns when all have ended.
pub(super) async fn all(killers: Vec<Box<dyn FnOnce() -> Result<()> + Send>>) -> Result<()> {
    let tasks: Vec<_> = killers.into_iter().map(tokio::task::spawn_blocking).collect();
    for task in tasks {
        task.await??;
    }
    Ok(())
}

/// One killer for each allocator and each agent, the kills shared out among them.
pub(super) fn killers(
    churn: &Arc<Churn>,
    (allocators, agents): (u32, u32),
    random: &mut Rng,
    (killed_allocators, killed_agents): (&Arc<AtomicU64>, &Arc<AtomicU64>),
) -> Vec<Box<dyn FnOnce() -> Result<()> + Send>> {
    let mut killers: Vec<Box<dyn FnOnce() -> Result<()> + Send>> = Vec::new();
    for (index, kills) in shares(allocators, churn.world.allocators.len()).enumerate() {
        let (churn, killed, random) = (churn.clone(), killed_allocators.clone(), random.fork());
        killers.push(Box::new(move || of_allocator(&churn, index, kills, random, &killed)));
    }
    for (node, kills) in shares(agents, churn.world.nodes.len()).enumerate() {
        let (churn, killed, random) = (churn.clone(), killed_agents.clone(), random.fork());
        killers.push(Box::new(move || of_agent(&churn, node, kills, random, &killed)));
    }
    killers
}

fn shares(total: u32, parts: usize) -> impl Iterator<Item = u32> {
    let count = u32::try_from(parts).unwrap_or(1);
    (0..count).map(move |part| total / count + u32::from(part < total % count))
}

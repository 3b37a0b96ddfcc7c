//! What happens to the agents while packets flow.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use clap::ValueEnum;
use serde::Serialize;

use crate::lab::{
    Agent, Error, Lab, Result,
    agent::{READY, Signal},
};

/// How long nobody looks after the nodes, where the agent is not started at once.
const AWAY: Duration = Duration::from_millis(100);
/// An agent that is killed before it is ready has run for less than this.
const YOUNG: Duration = Duration::from_millis(300);

/// What is done in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// `kill -9`, and the same agent again; every second time that one is killed while it starts, and a third one comes.
    Kill,
    /// Another build of the same ABI takes over: by turns from an agent that was asked to end, and from one that was
    /// killed the moment before.
    Upgrade,
    /// The same with a build of another ABI: there and back.
    Abi,
}

impl Action {
    /// As reports call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Upgrade => "upgrade",
            Self::Abi => "abi",
        }
    }
}

/// Programs of the agent, of which the first runs at the beginning.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The agent.
    pub agent: PathBuf,
    /// The same agent by another path, as an upgrade brings it.
    pub other: PathBuf,
    /// One with another ABI.
    pub next: Option<PathBuf>,
}

/// Does it on all nodes at once and says how long it took until all agents were ready again, and in words what was done.
pub(super) fn act(
    lab: &Lab,
    programs: &Programs,
    action: Action,
    number: u32,
    random: &mut fastrand::Rng,
) -> Result<(Duration, String)> {
    let odd = number % 2 == 1;
    let by_turns = |other: &Path| if odd { programs.agent.clone() } else { other.to_owned() };
    let start = |program: &Path| lab.agents().iter().try_for_each(|agent| agent.start_as(program, &[]));
    let stop = |signal| lab.agents().iter().try_for_each(|agent| agent.stop(signal));
    let before = versions(lab)?;
    let mut begin = Instant::now();
    let done = match action {
        Action::Kill => {
            stop(Signal::SIGKILL)?;
            thread::sleep(AWAY);
            begin = Instant::now();
            start(&programs.agent)?;
            let mut done = "killed".to_owned();
            if odd {
                let age = YOUNG.mul_f64(random.f64());
                thread::sleep(age);
                stop(Signal::SIGKILL)?;
                start(&programs.agent)?;
                done = format!("killed, and again {} ms after its start", age.as_millis());
            }
            done
        }
        Action::Upgrade | Action::Abi => {
            // There and back, each way by turns.
            let killed = number.div_ceil(2) % 2 == 1;
            stop(if killed { Signal::SIGKILL } else { Signal::SIGTERM })?;
            let next = if action == Action::Abi { programs.next.as_deref() } else { None };
            start(&by_turns(next.unwrap_or(&programs.other)))?;
            format!("replaced {}", if killed { "by force" } else { "in order" })
        }
    };
    lab.agents().iter().try_for_each(|agent| agent.wait_ready(READY))?;
    let time = begin.elapsed();
    let after = versions(lab)?;
    let moved = before.iter().zip(&after).all(|(before, after)| before != after);
    let stayed = before == after;
    if if action == Action::Abi { !moved } else { !stayed } {
        return Err(Error::Protocol(format!(
            "{}: pinned tables of {before:?} have become those of {after:?}",
            action.name()
        )));
    }
    Ok((time, done))
}

/// What each agent has below its pins: one directory, named after the version of its ABI.
fn versions(lab: &Lab) -> Result<Vec<BTreeSet<String>>> {
    let names = |dir: &Path| -> io::Result<BTreeSet<String>> {
        fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    let of = |agent: &Agent| {
        let dir = agent.pin_dir();
        names(dir).map_err(Error::io(format!("reading {}", dir.display())))
    };
    lab.agents().iter().map(of).collect()
}

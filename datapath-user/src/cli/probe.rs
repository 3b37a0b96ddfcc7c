//! `eniway status --probe`: for those who ask every few seconds and read the exit status only. It asks the agent over
//! its socket, so a loop that hangs is told from one that works, and it needs no privileges on the tables.

use std::time::Duration;

use eniway_agent_api::{SOCKET, StatusRequest};

use super::{CliError, Target};
use crate::{config::Config, status::Status};

/// How long the agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(8);

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Probe {
    /// The agent's loop answers, whatever the state of its source
    Alive,
    /// Besides, the kernel was brought to what the source says
    Ready,
}

/// Asks.
pub(super) fn run(target: &Target, probe: Probe) -> Result<(), CliError> {
    let config = Config::load(&target.config)?;
    let socket = config.run_dir.join(SOCKET);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let asked = runtime.map_err(CliError::Runtime)?.block_on(async {
        let agent = eniway_agent_api::client(&socket, PATIENCE, PATIENCE);
        let answer = agent.map_err(|error| error.to_string())?.status(StatusRequest {}).await;
        answer.map_err(|status| status.message().to_owned())
    });
    if let Err(error) = asked {
        let message = format!("the agent does not answer at {}: {error}", socket.display());
        return Err(CliError::NotSo(message));
    }
    if probe == Probe::Ready && !Status::read(&config.run_dir)?.ready {
        let message = "the agent runs, but its source has not told the pods yet";
        return Err(CliError::NotSo(message.to_owned()));
    }
    Ok(())
}

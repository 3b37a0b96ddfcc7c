//! The way to the agent.

use std::{path::Path, time::Duration};

use eniway_agent_api::{agent_client::AgentClient, client};
use tonic::{Response, Status, transport::Channel};

use crate::error::{Code, Error};

/// Longer than the agent waits for its allocator and the kernel together. Runtimes have limits of their own.
const PATIENCE: Duration = Duration::from_secs(120);
const CONNECT: Duration = Duration::from_secs(5);

/// Asks the agent once.
pub(crate) async fn call<T>(
    socket: &str,
    call: impl AsyncFnOnce(AgentClient<Channel>) -> Result<Response<T>, Status>,
) -> Result<T, Error> {
    if !socket.starts_with('/') {
        return Err(Error::new(Code::Config, format!("`agent`: `{socket}` is not an absolute path")));
    }
    let agent = client(Path::new(socket), CONNECT, PATIENCE)
        .map_err(|error| Error::new(Code::Config, format!("`agent`: {socket}: {error}")))?;
    match call(agent).await {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) => Err(Error::of(socket, &status)),
    }
}

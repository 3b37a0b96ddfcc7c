//! The way to the agent.

use std::time::Duration;

use eniway_agent_api::agent_client::AgentClient;
use tonic::{
    Response, Status,
    transport::{Channel, Endpoint},
};

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
    let endpoint = Endpoint::from_shared(format!("unix:{socket}"))
        .map_err(|error| Error::new(Code::Config, format!("`agent`: {socket}: {error}")))?;
    let channel = endpoint.connect_timeout(CONNECT).timeout(PATIENCE).connect_lazy();
    match call(AgentClient::new(channel)).await {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) => Err(Error::of(socket, &status)),
    }
}

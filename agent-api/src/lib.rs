//! The agent's service on the node: `proto/eniway/agent/v1/agent.proto` says what is on the wire.

use std::{path::Path, time::Duration};

use prost::Message as _;
use tonic::{
    Code, Status,
    transport::{self, Channel, Endpoint},
};

use self::agent_client::AgentClient;

#[expect(missing_docs, reason = "generated; the .proto file has the comments")]
#[expect(
    clippy::all,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
mod generated {
    tonic::include_proto!("eniway.agent.v1");
}

pub use generated::*;

/// The socket's name in the agent's run directory.
pub const SOCKET: &str = "agent.sock";

/// Where the agent is unless something else is said.
pub const DEFAULT_SOCKET: &str = "/run/eniway/agent.sock";

/// The way to the agent at a socket, which is opened by the first call.
///
/// # Errors
///
/// When the path makes no address.
pub fn client(
    socket: &Path,
    connect: Duration,
    patience: Duration,
) -> Result<AgentClient<Channel>, transport::Error> {
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display()))?;
    Ok(AgentClient::new(endpoint.connect_timeout(connect).timeout(patience).connect_lazy()))
}

/// Whether a runtime's id of a sandbox is as the CNI specification wants it, and short enough to be part of a file's name.
pub fn is_container_id(id: &str) -> bool {
    id.starts_with(|first: char| first.is_ascii_alphanumeric())
        && id.len() <= 128
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// An error on its way to the client.
pub fn status(reason: Reason, message: impl Into<String>) -> Status {
    let code = match reason {
        Reason::Invalid => Code::InvalidArgument,
        Reason::NoNamespace => Code::NotFound,
        Reason::TryAgain => Code::Unavailable,
        Reason::Exists => Code::AlreadyExists,
        Reason::Unspecified | Reason::Refused | Reason::Check => Code::FailedPrecondition,
    };
    let detail = ErrorDetail { reason: reason.into() };
    Status::with_details(code, message, detail.encode_to_vec().into())
}

/// What went wrong, if the agent said so; none when the call did not reach it.
pub fn reason(status: &Status) -> Option<Reason> {
    let detail = ErrorDetail::decode(status.details()).ok()?;
    Reason::try_from(detail.reason).ok().filter(|reason| *reason != Reason::Unspecified)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_cannot_lead_elsewhere() {
        assert!(is_container_id("a-1_b.c"));
        for bad in ["", ".", "../a", "a/b", "-a", "ä"] {
            assert!(!is_container_id(bad), "{bad}");
        }
    }

    #[test]
    fn reasons_travel_with_the_status() {
        assert_eq!(reason(&status(Reason::Exists, "eth0")), Some(Reason::Exists));
        assert_eq!(reason(&Status::unavailable("no such file")), None);
    }
}

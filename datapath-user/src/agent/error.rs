//! Why the agent does not run.

use std::{io, path::PathBuf};

use eniway_ipam::rpc::{ClientError, ServeError};

use crate::{
    attach::AttachError, feature::FeatureError, ipam::IpamError, lock::LockError, netlink::NetlinkError,
    netns::NetnsError, nic::NicError, object::ObjectError, pin::PinError, privilege::PrivilegeError,
    run_file::RunFileError, service::ServiceError, source::file::SourceError, status::StatusError,
    tables::TablesError, takeover::TakeoverError, wiring::WiringError,
};

/// Why the agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The process may not do it.
    #[error(transparent)]
    Privilege(#[from] PrivilegeError),
    /// The service manager.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The kernel cannot.
    #[error(transparent)]
    Feature(#[from] FeatureError),
    /// Another agent runs.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A parent ENI does not exist.
    #[error(
        "parent ENI {interface} does not exist in this network namespace: correct `interface` of its [[parent]], or \
         attach it to the node first"
    )]
    NoParent {
        /// The interface.
        interface: String,
    },
    /// The first document is bad, and nothing runs yet that needs an agent.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The allocator cannot be asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The allocator in this process.
    #[error(transparent)]
    Ipam(#[from] IpamError),
    /// The BPF file system.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A pod's namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// What another version has left.
    #[error(transparent)]
    Takeover(#[from] TakeoverError),
    /// The programs.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// The tables.
    #[error(transparent)]
    Tables(#[from] TablesError),
    /// Attaching.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Wiring.
    #[error(transparent)]
    Wiring(#[from] WiringError),
    /// The node's addresses.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The status file.
    #[error(transparent)]
    Status(#[from] StatusError),
    /// A pod's own ENI.
    #[error(transparent)]
    Nic(Box<NicError>),
    /// What is kept between two agents.
    #[error(transparent)]
    Kept(#[from] RunFileError),
    /// The socket for the CNI plugin.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// Signals.
    #[error("cannot wait for signals: {0}")]
    Signal(io::Error),
    /// A single run did not reach everything that the source asks for.
    #[error("not everything is as the source says: {}", problems.join("; "))]
    Incomplete {
        /// What is not.
        problems: Vec<String>,
    },
    /// Nothing waits for confirmation.
    #[error("no snapshot is held back, so there is nothing to confirm")]
    NothingHeld,
    /// A confirmation cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Confirm {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

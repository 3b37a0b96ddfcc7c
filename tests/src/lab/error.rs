//! What may go wrong in the lab.

use std::{io, path::PathBuf, time::Duration};

/// An error of the lab. The message names the namespace, interface, file or process, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call or a file operation failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, on which object.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A program ended with an error.
    #[error("`{command}` in {netns} failed ({status}): {stderr}")]
    Command {
        /// The command line.
        command: String,
        /// The namespace that it ran in.
        netns: String,
        /// Its exit status.
        status: String,
        /// What it wrote to standard error.
        stderr: String,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {limit:?}{detail}")]
    Timeout {
        /// What was awaited.
        what: String,
        /// How long.
        limit: Duration,
        /// What was seen instead, for the reader; may be empty.
        detail: String,
    },
    /// The kernel refused a program, map or link of the fabric.
    #[error("the fabric's {what}: {message}")]
    Bpf {
        /// The program, map or link.
        what: String,
        /// The chain of causes.
        message: String,
    },
    /// The description of the topology contradicts itself.
    #[error("topology: {0}")]
    Topology(String),
    /// A peer answered something else than it should.
    #[error("{0}")]
    Protocol(String),
    /// An agent ended or refused to start.
    #[error("agent of {node}: {message}; its log is {}", log.display())]
    Agent {
        /// The node.
        node: String,
        /// What happened.
        message: String,
        /// Where it logs.
        log: PathBuf,
    },
    /// The VPC cannot do what is asked.
    #[error("the VPC: {0}")]
    Vpc(String),
    /// The allocator, or a question to it.
    #[error("the lab's allocator: {0}")]
    Ipam(String),
    /// The lab does not have what was asked for.
    #[error("the lab has no {0}")]
    Unknown(String),
}

/// A result of the lab.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Io`], for use with `map_err`.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    pub(crate) fn errno(what: impl Into<String>) -> impl FnOnce(nix::errno::Errno) -> Self {
        let what = what.into();
        move |errno| Self::Io { what, source: errno.into() }
    }

    pub(crate) fn bpf(what: impl Into<String>, error: &dyn std::error::Error) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            let text = inner.to_string();
            if !message.contains(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
            cause = inner.source();
        }
        Self::Bpf { what: what.into(), message }
    }
}

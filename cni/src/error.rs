//! Errors as the specification has them: a code, a sentence, and the standard output as the place to say it.

use eniway_agent_api::{Reason, reason};
use serde_json::json;
use tonic::Status;

use crate::config::Version;

/// The specification's codes, and from 100 on our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// The configuration's version is not known, or too old for the command.
    Version = 1,
    /// There is no such container, or no longer.
    Container = 3,
    /// A variable of the environment is missing or wrong.
    Environment = 4,
    /// Reading or writing failed.
    Io = 5,
    /// The configuration is no JSON, or of another shape.
    Decode = 6,
    /// The configuration makes no sense.
    Config = 7,
    /// The agent is away or busy.
    TryAgain = 11,
    /// No container could be added now.
    NotAvailable = 50,
    /// The container has the interface already.
    Exists = 100,
    /// The allocator or the kernel refused.
    Refused = 101,
    /// The network is not as ADD left it.
    Check = 102,
}

/// Why the plugin fails.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Error {
    pub(crate) code: Code,
    message: String,
}

impl Error {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    pub(crate) fn with(self, code: Code) -> Self {
        Self { code, ..self }
    }

    /// What the agent said, or what became of the call.
    pub(crate) fn of(socket: &str, status: &Status) -> Self {
        let code = match reason(status) {
            Some(Reason::Invalid) => Code::Config,
            Some(Reason::NoNamespace) => Code::Container,
            Some(Reason::TryAgain) => Code::TryAgain,
            Some(Reason::Exists) => Code::Exists,
            Some(Reason::Check) => Code::Check,
            Some(Reason::Refused | Reason::Unspecified) => Code::Refused,
            None => {
                let message = format!(
                    "the agent does not answer at {socket}: {}; is `eniway agent` running? (`agent` in the network \
                     configuration names its socket)",
                    words(status)
                );
                let denied = status.code() == tonic::Code::PermissionDenied;
                return Self::new(if denied { Code::Refused } else { Code::TryAgain }, message);
            }
        };
        Self::new(code, status.message())
    }

    pub(crate) fn json(&self, version: Option<&str>) -> String {
        let version = version.unwrap_or(Version::NEWEST.name());
        json!({ "cniVersion": version, "code": self.code as u32, "msg": self.message }).to_string()
    }
}

/// Libraries keep the interesting words at the end.
fn words(status: &Status) -> String {
    let mut error: &dyn std::error::Error = status;
    while let Some(source) = error.source() {
        error = source;
    }
    if std::ptr::addr_eq(error, status) { status.message().to_owned() } else { error.to_string() }
}

//! The allocator as a gRPC service, and the client for it.
//!
//! `proto/eniway/ipam/v1/ipam.proto` says what is on the wire. [`serve`] answers on any number of [`Listener`]s; [`Client`] asks, and asks
//! again while the server is away; [`Follower`] is a node's watch that outlives any number of servers.
//!
//! A unix socket is open to root and to the server's own user only: by its mode, and by the peer's credentials. On TCP both sides show
//! certificates of one authority; who has one may do everything.

mod client;
mod convert;
mod local;
mod server;

pub use client::{Backoff, Client, ClientError, Event, Follower};
pub use local::{LocalSocket, local_only};
pub use server::{Listener, ServeError, serve};

use std::{fmt, path::PathBuf, str::FromStr};

use serde::Deserialize;

#[expect(missing_docs, reason = "generated; the .proto file has the comments")]
#[expect(
    clippy::all,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
pub mod proto {
    tonic::include_proto!("eniway.ipam.v1");
}

/// Where a server is unless something else is said.
pub const DEFAULT_ADDRESS: &str = "unix:/run/eniway/ipam.sock";

/// A list of all allocations of a large cluster is one message.
const MAX_MESSAGE: usize = 256 << 20;

/// The PEM texts for mutual TLS.
#[derive(Clone)]
pub struct Tls {
    /// The authority that the other side's certificate must be from.
    pub ca: Vec<u8>,
    /// Our certificate.
    pub certificate: Vec<u8>,
    /// Its key.
    pub key: Vec<u8>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// `https://host:port`.
    Https(String),
}

/// Why a text is not an address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an address: give unix:/path/of/socket or https://host:port")]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let error = || AddressError(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            // `unix:///path`, as other programs write it.
            let path = if path.starts_with("///") { &path[2..] } else { path };
            return path.starts_with('/').then(|| Self::Unix(path.into())).ok_or_else(error);
        }
        match text.strip_prefix("https://") {
            Some(rest)
                if rest.rsplit_once(':').is_some_and(|(host, port)| {
                    !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0)
                }) =>
            {
                Ok(Self::Https(text.to_owned()))
            }
            _ => Err(error()),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Https(url) => f.write_str(url),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_sockets_or_https() {
        for (text, shown) in [
            ("unix:/run/a.sock", "unix:/run/a.sock"),
            ("unix:///run/a.sock", "unix:/run/a.sock"),
            ("https://ipam.example:7443", "https://ipam.example:7443"),
        ] {
            assert_eq!(text.parse::<Address>().map(|address| address.to_string()), Ok(shown.to_owned()));
        }
        for text in ["unix:a.sock", "http://a:1", "https://a", "https://:1", "https://a:0", "/run/a.sock", ""]
        {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}

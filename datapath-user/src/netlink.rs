//! The few requests to the kernel's routing socket that the agent needs, with errors that say what was wanted.

mod dump;
mod link;
mod qdisc;
mod route;

use std::{io, net::IpAddr};

use futures_util::{StreamExt as _, TryStreamExt as _};
use ipnet::Ipv4Net;
use rtnetlink::{
    Handle,
    packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressScope},
        route::RouteProtocol,
    },
};
use tokio::task::JoinHandle;

pub(crate) use self::route::DisplayRule;
pub use self::{
    dump::{Filter, HostState},
    link::{AttachedXdp, Link, LinkChange, VethEnd},
    route::{Existing, MAIN, Neighbour, Route, SourceRule},
};

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No socket.
    #[error("cannot open a netlink socket: {0}")]
    Open(io::Error),
    /// There is no such interface.
    #[error("there is no interface {name} in this network namespace; there are: {}", list(present))]
    NoSuchInterface {
        /// The name that was wanted.
        name: String,
        /// The interfaces that exist.
        present: Vec<String>,
    },
    /// The kernel refused.
    #[error("cannot {what}: {source}{}", hint(source))]
    Request {
        /// What was wanted, to be read after "cannot".
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl NetlinkError {
    /// Whether the kernel said this.
    pub fn is(&self, code: i32) -> bool {
        matches!(self, Self::Request { source, .. } if source.raw_os_error() == Some(code))
    }
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => " (CAP_NET_ADMIN is needed)",
        _ => "",
    }
}

/// Routes, rules and neighbours that eniway makes carry this number as their protocol, so that it removes nothing
/// that others made. `ip` shows it as `proto 221`.
pub(crate) const PROTOCOL: RouteProtocol = RouteProtocol::Other(221);

/// A routing socket of the network namespace of the thread that opened it. Needs a tokio runtime.
#[derive(Debug)]
pub struct Netlink {
    handle: Handle,
    connection: JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Netlink {
    /// Opens a socket.
    pub fn open() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetlinkError::Open)?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    /// Whether an interface has an IPv4 address, or an IPv6 address beyond its link.
    pub async fn has_addresses(&self, link: &Link) -> Result<bool, NetlinkError> {
        let request = self.handle.address().get().set_link_index_filter(link.index);
        let messages: Vec<_> =
            request.execute().try_collect().await.map_err(|error| refused("list the addresses", error))?;
        Ok(messages.iter().any(|message| {
            message.header.family == AddressFamily::Inet || message.header.scope == AddressScope::Universe
        }))
    }

    /// Gives an interface an address; one that stands is no error.
    pub async fn add_address(&self, link: &Link, address: Ipv4Net) -> Result<(), NetlinkError> {
        let result = self
            .handle
            .address()
            .add(link.index, address.addr().into(), address.prefix_len())
            .execute()
            .await;
        unless(
            libc::EEXIST,
            result.map_err(|error| refused(format!("add address {address} to {}", link.name), error)),
        )
    }

    /// All addresses of the namespace, without those of the loopback ranges.
    pub async fn addresses(&self) -> Result<Vec<IpAddr>, NetlinkError> {
        let messages: Vec<_> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(|error| refused("list the addresses", error))?;
        let mut addresses: Vec<IpAddr> = messages
            .iter()
            .filter_map(|message| {
                // Of a point-to-point address, ADDRESS is the other end's and LOCAL the one here; IPv6 has no LOCAL.
                let local = message.attributes.iter().find_map(|attribute| match attribute {
                    AddressAttribute::Local(address) => Some(*address),
                    _ => None,
                });
                local.or_else(|| {
                    message.attributes.iter().find_map(|attribute| match attribute {
                        AddressAttribute::Address(address) => Some(*address),
                        _ => None,
                    })
                })
            })
            .filter(|address| !address.is_loopback())
            .collect();
        addresses.sort_unstable();
        addresses.dedup();
        Ok(addresses)
    }

    /// Makes a request that the library has no words for. Returns what the kernel answered.
    async fn request(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        what: &str,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut answers = self.handle.clone().request(request).map_err(|error| refused(what, error))?;
        let mut told = Vec::new();
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(refused(what, rtnetlink::Error::NetlinkError(error)));
                }
                NetlinkPayload::InnerMessage(message) => told.push(message),
                _ => {}
            }
        }
        Ok(told)
    }
}

/// The addresses of this network namespace, without those of the loopback ranges.
pub async fn local_addresses() -> Result<Vec<IpAddr>, NetlinkError> {
    Netlink::open()?.addresses().await
}

fn refused(what: impl Into<String>, error: rtnetlink::Error) -> NetlinkError {
    let source = match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    };
    NetlinkError::Request { what: what.into(), source }
}

fn unless(code: i32, result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match result {
        Err(error) if error.is(code) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_interface_is_told_with_those_that_exist() {
        let netlink = Netlink::open().unwrap();
        assert_eq!(netlink.find_link("ewc-none").await.unwrap(), None);
        let error = netlink.link("ewc-none").await.unwrap_err().to_string();
        assert!(error.contains("no interface ewc-none"), "{error}");
        assert!(error.contains("lo"), "{error}");
    }

    #[tokio::test]
    async fn loopback_is_no_address_of_the_node() {
        assert!(local_addresses().await.unwrap().iter().all(|address| !address.is_loopback()));
    }
}

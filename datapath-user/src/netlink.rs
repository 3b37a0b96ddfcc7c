//! The few requests to the kernel's routing socket that the agent needs, with errors that say what was wanted.

mod dump;
mod qdisc;

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd, AsRawFd as _},
};

use futures_util::{StreamExt as _, TryStreamExt as _};
use ipnet::Ipv4Net;
use rtnetlink::{
    Handle, IpVersion, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressScope},
        link::{
            InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp,
            State as OperState, XdpAttached,
        },
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        nsid::{NsidAttribute, NsidMessage},
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};
use tokio::task::JoinHandle;

pub use self::dump::{Filter, HostState, Neighbour, Route};
use crate::net::Mac;

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
        self.code() == Some(code)
    }

    fn code(&self) -> Option<i32> {
        match self {
            Self::Request { source, .. } => source.raw_os_error(),
            Self::Open(_) | Self::NoSuchInterface { .. } => None,
        }
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

/// An interface, as far as the agent cares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MAC, where it has one.
    pub mac: Option<[u8; 6]>,
    /// Its MTU.
    pub mtu: u32,
    /// Whether it is set up.
    pub up: bool,
    /// Whether it transmits: it is up, has a carrier, and the kernel has acted on both.
    pub operational: bool,
    /// Whether the other end of its wire is there and up.
    pub carrier: bool,
    /// Whether it is one end of a veth pair.
    pub veth: bool,
    /// Index of the interface it is bound to: for a veth, its other end.
    pub peer: Option<u32>,
    /// Namespace of that interface, as this one numbers it; `None` = this one.
    pub peer_namespace: Option<i32>,
    /// Its alias.
    pub alias: Option<String>,
    /// Queues that it sends by.
    pub queues: u32,
    /// The XDP program on it, and how it runs.
    pub xdp: Option<AttachedXdp>,
}

/// An XDP program on an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttachedXdp {
    /// By the driver itself; else generic.
    pub native: bool,
    /// The program.
    pub program: u32,
}

impl Link {
    pub(crate) fn from_message(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            mac: None,
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            operational: false,
            carrier: message.header.flags.contains(LinkFlags::LowerUp),
            veth: false,
            peer: None,
            peer_namespace: None,
            alias: None,
            queues: 1,
            xdp: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok(),
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::OperState(state) => link.operational = state == OperState::Up,
                LinkAttribute::Link(index) => link.peer = Some(index),
                LinkAttribute::LinkNetNsId(id) => link.peer_namespace = Some(id),
                LinkAttribute::NumTxQueues(queues) => link.queues = queues,
                LinkAttribute::Xdp(parts) => link.xdp = attached_xdp(&parts),
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::LinkInfo(infos) => link.veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth)),
                _ => {}
            }
        }
        link
    }
}

fn attached_xdp(parts: &[LinkXdp]) -> Option<AttachedXdp> {
    let program = parts.iter().find_map(|part| match part {
        LinkXdp::ProgId(program) => Some(*program),
        _ => None,
    })?;
    let native = parts
        .iter()
        .any(|part| matches!(part, LinkXdp::Attached(XdpAttached::Driver | XdpAttached::Hardware)));
    Some(AttachedXdp { native, program })
}

/// One end of a veth pair that is to be made.
#[derive(Debug, Clone, Copy)]
pub struct VethEnd<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its MAC. Always given: where it is not, systemd sets one of its own later.
    pub mac: [u8; 6],
}

/// What to change of a link; `None` leaves it as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkChange {
    /// The MAC.
    pub mac: Option<[u8; 6]>,
    /// The MTU.
    pub mtu: Option<u32>,
    /// The alias.
    pub alias: Option<String>,
    /// Whether to set it up.
    pub up: bool,
}

/// What becomes of a route to the same destination that stands already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It is replaced.
    Replace,
    /// It stays.
    Keep,
}

/// A rule of the routing policy that picks a table by source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceRule {
    /// Where the rule stands among all; lower comes first.
    pub priority: u32,
    /// The sources it holds for.
    pub source: Ipv4Net,
    /// The table that is asked.
    pub table: u32,
    /// Routes of that table with a prefix of this length or a shorter one do not count.
    pub suppress: Option<u32>,
    /// The rule holds for packets that carry these bits in their mark; 0 = for all.
    pub mark: u32,
}

/// A default route of a table, as far as the agent cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DefaultRoute {
    /// The table.
    pub table: u32,
    /// The interface it leaves by.
    pub output: u32,
    /// The gateway.
    pub gateway: Option<Ipv4Addr>,
}

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

    /// All interfaces.
    pub async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        self.handle
            .link()
            .get()
            .execute()
            .map_ok(Link::from_message)
            .try_collect()
            .await
            .map_err(|error| refused("list the interfaces", error))
    }

    /// The interface with this name, if there is one.
    pub async fn find_link(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let request = self.handle.link().get().match_name(name);
        Self::one_link(request, format!("look up interface {name}")).await
    }

    /// The interface with this index, if there is one.
    pub async fn find_link_by_index(&self, index: u32) -> Result<Option<Link>, NetlinkError> {
        let request = self.handle.link().get().match_index(index);
        Self::one_link(request, format!("look up interface {index}")).await
    }

    async fn one_link(
        request: rtnetlink::LinkGetRequest,
        what: String,
    ) -> Result<Option<Link>, NetlinkError> {
        let mut answers = std::pin::pin!(request.execute());
        match answers.next().await {
            None => Ok(None),
            Some(Ok(message)) => Ok(Some(Link::from_message(message))),
            Some(Err(error)) => match refused(what, error) {
                error if error.code() == Some(libc::ENODEV) => Ok(None),
                error => Err(error),
            },
        }
    }

    /// The interface with this name. Where there is none, the error lists those that exist.
    pub async fn link(&self, name: &str) -> Result<Link, NetlinkError> {
        match self.find_link(name).await? {
            Some(link) => Ok(link),
            None => {
                let present = self.links().await?.into_iter().map(|link| link.name).collect();
                Err(NetlinkError::NoSuchInterface { name: name.to_owned(), present })
            }
        }
    }

    /// Makes a veth pair in one step: `here` in this namespace, `there` in the other.
    pub async fn add_veth(
        &self,
        here: VethEnd<'_>,
        there: VethEnd<'_>,
        namespace: impl AsFd,
        mtu: u32,
    ) -> Result<(), NetlinkError> {
        let peer = LinkUnspec::new_with_name(there.name)
            .address(there.mac.to_vec())
            .mtu(mtu)
            .setns_by_fd(namespace.as_fd().as_raw_fd())
            .build();
        let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(here.name)
            .address(here.mac.to_vec())
            .mtu(mtu)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        self.handle
            .link()
            .add(message)
            .execute()
            .await
            .map_err(|error| refused(format!("create the veth pair {} and {}", here.name, there.name), error))
    }

    /// Deletes an interface; one that is gone is no error.
    pub async fn delete_link(&self, link: &Link) -> Result<(), NetlinkError> {
        let result = self.handle.link().del(link.index).execute().await;
        unless(
            libc::ENODEV,
            result.map_err(|error| refused(format!("delete interface {}", link.name), error)),
        )
    }

    /// Changes what differs from `change`.
    pub async fn change_link(&self, link: &Link, change: LinkChange) -> Result<(), NetlinkError> {
        let mut message = LinkUnspec::new_with_index(link.index);
        let mut what = Vec::new();
        if let Some(mac) = change.mac.filter(|mac| link.mac != Some(*mac)) {
            message = message.address(mac.to_vec());
            what.push(format!("MAC {}", Mac(mac)));
        }
        if let Some(mtu) = change.mtu.filter(|mtu| link.mtu != *mtu) {
            message = message.mtu(mtu);
            what.push(format!("MTU {mtu}"));
        }
        if let Some(alias) = change.alias.filter(|alias| link.alias.as_ref() != Some(alias)) {
            message = message.alias(&alias);
            what.push(format!("alias `{alias}`"));
        }
        if change.up && !link.up {
            message = message.up();
            what.push("state up".to_owned());
        }
        if what.is_empty() {
            return Ok(());
        }
        self.handle
            .link()
            .change(message.build())
            .execute()
            .await
            .map_err(|error| refused(format!("give interface {} {}", link.name, what.join(" and ")), error))
    }

    /// Moves an interface to another namespace, where it gets another name and, unless it is to keep its own, another index
    /// (Linux 5.13 and later). It arrives down, without addresses.
    ///
    /// # Errors
    ///
    /// EEXIST when the name is taken there, EBUSY when the index is.
    pub async fn move_link(
        &self,
        link: &Link,
        namespace: impl AsFd,
        name: &str,
        index: Option<u32>,
    ) -> Result<(), NetlinkError> {
        self.set_down(link).await?;
        let mut message = LinkUnspec::new_with_index(link.index)
            .name(name.to_owned())
            .setns_by_fd(namespace.as_fd().as_raw_fd())
            .build();
        if let Some(index) = index.and_then(|index| i32::try_from(index).ok()) {
            message.attributes.push(LinkAttribute::NewIfIndex(index));
        }
        let what = format!("move interface {} to another namespace as {name}", link.name);
        self.handle.link().change(message).execute().await.map_err(|error| refused(what, error))
    }

    /// Sets an interface down.
    pub async fn set_down(&self, link: &Link) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(link.index).down().build();
        let what = format!("set interface {} down", link.name);
        self.handle.link().change(message).execute().await.map_err(|error| refused(what, error))
    }

    /// Gives an interface another name. It has to be down, on kernels before 6.4.
    pub async fn rename(&self, link: &Link, name: &str) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(link.index).name(name.to_owned()).build();
        let what = format!("call interface {} {name}", link.name);
        self.handle.link().change(message).execute().await.map_err(|error| refused(what, error))
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

    /// How this namespace numbers another one; `None` = it has no number yet, so no interface here ends there.
    pub async fn namespace_id(&self, namespace: impl AsFd) -> Result<Option<i32>, NetlinkError> {
        let mut message = NsidMessage::default();
        message.attributes.push(NsidAttribute::Fd(namespace.as_fd().as_raw_fd().cast_unsigned()));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
        let what = "look up the number of a network namespace";
        let mut answers = self.handle.clone().request(request).map_err(|error| refused(what, error))?;
        let mut found = None;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(refused(what, rtnetlink::Error::NetlinkError(error)));
                }
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(message)) => {
                    found = message.attributes.iter().find_map(|attribute| match attribute {
                        NsidAttribute::Id(id) if *id >= 0 => Some(*id),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        Ok(found)
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

    /// Adds a route to hosts that are on the link itself.
    pub async fn add_link_route(
        &self,
        destination: Ipv4Net,
        link: &Link,
        existing: Existing,
    ) -> Result<(), NetlinkError> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(destination.addr(), destination.prefix_len())
            .output_interface(link.index)
            .scope(RouteScope::Link)
            .protocol(PROTOCOL)
            .build();
        self.add_route(route, existing, format!("add the route to {destination} by {}", link.name)).await
    }

    /// Adds a default route by a gateway that need not be in any subnet of the link.
    pub async fn add_default_route(
        &self,
        gateway: Ipv4Addr,
        link: &Link,
        table: u32,
        existing: Existing,
    ) -> Result<(), NetlinkError> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .gateway(gateway)
            .output_interface(link.index)
            .table_id(table)
            .onlink()
            .protocol(PROTOCOL)
            .build();
        let what = format!("add the default route by {gateway} and {} to table {table}", link.name);
        self.add_route(route, existing, what).await
    }

    /// Adds a route by a gateway that need not be in any subnet of the link.
    pub async fn add_gateway_route(
        &self,
        destination: Ipv4Net,
        gateway: Ipv4Addr,
        link: &Link,
        existing: Existing,
    ) -> Result<(), NetlinkError> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(destination.network(), destination.prefix_len())
            .gateway(gateway)
            .output_interface(link.index)
            .onlink()
            .protocol(PROTOCOL)
            .build();
        let what = format!("add the route to {destination} by {gateway} and {}", link.name);
        self.add_route(route, existing, what).await
    }

    async fn add_route(
        &self,
        route: RouteMessage,
        existing: Existing,
        what: String,
    ) -> Result<(), NetlinkError> {
        let request = self.handle.route().add(route);
        let request = if existing == Existing::Replace { request.replace() } else { request };
        unless(libc::EEXIST, request.execute().await.map_err(|error| refused(what, error)))
    }

    /// The default routes that eniway made in tables other than the main one.
    pub async fn own_default_routes(&self) -> Result<Vec<DefaultRoute>, NetlinkError> {
        let messages = self.own_routes().await?;
        Ok(messages.iter().filter_map(default_route).collect())
    }

    /// Removes a default route that eniway made.
    pub async fn delete_default_route(&self, route: DefaultRoute) -> Result<(), NetlinkError> {
        for message in self.own_routes().await? {
            if default_route(&message) == Some(route) {
                let result = self.handle.route().del(message).execute().await;
                let what = format!("remove the default route of table {}", route.table);
                unless(libc::ESRCH, result.map_err(|error| refused(what, error)))?;
            }
        }
        Ok(())
    }

    async fn own_routes(&self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let messages: Vec<_> = self
            .handle
            .route()
            .get(all)
            .execute()
            .try_collect()
            .await
            .map_err(|error| refused("list the routes", error))?;
        Ok(messages.into_iter().filter(|message| message.header.protocol == PROTOCOL).collect())
    }

    /// The rules that pick a table by source, whoever made them.
    pub async fn source_rules(&self) -> Result<Vec<SourceRule>, NetlinkError> {
        Ok(self.rules().await?.iter().filter_map(source_rule).collect())
    }

    /// Adds a rule; one that stands is no error.
    pub async fn add_rule(&self, rule: SourceRule) -> Result<(), NetlinkError> {
        let mut request = self
            .handle
            .rule()
            .add()
            .v4()
            .source_prefix(rule.source.network(), rule.source.prefix_len())
            .priority(rule.priority)
            .table_id(rule.table)
            .action(RuleAction::ToTable);
        let attributes = &mut request.message_mut().attributes;
        attributes.push(RuleAttribute::Protocol(PROTOCOL));
        if let Some(length) = rule.suppress {
            attributes.push(RuleAttribute::SuppressPrefixLen(length));
        }
        if rule.mark != 0 {
            attributes.push(RuleAttribute::FwMark(rule.mark));
            attributes.push(RuleAttribute::FwMask(rule.mark));
        }
        let what = format!("add rule {}", DisplayRule(rule));
        unless(libc::EEXIST, request.execute().await.map_err(|error| refused(what, error)))
    }

    /// Removes a rule, if eniway made it.
    pub async fn delete_rule(&self, rule: SourceRule) -> Result<(), NetlinkError> {
        for message in self.rules().await? {
            let own = message.attributes.contains(&RuleAttribute::Protocol(PROTOCOL));
            if own && source_rule(&message) == Some(rule) {
                let what = format!("remove rule {}", DisplayRule(rule));
                let result = self.handle.rule().del(message).execute().await;
                unless(libc::ENOENT, result.map_err(|error| refused(what, error)))?;
            }
        }
        Ok(())
    }

    async fn rules(&self) -> Result<Vec<RuleMessage>, NetlinkError> {
        self.handle
            .rule()
            .get(IpVersion::V4)
            .execute()
            .try_collect()
            .await
            .map_err(|error| refused("list the rules of the routing policy", error))
    }

    /// Sets who has an address on a link, for ever and in place of what the kernel knew.
    pub async fn set_neighbour(
        &self,
        link: &Link,
        address: Ipv4Addr,
        mac: [u8; 6],
    ) -> Result<(), NetlinkError> {
        let mut request = self
            .handle
            .neighbours()
            .add(link.index, address.into())
            .state(NeighbourState::Permanent)
            .link_layer_address(&mac)
            .replace();
        request.message_mut().attributes.push(NeighbourAttribute::Protocol(PROTOCOL));
        request.execute().await.map_err(|error| {
            refused(format!("set neighbour {address} of {} to {}", link.name, Mac(mac)), error)
        })
    }

    /// Removes the neighbours of a link that eniway set.
    pub async fn delete_own_neighbours(&self, link: &Link) -> Result<(), NetlinkError> {
        let messages: Vec<NeighbourMessage> = self
            .handle
            .neighbours()
            .get()
            .set_address_family(AddressFamily::Inet)
            .execute()
            .try_collect()
            .await
            .map_err(|error| refused("list the neighbours", error))?;
        for message in messages {
            let own = message.attributes.contains(&NeighbourAttribute::Protocol(PROTOCOL));
            if own && message.header.ifindex == link.index {
                let address = neighbour_address(&message).unwrap_or(Ipv4Addr::UNSPECIFIED);
                let what = format!("remove neighbour {address} of {}", link.name);
                let result = self.handle.neighbours().del(message).execute().await;
                unless(libc::ENOENT, result.map_err(|error| refused(what, error)))?;
            }
        }
        Ok(())
    }
}

/// The addresses of this network namespace, without those of the loopback ranges.
pub async fn local_addresses() -> Result<Vec<IpAddr>, NetlinkError> {
    Netlink::open()?.addresses().await
}

fn neighbour_address(message: &NeighbourMessage) -> Option<Ipv4Addr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(*address),
        _ => None,
    })
}

fn default_route(message: &RouteMessage) -> Option<DefaultRoute> {
    if message.header.destination_prefix_length != 0 || message.header.address_family != AddressFamily::Inet {
        return None;
    }
    let mut table = u32::from(message.header.table);
    let mut output = None;
    let mut gateway = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Oif(index) => output = Some(*index),
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => gateway = Some(*address),
            _ => {}
        }
    }
    Some(DefaultRoute { table, output: output?, gateway })
}

fn source_rule(message: &RuleMessage) -> Option<SourceRule> {
    let mut table = u32::from(message.header.table);
    let mut priority = 0;
    let mut source = None;
    let mut suppress = None;
    let mut mark = 0;
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Table(id) => table = *id,
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::Source(IpAddr::V4(address)) => {
                source = Ipv4Net::new(*address, message.header.src_len).ok();
            }
            // All bits set is how the kernel says that nothing is suppressed.
            RuleAttribute::SuppressPrefixLen(length) if *length != u32::MAX => suppress = Some(*length),
            RuleAttribute::FwMark(bits) => mark = *bits,
            _ => {}
        }
    }
    Some(SourceRule { priority, source: source?, table, suppress, mark })
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
        Err(error) if error.code() == Some(code) => Ok(()),
        result => result,
    }
}

/// A rule as `ip rule` writes it.
pub(crate) struct DisplayRule(pub(crate) SourceRule);

impl std::fmt::Display for DisplayRule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let SourceRule { priority, source, table, suppress, mark } = self.0;
        write!(f, "{priority}: from {source} ")?;
        if mark != 0 {
            write!(f, "fwmark {mark:#x}/{mark:#x} ")?;
        }
        f.write_str("lookup ")?;
        match table {
            MAIN => f.write_str("main")?,
            table => write!(f, "{table}")?,
        }
        match suppress {
            Some(length) => write!(f, " suppress_prefixlength {length}"),
            None => Ok(()),
        }
    }
}

/// The main routing table.
pub const MAIN: u32 = 254;

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

    #[test]
    fn rules_read_like_those_of_iproute2() {
        let rule = SourceRule {
            priority: 2100,
            source: "10.1.16.0/22".parse().unwrap(),
            table: MAIN,
            suppress: Some(31),
            mark: 0,
        };
        assert_eq!(
            DisplayRule(rule).to_string(),
            "2100: from 10.1.16.0/22 lookup main suppress_prefixlength 31"
        );
        assert_eq!(
            DisplayRule(SourceRule { suppress: None, mark: 0x1000, ..rule }).to_string(),
            "2100: from 10.1.16.0/22 fwmark 0x1000/0x1000 lookup main"
        );
    }
}

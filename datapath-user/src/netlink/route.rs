//! Routes, the rules that choose their tables, and neighbours.

use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt as _;
use ipnet::Ipv4Net;
use rtnetlink::{
    IpVersion, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};

use super::{Link, Netlink, NetlinkError, PROTOCOL, refused, unless};
use crate::net::Mac;

/// The main routing table.
pub const MAIN: u32 = 254;

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

/// An IPv4 route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// The table.
    pub table: u32,
    /// Where to.
    pub destination: Ipv4Net,
    /// The interface it leaves by.
    pub output: u32,
    /// The gateway.
    pub gateway: Option<Ipv4Addr>,
}

/// Who has an address on a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighbour {
    /// The link.
    pub output: u32,
    /// The address.
    pub address: Ipv4Addr,
    /// Its MAC, where it is known.
    pub mac: Option<[u8; 6]>,
    /// Whether it stands for ever.
    pub permanent: bool,
}

impl Netlink {
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

    /// All IPv4 routes.
    pub async fn routes(&self) -> Result<Vec<Route>, NetlinkError> {
        Ok(self.route_messages().await?.iter().filter_map(route).collect())
    }

    /// The default routes that eniway made, of all tables.
    pub async fn own_default_routes(&self) -> Result<Vec<Route>, NetlinkError> {
        let messages = self.route_messages().await?;
        let own = messages.iter().filter(|message| message.header.protocol == PROTOCOL);
        let routes = own.filter_map(route);
        Ok(routes.filter(|route| route.destination.prefix_len() == 0).collect())
    }

    /// Removes a route, if eniway made it.
    pub async fn delete_route(&self, wanted: Route) -> Result<(), NetlinkError> {
        for message in self.route_messages().await? {
            if message.header.protocol == PROTOCOL && route(&message) == Some(wanted) {
                let what = format!("remove the route to {} of table {}", wanted.destination, wanted.table);
                let result = self.handle.route().del(message).execute().await;
                unless(libc::ESRCH, result.map_err(|error| refused(what, error)))?;
            }
        }
        Ok(())
    }

    async fn route_messages(&self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let messages = self.handle.route().get(all).execute().try_collect().await;
        messages.map_err(|error| refused("list the routes", error))
    }

    /// The rules that pick a table by source, whoever made them.
    pub async fn source_rules(&self) -> Result<Vec<SourceRule>, NetlinkError> {
        Ok(self.rules().await?.iter().filter_map(source_rule).collect())
    }

    /// The rules that pick a table by source and that eniway made.
    pub async fn own_rules(&self) -> Result<Vec<SourceRule>, NetlinkError> {
        Ok(self.rules().await?.iter().filter(|rule| is_own(rule)).filter_map(source_rule).collect())
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
            if is_own(&message) && source_rule(&message) == Some(rule) {
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
        for message in self.neighbour_messages().await? {
            let own = message.attributes.contains(&NeighbourAttribute::Protocol(PROTOCOL));
            if own && message.header.ifindex == link.index {
                let address = neighbour(&message).map_or(Ipv4Addr::UNSPECIFIED, |it| it.address);
                let what = format!("remove neighbour {address} of {}", link.name);
                let result = self.handle.neighbours().del(message).execute().await;
                unless(libc::ENOENT, result.map_err(|error| refused(what, error)))?;
            }
        }
        Ok(())
    }

    /// All IPv4 neighbours, as the kernel knows them.
    pub async fn neighbours(&self) -> Result<Vec<Neighbour>, NetlinkError> {
        Ok(self.neighbour_messages().await?.iter().filter_map(neighbour).collect())
    }

    async fn neighbour_messages(&self) -> Result<Vec<NeighbourMessage>, NetlinkError> {
        let request = self.handle.neighbours().get().set_address_family(AddressFamily::Inet).execute();
        request.try_collect().await.map_err(|error| refused("list the neighbours", error))
    }
}

fn route(message: &RouteMessage) -> Option<Route> {
    if message.header.address_family != AddressFamily::Inet {
        return None;
    }
    let (mut table, mut output, mut gateway) = (u32::from(message.header.table), None, None);
    let mut destination = Ipv4Addr::UNSPECIFIED;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Oif(index) => output = Some(*index),
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => gateway = Some(*address),
            RouteAttribute::Destination(RouteAddress::Inet(address)) => destination = *address,
            _ => {}
        }
    }
    let destination = Ipv4Net::new(destination, message.header.destination_prefix_length).ok()?;
    Some(Route { table, destination, output: output?, gateway })
}

fn is_own(rule: &RuleMessage) -> bool {
    rule.attributes.contains(&RuleAttribute::Protocol(PROTOCOL))
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

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(is)) => address = Some(*is),
            NeighbourAttribute::LinkLayerAddress(is) => mac = is.as_slice().try_into().ok(),
            _ => {}
        }
    }
    let permanent = message.header.state == NeighbourState::Permanent;
    Some(Neighbour { output: message.header.ifindex, address: address?, mac, permanent })
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

#[cfg(test)]
mod tests {
    use super::*;

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

//! What the kernel has, in bulk: to be compared with what should be.

use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt as _;
use ipnet::Ipv4Net;
use rtnetlink::packet_route::{
    AddressFamily,
    neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteMessage},
    rule::RuleAttribute,
    tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption},
};

use super::{Netlink, NetlinkError, PROTOCOL, SourceRule, neighbour_address, refused, source_rule};
use crate::pin::Hook;

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

/// A program in a filter of clsact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Where it stands among all; lower comes first.
    pub priority: u16,
    /// The name that it was attached by.
    pub name: Option<String>,
}

impl Netlink {
    /// All IPv4 neighbours, as the kernel knows them.
    pub async fn neighbours(&self) -> Result<Vec<Neighbour>, NetlinkError> {
        let request = self.handle.neighbours().get().set_address_family(AddressFamily::Inet).execute();
        let messages: Vec<NeighbourMessage> =
            request.try_collect().await.map_err(|error| refused("list the neighbours", error))?;
        Ok(messages.iter().filter_map(neighbour).collect())
    }

    /// All IPv4 routes.
    pub async fn routes(&self) -> Result<Vec<Route>, NetlinkError> {
        let all = rtnetlink::RouteMessageBuilder::<Ipv4Addr>::new().build();
        let request = self.handle.route().get(all).execute();
        let messages: Vec<RouteMessage> =
            request.try_collect().await.map_err(|error| refused("list the routes", error))?;
        Ok(messages.iter().filter_map(route).collect())
    }

    /// The rules that eniway made.
    pub async fn own_rules(&self) -> Result<Vec<SourceRule>, NetlinkError> {
        let rules = self.rules().await?;
        let own = rules.iter().filter(|rule| rule.attributes.contains(&RuleAttribute::Protocol(PROTOCOL)));
        Ok(own.filter_map(source_rule).collect())
    }

    /// The programs in filters of an interface's clsact qdisc, in the order in which they run.
    pub async fn filters(&self, ifindex: u32, hook: Hook) -> Result<Vec<Filter>, NetlinkError> {
        let mut filters = self.handle.traffic_filter(ifindex.cast_signed());
        let request = match hook {
            Hook::In => filters.get().ingress(),
            Hook::Out => filters.get().egress(),
        };
        let result: Result<Vec<TcMessage>, _> = request.execute().try_collect().await;
        let messages = match result.map_err(|error| refused("list the filters of clsact", error)) {
            Ok(messages) => messages,
            // No such qdisc, so no filter.
            Err(error) if error.is(libc::EINVAL) || error.is(libc::ENOENT) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut filters: Vec<Filter> = messages.iter().filter_map(filter).collect();
        filters.sort_by_key(|filter| filter.priority);
        Ok(filters)
    }
}

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let mac = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(mac) => mac.as_slice().try_into().ok(),
        _ => None,
    });
    Some(Neighbour {
        output: message.header.ifindex,
        address: neighbour_address(message)?,
        mac,
        permanent: message.header.state == NeighbourState::Permanent,
    })
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

fn filter(message: &TcMessage) -> Option<Filter> {
    let options = message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    let mut bpf = options.iter().filter_map(|option| match option {
        TcOption::Bpf(option) => Some(option),
        _ => None,
    });
    let name = bpf.find_map(|option| match option {
        TcFilterBpfOption::ProgName(name) => Some(name.clone()),
        _ => None,
    });
    // The kernel lists each priority once more, without a filter.
    name.is_some().then_some(Filter { priority: (message.header.info >> 16) as u16, name })
}

/// What the node's network namespace holds, read once.
#[derive(Debug, Default)]
pub struct HostState {
    /// All interfaces.
    pub links: Vec<super::Link>,
    /// All IPv4 neighbours.
    pub neighbours: Vec<Neighbour>,
    /// All IPv4 routes.
    pub routes: Vec<Route>,
    /// The rules that eniway made.
    pub rules: Vec<SourceRule>,
    /// The addresses, without those of the loopback ranges.
    pub addresses: Vec<IpAddr>,
}

impl HostState {
    /// Reads the namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to list something.
    pub async fn read() -> Result<Self, NetlinkError> {
        let netlink = Netlink::open()?;
        Ok(Self {
            links: netlink.links().await?,
            neighbours: netlink.neighbours().await?,
            routes: netlink.routes().await?,
            rules: netlink.own_rules().await?,
            addresses: netlink.addresses().await?,
        })
    }

    /// The interface of this name.
    pub fn link(&self, name: &str) -> Option<&super::Link> {
        self.links.iter().find(|link| link.name == name)
    }
}

//! What the kernel has, in bulk: to be compared with what should be.

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption};

use super::{Link, Neighbour, Netlink, NetlinkError, Route, SourceRule, refused};
use crate::pin::Hook;

/// A program in a filter of clsact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Where it stands among all; lower comes first.
    pub priority: u16,
    /// The name that it was attached by.
    pub name: Option<String>,
}

impl Netlink {
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
    pub links: Vec<Link>,
    /// All IPv4 neighbours.
    pub neighbours: Vec<Neighbour>,
    /// All IPv4 routes.
    pub routes: Vec<Route>,
    /// The rules that eniway made.
    pub rules: Vec<SourceRule>,
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
        })
    }

    /// The interface of this name.
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }
}

//! What the kernel tells of interfaces, addresses, routes, neighbours and rules as they change.
//!
//! Messages are taken in by a task of their own and boiled down at once: of a storm of them, only the last state of each
//! interface is left. Turning an offload on or off is told as a change of the interface (`netdev_features_change`,
//! `rtnetlink_event`; seen on 6.1 to 6.18). When the kernel loses messages (ENOBUFS), everything has to be looked at.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use datapath_common::abi::Endpoint;
use futures_util::StreamExt as _;
use rtnetlink::{
    MulticastGroup, new_multicast_connection,
    packet_core::NetlinkPayload,
    packet_route::{AddressFamily, RouteNetlinkMessage, neighbour::NeighbourState},
    sys::AsyncSocket as _,
};
use tokio::{sync::Notify, task::JoinHandle, time};

use crate::netlink::{Link, NetlinkError, PROTOCOL};

const GROUPS: [MulticastGroup; 5] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Neigh,
];

/// Messages that belong together come within this time.
const SETTLE: Duration = Duration::from_millis(20);
/// Changes are handed out no more often than this.
const SPACING: Duration = Duration::from_millis(100);
/// Bytes of messages that may wait for the task: those of about a thousand interfaces at once.
const ROOM: i32 = 2 << 20;

/// What has changed since it was asked for last.
#[derive(Debug, Default)]
pub struct Changes {
    /// Interfaces by index, as they were told last; none = gone.
    pub links: BTreeMap<u32, Option<Link>>,
    /// The node's addresses.
    pub addresses: bool,
    /// Interfaces of which a route of eniway's, or a neighbour, went or was changed.
    pub routing: BTreeSet<u32>,
    /// A rule went.
    pub rules: bool,
    /// Messages were lost: anything may have changed.
    pub lost: bool,
}

impl Changes {
    /// Whether the host side of a pod was told to be otherwise than its record says.
    pub fn differs(&self, record: &Endpoint) -> bool {
        self.links.get(&record.ifindex).is_some_and(|link| {
            link.as_ref()
                .is_none_or(|link| link.mtu != u32::from(record.mtu) || link.mac != Some(record.gateway_mac))
        })
    }

    fn is_empty(&self) -> bool {
        let Self { links, addresses, routing, rules, lost } = self;
        links.is_empty() && routing.is_empty() && !addresses && !rules && !lost
    }

    fn take_in(&mut self, message: RouteNetlinkMessage) {
        match message {
            // Other families tell of bridge ports and IPv6 settings by messages of the same type.
            RouteNetlinkMessage::NewLink(link) if link.header.interface_family == AddressFamily::Unspec => {
                self.links.insert(link.header.index, Some(Link::from_message(link)));
            }
            RouteNetlinkMessage::DelLink(link) if link.header.interface_family == AddressFamily::Unspec => {
                self.links.insert(link.header.index, None);
            }
            RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => self.addresses = true,
            RouteNetlinkMessage::DelRoute(route) if route.header.protocol == PROTOCOL => {
                use rtnetlink::packet_route::route::RouteAttribute::Oif;
                let output = route.attributes.iter().find_map(|attribute| match attribute {
                    Oif(index) => Some(*index),
                    _ => None,
                });
                self.routing.extend(output);
            }
            RouteNetlinkMessage::DelNeighbour(it) if it.header.family == AddressFamily::Inet => {
                self.routing.insert(it.header.ifindex);
            }
            RouteNetlinkMessage::NewNeighbour(it)
                if it.header.family == AddressFamily::Inet
                    && it.header.state != NeighbourState::Permanent =>
            {
                self.routing.insert(it.header.ifindex);
            }
            RouteNetlinkMessage::DelRule(_) => self.rules = true,
            _ => {}
        }
    }
}

#[derive(Default)]
struct Shared {
    changes: Mutex<(Changes, Option<Instant>)>,
    changed: Notify,
}

impl Shared {
    fn change(&self, change: impl FnOnce(&mut Changes)) {
        let mut guard = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let (changes, since) = &mut *guard;
        change(changes);
        if !changes.is_empty() {
            since.get_or_insert_with(Instant::now);
            self.changed.notify_one();
        }
    }

    fn since(&self) -> Option<Instant> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    fn take(&self) -> Changes {
        let mut guard = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        guard.1 = None;
        std::mem::take(&mut guard.0)
    }
}

/// Listens in the network namespace of the thread that opened it. Needs a tokio runtime of that thread.
pub struct Monitor {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
    taken: Instant,
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Monitor {
    /// Begins to listen.
    ///
    /// # Errors
    ///
    /// When the kernel gives no socket.
    pub fn open() -> Result<Self, NetlinkError> {
        let shared = Arc::<Shared>::default();
        let task = tokio::spawn(listen(Arc::clone(&shared), connect()?));
        Ok(Self { shared, task, taken: Instant::now() })
    }

    /// What has changed, some milliseconds after it did. May be dropped and called again.
    pub async fn next(&mut self) -> Changes {
        loop {
            let changed = self.shared.changed.notified();
            match self.shared.since() {
                None => changed.await,
                Some(since) => {
                    time::sleep_until((since + SETTLE).max(self.taken + SPACING).into()).await;
                    self.taken = Instant::now();
                    return self.shared.take();
                }
            }
        }
    }
}

type Messages = (JoinHandle<()>, futures_util::stream::BoxStream<'static, RouteNetlinkMessage>);

fn connect() -> Result<Messages, NetlinkError> {
    let (mut connection, handle, messages) = new_multicast_connection(&GROUPS).map_err(NetlinkError::Open)?;
    // As much as is allowed; more messages are lost with less.
    if let Err(error) = connection.socket_mut().socket_mut().set_rx_buf_sz(ROOM) {
        log::debug!("room for messages of the kernel: {error}");
    }
    let task = tokio::spawn(async move {
        // The connection ends with its last handle.
        let _handle = handle;
        connection.await;
    });
    let messages = messages.filter_map(async |(message, _)| match message.payload {
        NetlinkPayload::InnerMessage(message) => Some(message),
        _ => None,
    });
    Ok((task, messages.boxed()))
}

async fn listen(shared: Arc<Shared>, (mut task, mut messages): Messages) {
    loop {
        while let Some(message) = messages.next().await {
            shared.change(|changes| changes.take_in(message));
        }
        task.abort();
        // The kernel had more to say than there was room for, or the socket failed otherwise: what was said is lost.
        (task, messages) = loop {
            let next = connect();
            shared.change(|changes| changes.lost = true);
            match next {
                Ok(next) => break next,
                Err(error) => log::error!("{error}; changes of interfaces are found by looking only"),
            }
            time::sleep(Duration::from_secs(1)).await;
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ethtool::{self, Offload},
        netlink::{LinkChange, Netlink, VethEnd},
        netns::Namespace,
        wiring::tests::on_a_node,
    };

    /// Every change that the agent acts on is told, an offload's too, and a storm of them as one.
    #[test]
    fn the_kernel_tells_what_changes() {
        on_a_node(async || {
            let netlink = Netlink::open().unwrap();
            let mut monitor = Monitor::open().unwrap();
            let here = Namespace::current().unwrap();
            let end = |name| VethEnd { name, mac: [2, 0, 0, 0, 0, name.len() as u8] };
            netlink.add_veth(end("eth1"), end("fabric"), &here, 1500).await.unwrap();
            let link = netlink.link("eth1").await.unwrap();
            let told = monitor.next().await;
            assert!(told.links[&link.index].as_ref().is_some_and(|it| it.name == "eth1"), "{told:?}");

            ethtool::set("eth1", Offload::RxVlan, false).unwrap();
            let begun = Instant::now();
            assert!(monitor.next().await.links.contains_key(&link.index));
            assert!(begun.elapsed() < Duration::from_secs(1));

            let up = LinkChange { up: true, ..LinkChange::default() };
            netlink.change_link(&link, up).await.unwrap();
            netlink.add_address(&link, "10.1.0.1/24".parse().unwrap()).await.unwrap();
            for mtu in 1300..1400 {
                let change = LinkChange { mtu: Some(mtu), ..LinkChange::default() };
                netlink.change_link(&link, change).await.unwrap();
            }
            let told = monitor.next().await;
            assert!(told.addresses && told.links[&link.index].as_ref().is_some_and(|it| it.mtu == 1399));
            netlink.delete_link(&link).await.unwrap();
            assert!(monitor.next().await.links[&link.index].is_none());
        });
    }
}

//! Interfaces.

use std::os::fd::{AsFd, AsRawFd as _};

use futures_util::{StreamExt as _, TryStreamExt as _};
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, LinkVeth,
    packet_route::{
        RouteNetlinkMessage,
        link::{
            InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, LinkXdp,
            State as OperState, XdpAttached,
        },
        nsid::{NsidAttribute, NsidMessage},
    },
};

use super::{Netlink, NetlinkError, refused, unless};
use crate::net::Mac;

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

impl Netlink {
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
                error if error.is(libc::ENODEV) => Ok(None),
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

    /// How this namespace numbers another one; `None` = it has no number yet, so no interface here ends there.
    pub async fn namespace_id(&self, namespace: impl AsFd) -> Result<Option<i32>, NetlinkError> {
        let mut message = NsidMessage::default();
        message.attributes.push(NsidAttribute::Fd(namespace.as_fd().as_raw_fd().cast_unsigned()));
        let request = RouteNetlinkMessage::GetNsId(message);
        let answers = self.request(request, 0, "look up the number of a network namespace").await?;
        let attributes = answers.into_iter().flat_map(|answer| match answer {
            RouteNetlinkMessage::NewNsId(message) => message.attributes,
            _ => Vec::new(),
        });
        let mut ids = attributes.filter_map(|attribute| match attribute {
            NsidAttribute::Id(id) if id >= 0 => Some(id),
            _ => None,
        });
        Ok(ids.next())
    }
}

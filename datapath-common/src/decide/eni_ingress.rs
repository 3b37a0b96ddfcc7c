//! From the fabric, at the parent ENI: which pod a frame is for, and whether it may have it.
//!
//! `eni_xdp` asks [`admit`] and drops what it refuses; `eni_ingress` asks [`decide`], which asks the same and then
//! chooses between the pod and the node's stack.
//!
//! Ways: [`Outcome::Untagged`] (the node's own traffic, untouched), [`Outcome::Wire`] (without its tag into the pod),
//! [`Outcome::HostReturn`] (without its tag to the node's stack, which translates it back before the pod sees it).

use super::{
    Decision,
    door::{arrival, fragment_key, inbound_key, lead, recall, refresh, reply_door},
    limit, same, same_mac,
};
use crate::{
    abi::{Door, Endpoint, Origin, Outcome},
    packet::{
        self, Frame, arp,
        ipv4::{self, Ipv4, Part},
        l4::Role,
        link::{self, Link, Tag},
        plain,
    },
    tables::Tables,
};

/// Decides on a frame that arrives at the parent ENI.
#[inline(always)]
pub fn decide<'t, T: Tables, F: Frame + ?Sized>(tables: &'t T, frame: &F, tag: Option<Tag>) -> Decision<'t> {
    let decision = decide_plain(tables, frame, tag).unwrap_or_else(|| decide_any(tables, frame, tag));
    limit::ingress(tables, frame, decision)
}

/// As [`decide`] but for limits, where the tag stands beside the frame and the packet is plain and for its pod, which has no limit,
/// or its pod is unknown; else `None`.
#[inline(always)]
pub fn decide_plain<'t, T: Tables, F: Frame + ?Sized>(
    tables: &'t T,
    frame: &F,
    tag: Option<Tag>,
) -> Option<Decision<'t>> {
    let tag = tag?;
    if tag.tpid != link::TPID_8021Q {
        return None;
    }
    plain_for::<0, _, _>(tables, frame, tag, |pod, packet| plain_route::<0, _, _>(tables, frame, pod, packet))
}

/// As [`route`]; of a packet for a pod that remembers nothing, the rest is read only where the reply would not take the wire.
/// `None` where it cannot be read.
#[inline(always)]
pub fn plain_route<'t, const TAG: usize, T: Tables, F: Frame + ?Sized>(
    tables: &'t T,
    frame: &F,
    pod: &'t Endpoint,
    packet: &plain::Packet,
) -> Option<Decision<'t>> {
    if !tables.marked(pod.id) && matches!(reply_door(tables, packet.src), Door::Wire) {
        return Some(Decision::new(Outcome::Wire, pod));
    }
    Some(route(tables, pod, &packet.ip::<TAG, _>(frame)?))
}

/// As [`decide`] but for limits, for every frame.
#[inline(always)]
pub fn decide_any<'t, T: Tables, F: Frame + ?Sized>(
    tables: &'t T,
    frame: &F,
    tag: Option<Tag>,
) -> Decision<'t> {
    admit(tables, frame, tag, |pod, ip| Some(route(tables, pod, ip)))
}

/// As [`admit`], where the tag is in the frame and the packet is plain and for its pod, or its pod is unknown; else `None`.
/// What `route` leaves open is left open.
#[inline(always)]
pub fn admit_plain<'t, T: Tables, F: Frame + ?Sized>(
    tables: &'t T,
    frame: &F,
    route: impl FnOnce(&'t Endpoint, &plain::Packet) -> Option<Decision<'t>>,
) -> Option<Decision<'t>> {
    let [tpid, tci]: [[u8; 2]; 2] = frame.load(link::UNTAGGED_LEN - 2)?;
    let tag = Tag { tpid: u16::from_be_bytes(tpid), tci: u16::from_be_bytes(tci) };
    if tag.tpid == link::TPID_8021Q { plain_for::<4, _, _>(tables, frame, tag, route) } else { None }
}

/// What is said of a packet that the pod may have.
#[inline(always)]
pub const fn admitted(pod: &Endpoint) -> Decision<'_> {
    Decision::new(Outcome::Wire, pod)
}

/// Decides where VLAN, MAC and address belong together, where only MAC or address does not, or where nobody has the VLAN id.
#[inline(always)]
fn plain_for<'t, const TAG: usize, T: Tables, F: Frame + ?Sized>(
    tables: &'t T,
    frame: &F,
    tag: Tag,
    route: impl FnOnce(&'t Endpoint, &plain::Packet) -> Option<Decision<'t>>,
) -> Option<Decision<'t>> {
    let vid = tag.tci & link::VID;
    // Not a second tag.
    if vid == 0 || frame.load::<u16>(link::UNTAGGED_LEN + TAG - 2)? != packet::IPV4.to_be() {
        return None;
    }
    let Some(pod) = tables.endpoint(tables.subeni(vid)) else {
        return Some(Decision::unknown(Outcome::UnknownVlan));
    };
    let packet = plain::parse::<TAG, _>(frame)?;
    if T::CHECKED {
        let mac = plain::DstMac::of(frame)?;
        // Refused at once: what a flood is made of is not read twice.
        if !mac.is(&pod.wire_mac) {
            return if mac.is_group() { None } else { Some(Decision::new(Outcome::WrongMac, pod)) };
        }
        if !same(packet.dst, pod.ipv4) {
            return Some(Decision::new(Outcome::WrongAddress, pod));
        }
        if same(packet.src, pod.ipv4) {
            return None;
        }
    }
    if limit::is_limited(Some(pod)) {
        return None;
    }
    route(pod, &packet)
}

/// Checks a frame against the pod that its VLAN id belongs to: VLAN, MAC and address belong together. `route` is asked
/// about IPv4 packets that the pod may have; without an answer of its, the frame goes the way [`Outcome::Wire`].
#[inline(always)]
pub fn admit<'t, T: Tables, F: Frame + ?Sized>(
    tables: &'t T,
    frame: &F,
    tag: Option<Tag>,
    route: impl FnOnce(&'t Endpoint, &Ipv4) -> Option<Decision<'t>>,
) -> Decision<'t> {
    let link = match link::parse(frame, tag) {
        Ok(link) => link,
        Err(reason) => return Decision::unknown(reason),
    };
    if link.vid == 0 {
        return Decision::unknown(Outcome::Untagged);
    }
    let Some(pod) = tables.endpoint(tables.subeni(link.vid)) else {
        return Decision::unknown(Outcome::UnknownVlan);
    };
    if !same_mac(link.dst, pod.wire_mac) && !link.is_broadcast() {
        return Decision::new(Outcome::WrongMac, pod);
    }
    match link.ethertype {
        packet::IPV4 => match ipv4_for(pod, frame, &link) {
            Ok(ip) => route(pod, &ip).unwrap_or(Decision::new(Outcome::Wire, pod)),
            Err(reason) => Decision::new(reason, pod),
        },
        packet::ARP => match arp::parse(frame, link.header_len) {
            Ok(arp) if same(arp.target, pod.ipv4) => Decision::new(Outcome::Wire, pod),
            Ok(_) => Decision::new(Outcome::ArpNotForPod, pod),
            Err(reason) => Decision::new(reason, pod),
        },
        ethertype => Decision::new(packet::refuse(frame, ethertype, link.header_len), pod),
    }
}

#[inline(always)]
fn ipv4_for<F: Frame + ?Sized>(pod: &Endpoint, frame: &F, link: &Link) -> Result<Ipv4, Outcome> {
    let ip = ipv4::parse(frame, link.header_len)?;
    if !same(ip.dst, pod.ipv4) {
        return Err(Outcome::WrongAddress);
    }
    if same(ip.src, pod.ipv4) {
        return Err(Outcome::SelfHairpin);
    }
    Ok(ip)
}

/// Chooses between the pod and the node's stack, and remembers the door where the reply would take another one.
#[inline(always)]
pub fn route<'t, T: Tables>(tables: &'t T, pod: &'t Endpoint, ip: &Ipv4) -> Decision<'t> {
    if tables.marked(pod.id) && returns_to_host(tables, pod, ip) {
        return Decision::new(Outcome::HostReturn, pod);
    }
    lead(tables, pod, ip, Door::Wire);
    let remark = arrival(tables, pod, ip, Door::Wire, reply_door(tables, ip.src));
    Decision { remark, ..Decision::new(Outcome::Wire, pod) }
}

/// Whether the packet answers a request that the node's stack sent out in the pod's name.
#[inline(always)]
fn returns_to_host<T: Tables>(tables: &T, pod: &Endpoint, ip: &Ipv4) -> bool {
    if matches!(ip.part, Part::Later) {
        return matches!(tables.fragment(&fragment_key(pod, ip)), Some(Door::Host));
    }
    if matches!(ip.l4.role, Role::Opens) {
        return false;
    }
    let key = inbound_key(pod, ip);
    let Some(known) = recall(tables, &key) else { return false };
    if known.origin != Origin::HostForwarded as u8 {
        return false;
    }
    refresh(tables, &key, known);
    lead(tables, pod, ip, Door::Host);
    true
}

//! From a pod, at the host side of its veth: whether it may send this, and by which door it leaves.
//!
//! Ways: [`Outcome::Wire`] (tagged onto the parent ENI, from the pod's MAC on the wire to the gateway's),
//! [`Outcome::WireArp`] (the same, but to the MAC that the frame has), [`Outcome::Local`] (into `to`, another pod of this
//! node, from the gateway's MAC to that pod's), [`Outcome::Host`] (to the node's stack), [`Outcome::HostService`] (the same,
//! marked as what it forwards in the pod's name), [`Outcome::ArpAnswered`] (back to the pod, turned into the answer to its
//! ARP request for the gateway).

use super::{
    Decision,
    door::{arrival, fragment_key, lead, outbound_key, recall, refresh, stays_on_the_wire},
    limit, policy, same, same_mac,
};
use crate::{
    abi::{Door, Endpoint, Origin, Outcome, maps::host_dst},
    packet::{
        self, Frame,
        arp::{self, Arp},
        ipv4::{self, ICMP, Ipv4, Part, UDP},
        l4,
        link::{self, Link, Tag},
        plain,
    },
    tables::Tables,
};

/// Decides on a frame that arrives at the host side interface `ifindex` of a pod. `gso_size` is the payload of one segment
/// in bytes where the frame stands for several (`skb->gso_size`), else 0.
#[inline(always)]
pub fn decide<'t, T: Tables, F: Frame + ?Sized>(
    tables: &'t T,
    frame: &F,
    tag: Option<Tag>,
    ifindex: u32,
    gso_size: u32,
) -> Decision<'t> {
    let decision = decide_plain(tables, frame, tag, ifindex, gso_size)
        .map(|plain| plain.decision)
        .unwrap_or_else(|| decide_any(tables, frame, tag, ifindex, gso_size));
    limit::egress(tables, frame, decision).decision
}

/// What [`decide_plain`] says.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Plain<'t> {
    /// The decision.
    pub decision: Decision<'t>,
    /// Neither the pod nor another one that receives the packet has a limit: known before it was asked. False says nothing of the other.
    pub free: bool,
}

/// As [`decide`] but for limits, where the frame is plain, untagged and from the MAC of a pod without a limit; else `None`.
#[inline(always)]
pub fn decide_plain<'t, T: Tables, F: Frame + ?Sized>(
    tables: &'t T,
    frame: &F,
    tag: Option<Tag>,
    ifindex: u32,
    gso_size: u32,
) -> Option<Plain<'t>> {
    if tag.is_some() {
        return None;
    }
    let pod = tables.pod_by_ifindex(ifindex)?;
    if limit::is_limited(Some(pod)) {
        return None;
    }
    let packet = plain::parse::<0, _>(frame)?;
    if T::CHECKED {
        if !same_mac(packet.src_mac, pod.mac) {
            return None;
        }
        if let Some(reason) = wrong_address(pod, packet.src, packet.dst) {
            return Some(Plain { decision: Decision::new(reason, pod), free: true });
        }
        if packet.proto == UDP && answers_dhcp(packet.ports::<0, _>(frame)?) {
            return Some(Plain { decision: Decision::new(Outcome::DhcpServer, pod), free: true });
        }
    }
    // What follows is `route`, and reads the rest of the packet only where that is asked for.
    let marked = tables.marked(pod.id);
    let to = if marked { None } else { tables.pod_by_ipv4(packet.dst) };
    match to {
        Some(to) if gso_size == 0 && plainly_local(tables, pod, to, ip_len(frame, link::UNTAGGED_LEN)) => {
            let decision = Decision { to: Some(to), ..Decision::new(Outcome::Local, pod) };
            // Neither has any flag but that of security groups.
            return Some(Plain { decision, free: true });
        }
        None if !marked => {
            let outcome = match tables.host_dst(packet.dst) {
                0 => Outcome::Wire,
                flags => by_flags(tables, flags, &packet.ip::<0, _>(frame)?, false),
            };
            return Some(Plain { decision: Decision::new(outcome, pod), free: true });
        }
        _ => {}
    }
    let ip = packet.ip::<0, _>(frame)?;
    let remembered = if marked { remembered(tables, pod, &ip) } else { None };
    let to = || if marked { tables.pod_by_ipv4(ip.dst) } else { to };
    let size = size(frame, link::UNTAGGED_LEN, &ip, gso_size);
    Some(Plain { decision: choose(tables, pod, &ip, size, remembered, to), free: false })
}

/// Whether [`local`] says "local", and notes nothing, of any packet of `size` bytes: for reasons that are cheap to look at.
#[inline(always)]
fn plainly_local<T: Tables>(tables: &T, pod: &Endpoint, to: &Endpoint, size: u32) -> bool {
    tables.fast_path()
        && to.id != pod.id
        && size <= u32::from(to.mtu)
        && !tables.marked(to.id)
        && policy::plainly_open(tables, pod, to)
}

/// As [`decide`] but for limits, for every frame.
#[inline(always)]
pub fn decide_any<'t, T: Tables, F: Frame + ?Sized>(
    tables: &'t T,
    frame: &F,
    tag: Option<Tag>,
    ifindex: u32,
    gso_size: u32,
) -> Decision<'t> {
    let Some(pod) = tables.pod_by_ifindex(ifindex) else {
        return Decision::unknown(Outcome::UnknownPod);
    };
    let link = match own_link(pod, frame, tag) {
        Ok(link) => link,
        Err(reason) => return Decision::new(reason, pod),
    };
    match link.ethertype {
        packet::IPV4 => match own_ipv4(pod, frame, &link) {
            Ok(ip) => route(tables, pod, &ip, size(frame, link.header_len, &ip, gso_size)),
            Err(reason) => Decision::new(reason, pod),
        },
        packet::ARP => match arp::parse(frame, link.header_len) {
            Ok(arp) => Decision::new(speak_arp(pod, &arp), pod),
            Err(reason) => Decision::new(reason, pod),
        },
        ethertype => Decision::new(packet::refuse(frame, ethertype, link.header_len), pod),
    }
}

/// The length in bytes of the largest IP packet that the frame stands for.
#[inline(always)]
fn size<F: Frame + ?Sized>(frame: &F, link_len: usize, ip: &Ipv4, gso_size: u32) -> u32 {
    if gso_size == 0 { ip_len(frame, link_len) } else { gso_size + ip.header_len + ip.l4.header_len }
}

#[inline(always)]
fn ip_len<F: Frame + ?Sized>(frame: &F, link_len: usize) -> u32 {
    frame.len() - link_len as u32
}

/// What leaves a pod carries no tag and the pod's MAC.
#[inline(always)]
pub(super) fn own_link<F: Frame + ?Sized>(
    pod: &Endpoint,
    frame: &F,
    tag: Option<Tag>,
) -> Result<Link, Outcome> {
    let link = match link::parse(frame, tag) {
        Ok(link) => link,
        Err(Outcome::DoubleTag) => return Err(Outcome::TaggedByPod),
        Err(reason) => return Err(reason),
    };
    if link.tagged {
        return Err(Outcome::TaggedByPod);
    }
    if !same_mac(link.src, pod.mac) {
        return Err(Outcome::SourceMac);
    }
    Ok(link)
}

/// The sender is the pod; an address probe (RFC 5227) has no address yet. The gateway is answered for.
#[inline(always)]
pub(super) fn speak_arp(pod: &Endpoint, arp: &Arp) -> Outcome {
    let requests = arp.operation == arp::REQUEST;
    let own = same(arp.sender, pod.ipv4) || requests && same(arp.sender, [0; 4]);
    if !own || !same_mac(arp.sender_mac, pod.mac) {
        Outcome::ArpSpoof
    } else if requests && same(arp.target, pod.gateway_ipv4) {
        Outcome::ArpAnswered
    } else {
        Outcome::WireArp
    }
}

/// The source is the pod, and it says nothing that only a router or a server may say.
#[inline(always)]
pub(super) fn own_ipv4<F: Frame + ?Sized>(pod: &Endpoint, frame: &F, link: &Link) -> Result<Ipv4, Outcome> {
    let ip = ipv4::parse(frame, link.header_len)?;
    match refused(pod, &ip) {
        Some(reason) => Err(reason),
        None => Ok(ip),
    }
}

/// Why the pod may not send this packet.
#[inline(always)]
fn refused(pod: &Endpoint, ip: &Ipv4) -> Option<Outcome> {
    if let Some(reason) = wrong_address(pod, ip.src, ip.dst) {
        return Some(reason);
    }
    if ip.proto == UDP && answers_dhcp((ip.l4.src_port, ip.l4.dst_port)) {
        return Some(Outcome::DhcpServer);
    }
    if ip.proto == ICMP && ip.l4.icmp_type == l4::REDIRECT {
        return Some(Outcome::IcmpRedirect);
    }
    if ip.proto == ICMP && ip.l4.icmp_type == l4::ROUTER_ADVERTISEMENT {
        return Some(Outcome::RouterAdvertisement);
    }
    None
}

#[inline(always)]
fn wrong_address(pod: &Endpoint, src: [u8; 4], dst: [u8; 4]) -> Option<Outcome> {
    if !same(src, pod.ipv4) {
        Some(Outcome::SourceAddress)
    } else if ipv4::is_multicast(dst) {
        Some(Outcome::Multicast)
    } else {
        None
    }
}

/// Whether UDP from the first port to the second is what a DHCP server sends.
#[inline(always)]
fn answers_dhcp(ports: (u16, u16)) -> bool {
    const SERVER: u16 = 67;
    const CLIENT: u16 = 68;
    ports == (SERVER, CLIENT)
}

/// Chooses the door: the remembered one, else by destination. `size` is the length in bytes of the largest IP packet that
/// the frame stands for.
#[inline(always)]
fn route<'t, T: Tables>(tables: &'t T, pod: &'t Endpoint, ip: &Ipv4, size: u32) -> Decision<'t> {
    let remembered = if tables.marked(pod.id) { remembered(tables, pod, ip) } else { None };
    choose(tables, pod, ip, size, remembered, || tables.pod_by_ipv4(ip.dst))
}

/// The same, when the remembered door is known; `to` says which pod of the node the packet is for.
#[inline(always)]
fn choose<'t, T: Tables>(
    tables: &'t T,
    pod: &'t Endpoint,
    ip: &Ipv4,
    size: u32,
    remembered: Option<Door>,
    to: impl FnOnce() -> Option<&'t Endpoint>,
) -> Decision<'t> {
    let outcome = match remembered {
        // A later fragment of what went to a destination of the host's own is no reply.
        Some(Door::Host)
            if matches!(ip.part, Part::Later) && tables.host_dst(ip.dst) & host_dst::HOST != 0 =>
        {
            Outcome::Host
        }
        Some(Door::Host) => Outcome::Host,
        Some(Door::Wire) => Outcome::Wire,
        // Fragments only: no flow is remembered by this door.
        Some(Door::Local) => match to() {
            Some(to) if policy::may_follow(tables, pod, to) => {
                return Decision { to: Some(to), ..Decision::new(Outcome::Local, pod) };
            }
            _ => Outcome::Wire,
        },
        None => {
            let later = matches!(ip.part, Part::Later);
            if let Some(to) = to() {
                if !later {
                    return local(tables, pod, to, ip, size);
                }
                // A fragment without a first one: the wire.
                Outcome::Wire
            } else {
                by_destination(tables, ip, later)
            }
        }
    };
    match outcome {
        Outcome::Host | Outcome::HostService => lead(tables, pod, ip, Door::Host),
        Outcome::Wire => lead(tables, pod, ip, Door::Wire),
        _ => {}
    }
    Decision::new(outcome, pod)
}

#[inline(always)]
fn remembered<T: Tables>(tables: &T, pod: &Endpoint, ip: &Ipv4) -> Option<Door> {
    if matches!(ip.part, Part::Later) {
        return tables.fragment(&fragment_key(pod, ip));
    }
    let key = outbound_key(pod, ip);
    let known = recall(tables, &key)?;
    if known.origin != Origin::Inbound as u8 {
        return None;
    }
    refresh(tables, &key, known);
    if known.door == Door::Host as u8 { Some(Door::Host) } else { Some(Door::Wire) }
}

/// The fast path, where it is allowed and gives what the wire would give.
#[inline(always)]
fn local<'t, T: Tables>(
    tables: &'t T,
    pod: &'t Endpoint,
    to: &'t Endpoint,
    ip: &Ipv4,
    size: u32,
) -> Decision<'t> {
    // To itself: the wire, which returns it to be dropped with its own reason.
    let allowed = tables.fast_path() && to.id != pod.id && !stays_on_the_wire(tables, to, ip);
    // The wire answers this one with "fragmentation needed".
    let too_big = size > u32::from(to.mtu);
    let ruling = if !allowed {
        policy::WIRE
    } else if too_big {
        policy::Ruling { fast: false, remark: Some(Outcome::TooBigForLocal) }
    } else {
        policy::rule(tables, pod, to, ip)
    };
    let remark = ruling.remark;
    if !ruling.fast {
        lead(tables, pod, ip, Door::Wire);
        return Decision { remark, ..Decision::new(Outcome::Wire, pod) };
    }
    lead(tables, pod, ip, Door::Local);
    // Never a remark: by the default door nothing is remembered.
    let _ = arrival(tables, to, ip, Door::Local, Door::Local);
    Decision { remark, to: Some(to), ..Decision::new(Outcome::Local, pod) }
}

/// Whether the destination is the node's stack's, or nobody's. A later fragment lacks the port that tells a virtual
/// address of a load balancer from the node's own: it takes the wire.
#[inline(always)]
fn by_destination<T: Tables>(tables: &T, ip: &Ipv4, later: bool) -> Outcome {
    by_flags(tables, tables.host_dst(ip.dst), ip, later)
}

#[inline(always)]
fn by_flags<T: Tables>(tables: &T, flags: u32, ip: &Ipv4, later: bool) -> Outcome {
    if flags & host_dst::DENY != 0 {
        Outcome::DeniedDestination
    } else if flags & host_dst::HOST != 0 && !later && !tables.is_vip(ip.dst, ip.l4.dst_port, ip.l4.proto) {
        if flags & host_dst::SERVICE != 0 { Outcome::HostService } else { Outcome::Host }
    } else {
        Outcome::Wire
    }
}

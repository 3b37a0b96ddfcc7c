//! From the node's stack, at the host side of a pod's veth: kubelet's probes, node ports, what kube-proxy translated.
//!
//! Ways: [`Outcome::Host`] (on to the pod).

use super::{
    Decision,
    door::{arrival, reply_door},
    limit, same,
};
use crate::{
    abi::{Door, Endpoint, Outcome},
    packet::{
        self, Frame, arp,
        ipv4::{self, Ipv4},
        link::{self, Tag},
        plain,
    },
    tables::Tables,
};

/// Decides on a frame that the node's stack sends out of the host side interface `ifindex` of a pod.
#[inline(always)]
pub fn decide<'t, T: Tables, F: Frame + ?Sized>(
    tables: &'t T,
    frame: &F,
    tag: Option<Tag>,
    ifindex: u32,
) -> Decision<'t> {
    let decision =
        decide_plain(tables, frame, tag, ifindex).unwrap_or_else(|| decide_any(tables, frame, tag, ifindex));
    limit::ingress(tables, frame, decision)
}

/// As [`decide`] but for limits, where the frame is plain, untagged and for the pod, which has no limit; else `None`.
#[inline(always)]
pub fn decide_plain<'t, T: Tables, F: Frame + ?Sized>(
    tables: &'t T,
    frame: &F,
    tag: Option<Tag>,
    ifindex: u32,
) -> Option<Decision<'t>> {
    if tag.is_some() {
        return None;
    }
    let pod = tables.pod_by_ifindex(ifindex)?;
    if limit::is_limited(Some(pod)) {
        return None;
    }
    let packet = plain::parse::<0, _>(frame)?;
    if !same(packet.dst, pod.ipv4) {
        return None;
    }
    let ip = packet.ip::<0, _>(frame)?;
    Some(deliver(tables, pod, &ip))
}

/// As [`decide`] but for limits, for every frame.
#[inline(always)]
pub fn decide_any<'t, T: Tables, F: Frame + ?Sized>(
    tables: &'t T,
    frame: &F,
    tag: Option<Tag>,
    ifindex: u32,
) -> Decision<'t> {
    let Some(pod) = tables.pod_by_ifindex(ifindex) else {
        return Decision::unknown(Outcome::UnknownPod);
    };
    let link = match link::parse(frame, tag) {
        Ok(link) => link,
        Err(reason) => return Decision::new(reason, pod),
    };
    match link.ethertype {
        packet::IPV4 => match ipv4::parse(frame, link.header_len) {
            Ok(ip) if same(ip.dst, pod.ipv4) => deliver(tables, pod, &ip),
            Ok(_) => Decision::new(Outcome::WrongAddress, pod),
            Err(reason) => Decision::new(reason, pod),
        },
        packet::ARP => match arp::parse(frame, link.header_len) {
            Ok(arp) if same(arp.target, pod.ipv4) => Decision::new(Outcome::Host, pod),
            Ok(_) => Decision::new(Outcome::ArpNotForPod, pod),
            Err(reason) => Decision::new(reason, pod),
        },
        ethertype => Decision::new(packet::refuse(frame, ethertype, link.header_len), pod),
    }
}

#[inline(always)]
fn deliver<'t, T: Tables>(tables: &'t T, pod: &'t Endpoint, ip: &Ipv4) -> Decision<'t> {
    let remark = arrival(tables, pod, ip, Door::Host, reply_door(tables, ip.src));
    Decision { remark, ..Decision::new(Outcome::Host, pod) }
}

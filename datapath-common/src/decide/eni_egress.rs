//! From the node's stack, at the parent ENI: what carries a local pod's source address leaves on that pod's VLAN.
//!
//! Ways: [`Outcome::Untagged`] (not a pod's, or tagged already: untouched), [`Outcome::Wire`] (onto the pod's VLAN, from its
//! MAC on the wire to the gateway's). It never drops: what cannot be read is not ours.

use super::{
    Decision,
    door::{memory, outbound_key, recall, refresh},
};
use crate::{
    abi::{Door, Endpoint, Origin, Outcome},
    packet::{
        self, Frame,
        ipv4::{self, Ipv4, Part},
        link::{self, Tag},
        plain,
    },
    tables::Tables,
};

/// Decides on a frame that leaves by the parent ENI.
#[inline(always)]
pub fn decide<'t, T: Tables, F: Frame + ?Sized>(tables: &'t T, frame: &F, tag: Option<Tag>) -> Decision<'t> {
    decide_plain(tables, frame, tag).unwrap_or_else(|| decide_any(tables, frame, tag))
}

const NOT_OURS: Decision<'_> = Decision::unknown(Outcome::Untagged);

/// As [`decide`], where the frame is plain, or tagged; else `None`.
#[inline(always)]
pub fn decide_plain<'t, T: Tables, F: Frame + ?Sized>(
    tables: &'t T,
    frame: &F,
    tag: Option<Tag>,
) -> Option<Decision<'t>> {
    // Every packet that pod_egress sent comes by here, tagged.
    if tag.is_some() {
        return Some(NOT_OURS);
    }
    let packet = plain::parse::<0, _>(frame)?;
    let Some(pod) = tables.pod_by_ipv4(packet.src) else { return Some(NOT_OURS) };
    Some(tagged(tables, pod, &packet.ip::<0, _>(frame)?))
}

/// As [`decide`], for every frame without a tag beside it.
#[inline(always)]
pub fn decide_any<'t, T: Tables, F: Frame + ?Sized>(
    tables: &'t T,
    frame: &F,
    tag: Option<Tag>,
) -> Decision<'t> {
    let Ok(link) = link::parse(frame, tag) else { return NOT_OURS };
    if link.tagged || link.ethertype != packet::IPV4 {
        return NOT_OURS;
    }
    let Ok(ip) = ipv4::parse(frame, link.header_len) else { return NOT_OURS };
    let Some(pod) = tables.pod_by_ipv4(ip.src) else { return NOT_OURS };
    tagged(tables, pod, &ip)
}

#[inline(always)]
fn tagged<'t, T: Tables>(tables: &'t T, pod: &'t Endpoint, ip: &Ipv4) -> Decision<'t> {
    remember(tables, pod, ip);
    Decision::new(Outcome::Wire, pod)
}

/// The stack may have translated the pod's request: replies go back to it.
#[inline(always)]
fn remember<T: Tables>(tables: &T, pod: &Endpoint, ip: &Ipv4) {
    if matches!(ip.part, Part::Later) {
        return;
    }
    let key = outbound_key(pod, ip);
    match recall(tables, &key) {
        None => tables.remember(&key, &memory(tables, Door::Host, Origin::HostForwarded)),
        Some(known) if known.origin == Origin::HostForwarded as u8 => refresh(tables, &key, known),
        // The pod answers a request that came in by another door.
        Some(_) => {}
    }
}

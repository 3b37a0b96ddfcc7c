//! An exclusive ENI, inside the pod that has it: what comes in and goes out is counted as on a sub-ENI, and what a pod may
//! not say is refused as there. Doors there are none: everything is the wire.

use super::{
    Decision,
    pod_egress::{own_ipv4, own_link, speak_arp},
};
use crate::{
    abi::Outcome,
    packet::{self, Frame, arp, link::Tag},
    tables::Tables,
};

/// Decides, but for limits, on a frame that the pod sends by its interface `ifindex`: [`Outcome::Wire`], [`Outcome::WireArp`], or why not.
#[inline(always)]
pub fn egress<'t, T: Tables, F: Frame + ?Sized>(
    tables: &'t T,
    frame: &F,
    tag: Option<Tag>,
    ifindex: u32,
) -> Decision<'t> {
    let Some(pod) = tables.pod_by_ifindex(ifindex) else {
        return Decision::unknown(Outcome::UnknownPod);
    };
    let link = match own_link(pod, frame, tag) {
        Ok(link) => link,
        Err(reason) => return Decision::new(reason, pod),
    };
    let outcome = match link.ethertype {
        packet::IPV4 => match own_ipv4(pod, frame, &link) {
            Ok(_) => Outcome::Wire,
            Err(reason) => reason,
        },
        packet::ARP => match arp::parse(frame, link.header_len) {
            Ok(arp) => match speak_arp(pod, &arp) {
                // The gateway answers for itself here.
                Outcome::ArpAnswered => Outcome::WireArp,
                outcome => outcome,
            },
            Err(reason) => reason,
        },
        ethertype => packet::refuse(frame, ethertype, link.header_len),
    };
    Decision::new(outcome, pod)
}

/// Counts, whatever the limits, a frame that comes in by the pod's interface `ifindex`. The cloud delivers by MAC and address; there is no VLAN
/// that could lead to the wrong pod.
#[inline(always)]
pub fn ingress<T: Tables>(tables: &T, ifindex: u32) -> Decision<'_> {
    match tables.pod_by_ifindex(ifindex) {
        Some(pod) => Decision::new(Outcome::Wire, pod),
        None => Decision::unknown(Outcome::UnknownPod),
    }
}

//! Doors (ARCHITECTURE.md, "Doors"): a reply leaves through the door that its flow came in by.
//!
//! The default door of a packet is a function of its destination. Where a request came in by another door than its
//! reply would take, the flow is remembered; a new request by the default door forgets it again.

use crate::{
    abi::{Door, Endpoint, Flow, FlowKey, FragmentKey, Origin, Outcome, maps::host_dst},
    packet::{
        ipv4::{Ipv4, Part, TCP},
        l4::Role,
    },
    tables::Tables,
};

/// The flow of a packet that the pod receives. An error may come from a router on the way to the other end.
#[inline(always)]
pub const fn inbound_key(pod: &Endpoint, ip: &Ipv4) -> FlowKey {
    let remote = if matches!(ip.l4.role, Role::Reports) { ip.l4.about } else { ip.src };
    key(pod.id, remote, ip.l4.src_port, ip.l4.dst_port, ip.l4.proto)
}

/// The flow of a packet that the pod sends.
#[inline(always)]
pub const fn outbound_key(pod: &Endpoint, ip: &Ipv4) -> FlowKey {
    key(pod.id, ip.dst, ip.l4.dst_port, ip.l4.src_port, ip.l4.proto)
}

#[inline(always)]
const fn key(id: u32, remote: [u8; 4], remote_port: u16, local_port: u16, proto: u8) -> FlowKey {
    FlowKey { id, remote, remote_port, local_port, proto, pad: [0; 3] }
}

/// The key of a fragmented datagram that the pod sends or receives.
#[inline(always)]
pub(super) const fn fragment_key(pod: &Endpoint, ip: &Ipv4) -> FragmentKey {
    FragmentKey { src: ip.src, dst: ip.dst, id: pod.id, ident: ip.ident, proto: ip.proto, pad: 0 }
}

/// Notes which way the first fragment of a datagram takes, for the later ones. Without a note they take the wire: that
/// one is noted only over an older datagram's note that had the same identification.
#[inline(always)]
pub(super) fn lead<T: Tables>(tables: &T, pod: &Endpoint, ip: &Ipv4, door: Door) {
    if !matches!(ip.part, Part::First) {
        return;
    }
    let key = fragment_key(pod, ip);
    if door as u8 != Door::Wire as u8 || tables.marked(pod.id) && tables.fragment(&key).is_some() {
        tables.remember_fragment(&key, door);
    }
}

/// The memory of a flow, unless it is void.
#[inline(always)]
pub(super) fn recall<'t, T: Tables>(tables: &'t T, key: &FlowKey) -> Option<&'t Flow> {
    let flow = tables.flow(key)?;
    if key.proto == TCP || flow.alive(tables.now()) { Some(flow) } else { None }
}

/// The door that a pod's reply to `remote` takes when nothing is remembered.
///
/// The fast path counts as the default towards every pod of the node, even where it is switched off: the memory then
/// stands when it is switched on.
#[inline(always)]
pub(super) fn reply_door<T: Tables>(tables: &T, remote: [u8; 4]) -> Door {
    if tables.pod_by_ipv4(remote).is_some() {
        Door::Local
    } else if tables.host_dst(remote) & host_dst::HOST != 0 {
        Door::Host
    } else {
        Door::Wire
    }
}

/// Remembers, or forgets, as a packet reaches `pod` by door `arrived` whose reply would take `default`. Returns the
/// remark to count.
#[inline(always)]
pub(super) fn arrival<T: Tables>(
    tables: &T,
    pod: &Endpoint,
    ip: &Ipv4,
    arrived: Door,
    default: Door,
) -> Option<Outcome> {
    if matches!(ip.part, Part::Later) || matches!(ip.l4.role, Role::Reports) {
        return None;
    }
    let opens = matches!(ip.l4.role, Role::Opens | Role::Either);
    if default as u8 == arrived as u8 {
        if opens && tables.marked(pod.id) {
            let key = inbound_key(pod, ip);
            if recall(tables, &key).is_some() {
                tables.forget(&key);
            }
        }
        return None;
    }
    let key = inbound_key(pod, ip);
    let known = recall(tables, &key);
    let Some(known) = known else {
        tables.remember(&key, &memory(tables, arrived, Origin::Inbound));
        let lost = matches!(ip.l4.role, Role::Continues);
        return Some(if lost { Outcome::FlowRelearned } else { Outcome::FlowRemembered });
    };
    if known.door == arrived as u8 && known.origin == Origin::Inbound as u8 {
        refresh(tables, &key, known);
    } else if opens {
        tables.remember(&key, &memory(tables, arrived, Origin::Inbound));
        return Some(Outcome::FlowRemembered);
    }
    None
}

/// Whether a flow of which a packet would reach `to` by the fast path began on the wire, and the packet does not begin it anew.
/// The VPC knows such a flow, and judges it only as long as it sees both directions.
#[inline(always)]
pub(super) fn stays_on_the_wire<T: Tables>(tables: &T, to: &Endpoint, ip: &Ipv4) -> bool {
    if !tables.marked(to.id) || matches!(ip.l4.role, Role::Opens | Role::Either) {
        return false;
    }
    let known = recall(tables, &inbound_key(to, ip));
    known.is_some_and(|known| known.door == Door::Wire as u8 && known.origin == Origin::Inbound as u8)
}

/// Writes a memory again for its time stamp's sake: only where that matters, and not for every packet.
#[inline(always)]
pub(super) fn refresh<T: Tables>(tables: &T, key: &FlowKey, known: &Flow) {
    if key.proto == TCP {
        return;
    }
    let seen = tables.now();
    if seen.wrapping_sub(known.seen) >= Flow::REFRESH {
        tables.remember(key, &Flow { door: known.door, origin: known.origin, pad: [0; 2], seen });
    }
}

#[inline(always)]
pub(super) fn memory<T: Tables>(tables: &T, door: Door, origin: Origin) -> Flow {
    Flow { door: door as u8, origin: origin as u8, pad: [0; 2], seen: tables.now() }
}

//! Programs on their hooks: really there, ours, and before all others.

use std::path::Path;

use datapath_common::abi::Endpoint;

use super::{Checks, ExpectedParent, ExpectedPod, Kind, Seen};
use crate::{
    attach::CLSACT_PRIORITY,
    feature::TcKind,
    netlink::Netlink,
    object::program,
    pin::{Hook, Pins},
    sys,
};

/// A hook of an interface of the calling thread's namespace, and what belongs there.
struct Place<'a> {
    interface: &'a str,
    ifindex: u32,
    hook: Hook,
    program: &'static str,
    pin: &'a Path,
}

pub(super) async fn parent(
    checks: &mut Checks,
    netlink: &Netlink,
    kind: TcKind,
    pins: &Pins,
    parent: &ExpectedParent,
    ifindex: u32,
    seen: &Seen<'_>,
) {
    let interface = parent.interface.as_str();
    for (program, hook) in [(program::ENI_INGRESS, Hook::In), (program::ENI_EGRESS, Hook::Out)] {
        let pin = &pins.parent_tc(interface, hook);
        tc(checks, netlink, kind, Place { interface, ifindex, hook, program, pin }).await;
    }
    let Some(generic) = parent.xdp_generic else { return };
    let mode = |native: bool| if native { "native" } else { "generic" };
    let what = format!("XDP of {interface}");
    let expected = format!("{}, {}", program::ENI_XDP, mode(!generic));
    let attached = seen.links.get(interface).and_then(|link| link.xdp);
    match (sys::link_info(&pins.parent_xdp(interface, generic)), attached) {
        (Err(error), _) => {
            checks.holds(false, Kind::Attachment, what, expected, format_args!("no link: {error}"));
        }
        (Ok(_), None) => checks.holds(false, Kind::Attachment, what, expected, "nothing attached"),
        (Ok(info), Some(xdp)) => {
            let holds = info.ifindex == ifindex && info.prog_id == xdp.program && xdp.native != generic;
            let found = format!("program {}, {}", xdp.program, mode(xdp.native));
            checks.holds(holds, Kind::Attachment, what, expected, found);
        }
    }
}

pub(super) async fn pod(
    checks: &mut Checks,
    netlink: &Netlink,
    kind: TcKind,
    pins: &Pins,
    pod: &ExpectedPod,
    record: &Endpoint,
) {
    for (program, hook) in [(program::POD_EGRESS, Hook::In), (program::POD_INGRESS, Hook::Out)] {
        let pin = &pins.pod_tc(record.ifindex, hook);
        let (interface, ifindex) = (pod.host_interface.as_str(), record.ifindex);
        tc(checks, netlink, kind, Place { interface, ifindex, hook, program, pin }).await;
    }
}

/// In the pod's namespace.
pub(super) async fn nic(
    checks: &mut Checks,
    netlink: &Netlink,
    kind: TcKind,
    pins: &Pins,
    interface: &str,
    record: &Endpoint,
) {
    for (program, hook) in [(program::NIC_INGRESS, Hook::In), (program::NIC_EGRESS, Hook::Out)] {
        let pin = &pins.pod_tc(record.ifindex, hook);
        tc(checks, netlink, kind, Place { interface, ifindex: record.ifindex, hook, program, pin }).await;
    }
}

async fn tc(checks: &mut Checks, netlink: &Netlink, kind: TcKind, place: Place<'_>) {
    let what = format!("tc {} of {}", place.hook, place.interface);
    // Filters of others keep their priorities.
    let expected = match kind {
        TcKind::Tcx => format!("{}, before all others", place.program),
        TcKind::Clsact => place.program.to_owned(),
    };
    let found = match kind {
        TcKind::Tcx => tcx(&place),
        TcKind::Clsact => clsact(netlink, &place).await,
    };
    checks.holds(found.is_ok(), Kind::Attachment, what, expected, found.err().unwrap_or_default());
}

/// What is there instead.
fn tcx(place: &Place<'_>) -> Result<(), String> {
    let info =
        sys::link_info(place.pin).map_err(|error| format!("no link at {}: {error}", place.pin.display()))?;
    if info.ifindex != place.ifindex {
        return Err("a link that is attached to no interface, or to another".to_owned());
    }
    let programs = sys::tcx_programs(place.ifindex, place.hook).map_err(|error| error.to_string())?;
    match programs.iter().position(|program| *program == info.prog_id) {
        None => Err("nothing of ours".to_owned()),
        Some(0) => Ok(()),
        Some(at) => Err(format!("{}, after program {}", place.program, programs[at - 1])),
    }
}

async fn clsact(netlink: &Netlink, place: &Place<'_>) -> Result<(), String> {
    let filters = netlink.filters(place.ifindex, place.hook).await.map_err(|error| error.to_string())?;
    let ours = filters.iter().find(|filter| filter.priority == CLSACT_PRIORITY);
    match ours.map(|filter| filter.name.as_deref().unwrap_or("?")) {
        None => Err("no filter of ours".to_owned()),
        Some(name) if name != place.program => Err(format!("program {name}")),
        Some(_) => Ok(()),
    }
}

/// Whether a link is attached to an interface, and its program stands before all others.
pub(crate) fn is_first(pin: &Path, interface: &str, ifindex: u32, hook: Hook, program: &'static str) -> bool {
    tcx(&Place { interface, ifindex, hook, program, pin }).is_ok()
}

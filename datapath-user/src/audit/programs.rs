//! Programs on their hooks: really there, ours, and before all others.

use std::path::Path;

use super::{Checks, ExpectedParent, Kind, Seen};
use crate::{
    attach::{self, CLSACT_PRIORITY, Programs},
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
    for (program, hook) in attach::PARENT.all() {
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

/// A pod's programs, on its host side or on an ENI of its own. To be called where that interface is.
pub(super) async fn pod(
    checks: &mut Checks,
    netlink: &Netlink,
    kind: TcKind,
    pins: &Pins,
    programs: Programs,
    interface: &str,
    ifindex: u32,
) {
    for (program, hook) in programs.all() {
        let pin = &pins.pod_tc(ifindex, hook);
        tc(checks, netlink, kind, Place { interface, ifindex, hook, program, pin }).await;
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
    match standing(place.pin, place.ifindex, place.hook)? {
        None => Ok(()),
        Some(before) => Err(format!("{}, after program {before}", place.program)),
    }
}

/// The program that a link's program stands after on its hook, if any.
fn standing(pin: &Path, ifindex: u32, hook: Hook) -> Result<Option<u32>, String> {
    let info = sys::link_info(pin).map_err(|error| format!("no link at {}: {error}", pin.display()))?;
    if info.ifindex != ifindex {
        return Err("a link that is attached to no interface, or to another".to_owned());
    }
    let programs = sys::tcx_programs(ifindex, hook).map_err(|error| error.to_string())?;
    match programs.iter().position(|program| *program == info.prog_id) {
        None => Err("nothing of ours".to_owned()),
        Some(at) => Ok(at.checked_sub(1).map(|before| programs[before])),
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
pub(crate) fn is_first(pin: &Path, ifindex: u32, hook: Hook) -> bool {
    standing(pin, ifindex, hook) == Ok(None)
}

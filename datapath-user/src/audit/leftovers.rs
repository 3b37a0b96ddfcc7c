//! What eniway made and nobody needs any more: pins without a pod, veths without a pod. What others made is none of it.

use std::collections::BTreeSet;

use datapath_common::abi::maps;

use super::{Checks, Expected, Kind, Seen};
use crate::{
    pin::{PinError, Pins},
    wiring,
};

pub(super) fn checks(expected: &Expected, pins: &Pins, seen: &Seen<'_>) -> Result<Checks, PinError> {
    let mut checks = Checks::default();
    let live: BTreeSet<u32> = expected.pods.iter().filter_map(|pod| Some(pod.live?.record.ifindex)).collect();
    for ifindex in pins.pinned_pods()? {
        let what = format!("links of interface {ifindex}");
        checks.holds(live.contains(&ifindex), Kind::Pin, what, "none", "pinned, without a pod");
    }
    for parent in pins.pinned_parents()? {
        let known = expected.parents.iter().any(|known| known.interface == parent);
        let what = format!("links of {parent}");
        checks.holds(known, Kind::Pin, what, "none", "pinned, and no [[parent]] of the configuration");
    }
    for name in pins.unknown_maps() {
        checks.holds(false, Kind::Pin, format_args!("map {name}"), "none", "pinned, and not of this version");
    }

    let named: BTreeSet<&str> = expected
        .pods
        .iter()
        .map(|pod| pod.host_interface.as_str())
        .chain(expected.also_wired.iter().map(String::as_str))
        .collect();
    for link in seen.host.links.iter().filter(|link| wiring::is_ours(link)) {
        let holds = named.contains(link.name.as_str());
        let alias = link.alias.as_deref().unwrap_or_default();
        checks.holds(holds, Kind::Link, &link.name, "none", format_args!("`{alias}`, without a pod"));
    }
    Ok(checks)
}

/// Pins of maps that are gone. Programs and the agent still use the maps.
pub(super) fn missing(pins: &Pins) -> Checks {
    let mut checks = Checks::default();
    for name in maps::ALL {
        let pin = pins.map(name);
        checks.holds(pin.exists(), Kind::Pin, format_args!("map {name}"), pin.display(), "no pin");
    }
    checks
}

//! A pod: its veth on the node's side, and everything inside.

use std::net::Ipv4Addr;

use datapath_common::abi::Endpoint;

use super::{Checks, Depth, ExpectedPod, Kind, Seen, programs};
use crate::{
    attach,
    attachment::Route,
    ethtool::{self, Offload},
    feature::TcKind,
    net::{Mac, mac_text},
    netlink::{self, Link, MAIN, Neighbour, Netlink},
    netns::Namespace,
    pin::Pins,
    sysctl,
    wiring::{self, PodSpec, WiringError},
};

fn state(up: bool) -> &'static str {
    if up { "up" } else { "down" }
}

/// A neighbour that should stand for ever.
pub(super) fn check_neighbour(
    checks: &mut Checks,
    address: Ipv4Addr,
    mac: [u8; 6],
    found: Option<&Neighbour>,
) {
    let text = match found {
        None => "none".to_owned(),
        Some(it) if !it.permanent => format!("{}, not permanent", mac_text(it.mac)),
        Some(it) => mac_text(it.mac),
    };
    let holds = found.is_some_and(|it| it.permanent && it.mac == Some(mac));
    checks.holds(holds, Kind::Neighbour, format_args!("neighbour {address}"), Mac(mac), text);
}

/// The node's side of a pod's veth. What is found by its name only, without the pod's namespace, is all of it.
pub fn host_side(checks: &mut Checks, pod: &ExpectedPod, record: &Endpoint, seen: &Seen<'_>, depth: Depth) {
    let name = pod.host_interface.as_str();
    let Some(link) = seen.links.get(name) else {
        let what = if name.is_empty() { "host side" } else { name };
        let expected = format!("interface index {}", record.ifindex);
        return checks.holds(false, Kind::Link, what, expected, "no such interface");
    };
    check_host_link(checks, link, record);
    let address = Ipv4Addr::from(record.ipv4);
    let route = (MAIN, address.into(), link.index, None);
    let holds = seen.routes.contains(&route);
    checks.holds(holds, Kind::Route, format_args!("route to {address}"), format_args!("dev {name}"), "none");
    seen.neighbour(checks, link.index, address, record.mac);
    if let Some(spec) = &pod.spec
        && wiring::is_own_name(name)
    {
        let found = link.alias.as_deref().unwrap_or("none");
        checks.equal(Kind::Link, format_args!("alias of {name}"), wiring::alias(spec).as_str(), found);
    }
    if depth == Depth::Everything {
        for (key, value) in wiring::host_settings(name) {
            check_sysctl(checks, &key, value);
        }
    }
}

/// What the kernel itself tells of a host side: asked after each event, too.
pub fn check_host_link(checks: &mut Checks, link: &Link, record: &Endpoint) {
    let name = link.name.as_str();
    checks.equal(Kind::Link, format_args!("interface index of {name}"), record.ifindex, link.index);
    checks.equal(Kind::Link, format_args!("state of {name}"), "up", state(link.up));
    let mac = mac_text(Some(record.gateway_mac));
    checks.equal(Kind::Link, format_args!("MAC of {name}"), mac, mac_text(link.mac));
    checks.equal(Kind::Mtu, format_args!("MTU of {name}"), u32::from(record.mtu), link.mtu);
}

/// A setting; one that the kernel does not have is as good.
pub(super) fn check_sysctl(checks: &mut Checks, key: &[&str], value: &str) {
    let what = format!("net.{}", key.join("."));
    match sysctl::get(key) {
        Ok(None) => {}
        // The kernel separates by tabs what is written with blanks.
        Ok(Some(found)) => {
            let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            checks.equal(Kind::Sysctl, what, words(value), words(&found));
        }
        Err(error) => checks.holds(false, Kind::Sysctl, what, value, error),
    }
}

/// Whether all that [`wiring::wire`] sets up inside is so. To be called in the pod's namespace.
///
/// # Errors
///
/// When the kernel does not list what is there.
pub async fn inside(spec: &PodSpec) -> Result<Checks, WiringError> {
    let netlink = Netlink::open()?;
    let mut checks = Checks::default();
    let name = spec.interface.as_str();
    let Some(link) = netlink.find_link(name).await? else {
        checks.holds(false, Kind::Link, name, "an interface of the pod", "no such interface");
        return Ok(checks);
    };
    let mac = mac_text(Some(spec.mac));
    checks.equal(Kind::Link, format_args!("MAC of {name}"), mac, mac_text(link.mac));
    checks.equal(Kind::Link, format_args!("state of {name}"), "up", state(link.up));
    checks.equal(Kind::Mtu, format_args!("MTU of {name}"), u32::from(spec.mtu), link.mtu);
    let lo = netlink.find_link("lo").await?.is_some_and(|lo| lo.up);
    checks.equal(Kind::Link, "state of lo", "up", state(lo));
    match ethtool::get(name, Offload::Gro) {
        Ok(on) => checks.holds(on, Kind::Offload, format_args!("gro of {name}"), "on", "off"),
        Err(error) => checks.holds(false, Kind::Offload, format_args!("gro of {name}"), "on", error),
    }
    let has = netlink.addresses().await?.contains(&spec.ipv4.into());
    checks.holds(has, Kind::Address, format_args!("address of {name}"), spec.ipv4, "none such");

    let neighbours = netlink.neighbours().await?;
    let found = neighbours.iter().find(|it| it.output == link.index && it.address == spec.gateway);
    check_neighbour(&mut checks, spec.gateway, spec.gateway_mac, found);
    routes_inside(&mut checks, spec, &link, &netlink.routes().await?);

    check_sysctl(&mut checks, &["ipv6", "conf", name, "accept_ra"], "0");
    for (key, value) in &spec.extras.sysctls {
        let parts: Vec<&str> = key.iter().map(String::as_str).collect();
        check_sysctl(&mut checks, &parts, value);
    }
    Ok(checks)
}

/// A veth that another made may have routes of its own to the same destinations, which stay.
fn routes_inside(checks: &mut Checks, spec: &PodSpec, link: &Link, routes: &[netlink::Route]) {
    let foreign = spec.host_interface.as_deref().is_some_and(|name| !wiring::is_own_name(name));
    let mut check = |what: String, destination, gateway: Option<Ipv4Addr>| {
        let expected = match gateway {
            Some(gateway) => format!("via {gateway} dev {}", link.name),
            None => format!("dev {}", link.name),
        };
        let mut same = routes.iter().filter(|it| it.table == MAIN && it.destination == destination);
        let holds = same.clone().any(|it| foreign || it.output == link.index && it.gateway == gateway);
        let found = same.next().map_or_else(
            || "none".to_owned(),
            |it| match it.gateway {
                Some(gateway) => format!("via {gateway} by interface {}", it.output),
                None => format!("by interface {}", it.output),
            },
        );
        checks.holds(holds, Kind::Route, what, expected, found);
    };
    check(format!("route to the gateway {}", spec.gateway), spec.gateway.into(), None);
    check("default route".to_owned(), ipnet::Ipv4Net::default(), Some(spec.gateway));
    for Route { destination, gateway } in &spec.extras.routes {
        let gateway = gateway.unwrap_or(spec.gateway);
        check(format!("route to {destination}"), destination.trunc(), Some(gateway));
    }
}

/// Everything inside a pod, programs on an ENI of its own among it. What cannot be looked at is a finding.
pub(super) async fn whole_inside(pod: &ExpectedPod, kind: TcKind, pins: &Pins) -> Checks {
    let mut failed = Checks::default();
    let (Some(spec), Some(live)) = (&pod.spec, &pod.live) else { return failed };
    let Some(path) = &spec.netns else { return failed };
    let (wanted, record, pins) = (spec.clone(), live.record, pins.clone());
    let exclusive = pod.is_exclusive();
    let work = async move || -> Result<Checks, WiringError> {
        let mut checks = inside(&wanted).await?;
        if exclusive {
            let netlink = Netlink::open()?;
            let (interface, ifindex) = (wanted.interface.as_str(), record.ifindex);
            programs::pod(&mut checks, &netlink, kind, &pins, attach::NIC, interface, ifindex).await;
        }
        Ok(checks)
    };
    let looked = match Namespace::open(path) {
        Ok(namespace) => namespace.run(work).await.map_err(WiringError::from).flatten(),
        Err(error) => Err(error.into()),
    };
    looked.unwrap_or_else(|error| {
        failed.holds(false, Kind::Link, "inside of the pod", "can be looked at", error);
        failed
    })
}

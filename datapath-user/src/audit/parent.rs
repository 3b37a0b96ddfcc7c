//! A parent ENI, and the node's routing for the pods behind it.

use super::{Checks, ExpectedParent, Kind, Seen, pod::check_sysctl};
use crate::{
    ethtool::{self, Offload},
    netlink::DisplayRule,
    wiring::parent::{RULE_MAIN, RULE_PARENT, TABLES, rules, settings},
};

/// Everything of a parent but its programs.
pub fn checks(parent: &ExpectedParent, seen: &Seen<'_>) -> Checks {
    let mut checks = Checks::default();
    let name = parent.interface.as_str();
    let Some(link) = seen.links.get(name) else {
        checks.holds(false, Kind::Link, name, "a parent ENI", "no such interface");
        return checks;
    };
    let text = |index: Option<u32>| index.map_or_else(|| "none".to_owned(), |index| index.to_string());
    let (wanted, found) = (text(parent.ifindex), text(Some(link.index)));
    checks.equal(Kind::Link, format_args!("interface index of {name}"), wanted, found);
    checks.holds(link.up, Kind::Link, format_args!("state of {name}"), "up", "down");
    if link.up {
        let carrier = format_args!("carrier of {name}");
        checks.holds(link.carrier, Kind::Carrier, carrier, "present", "none");
    }
    let least = format_args!("at least {}", parent.mtu);
    checks.holds(link.mtu >= parent.mtu, Kind::ParentMtu, format_args!("MTU of {name}"), least, link.mtu);
    for (key, value) in settings(name) {
        check_sysctl(&mut checks, &key, value);
    }
    if parent.rxvlan_off {
        match ethtool::get(name, Offload::RxVlan) {
            Ok(on) => checks.holds(!on, Kind::Offload, format_args!("rxvlan of {name}"), "off", "on"),
            Err(error) => checks.holds(false, Kind::Offload, format_args!("rxvlan of {name}"), "off", error),
        }
    }
    routing(&mut checks, parent, link.index, seen);
    checks
}

fn routing(checks: &mut Checks, parent: &ExpectedParent, index: u32, seen: &Seen<'_>) {
    for &(subnet, gateway, mac) in &parent.gateways {
        seen.neighbour(checks, index, gateway, mac);
        let mut tables = seen.host.routes.iter().filter(|route| {
            TABLES.contains(&route.table)
                && route.destination.prefix_len() == 0
                && route.output == index
                && route.gateway == Some(gateway)
        });
        let table = tables.next().map(|route| route.table);
        let expected =
            format_args!("via {gateway} dev {} in a table from {}", parent.interface, TABLES.start);
        checks.holds(
            table.is_some(),
            Kind::Route,
            format_args!("default route of {subnet}"),
            expected,
            "none",
        );
        let Some(table) = table else { continue };
        for rule in rules(subnet.trunc(), table) {
            let holds = seen.host.rules.contains(&rule);
            checks.holds(holds, Kind::Rule, "rule", DisplayRule(rule), "none");
        }
    }
}

/// Rules of ours for which there is no parent any more.
pub(super) fn stale_rules(checks: &mut Checks, parents: &[ExpectedParent], seen: &Seen<'_>) {
    let ours = seen.host.rules.iter().filter(|rule| [RULE_MAIN, RULE_PARENT].contains(&rule.priority));
    // While a parent is away, or its subnets are not known yet, its rules wait for it.
    if parents.iter().any(|parent| parent.ifindex.is_none() || parent.gateways.is_empty()) {
        return;
    }
    for rule in ours {
        let known =
            parents.iter().flat_map(|parent| &parent.gateways).any(|(net, ..)| net.trunc() == rule.source);
        checks.holds(known, Kind::Rule, "rule", "none for this subnet", DisplayRule(*rule));
    }
}

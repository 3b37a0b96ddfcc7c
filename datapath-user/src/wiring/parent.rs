//! What the node itself needs on a parent ENI: settings, and routes by it for what its stack forwards in a pod's name.
//!
//! What the node's stack forwards with a pod's source (a pod's packet to a Service, once translated) must leave by
//! the pod's parent, where it is tagged, and by no other interface of the node: the VPC would take it for spoofed.
//! `pod_egress` marks those packets. Replies to what came in by the stack (a node port) have a pod's source, too, until
//! the stack has translated it back, which is after routing; they go back by the node's own routes.
//!
//! ```text
//!   2100: from <subnet> fwmark 0x1000/0x1000 lookup main suppress_prefixlength 31     routes to this node's pods
//!   2101: from <subnet> fwmark 0x1000/0x1000 lookup 2100     default via <gateway> dev <parent> onlink
//! ```
//!
//! A further subnet whose gateway or parent is another takes the next free table. Everything is found again in the
//! kernel; nothing is written down elsewhere.

use std::{io, net::Ipv4Addr};

use datapath_common::abi::maps::SERVICE_MARK;
use ipnet::Ipv4Net;

use super::{WiringError, check_name};
use crate::{
    net::Mac,
    netlink::{DisplayRule, Existing, Link, MAIN, Netlink, NetlinkError, Route, SourceRule},
    settings::{NodeChange, Settings},
};

/// A parent ENI to be prepared.
#[derive(Debug, Clone)]
pub struct ParentSpec {
    /// Its name.
    pub interface: String,
    /// The subnets of the pods behind it, with gateway and the gateway's MAC.
    pub gateways: Vec<(Ipv4Net, Ipv4Addr, [u8; 6])>,
    /// Whether it gets a fair queue.
    pub fair_queue: bool,
}

/// A prepared parent ENI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// Whether VLAN tags reach XDP: read back from the driver, not assumed.
    pub rxvlan_off: bool,
    /// What eniway holds changed on the node for this parent, for people to read.
    pub changes: Vec<NodeChange>,
    /// Why it has not the fair queue that it shall have.
    pub queue_fault: Option<String>,
}

/// Priority of the rule that sends a pod's packets to Services to the routes of this node's pods first.
pub(crate) const RULE_MAIN: u32 = 2100;
/// Priority of the rule that sends the rest of them to the parent.
pub(crate) const RULE_PARENT: u32 = 2101;
/// The first table of those with a default route by a parent, and how many there may be.
pub(crate) const TABLES: std::ops::Range<u32> = 2100..2164;

/// Readies a parent ENI and the node's routing for the pods behind it. Idempotent; rules of subnets that are no
/// longer among the gateways are removed. Without any gateway the routing stays as it is: an agent that starts does
/// not know the subnets yet, and the pods of the one before it still use theirs.
pub async fn prepare(spec: &ParentSpec, known: &mut Settings) -> Result<Prepared, WiringError> {
    check_name(&spec.interface)?;
    let netlink = Netlink::open()?;
    let name = spec.interface.as_str();
    let mut changes = Vec::new();
    changes.extend(known.up(&netlink, name).await?);
    let link = netlink.link(name).await?;
    for (key, value) in settings(name) {
        changes.push(known.sysctl(&key, value, key.contains(&name).then_some(name))?);
    }
    let rxvlan = known.rxvlan_off(name)?;
    let rxvlan_off = rxvlan.is_some();
    changes.extend(rxvlan);
    let mut queue_fault = None;
    if spec.fair_queue {
        match netlink.set_fair_queue(&link).await {
            Ok(was) => changes.push(NodeChange { what: format!("{name}: fair queue (fq)"), was }),
            Err(error) => queue_fault = Some(format!("{error}; what is beyond a pod's limit is dropped")),
        }
    }
    if !spec.gateways.is_empty() {
        changes.extend(route_by_parent(&netlink, spec, &link).await?);
    }
    Ok(Prepared { rxvlan_off, changes, queue_fault })
}

/// Kernel settings that pods behind a parent need: the node forwards for them, and does not mind by which interface a
/// packet comes.
pub(crate) fn settings(parent: &str) -> [(Vec<&str>, &'static str); 2] {
    [(vec!["ipv4", "ip_forward"], "1"), (vec!["ipv4", "conf", parent, "rp_filter"], "2")]
}

async fn route_by_parent(
    netlink: &Netlink,
    spec: &ParentSpec,
    link: &Link,
) -> Result<Vec<NodeChange>, WiringError> {
    let mut changes = Vec::new();
    let mut kept = Vec::new();
    for &(subnet, gateway, gateway_mac) in &spec.gateways {
        let subnet = subnet.trunc();
        netlink.set_neighbour(link, gateway, gateway_mac).await?;
        let neighbour = format!("{}: neighbour {gateway} at {}", link.name, Mac(gateway_mac));
        changes.push(NodeChange::new(neighbour));
        let table = table_for(&netlink.own_default_routes().await?, link.index, gateway)?;
        netlink.add_default_route(gateway, link, table, Existing::Replace).await?;
        let route = format!("table {table}: default via {gateway} dev {} onlink", link.name);
        changes.push(NodeChange::new(route));
        for rule in rules(subnet, table) {
            netlink.add_rule(rule).await?;
            changes.push(NodeChange::new(format!("rule {}", DisplayRule(rule))));
            kept.push(rule);
        }
    }
    remove_rules(netlink, link.index, &kept).await?;
    for route in parent_routes(netlink, link.index).await? {
        if !kept.iter().any(|rule| rule.table == route.table) {
            netlink.delete_route(route).await?;
        }
    }
    Ok(changes)
}

pub(crate) fn rules(source: Ipv4Net, table: u32) -> [SourceRule; 2] {
    let parent = SourceRule { priority: RULE_PARENT, source, table, suppress: None, mark: SERVICE_MARK };
    [SourceRule { priority: RULE_MAIN, table: MAIN, suppress: Some(31), ..parent }, parent]
}

/// The table that has this default route already, or the first free one.
fn table_for(routes: &[Route], parent: u32, gateway: Ipv4Addr) -> Result<u32, WiringError> {
    let own = routes.iter().find(|route| {
        TABLES.contains(&route.table) && route.output == parent && route.gateway == Some(gateway)
    });
    own.map(|route| route.table)
        .or_else(|| TABLES.clone().find(|table| routes.iter().all(|route| route.table != *table)))
        .ok_or_else(|| {
            NetlinkError::Request {
                what: format!("find a free routing table of {} to {}", TABLES.start, TABLES.end - 1),
                source: io::ErrorKind::StorageFull.into(),
            }
            .into()
        })
}

async fn parent_routes(netlink: &Netlink, parent: u32) -> Result<Vec<Route>, WiringError> {
    let mut routes = netlink.own_default_routes().await?;
    routes.retain(|route| route.output == parent && TABLES.contains(&route.table));
    Ok(routes)
}

/// Removes the rules that lead to a parent's tables, and with them those of the same subnet for the main table, but
/// for those that are kept.
async fn remove_rules(netlink: &Netlink, parent: u32, kept: &[SourceRule]) -> Result<(), WiringError> {
    let tables: Vec<u32> = parent_routes(netlink, parent).await?.iter().map(|route| route.table).collect();
    let rules = netlink.source_rules().await?;
    let leading = rules.iter().filter(|rule| rule.priority == RULE_PARENT && tables.contains(&rule.table));
    for rule in leading.filter(|rule| !kept.contains(rule)) {
        netlink.delete_rule(*rule).await?;
        let [main, _] = self::rules(rule.source, rule.table);
        let shared = kept.contains(&main)
            || rules.iter().any(|other| {
                other.priority == RULE_PARENT && other.source == rule.source && other.table != rule.table
            });
        if !shared {
            netlink.delete_rule(main).await?;
        }
    }
    Ok(())
}

/// Takes back what [`prepare`] did to the node's routing for this parent, and to its queue: rules, routes, neighbours. Settings
/// and offloads: [`Settings::restore`]. A parent that is gone took everything but the rules with it.
pub async fn restore(interface: &str) -> Result<(), WiringError> {
    let netlink = Netlink::open()?;
    let Some(link) = netlink.find_link(interface).await? else {
        return remove_dead_rules(&netlink).await;
    };
    remove_rules(&netlink, link.index, &[]).await?;
    for route in parent_routes(&netlink, link.index).await? {
        netlink.delete_route(route).await?;
    }
    netlink.delete_own_neighbours(&link).await?;
    netlink.reset_fair_queue(&link).await?;
    remove_dead_rules(&netlink).await
}

/// Removes rules that lead to tables without a route, as are left when a parent was taken away.
async fn remove_dead_rules(netlink: &Netlink) -> Result<(), WiringError> {
    let routes = netlink.own_default_routes().await?;
    let rules = netlink.source_rules().await?;
    let alive = |rule: &SourceRule| routes.iter().any(|route| route.table == rule.table);
    let parent_rules = || rules.iter().filter(|rule| rule.priority == RULE_PARENT);
    for rule in parent_rules().filter(|rule| TABLES.contains(&rule.table) && !alive(rule)) {
        netlink.delete_rule(*rule).await?;
        if !parent_rules().any(|other| other.source == rule.source && alive(other)) {
            let [main, _] = self::rules(rule.source, rule.table);
            netlink.delete_rule(main).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{super::tests::*, *};
    use crate::{
        ethtool::{self, Offload},
        sysctl,
    };

    #[test]
    fn a_subnet_keeps_its_table_and_a_new_one_takes_a_free_one() {
        let gateway = Ipv4Addr::new(10, 1, 16, 1);
        let route =
            |table, output| Route { table, destination: Ipv4Net::default(), output, gateway: Some(gateway) };
        let routes = [route(2100, 5)];
        assert_eq!(table_for(&[], 5, gateway).unwrap(), 2100);
        assert_eq!(table_for(&routes, 5, gateway).unwrap(), 2100);
        assert_eq!(table_for(&routes, 6, gateway).unwrap(), 2101);
        assert_eq!(table_for(&routes, 5, Ipv4Addr::new(10, 1, 20, 1)).unwrap(), 2101);
        let full: Vec<_> = TABLES.map(|table| route(table, 1)).collect();
        assert!(table_for(&full, 5, gateway).is_err());
    }

    #[test]
    fn parents_are_prepared_and_restored() {
        on_a_node(async || {
            let netlink = Netlink::open().unwrap();
            add_parent(&netlink, "eth1").await;
            add_parent(&netlink, "eth2").await;
            let before = netlink.source_rules().await.unwrap();
            let [a, b]: [Ipv4Net; 2] = ["10.1.16.0/22", "10.1.20.0/22"].map(|net| net.parse().unwrap());
            let gateway = |net: Ipv4Net| (net, net.hosts().next().unwrap(), MAC_OF_GATEWAY);
            let one = ParentSpec {
                interface: "eth1".to_owned(),
                gateways: vec![gateway(a), gateway(b)],
                fair_queue: false,
            };
            let two = ParentSpec {
                interface: "eth2".to_owned(),
                gateways: vec![gateway("10.2.0.0/16".parse().unwrap())],
                fair_queue: false,
            };
            let dir = std::env::temp_dir().join(format!("eniway-parent-{}", std::process::id()));
            let known = &mut Settings::load(&dir).unwrap();
            let prepared = prepare(&one, known).await.unwrap();
            assert!(prepared.rxvlan_off);
            assert!(!ethtool::get("eth1", Offload::RxVlan).unwrap());
            assert!(
                prepared.changes.iter().any(|change| change.to_string() == "eth1: rxvlan off (was on)"),
                "{prepared:?}"
            );
            prepare(&two, known).await.unwrap();
            prepare(&one, known).await.unwrap();
            let rules = netlink.source_rules().await.unwrap();
            assert_eq!(rules.len(), 6, "{rules:?}");
            let mut tables: Vec<_> =
                netlink.own_default_routes().await.unwrap().iter().map(|route| route.table).collect();
            tables.sort_unstable();
            assert_eq!(tables, [2100, 2101, 2102]);

            let less = ParentSpec { gateways: vec![gateway(b)], ..one.clone() };
            prepare(&less, known).await.unwrap();
            prepare(&ParentSpec { gateways: vec![], ..one.clone() }, known).await.unwrap();
            let rules = netlink.source_rules().await.unwrap();
            assert!(rules.iter().all(|rule| rule.source != a), "{rules:?}");
            assert_eq!(rules.len(), 4);

            // The next agent knows what was, though it finds everything so already.
            let mut next = Settings::load(&dir).unwrap();
            let again = prepare(&one, &mut next).await.unwrap();
            let is = |what: &str| again.changes.iter().any(|change| change.to_string() == what);
            assert!(is("eth1: rxvlan off (was on)") && is("eth1: up (was down)"), "{again:?}");
            assert!(is("net.ipv4.ip_forward = 1 (was 0)"), "{again:?}");
            // Somebody else has changed it since, and keeps it.
            let rp_filter: sysctl::Key<'_> = &["ipv4", "conf", "eth2", "rp_filter"];
            sysctl::set(rp_filter, "1").unwrap();
            let left = next.restore().await;
            assert!(matches!(left.as_slice(), [one] if one.contains("eth2.rp_filter is 1")), "{left:?}");
            assert_eq!(sysctl::get(rp_filter).unwrap().as_deref(), Some("1"));
            assert_eq!(sysctl::get(&["ipv4", "ip_forward"]).unwrap().as_deref(), Some("0"));
            assert!(ethtool::get("eth1", Offload::RxVlan).unwrap());
            assert!(!netlink.link("eth1").await.unwrap().up);
            assert!(next.restore().await.is_empty());
            prepare(&ParentSpec { gateways: vec![gateway(b)], ..one.clone() }, known).await.unwrap();
            prepare(&two, known).await.unwrap();

            restore("eth1").await.unwrap();
            assert_eq!(netlink.source_rules().await.unwrap().len(), 2);
            // Taken away: its route is gone, the rules are not.
            let eth2 = netlink.link("eth2").await.unwrap();
            netlink.delete_link(&eth2).await.unwrap();
            restore("eth2").await.unwrap();
            assert_eq!(netlink.source_rules().await.unwrap(), before);

            // What was so before eniway is nobody's to put back, whoever has undone it since.
            let known = &mut Settings::load(&dir.join("later")).unwrap();
            let changes = prepare(&one, known).await.unwrap().changes;
            assert!(changes.iter().all(|change| change.was.is_none()), "{changes:?}");
            netlink.set_down(&netlink.link("eth1").await.unwrap()).await.unwrap();
            ethtool::set("eth1", Offload::RxVlan, true).unwrap();
            sysctl::set(&["ipv4", "ip_forward"], "0").unwrap();
            prepare(&one, known).await.unwrap();
            assert!(known.restore().await.is_empty());
            assert!(netlink.link("eth1").await.unwrap().up);
            assert!(!ethtool::get("eth1", Offload::RxVlan).unwrap());
            assert_eq!(sysctl::get(&["ipv4", "ip_forward"]).unwrap().as_deref(), Some("1"));

            let missing = ParentSpec { interface: "eth9".to_owned(), gateways: vec![], fair_queue: false };
            let error = prepare(&missing, known).await.unwrap_err().to_string();
            assert!(error.contains("no interface eth9") && error.contains("eth1"), "{error}");
            std::fs::remove_dir_all(dir).unwrap();
        });
    }
}

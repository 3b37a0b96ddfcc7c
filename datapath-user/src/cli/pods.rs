//! `eniway pods`: the pods of this node and their sub-ENIs.

use std::{collections::BTreeMap, net::Ipv4Addr};

use serde::Serialize;

use super::{
    CliError, Node, Target, interface, print, print_json,
    table::{Align, Table},
};
use crate::{bandwidth::Bandwidth, net::Mac, status::PodStatus, tables::Live};

/// List the pods of this node and their sub-ENIs
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    namespace: String,
    node: String,
    ip: String,
    vlan: u16,
    mac: String,
    parent: String,
    host_interface: Option<String>,
    id: Option<u32>,
    bandwidth: Option<Bandwidth>,
    ready: bool,
    error: Option<String>,
}

/// Runs the command.
///
/// # Errors
///
/// When something cannot be read.
pub fn run(args: &Args) -> Result<(), CliError> {
    let node = Node::read(&args.target)?;
    let live = match node.maps_or_note() {
        Some(maps) => maps.pods()?,
        None => Vec::new(),
    };
    let rows = rows(&node, live);
    if args.target.json { print_json(&rows) } else { print(&text(&rows, &node)) }
}

/// The pods that the agent knows, then those that only the tables know.
fn rows(node: &Node, live: Vec<Live>) -> Vec<Row> {
    let mut live: BTreeMap<u32, Live> = live.into_iter().map(|pod| (pod.record.id, pod)).collect();
    let mut rows = Vec::new();
    for pod in node.pods() {
        let record = pod.id.and_then(|id| live.remove(&id));
        rows.push(known(node, pod, record.as_ref()));
    }
    rows.extend(live.values().map(|pod| unknown(node, pod)));
    rows
}

fn known(node: &Node, pod: &PodStatus, live: Option<&Live>) -> Row {
    // What every index leads to: a pod whose packets pass.
    let complete = live.is_some_and(|live| live.missing == 0);
    let missing = || "its entries are not in the tables".to_owned();
    Row {
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        node: node.config.node.clone(),
        ip: pod.ipv4.to_string(),
        vlan: pod.vlan,
        mac: pod.mac.to_string(),
        parent: pod.parent.clone(),
        host_interface: pod.host_interface.clone(),
        id: pod.id,
        bandwidth: Some(pod.bandwidth),
        ready: complete && pod.error.is_none(),
        error: pod.error.clone().or_else(|| (pod.id.is_some() && !complete).then(missing)),
    }
}

fn unknown(node: &Node, Live { record, missing, .. }: &Live) -> Row {
    Row {
        name: format!("id {}", record.id),
        namespace: String::new(),
        node: node.config.node.clone(),
        ip: Ipv4Addr::from(record.ipv4).to_string(),
        vlan: record.vid,
        mac: Mac(record.mac).to_string(),
        parent: node.parent_name(record),
        host_interface: Some(interface(record.ifindex)),
        id: Some(record.id),
        bandwidth: None,
        ready: *missing == 0,
        error: Some("in the tables, but not in the agent's status".to_owned()),
    }
}

fn text(rows: &[Row], node: &Node) -> String {
    if rows.is_empty() {
        return format!("no pods on {}\n", node.config.node);
    }
    let mut table = Table::new(&[
        ("NAME", Align::Left),
        ("READY", Align::Left),
        ("IP", Align::Left),
        ("PARENT", Align::Left),
        ("VLAN", Align::Right),
        ("MAC", Align::Left),
        ("INTERFACE", Align::Left),
        ("ID", Align::Right),
        ("IN/OUT", Align::Left),
        ("ERROR", Align::Left),
    ]);
    let dash = || "-".to_owned();
    for row in rows {
        let prefix = if row.namespace.is_empty() { String::new() } else { format!("{}/", row.namespace) };
        table.row([
            prefix + &row.name,
            if row.ready { "yes" } else { "no" }.to_owned(),
            row.ip.clone(),
            row.parent.clone(),
            if row.vlan == 0 { dash() } else { row.vlan.to_string() },
            row.mac.clone(),
            row.host_interface.clone().unwrap_or_else(dash),
            row.id.map_or_else(dash, |id| id.to_string()),
            row.bandwidth.map_or_else(dash, |bandwidth| bandwidth.to_string()),
            row.error.clone().unwrap_or_default(),
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use datapath_common::abi::Endpoint;

    use super::*;
    use crate::cli::tests::{node, pod};

    fn live(id: u8, missing: usize) -> Live {
        let record = Endpoint { id: id.into(), ipv4: [10, 0, 0, id], vid: 100, ..Endpoint::ZERO };
        Live { slot: id.into(), record, missing }
    }

    #[test]
    fn a_pod_is_ready_when_all_its_entries_are_there() {
        let mut failed = pod("default", "d", 4);
        failed.id = None;
        failed.error = Some("its namespace is gone".to_owned());
        let node = node(vec![pod("default", "a", 1), pod("default", "b", 2), pod("default", "c", 3), failed]);
        let rows = rows(&node, vec![live(1, 0), live(2, 1), live(9, 0)]);
        let seen: Vec<_> = rows.iter().map(|row| (row.name.as_str(), row.ready)).collect();
        assert_eq!(seen, [("a", true), ("b", false), ("c", false), ("d", false), ("id 9", true)]);
        assert!(rows[2].error.as_ref().unwrap().contains("not in the tables"));
        assert_eq!(rows[3].error.as_deref(), Some("its namespace is gone"));
        let told = text(&rows, &node);
        assert!(told.contains("default/a") && told.contains("\nid 9"), "{told}");
    }
}

//! What the demo prints.

use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _},
    time::Duration,
};

use serde_json::Value;

use super::{
    Options, Result,
    checks::ALL,
    report::{CheckLine, Report},
    table::{Align, Table},
};
use crate::lab::{Lab, Subnet};

const GREEN: &str = "32";
const RED: &str = "31";
const BOLD: &str = "1";

/// Colours a text on a terminal.
fn paint(code: &str, text: &str) -> String {
    if std::io::stdout().is_terminal() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}

pub(super) fn headline(lab: &Lab, options: &Options, took: Duration) -> Result<()> {
    println!(
        "VPC {}: nodes in {}, containers in {}; ELB {} in front of all pods; fast path {}, XDP {}",
        Subnet::VPC,
        Subnet::NODES,
        Subnet::PODS,
        lab.vip()?,
        if options.fast_path { "all" } else { "off" },
        options.xdp.name()
    );
    println!(
        "{} nodes with an agent each, {} pods with nginx, allocated by static mode: up in {:.1} s\n",
        lab.nodes().len(),
        lab.pods().len(),
        took.as_secs_f32()
    );
    Ok(())
}

/// `kubectl get pod -o wide`, as far as there is something behind it.
pub(super) fn pods(lab: &Lab) -> Result<()> {
    let mut table = Table::new(&[
        ("NAME", Align::Left),
        ("READY", Align::Left),
        ("IP", Align::Left),
        ("NODE", Align::Left),
    ]);
    let known = agents_pods(lab)?;
    for pod in lab.pods() {
        // As a kubelet would have it: the network stands and the server answers.
        let wired = known.iter().any(|(_, row)| text(row, "name") == pod.name && row["ready"] == true);
        let serves = lab.elb().backends().iter().any(|backend| backend.pod == pod.name && backend.healthy);
        let ready = if wired && serves { "1/1" } else { "0/1" };
        table.row([pod.name.clone(), ready.into(), pod.ip.to_string(), lab.node_of(pod)?.ip.to_string()]);
    }
    print!("{}", table.render(""));
    Ok(())
}

/// The sub-ENIs of each extended NIC, as the agents have them in the kernel.
pub(super) fn sub_enis(lab: &Lab) -> Result<()> {
    let known = agents_pods(lab)?;
    for node in lab.nodes() {
        println!("\nextended NIC of {}: eth1, {}, {}", node.ip, node.parent_ip, node.parent_mac);
        let mut table = Table::new(&[
            ("VLAN", Align::Right),
            ("MAC", Align::Left),
            ("IP", Align::Left),
            ("POD", Align::Left),
        ]);
        for (_, row) in known.iter().filter(|(name, _)| *name == node.name) {
            let vlan = row["vlan"].to_string();
            let pod = format!("{}/{}", text(row, "namespace"), text(row, "name"));
            table.row([vlan, text(row, "mac").into(), text(row, "ip").into(), pod]);
        }
        print!("{}", table.render("  "));
    }
    Ok(())
}

/// What `eniway pods --json` says on each node: (node, row).
fn agents_pods(lab: &Lab) -> Result<Vec<(String, Value)>> {
    let mut all = Vec::new();
    for node in lab.nodes() {
        let rows = lab.agent(&node.name)?.cli_json(&["pods"])?;
        let rows = rows.as_array().cloned().unwrap_or_default();
        all.extend(rows.into_iter().map(|row| (node.name.clone(), row)));
    }
    Ok(all)
}

/// Packets by reason, over all nodes.
pub(super) fn counters(lab: &Lab) -> Result<()> {
    // By kind, so that what was dropped stands together: packets in and out, bytes.
    let mut sums: BTreeMap<(String, String), [u64; 3]> = BTreeMap::new();
    for node in lab.nodes() {
        for row in &lab.agent(&node.name)?.counters()? {
            let key = (text(row, "kind").to_owned(), text(row, "outcome").to_owned());
            let sum = sums.entry(key).or_default();
            let packets = row["packets"].as_u64().unwrap_or(0);
            sum[usize::from(text(row, "direction") == "egress")] += packets;
            sum[2] += row["bytes"].as_u64().unwrap_or(0);
        }
    }
    let mut table = Table::new(&[
        ("COUNTED AS", Align::Left),
        ("KIND", Align::Left),
        ("TO PODS", Align::Right),
        ("FROM PODS", Align::Right),
        ("BYTES", Align::Right),
    ]);
    for kind in ["forward", "remark", "drop"] {
        for ((_, outcome), [ingress, egress, bytes]) in sums.iter().filter(|((k, _), _)| k == kind) {
            table.row([
                outcome.clone(),
                kind.into(),
                ingress.to_string(),
                egress.to_string(),
                bytes.to_string(),
            ]);
        }
    }
    print!("\n{}", table.render(""));
    Ok(())
}

fn text<'v>(row: &'v Value, key: &str) -> &'v str {
    row[key].as_str().unwrap_or("")
}

fn width() -> usize {
    ALL.iter().map(|check| check.name.len()).max().unwrap_or(0)
}

/// On a terminal, the check that runs now.
pub(super) fn running(name: &str) {
    if std::io::stdout().is_terminal() {
        print!(" ..  {name:<width$}", width = width());
        let _ = std::io::stdout().flush();
    }
}

/// The line of a check that has ended.
pub(super) fn check(line: &CheckLine) {
    if std::io::stdout().is_terminal() {
        print!("\r");
    }
    let mark = if line.ok { paint(GREEN, "ok  ") } else { paint(RED, "FAIL") };
    println!(
        "{mark} {:<width$}  {:>9}  {}",
        line.name,
        latency(Duration::from_micros(line.micros)),
        line.detail,
        width = width()
    );
}

fn latency(time: Duration) -> String {
    let micros = time.as_micros();
    if micros < 10_000 { format!("{micros} us") } else { format!("{:.1} ms", micros as f64 / 1000.0) }
}

pub(super) fn result(report: &Report, all_ran: bool, took: Duration) {
    let text = format!(
        "{} passed, {} failed{} in {:.1} s",
        report.passed,
        report.failed,
        if all_ran { "" } else { ", interrupted" },
        took.as_secs_f32()
    );
    println!("\n{}", paint(if all_ran && report.failed == 0 { GREEN } else { RED }, &text));
}

/// How to look around in a lab that is kept.
pub(super) fn commands(lab: &Lab) -> Result<()> {
    let heading = |text: &str| println!("\n{}", paint(BOLD, text));
    let enter = |netns: &crate::lab::Netns| format!("nsenter --net={}", netns.path().display());
    println!("\nThe lab is left standing. `cargo xtask lab down` (or `eniway-lab down`) removes it.");
    println!(
        "Its allocator ends with this program: the agents say that their source is away, and all is forwarded as before."
    );
    heading("A pod's view:");
    for pod in lab.pods() {
        println!("  {} ip address        # {} on {}", enter(&pod.netns), pod.name, pod.node);
    }
    if let Some(pod) = lab.pods().first() {
        println!("  {} curl http://{}/whoami", enter(&pod.netns), lab.vip()?);
    }
    heading("A node's view:");
    let bin =
        crate::lab::agent::eniway_binary().map_or("eniway".to_owned(), |path| path.display().to_string());
    for node in lab.nodes() {
        let Ok(agent) = lab.agent(&node.name) else { continue };
        let config = agent.config().display().to_string();
        for words in ["status", "pods", "counters"] {
            println!("  {bin} {words} --config {config}");
        }
        if let Some(pod) = lab.pods().iter().find(|pod| pod.node == node.name) {
            println!("  {bin} trace --config {config} --pod {} --to {}", pod.full_name(), lab.vip()?);
        }
        println!("  {} ip rule          # {}", enter(&node.netns), node.name);
    }
    heading("The fabric's view:");
    println!("  {} tcpdump -eni any", enter(lab.fabric().netns()));
    println!(
        "  {} curl http://{}/",
        enter(&lab.outside().netns),
        lab.pods().iter().find_map(|pod| pod.eip).map_or("EIP".to_owned(), |eip| eip.to_string())
    );
    heading("Logs, configurations and documents:");
    println!("  {}", lab.dir().display());
    Ok(())
}

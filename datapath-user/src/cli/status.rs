//! `eniway status`: is the agent well, and what does it hold on this node?

use std::{
    fmt::Write as _,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

use super::{
    CliError, Node, Target, full_name, print, print_json,
    probe::{self, Probe},
    table::{Align, Table, duration, number},
};
use crate::{
    feature::TcKind,
    grace::Grace,
    privilege,
    settings::NodeChange,
    status::{Event, ParentStatus, Status},
};

/// Show the agent's health and what it holds on this node
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    target: Target,
    /// Ask the agent itself, print nothing, and end with status 1 when it is not so: for probes of Kubernetes and
    /// others
    #[arg(long, value_name = "WHAT")]
    probe: Option<Probe>,
    /// Show only what eniway has changed on the node outside of its own interfaces, with what was before
    #[arg(long)]
    node_changes: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    /// Whether the agent's process lives.
    running: bool,
    /// Pods whose every index is in the tables; `null` where there are no tables.
    pods_programmed: Option<usize>,
    /// Flows remembered; `null` where there are no tables.
    flows: Option<usize>,
    /// What the agent's process may do; `null` when there is none.
    capabilities: Option<privilege::Held>,
    #[serde(flatten)]
    status: &'a Status,
}

/// Runs the command.
///
/// # Errors
///
/// When no agent has ever run, or something cannot be read.
pub fn run(args: &Args) -> Result<(), CliError> {
    if let Some(probe) = args.probe {
        return probe::run(&args.target, probe);
    }
    let node = Node::read(&args.target)?;
    let Some(status) = &node.status else {
        // Says which file, and that nothing has run.
        return Status::read(&node.config.run_dir).map(drop).map_err(CliError::from);
    };
    if args.node_changes {
        let changes = node_changes(&node, status);
        return match args.target.json {
            true => print_json(&changes),
            false => print(&changes_text(&changes)),
        };
    }
    let (pods_programmed, flows) = match node.maps_or_note() {
        Some(maps) => {
            let complete = maps.pods()?.into_iter().filter(|pod| pod.missing == 0);
            (Some(complete.count()), Some(maps.flows()?.len()))
        }
        None => (None, None),
    };
    let capabilities = privilege::held_by(status.pid).filter(|_| node.running);
    let report = Report { running: node.running, pods_programmed, flows, capabilities, status };
    if args.target.json { print_json(&report) } else { print(&text(&report, &node)) }
}

/// What the agent holds, and what it holds only now and then.
fn node_changes(node: &Node, status: &Status) -> Vec<NodeChange> {
    let mut changes = status.node_changes.clone();
    if status.parents.iter().any(|parent| parent.tc == TcKind::Clsact.name()) {
        let clsact = |parent: &ParentStatus| NodeChange::new(format!("{}: qdisc clsact", parent.interface));
        changes.extend(status.parents.iter().map(clsact));
    }
    if Grace::is_left_turned(&node.config.run_dir) {
        let what = match node.running {
            true => "/sys/kernel/rcu_expedited = 1, while programs are attached",
            false => {
                "/sys/kernel/rcu_expedited = 1, left by an agent that was killed; `eniway audit --fix` puts it back"
            }
        };
        changes.push(NodeChange { what: what.to_owned(), was: Some("0".to_owned()) });
    }
    // Two parents have some in common.
    let mut seen = Vec::new();
    changes.retain(|change| {
        !seen.contains(change) && {
            seen.push(change.clone());
            true
        }
    });
    changes
}

fn changes_text(changes: &[NodeChange]) -> String {
    if changes.is_empty() {
        return "eniway has changed nothing on this node\n".to_owned();
    }
    let mut table = Table::new(&[("CHANGE", Align::Left), ("BEFORE", Align::Left)]);
    for NodeChange { what, was } in changes {
        table.row([what.clone(), was.clone().unwrap_or_else(|| "-".to_owned())]);
    }
    table.to_string()
}

fn text(report: &Report<'_>, node: &Node) -> String {
    let status = report.status;
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{name:<14}{value}");
    };
    line("node", status.node.clone());
    let agent = match report.running {
        true => format!("running, process {}, for {}", status.pid, since(status.started)),
        false => format!("not running (was process {}); the kernel forwards without it", status.pid),
    };
    line("agent", agent);
    if let Some(held) = &report.capabilities {
        line("capabilities", capabilities(held));
    }
    line("ready", if status.ready { "yes" } else { "no" }.to_owned());
    line("revision", status.revision.map_or_else(|| "none yet".to_owned(), |revision| revision.to_string()));
    let source = match (&status.source_error, status.source_down_since) {
        (None, None) => "ok".to_owned(),
        (Some(error), None) => error.clone(),
        (error, Some(down)) => {
            format!("{}, for {}", error.as_deref().unwrap_or("unreachable"), since(down))
        }
    };
    line("source", source);
    if let Some(reason) = &status.held_back {
        line("held back", format!("{reason} (`eniway confirm` lets it through)"));
    }
    line("fast path", status.fast_path.clone());
    let pods = match report.pods_programmed {
        Some(programmed) => format!("{} known, {programmed} in the tables", status.pods.len()),
        None => format!("{} known", status.pods.len()),
    };
    line("pods", pods);
    if let Some(flows) = report.flows {
        let limit = number(u64::from(node.config.limits.flows));
        line("flows", format!("{} remembered, room for {limit}", number(flows as u64)));
    }
    line("pins", node.pins.version_dir().display().to_string());

    let mut parents = Table::new(&[
        ("PARENT", Align::Left),
        ("INDEX", Align::Right),
        ("IFINDEX", Align::Right),
        ("PODS", Align::Right),
        ("TC", Align::Left),
        ("XDP", Align::Left),
        ("WANTED", Align::Left),
    ]);
    for parent in &status.parents {
        let pods = status.pods.iter().filter(|pod| pod.parent == parent.interface).count();
        parents.row([
            parent.interface.clone(),
            parent.index.to_string(),
            parent.ifindex.to_string(),
            pods.to_string(),
            parent.tc.clone(),
            parent.xdp_mode.clone(),
            parent.xdp_wanted.clone(),
        ]);
    }
    let _ = write!(out, "\n{parents}");
    for parent in &status.parents {
        for note in &parent.notes {
            let _ = writeln!(out, "  {}: {note}", parent.interface);
        }
    }
    let changes = node_changes(node, status);
    section(&mut out, "changed on this node", changes.iter().map(ToString::to_string));
    let happened = |event: &Event| format!("{} ago: {}", since(event.at), event.what);
    section(&mut out, "lately", status.events.iter().map(happened));
    let errors =
        status.pods.iter().filter_map(|pod| Some(format!("{}: {}", full_name(pod), pod.error.as_ref()?)));
    section(&mut out, "pods with errors", errors);
    section(&mut out, "refused, and left as they were", status.refused.iter().cloned());
    out
}

fn capabilities(held: &privilege::Held) -> String {
    // Of a process that was never limited the list would say nothing.
    if held.permitted.len() > 2 * privilege::NEEDS.len() {
        return format!("{}: more than it needs", held.permitted.len());
    }
    let word = |name: &String| {
        let asleep = if held.effective.contains(name) { "" } else { " (not in effect)" };
        format!("{name}{asleep}")
    };
    held.permitted.iter().map(word).collect::<Vec<_>>().join(", ")
}

fn section(out: &mut String, title: &str, lines: impl Iterator<Item = String>) {
    let mut lines = lines.peekable();
    if lines.peek().is_some() {
        let _ = writeln!(out, "\n{title}:");
    }
    for line in lines {
        let _ = writeln!(out, "  {line}");
    }
}

fn since(unix_seconds: u64) -> String {
    let then = UNIX_EPOCH + Duration::from_secs(unix_seconds);
    duration(SystemTime::now().duration_since(then).map_or(0, |elapsed| elapsed.as_secs()))
}

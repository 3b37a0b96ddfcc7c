//! `eniway policy`: what security groups say between the pods of this node, and why.

use std::{collections::BTreeMap, fmt::Write as _};

use datapath_common::{
    abi::{
        Endpoint,
        endpoint::flag,
        policy::{Verdict, class_row},
    },
    decide::policy::verdict,
    tables::Rules as _,
};
use eniway_policy::{
    compile::PodFacts,
    explain::{Line, Traffic, explain},
    model::Direction,
};
use serde::Serialize;

use super::{
    CliError, Node, Target, print, print_json,
    table::{Align, Table},
};
use crate::{
    live::LiveTables,
    policy::{PodPolicy, PolicyState},
};

/// Show which pods of this node may reach each other by the fast path, and why
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    target: Target,
    /// Only pairs with this pod: its name, namespace/name, or address
    #[arg(long, value_name = "NAME")]
    pod: Option<String>,
}

#[derive(Debug, Serialize)]
struct Report {
    revision: u64,
    epoch: u32,
    /// Why the groups are not in force.
    fault: Option<String>,
    pods: Vec<PodRow>,
    pairs: Vec<PairRow>,
}

#[derive(Debug, Serialize)]
struct PodRow {
    name: String,
    setting: &'static str,
    class: u32,
    security_groups: Vec<String>,
    not_judged: Option<String>,
}

#[derive(Debug, Serialize)]
struct PairRow {
    from: Vec<String>,
    to: Vec<String>,
    verdict: &'static str,
    why: String,
}

/// Runs the command.
///
/// # Errors
///
/// When something cannot be read.
pub fn run(args: &Args) -> Result<(), CliError> {
    let node = Node::read(&args.target)?;
    let state = PolicyState::read(&node.config.run_dir)?.unwrap_or_default();
    let only = args.pod.as_deref().map(|name| node.pod(name).map(super::full_name)).transpose()?;
    let report = report(&state, &node.tables()?, only.as_deref())?;
    if args.target.json { print_json(&report) } else { print(&text(&report)) }
}

/// A pod, with its record in the tables.
type Known<'a> = (&'a PodPolicy, &'a Endpoint);

fn report(state: &PolicyState, tables: &LiveTables, only: Option<&str>) -> Result<Report, CliError> {
    let mut known: Vec<Known<'_>> = Vec::new();
    for pod in &state.pods {
        if let Some(record) = tables.pod(pod.ipv4)? {
            known.push((pod, record));
        }
    }
    let pods = known.iter().map(|(pod, record)| PodRow {
        name: pod.name.clone(),
        setting: setting(record),
        class: record.policy_id,
        security_groups: pod.membership.groups.as_slice().iter().map(ToString::to_string).collect(),
        not_judged: pod.undecidable.clone(),
    });
    let pods = pods.collect();

    // Pods of one class and setting are alike, to each other and to all others.
    let mut kinds: BTreeMap<(u32, u32), Vec<Known<'_>>> = BTreeMap::new();
    for (pod, record) in &known {
        kinds.entry((record.policy_id, record.flags & !flag::LIMITED)).or_default().push((pod, record));
    }
    let names = |pods: &[Known<'_>]| pods.iter().map(|(pod, _)| pod.name.clone()).collect();
    let has = |pods: &[Known<'_>]| only.is_none_or(|only| pods.iter().any(|(pod, _)| pod.name == only));
    let mut pairs = Vec::new();
    for (from, senders) in &kinds {
        for (to, receivers) in &kinds {
            // A pod is no pair with itself.
            let alone = from == to && senders.len() == 1;
            if alone || !(has(senders) || has(receivers)) {
                continue;
            }
            let (verdict, why) = pair(tables, senders[0], receivers[0]);
            pairs.push(PairRow { from: names(senders), to: names(receivers), verdict, why });
        }
    }
    tables.take_steps()?;
    let epoch = tables.epoch();
    Ok(Report { revision: state.groups.revision, epoch, fault: state.fault.clone(), pods, pairs })
}

fn setting(record: &Endpoint) -> &'static str {
    if record.flags & flag::OFF != 0 {
        "off"
    } else if record.flags & flag::GROUPS != 0 {
        "security-groups"
    } else if record.flags & flag::OBSERVE != 0 {
        "all, observed"
    } else {
        "all"
    }
}

fn pair(tables: &LiveTables, from: Known<'_>, to: Known<'_>) -> (&'static str, String) {
    let ((sender, own), (receiver, peer)) = (from, to);
    let flags = own.flags | peer.flags;
    if flags & flag::OFF != 0 {
        return (Verdict::Wire.name(), "switched off for one of them".to_owned());
    }
    if flags & (flag::GROUPS | flag::OBSERVE) == 0 {
        return (Verdict::Open.name(), "security groups are not asked".to_owned());
    }
    let number = verdict(tables, own.policy_id, peer.policy_id);
    let verdict = Verdict::ALL.into_iter().find(|verdict| *verdict as u8 == number).unwrap_or(Verdict::Wire);
    let why = match verdict {
        Verdict::Open => "all traffic is allowed, both ways".to_owned(),
        Verdict::Refused => "no traffic is allowed, either way".to_owned(),
        Verdict::Check if own.mtu != peer.mtu => {
            return (Verdict::Wire.name(), "their MTUs differ".to_owned());
        }
        Verdict::Check => "depends on protocol and port, or on who begins".to_owned(),
        Verdict::Wire => {
            let one = |pod: &PodPolicy| pod.undecidable.as_ref().map(|why| format!("{}: {why}", pod.name));
            one(sender).or_else(|| one(receiver)).unwrap_or_else(|| "not in force yet".to_owned())
        }
    };
    (verdict.name(), why)
}

fn text(report: &Report) -> String {
    let mut out = format!("security groups of revision {}, epoch {}\n", report.revision, report.epoch);
    if let Some(fault) = &report.fault {
        let _ = writeln!(out, "{fault}");
    }
    let mut pods = Table::new(&[
        ("POD", Align::Left),
        ("SETTING", Align::Left),
        ("CLASS", Align::Right),
        ("SECURITY GROUPS", Align::Left),
        ("NOT JUDGED", Align::Left),
    ]);
    let dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    for pod in &report.pods {
        pods.row([
            pod.name.clone(),
            pod.setting.to_owned(),
            dash(if pod.class == 0 { String::new() } else { pod.class.to_string() }),
            dash(pod.security_groups.join(", ")),
            pod.not_judged.clone().unwrap_or_default(),
        ]);
    }
    let mut pairs = Table::new(&[
        ("FROM", Align::Left),
        ("TO", Align::Left),
        ("VERDICT", Align::Left),
        ("WHY", Align::Left),
    ]);
    for pair in &report.pairs {
        pairs.row([some(&pair.from), some(&pair.to), pair.verdict.to_owned(), pair.why.clone()]);
    }
    let _ = write!(out, "\n{pods}\n{pairs}");
    out
}

/// The first few of many names.
fn some(names: &[String]) -> String {
    const SHOWN: usize = 3;
    match names.len().checked_sub(SHOWN) {
        Some(more @ 1..) => format!("{} and {more} more", names[..SHOWN].join(", ")),
        _ => names.join(", "),
    }
}

/// What the rules of both sides say of a packet between two pods of the node, for `eniway trace`: line by line.
pub(super) fn rule_by_rule(
    state: &PolicyState,
    tables: &LiveTables,
    (from, own): (std::net::Ipv4Addr, &Endpoint),
    (to, peer): (std::net::Ipv4Addr, &Endpoint),
    traffic: Traffic,
) -> Vec<String> {
    let find = |address| state.pods.iter().find(|pod| pod.ipv4 == address);
    let (Some(sender), Some(receiver)) = (find(from), find(to)) else {
        return vec!["the agent has not written down the security groups of both pods".to_owned()];
    };
    let (verdict, why) = pair(tables, (sender, own), (receiver, peer));
    let mut lines = vec![format!("pair {} to {}: {verdict}: {why}", sender.name, receiver.name)];
    if own.policy_id == 0
        || peer.policy_id == 0
        || tables.class_groups(class_row(own.policy_id, tables.epoch())).is_none()
    {
        return lines;
    }
    let facts = |pod: &PodPolicy| PodFacts {
        ipv4: Some(pod.ipv4),
        ipv6: pod.ipv6,
        membership: pod.membership.clone(),
        class: 0,
    };
    let (sender_facts, receiver_facts) = (facts(sender), facts(receiver));
    let sides = [
        (sender, &sender_facts, &receiver_facts, Direction::Egress, "may send"),
        (receiver, &receiver_facts, &sender_facts, Direction::Ingress, "may receive"),
    ];
    for (pod, own, peer, direction, what) in sides {
        let side = explain(&state.groups, own, peer, direction, traffic);
        for Line { group, rule, passes } in &side.lines {
            let says = passes.as_ref().map_or("decides".to_owned(), |why| format!("says nothing: {why}"));
            lines.push(format!("{} of {}: {rule}: {says}", group, pod.name));
        }
        let answer = match (side.allowed, side.lines.last()) {
            (true, _) => what.to_owned(),
            (false, Some(Line { passes: None, .. })) => format!("not: {what}"),
            (false, _) => format!("not: {what}, for no rule says anything of it"),
        };
        lines.push(format!("{}: {answer}", pod.name));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_names_are_cut_short() {
        let names = |n: usize| (0..n).map(|i| format!("p{i}")).collect::<Vec<_>>();
        assert_eq!(some(&names(3)), "p0, p1, p2");
        assert_eq!(some(&names(5)), "p0, p1, p2 and 2 more");
    }
}

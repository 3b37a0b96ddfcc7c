//! `eniway counters`: what became of packets, by outcome.

use std::collections::{BTreeMap, HashMap};

use datapath_common::abi::{Counter, Direction, Outcome, outcome::Kind};
use serde::Serialize;

use super::{
    CliError, Node, Target, print, print_json,
    table::{Align, Table, bytes, number},
};
use crate::tables::Maps;

/// Show what became of packets: totals by outcome, of all pods or of one
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    target: Target,
    /// Only this pod: its name, namespace/name, or address
    #[arg(long, value_name = "NAME")]
    pod: Option<String>,
    /// A row for each pod instead of totals
    #[arg(long)]
    all: bool,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    pod: String,
    id: u32,
    direction: &'static str,
    outcome: &'static str,
    kind: &'static str,
    packets: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct Report {
    rows: Vec<Row>,
}

/// Runs the command.
///
/// # Errors
///
/// When there is no such pod, or the counters cannot be read.
pub fn run(args: &Args) -> Result<(), CliError> {
    let node = Node::read(&args.target)?;
    let only = match &args.pod {
        Some(name) => Some(wanted_id(&node, name)?),
        None => None,
    };
    let mut counts = counts(&node.maps()?)?;
    counts.retain(|count| only.is_none_or(|id| count.id == id));
    let names = node.names();
    if args.target.json {
        return print_json(&Report { rows: counts.iter().map(|count| row(count, &names)).collect() });
    }
    if counts.is_empty() {
        return print("nothing counted yet\n");
    }
    print(&if args.all { by_pod(&counts, &names) } else { totals(&counts) })
}

/// A counter that is not zero.
#[derive(Debug, Clone, Copy)]
struct Count {
    /// The pod's id; 0 = no pod.
    id: u32,
    direction: Direction,
    outcome: Outcome,
    counter: Counter,
}

fn counts(maps: &Maps) -> Result<Vec<Count>, CliError> {
    let mut counts = Vec::new();
    for (id, row) in maps.all_counters()? {
        for direction in Direction::ALL {
            for &outcome in Outcome::ALL {
                let counter = row.get(direction, outcome);
                if counter != Counter::default() {
                    counts.push(Count { id, direction, outcome, counter });
                }
            }
        }
    }
    Ok(counts)
}

fn wanted_id(node: &Node, name: &str) -> Result<u32, CliError> {
    // What the tables count for no pod, by the name that the output gives it.
    if name == NODE {
        return Ok(0);
    }
    let pod = node.pod(name)?;
    pod.id.ok_or_else(|| CliError::NotProgrammed { name: name.to_owned(), error: pod.error.clone() })
}

/// Packets that belong to no pod.
const NODE: &str = "(node)";

fn pod_name(id: u32, names: &HashMap<u32, String>) -> String {
    match id {
        0 => NODE.to_owned(),
        id => names.get(&id).cloned().unwrap_or_else(|| format!("id {id}")),
    }
}

pub(super) const fn kind(outcome: Outcome) -> &'static str {
    match outcome.kind() {
        Kind::Forward => "forward",
        Kind::Remark => "remark",
        Kind::Drop => "drop",
    }
}

fn row(count: &Count, names: &HashMap<u32, String>) -> Row {
    Row {
        pod: pod_name(count.id, names),
        id: count.id,
        direction: count.direction.name(),
        outcome: count.outcome.name(),
        kind: kind(count.outcome),
        packets: count.counter.packets,
        bytes: count.counter.bytes,
    }
}

fn totals(counts: &[Count]) -> String {
    let mut sums: BTreeMap<(Direction, Outcome), Counter> = BTreeMap::new();
    for count in counts {
        let sum = sums.entry((count.direction, count.outcome)).or_default();
        sum.packets += count.counter.packets;
        sum.bytes += count.counter.bytes;
    }
    let mut table = Table::new(&[
        ("DIRECTION", Align::Left),
        ("KIND", Align::Left),
        ("OUTCOME", Align::Left),
        ("PACKETS", Align::Right),
        ("BYTES", Align::Right),
        ("MEANING", Align::Left),
    ]);
    for ((direction, outcome), sum) in sums {
        table.row([
            direction.name().to_owned(),
            kind(outcome).to_owned(),
            outcome.name().to_owned(),
            number(sum.packets),
            bytes(sum.bytes),
            meaning(outcome),
        ]);
    }
    table.to_string()
}

fn by_pod(counts: &[Count], names: &HashMap<u32, String>) -> String {
    let mut table = Table::new(&[
        ("POD", Align::Left),
        ("DIRECTION", Align::Left),
        ("KIND", Align::Left),
        ("OUTCOME", Align::Left),
        ("PACKETS", Align::Right),
        ("BYTES", Align::Right),
    ]);
    for count in counts {
        table.row([
            pod_name(count.id, names),
            count.direction.name().to_owned(),
            kind(count.outcome).to_owned(),
            count.outcome.name().to_owned(),
            number(count.counter.packets),
            bytes(count.counter.bytes),
        ]);
    }
    table.to_string()
}

/// The sentence that the list of outcomes has, without the space that a doc comment starts with.
pub(super) fn meaning(outcome: Outcome) -> String {
    outcome.meaning().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(id: u32, outcome: Outcome, packets: u64) -> Count {
        let counter = Counter { packets, bytes: packets * 100 };
        Count { id, direction: Direction::Egress, outcome, counter }
    }

    #[test]
    fn totals_sum_over_pods() {
        let text = totals(&[
            count(1, Outcome::Wire, 3),
            count(2, Outcome::Wire, 4),
            count(2, Outcome::SourceMac, 1),
        ]);
        assert!(
            text.contains("egress      forward   wire               7   700 B   The packet crossed"),
            "{text}"
        );
        assert!(text.contains("source-mac"), "{text}");
    }

    #[test]
    fn rows_have_the_documented_shape() {
        let names = HashMap::from([(1, "default/a".to_owned())]);
        let json = serde_json::to_value(row(&count(1, Outcome::Wire, 1), &names)).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"pod": "default/a", "id": 1, "direction": "egress", "outcome": "wire",
                "kind": "forward", "packets": 1, "bytes": 100})
        );
        assert_eq!(row(&count(7, Outcome::Wire, 1), &names).pod, "id 7");
        assert_eq!(row(&count(0, Outcome::Untagged, 1), &names).pod, "(node)");
    }
}

//! The figures of a report as a page for docs/benchmarks.

use std::{collections::BTreeMap, fmt::Write as _};

use clap::ValueEnum as _;
use serde_json::Value;

use super::{action::Action, load::Path};

/// A page in Markdown with the tables of all figures that are there.
pub fn document(figures: &BTreeMap<String, Value>) -> String {
    let mut text = String::from(
        "# The agent's life\n\n[What the columns mean, and how to repeat it](README.md#the-agents-life)\n",
    );
    if figures.contains_key("lost") {
        packets(figures, &mut text);
    }
    if figures.contains_key("cni_add_ms") {
        pods(figures, &mut text);
    }
    if figures.contains_key("agent_rss_kib") {
        agent(figures, &mut text);
    }
    text
}

fn packets(figures: &BTreeMap<String, Value>, text: &mut String) {
    let of = |key: &str, action: Action| figures.get(key).and_then(|by_case| by_case.get(action.name()));
    let number = |value: Option<&Value>| value.and_then(Value::as_f64).unwrap_or(0.0);
    let all = |key: &str| number(figures.get(key));
    text.push_str(
        "\n## Packets while agents are killed, restarted and upgraded\n\n\
         | action | path | rounds | void | packets | lost | twice | reordered | ready, ms |\n\
         |---|---|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for &action in Action::value_variants() {
        for path in Path::ALL {
            let Some(lost) = of("lost", action).and_then(|paths| paths.get(path.name())) else { continue };
            let by_path = |key: &str| number(of(key, action).and_then(|paths| paths.get(path.name())));
            let _ = writeln!(
                text,
                "| {} | {path} | {} | {} | {} | {lost} | {} | {} | {} |",
                action.name(),
                number(of("rounds", action)),
                number(of("void_rounds", action)),
                by_path("sent"),
                by_path("duplicates"),
                by_path("reordered"),
                number(of("ready_ms", action)),
            );
        }
    }
    let slowest = Action::value_variants()
        .iter()
        .filter_map(|action| of("slowest_rate", *action).and_then(Value::as_f64))
        .fold(f64::INFINITY, f64::min);
    let _ = writeln!(
        text,
        "\n{} requests a second on each path, each answered; {slowest} on the slowest path of the slowest round. \
         TCP: {} of {} connections stood to the end, with {} exchanges.",
        all("rate"),
        all("tcp_survived"),
        all("tcp_connections"),
        all("tcp_exchanges"),
    );
}

fn pods(figures: &BTreeMap<String, Value>, text: &mut String) {
    let of = |key: &str, part: &str| figures.get(key).and_then(|value| value[part].as_f64()).unwrap_or(0.0);
    text.push_str(
        "\n## A pod's coming and going\n\n\
         | ms | eniway-cni | ptp and host-local |\n|---|---:|---:|\n",
    );
    for (what, key, part) in [
        ("ADD one after another, p50", "cni_add_ms", "p50"),
        ("ADD one after another, p99", "cni_add_ms", "p99"),
        ("ADD eight at a time, p50", "cni_add_ms", "p50_8"),
        ("ADD eight at a time, p99", "cni_add_ms", "p99_8"),
        ("DEL, p50", "cni_del_ms", "p50"),
    ] {
        let _ = writeln!(text, "| {what} | {} | {} |", of(key, part), of(key, &format!("ptp_{part}")));
    }
}

fn agent(figures: &BTreeMap<String, Value>, text: &mut String) {
    text.push_str(
        "\n## The agent, with 256 pods\n\n| figure | what | measured | wanted | |\n|---|---|---:|---:|---|\n",
    );
    for (key, what, below) in [
        ("agent_rss_kib", "memory, after 256 pods came", Some(25_600.0)),
        ("agent_restarted_rss_kib", "memory, after a restart", Some(25_600.0)),
        ("start_ms", "from exec until forwarding is confirmed, p50", Some(500.0)),
        ("start_max_ms", "the same, the slowest", None),
    ] {
        let Some(value) = figures.get(key).and_then(Value::as_f64) else { continue };
        let wanted = below.map(|below| format!("< {below}")).unwrap_or_default();
        let met = below.map_or("", |below| if value < below { "met" } else { "**missed**" });
        let _ = writeln!(text, "| `{key}` | {what} | {value} | {wanted} | {met} |");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_was_not_measured_is_left_out() {
        let figures: BTreeMap<String, Value> = serde_json::from_value(json!({
            "lost": { "kill": { "wire": 0, "fast_path": 7, "elb": 0 } },
            "sent": { "kill": { "wire": 10, "fast_path": 20, "elb": 30 } },
            "rounds": { "kill": 2 }, "rate": 50_000.0, "agent_rss_kib": 25_599, "start_ms": 500.0,
        }))
        .expect("figures");
        let text = document(&figures);
        assert!(text.contains("| kill | fast_path | 2 | 0 | 20 | 7 |"), "{text}");
        assert!(!text.contains("upgrade |") && !text.contains("eniway-cni"), "{text}");
        assert!(
            text.contains("| 25599 | < 25600 | met |") && text.contains("| 500 | < 500 | **missed** |"),
            "{text}"
        );
    }
}

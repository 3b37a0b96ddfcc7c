//! What the figures are to reach, and whether they do.

use std::fmt::Write as _;

use super::{
    Engine::{self, Counted, Wall},
    report::Report,
};
use Measure::{AboveLoopback, Cost, Rate};

/// How two systems are compared.
#[derive(Clone, Copy)]
enum Measure {
    /// The cost of the first over that of the second.
    Cost,
    /// The same after the cost of loopback was taken off both.
    AboveLoopback,
    /// The rate of the first over that of the second.
    Rate,
}

struct Target {
    engine: Engine,
    case: &'static str,
    measure: Measure,
    of: &'static str,
    to: &'static str,
    /// Of a rate at least, of a cost at most.
    bound: f64,
}

const fn target(
    engine: Engine,
    case: &'static str,
    measure: Measure,
    of: &'static str,
    to: &'static str,
    bound: f64,
) -> Target {
    Target { engine, case, measure, of, to, bound }
}

const TARGETS: [Target; 27] = [
    target(Counted, "same-node/tcp-rr", AboveLoopback, "eniway", "bare-redirect-peer", 1.4),
    target(Counted, "same-node/tcp-rr", AboveLoopback, "eniway", "linux-bridge", 0.55),
    target(Counted, "same-node/tcp-rr", AboveLoopback, "eniway", "routed-veth", 0.35),
    target(Counted, "same-node/tcp-rr", AboveLoopback, "eniway", "vlan-sub-interface", 0.25),
    target(Counted, "same-node/tcp-rr", Cost, "eniway", "eniway-unchecked", 1.05),
    target(Counted, "cross-node/tcp-rr", Cost, "eniway", "vlan-sub-interface", 1.1),
    target(Counted, "cross-node/tcp-rr", Cost, "eniway-netkit", "vlan-sub-interface", 1.03),
    target(Counted, "cross-node/tcp-rr", Cost, "eniway", "eniway-unchecked", 1.05),
    target(Counted, "attack/unknown-vlan", Rate, "eniway-xdp-guard", "bare-drop", 0.8),
    target(Counted, "attack/wrong-mac", Rate, "eniway-xdp-guard", "bare-drop", 0.8),
    target(Counted, "attack/wrong-address", Rate, "eniway-xdp-guard", "bare-drop", 0.8),
    target(Counted, "attack/spoofing-pod", Rate, "eniway", "bare-drop", 0.8),
    target(Counted, "pods-local/tcp-rr", Cost, "eniway-100-pods", "eniway", 1.1),
    target(Counted, "pods-local/tcp-rr", Cost, "eniway-1000-pods", "eniway", 1.1),
    target(Counted, "pods-local/tcp-rr", Cost, "eniway-4000-pods", "eniway", 1.1),
    target(Counted, "pods-wire/tcp-rr", Cost, "eniway-100-pods", "eniway", 1.1),
    target(Counted, "pods-wire/tcp-rr", Cost, "eniway-1000-pods", "eniway", 1.1),
    target(Counted, "pods-wire/tcp-rr", Cost, "eniway-4000-pods", "eniway", 1.1),
    target(Counted, "flows-local/udp-rr", Cost, "eniway-4000-pods-1000-flows", "eniway", 1.1),
    target(Counted, "flows-local/udp-rr", Cost, "eniway-4000-pods-100000-flows", "eniway", 1.1),
    target(Counted, "flows-wire/udp-rr", Cost, "eniway-4000-pods-1000-flows", "eniway", 1.1),
    target(Counted, "flows-wire/udp-rr", Cost, "eniway-4000-pods-100000-flows", "eniway", 1.1),
    target(Counted, "flows-elb/udp-rr", Cost, "eniway-4000-pods-1000-flows", "eniway", 1.1),
    target(Counted, "flows-elb/udp-rr", Cost, "eniway-4000-pods-100000-flows", "eniway", 1.1),
    target(Wall, "same-node/tcp-rr", Rate, "eniway", "bare-redirect-peer", 0.95),
    target(Wall, "same-node/tcp-crr", Rate, "eniway", "bare-redirect-peer", 0.95),
    target(Wall, "same-node/tcp-stream", Rate, "eniway", "bare-redirect-peer", 0.95),
];

impl Target {
    /// The figure, if it was measured. Of medians, but by the clock of the rounds' ratios, as far as there are any.
    fn value(&self, report: &Report) -> Option<f64> {
        let base = match self.measure {
            AboveLoopback => report.median(self.case, "loopback")?,
            Cost | Rate => 0.0,
        };
        let cost = (report.median(self.case, self.of)? - base) / (report.median(self.case, self.to)? - base);
        let paired = report.ratios.iter().find(|r| r.case == self.case && r.of == self.of && r.to == self.to);
        let cost = match (self.engine, paired) {
            (Wall, Some(paired)) => paired.value,
            _ => cost,
        };
        Some(if matches!(self.measure, Rate) { 1.0 / cost } else { cost })
    }

    fn what(&self) -> String {
        match self.measure {
            Cost => format!("cost of {} over {}", self.of, self.to),
            AboveLoopback => format!("cost of {} over {}, both above loopback", self.of, self.to),
            Rate => format!("rate of {} over {}", self.of, self.to),
        }
    }

    fn met(&self, value: f64) -> bool {
        if matches!(self.measure, Rate) { value >= self.bound } else { value <= self.bound }
    }
}

/// A table in Markdown of the targets that the report has figures for; empty if there are none.
pub fn markdown(report: &Report) -> String {
    let mut rows = String::new();
    for target in TARGETS.iter().filter(|target| target.engine.name() == report.engine) {
        let Some(value) = target.value(report) else { continue };
        let bound = if matches!(target.measure, Rate) { "at least" } else { "at most" };
        let void = report.void.iter().any(|case| case == target.case);
        let says = match (void, target.met(value)) {
            (true, _) => "void",
            (false, true) => "met",
            (false, false) => "**missed**",
        };
        let _ = writeln!(
            rows,
            "| {} | {} | {bound} {:.2} | {value:.3} | {says} |",
            target.case,
            target.what(),
            target.bound
        );
    }
    if rows.is_empty() {
        return rows;
    }
    format!("\n### Targets\n\n| case | what | wanted | is | |\n|---|---|---:|---:|---|\n{rows}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Case, report::Run, system::Kind};

    fn run(case: &str, system: &str, median: f64) -> Run {
        Run {
            engine: "counted".into(),
            kernel: String::new(),
            case: case.into(),
            system: system.into(),
            endpoints: 2,
            flows: 1,
            unit: String::new(),
            median,
            min: median,
            max: median,
            n: 1,
        }
    }

    #[test]
    fn a_target_is_met_or_missed() {
        let mut report = Report::new("counted");
        report.runs = vec![
            run("attack/wrong-mac", "bare-drop", 70.0),
            run("attack/wrong-mac", "eniway-xdp-guard", 100.0),
            run("pods-wire/tcp-rr", "eniway", 100.0),
            run("pods-wire/tcp-rr", "eniway-4000-pods", 110.0),
            run("same-node/tcp-rr", "loopback", 10.0),
            run("same-node/tcp-rr", "eniway", 24.0),
            run("same-node/tcp-rr", "bare-redirect-peer", 20.0),
        ];
        let text = markdown(&report);
        let line = |part: &str| text.lines().find(|line| line.contains(part)).unwrap_or_default();
        assert!(line("wrong-mac").ends_with("| at least 0.80 | 0.700 | **missed** |"), "{text}");
        assert!(line("4000-pods").ends_with("| at most 1.10 | 1.100 | met |"), "{text}");
        assert!(line("bare-redirect-peer").ends_with("| at most 1.40 | 1.400 | met |"), "{text}");
        assert_eq!(text.matches("\n| ").count(), 4, "a row for what was not measured: {text}");
        report.void.push("pods-wire/tcp-rr".into());
        assert!(markdown(&report).contains("1.100 | void |"));
        assert_eq!(markdown(&Report::new("wall")), "");
    }

    #[test]
    fn targets_name_cases_and_systems_that_exist() {
        let cases: Vec<String> = Case::all().map(|case| case.to_string()).collect();
        for target in &TARGETS {
            assert!(cases.iter().any(|case| case == target.case), "{}", target.case);
            for system in [target.of, target.to] {
                let known = Kind::ALL.iter().any(|kind| kind.name() == system);
                assert!(known || system.starts_with("eniway-") && system.contains("-pods"), "{system}");
            }
        }
    }
}

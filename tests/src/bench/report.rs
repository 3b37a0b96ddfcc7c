//! Figures, and how they are written down.

use std::{fmt::Write as _, fs};

use serde::{Deserialize, Serialize};

use super::targets;

/// Everything that was measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// What counted: "counted" or "wall".
    pub engine: String,
    /// Release of the kernel.
    pub kernel: String,
    /// Costs.
    pub runs: Vec<Run>,
    /// Costs of one system over those of another.
    pub ratios: Vec<Ratio>,
    /// The same after the cost of loopback was taken off both.
    #[serde(default)]
    pub above_loopback: Vec<Above>,
    /// Cases whose control was off: what was measured there says nothing.
    pub void: Vec<String>,
}

/// What a unit of a case costs over a system.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// As in the report.
    pub engine: String,
    /// As in the report.
    pub kernel: String,
    /// Place and load.
    pub case: String,
    /// The system.
    pub system: String,
    /// Pods on the client's node.
    pub endpoints: u32,
    /// Flows at once.
    #[serde(default = "one")]
    pub flows: u32,
    /// What the numbers are.
    pub unit: String,
    /// Of all rounds.
    pub median: f64,
    /// The cheapest round.
    pub min: f64,
    /// The dearest round.
    pub max: f64,
    /// Rounds.
    pub n: usize,
}

const fn one() -> u32 {
    1
}

/// The cost of one system over that of another: below 1, the first is cheaper.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ratio {
    /// Place and load.
    pub case: String,
    /// The first system.
    pub of: String,
    /// The second.
    pub to: String,
    /// The median of the ratios of each round.
    pub value: f64,
    /// Where the median lies with a probability of 95 %: from here
    pub low: f64,
    /// to here.
    pub high: f64,
}

/// What one system costs more than a base, over what another costs more than it. Of the medians: in a single round
/// what is left after the subtraction can be smaller than what disturbs the round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Above {
    /// Place and load.
    pub case: String,
    /// The first system.
    pub of: String,
    /// The second.
    pub to: String,
    /// The ratio.
    pub value: f64,
}

/// Median and range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle one; of an even number, the lower of the two in the middle.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of at least one value.
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        let last = sorted.len().saturating_sub(1);
        Self { median: at(last / 2), min: at(0), max: at(last) }
    }
}

/// How often the median is taken of a sample drawn from the rounds.
const DRAWS: usize = 2000;

impl Ratio {
    /// Of costs of the same rounds.
    pub fn paired(case: String, of: &str, to: &str, costs: &[f64], others: &[f64]) -> Self {
        let ratios: Vec<f64> = costs.iter().zip(others).map(|(cost, other)| cost / other).collect();
        let mut random = fastrand::Rng::with_seed(1);
        let mut drawn = vec![0.0; ratios.len()];
        let mut medians: Vec<f64> = (0..DRAWS)
            .map(|_| {
                drawn.fill_with(|| ratios[random.usize(..ratios.len())]);
                Spread::of(&drawn).median
            })
            .collect();
        medians.sort_by(f64::total_cmp);
        let value = Spread::of(&ratios).median;
        let (low, high) = (medians[DRAWS / 40], medians[DRAWS - 1 - DRAWS / 40]);
        Self { case, of: of.into(), to: to.into(), value, low, high }
    }
}

impl Report {
    /// An empty one of the running kernel.
    pub fn new(engine: &str) -> Self {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            engine: engine.to_owned(),
            kernel: kernel.trim().to_owned(),
            runs: vec![],
            ratios: vec![],
            above_loopback: vec![],
            void: vec![],
        }
    }

    /// Compares a system with all others above a base, in the cases that have both.
    pub fn compare_above(&mut self, of: &str, base: &str) {
        let mut all = Vec::new();
        for case in self.cases() {
            let runs = self.of(case);
            let median = |name: &str| runs.iter().find(|run| run.system == name).map(|run| run.median);
            let (Some(ours), Some(base_cost)) = (median(of), median(base)) else { continue };
            let others = runs.iter().filter(|run| run.system != of && run.system != base);
            all.extend(others.map(|run| Above {
                case: case.to_owned(),
                of: of.to_owned(),
                to: run.system.clone(),
                value: (ours - base_cost) / (run.median - base_cost),
            }));
        }
        self.above_loopback = all;
    }

    /// The cases, each once, in the order of measurement.
    pub fn cases(&self) -> Vec<&str> {
        let mut cases = Vec::new();
        for Run { case, .. } in &self.runs {
            if !cases.contains(&case.as_str()) {
                cases.push(case);
            }
        }
        cases
    }

    /// The figures of a case, the cheapest first.
    pub fn of(&self, case: &str) -> Vec<&Run> {
        let mut runs: Vec<_> = self.runs.iter().filter(|run| run.case == case).collect();
        runs.sort_by(|a, b| a.median.total_cmp(&b.median));
        runs
    }

    /// The median of a system in a case.
    pub fn median(&self, case: &str, system: &str) -> Option<f64> {
        self.runs.iter().find(|run| run.case == case && run.system == system).map(|run| run.median)
    }

    /// Engine and kernel, as files are called: `counted-6.12`.
    pub fn name(&self) -> String {
        let version: Vec<_> = self.kernel.split('.').take(2).collect();
        format!("{}-{}", self.engine, version.join("."))
    }

    /// The file of a case's chart.
    pub fn chart(&self, case: &str) -> String {
        format!("{}-{}.svg", self.name(), case.replace('/', "-"))
    }

    /// A document with the tables and the charts.
    pub fn document(&self) -> String {
        let mut text = format!("# {}, kernel {}\n", self.engine, self.kernel);
        text.push_str("\n[What the columns mean](README.md)\n");
        text.push_str(&self.markdown());
        text.push('\n');
        for case in self.cases() {
            let _ = writeln!(text, "![{case}]({})", self.chart(case));
        }
        text
    }

    /// Tables in Markdown: the targets, and a case each.
    pub fn markdown(&self) -> String {
        let mut text = targets::markdown(self);
        for case in self.cases() {
            let runs = self.of(case);
            let unit = runs.first().map_or("", |run| run.unit.as_str());
            let _ = write!(text, "\n### {case}\n\n");
            if self.void.iter().any(|void| void == case) {
                text.push_str("**Void**: the control pair differed; these figures say nothing.\n\n");
            }
            // Either of all ratios of a case is the same system.
            let ratios: Vec<_> = self.ratios.iter().filter(|ratio| ratio.case == case).collect();
            let same = |pick: fn(&Ratio) -> &str| {
                let first = ratios.first().map(|ratio| pick(ratio))?;
                ratios.iter().all(|ratio| pick(ratio) == first).then(|| first.to_owned())
            };
            let (of, to) = (same(|ratio| &ratio.of), same(|ratio| &ratio.to));
            let column = match (&of, &to) {
                (Some(of), _) => format!("{of} / this"),
                (None, Some(to)) => format!("this / {to}"),
                (None, None) => String::from("ratio"),
            };
            let above = self.above_loopback.iter().any(|above| above.case == case);
            let _ = write!(
                text,
                "| system | {unit} | range | {column} |{}\n|---|---:|---|---:|{}\n",
                if above { " above loopback |" } else { "" },
                if above { "---:|" } else { "" },
            );
            for run in runs {
                let written =
                    |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.3}"));
                let ratio = ratios.iter().find(|ratio| {
                    ratio.to == run.system && of.is_some() || ratio.of == run.system && of.is_none()
                });
                let _ = write!(
                    text,
                    "| {} | {:.0} | {:.0} to {:.0} | {} |",
                    run.system,
                    run.median,
                    run.min,
                    run.max,
                    written(ratio.map(|ratio| ratio.value)),
                );
                if above {
                    let of_case = self.above_loopback.iter().filter(|above| above.case == case);
                    let value =
                        of_case.filter(|above| above.to == run.system).map(|above| above.value).next();
                    let _ = write!(text, " {} |", written(value));
                }
                text.push('\n');
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_a_value_of_the_middle() {
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of(&[4.0, 1.0]).median, 1.0);
    }

    #[test]
    fn above_the_base_the_medians_are_compared() {
        let mut report = Report::new("counted");
        for (system, median) in [("loopback", 10.0), ("ours", 13.0), ("theirs", 12.0)] {
            let (case, unit) = (String::from("c"), String::new());
            let (engine, kernel, system) = (String::new(), String::new(), system.to_owned());
            report.runs.push(Run {
                engine,
                kernel,
                case,
                system,
                endpoints: 2,
                flows: 1,
                unit,
                median,
                min: 0.0,
                max: 99.0,
                n: 3,
            });
        }
        report.compare_above("ours", "loopback");
        let above = Above { case: "c".into(), of: "ours".into(), to: "theirs".into(), value: 1.5 };
        assert_eq!(report.above_loopback, [above]);
    }

    #[test]
    fn rounds_are_paired() {
        // Whatever disturbs a round disturbs both.
        let ratio = Ratio::paired("c".into(), "a", "b", &[1.0, 10.0, 100.0], &[2.0, 20.0, 200.0]);
        assert_eq!((ratio.value, ratio.low, ratio.high), (0.5, 0.5, 0.5));
    }
}

//! What was found, for people and for programs.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Map, Value, json};

use super::{
    action::Action,
    load::{Carried, Path},
    talk::Ended,
    tally::Tally,
};
use crate::demo::table::{Align, Table};

/// All rounds of one action.
#[derive(Clone, Debug)]
pub struct Case {
    /// What was done.
    pub action: Action,
    /// Rounds that count.
    pub rounds: u32,
    /// Why other rounds do not.
    pub void: Vec<String>,
    /// Packets of the rounds that count, by path.
    pub paths: BTreeMap<Path, Tally>,
    /// Requests a second on the slowest path in the slowest round.
    pub slowest: f64,
    /// From the start of the last agents until all are ready, of each round.
    pub ready: Vec<Duration>,
    /// Where packets were missing, and which counters had risen.
    pub missing: Vec<String>,
    /// Packets between pods of one node that went by the VPC instead, in all rounds, void ones and TCP included.
    pub hairpinned: u64,
}

impl Case {
    pub(super) fn new(action: Action) -> Self {
        Self {
            action,
            rounds: 0,
            void: Vec::new(),
            paths: Path::ALL.map(|path| (path, Tally::default())).into(),
            slowest: f64::INFINITY,
            ready: Vec::new(),
            missing: Vec::new(),
            hairpinned: 0,
        }
    }

    /// Adds a round.
    pub(super) fn count(&mut self, carried: &[Carried], ready: Duration, missing: Vec<String>) {
        self.rounds += 1;
        for carried in carried {
            *self.paths.entry(carried.path).or_default() += carried.tally;
            self.slowest = self.slowest.min(carried.rate);
        }
        self.ready.push(ready);
        self.missing.extend(missing);
    }

    /// Packets that were lost, by path, without those that a full socket refused.
    pub fn lost(&self) -> BTreeMap<Path, u64> {
        self.paths.iter().map(|(path, tally)| (*path, tally.unexplained())).collect()
    }

    fn by_path(&self, of: impl Fn(&Tally) -> u64) -> Value {
        let value = |(path, tally): (&Path, &Tally)| (path.name().to_owned(), json!(of(tally)));
        Value::Object(self.paths.iter().map(value).collect())
    }

    fn ready_ms(&self) -> u64 {
        let mut times = self.ready.clone();
        times.sort_unstable();
        times.get(times.len() / 2).map_or(0, |time| time.as_millis() as u64)
    }
}

/// Everything.
#[derive(Clone, Debug)]
pub struct Report {
    /// Requests a second on each path that were wanted; each is answered.
    pub rate: f64,
    /// What was done, in its order.
    pub cases: Vec<Case>,
    /// TCP connections that were established before anything was done.
    pub connections: usize,
    /// Those that stood to the end, with every byte as it was sent.
    pub survived: usize,
    /// Requests over them that were answered.
    pub exchanges: u64,
    /// Segments that were sent again.
    pub retransmitted: u64,
    /// Why the others ended.
    pub ended: Vec<String>,
}

impl Report {
    pub(super) fn new(rate: f64, connections: usize) -> Self {
        let (exchanges, retransmitted) = (0, 0);
        Self { rate, cases: vec![], connections, survived: 0, exchanges, retransmitted, ended: vec![] }
    }

    pub(super) fn note_talks(&mut self, talks: Vec<Ended>) {
        for talk in talks {
            self.exchanges += talk.exchanges;
            self.retransmitted += talk.retransmitted;
            match talk.error {
                None => self.survived += 1,
                Some(error) => self.ended.push(format!("{}: {error}", talk.name)),
            }
        }
    }

    /// The figures, by their names.
    pub fn figures(&self) -> Map<String, Value> {
        let by_case = |of: &dyn Fn(&Case) -> Value| {
            Value::Object(self.cases.iter().map(|case| (case.action.name().to_owned(), of(case))).collect())
        };
        let figures = json!({
            "lost": by_case(&|case| case.by_path(Tally::unexplained)),
            "sent": by_case(&|case| case.by_path(|tally| tally.sent)),
            "duplicates": by_case(&|case| case.by_path(|tally| tally.duplicates)),
            "reordered": by_case(&|case| case.by_path(|tally| tally.reordered)),
            "rounds": by_case(&|case| json!(case.rounds)),
            "void_rounds": by_case(&|case| json!(case.void.len())),
            "slowest_rate": by_case(&|case| json!(case.slowest.round())),
            "ready_ms": by_case(&|case| json!(case.ready_ms())),
            "fast_path_hairpinned": by_case(&|case| json!(case.hairpinned)),
            "missing": by_case(&|case| json!(case.missing)),
            "rate": self.rate,
            "tcp_connections": self.connections,
            "tcp_survived": self.survived,
            "tcp_exchanges": self.exchanges,
            "tcp_retransmitted": self.retransmitted,
            "tcp_ended": self.ended,
        });
        match figures {
            Value::Object(figures) => figures,
            _ => Map::new(),
        }
    }

    /// A table for people.
    pub fn table(&self) -> String {
        use Align::{Left, Right};
        let mut table = Table::new(&[
            ("ACTION", Left),
            ("ROUNDS", Right),
            ("VOID", Right),
            ("PATH", Left),
            ("PACKETS", Right),
            ("LOST", Right),
            ("TWICE", Right),
            ("REORDERED", Right),
            ("READY MS", Right),
        ]);
        for case in &self.cases {
            for (path, tally) in &case.paths {
                table.row([
                    case.action.name().to_owned(),
                    case.rounds.to_string(),
                    case.void.len().to_string(),
                    path.to_string(),
                    tally.sent.to_string(),
                    tally.unexplained().to_string(),
                    tally.duplicates.to_string(),
                    tally.reordered.to_string(),
                    case.ready_ms().to_string(),
                ]);
            }
        }
        let mut text = table.render("");
        for case in self.cases.iter().filter(|case| case.hairpinned > 0) {
            text.push_str(&format!(
                "{}: {} packets between pods of one node went by the VPC\n",
                case.action.name(),
                case.hairpinned
            ));
        }
        text.push_str(&format!(
            "TCP: {} of {} connections stood to the end; {} exchanges, every byte as it was sent; {} segments sent again\n",
            self.survived, self.connections, self.exchanges, self.retransmitted
        ));
        for line in &self.ended {
            text.push_str(&format!("    {line}\n"));
        }
        text
    }
}

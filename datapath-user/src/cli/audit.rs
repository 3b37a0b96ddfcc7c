//! `eniway audit`: is the node as it should be, and if not, what is different?

use std::{fmt::Write as _, process::ExitCode, time::Duration};

use eniway_agent_api::{ExpectRequest, RepairRequest, RepairResponse, SOCKET, agent_client::AgentClient};
use serde::Serialize;
use tonic::transport::Channel;

use super::{
    CliError, Node, Target, print, print_json, process,
    table::{Align, Table},
};
use crate::{
    audit::{self, Depth, Difference, Expected, Finding, Kind, Report, Target as Repair},
    grace::{Grace, KNOB},
    lock,
};

/// Exit status: what was found, or is left.
const FINDINGS: u8 = 1;
/// Exit status: it could not be found out.
const FAILED: u8 = 2;

/// A node that changes is looked at so many times.
const TRIES: u32 = 5;
/// How long the agent may take to say what should be: it may be busy with pods.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to repair.
const REPAIR: Duration = Duration::from_secs(60);

/// Compare the node with what should be: links, programs, offloads, neighbours, routes, rules, settings, tables, pins
///
/// Exit status: 0 = as it should be (with --fix: now), 1 = findings (with --fix: that remain), 2 = it cannot be told.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    target: Target,
    /// Have the agent repair what can be repaired, and look again
    #[arg(long)]
    fix: bool,
}

#[derive(Serialize)]
struct Answer<'a> {
    clean: bool,
    #[serde(flatten)]
    report: &'a Report,
    #[serde(skip_serializing_if = "Option::is_none")]
    repaired: Option<&'a [Finding]>,
    /// What the agent could not do, and what else is to be known.
    notes: &'a [String],
}

/// Runs the command; answers with its exit status.
pub fn run(args: &Args) -> ExitCode {
    match audited(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => FINDINGS.into(),
        Err(error) => {
            eprintln!("eniway: {error}");
            FAILED.into()
        }
    }
}

fn audited(args: &Args) -> Result<bool, CliError> {
    let node = Node::read(&args.target)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::Runtime)?;
    runtime.block_on(async {
        let mut notes = Vec::new();
        let mut report = look(&node, &mut notes).await?;
        let mut repaired = None;
        if args.fix {
            let before = report.findings.clone();
            if !before.is_empty() {
                fix(&node, &before, &mut notes).await?;
                report = look(&node, &mut notes).await?;
            }
            let remains = |finding: &Finding| report.findings.iter().any(|left| same(left, finding));
            repaired = Some(before.into_iter().filter(|finding| !remains(finding)).collect::<Vec<_>>());
        }
        notes.dedup();
        let clean = report.findings.is_empty();
        if args.target.json {
            let repaired = repaired.as_deref();
            print_json(&Answer { clean, report: &report, repaired, notes: &notes })?;
        } else {
            print(&text(&report, repaired.as_deref(), &notes))?;
        }
        Ok(clean)
    })
}

/// What is found may change while it is repaired: its place and what it is about do not.
fn same(a: &Finding, b: &Finding) -> bool {
    let key =
        |finding: &Finding| (finding.place.clone(), finding.difference.kind, finding.difference.what.clone());
    key(a) == key(b)
}

/// Looks until what should be has not changed meanwhile.
async fn look(node: &Node, notes: &mut Vec<String>) -> Result<Report, CliError> {
    let run_dir = &node.config.run_dir;
    let mut answers = node.running && expect(node, notes).await;
    let mut expected = Expected::read(run_dir)?;
    let mut tries = 0;
    loop {
        tries += 1;
        let mut report = audit::audit(&expected, &node.pins, Depth::Everything).await?;
        report.checks += 1;
        if !node.running && Grace::is_left_turned(run_dir) {
            report.findings.push(Finding {
                place: "node".to_owned(),
                difference: Difference {
                    kind: Kind::Sysctl,
                    what: KNOB.to_owned(),
                    expected: "0".to_owned(),
                    found: "1, as an agent left it that was killed".to_owned(),
                },
                repair: Repair::Leftovers,
            });
        }
        if report.findings.is_empty() || !answers {
            return Ok(report);
        }
        answers = expect(node, notes).await;
        let now = Expected::read(run_dir)?;
        if now == expected {
            return Ok(report);
        }
        if tries == TRIES {
            notes.push("the node kept changing while it was looked at; some findings may be over".to_owned());
            return Ok(report);
        }
        expected = now;
    }
}

fn connect(node: &Node, patience: Duration) -> Result<AgentClient<Channel>, String> {
    let socket = node.config.run_dir.join(SOCKET);
    eniway_agent_api::client(&socket, patience, patience).map_err(|error| error.to_string())
}

/// Has the agent write down what should be now. Returns whether it did.
async fn expect(node: &Node, notes: &mut Vec<String>) -> bool {
    let asked = async {
        let state = node.status.as_ref().and_then(|status| process(status.pid));
        if state.is_some_and(|(_, state)| matches!(state, 'T' | 't')) {
            return Err("it is stopped".to_owned());
        }
        let mut agent = connect(node, PATIENCE)?;
        agent.expect(ExpectRequest {}).await.map_err(|status| status.message().to_owned())
    };
    match asked.await {
        Ok(_) => true,
        Err(error) => {
            notes.push(format!("the agent does not answer ({error}); compared with what it wrote last"));
            false
        }
    }
}

async fn fix(node: &Node, findings: &[Finding], notes: &mut Vec<String>) -> Result<(), CliError> {
    if !node.running {
        let Ok(_lock) = lock::lock_run_dir(&node.config.run_dir) else {
            notes.push(
                "another process holds the agent's lock; run the audit again when it has ended".to_owned(),
            );
            return Ok(());
        };
        // Puts the grace periods back.
        Grace::new(&node.config.run_dir);
        let is_left = |it: &Finding| it.repair != Repair::Nobody && it.difference.what != KNOB;
        if findings.iter().any(is_left) {
            notes.push(
                "no agent is running, which alone repairs pods, parents and tables: start it \
                 (`eniway agent`, or `eniway agent --once`) and run `eniway audit --fix` again"
                    .to_owned(),
            );
        }
        return Ok(());
    }
    let mut request = RepairRequest::default();
    for finding in findings {
        match &finding.repair {
            Repair::Pod(owner) => request.pods.push(*owner),
            Repair::Parent(name) => request.parents.push(name.clone()),
            Repair::Tables => request.tables = true,
            Repair::Leftovers => request.leftovers = true,
            Repair::Nobody => {}
        }
    }
    let asked = async {
        let mut agent = connect(node, REPAIR)?;
        agent.repair(request).await.map_err(|status| status.message().to_owned())
    };
    match asked.await.map(tonic::Response::into_inner) {
        Ok(RepairResponse { problems }) => notes.extend(problems),
        Err(error) => notes.push(format!("the agent did not repair: {error}")),
    }
    Ok(())
}

fn text(report: &Report, repaired: Option<&[Finding]>, notes: &[String]) -> String {
    let mut out = String::new();
    let rows = |title: &'static str, findings: &[Finding]| {
        let mut table = Table::new(&[
            (title, Align::Left),
            ("WHERE", Align::Left),
            ("WHAT", Align::Left),
            ("EXPECTED", Align::Left),
            ("FOUND", Align::Left),
        ]);
        for Finding { place, difference, .. } in findings {
            table.row([
                difference.kind.name().to_owned(),
                place.clone(),
                difference.what.clone(),
                difference.expected.clone(),
                difference.found.clone(),
            ]);
        }
        table
    };
    // Writing to a string cannot fail.
    if let Some(repaired) = repaired.filter(|repaired| !repaired.is_empty()) {
        let _ = writeln!(out, "{}", rows("REPAIRED", repaired));
    }
    if !report.findings.is_empty() {
        let _ = writeln!(out, "{}", rows("FINDING", &report.findings));
    }
    for note in notes {
        let _ = writeln!(out, "note: {note}");
    }
    let Report { pods, parents, checks, findings } = report;
    let of = format!("{pods} pods, {parents} parents, {checks} checks");
    let _ = match (findings.len(), repaired.map_or(0, <[Finding]>::len)) {
        (0, 0) => writeln!(out, "clean: {of}"),
        (0, fixed) => writeln!(out, "clean now: {fixed} repaired, {of}"),
        (left, 0) => writeln!(out, "not clean: {left} findings, {of}"),
        (left, fixed) => writeln!(out, "not clean: {fixed} repaired, {left} findings remain, {of}"),
    };
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(what: &str) -> Finding {
        Finding {
            place: "default/a".to_owned(),
            difference: Difference {
                kind: Kind::Mtu,
                what: what.to_owned(),
                expected: "1500".to_owned(),
                found: "1400".to_owned(),
            },
            repair: Repair::Pod(1),
        }
    }

    #[tokio::test]
    async fn an_agent_is_asked_for_only_where_one_is_needed() {
        let run_dir = std::env::temp_dir().join(format!("eniway-audit-{}", std::process::id()));
        let mut node = Node { running: false, ..crate::cli::tests::node(Vec::new()) };
        node.config.run_dir.clone_from(&run_dir);
        let mut notes = Vec::new();
        let left_turned = Finding { repair: Repair::Leftovers, ..finding(KNOB) };
        fix(&node, &[left_turned, Finding { repair: Repair::Nobody, ..finding("MTU") }], &mut notes)
            .await
            .unwrap();
        assert!(notes.is_empty(), "{notes:?}");
        fix(&node, &[finding("MTU of eth0")], &mut notes).await.unwrap();
        assert!(matches!(notes.as_slice(), [one] if one.contains("no agent is running")), "{notes:?}");
        std::fs::remove_dir_all(run_dir).unwrap();
    }

    #[test]
    fn findings_are_a_table_and_a_sum() {
        let report = Report { pods: 2, parents: 1, checks: 90, findings: vec![finding("MTU of eth0")] };
        assert_eq!(
            text(&report, None, &[]),
            "FINDING   WHERE       WHAT          EXPECTED   FOUND\n\
             mtu       default/a   MTU of eth0   1500       1400\n\n\
             not clean: 1 findings, 2 pods, 1 parents, 90 checks\n"
        );
        let clean = Report { findings: vec![], ..report };
        assert_eq!(text(&clean, None, &[]), "clean: 2 pods, 1 parents, 90 checks\n");
        let fixed = [finding("MTU of eth0")];
        assert!(
            text(&clean, Some(&fixed), &[])
                .ends_with("clean now: 1 repaired, 2 pods, 1 parents, 90 checks\n")
        );
    }
}

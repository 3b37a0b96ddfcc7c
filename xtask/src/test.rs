//! `cargo xtask test`: runs the tests, passes on what the runners print, and sums up.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::{cmd, crates, lab, needs::Scope, setup, vm::matrix};

/// A part of the tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Group {
    /// Everything that runs without the kernel's help: parsing, decisions, configuration, planning.
    Host,
    /// The kernel programs, by BPF_PROG_TEST_RUN.
    Kernel,
    /// Scenarios in the lab.
    Lab,
    /// The kernel programs and the doors in the lab, on Debian's kernels in virtual machines.
    Vm,
    /// Security groups on the fast path against the VPC, at length.
    Equivalence,
}

/// What `equivalence` is told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cases {
    /// Repeats a run.
    pub(crate) seed: Option<u64>,
    /// How many.
    pub(crate) rule_sets: u64,
}

/// How the files of the scenarios in the lab begin, in tests/tests; the others test the kernel programs.
const SCENARIO_PREFIXES: [&str; 6] = ["agent", "bandwidth", "fabric", "groups", "lab", "scenario"];

/// Runs the tests of `group` (all without one), those in virtual machines on `kernels`. Returns whether all of them
/// passed.
pub(crate) fn run(group: Option<Group>, kernels: &[String], filter: &[String]) -> Result<bool> {
    let wanted = |one| group.is_none_or(|group| group == one);
    let host_only = group == Some(Group::Host);
    if host_only {
        setup::run(Scope::HostTests)?;
    } else {
        lab::need_root("testing the kernel programs")?;
        setup::run(Scope::Tests)?;
    }
    let mut total = Count::default();
    if wanted(Group::Host) {
        let mut tests = cmd::cargo(&["test", "--locked", "--no-fail-fast"]);
        crates::host(&mut tests).args(["--exclude", crates::LAB, "--"]).args(filter);
        total.add(runner("host", &mut tests)?);
    }
    if !host_only {
        // One build for both groups; the scenarios run the agent's own program.
        let built = if wanted(Group::Lab) || wanted(Group::Vm) { lab::build_next("dev") } else { Ok(()) };
        if let Err(error) = built.and_then(|()| lab::build()) {
            eprintln!("error: {error:#}");
            total.failed += 1;
        } else {
            for (name, one) in [("kernel", Group::Kernel), ("lab", Group::Lab)] {
                if wanted(one) {
                    total.add(in_kernel(name, one, filter)?);
                }
            }
            if wanted(Group::Vm) {
                total.add(matrix::run(kernels, filter)?);
            }
        }
    }
    if total.ignored > 0 {
        println!("{} ignored", total.ignored);
    }
    if total.passed + total.failed == 0 {
        eprintln!("error: no test ran; does a test have {filter:?} in its name?");
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    Ok(total.failed == 0 && total.passed > 0)
}

fn in_kernel(name: &str, group: Group, filter: &[String]) -> Result<Count> {
    let files = test_files(&cmd::root().join("tests/tests"), group)?;
    let mut tests = cmd::cargo(&["test", "--locked", "--no-fail-fast", "--package", crates::LAB]);
    if group == Group::Kernel {
        tests.args(["--lib", "--bins"]);
    } else if files.is_empty() {
        bail!("no files that begin with {} in tests/tests", SCENARIO_PREFIXES.join(" or "));
    }
    for file in &files {
        tests.args(["--test", file]);
    }
    // Namespaces, pins and interfaces are the machine's: one test at a time.
    tests.args(["--", "--test-threads=1"]).args(filter);
    tests.env("ENIWAY_BIN", lab::bin_dir()?.join("eniway"));
    runner(name, &mut tests)
}

/// The integration tests of a group, as cargo names them.
fn test_files(dir: &Path, group: Group) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        let is_test = path.extension().is_some_and(|e| e == "rs") || path.join("main.rs").is_file();
        let Some(name) = path.file_stem().and_then(|name| name.to_str()).filter(|_| is_test) else {
            continue;
        };
        let is_scenario = SCENARIO_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
        if is_scenario == (group == Group::Lab) {
            files.push(name.to_owned());
        }
    }
    files.sort();
    Ok(files)
}

/// Runs the random cases of security groups.
pub(crate) fn equivalence(Cases { seed, rule_sets }: Cases) -> Result<bool> {
    lab::need_root("testing the kernel programs")?;
    setup::run(Scope::Tests)?;
    let mut tests = cmd::cargo(&["test", "--locked", "--package", crates::LAB]);
    tests.args(["--test", "equivalence_groups", "--", "--test-threads=1", "--nocapture"]);
    tests.env("ENIWAY_RULE_SETS", rule_sets.to_string());
    if let Some(seed) = seed {
        tests.env("ENIWAY_SEED", seed.to_string());
    }
    let count = runner("equivalence", &mut tests)?;
    println!("{} passed, {} failed", count.passed, count.failed);
    Ok(count.failed == 0 && count.passed > 0)
}

/// Runs one `cargo test`, passing on and reading what it prints.
fn runner(name: &str, tests: &mut Command) -> Result<Count> {
    eprintln!("==> tests, {name}");
    let start = Instant::now();
    let mut child = tests.stdout(Stdio::piped()).spawn().with_context(|| cmd::cannot_run(tests))?;
    let mut reader = Reader::default();
    let lines = BufReader::new(child.stdout.take().context("the runner's output")?);
    for line in lines.split(b'\n') {
        let line = line.context("reading the runner's output")?;
        let mut out = io::stdout().lock();
        out.write_all(&line).and_then(|()| out.write_all(b"\n")).context("standard output")?;
        reader.line(&String::from_utf8_lossy(&line));
    }
    let status = child.wait().context("waiting for the runner")?;
    let mut count = reader.end();
    if !status.success() {
        eprintln!("    {}: {}", cmd::ended(status), cmd::line(tests));
        // It did not build, or it was killed between two test programs: that is no success either.
        count.failed = count.failed.max(1);
    }
    let seconds = start.elapsed().as_secs_f64();
    eprintln!("    tests, {name}: {} passed, {} failed ({seconds:.1} s)", count.passed, count.failed);
    Ok(count)
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) ignored: u64,
}

impl Count {
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

/// Reads what a test program prints.
#[derive(Default)]
pub(crate) struct Reader {
    total: Count,
    /// The program that is running: how many tests it announced, and what became of them so far.
    current: Option<(u64, Count)>,
}

impl Reader {
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(announced) = announcement(line) {
            self.give_up();
            self.current = Some((announced, Count::default()));
        } else if let Some(count) = summary(line) {
            self.current = None;
            self.total.add(count);
        } else if let Some((_, seen)) = &mut self.current
            && line.starts_with("test ")
        {
            seen.passed += u64::from(line.ends_with(" ... ok"));
            seen.ignored += u64::from(line.contains(" ... ignored"));
        }
    }

    pub(crate) fn end(mut self) -> Count {
        self.give_up();
        self.total
    }

    /// The running program ended without a summary: it was killed or aborted. What it did not report as
    /// passed counts as failed.
    fn give_up(&mut self) {
        let Some((announced, mut seen)) = self.current.take() else { return };
        seen.failed = announced.saturating_sub(seen.passed + seen.ignored).max(1);
        eprintln!(
            "    a test program ended without a summary after {} of {announced} tests: killed or aborted",
            seen.passed
        );
        self.total.add(seen);
    }
}

/// `running 3 tests`
fn announcement(line: &str) -> Option<u64> {
    let (number, rest) = line.strip_prefix("running ")?.split_once(' ')?;
    rest.starts_with("test").then(|| number.parse().ok())?
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s`
fn summary(line: &str) -> Option<Count> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let of = |what: &str| counts.split("; ").find_map(|part| part.strip_suffix(what)?.trim().parse().ok());
    Some(Count { passed: of("passed")?, failed: of("failed")?, ignored: of("ignored")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Count {
        let mut reader = Reader::default();
        text.lines().for_each(|line| reader.line(line));
        reader.end()
    }

    #[test]
    fn summaries_add_up() {
        let text = "\nrunning 2 tests\ntest a ... ok\ntest b ... FAILED\n\n\
            test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 3 filtered out; finished in 0.01s\n\
            running 1 test\ntest c ... ignored, slow\n\
            test result: ok. 0 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        assert_eq!(read(text), Count { passed: 1, failed: 1, ignored: 1 });
    }

    #[test]
    fn a_killed_program_is_a_failure() {
        let text = "running 3 tests\ntest a ... ok\ntest b ... ";
        assert_eq!(read(text), Count { passed: 1, failed: 2, ignored: 0 });
        // The next program's announcement ends it as well.
        let text = "running 1 test\ntest a ... ok\nrunning 0 tests\n\
            test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(read(text), Count { passed: 1, failed: 1, ignored: 0 });
    }

    #[test]
    fn other_lines_are_not_taken_for_tests() {
        assert_eq!(read("running down the list\ntest result: good\ntest x ... ok"), Count::default());
    }
}

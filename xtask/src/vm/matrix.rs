//! The tests of the kernel programs and of the lab, on other kernels than the running one.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{Engine, Job, Kernel, Ran, Run, boot};
use crate::{
    cmd, crates, needs,
    test::{Count, Reader},
};

/// The kernels that are tested when none are named.
pub(crate) const KERNELS: [&str; 2] = ["6.1", "6.12"];

/// The test programs that run there.
const TESTS: [&str; 4] = ["abi", "load", "fixtures", "scenarios"];

/// How long one kernel may take.
const LIMIT: Duration = Duration::from_secs(900);

/// Runs the tests on each kernel, and says for each how many passed.
pub(crate) fn run(kernels: &[String], filter: &[String]) -> Result<Count> {
    let programs = build()?;
    let mut total = Count::default();
    let mut lines = Vec::new();
    for version in kernels {
        let counted = cmd::step(&format!("tests, kernel {version}"), || on(version, &programs, filter));
        let count = counted.unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            Count { failed: 1, ..Count::default() }
        });
        lines.push(format!("kernel {version}: {} passed, {} failed", count.passed, count.failed));
        total.add(count);
    }
    for line in lines {
        println!("{line}");
    }
    Ok(total)
}

/// The test programs, by name.
fn build() -> Result<Vec<(String, PathBuf)>> {
    cmd::step("build the tests", || {
        let mut build = cmd::cargo(&["test", "--locked", "--no-run", "--message-format=json"]);
        build.args(["--package", crates::LAB]);
        for test in TESTS {
            build.args(["--test", test]);
        }
        let messages = cmd::output(&mut build)?;
        let mut programs = Vec::new();
        for message in messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            if let (Some(program), Some(name)) = (message["executable"].as_str(), message["target"]["name"].as_str())
                && TESTS.contains(&name)
            {
                programs.push((name.to_owned(), PathBuf::from(program)));
            }
        }
        programs.sort_by_key(|(name, _)| TESTS.iter().position(|test| test == name));
        Ok(programs)
    })
}

fn on(version: &str, programs: &[(String, PathBuf)], filter: &[String]) -> Result<Count> {
    let kernel = Kernel::find(version)?;
    let args: Vec<String> = ["--test-threads=1"].map(str::to_owned).into_iter().chain(filter.iter().cloned()).collect();
    let runs: Vec<Run> = programs
        .iter()
        .map(|(name, program)| Run { name: name.clone(), program: program.clone(), args: args.clone() })
        .collect();
    let tests = cmd::root().join("tests");
    let budget = tests.join("verifier-budget.json");
    let bless = std::env::var("ENIWAY_BLESS").unwrap_or_default();
    let job = Job {
        kernel: &kernel,
        engine: Engine::Fast,
        runs: &runs,
        tools: &tools()?,
        files: &[tests.join("abi.txt"), budget.clone()],
        dirs: &[temporary(programs)?],
        env: &[("ENIWAY_BLESS", bless.clone())],
        back: if bless == "1" { std::slice::from_ref(&budget) } else { &[] },
        limit: LIMIT,
    };
    let mut reader = Reader::default();
    let ran = boot(&job, |line| {
        println!("{line}");
        reader.line(line);
    });
    let mut count = reader.end();
    let ran = match ran {
        Ok(ran) => ran,
        Err(error) => {
            eprintln!("error: {error:#}");
            count.failed = count.failed.max(1);
            return Ok(count);
        }
    };
    for Ran { name, success, ended, seconds } in ran {
        eprintln!("    kernel {version}, {name}: {ended} after {seconds:.1} s");
        if !success {
            count.failed = count.failed.max(1);
        }
    }
    Ok(count)
}

/// `CARGO_TARGET_TMPDIR` of the test programs, which is compiled into them.
fn temporary(programs: &[(String, PathBuf)]) -> Result<PathBuf> {
    let program = programs.first().map(|(_, path)| path.as_path()).context("cargo named no test program")?;
    let target = program.ancestors().nth(3).context("the target directory")?;
    Ok(target.join("tmp"))
}

/// What the lab runs, and what the kernel loads modules by.
pub(crate) fn tools() -> Result<Vec<PathBuf>> {
    let names = needs::LAB_TOOLS.iter().map(|tool| tool.program).chain(["modprobe"]);
    names.map(|name| needs::find_tool(name).with_context(|| format!("no program {name}"))).collect()
}

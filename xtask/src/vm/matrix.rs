//! The tests of the kernel programs and of the lab, on other kernels than the running one.

use std::{
    num::NonZero,
    path::PathBuf,
    thread::{self, ScopedJoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{Job, Kernel, Ran, Run, boot};
use crate::{
    cmd, crates, lab, needs,
    test::{Count, Reader},
};

/// The kernels that are tested when none are named.
pub(crate) const KERNELS: [&str; 2] = ["6.1", "6.12"];

/// The test programs that run there.
const TESTS: [&str; 10] = [
    "abi",
    "load",
    "fixtures",
    "equivalence",
    "lab",
    "fabric",
    "agent",
    "agent_abi",
    "scenarios",
    "bandwidth",
];

/// Where tests look for the agent of the next ABI version: beside the directory of the other programs.
const NEXT_AGENT: &str = "/opt/next-abi/eniway";

/// How many generated packets the comparison of host and kernel takes; elsewhere it takes more.
const PACKETS: &str = "5000";

/// At which of its steps an agent is killed on its way to another version; elsewhere at each.
const KILL_EVERY: &str = "20";

/// How long one kernel may take.
const LIMIT: Duration = Duration::from_secs(1500);

/// Runs the tests on each kernel, and says for each how many passed.
pub(crate) fn run(kernels: &[String], filter: &[String]) -> Result<Count> {
    let programs = build()?;
    // apt and the caches are for one at a time; the machines are not. Each has one processor.
    let found = kernels.iter().map(|version| Kernel::find(version)).collect::<Result<Vec<_>>>()?;
    let bless = std::env::var("ENIWAY_BLESS").is_ok_and(|value| value == "1");
    // Each of them would write the file of all kernels.
    let at_once = if bless { 1 } else { thread::available_parallelism().map_or(1, NonZero::get) };
    let mut total = Count::default();
    let mut lines = Vec::new();
    for kernels in found.chunks(at_once) {
        let counts: Vec<_> = thread::scope(|scope| {
            let machines: Vec<_> =
                kernels.iter().map(|kernel| scope.spawn(|| on(kernel, &programs, filter, bless))).collect();
            machines.into_iter().map(ScopedJoinHandle::join).collect()
        });
        for (kernel, count) in kernels.iter().zip(counts) {
            let count =
                count.unwrap_or_else(|panic| std::panic::resume_unwind(panic)).unwrap_or_else(|error| {
                    eprintln!("error: {error:#}");
                    Count { failed: 1, ..Count::default() }
                });
            lines
                .push(format!("kernel {}: {} passed, {} failed", kernel.release, count.passed, count.failed));
            total.add(count);
        }
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
            if let (Some(program), Some(name)) =
                (message["executable"].as_str(), message["target"]["name"].as_str())
                && TESTS.contains(&name)
            {
                programs.push((name.to_owned(), PathBuf::from(program)));
            }
        }
        programs.sort_by_key(|(name, _)| TESTS.iter().position(|test| test == name));
        Ok(programs)
    })
}

fn on(kernel: &Kernel, programs: &[(String, PathBuf)], filter: &[String], bless: bool) -> Result<Count> {
    let version = &kernel.version;
    let args: Vec<String> =
        ["--test-threads=1"].map(str::to_owned).into_iter().chain(filter.iter().cloned()).collect();
    let runs: Vec<Run> = programs
        .iter()
        .map(|(name, program)| Run { name: name.clone(), program: program.clone(), args: args.clone() })
        .collect();
    let tests = cmd::root().join("tests");
    let budget = tests.join("verifier-budget.json");
    let job = Job {
        kernel,
        runs: &runs,
        programs: &[(lab::next_agent()?, NEXT_AGENT)],
        tools: &tools()?,
        files: &[tests.join("abi.txt"), budget.clone()],
        packaged: &[],
        trees: &[],
        dirs: &[temporary(programs)?],
        env: &[
            ("ENIWAY_BLESS", u8::from(bless).to_string()),
            ("ENIWAY_PACKETS", PACKETS.to_owned()),
            ("ENIWAY_KILL_EVERY", KILL_EVERY.to_owned()),
        ],
        back: if bless { std::slice::from_ref(&budget) } else { &[] },
        limit: LIMIT,
    };
    let mut reader = Reader::default();
    let ran = boot(&job, |line| {
        println!("{version}: {line}");
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

/// What the lab and the tests run, and what the kernel loads modules by.
pub(crate) fn tools() -> Result<Vec<PathBuf>> {
    let tests = ["modprobe", "tc", "sh", "setpriv", "unshare", "umount"];
    let names = needs::LAB_TOOLS.iter().map(|tool| tool.program).chain(tests);
    names.map(|name| needs::find_tool(name).with_context(|| format!("no program {name}"))).collect()
}

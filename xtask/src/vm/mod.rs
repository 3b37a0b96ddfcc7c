//! Virtual machines: Debian's kernels under qemu, without KVM, with an initramfs that holds what is to run.
//!
//! Nothing is installed for it: kernels, and qemu where the machine has none, come as packages by apt and are unpacked
//! below `target/vm`. The first process inside is `eniway-vm-init` (tests/src/bin), which runs a list of programs, passes
//! on what they print by the first serial port, and reports by the second.
//!
//! The machine has one processor, and its clock counts instructions: each is a nanosecond. What happens inside does not
//! depend on how busy the host is, waiting takes no time, and a duration is a number of instructions.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::{cmd, lab};

mod image;
mod kernel;
pub(crate) mod matrix;
mod output;
pub(crate) mod packages;
mod qemu;

pub(crate) use kernel::Kernel;

use image::Image;

/// A program to run inside.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    /// How reports call it.
    pub(crate) name: String,
    /// On the host.
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<String>,
}

/// What a virtual machine is to do.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) runs: &'a [Run],
    /// Further programs of ours, and their places inside. The agent is there in any case.
    pub(crate) programs: &'a [(PathBuf, &'a str)],
    /// Further programs of the machine, by their names on the host's PATH or by path.
    pub(crate) tools: &'a [PathBuf],
    /// Files that the programs find at the same place as on the host.
    pub(crate) files: &'a [PathBuf],
    /// Files of packages: the directory where one is unpacked, and the place of the file when it is installed.
    pub(crate) packaged: &'a [(PathBuf, &'a str)],
    /// Directories that are there as on the host.
    pub(crate) trees: &'a [PathBuf],
    /// Directories, empty at the start.
    pub(crate) dirs: &'a [PathBuf],
    pub(crate) env: &'a [(&'a str, String)],
    /// Files of the guest that are brought back, to the same place, when all is done.
    pub(crate) back: &'a [PathBuf],
    /// After this the machine is stopped.
    pub(crate) limit: Duration,
}

/// What came of a run.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) name: String,
    pub(crate) success: bool,
    /// How it ended, in words.
    pub(crate) ended: String,
    /// By the guest's clock.
    pub(crate) seconds: f64,
}

/// Directory of all that is kept between calls.
pub(crate) fn cache() -> Result<PathBuf> {
    let bin = lab::bin_dir()?;
    Ok(bin.parent().context("the target directory")?.join("vm"))
}

/// Boots, runs everything, and hands each line of the guest's output to `line`.
pub(crate) fn boot(job: &Job<'_>, mut line: impl FnMut(&str)) -> Result<Vec<Ran>> {
    let cache = cache()?;
    remove_leftovers(&cache);
    let dir = cache.join(format!("{RUN}{}-{}", job.kernel.version, std::process::id()));
    fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    let done = boot_in(&dir, job, &mut line);
    // Hundreds of megabytes that nobody needs any more.
    let _ = fs::remove_dir_all(&dir);
    done
}

/// How the directories of machines begin; they end with the number of the process that the machine belongs to.
const RUN: &str = "run-";

/// Removes what processes left behind that were killed.
fn remove_leftovers(cache: &Path) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = name.strip_prefix(RUN).and_then(|rest| rest.rsplit('-').next());
        if process.is_some_and(|id| !Path::new("/proc").join(id).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn boot_in(dir: &Path, job: &Job<'_>, line: &mut impl FnMut(&str)) -> Result<Vec<Ran>> {
    let start = Instant::now();
    let initramfs = dir.join("initramfs");
    build_image(&initramfs, dir, job)?;
    let report = dir.join("report");
    let mut qemu = qemu::command(job.kernel, &initramfs, &report)?;
    let made = start.elapsed();
    output::watch(&mut qemu, job.limit, line)?;
    let Guest { ran, files } = read_report(&report)?;
    for (path, text) in files {
        if job.back.contains(&path) {
            fs::write(&path, text).with_context(|| path.display().to_string())?;
        }
    }
    if let Some(missing) = job.runs.get(ran.len()) {
        bail!("kernel {}: the machine stopped during {}", job.kernel.release, missing.name);
    }
    eprintln!(
        "    kernel {}: image in {:.1} s, ran for {:.1} s",
        job.kernel.release,
        made.as_secs_f64(),
        (start.elapsed() - made).as_secs_f64()
    );
    Ok(ran)
}

/// Where programs under test are inside.
const GUEST_BIN: &str = "/opt/eniway";

fn build_image(to: &Path, scratch: &Path, job: &Job<'_>) -> Result<()> {
    let mut image = Image::create(to, scratch)?;
    for dir in
        ["/dev", "/proc", "/sys", "/run", "/tmp", "/root", "/var/tmp", "/var/log/nginx", "/var/lib/nginx"]
    {
        image.dir(dir)?;
    }
    // Programs change to these users.
    let (mut users, mut groups) = (String::new(), String::new());
    for (name, id) in [("root", 0), ("www-data", 33), ("tcpdump", 104), ("nobody", 65534), ("nogroup", 65534)]
    {
        users += &format!("{name}:x:{id}:{id}::/:/bin/sh\n");
        groups += &format!("{name}:x:{id}:\n");
    }
    image.file("/etc/passwd", 0o644, users.as_bytes())?;
    image.file("/etc/group", 0o644, groups.as_bytes())?;
    image.own_program(&lab::bin_dir()?.join("eniway-vm-init"), "/init")?;
    let mut runs = Vec::new();
    for run in job.runs {
        let inside = format!("{GUEST_BIN}/{}", run.name);
        image.own_program(&run.program, &inside)?;
        let command: Vec<&str> =
            std::iter::once(inside.as_str()).chain(run.args.iter().map(String::as_str)).collect();
        runs.push(json!({ "name": run.name, "command": command }));
    }
    for tool in job.tools {
        image.program(tool)?;
    }
    image.own_program(&lab::bin_dir()?.join("eniway"), &format!("{GUEST_BIN}/eniway"))?;
    for (program, place) in job.programs {
        image.own_program(program, place)?;
    }
    for file in job.files {
        let content = fs::read(file).with_context(|| file.display().to_string())?;
        image.file(file, 0o644, &content)?;
    }
    for (root, path) in job.packaged {
        image.packaged(root, path)?;
    }
    for tree in job.trees {
        image.tree(tree, &tree.to_string_lossy())?;
    }
    for dir in job.dirs {
        image.dir(dir)?;
    }
    image.tree(&job.kernel.modules, "/usr/lib/modules")?;
    let mut env = json!({
        "PATH": format!("{GUEST_BIN}:/usr/sbin:/usr/bin"),
        "ENIWAY_BIN": format!("{GUEST_BIN}/eniway"),
    });
    for (name, value) in job.env {
        env[name] = json!(value);
    }
    let spec = json!({ "runs": runs, "env": env, "back": job.back });
    image.file("/eniway-vm.json", 0o644, spec.to_string().as_bytes())?;
    image.finish()
}

/// What the guest has said.
struct Guest {
    ran: Vec<Ran>,
    /// Paths and contents.
    files: Vec<(PathBuf, String)>,
}

/// Reads what the guest reported: a line of JSON for each run, then for each file that it hands back.
fn read_report(path: &Path) -> Result<Guest> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let (mut ran, mut files) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let value: Value =
            serde_json::from_str(line).with_context(|| format!("the guest's report: {line:?}"))?;
        let word = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
        if value["file"].is_string() {
            files.push((word("file").into(), word("text")));
        } else {
            ran.push(Ran {
                name: word("run"),
                success: value["success"] == json!(true),
                ended: word("ended"),
                seconds: value["seconds"].as_f64().unwrap_or(0.0),
            });
        }
    }
    Ok(Guest { ran, files })
}

/// Runs a program to its end, quietly; what it printed is shown only when it fails.
fn quiet(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| cmd::cannot_run(command))?;
    if !output.status.success() {
        let _ = std::io::stderr().write_all(&output.stderr);
        bail!("{}: {}", cmd::ended(output.status), cmd::line(command));
    }
    Ok(())
}

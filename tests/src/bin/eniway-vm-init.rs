//! The first process of a virtual machine of `cargo xtask test vm` and `cargo xtask bench`: prepares the machine, runs the
//! programs that `/eniway-vm.json` lists, one after the other, and switches the machine off.
//!
//! What the programs print goes to the console, the first serial port. The second one carries a line of JSON for each
//! program that ran and for each file that is handed back.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        resource::{Resource, setrlimit},
    },
};
use serde::Deserialize;
use serde_json::json;

const SPEC: &str = "/eniway-vm.json";
const REPORT: &str = "/dev/ttyS1";
/// Bits of /proc/sys/kernel/tainted that say that the kernel itself has complained: died, warned, locked up.
const COMPLAINTS: u64 = 1 << 7 | 1 << 9 | 1 << 14;

const FILES: u64 = 1 << 20;

#[derive(Deserialize)]
struct Spec {
    runs: Vec<Run>,
    env: BTreeMap<String, String>,
    /// Files to hand back.
    back: Vec<PathBuf>,
}

#[derive(Deserialize)]
struct Run {
    name: String,
    command: Vec<String>,
}

fn main() -> Result<()> {
    ensure!(std::process::id() == 1, "this is the first process of a virtual machine, and of nothing else");
    if let Err(error) = work() {
        println!("error: {error:#}");
    }
    // SAFETY: no arguments; writes back what is buffered, such as the last lines of both ports.
    unsafe { libc::sync() };
    let error = reboot(RebootMode::RB_POWER_OFF);
    // The kernel panics when we end, and then qemu ends.
    Err(anyhow::anyhow!("cannot switch off: {error:?}"))
}

fn work() -> Result<()> {
    prepare()?;
    let text = fs::read_to_string(SPEC).context(SPEC)?;
    let spec: Spec = serde_json::from_str(&text).context(SPEC)?;
    let mut report = OpenOptions::new().write(true).open(REPORT).context(REPORT)?;
    raw(&report).context(REPORT)?;
    for run in &spec.runs {
        let line = play(run, &spec.env)?;
        writeln!(report, "{line}").context(REPORT)?;
    }
    for path in &spec.back {
        if let Ok(text) = fs::read_to_string(path) {
            writeln!(report, "{}", json!({ "file": path, "text": text })).context(REPORT)?;
        }
    }
    Ok(())
}

/// File systems, the loopback interface, limits.
fn prepare() -> Result<()> {
    let none = MsFlags::empty();
    for (what, at, kind, options) in [
        ("proc", "/proc", "proc", ""),
        ("sysfs", "/sys", "sysfs", ""),
        ("devtmpfs", "/dev", "devtmpfs", ""),
        ("tmpfs", "/run", "tmpfs", "mode=0755"),
        ("bpf", "/sys/fs/bpf", "bpf", "mode=0700"),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", ""),
    ] {
        mount(Some(what), at, Some(kind), none, Some(options)).with_context(|| format!("mounting {at}"))?;
    }
    for (link, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        let _ = std::os::unix::fs::symlink(target, Path::new("/dev").join(link));
    }
    // The kernel starts us with 1,024; a benchmark holds more programs and maps than that.
    setrlimit(Resource::RLIMIT_NOFILE, FILES, FILES).context("the limit of open files")?;
    fs::write("/proc/sys/kernel/hostname", "eniway-vm").context("the host name")?;
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).env("PATH", "/usr/sbin").status();
    ensure!(up.context("ip")?.success(), "cannot bring the loopback interface up");
    Ok(())
}

/// Runs one program and says how it ended. The kernel's own complaints count as a failure.
fn play(run: &Run, env: &BTreeMap<String, String>) -> Result<serde_json::Value> {
    let (program, args) = run.command.split_first().context("an empty command")?;
    let start = Instant::now();
    let complained = tainted();
    let (mut output, input) = io::pipe()?;
    let mut command = Command::new(program);
    command.args(args).env_clear().envs(env).current_dir("/root").stdin(Stdio::null());
    let mut child = command
        .stdout(input.try_clone()?)
        .stderr(input)
        .spawn()
        .with_context(|| format!("running {program}"))?;
    // It holds the writing end as well.
    drop(command);
    let mut buffer = [0; 4096];
    loop {
        match output.read(&mut buffer)? {
            0 => break,
            length => io::stdout().write_all(&buffer[..length])?,
        }
    }
    let status = child.wait()?;
    let complaint = tainted() & !complained;
    let mut ended = status.to_string();
    if complaint != 0 {
        ended += &format!("; the kernel has complained (taint {complaint:#x}), see its log");
        print_kernel_log()?;
    }
    Ok(json!({
        "run": run.name,
        "success": status.success() && complaint == 0,
        "ended": ended,
        "seconds": start.elapsed().as_secs_f64(),
    }))
}

fn tainted() -> u64 {
    let text = fs::read_to_string("/proc/sys/kernel/tainted").unwrap_or_default();
    text.trim().parse().unwrap_or(0) & COMPLAINTS
}

/// The kernel's messages so far.
fn print_kernel_log() -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut log = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
    let mut record = [0; 8192];
    // One record with each read, until there is none.
    while let Ok(length) = log.read(&mut record) {
        io::stdout().write_all(&record[..length])?;
    }
    Ok(())
}

/// A serial port that hands bytes on as they are.
fn raw(port: &File) -> Result<()> {
    use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
    let mut settings = tcgetattr(port)?;
    cfmakeraw(&mut settings);
    Ok(tcsetattr(port, SetArg::TCSANOW, &settings)?)
}

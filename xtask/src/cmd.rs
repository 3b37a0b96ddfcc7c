//! Running other programs: each as a named step with its time, and with its command line when it fails.

use std::{
    env,
    ffi::OsStr,
    fmt::Write as _,
    fs,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    // cargo sets it when it runs us; the compiled-in value serves who starts the binary by hand.
    let xtask = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&xtask).parent().map(Path::to_path_buf).unwrap_or_default()
}

/// cargo, in the repository's root, whatever the caller's directory is.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args(args);
    without_own_environment(&mut command);
    command
}

/// What `cargo run` sets for us describes xtask and must not leak into other builds: a build script that
/// watches one of these would run again on each change between `cargo xtask` and plain cargo.
fn without_own_environment(command: &mut Command) {
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
}

/// Names a step, does it, and says how long it took.
pub(crate) fn step<T>(name: &str, body: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("==> {name}");
    let start = Instant::now();
    let result = body().with_context(|| name.to_owned());
    let verdict = if result.is_ok() { "done" } else { "FAILED" };
    eprintln!("    {name}: {verdict} ({:.1} s)", start.elapsed().as_secs_f64());
    result
}

/// Runs a command to its end with our own input and output.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| cannot_run(command))?;
    expect_success(command, status)
}

/// Runs a command and returns what it printed; its errors go where ours go.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().with_context(|| cannot_run(command))?;
    expect_success(command, output.status)?;
    String::from_utf8(output.stdout)
        .with_context(|| format!("not UTF-8, what this printed: {}", line(command)))
}

/// Whether a command can be run and succeeds. Prints nothing; for probes.
pub(crate) fn succeeds(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
}

pub(crate) fn cannot_run(command: &Command) -> String {
    format!("cannot run {}", line(command))
}

fn expect_success(command: &Command, status: ExitStatus) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    bail!("{}: {}", ended(status), line(command))
}

/// How a process that did not succeed ended.
pub(crate) fn ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(9)) => "killed by signal 9 (by hand, by a time limit, or for want of memory)".into(),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// A command as a line for the shell: directory, environment, program, arguments.
pub(crate) fn line(command: &Command) -> String {
    let mut line = String::new();
    if let Some(dir) = command.get_current_dir() {
        let _ = write!(line, "cd {} && ", quoted(dir.as_os_str()));
    }
    let mut environment = String::new();
    let mut unset = String::new();
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => {
                let _ = write!(environment, "{}={} ", name.to_string_lossy(), quoted(value));
            }
            // Only what is set now makes a difference, and cargo's own words about us do not.
            None if env::var_os(name).is_some() && !name.to_string_lossy().starts_with("CARGO_") => {
                let _ = write!(unset, "-u {} ", name.to_string_lossy());
            }
            None => {}
        }
    }
    if !unset.is_empty() {
        let _ = write!(line, "env {unset}");
    }
    line.push_str(&environment);
    line.push_str(&quoted(command.get_program()));
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&quoted(arg));
    }
    line
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-+=/.,:@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into_owned();
    }
    if word.contains('\x1f') {
        let escaped = word.replace('\\', "\\\\").replace('\'', "\\'").replace('\x1f', "\\x1f");
        return format!("$'{escaped}'");
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// A field of /proc/self/status, such as `CapEff`.
fn own_status(field: &str) -> Option<String> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(value.trim().to_owned())
}

/// Whether we run as root.
pub(crate) fn is_root() -> bool {
    // Real, effective, saved and file system ids.
    own_status("Uid").is_some_and(|ids| ids.split_whitespace().nth(1) == Some("0"))
}

/// The effective capabilities as a bit set.
pub(crate) fn capabilities() -> u64 {
    own_status("CapEff").and_then(|set| u64::from_str_radix(&set, 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_can_be_pasted_into_a_shell() {
        let mut command = Command::new("echo");
        command.env("A", "1 2").args(["plain", "", "it's", "a\x1fb"]).current_dir("/tmp");
        let line = line(&command);
        assert_eq!(line, r"cd /tmp && A='1 2' echo plain '' 'it'\''s' $'a\x1fb'");
        let pasted = Command::new("bash").args(["-c", &line]).output().expect("bash");
        assert_eq!(String::from_utf8_lossy(&pasted.stdout), "plain  it's a\x1fb\n");
    }

    #[test]
    fn a_signal_is_named() {
        let status = Command::new("sh").args(["-c", "kill -9 $$"]).status().expect("sh");
        assert!(ended(status).starts_with("killed by signal 9"));
        let status = Command::new("sh").args(["-c", "exit 3"]).status().expect("sh");
        assert_eq!(ended(status), "exit status 3");
    }
}

//! A machine's console, line by line, until it ends or its time is up.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::cmd;

/// Ends the machine whatever happens to us.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a machine and hands over each line of its console.
pub(super) fn watch(command: &mut Command, limit: Duration, line: &mut impl FnMut(&str)) -> Result<()> {
    let end = Instant::now() + limit;
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut machine = Machine(command.spawn().with_context(|| cmd::cannot_run(command))?);
    let console = BufReader::new(machine.0.stdout.take().context("the console")?);
    let (send, lines) = channel();
    let reader = thread::spawn(move || {
        for line in console.split(b'\n').map_while(Result::ok) {
            if send.send(line).is_err() {
                break;
            }
        }
    });
    loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(bytes) => line(String::from_utf8_lossy(&bytes).trim_end_matches('\r')),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                bail!("the machine did not end within {} s: {}", limit.as_secs(), cmd::line(command))
            }
        }
    }
    let status = machine.0.wait().context("waiting for qemu")?;
    let _ = reader.join();
    if !status.success() {
        bail!("{}: {}", cmd::ended(status), cmd::line(command));
    }
    Ok(())
}

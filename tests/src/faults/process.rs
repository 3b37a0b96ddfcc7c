//! Processes that are killed and started again.

use std::{
    fs::OpenOptions,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

type Make = Box<dyn Fn() -> Result<Command> + Send + Sync>;

/// A program that can be started again and again. Dropped, it is killed.
pub(super) struct Process {
    pub(super) name: String,
    pub(super) log: PathBuf,
    make: Make,
    child: Mutex<Option<Child>>,
}

impl Process {
    pub(super) fn new(name: &str, log: PathBuf, make: Make) -> Self {
        Self { name: name.to_owned(), log, make, child: Mutex::new(None) }
    }

    /// Starts it, if it does not run.
    pub(super) fn start(&self) -> Result<()> {
        let mut child = self.child();
        if let Some(running) = child.as_mut()
            && running.try_wait()?.is_none()
        {
            return Ok(());
        }
        let log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        let mut command = (self.make)()?;
        // A program that reads it learns when we have ended.
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log);
        *child = Some(command.spawn().with_context(|| format!("starting {}", self.name))?);
        Ok(())
    }

    /// Its process id, from its start until it has been waited for.
    pub(super) fn pid(&self) -> Option<Pid> {
        self.child().as_ref().map(|child| Pid::from_raw(child.id().cast_signed()))
    }

    /// Whether it has ended by itself.
    pub(super) fn has_ended(&self) -> bool {
        self.child().as_mut().is_some_and(|child| child.try_wait().is_ok_and(|status| status.is_some()))
    }

    /// Whether it has ended by SIGKILL.
    pub(super) fn was_killed(&self) -> bool {
        use std::os::unix::process::ExitStatusExt as _;
        let status = self.child().as_mut().and_then(|child| child.try_wait().ok()).flatten();
        status.is_some_and(|status| status.signal() == Some(Signal::SIGKILL as i32))
    }

    /// Kills it and waits for its end.
    pub(super) fn kill(&self) {
        if let Some(mut child) = self.child().take() {
            // It may have been killed already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Sends it a signal, if it runs.
    pub(super) fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            let _ = kill(pid, signal);
        }
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

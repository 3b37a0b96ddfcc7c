//! Network namespaces as `ip netns` knows them: a name under `/run/netns`.

use std::{
    ffi::OsStr,
    fmt, fs,
    fs::File,
    io,
    io::Write as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

use super::error::{Error, Result};

/// Where `ip netns` keeps its names.
pub const DIR: &str = "/run/netns";

/// A network namespace by name. Cloning it does not clone the namespace; see [`NetnsGuard`] for its life.
#[derive(Clone, PartialEq, Eq)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// The namespace of this name, whether it exists or not.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    /// Its name: `ip netns` lists it, and `nsenter --net=/run/netns/NAME` enters it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        Path::new(DIR).join(&self.name)
    }

    /// Runs `work` on a thread of its own inside the namespace and hands its result back. A panic inside goes on
    /// in the caller.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter()?;
                Ok(work())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// As [`run`](Self::run), for work that outlives the call. The namespace is entered before this returns.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered.
    pub fn spawn(&self, work: impl FnOnce() + Send + 'static) -> Result<thread::JoinHandle<()>> {
        let netns = self.clone();
        let (entered, wait) = mpsc::channel();
        let thread = thread::Builder::new()
            .name(self.name.clone())
            .spawn(move || {
                let result = netns.enter();
                let may_work = result.is_ok();
                if entered.send(result).is_ok() && may_work {
                    work();
                }
            })
            .map_err(Error::io("starting a thread"))?;
        wait.recv().unwrap_or_else(|_| Err(Error::Unknown(format!("thread in namespace {}", self.name))))?;
        Ok(thread)
    }

    /// A command that will run inside the namespace, with standard input closed.
    ///
    /// # Errors
    ///
    /// When the namespace does not exist.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let file = self.open()?;
        let mut command = Command::new(program);
        command.stdin(Stdio::null());
        super::sys::setns_before_exec(&mut command, file);
        command.process_group(0);
        Ok(command)
    }

    /// Runs a command inside the namespace to its end and returns what it wrote to standard output.
    ///
    /// # Errors
    ///
    /// When it cannot be started or ends with an error.
    pub fn exec(&self, words: &[&str]) -> Result<String> {
        let (program, arguments) =
            words.split_first().ok_or_else(|| Error::Topology("empty command".into()))?;
        let output = self.command(program)?.args(arguments).output().map_err(Error::io(format!(
            "running `{}` in {}",
            words.join(" "),
            self.name
        )))?;
        if !output.status.success() {
            return Err(Error::Command {
                command: words.join(" "),
                netns: self.name.clone(),
                status: output.status.to_string(),
                stderr: String::from_utf8_lossy(&output.stderr).trim().into(),
            });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs lines of `ip -batch`.
    ///
    /// # Errors
    ///
    /// When `ip` refuses a line; says which.
    pub fn ip_batch(&self, lines: &str) -> Result<()> {
        let what = || format!("running `ip -batch -` in {}", self.name);
        let mut child = self
            .command("ip")?
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(Error::io(what()))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(lines.as_bytes()).map_err(Error::io(what()))?;
        }
        let output = child.wait_with_output().map_err(Error::io(what()))?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            // "Command failed -:5": the fifth line.
            let number = stderr.rsplit_once("-:").and_then(|(_, number)| number.trim().parse::<usize>().ok());
            let line = number.and_then(|number| lines.lines().nth(number.saturating_sub(1)));
            return Err(Error::Command {
                command: format!("ip {}", line.unwrap_or("-batch -")),
                netns: self.name.clone(),
                status: output.status.to_string(),
                stderr,
            });
        }
        Ok(())
    }

    /// Writes a sysctl of the namespace, such as `net/ipv4/ip_forward`.
    ///
    /// # Errors
    ///
    /// When it does not exist or refuses the value.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{key}");
        self.run(|| fs::write(&path, value))?.map_err(Error::io(format!("writing {path} in {}", self.name)))
    }

    /// Enters it with the calling thread, which never comes back.
    fn enter(&self) -> Result<()> {
        setns(self.open()?, CloneFlags::CLONE_NEWNET)
            .map_err(Error::errno(format!("entering namespace {}", self.name)))
    }

    fn open(&self) -> Result<File> {
        let path = self.path();
        File::open(&path).map_err(Error::io(format!("namespace {}", path.display())))
    }
}

impl fmt::Debug for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl fmt::Display for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// A namespace that lives as long as the guard.
#[derive(Debug)]
pub struct NetnsGuard {
    netns: Netns,
    keep: bool,
}

impl NetnsGuard {
    /// Makes a new namespace, its loopback interface up.
    ///
    /// # Errors
    ///
    /// When the name is taken, or without the privilege.
    pub fn create(name: impl Into<String>) -> Result<Self> {
        let netns = Netns::named(name);
        let path = netns.path();
        prepare_dir()?;
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(Error::io(format!("namespace {}", path.display())))?;
        let guard = Self { netns, keep: false };
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
                super::sys::link_up("lo")
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
        .map_err(Error::io(format!("making namespace {} (root is needed)", path.display())))?;
        Ok(guard)
    }

    /// As [`create`](Self::create), in the place of what a run that was killed has left under this name.
    ///
    /// # Errors
    ///
    /// When what is there cannot be removed, or without the privilege.
    pub fn renew(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        remove(&Netns::named(&*name))?;
        Self::create(name)
    }

    /// The namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Leaves the namespace standing when the guard goes.
    pub fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for NetnsGuard {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = remove(&self.netns)
        {
            log::warn!("{error}");
        }
    }
}

/// Takes the name of a namespace away; with the last process or socket in it, it is gone.
pub(crate) fn remove(netns: &Netns) -> Result<()> {
    let path = netns.path();
    // EINVAL: a name that was never mounted on, left behind by a crash in the middle of `create`.
    match umount2(&path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::EINVAL) => {}
        Err(nix::errno::Errno::ENOENT) => return Ok(()),
        Err(errno) => return Err(Error::errno(format!("unmounting {}", path.display()))(errno)),
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("removing {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}

/// What `ip netns add` does: a shared mount, so that the names show in other mount namespaces too.
fn prepare_dir() -> Result<()> {
    let what = || format!("preparing {DIR} (root is needed)");
    fs::create_dir_all(DIR).map_err(Error::io(what()))?;
    let share = || mount(None::<&str>, DIR, None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>);
    match share() {
        Err(nix::errno::Errno::EINVAL) => {
            mount(Some(DIR), DIR, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
                .map_err(Error::errno(what()))?;
            share().map_err(Error::errno(what()))
        }
        other => other.map_err(Error::errno(what())),
    }
}

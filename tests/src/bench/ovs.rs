//! Open vSwitch in a namespace: its two daemons and a bridge.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::lab::{Error, Netns, Result};

const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
const VSWITCHD: &str = "/usr/lib/openvswitch-switch/ovs-vswitchd";
const START: Duration = Duration::from_secs(20);

/// Runs until it is dropped.
pub struct Ovs {
    netns: Netns,
    dir: PathBuf,
    daemons: Vec<Child>,
}

impl Ovs {
    /// Starts it with a bridge `br0`, which switches by MAC addresses.
    ///
    /// # Errors
    ///
    /// When it is not installed, or the kernel has no module for it.
    pub fn start(netns: &Netns) -> Result<Self> {
        wait_for_cores()?;
        let dir = Path::new("/run").join(netns.name()).join("ovs");
        fs::create_dir_all(&dir).map_err(Error::io(format!("making {}", dir.display())))?;
        let mut ovs = Self { netns: netns.clone(), dir, daemons: Vec::new() };
        let (database, socket) = (ovs.file("conf.db"), ovs.file("db.sock"));
        ovs.run(&["ovsdb-tool", "create", &database, SCHEMA])?;
        ovs.daemon(&["ovsdb-server", &database, &format!("--remote=punix:{socket}"), "--unixctl=none"])?;
        ovs.wait(&socket)?;
        ovs.vsctl(&["--no-wait", "init"])?;
        ovs.daemon(&[VSWITCHD, &format!("unix:{socket}"), "--unixctl=none"])?;
        ovs.vsctl(&["add-br", "br0"])?;
        Ok(ovs)
    }

    /// Adds an interface to the bridge; the options are those of its record in the database.
    ///
    /// # Errors
    ///
    /// When the kernel does not take it.
    pub fn add_port(&self, name: &str, options: &[&str]) -> Result<()> {
        self.vsctl(&[&["add-port", "br0", name, "--", "set", "interface", name][..], options].concat())?;
        // Adding succeeds whatever the kernel says; a port that works has a number.
        let number = self.vsctl(&["get", "interface", name, "ofport"])?;
        if number.trim().parse::<u32>().is_ok() {
            return Ok(());
        }
        let detail = self.vsctl(&["get", "interface", name, "error"])?;
        Err(Error::Topology(format!("Open vSwitch has no port {name} (ofport {}): {detail}", number.trim())))
    }

    fn vsctl(&self, words: &[&str]) -> Result<String> {
        let database = format!("--db=unix:{}", self.file("db.sock"));
        self.run(&[&["ovs-vsctl", "--timeout=20", &database][..], words].concat())
    }

    fn file(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    fn command(&self, words: &[&str]) -> Result<Command> {
        let (program, arguments) =
            words.split_first().ok_or_else(|| Error::Topology("empty command".into()))?;
        let mut command = self.netns.command(program)?;
        command.args(arguments).env("OVS_RUNDIR", &self.dir).env("OVS_DBDIR", &self.dir);
        Ok(command)
    }

    fn run(&self, words: &[&str]) -> Result<String> {
        let what = || format!("{} (package openvswitch-switch)", words.join(" "));
        let output = self.command(words)?.output().map_err(Error::io(what()))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Error::Command {
            command: words.join(" "),
            netns: self.netns.name().into(),
            status: output.status.to_string(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    fn daemon(&mut self, words: &[&str]) -> Result<()> {
        let what = || format!("{} (package openvswitch-switch)", words.join(" "));
        let log = fs::File::create(self.file("log")).map_err(Error::io(what()))?;
        let child =
            self.command(words)?.stdout(Stdio::null()).stderr(log).spawn().map_err(Error::io(what()))?;
        self.daemons.push(child);
        Ok(())
    }

    fn wait(&self, path: &str) -> Result<()> {
        let end = Instant::now() + START;
        while !Path::new(path).exists() {
            if Instant::now() > end {
                let detail = fs::read_to_string(self.file("log")).unwrap_or_default();
                return Err(Error::Timeout { what: path.into(), limit: START, detail });
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

/// Version 3.1 counts the processors only once the machine is up for ten seconds, and starts no thread for the kernel's
/// questions before (lib/ovs-thread.c, `count_total_cores`).
fn wait_for_cores() -> Result<()> {
    let text = fs::read_to_string("/proc/uptime").map_err(Error::io("reading /proc/uptime"))?;
    let up: f64 = text.split(' ').next().and_then(|seconds| seconds.parse().ok()).unwrap_or_default();
    thread::sleep(Duration::from_secs_f64((11.0 - up).max(0.0)));
    Ok(())
}

impl Drop for Ovs {
    fn drop(&mut self) {
        for daemon in self.daemons.iter_mut().rev() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        let _ = fs::remove_dir_all(&self.dir);
        if let Some(above) = self.dir.parent() {
            let _ = fs::remove_dir(above);
        }
    }
}

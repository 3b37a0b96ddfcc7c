//! The agents, each a process `eniway agent` in its node's namespace, and what they read.

use std::{
    env, fs,
    fs::OpenOptions,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use datapath_user::{config::Limits, grace::Grace};
use eniway_policy::model::{GroupList, Groups};
pub use nix::sys::signal::Signal;
use nix::{sys::signal::kill, unistd::Pid};
use serde_json::{Value, json};

use super::{
    error::{Error, Result},
    fabric::lock,
    netns::Netns,
    remains::{self, Places},
    spec::{GATEWAY_MAC, Subnet, VipSpec, XdpMode},
    topology::Pod,
};

/// How long an agent may take to become ready.
pub const READY: Duration = Duration::from_secs(20);

/// The agent of one node: its files, and its process while there is one. Dropped, it is killed.
pub struct Agent {
    node: String,
    netns: Netns,
    places: Places,
    dir: PathBuf,
    pin_dir: PathBuf,
    /// Whether its source is a document.
    reads_document: bool,
    child: Mutex<Option<Child>>,
    /// What was started last.
    binary: Mutex<Option<PathBuf>>,
    leave: bool,
}

/// What all agents of a lab are told.
pub(super) struct Settings<'a> {
    /// The socket of their source; a document for each if there is none.
    pub(super) allocator: Option<&'a Path>,
    pub(super) fast_path: bool,
    pub(super) xdp: XdpMode,
    pub(super) host_prefixes: &'a [String],
    pub(super) limits: Limits,
    pub(super) mtu: u32,
    pub(super) vips: &'a [VipSpec],
    pub(super) groups: Option<&'a Groups>,
    pub(super) lists: &'a [(String, GroupList)],
}

impl Agent {
    /// Writes the configuration of a node, and its document if that is the source.
    pub(super) fn prepare(
        places: &Places,
        node: &str,
        netns: &Netns,
        pods: &[&Pod],
        settings: &Settings<'_>,
    ) -> Result<Self> {
        let dir = places.run().join("nodes").join(node);
        fs::create_dir_all(&dir).map_err(Error::io(format!("making {}", dir.display())))?;
        let agent = Self {
            node: node.into(),
            netns: netns.clone(),
            places: places.clone(),
            pin_dir: places.pins().join(node),
            dir,
            reads_document: settings.allocator.is_none(),
            child: Mutex::new(None),
            binary: Mutex::new(None),
            leave: false,
        };
        let prefixes: Vec<String> =
            settings.host_prefixes.iter().map(|prefix| format!("{prefix:?}")).collect();
        let source = match settings.allocator {
            None => format!("kind = \"file\"\npath = {:?}", agent.source()),
            Some(socket) => {
                format!("kind = \"grpc\"\naddress = {:?}", format!("unix:{}", socket.display()))
            }
        };
        let config = format!(
            "node = {node:?}\npin_dir = {:?}\nrun_dir = {:?}\nfast_path = {:?}\nlog = \"debug\"\n\n\
             [source]\n{source}\n\n\
             [[parent]]\ninterface = \"eth1\"\nxdp = {:?}\n\n\
             [host]\nprefixes = [{}]\n\n\
             [limits]\nendpoints = {}\nflows = {}\n",
            agent.pin_dir,
            agent.run_dir(),
            match (settings.fast_path, settings.groups) {
                (false, _) => "off",
                (true, Some(_)) => "security-groups",
                (true, None) => "all",
            },
            settings.xdp.name(),
            prefixes.join(", "),
            settings.limits.endpoints,
            settings.limits.flows,
        );
        let path = agent.config();
        fs::write(&path, config).map_err(Error::io(format!("writing {}", path.display())))?;
        if agent.reads_document {
            agent.write(&document(pods, settings))?;
        }
        Ok(agent)
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.dir.join("agent.toml")
    }

    /// Its document, if that is its source.
    pub fn source(&self) -> PathBuf {
        self.dir.join("pods.json")
    }

    /// Its log, to which every start appends.
    pub fn log(&self) -> PathBuf {
        self.dir.join("agent.log")
    }

    /// Its run directory, with `status.json`.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// Its pins (the agent appends the version of its ABI).
    pub fn pin_dir(&self) -> &Path {
        &self.pin_dir
    }

    /// The name of its node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        let mut child = lock(&self.child);
        match child.as_mut()?.try_wait() {
            Ok(None) => child.as_ref().map(Child::id),
            _ => None,
        }
    }

    /// Starts it without waiting.
    ///
    /// # Errors
    ///
    /// When it runs already, or there is no binary.
    pub fn start(&self) -> Result<()> {
        self.start_as(&eniway_binary()?, &[])
    }

    /// As [`start`](Self::start), with another binary, which [`cli`](Self::cli) runs from then on too, and environment.
    ///
    /// # Errors
    ///
    /// When it runs already, or the binary cannot be run.
    pub fn start_as(&self, binary: &Path, environment: &[(&str, &str)]) -> Result<()> {
        if self.pid().is_some() {
            return Err(self.error("it runs already"));
        }
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log())
            .map_err(Error::io(format!("log {}", self.log().display())))?;
        let child = self
            .netns
            .command(binary)?
            .envs(environment.iter().copied())
            .arg("agent")
            .arg("--config")
            .arg(self.config())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(Error::io(format!("starting {}", binary.display())))?;
        remains::note_process(&self.places, child.id(), &format!("agent of {}", self.node))?;
        *lock(&self.child) = Some(child);
        *lock(&self.binary) = Some(binary.to_owned());
        Ok(())
    }

    /// Waits until it is ready; if its source is a document, with the newest one.
    ///
    /// # Errors
    ///
    /// When it ends, or is not ready in time; the message holds the end of its log.
    pub fn wait_ready(&self, limit: Duration) -> Result<()> {
        let revision = if self.reads_document { self.document()?["revision"].clone() } else { Value::Null };
        self.wait_status("ready", limit, |status| {
            status["ready"] == true && status["revision"].as_i64() >= revision.as_i64()
        })
    }

    /// Waits until the status file of the running process says what it shall.
    ///
    /// # Errors
    ///
    /// When the agent ends, or its status does not come to that in time.
    pub fn wait_status(&self, what: &str, limit: Duration, done: impl Fn(&Value) -> bool) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            let Some(pid) = self.pid() else {
                return Err(self.error(&format!("it has ended{}", self.log_end())));
            };
            let status = self.status().unwrap_or_default();
            if status["pid"] == pid && done(&status) {
                return Ok(());
            }
            if Instant::now() >= end {
                return Err(Error::Timeout {
                    what: format!("agent of {}: {what}", self.node),
                    limit,
                    detail: format!(": its status is {status}{}", self.log_end()),
                });
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends it a signal and waits for its end. An agent that does not run is no error.
    ///
    /// # Errors
    ///
    /// When it does not end within five seconds.
    pub fn stop(&self, signal: Signal) -> Result<()> {
        let mut slot = lock(&self.child);
        let Some(child) = slot.as_mut() else { return Ok(()) };
        let pid = child.id();
        let limit = Duration::from_secs(5);
        let end = Instant::now() + limit;
        if child.try_wait().map_err(Error::io("waiting for an agent"))?.is_none() {
            kill(Pid::from_raw(pid as i32), signal)
                .map_err(Error::errno(format!("signalling agent {pid}")))?;
        }
        while child.try_wait().map_err(Error::io("waiting for an agent"))?.is_none() {
            if Instant::now() >= end {
                let what = format!("end of the agent of {} after {signal}", self.node);
                return Err(Error::Timeout { what, limit, detail: String::new() });
            }
            thread::sleep(Duration::from_millis(2));
        }
        *slot = None;
        remains::strike_process(&self.places, pid);
        Ok(())
    }

    /// Kills it (SIGKILL), starts it again and waits until it is ready.
    ///
    /// # Errors
    ///
    /// As for [`start`](Self::start) and [`wait_ready`](Self::wait_ready).
    pub fn restart(&self) -> Result<()> {
        self.stop(Signal::SIGKILL)?;
        self.start()?;
        self.wait_ready(READY)
    }

    /// The status file.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn status(&self) -> Result<Value> {
        read_json(&self.run_dir().join("status.json"))
    }

    /// The document that it reads.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn document(&self) -> Result<Value> {
        read_json(&self.source())
    }

    /// Changes the document: raises its revision and replaces the file by rename. [`wait_ready`](Self::wait_ready)
    /// waits until the agent has taken it.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn change(&self, edit: impl FnOnce(&mut Value)) -> Result<()> {
        let mut document = self.document()?;
        document["revision"] = json!(document["revision"].as_i64().unwrap_or(0) + 1);
        edit(&mut document);
        self.write(&document)
    }

    /// Runs `eniway <words> --config <its configuration>` in the node's namespace and returns its output.
    ///
    /// # Errors
    ///
    /// When it ends with an error.
    pub fn cli(&self, words: &[&str]) -> Result<String> {
        let started = lock(&self.binary).clone();
        self.cli_of(&started.map_or_else(eniway_binary, Ok)?, words)
    }

    /// What `eniway <words> --json` says.
    ///
    /// # Errors
    ///
    /// When it ends with an error, or says something else than JSON.
    pub fn cli_json(&self, words: &[&str]) -> Result<Value> {
        let text = self.cli(&[words, &["--json"]].concat())?;
        serde_json::from_str(&text).map_err(|error| {
            Error::Protocol(format!("`eniway {} --json` of {}: {error}: {text}", words.join(" "), self.node))
        })
    }

    /// As [`cli`](Self::cli), with another binary.
    ///
    /// # Errors
    ///
    /// When it ends with an error.
    pub fn cli_of(&self, binary: &Path, words: &[&str]) -> Result<String> {
        let (binary, config) = (binary.to_string_lossy(), self.config());
        let mut command = vec![&*binary];
        command.extend(words);
        let config = config.to_string_lossy();
        command.extend(["--config", &*config]);
        self.netns.exec(&command)
    }

    /// Packets that `eniway counters` shows for a pod (`default/example-1`, or `(node)`), direction (`ingress`,
    /// `egress`) and outcome (`wire`, `local`, `source-address` …); 0 when there is no such row.
    ///
    /// # Errors
    ///
    /// When the command fails.
    pub fn counter(&self, pod: &str, direction: &str, outcome: &str) -> Result<u64> {
        let row =
            |row: &&Value| row["pod"] == pod && row["direction"] == direction && row["outcome"] == outcome;
        Ok(self.counters()?.iter().filter(row).filter_map(|row| row["packets"].as_u64()).sum())
    }

    /// All rows that `eniway counters` shows.
    ///
    /// # Errors
    ///
    /// When the command fails.
    pub fn counters(&self) -> Result<Vec<Value>> {
        Ok(self.cli_json(&["counters"])?["rows"].as_array().cloned().unwrap_or_default())
    }

    /// Gives all pods of the node one security group with these rules, and waits until the agent judges them by it. The fabric
    /// knows nothing of it, and costs what it costs without.
    ///
    /// # Errors
    ///
    /// When the document cannot be written, or the agent does not become ready with it.
    pub fn judge_all(&self, group: &str, rules: &Value) -> Result<()> {
        self.change(|document| {
            document["security_groups"] = json!([{ "id": group, "rules": rules }]);
            for pod in document["pods"].as_array_mut().into_iter().flatten() {
                pod["fast_path"] = json!("security-groups");
                pod["security_groups"] = json!([group]);
            }
        })?;
        self.wait_ready(READY)
    }

    /// Lets it run on when this value goes.
    pub(super) fn leave(&mut self) {
        self.leave = true;
    }

    fn write(&self, document: &Value) -> Result<()> {
        let path = self.source();
        let new = path.with_extension("json.new");
        fs::write(&new, format!("{document:#}\n"))
            .and_then(|()| fs::rename(&new, &path))
            .map_err(Error::io(format!("writing {}", path.display())))
    }

    fn error(&self, message: &str) -> Error {
        Error::Agent { node: self.node.clone(), message: message.into(), log: self.log() }
    }

    fn log_end(&self) -> String {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(12)..].join("\n  ");
        format!("; its log ends with\n  {end}")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if !self.leave
            && let Err(error) = self.stop(Signal::SIGKILL)
        {
            log::warn!("{error}");
        }
        // One that was killed while it attached programs has left this machine's grace periods short.
        Grace::new(&self.run_dir());
    }
}

/// The `eniway` binary: `$ENIWAY_BIN`, or beside this executable, or (for test binaries) one directory up.
///
/// # Errors
///
/// When there is none.
pub fn eniway_binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os("ENIWAY_BIN") {
        let path = PathBuf::from(path);
        return if path.is_file() {
            Ok(path)
        } else {
            Err(Error::Unknown(format!("$ENIWAY_BIN: {}", path.display())))
        };
    }
    let own = env::current_exe().map_err(Error::io("the path of this executable"))?;
    own.ancestors().skip(1).take(2).map(|dir| dir.join("eniway")).find(|path| path.is_file()).ok_or_else(
        || Error::Unknown(format!("binary `eniway` near {} (`cargo build -p datapath-user`)", own.display())),
    )
}

/// The `eniway` of the ABI version after this one: in `next-abi` beside the directory of the other programs.
///
/// # Errors
///
/// When there is none.
pub fn next_agent() -> Result<PathBuf> {
    let own = eniway_binary()?;
    own.ancestors()
        .skip(2)
        .take(2)
        .map(|dir| dir.join("next-abi/eniway"))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            Error::Unknown(format!(
                "binary `next-abi/eniway` near {} (`cargo xtask next-abi`)",
                own.display()
            ))
        })
}

/// The file source of a node with these pods.
fn document(pods: &[&Pod], settings: &Settings<'_>) -> Value {
    let vips: Vec<Value> = settings
        .vips
        .iter()
        .map(|vip| json!({ "ip": vip.ip, "port": vip.port, "protocol": vip.protocol.name() }))
        .collect();
    let entry_with_list = |pod: &&Pod| {
        let mut entry = entry(pod, settings.mtu);
        if let Some((_, list)) = settings.lists.iter().find(|(name, _)| *name == pod.name) {
            entry["security_groups"] = json!(list);
        }
        entry
    };
    let pods: Vec<Value> = pods.iter().map(entry_with_list).collect();
    let mut document = json!({ "version": 1, "revision": 1, "vips": vips, "pods": pods });
    if let Some(groups) = settings.groups {
        put_groups(&mut document, groups);
    }
    document
}

/// Puts security groups and address groups into a document of the file source.
pub fn put_groups(document: &mut Value, groups: &Groups) {
    let written = json!(groups);
    for part in ["security_groups", "address_groups"] {
        document[part] = written[part].clone();
    }
}

/// A pod as the file source has it.
pub(super) fn entry(pod: &Pod, mtu: u32) -> Value {
    json!({
        "uid": format!("uid-{}", pod.name),
        "namespace": pod.namespace,
        "name": pod.name,
        "container_id": format!("container-{}", pod.name),
        "netns": pod.netns.path(),
        "interface": "eth0",
        "host_interface": null,
        "state": "active",
        "generation": 1,
        "parent": "eth1",
        "vlan": pod.vlan,
        "mac": pod.mac.to_string(),
        "wire_mac": null,
        "ipv4": pod.ip,
        "ipv6": null,
        "subnet": Subnet::PODS.to_string(),
        "gateway": Subnet::PODS.gateway,
        "gateway_mac": GATEWAY_MAC.to_string(),
        "gateway_ipv6": null,
        "mtu": mtu,
        "security_groups": [],
    })
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).map_err(Error::io(format!("reading {}", path.display())))?;
    serde_json::from_str(&text).map_err(|error| Error::Protocol(format!("{}: {error}", path.display())))
}

//! A node as a container runtime sees it: an agent with the allocator inside, its CNI plugin, and the network
//! configuration that names it.
//!
//! ```text
//!   namespace ewr-NAME-n (the node):  eth1 ── fabric      a directory: agent, allocator's records, network configuration
//!   the runtime, or a test in its place, runs eniway-cni in it
//! ```

pub mod containerd;
pub mod cri;

use std::{
    fs,
    io::{self, Write as _},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use datapath_common::abi::{Direction, Limits, Outcome};
use datapath_user::{
    pin::Pins,
    tables::{Maps, Tables, TablesError},
};
use eniway_agent_api::{Attachment, CheckRequest, SOCKET, StatusRequest, agent_client::AgentClient};
use serde_json::{Value, json};
use tonic::transport::Endpoint;

use crate::lab::{Error, Netns, NetnsGuard, Result, agent::eniway_binary};

/// Long enough for everything that should happen.
pub const SOON: Duration = Duration::from_secs(60);

/// The node. Dropped, it is taken down with everything in it.
pub struct Node {
    name: String,
    netns: Option<NetnsGuard>,
    dir: PathBuf,
    agent: Option<Child>,
    launcher: Vec<String>,
    environment: Vec<(String, String)>,
    allocator: bool,
    /// Whether its plugin takes limits of bandwidth from the runtime; else they are for others of the chain.
    pub limits: bool,
}

/// What the plugin said.
#[derive(Debug)]
pub struct Said {
    /// Its exit status was 0.
    pub ok: bool,
    /// Standard output, as JSON; null when empty.
    pub output: Value,
}

impl Said {
    /// The error's code.
    pub fn code(&self) -> Option<u64> {
        self.output["code"].as_u64()
    }

    /// The address of the sandbox.
    pub fn address(&self) -> Option<Ipv4Addr> {
        self.output["ips"][0]["address"].as_str()?.split('/').next()?.parse().ok()
    }
}

/// A sandbox, as the plugin is told of it.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// The runtime's id.
    pub id: String,
    /// Path of its network namespace; empty when there is none any more.
    pub netns: String,
    /// The pod's name, which is its uid, too; empty when the runtime knows no pods.
    pub pod: String,
}

impl Sandbox {
    /// One of a pod with this name, by the id `id`, in a new network namespace.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be made.
    pub fn create(netns: &str, id: &str, pod: &str) -> Result<(NetnsGuard, Self)> {
        let guard = NetnsGuard::renew(netns)?;
        let netns = guard.netns().path().display().to_string();
        Ok((guard, Self { id: id.to_owned(), netns, pod: pod.to_owned() }))
    }

    /// So many of `pod-0`, `pod-1` and so on, for a test.
    ///
    /// # Errors
    ///
    /// When a namespace cannot be made.
    pub fn several(test: &str, count: usize) -> Result<Vec<(NetnsGuard, Self)>> {
        let one = |number| {
            Self::create(
                &format!("ewr-{test}-{number}"),
                &format!("{test}{number}"),
                &format!("pod-{number}"),
            )
        };
        (0..count).map(one).collect()
    }
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    Error::io(what)
}

/// A program that is built beside the agent.
///
/// # Errors
///
/// When the agent's own program is not found.
pub fn plugin_binary() -> Result<PathBuf> {
    Ok(eniway_binary()?.with_file_name("eniway-cni"))
}

impl Node {
    /// Makes the node's namespace and files; nothing runs yet. `pool` interfaces are kept ready.
    ///
    /// # Errors
    ///
    /// When something cannot be made.
    pub fn new(name: &str, pool: u32) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("ewr-{name}"));
        // What a run that was killed has left; its processes are of the namespace that goes with it.
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("net.d")).map_err(io_error(format!("making {}", dir.display())))?;
        let mut node = Self {
            name: name.to_owned(),
            netns: None,
            dir,
            agent: None,
            launcher: Vec::new(),
            environment: Vec::new(),
            allocator: true,
            limits: false,
        };
        let _ = fs::remove_dir_all(node.pin_dir());
        node.boot()?;
        let write = |file: &str, text: String| {
            let path = node.path(file);
            fs::write(&path, text).map_err(io_error(format!("writing {}", path.display())))
        };
        write(
            "agent.toml",
            format!(
                "node = \"n\"\npin_dir = {:?}\nrun_dir = {:?}\nfast_path = \"all\"\nlog = \"debug\"\n\
                 [source]\nkind = \"embedded\"\nconfig = {:?}\n[[parent]]\ninterface = \"eth1\"\n",
                node.pin_dir(),
                node.run_dir(),
                node.path("ipam.toml"),
            ),
        )?;
        write(
            "ipam.toml",
            format!(
                "listen = [\"unix:{}\"]\n[settings]\ncool_down = 1\n[store]\nkind = \"embedded\"\npath = {:?}\n\
                 [[subnet]]\nid = \"net-a\"\nipv4 = \"10.1.16.0/20\"\ngateway = \"10.1.16.1\"\n\
                 gateway_mac = \"fa:ff:ff:00:00:01\"\n[[node]]\nname = \"n\"\n\
                 policy = {{ pre-bound = {{ minimum = {pool}, maximum = {} }} }}\n\
                 kind = {{ sub-eni = {{ parents = [{{ id = \"eni-1\", interface = \"eth1\", limit = 1024 }}] }} }}\n",
                node.path("ipam.sock").display(),
                node.path("ipam.redb"),
                pool + 64,
            ),
        )?;
        Ok(node)
    }

    /// Takes the pods from a file instead.
    ///
    /// # Errors
    ///
    /// When the configuration cannot be written.
    pub fn use_file(&mut self, file: &Path) -> Result<()> {
        let path = self.path("agent.toml");
        let text = fs::read_to_string(&path).map_err(io_error("reading the agent's configuration"))?;
        let source = format!("kind = \"embedded\"\nconfig = {:?}", self.path("ipam.toml"));
        let text = text.replace(&source, &format!("kind = \"file\"\npath = {file:?}"));
        self.allocator = false;
        fs::write(&path, text).map_err(io_error("writing the agent's configuration"))
    }

    /// Gives the node's pods ENIs of their own instead, so many at the most.
    ///
    /// # Errors
    ///
    /// When the configurations cannot be written.
    pub fn use_exclusive(&self, bindable: u32) -> Result<()> {
        let (agent, ipam) = (self.path("agent.toml"), self.path("ipam.toml"));
        let read = |path: &Path| fs::read_to_string(path).map_err(io_error("reading a configuration"));
        let text = read(&agent)?.replace("[[parent]]\ninterface = \"eth1\"\n", "");
        fs::write(&agent, text).map_err(io_error("writing the agent's configuration"))?;
        let text = read(&ipam)?;
        let kind =
            text.lines().find(|line| line.starts_with("kind = { sub-eni")).unwrap_or_default().to_owned();
        let own = format!("kind = {{ exclusive-eni = {{ instance = \"i-1\", bindable = {bindable} }} }}");
        let text = text.replace(&kind, &own);
        fs::write(&ipam, text).map_err(io_error("writing the allocator's configuration"))
    }

    /// Packets that were counted for a pod's address.
    ///
    /// # Errors
    ///
    /// When the tables cannot be read, or do not know the address.
    pub fn counted(&self, address: Ipv4Addr, direction: Direction, outcome: Outcome) -> Result<u64> {
        let tables = Maps::open(&Pins::new(&self.pin_dir()))
            .and_then(Tables::new)
            .map_err(|error| unreadable(&error))?;
        let pod = tables.pods().find(|pod| Ipv4Addr::from(pod.record.ipv4) == address);
        let id = pod.ok_or_else(|| Error::Unknown(format!("{address} is in no table")))?.record.id;
        let rows = tables.maps.all_counters().map_err(|error| unreadable(&error))?;
        let row = rows.into_iter().find(|(row, _)| *row == id);
        Ok(row.map_or(0, |(_, row)| row.get(direction, outcome).packets))
    }

    /// What limits the pods that have a limit of bandwidth, by the kernel's tables.
    ///
    /// # Errors
    ///
    /// When the tables cannot be read.
    pub fn limits_in_force(&self) -> Result<Vec<Limits>> {
        let maps = Maps::open(&Pins::new(&self.pin_dir())).map_err(|error| unreadable(&error))?;
        let all = (0..maps.ids()).map(|id| maps.limits(id).map_err(|error| unreadable(&error)));
        all.filter(|limits| !matches!(limits, Ok(Limits::ZERO))).collect()
    }

    /// Adds NICs `ens1`, `ens2`, ... with the MACs that the allocator gives to exclusive ENIs. Their other ends, `far1`, `far2`, ...,
    /// are on the node.
    ///
    /// # Errors
    ///
    /// When one cannot be made.
    pub fn add_nics(&self, count: u8) -> Result<()> {
        (1..=count).try_for_each(|number| {
            self.netns().ip_batch(&format!(
                "link add ens{number} mtu 1600 address fa:16:3e:00:00:{number:02x} type veth peer name far{number} mtu 1600\n"
            ))
        })
    }

    /// The namespace of a node that has just been switched on.
    fn boot(&mut self) -> Result<()> {
        let guard = NetnsGuard::renew(format!("ewr-{}-n", self.name))?;
        guard.netns().exec(&["ip", "link", "add", "eth1", "type", "veth", "peer", "name", "fabric"])?;
        guard.netns().exec(&["ip", "link", "set", "fabric", "up"])?;
        self.netns = Some(guard);
        Ok(())
    }

    /// Everything that a node loses when it restarts: processes, namespaces, pins, the run directory. What is on disk
    /// stays.
    ///
    /// # Errors
    ///
    /// When something cannot be taken away or made anew.
    pub fn reboot(&mut self) -> Result<()> {
        self.kill_agent();
        self.netns = None;
        let _ = fs::remove_dir_all(self.pin_dir());
        let _ = fs::remove_dir_all(self.run_dir());
        self.boot()
    }

    /// The node's namespace.
    ///
    /// # Panics
    ///
    /// Never: it is there from the beginning on.
    pub fn netns(&self) -> &Netns {
        self.netns.as_ref().expect("a node has a namespace").netns()
    }

    /// A file of the node.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn run_dir(&self) -> PathBuf {
        self.path("run")
    }

    /// Where its agent pins.
    pub fn pin_dir(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(format!("ewr-{}", self.name))
    }

    /// Starts the agent and waits until it would add a pod.
    ///
    /// # Errors
    ///
    /// When it cannot be started, or does not become ready.
    pub fn start_agent(&mut self) -> Result<()> {
        self.start_agent_as(&eniway_binary()?)
    }

    /// As [`start_agent`](Self::start_agent), with another binary.
    ///
    /// # Errors
    ///
    /// When it cannot be started, or does not become ready.
    pub fn start_agent_as(&mut self, binary: &Path) -> Result<()> {
        self.spawn_agent_as(binary)?;
        self.wait("the agent is ready", |node| Ok(node.plugin("STATUS", None, json!({}))?.ok))
    }

    /// Starts the agent; answers with the time from its exec until it would add a pod, and forwards for this one.
    ///
    /// # Errors
    ///
    /// When it cannot be started, or is not ready soon.
    pub fn time_start(&mut self, sandbox: &Sandbox) -> Result<Duration> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(io_error("starting a runtime"))?;
        let socket = format!("unix:{}", self.run_dir().join(SOCKET).display());
        let endpoint = Endpoint::from_shared(socket).map_err(|error| Error::Unknown(error.to_string()))?;
        let request = CheckRequest {
            attachment: Some(Attachment { container_id: sandbox.id.clone(), interface: "eth0".into() }),
            netns: sandbox.netns.clone(),
            addresses: Vec::new(),
        };
        let begin = Instant::now();
        self.spawn_agent()?;
        let ready = async {
            loop {
                if let Ok(channel) = endpoint.connect().await {
                    let mut agent = AgentClient::new(channel);
                    let adds = agent.status(StatusRequest {}).await;
                    if adds.is_ok_and(|status| status.into_inner().problem.is_empty())
                        && agent.check(request.clone()).await.is_ok()
                    {
                        return begin.elapsed();
                    }
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let late = |_| Error::Unknown(format!("the agent is not ready within {SOON:?}\n{}", self.log()));
        runtime.block_on(async { tokio::time::timeout(SOON, ready).await }).map_err(late)
    }

    /// Has agents started by another program with these arguments, such as `setpriv`, from now on.
    pub fn launch_by(&mut self, words: &[&str]) {
        self.launcher = words.iter().map(|word| (*word).to_owned()).collect();
    }

    /// Sets a variable of the environment of agents from now on.
    pub fn set_variable(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Runs `eniway <words> --config <its configuration>` in the node's namespace.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn run_eniway(&self, words: &[&str]) -> Result<std::process::Output> {
        let mut command = self.agent_command(&eniway_binary()?)?;
        command.args(words).arg("--config").arg(self.path("agent.toml"));
        command.output().map_err(io_error("running eniway"))
    }

    fn agent_command(&self, binary: &Path) -> Result<Command> {
        Ok(match self.launcher.split_first() {
            None => self.netns().command(binary)?,
            Some((program, words)) => {
                let mut command = self.netns().command(program)?;
                command.args(words).arg(binary);
                command
            }
        })
    }

    /// Starts the agent and waits for nothing.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn spawn_agent(&mut self) -> Result<()> {
        self.spawn_agent_as(&eniway_binary()?)
    }

    fn spawn_agent_as(&mut self, binary: &Path) -> Result<()> {
        let path = self.path("agent.log");
        let log = fs::OpenOptions::new().create(true).append(true).open(&path);
        let log = log.map_err(io_error(format!("opening {}", path.display())))?;
        let mut command = self.agent_command(binary)?;
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.args(["agent", "--config"]).arg(self.path("agent.toml")).stdout(Stdio::null()).stderr(log);
        self.agent = Some(command.spawn().map_err(io_error("starting the agent"))?);
        Ok(())
    }

    /// Its process id, while it runs.
    pub fn agent_pid(&self) -> Option<u32> {
        self.agent.as_ref().map(Child::id)
    }

    /// Kills the agent, as the kernel does when memory is short.
    pub fn kill_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }

    /// Ends the agent, which finishes what it is at.
    pub fn stop_agent(&mut self) {
        if let Some(pid) = self.agent_pid().and_then(|pid| i32::try_from(pid).ok()) {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
            let end = Instant::now() + Duration::from_secs(10);
            while let Some(agent) = &mut self.agent
                && matches!(agent.try_wait(), Ok(None))
                && Instant::now() < end
            {
                thread::sleep(Duration::from_millis(10));
            }
        }
        self.kill_agent();
    }

    /// What the agent has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("agent.log")).unwrap_or_default()
    }

    /// Waits until something is so.
    ///
    /// # Errors
    ///
    /// When it is not so soon, with the agent's log.
    pub fn wait(&self, what: &str, is: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let end = Instant::now() + SOON;
        while !is(self)? {
            if Instant::now() > end {
                return Err(Error::Unknown(format!("{what}: not within {SOON:?}\n{}", self.log())));
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The plugin's part of a network configuration.
    pub fn plugin_conf(&self) -> Value {
        json!({
            "type": "eniway-cni",
            "agent": self.run_dir().join(SOCKET),
            "capabilities": { "io.kubernetes.cri.pod-annotations": true, "bandwidth": self.limits }
        })
    }

    /// Runs the plugin as a runtime does. `more` goes into the network configuration.
    ///
    /// # Errors
    ///
    /// When it cannot be run or writes no JSON.
    pub fn plugin(&self, verb: &str, sandbox: Option<&Sandbox>, more: Value) -> Result<Said> {
        self.program(&plugin_binary()?, self.plugin_conf(), verb, sandbox, more)
    }

    /// Runs any plugin, with its part of a configuration.
    ///
    /// # Errors
    ///
    /// As [`plugin`](Self::plugin).
    pub fn program(
        &self,
        program: &Path,
        mut conf: Value,
        verb: &str,
        sandbox: Option<&Sandbox>,
        more: Value,
    ) -> Result<Said> {
        let Value::Object(more) = more else {
            return Err(Error::Unknown("a configuration is an object".into()));
        };
        conf["cniVersion"] = "1.1.0".into();
        conf["name"] = "eniway".into();
        for (key, value) in more {
            conf[key] = value;
        }
        let mut command = self.netns().command(program)?;
        command.env("CNI_COMMAND", verb).env("CNI_PATH", "/usr/lib/cni");
        if let Some(sandbox) = sandbox {
            command
                .env("CNI_CONTAINERID", &sandbox.id)
                .env("CNI_IFNAME", "eth0")
                .env("CNI_NETNS", &sandbox.netns);
            if !sandbox.pod.is_empty() {
                let pod = &sandbox.pod;
                let arguments = format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod};K8S_POD_UID={pod};\
                     K8S_POD_INFRA_CONTAINER_ID={}",
                    sandbox.id
                );
                command.env("CNI_ARGS", arguments);
            }
        }
        run_plugin(command, &conf)
    }

    /// Everything that pods leave on a node while they live, as text: empty when nothing does.
    ///
    /// # Errors
    ///
    /// When something cannot be looked at.
    pub fn traces(&self) -> Result<Vec<String>> {
        let mut traces = Vec::new();
        let links = self.netns().exec(&["ip", "-br", "link"])?;
        traces
            .extend(links.lines().filter(|line| line.starts_with("eni")).map(|line| format!("link {line}")));
        for (verb, what) in [("route", "proto 221"), ("neigh", "PERMANENT")] {
            let listed = self.netns().exec(&["ip", verb, "show"])?;
            let ours = listed.lines().filter(|line| line.contains(what) && line.contains("dev eni"));
            traces.extend(ours.map(|line| format!("{verb} {line}")));
        }
        let pins = Pins::new(&self.pin_dir());
        if pins.maps_dir().exists() {
            let tables = Maps::open(&pins).and_then(Tables::new).map_err(|error| unreadable(&error))?;
            traces.extend(tables.pods().map(|pod| format!("map entry {}", Ipv4Addr::from(pod.record.ipv4))));
        }
        if self.allocator {
            let server = format!("unix:{}", self.path("ipam.sock").display());
            let text = self.eniway(&["ipam", "allocations", "--json", "--server", &server])?;
            let given: Vec<Value> =
                serde_json::from_str(&text).map_err(|error| Error::Unknown(format!("{error}: {text}")))?;
            traces.extend(given.iter().map(|one| format!("address of {}", one["name"])));
        }
        for (dir, what) in [
            (pins.links_dir(), "pin"),
            (self.run_dir().join("attachments"), "attachment"),
            (self.run_dir().join("enis"), "ENI in a pod"),
        ] {
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if !name.starts_with("parent-") {
                    traces.push(format!("{what} {name}"));
                }
            }
        }
        Ok(traces)
    }

    fn eniway(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.netns().command(eniway_binary()?)?;
        let output = command.args(arguments).output().map_err(io_error("running eniway"))?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(Error::Unknown(format!("eniway {}: {stderr}", arguments.join(" "))));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn unreadable(error: &TablesError) -> Error {
    Error::Unknown(error.to_string())
}

fn run_plugin(mut command: Command, conf: &Value) -> Result<Said> {
    let what = format!("running {}", command.get_program().to_string_lossy());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(io_error(what.clone()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A plugin that does not read has something to say.
        let _ = stdin.write_all(conf.to_string().as_bytes());
    }
    let output = child.wait_with_output().map_err(io_error(what.clone()))?;
    let said = if output.stdout.is_empty() {
        Value::Null
    } else {
        serde_json::from_slice(&output.stdout).map_err(|error| Error::Unknown(format!("{what}: {error}")))?
    };
    Ok(Said { ok: output.status.success(), output: said })
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop_agent();
        let _ = self.eniway(&["detach", "--config", &self.path("agent.toml").display().to_string()]);
        let _ = fs::remove_dir_all(self.pin_dir());
        let _ = fs::remove_dir_all(&self.dir);
    }
}

//! The commands that show what runs: `eniway status`, `audit`, `pods`, `counters`, `policy`, `trace`; and `detach`, which ends it.
//!
//! They read the agent's status file for names and wishes, and the pinned tables for what is. Neither needs a running
//! agent; without one, a line on standard error says so.

pub mod audit;
pub mod counters;
pub mod detach;
pub mod ipam;
pub mod pods;
pub mod policy;
mod probe;
pub mod status;
pub mod table;
pub mod trace;

use std::{
    collections::HashMap,
    fs,
    io::{self, Write as _},
    path::PathBuf,
};

use datapath_common::abi::Endpoint;
use serde::Serialize;

use crate::{
    config::{self, Config, ConfigError, FastPath},
    live::LiveTables,
    net,
    pin::Pins,
    status::{PodStatus, Status, StatusError},
    tables::{Maps, TablesError},
};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The agent's status file.
    #[error(transparent)]
    Status(#[from] StatusError),
    /// The agent's file of security groups.
    #[error(transparent)]
    Policy(#[from] crate::run_file::RunFileError),
    /// The pinned tables.
    #[error(transparent)]
    Tables(#[from] TablesError),
    /// What should be, as the agent wrote it.
    #[error(transparent)]
    Expected(#[from] crate::audit::ExpectedError),
    /// Comparing the node with it.
    #[error(transparent)]
    Audit(#[from] crate::audit::AuditError),
    /// Removing everything.
    #[error(transparent)]
    Detach(#[from] crate::detach::DetachError),
    /// Programs and tables are gone, but not all that was beside them.
    #[error("programs and tables are removed, but not all else: {}", .0.join("; "))]
    LeftBehind(Vec<String>),
    /// No pod of this name.
    #[error("no pod `{name}` on this node; there are: {present}")]
    NoSuchPod {
        /// The name that was given.
        name: String,
        /// The pods that exist.
        present: String,
    },
    /// Several pods of this name.
    #[error("`{name}` is the name of several pods; say which: {present}")]
    AmbiguousPod {
        /// The name that was given.
        name: String,
        /// The pods with that name.
        present: String,
    },
    /// The pod is known, but the datapath has no record of it.
    #[error("pod {name} is not in the datapath's tables{}", .error.as_deref().map(|e| format!(": {e}")).unwrap_or_default())]
    NotProgrammed {
        /// The pod.
        name: String,
        /// What the agent said of it.
        error: Option<String>,
    },
    /// A packet cannot be built as asked.
    #[error("cannot build the packet: {0}")]
    Packet(String),
    /// The allocator did not do it, or does not answer.
    #[error(transparent)]
    Client(#[from] eniway_ipam::rpc::ClientError),
    /// The allocator cannot run.
    #[error(transparent)]
    Ipam(#[from] crate::ipam::IpamError),
    /// The agent is not as asked.
    #[error("{0}")]
    NotSo(String),
    /// An argument that makes no sense.
    #[error("{0}")]
    Argument(String),
    /// The runtime for what takes its time.
    #[error("cannot start: {0}")]
    Runtime(io::Error),
    /// Standard output.
    #[error("cannot write to standard output: {0}")]
    Output(#[from] io::Error),
    /// JSON.
    #[error("cannot write JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// Which agent a command is about.
#[derive(Debug, Clone, clap::Args)]
pub struct Target {
    /// The agent's configuration file
    #[arg(long, value_name = "FILE", default_value = config::DEFAULT_PATH)]
    pub config: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What a command knows of the node before it asks the tables.
#[derive(Debug)]
pub struct Node {
    /// The agent's configuration.
    pub config: Config,
    /// The pins.
    pub pins: Pins,
    /// What the agent wrote last. `None`: it has never run, or its file is gone.
    pub status: Option<Status>,
    /// Whether the agent runs.
    pub running: bool,
}

impl Node {
    /// Reads configuration and status, and tells on standard error when no agent runs.
    ///
    /// # Errors
    ///
    /// When the configuration or the status cannot be read; a missing status file is none.
    pub fn read(target: &Target) -> Result<Self, CliError> {
        let config = Config::load(&target.config)?;
        let pins = Pins::new(&config.pin_dir);
        let status = match Status::read(&config.run_dir) {
            Ok(status) => Some(status),
            Err(StatusError::Missing { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let running = status.as_ref().is_some_and(|status| is_agent(status.pid));
        match &status {
            Some(_) if running => {}
            Some(status) => eprintln!(
                "note: the agent (process {}) is not running; names are from its last status, the tables are live",
                status.pid
            ),
            None => eprintln!(
                "note: no agent has written {}; pods are known by number only",
                Status::path(&config.run_dir).display()
            ),
        }
        Ok(Self { config, pins, status, running })
    }

    /// The pods of the status.
    pub fn pods(&self) -> &[PodStatus] {
        self.status.as_ref().map_or(&[], |status| &status.pods)
    }

    /// Names of the pods by their number in the tables.
    pub fn names(&self) -> HashMap<u32, String> {
        self.pods().iter().filter_map(|pod| Some((pod.id?, full_name(pod)))).collect()
    }

    /// The pod that the user means: `namespace/name`, the name alone where one pod has it, or the address.
    ///
    /// # Errors
    ///
    /// When none or several are meant.
    pub fn pod(&self, name: &str) -> Result<&PodStatus, CliError> {
        let matches = |pod: &&PodStatus| {
            pod.name == name || full_name(pod) == name || pod.ipv4.to_string() == name || pod.uid == name
        };
        let mut found = self.pods().iter().filter(matches);
        match (found.next(), found.next()) {
            (Some(pod), None) => Ok(pod),
            (None, _) => {
                Err(CliError::NoSuchPod { name: name.to_owned(), present: list(self.pods().iter()) })
            }
            (Some(_), Some(_)) => Err(CliError::AmbiguousPod {
                name: name.to_owned(),
                present: list(self.pods().iter().filter(matches)),
            }),
        }
    }

    /// The parent ENI of a pod, by name.
    pub fn parent_name(&self, pod: &Endpoint) -> String {
        let mut parents = self.status.iter().flat_map(|status| &status.parents);
        match parents.find(|parent| parent.index == pod.parent) {
            Some(parent) => parent.interface.clone(),
            None => interface(pod.parent_ifindex),
        }
    }

    /// The name of the host side of a pod's veth. The agent's status knows it, whatever namespace this runs in.
    pub fn host_interface(&self, pod: &Endpoint) -> String {
        let known = self.pods().iter().find(|status| status.id == Some(pod.id));
        match known.and_then(|status| status.host_interface.clone()) {
            Some(name) => name,
            None => interface(pod.ifindex),
        }
    }

    /// The pinned maps.
    ///
    /// # Errors
    ///
    /// When they are not there or cannot be opened.
    pub fn maps(&self) -> Result<Maps, CliError> {
        Ok(Maps::open(&self.pins)?)
    }

    /// The pinned maps; without them, a line on standard error that says why.
    pub fn maps_or_note(&self) -> Option<Maps> {
        Maps::open(&self.pins).inspect_err(|error| eprintln!("note: {error}")).ok()
    }

    /// The tables that decisions are made over.
    ///
    /// # Errors
    ///
    /// When they are not there or cannot be opened.
    pub fn tables(&self) -> Result<LiveTables, CliError> {
        // As the running programs were loaded; the configuration may have changed since.
        let fast_path = match &self.status {
            Some(status) => status.fast_path != FastPath::Off.name(),
            None => self.config.fast_path != FastPath::Off,
        };
        Ok(LiveTables::new(self.maps()?, fast_path, self.names()))
    }
}

/// An interface by name, or by number if it is not in this namespace.
fn interface(index: u32) -> String {
    let name = net::ifname(index).filter(|name| !name.is_empty());
    name.unwrap_or_else(|| format!("interface {index}"))
}

/// A pod's name with its namespace.
pub fn full_name(pod: &PodStatus) -> String {
    format!("{}/{}", pod.namespace, pod.name)
}

fn list<'a>(pods: impl Iterator<Item = &'a PodStatus>) -> String {
    let names: Vec<_> = pods.map(full_name).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// Whether this process is an agent. Its number alone proves nothing: the system gives it to others again.
fn is_agent(pid: u32) -> bool {
    // One that has ended and waits for its parent to notice is in state Z.
    process(pid).is_some_and(|(name, state)| name == "eniway" && state != 'Z')
}

/// Name and state of a process (proc(5), `/proc/PID/stat`: "PID (name) state ..."), if there is one.
fn process(pid: u32) -> Option<(String, char)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(") ")?;
    Some((name.to_owned(), rest.chars().next()?))
}

/// Writes to standard output. A reader that has gone, such as `head`, is no error.
fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

fn print_json(value: &impl Serialize) -> Result<(), CliError> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::net::Mac;

    pub(super) fn pod(namespace: &str, name: &str, last: u8) -> PodStatus {
        PodStatus {
            uid: format!("uid-{last}"),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            container_id: String::new(),
            netns: None,
            interface: "eth0".to_owned(),
            host_interface: None,
            id: Some(u32::from(last)),
            slot: Some(u32::from(last)),
            parent: "eth1".to_owned(),
            vlan: 100,
            mac: Mac([2, 0, 0, 0, 0, last]),
            ipv4: Ipv4Addr::new(10, 0, 0, last),
            generation: 1,
            bandwidth: crate::bandwidth::Bandwidth::default(),
            error: None,
        }
    }

    /// A node without tables, on which an agent knows these pods.
    pub(super) fn node(pods: Vec<PodStatus>) -> Node {
        let toml =
            "node = \"n\"\n[source]\nkind = \"file\"\npath = \"/p\"\n[[parent]]\ninterface = \"eth1\"\n";
        let config = Config::parse(toml, "agent.toml".as_ref()).unwrap();
        let status = Some(Status { pods, ..Status::default() });
        Node { pins: Pins::new(&config.pin_dir), config, status, running: true }
    }

    #[test]
    fn pods_are_found_by_what_people_call_them() {
        let node = node(vec![pod("default", "a", 1), pod("default", "b", 2), pod("kube-system", "b", 3)]);
        assert_eq!(node.pod("a").unwrap().id, Some(1));
        assert_eq!(node.pod("kube-system/b").unwrap().id, Some(3));
        assert_eq!(node.pod("10.0.0.2").unwrap().id, Some(2));
        let error = node.pod("b").unwrap_err().to_string();
        assert!(error.contains("default/b, kube-system/b"), "{error}");
        let error = node.pod("c").unwrap_err().to_string();
        assert!(error.contains("default/a"), "{error}");
        assert_eq!(node.names()[&2], "default/b");
    }

    #[test]
    fn this_test_is_no_agent() {
        assert!(!is_agent(std::process::id()));
        assert!(!is_agent(u32::MAX));
    }
}

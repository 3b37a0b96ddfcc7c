//! The agent's configuration file. Every key is described in `docs/configuration.md`.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use datapath_common::abi::{
    maps::{DEFAULT_ENDPOINTS, DEFAULT_FLOWS, MAX_PARENTS},
    policy::CLASSES,
};
use eniway_ipam::rpc::Address;
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::net::InterfaceName;

/// Where the configuration is looked for when nothing else is said.
pub const DEFAULT_PATH: &str = "/etc/eniway/agent.toml";

/// Flows that may be remembered at the most.
pub const MAX_FLOWS: u32 = 1 << 24;

/// Why a configuration, the agent's or the allocator's, is not used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The configuration itself cannot be read.
    #[error("cannot read the configuration {}: {source}; name another file with --config", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file or directory that it names cannot be used.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not TOML, has an unknown key, lacks one, or a value is of the wrong kind.
    #[error("{}: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Says line and column.
        source: Box<toml::de::Error>,
    },
    /// A value makes no sense.
    #[error("{}: `{key}`: {problem}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key, with the names of its tables.
        key: String,
        /// What is wrong and what is right.
        problem: String,
    },
}

/// The configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The node's name, for people and for the allocator; the environment's `ENIWAY_NODE` where it is not given.
    #[serde(default = "node_from_environment")]
    pub node: String,
    /// Directory on a BPF file system for maps and links; the ABI version is appended.
    #[serde(default = "default_pin_dir")]
    pub pin_dir: PathBuf,
    /// Directory for the lock and the status file.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// Which pod-to-pod traffic on the node takes the fast path.
    #[serde(default)]
    pub fast_path: FastPath,
    /// Only count what security groups would do to traffic that takes the fast path by `fast_path = "all"`.
    #[serde(default)]
    pub observe: bool,
    /// What to log, unless the environment's `RUST_LOG` says otherwise.
    #[serde(default = "default_log")]
    pub log: String,
    /// Where the pods are read from.
    pub source: Source,
    /// The parent ENIs; none on a node whose pods have ENIs of their own.
    #[serde(default, rename = "parent")]
    pub parents: Vec<Parent>,
    /// What the node's own stack serves.
    #[serde(default)]
    pub host: Host,
    /// Sizes of the tables.
    #[serde(default)]
    pub limits: Limits,
}

/// Which pod-to-pod traffic on the node takes the fast path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FastPath {
    /// None: everything goes out on the source's VLAN and comes back on the destination's.
    Off,
    /// What security groups allow.
    #[default]
    SecurityGroups,
    /// All of it, whatever the security groups say.
    All,
}

impl FastPath {
    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::SecurityGroups => "security-groups",
            Self::All => "all",
        }
    }
}

/// Where the pods are read from.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Source {
    /// A JSON document, described in `docs/ipam-file.md`.
    File {
        /// The document.
        path: PathBuf,
        /// A snapshot that removes most pods waits for `eniway confirm`; seeing it a second time is not enough.
        #[serde(default)]
        confirm_removals: bool,
    },
    /// An allocator elsewhere.
    Grpc {
        /// Where.
        #[serde(default = "default_allocator")]
        address: Address,
        /// PEM file of the authority that the allocator's certificate is from.
        #[serde(default)]
        ca: Option<PathBuf>,
        /// PEM file of the node's certificate.
        #[serde(default)]
        cert: Option<PathBuf>,
        /// PEM file of its key.
        #[serde(default)]
        key: Option<PathBuf>,
    },
    /// An allocator in the agent's own process, for a node or a few that share it over its socket.
    Embedded {
        /// The allocator's configuration, as of `eniway ipam serve`.
        config: PathBuf,
    },
}

fn default_allocator() -> Address {
    Address::Unix("/run/eniway/ipam.sock".into())
}

/// A parent ENI.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// Its interface.
    pub interface: InterfaceName,
    /// What XDP does on it.
    #[serde(default)]
    pub xdp: Xdp,
    /// Use the kernel's generic XDP, for interfaces whose driver has none.
    #[serde(default)]
    pub generic_xdp: bool,
    /// Give it a fair queue (`fq`), in which packets beyond a pod's limit of bandwidth wait in place of being dropped.
    #[serde(default)]
    pub fair_queue: bool,
}

/// What XDP does on a parent ENI.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Xdp {
    /// Nothing: tc does all.
    #[default]
    Off,
    /// Drops what must be dropped before the kernel builds a packet of it.
    Guard,
    /// Guards, and delivers the kinds of packets at which it is faster.
    Redirect,
}

impl Xdp {
    /// As users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Guard => "guard",
            Self::Redirect => "redirect",
        }
    }
}

/// What the node's own stack serves.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Destinations besides the node's own addresses.
    #[serde(default)]
    pub prefixes: Vec<Ipv4Net>,
    /// Where load balancers' health checks come from.
    #[serde(default)]
    pub health_checks: Vec<Ipv4Net>,
    /// The cloud's metadata service.
    #[serde(default)]
    pub metadata: Metadata,
}

/// What becomes of a pod's packets to the cloud's metadata service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metadata {
    /// Dropped.
    #[default]
    Deny,
    /// The node's stack serves or forwards them.
    Host,
    /// They leave like any other, on the pod's VLAN.
    Wire,
}

/// Sizes of the tables. They cannot change while the tables exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Pods on the node.
    pub endpoints: u32,
    /// Remembered flows.
    pub flows: u32,
}

impl Limits {
    /// Classes of pods that security groups are compiled for, the 0 of "cannot be judged" included.
    pub fn classes(&self) -> u32 {
        (self.endpoints + 1).min(CLASSES as u32)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { endpoints: DEFAULT_ENDPOINTS, flows: DEFAULT_FLOWS }
    }
}

/// Names the node where one configuration is for many.
const NODE: &str = "ENIWAY_NODE";

fn node_from_environment() -> String {
    env::var(NODE).unwrap_or_default()
}

fn default_pin_dir() -> PathBuf {
    "/sys/fs/bpf/eniway".into()
}

fn default_run_dir() -> PathBuf {
    "/run/eniway".into()
}

fn default_log() -> String {
    "info".to_owned()
}

/// Starts to log to standard error, as configured unless the environment's `RUST_LOG` says otherwise.
pub fn start_log(level: &str) {
    // What libraries say on the way is for those who ask for it by RUST_LOG.
    let libraries =
        ["aya", "aya_obj", "netlink_proto", "h2", "hyper", "hyper_util", "rustls", "tonic", "tower"];
    let quiet = libraries.iter().fold(level.to_owned(), |filter, library| format!("{filter},{library}=warn"));
    let filter = env_logger::Env::default().default_filter_or(quiet);
    env_logger::Builder::from_env(filter).init();
}

/// The text of a configuration file.
pub(crate) fn text_of(path: &Path) -> Result<String, ConfigError> {
    fs::read_to_string(path).map_err(|source| ConfigError::Open { path: path.to_owned(), source })
}

/// What a configuration file's text says.
pub(crate) fn from_toml<T: DeserializeOwned>(text: &str, path: &Path) -> Result<T, ConfigError> {
    toml::from_str(text)
        .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or says anything that is not understood in full.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(&text_of(path)?, path)
    }

    /// Reads a configuration from text; `path` is for messages.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load).
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = from_toml(text, path)?;
        match config.problem() {
            None => Ok(config),
            Some((key, problem)) => Err(ConfigError::Value { path: path.to_owned(), key, problem }),
        }
    }

    fn problem(&self) -> Option<(String, String)> {
        let says = |key: &str, problem: String| Some((key.to_owned(), problem));
        if self.node.is_empty() {
            return says("node", format!("must be given, here or as {NODE} in the environment"));
        }
        for (key, path) in [("pin_dir", &self.pin_dir), ("run_dir", &self.run_dir)] {
            if !path.is_absolute() {
                return says(key, format!("`{}` is not an absolute path", path.display()));
            }
        }
        if let Source::Grpc { address: Address::Https(url), ca, cert, key } = &self.source
            && [ca, cert, key].into_iter().any(Option::is_none)
        {
            return says("source.address", format!("`{url}` needs `ca`, `cert` and `key` beside it"));
        }
        if self.observe && self.fast_path != FastPath::All {
            let name = self.fast_path.name();
            return says("observe", format!("works with `fast_path = \"all\"`, not with \"{name}\""));
        }
        if self.parents.len() > MAX_PARENTS as usize {
            return says("parent", format!("{} given, at most {MAX_PARENTS} work", self.parents.len()));
        }
        for (i, parent) in self.parents.iter().enumerate() {
            if let Some(first) = self.parents[..i].iter().position(|p| p.interface == parent.interface) {
                return says(
                    &format!("parent[{i}].interface"),
                    format!("`{}` is also parent[{first}]", parent.interface),
                );
            }
        }
        // Ids and slots are array indexes: each array is allocated whole, whatever is used of it.
        for (key, value, range) in [
            ("limits.endpoints", self.limits.endpoints, 1..=32_768),
            ("limits.flows", self.limits.flows, 1_024..=MAX_FLOWS),
        ] {
            if !range.contains(&value) {
                return says(key, format!("{value} is not between {} and {}", range.start(), range.end()));
            }
        }
        None
    }

    /// Whether a parent of this interface is configured.
    pub fn parent(&self, interface: &str) -> Option<&Parent> {
        self.parents.iter().find(|parent| parent.interface.as_str() == interface)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = r#"
node = "node-167"
[source]
kind = "file"
path = "/etc/eniway/pods.json"
[[parent]]
interface = "eth1"
"#;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("agent.toml")).map_err(|e| e.to_string())
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let config = parse(LEAST).unwrap();
        assert_eq!(config.pin_dir, Path::new("/sys/fs/bpf/eniway"));
        assert_eq!(config.run_dir, Path::new("/run/eniway"));
        assert_eq!(config.fast_path, FastPath::SecurityGroups);
        assert_eq!(config.parents[0].xdp, Xdp::Off);
        assert!(!config.parents[0].generic_xdp);
        assert_eq!(config.host.metadata, Metadata::Deny);
        assert_eq!(config.limits, Limits { endpoints: 1024, flows: 65_536 });
        assert!(matches!(config.source, Source::File { confirm_removals: false, .. }));
    }

    #[test]
    fn every_key_is_read() {
        let config = parse(
            r#"
node = "n"
pin_dir = "/sys/fs/bpf/n"
run_dir = "/run/n"
fast_path = "all"
log = "debug"
[source]
kind = "file"
path = "/p.json"
confirm_removals = true
[[parent]]
interface = "eth1"
xdp = "redirect"
generic_xdp = true
fair_queue = true
[host]
prefixes = ["10.247.0.0/16"]
health_checks = ["100.125.0.0/16"]
metadata = "wire"
[limits]
endpoints = 64
flows = 2048
"#,
        )
        .unwrap();
        assert_eq!(config.fast_path, FastPath::All);
        assert_eq!(config.parents[0].xdp, Xdp::Redirect);
        assert!(config.parents[0].fair_queue);
        assert_eq!(config.host.health_checks, ["100.125.0.0/16".parse().unwrap()]);
        assert_eq!(config.host.prefixes, ["10.247.0.0/16".parse().unwrap()]);
        assert_eq!(config.limits, Limits { endpoints: 64, flows: 2048 });
    }

    #[test]
    fn an_allocator_is_reached_by_socket_or_tls() {
        let file = "kind = \"file\"\npath = \"/etc/eniway/pods.json\"";
        let with = |source: &str| parse(&LEAST.replace(file, source)).map(|config| config.source);
        let Ok(Source::Grpc { address, .. }) = with("kind = \"grpc\"") else { panic!("no grpc") };
        assert_eq!(address.to_string(), "unix:/run/eniway/ipam.sock");
        let tls = "ca = \"/a\"\ncert = \"/b\"\nkey = \"/c\"";
        assert!(with(&format!("kind = \"grpc\"\naddress = \"https://ipam:7443\"\n{tls}")).is_ok());
        for (source, words) in [
            ("kind = \"grpc\"\naddress = \"https://ipam:7443\"", ["source.address", "cert"]),
            ("kind = \"grpc\"\naddress = \"http://ipam:7443\"", ["http://ipam", "unix:"]),
            ("kind = \"grpc\"\nadress = \"unix:/a\"", ["adress", "line"]),
            ("kind = \"embedded\"", ["config", "missing"]),
        ] {
            let error = with(source).unwrap_err();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }

    #[test]
    fn unknown_keys_are_refused_with_their_line() {
        for (extra, word) in [
            ("[limits]\nendpoint = 3\n", "endpoint"),
            ("[[parent]]\ninterface = \"eth2\"\nxpd = \"off\"\n", "xpd"),
            ("[host]\nmetdata = \"deny\"\n", "metdata"),
        ] {
            let error = parse(&format!("{LEAST}{extra}")).unwrap_err();
            assert!(error.contains("line ") && error.contains(word), "{error}");
        }
        let error = parse(&LEAST.replace("[source]", "nod = 1\n[source]")).unwrap_err();
        assert!(error.contains("line 3") && error.contains("nod"), "{error}");
        let error = parse(&LEAST.replace("path =", "pth = 1\npath =")).unwrap_err();
        assert!(error.contains("pth"), "{error}");
    }

    #[test]
    fn senseless_values_name_their_key() {
        for (from, to, key) in [
            ("\"node-167\"", "\"\"", "`node`"),
            ("[source]", "pin_dir = \"x\"\n[source]", "`pin_dir`"),
            ("[[parent]]", "[limits]\nendpoints = 0\n[[parent]]", "`limits.endpoints`"),
            ("[[parent]]", "[[parent]]\ninterface = \"eth1\"\n[[parent]]", "`parent[1].interface`"),
            ("\"eth1\"", "\"a/b\"", "a/b"),
        ] {
            let error = parse(&LEAST.replace(from, to)).unwrap_err();
            assert!(error.contains(key), "{error}");
        }
    }
}

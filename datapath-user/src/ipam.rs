//! Running the allocator: its configuration file, described in `docs/ipam.md`, and what is opened by it.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use eniway_ipam::{
    Allocator, EmbeddedStore, EtcdSettings, EtcdStore, EtcdTls, MemoryVpc, Node, NodeKind, Settings, Store,
    Subnet, SystemClock, Vpc,
    rpc::{Address, Listener, ServeError, Tls},
};
use serde::Deserialize;

use crate::config::{self, ConfigError};

/// Where the allocator's configuration is looked for when nothing else is said.
pub const DEFAULT_PATH: &str = "/etc/eniway/ipam.toml";

/// Why the allocator does not run.
#[derive(Debug, thiserror::Error)]
pub enum IpamError {
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The allocator itself: its store, its records.
    #[error("the allocator cannot start: {0}")]
    Allocator(#[from] eniway_ipam::Error),
    /// A place to serve on.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A thread or runtime for it.
    #[error("cannot start the allocator's thread: {0}")]
    Runtime(io::Error),
    /// The thread has ended without a word.
    #[error("the allocator's thread has ended before it had started")]
    Died,
}

/// The configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The allocator's name: unique among those that share a store, the same after a restart.
    #[serde(default = "default_name")]
    pub name: String,
    /// Where to serve.
    #[serde(default = "default_listen")]
    pub listen: Vec<Listen>,
    /// Certificates for listening on TCP.
    #[serde(default)]
    pub tls: Option<TlsFiles>,
    /// What to log, unless the environment's `RUST_LOG` says otherwise.
    #[serde(default = "default_log")]
    pub log: String,
    /// Where the records are kept.
    pub store: StoreConfig,
    /// The VPC's API.
    #[serde(default)]
    pub vpc: VpcConfig,
    /// The allocator's settings.
    #[serde(default)]
    pub settings: SettingsConfig,
    /// Nodes, registered or changed at each start.
    #[serde(default, rename = "node")]
    pub nodes: Vec<Node>,
    /// Container subnets, added at each start if they are not there.
    #[serde(default, rename = "subnet")]
    pub subnets: Vec<Subnet>,
    /// The file, for messages.
    #[serde(skip)]
    path: PathBuf,
}

/// A place to serve on.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Listen {
    /// `unix:/path`.
    Unix(PathBuf),
    /// `tls:address:port`.
    Tls(SocketAddr),
}

impl TryFrom<String> for Listen {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong =
            || format!("`{text}` is not a place to serve on: give unix:/path/of/socket or tls:address:port");
        match text.strip_prefix("tls:") {
            Some(address) => address.parse().map(Self::Tls).map_err(|_| wrong()),
            None => match text.parse() {
                Ok(Address::Unix(path)) => Ok(Self::Unix(path)),
                _ => Err(wrong()),
            },
        }
    }
}

/// PEM files for mutual TLS.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The authority that the other side's certificate must be from.
    pub ca: PathBuf,
    /// Our certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl TlsFiles {
    /// Reads the files.
    ///
    /// # Errors
    ///
    /// When one cannot be read.
    pub fn read(&self) -> Result<Tls, ConfigError> {
        Ok(Tls { ca: read(&self.ca)?, certificate: read(&self.cert)?, key: read(&self.key)? })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ConfigError> {
    fs::read(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })
}

/// Where the records are kept.
#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum StoreConfig {
    /// One file.
    Embedded {
        /// The file.
        path: PathBuf,
    },
    /// etcd.
    Etcd {
        /// URLs.
        endpoints: Vec<String>,
        /// The prefix of all keys.
        #[serde(default = "default_root")]
        root: String,
        /// The authority of etcd's certificate.
        #[serde(default)]
        ca: Option<PathBuf>,
        /// Our certificate, if etcd asks for one.
        #[serde(default)]
        cert: Option<PathBuf>,
        /// Its key.
        #[serde(default)]
        key: Option<PathBuf>,
    },
}

/// The VPC's API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VpcConfig {
    /// One in memory, for trying things out: it knows what the configuration names and forgets its interfaces when the
    /// process ends.
    #[default]
    Memory,
}

/// The allocator's settings, in seconds.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "as in `Settings`")]
pub struct SettingsConfig {
    pub owner: String,
    pub cool_down: u64,
    pub static_retention: u64,
    pub give_back_every: u64,
    pub leak_interval: u64,
    pub allocate_timeout: u64,
    pub vpc_calls: usize,
    pub keep_revisions: u64,
}

impl Default for SettingsConfig {
    fn default() -> Self {
        let Settings {
            owner,
            cool_down,
            static_retention,
            give_back_every,
            leak_interval,
            allocate_timeout,
            vpc_calls,
            keep_revisions,
            ..
        } = Settings::default();
        Self {
            owner,
            cool_down: cool_down.as_secs(),
            static_retention: static_retention.as_secs(),
            give_back_every: give_back_every.as_secs(),
            leak_interval: leak_interval.as_secs(),
            allocate_timeout: allocate_timeout.as_secs(),
            vpc_calls,
            keep_revisions,
        }
    }
}

fn default_name() -> String {
    "allocator".to_owned()
}

fn default_listen() -> Vec<Listen> {
    vec![Listen::Unix("/run/eniway/ipam.sock".into())]
}

fn default_log() -> String {
    "info".to_owned()
}

fn default_root() -> String {
    "/eniway/ipam/".to_owned()
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or says anything that is not understood in full.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(&config::text_of(path)?, path)
    }

    /// Reads a configuration from text; `path` is for messages.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load).
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = config::from_toml(text, path)?;
        config.path = path.to_owned();
        if config.tls.is_none()
            && let Some(Listen::Tls(address)) =
                config.listen.iter().find(|listen| matches!(listen, Listen::Tls(_)))
        {
            let problem = format!("`tls:{address}` needs a [tls] section with `ca`, `cert` and `key`");
            return Err(config.wrong("listen", problem));
        }
        Ok(config)
    }

    fn wrong(&self, key: &str, problem: String) -> ConfigError {
        ConfigError::Value { path: self.path.clone(), key: key.to_owned(), problem }
    }

    fn settings(&self) -> Settings {
        let SettingsConfig { owner, vpc_calls, keep_revisions, .. } = self.settings.clone();
        let seconds = Duration::from_secs;
        let from = &self.settings;
        Settings {
            name: self.name.clone(),
            owner,
            cool_down: seconds(from.cool_down),
            static_retention: seconds(from.static_retention),
            give_back_every: seconds(from.give_back_every),
            leak_interval: seconds(from.leak_interval),
            allocate_timeout: seconds(from.allocate_timeout),
            vpc_calls,
            keep_revisions,
            ..Settings::default()
        }
    }

    fn store(&self) -> Result<Arc<dyn Store>, IpamError> {
        match &self.store {
            StoreConfig::Embedded { path } => {
                if let Some(directory) = path.parent() {
                    fs::create_dir_all(directory)
                        .map_err(|source| ConfigError::Read { path: directory.to_owned(), source })?;
                }
                Ok(Arc::new(EmbeddedStore::open(path).map_err(eniway_ipam::Error::from)?))
            }
            StoreConfig::Etcd { endpoints, root, ca, cert, key } => {
                let identity = match (cert, key) {
                    (Some(cert), Some(key)) => Some((read(cert)?, read(key)?)),
                    (None, None) => None,
                    _ => {
                        return Err(self
                            .wrong("store.cert", "`cert` and `key` go together".to_owned())
                            .into());
                    }
                };
                let tls = match ca {
                    Some(ca) => Some(EtcdTls { ca: read(ca)?, identity }),
                    None if identity.is_some() => {
                        let problem = "`cert` and `key` need `ca` beside them".to_owned();
                        return Err(self.wrong("store.ca", problem).into());
                    }
                    None => None,
                };
                let settings =
                    EtcdSettings { root: root.clone(), tls, ..EtcdSettings::new(endpoints.clone()) };
                Ok(Arc::new(EtcdStore::connect(&settings).map_err(eniway_ipam::Error::from)?))
            }
        }
    }

    fn vpc(&self) -> Arc<MemoryVpc> {
        let VpcConfig::Memory = self.vpc;
        // The seed decides addresses: the same would give the ones that records of an earlier run may still have.
        let vpc = MemoryVpc::new(Arc::new(SystemClock), u64::from(std::process::id()));
        for subnet in &self.subnets {
            vpc.add_subnet(&subnet.id, subnet.ipv4, subnet.ipv6);
        }
        for node in &self.nodes {
            match &node.kind {
                NodeKind::SubEni { parents } => {
                    parents.iter().for_each(|parent| vpc.add_parent(&parent.id, parent.limit as usize));
                }
                NodeKind::ExclusiveEni { instance, bindable } => {
                    vpc.add_instance(instance, *bindable as usize);
                }
            }
        }
        Arc::new(vpc)
    }
}

/// Opens everything that the configuration names: afterwards, serve. To be called on a tokio runtime.
///
/// # Errors
///
/// When something is taken, missing, or refused.
pub async fn open(config: &Config) -> Result<(Allocator, Vec<Listener>), IpamError> {
    let settings = match config.vpc {
        // After a restart it knows no interface any more, which must not be taken for the loss of all.
        VpcConfig::Memory => {
            Settings { leak_interval: Duration::from_secs(u64::from(u32::MAX)), ..config.settings() }
        }
    };
    open_on(config, settings, config.vpc()).await
}

/// As [`open`], with a VPC of the caller's own; the configuration's `vpc` is not looked at.
///
/// # Errors
///
/// As [`open`].
pub async fn open_with_vpc(
    config: &Config,
    vpc: Arc<dyn Vpc>,
) -> Result<(Allocator, Vec<Listener>), IpamError> {
    open_on(config, config.settings(), vpc).await
}

async fn open_on(
    config: &Config,
    settings: Settings,
    vpc: Arc<dyn Vpc>,
) -> Result<(Allocator, Vec<Listener>), IpamError> {
    let mut listeners = Vec::new();
    let tls = config.tls.as_ref().map(TlsFiles::read).transpose()?;
    let store = config.store()?;
    let allocator = Allocator::open(settings, store, vpc, Arc::new(SystemClock)).await?;
    for subnet in &config.subnets {
        allocator.add_subnet(subnet.clone()).await?;
    }
    for node in &config.nodes {
        allocator.put_node(node.clone()).await?;
    }
    for listen in &config.listen {
        listeners.push(match (listen, &tls) {
            (Listen::Unix(path), _) => Listener::unix(path)?,
            (Listen::Tls(address), Some(tls)) => Listener::tls(*address, tls.clone()).await?,
            (Listen::Tls(_), None) => continue,
        });
    }
    allocator.start();
    for listener in &listeners {
        log::info!("the allocator {} serves on {}", config.name, listener.address());
    }
    Ok((allocator, listeners))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENTED: &str = r#"
name = "ipam-1"
listen = ["unix:/run/eniway/ipam.sock", "tls:0.0.0.0:7443"]
log = "info"
vpc = "memory"

[store]
kind = "embedded"
path = "/var/lib/eniway/ipam.redb"

[tls]
ca = "/etc/eniway/ca.pem"
cert = "/etc/eniway/ipam.pem"
key = "/etc/eniway/ipam.key"

[settings]
owner = "cluster-a"
cool_down = 60

[[subnet]]
id = "subnet-1"
ipv4 = "10.1.16.0/22"
gateway = "10.1.16.1"
gateway_mac = "fa:ff:ff:00:00:01"

[[node]]
name = "node-167"
kind = { sub-eni = { parents = [{ id = "eni-1", interface = "eth1" }] } }
policy = { pre-bound = { minimum = 4, maximum = 16 } }
"#;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("ipam.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn the_documented_example_is_read() {
        let config = parse(DOCUMENTED).unwrap();
        assert_eq!(config.listen.len(), 2);
        assert_eq!(config.nodes[0].kind.limit(), 256);
        assert_eq!(config.settings().owner, "cluster-a");
        assert_eq!(config.subnets[0].mtu, 1500);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, words) in [
            ("cool_down", "cooldown", ["cooldown", "line"]),
            ("tls:0.0.0.0:7443", "0.0.0.0:7443", ["0.0.0.0:7443", "unix:"]),
            ("kind = \"embedded\"", "kind = \"sqlite\"", ["sqlite", "embedded"]),
            ("[tls]", "[nottls]", ["nottls", "line"]),
            ("interface = \"eth1\"", "interfaces = \"eth1\"", ["interfaces", "line"]),
        ] {
            let error = parse(&DOCUMENTED.replace(from, to)).unwrap_err();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
        let without = DOCUMENTED.split("[tls]").next().unwrap();
        let error = parse(without).unwrap_err();
        assert!(error.contains("`listen`") && error.contains("[tls]"), "{error}");
    }
}

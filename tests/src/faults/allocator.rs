//! The allocator as a process of its own, with a VPC that is another process' affair.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use eniway_ipam::{
    Allocator, EmbeddedStore, EtcdSettings, EtcdStore, Node, Settings, Store, Subnet, SystemClock,
    rpc::{self, Listener},
};
use serde::{Deserialize, Serialize};

use super::vpc::RemoteVpc;

/// What such a process is told.
#[derive(Serialize, Deserialize)]
pub(super) struct Config {
    pub(super) name: String,
    /// Where it serves.
    pub(super) socket: PathBuf,
    /// Where the VPC is.
    pub(super) vpc: PathBuf,
    pub(super) store: StoreConfig,
    pub(super) subnets: Vec<Subnet>,
    pub(super) nodes: Vec<Node>,
}

/// Where its records are.
#[derive(Clone, Serialize, Deserialize)]
pub(super) enum StoreConfig {
    Embedded(PathBuf),
    Etcd(String),
}

impl StoreConfig {
    pub(super) fn open(&self) -> Result<Arc<dyn Store>> {
        Ok(match self {
            Self::Embedded(path) => Arc::new(EmbeddedStore::open(path)?),
            Self::Etcd(url) => Arc::new(EtcdStore::connect(&EtcdSettings::new(vec![url.clone()]))?),
        })
    }
}

pub(super) const OWNER: &str = "faults";
/// As [`Settings::static_retention`].
pub(super) const RETENTION: Duration = Duration::from_secs(4);

/// Times are short, so that minutes hold what takes hours otherwise.
fn settings(name: &str) -> Settings {
    let milliseconds = Duration::from_millis;
    Settings {
        name: name.to_owned(),
        owner: OWNER.to_owned(),
        cool_down: milliseconds(1_000),
        static_retention: RETENTION,
        give_back_every: milliseconds(500),
        leak_interval: milliseconds(2_000),
        take_over_after: milliseconds(1_500),
        allocate_timeout: milliseconds(5_000),
        retry_from: milliseconds(20),
        retry_to: milliseconds(500),
        refused_pause: milliseconds(300),
        ..Settings::default()
    }
}

/// Runs an allocator until the process is killed, or its parent ends.
///
/// # Errors
///
/// When it cannot start.
pub fn serve(config: &Path) -> Result<()> {
    std::thread::spawn(|| {
        // Nothing ever comes; the end comes with the end of who has started us.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    let text = fs::read(config).with_context(|| config.display().to_string())?;
    let config: Config = serde_json::from_slice(&text)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let store = loop {
            // With etcd away, opening goes on when it is back, as a supervisor would have it.
            match config.store.open() {
                Ok(store) => break store,
                Err(error) => log::warn!("{error:#}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        let vpc = Arc::new(RemoteVpc { caller: config.name.clone(), socket: config.vpc.clone() });
        let allocator = Allocator::open(settings(&config.name), store, vpc, Arc::new(SystemClock)).await?;
        for subnet in &config.subnets {
            allocator.add_subnet(subnet.clone()).await?;
        }
        for node in &config.nodes {
            allocator.put_node(node.clone()).await?;
        }
        let listener = Listener::unix(&config.socket)?;
        allocator.start();
        rpc::serve(allocator, vec![listener], std::future::pending()).await?;
        Ok(())
    })
}

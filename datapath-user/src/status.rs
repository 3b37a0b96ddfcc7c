//! What the agent says of itself: `<run_dir>/status.json`, replaced whole at each change. The truth about packets is
//! in the kernel's tables; this file adds names, wishes and errors.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    bandwidth::Bandwidth,
    net::Mac,
    run_file::{self, RunFileError},
    settings::NodeChange,
};

/// Why the status cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// There is no file: no agent has run here.
    #[error("{} does not exist: no agent has run with this run_dir", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file.
    #[error(transparent)]
    File(#[from] RunFileError),
}

/// The agent's state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The agent's process.
    pub pid: u32,
    /// The node's name, from the configuration.
    pub node: String,
    /// When the agent started, in seconds since 1970.
    pub started: u64,
    /// Whether everything of the first snapshot was tried.
    pub ready: bool,
    /// The revision of the snapshot in force.
    pub revision: Option<u64>,
    /// Why the newest document was refused, or cannot be read.
    pub source_error: Option<String>,
    /// Since when, in seconds since 1970.
    pub source_down_since: Option<u64>,
    /// Why a snapshot waits for confirmation.
    pub held_back: Option<String>,
    /// Which snapshot waits: what `eniway confirm` confirms.
    #[serde(default)]
    pub held_back_id: Option<String>,
    /// The fast path's setting.
    pub fast_path: String,
    /// The parent ENIs.
    pub parents: Vec<ParentStatus>,
    /// What was changed in the node's settings.
    pub node_changes: Vec<NodeChange>,
    /// The pods of the snapshot in force.
    pub pods: Vec<PodStatus>,
    /// What happened lately on the node, and what was done about it; the newest last.
    #[serde(default)]
    pub events: Vec<Event>,
    /// Pods of which the source says what cannot be, and why; what they have stays.
    #[serde(default)]
    pub refused: Vec<String>,
}

/// Something that happened on the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, in seconds since 1970.
    pub at: u64,
    /// What, and what was done.
    pub what: String,
}

/// A parent ENI.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParentStatus {
    /// Its interface.
    pub interface: String,
    /// Its number in the tables.
    pub index: u16,
    /// Its interface index.
    pub ifindex: u32,
    /// What the configuration asks of XDP: `off`, `guard` or `redirect`.
    pub xdp_wanted: String,
    /// How XDP runs: `off`, `native` or `generic`.
    pub xdp_mode: String,
    /// How tc programs are attached: `tcx` or `clsact`.
    pub tc: String,
    /// Since when the interface is away, in seconds since 1970.
    #[serde(default)]
    pub gone_since: Option<u64>,
    /// Since when it has no carrier, in seconds since 1970.
    #[serde(default)]
    pub no_carrier_since: Option<u64>,
    /// What is not as wished, and why.
    pub notes: Vec<String>,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodStatus {
    /// Kubernetes' uid.
    pub uid: String,
    /// Kubernetes' namespace.
    pub namespace: String,
    /// Kubernetes' name.
    pub name: String,
    /// The runtime's id of the sandbox.
    pub container_id: String,
    /// Path of its network namespace.
    pub netns: Option<String>,
    /// Its interface, inside.
    pub interface: String,
    /// Its interface, on the host's side.
    pub host_interface: Option<String>,
    /// Its number in the tables.
    pub id: Option<u32>,
    /// Where its record is.
    pub slot: Option<u32>,
    /// Interface of its parent ENI.
    pub parent: String,
    /// Its VLAN id; 0 = none yet.
    pub vlan: u16,
    /// Its MAC.
    pub mac: Mac,
    /// Its address.
    pub ipv4: Ipv4Addr,
    /// The allocator's generation.
    pub generation: u32,
    /// Limits of its bandwidth.
    #[serde(default)]
    pub bandwidth: Bandwidth,
    /// Why it is not, or not as asked, in the tables.
    pub error: Option<String>,
}

impl Status {
    /// The file's place.
    pub fn path(run_dir: &Path) -> PathBuf {
        run_dir.join("status.json")
    }

    /// Reads the newest status.
    ///
    /// # Errors
    ///
    /// When there is none, or it is not ours.
    pub fn read(run_dir: &Path) -> Result<Self, StatusError> {
        let path = Self::path(run_dir);
        run_file::read(&path)?.ok_or(StatusError::Missing { path })
    }

    /// Replaces the file; a reader sees the old one or the new one.
    ///
    /// # Errors
    ///
    /// When the directory cannot be written.
    pub fn write(&self, run_dir: &Path) -> Result<(), StatusError> {
        Ok(run_file::write(&Self::path(run_dir), self)?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let dir = std::env::temp_dir().join(format!("eniway-status-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        assert!(matches!(Status::read(&dir), Err(StatusError::Missing { .. })));
        let status = Status {
            pid: 1,
            node: "n".to_owned(),
            pods: vec![PodStatus {
                uid: "u".to_owned(),
                namespace: "default".to_owned(),
                name: "a".to_owned(),
                container_id: "c".to_owned(),
                netns: None,
                interface: "eth0".to_owned(),
                host_interface: None,
                id: Some(1),
                slot: Some(2),
                parent: "eth1".to_owned(),
                vlan: 101,
                mac: Mac([2, 0, 0, 0, 0, 1]),
                ipv4: Ipv4Addr::new(10, 0, 0, 1),
                generation: 1,
                bandwidth: Bandwidth::default(),
                error: None,
            }],
            ..Status::default()
        };
        status.write(&dir).unwrap();
        assert_eq!(Status::read(&dir).unwrap(), status);
        fs::remove_dir_all(&dir).unwrap();
    }
}

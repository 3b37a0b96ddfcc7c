//! What should be, as the agent writes it down: an audit needs no running agent.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use datapath_common::abi::Endpoint;
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::{
    run_file::{self, RunFileError},
    tables::PolicyDigest,
    wiring::PodSpec,
};

/// Why what should be cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ExpectedError {
    /// There is no file.
    #[error("{} does not exist: no agent of this version has run with this run_dir; start `eniway agent`", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file.
    #[error(transparent)]
    File(#[from] RunFileError),
}

/// All that the agent wants of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expected {
    /// Programs are attached by filters of clsact; else by TCX.
    pub clsact: bool,
    /// The parent ENIs.
    pub parents: Vec<ExpectedParent>,
    /// The pods.
    pub pods: Vec<ExpectedPod>,
    /// Host sides that were wired for pods that are in no table.
    pub also_wired: Vec<String>,
    /// Destinations that are not left to the wire, with their flags.
    pub host_dsts: Vec<(Ipv4Net, u32)>,
    /// Virtual addresses of load balancers: address, port, protocol. `None`: the source has not said them yet.
    pub vips: Option<Vec<([u8; 4], u16, u8)>>,
    /// The security groups' tables. `None`: they are not in force as they should be, and the agent knows.
    pub policy: Option<PolicyDigest>,
}

/// A parent ENI.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpectedParent {
    /// Its interface.
    pub interface: String,
    /// Its interface index; none while it is away.
    pub ifindex: Option<u32>,
    /// The subnets of its pods, with gateway and the gateway's MAC. None: the routing is left as it is.
    pub gateways: Vec<(Ipv4Net, Ipv4Addr, [u8; 6])>,
    /// XDP runs: by the driver (`false`), or generic (`true`).
    pub xdp_generic: Option<bool>,
    /// The VLAN offload is off: its driver lets it.
    pub rxvlan_off: bool,
    /// The largest IP MTU of its pods.
    pub mtu: u32,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpectedPod {
    /// As users call it.
    pub name: String,
    /// Who owns its record.
    pub owner: u64,
    /// How it is wired; none while the source has not said it to this agent.
    pub spec: Option<PodSpec>,
    /// Its interface on the host's side; empty for one with an ENI of its own.
    pub host_interface: String,
    /// What the tables hold of it.
    pub live: Option<LiveRecord>,
    /// Why it is not as the source wants it.
    pub fault: Option<String>,
}

impl ExpectedPod {
    /// Whether it has an ENI of its own.
    pub fn is_exclusive(&self) -> bool {
        self.live.is_some_and(|live| live.record.vid == 0)
    }
}

/// A record and its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveRecord {
    /// The slot.
    pub slot: u32,
    /// What stands there.
    #[serde(with = "Fields")]
    pub record: Endpoint,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Endpoint")]
struct Fields {
    #[cfg(feature = "next-abi")]
    spare: u64,
    owner: u64,
    id: u32,
    generation: u32,
    ifindex: u32,
    parent_ifindex: u32,
    policy_id: u32,
    flags: u32,
    ipv4: [u8; 4],
    gateway_ipv4: [u8; 4],
    ipv6: [u8; 16],
    gateway_ipv6: [u8; 16],
    mac: [u8; 6],
    wire_mac: [u8; 6],
    gateway_mac: [u8; 6],
    vid: u16,
    mtu: u16,
    parent: u16,
}

impl Expected {
    /// The file's place.
    pub fn path(run_dir: &Path) -> PathBuf {
        run_dir.join("expected.json")
    }

    /// Reads what the agent wrote last.
    ///
    /// # Errors
    ///
    /// When there is nothing, or it is not ours.
    pub fn read(run_dir: &Path) -> Result<Self, ExpectedError> {
        let path = Self::path(run_dir);
        run_file::read(&path)?.ok_or(ExpectedError::Missing { path })
    }

    /// As it is written.
    ///
    /// # Errors
    ///
    /// Never: everything in it can be written.
    pub fn to_text(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }

    /// Replaces the file.
    ///
    /// # Errors
    ///
    /// When the directory cannot be written.
    pub fn write(run_dir: &Path, text: &[u8]) -> Result<(), ExpectedError> {
        Ok(run_file::write_text(&Self::path(run_dir), text)?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let dir = std::env::temp_dir().join(format!("eniway-expected-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        assert!(matches!(Expected::read(&dir), Err(ExpectedError::Missing { .. })));
        let record = Endpoint { owner: u64::MAX, id: 7, vid: 100, mac: [2, 0, 0, 0, 0, 7], ..Endpoint::ZERO };
        let pod = ExpectedPod {
            name: "default/a".to_owned(),
            owner: u64::MAX,
            spec: None,
            host_interface: "eni1".to_owned(),
            live: Some(LiveRecord { slot: 3, record }),
            fault: None,
        };
        let expected = Expected {
            pods: vec![pod],
            host_dsts: vec![("10.0.0.0/8".parse().unwrap(), 1)],
            vips: Some(vec![([10, 0, 0, 1], 80, 6)]),
            ..Expected::default()
        };
        Expected::write(&dir, &expected.to_text().unwrap()).unwrap();
        assert_eq!(Expected::read(&dir).unwrap(), expected);
        fs::remove_dir_all(&dir).unwrap();
    }
}

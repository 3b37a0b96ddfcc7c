//! What the agent says of security groups: `<run_dir>/policy.json`, replaced whole at each change. The kernel's tables hold
//! what is in force, but no names; this file has the rules and whom they are about.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use eniway_policy::model::{Groups, Membership};
use serde::{Deserialize, Serialize};

use crate::{
    config::FastPath,
    run_file::{self, RunFileError},
    source::{Desired, Pod},
};

/// The groups, and the pods that they are about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyState {
    /// The groups.
    pub groups: Groups,
    /// The pods.
    pub pods: Vec<PodPolicy>,
    /// Why the groups are not in force.
    pub fault: Option<String>,
}

/// A pod, as far as security groups are concerned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodPolicy {
    /// As users call it.
    pub name: String,
    /// Its address.
    pub ipv4: Ipv4Addr,
    /// Its IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// Its groups.
    pub membership: Membership,
    /// What holds for it in place of the node's setting.
    pub fast_path: Option<FastPath>,
    /// Why it cannot be judged on the node.
    pub undecidable: Option<String>,
}

impl PolicyState {
    /// The state of what is wanted; with each pod comes why it cannot be judged.
    pub fn of<'a>(
        desired: &Desired,
        pods: impl Iterator<Item = (&'a Pod, Option<String>)>,
        fault: Option<String>,
    ) -> Self {
        let pods = pods.map(|(pod, undecidable)| PodPolicy {
            name: pod.full_name(),
            ipv4: pod.ipv4,
            ipv6: pod.ipv6,
            membership: pod.membership.clone(),
            fast_path: pod.fast_path,
            undecidable,
        });
        Self { groups: desired.groups.clone(), pods: pods.collect(), fault }
    }

    /// The file's place.
    pub fn path(run_dir: &Path) -> PathBuf {
        run_dir.join("policy.json")
    }

    /// Reads the newest state; none where no agent has written one.
    ///
    /// # Errors
    ///
    /// When there is a file that cannot be read or understood.
    pub fn read(run_dir: &Path) -> Result<Option<Self>, RunFileError> {
        run_file::read(&Self::path(run_dir))
    }

    /// Replaces the file.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn write(&self, run_dir: &Path) -> Result<(), RunFileError> {
        run_file::write(&Self::path(run_dir), self)
    }
}

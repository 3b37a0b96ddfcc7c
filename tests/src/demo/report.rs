//! The report for programs: what `eniway-lab demo --report FILE` writes.

use std::{fs, net::Ipv4Addr, path::Path};

use serde::Serialize;

use super::{Error, Result};
use crate::lab::{Lab, Pod};

/// The report.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// All pods, as built.
    pub pods: Vec<PodLine>,
    /// All checks, in the order in which they ran.
    pub checks: Vec<CheckLine>,
    /// How many passed.
    pub passed: usize,
    /// How many failed.
    pub failed: usize,
}

/// A pod.
#[derive(Clone, Debug, Serialize)]
pub struct PodLine {
    /// Its name.
    pub name: String,
    /// Its node's address, which is the node's name in such clusters.
    pub node: Ipv4Addr,
    /// Its address.
    pub ip: Ipv4Addr,
    /// Its VLAN id on the node's extended NIC.
    pub vlan: u16,
    /// The MAC of its sub-ENI.
    pub mac: String,
    /// The address of the node's extended NIC.
    pub eni_ip: Ipv4Addr,
}

/// A check.
#[derive(Clone, Debug, Serialize)]
pub struct CheckLine {
    /// Its name.
    pub name: &'static str,
    /// Whether it passed.
    pub ok: bool,
    /// What was seen.
    pub detail: String,
    /// How long what it looked at took, in microseconds.
    pub micros: u64,
}

impl Report {
    /// A report of the lab's pods, without checks.
    ///
    /// # Errors
    ///
    /// When a pod is on no node of the lab.
    pub fn of(lab: &Lab) -> Result<Self> {
        let line = |pod: &Pod| {
            let node = lab.node_of(pod)?;
            Ok(PodLine {
                name: pod.name.clone(),
                node: node.ip,
                ip: pod.ip,
                vlan: pod.vlan,
                mac: pod.mac.to_string(),
                eni_ip: node.parent_ip,
            })
        };
        let pods: Result<_> = lab.pods().iter().map(line).collect();
        Ok(Self { pods: pods?, ..Self::default() })
    }

    /// Adds a check.
    pub fn add(&mut self, check: CheckLine) {
        if check.ok {
            self.passed += 1;
        } else {
            self.failed += 1;
        }
        self.checks.push(check);
    }

    /// Writes the report as JSON.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(std::io::Error::from);
        text.and_then(|text| fs::write(path, text + "\n"))
            .map_err(|source| Error::Report { path: path.to_owned(), source })
    }
}

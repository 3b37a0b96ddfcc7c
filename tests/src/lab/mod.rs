//! The lab: a [`Lab`] is a VPC with nodes, pods and clients, built by [`LabBuilder`] and removed when dropped.
//!
//! ```text
//!   outside ──┐            ┌── vm (10.1.0.20)          one port, one veth pair; the lab's ends are all in
//!   elb ──────┤   fabric   ├── node-167 eth0 (primary)  namespace ew-<id>-fabric, where the tc program
//!   …         └────────────┴── node-167 eth1 (parent)   `fabric_port` moves the packets
//!                                  ╰─ VLAN 101 ── pod    (wired by the agent of the node)
//! ```
//!
//! Where the agents know their pods from is a choice ([`Source`]): documents, which tests may change, or an allocator ([`Ipam`])
//! with the fabric as its VPC ([`vpc`]).
//!
//! ```no_run
//! use eniway_tests::lab::{http, Lab};
//!
//! # fn main() -> eniway_tests::lab::Result<()> {
//! let lab = Lab::walkthrough("l2").build()?;
//! lab.start_agents()?;
//! let (a, b) = (lab.pod("example-1")?, lab.pod("example-4")?);
//! lab.elb().pin(a.ip, b.ip)?;
//! let response = http::get(&a.netns, lab.vip()?, "/whoami")?;
//! assert_eq!(response.whoami()?.remote, response.local);
//! # Ok(())
//! # }
//! ```

pub mod agent;
pub mod capture;
pub mod elb;
pub mod error;
pub mod fabric;
pub mod groups;
pub mod http;
pub mod ipam;
pub mod large;
pub mod net;
pub mod netns;
pub mod nginx;
pub mod raw;
mod remains;
pub mod spec;
mod sys;
mod topology;
pub mod vpc;

pub use agent::Agent;
pub use error::{Error, Result};
pub use fabric::Fabric;
pub use ipam::Ipam;
pub use netns::{Netns, NetnsGuard};
pub use remains::remove;
pub use spec::{
    ELB_IP, GATEWAY_MAC, Mac, NodeSpec, OUTSIDE_IP, PodSpec, Protocol, Source, Subnet, VM_IP, VipSpec,
    VmSpec, XdpMode,
};
pub use topology::{Client, Lab, LabBuilder, Node, Pod};

//! What callers of the allocator give and get.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::{
    clock::Instant,
    model::{LeakKind, Node, PodKey, Policy, WrongStep},
    net::{Addresses, Mac},
    store::{Revision, StoreError},
    vpc::{Kind, VpcError},
};

/// The allocator's own settings. What concerns one node is in [`Node`].
#[derive(Clone, Debug)]
pub struct Settings {
    /// This allocator's name, unique among those that share a store and the same after a restart: it then continues its own unfinished calls at once.
    pub name: String,
    /// The tag of our interfaces at the VPC, unique per cluster. What carries it and is in no record counts as leaked.
    pub owner: String,
    /// How long a released interface, its address and its VLAN rest before a pod gets them again.
    pub cool_down: Duration,
    /// How long a static address is kept after its pod is gone, unless the pod asks otherwise.
    pub static_retention: Duration,
    /// How often a pool above its maximum gives one interface back.
    pub give_back_every: Duration,
    /// How often the VPC's list is compared with the records.
    pub leak_interval: Duration,
    /// After this time another allocator continues an unfinished call.
    pub take_over_after: Duration,
    /// The longest an allocation may wait for the VPC.
    pub allocate_timeout: Duration,
    /// The pause before a failed VPC call is repeated: from this ...
    pub retry_from: Duration,
    /// ... doubling up to this.
    pub retry_to: Duration,
    /// The pause before a pool asks again for what the VPC refused.
    pub refused_pause: Duration,
    /// The most VPC calls at once.
    pub vpc_calls: usize,
    /// How many of the store's last changes are kept for watches.
    pub keep_revisions: Revision,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            name: "allocator".to_owned(),
            owner: "eniway".to_owned(),
            cool_down: Duration::from_secs(60),
            static_retention: Duration::from_secs(300),
            give_back_every: Duration::from_secs(120),
            leak_interval: Duration::from_secs(600),
            take_over_after: Duration::from_secs(30),
            allocate_timeout: Duration::from_secs(50),
            retry_from: Duration::from_millis(200),
            retry_to: Duration::from_secs(30),
            refused_pause: Duration::from_secs(30),
            vpc_calls: 32,
            keep_revisions: 50_000,
        }
    }
}

/// Which address a pod gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AddressRequest {
    /// One of the node's pool.
    #[default]
    Pool,
    /// One tied to the pod's namespace and name.
    Static {
        /// This IPv4 address; any for the first time, later the one kept.
        ipv4: Option<Ipv4Addr>,
        /// This IPv6 address, on dual-stack nodes.
        ipv6: Option<Ipv6Addr>,
        /// How long the address is kept after the pod is gone, zero for ever; [`Settings::static_retention`] by default.
        retention: Option<Duration>,
    },
}

/// A pod that needs an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllocateRequest {
    /// The node it runs on.
    pub node: String,
    /// The allocation's identity: asking again with the same gives the same interface.
    pub key: PodKey,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The network namespace's path on the node; only passed on.
    pub netns: Option<String>,
    /// The interface's name in the pod; only passed on.
    pub interface: String,
    /// Which address.
    pub address: AddressRequest,
    /// Security groups other than the node's; such interfaces never come from the pool or go back to it.
    pub security_groups: Option<Vec<String>>,
    /// How long to wait for the VPC; [`Settings::allocate_timeout`] by default.
    pub timeout: Option<Duration>,
}

/// An interface that a pod has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocation {
    /// The allocation's identity.
    #[serde(flatten)]
    pub key: PodKey,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The node.
    pub node: String,
    /// The network namespace's path on the node, if it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<String>,
    /// The interface's name in the pod.
    pub interface: String,
    /// Grows with every allocation: an older one never replaces or removes a newer one.
    pub generation: u64,
    /// Our id of the interface.
    pub interface_id: String,
    /// The VPC's id of it.
    pub vpc_id: String,
    /// What kind.
    pub kind: Kind,
    /// The parent ENI's id; none for a whole ENI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The parent's name on the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_interface: Option<String>,
    /// The VLAN id; 0 for a whole ENI, -1 when the VPC no longer has the interface and it must not be programmed.
    pub vlan: i32,
    /// The MAC address.
    pub mac: Mac,
    /// The addresses.
    pub addresses: Addresses,
    /// The subnet's id.
    pub subnet_id: String,
    /// The subnet.
    pub subnet: Ipv4Net,
    /// Its gateway.
    pub gateway: Ipv4Addr,
    /// The gateway's MAC address.
    pub gateway_mac: Mac,
    /// The subnet's IPv6 prefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet_ipv6: Option<Ipv6Net>,
    /// Its IPv6 gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_ipv6: Option<Ipv6Addr>,
    /// The MTU.
    pub mtu: u16,
    /// The security groups.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub security_groups: Vec<String>,
    /// The revision of the security groups when the pod got these: older rules do not judge it.
    #[serde(default)]
    pub security_groups_revision: Revision,
    /// Whether the VPC is being told other security groups: until it has them, nobody else can judge the pod.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub regrouping: bool,
    /// Whether the address is tied to the pod's name.
    #[serde(default, rename = "static")]
    pub is_static: bool,
    /// The store's revision at which the allocation came to be as it is: what the agent's acknowledgement is compared with.
    pub revision: Revision,
}

/// What putting security groups has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SecurityGroupsPut {
    /// The revision of the security groups now.
    pub revision: Revision,
    /// Whether it is a new one.
    pub changed: bool,
}

/// What a release found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    /// The interface is released now.
    Now,
    /// There was no such allocation: released before, or never made.
    NotAllocated,
}

/// What a node's agent reports about what it was told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Acknowledgement {
    /// The store's id: an acknowledgement for another store says nothing here.
    pub store: String,
    /// Everything up to this revision is in the kernel, except what is named below.
    pub revision: Revision,
    /// All allocations that the agent could not put into the kernel: the full list each time.
    pub refused: Vec<RefusedByAgent>,
}

/// An allocation that an agent could not put into the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedByAgent {
    /// Which.
    pub key: PodKey,
    /// Why.
    pub reason: String,
}

/// A node's pool at a glance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PoolStatus {
    /// The node.
    pub node: String,
    /// What its pods get.
    pub kind: Kind,
    /// Its policy.
    pub policy: Policy,
    /// How many interfaces it can hold for pods.
    pub limit: u32,
    /// Interfaces of pods.
    pub pods: u32,
    /// Available at once.
    pub idle: u32,
    /// Resting after a release.
    pub cooling: u32,
    /// Being created for the pool.
    pub coming: u32,
    /// Being given back.
    pub leaving: u32,
    /// Whether the node is being emptied.
    pub draining: bool,
    /// The VPC's last refusal or failure for this node, until a call succeeds.
    pub problem: Option<String>,
    /// The revision that the node's agent has acknowledged to this allocator.
    pub acknowledged: Option<Revision>,
}

/// An interface that rests after a release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CoolingStatus {
    /// Our id of the interface, if the whole interface rests; none if only the VLAN does.
    pub interface_id: Option<String>,
    /// The node.
    pub node: Option<String>,
    /// The parent ENI's id.
    pub parent: Option<String>,
    /// The VLAN id.
    pub vlan: Option<u16>,
    /// The addresses.
    pub addresses: Option<Addresses>,
    /// When it is available again.
    pub until: Instant,
    /// In how many milliseconds that is.
    pub remaining_ms: u64,
}

/// A leak.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeakStatus {
    /// The VPC's id of the interface.
    pub vpc_id: String,
    /// Which side knows it.
    pub kind: LeakKind,
    /// Our id, if we have a record.
    pub interface_id: Option<String>,
    /// Its addresses, if known.
    pub addresses: Option<Addresses>,
    /// When it was first seen.
    pub first_seen: Instant,
    /// How often it was seen.
    pub sightings: u32,
    /// Whether its collection waits for [`Confirm::Leaks`], because there are suspiciously many.
    pub held_back: bool,
}

/// What an operator confirms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Confirm {
    /// The removals that a node's agent holds back.
    Node(String),
    /// The collection of all leaks seen so far.
    Leaks,
}

/// How full the container subnets are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SubnetStatus {
    /// The subnet's id.
    pub id: String,
    /// Its prefix.
    pub subnet: Ipv4Net,
    /// Addresses that can still be given out, as of the VPC's last answer and our own changes since.
    pub available: Option<u64>,
    /// All addresses, once the VPC has told.
    pub total: Option<u64>,
    /// Interfaces of ours in it.
    pub ours: u64,
}

/// The subnets of an allocation that found no address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetList(pub Vec<SubnetStatus>);

impl fmt::Display for SubnetList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no subnet is configured");
        }
        for (index, SubnetStatus { id, subnet, available, total, ours }) in self.0.iter().enumerate() {
            let (available, total) = (available.unwrap_or(0), total.unwrap_or(0));
            let separator = if index == 0 { "" } else { "; " };
            write!(
                f,
                "{separator}{id} ({subnet}): {available} of {total} addresses available, {ours} are ours"
            )?;
        }
        Ok(())
    }
}

/// Why the allocator did not do what was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The node is not registered.
    #[error("node {0} is not known to the allocator; add its settings first")]
    UnknownNode(String),
    /// The node is being emptied.
    #[error("node {0} is being drained and takes no pods; wait until it is gone to use its name again")]
    Draining(String),
    /// The node can hold no more.
    #[error(
        "node {node} is full: {pods} pods of at most {limit} interfaces, {cooling} cooling down{next}; \
         delete pods of it, or schedule on another node"
    )]
    NodeFull {
        /// The node.
        node: String,
        /// How many interfaces it can hold for pods.
        limit: u32,
        /// How many pods have one.
        pods: u32,
        /// How many are resting.
        cooling: u32,
        /// When the next one is available, as text.
        next: String,
    },
    /// All subnets are full.
    #[error(
        "no free address for node {node}: {subnets}; add a subnet (`eniway ipam add-subnet`) or delete pods"
    )]
    SubnetsExhausted {
        /// The node.
        node: String,
        /// The subnets with their counts.
        subnets: SubnetList,
    },
    /// A subnet overlaps one that is there.
    #[error(
        "subnet {new} ({new_prefix}) overlaps {old} ({old_prefix}); addresses must belong to one subnet only"
    )]
    SubnetOverlap {
        /// The new one's id.
        new: String,
        /// The new one's prefix.
        new_prefix: Ipv4Net,
        /// The old one's id.
        old: String,
        /// The old one's prefix.
        old_prefix: Ipv4Net,
    },
    /// The static address is still in use.
    #[error(
        "the static address of {pod} is in use by pod {uid} on node {node}; \
         it moves when that pod is released or the node is drained"
    )]
    StaticInUse {
        /// `namespace/name`.
        pod: String,
        /// The uid of the pod that has it.
        uid: String,
        /// Its node.
        node: String,
    },
    /// The allocation is another one by now.
    #[error("generation {asked} of {key} is out of date, the present one is {current}; nothing was released")]
    StaleGeneration {
        /// Which allocation.
        key: PodKey,
        /// The generation given.
        asked: u64,
        /// The generation there.
        current: u64,
    },
    /// The pod has no interface.
    #[error("{0} has no interface; allocate one first")]
    UnknownPod(PodKey),
    /// The security groups have changed since they were read.
    #[error(
        "the document is a change of revision {asked}, but the security groups are at revision {current} by now; \
         read them again (`eniway ipam security-groups show --json`), or leave `revision` out to replace whatever is there"
    )]
    StaleSecurityGroups {
        /// The revision given.
        asked: Revision,
        /// The revision there.
        current: Revision,
    },
    /// The VPC has lost the pod's interface.
    #[error("the VPC no longer has the interface of {0}; delete the pod so that it gets another one")]
    Lost(PodKey),
    /// It took too long.
    #[error(
        "{what} did not finish within {waited:?}; it goes on, ask again with the same pod and container id"
    )]
    TimedOut {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// The node's agent could not put the allocation into the kernel.
    #[error("the agent of node {node} did not program {key}: {reason}")]
    RefusedByAgent {
        /// The node.
        node: String,
        /// Which allocation.
        key: PodKey,
        /// Why.
        reason: String,
    },
    /// The VPC refused.
    #[error(transparent)]
    Vpc(#[from] VpcError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The allocator would have taken a step that does not exist.
    #[error(transparent)]
    WrongStep(#[from] WrongStep),
    /// The allocator is shutting down.
    #[error("the allocator is shutting down; ask again")]
    Closed,
}

/// Checks a node's settings.
pub(crate) fn check_node(node: &Node) -> Result<(), Error> {
    let name = &node.name;
    if name.is_empty() || name.contains('/') {
        return Err(Error::Invalid(format!(
            "`{name}` is not a node name: it must not be empty or contain `/`"
        )));
    }
    match node.policy {
        Policy::PreBound { minimum, maximum } if minimum > maximum => Err(Error::Invalid(format!(
            "node {name}: the minimum pre-bound ({minimum}) is above the maximum ({maximum}); lower it"
        ))),
        _ if node.kind.limit() == 0 => Err(Error::Invalid(format!(
            "node {name} can hold no interface for pods; give it a parent ENI or a higher limit"
        ))),
        _ => Ok(()),
    }
}

//! The records in the store, and the one place that knows the life of an interface.
//!
//! | key | value | written when |
//! |---|---|---|
//! | `store` | the store's id, a random word: revisions of two stores have nothing to do with each other | the first allocator opens it |
//! | `subnets` | all container subnets ([`Subnet`]) in one list, so that overlaps are found atomically | a subnet is added |
//! | `security-groups` | all security groups and address groups ([`Groups`](eniway_policy::model::Groups)); their revision is that of the key | an operator puts them |
//! | `node/<name>` | [`Node`]: the node's settings, and whether it is draining | settings change; gone when drained |
//! | `pool/<node>` | [`Pool`]: serialises growth and shrinking of one node's pool | interfaces join a node, or are given back at a pace |
//! | `interface/<id>` | [`Interface`]: state, VPC identity, addresses, pod | every step of the table at [`State`] |
//! | `pod/<uid>/<container id>` | [`PodKey`] → interface id: what makes allocation idempotent | claimed and released |
//! | `static/<namespace>/<name>` | [`StaticAddress`]: the address kept for a pod name | bound and released |
//! | `vlan/<parent>/<vlan>` | until when a VLAN that lost its interface must not be used | a static interface is unbound |
//! | `leak/<id>` | [`Leak`]: sightings of something that only one side knows | the leak scan; gone when collected |
//!
//! Values are JSON. A key is only ever changed by a transaction that states the revision at which it was last seen.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::{
    clock::Instant,
    net::{Addresses, Mac, VlanId},
    vpc::Kind,
};

/// A container subnet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subnet {
    /// The VPC's id of the subnet.
    pub id: String,
    /// The IPv4 prefix.
    pub ipv4: Ipv4Net,
    /// The gateway in it.
    pub gateway: Ipv4Addr,
    /// The gateway's MAC address.
    pub gateway_mac: Mac,
    /// The IPv6 prefix; needed for dual-stack nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Net>,
    /// The gateway in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_ipv6: Option<Ipv6Addr>,
    /// The MTU of the pods' interfaces.
    #[serde(default = "default_mtu")]
    pub mtu: u16,
}

fn default_mtu() -> u16 {
    1500
}

impl Subnet {
    /// Whether the two share an address.
    pub fn overlaps(&self, other: &Self) -> bool {
        let nested = self.ipv4.contains(&other.ipv4) || other.ipv4.contains(&self.ipv4);
        let nested_ipv6 = match (&self.ipv6, &other.ipv6) {
            (Some(ours), Some(theirs)) => ours.contains(theirs) || theirs.contains(ours),
            _ => false,
        };
        nested || nested_ipv6
    }
}

/// A parent ENI of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parent {
    /// The VPC's id of the ENI.
    pub id: String,
    /// The interface's name on the node.
    pub interface: String,
    /// How many sub-ENIs it can carry.
    #[serde(default = "default_parent_limit")]
    pub limit: u32,
}

fn default_parent_limit() -> u32 {
    256
}

/// What a node's pods get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum NodeKind {
    /// Sub-ENIs on parent ENIs.
    SubEni {
        /// The parents; new sub-ENIs go to the one with the most room.
        parents: Vec<Parent>,
    },
    /// Whole ENIs.
    ExclusiveEni {
        /// The VPC's id of the instance.
        instance: String,
        /// How many ENIs can be bound to the instance; pods can have one fewer.
        bindable: u32,
    },
}

impl NodeKind {
    /// The kind of the node's interfaces.
    pub fn kind(&self) -> Kind {
        match self {
            Self::SubEni { .. } => Kind::SubEni,
            Self::ExclusiveEni { .. } => Kind::Eni,
        }
    }

    /// How many interfaces the node can hold for pods.
    pub fn limit(&self) -> u32 {
        match self {
            Self::SubEni { parents } => {
                parents.iter().map(|parent| parent.limit.min(VlanId::MAX.into())).sum()
            }
            Self::ExclusiveEni { bindable, .. } => bindable.saturating_sub(1),
        }
    }
}

/// How many interfaces a node holds in advance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Policy {
    /// Interfaces on the node stay between pods + minimum and pods + maximum.
    PreBound {
        /// Bound in advance at least.
        minimum: u32,
        /// Bound in advance at most.
        maximum: u32,
    },
    /// Targets as in CCE.
    Targets {
        /// Interfaces on the node at least, with or without pods.
        minimum: u32,
        /// Above this many interfaces on the node none is bound in advance; 0, or less than the minimum, is no such limit.
        maximum: u32,
        /// Idle interfaces to hold once the minimum is used up.
        warm: u32,
        /// Idle interfaces beyond `warm` that are tolerated before any is given back.
        reclaim_above: u32,
    },
    /// None: static address mode. Interfaces are bound when pods are created and given back when they are deleted.
    OnDemand,
}

impl Policy {
    /// The CCE-style policy with its defaults.
    pub const TARGETS: Self = Self::Targets { minimum: 10, maximum: 0, warm: 2, reclaim_above: 2 };
}

/// A node and its settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// The node's name.
    pub name: String,
    /// What its pods get.
    pub kind: NodeKind,
    /// How many interfaces it holds in advance.
    pub policy: Policy,
    /// Whether interfaces carry IPv6 too.
    #[serde(default)]
    pub dual_stack: bool,
    /// The subnets to allocate from; all when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subnets: Vec<String>,
    /// The security groups of its interfaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub security_groups: Vec<String>,
    /// Whether it is being emptied. Set by draining, not by hand.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
    /// Up to which revision an operator has confirmed the removals in what the node is told.
    #[serde(default)]
    pub confirmed: u64,
}

/// Serialises the changes of one node's pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// When an interface was last given back at a pace.
    pub given_back: Instant,
    /// The VLAN id given last: ids are used in turn, so that one rests as long as possible.
    #[serde(default)]
    pub last_vlan: u16,
}

/// An allocation's identity: a pod may have several sandboxes one after the other, each with its own container id.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PodKey {
    /// The pod's uid.
    pub uid: String,
    /// The container (sandbox) id.
    pub container_id: String,
}

impl fmt::Display for PodKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pod {} (container {})", self.uid, self.container_id)
    }
}

/// The pod that an interface belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The allocation's identity.
    #[serde(flatten)]
    pub key: PodKey,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The network namespace's path on the node, for the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<String>,
    /// The interface's name in the pod.
    pub interface: String,
    /// Tells this claim from earlier and later ones of the same interface, pod or address: it grows with every claim.
    pub generation: u64,
    /// The revision of the security groups when the pod got its list of them.
    #[serde(default)]
    pub security_groups_revision: u64,
}

/// Where an interface is in its life.
///
/// An *intent* state is written before the VPC is called and says what the call is; after a crash the call is made again. Everything else
/// is at rest.
///
/// | state | VPC call | event: next state |
/// |---|---|---|
/// | creating (intent) | create | done, sub-ENI: bound if claimed, detaching if static and no longer claimed, else idle; done, ENI: attaching; refused: gone; unusable: deleting |
/// | attaching (intent) | attach | done: bound if claimed, detaching if static and no longer claimed, else idle; refused: unbound if static, else deleting |
/// | idle | | claim: bound; discard: deleting (an ENI: detaching); missing: gone. Before `available_at` it is *cooling* and can do none of this |
/// | bound | | release: idle, cooling (static: detaching); missing: lost |
/// | detaching (intent) | detach | done: unbound if static, else deleting |
/// | unbound | | claim: attaching; discard: deleting; missing: gone |
/// | deleting (intent) | delete | done: gone |
/// | lost | | release: gone. The pod has it, the VPC does not: not programmed |
///
/// Beside its state an interface may have another intent: [`Interface::regroup`]. Its call is made while the state is idle, bound or
/// unbound, and leads to no other state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the table above")]
pub enum State {
    Creating,
    Attaching,
    Idle,
    Bound,
    Detaching,
    Unbound,
    Deleting,
    Lost,
}

/// What happens to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The call of the intent took effect.
    Done,
    /// The call of the intent was refused for good.
    Refused,
    /// The call took effect, but what it made cannot be used.
    Unusable,
    /// A pod takes it.
    Claim,
    /// Its pod gives it back.
    Release,
    /// It is not wanted any more.
    Discard,
    /// The VPC does not have it.
    Missing,
}

/// Where an interface goes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// To this state.
    To(State),
    /// Its record is removed.
    Gone,
}

impl State {
    /// Whether a VPC call belongs to the state.
    pub fn is_intent(self) -> bool {
        matches!(self, Self::Creating | Self::Attaching | Self::Detaching | Self::Deleting)
    }

    /// Whether the call of [`Interface::regroup`] can be made.
    fn is_at_rest(self) -> bool {
        matches!(self, Self::Idle | Self::Bound | Self::Unbound)
    }
}

/// The interface in the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Our id. The VPC's name of the interface, so that each can be found from the other.
    pub id: String,
    /// The state.
    pub state: State,
    /// The node it is on, was last on, or is going to.
    pub node: String,
    /// What kind.
    pub kind: Kind,
    /// The subnet's id.
    pub subnet: String,
    /// The client token of the creation.
    pub token: String,
    /// The VPC's id, once created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vpc_id: Option<String>,
    /// What it is attached to or going to be: the parent ENI of a sub-ENI, the instance of a whole ENI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// The VLAN id on the parent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<VlanId>,
    /// The MAC address, once created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// The addresses: those asked for before the creation, those given after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<Addresses>,
    /// Whether it carries IPv6 too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dual_stack: bool,
    /// Its security groups.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub security_groups: Vec<String>,
    /// An intent: the VPC is being told these security groups. Until it has them, nobody else can judge by either list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regroup: Option<Vec<String>>,
    /// While idle: not before this time. Later than now is *cooling*.
    #[serde(default)]
    pub available_at: Instant,
    /// The pod that has it or waits for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<Claim>,
    /// The `namespace/name` whose static address it carries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub static_for: Option<String>,
    /// Which allocator makes the intent's call.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub by: String,
    /// Since when it is in this state.
    pub since: Instant,
}

/// An event in a state that does not know it: a mistake in the allocator, nothing is changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("interface {id}: {event:?} does not go with the state {state:?}")]
pub struct WrongStep {
    /// The interface's id.
    pub id: String,
    /// Its state.
    pub state: State,
    /// What was to happen.
    pub event: Event,
}

impl Interface {
    /// Whether a VPC call is to be made for it.
    pub fn is_intent(&self) -> bool {
        self.state.is_intent() || self.regroup.is_some() && self.state.is_at_rest()
    }

    /// The table at [`State`].
    pub fn next(&self, event: Event) -> Result<Next, WrongStep> {
        let is_static = self.static_for.is_some();
        let arrived = if self.claim.is_some() {
            State::Bound
        } else if is_static {
            State::Detaching
        } else {
            State::Idle
        };
        let next = match (self.state, event) {
            (State::Creating, Event::Done) if self.kind == Kind::Eni => State::Attaching,
            (State::Creating | State::Attaching, Event::Done) => arrived,
            (State::Creating, Event::Refused) => return Ok(Next::Gone),
            (State::Creating, Event::Unusable) => State::Deleting,
            (State::Attaching, Event::Refused) if is_static => State::Unbound,
            (State::Attaching, Event::Refused) => State::Deleting,
            (State::Idle, Event::Claim) => State::Bound,
            (State::Idle, Event::Discard) if self.kind == Kind::Eni => State::Detaching,
            (State::Idle | State::Unbound, Event::Discard) => State::Deleting,
            (State::Idle | State::Unbound, Event::Missing) => return Ok(Next::Gone),
            (State::Bound, Event::Release) if is_static => State::Detaching,
            (State::Bound, Event::Release) => State::Idle,
            (State::Bound, Event::Missing) => State::Lost,
            (State::Detaching, Event::Done) if is_static => State::Unbound,
            (State::Detaching, Event::Done) => State::Deleting,
            (State::Unbound, Event::Claim) => State::Attaching,
            (State::Deleting, Event::Done) => return Ok(Next::Gone),
            (State::Lost, Event::Release) => return Ok(Next::Gone),
            (state, event) => return Err(WrongStep { id: self.id.clone(), state, event }),
        };
        Ok(Next::To(next))
    }

    /// Whether it waits for its time after a release.
    pub fn is_cooling(&self, now: Instant) -> bool {
        self.state == State::Idle && self.available_at > now
    }

    /// Whether it takes up room on its node.
    pub fn is_on_node(&self) -> bool {
        self.state != State::Unbound
    }
}

/// The address kept for a pod name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StaticAddress {
    /// The interface that carries it.
    pub interface: String,
    /// How long it is kept after the pod is gone; zero is for ever.
    pub retention: Duration,
    /// When the pod released it; none while a pod has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub released: Option<Instant>,
}

/// Which side knows something that the other does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeakKind {
    /// The VPC has an interface of ours that we do not know.
    Unowned,
    /// We have a record of an interface that the VPC does not have.
    Missing,
}

/// Sightings of a leak.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leak {
    /// The VPC's id of the interface.
    pub vpc_id: String,
    /// Which side knows it.
    pub kind: LeakKind,
    /// Our id, if we have a record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// Its addresses, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<Addresses>,
    /// When it was first seen.
    pub first_seen: Instant,
    /// When it was last seen.
    pub last_seen: Instant,
    /// How often it was seen, at least half a scan interval apart.
    pub sightings: u32,
    /// Whether an operator has allowed its collection although there are very many.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub confirmed: bool,
}

/// The keys of the store.
pub mod keys {
    use super::PodKey;

    /// The store's id.
    pub const STORE: &str = "store";

    /// All subnets.
    pub const SUBNETS: &str = "subnets";

    /// All security groups and address groups.
    pub const SECURITY_GROUPS: &str = "security-groups";

    /// A node's settings.
    pub fn node(name: &str) -> String {
        format!("node/{name}")
    }

    /// A node's pool.
    pub fn pool(node: &str) -> String {
        format!("pool/{node}")
    }

    /// An interface.
    pub fn interface(id: &str) -> String {
        format!("interface/{id}")
    }

    /// An allocation.
    pub fn pod(key: &PodKey) -> String {
        format!("pod/{}/{}", key.uid, key.container_id)
    }

    /// A static address, by `namespace/name`.
    pub fn static_address(pod: &str) -> String {
        format!("static/{pod}")
    }

    /// A VLAN that must rest.
    pub fn vlan(parent: &str, vlan: crate::net::VlanId) -> String {
        format!("vlan/{parent}/{vlan}")
    }

    /// A leak, by the VPC's id.
    pub fn leak(vpc_id: &str) -> String {
        format!("leak/{vpc_id}")
    }
}

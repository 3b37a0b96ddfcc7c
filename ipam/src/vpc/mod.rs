//! The VPC's own API, as far as the allocator needs it.
//!
//! Shaped after the public APIs for sub-network interfaces: a sub-ENI is created on a parent ENI with a VLAN id that is
//! unique there; an ENI is created on its own and attached to an instance. The VPC gives the MAC address. Every call
//! may fail in ways that leave open whether it took effect ([`VpcError::outcome_unknown`]); creation therefore
//! carries a client token: the same token never creates a second interface.

mod memory;

use std::net::{Ipv4Addr, Ipv6Addr};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::net::{Addresses, Mac, VlanId};
pub use memory::{Fault, Faults, Injected, MemoryVpc, Operation, Rewire, Violations};

/// What kind of network interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A VLAN-tagged child of a parent ENI.
    SubEni,
    /// A whole network interface of an instance.
    Eni,
}

/// Where an interface is attached.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attachment {
    /// A sub-ENI on a parent ENI.
    Parent {
        /// The parent ENI's id.
        id: String,
        /// The VLAN id, unique on the parent.
        vlan: VlanId,
    },
    /// An ENI in an instance.
    Instance {
        /// The instance's id.
        id: String,
    },
}

/// Which IPv6 address is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WantIpv6 {
    /// None.
    No,
    /// Any of the subnet.
    Any,
    /// This one.
    Exactly(Ipv6Addr),
}

/// The creation of an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateInterface {
    /// The client token: a repeated call with it returns the interface that the first one created.
    pub token: String,
    /// A name for people and for finding our own again; the allocator puts its interface id here.
    pub name: String,
    /// Who manages the interface, as a tag: interfaces of others are never touched.
    pub owner: String,
    /// A sub-ENI is created on its parent. An ENI is created unattached: none.
    pub parent: Option<(String, VlanId)>,
    /// The subnet's id.
    pub subnet: String,
    /// The IPv4 address wanted; any of the subnet by default.
    pub ipv4: Option<Ipv4Addr>,
    /// The IPv6 address wanted.
    pub ipv6: WantIpv6,
    /// The security groups' ids; the VPC's default group when empty.
    pub security_groups: Vec<String>,
}

/// An interface as the VPC knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VpcInterface {
    /// The VPC's id, never used again for another interface.
    pub id: String,
    /// What kind.
    pub kind: Kind,
    /// The name given at creation.
    pub name: String,
    /// The owner given at creation.
    pub owner: String,
    /// Where it is attached.
    pub attachment: Option<Attachment>,
    /// The subnet's id.
    pub subnet: String,
    /// The MAC address.
    pub mac: Mac,
    /// The addresses.
    pub addresses: Addresses,
    /// The security groups' ids.
    pub security_groups: Vec<String>,
}

/// One page of a list.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Page {
    /// The interfaces.
    pub interfaces: Vec<VpcInterface>,
    /// What to ask the next page with; none after the last one.
    pub next: Option<String>,
}

/// How full a subnet is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubnetUsage {
    /// The subnet's id.
    pub id: String,
    /// IPv4 addresses that can still be given out.
    pub available: u64,
    /// All IPv4 addresses that interfaces can have.
    pub total: u64,
}

/// Why the VPC did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum VpcError {
    /// A quota is used up.
    #[error("the VPC's quota is used up: {what}; raise the quota or lower the pool's minimum")]
    QuotaExceeded {
        /// Which quota, with its limit.
        what: String,
    },
    /// The subnet has no address left.
    #[error("subnet {subnet} has no free address; add a subnet")]
    SubnetExhausted {
        /// The subnet's id.
        subnet: String,
    },
    /// Something named in the call is not there.
    #[error("the VPC does not know {what}")]
    NotFound {
        /// What is not there.
        what: String,
    },
    /// The VLAN id is taken on this parent.
    #[error("VLAN {vlan} is already used on parent {parent}")]
    VlanTaken {
        /// The parent ENI's id.
        parent: String,
        /// The VLAN id.
        vlan: VlanId,
    },
    /// An address asked for is taken.
    #[error("address {address} is already used by {by}")]
    AddressTaken {
        /// The address.
        address: String,
        /// What uses it.
        by: String,
    },
    /// The state of the thing does not allow it.
    #[error("the VPC refuses: {what}")]
    Conflict {
        /// Why.
        what: String,
    },
    /// The call can never succeed like this.
    #[error("the VPC does not accept the call: {what}")]
    Invalid {
        /// What is wrong with it.
        what: String,
    },
    /// Too many calls. Nothing was done.
    #[error("the VPC asks for fewer calls")]
    Throttled,
    /// No answer in time, or it got lost: the call may or may not have taken effect.
    #[error("the VPC did not answer; the call may or may not have taken effect")]
    TimedOut,
    /// The VPC's own failure: the call may or may not have taken effect.
    #[error("the VPC failed: {what}")]
    Failed {
        /// What it said.
        what: String,
    },
}

impl VpcError {
    /// Whether the call may have taken effect all the same.
    pub fn outcome_unknown(&self) -> bool {
        matches!(self, Self::TimedOut | Self::Failed { .. })
    }

    /// Whether the same call may succeed later.
    pub fn is_transient(&self) -> bool {
        self.outcome_unknown() || matches!(self, Self::Throttled)
    }
}

/// The VPC. Calls may be repeated: creation by its token; attaching what is attached there already, detaching what is not attached and
/// deleting what is not there succeed or say [`VpcError::NotFound`].
#[async_trait]
pub trait Vpc: Send + Sync + 'static {
    /// Creates a sub-ENI on its parent, or an unattached ENI.
    async fn create(&self, request: CreateInterface) -> Result<VpcInterface, VpcError>;

    /// Deletes an interface. A sub-ENI may be attached, an ENI may not.
    async fn delete(&self, id: &str) -> Result<(), VpcError>;

    /// Attaches an unattached interface.
    async fn attach(&self, id: &str, to: Attachment) -> Result<VpcInterface, VpcError>;

    /// Detaches an interface; it keeps its addresses and its MAC.
    async fn detach(&self, id: &str) -> Result<(), VpcError>;

    /// Gives an interface other security groups: these, in their order, in place of those it has. When this returns, the VPC judges
    /// by them.
    async fn set_security_groups(&self, id: &str, groups: &[String]) -> Result<(), VpcError>;

    /// The interfaces with this owner, page by page.
    async fn list(&self, owner: &str, page: Option<String>) -> Result<Page, VpcError>;

    /// How full the subnets are; those it does not know are left out.
    async fn usage(&self, subnets: &[String]) -> Result<Vec<SubnetUsage>, VpcError>;
}

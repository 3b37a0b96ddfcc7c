//! Security groups, address groups, and who is a member. Values are valid by construction; what comes from outside is
//! parsed by [`serde`] from the JSON form that docs/security-groups.md describes.

mod form;
mod ports;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    str::FromStr,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use ports::{PortRange, Ports};

/// Groups that one pod may have.
pub const MAX_GROUPS_OF_A_POD: usize = 5;
/// Characters that an id may have.
const MAX_ID: usize = 64;

/// Why a value is no part of the model.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Invalid {
    /// An id of a group.
    #[error(
        "{0:?} is no id of a group: 1 to {MAX_ID} of the characters A-Z, a-z, 0-9, dot, dash and underscore"
    )]
    Id(String),
    /// A priority.
    #[error("priority {0}: it is 1 (decides first) to 100")]
    Priority(u64),
    /// A protocol.
    #[error("protocol {0:?}: it is any, tcp, udp, icmp, icmpv6, gre or a number from 0 to 255")]
    Protocol(String),
    /// Ports that are not well-formed.
    #[error(
        "ports {0:?}: they are numbers and ranges from 1 to 65535 with commas between, such as 80,443,8000-8100"
    )]
    Ports(String),
    /// Ports for a protocol without ports.
    #[error("ports with protocol {0}: only tcp and udp have ports")]
    PortsWithout(String),
    /// ICMP type or code for another protocol.
    #[error("icmp_type and icmp_code with protocol {0}: only icmp and icmpv6 have them")]
    IcmpWithout(String),
    /// A code without a type.
    #[error("icmp_code {0} without icmp_type: a code means something only with its type")]
    CodeWithoutType(u8),
    /// More than one remote.
    #[error("a rule has one remote: cidr, group or address_group")]
    Remotes,
    /// An address or prefix.
    #[error("{0:?} is neither an address nor a prefix such as 10.0.0.0/8 or 2001:db8::/32")]
    Prefix(String),
    /// Something twice.
    #[error("{what} {id} is there twice")]
    Twice {
        /// What.
        what: &'static str,
        /// Which.
        id: String,
    },
    /// More groups than a pod may have.
    #[error("{0} security groups: a pod has at most {MAX_GROUPS_OF_A_POD}")]
    TooManyGroups(usize),
    /// In a rule of a group.
    #[error("security group {group}, rule {rule}: {source}")]
    InRule {
        /// The group.
        group: String,
        /// The rule's place, from 1.
        rule: usize,
        /// What is wrong.
        source: Box<Invalid>,
    },
}

/// The id of a security group or an address group.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GroupId(String);

impl GroupId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for GroupId {
    type Error = Invalid;

    fn try_from(id: String) -> Result<Self, Invalid> {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if id.is_empty() || id.len() > MAX_ID || !id.chars().all(fits) {
            return Err(Invalid::Id(id));
        }
        Ok(Self(id))
    }
}

impl FromStr for GroupId {
    type Err = Invalid;

    fn from_str(id: &str) -> Result<Self, Invalid> {
        id.to_owned().try_into()
    }
}

impl From<GroupId> for String {
    fn from(id: GroupId) -> Self {
        id.0
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Seen from the pod that has the rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// To the pod.
    Ingress,
    /// From the pod.
    Egress,
}

/// What a rule does with what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Decides before [`Action::Allow`] at equal priority.
    Deny,
    /// Lets pass.
    Allow,
}

/// A rule's place within its group: 1 decides first, 100 last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Priority(u8);

impl Priority {
    /// What a rule has that names none: it decides first.
    pub const FIRST: Self = Self(1);
    /// The last.
    pub const LAST: Self = Self(100);

    /// The number.
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u64> for Priority {
    type Error = Invalid;

    fn try_from(number: u64) -> Result<Self, Invalid> {
        match u8::try_from(number) {
            Ok(number @ 1..=100) => Ok(Self(number)),
            _ => Err(Invalid::Priority(number)),
        }
    }
}

/// Which ICMP messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IcmpMatch {
    /// All.
    Any,
    /// All of a type.
    Type(u8),
    /// Of a type and code.
    Code(u8, u8),
}

/// The traffic a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// All of it.
    Any,
    /// TCP to these destination ports.
    Tcp(Ports),
    /// UDP to these destination ports.
    Udp(Ports),
    /// ICMP (protocol 1).
    Icmp(IcmpMatch),
    /// ICMP for IPv6 (protocol 58).
    Icmpv6(IcmpMatch),
    /// All of another protocol, by number (GRE is 47); never 1, 6, 17 or 58.
    Number(u8),
}

impl Protocol {
    /// Protocol number of ICMP.
    pub const ICMP: u8 = 1;
    /// Protocol number of TCP.
    pub const TCP: u8 = 6;
    /// Protocol number of UDP.
    pub const UDP: u8 = 17;
    /// Protocol number of GRE.
    pub const GRE: u8 = 47;
    /// Protocol number of ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
}

/// Whom a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Remote {
    /// Everybody, IPv4 and IPv6.
    Any,
    /// The addresses of a prefix.
    Cidr(IpNet),
    /// The pods that have this security group.
    Group(GroupId),
    /// The addresses of an address group.
    AddressGroup(GroupId),
}

/// A rule of a security group.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "form::Rule", into = "form::Rule")]
pub struct Rule {
    /// Which direction.
    pub direction: Direction,
    /// What it does.
    pub action: Action,
    /// When it decides.
    pub priority: Priority,
    /// Which traffic.
    pub protocol: Protocol,
    /// With whom.
    pub remote: Remote,
}

/// A security group.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecurityGroup {
    /// Its id.
    pub id: GroupId,
    /// Its rules; what counts is their priority, not their place.
    #[serde(default)]
    pub rules: Vec<Rule>,
}

/// A named set of addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "form::AddressGroup", into = "form::AddressGroup")]
pub struct AddressGroup {
    /// Its id.
    pub id: GroupId,
    /// The prefixes that make it up, host bits zero; single addresses are /32 or /128.
    pub addresses: BTreeSet<IpNet>,
}

impl AddressGroup {
    /// Whether the address is in the group.
    pub fn holds(&self, address: IpAddr) -> bool {
        self.addresses.iter().any(|prefix| prefix.contains(&address))
    }
}

/// All groups at one revision.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "form::Groups", into = "form::Groups")]
pub struct Groups {
    /// Counts the changes of groups, rules and address groups; a source never goes back.
    pub revision: u64,
    /// The security groups.
    pub security_groups: BTreeMap<GroupId, SecurityGroup>,
    /// The address groups.
    pub address_groups: BTreeMap<GroupId, AddressGroup>,
}

impl Groups {
    /// All of these.
    ///
    /// # Errors
    ///
    /// When an id is there twice.
    pub fn new(
        revision: u64,
        security_groups: Vec<SecurityGroup>,
        address_groups: Vec<AddressGroup>,
    ) -> Result<Self, Invalid> {
        let mut groups = Self { revision, ..Self::default() };
        for group in security_groups {
            let id = group.id.clone();
            if groups.security_groups.insert(id.clone(), group).is_some() {
                return Err(Invalid::Twice { what: "security group", id: id.into() });
            }
        }
        for group in address_groups {
            let id = group.id.clone();
            if groups.address_groups.insert(id.clone(), group).is_some() {
                return Err(Invalid::Twice { what: "address group", id: id.into() });
            }
        }
        Ok(groups)
    }
}

/// The security groups of a pod in their order: at most [`MAX_GROUPS_OF_A_POD`], none twice.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<GroupId>", into = "Vec<GroupId>")]
pub struct GroupList(Vec<GroupId>);

impl GroupList {
    /// The groups, the one that decides first in front.
    pub fn as_slice(&self) -> &[GroupId] {
        &self.0
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl TryFrom<Vec<GroupId>> for GroupList {
    type Error = Invalid;

    fn try_from(groups: Vec<GroupId>) -> Result<Self, Invalid> {
        if groups.len() > MAX_GROUPS_OF_A_POD {
            return Err(Invalid::TooManyGroups(groups.len()));
        }
        for (place, id) in groups.iter().enumerate() {
            if groups[..place].contains(id) {
                return Err(Invalid::Twice { what: "security group", id: id.to_string() });
            }
        }
        Ok(Self(groups))
    }
}

impl From<GroupList> for Vec<GroupId> {
    fn from(list: GroupList) -> Self {
        list.0
    }
}

/// What judging by groups needs to know of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Membership {
    /// The pod's groups. None: not decidable.
    pub groups: GroupList,
    /// The oldest [`Groups::revision`] that the pod may be judged by: the one at which it got these groups. 0 = any.
    #[serde(default)]
    pub revision: u64,
}

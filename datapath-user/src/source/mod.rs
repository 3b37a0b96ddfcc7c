//! What should be: the allocator's word as a checked value, whatever brought it.

pub mod allocator;
pub mod file;

use std::{
    collections::BTreeMap,
    hash::{Hash, Hasher},
    net::{Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use datapath_common::abi::Endpoint;
use eniway_policy::model::{Groups, Membership};
use ipnet::Ipv4Net;

use crate::{
    attachment::{Attachment, Extras},
    bandwidth::Bandwidth,
    config::FastPath,
    fnv::Fnv,
    net::{InterfaceName, Mac, VlanId},
};

/// All pods of the node at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The source's number for this state; informative.
    pub revision: u64,
    /// Virtual addresses of load balancers.
    pub vips: Vec<Vip>,
    /// Security groups and address groups.
    pub groups: Groups,
    /// The pods.
    pub pods: Vec<Pod>,
}

/// A virtual address of a load balancer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Vip {
    /// The address.
    pub ip: Ipv4Addr,
    /// The port.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
}

/// What the allocator wants of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// It shall have its network.
    Active,
    /// It is going away: treated as if it were not listed.
    Releasing,
}

/// A pod and its sub-ENI.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pod {
    /// Kubernetes' uid.
    pub uid: String,
    /// Kubernetes' namespace.
    pub namespace: String,
    /// Kubernetes' name.
    pub name: String,
    /// The runtime's id of the sandbox; empty while the pod waits for the runtime to bring one.
    pub container_id: String,
    /// The pod's network namespace, if the agent shall wire the pod.
    pub netns: Option<PathBuf>,
    /// Its interface, inside.
    pub interface: InterfaceName,
    /// Its interface on the host's side, if somebody else wired the pod.
    pub host_interface: Option<InterfaceName>,
    /// What the allocator wants.
    pub state: State,
    /// The allocator's generation of the allocation.
    pub generation: u32,
    /// Interface of the parent ENI; none = the pod has an ENI of its own.
    pub parent: Option<InterfaceName>,
    /// VLAN id on the parent; none yet = the pod is listed, and not programmed.
    pub vlan: Option<VlanId>,
    /// MAC of the sub-ENI.
    pub mac: Mac,
    /// MAC on the wire.
    pub wire_mac: Mac,
    /// IPv4 address.
    pub ipv4: Ipv4Addr,
    /// IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// The subnet.
    pub subnet: Ipv4Net,
    /// Its gateway.
    pub gateway: Ipv4Addr,
    /// The gateway's MAC.
    pub gateway_mac: Mac,
    /// The IPv6 gateway.
    pub gateway_ipv6: Option<Ipv6Addr>,
    /// IP MTU of the pod's interface.
    pub mtu: u16,
    /// Its security groups.
    pub membership: Membership,
    /// What holds for it in place of the node's setting.
    pub fast_path: Option<FastPath>,
    /// Limits of its bandwidth.
    pub bandwidth: Bandwidth,
    /// What the runtime wants besides.
    pub extras: Extras,
}

impl Pod {
    /// Who owns the record: the same for the same container of the same pod, at all times. Never 0.
    pub fn owner(&self) -> u64 {
        owner_of(&self.uid, &self.container_id)
    }

    /// Whether it makes sense on a node with these parents; else which field does not, and why.
    pub fn check(&self, parents: &[impl AsRef<str>]) -> Result<(), (&'static str, String)> {
        let problem = |field, what| Err((field, what));
        for (field, value) in [
            ("uid", &self.uid),
            ("namespace", &self.namespace),
            ("name", &self.name),
            ("container_id", &self.container_id),
        ] {
            let may_be_empty = field == "container_id" && self.is_waiting();
            if value.is_empty() && !may_be_empty || value.contains('\0') {
                return problem(field, "must not be empty, nor hold a zero byte".to_owned());
            }
        }
        if let Some(netns) = self.netns.as_deref().filter(|netns| !netns.is_absolute()) {
            return problem("netns", format!("`{}` is not an absolute path", netns.display()));
        }
        if self.is_wanted() && self.netns.is_none() && self.host_interface.is_none() {
            return problem(
                "netns",
                "neither `netns` nor `host_interface` is given: one must say where the pod is".to_owned(),
            );
        }
        if let Some(own) = &self.parent
            && !parents.iter().any(|parent| parent.as_ref() == own.as_str())
        {
            let known: Vec<&str> = parents.iter().map(AsRef::as_ref).collect();
            return problem(
                "parent",
                format!("`{}` is not a [[parent]] of the configuration, which has {}", own, known.join(", ")),
            );
        }
        let usable = |address: Ipv4Addr| {
            !(address.is_unspecified()
                || address.is_multicast()
                || address.is_broadcast()
                || address.is_loopback())
        };
        for (field, address) in [("ipv4", self.ipv4), ("gateway", self.gateway)] {
            if !usable(address) {
                return problem(field, format!("{address} cannot be an interface's address"));
            }
            if !self.subnet.contains(&address) {
                return problem(field, format!("{address} is not in the subnet {}", self.subnet));
            }
        }
        if self.ipv4 == self.gateway {
            return problem("ipv4", format!("{} is the gateway's address", self.ipv4));
        }
        if let Some(address) = self.ipv6.filter(|address| address.is_unspecified() || address.is_multicast())
        {
            return problem("ipv6", format!("{address} cannot be an interface's address"));
        }
        // RFC 791: every link carries 68 bytes, and hosts accept 576; less than that breaks things that need not be
        // found out the hard way.
        if self.mtu < 576 {
            return problem("mtu", format!("{} is less than 576", self.mtu));
        }
        Ok(())
    }

    /// Whether it shall be in the tables.
    pub fn is_wanted(&self) -> bool {
        self.state == State::Active && (self.vlan.is_some() || self.is_exclusive()) && !self.is_waiting()
    }

    /// Whether it has an ENI of its own, which is moved into it.
    pub fn is_exclusive(&self) -> bool {
        self.parent.is_none()
    }

    /// Whether the runtime has yet to bring its sandbox.
    pub fn is_waiting(&self) -> bool {
        self.container_id.is_empty() && self.netns.is_none() && self.host_interface.is_none()
    }

    /// Takes in what the runtime asked for. It can lower the MTU, not raise it: the subnet's is the most that works. Its limits of
    /// bandwidth hold before those of the source.
    pub fn attach(&mut self, attachment: &Attachment) {
        self.bandwidth = attachment.bandwidth.or(self.bandwidth);
        self.extras = attachment.extras.clone();
        self.mtu = attachment.mtu.map_or(self.mtu, |mtu| mtu.min(self.mtu));
    }

    /// As users call it.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Its record, without what wiring, tables and security groups fill in.
    pub fn record(&self, parent: u16, parent_ifindex: u32) -> Endpoint {
        Endpoint {
            #[cfg(feature = "next-abi")]
            spare: 0,
            owner: self.owner(),
            id: 0,
            generation: self.generation,
            ifindex: 0,
            parent_ifindex,
            policy_id: 0,
            flags: self.bandwidth.flag(),
            ipv4: self.ipv4.octets(),
            gateway_ipv4: self.gateway.octets(),
            ipv6: self.ipv6.map_or([0; 16], |address| address.octets()),
            gateway_ipv6: self.gateway_ipv6.map_or([0; 16], |address| address.octets()),
            mac: self.mac.0,
            wire_mac: self.wire_mac.0,
            gateway_mac: self.gateway_mac.0,
            vid: self.vlan.map_or(0, VlanId::get),
            mtu: self.mtu,
            parent,
        }
    }
}

/// Who owns a record, by the pod's uid and its container's id.
pub fn owner_of(uid: &str, container_id: &str) -> u64 {
    let mut hash = Fnv::default();
    hash.write(uid.as_bytes());
    // No uid or container id has a zero byte.
    hash.write(&[0]);
    hash.write(container_id.as_bytes());
    hash.finish().max(1)
}

/// The VLAN id that a number of an allocator says. Allocators write 0 or -1 for a sub-ENI that is not attached.
///
/// # Errors
///
/// When it is above the highest VLAN id.
pub fn vlan_id(id: i64) -> Result<Option<VlanId>, String> {
    if id <= 0 {
        return Ok(None);
    }
    let vlan = u16::try_from(id).ok().and_then(VlanId::new);
    vlan.map(Some).ok_or_else(|| format!("{id} is not a VLAN id (1-4094)"))
}

/// What shall be on the node: snapshot and changes taken together.
#[derive(Clone, Debug, Default)]
pub struct Desired {
    /// The source's number for this state.
    pub revision: u64,
    /// Virtual addresses of load balancers.
    pub vips: Vec<Vip>,
    /// Security groups and address groups.
    pub groups: Groups,
    /// The pods by owner, with their place in the order in which they came.
    pods: BTreeMap<u64, (u64, Pod)>,
    /// What cannot be used, by owner. What such a pod has stays as it is.
    pub refused: BTreeMap<u64, Refused>,
    next: u64,
}

/// A pod of which the source says what cannot be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Refused {
    /// Kubernetes' uid.
    pub uid: String,
    /// The runtime's id of the sandbox.
    pub container_id: String,
    /// As users call it.
    pub name: String,
    /// What cannot be.
    pub reason: String,
}

impl From<Snapshot> for Desired {
    fn from(snapshot: Snapshot) -> Self {
        let mut desired = Self {
            revision: snapshot.revision,
            vips: snapshot.vips,
            groups: snapshot.groups,
            ..Self::default()
        };
        for pod in snapshot.pods {
            desired.put(pod);
        }
        desired
    }
}

impl Desired {
    /// All pods, by owner.
    pub fn pods(&self) -> impl Iterator<Item = (u64, &Pod)> {
        self.pods.iter().map(|(owner, (_, pod))| (*owner, pod))
    }

    /// The pod of an owner.
    pub fn pod(&self, owner: u64) -> Option<&Pod> {
        self.pods.get(&owner).map(|(_, pod)| pod)
    }

    /// Where a pod stands in the order in which they came.
    pub fn place(&self, owner: u64) -> u64 {
        self.pods.get(&owner).map_or(u64::MAX, |(place, _)| *place)
    }

    /// Adds a pod or changes it.
    pub fn put(&mut self, pod: Pod) {
        let owner = pod.owner();
        self.refused.remove(&owner);
        let place = self.pods.get(&owner).map_or(self.next, |(place, _)| *place);
        self.next += 1;
        self.pods.insert(owner, (place, pod));
    }

    /// Changes pods, but for what makes their owners.
    pub fn adjust(&mut self, mut change: impl FnMut(&mut Pod)) {
        self.pods.values_mut().for_each(|(_, pod)| change(pod));
    }

    /// Says of a pod that it cannot be as the source wants it.
    pub fn refuse(&mut self, owner: u64, refused: Refused) {
        self.pods.remove(&owner);
        self.refused.insert(owner, refused);
    }

    /// Removes a pod.
    pub fn remove(&mut self, owner: u64) {
        self.pods.remove(&owner);
        self.refused.remove(&owner);
    }

    /// A number for what is said, apart from its revision.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = Fnv::default();
        self.vips.hash(&mut hash);
        self.groups.hash(&mut hash);
        self.pods().for_each(|(_, pod)| pod.hash(&mut hash));
        self.refused.hash(&mut hash);
        hash.finish()
    }
}

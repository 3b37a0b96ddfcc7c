//! The VPC with its API: what an allocator creates, attaches, detaches and deletes through it, the fabric carries, or knows
//! no more, when the call returns.
//!
//! The bookkeeping (unique VLAN ids, addresses, limits, client tokens, owners) is that of [`MemoryVpc`]; behind it stand
//! the fabric's tables instead of nothing.

use std::{collections::HashMap, net::Ipv4Addr, sync::Arc};

use eniway_ipam::{
    SystemClock,
    vpc::{Attachment, MemoryVpc, Rewire, VpcInterface},
};
use ipnet::Ipv4Net;

use super::{
    error::{Error, Result},
    fabric::Fabric,
    spec::{Mac, Subnet},
    topology::Node,
};

/// The id of [`Subnet::PODS`] in the VPC.
pub const PODS_SUBNET: &str = "subnet-pods";
/// How many sub-ENIs a parent ENI can carry.
pub const PARENT_LIMIT: u32 = 256;

/// What the fabric needs to know of an interface: where, and what else the VPC has bound to its address.
struct Switch {
    fabric: Arc<Fabric>,
    /// The fabric's port of each parent ENI.
    ports: HashMap<String, String>,
    /// Elastic IPs, by the address that they are bound to.
    eips: HashMap<Ipv4Addr, Ipv4Addr>,
}

/// The VPC of these nodes, without sub-ENIs yet.
pub(super) fn of(
    fabric: &Arc<Fabric>,
    nodes: &[Node],
    eips: HashMap<Ipv4Addr, Ipv4Addr>,
) -> Result<MemoryVpc> {
    let failed = |error: &dyn std::fmt::Display| Error::Vpc(error.to_string());
    let ports = nodes.iter().map(|node| (node.parent_id(), node.parent_port.clone())).collect();
    let switch = Switch { fabric: Arc::clone(fabric), ports, eips };
    let vpc = MemoryVpc::new(Arc::new(SystemClock), 1)
        .carried_by(move |change| switch.apply(change).map_err(|error| error.to_string()));
    let Subnet { network, prefix, .. } = Subnet::PODS;
    let ipv4 = Ipv4Net::new(network, prefix).map_err(|error| failed(&error))?;
    vpc.add_subnet(PODS_SUBNET, ipv4, None);
    for node in nodes {
        vpc.reserve(PODS_SUBNET, node.parent_ip).map_err(|error| failed(&error))?;
        vpc.add_parent(&node.parent_id(), PARENT_LIMIT as usize);
    }
    Ok(vpc)
}

impl Switch {
    fn apply(&self, change: Rewire<'_>) -> Result<()> {
        match change {
            Rewire::Attach(interface) => self.attach(interface),
            // The fabric's groups are told by the lab (`Lab::set_list`).
            Rewire::Regroup(interface) => {
                Err(Error::Vpc(format!("{}: the fabric takes no security groups", interface.id)))
            }
            Rewire::Detach(interface) => {
                let (port, vlan) = self.place(interface)?;
                self.fabric.detach_nic(port, vlan)
            }
        }
    }

    fn attach(&self, interface: &VpcInterface) -> Result<()> {
        let (port, vlan) = self.place(interface)?;
        let (ip, mac) = (interface.addresses.ipv4, Mac(interface.mac.0));
        // The fabric itself lets the last one win.
        let in_the_way = |nic: &super::fabric::Attached| {
            nic.ip == ip || nic.mac == mac || nic.port == port && nic.vlan == vlan
        };
        if let Some(nic) = self.fabric.attached()?.into_iter().find(in_the_way) {
            return Err(Error::Vpc(format!("{ip} ({mac}) at VLAN {vlan} of {port}: in the way is {nic:?}")));
        }
        let attached = self.fabric.attach_nic(port, vlan, ip, mac, self.eips.get(&ip).copied());
        if attached.is_err() {
            // Half of it may be there; why it failed matters more than whether this fails too.
            let _ = self.fabric.detach_nic(port, vlan);
        }
        attached
    }

    fn place(&self, interface: &VpcInterface) -> Result<(&str, u16)> {
        match &interface.attachment {
            Some(Attachment::Parent { id, vlan }) => {
                let port = self.ports.get(id).ok_or_else(|| Error::Unknown(format!("parent ENI {id}")))?;
                Ok((port, vlan.get()))
            }
            other => Err(Error::Vpc(format!("{}: sub-ENIs only, not {other:?}", interface.id))),
        }
    }
}

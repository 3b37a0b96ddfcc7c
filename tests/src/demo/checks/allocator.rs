//! What the allocator gave is what the VPC, the fabric and the kernel have, and nothing else is there.

use std::{collections::BTreeSet, net::Ipv4Addr, time::Instant};

use eniway_ipam::{
    Allocation,
    vpc::{Operation, Violations, VpcInterface},
};

use super::{Cast, Proof};
use crate::{
    demo::evidence::Result,
    ensure,
    lab::{Error, Lab, fabric::Attached},
};

/// A sub-ENI as somebody has it: port of the fabric, VLAN id, MAC, address.
type SubEni = (String, u16, String, Ipv4Addr);

pub(super) fn allocated_static(c: &Cast<'_>) -> Result<Proof> {
    let start = Instant::now();
    let ipam = c.lab.ipam()?;
    let allocations = ipam.ask(|client| async move { client.list(None).await })?;
    for pod in c.lab.pods() {
        let given = allocations.iter().find(|one| one.namespace == pod.namespace && one.name == pod.name);
        let Some(given) = given else {
            return Err(Error::Unknown(format!("allocation of {}", pod.full_name())).into());
        };
        ensure!(
            given.is_static && given.addresses.ipv4 == pod.ip && given.node == pod.node,
            "{} was given {given:?}",
            pod.full_name()
        );
    }
    let given: BTreeSet<SubEni> =
        allocations.iter().map(|one| of_allocation(c.lab, one)).collect::<Result<_>>()?;
    let interfaces = ipam.vpc().interfaces();
    let vpc: BTreeSet<SubEni> = interfaces.iter().map(|one| of_vpc(c.lab, one)).collect::<Result<_>>()?;
    let attached = c.lab.fabric().attached()?;
    let fabric: BTreeSet<SubEni> = attached.into_iter().filter(|nic| nic.vlan != 0).map(of_fabric).collect();
    let kernel = of_kernel(c.lab)?;
    let latency = start.elapsed();
    ensure!(given.len() == c.lab.pods().len(), "the allocator gave {given:?}");
    for (who, has) in [("the VPC", &vpc), ("the fabric", &fabric), ("the agents' kernel", &kernel)] {
        ensure!(*has == given, "the allocator gave {given:?}, {who} has {has:?}");
    }
    let (created, violations) = (ipam.vpc().calls(Operation::Create), ipam.vpc().violations());
    ensure!(violations == Violations::default(), "the VPC counted {violations:?}");
    Ok(Proof {
        latency,
        detail: format!(
            "{} addresses in {created} calls of the VPC; VPC, fabric and agents have these sub-ENIs and no other",
            given.len()
        ),
    })
}

fn of_allocation(lab: &Lab, one: &Allocation) -> Result<SubEni> {
    let vlan = u16::try_from(one.vlan).map_err(|_| Error::Protocol(format!("VLAN {}", one.vlan)))?;
    Ok((lab.node(&one.node)?.parent_port.clone(), vlan, one.mac.to_string(), one.addresses.ipv4))
}

fn of_vpc(lab: &Lab, one: &VpcInterface) -> Result<SubEni> {
    let Some(eniway_ipam::vpc::Attachment::Parent { id, vlan }) = &one.attachment else {
        return Err(Error::Protocol(format!("{} is attached to {:?}", one.id, one.attachment)).into());
    };
    let node = lab.nodes().iter().find(|node| node.parent_id() == *id);
    let node = node.ok_or_else(|| Error::Unknown(format!("parent ENI {id}")))?;
    Ok((node.parent_port.clone(), vlan.get(), one.mac.to_string(), one.addresses.ipv4))
}

fn of_fabric(nic: Attached) -> SubEni {
    (nic.port, nic.vlan, nic.mac.to_string(), nic.ip)
}

/// What `eniway pods` reads from the maps of all nodes.
fn of_kernel(lab: &Lab) -> Result<BTreeSet<SubEni>> {
    let mut all = BTreeSet::new();
    for node in lab.nodes() {
        let rows = lab.agent(&node.name)?.cli_json(&["pods"])?;
        for row in rows.as_array().into_iter().flatten() {
            let vlan = row["vlan"].as_u64().and_then(|vlan| u16::try_from(vlan).ok());
            let ip = row["ip"].as_str().and_then(|ip| ip.parse().ok());
            let (Some(vlan), Some(mac), Some(ip)) = (vlan, row["mac"].as_str(), ip) else {
                let what = format!("`eniway pods` on {}: a row that makes no sense: {row}", node.name);
                return Err(Error::Protocol(what).into());
            };
            all.insert((node.parent_port.clone(), vlan, mac.to_owned(), ip));
        }
    }
    Ok(all)
}

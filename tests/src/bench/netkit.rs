//! Pods on netkit instead of veth: a pair of devices that runs a BPF program as a pod sends, in the pod's own context, so
//! that nothing waits in a queue of the node. Kernel 6.7 and later; neither iproute2 of Debian 12 nor aya knows it.

use std::{io, os::fd::OwnedFd};

use aya::Ebpf;
use datapath_common::abi::Endpoint;
use datapath_user::{
    config::{FastPath, Limits, Xdp},
    object::{self, Constants, program},
    tables::{Maps, Tables},
};
use rtnetlink::{LinkNetkit, packet_route::link::NetkitMode};

use super::{
    Place, floor, labs, sys,
    system::{HOST_MAC, PODS, Small, System, Way, index, meet},
};
use crate::lab::{Error, GATEWAY_MAC, Mac, Netns, Node, Pod, Result, Subnet};

/// Both of [`floor`]'s paths, on netkit: `bpf_redirect` to a pod's host side, for `bpf_redirect_peer` is for tc ingress only.
pub(super) fn bare() -> Result<System> {
    let small = Small::new("netkit")?;
    let node = small.node.netns();
    for ((name, ip), pod) in PODS.into_iter().zip(&small.pods) {
        pair(node, name, pod.netns(), Mac::of(ip))?;
    }
    let mut held = Vec::new();
    for (at, ((name, ip), pod)) in PODS.into_iter().zip(&small.pods).enumerate() {
        let (peer, peer_ip) = PODS[1 - at];
        held.push(attach_floor(node, name, "floor_to", index(node, peer)?, 0)?);
        meet(pod.netns(), ip, peer_ip)?;
    }
    let lab = labs::lab("bench-netkit").build()?;
    let mut inbound = Vec::new();
    for pod in ["a", "c"].map(|name| lab.pod(name)) {
        let pod = pod?;
        let Node { netns: node, .. } = lab.node_of(pod)?;
        pair(node, "pod", &pod.netns, pod.mac)?;
        labs::address(pod)?;
        held.push(attach_floor(node, "pod", "floor_wire", index(node, "eth1")?, pod.vlan)?);
        inbound.push(floor::attach(node, "eth1", "floor_pod", index(node, "pod")?, 0)?);
    }
    let cross = Way::pair(Place::CrossNode, labs::to_pod(&lab, "c")?);
    let mut system = small.system((held, inbound, lab));
    system.ways.push(cross);
    Ok(system)
}

/// Our programs as they are, between nodes: `pod_egress` as the pod sends, `eni_ingress` on the parent. The tables are written
/// here, for agents make veth pairs; on one node `pod_egress` cannot be used so, for it ends with `bpf_redirect_peer`.
pub(super) fn eniway() -> Result<System> {
    let lab = labs::lab("netkit-eniway").build()?;
    let mut held = Vec::new();
    for pod in ["a", "c"].map(|name| lab.pod(name)) {
        let pod = pod?;
        let Node { netns: node, .. } = lab.node_of(pod)?;
        pair(node, "pod", &pod.netns, pod.mac)?;
        labs::address(pod)?;
        held.push(programs(node, pod)?);
    }
    let cross = Way::pair(Place::CrossNode, labs::to_pod(&lab, "c")?);
    Ok(System { ways: vec![cross], hold: Box::new((held, lab)) })
}

fn programs(node: &Netns, pod: &Pod) -> Result<(Ebpf, OwnedFd)> {
    let failed = |what: &str, error: &dyn std::error::Error| Error::Topology(format!("{what}: {error}"));
    let constants = Constants { fast_path: FastPath::SecurityGroups, parent: 0, xdp: Xdp::Off };
    let mut ebpf =
        object::open(constants, &Limits::default(), None).map_err(|e| failed("the programs", &e))?;
    let maps = Maps::of(&ebpf).map_err(|e| failed("the tables", &e))?;
    let record = Endpoint {
        owner: 1,
        generation: 1,
        ifindex: index(node, "pod")?,
        parent_ifindex: index(node, "eth1")?,
        ipv4: pod.ip.octets(),
        gateway_ipv4: Subnet::PODS.gateway.octets(),
        mac: pod.mac.0,
        wire_mac: pod.mac.0,
        gateway_mac: GATEWAY_MAC.0,
        vid: pod.vlan,
        mtu: 1500,
        ..Endpoint::ZERO
    };
    Tables::new(maps).and_then(|mut tables| tables.put(&record)).map_err(|e| failed("the tables", &e))?;
    let egress = object::tc(&mut ebpf, program::POD_EGRESS).map_err(|e| failed("pod_egress", &e))?;
    let fd = egress.fd().map_err(|e| failed("pod_egress", &e))?;
    let link = node
        .run(|| sys::attach_to_netkit_peer(fd, record.ifindex))?
        .map_err(Error::io(format!("pod_egress at netkit pod of {node}")))?;
    floor::attach_at(&mut ebpf, node, "eth1", program::ENI_INGRESS)?;
    Ok((ebpf, link))
}

fn attach_floor(
    node: &Netns,
    name: &str,
    program: &'static str,
    target: u32,
    vid: u16,
) -> Result<(Ebpf, OwnedFd)> {
    let ebpf = floor::load(program, target, vid)?;
    let ifindex = index(node, name)?;
    let fd = floor::fd(&ebpf, program)?;
    let link = node
        .run(|| sys::attach_to_netkit_peer(fd, ifindex))?
        .map_err(Error::io(format!("{program} at netkit {name} of {node}")))?;
    Ok((ebpf, link))
}

/// A pair of devices: `name` on the node, up, and `eth0` in the pod.
fn pair(node: &Netns, name: &str, pod: &Netns, mac: Mac) -> Result<()> {
    let what = || format!("netkit {name} of {node} (kernel 6.7 and later, CONFIG_NETKIT)");
    let peer = format!("{name}-pod");
    node.run(|| create(name, &peer))?.map_err(Error::io(what()))?;
    // The kernel takes no addresses with the request.
    node.ip_batch(&format!(
        "link set dev {name} address {HOST_MAC} up\nlink set dev {peer} netns {} name eth0\n",
        pod.name()
    ))?;
    pod.ip_batch(&format!("link set dev eth0 address {mac}\n"))
}

/// A pair of devices in the thread's namespace.
fn create(name: &str, peer: &str) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        let pair = LinkNetkit::new(name, peer, NetkitMode::L2).build();
        handle.link().add(pair).execute().await.map_err(io::Error::other)
    })
}

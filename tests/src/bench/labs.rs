//! The systems that need a VPC: between nodes, and behind its load balancer.

use std::{any::Any, net::Ipv4Addr};

use serde_json::{Value, json};

use super::{
    Pair, Place, floor,
    load::{ECHO_DATAGRAMS, TCP_PORTS},
    ovs::Ovs,
    system::{A, B, C, PODS, Small, System, Way, index, kube_proxy, meet, route, veth},
};
use crate::lab::{
    Agent, Error, GATEWAY_MAC, Lab, LabBuilder, Node, Pod, PodSpec, Protocol, Result, Subnet, VM_IP, VipSpec,
    XdpMode,
};

/// What the ELB answers for, with `b` behind it.
const VIP: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 200);
/// The host that is no node.
const CLIENT: &str = "client";
/// Where the pods of [`routed`] are served on their nodes: this and the number of the port.
const NODE_PORTS: u16 = 25_000;

/// A VPC with two nodes; pods `a` and `b` on the first, `c` on the second; a host `client`; an ELB with `b` behind it.
pub(super) fn lab(id: &str) -> LabBuilder {
    lab_with_ports(id, 0)
}

/// The backend's ports are so much higher than the ELB's.
fn lab_with_ports(id: &str, higher: u16) -> LabBuilder {
    let listener = |protocol| {
        move |port| VipSpec {
            ip: VIP,
            port,
            protocol,
            target_port: port + higher,
            backends: vec!["b".into()],
            health_check: false,
        }
    };
    let tcp = TCP_PORTS.into_iter().map(listener(Protocol::Tcp));
    let udp = ECHO_DATAGRAMS.into_iter().map(listener(Protocol::Udp));
    let builder = Lab::builder(id)
        .node("node-1", [10, 1, 0, 11], [10, 1, 16, 11])
        .node("node-2", [10, 1, 0, 12], [10, 1, 16, 12])
        .pod_spec(PodSpec::bare("a", "node-1", A, 101))
        .pod_spec(PodSpec::bare("b", "node-1", B, 102))
        .pod_spec(PodSpec::bare("c", "node-2", C, 101))
        .vm(CLIENT, VM_IP.octets())
        .flow_log(false);
    tcp.chain(udp).fold(builder, LabBuilder::vip)
}

/// From pod `a` to another.
pub(super) fn to_pod(lab: &Lab, server: &str) -> Result<Pair> {
    let (client, server) = (lab.pod("a")?, lab.pod(server)?);
    Ok(Pair { client: client.netns.clone(), server: server.netns.clone(), to: server.ip })
}

/// From the host `client` by way of the ELB.
fn by_elb(lab: &Lab, server: &str) -> Result<Pair> {
    let (client, server) = (lab.vm(CLIENT)?, lab.pod(server)?);
    Ok(Pair { client: client.netns.clone(), server: server.netns.clone(), to: VIP })
}

/// The way of a place in a lab where all pods are wired; `None` for the places that are not of the VPC.
pub(super) fn pair(lab: &Lab, place: Place) -> Result<Option<Pair>> {
    Ok(Some(match place {
        Place::SameNode | Place::PodsLocal | Place::FlowsLocal => to_pod(lab, "b")?,
        Place::CrossNode | Place::PodsWire | Place::FlowsWire => to_pod(lab, "c")?,
        Place::Elb => by_elb(lab, "b")?,
        Place::ElbHairpin | Place::FlowsElb => Pair { to: VIP, ..to_pod(lab, "b")? },
        Place::Attack => return Ok(None),
    }))
}

fn of_lab(lab: Lab, places: &[Place], hold: impl Any) -> Result<System> {
    let mut ways = Vec::new();
    for place in places {
        ways.extend(pair(&lab, *place)?.map(|pair| Way::pair(*place, pair)));
    }
    Ok(System { ways, hold: Box::new((hold, lab)) })
}

const DIRECT: [Place; 2] = [Place::SameNode, Place::CrossNode];
const ALL: [Place; 4] = [Place::SameNode, Place::CrossNode, Place::Elb, Place::ElbHairpin];

/// The agent's default, but for what is said here.
pub(super) fn eniway(id: &str, fast_path: bool, xdp: XdpMode) -> Result<System> {
    everywhere(with_agents(id, fast_path, xdp)?)
}

/// All ways of a lab where all pods are wired.
pub(super) fn everywhere(lab: Lab) -> Result<System> {
    of_lab(lab, &ALL, ())
}

pub(super) fn with_agents(id: &str, fast_path: bool, xdp: XdpMode) -> Result<Lab> {
    let lab = lab(id).fast_path(fast_path).xdp(xdp).build()?;
    lab.start_agents()?;
    if fast_path {
        let all = ["ingress", "egress"].map(|way| json!({ "direction": way, "action": "allow" }));
        lab.agents().iter().try_for_each(|agent| give_groups(agent, &json!(all), "open"))?;
    }
    Ok(lab)
}

/// The agent's default, `fast_path = "security-groups"`, with one group for all pods, whose rules make this of every pair.
pub(super) fn give_groups(agent: &Agent, rules: &Value, verdict: &str) -> Result<()> {
    agent.judge_all("sg-bench", rules)?;
    let policy = agent.cli_json(&["policy"])?;
    let pairs = policy["pairs"].as_array().map(Vec::as_slice).unwrap_or_default();
    if pairs.iter().any(|pair| pair["verdict"] != verdict) {
        return Err(Error::Protocol(format!("a pair of pods that is not {verdict}: {policy}")));
    }
    Ok(())
}

/// Address and routes of a pod that has its sub-ENI as `eth0`.
pub(super) fn address(pod: &Pod) -> Result<()> {
    let gateway = Subnet::PODS.gateway;
    pod.netns.ip_batch(&format!(
        "addr add {}/32 dev eth0\nlink set dev eth0 up\nneigh replace {gateway} lladdr {GATEWAY_MAC} dev eth0\n\
         route add {gateway} dev eth0\nroute add default via {gateway} dev eth0\n",
        pod.ip
    ))
}

/// 8021q devices in the pods.
pub(super) fn vlan() -> Result<System> {
    everywhere(with_vlans("bench-vlan")?)
}

pub(super) fn with_vlans(id: &str) -> Result<Lab> {
    let lab = lab(id).build()?;
    for pod in lab.pods() {
        let Pod { vlan, mac, netns, .. } = pod;
        lab.node_of(pod)?.netns.ip_batch(&format!(
            "link add link eth1 name vlan{vlan} address {mac} type vlan id {vlan}\n\
             link set dev vlan{vlan} netns {} name eth0\n",
            netns.name()
        ))?;
        address(pod)?;
    }
    Ok(lab)
}

/// What does the least, for all pods but `b`.
pub(super) fn bare() -> Result<System> {
    let small = Small::with_veth("floor")?;
    let node = small.node.netns();
    let mut programs = Vec::new();
    for (at, ((name, ip), pod)) in PODS.into_iter().zip(&small.pods).enumerate() {
        let (peer, peer_ip) = PODS[1 - at];
        programs.push(floor::attach(node, name, "floor_peer", index(node, peer)?, 0)?);
        meet(pod.netns(), ip, peer_ip)?;
    }
    let lab = lab("bench-floor").build()?;
    for pod in ["a", "c"].map(|name| lab.pod(name)) {
        let pod = pod?;
        let Node { netns: node, .. } = lab.node_of(pod)?;
        veth(node, "pod", &pod.netns, pod.mac)?;
        address(pod)?;
        programs.push(floor::attach(node, "pod", "floor_wire", index(node, "eth1")?, pod.vlan)?);
        programs.push(floor::attach(node, "eth1", "floor_pod", index(node, "pod")?, 0)?);
    }
    // The ELB has `a` behind it: a parent leads to one pod.
    lab.elb().pin(VM_IP, A)?;
    let ways = [Way::pair(Place::CrossNode, to_pod(&lab, "c")?), Way::pair(Place::Elb, by_elb(&lab, "a")?)];
    let mut system = small.system((programs, lab));
    system.ways.extend(ways);
    Ok(system)
}

/// What VXLAN adds to each packet.
const OUTER: u32 = 50;

/// The pods' packets cross the VPC between the nodes' own addresses.
pub(super) fn tunnel() -> Result<System> {
    let lab = lab("bench-tunnel").build()?;
    let mut switches = Vec::new();
    for (at, node) in lab.nodes().iter().enumerate() {
        let ovs = Ovs::start(&node.netns)?;
        let other = &lab.nodes()[1 - at];
        let remote = format!("options:remote_ip={}", other.ip);
        ovs.add_port("vxlan0", &["type=vxlan", &remote, "options:key=1"])?;
        switches.push(ovs);
    }
    for pod in lab.pods() {
        let at = lab.nodes().iter().position(|node| node.name == pod.node).unwrap_or_default();
        let node = &lab.nodes()[at].netns;
        veth(node, &pod.name, &pod.netns, pod.mac)?;
        pod.netns.ip_batch(&format!(
            "addr add {}/22 dev eth0\nlink set dev eth0 mtu {} up\n",
            pod.ip,
            1500 - OUTER
        ))?;
        switches[at].add_port(&pod.name, &["type=system"])?;
    }
    of_lab(lab, &DIRECT, switches)
}

/// Adds what pods with host routes have between nodes, by the nodes' own NICs, to a system that has them on one node. The VPC
/// routes the pods' addresses to their nodes. With `services`, the nodes have kube-proxy's rules, and the ELB knows node ports
/// instead of pods: the pod keeps the client's address (`externalTrafficPolicy: Local`).
pub(super) fn routed(same_node: System, id: &str, services: bool) -> Result<System> {
    let lab = lab_with_ports(id, if services { NODE_PORTS } else { 0 }).build()?;
    for node in lab.nodes() {
        let pods: Vec<&Pod> = lab.pods().iter().filter(|pod| pod.node == node.name).collect();
        let addresses: Vec<Ipv4Addr> = pods.iter().map(|pod| pod.ip).collect();
        lab.fabric().forwards(&node.primary_port, &addresses)?;
        for pod in pods {
            veth(&node.netns, &pod.name, &pod.netns, pod.mac)?;
            route(&node.netns, &pod.name, &pod.netns, pod.ip)?;
        }
        if services {
            kube_proxy(&node.netns, &node_ports(B))?;
        }
    }
    if services {
        lab.elb().pin(VM_IP, lab.node_of(lab.pod("b")?)?.ip)?;
    }
    let ways = [Way::pair(Place::CrossNode, to_pod(&lab, "c")?), Way::pair(Place::Elb, by_elb(&lab, "b")?)];
    let System { ways: mut all, hold } = same_node;
    all.extend(ways);
    Ok(System { ways: all, hold: Box::new((hold, lab)) })
}

/// As kube-proxy writes them for a Service whose node port keeps the client's address.
fn node_ports(pod: Ipv4Addr) -> String {
    let rules = TCP_PORTS.map(|port| {
        let name = format!("NODE-{port}");
        format!(
            "-N KUBE-EXT-{name}\n-N KUBE-SVL-{name}\n-N KUBE-SEP-{name}\n\
             -A KUBE-NODEPORTS -p tcp -m tcp --dport {} -j KUBE-EXT-{name}\n-A KUBE-EXT-{name} -j KUBE-SVL-{name}\n\
             -A KUBE-SVL-{name} -j KUBE-SEP-{name}\n-A KUBE-SEP-{name} -s {pod}/32 -j KUBE-MARK-MASQ\n\
             -A KUBE-SEP-{name} -p tcp -m tcp -j DNAT --to-destination {pod}:{port}\n",
            port + NODE_PORTS
        )
    });
    rules.concat()
}

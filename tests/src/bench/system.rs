//! The systems that are compared, each set up as its users would. All of them may stand at once.

use std::{any::Any, fmt::Write as _, io::Write as _, net::Ipv4Addr, process::Stdio};

use nix::net::if_::if_nametoindex;

use serde_json::{Value, json};

use super::{Pair, Place, floor, ovs::Ovs};
use crate::lab::{
    Agent, Error, GATEWAY_MAC, Lab, LabBuilder, Mac, Netns, NetnsGuard, Node, Pod, PodSpec, Result, Subnet,
    XdpMode, agent::READY, netns,
};

/// One of the systems.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Client and server in one namespace.
    Loopback,
    /// veth pods, `bpf_redirect_peer` and nothing else; between nodes push and pop of a tag, too.
    Floor,
    /// veth pods, default configuration.
    Eniway,
    /// The same without the fast path.
    EniwayHairpin,
    /// XDP drops on the parent what it must.
    EniwayGuard,
    /// XDP on the parent takes what it may.
    EniwayRedirect,
    /// A VLAN device (8021q) on the parent, moved into the pod.
    Vlan,
    /// veth pods on a Linux bridge.
    Bridge,
    /// macvlan pods in bridge mode.
    Macvlan,
    /// ipvlan pods in L2 mode.
    Ipvlan,
    /// veth pods with host routes, without any rules.
    Routed,
    /// The same with kube-proxy's iptables for 2,000 Services, and so with connection tracking.
    VpcNetwork,
    /// veth pods on Open vSwitch, between nodes by VXLAN.
    Tunnel,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Loopback,
        Self::Floor,
        Self::Eniway,
        Self::EniwayHairpin,
        Self::EniwayGuard,
        Self::EniwayRedirect,
        Self::Vlan,
        Self::Bridge,
        Self::Macvlan,
        Self::Ipvlan,
        Self::Routed,
        Self::VpcNetwork,
        Self::Tunnel,
    ];

    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::Floor => "bare-redirect-peer",
            Self::Eniway => "eniway",
            Self::EniwayHairpin => "eniway-hairpin",
            Self::EniwayGuard => "eniway-xdp-guard",
            Self::EniwayRedirect => "eniway-xdp-redirect",
            Self::Vlan => "vlan-sub-interface",
            Self::Bridge => "linux-bridge",
            Self::Macvlan => "macvlan",
            Self::Ipvlan => "ipvlan-l2",
            Self::Routed => "routed-veth",
            Self::VpcNetwork => "vpc-network-2000-services",
            Self::Tunnel => "container-tunnel",
        }
    }

    /// Sets it up.
    ///
    /// # Errors
    ///
    /// When the kernel lacks something, or a program is not installed.
    pub fn build(self) -> Result<System> {
        match self {
            Self::Loopback => loopback(),
            Self::Floor => bare(),
            Self::Eniway => eniway("bench-eniway", true, XdpMode::Off),
            Self::EniwayHairpin => eniway("bench-hairpin", false, XdpMode::Off),
            Self::EniwayGuard => eniway("bench-guard", true, XdpMode::Guard),
            Self::EniwayRedirect => eniway("bench-redirect", true, XdpMode::Redirect),
            Self::Vlan => vlan(),
            Self::Bridge => bridge(),
            Self::Macvlan => shared("macvlan", "macvlan mode bridge"),
            Self::Ipvlan => shared("ipvlan", "ipvlan mode l2"),
            Self::Routed => routed("routed"),
            Self::VpcNetwork => vpc_network(),
            Self::Tunnel => tunnel(),
        }
    }
}

/// A system that stands, until it is dropped.
pub struct System {
    /// Where a client and a server are, by the case's place.
    pub pairs: Vec<(Place, Pair)>,
    _hold: Box<dyn Any>,
}

const A: Ipv4Addr = Ipv4Addr::new(10, 1, 16, 101);
const B: Ipv4Addr = Ipv4Addr::new(10, 1, 16, 102);
const C: Ipv4Addr = Ipv4Addr::new(10, 1, 16, 103);
const PODS: [(&str, Ipv4Addr); 2] = [("a", A), ("b", B)];
/// The MAC of the host's side of all veth pairs.
const HOST_MAC: Mac = Mac([0x02, 0, 0, 0, 0, 1]);

/// A node and two pods, in namespaces of their own.
struct Small {
    node: NetnsGuard,
    pods: [NetnsGuard; 2],
}

impl Small {
    fn new(name: &str) -> Result<Self> {
        let make = |member: &str| {
            let netns = Netns::named(format!("ewb-{name}-{member}"));
            // Of a run that was killed: another that lives would hold the lock.
            netns::remove(&netns)?;
            NetnsGuard::create(netns.name())
        };
        Ok(Self { node: make("node")?, pods: [make("a")?, make("b")?] })
    }

    /// With a veth pair for each pod: `a` and `b` on the node, `eth0` in the pods.
    fn with_veth(name: &str) -> Result<Self> {
        let small = Self::new(name)?;
        for ((pod, ip), netns) in PODS.into_iter().zip(&small.pods) {
            veth(small.node.netns(), pod, netns.netns(), Mac::of(ip))?;
        }
        Ok(small)
    }

    fn system(self, hold: impl Any) -> System {
        let pair = Pair { client: self.pods[0].netns().clone(), server: self.pods[1].netns().clone(), to: B };
        System { pairs: vec![(Place::SameNode, pair)], _hold: Box::new((hold, self)) }
    }
}

fn veth(node: &Netns, name: &str, pod: &Netns, mac: Mac) -> Result<()> {
    node.ip_batch(&format!(
        "link add name {name} address {HOST_MAC} type veth peer name eth0 address {mac} netns {}\n\
         link set dev {name} up\n",
        pod.name()
    ))
}

fn loopback() -> Result<System> {
    let name = "ewb-loopback";
    netns::remove(&Netns::named(name))?;
    let guard = NetnsGuard::create(name)?;
    let netns = guard.netns().clone();
    let pair = || Pair { client: netns.clone(), server: netns.clone(), to: Ipv4Addr::LOCALHOST };
    Ok(System { pairs: vec![(Place::SameNode, pair())], _hold: Box::new(guard) })
}

fn bridge() -> Result<System> {
    let small = Small::with_veth("bridge")?;
    small.node.netns().ip_batch(&format!(
        "link add name br0 address {HOST_MAC} type bridge\nlink set dev br0 up\n\
         link set dev a master br0\nlink set dev b master br0\n"
    ))?;
    for ((_, ip), pod) in PODS.into_iter().zip(&small.pods) {
        pod.netns().ip_batch(&format!("addr add {ip}/22 dev eth0\nlink set dev eth0 up\n"))?;
    }
    Ok(small.system(()))
}

/// Pods on a shared parent: one end of a veth pair, as it would be a NIC.
fn shared(name: &str, kind: &str) -> Result<System> {
    let small = Small::new(name)?;
    let node = small.node.netns();
    node.ip_batch(
        "link add name parent type veth peer name far\nlink set dev parent up\nlink set dev far up\n",
    )?;
    for ((_, ip), pod) in PODS.into_iter().zip(&small.pods) {
        let pod = pod.netns();
        node.ip_batch(&format!("link add link parent name eth0 netns {} type {kind}\n", pod.name()))?;
        pod.ip_batch(&format!("addr add {ip}/22 dev eth0\nlink set dev eth0 up\n"))?;
    }
    Ok(small.system(()))
}

/// As AWS's plugin and Calico wire pods: a gateway that is nobody, answered by the host's MAC, and host routes.
fn wire_routed(small: &Small) -> Result<()> {
    let node = small.node.netns();
    node.sysctl("net/ipv4/ip_forward", "1")?;
    for ((name, ip), pod) in PODS.into_iter().zip(&small.pods) {
        pod.netns().ip_batch(&format!(
            "addr add {ip}/32 dev eth0\nlink set dev eth0 up\n\
             neigh add 169.254.1.1 lladdr {HOST_MAC} dev eth0\n\
             route add 169.254.1.1 dev eth0\nroute add default via 169.254.1.1 dev eth0\n"
        ))?;
        node.ip_batch(&format!("route add {ip}/32 dev {name}\n"))?;
    }
    Ok(())
}

fn routed(name: &str) -> Result<System> {
    let small = Small::with_veth(name)?;
    wire_routed(&small)?;
    Ok(small.system(()))
}

fn vpc_network() -> Result<System> {
    let small = Small::with_veth("vpc-network")?;
    wire_routed(&small)?;
    let what = || Error::io("iptables-legacy-restore (package iptables)");
    let mut restore = small.node.netns().command("iptables-legacy-restore")?;
    let mut child = restore.stdin(Stdio::piped()).spawn().map_err(what())?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(kube_proxy_rules(2000).as_bytes()).map_err(what())?;
    }
    let status = child.wait().map_err(what())?;
    if !status.success() {
        return Err(Error::Topology(format!("iptables-legacy-restore: {status}")));
    }
    Ok(small.system(()))
}

/// The rules that kube-proxy makes in its iptables mode for so many Services with one backend each (Kubernetes,
/// pkg/proxy/iptables/proxier.go).
fn kube_proxy_rules(services: u16) -> String {
    let mut nat = String::from(
        "*nat\n:KUBE-SERVICES -\n:KUBE-NODEPORTS -\n:KUBE-POSTROUTING -\n:KUBE-MARK-MASQ -\n\
         -A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n-A POSTROUTING -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n-A KUBE-POSTROUTING -j MASQUERADE --random-fully\n",
    );
    let mut chains = String::new();
    let mut rules = String::new();
    for service in 0..services {
        let [high, low] = service.to_be_bytes();
        let backend = format!("10.1.{}.{low}", 20 + high);
        let _ = write!(chains, ":KUBE-SVC-{service} -\n:KUBE-SEP-{service} -\n");
        let _ = write!(
            rules,
            "-A KUBE-SERVICES -d 10.247.{high}.{low}/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-{service}\n\
             -A KUBE-SVC-{service} -j KUBE-SEP-{service}\n\
             -A KUBE-SEP-{service} -s {backend}/32 -j KUBE-MARK-MASQ\n\
             -A KUBE-SEP-{service} -p tcp -m tcp -j DNAT --to-destination {backend}:80\n"
        );
    }
    nat.push_str(&chains);
    nat.push_str(&rules);
    nat.push_str("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n");
    nat + "*filter\n:KUBE-SERVICES -\n:KUBE-FORWARD -\n:KUBE-PROXY-FIREWALL -\n\
           -A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL\n\
           -A FORWARD -j KUBE-FORWARD\n-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES\n\
           -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
           -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
           -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n"
}

/// A VPC with two nodes; pods `a` and `b` on the first, `c` on the second.
fn lab(id: &str) -> LabBuilder {
    let pod = |name: &str, node: &str, ip, vlan| PodSpec {
        namespace: "default".into(),
        name: name.into(),
        node: node.into(),
        ip,
        vlan,
        eip: None,
        nginx: false,
    };
    Lab::builder(id)
        .node("node-1", [10, 1, 0, 11], [10, 1, 16, 11])
        .node("node-2", [10, 1, 0, 12], [10, 1, 16, 12])
        .pod_spec(pod("a", "node-1", A, 101))
        .pod_spec(pod("b", "node-1", B, 102))
        .pod_spec(pod("c", "node-2", C, 101))
        .flow_log(false)
}

fn in_lab(lab: &Lab, server: &str) -> Result<Pair> {
    let (client, server) = (lab.pod("a")?, lab.pod(server)?);
    Ok(Pair { client: client.netns.clone(), server: server.netns.clone(), to: server.ip })
}

fn of_lab(lab: Lab, hold: impl Any) -> Result<System> {
    let pairs = vec![(Place::SameNode, in_lab(&lab, "b")?), (Place::CrossNode, in_lab(&lab, "c")?)];
    Ok(System { pairs, _hold: Box::new((hold, lab)) })
}

fn eniway(id: &str, fast_path: bool, xdp: XdpMode) -> Result<System> {
    let lab = lab(id).fast_path(fast_path).xdp(xdp).build()?;
    lab.start_agents()?;
    if fast_path {
        for node in lab.nodes() {
            open(lab.agent(&node.name)?)?;
        }
    }
    of_lab(lab, ())
}

/// The agent's default, `fast_path = "security-groups"`, with a group that leaves every pair of pods open. Only the
/// agent knows of it: the fabric judges nothing, so that it costs the same under every system.
fn open(agent: &Agent) -> Result<()> {
    agent.change(|document| {
        document["security_groups"] = json!([{ "id": "sg-open", "rules": [
            { "direction": "ingress", "action": "allow" }, { "direction": "egress", "action": "allow" } ] }]);
        for pod in document["pods"].as_array_mut().into_iter().flatten() {
            pod["fast_path"] = json!("security-groups");
            pod["security_groups"] = json!(["sg-open"]);
        }
    })?;
    let revision = agent.document()?["revision"].clone();
    agent.wait_status("the security groups", READY, |status| status["revision"] == revision)?;
    let told = agent.cli(&["policy", "--json"])?;
    let policy: Value =
        serde_json::from_str(&told).map_err(|error| Error::Protocol(format!("`eniway policy`: {error}")))?;
    let pairs = policy["pairs"].as_array().map(Vec::as_slice).unwrap_or_default();
    if pairs.iter().any(|pair| pair["verdict"] != "open") {
        return Err(Error::Protocol(format!("a pair of pods that is not open: {told}")));
    }
    Ok(())
}

/// Address and routes of a pod that has its sub-ENI as `eth0`.
fn address(pod: &Pod) -> Result<()> {
    let gateway = Subnet::PODS.gateway;
    pod.netns.ip_batch(&format!(
        "addr add {}/32 dev eth0\nlink set dev eth0 up\nneigh replace {gateway} lladdr {GATEWAY_MAC} dev eth0\n\
         route add {gateway} dev eth0\nroute add default via {gateway} dev eth0\n",
        pod.ip
    ))
}

fn vlan() -> Result<System> {
    let lab = lab("bench-vlan").build()?;
    for pod in lab.pods() {
        let Pod { vlan, mac, netns, .. } = pod;
        lab.node_of(pod)?.netns.ip_batch(&format!(
            "link add link eth1 name vlan{vlan} address {mac} type vlan id {vlan}\n\
             link set dev vlan{vlan} netns {} name eth0\n",
            netns.name()
        ))?;
        address(pod)?;
    }
    of_lab(lab, ())
}

fn bare() -> Result<System> {
    let small = Small::with_veth("floor")?;
    let node = small.node.netns();
    let mut programs = Vec::new();
    for (at, ((name, ip), pod)) in PODS.into_iter().zip(&small.pods).enumerate() {
        let (peer, peer_ip) = PODS[1 - at];
        programs.push(floor::attach(node, name, "floor_peer", index(node, peer)?, 0)?);
        pod.netns().ip_batch(&format!(
            "addr add {ip}/32 dev eth0\nlink set dev eth0 up\n\
             neigh add {peer_ip} lladdr {} dev eth0\nroute add {peer_ip} dev eth0\n",
            Mac::of(peer_ip)
        ))?;
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
    let cross = in_lab(&lab, "c")?;
    let mut system = small.system((programs, lab));
    system.pairs.push((Place::CrossNode, cross));
    Ok(system)
}

/// What VXLAN adds to each packet.
const OUTER: u32 = 50;

/// The pods' packets cross the VPC between the nodes' own addresses.
fn tunnel() -> Result<System> {
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
    of_lab(lab, switches)
}

fn index(netns: &Netns, interface: &str) -> Result<u32> {
    netns.run(|| if_nametoindex(interface))?.map_err(Error::errno(format!("{interface} in {netns}")))
}

//! The systems that are compared, each set up as its users would. All of them may stand at once.

use std::{any::Any, fmt::Write as _, io::Write as _, net::Ipv4Addr, process::Stdio};

use nix::net::if_::if_nametoindex;

use super::{Pair, Place, attack, case::Group, feed, labs, load::Load, netkit, scale, unchecked};
use crate::lab::{Error, Mac, Netns, NetnsGuard, Result, XdpMode};

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
    /// As [`Kind::Floor`] with netkit in place of veth.
    Netkit,
    /// Our programs on netkit, wired by hand.
    EniwayNetkit,
    /// As [`Kind::Eniway`], with programs that check nothing.
    EniwayUnchecked,
    /// Drops whatever comes, before anything is known of it.
    Drop,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 17] = [
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
        Self::Netkit,
        Self::EniwayNetkit,
        Self::EniwayUnchecked,
        Self::Drop,
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
            Self::Netkit => "bare-netkit",
            Self::EniwayNetkit => "eniway-netkit",
            Self::EniwayUnchecked => "eniway-unchecked",
            Self::Drop => "bare-drop",
        }
    }

    /// Whether it has a way for the cases of this place.
    pub fn has(self, place: Place) -> bool {
        let eniway = matches!(
            self,
            Self::Eniway
                | Self::EniwayHairpin
                | Self::EniwayGuard
                | Self::EniwayRedirect
                | Self::EniwayUnchecked
        );
        match place {
            Place::SameNode => !matches!(self, Self::EniwayNetkit | Self::Drop),
            Place::CrossNode => {
                !matches!(self, Self::Loopback | Self::Bridge | Self::Macvlan | Self::Ipvlan | Self::Drop)
            }
            Place::Elb => {
                eniway || matches!(self, Self::Floor | Self::Vlan | Self::Routed | Self::VpcNetwork)
            }
            Place::ElbHairpin => eniway || self == Self::Vlan,
            Place::Attack => matches!(
                self,
                Self::Eniway | Self::EniwayGuard | Self::EniwayRedirect | Self::Vlan | Self::Drop
            ),
            Place::PodsLocal | Place::PodsWire | Place::FlowsLocal | Place::FlowsWire | Place::FlowsElb => {
                self == Self::Eniway
            }
        }
    }

    /// Sets it up for a group of cases; `None` if it has nothing to do with them.
    ///
    /// # Errors
    ///
    /// When the kernel lacks something, or a program is not installed.
    pub fn build(self, group: Group) -> Result<Option<System>> {
        let system = match (group, self) {
            (Group::Traffic, Self::Loopback) => loopback(),
            (Group::Traffic, Self::Floor) => labs::bare(),
            (Group::Traffic, Self::Eniway) => labs::eniway("bench-eniway", true, XdpMode::Off),
            (Group::Traffic, Self::EniwayHairpin) => labs::eniway("bench-hairpin", false, XdpMode::Off),
            (Group::Traffic, Self::EniwayGuard) => labs::eniway("bench-guard", true, XdpMode::Guard),
            (Group::Traffic, Self::EniwayRedirect) => labs::eniway("bench-redirect", true, XdpMode::Redirect),
            (Group::Traffic, Self::EniwayUnchecked) => unchecked::eniway(),
            (Group::Traffic, Self::Vlan) => labs::vlan(),
            (Group::Traffic, Self::Bridge) => bridge(),
            (Group::Traffic, Self::Macvlan) => shared("macvlan", "macvlan mode bridge"),
            (Group::Traffic, Self::Ipvlan) => shared("ipvlan", "ipvlan mode l2"),
            (Group::Traffic, Self::Routed) => labs::routed(routed("routed")?, "bench-routed", false),
            (Group::Traffic, Self::VpcNetwork) => labs::routed(vpc_network()?, "bench-vpc", true),
            (Group::Traffic, Self::Tunnel) => labs::tunnel(),
            (Group::Traffic, Self::Netkit) => netkit::bare(),
            (Group::Traffic, Self::EniwayNetkit) => netkit::eniway(),
            (Group::Attack, Self::Drop) => attack::bare(),
            (Group::Attack, Self::Eniway) => attack::eniway("flood-off", XdpMode::Off),
            (Group::Attack, Self::EniwayGuard) => attack::eniway("flood-guard", XdpMode::Guard),
            (Group::Attack, Self::EniwayRedirect) => attack::eniway("flood-redirect", XdpMode::Redirect),
            (Group::Attack, Self::Vlan) => attack::vlan(),
            (Group::Scale, Self::Eniway) => scale::eniway(),
            _ => return Ok(None),
        };
        system.map(Some)
    }
}

/// A system that stands, until it is dropped.
pub struct System {
    /// What it offers.
    pub ways: Vec<Way>,
    pub(super) hold: Box<dyn Any>,
}

/// A way to measure a system: a line of a case's table.
pub struct Way {
    /// In the cases of this place.
    pub place: Place,
    /// What the line is called, if not like the system.
    pub name: Option<String>,
    /// Pods on the client's node.
    pub endpoints: u32,
    /// Who sends what to whom.
    pub ends: Ends,
    /// Shows, once the line is warm, that what should be measured is what happens.
    pub proof: Option<Proof>,
}

/// Shows that something is so.
pub type Proof = Box<dyn Fn() -> Result<()>>;

/// Who sends what to whom.
pub enum Ends {
    /// Any load between two processes.
    Pair(Pair),
    /// Datagrams of so many flows.
    Flows(Pair, u32),
    /// Frames of one kind.
    Feed(Load, feed::Source),
}

impl Way {
    /// Between two processes, of a node with two pods.
    pub(super) const fn pair(place: Place, pair: Pair) -> Self {
        Self { place, name: None, endpoints: 2, ends: Ends::Pair(pair), proof: None }
    }
}

impl Ends {
    /// Whether this is what a load asks for.
    pub fn fit(&self, load: Load) -> bool {
        match self {
            Self::Pair(_) => load.has_processes(),
            Self::Flows(..) => load == Load::UdpRr,
            Self::Feed(this, _) => load == *this,
        }
    }

    /// The namespace that the client runs in.
    pub(super) const fn client(&self) -> &Netns {
        match self {
            Self::Pair(pair) | Self::Flows(pair, _) => &pair.client,
            Self::Feed(_, source) => &source.from.0,
        }
    }

    /// Flows at once.
    pub(super) const fn flows(&self) -> u32 {
        match self {
            Self::Pair(_) | Self::Feed(..) => 1,
            Self::Flows(_, flows) => *flows,
        }
    }
}

pub(super) const A: Ipv4Addr = Ipv4Addr::new(10, 1, 16, 101);
pub(super) const B: Ipv4Addr = Ipv4Addr::new(10, 1, 16, 102);
pub(super) const C: Ipv4Addr = Ipv4Addr::new(10, 1, 16, 103);
pub(super) const PODS: [(&str, Ipv4Addr); 2] = [("a", A), ("b", B)];
/// The MAC of the host's side of all veth pairs.
pub(super) const HOST_MAC: Mac = Mac([0x02, 0, 0, 0, 0, 1]);

/// A node and two pods, in namespaces of their own.
pub(super) struct Small {
    pub(super) node: NetnsGuard,
    pub(super) pods: [NetnsGuard; 2],
}

impl Small {
    pub(super) fn new(name: &str) -> Result<Self> {
        // Nobody else has these: another run that lives would hold the lock.
        let make = |member: &str| NetnsGuard::renew(format!("ewb-{name}-{member}"));
        Ok(Self { node: make("node")?, pods: [make("a")?, make("b")?] })
    }

    /// With a veth pair for each pod: `a` and `b` on the node, `eth0` in the pods.
    pub(super) fn with_veth(name: &str) -> Result<Self> {
        let small = Self::new(name)?;
        for ((pod, ip), netns) in PODS.into_iter().zip(&small.pods) {
            veth(small.node.netns(), pod, netns.netns(), Mac::of(ip))?;
        }
        Ok(small)
    }

    pub(super) fn system(self, hold: impl Any) -> System {
        let pair = Pair { client: self.pods[0].netns().clone(), server: self.pods[1].netns().clone(), to: B };
        System { ways: vec![Way::pair(Place::SameNode, pair)], hold: Box::new((hold, self)) }
    }
}

/// Address of a pod that knows one other, with its MAC, and nobody else.
pub(super) fn meet(pod: &Netns, ip: Ipv4Addr, peer: Ipv4Addr) -> Result<()> {
    pod.ip_batch(&format!(
        "addr add {ip}/32 dev eth0\nlink set dev eth0 up\n\
         neigh add {peer} lladdr {} dev eth0\nroute add {peer} dev eth0\n",
        Mac::of(peer)
    ))
}

pub(super) fn veth(node: &Netns, name: &str, pod: &Netns, mac: Mac) -> Result<()> {
    node.ip_batch(&format!(
        "link add name {name} address {HOST_MAC} type veth peer name eth0 address {mac} netns {}\n\
         link set dev {name} up\n",
        pod.name()
    ))
}

fn loopback() -> Result<System> {
    let guard = NetnsGuard::renew("ewb-loopback")?;
    let netns = guard.netns().clone();
    let pair = Pair { client: netns.clone(), server: netns, to: Ipv4Addr::LOCALHOST };
    Ok(System { ways: vec![Way::pair(Place::SameNode, pair)], hold: Box::new(guard) })
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
    small.node.netns().sysctl("net/ipv4/ip_forward", "1")?;
    for ((name, ip), pod) in PODS.into_iter().zip(&small.pods) {
        route(small.node.netns(), name, pod.netns(), ip)?;
    }
    Ok(())
}

/// A host route to a pod behind a veth, and its own to everything.
pub(super) fn route(node: &Netns, name: &str, pod: &Netns, ip: Ipv4Addr) -> Result<()> {
    pod.ip_batch(&format!(
        "addr add {ip}/32 dev eth0\nlink set dev eth0 up\n\
         neigh add 169.254.1.1 lladdr {HOST_MAC} dev eth0\n\
         route add 169.254.1.1 dev eth0\nroute add default via 169.254.1.1 dev eth0\n"
    ))?;
    node.ip_batch(&format!("route add {ip}/32 dev {name}\n"))
}

fn routed(name: &str) -> Result<System> {
    let small = Small::with_veth(name)?;
    wire_routed(&small)?;
    Ok(small.system(()))
}

fn vpc_network() -> Result<System> {
    let small = Small::with_veth("vpc-network")?;
    wire_routed(&small)?;
    kube_proxy(small.node.netns(), "")?;
    Ok(small.system(()))
}

/// Gives a node the rules of kube-proxy; `node_ports` are further ones in the table nat.
pub(super) fn kube_proxy(node: &Netns, node_ports: &str) -> Result<()> {
    let what = || Error::io("iptables-legacy-restore (package iptables)");
    let mut restore = node.command("iptables-legacy-restore")?;
    let mut child = restore.stdin(Stdio::piped()).spawn().map_err(what())?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(kube_proxy_rules(2000, node_ports).as_bytes()).map_err(what())?;
    }
    let status = child.wait().map_err(what())?;
    if !status.success() {
        return Err(Error::Topology(format!("iptables-legacy-restore: {status}")));
    }
    Ok(())
}

/// The rules that kube-proxy makes in its iptables mode for so many Services with one backend each (Kubernetes,
/// pkg/proxy/iptables/proxier.go).
fn kube_proxy_rules(services: u16, node_ports: &str) -> String {
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
    nat.push_str(node_ports);
    nat.push_str("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n");
    nat + "*filter\n:KUBE-SERVICES -\n:KUBE-FORWARD -\n:KUBE-PROXY-FIREWALL -\n\
           -A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL\n\
           -A FORWARD -j KUBE-FORWARD\n-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES\n\
           -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
           -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
           -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n"
}

/// Index of an interface.
pub(super) fn index(netns: &Netns, interface: &str) -> Result<u32> {
    netns.run(|| if_nametoindex(interface))?.map_err(Error::errno(format!("{interface} in {netns}")))
}

//! The description of a topology: what [`LabBuilder`](super::LabBuilder) takes and [`Lab`](super::Lab) shows.

use std::{fmt, net::Ipv4Addr, time::Duration};

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

/// The MAC that answers for every gateway of the VPC.
pub const GATEWAY_MAC: Mac = Mac([0xfa, 0xff, 0xff, 0, 0, 1]);
/// `ff:ff:ff:ff:ff:ff`.
pub const BROADCAST: Mac = Mac([0xff; 6]);

impl Mac {
    /// The MAC that the lab gives to the NIC with this address: `fa:16:3e` and its last three bytes.
    pub const fn of(ip: Ipv4Addr) -> Self {
        let [_, b, c, d] = ip.octets();
        Self([0xfa, 0x16, 0x3e, b, c, d])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A subnet of the VPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Subnet {
    /// The network address.
    pub network: Ipv4Addr,
    /// The length of its prefix.
    pub prefix: u8,
    /// Its gateway, which the fabric is.
    pub gateway: Ipv4Addr,
}

impl Subnet {
    /// The whole VPC: 10.1.0.0/16.
    pub const VPC: Self = Self::new([10, 1, 0, 0], 16, [10, 1, 0, 1]);
    /// Nodes, virtual machines, the ELB's own address and its VIPs: 10.1.0.0/24.
    pub const NODES: Self = Self::new([10, 1, 0, 0], 24, [10, 1, 0, 1]);
    /// Parent ENIs and pods: 10.1.16.0/22.
    pub const PODS: Self = Self::new([10, 1, 16, 0], 22, [10, 1, 16, 1]);

    const fn new(network: [u8; 4], prefix: u8, gateway: [u8; 4]) -> Self {
        let [a, b, c, d] = network;
        let [e, f, g, h] = gateway;
        Self { network: Ipv4Addr::new(a, b, c, d), prefix, gateway: Ipv4Addr::new(e, f, g, h) }
    }

    /// The network mask as a number.
    pub const fn mask(&self) -> u32 {
        if self.prefix == 0 { 0 } else { u32::MAX << (32 - self.prefix) }
    }

    /// Whether the address is of this subnet.
    pub const fn contains(&self, ip: Ipv4Addr) -> bool {
        ip.to_bits() & self.mask() == self.network.to_bits()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

/// The ELB's own address in the VPC, the source of its health checks.
pub const ELB_IP: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 250);
/// The client in the outside network.
pub const OUTSIDE_IP: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
/// Where the walk-through's virtual machine is.
pub const VM_IP: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 20);

/// A node to be.
#[derive(Clone, Debug)]
pub struct NodeSpec {
    /// Lower-case letters, digits, `-`; at most 10 characters.
    pub name: String,
    /// Address of `eth0`, in [`Subnet::NODES`].
    pub ip: Ipv4Addr,
    /// Address of `eth1`, the parent ENI, in [`Subnet::PODS`].
    pub parent_ip: Ipv4Addr,
}

/// A pod to be.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Lower-case letters, digits, `-`; unique in the lab.
    pub name: String,
    /// The node's name.
    pub node: String,
    /// Address, in [`Subnet::PODS`].
    pub ip: Ipv4Addr,
    /// VLAN id on the node's parent ENI. An allocator chooses its own.
    pub vlan: u16,
    /// Elastic IP, if the pod may reach and be reached from outside.
    pub eip: Option<Ipv4Addr>,
    /// Whether nginx serves in it (port 80).
    pub nginx: bool,
}

impl PodSpec {
    /// A pod in Kubernetes namespace `default`, without EIP and nginx.
    pub fn bare(name: &str, node: &str, ip: impl Into<Ipv4Addr>, vlan: u16) -> Self {
        let namespace = "default".into();
        Self { namespace, name: name.into(), node: node.into(), ip: ip.into(), vlan, eip: None, nginx: false }
    }
}

/// A virtual machine to be: a client in [`Subnet::NODES`].
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// Lower-case letters, digits, `-`; at most 10 characters; unique in the lab.
    pub name: String,
    /// Address, in [`Subnet::NODES`].
    pub ip: Ipv4Addr,
}

/// A listener of the ELB to be: one virtual address and port, and the pods behind it.
#[derive(Clone, Debug)]
pub struct VipSpec {
    /// The virtual address, in [`Subnet::NODES`].
    pub ip: Ipv4Addr,
    /// The virtual port.
    pub port: u16,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The port of the backends.
    pub target_port: u16,
    /// Names of the pods behind it, at most [`fabric_ebpf::BACKENDS`]; empty = all pods of the lab.
    pub backends: Vec<String>,
    /// Whether backends are checked by TCP connects to `target_port`; if not, they count as healthy.
    pub health_check: bool,
}

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Protocol {
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
}

impl Protocol {
    /// As the file source writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// Where the agents know their pods from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// A document for each node, which tests may change. The lab attaches the pods' sub-ENIs to the fabric itself.
    #[default]
    File,
    /// An allocator, which gets the pods' addresses, by static mode, from the fabric's VPC API. VLAN ids and MACs are
    /// those that it gives.
    Allocator {
        /// How long what is released rests, in whole seconds.
        cool_down: Duration,
    },
}

impl Source {
    /// An allocator with the default cool-down of 60 s.
    pub const ALLOCATOR: Self = Self::Allocator { cool_down: Duration::from_secs(60) };
}

/// How the agents use XDP on the parent ENIs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum XdpMode {
    /// Not at all.
    #[default]
    Off,
    /// Validate and drop early.
    Guard,
    /// Also deliver what it wins at.
    Redirect,
}

impl XdpMode {
    /// As the agent's configuration writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Guard => "guard",
            Self::Redirect => "redirect",
        }
    }
}

//! What the fabric's kernel program and its userspace share: the layout of its maps; and what surrounds every object of this crate.
//!
//! The same rules as for the datapath's own ABI: `#[repr(C)]`, padding spelled out and zero. Addresses and MACs are
//! in network order, all other integers (ports too) in the machine's.

#![no_std]

/// What an object has around its programs: a licence, as helpers are for GPL-compatible programs only, and a panic handler; on the
/// host, where there is nothing to run, a `main`.
#[macro_export]
macro_rules! frame {
    () => {
        #[cfg(target_arch = "bpf")]
        #[unsafe(no_mangle)]
        #[unsafe(link_section = "license")]
        static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

        #[cfg(target_arch = "bpf")]
        #[panic_handler]
        fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
            loop {}
        }

        #[cfg(not(target_arch = "bpf"))]
        fn main() {}
    };
}

/// The most backends a listener may have.
pub const BACKENDS: usize = 16;
/// The most listeners.
pub const LISTENERS: u32 = 64;

/// Where a NIC is: key of map `NICS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortVlan {
    /// Interface index of the fabric's end of the port.
    pub ifindex: u32,
    /// VLAN id; 0 = untagged.
    pub vid: u16,
    /// Zero.
    pub pad: u16,
}

/// A NIC or sub-ENI of the VPC: value of `NICS` (by place) and `ROUTES` (by address).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nic {
    /// Its place.
    pub at: PortVlan,
    /// Its only MAC.
    pub mac: [u8; 6],
    /// Zero.
    pub pad: [u8; 2],
    /// Its only address.
    pub ip: [u8; 4],
    /// Its elastic IP; all zero = none.
    pub eip: [u8; 4],
    /// See [`nic`].
    pub flags: u32,
}

/// Flags of a [`Nic`].
pub mod nic {
    /// The port to the outside network: it may send from any address that is not of the VPC.
    pub const OUTSIDE: u32 = 1;
    /// Its source check is off: the host behind it forwards for other addresses of the VPC.
    pub const FORWARDS: u32 = 2;
}

/// Key of `SERVICES`: a listener of the ELB.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ServiceKey {
    /// The virtual address.
    pub ip: [u8; 4],
    /// The virtual port.
    pub port: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
}

/// One end of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Addr {
    /// Address.
    pub ip: [u8; 4],
    /// Port.
    pub port: u16,
    /// Zero.
    pub pad: u16,
}

/// Value of `SERVICES`: the healthy backends.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// Index into `TURNS`, less than [`LISTENERS`].
    pub id: u32,
    /// How many of `backends` there are.
    pub count: u32,
    /// The port of all backends, for pinned clients.
    pub target_port: u32,
    /// The healthy backends.
    pub backends: [Addr; BACKENDS],
}

/// Key of `PINS`: a client whose flows to a VIP go to a chosen backend (value: its address).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PinKey {
    /// The client.
    pub client: [u8; 4],
    /// The virtual address.
    pub vip: [u8; 4],
}

/// A flow of the ELB, seen from the client: key of `ELB_FLOWS` with the VIP as `server` (value: the backend), and
/// of `ELB_RETURNS` with the backend as `server` (value: the VIP).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ElbKey {
    /// The client's end.
    pub client: Addr,
    /// The other end.
    pub server: Addr,
    /// IP protocol number.
    pub proto: u32,
}

/// Key of `COUNTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CountKey {
    /// Where the frame came from.
    pub at: PortVlan,
    /// A [`Kind`].
    pub kind: u32,
}

/// Key of `FLOW_LOG`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Where it crossed.
    pub at: PortVlan,
    /// Source.
    pub src: [u8; 4],
    /// Destination.
    pub dst: [u8; 4],
    /// Source port; the identifier for ICMP echo.
    pub sport: u16,
    /// Destination port; the type for ICMP.
    pub dport: u16,
    /// IP protocol number.
    pub proto: u8,
    /// 0 = from the NIC, 1 = to it.
    pub to_nic: u8,
    /// Zero.
    pub pad: [u8; 2],
}

/// Value of `FLOW_LOG`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowCount {
    /// Packets as on the wire.
    pub packets: u64,
    /// Bytes of the frames as they crossed (a GSO frame counts its headers once).
    pub bytes: u64,
}

const _: () = {
    assert!(size_of::<PortVlan>() == 8);
    assert!(size_of::<Nic>() == 28);
    assert!(size_of::<ServiceKey>() == 8);
    assert!(size_of::<Service>() == 12 + 8 * BACKENDS);
    assert!(size_of::<PinKey>() == 8);
    assert!(size_of::<ElbKey>() == 20);
    assert!(size_of::<CountKey>() == 12);
    assert!(size_of::<FlowKey>() == 24);
};

/// Ethertype of a frame that the gate gives back because security groups deny it, instead of IPv4's (a local experimental
/// one, IEEE 802).
pub const REFUSED: u16 = 0x88b5;

macro_rules! kinds {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $text:literal, $violation:literal;)+) => {
        /// Why the fabric did not forward a frame.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Kind {
            $($(#[doc = $doc])+ $name = $number,)+
        }

        impl Kind {
            /// All kinds.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// As tests and reports show it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }

            /// Whether the sender broke a rule of the VPC, as opposed to sending what has nowhere to go.
            pub const fn is_violation(self) -> bool {
                match self { $(Self::$name => $violation,)+ }
            }
        }
    };
}

kinds! {
    /// No NIC has this VLAN id on this port.
    UnknownVlan = 1, "unknown-vlan", true;
    /// A second tag, or one that is not 802.1Q.
    DoubleTag = 2, "double-tag", true;
    /// The source MAC is not the NIC's.
    SourceMac = 3, "source-mac", true;
    /// The source address is not the NIC's (from outside: one of the VPC).
    SourceIp = 4, "source-ip", true;
    /// ARP with a sender that is not the NIC.
    ArpSender = 5, "arp-sender", true;
    /// IPv4 to a MAC that is not the gateway's.
    DestinationMac = 6, "destination-mac", true;
    /// Neither IPv4 nor ARP, on a VLAN; or neither IPv4, IPv6 nor ARP.
    Ethertype = 7, "ethertype", true;
    /// Headers that contradict themselves or end early.
    Malformed = 8, "malformed", true;

    /// An address of the VPC that no NIC has.
    NoRoute = 32, "no-route", false;
    /// An address outside, and the sender has no EIP; or an EIP that nobody has.
    NoEip = 33, "no-eip", false;
    /// A VIP without a listener on this port.
    NoListener = 34, "no-listener", false;
    /// A listener without a healthy backend.
    NoBackend = 35, "no-backend", false;
    /// In the middle of a TCP connection that the ELB does not know.
    NoElbFlow = 36, "no-elb-flow", false;
    /// Broadcast or multicast.
    Multicast = 37, "multicast", false;
    /// IPv6 of an untagged NIC: the VPC has none.
    Ipv6 = 38, "ipv6", false;
    /// ARP that asks for nothing the VPC has, or answers what nobody asked.
    ArpIgnored = 39, "arp-ignored", false;
    /// A later fragment to a VIP.
    Fragment = 40, "fragment", false;
    /// The security groups of one of the ends deny it.
    SecurityGroup = 41, "security-group", false;
}

//! The memory of doors: which way a flow came in, so that its replies leave the same way.

#[cfg(not(feature = "next-abi"))]
use core::mem::offset_of;
use core::mem::size_of;

/// The way a packet enters or leaves a pod. Numbers are stored in maps: never renumber.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// The pod's VLAN on the parent ENI.
    Wire = 1,
    /// The fast path to another pod of this node.
    Local = 2,
    /// The node's own network stack.
    Host = 3,
}

impl Door {
    /// The door with this number.
    #[inline(always)]
    pub const fn from_u8(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Wire),
            2 => Some(Self::Local),
            3 => Some(Self::Host),
            _ => None,
        }
    }

    /// As users read it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Wire => "wire",
            Self::Local => "local",
            Self::Host => "host",
        }
    }
}

/// Why a flow is remembered. Numbers are stored in maps: never renumber.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A request reached the pod by the flow's door; the pod's replies follow it.
    Inbound = 1,
    /// The node's stack sent the pod's request out on the wire (kube-proxy had translated it); replies from the wire
    /// go back to the stack, which undoes the translation.
    HostForwarded = 2,
}

/// Key of map `FLOWS`: a 5-tuple seen from the pod. The pod's own address is implied by `id`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// IP protocol number.
    #[cfg(feature = "next-abi")]
    pub proto: u8,
    /// Zero.
    #[cfg(feature = "next-abi")]
    pub pad: [u8; 3],
    /// [`Endpoint::id`](super::Endpoint::id) of the pod.
    pub id: u32,
    /// IPv4 address of the other end.
    pub remote: [u8; 4],
    /// Port of the other end; the identifier for ICMP queries; 0 where the protocol has no ports.
    pub remote_port: u16,
    /// Port of the pod; the identifier for ICMP queries; 0 where the protocol has no ports.
    pub local_port: u16,
    /// IP protocol number.
    #[cfg(not(feature = "next-abi"))]
    pub proto: u8,
    /// Zero.
    #[cfg(not(feature = "next-abi"))]
    pub pad: [u8; 3],
}

const _: () = assert!(size_of::<FlowKey>() == 16);
#[cfg(not(feature = "next-abi"))]
const _: () = {
    assert!(offset_of!(FlowKey, remote_port) == 8);
    assert!(offset_of!(FlowKey, proto) == 12);
};

impl FlowKey {
    /// The key as the words that it is in memory. Written to memory field by field, LLVM calls a loop for the padding, and
    /// the kernel, which hashes words, has to wait for the bytes of one.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        let ([a, b], [c, d]) = (self.remote_port.to_ne_bytes(), self.local_port.to_ne_bytes());
        let ports = u32::from_ne_bytes([a, b, c, d]);
        let remote = u32::from_ne_bytes(self.remote);
        let proto = u32::from_ne_bytes([self.proto, 0, 0, 0]);
        if cfg!(feature = "next-abi") {
            [proto, self.id, remote, ports]
        } else {
            [self.id, remote, ports, proto]
        }
    }
}

/// Value of map `FLOWS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// When the flow was last known to live, in seconds of the monotonic clock, within [`Flow::REFRESH`]. Meaningful
    /// for protocols without a connection only.
    #[cfg(feature = "next-abi")]
    pub seen: u32,
    /// A [`Door`].
    pub door: u8,
    /// An [`Origin`].
    pub origin: u8,
    /// Zero.
    pub pad: [u8; 2],
    /// When the flow was last known to live, in seconds of the monotonic clock, within [`Flow::REFRESH`]. Meaningful
    /// for protocols without a connection only.
    #[cfg(not(feature = "next-abi"))]
    pub seen: u32,
}

const _: () = assert!(size_of::<Flow>() == 8);

impl Flow {
    /// A memory of a flow without a connection (all but TCP) is void after this many seconds of silence, the time
    /// that RFC 4787 (REQ-5) has translators keep theirs at the least, with a minute on top.
    pub const IDLE: u32 = 180;
    /// A memory is written again for its time stamp's sake when it is older than this many seconds.
    pub const REFRESH: u32 = 16;

    /// Whether the entry of a flow without a connection still stands at `now`, in seconds of the monotonic clock.
    #[inline(always)]
    pub const fn alive(&self, now: u32) -> bool {
        now.wrapping_sub(self.seen) <= Self::IDLE
    }
}

/// Key of map `FRAGS`: one fragmented datagram on its way (RFC 791: source, destination, protocol, identification).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// Source address.
    pub src: [u8; 4],
    /// Destination address.
    pub dst: [u8; 4],
    /// [`Endpoint::id`](super::Endpoint::id) of the pod that sends or receives it.
    pub id: u32,
    /// The identification field.
    pub ident: u16,
    /// IP protocol number.
    pub proto: u8,
    /// Zero.
    pub pad: u8,
}

const _: () = assert!(size_of::<FragmentKey>() == 16);

/// Value of map `FRAGS`: where the first fragment went.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// A [`Door`].
    pub door: u8,
    /// Zero.
    pub pad: [u8; 3],
    /// The [epoch](super::policy) in which the first fragment was judged.
    pub epoch: u32,
}

const _: () = assert!(size_of::<Fragment>() == 8);

impl Fragment {
    /// The way that later fragments take: what was judged by rules of another epoch is left to the wire.
    #[inline(always)]
    pub const fn door_in(&self, epoch: u32) -> Option<Door> {
        match Door::from_u8(self.door) {
            Some(Door::Local) if self.epoch != epoch => Some(Door::Wire),
            door => door,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_its_words() {
        let key = FlowKey {
            id: 0x0102_0304,
            remote: [5, 6, 7, 8],
            remote_port: 0x090a,
            local_port: 0x0b0c,
            proto: 6,
            pad: [0; 3],
        };
        // SAFETY: as long as each other, without padding.
        let bytes: [u32; 4] = unsafe { core::mem::transmute(key) };
        assert_eq!(key.words(), bytes);
    }
}

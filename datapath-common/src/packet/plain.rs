//! The packet that nearly all packets are: a whole IPv4 datagram without options that carries TCP or UDP.
//!
//! Its headers stand at fixed places, so they are read at once and cost a fraction of what the parsers for everything cost;
//! and addresses are nearly always all that decides, so what only a flow's memory and security groups ask for is read later.
//! What is not plain goes to those; what is plain reads the same by both (`tests::plain_agrees_with_the_parsers`).

use super::{
    Frame, IPV4, Plain,
    ipv4::{Ipv4, Part, TCP, UDP},
    l4::{self, L4, Role},
};

/// Where the fields begin that are read at once, in an untagged frame.
const START: usize = 6;
const ETHERNET: usize = 14;
const IPV4_LEN: u32 = 20;
const TCP_LEN: u32 = 20;
const UDP_LEN: u32 = 8;
/// Version 4, five words.
const VERSION_AND_LENGTH: u8 = 0x45;
/// "More fragments" and the offset: all but the bits "reserved" and "don't fragment".
const FRAGMENT: u16 = 0x3fff;

/// Bytes 6 to 42 of an untagged frame. From an offset of 6 on all fields stand at multiples of their size.
#[repr(C)]
#[derive(Clone, Copy)]
struct Start {
    src_mac: u32,
    src_mac_end: u16,
    ethertype: u16,
    version_and_length: u8,
    _service: u8,
    total_len: u16,
    _ident: u16,
    fragment: u16,
    _ttl: u8,
    proto: u8,
    _checksum: u16,
    src: u32,
    dst: u32,
    _ports: u32,
    _rest: u32,
}

// SAFETY: #[repr(C)], integers whose offsets are multiples of their sizes, no padding.
unsafe impl Plain for Start {}
const _: () = assert!(size_of::<Start>() == 36 && align_of::<Start>() == 4);

/// The first bytes of a frame, with the source MAC: eight of them LLVM would read as one number, and take apart again.
#[repr(C)]
#[derive(Clone, Copy)]
struct Macs {
    dst: u32,
    dst_end: u16,
    _src: u16,
    _src_end: u32,
}

// SAFETY: as above.
unsafe impl Plain for Macs {}
const _: () = assert!(size_of::<Macs>() == 12);

/// The rest of a TCP header, from byte 46 of an untagged frame on.
#[repr(C)]
#[derive(Clone, Copy)]
struct TcpRest {
    data_offset: u8,
    flags: u8,
    window: u16,
    checksum: u16,
    urgent: u16,
}

// SAFETY: as above.
unsafe impl Plain for TcpRest {}
const _: () = assert!(size_of::<TcpRest>() == 8);
const TCP_REST: usize = 46;
const IDENT: usize = 18;
const PORTS: usize = 34;

/// A plain packet: what nearly all decisions need of it. [`Packet::ip`] reads the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source MAC; without meaning in a tagged frame.
    pub src_mac: [u8; 6],
    /// Source address.
    pub src: [u8; 4],
    /// Destination address.
    pub dst: [u8; 4],
    /// Protocol number: TCP or UDP.
    pub proto: u8,
}

/// A source MAC: of bytes, for words cost the program of a pod more registers than they save.
#[inline(always)]
const fn mac(start: u32, end: u16) -> [u8; 6] {
    let ([a, b, c, d], [e, f]) = (start.to_ne_bytes(), end.to_ne_bytes());
    [a, b, c, d, e, f]
}

/// A destination MAC, in the two words that it is compared by. Of six bytes LLVM makes one number, and shifts and masks both
/// sides of each comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DstMac {
    start: u32,
    end: u16,
}

impl DstMac {
    /// That of a frame; `None` where it ends before.
    #[inline(always)]
    pub fn of<F: Frame + ?Sized>(frame: &F) -> Option<Self> {
        let macs: Macs = frame.load(0)?;
        Some(Self { start: macs.dst, end: macs.dst_end })
    }

    /// Whether it is this one.
    #[inline(always)]
    pub const fn is(self, mac: &[u8; 6]) -> bool {
        self.start == u32::from_ne_bytes([mac[0], mac[1], mac[2], mac[3]])
            && self.end == u16::from_ne_bytes([mac[4], mac[5]])
    }

    /// Whether it is of a group, the broadcast address included (IEEE 802, the first bit on the wire).
    #[inline(always)]
    pub const fn is_group(self) -> bool {
        self.start.to_ne_bytes()[0] & 1 != 0
    }
}

/// Reads a plain packet behind `TAG` bytes of VLAN tag inside the frame (0 or 4); `None` where it is anything else.
#[inline(always)]
pub fn parse<const TAG: usize, F: Frame + ?Sized>(frame: &F) -> Option<Packet> {
    let start: Start = frame.load(START + TAG)?;
    if start.ethertype != IPV4.to_be()
        || start.version_and_length != VERSION_AND_LENGTH
        || start.fragment & FRAGMENT.to_be() != 0
    {
        return None;
    }
    let least = match start.proto {
        TCP => IPV4_LEN + TCP_LEN,
        UDP => IPV4_LEN + UDP_LEN,
        _ => return None,
    };
    let total_len = u32::from(u16::from_be(start.total_len));
    if total_len < least || !frame.holds(total_len + (ETHERNET + TAG) as u32) {
        return None;
    }
    Some(Packet {
        src_mac: mac(start.src_mac, start.src_mac_end),
        src: start.src.to_ne_bytes(),
        dst: start.dst.to_ne_bytes(),
        proto: start.proto,
    })
}

impl Packet {
    /// Source and destination port, read from the same `frame`.
    #[inline(always)]
    pub fn ports<const TAG: usize, F: Frame + ?Sized>(&self, frame: &F) -> Option<(u16, u16)> {
        let [src, dst]: [u16; 2] = frame.load(PORTS + TAG)?;
        Some((u16::from_be(src), u16::from_be(dst)))
    }

    /// All that decisions may need, read from the same `frame`; `None` where the frame's first piece of memory ends before
    /// the TCP header does.
    #[inline(always)]
    pub fn ip<const TAG: usize, F: Frame + ?Sized>(&self, frame: &F) -> Option<Ipv4> {
        let (role, ends, header_len) = if self.proto == TCP {
            let tcp: TcpRest = frame.load(TCP_REST + TAG)?;
            (l4::tcp_role(tcp.flags), l4::tcp_ends(tcp.flags), u32::from(tcp.data_offset >> 4) * 4)
        } else {
            (Role::Either, 0, UDP_LEN)
        };
        let (src_port, dst_port) = self.ports::<TAG, F>(frame)?;
        let ident: u16 = frame.load(IDENT + TAG)?;
        Some(Ipv4 {
            src: self.src,
            dst: self.dst,
            proto: self.proto,
            ident: u16::from_be(ident),
            part: Part::Whole,
            header_len: IPV4_LEN,
            l4: L4 { src_port, dst_port, proto: self.proto, header_len, role, ends, ..L4::NONE },
        })
    }
}

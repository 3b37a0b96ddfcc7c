//! The packet that nearly all packets are: a whole IPv4 datagram without options that carries TCP or UDP.
//!
//! Its headers stand at fixed places, so they are read at once and cost a fraction of what the parsers for everything cost.
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
    service: u8,
    total_len: u16,
    ident: u16,
    fragment: u16,
    ttl: u8,
    proto: u8,
    checksum: u16,
    src: u32,
    dst: u32,
    src_port: u16,
    dst_port: u16,
    rest: u32,
}

// SAFETY: #[repr(C)], integers whose offsets are multiples of their sizes, no padding.
unsafe impl Plain for Start {}
const _: () = assert!(size_of::<Start>() == 36 && align_of::<Start>() == 4);

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

/// A plain packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source MAC; without meaning in a tagged frame.
    pub src_mac: [u8; 6],
    /// The packet.
    pub ip: Ipv4,
}

#[inline(always)]
const fn mac(start: u32, end: u16) -> [u8; 6] {
    let ([a, b, c, d], [e, f]) = (start.to_ne_bytes(), end.to_ne_bytes());
    [a, b, c, d, e, f]
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
    let total_len = u32::from(u16::from_be(start.total_len));
    if frame.len() < total_len + (ETHERNET + TAG) as u32 {
        return None;
    }
    let (role, ends, header_len) = match start.proto {
        TCP => {
            let tcp: TcpRest = frame.load(TCP_REST + TAG)?;
            (l4::tcp_role(tcp.flags), l4::tcp_ends(tcp.flags), u32::from(tcp.data_offset >> 4) * 4)
        }
        UDP => (Role::Either, 0, 8),
        _ => return None,
    };
    let least = if start.proto == TCP { IPV4_LEN + 20 } else { IPV4_LEN + 8 };
    if total_len < least {
        return None;
    }
    Some(Packet {
        src_mac: mac(start.src_mac, start.src_mac_end),
        ip: Ipv4 {
            src: start.src.to_ne_bytes(),
            dst: start.dst.to_ne_bytes(),
            proto: start.proto,
            ident: u16::from_be(start.ident),
            part: Part::Whole,
            header_len: IPV4_LEN,
            l4: L4 {
                src_port: u16::from_be(start.src_port),
                dst_port: u16::from_be(start.dst_port),
                proto: start.proto,
                header_len,
                role,
                ends,
                ..L4::NONE
            },
        },
    })
}

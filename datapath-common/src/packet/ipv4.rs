//! IPv4 (RFC 791).

use network_types::ip::Ipv4Hdr;

use super::{
    Frame,
    l4::{self, L4},
};
use crate::abi::Outcome;

/// Protocol number of ICMP.
pub const ICMP: u8 = 1;
/// Protocol number of TCP.
pub const TCP: u8 = 6;
/// Protocol number of UDP.
pub const UDP: u8 = 17;

const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET_MASK: u16 = 0x1fff;

/// Which part of a datagram a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// The first fragment, which carries the ports.
    First,
    /// Another fragment, without ports.
    Later,
}

/// An IPv4 packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4 {
    /// Source address.
    pub src: [u8; 4],
    /// Destination address.
    pub dst: [u8; 4],
    /// Protocol number.
    pub proto: u8,
    /// The identification field.
    pub ident: u16,
    /// Which part of the datagram this is.
    pub part: Part,
    /// Length of the IPv4 header in bytes.
    pub header_len: u32,
    /// Ports and what else decisions need of the next header; all zero for [`Part::Later`].
    pub l4: L4,
}

/// Parses the IPv4 packet at `offset`.
///
/// # Errors
///
/// [`Outcome::Truncated`] or [`Outcome::BadIpv4Header`].
#[inline(always)]
pub fn parse<F: Frame + ?Sized>(frame: &F, offset: usize) -> Result<Ipv4, Outcome> {
    let header: Ipv4Hdr = frame.load(offset).ok_or(Outcome::Truncated)?;
    let header_len = header_len(&header).ok_or(Outcome::BadIpv4Header)?;
    let total_len = usize::from(u16::from_be_bytes(header.tot_len));
    // A GSO packet is longer than the field can say at times (BIG TCP) and says 0 then.
    let too_long_to_say = total_len == 0 && frame.len() as usize > offset + usize::from(u16::MAX);
    if !too_long_to_say && (total_len < header_len || offset + total_len > frame.len() as usize) {
        return Err(Outcome::BadIpv4Header);
    }
    let fragment = u16::from_be_bytes(header.frags);
    let part = match (fragment & OFFSET_MASK, fragment & MORE_FRAGMENTS) {
        (0, 0) => Part::Whole,
        (0, _) => Part::First,
        _ => Part::Later,
    };
    let l4 = match part {
        Part::Later => L4::NONE,
        Part::Whole | Part::First => {
            // What follows the packet is the padding of a short Ethernet frame.
            let payload = if too_long_to_say { usize::MAX } else { total_len - header_len };
            if payload < l4::min_len(header.proto) {
                return Err(Outcome::Truncated);
            }
            l4::parse(frame, offset + header_len, header.proto)?
        }
    };
    Ok(Ipv4 {
        src: header.src_addr,
        dst: header.dst_addr,
        proto: header.proto,
        ident: u16::from_be_bytes(header.id),
        part,
        header_len: header_len as u32,
        l4,
    })
}

/// The header's length in bytes, 20 to 60; `None` when version or length is wrong.
#[inline(always)]
pub(super) const fn header_len(header: &Ipv4Hdr) -> Option<usize> {
    let words = header.vihl & 0x0f;
    if header.vihl >> 4 == 4 && words >= 5 { Some(words as usize * 4) } else { None }
}

/// Whether the address is of class D or E (multicast, reserved, limited broadcast): no single host has it.
#[inline(always)]
pub const fn is_multicast(address: [u8; 4]) -> bool {
    address[0] >= 224
}

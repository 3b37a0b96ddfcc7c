//! From bytes to plain values, one header a file. Nothing here decides; nothing outside reads packet bytes.
//!
//! The link header comes first and alone ([`link::parse`]): a frame that is not ours is left alone before anything else
//! of it has been looked at.

pub mod arp;
pub mod ipv4;
pub mod l4;
pub mod link;
pub mod plain;
#[cfg(test)]
mod tests;

use crate::abi::Outcome;

/// A frame's bytes, from the Ethernet header on.
#[expect(clippy::len_without_is_empty, reason = "nobody asks for that: whoever reads a header learns it")]
pub trait Frame {
    /// Reads a header at `offset`; `None` where the frame ends before it does.
    fn load<T: Plain>(&self, offset: usize) -> Option<T>;
    /// The frame's length in bytes.
    fn len(&self) -> u32;
    /// Whether the frame is at least so many bytes long.
    #[inline(always)]
    fn holds(&self, len: u32) -> bool {
        self.len() >= len
    }
}

/// A type that any bytes are a valid value of.
///
/// # Safety
///
/// No padding, no invalid bit pattern.
pub unsafe trait Plain: Copy {}

// SAFETY: arrays of bytes.
unsafe impl<const N: usize> Plain for [u8; N] {}
// SAFETY: an integer.
unsafe impl Plain for u16 {}
// SAFETY: an integer.
unsafe impl Plain for u32 {}
// SAFETY: arrays of integers.
unsafe impl<const N: usize> Plain for [u16; N] {}
// SAFETY: arrays of integers.
unsafe impl<const N: usize> Plain for [u32; N] {}
// SAFETY: arrays of arrays of bytes.
unsafe impl<const N: usize, const M: usize> Plain for [[u8; N]; M] {}
// SAFETY: #[repr(C)], two arrays of 6 bytes and a u16 at offset 12.
unsafe impl Plain for network_types::eth::EthHdr {}
// SAFETY: #[repr(C)], an array of 2 bytes and a u16 at offset 2.
unsafe impl Plain for network_types::vlan::VlanHdr {}
// SAFETY: #[repr(C)], bytes and arrays of bytes only.
unsafe impl Plain for network_types::arp::ArpHdr {}
// SAFETY: #[repr(C)], bytes and arrays of bytes only.
unsafe impl Plain for network_types::ip::Ipv4Hdr {}

impl Frame for [u8] {
    fn load<T: Plain>(&self, offset: usize) -> Option<T> {
        let bytes = self.get(offset..)?.get(..size_of::<T>())?;
        // SAFETY: `bytes` is as long as T, T takes any bytes, and the read is unaligned.
        Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }

    fn len(&self) -> u32 {
        <[u8]>::len(self) as u32
    }
}

/// Ethertype of IPv4 (RFC 894).
pub const IPV4: u16 = 0x0800;
/// Ethertype of ARP (RFC 826).
pub const ARP: u16 = 0x0806;
/// Ethertype of IPv6 (RFC 2464).
pub const IPV6: u16 = 0x86dd;

/// Why a frame that is neither IPv4 nor ARP is dropped: IPv6 with its discovery (RFC 4861: ICMPv6 types 133 to 137, which
/// follow the IPv6 header at once) told from the rest, or an unknown ethertype.
#[inline(always)]
pub fn refuse<F: Frame + ?Sized>(frame: &F, ethertype: u16, offset: usize) -> Outcome {
    const NEXT_HEADER: usize = 6;
    const HEADER_LEN: usize = 40;
    const ICMPV6: u8 = 58;
    if ethertype != IPV6 {
        return Outcome::UnknownEthertype;
    }
    match frame.load::<[u8; HEADER_LEN + 4]>(offset) {
        Some(header) if header[NEXT_HEADER] == ICMPV6 && (133..=137).contains(&header[HEADER_LEN]) => {
            Outcome::Ipv6Discovery
        }
        _ => Outcome::Ipv6,
    }
}

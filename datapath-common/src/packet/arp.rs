//! ARP for IPv4 over Ethernet (RFC 826).

use network_types::arp::ArpHdr;

use super::Frame;
use crate::abi::Outcome;

/// Operation code of a request.
pub const REQUEST: u16 = 1;
/// Operation code of a reply.
pub const REPLY: u16 = 2;

/// Hardware type Ethernet, protocol type IPv4, their address lengths: the first six bytes of every packet accepted.
const ETHERNET_IPV4: [u8; 6] = [0, 1, 0x08, 0x00, 6, 4];

/// An ARP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// [`REQUEST`] or [`REPLY`].
    pub operation: u16,
    /// The sender's MAC.
    pub sender_mac: [u8; 6],
    /// The sender's address.
    pub sender: [u8; 4],
    /// The address asked for, or of the one who asked.
    pub target: [u8; 4],
}

/// Parses the ARP packet at `offset`.
///
/// # Errors
///
/// [`Outcome::Truncated`], or [`Outcome::ArpSpoof`] for other hardware, protocols or operations.
#[inline(always)]
pub fn parse<F: Frame + ?Sized>(frame: &F, offset: usize) -> Result<Arp, Outcome> {
    let arp: ArpHdr = frame.load(offset).ok_or(Outcome::Truncated)?;
    let operation = u16::from_be_bytes(arp.oper);
    let kind = [arp.htype[0], arp.htype[1], arp.ptype[0], arp.ptype[1], arp.hlen, arp.plen];
    if kind != ETHERNET_IPV4 || !(operation == REQUEST || operation == REPLY) {
        return Err(Outcome::ArpSpoof);
    }
    Ok(Arp { operation, sender_mac: arp.sha, sender: arp.spa, target: arp.tpa })
}

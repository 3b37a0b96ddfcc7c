//! Ethernet (IEEE 802.3) and 802.1Q.

use network_types::{eth::EthHdr, vlan::VlanHdr};

use super::Frame;
use crate::abi::Outcome;

/// Tag protocol of 802.1Q.
pub const TPID_8021Q: u16 = 0x8100;
/// Tag protocol of 802.1ad.
pub const TPID_8021AD: u16 = 0x88a8;
/// The bits of the tag control information that are the VLAN id.
pub const VID: u16 = 0x0fff;
/// Length of the link header of a frame without a tag inside, in bytes.
pub const UNTAGGED_LEN: usize = size_of::<EthHdr>();
/// The broadcast MAC.
pub const BROADCAST: [u8; 6] = [0xff; 6];

/// A VLAN tag that the kernel keeps beside the frame (`skb->vlan_proto`, `skb->vlan_tci`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Tag protocol.
    pub tpid: u16,
    /// Priority (3 bits), drop eligible (1 bit), VLAN id (12 bits).
    pub tci: u16,
}

/// The link header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Destination MAC.
    pub dst: [u8; 6],
    /// Source MAC.
    pub src: [u8; 6],
    /// VLAN id; 0 = untagged, or tagged for its priority only (IEEE 802.1Q, table 9-2).
    pub vid: u16,
    /// Whether there is a tag at all, be its VLAN id 0.
    pub tagged: bool,
    /// What follows.
    pub ethertype: u16,
    /// Where it follows, in bytes from the start of the frame: 14, or 18 with a tag inside the frame.
    pub header_len: usize,
}

impl Link {
    /// Whether the frame goes to everybody.
    pub fn is_broadcast(&self) -> bool {
        self.dst == BROADCAST
    }
}

/// Parses MACs, tag and ethertype. A tag may stand beside the frame, as tc programs see it, or inside, as XDP programs
/// see it; priority bits are masked off.
///
/// # Errors
///
/// [`Outcome::Truncated`], or [`Outcome::DoubleTag`] for an 802.1ad tag or a second tag.
#[inline(always)]
pub fn parse<F: Frame + ?Sized>(frame: &F, tag: Option<Tag>) -> Result<Link, Outcome> {
    let eth: EthHdr = frame.load(0).ok_or(Outcome::Truncated)?;
    let outer = u16::from_be(eth.ether_type);
    let mut link = Link {
        dst: eth.dst_addr,
        src: eth.src_addr,
        vid: 0,
        tagged: false,
        ethertype: outer,
        header_len: size_of::<EthHdr>(),
    };
    if let Some(tag) = tag {
        if tag.tpid == TPID_8021AD || is_tag(outer) {
            return Err(Outcome::DoubleTag);
        }
        link.tagged = true;
        link.vid = tag.tci & VID;
    } else if outer == TPID_8021AD {
        return Err(Outcome::DoubleTag);
    } else if outer == TPID_8021Q {
        let vlan: VlanHdr = frame.load(link.header_len).ok_or(Outcome::Truncated)?;
        link.tagged = true;
        link.vid = u16::from_be_bytes(vlan.tci) & VID;
        link.ethertype = u16::from_be(vlan.ether_type);
        link.header_len = size_of::<EthHdr>() + size_of::<VlanHdr>();
        if is_tag(link.ethertype) {
            return Err(Outcome::DoubleTag);
        }
    }
    Ok(link)
}

#[inline(always)]
const fn is_tag(ethertype: u16) -> bool {
    ethertype == TPID_8021Q || ethertype == TPID_8021AD
}

//! What decisions need of TCP (RFC 9293), UDP (RFC 768) and ICMP (RFC 792).

use network_types::ip::Ipv4Hdr;

use super::{
    Frame,
    ipv4::{self, ICMP, TCP, UDP},
};
use crate::abi::Outcome;

/// ICMP type of an echo reply.
pub const ECHO_REPLY: u8 = 0;
/// ICMP type of a redirect.
pub const REDIRECT: u8 = 5;
/// ICMP type of an echo request.
pub const ECHO_REQUEST: u8 = 8;
/// ICMP type of a router advertisement (RFC 1256).
pub const ROUTER_ADVERTISEMENT: u8 = 9;

const TCP_DATA_OFFSET: usize = 12;
const TCP_FLAGS: usize = 13;
/// TCP flag: the sender has no more to send.
pub const FIN: u8 = 0x01;
/// TCP flag: the connection is void.
pub const RST: u8 = 0x04;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const SYN_ACK: u8 = SYN | ACK;

/// The transport header. For ICMP errors, ports and protocol are those of the packet that the error is about, turned
/// round: as if the one who reports were its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L4 {
    /// Source port; the identifier of ICMP queries; 0 where there is none.
    pub src_port: u16,
    /// Destination port; the identifier of ICMP queries; 0 where there is none.
    pub dst_port: u16,
    /// The protocol that the ports belong to.
    pub proto: u8,
    /// ICMP type; 0 for other protocols.
    pub icmp_type: u8,
    /// ICMP code; 0 for other protocols.
    pub icmp_code: u8,
    /// TCP's [`FIN`] and [`RST`], as far as they are set; 0 for other protocols.
    pub ends: u8,
    /// Length of the TCP or UDP header in bytes; 0 for other protocols.
    pub header_len: u32,
    /// What the packet is to its flow.
    pub role: Role,
    /// Of ICMP errors: where the packet that the error is about was going. Routers report, too.
    pub about: [u8; 4],
    /// Of ICMP errors: who had sent that packet.
    pub quoted_src: [u8; 4],
    /// Of ICMP errors about ICMP: the type of that packet.
    pub quoted_type: u8,
}

/// What a packet is to the flow it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It opens the flow: a SYN without ACK.
    Opens,
    /// It may open the flow or continue it: protocols without connections.
    Either,
    /// It is the first answer: a SYN with ACK.
    Answers,
    /// It continues the flow.
    Continues,
    /// It reports an error about the flow.
    Reports,
}

impl L4 {
    /// No transport header.
    pub const NONE: Self = Self {
        src_port: 0,
        dst_port: 0,
        proto: 0,
        icmp_type: 0,
        icmp_code: 0,
        ends: 0,
        header_len: 0,
        role: Role::Continues,
        about: [0; 4],
        quoted_src: [0; 4],
        quoted_type: 0,
    };
}

/// The least that a packet of this protocol carries, in bytes.
#[inline(always)]
pub(super) const fn min_len(proto: u8) -> usize {
    match proto {
        TCP => 20,
        UDP | ICMP => 8,
        _ => 0,
    }
}

/// Parses the transport header at `offset`, where the packet has [`min_len`] bytes.
///
/// # Errors
///
/// [`Outcome::Truncated`].
#[inline(always)]
pub(super) fn parse<F: Frame + ?Sized>(frame: &F, offset: usize, proto: u8) -> Result<L4, Outcome> {
    match proto {
        TCP => {
            let header: [u8; 20] = frame.load(offset).ok_or(Outcome::Truncated)?;
            let role = tcp_role(header[TCP_FLAGS]);
            let header_len = u32::from(header[TCP_DATA_OFFSET] >> 4) * 4;
            let ends = tcp_ends(header[TCP_FLAGS]);
            Ok(L4 { role, ends, header_len, ..ports([header[0], header[1], header[2], header[3]], proto) })
        }
        UDP => {
            let header: [u8; 8] = frame.load(offset).ok_or(Outcome::Truncated)?;
            Ok(L4 {
                role: Role::Either,
                header_len: 8,
                ..ports([header[0], header[1], header[2], header[3]], proto)
            })
        }
        ICMP => icmp(frame, offset),
        _ => Ok(L4 { proto, role: Role::Either, ..L4::NONE }),
    }
}

/// What a TCP segment with these flags is to its flow.
#[inline(always)]
pub(super) const fn tcp_role(flags: u8) -> Role {
    match flags & (SYN | ACK) {
        SYN => Role::Opens,
        SYN_ACK => Role::Answers,
        _ => Role::Continues,
    }
}

/// FIN and RST of these flags.
#[inline(always)]
pub(super) const fn tcp_ends(flags: u8) -> u8 {
    flags & (FIN | RST)
}

#[inline(always)]
fn icmp<F: Frame + ?Sized>(frame: &F, offset: usize) -> Result<L4, Outcome> {
    let header: [u8; 8] = frame.load(offset).ok_or(Outcome::Truncated)?;
    let (icmp_type, icmp_code) = (header[0], header[1]);
    let identifier = u16::from_be_bytes([header[4], header[5]]);
    match icmp_type {
        // Destination unreachable, source quench, time exceeded, parameter problem: the packet's own header follows.
        3 | 4 | 11 | 12 => {
            Ok(L4 { icmp_type, icmp_code, role: Role::Reports, ..reported(frame, offset + header.len()) })
        }
        // Echo, timestamp, information: both directions carry the same identifier.
        ECHO_REPLY | ECHO_REQUEST | 13..=16 => Ok(L4 {
            src_port: identifier,
            dst_port: identifier,
            proto: ICMP,
            icmp_type,
            icmp_code,
            role: Role::Either,
            ..L4::NONE
        }),
        _ => Ok(L4 { proto: ICMP, icmp_type, icmp_code, role: Role::Either, ..L4::NONE }),
    }
}

/// The flow that an ICMP error is about, from the header it quotes; ports stay 0 where that is cut short.
#[inline(always)]
fn reported<F: Frame + ?Sized>(frame: &F, offset: usize) -> L4 {
    let Some(inner) = frame.load::<Ipv4Hdr>(offset) else { return L4::NONE };
    let Some(len) = ipv4::header_len(&inner) else { return L4::NONE };
    let Some(start) = frame.load::<[u8; 8]>(offset + len) else { return L4::NONE };
    let l4 = match inner.proto {
        TCP | UDP => ports([start[2], start[3], start[0], start[1]], inner.proto),
        ICMP => L4 { quoted_type: start[0], ..ports([start[4], start[5], start[4], start[5]], ICMP) },
        proto => L4 { proto, ..L4::NONE },
    };
    L4 { about: inner.dst_addr, quoted_src: inner.src_addr, ..l4 }
}

#[inline(always)]
const fn ports(bytes: [u8; 4], proto: u8) -> L4 {
    L4 {
        src_port: u16::from_be_bytes([bytes[0], bytes[1]]),
        dst_port: u16::from_be_bytes([bytes[2], bytes[3]]),
        proto,
        ..L4::NONE
    }
}

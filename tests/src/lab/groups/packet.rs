//! What judging needs of an IPv4 packet, read from its bytes. The lab's own reading, as [`raw`](crate::lab::raw) is its own
//! writing: a mistake in the datapath's does not hide in it.

use std::{fmt, net::Ipv4Addr};

use crate::lab::raw::checksum;

/// TCP flags, as in the header.
pub mod flag {
    /// No more data.
    pub const FIN: u8 = 0x01;
    /// Opens.
    pub const SYN: u8 = 0x02;
    /// Ends at once.
    pub const RST: u8 = 0x04;
    /// Acknowledges.
    pub const ACK: u8 = 0x10;
}

/// ICMP.
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// ICMP for IPv6.
pub const ICMPV6: u8 = 58;

/// An IPv4 packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Source.
    pub src: Ipv4Addr,
    /// Destination.
    pub dst: Ipv4Addr,
    /// IP protocol number.
    pub proto: u8,
    /// Identification, which all fragments of a datagram share.
    pub ident: u16,
    /// Which part of a datagram.
    pub part: Part,
    /// What the transport header says; of a later fragment [`Transport::None`].
    pub transport: Transport,
}

/// Which part of a datagram a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// The first fragment.
    First,
    /// A fragment without the transport header.
    Later,
}

/// What the transport header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp {
        /// Source port.
        src: u16,
        /// Destination port.
        dst: u16,
        /// See [`flag`].
        flags: u8,
    },
    /// UDP.
    Udp {
        /// Source port.
        src: u16,
        /// Destination port.
        dst: u16,
    },
    /// ICMP, for IPv6 too.
    Icmp {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// The identifier of queries and answers; of others, what stands there.
        ident: u16,
        /// What an error of ICMP quotes, where it can be read.
        quote: Option<Quote>,
    },
    /// Nothing that is read: another protocol, or no header in this fragment.
    None,
}

/// The packet that an ICMP error quotes, as far as it does: the IP header and eight bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quote {
    /// Source.
    pub src: Ipv4Addr,
    /// Destination.
    pub dst: Ipv4Addr,
    /// IP protocol number.
    pub proto: u8,
    /// The first eight bytes behind the IP header, unless it quotes a later fragment.
    pub start: Option<[u8; 8]>,
}

impl Packet {
    /// Reads a packet from the IP header on. What follows the packet (padding) is not looked at.
    ///
    /// `None`: it is no IPv4 packet, or its headers end early.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let (header, body) = split(bytes)?;
        let body = body.get(..usize::from(header.total_len).checked_sub(header.len)?)?;
        let transport = match header.part {
            Part::Later => Transport::None,
            _ => transport(header.proto, body)?,
        };
        let Header { src, dst, proto, ident, part, .. } = header;
        Some(Self { src, dst, proto, ident, part, transport })
    }
}

impl Packet {
    /// Writes the packet, from the IP header on, with so many bytes behind its headers.
    pub fn write(&self, more: u16) -> Vec<u8> {
        let mut body = match self.transport {
            Transport::Tcp { src, dst, flags } => {
                let ports = [src.to_be_bytes(), dst.to_be_bytes()].concat();
                [&ports[..], &[0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]].concat()
            }
            Transport::Udp { src, dst } => {
                [src.to_be_bytes(), dst.to_be_bytes(), (8 + more).to_be_bytes(), [0; 2]].concat()
            }
            Transport::Icmp { kind, code, ident, quote } => {
                let [high, low] = ident.to_be_bytes();
                let mut message = vec![kind, code, 0, 0, high, low, 0, 0];
                if let Some(quote) = quote {
                    message.extend(quote.write());
                }
                message
            }
            Transport::None => vec![0x20, 0, 0x08, 0, 0, 0, 0, 0],
        };
        body.resize(body.len() + usize::from(more), 0x5a);
        let checksum_at = match self.transport {
            Transport::Tcp { .. } => Some((16, true)),
            Transport::Udp { .. } => Some((6, true)),
            Transport::Icmp { .. } => Some((2, false)),
            Transport::None => None,
        };
        if let (Some((at, pseudo)), Part::Whole) = (checksum_at, self.part) {
            let [high, low] = (body.len() as u16).to_be_bytes();
            let ends = [self.src.octets(), self.dst.octets(), [0, self.proto, high, low]].concat();
            let sum = checksum(&[if pseudo { &ends } else { &[] }, &body]);
            body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        let fragment = match self.part {
            Part::Whole => 0,
            Part::First => 0x2000,
            Part::Later => 185,
        };
        let mut packet = header(self.src, self.dst, self.proto, (self.ident, fragment), body.len());
        packet.extend(body);
        packet
    }
}

impl Quote {
    fn write(&self) -> Vec<u8> {
        let fragment = if self.start.is_some() { 0 } else { 185 };
        let mut packet = header(self.src, self.dst, self.proto, (1, fragment), 8);
        packet.extend(self.start.unwrap_or_default());
        packet
    }
}

fn header(src: Ipv4Addr, dst: Ipv4Addr, proto: u8, (ident, fragment): (u16, u16), body: usize) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    for word in [20 + body as u16, ident, fragment] {
        header.extend(word.to_be_bytes());
    }
    header.extend([64, proto, 0, 0]);
    header.extend([src.octets(), dst.octets()].concat());
    let sum = checksum(&[&header]);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header
}

struct Header {
    src: Ipv4Addr,
    dst: Ipv4Addr,
    proto: u8,
    ident: u16,
    part: Part,
    len: usize,
    total_len: u16,
}

/// The IP header, and what follows it.
fn split(bytes: &[u8]) -> Option<(Header, &[u8])> {
    let fixed: &[u8; 20] = bytes.first_chunk()?;
    let len = usize::from(fixed[0] & 0xf) * 4;
    if fixed[0] >> 4 != 4 || len < 20 {
        return None;
    }
    let fragment = u16::from_be_bytes([fixed[6], fixed[7]]);
    let part = match (fragment & 0x1fff, fragment & 0x2000) {
        (0, 0) => Part::Whole,
        (0, _) => Part::First,
        _ => Part::Later,
    };
    let header = Header {
        src: Ipv4Addr::new(fixed[12], fixed[13], fixed[14], fixed[15]),
        dst: Ipv4Addr::new(fixed[16], fixed[17], fixed[18], fixed[19]),
        proto: fixed[9],
        ident: u16::from_be_bytes([fixed[4], fixed[5]]),
        part,
        len,
        total_len: u16::from_be_bytes([fixed[2], fixed[3]]),
    };
    Some((header, bytes.get(len..)?))
}

fn transport(proto: u8, body: &[u8]) -> Option<Transport> {
    let word = |at: usize| Some(u16::from_be_bytes([*body.get(at)?, *body.get(at + 1)?]));
    Some(match proto {
        TCP => Transport::Tcp { src: word(0)?, dst: word(2)?, flags: *body.get(13)? },
        UDP => Transport::Udp { src: word(0)?, dst: word(2)? },
        ICMP | ICMPV6 => {
            let kind = *body.first()?;
            let quote = if proto == ICMP && is_error(kind) { quote(body.get(8..)?) } else { None };
            Transport::Icmp { kind, code: *body.get(1)?, ident: word(4)?, quote }
        }
        _ => Transport::None,
    })
}

/// Whether messages of this ICMP type quote a packet: unreachable, source quench, time exceeded, parameter problem.
const fn is_error(kind: u8) -> bool {
    matches!(kind, 3 | 4 | 11 | 12)
}

fn quote(bytes: &[u8]) -> Option<Quote> {
    let (Header { src, dst, proto, part, .. }, body) = split(bytes)?;
    let start = if part == Part::Later { None } else { body.first_chunk().copied() };
    Some(Quote { src, dst, proto, start })
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { src, dst, proto, ident, part, .. } = self;
        match self.transport {
            Transport::Tcp { src: sport, dst: dport, flags } => {
                write!(f, "tcp {src}:{sport} > {dst}:{dport} ")?;
                let names = [(flag::SYN, 'S'), (flag::ACK, 'A'), (flag::FIN, 'F'), (flag::RST, 'R')];
                names
                    .iter()
                    .filter(|(bit, _)| flags & bit != 0)
                    .try_for_each(|(_, name)| write!(f, "{name}"))?;
            }
            Transport::Udp { src: sport, dst: dport } => write!(f, "udp {src}:{sport} > {dst}:{dport}")?,
            Transport::Icmp { kind, code, ident, quote } => {
                write!(f, "icmp {src} > {dst} type {kind} code {code} id {ident}")?;
                if let Some(Quote { src, dst, proto, start }) = quote {
                    write!(f, " about protocol {proto} {src} > {dst}")?;
                    if let Some(start) = start {
                        write!(f, " {start:02x?}")?;
                    }
                }
            }
            Transport::None => write!(f, "protocol {proto} {src} > {dst}")?,
        }
        match part {
            Part::Whole => Ok(()),
            Part::First => write!(f, ", first fragment of {ident}"),
            Part::Later => write!(f, ", later fragment of {ident}"),
        }
    }
}

impl fmt::Debug for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

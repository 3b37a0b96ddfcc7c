//! A packet builder. It shares nothing with the parsers that it feeds.

use std::{vec, vec::Vec};

/// TCP flag SYN.
pub const SYN: u8 = 0x02;
/// TCP flags SYN and ACK.
pub const SYN_ACK: u8 = 0x12;
/// TCP flag ACK.
pub const ACK: u8 = 0x10;

/// A frame in the making: link header, tags, one packet.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Destination MAC.
    pub dst_mac: [u8; 6],
    /// Source MAC.
    pub src_mac: [u8; 6],
    /// Tags, from the outside in: tag protocol and tag control information.
    pub tags: Vec<(u16, u16)>,
    /// What follows the tags.
    pub ethertype: u16,
    /// The IPv4 header, if there is one.
    pub ip: Option<Ip>,
    /// What follows the IPv4 header, or the link header without one.
    pub rest: Vec<u8>,
}

/// An IPv4 header in the making.
#[derive(Clone, Debug)]
pub struct Ip {
    /// Source address.
    pub src: [u8; 4],
    /// Destination address.
    pub dst: [u8; 4],
    /// Protocol number.
    pub proto: u8,
    /// Identification.
    pub ident: u16,
    /// Flags and fragment offset.
    pub fragment: u16,
    /// Options; the length in bytes is a multiple of 4 up to 40.
    pub options: Vec<u8>,
    /// Version and header length, if other than they should be.
    pub version_and_length: Option<u8>,
    /// The total length, if other than it should be.
    pub total_len: Option<u16>,
}

/// An address with a port.
pub type Socket = ([u8; 4], u16);

impl Packet {
    /// Anything.
    pub fn raw(ethertype: u16, rest: &[u8]) -> Self {
        Self { dst_mac: [0; 6], src_mac: [0; 6], tags: vec![], ethertype, ip: None, rest: rest.to_vec() }
    }

    /// IPv4 with any protocol.
    pub fn ipv4(src: [u8; 4], dst: [u8; 4], proto: u8, rest: &[u8]) -> Self {
        let ip = Ip {
            src,
            dst,
            proto,
            ident: 1,
            fragment: 0,
            options: vec![],
            version_and_length: None,
            total_len: None,
        };
        Self { ip: Some(ip), ..Self::raw(0x0800, rest) }
    }

    /// TCP, without payload.
    pub fn tcp(src: Socket, dst: Socket, flags: u8) -> Self {
        let mut header = ports(src.1, dst.1);
        header.extend([0, 0, 0, 1, 0, 0, 0, 0, 5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
        Self::ipv4(src.0, dst.0, 6, &header)
    }

    /// UDP, without payload.
    pub fn udp(src: Socket, dst: Socket) -> Self {
        let mut header = ports(src.1, dst.1);
        header.extend([0, 8, 0, 0]);
        Self::ipv4(src.0, dst.0, 17, &header)
    }

    /// ICMP with an identifier: type 8 asks for an echo, type 0 is one.
    pub fn icmp(icmp_type: u8, src: [u8; 4], dst: [u8; 4], identifier: u16) -> Self {
        let [high, low] = identifier.to_be_bytes();
        Self::ipv4(src, dst, 1, &[icmp_type, 0, 0, 0, high, low, 0, 1])
    }

    /// An ICMP error about a packet, of which it quotes all.
    pub fn icmp_error(icmp_type: u8, src: [u8; 4], dst: [u8; 4], about: &Self) -> Self {
        let mut rest = vec![icmp_type, 1, 0, 0, 0, 0, 0, 0];
        rest.extend(about.ip_bytes());
        Self::ipv4(src, dst, 1, &rest)
    }

    /// ARP for IPv4 over Ethernet.
    pub fn arp(operation: u16, sender_mac: [u8; 6], sender: [u8; 4], target: [u8; 4]) -> Self {
        let mut rest = vec![0, 1, 8, 0, 6, 4];
        rest.extend(operation.to_be_bytes());
        rest.extend(sender_mac);
        rest.extend(sender);
        rest.extend([0; 6]);
        rest.extend(target);
        Self::raw(0x0806, &rest)
    }

    /// IPv6 from and to link-local addresses.
    pub fn ipv6(next_header: u8, rest: &[u8]) -> Self {
        let mut header = vec![0x60, 0, 0, 0];
        header.extend((rest.len() as u16).to_be_bytes());
        header.extend([next_header, 255]);
        header.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        header.extend([0xff, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        header.extend(rest);
        Self::raw(0x86dd, &header)
    }

    /// Sets both MACs.
    pub fn macs(mut self, src: [u8; 6], dst: [u8; 6]) -> Self {
        self.src_mac = src;
        self.dst_mac = dst;
        self
    }

    /// Adds an 802.1Q tag, inside of those that are there.
    pub fn vlan(self, tci: u16) -> Self {
        self.tag(0x8100, tci)
    }

    /// Adds a tag, inside of those that are there.
    pub fn tag(mut self, tpid: u16, tci: u16) -> Self {
        self.tags.push((tpid, tci));
        self
    }

    /// Adds payload.
    pub fn payload(mut self, len: usize) -> Self {
        self.rest.resize(self.rest.len() + len, 0xa5);
        self
    }

    /// Changes the IPv4 header.
    pub fn ip(mut self, change: impl FnOnce(&mut Ip)) -> Self {
        if let Some(ip) = &mut self.ip {
            change(ip);
        }
        self
    }

    /// Adds options of `words` times four bytes.
    pub fn options(self, words: usize) -> Self {
        const NO_OPERATION: u8 = 1;
        self.ip(|ip| ip.options = vec![NO_OPERATION; words * 4])
    }

    /// Makes this the fragment of a datagram at `offset`, in units of eight bytes, with more to come or not.
    pub fn fragment(self, ident: u16, offset: u16, more: bool) -> Self {
        self.ip(|ip| {
            ip.ident = ident;
            ip.fragment = offset | if more { 0x2000 } else { 0 };
        })
    }

    /// Everything from the IPv4 header on, with lengths and the header's checksum filled in.
    pub fn ip_bytes(&self) -> Vec<u8> {
        let Some(ip) = &self.ip else { return self.rest.clone() };
        let header_len = 20 + ip.options.len();
        let total_len = ip.total_len.unwrap_or((header_len + self.rest.len()) as u16);
        let mut bytes = vec![ip.version_and_length.unwrap_or(0x40 | (header_len / 4) as u8), 0];
        bytes.extend(total_len.to_be_bytes());
        bytes.extend(ip.ident.to_be_bytes());
        bytes.extend(ip.fragment.to_be_bytes());
        bytes.extend([64, ip.proto, 0, 0]);
        bytes.extend(ip.src);
        bytes.extend(ip.dst);
        bytes.extend(&ip.options);
        let checksum = checksum(&bytes).to_be_bytes();
        bytes[10..12].copy_from_slice(&checksum);
        bytes.extend(&self.rest);
        // The length field of an unfragmented UDP datagram.
        if ip.proto == 17 && ip.fragment == 0 && self.rest.len() >= 8 {
            let len = (self.rest.len() as u16).to_be_bytes();
            bytes[header_len + 4..header_len + 6].copy_from_slice(&len);
        }
        bytes
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.dst_mac.to_vec();
        bytes.extend(self.src_mac);
        for (tpid, tci) in &self.tags {
            bytes.extend(tpid.to_be_bytes());
            bytes.extend(tci.to_be_bytes());
        }
        bytes.extend(self.ethertype.to_be_bytes());
        bytes.extend(self.ip_bytes());
        bytes
    }
}

fn ports(src: u16, dst: u16) -> Vec<u8> {
    [src.to_be_bytes(), dst.to_be_bytes()].concat()
}

/// The internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)))
        .sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

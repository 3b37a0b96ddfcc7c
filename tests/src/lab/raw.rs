//! Raw Ethernet frames: a builder, a sender, a sniffer. The builder is the lab's own, so that a mistake in the
//! datapath's idea of a packet does not hide in it.

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use super::{
    error::{Error, Result},
    netns::Netns,
    spec::{BROADCAST, Mac},
    sys::PacketSocket,
};

/// Builds a frame: addresses, then tags from the outermost on, then one of the finishing methods.
#[derive(Clone, Debug)]
pub struct Frame {
    bytes: Vec<u8>,
}

impl Frame {
    /// A frame from one MAC to another.
    pub fn new(dst: Mac, src: Mac) -> Self {
        Self { bytes: [dst.0, src.0].concat() }
    }

    /// Adds an 802.1Q tag.
    #[must_use]
    pub fn vlan(self, vid: u16) -> Self {
        self.tag(0x8100, vid)
    }

    /// Adds a tag of any kind; the TCI holds priority, DEI and VLAN id.
    #[must_use]
    pub fn tag(mut self, tpid: u16, tci: u16) -> Self {
        self.bytes.extend(tpid.to_be_bytes());
        self.bytes.extend(tci.to_be_bytes());
        self
    }

    /// Any payload.
    pub fn payload(mut self, ethertype: u16, payload: &[u8]) -> Vec<u8> {
        self.bytes.extend(ethertype.to_be_bytes());
        self.bytes.extend(payload);
        self.bytes
    }

    /// ARP: operation 1 asks, 2 answers.
    pub fn arp(self, operation: u16, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> Vec<u8> {
        let mut body = vec![0, 1, 8, 0, 6, 4];
        body.extend(operation.to_be_bytes());
        for (mac, ip) in [sender, target] {
            body.extend(mac.0);
            body.extend(ip.octets());
        }
        self.payload(0x0806, &body)
    }

    /// An IPv4 packet with this payload, header checksum included.
    pub fn ipv4(self, src: Ipv4Addr, dst: Ipv4Addr, proto: u8, payload: &[u8]) -> Vec<u8> {
        let mut header = vec![0x45, 0];
        header.extend((20 + payload.len() as u16).to_be_bytes());
        header.extend([0, 0, 0x40, 0, 64, proto, 0, 0]);
        header.extend(src.octets());
        header.extend(dst.octets());
        let sum = checksum(&[&header]);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header.extend(payload);
        self.payload(0x0800, &header)
    }

    /// A UDP datagram.
    pub fn udp(self, src: SocketAddrV4, dst: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
        let length = (8 + payload.len() as u16).to_be_bytes();
        let mut datagram = [src.port().to_be_bytes(), dst.port().to_be_bytes(), length, [0, 0]].concat();
        datagram.extend(payload);
        let sum = match transport_checksum(src, dst, 17, &datagram) {
            0 => 0xffff,
            sum => sum,
        };
        datagram[6..8].copy_from_slice(&sum.to_be_bytes());
        self.ipv4(*src.ip(), *dst.ip(), 17, &datagram)
    }

    /// A TCP segment without options or data; flags as in the header: 0x02 SYN, 0x10 ACK, 0x04 RST, 0x01 FIN.
    pub fn tcp(self, src: SocketAddrV4, dst: SocketAddrV4, flags: u8) -> Vec<u8> {
        let mut segment = [src.port().to_be_bytes(), dst.port().to_be_bytes()].concat();
        segment.extend(1000_u32.to_be_bytes());
        segment.extend(0_u32.to_be_bytes());
        segment.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        let sum = transport_checksum(src, dst, 6, &segment);
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        self.ipv4(*src.ip(), *dst.ip(), 6, &segment)
    }

    /// An ICMP echo request.
    pub fn echo(self, src: Ipv4Addr, dst: Ipv4Addr, id: u16) -> Vec<u8> {
        let [a, b] = id.to_be_bytes();
        let mut message = [8, 0, 0, 0, a, b, 0, 1];
        let sum = checksum(&[&message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        self.ipv4(src, dst, 1, &message)
    }
}

/// A broadcast "who has `target`?".
pub fn arp_request(sender: (Mac, Ipv4Addr), target: Ipv4Addr) -> Vec<u8> {
    Frame::new(BROADCAST, sender.0).arp(1, sender, (Mac([0; 6]), target))
}

/// RFC 1071.
pub(super) fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes: Vec<u8> = parts.concat();
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn transport_checksum(src: SocketAddrV4, dst: SocketAddrV4, proto: u8, message: &[u8]) -> u16 {
    let [a, b] = (message.len() as u16).to_be_bytes();
    checksum(&[&src.ip().octets(), &dst.ip().octets(), &[0, proto, a, b], message])
}

/// Sends a frame as it is from an interface of the namespace.
///
/// # Errors
///
/// When there is no such interface, or it is down.
pub fn send(netns: &Netns, interface: &str, frame: &[u8]) -> Result<()> {
    Sender::open(netns, interface)?.send(frame)
}

/// Sends many frames.
#[derive(Debug)]
pub struct Sender {
    socket: PacketSocket,
    what: String,
}

impl Sender {
    /// Opens an interface of a namespace.
    ///
    /// # Errors
    ///
    /// When there is no such interface.
    pub fn open(netns: &Netns, interface: &str) -> Result<Self> {
        let what = format!("raw socket on {interface} of {netns}");
        let socket = netns
            .run(|| PacketSocket::open(nix::net::if_::if_nametoindex(interface)?, false))?
            .map_err(Error::io(what.clone()))?;
        Ok(Self { socket, what })
    }

    /// Sends a frame as it is.
    ///
    /// # Errors
    ///
    /// When the interface is down or the frame too long.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        self.socket.send(frame).map_err(Error::io(self.what.clone()))
    }
}

/// The body of an ARP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// 1 asks, 2 answers.
    pub operation: u16,
    /// Who sends it.
    pub sender: (Mac, Ipv4Addr),
    /// Whom it is about, or for.
    pub target: (Mac, Ipv4Addr),
}

/// A frame that a [`Sniffer`] saw, with all its tags in place, whether the kernel kept them aside or not.
#[derive(Clone, PartialEq, Eq)]
pub struct Captured {
    /// From the Ethernet header on. A GSO packet is one frame; checksums may be left to offload.
    pub data: Vec<u8>,
    /// The interface.
    pub interface: String,
    /// Seen on its way out of the interface, as opposed to in.
    pub outgoing: bool,
}

impl Captured {
    /// Destination MAC.
    pub fn dst_mac(&self) -> Mac {
        self.mac(0)
    }

    /// Source MAC.
    pub fn src_mac(&self) -> Mac {
        self.mac(6)
    }

    fn mac(&self, at: usize) -> Mac {
        let mut mac = [0; 6];
        for (to, from) in mac.iter_mut().zip(self.data.iter().skip(at)) {
            *to = *from;
        }
        Mac(mac)
    }

    /// VLAN id of the outermost tag.
    pub fn vlan(&self) -> Option<u16> {
        matches!(self.u16_at(12)?, 0x8100 | 0x88a8).then(|| self.u16_at(14).map(|tci| tci & 0xfff))?
    }

    /// Ethertype behind all tags, and what follows it.
    pub fn payload(&self) -> Option<(u16, &[u8])> {
        let mut at = 12;
        while matches!(self.u16_at(at)?, 0x8100 | 0x88a8) {
            at += 4;
        }
        Some((self.u16_at(at)?, self.data.get(at + 2..)?))
    }

    /// Source, destination and protocol of an IPv4 packet; ports are 0 where there are none.
    pub fn ipv4(&self) -> Option<(SocketAddrV4, SocketAddrV4, u8)> {
        let (0x0800, packet) = self.payload()? else { return None };
        let ip = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
        let transport = packet.get(usize::from(packet.first()? & 0xf) * 4..)?;
        let proto = *packet.get(9)?;
        let port = |at: usize| match proto {
            6 | 17 => transport.get(at..at + 2).map_or(0, |b| u16::from_be_bytes([b[0], b[1]])),
            _ => 0,
        };
        Some((SocketAddrV4::new(ip(12)?, port(0)), SocketAddrV4::new(ip(16)?, port(2)), proto))
    }

    /// The body of an ARP packet.
    pub fn arp(&self) -> Option<Arp> {
        let (0x0806, packet) = self.payload()? else { return None };
        let end = |at: usize| {
            let mac = <[u8; 6]>::try_from(packet.get(at..at + 6)?).ok()?;
            let ip = <[u8; 4]>::try_from(packet.get(at + 6..at + 10)?).ok()?;
            Some((Mac(mac), Ipv4Addr::from(ip)))
        };
        let operation = packet.get(6..8)?;
        let operation = u16::from_be_bytes([operation[0], operation[1]]);
        Some(Arp { operation, sender: end(8)?, target: end(18)? })
    }

    fn u16_at(&self, at: usize) -> Option<u16> {
        let bytes = self.data.get(at..at + 2)?;
        Some(u16::from_be_bytes([bytes[0], bytes[1]]))
    }
}

impl fmt::Debug for Captured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = if self.outgoing { "out of" } else { "into" };
        write!(f, "{way} {}: {} > {}", self.interface, self.src_mac(), self.dst_mac())?;
        if let Some(vlan) = self.vlan() {
            write!(f, " vlan {vlan}")?;
        }
        if let Some((src, dst, proto)) = self.ipv4() {
            write!(f, " {src} > {dst} proto {proto}")?;
        } else if let Some(Arp { operation, sender, target }) = self.arp() {
            write!(f, " arp {operation} from {sender:?} for {target:?}")?;
        } else if let Some((ethertype, _)) = self.payload() {
            write!(f, " ethertype {ethertype:#06x}")?;
        }
        write!(f, " {} bytes", self.data.len())
    }
}

/// Listens on an interface of a namespace from the moment that it is opened.
#[derive(Debug)]
pub struct Sniffer {
    socket: PacketSocket,
    netns: String,
    names: Vec<(u32, String)>,
}

impl Sniffer {
    /// Opens it; an empty name = all interfaces.
    ///
    /// # Errors
    ///
    /// When there is no such interface.
    pub fn open(netns: &Netns, interface: &str) -> Result<Self> {
        let open = || {
            let names = nix::net::if_::if_nameindex()?;
            let names: Vec<(u32, String)> =
                names.iter().map(|i| (i.index(), i.name().to_string_lossy().into_owned())).collect();
            let ifindex = match interface {
                "" => 0,
                name => nix::net::if_::if_nametoindex(name)?,
            };
            Ok((PacketSocket::open(ifindex, true)?, names))
        };
        let (socket, names) =
            netns.run(open)?.map_err(Error::io(format!("sniffing on {interface:?} of {netns}")))?;
        Ok(Self { socket, netns: netns.name().into(), names })
    }

    /// Waits for a frame that the filter likes; others are passed over.
    ///
    /// # Errors
    ///
    /// When the socket fails. No frame in time is `None`.
    pub fn wait(
        &mut self,
        limit: Duration,
        mut filter: impl FnMut(&Captured) -> bool,
    ) -> Result<Option<Captured>> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let received =
                self.socket.receive(left).map_err(Error::io(format!("sniffing in {}", self.netns)))?;
            if let Some(received) = received {
                let captured = Captured {
                    data: with_tag(&received.data, received.tag),
                    interface: self.name(received.ifindex),
                    outgoing: received.outgoing,
                };
                if filter(&captured) {
                    return Ok(Some(captured));
                }
            } else if left.is_zero() {
                return Ok(None);
            }
        }
    }

    /// All frames within this time that the filter likes.
    ///
    /// # Errors
    ///
    /// When the socket fails.
    pub fn collect(
        &mut self,
        time: Duration,
        mut filter: impl FnMut(&Captured) -> bool,
    ) -> Result<Vec<Captured>> {
        let end = Instant::now() + time;
        let mut all = Vec::new();
        while let Some(frame) = self.wait(end.saturating_duration_since(Instant::now()), &mut filter)? {
            all.push(frame);
        }
        Ok(all)
    }

    fn name(&self, ifindex: u32) -> String {
        let known = self.names.iter().find(|(index, _)| *index == ifindex);
        known.map_or_else(|| format!("interface {ifindex}"), |(_, name)| name.clone())
    }
}

/// Puts a tag that the kernel kept aside back where it was.
pub(super) fn with_tag(frame: &[u8], tag: Option<(u16, u16)>) -> Vec<u8> {
    match (tag, frame.split_at_checked(12)) {
        (Some((tpid, tci)), Some((macs, rest))) => {
            [macs, &tpid.to_be_bytes(), &tci.to_be_bytes(), rest].concat()
        }
        _ => frame.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_over_itself_is_zero() {
        let src = SocketAddrV4::new(Ipv4Addr::new(10, 1, 18, 2), 4000);
        let dst = SocketAddrV4::new(Ipv4Addr::new(10, 1, 0, 20), 53);
        let frame = Frame::new(BROADCAST, Mac([2; 6])).vlan(7).udp(src, dst, b"odd");
        let packet = &frame[18..];
        assert_eq!(checksum(&[&packet[..20]]), 0);
        assert_eq!(transport_checksum(src, dst, 17, &packet[20..]), 0);
    }

    #[test]
    fn a_frame_is_read_as_it_was_built() {
        let src = SocketAddrV4::new(Ipv4Addr::new(10, 1, 18, 2), 4000);
        let dst = SocketAddrV4::new(Ipv4Addr::new(10, 1, 0, 20), 80);
        let data = Frame::new(BROADCAST, Mac([2; 6])).tag(0x88a8, 0x2005).vlan(7).tcp(src, dst, 2);
        let captured = Captured { data, interface: String::new(), outgoing: false };
        assert_eq!(captured.vlan(), Some(5));
        assert_eq!(captured.ipv4(), Some((src, dst, 6)));
        assert_eq!(captured.src_mac(), Mac([2; 6]));
    }
}

use std::{vec, vec::Vec};

use proptest::prelude::*;

use super::{
    Frame as _, IPV4, IPV6,
    arp::{self, Arp},
    ipv4::{self, Part},
    l4::{L4, Role},
    link::{self, Link, TPID_8021AD, TPID_8021Q, Tag},
    plain, refuse,
};
use crate::{
    abi::Outcome,
    testing::{
        Packet,
        packet::{ACK, SYN, SYN_ACK},
    },
};

const A: [u8; 4] = [10, 1, 18, 2];
const B: [u8; 4] = [10, 1, 16, 125];

fn l4_of(packet: &Packet) -> L4 {
    ipv4::parse(packet.bytes().as_slice(), 14).unwrap().l4
}

#[test]
fn a_slice_is_a_frame() {
    let bytes = [1, 2, 3, 4, 5];
    assert_eq!(bytes.load::<[u8; 2]>(3), Some([4, 5]));
    assert_eq!(bytes.load::<[u8; 2]>(4), None);
    assert_eq!(bytes.load::<[u8; 2]>(6), None);
    assert_eq!(bytes.load::<[u8; 2]>(usize::MAX), None);
    assert_eq!(bytes.as_slice().len(), 5);
}

#[test]
fn tags_stand_inside_or_beside() {
    let macs = |packet: Packet| packet.macs([2; 6], [1; 6]).bytes();
    let untagged = Link { dst: [1; 6], src: [2; 6], vid: 0, tagged: false, ethertype: IPV4, header_len: 14 };
    let plain = macs(Packet::raw(IPV4, &[]));
    assert_eq!(link::parse(&*plain, None), Ok(untagged));

    let tagged = Link { vid: 101, tagged: true, ..untagged };
    // Priority 7 and "drop eligible" are not part of the VLAN id.
    let inside = macs(Packet::raw(IPV4, &[]).vlan(0xf000 | 101));
    assert_eq!(link::parse(&*inside, None), Ok(Link { header_len: 18, ..tagged }));
    let beside = Tag { tpid: TPID_8021Q, tci: 0xf000 | 101 };
    assert_eq!(link::parse(&*plain, Some(beside)), Ok(tagged));

    // Tagged for its priority only.
    let priority = link::parse(&*macs(Packet::raw(IPV4, &[]).vlan(0xe000)), None).unwrap();
    assert_eq!((priority.vid, priority.tagged), (0, true));
}

#[test]
fn two_tags_are_one_too_many() {
    let double = Err(Outcome::DoubleTag);
    let tag = |tpid| Some(Tag { tpid, tci: 5 });
    for inner in [TPID_8021Q, TPID_8021AD] {
        assert_eq!(link::parse(&*Packet::raw(IPV4, &[]).vlan(5).tag(inner, 6).bytes(), None), double);
        assert_eq!(link::parse(&*Packet::raw(IPV4, &[]).tag(inner, 6).bytes(), tag(TPID_8021Q)), double);
    }
    assert_eq!(link::parse(&*Packet::raw(IPV4, &[]).tag(TPID_8021AD, 5).bytes(), None), double);
    assert_eq!(link::parse(&*Packet::raw(IPV4, &[]).bytes(), tag(TPID_8021AD)), double);
}

#[test]
fn link_headers_cut_off() {
    for (frame, whole) in [(Packet::raw(IPV4, &[]).bytes(), 14), (Packet::raw(IPV4, &[]).vlan(5).bytes(), 18)]
    {
        assert_eq!(frame.len(), whole);
        for len in 0..whole {
            assert_eq!(link::parse(&frame[..len], None), Err(Outcome::Truncated), "{len} of {whole}");
        }
        assert!(link::parse(&*frame, None).is_ok());
    }
}

#[test]
fn arp_is_ethernet_and_ipv4_only() {
    let good = Packet::arp(1, [2; 6], A, B).bytes();
    let parsed = Arp { operation: arp::REQUEST, sender_mac: [2; 6], sender: A, target: B };
    assert_eq!(arp::parse(&*good, 14), Ok(parsed));
    assert_eq!(
        arp::parse(&*Packet::arp(2, [2; 6], A, B).bytes(), 14),
        Ok(Arp { operation: arp::REPLY, ..parsed })
    );
    for operation in [0, 3, 8, 0x100, 0xffff] {
        assert_eq!(arp::parse(&*Packet::arp(operation, [2; 6], A, B).bytes(), 14), Err(Outcome::ArpSpoof));
    }
    for byte in 14..20 {
        let mut bad = good.clone();
        bad[byte] ^= 1;
        assert_eq!(arp::parse(&*bad, 14), Err(Outcome::ArpSpoof), "byte {byte}");
    }
    for len in 14..good.len() {
        assert_eq!(arp::parse(&good[..len], 14), Err(Outcome::Truncated), "{len}");
    }
}

#[test]
fn roles_of_tcp() {
    let role = |flags| l4_of(&Packet::tcp((A, 1), (B, 2), flags)).role;
    assert_eq!(role(SYN), Role::Opens);
    assert_eq!(role(SYN_ACK), Role::Answers);
    assert_eq!(role(ACK), Role::Continues);
    // SYN with ECN set-up (RFC 3168) or with data pushed opens, too; a reset does not.
    assert_eq!(role(SYN | 0xc0), Role::Opens);
    assert_eq!(role(SYN | 0x08), Role::Opens);
    assert_eq!(role(0x04), Role::Continues);
}

#[test]
fn ports_and_lengths() {
    let tcp = l4_of(&Packet::tcp((A, 4096), (B, 80), SYN));
    assert_eq!((tcp.src_port, tcp.dst_port, tcp.proto, tcp.header_len), (4096, 80, 6, 20));
    let udp = l4_of(&Packet::udp((A, 53), (B, 0x1234)));
    assert_eq!((udp.src_port, udp.dst_port, udp.proto, udp.header_len), (53, 0x1234, 17, 8));
    assert_eq!(udp.role, Role::Either);
    let echo = l4_of(&Packet::icmp(8, A, B, 77));
    assert_eq!((echo.src_port, echo.dst_port, echo.proto, echo.icmp_type), (77, 77, 1, 8));
    let esp = l4_of(&Packet::ipv4(A, B, 50, &[]));
    assert_eq!((esp.src_port, esp.dst_port, esp.proto, esp.role), (0, 0, 50, Role::Either));
    // The longest TCP header.
    let mut rest = Packet::tcp((A, 1), (B, 2), ACK).rest;
    rest[12] = 15 << 4;
    rest.resize(60, 0);
    assert_eq!(l4_of(&Packet::ipv4(A, B, 6, &rest)).header_len, 60);
}

#[test]
fn icmp_errors_speak_of_the_flow_they_are_about() {
    // B reports about what A sent to it: the flow as if B had sent it.
    let sent = Packet::udp((A, 1111), (B, 53)).payload(30);
    for icmp_type in [3, 4, 11, 12] {
        let error = l4_of(&Packet::icmp_error(icmp_type, B, A, &sent));
        assert_eq!((error.src_port, error.dst_port, error.proto), (53, 1111, 17));
        assert_eq!((error.role, error.icmp_type, error.about), (Role::Reports, icmp_type, B));
    }
    let error = l4_of(&Packet::icmp_error(3, B, A, &Packet::tcp((A, 1), (B, 2), SYN).options(10)));
    assert_eq!((error.src_port, error.dst_port, error.proto), (2, 1, 6));
    let error = l4_of(&Packet::icmp_error(11, B, A, &Packet::icmp(8, A, B, 9)));
    assert_eq!((error.src_port, error.dst_port, error.proto), (9, 9, 1));
    let error = l4_of(&Packet::icmp_error(3, B, A, &Packet::ipv4(A, B, 50, &[0; 8])));
    assert_eq!((error.src_port, error.dst_port, error.proto), (0, 0, 50));
}

#[test]
fn icmp_errors_that_quote_too_little_are_about_no_flow() {
    let whole = Packet::icmp_error(3, B, A, &Packet::udp((A, 1), (B, 2)));
    for len in 8..whole.rest.len() {
        let error = l4_of(&Packet::ipv4(B, A, 1, &whole.rest[..len]));
        assert_eq!((error.src_port, error.dst_port, error.role), (0, 0, Role::Reports), "{len}");
    }
}

#[test]
fn fragments() {
    let part = |offset, more| {
        let packet = Packet::udp((A, 1), (B, 2)).payload(16).fragment(7, offset, more);
        let ip = ipv4::parse(packet.bytes().as_slice(), 14).unwrap();
        assert_eq!(ip.ident, 7);
        (ip.part, ip.l4.src_port)
    };
    assert_eq!(part(0, false), (Part::Whole, 1));
    assert_eq!(part(0, true), (Part::First, 1));
    assert_eq!(part(1, true), (Part::Later, 0));
    assert_eq!(part(1, false), (Part::Later, 0));
    assert_eq!(part(0x1fff, false), (Part::Later, 0));
    // "Don't fragment" and the reserved bit say nothing about parts.
    let packet = Packet::udp((A, 1), (B, 2)).ip(|ip| ip.fragment = 0xc000);
    assert_eq!(ipv4::parse(packet.bytes().as_slice(), 14).unwrap().part, Part::Whole);
}

#[test]
fn headers_that_contradict_themselves() {
    let parse = |change: &dyn Fn(&mut crate::testing::packet::Ip)| {
        let packet = Packet::udp((A, 1), (B, 2)).payload(8).ip(|ip| change(ip));
        ipv4::parse(packet.bytes().as_slice(), 14).map(|_| ())
    };
    let bad = Err(Outcome::BadIpv4Header);
    for version_and_length in [0x35, 0x55, 0x65, 0x05, 0x40, 0x44] {
        assert_eq!(parse(&|ip| ip.version_and_length = Some(version_and_length)), bad);
    }
    for total_len in [1, 19, 37, 0xffff] {
        assert_eq!(parse(&|ip| ip.total_len = Some(total_len)), bad, "{total_len}");
    }
    // Longer than the total length because of padding: fine.
    assert_eq!(parse(&|ip| ip.total_len = Some(28)), Ok(()));
    // But padding is no part of a header.
    assert_eq!(parse(&|ip| ip.total_len = Some(27)), Err(Outcome::Truncated));
    // A header longer than the datagram.
    assert_eq!(parse(&|ip| (ip.version_and_length, ip.total_len) = (Some(0x4f), Some(36))), bad);
}

#[test]
fn a_total_length_of_zero_is_for_what_is_longer_than_it_can_say() {
    let packet = |payload| Packet::tcp((A, 1), (B, 2), ACK).payload(payload).ip(|ip| ip.total_len = Some(0));
    let parse = |payload| ipv4::parse(packet(payload).bytes().as_slice(), 14).map(|ip| ip.l4.dst_port);
    assert_eq!(parse(100), Err(Outcome::BadIpv4Header));
    assert_eq!(parse(0xffff - 40), Err(Outcome::BadIpv4Header));
    assert_eq!(parse(0x1_0000 - 40), Ok(2));
}

#[test]
fn discovery_is_told_from_other_ipv6() {
    let refused = |next_header, icmp_type| {
        let frame = Packet::ipv6(next_header, &[icmp_type, 0, 0, 0, 0, 0, 0, 0]).bytes();
        refuse(frame.as_slice(), IPV6, 14)
    };
    for icmp_type in 133..=137 {
        assert_eq!(refused(58, icmp_type), Outcome::Ipv6Discovery);
        assert_eq!(refused(17, icmp_type), Outcome::Ipv6);
    }
    assert_eq!(refused(58, 128), Outcome::Ipv6);
    assert_eq!(refused(58, 138), Outcome::Ipv6);
    assert_eq!(refuse([0; 40].as_slice(), IPV6, 14), Outcome::Ipv6);
    assert_eq!(refuse([0; 40].as_slice(), 0x88cc, 14), Outcome::UnknownEthertype);
}

/// Packets of every protocol that the parsers know, with and without options.
fn packets() -> impl Strategy<Value = Packet> {
    let body = prop_oneof![
        (any::<u16>(), any::<u16>(), any::<u8>()).prop_map(|(s, d, flags)| Packet::tcp(
            (A, s),
            (B, d),
            flags
        )),
        (any::<u16>(), any::<u16>()).prop_map(|(s, d)| Packet::udp((A, s), (B, d))),
        (any::<u8>(), any::<u16>()).prop_map(|(kind, id)| Packet::icmp(kind, A, B, id)),
        (prop::sample::select(vec![3_u8, 4, 11, 12]), any::<u16>(), 0..=10_usize).prop_map(
            |(kind, port, words)| {
                Packet::icmp_error(kind, A, B, &Packet::udp((B, port), (A, 53)).options(words))
            }
        ),
    ];
    (body, 0..=10_usize, 0..64_usize)
        .prop_map(|(packet, words, payload)| packet.options(words).payload(payload))
}

/// How many bytes from the IPv4 header on the parser needs.
fn needed(packet: &Packet) -> usize {
    let ip = packet.ip.as_ref().unwrap();
    20 + ip.options.len() + if ip.proto == 6 { 20 } else { 8 }
}

proptest! {
    #[test]
    fn any_bytes_parse_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), offset in 0..220_usize) {
        let frame = bytes.as_slice();
        for tag in [None, Some(Tag { tpid: TPID_8021Q, tci: 9 })] {
            if let Ok(link) = link::parse(frame, tag) {
                prop_assert!(link.header_len <= frame.len());
                prop_assert!(link.vid < 4096);
            }
        }
        let _ = arp::parse(frame, offset);
        if let Ok(ip) = ipv4::parse(frame, offset) {
            prop_assert!((20..=60).contains(&ip.header_len) && ip.header_len % 4 == 0);
            prop_assert!(offset + ip.header_len as usize <= frame.len() || matches!(ip.part, Part::Later));
        }
        let _ = refuse(frame, IPV6, offset);
    }

    /// With a byte changed and the end cut off, what is plain is what the parsers for everything read, and what they read
    /// as a whole TCP or UDP packet without options is plain.
    #[test]
    fn plain_agrees_with_the_parsers(
        packet in packets(), change in (0..80_usize, any::<u8>()), cut in 0..60_usize, tagged in any::<bool>()
    ) {
        let packet = packet.macs([2, 3, 4, 5, 6, 7], [1; 6]);
        let mut bytes = if tagged { packet.vlan(101) } else { packet }.bytes();
        if let Some(byte) = bytes.get_mut(change.0) {
            *byte = change.1;
        }
        bytes.truncate(bytes.len() - cut / 2);
        let frame = bytes.as_slice();
        let plain = if tagged { plain::parse::<4, _>(frame) } else { plain::parse::<0, _>(frame) };
        let link_len = if tagged { 18 } else { 14 };
        let ethertype: Option<[u8; 2]> = frame.load(link_len - 2);
        let parsed = match ethertype {
            Some(ethertype) if ethertype == IPV4.to_be_bytes() => ipv4::parse(frame, link_len).ok(),
            _ => None,
        };
        if let Some(plain) = plain {
            let ip = if tagged { plain.ip::<4, _>(frame) } else { plain.ip::<0, _>(frame) };
            prop_assert_eq!(ip, parsed);
            prop_assert_eq!((plain.src, plain.dst, plain.proto), parsed.map(|ip| (ip.src, ip.dst, ip.proto)).unwrap());
            let ports = if tagged { plain.ports::<4, _>(frame) } else { plain.ports::<0, _>(frame) };
            prop_assert_eq!(ports, parsed.map(|ip| (ip.l4.src_port, ip.l4.dst_port)));
            let macs: Option<[[u8; 6]; 2]> = frame.load(0);
            let [dst, src] = macs.unwrap();
            prop_assert!(tagged || plain.src_mac == src);
            prop_assert!(plain::DstMac::of(frame).is_some_and(|mac| mac.is(&dst) && mac.is_group() == (dst[0] & 1 != 0)));
        } else if let Some(ip) = parsed {
            prop_assert!(ip.header_len != 20 || ip.part != Part::Whole || ![6, 17].contains(&ip.proto), "{:?}", ip);
        }
    }

    #[test]
    fn a_packet_cut_off_anywhere_is_refused(packet in packets()) {
        let bytes = packet.ip_bytes();
        for len in 0..bytes.len() {
            let refused = ipv4::parse(&bytes[..len], 0).unwrap_err();
            // The total length is more than there is, unless even the header is not there.
            let expected = if len < 20 { Outcome::Truncated } else { Outcome::BadIpv4Header };
            prop_assert_eq!(refused, expected, "{} of {}", len, bytes.len());
        }
    }

    #[test]
    fn a_datagram_cut_off_by_its_sender_is_refused(packet in packets()) {
        let whole = packet.ip_bytes();
        for len in 20..whole.len() {
            let mut bytes: Vec<u8> = whole[..len].to_vec();
            bytes[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            let header_len = 20 + packet.ip.as_ref().unwrap().options.len();
            let expected = if len < header_len {
                Err(Outcome::BadIpv4Header)
            } else if len < needed(&packet) {
                Err(Outcome::Truncated)
            } else {
                Ok(())
            };
            prop_assert_eq!(ipv4::parse(&*bytes, 0).map(|_| ()), expected, "{} of {}", len, whole.len());
        }
    }

    #[test]
    fn options_and_what_stands_before_change_nothing(packet in packets(), words in 0..=10_usize, before in 0..64_usize) {
        let plain = ipv4::parse(&*packet.clone().options(0).ip_bytes(), 0).unwrap();
        let mut bytes = vec![0; before];
        bytes.extend(packet.options(words).ip_bytes());
        let parsed = ipv4::parse(&*bytes, before).unwrap();
        prop_assert_eq!(parsed.header_len as usize, 20 + words * 4);
        prop_assert_eq!(ipv4::Ipv4 { header_len: 20, ..parsed }, plain);
    }
}

//! The program and its maps.

use aya_ebpf::{
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_NOEXIST, TC_ACT_SHOT},
    helpers::{bpf_redirect, bpf_skb_vlan_pop, bpf_skb_vlan_push},
    macros::{classifier, map},
    maps::{Array, HashMap, LruHashMap, LruPerCpuHashMap, PerCpuHashMap},
    programs::TcContext,
};
use fabric_ebpf::{
    Addr, BACKENDS, CountKey, ElbKey, FlowCount, FlowKey, Kind, LISTENERS, Nic, PinKey, PortVlan, REFUSED,
    Service, ServiceKey, nic,
};

/// NICs by place. Written by the lab.
#[map]
static NICS: HashMap<PortVlan, Nic> = HashMap::with_max_entries(16_384, 0);
/// NICs by address; 0.0.0.0 = the port to the outside. Written by the lab.
#[map]
static ROUTES: HashMap<[u8; 4], Nic> = HashMap::with_max_entries(16_384, 0);
/// Elastic IP → address of its NIC. Written by the lab.
#[map]
static EIPS: HashMap<[u8; 4], [u8; 4]> = HashMap::with_max_entries(1024, 0);
/// Addresses that are VIPs, with or without a listener on the port asked for. Written by the lab.
#[map]
static VIPS: HashMap<[u8; 4], u32> = HashMap::with_max_entries(LISTENERS, 0);
/// Listeners and their healthy backends. Written by the health checker.
#[map]
static SERVICES: HashMap<ServiceKey, Service> = HashMap::with_max_entries(LISTENERS, 0);
/// Whose turn it is, by listener.
#[map]
static TURNS: Array<u32> = Array::with_max_entries(LISTENERS, 0);
/// Clients whose backend a test has chosen.
#[map]
static PINS: HashMap<PinKey, [u8; 4]> = HashMap::with_max_entries(1024, 0);
/// Flows of the ELB: client and VIP → backend.
#[map]
static ELB_FLOWS: LruHashMap<ElbKey, Addr> = LruHashMap::with_max_entries(65_536, 0);
/// Flows of the ELB: client and backend → VIP.
#[map]
static ELB_RETURNS: LruHashMap<ElbKey, Addr> = LruHashMap::with_max_entries(65_536, 0);
/// Frames that were not forwarded.
#[map]
static COUNTS: PerCpuHashMap<CountKey, u64> = PerCpuHashMap::with_max_entries(4096, 0);
/// What crossed which NIC.
#[map]
static FLOW_LOG: LruPerCpuHashMap<FlowKey, FlowCount> = LruPerCpuHashMap::with_max_entries(65_536, 0);

/// Whether to write `FLOW_LOG`.
#[unsafe(no_mangle)]
static LOG_FLOWS: u8 = 1;
/// The interface behind which security groups are judged; 0 = there are none.
#[unsafe(no_mangle)]
static GATE: u32 = 0;
/// The VPC's network address and mask.
#[unsafe(no_mangle)]
static VPC_NETWORK: u32 = 0;
#[unsafe(no_mangle)]
static VPC_MASK: u32 = 0;
/// The MAC of every gateway.
#[unsafe(no_mangle)]
static GATEWAY_MAC: [u8; 6] = [0; 6];

const ETH_LEN: usize = 14;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_8021AD: u16 = 0x88a8;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const TCP_SYN: u8 = 0x02;
const TCP_ACK: u8 = 0x10;

/// What is known of a packet.
struct Packet {
    /// Offset of the transport header.
    l4: usize,
    src: Addr,
    dst: Addr,
    proto: u8,
    /// A fragment that is not the first: no ports.
    later_fragment: bool,
    /// The first packet of a TCP connection.
    opens: bool,
}

#[classifier]
pub fn fabric_port(ctx: TcContext) -> i32 {
    // SAFETY: the context is valid for as long as the program runs.
    let skb = unsafe { &*ctx.skb.skb };
    let vid = if skb.vlan_present != 0 { (skb.vlan_tci & 0xfff) as u16 } else { 0 };
    let at = PortVlan { ifindex: skb.ifindex, vid, pad: 0 };
    match forward(&ctx, at) {
        Ok(verdict) => verdict,
        Err(kind) => {
            count(at, kind);
            TC_ACT_SHOT
        }
    }
}

#[inline(always)]
fn forward(ctx: &TcContext, at: PortVlan) -> Result<i32, Kind> {
    // SAFETY: as in `fabric_port`.
    let skb = unsafe { &*ctx.skb.skb };
    let tagged = skb.vlan_present != 0;
    if tagged && u16::from_be(skb.vlan_proto as u16) != ETH_P_8021Q {
        return Err(Kind::DoubleTag);
    }
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1] = load::<[u8; ETH_LEN]>(ctx, 0)?;
    let ethertype = u16::from_be_bytes([t0, t1]);
    if ethertype == ETH_P_8021Q || ethertype == ETH_P_8021AD {
        return Err(Kind::DoubleTag);
    }
    // SAFETY: the entry stays valid for the program's run; the lab writes it whole.
    let from = unsafe { NICS.get(at) }.ok_or(Kind::UnknownVlan)?;
    if [s0, s1, s2, s3, s4, s5] != from.mac {
        return Err(Kind::SourceMac);
    }
    match ethertype {
        ETH_P_ARP => arp(ctx, from),
        ETH_P_IP => ipv4(ctx, from, [d0, d1, d2, d3, d4, d5]),
        ETH_P_IPV6 if at.vid == 0 => Err(Kind::Ipv6),
        _ => Err(Kind::Ethertype),
    }
}

/// Answers for every address of the VPC with the gateway's MAC, in the same frame.
#[inline(always)]
fn arp(ctx: &TcContext, from: &Nic) -> Result<i32, Kind> {
    let [h0, h1, p0, p1, hl, pl, o0, o1] = load::<[u8; 8]>(ctx, ETH_LEN)?;
    if [h0, h1, p0, p1, hl, pl] != [0, 1, 8, 0, 6, 4] {
        return Err(Kind::Malformed);
    }
    let sender_mac = load::<[u8; 6]>(ctx, ETH_LEN + 8)?;
    let sender_ip = load::<[u8; 4]>(ctx, ETH_LEN + 14)?;
    let target_ip = load::<[u8; 4]>(ctx, ETH_LEN + 24)?;
    if sender_mac != from.mac || sender_ip != from.ip {
        return Err(Kind::ArpSender);
    }
    let answers = in_vpc(target_ip) || from.flags & nic::OUTSIDE != 0;
    if [o0, o1] != [0, 1] || target_ip == from.ip || !answers {
        return Err(Kind::ArpIgnored);
    }
    let gateway = gateway_mac();
    store(ctx, ETH_LEN + 6, &[0_u8, 2])?;
    store(ctx, ETH_LEN + 8, &gateway)?;
    store(ctx, ETH_LEN + 14, &target_ip)?;
    store(ctx, ETH_LEN + 18, &from.mac)?;
    store(ctx, ETH_LEN + 24, &from.ip)?;
    store(ctx, 0, &from.mac)?;
    store(ctx, 6, &gateway)?;
    // The tag, if any, is still in the metadata.
    Ok(redirect(from.at.ifindex))
}

#[inline(always)]
fn ipv4(ctx: &TcContext, from: &Nic, destination: [u8; 6]) -> Result<i32, Kind> {
    let mut packet = parse(ctx)?;
    let outside = from.flags & nic::OUTSIDE != 0;
    let refused = if outside {
        in_vpc(packet.src.ip)
    } else {
        packet.src.ip != from.ip && from.flags & nic::FORWARDS == 0
    };
    if refused {
        return Err(Kind::SourceIp);
    }
    if destination[0] & 1 == 1 {
        return Err(Kind::Multicast);
    }
    if destination != gateway_mac() {
        return Err(Kind::DestinationMac);
    }
    if packet.dst.ip[0] >= 224 {
        return Err(Kind::Multicast);
    }
    log_flow(ctx, from.at, &packet, 0);

    if outside {
        // SAFETY: as for `NICS`.
        let inside = unsafe { EIPS.get(packet.dst.ip) }.ok_or(Kind::NoEip)?;
        let to = Addr { ip: *inside, ..packet.dst };
        translate(ctx, &mut packet, End::Destination, to)?;
    } else {
        forget_return(&packet);
        // SAFETY: as for `NICS`.
        if unsafe { VIPS.get(packet.dst.ip) }.is_some() {
            let backend = choose(&packet)?;
            translate(ctx, &mut packet, End::Destination, backend)?;
        }
    }
    // SAFETY: set by the loader, read as it is then.
    let gate = unsafe { core::ptr::read_volatile(&raw const GATE) };
    if gate == 0 { onward(ctx, from, packet) } else { to_gate(ctx, gate) }
}

/// Hands the packet, whose ends have the addresses by which their groups judge it, to the gate.
#[inline(always)]
fn to_gate(ctx: &TcContext, gate: u32) -> Result<i32, Kind> {
    // SAFETY: as in `fabric_port`.
    let tagged = unsafe { (*ctx.skb.skb).vlan_present } != 0;
    // SAFETY: a helper on a valid context.
    if tagged && unsafe { bpf_skb_vlan_pop(ctx.skb.skb) } != 0 {
        return Err(Kind::Malformed);
    }
    Ok(redirect(gate))
}

/// What the gate gives back.
#[classifier]
pub fn fabric_judged(ctx: TcContext) -> i32 {
    let Ok(packet) = parse(&ctx) else { return TC_ACT_SHOT };
    let source = if in_vpc(packet.src.ip) { packet.src.ip } else { [0; 4] };
    // SAFETY: as for `NICS`. The NIC may have gone since.
    let Some(from) = (unsafe { ROUTES.get(source) }) else { return TC_ACT_SHOT };
    let forwarded = match load::<[u8; 2]>(&ctx, ETH_LEN - 2).map(u16::from_be_bytes) {
        Ok(REFUSED) => Err(Kind::SecurityGroup),
        _ => onward(&ctx, from, packet),
    };
    match forwarded {
        Ok(verdict) => verdict,
        Err(kind) => {
            count(from.at, kind);
            TC_ACT_SHOT
        }
    }
}

/// From the addresses inside to those that the destination shall see, and to the destination.
#[inline(always)]
fn onward(ctx: &TcContext, from: &Nic, mut packet: Packet) -> Result<i32, Kind> {
    if from.flags & nic::OUTSIDE != 0 {
        return deliver(ctx, &packet, packet.dst.ip, Kind::NoRoute);
    }
    from_backend(ctx, &mut packet)?;
    if !in_vpc(packet.dst.ip) {
        if from.eip == [0; 4] {
            return Err(Kind::NoEip);
        }
        let to = Addr { ip: from.eip, ..packet.src };
        translate(ctx, &mut packet, End::Source, to)?;
        return deliver(ctx, &packet, [0; 4], Kind::NoEip);
    }
    deliver(ctx, &packet, packet.dst.ip, Kind::NoRoute)
}

/// The ELB's choice: what the flow has already, or, for a new one, what a test has pinned, or the next in turn.
#[inline(always)]
fn choose(packet: &Packet) -> Result<Addr, Kind> {
    if packet.later_fragment {
        return Err(Kind::Fragment);
    }
    let listener = ServiceKey { ip: packet.dst.ip, port: packet.dst.port, proto: packet.proto, pad: 0 };
    // SAFETY: as for `NICS`; the health checker replaces the value as a whole.
    let service = unsafe { SERVICES.get(listener) }.ok_or(Kind::NoListener)?;
    let flow = ElbKey { client: packet.src, server: packet.dst, proto: u32::from(packet.proto) };
    // SAFETY: as above.
    let pin = unsafe { PINS.get(PinKey { client: packet.src.ip, vip: packet.dst.ip }) };
    // SAFETY: the program alone writes the entry, and never changes one.
    let known = unsafe { ELB_FLOWS.get(flow) };
    if let Some(backend) = known
        && (!packet.opens || pin.is_none_or(|pin| *pin == backend.ip) && is_healthy(service, backend))
    {
        return Ok(*backend);
    }
    if packet.proto == TCP && !packet.opens {
        return Err(Kind::NoElbFlow);
    }
    let backend = match pin {
        Some(pin) => Addr { ip: *pin, port: service.target_port as u16, pad: 0 },
        None => in_turn(service).ok_or(Kind::NoBackend)?,
    };
    let back = ElbKey { client: packet.src, server: backend, proto: u32::from(packet.proto) };
    let stored =
        ELB_FLOWS.insert(flow, backend, 0).is_ok() && ELB_RETURNS.insert(back, packet.dst, 0).is_ok();
    if stored { Ok(backend) } else { Err(Kind::NoElbFlow) }
}

/// A SYN is sent again to the same backend, but a source port that is used anew must not meet a dead one.
#[inline(always)]
fn is_healthy(service: &Service, backend: &Addr) -> bool {
    let mut i = 0;
    while i < BACKENDS {
        if i < service.count as usize && service.backends[i] == *backend {
            return true;
        }
        i += 1;
    }
    false
}

#[inline(always)]
fn in_turn(service: &Service) -> Option<Addr> {
    if service.count == 0 {
        return None;
    }
    let turn = TURNS.get_ptr_mut(service.id)?;
    // SAFETY: a map value is aligned and stays valid for the program's run. When two CPUs meet here, two clients get
    // the same backend.
    let turn = unsafe {
        *turn = (*turn).wrapping_add(1);
        *turn
    };
    Some(service.backends[(turn % service.count) as usize & (BACKENDS - 1)])
}

/// A direct connection between the same ends: what an earlier one through the ELB left is void.
#[inline(always)]
fn forget_return(packet: &Packet) {
    if packet.opens {
        let direct = ElbKey { client: packet.src, server: packet.dst, proto: u32::from(packet.proto) };
        let _ = ELB_RETURNS.remove(direct);
    }
}

/// The way back: the answer of a backend gets the VIP as its source.
#[inline(always)]
fn from_backend(ctx: &TcContext, packet: &mut Packet) -> Result<(), Kind> {
    if packet.proto != TCP && packet.proto != UDP || packet.later_fragment || packet.opens {
        return Ok(());
    }
    let back = ElbKey { client: packet.dst, server: packet.src, proto: u32::from(packet.proto) };
    // SAFETY: the program alone writes the entry, and never changes one.
    let Some(vip) = (unsafe { ELB_RETURNS.get(back) }) else { return Ok(()) };
    translate(ctx, packet, End::Source, *vip)
}

/// Hands the packet to the NIC with this address.
#[inline(always)]
fn deliver(ctx: &TcContext, packet: &Packet, ip: [u8; 4], otherwise: Kind) -> Result<i32, Kind> {
    // SAFETY: as for `NICS`.
    let to = unsafe { ROUTES.get(ip) }.ok_or(otherwise)?;
    store(ctx, 0, &to.mac)?;
    store(ctx, 6, &gateway_mac())?;
    log_flow(ctx, to.at, packet, 1);
    // SAFETY: as in `fabric_port`.
    let tagged = unsafe { (*ctx.skb.skb).vlan_present } != 0;
    // SAFETY: helpers on a valid context.
    let failed = unsafe {
        (tagged && bpf_skb_vlan_pop(ctx.skb.skb) != 0)
            || (to.at.vid != 0 && bpf_skb_vlan_push(ctx.skb.skb, ETH_P_8021Q.to_be(), to.at.vid) != 0)
    };
    if failed {
        return Err(Kind::Malformed);
    }
    Ok(redirect(to.at.ifindex))
}

#[inline(always)]
fn parse(ctx: &TcContext) -> Result<Packet, Kind> {
    let header = load::<[u8; 20]>(ctx, ETH_LEN)?;
    let header_len = usize::from(header[0] & 0xf) * 4;
    let total_len = usize::from(u16::from_be_bytes([header[2], header[3]]));
    // A GSO packet larger than 64 KiB has a total length of 0 (BIG TCP).
    let fits = total_len == 0 || total_len >= header_len && ETH_LEN + total_len <= ctx.len() as usize;
    if header[0] >> 4 != 4 || header_len < 20 || !fits {
        return Err(Kind::Malformed);
    }
    let mut packet = Packet {
        l4: ETH_LEN + header_len,
        src: Addr { ip: [header[12], header[13], header[14], header[15]], port: 0, pad: 0 },
        dst: Addr { ip: [header[16], header[17], header[18], header[19]], port: 0, pad: 0 },
        proto: header[9],
        later_fragment: u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0,
        opens: false,
    };
    if packet.later_fragment {
        return Ok(packet);
    }
    match packet.proto {
        TCP | UDP => {
            let [s0, s1, d0, d1] = load::<[u8; 4]>(ctx, packet.l4)?;
            packet.src.port = u16::from_be_bytes([s0, s1]);
            packet.dst.port = u16::from_be_bytes([d0, d1]);
            if packet.proto == TCP {
                let [flags] = load::<[u8; 1]>(ctx, packet.l4 + 13)?;
                packet.opens = flags & (TCP_SYN | TCP_ACK) == TCP_SYN;
            }
        }
        ICMP => {
            let [kind, _, _, _, i0, i1] = load::<[u8; 6]>(ctx, packet.l4)?;
            if kind == 0 || kind == 8 {
                packet.src.port = u16::from_be_bytes([i0, i1]);
            }
            packet.dst.port = u16::from(kind);
        }
        _ => {}
    }
    Ok(packet)
}

/// One end of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Source,
    Destination,
}

/// Gives one end of the packet another address (and port), checksums included: right for computed, partial and
/// absent ones.
#[inline(always)]
fn translate(ctx: &TcContext, packet: &mut Packet, end: End, to: Addr) -> Result<(), Kind> {
    let (from, ip_at, port_at) = match end {
        End::Source => (packet.src, ETH_LEN + 12, packet.l4),
        End::Destination => (packet.dst, ETH_LEN + 16, packet.l4 + 2),
    };
    let old = u64::from(u32::from_ne_bytes(from.ip));
    let new = u64::from(u32::from_ne_bytes(to.ip));
    ctx.l3_csum_replace(ETH_LEN + 10, old, new, 4).map_err(|_| Kind::Malformed)?;
    store(ctx, ip_at, &to.ip)?;
    let (checksum_at, flags) = match packet.proto {
        TCP => (packet.l4 + 16, 0),
        UDP => (packet.l4 + 6, u64::from(BPF_F_MARK_MANGLED_0)),
        _ => (0, 0),
    };
    if checksum_at != 0 && !packet.later_fragment {
        ctx.l4_csum_replace(checksum_at, old, new, flags | u64::from(BPF_F_PSEUDO_HDR) | 4)
            .map_err(|_| Kind::Malformed)?;
        if from.port != to.port {
            ctx.l4_csum_replace(
                checksum_at,
                u64::from(from.port.to_be()),
                u64::from(to.port.to_be()),
                flags | 2,
            )
            .map_err(|_| Kind::Malformed)?;
            store(ctx, port_at, &to.port.to_be_bytes())?;
        }
    }
    match end {
        End::Source => packet.src = to,
        End::Destination => packet.dst = to,
    }
    Ok(())
}

#[inline(always)]
fn log_flow(ctx: &TcContext, at: PortVlan, packet: &Packet, to_nic: u8) {
    // SAFETY: set by the loader, read as it is then.
    if unsafe { core::ptr::read_volatile(&raw const LOG_FLOWS) } == 0 {
        return;
    }
    let key = FlowKey {
        at,
        src: packet.src.ip,
        dst: packet.dst.ip,
        sport: packet.src.port,
        dport: packet.dst.port,
        proto: packet.proto,
        to_nic,
        pad: [0; 2],
    };
    let mut entry = FLOW_LOG.get_ptr_mut(key);
    if entry.is_none() {
        // EEXIST: another CPU was faster.
        let _ = FLOW_LOG.insert(key, FlowCount { packets: 0, bytes: 0 }, u64::from(BPF_NOEXIST));
        entry = FLOW_LOG.get_ptr_mut(key);
    }
    let Some(entry) = entry else { return };
    // SAFETY: as in `fabric_port`.
    let segments = unsafe { (*ctx.skb.skb).gso_segs }.max(1);
    // SAFETY: a map value is aligned and stays valid for the program's run; it is this CPU's own.
    unsafe {
        (*entry).packets += u64::from(segments);
        (*entry).bytes += u64::from(ctx.len());
    }
}

#[inline(always)]
fn count(at: PortVlan, kind: Kind) {
    let key = CountKey { at, kind: kind as u32 };
    let mut entry = COUNTS.get_ptr_mut(key);
    if entry.is_none() {
        let _ = COUNTS.insert(key, 0, u64::from(BPF_NOEXIST));
        entry = COUNTS.get_ptr_mut(key);
    }
    if let Some(entry) = entry {
        // SAFETY: as in `log_flow`.
        unsafe { *entry += 1 };
    }
}

#[inline(always)]
fn in_vpc(ip: [u8; 4]) -> bool {
    // SAFETY: set by the loader, read as they are then.
    let (network, mask) = unsafe {
        (core::ptr::read_volatile(&raw const VPC_NETWORK), core::ptr::read_volatile(&raw const VPC_MASK))
    };
    u32::from_be_bytes(ip) & mask == network
}

#[inline(always)]
fn gateway_mac() -> [u8; 6] {
    // SAFETY: set by the loader, read as it is then.
    unsafe { core::ptr::read_volatile(&raw const GATEWAY_MAC) }
}

#[inline(always)]
fn redirect(ifindex: u32) -> i32 {
    // SAFETY: the helper takes plain numbers.
    unsafe { bpf_redirect(ifindex, 0) as i32 }
}

#[inline(always)]
fn load<T>(ctx: &TcContext, offset: usize) -> Result<T, Kind> {
    ctx.load(offset).map_err(|_| Kind::Malformed)
}

#[inline(always)]
fn store<T>(ctx: &TcContext, offset: usize, value: &T) -> Result<(), Kind> {
    ctx.store(offset, value, 0).map_err(|_| Kind::Malformed)
}

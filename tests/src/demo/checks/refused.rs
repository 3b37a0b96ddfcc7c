//! What must not pass: frames in another's name from a pod, and frames from the fabric that are nobody's.
//!
//! Each sends raw frames and then looks at both ends: the counter of the reason rose by exactly their number, and nobody
//! whom they could have reached saw one. A marker in each frame tells it from all others.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use super::{Cast, Proof};
use crate::{
    demo::evidence::{Result, Watch},
    ensure,
    lab::{
        GATEWAY_MAC, Mac, Netns, Pod, Subnet,
        net::UdpEcho,
        raw::{Captured, Frame, Sender, Sniffer},
    },
};

/// How often each frame is sent.
const TIMES: u64 = 5;
const MARKER: &[u8] = b"eniway-must-not-pass";
/// How long nothing must be seen for.
const QUIET: Duration = Duration::from_millis(50);
/// A port that nothing else uses.
const PORT: u16 = 7777;

/// Ears at several places.
struct Ears {
    sniffers: Vec<(String, Sniffer)>,
}

impl Ears {
    /// At everything that the fabric gets from anybody, and at the doors of these pods.
    fn open<'p>(c: &Cast<'_>, fabric: bool, pods: impl IntoIterator<Item = &'p Pod>) -> Result<Self> {
        let mut sniffers = Vec::new();
        if fabric {
            sniffers.push(("the fabric".to_owned(), Sniffer::open(c.lab.fabric().netns(), "")?));
        }
        for pod in pods {
            sniffers.push((pod.name.clone(), Sniffer::open(&pod.netns, "eth0")?));
        }
        Ok(Self { sniffers })
    }

    /// Fails if anything was, or is being, heard that the filter knows.
    fn heard_nothing(&mut self, mut is_ours: impl FnMut(&Captured) -> bool) -> Result<()> {
        for (who, sniffer) in &mut self.sniffers {
            let heard = sniffer.collect(QUIET, |frame| !frame.outgoing && is_ours(frame))?;
            ensure!(heard.is_empty(), "{who} saw it: {heard:?}");
        }
        Ok(())
    }
}

fn is_marked(frame: &Captured) -> bool {
    frame.data.windows(MARKER.len()).any(|window| window == MARKER)
}

/// Sends the frames from inside `a`, and expects each to be dropped for that reason and seen by nobody.
fn from_pod(
    c: &Cast<'_>,
    reason: &'static str,
    frames: &[Vec<u8>],
    is_ours: impl FnMut(&Captured) -> bool,
) -> Result<Proof> {
    let dropped = Watch::pod(c.lab, c.a, "egress", reason)?;
    let mut ears = Ears::open(c, true, [c.near])?;
    let start = Instant::now();
    let count = send(&c.a.netns, "eth0", frames)?;
    dropped.exactly(count)?;
    let latency = start.elapsed();
    ears.heard_nothing(is_ours)?;
    let detail =
        format!("{count} frames sent, {count} {reason} counted, none at the fabric or at {}", c.near.name);
    Ok(Proof { latency, detail })
}

fn send(netns: &Netns, interface: &str, frames: &[Vec<u8>]) -> Result<u64> {
    let sender = Sender::open(netns, interface)?;
    for frame in frames {
        (0..TIMES).try_for_each(|_| sender.send(frame))?;
    }
    Ok(TIMES * frames.len() as u64)
}

/// A datagram to the VM and one to the neighbour, so that both the wire and the fast path are tried.
fn datagrams(c: &Cast<'_>, frame: &Frame, src: Ipv4Addr) -> Vec<Vec<u8>> {
    let to = [c.vm.ip, c.near.ip];
    let datagram =
        |dst| frame.clone().udp(SocketAddrV4::new(src, PORT), SocketAddrV4::new(dst, PORT), MARKER);
    to.map(datagram).to_vec()
}

pub(super) fn spoof_ip(c: &Cast<'_>) -> Result<Proof> {
    let frame = Frame::new(GATEWAY_MAC, c.a.mac);
    let mut frames = datagrams(c, &frame, c.far.ip);
    frames.extend(datagrams(c, &frame, c.vm.ip));
    from_pod(c, "source-address", &frames, is_marked)
}

pub(super) fn spoof_mac(c: &Cast<'_>) -> Result<Proof> {
    let mut frames = datagrams(c, &Frame::new(GATEWAY_MAC, c.near.mac), c.a.ip);
    frames.extend(datagrams(c, &Frame::new(GATEWAY_MAC, Mac([2, 0, 0, 0, 0, 9])), c.a.ip));
    from_pod(c, "source-mac", &frames, is_marked)
}

pub(super) fn spoof_arp(c: &Cast<'_>) -> Result<Proof> {
    let gateway = Subnet::PODS.gateway;
    let to = (c.near.mac, c.near.ip);
    let frames = [
        // The classic: "the gateway is at my MAC".
        Frame::new(to.0, c.a.mac).arp(2, (c.a.mac, gateway), to),
        Frame::new(to.0, c.a.mac).arp(2, (c.a.mac, c.far.ip), to),
        // The frame is the pod's own, what it says is not.
        Frame::new(to.0, c.a.mac).arp(2, (c.near.mac, c.a.ip), to),
        Frame::new(Mac([0xff; 6]), c.a.mac).arp(1, (c.a.mac, c.far.ip), (Mac([0; 6]), gateway)),
    ];
    let from_a = c.a.mac;
    from_pod(c, "arp-spoof", &frames, |frame| frame.src_mac() == from_a && frame.arp().is_some())
}

pub(super) fn spoof_vlan(c: &Cast<'_>) -> Result<Proof> {
    let mut frames = Vec::new();
    // Its own VLAN, its neighbour's, and a neighbour's under one of its own.
    for frame in [
        Frame::new(GATEWAY_MAC, c.a.mac).vlan(c.a.vlan),
        Frame::new(GATEWAY_MAC, c.a.mac).vlan(c.near.vlan),
        Frame::new(GATEWAY_MAC, c.a.mac).vlan(c.a.vlan).vlan(c.near.vlan),
        Frame::new(GATEWAY_MAC, c.a.mac).tag(0x88a8, c.near.vlan),
    ] {
        frames.extend(datagrams(c, &frame, c.a.ip));
    }
    from_pod(c, "tagged-by-pod", &frames, is_marked)
}

/// Sends the frames to the node as if the fabric had, and expects each to be dropped for that reason and seen by no pod,
/// nor by the node's own stack.
fn from_fabric(c: &Cast<'_>, reason: &'static str, frame: &Frame, pod: &Pod) -> Result<Proof> {
    let dropped = Watch::node(c.lab, c.node, "ingress", reason)?;
    let mut ears = Ears::open(c, false, c.lab.pods().iter().filter(|pod| pod.node == c.node.name))?;
    let host = UdpEcho::start(&c.node.netns, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, PORT))?;
    let from = SocketAddrV4::new(c.vm.ip, PORT);
    let frames: Vec<Vec<u8>> = [pod.ip, c.node.parent_ip, c.node.ip]
        .iter()
        .map(|ip| frame.clone().udp(from, SocketAddrV4::new(*ip, PORT), MARKER))
        .collect();
    let start = Instant::now();
    let count = send(c.lab.fabric().netns(), &c.node.parent_port, &frames)?;
    dropped.exactly(count)?;
    let latency = start.elapsed();
    ears.heard_nothing(is_marked)?;
    ensure!(host.seen().is_empty(), "the node's own stack saw it: {:?}", host.seen());
    let detail =
        format!("{count} frames sent, {count} {reason} counted, none at a pod or in the node's stack");
    Ok(Proof { latency, detail })
}

pub(super) fn unknown_vlan(c: &Cast<'_>) -> Result<Proof> {
    let frame = Frame::new(c.a.mac, GATEWAY_MAC).vlan(999);
    from_fabric(c, "unknown-vlan", &frame, c.a)
}

pub(super) fn double_tag(c: &Cast<'_>) -> Result<Proof> {
    let frame = Frame::new(c.a.mac, GATEWAY_MAC).vlan(c.a.vlan).vlan(c.near.vlan);
    from_fabric(c, "double-tag", &frame, c.a)
}

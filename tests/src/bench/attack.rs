//! Floods: frames that must not get through, fed to what drops them (see [`feed`](super::feed)).

use std::{
    any::Any,
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
};

use datapath_common::abi::{Direction, Outcome};
use datapath_user::{
    ethtool::{self, Offload},
    pin::Pins,
    tables::Maps,
};
use nix::net::if_::if_indextoname;

use super::{
    Place,
    feed::Source,
    floor, labs,
    load::Load,
    system::{Ends, Proof, System, Way, veth},
};
use crate::lab::{Error, GATEWAY_MAC, Lab, Mac, Netns, Pod, Result, XdpMode, raw::Frame};

/// On no parent of the lab.
const UNKNOWN_VLAN: u16 = 4000;
/// Of another NIC.
const OTHER_MAC: Mac = Mac([0xfa, 0x16, 0x3e, 9, 9, 9]);
/// Of no pod of the lab.
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 1, 16, 199);
const REMOTE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 1, 16, 250), 4000);
/// With a tag, the shortest frame.
const PAYLOAD: [u8; 18] = [0; 18];

const FROM_THE_WIRE: [Load; 3] = [Load::UnknownVlan, Load::WrongMac, Load::WrongAddress];

/// The parent's drops by a bare XDP program, the pod's by a bare tc program.
pub(super) fn bare() -> Result<System> {
    let lab = labs::lab("flood-bare").build()?;
    let pod = lab.pod("a")?;
    let node = &lab.node_of(pod)?.netns;
    let drop = floor::attach_xdp(node, "eth1", "floor_drop")?;
    veth(node, "pod", &pod.netns, pod.mac)?;
    labs::address(pod)?;
    let shot = floor::attach(node, "pod", "floor_shot", 0, 0)?;
    napi(node, "pod")?;
    let pod_way = from_pod(pod, node, "pod");
    let ways = from_the_wire(&lab)?.chain([pod_way]).collect();
    Ok(System { ways, hold: hold((drop, shot), lab) })
}

/// The agent's default, but for XDP. Without XDP the parent has GRO on, for NAPI, as NICs have it.
pub(super) fn eniway(id: &str, xdp: XdpMode) -> Result<System> {
    let lab = labs::with_agents(id, true, xdp)?;
    let pod = lab.pod("a")?;
    let node = &lab.node_of(pod)?.netns;
    let pins = lab.agent(&pod.node)?.pin_dir();
    let live = open(pins)?.pods().map_err(|error| Error::Protocol(error.to_string()))?;
    let live = live.iter().find(|live| live.record.ipv4 == pod.ip.octets());
    let record = live.ok_or_else(|| Error::Unknown(format!("record of pod {}", pod.name)))?.record;
    let mut ways: Vec<Way> = from_the_wire(&lab)?.collect();
    if xdp == XdpMode::Off {
        napi(node, "eth1")?;
        let name = node
            .run(|| if_indextoname(record.ifindex))?
            .map_err(Error::errno(format!("interface {} in {node}", record.ifindex)))?;
        let name = name.to_string_lossy().into_owned();
        napi(node, &name)?;
        ways.push(from_pod(pod, node, &name));
    }
    for way in &mut ways {
        let Ends::Feed(load, _) = &way.ends else { continue };
        let (id, direction, outcome) = match load {
            Load::UnknownVlan => (0, Direction::Ingress, Outcome::UnknownVlan),
            Load::WrongMac => (record.id, Direction::Ingress, Outcome::WrongMac),
            Load::WrongAddress => (record.id, Direction::Ingress, Outcome::WrongAddress),
            _ => (record.id, Direction::Egress, Outcome::SourceAddress),
        };
        way.proof = Some(counted(pins, load.round().1, id, direction, outcome));
    }
    Ok(System { ways, hold: hold((), lab) })
}

/// 8021q, and what the stacks of node and pod make of such frames. The parent has GRO on.
pub(super) fn vlan() -> Result<System> {
    let lab = labs::with_vlans("flood-vlan")?;
    napi(&lab.node("node-1")?.netns, "eth1")?;
    let ways = from_the_wire(&lab)?.collect();
    Ok(System { ways, hold: hold((), lab) })
}

fn hold(programs: impl Any, lab: Lab) -> Box<dyn Any> {
    Box::new((programs, lab))
}

/// Lets an end of a veth pair receive frames that XDP sends.
fn napi(netns: &Netns, interface: &str) -> Result<()> {
    let set = netns.run(|| ethtool::set(interface, Offload::Gro, true))?;
    match set {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::Topology(format!("{interface} of {netns} keeps GRO off"))),
        Err(error) => Err(Error::Topology(error.to_string())),
    }
}

fn way(load: Load, source: Source) -> Way {
    Way { place: Place::Attack, name: None, endpoints: 2, ends: Ends::Feed(load, source), proof: None }
}

/// To pod `a` and its node, out of the fabric's port.
fn from_the_wire(lab: &Lab) -> Result<impl Iterator<Item = Way>> {
    let pod = lab.pod("a")?.clone();
    let node = lab.node_of(&pod)?;
    let from = (lab.fabric().netns().clone(), node.parent_port.clone());
    let into = (node.netns.clone(), "eth1".to_owned());
    Ok(FROM_THE_WIRE.into_iter().map(move |load| {
        let (mac, vlan, ip) = match load {
            Load::UnknownVlan => (pod.mac, UNKNOWN_VLAN, pod.ip),
            Load::WrongMac => (OTHER_MAC, pod.vlan, pod.ip),
            _ => (pod.mac, pod.vlan, OTHER),
        };
        let frame = Frame::new(mac, GATEWAY_MAC).vlan(vlan).udp(REMOTE, SocketAddrV4::new(ip, 9), &PAYLOAD);
        way(load, Source { from: from.clone(), into: into.clone(), frame })
    }))
}

/// Out of pod `a`, in another's name.
fn from_pod(pod: &Pod, node: &Netns, host_side: &str) -> Way {
    let frame = Frame::new(GATEWAY_MAC, pod.mac).udp(SocketAddrV4::new(OTHER, 9), REMOTE, &PAYLOAD);
    let from = (pod.netns.clone(), "eth0".to_owned());
    way(Load::SpoofingPod, Source { from, into: (node.clone(), host_side.to_owned()), frame })
}

fn open(pins: &Path) -> Result<Maps> {
    Maps::open(&Pins::new(pins)).map_err(|error| Error::Protocol(error.to_string()))
}

/// All frames of the first round were dropped for this reason.
fn counted(pins: &Path, sent: u64, id: u32, direction: Direction, outcome: Outcome) -> Proof {
    let pins = pins.to_owned();
    Box::new(move || {
        let row = open(&pins)?.counters(id).map_err(|error| Error::Protocol(error.to_string()))?;
        let packets = row.get(direction, outcome).packets;
        if packets < sent {
            return Err(Error::Protocol(format!(
                "{packets} of {sent} frames counted as {outcome:?} of pod {id}"
            )));
        }
        Ok(())
    })
}

//! One system in several sizes: nodes with up to 4,000 pods, and up to 100,000 flows at once.

use std::path::Path;

use datapath_common::abi::Endpoint;
use datapath_user::{
    config::Limits,
    pin::Pins,
    tables::{Maps, Tables, TablesError},
};
use serde_json::json;

use super::{
    Pair, Place,
    flows::MOST,
    labs,
    load::PORTS,
    system::{Ends, Proof, System, Way},
};
use crate::lab::{Error, Lab, Result, agent::Signal};

/// Pods on each node. The first size is what the others are compared with.
const PODS: [u32; 4] = [2, 100, 1000, 4000];
/// Flows at once, on the largest nodes; also on the smallest, the first.
const FLOWS: [u32; 3] = [1, 1000, MOST];
/// Room for all of them.
const LIMITS: Limits = Limits { endpoints: 4096, flows: 131_072 };

/// Two nodes of each size, with security groups that have to be asked about each flow. The pods that are there for their
/// number's sake are records in the tables; the agents, which know nothing of them, have been stopped.
pub(super) fn eniway() -> Result<System> {
    let mut ways = Vec::new();
    let mut labs = Vec::new();
    for pods in PODS {
        let lab = labs::lab(&format!("scale-{pods}")).limits(LIMITS).elb_flows(2 * LIMITS.flows).build()?;
        lab.start_agents()?;
        for agent in lab.agents() {
            let ports = format!("{}-{}", PORTS.start(), PORTS.end());
            let ingress = ["tcp", "udp"].map(|protocol| {
                json!({ "direction": "ingress", "action": "allow", "protocol": protocol, "ports": ports })
            });
            let egress = json!({ "direction": "egress", "action": "allow" });
            let [tcp, udp] = ingress;
            labs::give_groups(agent, &json!([tcp, udp, egress]), "check")?;
            agent.stop(Signal::SIGKILL)?;
            fill(agent.pin_dir(), pods).map_err(|error| Error::Protocol(error.to_string()))?;
        }
        ways.extend(of_pods(&lab, pods)?);
        if pods == PODS[0] || pods == PODS[PODS.len() - 1] {
            ways.extend(of_flows(&lab, pods)?);
        }
        labs.push(lab);
    }
    Ok(System { ways, hold: Box::new(labs) })
}

/// Adds records until the node has so many pods. All are like the first one, but for what tells pods apart.
fn fill(pins: &Path, pods: u32) -> std::result::Result<(), TablesError> {
    let maps = Maps::open(&Pins::new(pins))?;
    let real = maps.pods()?;
    let Some(like) = real.first().map(|live| live.record) else { return Ok(()) };
    let taken: Vec<u16> = real.iter().map(|live| live.record.vid).collect();
    let mut tables = Tables::new(maps)?;
    let free = (1..4095_u16).filter(|vid| !taken.contains(vid));
    for (number, vid) in (real.len() as u32..pods).zip(free) {
        let [_, _, high, low] = number.to_be_bytes();
        let mac = [0xfa, 0x16, 0x3e, 0xff, high, low];
        let record = Endpoint {
            owner: like.owner.wrapping_add(u64::from(number)),
            ifindex: 10_000 + number,
            ipv4: [10, 1, 32 + high, low],
            mac,
            wire_mac: mac,
            vid,
            ..like
        };
        tables.put(&record)?;
    }
    Ok(())
}

fn way(place: Place, pods: u32, flows: Option<u32>, ends: Ends) -> Way {
    let name = match flows {
        // What the others are compared with.
        None | Some(1) if pods == PODS[0] => None,
        None => Some(format!("eniway-{pods}-pods")),
        Some(1) => Some(format!("eniway-{pods}-pods-1-flow")),
        Some(flows) => Some(format!("eniway-{pods}-pods-{flows}-flows")),
    };
    Way { place, name, endpoints: pods, ends, proof: None }
}

fn of_pods(lab: &Lab, pods: u32) -> Result<Vec<Way>> {
    let mut ways = Vec::new();
    for place in [Place::PodsLocal, Place::PodsWire] {
        ways.extend(labs::pair(lab, place)?.map(|pair| way(place, pods, None, Ends::Pair(pair))));
    }
    Ok(ways)
}

fn of_flows(lab: &Lab, pods: u32) -> Result<Vec<Way>> {
    let mut ways = Vec::new();
    let most = if pods == PODS[0] { 1 } else { FLOWS.len() };
    for place in [Place::FlowsLocal, Place::FlowsWire, Place::FlowsElb] {
        let Some(Pair { client, server, to }) = labs::pair(lab, place)? else { continue };
        for flows in &FLOWS[..most] {
            let pair = Pair { client: client.clone(), server: server.clone(), to };
            let mut way = way(place, pods, Some(*flows), Ends::Flows(pair, *flows));
            way.proof = known(lab.agent("node-1")?.pin_dir(), place, *flows);
            ways.push(way);
        }
    }
    Ok(ways)
}

/// The node knows so many flows.
fn known(pins: &Path, place: Place, flows: u32) -> Option<Proof> {
    let local = match place {
        Place::FlowsLocal => true,
        Place::FlowsElb => false,
        // Between nodes there is nothing to be known.
        _ => return None,
    };
    let pins = pins.to_owned();
    Some(Box::new(move || {
        let count = || {
            let maps = Maps::open(&Pins::new(&pins))?;
            Ok::<_, TablesError>(if local { maps.policy.pairs()?.len() } else { maps.flows()?.len() })
        };
        let count = count().map_err(|error| Error::Protocol(error.to_string()))?;
        if count < flows as usize {
            return Err(Error::Protocol(format!("{}: {count} flows are known, of {flows}", place.name())));
        }
        Ok(())
    }))
}

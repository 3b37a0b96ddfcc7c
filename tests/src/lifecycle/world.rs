//! The lab of the measurement, and how packets go in it.

use std::net::{Ipv4Addr, SocketAddrV4};

use datapath_common::abi::Outcome;
use serde_json::{Value, json};

use super::load::{Ends, Path};
use crate::lab::{Agent, Error, Lab, Pod, PodSpec, Protocol, Result, VipSpec, XdpMode, agent::READY};

const WIRE: u16 = 7_001;
const FAST_PATH: u16 = 7_002;
const ELB_SAME_NODE: u16 = 7_003;
const ELB_OTHER_NODE: u16 = 7_004;
const VIP_SAME_NODE: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 201);
const VIP_OTHER_NODE: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 202);

/// Builds it and starts the agents. Flows between the pods are judged one by one, and remembered: more state than
/// pods that are open to each other have.
pub(super) fn build(id: &str, xdp: XdpMode) -> Result<Lab> {
    let pod = |name: &str, node: &str, last: u8| PodSpec {
        namespace: "default".into(),
        name: name.into(),
        node: node.into(),
        ip: [10, 1, 16, last].into(),
        vlan: 3_000 + u16::from(last),
        eip: None,
        nginx: false,
    };
    let mut lab = Lab::builder(id)
        .node("n1", [10, 1, 0, 11], [10, 1, 16, 11])
        .node("n2", [10, 1, 0, 12], [10, 1, 16, 12])
        .pod_spec(pod("a", "n1", 101))
        .pod_spec(pod("b", "n1", 102))
        .pod_spec(pod("c", "n2", 103))
        .xdp(xdp)
        .flow_log(false);
    for (ip, port, backend) in [(VIP_SAME_NODE, ELB_SAME_NODE, "b"), (VIP_OTHER_NODE, ELB_OTHER_NODE, "c")] {
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            let backends = vec![backend.into()];
            lab = lab.vip(VipSpec { ip, port, protocol, target_port: port, backends, health_check: false });
        }
    }
    let lab = lab.build()?;
    lab.start_agents()?;
    lab.agents().iter().try_for_each(judge)?;
    Ok(lab)
}

/// Only the agents know of the group: the fabric judges nothing, which it could not do so fast.
fn judge(agent: &Agent) -> Result<()> {
    agent.change(|document| {
        document["security_groups"] = json!([{ "id": "sg-load", "rules": [
            { "direction": "ingress", "action": "allow", "protocol": "udp", "ports": "7000-7099", "group": "sg-load" },
            { "direction": "ingress", "action": "allow", "protocol": "tcp", "ports": "7000-7099", "group": "sg-load" },
            { "direction": "egress", "action": "allow" } ] }]);
        for pod in document["pods"].as_array_mut().into_iter().flatten() {
            pod["fast_path"] = json!("security-groups");
            pod["security_groups"] = json!(["sg-load"]);
        }
    })?;
    agent.wait_ready(READY)
}

/// All pairs of ends: what asks, what answers, and by which address.
pub(super) fn ends(lab: &Lab) -> Result<[Ends<'_>; 4]> {
    let (a, b, c) = (lab.pod("a")?, lab.pod("b")?, lab.pod("c")?);
    let direct = |path, server: &'static str, port| -> Result<Ends<'_>> {
        let server = lab.pod(server)?;
        Ok(Ends { path, share: 1.0, client: a, server, port, to: SocketAddrV4::new(server.ip, port) })
    };
    let by_elb = |server, vip, port| {
        let to = SocketAddrV4::new(vip, port);
        Ends { path: Path::Elb, share: 0.5, client: a, server, port, to }
    };
    Ok([
        direct(Path::Wire, "c", WIRE)?,
        direct(Path::FastPath, "b", FAST_PATH)?,
        by_elb(b, VIP_SAME_NODE, ELB_SAME_NODE),
        by_elb(c, VIP_OTHER_NODE, ELB_OTHER_NODE),
    ])
}

/// Packets that pods of the first node have sent, by door.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Doors {
    /// By the fast path.
    pub(super) local: u64,
    /// On their VLAN.
    pub(super) wire: u64,
    /// Those of them that would have taken the fast path, had security groups been known and allowed it.
    pub(super) hairpin: u64,
}

impl Doors {
    pub(super) fn look(lab: &Lab) -> Result<Self> {
        let agent = lab.agent("n1")?;
        let pods: Vec<String> = lab.pods().iter().map(Pod::full_name).collect();
        let table: Value = serde_json::from_str(&agent.cli(&["counters", "--json"])?)
            .map_err(|error| Error::Protocol(format!("`eniway counters`: {error}")))?;
        let sum = |outcomes: &[Outcome]| {
            let rows = table["rows"].as_array().into_iter().flatten();
            rows.filter(|row| row["direction"] == "egress")
                .filter(|row| outcomes.iter().any(|outcome| row["outcome"] == outcome.name()))
                .filter(|row| pods.iter().any(|pod| row["pod"] == **pod))
                .filter_map(|row| row["packets"].as_u64())
                .sum()
        };
        let hairpin =
            [Outcome::PolicyWire, Outcome::PolicyRefused, Outcome::PolicyNoFlow, Outcome::PolicyRevoked];
        Ok(Self { local: sum(&[Outcome::Local]), wire: sum(&[Outcome::Wire]), hairpin: sum(&hairpin) })
    }
}

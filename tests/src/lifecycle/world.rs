//! The lab of the measurement, and how packets go in it.

use std::net::{Ipv4Addr, SocketAddrV4};

use datapath_common::abi::Outcome;
use serde_json::json;

use super::load::{Ends, Path};
use crate::lab::{Lab, Pod, PodSpec, Protocol, Result, VipSpec, XdpMode};

const WIRE: u16 = 7_001;
const FAST_PATH: u16 = 7_002;
const ELB_SAME_NODE: u16 = 7_003;
const ELB_OTHER_NODE: u16 = 7_004;
const VIP_SAME_NODE: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 201);
const VIP_OTHER_NODE: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 202);

/// Builds it and starts the agents. Flows between the pods are judged one by one, and remembered: more state than
/// pods that are open to each other have.
pub(super) fn build(id: &str, xdp: XdpMode) -> Result<Lab> {
    let pod = |name, node, last: u8| PodSpec::bare(name, node, [10, 1, 16, last], 3_000 + u16::from(last));
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
    // The fabric could not judge so fast.
    let rules = json!([
        { "direction": "ingress", "action": "allow", "protocol": "udp", "ports": "7000-7099", "group": "sg-load" },
        { "direction": "ingress", "action": "allow", "protocol": "tcp", "ports": "7000-7099", "group": "sg-load" },
        { "direction": "egress", "action": "allow" } ]);
    lab.agents().iter().try_for_each(|agent| agent.judge_all("sg-load", &rules))?;
    Ok(lab)
}

/// All pairs of ends: what asks, what answers, and by which address.
pub(super) fn ends(lab: &Lab) -> Result<[Ends<'_>; 4]> {
    let (a, b, c) = (lab.pod("a")?, lab.pod("b")?, lab.pod("c")?);
    let ends = |path, share, server, ip, port| {
        let to = SocketAddrV4::new(ip, port);
        Ends { path, share, client: a, server, port, to }
    };
    Ok([
        ends(Path::Wire, 1.0, c, c.ip, WIRE),
        ends(Path::FastPath, 1.0, b, b.ip, FAST_PATH),
        ends(Path::Elb, 0.5, b, VIP_SAME_NODE, ELB_SAME_NODE),
        ends(Path::Elb, 0.5, c, VIP_OTHER_NODE, ELB_OTHER_NODE),
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
        let pods: Vec<String> = lab.pods().iter().map(Pod::full_name).collect();
        let rows = lab.agent("n1")?.counters()?;
        let sum = |outcomes: &[Outcome]| {
            rows.iter()
                .filter(|row| row["direction"] == "egress")
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

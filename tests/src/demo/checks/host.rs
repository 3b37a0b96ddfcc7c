//! The node's own stack: kubelet, node ports, Services, and what pods may not reach.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddrV4},
    time::Duration,
};

use super::{Cast, Proof, expect_direct, gets_nowhere};
use crate::{
    demo::{
        evidence::{Place, Result, Trail, Watch, ask, expect_seen, greet},
        kube_proxy::{Rules, Source},
    },
    ensure,
    lab::net::TcpServer,
};

/// Where kubelet listens.
const KUBELET: u16 = 10250;
const NODE_PORT: u16 = 30080;
const SERVICE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 247, 0, 10), 80);
const METADATA: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(169, 254, 169, 254), 80);

pub(super) fn host_to_pod(c: &Cast<'_>) -> Result<Proof> {
    let port = c.lab.fresh_port();
    let (to_pod, from_pod) =
        (Watch::pod(c.lab, c.a, "ingress", "host")?, Watch::pod(c.lab, c.a, "egress", "host")?);
    let (response, whoami) = ask(&c.node.netns, c.a.http(), port)?;
    expect_seen(&whoami, c.a, response.local)?;
    ensure!(
        [c.node.ip, c.node.parent_ip].contains(whoami.remote.ip()),
        "{} saw {}, no address of its node",
        c.a.name,
        whoami.remote
    );
    Trail::between(c.lab, *whoami.remote.ip(), c.a.ip, port)?.none()?;
    let (there, back) = (to_pod.rose()?, from_pod.rose()?);
    let detail =
        format!("{} saw {}; {there}+{back} packets host, none at the fabric", c.a.name, whoami.remote);
    Ok(Proof { latency: response.elapsed, detail })
}

pub(super) fn pod_to_host(c: &Cast<'_>) -> Result<Proof> {
    let port = c.lab.fresh_port();
    let client = SocketAddrV4::new(c.a.ip, port);
    let to = SocketAddrV4::new(c.node.ip, KUBELET);
    let _server = TcpServer::start(&c.node.netns, to)?;
    let (from_pod, to_pod) =
        (Watch::pod(c.lab, c.a, "egress", "host")?, Watch::pod(c.lab, c.a, "ingress", "host")?);
    let (latency, seen) = greet(&c.a.netns, port, to)?;
    ensure!(seen == client, "the node saw {seen}, not {client}");
    Trail::between(c.lab, c.a.ip, c.node.ip, port)?.none()?;
    let (there, back) = (from_pod.rose()?, to_pod.rose()?);
    let detail = format!("{} saw {client}; {there}+{back} packets host, none at the fabric", c.node.name);
    Ok(Proof { latency, detail })
}

pub(super) fn nodeport_local(c: &Cast<'_>) -> Result<Proof> {
    let _rules = Rules::install(c.node, c.node.ip, NODE_PORT, &[c.a], Source::Kept)?;
    let port = c.lab.fresh_port();
    let client = SocketAddrV4::new(c.vm.ip, port);
    let to = SocketAddrV4::new(c.node.ip, NODE_PORT);
    let back = Watch::pod(c.lab, c.a, "egress", "host")?;
    let (response, whoami) = ask(&c.vm.netns, to, port)?;
    expect_seen(&whoami, c.a, client)?;
    Trail::between(c.lab, c.vm.ip, c.a.ip, port)?.none()?;
    Trail::between(c.lab, c.vm.ip, c.node.ip, port)?.both_ways(
        &Place::of_node(c.node),
        client,
        to,
        &Place::of_client(c.vm),
    )?;
    back.rose()?;
    let detail = format!("{to} -> {} saw the client {client}; answered through the node", c.a.name);
    Ok(Proof { latency: response.elapsed, detail })
}

pub(super) fn pod_to_service(c: &Cast<'_>) -> Result<Proof> {
    let _rules = Rules::install(c.node, *SERVICE.ip(), SERVICE.port(), &[c.far, c.near], Source::Kept)?;
    let returned = Watch::pod(c.lab, c.a, "ingress", "host-return")?;
    let mut seen = BTreeSet::new();
    let mut latency = Duration::ZERO;
    for _ in 0..2 {
        let port = c.lab.fresh_port();
        let client = SocketAddrV4::new(c.a.ip, port);
        // That the connection stands says that the answers came translated back: from the Service's address.
        let (response, whoami) = ask(&c.a.netns, SERVICE, port)?;
        let pod = c.lab.pod(&whoami.pod)?;
        expect_seen(&whoami, pod, client)?;
        Trail::between(c.lab, c.a.ip, *SERVICE.ip(), port)?.none()?;
        if pod.node == c.a.node {
            Trail::between(c.lab, c.a.ip, pod.ip, port)?.none()?;
        } else {
            expect_direct(c, c.a, port, pod)?;
        }
        latency = latency.max(response.elapsed);
        seen.insert(whoami.pod);
    }
    ensure!(seen.len() == 2, "only {seen:?} were chosen");
    returned.rose()?;
    let detail = format!(
        "{SERVICE} -> {} (VLAN {}) and {} (through the node); both saw {}",
        c.far.name, c.a.vlan, c.near.name, c.a.ip
    );
    Ok(Proof { latency, detail })
}

pub(super) fn metadata_denied(c: &Cast<'_>) -> Result<Proof> {
    let port = c.lab.fresh_port();
    let dropped = Watch::pod(c.lab, c.a, "egress", "denied-destination")?;
    let latency = gets_nowhere(&c.a.netns, port, METADATA, Duration::from_millis(200))?;
    Trail::between(c.lab, c.a.ip, *METADATA.ip(), port)?.none()?;
    let count = dropped.rose()?;
    Ok(Proof { latency, detail: format!("{METADATA} was not reached: {count} denied-destination counted") })
}

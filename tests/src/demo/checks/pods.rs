//! Pods, virtual machines and the internet: each at its own address.

use std::{net::SocketAddrV4, time::Duration};

use super::{Cast, Proof, expect_direct, gets_nowhere};
use crate::{
    demo::evidence::{Place, Result, Trail, Watch, ask, expect_seen, greet},
    ensure,
    lab::{Error, fabric::Kind, net::TcpServer},
};

/// Port of the servers that run beside the pods.
const SERVER: u16 = 8080;

pub(super) fn same_node(c: &Cast<'_>) -> Result<Proof> {
    let port = c.lab.fresh_port();
    let door = if c.fast_path { "local" } else { "wire" };
    let asks = Watch::pod(c.lab, c.a, "egress", door)?;
    let answers = Watch::pod(c.lab, c.near, "egress", door)?;
    let (response, whoami) = ask(&c.a.netns, c.near.http(), port)?;
    expect_seen(&whoami, c.near, SocketAddrV4::new(c.a.ip, port))?;
    let seen = expect_direct(c, c.a, port, c.near)?;
    let (there, back) = (asks.rose()?, answers.rose()?);
    Ok(Proof {
        latency: response.elapsed,
        detail: format!("{} saw {}; {there}+{back} packets {door}; {seen}", c.near.name, whoami.remote),
    })
}

pub(super) fn cross_node(c: &Cast<'_>) -> Result<Proof> {
    let port = c.lab.fresh_port();
    let (response, whoami) = ask(&c.a.netns, c.far.http(), port)?;
    expect_seen(&whoami, c.far, SocketAddrV4::new(c.a.ip, port))?;
    let seen = expect_direct(c, c.a, port, c.far)?;
    Ok(Proof {
        latency: response.elapsed,
        detail: format!("{} on {} saw {}; {seen}", c.far.name, c.far.node, whoami.remote),
    })
}

pub(super) fn vpc_to_pod(c: &Cast<'_>) -> Result<Proof> {
    let port = c.lab.fresh_port();
    let client = SocketAddrV4::new(c.vm.ip, port);
    let (response, whoami) = ask(&c.vm.netns, c.a.http(), port)?;
    expect_seen(&whoami, c.a, client)?;
    Trail::between(c.lab, c.vm.ip, c.a.ip, port)?.both_ways(
        &Place::of_pod(c.a),
        client,
        c.a.http(),
        &Place::of_client(c.vm),
    )?;
    let detail = format!("{} saw the VM {client}; both ways by VLAN {}", c.a.name, c.a.vlan);
    Ok(Proof { latency: response.elapsed, detail })
}

pub(super) fn pod_to_vpc(c: &Cast<'_>) -> Result<Proof> {
    let port = c.lab.fresh_port();
    let (client, to) = (SocketAddrV4::new(c.a.ip, port), SocketAddrV4::new(c.vm.ip, SERVER));
    let _server = TcpServer::start(&c.vm.netns, to)?;
    let (latency, seen) = greet(&c.a.netns, port, to)?;
    ensure!(seen == client, "the VM saw {seen}, not {client}");
    Trail::between(c.lab, c.a.ip, c.vm.ip, port)?.both_ways(
        &Place::of_client(c.vm),
        client,
        to,
        &Place::of_pod(c.a),
    )?;
    Ok(Proof { latency, detail: format!("the VM saw {client}; both ways by VLAN {}", c.a.vlan) })
}

pub(super) fn eip_to_pod(c: &Cast<'_>) -> Result<Proof> {
    let port = c.lab.fresh_port();
    let client = SocketAddrV4::new(c.outside.ip, port);
    let eip = c.a.eip.ok_or(Error::Unknown("EIP of example-1".to_owned()))?;
    let (response, whoami) = ask(&c.outside.netns, SocketAddrV4::new(eip, 80), port)?;
    expect_seen(&whoami, c.a, client)?;
    let trail = Trail::between(c.lab, c.outside.ip, c.a.ip, port)?;
    trail.both_ways(&Place::of_pod(c.a), client, c.a.http(), &Place::of_client(c.outside))?;
    let detail = format!("{eip} is {}; it saw {client}; both ways by VLAN {}", c.a.name, c.a.vlan);
    Ok(Proof { latency: response.elapsed, detail })
}

pub(super) fn pod_to_internet(c: &Cast<'_>) -> Result<Proof> {
    let port = c.lab.fresh_port();
    let eip = c.a.eip.ok_or(Error::Unknown("EIP of example-1".to_owned()))?;
    let to = SocketAddrV4::new(c.outside.ip, SERVER);
    let _server = TcpServer::start(&c.outside.netns, to)?;
    let (latency, seen) = greet(&c.a.netns, port, to)?;
    let wanted = SocketAddrV4::new(eip, port);
    ensure!(seen == wanted, "the server outside saw {seen}, not {wanted}");
    let sent = Trail::between(c.lab, c.a.ip, c.outside.ip, port)?.sent(
        &Place::of_pod(c.a),
        SocketAddrV4::new(c.a.ip, port),
        to,
    );
    ensure!(sent > 0, "nothing left by VLAN {}", c.a.vlan);

    // Without an elastic IP there is no way out.
    let refused = c.lab.fabric().count(Kind::NoEip)?;
    gets_nowhere(&c.near.netns, c.lab.fresh_port(), to, Duration::from_millis(200))?;
    ensure!(
        c.lab.fabric().count(Kind::NoEip)? > refused,
        "the fabric did not refuse {} a way out",
        c.near.name
    );
    Ok(Proof {
        latency,
        detail: format!("the server outside saw {wanted}; {} has no EIP and no way out", c.near.name),
    })
}

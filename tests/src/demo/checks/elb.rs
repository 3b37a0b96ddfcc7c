//! The load balancer, which keeps client addresses: the reply must leave on the VLAN that the request arrived on.

use std::{
    collections::BTreeSet,
    net::SocketAddrV4,
    time::{Duration, Instant},
};

use super::{Cast, Pinned, Proof, gets_nowhere};
use crate::{
    demo::evidence::{Place, Result, Session, Trail, Watch, ask, expect_seen},
    ensure,
    lab::{ELB_IP, Netns, Pod},
};

/// From `from` (at `place`) to the VIP and by it to `to`, which must see the client and answer on its VLAN.
fn through(c: &Cast<'_>, netns: &Netns, client: SocketAddrV4, place: &Place, to: &Pod) -> Result<Duration> {
    let (response, whoami) = ask(netns, c.vip, client.port())?;
    expect_seen(&whoami, to, client)?;
    Trail::between(c.lab, *client.ip(), to.ip, client.port())?.both_ways(
        &Place::of_pod(to),
        client,
        to.http(),
        &Place::of_pod(to),
    )?;
    let at_client = Trail::between(c.lab, *client.ip(), *c.vip.ip(), client.port())?;
    at_client.at_client(place, client, c.vip)?;
    Ok(response.elapsed)
}

pub(super) fn elb_to_pod(c: &Cast<'_>) -> Result<Proof> {
    let mut chosen = BTreeSet::new();
    let mut total = Duration::ZERO;
    let rounds = 2 * c.lab.pods().len() as u32;
    for _ in 0..rounds {
        let port = c.lab.fresh_port();
        let client = SocketAddrV4::new(c.vm.ip, port);
        let (response, whoami) = ask(&c.vm.netns, c.vip, port)?;
        let pod = c.lab.pod(&whoami.pod)?;
        expect_seen(&whoami, pod, client)?;
        Trail::between(c.lab, c.vm.ip, pod.ip, port)?.both_ways(
            &Place::of_pod(pod),
            client,
            pod.http(),
            &Place::of_pod(pod),
        )?;
        total += response.elapsed;
        chosen.insert(whoami.pod);
    }
    ensure!(chosen.len() == c.lab.pods().len(), "only {chosen:?} were chosen");
    let detail = format!("all {} pods answered in turn, each saw the VM {}", chosen.len(), c.vm.ip);
    Ok(Proof { latency: total / rounds, detail })
}

pub(super) fn health_checks(c: &Cast<'_>) -> Result<Proof> {
    let start = Instant::now();
    let backends = c.lab.elb().backends();
    ensure!(backends.len() == c.lab.pods().len(), "{} backends instead of all pods", backends.len());
    for backend in &backends {
        let pod = c.lab.pod(&backend.pod)?;
        ensure!(backend.healthy && backend.passed > 0, "{} is not healthy: {backend:?}", backend.pod);
        let trail = Trail::between(c.lab, ELB_IP, pod.ip, 80)?;
        trail.conversation(&Place::of_pod(pod), ELB_IP, pod.ip)?;
    }
    let passed: u64 = backends.iter().map(|backend| backend.passed).sum();
    Ok(Proof {
        latency: start.elapsed(),
        detail: format!("{passed} passed; the answers to {ELB_IP} left by each pod's VLAN"),
    })
}

pub(super) fn other_node(c: &Cast<'_>) -> Result<Proof> {
    let _pin = Pinned::new(c.lab, c.a.ip, c.far)?;
    let client = SocketAddrV4::new(c.a.ip, c.lab.fresh_port());
    let latency = through(c, &c.a.netns, client, &Place::of_pod(c.a), c.far)?;
    let detail = format!("{} saw {client}; answered by VLAN {} of {}", c.far.name, c.far.vlan, c.far.node);
    Ok(Proof { latency, detail })
}

pub(super) fn same_node(c: &Cast<'_>) -> Result<Proof> {
    let _pin = Pinned::new(c.lab, c.a.ip, c.near)?;
    let remembered = Watch::pod(c.lab, c.near, "ingress", "flow-remembered")?;
    let short_cut = Watch::pod(c.lab, c.near, "egress", "local")?;
    let client = SocketAddrV4::new(c.a.ip, c.lab.fresh_port());
    let latency = through(c, &c.a.netns, client, &Place::of_pod(c.a), c.near)?;
    remembered.rose()?;
    short_cut.rested()?;
    let detail = format!(
        "{} on the same node saw {client}; answered by its VLAN {}, not by the short cut",
        c.near.name, c.near.vlan
    );
    Ok(Proof { latency, detail })
}

pub(super) fn to_self(c: &Cast<'_>) -> Result<Proof> {
    let _pin = Pinned::new(c.lab, c.a.ip, c.a)?;
    let dropped = Watch::pod(c.lab, c.a, "ingress", "self-hairpin")?;
    let port = c.lab.fresh_port();
    let latency = gets_nowhere(&c.a.netns, port, c.vip, Duration::from_millis(500))?;
    let client = SocketAddrV4::new(c.a.ip, port);
    let sent = Trail::between(c.lab, c.a.ip, c.a.ip, port)?.got(&Place::of_pod(c.a), client, c.a.http());
    ensure!(sent > 0, "the ELB did not send the packet back");
    let count = dropped.rose()?;
    Ok(Proof { latency, detail: format!("the ELB chose {} itself: {count} self-hairpin counted", c.a.name) })
}

pub(super) fn node_to_elb(c: &Cast<'_>) -> Result<Proof> {
    let _pin = Pinned::new(c.lab, c.node.ip, c.a)?;
    let by_host = Watch::pod(c.lab, c.a, "egress", "host")?;
    let client = SocketAddrV4::new(c.node.ip, c.lab.fresh_port());
    let latency = through(c, &c.node.netns, client, &Place::of_node(c.node), c.a)?;
    by_host.rested()?;
    let detail = format!(
        "{} saw its own node {client}; answered by its VLAN {}, not through the node",
        c.a.name, c.a.vlan
    );
    Ok(Proof { latency, detail })
}

pub(super) fn direct_and_elb(c: &Cast<'_>) -> Result<Proof> {
    const ROUNDS: u32 = 10;
    let _pin = Pinned::new(c.lab, c.a.ip, c.near)?;
    let (direct, by_elb) = (c.lab.fresh_port(), c.lab.fresh_port());
    let start = Instant::now();
    let mut sessions = [
        (direct, Session::open(&c.a.netns, direct, c.near.http())?),
        (by_elb, Session::open(&c.a.netns, by_elb, c.vip)?),
    ];
    for _ in 0..ROUNDS {
        for (port, session) in &mut sessions {
            expect_seen(&session.ask()?, c.near, SocketAddrV4::new(c.a.ip, *port))?;
        }
    }
    let latency = start.elapsed() / (2 * ROUNDS);
    let direct_way = super::expect_direct(c, c.a, direct, c.near)?;
    Trail::between(c.lab, c.a.ip, c.near.ip, by_elb)?.both_ways(
        &Place::of_pod(c.near),
        SocketAddrV4::new(c.a.ip, by_elb),
        c.near.http(),
        &Place::of_pod(c.near),
    )?;
    let detail = format!(
        "{ROUNDS} requests each in turn; direct: {direct_way}; by the ELB: VLAN {} both ways",
        c.near.vlan
    );
    Ok(Proof { latency, detail })
}

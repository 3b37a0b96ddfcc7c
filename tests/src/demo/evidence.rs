//! What a check is made of: requests with a source port of their own, what the server saw of them, what the fabric
//! logged of them, and what the agent's counters say.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    thread,
    time::{Duration, Instant},
};

use crate::lab::{
    self, Agent, Client, Lab, Netns, Node, Pod,
    fabric::{Direction, FlowRecord},
    http::{Request, Response, Whoami},
};

/// Why a check fails.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The lab, or a connection in it.
    #[error(transparent)]
    Lab(#[from] lab::Error),
    /// Something else was seen than should be.
    #[error("{0}")]
    Wrong(String),
}

/// What a check found.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

/// Fails the check unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err($crate::demo::evidence::Failure::Wrong(format!($($message)+)));
        }
    };
}

/// A place where the fabric sees packets: a port, and a VLAN id on it (0 = untagged).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The fabric's name for the port.
    pub port: String,
    /// The VLAN id.
    pub vlan: u16,
}

impl Place {
    /// Where the sub-ENI of a pod is.
    pub fn of_pod(pod: &Pod) -> Self {
        Self { port: pod.port.clone(), vlan: pod.vlan }
    }

    /// Where a node's primary NIC is.
    pub fn of_node(node: &Node) -> Self {
        Self { port: node.primary_port.clone(), vlan: 0 }
    }

    /// Where a host without an agent is.
    pub fn of_client(client: &Client) -> Self {
        Self { port: client.name.clone(), vlan: 0 }
    }
}

/// What the fabric logged of the packets between two addresses with a given port at one end.
#[derive(Debug)]
pub struct Trail {
    records: Vec<FlowRecord>,
}

impl Trail {
    /// Reads the fabric's log.
    pub fn between(lab: &Lab, a: Ipv4Addr, b: Ipv4Addr, port: u16) -> Result<Self> {
        Ok(Self { records: lab.fabric().flows_between(a, b, port)? })
    }

    /// Packets from `src` to `dst` that the NIC at `place` sent.
    pub fn sent(&self, place: &Place, src: SocketAddrV4, dst: SocketAddrV4) -> u64 {
        self.packets(place, Direction::FromNic, src, dst)
    }

    /// Packets from `src` to `dst` that the NIC at `place` got.
    pub fn got(&self, place: &Place, src: SocketAddrV4, dst: SocketAddrV4) -> u64 {
        self.packets(place, Direction::ToNic, src, dst)
    }

    /// Bytes, whichever way, at one place.
    pub fn bytes(&self, place: &Place) -> u64 {
        self.records.iter().filter(|r| r.port == place.port && r.vlan == place.vlan).map(|r| r.bytes).sum()
    }

    /// Fails unless the fabric saw nothing of it.
    pub fn none(&self) -> Result<()> {
        ensure!(self.records.is_empty(), "the fabric saw packets that should not have been there: {self}");
        Ok(())
    }

    /// Fails unless `client` reached `server` at `place`, the answers left at the same place, and at no other place but
    /// `other` was anything seen.
    pub fn both_ways(
        &self,
        place: &Place,
        client: SocketAddrV4,
        server: SocketAddrV4,
        other: &Place,
    ) -> Result<()> {
        ensure!(
            self.got(place, client, server) > 0,
            "{client} -> {server} did not arrive on VLAN {} of {}: {self}",
            place.vlan,
            place.port
        );
        ensure!(
            self.sent(place, server, client) > 0,
            "the answer {server} -> {client} did not leave by VLAN {} of {}: {self}",
            place.vlan,
            place.port
        );
        let stray = |r: &&FlowRecord| ![place, other].iter().any(|p| p.port == r.port && p.vlan == r.vlan);
        ensure!(
            self.records.iter().find(stray).is_none(),
            "seen where it does not belong (only {place:?} and {other:?} are its places): {self}"
        );
        Ok(())
    }

    /// Fails unless both ends of a conversation with a VIP were seen at the client's place, and nothing elsewhere.
    pub fn at_client(&self, place: &Place, client: SocketAddrV4, vip: SocketAddrV4) -> Result<()> {
        ensure!(self.sent(place, client, vip) > 0, "{client} -> {vip} was not seen at {place:?}: {self}");
        ensure!(self.got(place, vip, client) > 0, "{client} got no answer from {vip}: {self}");
        let stray = |r: &&FlowRecord| place.port != r.port || place.vlan != r.vlan;
        ensure!(self.records.iter().find(stray).is_none(), "seen where it does not belong: {self}");
        Ok(())
    }

    /// Fails unless both addresses were heard at this place.
    pub fn conversation(&self, place: &Place, client: Ipv4Addr, server: Ipv4Addr) -> Result<()> {
        let heard = |direction, src: Ipv4Addr| {
            self.records.iter().any(|r| {
                r.port == place.port && r.vlan == place.vlan && r.direction == direction && *r.src.ip() == src
            })
        };
        ensure!(heard(Direction::ToNic, client), "nothing of {client} arrived at {place:?}");
        ensure!(heard(Direction::FromNic, server), "no answer of {server} left by {place:?}");
        Ok(())
    }

    fn packets(&self, place: &Place, direction: Direction, src: SocketAddrV4, dst: SocketAddrV4) -> u64 {
        let is = |r: &&FlowRecord| {
            r.port == place.port
                && r.vlan == place.vlan
                && r.direction == direction
                && r.src == src
                && r.dst == dst
        };
        self.records.iter().filter(is).map(|r| r.packets).sum()
    }
}

impl std::fmt::Display for Trail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.records.is_empty() {
            return f.write_str("the fabric saw nothing of it");
        }
        for (i, r) in self.records.iter().enumerate() {
            let way = match r.direction {
                Direction::FromNic => "from",
                Direction::ToNic => "to",
            };
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{} packets {} -> {} {way} {}.{}", r.packets, r.src, r.dst, r.port, r.vlan)?;
        }
        Ok(())
    }
}

/// A counter of an agent, watched.
pub struct Watch<'l> {
    agent: &'l Agent,
    pod: String,
    direction: &'static str,
    outcome: &'static str,
    before: u64,
}

impl<'l> Watch<'l> {
    /// A counter of a pod.
    pub fn pod(lab: &'l Lab, pod: &Pod, direction: &'static str, outcome: &'static str) -> Result<Self> {
        Self::new(lab.agent(&pod.node)?, pod.full_name(), direction, outcome)
    }

    /// A counter of packets that belong to no pod.
    pub fn node(lab: &'l Lab, node: &Node, direction: &'static str, outcome: &'static str) -> Result<Self> {
        Self::new(lab.agent(&node.name)?, "(node)".to_owned(), direction, outcome)
    }

    fn new(agent: &'l Agent, pod: String, direction: &'static str, outcome: &'static str) -> Result<Self> {
        let before = agent.counter(&pod, direction, outcome)?;
        Ok(Self { agent, pod, direction, outcome, before })
    }

    /// What was counted since.
    pub fn rise(&self) -> Result<u64> {
        Ok(self.agent.counter(&self.pod, self.direction, self.outcome)?.saturating_sub(self.before))
    }

    /// Fails unless something was counted since.
    pub fn rose(&self) -> Result<u64> {
        let rise = self.rise()?;
        ensure!(rise > 0, "{self} did not count");
        Ok(rise)
    }

    /// Fails unless nothing was counted since.
    pub fn rested(&self) -> Result<()> {
        let rise = self.rise()?;
        ensure!(rise == 0, "{self} counted {rise}");
        Ok(())
    }

    /// Waits until exactly so many were counted and no more come.
    pub fn exactly(&self, wanted: u64) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(1);
        while self.rise()? < wanted && Instant::now() < end {
            thread::sleep(Duration::from_millis(5));
        }
        thread::sleep(Duration::from_millis(20));
        let rise = self.rise()?;
        ensure!(rise == wanted, "{self} counted {rise}, not {wanted}");
        Ok(())
    }
}

impl std::fmt::Display for Watch<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "counter {} {} of {}", self.direction, self.outcome, self.pod)
    }
}

/// Asks a server `/whoami` from a source port of one's own.
pub fn ask(netns: &Netns, to: SocketAddrV4, from_port: u16) -> Result<(Response, Whoami)> {
    let response = Request::get(to, "/whoami").from_port(from_port).send(netns)?;
    ensure!(response.status == 200, "{to} answered with HTTP status {}", response.status);
    let whoami = response.whoami()?;
    Ok((response, whoami))
}

/// Fails unless it was this pod that answered, and it saw this client.
pub fn expect_seen(whoami: &Whoami, pod: &Pod, client: SocketAddrV4) -> Result<()> {
    ensure!(whoami.pod == pod.name, "{} answered instead of {}", whoami.pod, pod.name);
    ensure!(whoami.remote == client, "{} saw {}, not {client}", pod.name, whoami.remote);
    Ok(())
}

/// Fails unless one pod reaches another, which sees the pod's own address.
pub fn expect_reach(lab: &Lab, from: &Pod, to: &Pod) -> Result<()> {
    let client = SocketAddrV4::new(from.ip, lab.fresh_port());
    let (_, whoami) = ask(&from.netns, to.http(), client.port())?;
    expect_seen(&whoami, to, client)
}

/// A connection that stays open for several requests.
pub struct Session {
    stream: TcpStream,
}

impl Session {
    /// Connects.
    pub fn open(netns: &Netns, from_port: u16, to: SocketAddrV4) -> Result<Self> {
        let stream = lab::net::tcp_connect(netns, from_port, to, Duration::from_secs(2))?;
        let limit = Some(Duration::from_secs(2));
        stream
            .set_read_timeout(limit)
            .and_then(|()| stream.set_write_timeout(limit))
            .map_err(lab::Error::io(format!("connection to {to}")))?;
        Ok(Self { stream })
    }

    /// One more `/whoami`.
    pub fn ask(&mut self) -> Result<Whoami> {
        let local = match self.stream.local_addr() {
            Ok(std::net::SocketAddr::V4(local)) => local,
            _ => SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0),
        };
        let body = self.exchange().map_err(lab::Error::io(format!("asking again from {local}")))?;
        let elapsed = Duration::ZERO;
        Ok(Response { status: 200, body, local, elapsed }.whoami()?)
    }

    fn exchange(&mut self) -> std::io::Result<Vec<u8>> {
        self.stream.write_all(b"GET /whoami HTTP/1.1\r\nHost: example\r\n\r\n")?;
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            self.stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok())
            .ok_or_else(|| std::io::Error::other(format!("an answer without length: {head}")))?;
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        Ok(body)
    }
}

/// Connects to a [`TcpServer`](lab::net::TcpServer) and returns how long its answer took, and whom it saw.
pub fn greet(netns: &Netns, from_port: u16, to: SocketAddrV4) -> Result<(Duration, SocketAddrV4)> {
    let start = Instant::now();
    let limit = Duration::from_secs(2);
    let mut stream = lab::net::tcp_connect(netns, from_port, to, limit)?;
    let (_, seen) = lab::net::read_tcp_server(&mut stream, limit)?;
    Ok((start.elapsed(), seen))
}

//! A client of many flows at once: request and response over another flow each time, by datagrams.
//!
//! A socket for each flow would measure the kernel's search for sockets. Here one raw socket sends from any port, and a
//! program at the namespace's socket look-up gives the answers, whatever port they are for, to one other.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    time::{Duration, Instant},
};

use aya::{
    Ebpf,
    maps::{MapData, SockMap},
    programs::SkLookup,
};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    feed::load_object,
    load::{ECHO_DATAGRAMS, Limit},
};

/// The first port that is sent from.
const FIRST_PORT: u16 = 2000;
/// How many ports are sent from to each of the server's.
const PORTS: u32 = 50_000;
/// The most flows.
pub const MOST: u32 = PORTS * ECHO_DATAGRAMS.len() as u32;
/// Nothing takes so long.
const STUCK: Duration = Duration::from_secs(30);

const IPV4: usize = 20;
const UDP: usize = 8;
/// The flow's number.
const PAYLOAD: usize = 4;
const LENGTH: usize = IPV4 + UDP + PAYLOAD;

/// The client.
pub struct Flows {
    send: Socket,
    receive: UdpSocket,
    packet: [u8; LENGTH],
    server: Ipv4Addr,
    flows: u32,
    random: fastrand::Rng,
    steer: Ebpf,
}

impl Flows {
    /// Opens so many flows, one after the other, in the calling thread's namespace.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the program, or the server does not answer.
    pub fn open(server: Ipv4Addr, flows: u32) -> io::Result<Self> {
        if flows == 0 || flows > MOST {
            return Err(io::Error::other(format!("{flows} flows: from 1 to {MOST}")));
        }
        let probe = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        probe.connect((server, ECHO_DATAGRAMS[0]))?;
        let std::net::SocketAddr::V4(own) = probe.local_addr()? else {
            return Err(io::Error::other("an IPv6 address of an IPv4 socket"));
        };
        drop(probe);
        let receive = UdpSocket::bind((*own.ip(), 0))?;
        receive.set_read_timeout(Some(STUCK))?;
        let steer = load_steer(&receive)?;
        let send = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
        let packet = header(*own.ip(), server);
        let random = fastrand::Rng::with_seed(1);
        let mut client = Self { send, receive, packet, server, flows, random, steer };
        client.steered(|client| (0..flows).try_for_each(|flow| client.exchange(flow)))?;
        Ok(client)
    }

    /// As [`Client::measure`](super::load::Client::measure).
    ///
    /// # Errors
    ///
    /// When a datagram is lost.
    pub fn measure(&mut self, limit: Limit) -> io::Result<(u64, Duration)> {
        self.steered(|client| {
            let start = Instant::now();
            let mut done = 0;
            while limit.goes_on(done, start) {
                let flow = client.random.u32(..client.flows);
                client.exchange(flow)?;
                done += 1;
            }
            Ok((done, start.elapsed()))
        })
    }

    /// Does something while this client gets all answers: another of the same namespace may come next.
    fn steered<T>(&mut self, work: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        let link = program(&mut self.steer)?
            .attach(File::open("/proc/thread-self/ns/net")?)
            .map_err(io::Error::other)?;
        let done = work(self);
        program(&mut self.steer)?.detach(link).map_err(io::Error::other)?;
        done
    }

    fn exchange(&mut self, flow: u32) -> io::Result<()> {
        let port = FIRST_PORT + (flow % PORTS) as u16;
        let to = ECHO_DATAGRAMS[(flow / PORTS) as usize];
        self.packet[IPV4..IPV4 + 2].copy_from_slice(&port.to_be_bytes());
        self.packet[IPV4 + 2..IPV4 + 4].copy_from_slice(&to.to_be_bytes());
        self.packet[IPV4 + UDP..].copy_from_slice(&flow.to_ne_bytes());
        self.send.send_to(&self.packet, &SocketAddrV4::new(self.server, 0).into())?;
        let mut answer = [0; PAYLOAD];
        let length = self.receive.recv(&mut answer)?;
        if length == PAYLOAD && u32::from_ne_bytes(answer) == flow {
            return Ok(());
        }
        Err(io::Error::other(format!("flow {flow}: the answer is {answer:?}, {length} bytes")))
    }
}

/// Headers without ports. The kernel adds identification and checksum of the IPv4 one (raw(7)); UDP goes without.
fn header(from: Ipv4Addr, to: Ipv4Addr) -> [u8; LENGTH] {
    let mut packet = [0; LENGTH];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(LENGTH as u16).to_be_bytes());
    packet[8] = 64;
    packet[9] = libc::IPPROTO_UDP as u8;
    packet[12..16].copy_from_slice(&from.octets());
    packet[16..20].copy_from_slice(&to.octets());
    packet[IPV4 + 4..IPV4 + 6].copy_from_slice(&((UDP + PAYLOAD) as u16).to_be_bytes());
    packet
}

/// Loads the program that gives the socket what comes to any port of the namespace that it is attached to.
fn load_steer(socket: &UdpSocket) -> io::Result<Ebpf> {
    let mut ebpf = load_object(0, [0; 16])?;
    let map = ebpf.map_mut("REPLIES").ok_or_else(|| io::Error::other("no map REPLIES"))?;
    let mut sockets: SockMap<&mut MapData> = map.try_into().map_err(io::Error::other)?;
    sockets.set(0, socket, 0).map_err(io::Error::other)?;
    program(&mut ebpf)?.load().map_err(io::Error::other)?;
    Ok(ebpf)
}

fn program(ebpf: &mut Ebpf) -> io::Result<&mut SkLookup> {
    let program = ebpf.program_mut("load_steer").ok_or_else(|| io::Error::other("no program load_steer"))?;
    program.try_into().map_err(io::Error::other)
}

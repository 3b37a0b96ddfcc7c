//! What is sent, and how long it takes: servers in one namespace, a client in another.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd as _,
    thread,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::lab::{Error, Netns, Result};

use super::{feed::Feed, flows::Flows};

const LISTEN: Ipv4Addr = Ipv4Addr::UNSPECIFIED;
/// Answers byte by byte.
const ECHO: u16 = 5001;
/// Answers one byte and ends the connection.
const ONCE: u16 = 5002;
/// Takes all, and answers one byte at the end.
const SINK: u16 = 5003;
/// Answers each [`BURST`]th datagram.
const DATAGRAMS: u16 = 5004;
/// Answer each datagram with itself.
pub(super) const ECHO_DATAGRAMS: [u16; 2] = [5005, 5006];
/// All of them; a listener of the ELB has to exist for each.
pub(super) const TCP_PORTS: [u16; 2] = [ECHO, ONCE];
/// Those that security groups have to let pass.
pub(super) const PORTS: std::ops::RangeInclusive<u16> = ECHO..=ECHO_DATAGRAMS[1];

/// Datagrams that are under way at once: a socket's buffer holds far more.
const BURST: u64 = 32;
const SMALL: usize = 64;
const CHUNK: usize = 1 << 16;
const MIB: u64 = 1 << 20;
/// MiB that one connection of a stream carries. How fast a connection is depends on how its windows opened, for as long as it
/// lives: a round of the clock's engine has several.
const CONNECTION: u64 = 256;
/// Nothing of this takes so long; a lost packet that nobody repeats would wait for ever.
const STUCK: Duration = Duration::from_secs(30);

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Load {
    /// One byte each way over a connection that stands: a transaction.
    TcpRr,
    /// Connect, one byte each way, close: a transaction.
    TcpCrr,
    /// One stream: a MiB.
    TcpStream,
    /// Datagrams of 64 bytes, one way: a datagram.
    Udp,
    /// A datagram each way, by another flow each time: a transaction.
    UdpRr,
    /// To a VLAN id that nobody has: a frame.
    UnknownVlan,
    /// To a pod's VLAN id and address, with another MAC: a frame.
    WrongMac,
    /// To a pod's VLAN id and MAC, with another address: a frame.
    WrongAddress,
    /// From a pod, with another source address than its own: a frame.
    SpoofingPod,
}

impl Load {
    /// Its name in cases.
    pub const fn name(self) -> &'static str {
        match self {
            Self::TcpRr => "tcp-rr",
            Self::TcpCrr => "tcp-crr",
            Self::TcpStream => "tcp-stream",
            Self::Udp => "udp-64",
            Self::UdpRr => "udp-rr",
            Self::UnknownVlan => "unknown-vlan",
            Self::WrongMac => "wrong-mac",
            Self::WrongAddress => "wrong-address",
            Self::SpoofingPod => "spoofing-pod",
        }
    }

    /// What is counted.
    pub const fn unit(self) -> &'static str {
        match self {
            Self::TcpRr | Self::TcpCrr | Self::UdpRr => "transaction",
            Self::TcpStream => "MiB",
            Self::Udp => "datagram",
            Self::UnknownVlan | Self::WrongMac | Self::WrongAddress | Self::SpoofingPod => "frame",
        }
    }

    /// Whether it is between two processes, by sockets of the kernel's choice.
    pub const fn has_processes(self) -> bool {
        matches!(self, Self::TcpRr | Self::TcpCrr | Self::TcpStream | Self::Udp)
    }

    /// How many make a round of the counted engine, and how many go before the first: caches of routes and neighbours
    /// fill, windows open. A round is a few periods of the timer: so short that whatever else the machine does (the
    /// agents look after their nodes) is in few rounds, and not in the median.
    pub const fn round(self) -> (u64, u64) {
        match self {
            Self::TcpRr | Self::UdpRr => (500, 100),
            Self::TcpCrr => (100, 20),
            Self::TcpStream => (16, 16),
            Self::Udp => (100 * BURST, 4 * BURST),
            // What a test run takes to begin and to end is then nothing beside the frames.
            Self::UnknownVlan | Self::WrongMac | Self::WrongAddress | Self::SpoofingPod => (32_000, 640),
        }
    }
}

/// How long a measurement lasts.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    /// So many units, see [`Load::unit`]; of datagrams the next multiple of a burst.
    Count(u64),
    /// At least so long.
    Time(Duration),
}

impl Limit {
    pub(super) fn goes_on(self, done: u64, start: Instant) -> bool {
        match self {
            Self::Count(count) => done < count,
            // The clock costs something, too.
            Self::Time(limit) => !done.is_multiple_of(16) || start.elapsed() < limit,
        }
    }
}

/// Gives a client ports for all its connections. Those that have ended hold theirs for a minute, but on loopback only for a second:
/// with the default range they run out, and the search for a free one is all that [`Load::TcpCrr`] would measure then.
///
/// # Errors
///
/// When the namespace is gone.
pub fn widen_ports(client: &Netns) -> Result<()> {
    client.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
    client.sysctl("net/ipv4/tcp_tw_reuse", "1")
}

/// Starts all servers in a namespace, for as long as the process lives.
///
/// # Errors
///
/// When a port is taken, or the namespace is gone.
pub fn serve(netns: &Netns) -> Result<()> {
    let tcp = |port| TcpListener::bind((LISTEN, port));
    let udp = |port| UdpSocket::bind((LISTEN, port));
    let sockets = || {
        let [first, second] = ECHO_DATAGRAMS;
        let echoes = [udp(first)?, udp(second)?];
        io::Result::Ok((tcp(ECHO)?, tcp(ONCE)?, tcp(SINK)?, udp(DATAGRAMS)?, echoes))
    };
    let (echo, once, sink, datagrams, echoes) =
        netns.run(sockets)?.map_err(Error::io(format!("servers in {netns}")))?;
    // A server that fails ends its connection, and the client says so.
    thread::spawn(move || {
        for mut stream in echo.incoming().map_while(io::Result::ok) {
            thread::spawn(move || {
                let mut byte = [0];
                let _ = stream.set_nodelay(true);
                while stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte)).is_ok() {}
            });
        }
    });
    thread::spawn(move || {
        for mut stream in once.incoming().map_while(io::Result::ok) {
            let mut byte = [0];
            let _ = stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte));
            // The client closes first.
            let _ = stream.read(&mut byte);
        }
    });
    thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        for mut stream in sink.incoming().map_while(io::Result::ok) {
            while stream.read(&mut buffer).is_ok_and(|length| length > 0) {}
            let _ = stream.write_all(&[0]);
        }
    });
    thread::spawn(move || {
        let mut buffer = [0; SMALL];
        let mut count = 0;
        while let Ok((_, from)) = datagrams.recv_from(&mut buffer) {
            count += 1;
            if count % BURST == 0 {
                let _ = datagrams.send_to(&buffer[..1], from);
            }
        }
    });
    thread::spawn(move || echo_all(&echoes));
    Ok(())
}

/// Answers the datagrams of all sockets by one thread: one for each would make the figures depend on whose turn it is.
fn echo_all(sockets: &[UdpSocket; 2]) -> io::Result<()> {
    let mut buffer = [0; SMALL];
    loop {
        let mut ready = sockets.each_ref().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN));
        poll(&mut ready, PollTimeout::NONE)?;
        let came = ready.map(|ready| ready.any() == Some(true));
        for (socket, _) in sockets.iter().zip(came).filter(|(_, came)| *came) {
            let (length, from) = socket.recv_from(&mut buffer)?;
            socket.send_to(&buffer[..length], from)?;
        }
    }
}

/// A client that is ready to measure; it does not matter what thread it is used by.
pub enum Client {
    /// Connected.
    Rr(TcpStream),
    /// Has to connect from its namespace each time.
    Crr(SocketAddrV4),
    /// As [`Client::Crr`].
    Stream(SocketAddrV4),
    /// Connected.
    Udp(UdpSocket),
    /// Of many flows.
    Flows(Box<Flows>),
    /// Of frames that a kernel program sends.
    Feed(Box<Feed>),
}

impl Client {
    /// A client for this load, in the calling thread's namespace.
    ///
    /// # Errors
    ///
    /// When the server does not answer.
    pub fn connect(load: Load, server: Ipv4Addr) -> io::Result<Self> {
        let to = |port| SocketAddrV4::new(server, port);
        Ok(match load {
            Load::UdpRr | Load::UnknownVlan | Load::WrongMac | Load::WrongAddress | Load::SpoofingPod => {
                return Err(io::Error::other("this load has a client of its own"));
            }
            Load::TcpRr => {
                let stream = TcpStream::connect_timeout(&to(ECHO).into(), STUCK)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(STUCK))?;
                Self::Rr(stream)
            }
            Load::TcpCrr => Self::Crr(to(ONCE)),
            Load::TcpStream => Self::Stream(to(SINK)),
            Load::Udp => {
                let socket = UdpSocket::bind((LISTEN, 0))?;
                socket.connect(to(DATAGRAMS))?;
                socket.set_read_timeout(Some(STUCK))?;
                Self::Udp(socket)
            }
        })
    }

    /// Sends, and says how many units went and how long they took; in the calling thread's namespace.
    ///
    /// # Errors
    ///
    /// When a connection ends early or a datagram is lost.
    pub fn measure(&mut self, limit: Limit) -> io::Result<(u64, Duration)> {
        let start = Instant::now();
        let mut done = 0;
        match self {
            Self::Rr(stream) => {
                while limit.goes_on(done, start) {
                    exchange(stream)?;
                    done += 1;
                }
            }
            Self::Crr(to) => {
                while limit.goes_on(done, start) {
                    let mut stream = TcpStream::connect(*to)?;
                    exchange(&mut stream)?;
                    stream.shutdown(Shutdown::Both)?;
                    done += 1;
                }
            }
            Self::Stream(to) => {
                let chunk = vec![0; CHUNK];
                while limit.goes_on(done, start) {
                    let mut stream = TcpStream::connect(*to)?;
                    let end = done + CONNECTION;
                    while done < end && limit.goes_on(done, start) {
                        for _ in 0..MIB / CHUNK as u64 {
                            stream.write_all(&chunk)?;
                        }
                        done += 1;
                    }
                    stream.shutdown(Shutdown::Write)?;
                    stream.read_exact(&mut [0])?;
                }
            }
            Self::Udp(socket) => {
                while limit.goes_on(done, start) {
                    for _ in 0..BURST {
                        socket.send(&[0; SMALL])?;
                    }
                    socket.recv(&mut [0])?;
                    done += BURST;
                }
            }
            Self::Flows(flows) => return flows.measure(limit),
            Self::Feed(feed) => return feed.measure(limit),
        }
        Ok((done, start.elapsed()))
    }
}

fn exchange(stream: &mut TcpStream) -> io::Result<()> {
    let mut byte = [0];
    stream.write_all(&byte)?;
    stream.read_exact(&mut byte)
}

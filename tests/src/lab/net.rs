//! Sockets inside namespaces: TCP connects, a TCP server, UDP echo, ICMP echo.
//!
//! A socket belongs to the namespace that it was made in, whichever thread uses it later.

use std::{
    io::{self, Read as _, Write as _},
    mem::MaybeUninit,
    net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU16, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
use socket2::{Domain, SockAddr, Socket, Type};

use super::{
    error::{Error, Result},
    fabric::lock,
    netns::Netns,
};

/// Connects from a namespace, from this port (0 = the kernel's choice). When dropped, the connection is reset, so that
/// the port is free at once.
///
/// # Errors
///
/// When the connection is refused, or not accepted in time.
pub fn tcp_connect(netns: &Netns, from_port: u16, to: SocketAddrV4, limit: Duration) -> Result<TcpStream> {
    netns
        .run(|| connect_here(from_port, to, limit))?
        .map_err(Error::io(format!("connecting from {netns} port {from_port} to {to}")))
}

/// As [`tcp_connect`], in the thread's own namespace.
pub(super) fn connect_here(from_port: u16, to: SocketAddrV4, limit: Duration) -> io::Result<TcpStream> {
    connect_from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, from_port), to, limit)
}

pub(super) fn connect_from(from: SocketAddrV4, to: SocketAddrV4, limit: Duration) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    if *from.ip() != Ipv4Addr::UNSPECIFIED || from.port() != 0 {
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
    }
    socket.connect_timeout(&to.into(), limit)?;
    socket.set_linger(Some(Duration::ZERO))?;
    Ok(socket.into())
}

/// A TCP server that answers every connection with one line, `<its own address> <the client's address>`. Stops when
/// dropped.
#[derive(Debug)]
pub struct TcpServer {
    listener: TcpListener,
    addr: SocketAddrV4,
    seen: Arc<Mutex<Vec<SocketAddrV4>>>,
    thread: Option<JoinHandle<()>>,
}

impl TcpServer {
    /// Listens; 0.0.0.0 = on all addresses of the namespace.
    ///
    /// # Errors
    ///
    /// When the address is taken.
    pub fn start(netns: &Netns, at: SocketAddrV4) -> Result<Self> {
        let what = || format!("listening in {netns} at {at}");
        let listener = netns.run(|| TcpListener::bind(at))?.map_err(Error::io(what()))?;
        let addr = v4(listener.local_addr().map_err(Error::io(what()))?);
        let accept = listener.try_clone().map_err(Error::io(what()))?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&seen);
        let thread = std::thread::spawn(move || {
            // Ends when the listener is shut down.
            while let Ok((mut stream, from)) = accept.accept() {
                lock(&noted).push(v4(from));
                let own = stream.local_addr().map(|own| own.to_string()).unwrap_or_default();
                // A client that has gone is none of the server's business.
                let _ = stream.write_all(format!("{own} {from}\n").as_bytes());
            }
        });
        Ok(Self { listener, addr, seen, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddrV4 {
        self.addr
    }

    /// The clients so far.
    pub fn seen(&self) -> Vec<SocketAddrV4> {
        lock(&self.seen).clone()
    }
}

impl Drop for TcpServer {
    fn drop(&mut self) {
        // On Linux this wakes `accept`.
        let _ = nix::sys::socket::shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What a [`TcpServer`] said to a client: (the server's address, the client's), each as the server saw it.
///
/// # Errors
///
/// When it says nothing in time, or something else.
pub fn read_tcp_server(stream: &mut TcpStream, limit: Duration) -> Result<(SocketAddrV4, SocketAddrV4)> {
    let mut text = String::new();
    stream
        .set_read_timeout(Some(limit))
        .and_then(|()| stream.read_to_string(&mut text))
        .map_err(Error::io("reading a TCP server's line"))?;
    let parsed = text.trim().split_once(' ').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    parsed.ok_or_else(|| Error::Protocol(format!("a TCP server said {text:?}")))
}

/// A UDP server that sends every datagram back. Stops when dropped.
#[derive(Debug)]
pub struct UdpEcho {
    addr: SocketAddrV4,
    seen: Arc<Mutex<Vec<SocketAddrV4>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl UdpEcho {
    /// Listens; in a namespace with several addresses name one, so that answers come from it.
    ///
    /// # Errors
    ///
    /// When the address is taken.
    pub fn start(netns: &Netns, at: SocketAddrV4) -> Result<Self> {
        let what = || format!("listening in {netns} at {at} (UDP)");
        let socket = netns.run(|| UdpSocket::bind(at))?.map_err(Error::io(what()))?;
        patient(&socket).map_err(Error::io(what()))?;
        socket.set_read_timeout(Some(Duration::from_millis(20))).map_err(Error::io(what()))?;
        let addr = v4(socket.local_addr().map_err(Error::io(what()))?);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (noted, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            while !stopped.load(Ordering::Relaxed) {
                // An error is a time-out, or ICMP's answer to an earlier datagram.
                if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    lock(&noted).push(v4(from));
                    let _ = socket.send_to(&buffer[..length], from);
                }
            }
        });
        Ok(Self { addr, seen, stop, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddrV4 {
        self.addr
    }

    /// The clients so far, one entry for each datagram.
    pub fn seen(&self) -> Vec<SocketAddrV4> {
        lock(&self.seen).clone()
    }
}

impl Drop for UdpEcho {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Has a socket keep thousands of datagrams until somebody reads them: whoever does may have to wait for a processor.
///
/// # Errors
///
/// Without the privilege (`SO_RCVBUFFORCE`).
pub fn patient(socket: &UdpSocket) -> io::Result<()> {
    Ok(setsockopt(socket, RcvBufForce, &(16 << 20))?)
}

/// The answer to a datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UdpReply {
    /// Who answered.
    pub from: SocketAddrV4,
    /// What.
    pub payload: Vec<u8>,
    /// The port that the datagram was sent from.
    pub local_port: u16,
    /// How long it took.
    pub elapsed: Duration,
}

/// Sends one datagram from a namespace (from this port, 0 = the kernel's choice) and waits for the first answer,
/// whoever sends it.
///
/// # Errors
///
/// When none comes in time.
pub fn udp_exchange(
    netns: &Netns,
    from_port: u16,
    to: SocketAddrV4,
    payload: &[u8],
    limit: Duration,
) -> Result<UdpReply> {
    let exchange = || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, from_port))?;
        socket.set_read_timeout(Some(limit))?;
        let local_port = socket.local_addr()?.port();
        let start = Instant::now();
        socket.send_to(payload, to)?;
        let mut buffer = vec![0; 65_536];
        let (length, from) = socket.recv_from(&mut buffer)?;
        let elapsed = start.elapsed();
        buffer.truncate(length);
        Ok(UdpReply { from: v4(from), payload: buffer, local_port, elapsed })
    };
    netns.run(exchange)?.map_err(Error::io(format!("UDP from {netns} port {from_port} to {to}")))
}

/// Sends one ICMP echo request from a namespace and returns how long the answer took.
///
/// # Errors
///
/// When none comes in time.
pub fn ping(netns: &Netns, to: Ipv4Addr, limit: Duration) -> Result<Duration> {
    /// The identifier tells this request's answer from others'.
    static IDENTIFIER: AtomicU16 = AtomicU16::new(0x4557);
    let id = IDENTIFIER.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let exchange = || {
        let socket = Socket::new(Domain::IPV4, Type::from(libc::SOCK_RAW), Some(socket2::Protocol::ICMPV4))?;
        let mut request = [8, 0, 0, 0, id[0], id[1], 0, 1, b'e', b'n', b'i', b'w'];
        let sum = super::raw::checksum(&[&request]).to_be_bytes();
        request[2..4].copy_from_slice(&sum);
        let start = Instant::now();
        socket.send_to(&request, &SockAddr::from(SocketAddrV4::new(to, 0)))?;
        let mut buffer = [const { MaybeUninit::uninit() }; 256];
        loop {
            let left = limit.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            socket.set_read_timeout(Some(left))?;
            let (length, from) = socket.recv_from(&mut buffer)?;
            let packet: Vec<u8> = buffer[..length.min(buffer.len())]
                .iter()
                // SAFETY: the kernel has written the first `length` bytes.
                .map(|byte| unsafe { byte.assume_init() })
                .collect();
            let ours = packet.get(20) == Some(&0) && packet.get(24..26) == Some(&id);
            if ours && from.as_socket_ipv4().is_some_and(|from| *from.ip() == to) {
                return Ok(start.elapsed());
            }
        }
    };
    netns.run(exchange)?.map_err(Error::io(format!("ping from {netns} to {to}")))
}

/// Ends a connection in order (FIN) where dropping it would reset it.
///
/// # Errors
///
/// When the peer has reset it already.
pub fn close(stream: TcpStream) -> Result<()> {
    let close = || -> io::Result<()> {
        socket2::SockRef::from(&stream).set_linger(None)?;
        stream.shutdown(Shutdown::Write)
    };
    let result = close().map_err(Error::io("closing a connection"));
    drop(stream);
    result
}

pub(super) fn v4(addr: SocketAddr) -> SocketAddrV4 {
    match addr {
        SocketAddr::V4(addr) => addr,
        // No socket of this module is an IPv6 one.
        SocketAddr::V6(addr) => SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, addr.port()),
    }
}

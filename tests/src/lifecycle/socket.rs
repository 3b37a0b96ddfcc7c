//! Datagrams by the batch, and what the kernel knows of a socket: the system calls that no safe crate offers in a form
//! that keeps up with 300,000 datagrams a second.

use std::{
    io, mem,
    net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    ptr,
};

use nix::sys::socket::{
    setsockopt,
    sockopt::{RcvBufForce, SndBufForce},
};

/// Bytes of a datagram.
pub(super) const SIZE: usize = 64;
/// Datagrams of a batch at the most.
pub(super) const BATCH: usize = 64;

/// Receive buffers are so large that a receiver which does not run for a second loses nothing: the kernel counts some
/// 800 bytes for a small datagram, and doubles what is asked for.
const RECEIVE_BUFFER: usize = 64 << 20;
const SEND_BUFFER: usize = 4 << 20;

/// A datagram, and where it came from or goes to.
#[derive(Clone, Copy)]
pub(super) struct Datagram {
    pub(super) data: [u8; SIZE],
    pub(super) peer: SocketAddrV4,
}

impl Default for Datagram {
    fn default() -> Self {
        Self { data: [0; SIZE], peer: SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0) }
    }
}

/// The message headers of a batch, on the stack of the call that uses them.
struct Headers {
    names: [libc::sockaddr_in; BATCH],
    vectors: [libc::iovec; BATCH],
    messages: [libc::mmsghdr; BATCH],
}

impl Headers {
    fn new() -> Self {
        // SAFETY: all zero is valid for the three C structs: null pointers and lengths of 0.
        unsafe { mem::zeroed() }
    }

    /// Points the headers at these buffers. `self` and the buffers must stay where they are until the call is over.
    fn point(&mut self, buffers: impl Iterator<Item = *mut u8>, named: bool) {
        for (at, buffer) in buffers.take(BATCH).enumerate() {
            self.vectors[at] = libc::iovec { iov_base: buffer.cast(), iov_len: SIZE };
            let header = &mut self.messages[at].msg_hdr;
            header.msg_iov = &raw mut self.vectors[at];
            header.msg_iovlen = 1;
            if named {
                header.msg_name = (&raw mut self.names[at]).cast();
                header.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
            }
        }
    }
}

/// Takes what is there, without waiting, at most a batch. Datagrams of another size than [`SIZE`] are passed over.
pub(super) fn receive(socket: &UdpSocket, into: &mut Vec<Datagram>) -> io::Result<()> {
    into.resize(BATCH, Datagram::default());
    let mut headers = Headers::new();
    headers.point(into.iter_mut().map(|datagram| datagram.data.as_mut_ptr()), true);
    // SAFETY: the headers point at buffers and names that outlive the call, with their lengths; no time-out is given.
    let count = unsafe {
        libc::recvmmsg(
            socket.as_raw_fd(),
            headers.messages.as_mut_ptr(),
            BATCH as libc::c_uint,
            libc::MSG_DONTWAIT,
            ptr::null_mut(),
        )
    };
    let Ok(count) = usize::try_from(count) else {
        into.clear();
        return none_if_it_would_block(io::Error::last_os_error());
    };
    for (at, datagram) in into.iter_mut().enumerate().take(count) {
        let name = &headers.names[at];
        let ip = Ipv4Addr::from_bits(u32::from_be(name.sin_addr.s_addr));
        datagram.peer = SocketAddrV4::new(ip, u16::from_be(name.sin_port));
    }
    into.truncate(count);
    let mut at = 0;
    into.retain(|_| {
        at += 1;
        headers.messages[at - 1].msg_len as usize == SIZE
    });
    Ok(())
}

/// Hands datagrams to the kernel, each to its peer if `named`, else to the peer that the socket is connected to. Says how
/// many it took: fewer when the socket's buffer is full.
pub(super) fn send(socket: &UdpSocket, datagrams: &mut [Datagram], named: bool) -> io::Result<usize> {
    let count = datagrams.len().min(BATCH);
    let mut headers = Headers::new();
    if named {
        for (name, datagram) in headers.names.iter_mut().zip(datagrams.iter()) {
            name.sin_family = libc::AF_INET as libc::sa_family_t;
            name.sin_port = datagram.peer.port().to_be();
            name.sin_addr.s_addr = datagram.peer.ip().to_bits().to_be();
        }
    }
    headers.point(datagrams.iter_mut().map(|datagram| datagram.data.as_mut_ptr()), named);
    // SAFETY: the first `count` headers point at buffers and names that outlive the call, with their lengths.
    let sent = unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            headers.messages.as_mut_ptr(),
            count as libc::c_uint,
            libc::MSG_DONTWAIT,
        )
    };
    match usize::try_from(sent) {
        Ok(sent) => Ok(sent),
        Err(_) => none_if_it_would_block(io::Error::last_os_error()).map(|()| 0),
    }
}

fn none_if_it_would_block(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
        _ => Err(error),
    }
}

/// Makes a socket's buffers larger than the machine's limits allow (`SO_RCVBUFFORCE`).
pub(super) fn widen(socket: &UdpSocket) -> io::Result<()> {
    setsockopt(socket, RcvBufForce, &RECEIVE_BUFFER)?;
    Ok(setsockopt(socket, SndBufForce, &SEND_BUFFER)?)
}

/// Datagrams that arrived at a socket and found it full, since it was made.
pub(super) fn overflows(socket: &UdpSocket) -> io::Result<u64> {
    // `linux/sock_diag.h`: SO_MEMINFO answers with nine numbers, the last is `sk_drops`.
    const SO_MEMINFO: libc::c_int = 55;
    let mut numbers = [0_u32; 9];
    option(socket, libc::SOL_SOCKET, SO_MEMINFO, &mut numbers)?;
    Ok(u64::from(numbers[8]))
}

/// Segments that a connection has sent again.
pub(super) fn retransmitted(stream: &TcpStream) -> io::Result<u64> {
    // SAFETY: `tcp_info` is integers; all zero is valid.
    let mut info: libc::tcp_info = unsafe { mem::zeroed() };
    option(stream, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    Ok(u64::from(info.tcpi_total_retrans))
}

/// Reads a socket option into a plain C value, of which the kernel fills as much as it knows.
fn option<T: Copy>(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: &mut T,
) -> io::Result<()> {
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into the value, and both callers' types take any bytes.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, ptr::from_mut(value).cast(), &raw mut length)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (UdpSocket, UdpSocket) {
        let [a, b] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").expect("a socket"));
        a.connect(b.local_addr().expect("its address")).expect("connected");
        (a, b)
    }

    #[test]
    fn batches_go_there_and_back() {
        let (client, server) = pair();
        let mut out = vec![Datagram::default(); 5];
        for (number, datagram) in (0..).zip(&mut out) {
            datagram.data[0] = number;
        }
        assert_eq!(send(&client, &mut out, false).expect("sent"), 5);
        client.send(b"too short").expect("sent");
        let mut got = Vec::new();
        receive(&server, &mut got).expect("received");
        assert_eq!(got.iter().map(|datagram| datagram.data[0]).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        assert_eq!(std::net::SocketAddr::V4(got[0].peer), client.local_addr().expect("its address"));
        assert_eq!(send(&server, &mut got[3..], true).expect("sent"), 2);
        receive(&client, &mut out).expect("received");
        assert_eq!(out.iter().map(|datagram| datagram.data[0]).collect::<Vec<_>>(), [3, 4]);
        receive(&client, &mut out).expect("nothing is no error");
        assert!(out.is_empty());
    }

    #[test]
    fn a_full_socket_counts_what_it_drops() {
        let (client, server) = pair();
        socket2::SockRef::from(&server).set_recv_buffer_size(4096).expect("a small buffer");
        for _ in 0..10 {
            send(&client, &mut [Datagram::default(); BATCH], false).expect("sent");
        }
        let mut taken = 0;
        let mut got = Vec::new();
        loop {
            receive(&server, &mut got).expect("received");
            if got.is_empty() {
                break;
            }
            taken += got.len() as u64;
        }
        let dropped = overflows(&server).expect("its counters");
        assert!(dropped > 0);
        assert_eq!(taken + dropped, 10 * BATCH as u64);
    }
}

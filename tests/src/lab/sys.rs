//! The system calls that no safe crate offers, and nothing else: all of the lab's `unsafe` but the map types.

use std::{
    fs::File,
    io, mem,
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::Command,
    time::Duration,
};

use nix::sched::{CloneFlags, setns};

/// Has a child enter a network namespace between fork and exec.
pub(super) fn setns_before_exec(command: &mut Command, netns: File) {
    // SAFETY: between fork and exec only `setns` is called, which is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(move || setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).map_err(io::Error::from));
    }
}

/// Sets an interface of the thread's namespace up.
pub(super) fn link_up(interface: &str) -> io::Result<()> {
    let socket = inet_socket()?;
    let mut request = interface_request(interface)?;
    ioctl(&socket, libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: SIOCGIFFLAGS has filled this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    ioctl(&socket, libc::SIOCSIFFLAGS, &mut request)
}

/// A setting of `ethtool` with a pair of commands to read and write it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Offload {
    /// VLAN tags are inserted by the "NIC". Off, the tag crosses a veth inside the frame, as on a wire.
    TxVlan,
    /// Checksums are computed by the "NIC". Off, they are in the frame, as on a wire.
    TxChecksum,
}

impl Offload {
    /// `linux/ethtool.h`: the commands to read and to write, and the bit, which libc does not name.
    const fn numbers(self) -> (u32, u32, u32) {
        match self {
            Self::TxVlan => (0x25, 0x26, 1 << 7),
            Self::TxChecksum => (0x16, 0x17, 1),
        }
    }
}

/// Switches an offload of an interface of the thread's namespace off and makes sure that it is off.
pub(super) fn offload_off(interface: &str, offload: Offload) -> io::Result<()> {
    #[repr(C)]
    struct Value {
        command: u32,
        data: u32,
    }

    let (read, write, bit) = offload.numbers();
    let socket = inet_socket()?;
    let mut value = Value { command: read, data: 0 };
    let mut request = interface_request(interface)?;
    let mut call = |value: &mut Value| {
        request.ifr_ifru.ifru_data = (&raw mut *value).cast();
        ioctl(&socket, libc::SIOCETHTOOL, &mut request)
    };
    call(&mut value)?;
    value = Value { command: write, data: value.data & !bit };
    call(&mut value)?;
    value = Value { command: read, data: 0 };
    call(&mut value)?;
    if value.data & bit != 0 {
        return Err(io::Error::other(format!("the kernel keeps {offload:?} on")));
    }
    Ok(())
}

fn inet_socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers involved.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    owned(fd)
}

fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just handed out this descriptor, nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn interface_request(interface: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("interface name {interface} is too long"),
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn ioctl(socket: &OwnedFd, number: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: `request` is a complete `ifreq`; where it points to data, that lives in the caller's frame.
    match unsafe { libc::ioctl(socket.as_raw_fd(), number, &raw mut *request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A raw packet socket, and what came through it.
#[derive(Debug)]
pub(super) struct PacketSocket {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

/// A frame as the kernel tells of it.
#[derive(Debug)]
pub(super) struct Received {
    /// From the Ethernet header on; a tag that the kernel keeps aside is not in it.
    pub(super) data: Vec<u8>,
    /// The tag that the kernel kept aside: (TPID, TCI).
    pub(super) tag: Option<(u16, u16)>,
    /// Where it was seen.
    pub(super) ifindex: u32,
    /// On its way out.
    pub(super) outgoing: bool,
}

impl PacketSocket {
    /// Room for a GSO packet of 64 KiB with its headers.
    const BUFFER: usize = 66_000;

    /// Opens a socket on one interface of the thread's namespace, 0 = all. `receive`: whether it gets frames.
    pub(super) fn open(ifindex: u32, receive: bool) -> io::Result<Self> {
        let protocol = if receive { (libc::ETH_P_ALL as u16).to_be() } else { 0 };
        // The socket gets nothing until it is bound, so that no frame of another interface is in its queue.
        // SAFETY: no pointers involved.
        let fd = owned(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) })?;
        let socket = Self { fd, buffer: Vec::new() };
        socket.set_option(libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;
        if receive {
            socket.set_option(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 32 << 20)?;
        }
        // SAFETY: all zero is a valid `sockaddr_ll`.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = ifindex as i32;
        // SAFETY: the address and its length belong together.
        let bound = unsafe {
            libc::bind(
                socket.fd.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        if bound == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
    }

    fn set_option(&self, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
        // SAFETY: the value and its length belong together.
        let result = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of_val(&value) as libc::socklen_t,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Sends a frame as it is, past the queueing discipline's batching but not past tc.
    pub(super) fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: pointer and length are one slice's.
        let sent = unsafe { libc::send(self.fd.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        match usize::try_from(sent) {
            Ok(sent) if sent == frame.len() => Ok(()),
            Ok(sent) => Err(io::Error::other(format!("{sent} of {} bytes sent", frame.len()))),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    /// The next frame, if one comes in time.
    pub(super) fn receive(&mut self, limit: Duration) -> io::Result<Option<Received>> {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let millis = i32::try_from(limit.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        // SAFETY: one valid entry.
        match unsafe { libc::poll(&raw mut poll, 1, millis) } {
            0 => return Ok(None),
            n if n < 0 => {
                let error = io::Error::last_os_error();
                return if error.kind() == io::ErrorKind::Interrupted { Ok(None) } else { Err(error) };
            }
            _ => {}
        }
        self.buffer.resize(Self::BUFFER, 0);
        let mut control = [0_u64; 16];
        // SAFETY: all zero is a valid `sockaddr_ll`.
        let mut from: libc::sockaddr_ll = unsafe { mem::zeroed() };
        let mut vector =
            libc::iovec { iov_base: self.buffer.as_mut_ptr().cast(), iov_len: self.buffer.len() };
        // SAFETY: all zero is a valid `msghdr`.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = size_of_val(&from) as libc::socklen_t;
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: all buffers of `message` live in this frame, with their lengths.
        let received = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        let Ok(length) = usize::try_from(received) else {
            let error = io::Error::last_os_error();
            // ENETDOWN: the interface went; what else it had seen is still to come.
            return match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR | libc::ENETDOWN) => Ok(None),
                _ => Err(error),
            };
        };
        Ok(Some(Received {
            data: self.buffer[..length].to_vec(),
            tag: auxiliary_tag(&message),
            ifindex: from.sll_ifindex as u32,
            outgoing: from.sll_pkttype == libc::PACKET_OUTGOING,
        }))
    }
}

/// The tag out of `PACKET_AUXDATA`.
fn auxiliary_tag(message: &libc::msghdr) -> Option<(u16, u16)> {
    // SAFETY: `recvmsg` has filled the control buffer and set its length; the CMSG macros stay within.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_PACKET && (*header).cmsg_type == libc::PACKET_AUXDATA {
                let data = libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned();
                let valid = data.tp_status & libc::TP_STATUS_VLAN_VALID != 0;
                return valid.then_some((data.tp_vlan_tpid, data.tp_vlan_tci));
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    None
}

//! What netkit needs of the kernel and no crate here offers: making a pair of devices by rtnetlink, and a BPF link on it.

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
};

const BPF_LINK_CREATE: libc::c_int = 28;
/// Runs as the device in the pod sends; attached by the index of the device on the node.
const BPF_NETKIT_PEER: u32 = 55;

// linux/if_link.h
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_NETKIT_PEER_INFO: u16 = 1;
const IFLA_NETKIT_MODE: u16 = 5;
/// Frames with Ethernet headers.
const NETKIT_L2: u32 = 0;
const NLA_F_NESTED: u16 = 1 << 15;

/// Attaches a tc program to the pod's side of a netkit pair of the thread's namespace, named by its other side.
pub(super) fn attach_to_netkit_peer(program: impl AsFd, ifindex: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        program: i32,
        ifindex: u32,
        attach_type: u32,
        flags: u32,
        rest: [u64; 4],
    }
    let mut attr = Attr {
        program: program.as_fd().as_raw_fd(),
        ifindex,
        attach_type: BPF_NETKIT_PEER,
        flags: 0,
        rest: [0; 4],
    };
    // SAFETY: `struct { ... } link_create` of `union bpf_attr`, without pointers; the kernel reads `size_of::<Attr>()` bytes.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_LINK_CREATE, &raw mut attr, size_of::<Attr>()) };
    owned(fd as i32)
}

/// Makes a netkit pair: `name` in the thread's namespace, `peer` in another.
pub(super) fn create_netkit(name: &str, peer: &str, peer_netns: impl AsFd) -> io::Result<()> {
    // Headers of the request and of a link (linux/netlink.h, linux/rtnetlink.h); the length is set at the end.
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let mut request = Vec::new();
    request.extend(0_u32.to_ne_bytes());
    request.extend(libc::RTM_NEWLINK.to_ne_bytes());
    request.extend((flags as u16).to_ne_bytes());
    request.extend([0; 8]);
    request.extend([0; IFINFO]);
    attribute(&mut request, libc::IFLA_IFNAME, &text(name));
    let mut other = vec![0; IFINFO];
    attribute(&mut other, libc::IFLA_IFNAME, &text(peer));
    attribute(&mut other, libc::IFLA_NET_NS_FD, &peer_netns.as_fd().as_raw_fd().to_ne_bytes());
    let mut data = Vec::new();
    attribute(&mut data, IFLA_NETKIT_MODE, &NETKIT_L2.to_ne_bytes());
    attribute(&mut data, IFLA_NETKIT_PEER_INFO | NLA_F_NESTED, &other);
    let mut info = Vec::new();
    attribute(&mut info, IFLA_INFO_KIND, b"netkit");
    attribute(&mut info, IFLA_INFO_DATA | NLA_F_NESTED, &data);
    attribute(&mut request, libc::IFLA_LINKINFO | NLA_F_NESTED, &info);
    let length = (request.len() as u32).to_ne_bytes();
    request[..4].copy_from_slice(&length);
    ask(&request)
}

/// `struct ifinfomsg`.
const IFINFO: usize = 16;

fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend((4 + value.len() as u16).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

/// Sends a request to the kernel's routing socket and reads its answer: a `struct nlmsgerr` behind a header.
fn ask(request: &[u8]) -> io::Result<()> {
    // SAFETY: no pointers involved.
    let socket = owned(unsafe {
        libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE)
    })?;
    let mut answer = [0_u8; 1024];
    // SAFETY: pointers and lengths are those of the slices.
    let length = unsafe {
        if libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0)
    };
    const ERROR: usize = mem::size_of::<libc::nlmsghdr>();
    match usize::try_from(length) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(length) if length < ERROR + 4 => Err(io::Error::other("the kernel's answer is too short")),
        Ok(_) => {
            match i32::from_ne_bytes([answer[ERROR], answer[ERROR + 1], answer[ERROR + 2], answer[ERROR + 3]])
            {
                0 => Ok(()),
                error => Err(io::Error::from_raw_os_error(-error)),
            }
        }
    }
}

fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just handed out this descriptor, nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

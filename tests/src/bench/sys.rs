//! What netkit needs of the kernel and aya does not offer: a BPF link on the pod's side of a pair.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
};

const BPF_LINK_CREATE: libc::c_int = 28;
/// Runs as the device in the pod sends; attached by the index of the device on the node.
const BPF_NETKIT_PEER: u32 = 55;

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
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just handed out this descriptor, nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

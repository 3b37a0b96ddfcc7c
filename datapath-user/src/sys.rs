//! System calls that aya does not offer: creating an XDP link without falling back to netlink, reading which interface a
//! link belongs to, and reading a hash map by batches.

use std::{
    ffi::CString,
    io,
    mem::{size_of, size_of_val},
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
const BPF_LINK_CREATE: libc::c_int = 28;

const BPF_XDP: u32 = 37;
const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// What the kernel calls `struct bpf_link_info`, up to the interface of an XDP or TCX link.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LinkInfo {
    kind: u32,
    id: u32,
    /// The program behind the link.
    pub(crate) prog_id: u32,
    pad: u32,
    /// The interface; 0 once it is gone.
    pub(crate) ifindex: u32,
    attach_type: u32,
    reserved: [u64; 8],
}

/// One command of bpf(2).
///
/// # Safety
///
/// `attr` must be the part of `union bpf_attr` that the command reads, and pointers in it must be valid for what the
/// command does with them.
unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<i32> {
    let size = size_of_val(attr) as libc::c_uint;
    // SAFETY: the caller's promise; the kernel reads at most `size` bytes and takes the rest for zero.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

/// Attaches an XDP program to an interface, in the mode that is asked for and no other.
pub(crate) fn xdp_link_create(program: impl AsFd, ifindex: u32, generic: bool) -> io::Result<OwnedFd> {
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
        attach_type: BPF_XDP,
        flags: if generic { XDP_FLAGS_SKB_MODE } else { XDP_FLAGS_DRV_MODE },
        rest: [0; 4],
    };
    // SAFETY: `struct { ... } link_create` of `union bpf_attr`, without pointers.
    let fd = unsafe { bpf(BPF_LINK_CREATE, &mut attr) }?;
    // SAFETY: the kernel made this descriptor for us a moment ago.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[repr(C)]
struct ObjAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Gives an object a name on a BPF file system.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjAttr { path: path.as_ptr() as u64, fd: object.as_raw_fd() as u32, flags: 0 };
    // SAFETY: `path` is a C string that outlives the call.
    unsafe { bpf(BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// Opens an object by its name on a BPF file system.
fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjAttr { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: `path` is a C string that outlives the call.
    let fd = unsafe { bpf(BPF_OBJ_GET, &mut attr) }?;
    // SAFETY: the kernel made this descriptor for us a moment ago.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a pinned link is.
pub(crate) fn link_info(path: &Path) -> io::Result<LinkInfo> {
    #[repr(C)]
    struct Attr {
        fd: u32,
        len: u32,
        info: u64,
    }
    let link = open(path)?;
    let mut info = LinkInfo::default();
    let mut attr = Attr {
        fd: link.as_raw_fd() as u32,
        len: size_of::<LinkInfo>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: `info` has room for `len` bytes and outlives the call.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// All entries of a hash map without per-CPU values. Bucket by bucket, each at one time: what stands in the map throughout is seen
/// once, whatever programs add and remove meanwhile (kernel/bpf/hashtab.c, `__htab_map_lookup_and_delete_batch`).
pub(crate) fn hash_entries<K: aya::Pod, V: aya::Pod>(map: impl AsFd) -> io::Result<Vec<(K, V)>> {
    #[repr(C)]
    struct Attr {
        in_batch: u64,
        out_batch: u64,
        keys: u64,
        values: u64,
        count: u32,
        map: u32,
        elem_flags: u64,
        flags: u64,
    }
    let mut room = 4096;
    let mut all = Vec::new();
    // Where to go on: the number of a bucket.
    let mut at: Option<u32> = None;
    loop {
        let mut keys = Vec::<K>::with_capacity(room);
        let mut values = Vec::<V>::with_capacity(room);
        let mut next = 0_u32;
        let mut attr = Attr {
            in_batch: at.as_ref().map_or(0, |at| std::ptr::from_ref(at) as u64),
            out_batch: std::ptr::from_mut(&mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: room as u32,
            map: map.as_fd().as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: all pointers are to what outlives the call; `keys` and `values` have room for `count`, and sizes were
        // compared with the map's when it was opened as a typed one.
        let end = match unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) } {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            // A bucket with more entries than there is room for.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                room *= 2;
                continue;
            }
            Err(error) => return Err(error),
        };
        // SAFETY: the kernel wrote so many, and every bit pattern of a `Pod` is valid.
        unsafe {
            keys.set_len(attr.count as usize);
            values.set_len(attr.count as usize);
        }
        all.extend(keys.into_iter().zip(values));
        if end {
            return Ok(all);
        }
        at = Some(next);
    }
}

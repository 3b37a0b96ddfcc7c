//! System calls that aya does not offer: creating an XDP link without falling back to netlink, swapping the program behind a
//! link of any kind, reading which interface a link belongs to, asking which programs are on a hook, and maps whose layout is
//! known at run time only.

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

use aya::maps::MapType;

use crate::pin::Hook;

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_MAP_FREEZE: libc::c_int = 22;
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;

const BPF_XDP: u32 = 37;
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;
const BPF_F_BEFORE: u32 = 1 << 3;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
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

/// As [`bpf`], for commands that answer with a descriptor.
///
/// # Safety
///
/// As for [`bpf`].
unsafe fn bpf_open<T>(command: libc::c_int, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, attr) }?;
    // SAFETY: the kernel made this descriptor for us a moment ago.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches an XDP program to an interface, in the mode that is asked for and no other.
pub(crate) fn xdp_link_create(program: impl AsFd, ifindex: u32, generic: bool) -> io::Result<OwnedFd> {
    link_create(program, ifindex, BPF_XDP, if generic { XDP_FLAGS_SKB_MODE } else { XDP_FLAGS_DRV_MODE })
}

/// Attaches a program by TCX, before all others on its hook.
pub(crate) fn tcx_link_create_first(program: impl AsFd, ifindex: u32, hook: Hook) -> io::Result<OwnedFd> {
    // Before nothing that is named: first.
    link_create(program, ifindex, tcx(hook), BPF_F_BEFORE)
}

fn link_create(program: impl AsFd, ifindex: u32, attach_type: u32, flags: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        program: i32,
        ifindex: u32,
        attach_type: u32,
        flags: u32,
        rest: [u64; 4],
    }
    let mut attr = Attr { program: program.as_fd().as_raw_fd(), ifindex, attach_type, flags, rest: [0; 4] };
    // SAFETY: `struct { ... } link_create` of `union bpf_attr`, without pointers.
    unsafe { bpf_open(BPF_LINK_CREATE, &mut attr) }
}

const fn tcx(hook: Hook) -> u32 {
    match hook {
        Hook::In => BPF_TCX_INGRESS,
        Hook::Out => BPF_TCX_EGRESS,
    }
}

/// Gives memory that was freed back to the system: reading and loading programs, and a first look at everything, take
/// several MiB, once.
pub(crate) fn give_memory_back() {
    // SAFETY: malloc_trim(3) changes nothing that is in use, and may be called from any thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Loads a tc program that drops everything. It reads nothing, so that no privilege beyond CAP_BPF and CAP_NET_ADMIN is asked for.
pub(crate) fn load_drop() -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log: [u64; 2],
        kernel: u32,
        flags: u32,
        name: [u8; 16],
    }
    // r0 = TC_ACT_SHOT; exit (Documentation/bpf/standardization/instruction-set.rst)
    let instructions: [[u8; 8]; 2] = [[0xb7, 0, 0, 0, 2, 0, 0, 0], [0x95, 0, 0, 0, 0, 0, 0, 0]];
    let mut attr = Attr {
        kind: BPF_PROG_TYPE_SCHED_CLS,
        count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        log: [0; 2],
        kernel: 0,
        flags: 0,
        name: *b"eniway_stand_in\0",
    };
    // SAFETY: the first fields of the `struct` for BPF_PROG_LOAD of `union bpf_attr`; both pointers outlive the call.
    unsafe { bpf_open(BPF_PROG_LOAD, &mut attr) }
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

/// Swaps the program behind a link, in one step. `ENOLINK`: the interface is gone.
pub(crate) fn link_update(link: impl AsFd, program: impl AsFd) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        link: u32,
        program: u32,
        flags: u32,
        old_program: u32,
    }
    let mut attr = Attr {
        link: link.as_fd().as_raw_fd() as u32,
        program: program.as_fd().as_raw_fd() as u32,
        flags: 0,
        old_program: 0,
    };
    // SAFETY: `struct { ... } link_update` of `union bpf_attr`, without pointers.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// Opens an object by its name on a BPF file system.
pub(crate) fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjAttr { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: `path` is a C string that outlives the call.
    unsafe { bpf_open(BPF_OBJ_GET, &mut attr) }
}

/// Programs that TCX runs on a hook, by id, in their order. Their names would need more capabilities than the agent keeps.
pub(crate) fn tcx_programs(ifindex: u32, hook: Hook) -> io::Result<Vec<u32>> {
    // As many as a hook takes (BPF_MPROG_MAX).
    const MOST: usize = 64;
    #[repr(C)]
    struct Attr {
        ifindex: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        pad: u32,
        rest: [u64; 4],
    }
    let mut ids = [0_u32; MOST];
    let mut attr = Attr {
        ifindex,
        attach_type: tcx(hook),
        query_flags: 0,
        attach_flags: 0,
        ids: ids.as_mut_ptr() as u64,
        count: MOST as u32,
        pad: 0,
        rest: [0; 4],
    };
    // SAFETY: `struct { ... } query` of `union bpf_attr`; `ids` has room for `count` and outlives the call.
    unsafe { bpf(BPF_PROG_QUERY, &mut attr) }?;
    Ok(ids[..MOST.min(attr.count as usize)].to_vec())
}

/// Takes a pinned link's program from its interface, at once; without this that happens some time after the last reference
/// to the link went.
pub(crate) fn link_detach(path: &Path) -> io::Result<()> {
    let link = open(path)?;
    let mut attr = link.as_raw_fd() as u32;
    // SAFETY: `struct { __u32 link_fd; } link_detach` of `union bpf_attr`.
    unsafe { bpf(BPF_LINK_DETACH, &mut attr) }.map(drop)
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

/// A new map.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewMap<'a> {
    pub(crate) name: &'a str,
    pub(crate) kind: MapType,
    pub(crate) key: usize,
    pub(crate) value: usize,
    pub(crate) entries: u32,
    pub(crate) flags: u32,
}

/// Makes a map.
pub(crate) fn map_create(map: NewMap<'_>) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attr {
        kind: u32,
        key: u32,
        value: u32,
        entries: u32,
        flags: u32,
        inner_map: u32,
        numa_node: u32,
        name: [u8; 16],
    }
    let mut name = [0; 16];
    // The last byte stays 0.
    for (to, from) in name[..15].iter_mut().zip(map.name.bytes()) {
        *to = from;
    }
    let mut attr = Attr {
        kind: map.kind as u32,
        key: map.key as u32,
        value: map.value as u32,
        entries: map.entries,
        flags: map.flags,
        inner_map: 0,
        numa_node: 0,
        name,
    };
    // SAFETY: the first fields of the `struct` for BPF_MAP_CREATE of `union bpf_attr`, without pointers.
    unsafe { bpf_open(BPF_MAP_CREATE, &mut attr) }
}

/// Takes from everybody the right to change a map from user space.
pub(crate) fn map_freeze(map: impl AsFd) -> io::Result<()> {
    let mut map = map.as_fd().as_raw_fd() as u32;
    // SAFETY: the command reads the map's descriptor only.
    unsafe { bpf(BPF_MAP_FREEZE, &mut map) }.map(drop)
}

#[repr(C)]
struct ElemAttr {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Reads a value, of a size that the caller knows of the map; false if there is no such key.
///
/// # Safety
///
/// `key` and `value` must be as long as the map's keys and values; for a per-CPU map, a value is one for each possible CPU, each
/// padded to 8 bytes.
pub(crate) unsafe fn map_lookup(map: impl AsFd, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr = ElemAttr {
        map: map.as_fd().as_raw_fd() as u32,
        pad: 0,
        key: key.as_ptr() as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the caller's promise; both outlive the call.
    match unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) } {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes a value.
///
/// # Safety
///
/// As for [`map_lookup`].
pub(crate) unsafe fn map_update(map: impl AsFd, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
    let mut attr = ElemAttr {
        map: map.as_fd().as_raw_fd() as u32,
        pad: 0,
        key: key.as_ptr() as u64,
        value: value.as_ptr() as u64,
        flags,
    };
    // SAFETY: the caller's promise; both outlive the call.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
}

/// Removes an entry; false if there was none.
///
/// # Safety
///
/// `key` must be as long as the map's keys.
pub(crate) unsafe fn map_delete(map: impl AsFd, key: &[u8]) -> io::Result<bool> {
    let map = map.as_fd().as_raw_fd() as u32;
    let mut attr = ElemAttr { map, pad: 0, key: key.as_ptr() as u64, value: 0, flags: 0 };
    // SAFETY: the caller's promise.
    match unsafe { bpf(BPF_MAP_DELETE_ELEM, &mut attr) } {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// All entries of an array or a hash map without per-CPU values.
///
/// # Safety
///
/// The map's keys and values must be as long as `K` and `V`.
pub(crate) unsafe fn map_entries<K: aya::Pod, V: aya::Pod>(map: impl AsFd) -> io::Result<Vec<(K, V)>> {
    let mut all = Vec::new();
    let each = |key: &[u8], value: &[u8]| {
        // SAFETY: each slice is as long as the type, of which every bit pattern is valid.
        all.push(unsafe {
            (key.as_ptr().cast::<K>().read_unaligned(), value.as_ptr().cast::<V>().read_unaligned())
        });
    };
    // SAFETY: the caller's promise.
    unsafe { for_each_entry(map, size_of::<K>(), size_of::<V>(), each) }?;
    Ok(all)
}

/// Hands out all entries of an array or a hash map without per-CPU values. Of a hash map bucket by bucket, each at one time:
/// what stands in the map throughout is seen once, whatever programs add and remove meanwhile (kernel/bpf/hashtab.c,
/// `__htab_map_lookup_and_delete_batch`).
///
/// # Safety
///
/// `key_size` and `value_size` must be the map's.
pub(crate) unsafe fn for_each_entry(
    map: impl AsFd,
    key_size: usize,
    value_size: usize,
    mut each: impl FnMut(&[u8], &[u8]),
) -> io::Result<()> {
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
    // Where to go on: the number of a bucket, or the last key of an array.
    let mut at: Option<u32> = None;
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    loop {
        keys.resize(room * key_size, 0_u8);
        values.resize(room * value_size, 0_u8);
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
        // SAFETY: all pointers are to what outlives the call; `keys` and `values` have room for `count`, by the caller's promise.
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
        let count = attr.count as usize;
        keys.chunks(key_size)
            .zip(values.chunks(value_size))
            .take(count)
            .for_each(|(key, value)| each(key, value));
        if end {
            return Ok(());
        }
        at = Some(next);
    }
}

//! Offloads of an interface, by the plain `SIOCETHTOOL` call of the calling thread's network namespace.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// Why an offload could not be read or set.
#[derive(Debug, thiserror::Error)]
pub enum EthtoolError {
    /// No socket for the call.
    #[error("cannot open a socket for ethtool: {0}")]
    Socket(io::Error),
    /// The name does not fit an interface name.
    #[error("`{0}` is no interface name: 1 to 15 characters are allowed")]
    Name(String),
    /// The driver, or the kernel, refused.
    #[error("cannot {verb} {offload} of {interface}: {source}")]
    Refused {
        /// "read" or "set".
        verb: &'static str,
        /// The offload.
        offload: Offload,
        /// The interface.
        interface: String,
        /// What the system said.
        source: io::Error,
    },
}

/// What an interface may do in place of the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offload {
    /// Joining received segments (GRO). On a veth it also runs NAPI, without which frames that XDP redirects to the
    /// other end are lost.
    Gro,
    /// Taking the VLAN tag out of received frames, before XDP sees them.
    RxVlan,
    /// Leaving the VLAN tag beside the frame on transmission.
    TxVlan,
    /// Leaving checksums undone on transmission.
    TxChecksum,
}

impl std::fmt::Display for Offload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Gro => "gro",
            Self::RxVlan => "rxvlan",
            Self::TxVlan => "txvlan",
            Self::TxChecksum => "tx checksumming",
        })
    }
}

impl Offload {
    /// How to ask for the offload: the calls that read and write it, and its bit in the value.
    const fn calls(self) -> Calls {
        match self {
            Self::Gro => Calls { get: ETHTOOL_GGRO, set: ETHTOOL_SGRO, bit: 1 },
            Self::RxVlan => Calls { get: ETHTOOL_GFLAGS, set: ETHTOOL_SFLAGS, bit: ETH_FLAG_RXVLAN },
            Self::TxVlan => Calls { get: ETHTOOL_GFLAGS, set: ETHTOOL_SFLAGS, bit: ETH_FLAG_TXVLAN },
            Self::TxChecksum => Calls { get: ETHTOOL_GTXCSUM, set: ETHTOOL_STXCSUM, bit: 1 },
        }
    }
}

struct Calls {
    get: u32,
    set: u32,
    bit: u32,
}

// linux/ethtool.h
const ETHTOOL_GTXCSUM: u32 = 0x16;
const ETHTOOL_STXCSUM: u32 = 0x17;
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_SFLAGS: u32 = 0x26;
const ETHTOOL_GGRO: u32 = 0x2b;
const ETHTOOL_SGRO: u32 = 0x2c;
const ETH_FLAG_TXVLAN: u32 = 1 << 7;
const ETH_FLAG_RXVLAN: u32 = 1 << 8;

/// Whether an offload is on.
pub fn get(interface: &str, offload: Offload) -> Result<bool, EthtoolError> {
    let calls = offload.calls();
    Ok(Call::new(interface, offload)?.value("read", calls.get, 0)? & calls.bit != 0)
}

/// Switches an offload and answers with what the driver made of it, which need not be what was asked for.
pub fn set(interface: &str, offload: Offload, on: bool) -> Result<bool, EthtoolError> {
    let calls = offload.calls();
    let call = Call::new(interface, offload)?;
    let now = call.value("read", calls.get, 0)?;
    let wanted = if on { now | calls.bit } else { now & !calls.bit };
    if wanted != now {
        call.value("set", calls.set, wanted)?;
    }
    Ok(call.value("read", calls.get, 0)? & calls.bit != 0)
}

struct Call<'a> {
    socket: OwnedFd,
    interface: &'a str,
    offload: Offload,
}

impl<'a> Call<'a> {
    fn new(interface: &'a str, offload: Offload) -> Result<Self, EthtoolError> {
        if interface.is_empty() || interface.len() >= libc::IFNAMSIZ {
            return Err(EthtoolError::Name(interface.to_owned()));
        }
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|errno| EthtoolError::Socket(errno.into()))?;
        Ok(Self { socket, interface, offload })
    }

    /// One call with a `struct ethtool_value`; answers with the value that the kernel left in it.
    fn value(&self, verb: &'static str, command: u32, data: u32) -> Result<u32, EthtoolError> {
        let mut value = EthtoolValue { command, data };
        let mut request = Request { name: [0; libc::IFNAMSIZ], data: &raw mut value, pad: [0; 16] };
        request.name[..self.interface.len()].copy_from_slice(self.interface.as_bytes());
        // SAFETY: the request is at least as large as the kernel's `struct ifreq`, of which SIOCETHTOOL reads the
        // name (ended by a zero, as it is shorter than the field) and the pointer; that points at a live, writable
        // `struct ethtool_value`, which is all that the commands used here read and write.
        let result = unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
        if result < 0 {
            return Err(EthtoolError::Refused {
                verb,
                offload: self.offload,
                interface: self.interface.to_owned(),
                source: io::Error::last_os_error(),
            });
        }
        Ok(value.data)
    }
}

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// `struct ifreq` as SIOCETHTOOL reads it.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    data: *mut EthtoolValue,
    pad: [u8; 16],
}

const _: () = assert!(size_of::<Request>() >= size_of::<libc::ifreq>());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_do_not_fit_are_refused() {
        assert!(matches!(get("", Offload::Gro), Err(EthtoolError::Name(_))));
        assert!(matches!(get("sixteen-letters!", Offload::Gro), Err(EthtoolError::Name(_))));
    }

    #[test]
    fn a_missing_interface_is_named() {
        let error = get("ewc-none", Offload::RxVlan).unwrap_err().to_string();
        assert!(error.contains("read rxvlan of ewc-none"), "{error}");
    }
}

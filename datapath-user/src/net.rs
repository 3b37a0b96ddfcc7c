//! Small values of the network, valid by construction.

use std::{fmt, num::NonZeroU16};

pub use eniway_ipam::net::Mac;
use serde::{Deserialize, Deserializer, Serialize, de};

/// A VLAN id that can carry a pod: 1 to 4094.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VlanId(NonZeroU16);

impl VlanId {
    /// The id, if it is one.
    pub fn new(id: u16) -> Option<Self> {
        NonZeroU16::new(id).filter(|id| id.get() <= 4094).map(Self)
    }

    /// As a number.
    pub fn get(self) -> u16 {
        self.0.get()
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The name of a network interface, as the kernel allows it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct InterfaceName(String);

impl InterfaceName {
    /// The name, if an interface may bear it.
    pub fn new(name: &str) -> Option<Self> {
        let valid = !name.is_empty()
            && name.len() < libc::IFNAMSIZ
            && name != "."
            && name != ".."
            && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
        valid.then(|| Self(name.to_owned()))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for InterfaceName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::new(&name).ok_or_else(|| {
            de::Error::custom(format_args!(
                "`{name}` cannot be the name of an interface (1 to 15 characters without `/`, `:` and blanks)"
            ))
        })
    }
}

/// The interface's index in the calling thread's network namespace.
pub fn ifindex(name: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(name).ok()
}

/// The interface's name in the calling thread's network namespace.
pub fn ifname(index: u32) -> Option<String> {
    nix::net::if_::if_indextoname(index).ok()?.into_string().ok()
}

/// A MAC, or that there is none.
pub(crate) fn mac_text(mac: Option<[u8; 6]>) -> String {
    mac.map_or_else(|| "none".to_owned(), |mac| Mac(mac).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vlan_ids_end_at_4094() {
        assert_eq!([0, 1, 4094, 4095].map(|id| VlanId::new(id).is_some()), [false, true, true, false]);
    }

    #[test]
    fn interface_names_are_the_kernels() {
        for good in ["eth0", "eth1.5", "a23456789012345"] {
            assert!(InterfaceName::new(good).is_some(), "{good}");
        }
        for bad in ["", ".", "..", "a234567890123456", "a/b", "a b", "a:b"] {
            assert!(InterfaceName::new(bad).is_none(), "{bad}");
        }
    }
}

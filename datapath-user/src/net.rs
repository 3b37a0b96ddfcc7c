//! Small values of the network, valid by construction.

use std::{fmt, num::NonZeroU16, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

/// Why a text is not a MAC address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a MAC address such as fa:16:3e:00:01:02")]
pub struct MacError(String);

impl Mac {
    /// Whether an interface may carry it: not multicast, not all zero.
    pub fn is_assignable(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let error = || MacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
                .ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() { Err(error()) } else { Ok(Self(bytes)) }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mac: Self = String::deserialize(deserializer)?.parse().map_err(de::Error::custom)?;
        if !mac.is_assignable() {
            return Err(de::Error::custom(format_args!(
                "{mac} cannot be an interface's address: it is multicast or zero"
            )));
        }
        Ok(mac)
    }
}

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
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_read_and_print_alike() {
        let text = "fa:16:3e:00:01:02";
        assert_eq!(text.parse::<Mac>().unwrap().to_string(), text);
        for bad in [
            "",
            "fa:16:3e:00:01",
            "fa:16:3e:00:01:02:03",
            "fa:16:3e:00:01:0g",
            "fa-16-3e-00-01-02",
            "+a:16:3e:00:01:02",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn multicast_and_zero_are_not_assignable() {
        assert!(!Mac([0; 6]).is_assignable());
        assert!(!Mac([1, 0, 0, 0, 0, 1]).is_assignable());
        assert!(Mac([2, 0, 0, 0, 0, 1]).is_assignable());
    }

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

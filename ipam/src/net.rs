//! Small values of the network.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A MAC address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

/// Why a text is not the MAC address of an interface.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// It is something else.
    #[error("`{0}` is not a MAC address such as fa:16:3e:00:01:02")]
    Malformed(String),
    /// It is multicast or zero.
    #[error("{0} cannot be an interface's address: it is multicast or zero")]
    NotAssignable(Mac),
}

impl Mac {
    /// Whether an interface may carry it: not multicast, not all zero.
    pub fn is_assignable(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let error = || MacError::Malformed(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            // `from_str_radix` alone would take a sign for a digit.
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
                .ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() {
            return Err(error());
        }
        let mac = Self(bytes);
        if mac.is_assignable() { Ok(mac) } else { Err(MacError::NotAssignable(mac)) }
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
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A VLAN id that can carry a pod: 1 to 4094.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct VlanId(u16);

impl VlanId {
    /// The highest id.
    pub const MAX: u16 = 4094;

    /// The id, if it is one.
    pub fn new(id: u16) -> Option<Self> {
        (1..=Self::MAX).contains(&id).then_some(Self(id))
    }

    /// As a number.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u16> for VlanId {
    type Error = String;

    fn try_from(id: u16) -> Result<Self, String> {
        Self::new(id).ok_or_else(|| format!("{id} is not a VLAN id (1-{})", Self::MAX))
    }
}

impl From<VlanId> for u16 {
    fn from(id: VlanId) -> Self {
        id.0
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The addresses of one interface: with dual stack both, always allocated and released together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Addresses {
    /// The IPv4 address.
    pub ipv4: Ipv4Addr,
    /// The IPv6 address, on dual-stack nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<Ipv6Addr>,
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ipv6 {
            Some(ipv6) => write!(f, "{} and {ipv6}", self.ipv4),
            None => self.ipv4.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_is_six_pairs_of_hexadecimal_digits() {
        let mac: Mac = "fa:16:3e:00:01:0F".parse().unwrap();
        assert_eq!(mac.to_string(), "fa:16:3e:00:01:0f");
        for bad in [
            "",
            "fa:16:3e:00:01",
            "fa:16:3e:00:01:02:03",
            "fa:16:3e:00:01:+2",
            "fa:16:3e:00:01:2",
            "fa:16:3e:00:01:0g",
            "fa-16-3e-00-01-02",
        ] {
            assert_eq!(bad.parse::<Mac>(), Err(MacError::Malformed(bad.to_owned())));
        }
    }

    #[test]
    fn multicast_and_zero_are_no_interfaces_address() {
        for bad in ["00:00:00:00:00:00", "01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff"] {
            let error = bad.parse::<Mac>().unwrap_err().to_string();
            assert!(error.contains(bad) && error.contains("multicast"), "{error}");
        }
    }
}

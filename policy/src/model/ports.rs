//! Sets of ports.

use std::{fmt, str::FromStr};

use super::Invalid;

/// Ports from the first to the last, both included; 1 to 65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// The ports from `first` to `last`, unless that is none or has port 0.
    pub const fn new(first: u16, last: u16) -> Option<Self> {
        if first == 0 || last < first { None } else { Some(Self { first, last }) }
    }

    /// The first port.
    pub const fn first(self) -> u16 {
        self.first
    }

    /// The last port.
    pub const fn last(self) -> u16 {
        self.last
    }
}

/// Ports, as ranges. Written `80,443,8000-8100`; all of them (port 0 as well) are [`Ports::ALL`], written by leaving
/// them out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ports(Vec<PortRange>);

impl Ports {
    /// All ports, 0 included.
    pub const ALL: Self = Self(Vec::new());

    /// These ranges; without any, [`Ports::ALL`].
    pub const fn of(ranges: Vec<PortRange>) -> Self {
        Self(ranges)
    }

    /// Whether these are all ports.
    pub const fn is_all(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges as they were written, perhaps overlapping; none for [`Ports::ALL`].
    pub fn ranges(&self) -> &[PortRange] {
        &self.0
    }

    /// Whether the port is one of them.
    pub fn holds(&self, port: u16) -> bool {
        self.is_all() || self.0.iter().any(|range| (range.first..=range.last).contains(&port))
    }
}

impl FromStr for Ports {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid = || Invalid::Ports(text.to_owned());
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            // `parse` alone would take a sign.
            let number = |digits: &str| {
                let digits = digits.trim();
                if digits.bytes().all(|byte| byte.is_ascii_digit()) { digits.parse().ok() } else { None }
            };
            PortRange::new(number(first)?, number(last)?)
        };
        text.split(',').map(range).collect::<Option<Vec<_>>>().map(Self).ok_or_else(invalid)
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_all() {
            return f.write_str("all");
        }
        for (place, range) in self.0.iter().enumerate() {
            if place > 0 {
                f.write_str(",")?;
            }
            if range.first == range.last {
                write!(f, "{}", range.first)?;
            } else {
                write!(f, "{}-{}", range.first, range.last)?;
            }
        }
        Ok(())
    }
}

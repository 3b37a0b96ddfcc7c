//! Limits of a pod's bandwidth, as runtimes and the file source ask for them.

use datapath_common::abi::{self, Bucket, endpoint::flag};
use serde::{Deserialize, Serialize};

/// Bits per second that can be asked for: what Kubernetes takes of its annotations.
const RATES: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;
/// The smallest burst in bytes: the largest GSO packet, with its headers and room for the acknowledgements of its connection.
const MIN_BURST: u64 = 68 << 10;
/// The burst where none is asked for: so many bytes at least, and what the rate gives in so many milliseconds. A TCP sender that
/// loses the end of what it sends is silent for 200 ms (`TCP_RTO_MIN`); with a smaller burst what it earns meanwhile is lost.
const DEFAULT_BURST: (u64, u64) = (256 << 10, 250);
/// The largest burst in bits, as of the CNI plugin `bandwidth`.
const MAX_BURST_BITS: u64 = 8 * u32::MAX as u64;
/// What runtimes write for a burst that nobody has chosen. Taken at its word it would let a pod of 10 Mbit/s send for minutes
/// as if it had no limit.
const NOT_CHOSEN: [u64; 2] = [i32::MAX as u64, u32::MAX as u64];

/// A limit of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Limit {
    /// Bits per second.
    pub rate: u64,
    /// Bytes that may pass at once.
    pub burst: u64,
}

impl Limit {
    /// The limit that a rate in bits per second and a burst in bits stand for; 0 = none, or not chosen.
    ///
    /// # Errors
    ///
    /// Says which of the two makes no sense, and why.
    pub fn new(rate: u64, burst: u64) -> Result<Option<Self>, (&'static str, String)> {
        if rate == 0 {
            return match burst {
                0 => Ok(None),
                burst => Err(("burst", format!("{burst} bits are given, and no rate"))),
            };
        }
        if !RATES.contains(&rate) {
            let (least, most) = (RATES.start(), RATES.end());
            return Err(("rate", format!("{rate} bits per second are not between {least} and {most}")));
        }
        if burst > MAX_BURST_BITS {
            return Err(("burst", format!("{burst} bits are more than {MAX_BURST_BITS}")));
        }
        let (least, milliseconds) = DEFAULT_BURST;
        let burst = match burst {
            0 => None,
            burst if NOT_CHOSEN.contains(&burst) => None,
            bits => Some((bits / 8).max(MIN_BURST)),
        };
        let burst = burst.unwrap_or_else(|| least.max(rate / 8 * milliseconds / 1000));
        Ok(Some(Self { rate, burst }))
    }

    fn bucket(limit: Option<Self>) -> Bucket {
        limit.map_or(Bucket::ZERO, |limit| Bucket::new(limit.rate, limit.burst))
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let units = [(1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")];
        match units.into_iter().find(|(unit, _)| self.rate.is_multiple_of(*unit)) {
            Some((unit, name)) => write!(f, "{}{name}", self.rate / unit),
            None => write!(f, "{}", self.rate),
        }
    }
}

/// The limits of a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Of what it receives.
    pub ingress: Option<Limit>,
    /// Of what it sends.
    pub egress: Option<Limit>,
}

/// Rates in bits per second and bursts in bits, as the CNI's `runtimeConfig.bandwidth` and the file source have them.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Asked {
    /// Of what the pod receives.
    pub ingress_rate: u64,
    /// Of what it receives at once.
    pub ingress_burst: u64,
    /// Of what the pod sends.
    pub egress_rate: u64,
    /// Of what it sends at once.
    pub egress_burst: u64,
}

impl Bandwidth {
    /// What is asked for, as limits.
    ///
    /// # Errors
    ///
    /// Says which value makes no sense, and why.
    pub fn new(asked: &Asked) -> Result<Self, String> {
        let limit = |direction, rate, burst| {
            Limit::new(rate, burst).map_err(|(what, problem)| format!("{direction} {what}: {problem}"))
        };
        Ok(Self {
            ingress: limit("ingress", asked.ingress_rate, asked.ingress_burst)?,
            egress: limit("egress", asked.egress_rate, asked.egress_burst)?,
        })
    }

    /// These limits, and others where these have none.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self { ingress: self.ingress.or(other.ingress), egress: self.egress.or(other.egress) }
    }

    /// What stands for them in a pod's record.
    pub fn flag(&self) -> u32 {
        if *self == Self::default() { 0 } else { flag::LIMITED }
    }

    /// The row of map `LIMITS`, for a pod whose parent ENI has a queue in which so many of its bytes may wait.
    pub fn row(&self, queue: u64) -> abi::Limits {
        let egress = Limit::bucket(self.egress);
        abi::Limits { ingress: Limit::bucket(self.ingress), egress, pace: egress.nanos(queue) }
    }
}

/// As people read it: what the pod receives, then what it sends.
impl std::fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |limit: Option<Limit>| limit.map_or_else(|| "-".to_owned(), |limit| limit.to_string());
        match self.flag() {
            0 => f.write_str("-"),
            _ => write!(f, "{}/{}", text(self.ingress), text(self.egress)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_bursts_are_checked() {
        assert_eq!(Limit::new(0, 0).unwrap(), None);
        for (rate, burst, what, word) in [
            (0, 8, "burst", "no rate"),
            (999, 0, "rate", "1000"),
            (1_000_000_000_000_001, 0, "rate", "between"),
            (1_000, 8 * u64::from(u32::MAX) + 1, "burst", "more than"),
        ] {
            let (field, problem) = Limit::new(rate, burst).unwrap_err();
            assert!(field == what && problem.contains(word), "{field}: {problem}");
        }
    }

    #[test]
    fn bursts_let_the_largest_packet_through() {
        let burst = |rate, burst| Limit::new(rate, burst).unwrap().unwrap().burst;
        assert_eq!(burst(1_000_000, 8_000_000), 1_000_000);
        assert_eq!(burst(1_000_000, 8), 69_632);
        // What containerd and kubelet write when nobody has chosen.
        for bits in [0, 2_147_483_647, 4_294_967_295] {
            assert_eq!(burst(1_000_000, bits), 262_144);
            assert_eq!(burst(1_000_000_000, bits), 31_250_000);
        }
    }

    #[test]
    fn directions_are_told_apart() {
        let asked = Asked { ingress_rate: 10_000_000, egress_rate: 1_500, ..Asked::default() };
        let bandwidth = Bandwidth::new(&asked).unwrap();
        assert_eq!(bandwidth.to_string(), "10M/1500");
        assert_eq!(Bandwidth { egress: None, ..bandwidth }.to_string(), "10M/-");
        assert_eq!(Bandwidth::default().to_string(), "-");
        let wrong = Bandwidth::new(&Asked { egress_rate: 7, ..asked }).unwrap_err();
        assert!(wrong.starts_with("egress rate: 7 "), "{wrong}");
        let row = bandwidth.row(0);
        assert_eq!((row.ingress.nanos(10), row.pace), (8_000, 0));
        assert!(bandwidth.row(1000).pace > 0);
        assert_eq!(Bandwidth { egress: None, ..bandwidth }.row(1000).pace, 0);
    }
}

//! Limits of bandwidth: what the agent says of a pod in map `LIMITS`, by endpoint id. How far they are used up stands in map
//! `SPENT`, which the programs write.

use core::mem::{offset_of, size_of};

use super::Direction;

/// What a pod may send, or receive.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// Nanoseconds that one byte takes, times 2 to the power of [`Bucket::SHIFT`]; 0 = no limit.
    pub cost: u64,
    /// Nanoseconds that the burst takes: so far may the pod be ahead of its rate.
    pub depth: u64,
    /// Nanoseconds beyond `depth` that are kept for the node and for health checks.
    pub reserve: u64,
}

impl Bucket {
    /// No limit.
    pub const ZERO: Self = Self { cost: 0, depth: 0, reserve: 0 };
    /// Fraction bits of [`cost`](Self::cost). With the lowest rate, 1 kbit/s, a packet of 1 MiB still takes a `u64`.
    pub const SHIFT: u32 = 20;
    /// Bytes that [`reserve`](Self::reserve) stands for: the largest GSO packet.
    pub const RESERVE: u64 = 64 << 10;

    /// A limit of `rate` bits a second, at least 1000 of them, with a burst of so many bytes.
    pub const fn new(rate: u64, burst: u64) -> Self {
        let cost = ((8_000_000_000u128 << Self::SHIFT) + rate as u128 / 2) / rate as u128;
        let cost = if cost == 0 { 1 } else { cost as u64 };
        Self { cost, depth: Self::time(cost, burst), reserve: Self::time(cost, Self::RESERVE) }
    }

    /// Nanoseconds that so many bytes take.
    const fn time(cost: u64, bytes: u64) -> u64 {
        let time = (bytes as u128 * cost as u128) >> Self::SHIFT;
        // Centuries are as good as forever, and leave room for a clock to be added.
        if time > (u64::MAX >> 2) as u128 { u64::MAX >> 2 } else { time as u64 }
    }

    /// Nanoseconds that so many bytes take at this rate.
    pub const fn nanos(&self, bytes: u64) -> u64 {
        Self::time(self.cost, bytes)
    }
}

/// Value of map `LIMITS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// What the pod may receive.
    pub ingress: Bucket,
    /// What it may send.
    pub egress: Bucket,
    /// Nanoseconds of what it sends beyond the burst that wait for their time in the fair queue (`fq`) of its parent ENI
    /// in place of being dropped; 0 where there is none.
    pub pace: u64,
}

impl Limits {
    /// No limits.
    pub const ZERO: Self = Self { ingress: Bucket::ZERO, egress: Bucket::ZERO, pace: 0 };

    /// The limit of one direction.
    #[inline(always)]
    pub const fn of(&self, direction: Direction) -> &Bucket {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }
}

/// Value of map `SPENT`, by direction: the time, in nanoseconds of the monotonic clock, at which all that has passed has been
/// paid for. In the past: the pod has its whole burst.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// By [`Direction`].
    pub until: [u64; 2],
}

impl Spent {
    /// Nothing passed yet.
    pub const ZERO: Self = Self { until: [0; 2] };
}

const _: () = {
    assert!(size_of::<Bucket>() == 24);
    assert!(size_of::<Limits>() == 56);
    assert!(offset_of!(Limits, egress) == 24);
    assert!(offset_of!(Limits, pace) == 48);
    assert!(size_of::<Spent>() == 16);
};

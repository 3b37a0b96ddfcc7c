//! What was sent, and what of it arrived.

use std::ops::AddAssign;

use serde::Serialize;

/// The numbers that arrived out of one sequence.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    bits: Vec<u64>,
    next: u64,
    pub(super) distinct: u64,
    pub(super) duplicates: u64,
    pub(super) reordered: u64,
}

impl Seen {
    pub(super) fn note(&mut self, number: u64) {
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if word >= self.bits.len() {
            self.bits.resize(word + 1, 0);
        }
        if self.bits[word] & bit != 0 {
            self.duplicates += 1;
            return;
        }
        self.bits[word] |= bit;
        self.distinct += 1;
        if number < self.next {
            self.reordered += 1;
        } else {
            self.next = number + 1;
        }
    }

    /// The first and the last of the numbers below `sent` that have not arrived.
    pub(super) fn gap(&self, sent: u64) -> Option<(u64, u64)> {
        let absent = |number: &u64| {
            self.bits.get((number / 64) as usize).is_none_or(|word| word & (1 << (number % 64)) == 0)
        };
        Some(((0..sent).find(absent)?, (0..sent).rev().find(absent)?))
    }
}

/// Packets of a path, requests and replies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Handed to the kernel, and taken by it.
    pub sent: u64,
    /// Those that did not arrive.
    pub lost: u64,
    /// Those of them that arrived at a socket which was full: no fault of the datapath, but such a round proves nothing.
    pub full: u64,
    /// Those that arrived twice.
    pub duplicates: u64,
    /// Those that arrived after one that was sent later.
    pub reordered: u64,
}

impl Tally {
    /// Adds one direction of one flow.
    pub(super) fn count(&mut self, sent: u64, seen: &Seen) {
        self.sent += sent;
        self.lost += sent.saturating_sub(seen.distinct);
        self.duplicates += seen.duplicates;
        self.reordered += seen.reordered;
    }

    /// Packets that were lost and not for a full socket.
    pub fn unexplained(&self) -> u64 {
        self.lost.saturating_sub(self.full)
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.lost += other.lost;
        self.full += other.full;
        self.duplicates += other.duplicates;
        self.reordered += other.reordered;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_counts_once() {
        let mut seen = Seen::default();
        for number in [0, 1, 3, 2, 3, 200, 199] {
            seen.note(number);
        }
        assert_eq!((seen.distinct, seen.duplicates, seen.reordered), (6, 1, 2));
        assert_eq!(seen.gap(4), None);
        assert_eq!(seen.gap(202), Some((4, 201)));
    }

    #[test]
    fn what_a_full_socket_took_is_told_apart() {
        let mut seen = Seen::default();
        (0..7).for_each(|number| seen.note(number));
        let mut tally = Tally::default();
        tally.count(10, &seen);
        tally.full = 2;
        assert_eq!((tally.sent, tally.lost, tally.unexplained()), (10, 3, 1));
    }
}

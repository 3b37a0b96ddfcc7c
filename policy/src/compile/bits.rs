//! Sets of small numbers.

/// What a peer has of what rules ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Bits(Vec<u64>);

impl Bits {
    pub(super) fn set(&mut self, bit: usize) {
        if self.0.len() <= bit / 64 {
            self.0.resize(bit / 64 + 1, 0);
        }
        self.0[bit / 64] |= 1 << (bit % 64);
    }

    pub(super) fn has(&self, bit: usize) -> bool {
        self.0.get(bit / 64).is_some_and(|word| word >> (bit % 64) & 1 != 0)
    }

    /// What is in both; without trailing zeros, so that equal sets are equal values.
    pub(super) fn and(&self, other: &Self) -> Self {
        let mut both: Vec<u64> = self.0.iter().zip(&other.0).map(|(a, b)| a & b).collect();
        while both.last() == Some(&0) {
            both.pop();
        }
        Self(both)
    }
}

//! Which slots and ids are free. One that was given up rests, for a program that looked it up may still be running.

use std::time::Instant;

use super::{GRACE, TablesError};

/// Places of an array, without the first.
pub(super) struct Places(Vec<Place>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Clean.
    Free,
    /// Not known to be clean: what an earlier agent left.
    Unknown,
    /// Given up, and perhaps still in use by a running program.
    Resting(Instant),
    Taken,
}

impl Places {
    pub(super) fn new(len: u32) -> Self {
        let mut places = vec![Place::Unknown; len as usize];
        if let Some(first) = places.first_mut() {
            *first = Place::Taken;
        }
        Self(places)
    }

    /// Takes the first place that is free, and says whether it is clean.
    pub(super) fn take(&mut self, limit: u32) -> Result<(u32, bool), TablesError> {
        let usable = |place: &Place| match place {
            Place::Free | Place::Unknown => true,
            Place::Resting(since) => since.elapsed() >= GRACE,
            Place::Taken => false,
        };
        match self.0.iter().position(usable) {
            Some(i) => {
                let clean = self.0[i] == Place::Free;
                self.0[i] = Place::Taken;
                Ok((i as u32, clean))
            }
            None if self.0.iter().any(|place| matches!(place, Place::Resting(_))) => {
                Err(TablesError::Resting)
            }
            None => Err(TablesError::Full { limit }),
        }
    }

    /// Takes a place that is in use already.
    pub(super) fn occupy(&mut self, i: u32) {
        self.0[i as usize] = Place::Taken;
    }

    pub(super) fn rest(&mut self, i: u32) {
        self.0[i as usize] = Place::Resting(Instant::now());
    }

    pub(super) fn give_back(&mut self, i: u32) {
        self.0[i as usize] = Place::Unknown;
    }

    /// Frees a place that was cleaned.
    pub(super) fn free(&mut self, i: u32) {
        self.0[i as usize] = Place::Free;
    }

    pub(super) fn rested(&self) -> Vec<u32> {
        let rested = |place: &Place| matches!(place, Place::Resting(since) if since.elapsed() >= GRACE);
        (0..self.0.len()).filter(|&i| rested(&self.0[i])).map(|i| i as u32).collect()
    }

    /// Lets the time go by that places rest.
    #[cfg(test)]
    pub(super) fn wait(&mut self) {
        for place in &mut self.0 {
            if let Place::Resting(since) = place {
                *since -= GRACE;
            }
        }
    }
}

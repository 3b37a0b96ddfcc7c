//! Words that programs on several CPUs change at the same time. `core` has no atomic types for this target, whose first
//! instruction sets could not do more than add; kernels from 5.12 on can.

use core::{
    cell::UnsafeCell,
    intrinsics::{
        AtomicOrdering::{Relaxed, SeqCst},
        atomic_cxchg, atomic_xadd,
    },
};

use datapath_common::tables::Shared;

/// A word in a map.
#[repr(transparent)]
pub struct Word(UnsafeCell<u64>);

impl Word {
    /// The word at this place.
    ///
    /// # Safety
    ///
    /// The place is an aligned word of a map's value, which only [`Word`]s and the agent write.
    #[inline(always)]
    pub unsafe fn at<'a>(place: *mut u64) -> &'a Self {
        // SAFETY: as the caller promises; the type is a word's.
        unsafe { &*place.cast() }
    }
}

impl Shared for Word {
    #[inline(always)]
    fn read(&self) -> u64 {
        // SAFETY: an aligned word is read in one instruction; volatile, lest it be read twice.
        unsafe { self.0.get().read_volatile() }
    }

    #[inline(always)]
    fn replace(&self, old: u64, new: u64) {
        // SAFETY: the place is valid, see `at`. Whoever was first has set it.
        let _ = unsafe { atomic_cxchg::<u64, { Relaxed }, { Relaxed }>(self.0.get(), old, new) };
    }

    #[inline(always)]
    fn add(&self, more: u64) -> u64 {
        // SAFETY: the place is valid, see `at`. Not relaxed: of a relaxed addition LLVM makes the instruction that returns nothing
        // (`lock *(u64 *)r += x`), and takes what was added for what was there, though the result is asked for.
        unsafe { atomic_xadd::<u64, u64, { SeqCst }>(self.0.get(), more) }
    }
}

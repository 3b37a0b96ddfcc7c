//! What the kernel programs and the agent of eniway share, in `no_std` code without dependencies:
//!
//! - [`abi`]: the layout of every map (keys, values, names), the numbers that packets are counted by, and the
//!   version that covers them all;
//! - [`packet`]: one header a file, from bytes to plain values;
//! - [`decide`]: one hook a file, from values to a verdict, over the look-ups of [`tables::Tables`].
//!
//! The kernel programs compile [`packet`] and [`decide`] in; the host compiles the same functions for unit tests,
//! property tests and `eniway trace`. **A packet's fate is decided in [`decide`] and nowhere else.**

#![no_std]

#[cfg(any(test, feature = "testing"))]
extern crate std;

pub mod abi;
pub mod decide;
pub mod packet;
pub mod tables;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

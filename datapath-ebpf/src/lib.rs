//! The kernel programs are the binary of this package; the empty library lets cargo treat it as a dependency.

#![no_std]

//! The fast path against the VPC: what reaches the other pod with the fast path on must be exactly what reaches it with
//! everything hairpinned. Cases are drawn by chance, run in both worlds, and made as small as they get where they differ.

pub mod case;
mod generate;
mod shrink;

pub use case::{Case, Pod, Step};
pub use generate::{Dice, Size};
pub use shrink::shrink;

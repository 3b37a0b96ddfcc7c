//! The fast path against the VPC: what reaches the other pod with the fast path on must be exactly what reaches it with
//! everything hairpinned. Cases are drawn by chance, run in both worlds, and made as small as they get where they differ.

pub mod case;
mod generate;
mod host;
mod kernel;
mod shrink;
mod world;

pub use crate::dice::Dice;
pub use case::{Case, Pod, State, Step};
pub use generate::{PODS, Size};
pub use host::HostNode;
pub use kernel::KernelNode;
pub use shrink::shrink;
pub use world::{Datagrams, Difference, Fate, Node, Sent, Tally, change, new_to_the_vpc, run, vpc};

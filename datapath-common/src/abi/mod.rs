//! The contract between the kernel programs, the agent and whoever reads the pinned maps.
//!
//! Rules: `#[repr(C)]`, padding spelled out and zero, sizes and offsets asserted at compile time, no `bool`, `Option`
//! or Rust enum inside. Addresses and MACs are byte arrays in network order; all other integers are in the
//! machine's order. A change of any layout raises [`VERSION`] (`tests/abi.txt` holds the snapshot that CI compares).

pub mod endpoint;
pub mod flow;
pub mod layout;
pub mod limit;
pub mod maps;
pub mod outcome;
pub mod policy;

pub use endpoint::Endpoint;
pub use flow::{Door, Flow, FlowKey, Fragment, FragmentKey, Origin};
pub use limit::{Bucket, Limits, Spent};
pub use outcome::{Carried, Counter, CounterRow, Direction, Outcome};
pub use policy::{Admitted, PairKey};

/// The version of all layouts in this module. It is part of the pin path.
pub const VERSION: u32 = if cfg!(feature = "next-abi") { RELEASED + 1 } else { RELEASED };

const RELEASED: u32 = 4;

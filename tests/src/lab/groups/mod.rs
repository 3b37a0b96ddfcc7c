//! Security groups as the lab's VPC enforces them: a plain evaluator of what the documentation of [`eniway_policy`] says,
//! which shares nothing with the compiler of the fast path but the types of the model, and so can judge it.

mod flows;
mod gate;
pub mod packet;
mod rules;
#[cfg(test)]
mod tests;

pub use flows::Vpc;
pub(super) use gate::{GATE, connect_gate};
pub use gate::{Gate, Refused};
pub use packet::Packet;
pub use rules::{Members, Verdict, Why};

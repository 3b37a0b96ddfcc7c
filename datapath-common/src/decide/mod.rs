//! Where a packet's fate is decided: one hook a file, each a function from a frame and the tables to a [`Decision`].
//! [`door`] holds what the hooks share: which way a flow goes and what is remembered.
//!
//! A hook has its decision in two parts: `decide_plain` for what nearly all packets are ([`packet::plain`](crate::packet::plain)),
//! and `decide_any`, which knows every packet and is asked about what the first leaves open. `decide` is the two together;
//! the kernel programs call them one by one, so that the compiler keeps the common way free of what the other has to carry.
//!
//! Decisions are flat values on purpose. Where an enum with a payload meets itself from two branches, LLVM carries the
//! payload of the empty variant along as an undefined register, and the verifier refuses to have that copied.

pub mod door;
pub mod eni_egress;
pub mod eni_ingress;
pub mod limit;
#[cfg(test)]
mod limit_tests;
pub mod nic;
pub mod pod_egress;
pub mod pod_ingress;
pub mod policy;
#[cfg(test)]
mod policy_tests;
#[cfg(test)]
mod tests;

use crate::abi::{Endpoint, Outcome};

/// What becomes of a packet.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Decision<'t> {
    /// The way it takes, or the reason why it ends here. Each hook's file says which ways it knows.
    pub outcome: Outcome,
    /// A remark to count besides.
    pub remark: Option<Outcome>,
    /// The pod that it is from, or for, and is counted for; none is known for some that end here.
    pub pod: Option<&'t Endpoint>,
    /// The other pod, for [`Outcome::Local`].
    pub to: Option<&'t Endpoint>,
}

impl<'t> Decision<'t> {
    #[inline(always)]
    const fn new(outcome: Outcome, pod: &'t Endpoint) -> Self {
        Self { outcome, remark: None, pod: Some(pod), to: None }
    }

    #[inline(always)]
    const fn unknown(outcome: Outcome) -> Self {
        Self { outcome, remark: None, pod: None, to: None }
    }

    /// The number that the packet is counted under: the pod's, or 0.
    #[inline(always)]
    pub fn id(&self) -> u32 {
        match self.pod {
            Some(pod) => pod.id,
            None => 0,
        }
    }
}

/// Compares addresses as the words that they are: through references to byte arrays LLVM would compare byte by byte.
#[inline(always)]
const fn same(a: [u8; 4], b: [u8; 4]) -> bool {
    u32::from_ne_bytes(a) == u32::from_ne_bytes(b)
}

/// Compares MACs in two words.
#[inline(always)]
pub const fn same_mac(a: [u8; 6], b: [u8; 6]) -> bool {
    same([a[0], a[1], a[2], a[3]], [b[0], b[1], b[2], b[3]])
        && u16::from_ne_bytes([a[4], a[5]]) == u16::from_ne_bytes([b[4], b[5]])
}

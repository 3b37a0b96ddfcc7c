//! A VPC made of network namespaces, in which the tests, the demo and the benchmarks run: nodes, pods, virtual
//! machines, and a fabric that is as strict as a cloud's. Start at [`lab::Lab`].
//!
//! The fabric shares no code with the datapath: it is the independent judge of what the datapath sends.

pub mod bench;
pub mod demo;
pub mod dice;
pub mod equivalence;
pub mod faults;
pub mod figures;
pub mod lab;
pub mod lifecycle;
pub mod programs;
pub mod runtime;

//! The fabric of the lab: one program at tc ingress of the fabric's end of every port. It is as strict as a cloud: a
//! frame must come from a NIC that exists at (port, VLAN id), with that NIC's MAC and address, and go to the gateway.
//!
//! Speed matters only in that a large GSO packet must cost no more than a small one.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(
    target_arch = "bpf",
    expect(clippy::needless_pass_by_value, reason = "aya's macros hand a hook its context by value")
)]

#[cfg(target_arch = "bpf")]
mod fabric;

fabric_ebpf::frame!();

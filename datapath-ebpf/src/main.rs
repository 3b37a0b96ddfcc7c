//! The kernel programs of eniway, one file a hook. A hook gets the packet, asks `datapath_common::decide`, counts, and
//! acts; it decides nothing itself.

#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(core_intrinsics))]
#![cfg_attr(
    target_arch = "bpf",
    expect(internal_features, reason = "core has no atomic types for this target, see shared.rs")
)]
#![cfg_attr(
    target_arch = "bpf",
    expect(clippy::needless_pass_by_value, reason = "aya's macros hand a hook its context by value")
)]

#[cfg(target_arch = "bpf")]
mod config;
#[cfg(target_arch = "bpf")]
mod count;
#[cfg(target_arch = "bpf")]
mod ctx;
#[cfg(target_arch = "bpf")]
mod eni_egress;
#[cfg(target_arch = "bpf")]
mod eni_ingress;
#[cfg(target_arch = "bpf")]
mod eni_xdp;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod nic_egress;
#[cfg(target_arch = "bpf")]
mod nic_ingress;
#[cfg(target_arch = "bpf")]
mod pod_egress;
#[cfg(target_arch = "bpf")]
mod pod_ingress;
#[cfg(target_arch = "bpf")]
mod shared;

/// `bpf_redirect_peer` and others are for GPL-compatible programs only.
#[cfg(target_arch = "bpf")]
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// A panic path that survives optimisation becomes an endless loop, which the verifier refuses: it cannot go unseen.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}

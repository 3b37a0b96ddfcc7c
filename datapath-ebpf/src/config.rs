//! All load-time constants. The loader sets them in `.rodata`, which the kernel freezes, so that the verifier removes
//! what they rule out.

use aya_ebpf::Global;

/// 1 = traffic between pods of this node takes the fast path.
#[unsafe(no_mangle)]
pub static FAST_PATH: Global<u8> = Global::new(0);

/// Index of the parent ENI that this instance is attached to: selects its part of `SUBENI`.
#[unsafe(no_mangle)]
pub static PARENT_INDEX: Global<u32> = Global::new(0);

/// 1 = `eni_xdp` delivers to pods what it wins at; 0 = it only guards.
#[unsafe(no_mangle)]
pub static XDP_REDIRECT: Global<u8> = Global::new(0);

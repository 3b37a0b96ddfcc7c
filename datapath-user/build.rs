//! Compiles the kernel programs, which `object.rs` embeds.

use std::path::Path;

fn main() -> anyhow::Result<()> {
    let next_abi = std::env::var_os("CARGO_FEATURE_NEXT_ABI").is_some();
    let features: &[&str] = if next_abi { &["next-abi"] } else { &[] };
    let (dir, watch) = (Path::new("../datapath-ebpf"), ["../datapath-common/src"]);
    bpf_build::build("datapath-ebpf", dir, &["eniway"], &watch, features)
}

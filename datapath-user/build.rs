//! Compiles the kernel programs, which `object.rs` embeds.

use std::path::Path;

fn main() -> anyhow::Result<()> {
    bpf_build::build("datapath-ebpf", Path::new("../datapath-ebpf"), &["eniway"], &["../datapath-common/src"])
}

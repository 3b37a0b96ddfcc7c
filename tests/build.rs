//! Compiles the fabric's kernel program, those around the programs under test, those that benchmarks compare with, and the
//! datapath's own without their checks, for benchmarks.

use std::path::Path;

fn main() -> anyhow::Result<()> {
    bpf_build::build("fabric-ebpf", "fabric-ebpf".as_ref(), &["fabric", "floor", "load", "probe"], &[], &[])?;
    let (datapath, watch) = (Path::new("../datapath-ebpf"), ["../datapath-common/src"]);
    bpf_build::build("datapath-ebpf", datapath, &["eniway"], &watch, &["unchecked"])
}

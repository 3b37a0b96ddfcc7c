//! Compiles the fabric's kernel program, those around the programs under test, and those that benchmarks compare with.

fn main() -> anyhow::Result<()> {
    bpf_build::build("fabric-ebpf", "fabric-ebpf".as_ref(), &["fabric", "floor", "probe"], &[], &[])
}

//! Compiles the fabric's kernel program, and those around the programs under test.

fn main() -> anyhow::Result<()> {
    bpf_build::build("fabric-ebpf", "fabric-ebpf".as_ref(), &["fabric", "probe"], &[])
}

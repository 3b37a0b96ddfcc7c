//! Which crates of the workspace belong to which world.

use std::process::Command;

/// What compiles for BPF, each in a call of its own.
pub(crate) const BPF: [&str; 2] = ["datapath-ebpf", "fabric-ebpf"];

/// The crate whose tests need root and the kernel.
pub(crate) const LAB: &str = "eniway-tests";

/// Selects all that compiles for the host. The BPF crates are kept out of these calls: one call would unite
/// the features of both worlds and give a BPF program two panic handlers.
pub(crate) fn host(cargo: &mut Command) -> &mut Command {
    cargo.arg("--workspace");
    for package in BPF {
        cargo.args(["--exclude", package]);
    }
    cargo
}

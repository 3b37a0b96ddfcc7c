//! `cargo xtask doctor`: what this machine has, what it lacks, and how to get it.

use std::{fs, path::Path, process::Command};

use anyhow::Result;
use bpf_build::{Compiler, find_in_path};

use crate::{
    cmd,
    needs::{self, BPF_LINKER, BPFFS, Scope},
};

enum State {
    Ok,
    /// Works without it, less well.
    Optional,
    Missing,
}

struct Finding {
    name: &'static str,
    state: State,
    text: String,
}

/// Prints the table. Returns whether everything required is there.
pub(crate) fn run() -> Result<bool> {
    let mut findings = build();
    findings.extend(machine());
    findings.extend(kernel());
    let missing = findings.iter().filter(|finding| matches!(finding.state, State::Missing)).count();
    for Finding { name, state, text } in &findings {
        let state = match state {
            State::Ok => "ok",
            State::Optional => "optional",
            State::Missing => "MISSING",
        };
        println!("{name:<18} {state:<9} {text}");
    }
    println!();
    match missing {
        0 => println!("everything required is there"),
        n => println!("{n} missing; `cargo xtask setup` (as root) installs what can be installed"),
    }
    Ok(missing == 0)
}

fn required(name: &'static str, found: Option<String>, remedy: &str) -> Finding {
    match found {
        Some(text) => Finding { name, state: State::Ok, text },
        None => Finding { name, state: State::Missing, text: remedy.to_owned() },
    }
}

fn optional(name: &'static str, found: Option<String>, without: &str) -> Finding {
    match found {
        Some(text) => Finding { name, state: State::Ok, text },
        None => Finding { name, state: State::Optional, text: without.to_owned() },
    }
}

/// The first line that a program prints.
fn first_line(program: &Path, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).current_dir(cmd::root()).output().ok()?;
    let line = String::from_utf8(output.stdout).ok()?.lines().next()?.to_owned();
    output.status.success().then_some(line)
}

fn build() -> Vec<Finding> {
    let compiler = Compiler::find().ok();
    let sources = compiler.as_ref().map(|compiler| {
        let version = first_line(compiler.rustc(), &["--version"]).unwrap_or_default();
        format!("{version}, as {}", compiler.rustc().display())
    });
    let bpf_clippy = compiler.map(|compiler| compiler.tool("cargo-clippy")).filter(|clippy| {
        clippy.exists() || (clippy.components().count() == 1 && find_in_path("cargo-clippy").is_some())
    });
    let linker = needs::linker_version().filter(|version| version == BPF_LINKER);
    vec![
        required(
            "rustc",
            first_line(Path::new("rustc"), &["--version"]),
            "install Rust by rustup (https://rustup.rs)",
        ),
        required(
            "BPF compiler",
            sources,
            "`rustup component add rust-src`, or Debian's packages rustc-web and rust-web-src",
        ),
        required(
            "bpf-linker",
            linker,
            &format!("version {BPF_LINKER}: `cargo install bpf-linker --version {BPF_LINKER} --locked`"),
        ),
        optional(
            "BPF clippy",
            bpf_clippy.map(|clippy| clippy.display().to_string()),
            "`cargo xtask check` needs it: Debian's package rust-web-clippy, or rustup's clippy",
        ),
        optional(
            "rustfmt",
            first_line(Path::new("rustfmt"), &["--version"]),
            "`cargo xtask check` needs it: `rustup component add rustfmt`",
        ),
    ]
}

fn machine() -> Vec<Finding> {
    let mut findings = vec![required(
        "root",
        cmd::is_root().then(|| "yes".to_owned()),
        "the agent, the lab and the kernel tests run as root",
    )];
    let capabilities = cmd::capabilities();
    for (name, bit) in [("CAP_NET_ADMIN", 12), ("CAP_SYS_ADMIN", 21), ("CAP_PERFMON", 38), ("CAP_BPF", 39)] {
        let held = capabilities & (1 << bit) != 0;
        findings.push(required(
            name,
            held.then(|| "held".to_owned()),
            "not held: run as root, in a container with this capability added",
        ));
    }
    for tool in needs::tools(Scope::All) {
        findings.push(required(
            tool.program,
            needs::find_tool(tool.program).map(|path| path.display().to_string()),
            &format!("{}: `apt-get install {}`", tool.why, tool.package),
        ));
    }
    findings
}

fn kernel() -> Vec<Finding> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|text| text.trim().to_owned());
    let btf = fs::read("/sys/kernel/btf/vmlinux").ok();
    // The kernel's own types tell what it was built with, whatever its version number says.
    let has_type = |name: &str| {
        let name = [b"\0", name.as_bytes(), b"\0"].concat();
        btf.as_ref().is_some_and(|btf| btf.windows(name.len()).any(|window| window == name))
    };
    let in_new_namespace = |args: &[&str]| cmd::succeeds("unshare", &[&["--net"], args].concat());
    let yes = |found: bool| found.then(|| "yes".to_owned());
    let nat = "add table ip t; add chain ip t c { type nat hook prerouting priority -100; }; \
               add rule ip t c tcp dport 30000 dnat to 192.0.2.1:80";
    vec![
        required("kernel", release, "cannot read /proc/sys/kernel/osrelease"),
        required(
            "BTF",
            btf.as_ref().map(|btf| format!("/sys/kernel/btf/vmlinux, {} KiB", btf.len() / 1024)),
            "no /sys/kernel/btf/vmlinux: a kernel with CONFIG_DEBUG_INFO_BTF",
        ),
        required("bpffs", needs::bpffs_mounted().then(|| BPFFS.to_owned()), "`mount -t bpf bpf /sys/fs/bpf`"),
        optional(
            "TCX",
            yes(has_type("tcx_link")),
            "not in this kernel (6.6 has it): programs attach by clsact",
        ),
        optional(
            "BPF JIT",
            yes(fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").is_ok_and(|text| text.trim() != "0")),
            "off: `sysctl net.core.bpf_jit_enable=1`, or every packet pays for an interpreter",
        ),
        required(
            "namespaces, veth",
            yes(in_new_namespace(&["ip", "link", "add", "probe0", "type", "veth", "peer", "name", "probe1"])),
            "cannot make a veth pair in a new network namespace: root, and a kernel with CONFIG_VETH",
        ),
        required(
            "nftables NAT",
            yes(in_new_namespace(&["nft", nat])),
            "the lab's NodePort: the package nftables, and a kernel with CONFIG_NFT_NAT",
        ),
    ]
}

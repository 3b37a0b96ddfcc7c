//! `cargo xtask setup`: installs what is missing, and only that.

use std::{
    collections::BTreeSet, fs, os::unix::fs::PermissionsExt as _, path::PathBuf, process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, bail};
use bpf_build::{Compiler, find_in_path};

use crate::{
    cmd,
    needs::{self, BPF_LINKER, BPFFS, Lack, Scope},
};

/// Installs what `scope` needs. Quick, and one line only, when nothing is missing.
pub(crate) fn run(scope: Scope) -> Result<()> {
    let start = Instant::now();
    NoServices::remove_leftover();
    let lacks = needs::lacks(scope);
    if lacks.is_empty() {
        eprintln!("==> setup: nothing is missing ({:.2} s)", start.elapsed().as_secs_f64());
        return Ok(());
    }
    cmd::step("setup", || {
        for lack in &lacks {
            eprintln!("    missing: {lack}");
        }
        install(scope, &lacks)?;
        let left = needs::lacks(scope);
        if !left.is_empty() {
            bail!("still missing: {}", list(&left));
        }
        Ok(())
    })
}

/// Lists what is missing. Returns whether nothing is.
pub(crate) fn check() -> Result<bool> {
    let lacks = needs::lacks(Scope::All);
    if lacks.is_empty() {
        println!("nothing is missing");
    }
    for lack in &lacks {
        println!("missing: {lack}");
    }
    Ok(lacks.is_empty())
}

fn list(lacks: &[Lack]) -> String {
    lacks.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn install(scope: Scope, lacks: &[Lack]) -> Result<()> {
    let mut packages = BTreeSet::new();
    let mut as_root = Vec::new();
    for lack in lacks {
        match lack {
            Lack::Tool(tool) => _ = packages.insert(tool.package),
            Lack::DebianClippy => _ = packages.insert("rust-web-clippy"),
            Lack::Sources if !sources_by_rustup() => {
                packages.extend(["rustc-web", "rust-web-src"]);
                if matches!(scope, Scope::Check | Scope::All) {
                    packages.insert("rust-web-clippy");
                }
            }
            Lack::Bpffs => as_root.push(Command::new("mount")),
            Lack::Sources | Lack::Linker(_) => {}
        }
    }
    for mount in &mut as_root {
        mount.args(["-t", "bpf", "bpf", BPFFS]);
    }
    let root_needed = !packages.is_empty() || !as_root.is_empty();
    if root_needed && !cmd::is_root() {
        let mut needed: Vec<_> = as_root.iter().map(cmd::line).collect();
        if !packages.is_empty() {
            needed.push(cmd::line(&apt_install(&packages)));
        }
        bail!("not root, and this needs root: {}", needed.join("; "));
    }
    if !packages.is_empty() {
        install_packages(&packages)?;
    }
    for mount in &mut as_root {
        cmd::step("mount the BPF file system", || cmd::run(mount))?;
    }
    if lacks.iter().any(|lack| matches!(lack, Lack::Linker(_))) {
        cmd::step(&format!("install bpf-linker {BPF_LINKER}"), install_linker)?;
    }
    Ok(())
}

/// Asks rustup for the sources of the active toolchain. A toolchain that is not rustup's, or a server that
/// does not answer, is no failure here: Debian's packages come next.
fn sources_by_rustup() -> bool {
    if find_in_path("rustup").is_none() || find_in_path("timeout").is_none() {
        return false;
    }
    let added = cmd::step("sources of the core library, by rustup", || {
        cmd::run(
            Command::new("timeout")
                .args(["120", "rustup", "component", "add", "rust-src"])
                .env("RUSTUP_MAX_RETRIES", "1")
                .env("RUST_BACKTRACE", "0")
                .current_dir(cmd::root()),
        )
    });
    if let Err(error) = &added {
        eprintln!("    {error:#}; taking Debian's compiler with its sources instead");
    }
    added.is_ok() && Compiler::find().is_ok()
}

fn install_linker() -> Result<()> {
    cmd::run(&mut cmd::cargo(&["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--quiet"]))?;
    match (find_in_path("bpf-linker"), needs::linker_version()) {
        (_, Some(version)) if version == BPF_LINKER => Ok(()),
        (Some(other), Some(version)) => bail!(
            "{} (version {version}) comes before the new one on PATH: remove it, or put cargo's bin directory first",
            other.display()
        ),
        _ => {
            bail!("bpf-linker is installed but not on PATH: add cargo's bin directory, usually ~/.cargo/bin")
        }
    }
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    // A freshly started machine may still be holding the lock for its own updates.
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-y", "-o", "DPkg::Lock::Timeout=120"]);
    command
}

fn apt_install(packages: &BTreeSet<&str>) -> Command {
    let mut command = apt_get();
    // Nothing of the user's is removed for a package of ours: apt fails instead.
    command
        .args(["-o", "Dpkg::Use-Pty=0", "--no-install-recommends", "--no-remove", "install"])
        .args(packages);
    command
}

fn install_packages(packages: &BTreeSet<&str>) -> Result<()> {
    if find_in_path("apt-get").is_none() {
        let names: Vec<_> = packages.iter().copied().collect();
        bail!(
            "no apt-get here: install by hand what Debian's packages {} contain (`cargo xtask doctor` says what for)",
            names.join(", ")
        );
    }
    cmd::step("package lists", || cmd::run(apt_get().arg("update")))?;
    let what = packages.iter().copied().collect::<Vec<_>>().join(" ");
    cmd::step(&format!("Debian packages: {what}"), || {
        let guard = NoServices::new()?;
        let installed = cmd::run(&mut apt_install(packages));
        // The lab and the tests run these by themselves; the machine's own services stay off.
        for (package, service) in [("nginx", "nginx"), ("etcd-server", "etcd")] {
            if packages.contains(package) {
                disable_service(service)?;
            }
        }
        // It has no init script.
        if packages.contains("containerd") && find_in_path("systemctl").is_some() {
            cmd::run(Command::new("systemctl").args(["disable", "--quiet", "containerd.service"]))?;
        }
        drop(guard);
        installed
    })
}

/// Takes back the enabling that a package's installation did, for systemd and for init scripts.
fn disable_service(name: &str) -> Result<()> {
    let program = needs::find_tool("update-rc.d").context("no update-rc.d (package init-system-helpers)")?;
    cmd::run(Command::new(program).args([name, "disable"]))
}

const POLICY: &str = "/usr/sbin/policy-rc.d";
const POLICY_TEXT: &str =
    "#!/bin/sh\n# Written by `cargo xtask setup` while it installs packages.\nexit 101\n";

/// Keeps packages from starting their services while it lives, by Debian's policy file. A file that is
/// there already stays as it is.
struct NoServices {
    ours: Option<PathBuf>,
}

impl NoServices {
    fn new() -> Result<Self> {
        let path = PathBuf::from(POLICY);
        if path.exists() {
            return Ok(Self { ours: None });
        }
        fs::write(&path, POLICY_TEXT).with_context(|| format!("cannot write {POLICY}"))?;
        let guard = Self { ours: Some(path) };
        fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("cannot make {POLICY} executable"))?;
        Ok(guard)
    }

    /// A setup that was killed leaves its file behind, and no service would start after that.
    fn remove_leftover() {
        if fs::read_to_string(POLICY).is_ok_and(|text| text == POLICY_TEXT) {
            drop(Self { ours: Some(POLICY.into()) });
        }
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(path) = &self.ours
            && let Err(error) = fs::remove_file(path)
        {
            eprintln!(
                "warning: cannot remove {}: {error}; remove it, or no service will start",
                path.display()
            );
        }
    }
}

//! `cargo xtask check`: everything that can be said about the code without running it.

use std::process::Command;

use anyhow::{Context as _, Result, bail};
use bpf_build::{Compiler, TARGET_ARGS};

use crate::{
    cmd,
    crates::{self, BPF},
    lab, links,
    needs::Scope,
    setup,
};

/// Runs all checks, the later ones too when one fails.
pub(crate) fn run() -> Result<()> {
    setup::run(Scope::Check)?;
    let mut checks = Checks::default();
    checks.add("formatting", formatting);
    checks.add("lock file", lock_file);
    checks.add("lints, host", clippy_host);
    for package in BPF {
        checks.add(&format!("lints, {package}"), || clippy_bpf(package));
    }
    checks.add("documentation, host", docs_host);
    for package in BPF {
        checks.add(&format!("documentation, {package}"), || docs_bpf(package));
    }
    checks.add("links in the documents", links::check);
    checks.finish()
}

#[derive(Default)]
struct Checks {
    done: usize,
    failed: Vec<String>,
}

impl Checks {
    fn add(&mut self, name: &str, check: impl FnOnce() -> Result<()>) {
        self.done += 1;
        if let Err(error) = cmd::step(name, check) {
            eprintln!("error: {error:#}");
            self.failed.push(name.to_owned());
        }
    }

    fn finish(self) -> Result<()> {
        if !self.failed.is_empty() {
            bail!("{} of {} checks failed: {}", self.failed.len(), self.done, self.failed.join("; "));
        }
        eprintln!("{} checks passed", self.done);
        Ok(())
    }
}

fn formatting() -> Result<()> {
    cmd::run(&mut cmd::cargo(&["fmt", "--all", "--check"]))
}

fn lock_file() -> Result<()> {
    cmd::output(&mut cmd::cargo(&["metadata", "--locked", "--format-version", "1"])).map(drop)
}

fn clippy_host() -> Result<()> {
    let mut clippy = cmd::cargo(&["clippy", "--locked", "--all-targets", "--keep-going"]);
    cmd::run(crates::host(&mut clippy).args(["--", "-D", "warnings"]))
}

fn docs_host() -> Result<()> {
    let mut doc = cmd::cargo(&["doc", "--locked", "--no-deps", "--document-private-items"]);
    cmd::run(crates::host(&mut doc).env("RUSTDOCFLAGS", "-D warnings"))
}

fn clippy_bpf(package: &str) -> Result<()> {
    let compiler = Compiler::find()?;
    // `cargo clippy` takes the driver that lies beside it, which must be of the compiler's release.
    let mut clippy = Command::new(compiler.tool("cargo-clippy"));
    clippy.arg("clippy").env("CARGO", cmd::cargo(&[]).get_program());
    bpf_call(&mut clippy, &compiler, package)?;
    cmd::run(clippy.args(["--", "-D", "warnings"]))
}

fn docs_bpf(package: &str) -> Result<()> {
    let compiler = Compiler::find()?;
    let mut doc = cmd::cargo(&["doc", "--no-deps", "--document-private-items"]);
    bpf_call(&mut doc, &compiler, package)?;
    cmd::run(doc.env("RUSTDOC", compiler.tool("rustdoc")).env("RUSTDOCFLAGS", "-D warnings"))
}

/// What the calls for BPF crates have in common. Their own target directory keeps two compilers from
/// invalidating each other's artefacts.
fn bpf_call(cargo: &mut Command, compiler: &Compiler, package: &str) -> Result<()> {
    let bin = lab::bin_dir()?;
    let target = bin.parent().context("the target directory")?.join("bpf-check");
    cargo.current_dir(cmd::root()).args(["--locked", "--package", package, "--lib", "--bins"]);
    cargo.args(TARGET_ARGS).arg("--target-dir").arg(target);
    compiler.prepare(cargo, std::env::consts::ARCH);
    Ok(())
}

//! `cargo xtask demo` and `cargo xtask lab`: build the lab's program and become it.

use std::{env, fs, os::unix::process::CommandExt as _, path::Path, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::{cmd, crates, needs::Scope, setup};

/// Runs the walk-through.
pub(crate) fn demo(keep: bool, report: Option<&Path>) -> Result<()> {
    need_root("the lab")?;
    setup::run(Scope::Lab)?;
    build()?;
    let mut demo = lab()?;
    demo.arg("demo");
    if keep {
        demo.arg("--keep");
    }
    if let Some(report) = report {
        demo.arg("--report").arg(report);
    }
    become_it(&mut demo)
}

/// Runs the lab's program with these arguments.
pub(crate) fn run(args: &[String]) -> Result<()> {
    need_root("the lab")?;
    // What stands must come down also while the code does not build.
    let built = bin_dir()?.join("eniway-lab").is_file();
    if !(built && args.first().is_some_and(|arg| arg == "down")) {
        setup::run(Scope::Lab)?;
        build()?;
    }
    become_it(lab()?.args(args))
}

/// Builds the agent and the lab, with the BPF objects inside.
pub(crate) fn build() -> Result<()> {
    cmd::step("build the agent and the lab", || {
        cmd::run(&mut cmd::cargo(&[
            "build",
            "--locked",
            "--package",
            "datapath-user",
            "--package",
            "eniway-cni",
            "--package",
            crates::LAB,
            "--bins",
        ]))
    })
}

/// Builds the agent of the ABI version after this one, which tests and benchmarks take turns with, as `next-abi/eniway` in the
/// target directory. What is built in `profile` after it has this version again: nothing is built twice.
pub(crate) fn build_next(profile: &str) -> Result<()> {
    cmd::step("build the agent of the next ABI version", || {
        let package = ["--package", "datapath-user", "--bin", "eniway", "--features", "next-abi"];
        let build = ["build", "--locked", "--profile", profile];
        cmd::run(cmd::cargo(&build).args(package))?;
        let to = next_agent()?;
        let dir = to.parent().context("the directory of the next version")?;
        let target = dir.parent().context("the target directory")?;
        let built = target.join(if profile == "dev" { "debug" } else { profile }).join("eniway");
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        // By a rename: the old one may be running.
        let new = to.with_extension("new");
        fs::copy(&built, &new)
            .and_then(|_| fs::rename(&new, &to))
            .with_context(|| to.display().to_string())?;
        // Whoever looks beside it for the agent finds the one of this version.
        cmd::run(cmd::cargo(&build).args(&package[..4]))
    })
}

/// Where [`build_next`] leaves the agent.
pub(crate) fn next_agent() -> Result<PathBuf> {
    Ok(bin_dir()?.with_file_name("next-abi").join("eniway"))
}

/// Fails where we are not root, before anything else is done.
pub(crate) fn need_root(what: &str) -> Result<()> {
    if !cmd::is_root() {
        bail!("{what} needs root (network namespaces, BPF programs): run it as root");
    }
    Ok(())
}

/// The directory of the programs that [`build`] makes.
pub(crate) fn bin_dir() -> Result<PathBuf> {
    // We are in the same target directory, perhaps built with another profile.
    let own = env::current_exe().context("where our own program is")?;
    let profiles =
        own.parent().and_then(Path::parent).context("our own program is not in a target directory")?;
    Ok(profiles.join("debug"))
}

fn lab() -> Result<Command> {
    let bin = bin_dir()?;
    let mut lab = Command::new(bin.join("eniway-lab"));
    lab.env("ENIWAY_BIN", bin.join("eniway"));
    Ok(lab)
}

fn become_it(command: &mut Command) -> Result<()> {
    let error = command.exec();
    Err(error).with_context(|| cmd::cannot_run(command))
}

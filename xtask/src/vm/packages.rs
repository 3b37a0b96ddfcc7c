//! Debian packages, fetched by apt and unpacked below `target/vm`: nothing is installed, and nothing of the system's is in
//! the way.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::{cache, quiet};
use crate::cmd;

/// Packages whose names fit a regular expression, by the package lists; those are fetched when nothing fits.
pub(super) fn named(pattern: &str) -> Result<Vec<String>> {
    let search = || {
        let text = cmd::output(Command::new("apt-cache").args(["search", "--names-only", pattern]))?;
        let names = text.lines().filter_map(|line| line.split(' ').next());
        anyhow::Ok(names.map(str::to_owned).collect::<Vec<_>>())
    };
    let names = search()?;
    if !names.is_empty() {
        return Ok(names);
    }
    update()?;
    search()
}

/// The package, unpacked; fetched the first time.
pub(super) fn unpacked(package: &str) -> Result<PathBuf> {
    let to = cache()?.join("packages").join(package);
    if !to.is_dir() {
        unpack(&[package.to_owned()], &to)?;
    }
    Ok(to)
}

/// What apt would install for a package and does not find installed.
fn would_install(package: &str) -> Result<Vec<String>> {
    let simulate = || {
        let args = ["-q", "-s", "--no-install-recommends", "install", package];
        cmd::output(Command::new("apt-get").env("LC_ALL", "C").args(args))
    };
    let plan = match simulate() {
        Ok(plan) => plan,
        Err(_) => {
            update()?;
            simulate()?
        }
    };
    let words = plan.lines().filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next());
    Ok(words.map(str::to_owned).collect())
}

/// The package and what it needs beside what is installed, unpacked into one directory.
pub(crate) fn with_needs(package: &str) -> Result<PathBuf> {
    let to = cache()?.join("packages").join(format!("{package}-with-needs"));
    if !to.is_dir() {
        let mut packages = would_install(package)?;
        if !packages.iter().any(|name| name == package) {
            packages.push(package.to_owned());
        }
        cmd::step(&format!("{package}, unpacked below the target directory"), || unpack(&packages, &to))?;
    }
    Ok(to)
}

/// Fetches packages and unpacks all of them into one directory, which is there whole or not at all.
fn unpack(packages: &[String], to: &Path) -> Result<()> {
    let new = to.with_extension(format!("new-{}", std::process::id()));
    let debs = new.join("debs");
    let tree = new.join("tree");
    for dir in [&debs, &tree] {
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    }
    let download = || {
        let mut apt = Command::new("apt-get");
        // Our directory is not open to apt's own user.
        apt.current_dir(&debs).args(["-q", "-o", "APT::Sandbox::User=root", "download"]).args(packages);
        quiet(&mut apt)
    };
    // Lists that are too old name versions that are gone.
    if download().is_err() {
        update()?;
        download()?;
    }
    let mut count = 0;
    for deb in fs::read_dir(&debs)? {
        quiet(Command::new("dpkg-deb").arg("-x").arg(deb?.path()).arg(&tree))?;
        count += 1;
    }
    if count != packages.len() {
        bail!("apt-get fetched {count} packages for {}", packages.join(", "));
    }
    let renamed = fs::rename(&tree, to);
    fs::remove_dir_all(&new).with_context(|| new.display().to_string())?;
    // Another process may have been faster, with the same packages.
    if to.is_dir() { Ok(()) } else { renamed.with_context(|| to.display().to_string()) }
}

fn update() -> Result<()> {
    let mut update = Command::new("apt-get");
    update.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-o", "DPkg::Lock::Timeout=120", "update"]);
    cmd::step("package lists", || quiet(&mut update))
}

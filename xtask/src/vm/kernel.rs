//! Debian's cloud kernels.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::{cache, packages, quiet};

/// Where the modules are that the lab's networks are made of. A kernel loads them by itself, by modprobe.
const MODULES: [&str; 5] = ["net", "lib", "crypto", "arch/x86/crypto", "drivers/net"];

/// A kernel, unpacked.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// As asked for: `6.1`.
    pub(crate) version: String,
    /// What `uname -r` will say.
    pub(crate) release: String,
    pub(crate) image: PathBuf,
    /// The directory that has a directory named after the release, with modules and their index.
    pub(crate) modules: PathBuf,
}

impl Kernel {
    /// The latest one of a version such as `6.1`, fetched if need be.
    pub(crate) fn find(version: &str) -> Result<Self> {
        let numbers: Vec<_> = version.split('.').collect();
        if numbers.len() != 2
            || numbers.iter().any(|n| n.is_empty() || n.bytes().any(|b| !b.is_ascii_digit()))
        {
            bail!("kernel {version:?}: two numbers, please, such as 6.1");
        }
        let pattern = format!(r"^linux-image-{}\.[0-9].*-cloud-amd64$", version.replace('.', r"\."));
        let found = packages::named(&pattern)?;
        let package = found.into_iter().max_by_key(|name| numbers_in(name)).with_context(|| {
            format!(
                "no package {pattern} in Debian's lists; Debian 12 with its security updates has 6.1 and 6.12"
            )
        })?;
        let release = package.strip_prefix("linux-image-").unwrap_or(&package).to_owned();
        let unpacked = packages::unpacked(&package)?;
        let image = unpacked.join("boot").join(format!("vmlinuz-{release}"));
        if !image.is_file() {
            bail!("{package} has no {}", image.display());
        }
        let modules = modules(&unpacked, &release)?;
        Ok(Self { version: version.to_owned(), release, image, modules })
    }
}

/// All numbers of a name, for comparing versions.
fn numbers_in(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

/// Copies the modules that may be needed and makes their index.
fn modules(unpacked: &Path, release: &str) -> Result<PathBuf> {
    let base = cache()?.join("modules").join(release);
    let to = base.join("lib/modules");
    if to.join(release).join("modules.dep.bin").is_file() {
        return Ok(to);
    }
    let from = unpacked.join("lib/modules").join(release);
    for part in MODULES {
        let from = from.join("kernel").join(part);
        if from.is_dir() {
            let to = to.join(release).join("kernel").join(part);
            fs::create_dir_all(&to).with_context(|| to.display().to_string())?;
            quiet(Command::new("cp").arg("-a").arg("-T").arg(&from).arg(&to))?;
        }
    }
    for list in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
        fs::copy(from.join(list), to.join(release).join(list)).with_context(|| list.to_owned())?;
    }
    quiet(Command::new("depmod").arg("-b").arg(&base).arg(release))?;
    Ok(to)
}

#[cfg(test)]
mod tests {
    use super::numbers_in;

    #[test]
    fn versions_compare_by_numbers() {
        let newest = ["linux-image-6.12.99+deb12-cloud-amd64", "linux-image-6.12.107+deb12-cloud-amd64"]
            .into_iter()
            .max_by_key(|name| numbers_in(name));
        assert_eq!(newest, Some("linux-image-6.12.107+deb12-cloud-amd64"));
    }
}

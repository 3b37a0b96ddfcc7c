//! Kernel settings of the calling thread's network namespace, by way of `/proc/sys/net`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Why a setting could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot set {} to {value}: {source}; is /proc/sys mounted read-only? (in a container, mount the node's /proc/sys/net at {OF_NODE})", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The value that was wanted.
        value: String,
        /// What the system said.
        source: io::Error,
    },
}

/// The parts of a setting's name below `net`. Parts and not dots, for interface names may hold dots.
pub type Key<'a> = &'a [&'a str];

/// Where settings are; the namespace is the calling thread's whatever the way to them.
const DIRECTORY: &str = "/proc/sys/net";
/// The node's, in a container: its own is read-only, and nothing can be mounted there.
const OF_NODE: &str = "/host/proc/sys/net";

fn path_of(key: Key<'_>) -> PathBuf {
    let of_node = Path::new(OF_NODE);
    let mut path = if of_node.is_dir() { of_node } else { Path::new(DIRECTORY) }.to_path_buf();
    path.extend(key);
    path
}

/// The value of a setting; `None` where the kernel has no such setting (IPv6 may be switched off).
pub fn get(key: Key<'_>) -> Result<Option<String>, SysctlError> {
    let path = path_of(key);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SysctlError::Read { path, source }),
    }
}

/// Sets a setting that the kernel has. Answers with the value before when it was another.
pub fn set(key: Key<'_>, value: &str) -> Result<Option<String>, SysctlError> {
    let Some(before) = get(key)?.filter(|now| now != value) else {
        return Ok(None);
    };
    let path = path_of(key);
    write(&path, value).map_err(|source| SysctlError::Write { path, value: value.to_owned(), source })?;
    Ok(Some(before))
}

/// Writes to a file of the kernel's. Not `fs::write`: it exists or it does not, and creating one is no way to set a value.
pub(crate) fn write(path: &Path, value: &str) -> io::Result<()> {
    io::Write::write_all(&mut fs::OpenOptions::new().write(true).open(path)?, value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_that_the_kernel_lacks_is_none() {
        assert_eq!(get(&["ipv4", "conf", "ewc-none", "rp_filter"]).unwrap(), None);
        assert_eq!(set(&["ipv4", "conf", "ewc-none", "rp_filter"], "2").unwrap(), None);
    }

    #[test]
    fn a_setting_that_is_right_is_left_alone() {
        let now = get(&["ipv4", "ip_forward"]).unwrap().unwrap();
        assert_eq!(set(&["ipv4", "ip_forward"], &now).unwrap(), None);
    }
}

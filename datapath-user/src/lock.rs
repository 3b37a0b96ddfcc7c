//! Keeps two agents apart: one by `run_dir`, one by `pin_dir`, whichever they share.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
};

/// Why the lock was not had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another agent has it.
    #[error(
        "another agent{} is running: it holds {}. Stop it first; pods keep their network meanwhile",
        pid.as_ref().map_or(String::new(), |pid| format!(" (pid {pid})")), path.display()
    )]
    Held {
        /// What is locked.
        path: PathBuf,
        /// Its process, if it says.
        pid: Option<u32>,
    },
    /// The file cannot be made or locked.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A lock, held until dropped or until the process ends, in whatever way.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// Locks `<run_dir>/lock`, making the directory if need be, and writes the process id there.
///
/// # Errors
///
/// When another process holds it, or the directory cannot be used.
pub fn lock_run_dir(run_dir: &Path) -> Result<Lock, LockError> {
    fs::create_dir_all(run_dir).map_err(|source| LockError::Io {
        action: "make the directory",
        path: run_dir.to_owned(),
        source,
    })?;
    let path = run_dir.join("lock");
    let io = |action| {
        let path = path.clone();
        move |source| LockError::Io { action, path, source }
    };
    // The file is not emptied before it is ours: it names the process that holds it.
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(io("open"))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            let _ = file.read_to_string(&mut text);
            return Err(LockError::Held { pid: text.trim().parse().ok(), path });
        }
        Err(TryLockError::Error(source)) => return Err(io("lock")(source)),
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(io("write"))?;
    Ok(Lock { _file: file })
}

/// Locks a directory of pins, against an agent with another `run_dir`.
///
/// # Errors
///
/// When another process holds it, or it cannot be opened.
pub fn lock_pins(dir: &Path) -> Result<Lock, LockError> {
    let io = |action| move |source| LockError::Io { action, path: dir.to_owned(), source };
    let file = File::open(dir).map_err(io("open"))?;
    match file.try_lock() {
        Ok(()) => Ok(Lock { _file: file }),
        Err(TryLockError::WouldBlock) => Err(LockError::Held { path: dir.to_owned(), pid: None }),
        Err(TryLockError::Error(source)) => Err(io("lock")(source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_is_first() {
        let dir = std::env::temp_dir().join(format!("eniway-lock-{}", std::process::id()));
        let first = lock_run_dir(&dir).unwrap();
        match lock_run_dir(&dir) {
            Err(LockError::Held { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
            other => panic!("{other:?}"),
        }
        drop(first);
        lock_run_dir(&dir).unwrap();
        let pins = lock_pins(&dir).unwrap();
        assert!(matches!(lock_pins(&dir), Err(LockError::Held { .. })));
        drop(pins);
        fs::remove_dir_all(&dir).unwrap();
    }
}

//! Files of the run directory: JSON, replaced as a whole, so that a reader sees the old one or the new one.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

/// Why a file of the run directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunFileError {
    /// It cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It says something else.
    #[error("{} was not written by this version of eniway: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where.
        source: serde_json::Error,
    },
}

/// Reads a file; none where there is no file.
///
/// # Errors
///
/// When there is one that cannot be read or understood.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, RunFileError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(RunFileError::Io { action: "read", path: path.to_owned(), source }),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|source| RunFileError::Parse { path: path.to_owned(), source })
}

/// Replaces a file.
///
/// # Errors
///
/// When the directory cannot be written; then the file is as it was.
pub(crate) fn write<T: Serialize>(path: &Path, content: &T) -> Result<(), RunFileError> {
    let text = serde_json::to_vec_pretty(content).map_err(|error| failed(path, error.into()))?;
    write_text(path, &text)
}

/// As [`write()`], of what is JSON already. There is a draft beside the file for a moment: `<path>.new`.
pub(crate) fn write_text(path: &Path, text: &[u8]) -> Result<(), RunFileError> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(".new");
    fs::write(&draft, text).and_then(|()| fs::rename(&draft, path)).map_err(|error| failed(path, error))
}

fn failed(path: &Path, source: io::Error) -> RunFileError {
    RunFileError::Io { action: "write", path: path.to_owned(), source }
}

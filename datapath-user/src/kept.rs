//! Small records that outlive the agent and not the node: a file each in a directory of the run directory, which is empty
//! after a restart of the node.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

use crate::run_file::{self, RunFileError};

/// Records by key. A key is part of a file's name: letters, digits, `_`, `.` and `-`.
#[derive(Debug)]
pub struct Kept<T> {
    dir: PathBuf,
    all: BTreeMap<String, T>,
}

impl<T: Serialize + DeserializeOwned> Kept<T> {
    /// Reads what an earlier agent has kept under this name. What cannot be read is told and left out.
    ///
    /// # Errors
    ///
    /// When the directory cannot be made or read.
    pub fn load(run_dir: &Path, name: &str) -> Result<Self, RunFileError> {
        let dir = run_dir.join(name);
        let failed = |action| {
            let path = dir.clone();
            move |source| RunFileError::Io { action, path, source }
        };
        fs::create_dir_all(&dir).map_err(failed("make the directory"))?;
        let mut all = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(failed("read"))? {
            let path = entry.map_err(failed("read"))?.path();
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let Some(key) = file.strip_suffix(SUFFIX) else {
                // A draft that was cut short.
                let _ = fs::remove_file(&path);
                continue;
            };
            match fs::read(&path).map(|text| serde_json::from_slice::<T>(&text)) {
                Ok(Ok(record)) => _ = all.insert(key.to_owned(), record),
                Ok(Err(error)) => log::error!("{}: {error}; left out", path.display()),
                Err(error) => log::error!("cannot read {}: {error}", path.display()),
            }
        }
        Ok(Self { dir, all })
    }

    /// Keeps a record.
    ///
    /// # Errors
    ///
    /// When it cannot be written; then it is not kept.
    pub fn put(&mut self, key: &str, record: T) -> Result<(), RunFileError> {
        run_file::write(&self.path(key), &record)?;
        self.all.insert(key.to_owned(), record);
        Ok(())
    }

    /// Forgets a record.
    pub fn remove(&mut self, key: &str) -> Option<T> {
        let removed = self.all.remove(key)?;
        let path = self.path(key);
        if let Err(error) = fs::remove_file(&path) {
            log::error!("cannot remove {}: {error}", path.display());
        }
        Some(removed)
    }

    /// The record of a key.
    pub fn get(&self, key: &str) -> Option<&T> {
        self.all.get(key)
    }

    /// All keys.
    pub fn keys(&self) -> impl Iterator<Item = &String> {
        self.all.keys()
    }

    /// All records.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.all.values()
    }

    fn path(&self, key: &str) -> PathBuf {
        self.dir.join(format!("{key}{SUFFIX}"))
    }
}

const SUFFIX: &str = ".json";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_outlive_the_agent() {
        let dir = std::env::temp_dir().join(format!("eniway-kept-{}", std::process::id()));
        let mut kept: Kept<String> = Kept::load(&dir, "things").unwrap();
        kept.put("a.1", "one".to_owned()).unwrap();
        fs::write(dir.join("things/x.json.new"), "half").unwrap();
        fs::write(dir.join("things/bad.json"), "{").unwrap();
        let mut again: Kept<String> = Kept::load(&dir, "things").unwrap();
        assert_eq!(again.keys().collect::<Vec<_>>(), ["a.1"]);
        assert_eq!(again.remove("a.1").as_deref(), Some("one"));
        assert_eq!(again.remove("a.1"), None);
        assert!(!dir.join("things/x.json.new").exists() && !dir.join("things/a.1.json").exists());
        fs::remove_dir_all(dir).unwrap();
    }
}

//! Short grace periods while programs come and go.
//!
//! The kernel waits for an RCU grace period each time a TCX program is attached or its interface goes, and holds the
//! lock of all network settings meanwhile (`tcx_entry_sync` in `include/net/tcx.h`, 6.6 to 6.18). An ordinary grace
//! period takes several ticks, an expedited one a fraction of a millisecond, which is why the kernel's own
//! `synchronize_net` asks for it under that lock. `docs/adr/0008-wiring-cost.md` has the numbers.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::sysctl;

pub(crate) const KNOB: &str = "/sys/kernel/rcu_expedited";
/// In the run directory while the knob is turned: a process that was killed meanwhile leaves it there.
const MARK: &str = "rcu-expedited";

/// The way to short grace periods, by `/sys/kernel/rcu_expedited`.
#[derive(Debug)]
pub struct Grace {
    knob: PathBuf,
    mark: PathBuf,
}

impl Grace {
    /// Turns back what a process that was killed has left turned.
    pub fn new(run_dir: &Path) -> Self {
        let grace = Self { knob: KNOB.into(), mark: run_dir.join(MARK) };
        if grace.mark.exists() {
            grace.end();
        }
        grace
    }

    /// Whether a process has made grace periods short and not put them back yet: it is at it, or was killed.
    pub fn is_left_turned(run_dir: &Path) -> bool {
        run_dir.join(MARK).exists()
    }

    /// Makes grace periods short while the answer lives. They stay as they are where somebody made them short
    /// already, or where the file cannot be written: then attaching takes longer, and that is all.
    #[must_use]
    pub fn expedite(&self) -> Expedited<'_> {
        let begun = match fs::read_to_string(&self.knob) {
            Ok(value) if value.trim() == "0" => self.begin(),
            _ => Ok(false),
        };
        let turned = begun.unwrap_or_else(|error| {
            log::debug!("{}: {error}; attaching takes longer", self.knob.display());
            false
        });
        Expedited(turned.then_some(self))
    }

    fn begin(&self) -> io::Result<bool> {
        fs::write(&self.mark, [])?;
        sysctl::write(&self.knob, "1").map(|()| true).inspect_err(|_| drop(fs::remove_file(&self.mark)))
    }

    fn end(&self) {
        match sysctl::write(&self.knob, "0") {
            Ok(()) => drop(fs::remove_file(&self.mark)),
            Err(error) => log::error!("cannot set {} to 0 again: {error}", self.knob.display()),
        }
    }
}

/// Grace periods are short while this lives.
#[derive(Debug)]
pub struct Expedited<'a>(Option<&'a Grace>);

impl Drop for Expedited<'_> {
    fn drop(&mut self) {
        if let Some(grace) = self.0 {
            grace.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stand(name: &str, value: &str) -> (PathBuf, Grace) {
        let dir = std::env::temp_dir().join(format!("eniway-grace-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let grace = Grace { knob: dir.join("knob"), mark: dir.join(MARK) };
        fs::write(&grace.knob, value).unwrap();
        (dir, grace)
    }

    fn value(grace: &Grace) -> String {
        fs::read_to_string(&grace.knob).unwrap().trim().to_owned()
    }

    #[test]
    fn what_was_turned_is_turned_back() {
        let (dir, grace) = stand("back", "0\n");
        {
            let _short = grace.expedite();
            assert_eq!(value(&grace).as_bytes()[0], b'1');
            let _inner = grace.expedite();
            assert!(grace.mark.exists());
        }
        assert_eq!(value(&grace).as_bytes()[0], b'0');
        assert!(!grace.mark.exists());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn what_others_turned_stays() {
        let (dir, grace) = stand("others", "1\n");
        drop(grace.expedite());
        assert_eq!(value(&grace), "1");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_knob_that_is_missing_is_no_error() {
        let (dir, grace) = stand("missing", "0");
        fs::remove_file(&grace.knob).unwrap();
        drop(grace.expedite());
        assert!(!grace.mark.exists() && !grace.knob.exists());
        fs::remove_dir_all(dir).unwrap();
    }
}

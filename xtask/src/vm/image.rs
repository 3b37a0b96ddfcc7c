//! An initramfs: a cpio archive in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst in the
//! kernel's sources), with programs and the libraries that they need.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{BufWriter, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::quiet;
use crate::cmd;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// An archive that is being written.
pub(super) struct Image {
    out: BufWriter<File>,
    /// Whose debug information is taken off is written here first.
    scratch: PathBuf,
    there: BTreeSet<PathBuf>,
}

impl Image {
    /// Begins an archive. Directories are merged as Debian does it: `/lib` is `/usr/lib`.
    pub(super) fn create(path: &Path, scratch: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        let mut image = Self {
            out: BufWriter::with_capacity(1 << 20, file),
            scratch: scratch.to_owned(),
            there: BTreeSet::from(["/".into()]),
        };
        for dir in ["bin", "sbin", "lib", "lib64"] {
            image.dir(format!("/usr/{dir}"))?;
            image.link(format!("/{dir}"), &format!("usr/{dir}"))?;
        }
        Ok(image)
    }

    /// A directory and those above it.
    pub(super) fn dir(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        if self.there.contains(path) {
            return Ok(());
        }
        if let Some(above) = path.parent() {
            self.dir(above)?;
        }
        self.there.insert(path.to_owned());
        self.entry(path, DIRECTORY | 0o755, &[])
    }

    /// A file and the directories above it. The first one of a path stays.
    pub(super) fn file(&mut self, path: impl AsRef<Path>, mode: u32, content: &[u8]) -> Result<()> {
        self.leaf(path.as_ref(), REGULAR | mode, content)
    }

    /// A symbolic link.
    pub(super) fn link(&mut self, path: impl AsRef<Path>, target: &str) -> Result<()> {
        self.leaf(path.as_ref(), LINK | 0o777, target.as_bytes())
    }

    fn leaf(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<()> {
        if let Some(above) = path.parent() {
            self.dir(above)?;
        }
        if self.there.insert(path.to_owned()) {
            self.entry(path, mode, content)?;
        }
        Ok(())
    }

    /// A program of the host's, at its place, with its libraries.
    pub(super) fn program(&mut self, path: &Path) -> Result<()> {
        self.copy(path, path)?;
        self.libraries(path, Path::new("/"))
    }

    /// A file of a package that is unpacked in `root`, at the place that it would have when installed.
    pub(super) fn packaged(&mut self, root: &Path, path: &str) -> Result<()> {
        let host = root.join(path.trim_start_matches('/'));
        self.copy(&host, Path::new(path))?;
        if fs::metadata(&host)?.permissions().mode() & 0o111 != 0 {
            self.libraries(&host, root)?;
        }
        Ok(())
    }

    /// A program of our own build, without its debug information, with its libraries.
    pub(super) fn own_program(&mut self, host: &Path, guest: &str) -> Result<()> {
        let stripped = self.scratch.join("stripped");
        quiet(Command::new("strip").arg("--strip-debug").arg("-o").arg(&stripped).arg(host))?;
        let content = fs::read(&stripped).with_context(|| stripped.display().to_string())?;
        self.file(guest, 0o755, &content)?;
        self.libraries(host, Path::new("/"))
    }

    /// A directory of the host's, whole.
    pub(super) fn tree(&mut self, host: &Path, guest: &str) -> Result<()> {
        for entry in fs::read_dir(host).with_context(|| host.display().to_string())? {
            let entry = entry?;
            let (from, to) = (entry.path(), format!("{guest}/{}", entry.file_name().to_string_lossy()));
            let kind = entry.file_type()?;
            if kind.is_dir() {
                self.tree(&from, &to)?;
            } else if kind.is_symlink() {
                self.link(&to, &fs::read_link(&from)?.to_string_lossy())?;
            } else {
                self.copy(&from, Path::new(&to))?;
            }
        }
        Ok(())
    }

    /// The libraries that the loader would take, those in `root` first, and the loader itself.
    fn libraries(&mut self, program: &Path, root: &Path) -> Result<()> {
        let mut ldd = Command::new("ldd");
        let text =
            cmd::output(ldd.arg(program).env("LD_LIBRARY_PATH", root.join("usr/lib/x86_64-linux-gnu")))?;
        if let Some(missing) = text.lines().find(|line| line.contains("not found")) {
            bail!("{} needs{missing}", program.display());
        }
        for line in text.lines() {
            // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)` or `/lib64/ld-linux-x86-64.so.2 (0x…)`
            let found = line.rsplit("=> ").next().and_then(|rest| rest.trim().split(' ').next());
            if let Some(path) = found.filter(|path| path.starts_with('/')) {
                let path = Path::new(path);
                let inside = path
                    .strip_prefix(root)
                    .map_or_else(|_| path.to_owned(), |rest| Path::new("/").join(rest));
                self.copy(path, &inside)?;
            }
        }
        Ok(())
    }

    fn copy(&mut self, host: &Path, guest: &Path) -> Result<()> {
        let guest = merged(guest);
        if self.there.contains(&guest) {
            return Ok(());
        }
        let context = || host.display().to_string();
        let mode = fs::metadata(host).with_context(context)?.permissions().mode() & 0o777;
        let content = fs::read(host).with_context(context)?;
        self.file(&guest, mode, &content)
    }

    fn entry(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<()> {
        let name = path.strip_prefix("/").unwrap_or(path).to_string_lossy();
        // Links between files are by inode number and count; each entry is a file of its own.
        let inode = self.there.len();
        write!(self.out, "070701{inode:08x}{mode:08x}{:08x}{:08x}{:08x}", 0, 0, 1)?;
        write!(self.out, "{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}", 0, content.len(), 0, 0, 0, 0)?;
        write!(self.out, "{:08x}{:08x}{name}\0", name.len() + 1, 0)?;
        self.pad(110 + name.len() + 1)?;
        self.out.write_all(content)?;
        self.pad(content.len())
    }

    fn pad(&mut self, written: usize) -> Result<()> {
        Ok(self.out.write_all(&[0; 3][..written.next_multiple_of(4) - written])?)
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> Result<()> {
        self.entry(Path::new("TRAILER!!!"), 0, &[])?;
        Ok(self.out.flush()?)
    }
}

/// `/lib/x` as `/usr/lib/x`.
fn merged(path: &Path) -> PathBuf {
    let at_root =
        ["bin", "sbin", "lib", "lib64"].iter().any(|dir| path.starts_with(Path::new("/").join(dir)));
    match path.strip_prefix("/") {
        Ok(rest) if at_root => Path::new("/usr").join(rest),
        _ => path.to_owned(),
    }
}

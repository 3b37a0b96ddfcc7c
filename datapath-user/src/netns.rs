//! Network namespaces of pods.
//!
//! A thread that entered another namespace must never go back to a pool: a task that ran on it next would work in
//! the wrong one. So whatever has to happen inside a pod happens on a thread of its own that ends with the work.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        linux::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::sched::{CloneFlags, setns};
use tokio::sync::oneshot;

use crate::privilege;

/// Why a namespace could not be used.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// Nothing stands at the path.
    #[error(
        "network namespace {} is gone; the pod was stopped, or the source names a wrong path in `netns`",
        path.display()
    )]
    Gone {
        /// The path that was given.
        path: PathBuf,
    },
    /// The path cannot be opened.
    #[error("cannot open network namespace {}: {source}{}", path.display(), open_hint(path, source))]
    Open {
        /// The path that was given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The path does not lead to a network namespace, or entering it is not allowed.
    #[error("cannot enter {} as a network namespace: {source}{}", path.display(), enter_hint(source))]
    Enter {
        /// The path that was given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The thread for the work in the namespace failed.
    #[error("work in network namespace {} ended early: {source}", path.display())]
    Thread {
        /// The path that was given.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
}

fn open_hint(path: &Path, error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EACCES) if path.starts_with("/proc") => {
            " (by a process's directory this needs CAP_SYS_PTRACE; by a path below /run/netns it does not)"
        }
        _ => "",
    }
}

fn enter_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EINVAL) => " (the file is not a namespace; one is left behind when its mount is gone)",
        Some(libc::EPERM) => " (CAP_SYS_ADMIN is needed)",
        _ => "",
    }
}

/// An open network namespace, which lives at least as long as this.
#[derive(Debug, Clone)]
pub struct Namespace {
    path: PathBuf,
    file: Arc<File>,
}

impl Namespace {
    /// Opens the namespace at `path`, for instance `/run/netns/x` or `/proc/PID/ns/net`.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let opened = if path.starts_with("/proc") {
            privilege::opening(|| File::open(path))
        } else {
            File::open(path)
        };
        match opened {
            Ok(file) => Ok(Self { path: path.to_path_buf(), file: Arc::new(file) }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(NetnsError::Gone { path: path.to_path_buf() })
            }
            Err(source) => Err(NetnsError::Open { path: path.to_path_buf(), source }),
        }
    }

    /// The namespace of the calling thread.
    pub fn current() -> Result<Self, NetnsError> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether both are the same namespace, whatever their paths.
    pub fn same_as(&self, other: &Self) -> bool {
        match (self.file.metadata(), other.file.metadata()) {
            (Ok(a), Ok(b)) => (a.st_dev(), a.st_ino()) == (b.st_dev(), b.st_ino()),
            _ => false,
        }
    }

    /// Runs `work` inside the namespace, on a thread of its own with a runtime of its own.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl AsyncFnOnce() -> T + Send + 'static,
    ) -> Result<T, NetnsError> {
        let (sender, receiver) = oneshot::channel();
        let namespace = self.clone();
        let body = move || {
            // An error of send means that the caller no longer waits.
            let _ = sender.send(namespace.run_here(work));
        };
        std::thread::Builder::new()
            .name("netns".to_owned())
            .spawn(body)
            .map_err(|source| NetnsError::Thread { path: self.path.clone(), source })?;
        receiver.await.unwrap_or_else(|_| {
            Err(NetnsError::Thread { path: self.path.clone(), source: io::Error::other("it panicked") })
        })
    }

    /// Runs `work` inside the namespace, on a thread of its own, and waits for it.
    ///
    /// # Errors
    ///
    /// When the namespace cannot be entered.
    pub fn enter_for<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter()?;
                Ok(work())
            });
            thread.join().unwrap_or_else(|_| {
                Err(NetnsError::Thread { path: self.path.clone(), source: io::Error::other("it panicked") })
            })
        })
    }

    /// Enters with the calling thread.
    fn enter(&self) -> Result<(), NetnsError> {
        privilege::entering(|| setns(&self.file, CloneFlags::CLONE_NEWNET))
            .map_err(|errno| NetnsError::Enter { path: self.path.clone(), source: errno.into() })
    }

    fn run_here<T>(&self, work: impl AsyncFnOnce() -> T) -> Result<T, NetnsError> {
        self.enter()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| NetnsError::Thread { path: self.path.clone(), source })?;
        Ok(runtime.block_on(work()))
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_namespace_is_named() {
        let error = Namespace::open(Path::new("/run/netns/ewc-nowhere")).unwrap_err();
        assert!(matches!(error, NetnsError::Gone { .. }));
        assert!(error.to_string().contains("/run/netns/ewc-nowhere"));
    }

    #[test]
    fn a_namespace_is_itself_by_any_path() {
        let a = Namespace::current().unwrap();
        let b = Namespace::open(Path::new("/proc/self/ns/net")).unwrap();
        assert!(a.same_as(&b));
    }

    #[tokio::test]
    async fn a_plain_file_is_refused() {
        let path = std::env::temp_dir().join(format!("ewc-file-{}", std::process::id()));
        std::fs::write(&path, b"").unwrap();
        let result = Namespace::open(&path).unwrap().run(async || ()).await;
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(result, Err(NetnsError::Enter { .. })), "{result:?}");
    }
}

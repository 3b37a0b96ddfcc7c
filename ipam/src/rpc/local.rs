//! Sockets for those on this machine who may: root and the server's own user.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    pin::Pin,
};

use tokio::net::{UnixListener, UnixStream};
use tokio_stream::{Stream, wrappers::UnixListenerStream};
use tonic::{Request, Status, transport::server::UdsConnectInfo};

use super::ServeError;

/// A unix socket that is listened on. Its file is removed in the end, unless another server has put its own there.
#[derive(Debug)]
pub struct LocalSocket {
    listener: Option<UnixListener>,
    path: PathBuf,
    inode: u64,
}

impl Drop for LocalSocket {
    fn drop(&mut self) {
        if fs::metadata(&self.path).is_ok_and(|meta| meta.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl LocalSocket {
    /// Listens. What a server that was killed has left there is replaced. To be called on a tokio runtime.
    ///
    /// # Errors
    ///
    /// When another server listens there, or the directory cannot be made or written.
    pub fn bind(path: &Path) -> Result<Self, ServeError> {
        let failed = |source| ServeError::Bind { address: format!("unix:{}", path.display()), source };
        match fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => return Err(ServeError::NoSocket(path.to_owned())),
            Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
                return Err(ServeError::Taken(path.to_owned()));
            }
            _ => {}
        }
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(failed)?;
        }
        // Nobody finds the socket before it has its mode.
        let mut draft = path.as_os_str().to_owned();
        draft.push(format!(".{}", std::process::id()));
        let draft = PathBuf::from(draft);
        let _ = fs::remove_file(&draft);
        let bound = UnixListener::bind(&draft).and_then(|listener| {
            fs::set_permissions(&draft, fs::Permissions::from_mode(0o600))?;
            let inode = fs::metadata(&draft)?.ino();
            fs::rename(&draft, path)?;
            Ok((listener, inode))
        });
        let (listener, inode) = bound.map_err(|source| {
            let _ = fs::remove_file(&draft);
            failed(source)
        })?;
        Ok(Self { listener: Some(listener), path: path.to_owned(), inode })
    }

    /// The connections, for a server. There are none the second time.
    pub fn incoming(&mut self) -> Pin<Box<dyn Stream<Item = io::Result<UnixStream>> + Send>> {
        match self.listener.take() {
            Some(listener) => Box::pin(UnixListenerStream::new(listener)),
            None => Box::pin(tokio_stream::empty()),
        }
    }
}

/// An interceptor: the socket's mode keeps others out already; a socket that was passed on, or a mode that was changed,
/// does not let them in.
///
/// # Errors
///
/// When the peer is neither root nor the server's own user, or unknown.
pub fn local_only(request: Request<()>) -> Result<Request<()>, Status> {
    let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
    match peer {
        Some(peer) if peer.uid() == 0 || Some(peer.uid()) == own_uid() => Ok(request),
        Some(peer) => Err(Status::permission_denied(format!(
            "user {} may not use this socket; only root and the server's own user may",
            peer.uid()
        ))),
        None => Err(Status::permission_denied("the kernel does not say who is asking")),
    }
}

fn own_uid() -> Option<u32> {
    fs::metadata("/proc/self").ok().map(|meta| meta.uid())
}

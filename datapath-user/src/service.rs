//! What the agent tells a service manager: sd_notify(3), by datagrams to the socket in `NOTIFY_SOCKET`. Without one
//! nothing is told.

use std::{
    env,
    ffi::{OsStr, OsString},
    fmt::Write as _,
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::{Duration, Instant},
};

/// Why a service manager cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The socket.
    #[error("cannot reach the service manager at {}: {source}; unset NOTIFY_SOCKET to do without", address.display())]
    Socket {
        /// As the environment names it.
        address: OsString,
        /// What the system said.
        source: io::Error,
    },
}

/// The way to the service manager.
#[derive(Debug)]
pub struct Service {
    socket: Option<UnixDatagram>,
    /// The watchdog bites after this time without a sign.
    watchdog: Option<Duration>,
    due: Option<Instant>,
    ready: bool,
    said: String,
}

impl Service {
    /// As the environment says.
    ///
    /// # Errors
    ///
    /// When it names a socket that cannot be reached.
    pub fn from_environment() -> Result<Self, ServiceError> {
        let socket = env::var_os("NOTIFY_SOCKET").map(|address| connect(&address)).transpose()?;
        let for_us = env::var("WATCHDOG_PID").map_or(true, |pid| pid == std::process::id().to_string());
        let watchdog = env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok());
        let watchdog = watchdog.filter(|micros| *micros > 0 && for_us && socket.is_some());
        Ok(Self::new(socket, watchdog.map(Duration::from_micros)))
    }

    fn new(socket: Option<UnixDatagram>, watchdog: Option<Duration>) -> Self {
        Self { socket, watchdog, due: watchdog.map(|_| Instant::now()), ready: false, said: String::new() }
    }

    /// When the next sign of life has to be given.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Gives a sign of life. Until the agent is ready it asks for as much time again: an allocator that is away is no
    /// reason to start anew.
    pub fn alive(&mut self) {
        let Some(watchdog) = self.watchdog else { return };
        let mut text = "WATCHDOG=1".to_owned();
        if !self.ready {
            // Writing to a string cannot fail.
            let _ = write!(text, "\nEXTEND_TIMEOUT_USEC={}", watchdog.as_micros());
        }
        self.send(&text);
        self.due = Some(Instant::now() + watchdog / 2);
    }

    /// Says how things are, if that is news. The first time with `ready` says that, too.
    pub fn tell(&mut self, ready: bool, status: String) {
        if self.socket.is_none() || (ready == self.ready && status == self.said) {
            return;
        }
        let state = if ready && !self.ready { "READY=1\n" } else { "" };
        self.send(&format!("{state}STATUS={}", status.replace('\n', "; ")));
        self.ready |= ready;
        self.said = status;
    }

    /// Says that the agent ends by itself.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    fn send(&self, text: &str) {
        // A manager that does not listen must not stop us: the socket does not block.
        if let Some(socket) = &self.socket
            && let Err(error) = socket.send(text.as_bytes())
        {
            log::warn!("cannot tell the service manager: {error}");
        }
    }
}

fn connect(address: &OsStr) -> Result<UnixDatagram, ServiceError> {
    let socket = || {
        let to = match address.as_bytes().split_first() {
            Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(address)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&to)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    socket().map_err(|source| ServiceError::Socket { address: address.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(watchdog: Option<Duration>) -> (UnixDatagram, Service) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (theirs, Service::new(Some(ours), watchdog))
    }

    fn heard(socket: &UnixDatagram) -> Option<String> {
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    #[test]
    fn ready_is_said_once_and_status_when_it_is_news() {
        let (manager, mut service) = pair(None);
        service.tell(false, "waits for its source".to_owned());
        service.tell(false, "waits for its source".to_owned());
        service.tell(true, "2 pods\nsource ok".to_owned());
        service.tell(true, "3 pods".to_owned());
        service.alive();
        service.stopping();
        let all: Vec<_> = std::iter::from_fn(|| heard(&manager)).collect();
        let expected = [
            "STATUS=waits for its source",
            "READY=1\nSTATUS=2 pods; source ok",
            "STATUS=3 pods",
            "STOPPING=1",
        ];
        assert_eq!(all, expected);
        assert_eq!(service.due(), None);
    }

    #[test]
    fn signs_of_life_ask_for_time_until_it_is_ready() {
        let (manager, mut service) = pair(Some(Duration::from_secs(60)));
        assert!(service.due().is_some_and(|due| due <= Instant::now()));
        service.alive();
        assert_eq!(heard(&manager).as_deref(), Some("WATCHDOG=1\nEXTEND_TIMEOUT_USEC=60000000"));
        let left = service.due().unwrap() - Instant::now();
        assert!(left <= Duration::from_secs(30) && left > Duration::from_secs(25), "{left:?}");
        service.tell(true, String::new());
        heard(&manager);
        service.alive();
        assert_eq!(heard(&manager).as_deref(), Some("WATCHDOG=1"));
    }

    #[test]
    fn a_manager_that_does_not_listen_blocks_nobody() {
        let (manager, mut service) = pair(Some(Duration::from_secs(60)));
        (0..10_000).for_each(|_| service.alive());
        assert!(heard(&manager).is_some());
    }

    #[test]
    fn a_socket_that_is_not_there_is_named() {
        let error = connect("/nonexistent/notify".as_ref()).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/notify") && error.contains("NOTIFY_SOCKET"), "{error}");
    }
}

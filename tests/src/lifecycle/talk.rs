//! TCP connections that ask and are answered all the time, and whose every byte is compared.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddrV4, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use super::{load::Ends, socket};
use crate::lab::{Error, Result, net};

/// Connections of each pair of ends.
const CONNECTIONS: u64 = 2;
/// A request, and its answer, has at most so many bytes: some take several segments.
const LONGEST: usize = 5_000;
/// Between an answer and the next request.
const PAUSE: Duration = Duration::from_millis(5);
/// A connection that is not answered for so long is dead.
const DEAD: Duration = Duration::from_secs(10);

/// What has become of one connection.
#[derive(Clone, Debug)]
pub(super) struct Ended {
    /// Both ends and the path, in words.
    pub(super) name: String,
    /// Requests that were answered, byte for byte.
    pub(super) exchanges: u64,
    /// Segments that the client's side has sent again.
    pub(super) retransmitted: u64,
    /// Why it has ended before its time.
    pub(super) error: Option<String>,
}

struct Talk {
    name: String,
    exchanges: Arc<AtomicU64>,
    thread: JoinHandle<(u64, io::Result<()>)>,
}

/// Connections that are established once and stand until the end.
pub(super) struct Talks {
    talks: Vec<Talk>,
    stop: Arc<AtomicBool>,
}

impl Talks {
    pub(super) fn open(ends: &[Ends<'_>]) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut talks = Vec::new();
        for ends in ends {
            let at = SocketAddrV4::new(ends.server.ip, ends.port);
            let listener = ends.server.netns.run(|| TcpListener::bind(at))?;
            let listener =
                listener.map_err(Error::io(format!("listening in pod {} at {at}", ends.server.name)))?;
            for _ in 0..CONNECTIONS {
                let what =
                    format!("{}: {} to {} by {}", ends.path, ends.client.name, ends.server.name, ends.to);
                let stream = net::tcp_connect(&ends.client.netns, 0, ends.to, DEAD)?;
                let (answers, _) = listener.accept().map_err(Error::io(what.clone()))?;
                thread::spawn(move || echo(answers));
                let exchanges = Arc::new(AtomicU64::new(0));
                let (count, stop) = (Arc::clone(&exchanges), Arc::clone(&stop));
                let thread = thread::spawn(move || {
                    let result = talk(&stream, &count, &stop);
                    (socket::retransmitted(&stream).unwrap_or(0), result)
                });
                talks.push(Talk { name: what, exchanges, thread });
            }
        }
        Ok(Self { talks, stop })
    }

    pub(super) fn count(&self) -> usize {
        self.talks.len()
    }

    /// Ends them all, each after an exchange that begins now.
    pub(super) fn finish(self) -> Vec<Ended> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = |talk: Talk| {
            let (retransmitted, result) =
                talk.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let exchanges = talk.exchanges.load(Ordering::Relaxed);
            Ended { name: talk.name, exchanges, retransmitted, error: result.err().map(|e| e.to_string()) }
        };
        self.talks.into_iter().map(ended).collect()
    }
}

/// Random bytes there, and the same back, until told to stop; then once more.
fn talk(stream: &TcpStream, exchanges: &AtomicU64, stop: &AtomicBool) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(DEAD))?;
    stream.set_write_timeout(Some(DEAD))?;
    let mut random = fastrand::Rng::new();
    let (mut request, mut answer) = ([0; LONGEST], [0; LONGEST]);
    let mut stream = stream;
    loop {
        let last = stop.load(Ordering::Relaxed);
        let length = random.usize(1..=LONGEST);
        random.fill(&mut request[..length]);
        stream.write_all(&request[..length])?;
        stream.read_exact(&mut answer[..length])?;
        if answer[..length] != request[..length] {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the answer has other bytes than the request",
            ));
        }
        exchanges.fetch_add(1, Ordering::Relaxed);
        if last {
            return Ok(());
        }
        thread::sleep(PAUSE);
    }
}

/// Gives back what comes, until the client has gone.
fn echo(mut stream: TcpStream) {
    let mut buffer = [0; LONGEST];
    let _ = stream.set_nodelay(true);
    while let Ok(length) = stream.read(&mut buffer)
        && length > 0
        && stream.write_all(&buffer[..length]).is_ok()
    {}
}

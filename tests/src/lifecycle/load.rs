//! Numbered datagrams at a steady pace on all paths at once, each answered by a numbered datagram.
//!
//! One thread sends all requests and takes all answers, another answers: two processors carry 300,000 packets a second only
//! if nobody is woken for a single one. Both look at their sockets by the millisecond and move what is there in batches.

use std::{
    fmt, io,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{
    socket::{self, BATCH, Datagram},
    tally::{Seen, Tally},
};
use crate::lab::{Error, Pod, Result};

/// Flows of each stream; each sends in its turn.
const FLOWS: usize = 4;
/// Between two bursts of a stream, and between two looks at the sockets that get them.
const TICK: Duration = Duration::from_millis(1);
const LOOK: Duration = Duration::from_micros(300);
/// After this silence nothing is under way any more.
const SILENCE: Duration = Duration::from_millis(100);
/// A sender that did not run for a while catches up, but not at once, and not with more than it missed in this time.
const CATCH_UP: f64 = 4.0;
const MEMORY: Duration = Duration::from_millis(200);

/// The way that packets take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Path {
    /// To a pod on another node.
    Wire,
    /// To a pod on the same node, without leaving it.
    FastPath,
    /// To a VIP, and from the ELB to a pod: one half to a pod on the same node, one to a pod on another.
    Elb,
}

impl Path {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Wire, Self::FastPath, Self::Elb];

    /// As reports call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Wire => "wire",
            Self::FastPath => "fast_path",
            Self::Elb => "elb",
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A client and a server, and the address by which the one asks the other.
pub(super) struct Ends<'a> {
    pub(super) path: Path,
    /// This part of the path's packets.
    pub(super) share: f64,
    pub(super) client: &'a Pod,
    pub(super) server: &'a Pod,
    pub(super) port: u16,
    pub(super) to: SocketAddrV4,
}

struct Stream {
    path: Path,
    share: f64,
    clients: Vec<UdpSocket>,
    server: UdpSocket,
    /// Datagrams that its sockets had dropped before this round.
    overflows: u64,
}

/// What has become of one round's packets on one path.
#[derive(Clone, Debug)]
pub(super) struct Carried {
    pub(super) path: Path,
    pub(super) tally: Tally,
    /// Requests a second.
    pub(super) rate: f64,
    /// Where packets are missing, in words.
    pub(super) gaps: Vec<String>,
}

/// The sockets of all streams. They live as long as this value: each round has the same flows as the one before.
pub(super) struct Load {
    streams: Vec<Stream>,
    round: u32,
}

impl Load {
    pub(super) fn open(ends: &[Ends<'_>]) -> Result<Self> {
        let streams = ends.iter().map(Stream::open).collect::<Result<_>>()?;
        Ok(Self { streams, round: 0 })
    }

    /// Sends `rate` requests a second on each path while `work` is done, then waits for what is under way.
    pub(super) fn carry(&mut self, rate: f64, work: impl FnOnce() -> Result<()>) -> Result<Vec<Carried>> {
        self.round += 1;
        for stream in &mut self.streams {
            stream.overflows = stream.overflows().map_err(Error::io("counters of a socket"))?;
        }
        let (round, streams) = (self.round, &self.streams);
        let (stop, asked) = (AtomicBool::new(false), AtomicBool::new(false));
        let answered = AtomicBool::new(false);
        let (worked, sent, got) = thread::scope(|scope| {
            let server = scope.spawn(|| {
                let result = serve(streams, round, &asked);
                answered.store(true, Ordering::Release);
                result
            });
            let client = scope.spawn(|| {
                let result = ask(streams, round, rate, &stop, &asked, &answered);
                asked.store(true, Ordering::Release);
                result
            });
            let worked = work();
            stop.store(true, Ordering::Release);
            let join = |end: thread::Result<io::Result<_>>| {
                end.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            (worked, join(client.join()), join(server.join()))
        });
        worked?;
        let sent = sent.map_err(Error::io("sending requests"))?;
        let got = got.map_err(Error::io("answering requests"))?;
        self.judge(&sent, &got)
    }

    fn judge(&self, client: &[Side], server: &[Side]) -> Result<Vec<Carried>> {
        let mut all = Vec::new();
        for path in Path::ALL {
            let mut carried = Carried { path, tally: Tally::default(), rate: 0.0, gaps: Vec::new() };
            let of_path = self.streams.iter().zip(client.iter().zip(server)).filter(|(s, _)| s.path == path);
            for (stream, (client, server)) in of_path {
                for (what, from, to) in [("requests", client, server), ("answers", server, client)] {
                    for flow in 0..FLOWS {
                        carried.tally.count(from.sent[flow], &to.seen[flow]);
                        if let Some((first, last)) = to.seen[flow].gap(from.sent[flow]) {
                            let lost = from.sent[flow] - to.seen[flow].distinct;
                            let port = stream.port(flow).map_err(Error::io("the address of a socket"))?;
                            let sent = from.sent[flow];
                            carried.gaps.push(format!(
                                "{what} of port {port}: {lost} of {sent}, between the {first}th and the {last}th"
                            ));
                        }
                    }
                }
                let overflows = stream.overflows().map_err(Error::io("counters of a socket"))?;
                carried.tally.full += overflows - stream.overflows;
                carried.rate += client.sent.iter().sum::<u64>() as f64 / client.time.as_secs_f64();
            }
            all.push(carried);
        }
        Ok(all)
    }
}

impl Stream {
    fn open(ends: &Ends<'_>) -> Result<Self> {
        let Ends { path, share, client, server, port, to } = *ends;
        let at = SocketAddrV4::new(server.ip, port);
        let bound = server.netns.run(|| UdpSocket::bind(at))?;
        let bound = bound.map_err(Error::io(format!("listening in pod {} at {at}", server.name)))?;
        let connect = || {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.connect(to)?;
            Ok(socket)
        };
        let clients = client
            .netns
            .run(|| (0..FLOWS).map(|_| connect()).collect::<io::Result<Vec<_>>>())?
            .map_err(Error::io(format!("a socket of pod {} towards {to}", client.name)))?;
        let stream = Self { path, share, clients, server: bound, overflows: 0 };
        stream.sockets().try_for_each(socket::widen).map_err(Error::io("widening a socket's buffers"))?;
        Ok(stream)
    }

    fn sockets(&self) -> impl Iterator<Item = &UdpSocket> {
        self.clients.iter().chain([&self.server])
    }

    fn overflows(&self) -> io::Result<u64> {
        self.sockets().map(socket::overflows).sum()
    }

    fn port(&self, flow: usize) -> io::Result<u16> {
        Ok(self.clients[flow].local_addr()?.port())
    }
}

/// One side of a stream in one round.
struct Side {
    sent: [u64; FLOWS],
    seen: [Seen; FLOWS],
    /// How long it has sent.
    time: Duration,
}

impl Side {
    fn new() -> Self {
        Self { sent: [0; FLOWS], seen: std::array::from_fn(|_| Seen::default()), time: Duration::ZERO }
    }

    fn label(&mut self, round: u32, flow: usize, datagram: &mut Datagram) {
        datagram.data[..4].copy_from_slice(&round.to_be_bytes());
        datagram.data[4..8].copy_from_slice(&(flow as u32).to_be_bytes());
        datagram.data[8..16].copy_from_slice(&self.sent[flow].to_be_bytes());
        self.sent[flow] += 1;
    }

    /// The flow of a datagram of this round. What comes of an earlier one is late by more than [`SILENCE`], and was lost.
    fn note(&mut self, round: u32, datagram: &Datagram) -> Option<usize> {
        let [r0, r1, r2, r3, f0, f1, f2, f3, number @ ..] = datagram.data.first_chunk::<16>()?;
        let flow = u32::from_be_bytes([*f0, *f1, *f2, *f3]) as usize;
        if u32::from_be_bytes([*r0, *r1, *r2, *r3]) != round || flow >= FLOWS {
            return None;
        }
        self.seen[flow].note(u64::from_be_bytes(*number));
        Some(flow)
    }
}

/// Sends requests and takes answers until told to stop, then takes answers until there are no more.
fn ask(
    streams: &[Stream],
    round: u32,
    rate: f64,
    stop: &AtomicBool,
    asked: &AtomicBool,
    answered: &AtomicBool,
) -> io::Result<Vec<Side>> {
    let mut sides: Vec<Side> = streams.iter().map(|_| Side::new()).collect();
    let mut burst = vec![Datagram::default(); BATCH];
    let mut answers = Vec::with_capacity(BATCH);
    let begin = Instant::now();
    // Time that was missed and shall not be caught up with.
    let mut missed = Duration::ZERO;
    let mut last = begin;
    for tick in 0_usize.. {
        let now = Instant::now();
        missed += now.duration_since(last).saturating_sub(MEMORY);
        last = now;
        let time = now.duration_since(begin);
        for (stream, side) in streams.iter().zip(&mut sides) {
            let rate = rate * stream.share;
            let due = (rate * (time - missed).as_secs_f64()) as u64;
            let most = (rate * TICK.as_secs_f64() * CATCH_UP) as u64;
            let mut left = due.saturating_sub(side.sent.iter().sum()).min(most.max(1));
            let flow = tick % FLOWS;
            while left > 0 {
                let count = left.min(BATCH as u64) as usize;
                let before = side.sent[flow];
                burst[..count].iter_mut().for_each(|datagram| side.label(round, flow, datagram));
                let taken = socket::send(&stream.clients[flow], &mut burst[..count], false)?;
                side.sent[flow] = before + taken as u64;
                if taken < count {
                    break;
                }
                left -= count as u64;
            }
            side.time = time;
        }
        take(streams, round, &mut sides, &mut answers)?;
        if stop.load(Ordering::Acquire) {
            break;
        }
        thread::sleep(TICK.saturating_sub(now.elapsed()));
    }
    asked.store(true, Ordering::Release);
    let mut silent_since = Instant::now();
    while !answered.load(Ordering::Acquire) || silent_since.elapsed() < SILENCE {
        if take(streams, round, &mut sides, &mut answers)? {
            silent_since = Instant::now();
        } else {
            thread::sleep(LOOK);
        }
    }
    Ok(sides)
}

/// Takes all answers that are there; says whether there were any.
fn take(streams: &[Stream], round: u32, sides: &mut [Side], answers: &mut Vec<Datagram>) -> io::Result<bool> {
    let mut any = false;
    for (stream, side) in streams.iter().zip(sides) {
        for socket in &stream.clients {
            loop {
                socket::receive(socket, answers)?;
                answers.iter().for_each(|answer| _ = side.note(round, answer));
                any |= !answers.is_empty();
                if answers.len() < BATCH {
                    break;
                }
            }
        }
    }
    Ok(any)
}

/// Answers until all was asked and nothing comes any more.
fn serve(streams: &[Stream], round: u32, asked: &AtomicBool) -> io::Result<Vec<Side>> {
    let mut sides: Vec<Side> = streams.iter().map(|_| Side::new()).collect();
    let mut batch = Vec::with_capacity(BATCH);
    let begin = Instant::now();
    let mut silent_since = begin;
    while !asked.load(Ordering::Acquire) || silent_since.elapsed() < SILENCE {
        let mut any = false;
        for (stream, side) in streams.iter().zip(&mut sides) {
            socket::receive(&stream.server, &mut batch)?;
            any |= !batch.is_empty();
            batch.retain_mut(|datagram| {
                let flow = side.note(round, datagram);
                if let Some(flow) = flow {
                    side.label(round, flow, datagram);
                }
                flow.is_some()
            });
            let mut rest = &mut batch[..];
            while !rest.is_empty() {
                let taken = socket::send(&stream.server, rest, true)?;
                rest = &mut rest[taken..];
                if taken == 0 {
                    thread::yield_now();
                }
            }
            side.time = begin.elapsed();
        }
        if any {
            silent_since = Instant::now();
        } else {
            thread::sleep(LOOK);
        }
    }
    Ok(sides)
}

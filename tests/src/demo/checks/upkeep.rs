//! What must hold for long: bulk transfers, and forwarding while the agent is away.

use std::{
    io::{Read as _, Write as _},
    net::SocketAddrV4,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use super::{Cast, Pinned, Proof};
use crate::{
    demo::evidence::{Failure, Place, Result, Trail, ask, expect_seen},
    ensure,
    lab::{
        Agent, Error, Netns, Pod,
        http::{Download, Request},
        large::{self, Compare},
        net::tcp_connect,
    },
};

pub(super) fn large_transfer(c: &Cast<'_>) -> Result<Proof> {
    let start = Instant::now();
    let near = download(c, &c.a.netns, c.near.http())?;
    let far = download(c, &c.a.netns, c.far.http())?;
    // By the ELB to the same node: the answers must not take the short cut.
    let elb = {
        let _pin = Pinned::new(c.lab, c.a.ip, c.near)?;
        download(c, &c.a.netns, c.vip)?
    };
    let latency = start.elapsed();
    super::expect_direct(c, c.a, near.local.port(), c.near)?;
    super::expect_direct(c, c.a, far.local.port(), c.far)?;
    for (pod, download) in [(c.far, &far), (c.near, &elb)] {
        let bytes = Trail::between(c.lab, c.a.ip, pod.ip, download.local.port())?.bytes(&Place::of_pod(pod));
        ensure!(bytes >= large::LENGTH, "only {bytes} bytes crossed VLAN {} of {}", pod.vlan, pod.port);
    }
    let detail = format!(
        "100 MB each, every byte compared; Gbit/s: same node {:.1}, cross node {:.1}, through the ELB {:.1}",
        near.gbit_per_second(),
        far.gbit_per_second(),
        elb.gbit_per_second()
    );
    Ok(Proof { latency, detail })
}

fn download(c: &Cast<'_>, netns: &Netns, to: SocketAddrV4) -> Result<Download> {
    let download = Request::get(to, "/large").from_port(c.lab.fresh_port()).send_large(netns)?;
    ensure!(download.bytes == large::LENGTH, "{to} sent {} bytes", download.bytes);
    ensure!(download.differs_at.is_none(), "{to}: byte {:?} differs", download.differs_at);
    Ok(download)
}

pub(super) fn agent_killed(c: &Cast<'_>) -> Result<Proof> {
    let agent = c.lab.agent(&c.node.name)?;
    let transfers = [Transfer::new(c.near.http()), Transfer::new(c.far.http())];
    let away = thread::scope(|scope| {
        let running: Vec<_> =
            transfers.iter().map(|transfer| scope.spawn(|| transfer.run(&c.a.netns))).collect();
        let result = kill_and_restart(c, agent, &transfers);
        for transfer in &transfers {
            transfer.hurry.store(true, Ordering::Relaxed);
        }
        let results: Vec<_> = running.into_iter().map(thread::ScopedJoinHandle::join).collect();
        let away = result?;
        for result in results {
            result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok::<_, Failure>(away)
    })?;
    let detail = format!(
        "two transfers and new connections went on without it ({} ms); restarted with 0 changes",
        away.as_millis()
    );
    Ok(Proof { latency: away, detail })
}

/// Kills the agent in the midst of the transfers, looks what still works, and starts it again. Returns how long it was away.
fn kill_and_restart(c: &Cast<'_>, agent: &Agent, transfers: &[Transfer]) -> Result<Duration> {
    wait_for("the transfers to begin", || transfers.iter().all(|transfer| transfer.so_far() > 0))?;
    agent.stop(Signal::SIGKILL)?;
    let start = Instant::now();
    let before: Vec<u64> = transfers.iter().map(Transfer::so_far).collect();
    for pod in [c.near, c.far] {
        works(c, pod)?;
    }
    wait_for("the transfers to go on without an agent", || {
        transfers.iter().zip(&before).all(|(transfer, before)| transfer.so_far() > before + 1_000_000)
    })?;
    let log_end = file_length(&agent.log());
    agent.start()?;
    agent.wait_ready(Duration::from_secs(10))?;
    let away = start.elapsed();
    let operations = operations_since(agent, log_end)?;
    ensure!(operations == 0, "the restarted agent changed {operations} things");
    ensure!(
        transfers.iter().all(|transfer| transfer.so_far() < large::LENGTH),
        "a transfer was over before the agent was back: nothing is proved"
    );
    works(c, c.near)?;
    Ok(away)
}

fn file_length(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// What the agent says that it changed: `revision 1: 3 pods, 0 released, 0 operations, 0 faults`.
fn operations_since(agent: &Agent, log_end: u64) -> Result<u64> {
    let log = agent.log();
    let text = std::fs::read(&log).map_err(Error::io(format!("reading {}", log.display())))?;
    let news = String::from_utf8_lossy(&text[(log_end as usize).min(text.len())..]).into_owned();
    let number = |line: &str| {
        let before = line.split(" operations").next().filter(|before| before.len() < line.len())?;
        before.rsplit(' ').next()?.parse::<u64>().ok()
    };
    let mut numbers = news.lines().filter_map(number).peekable();
    ensure!(numbers.peek().is_some(), "{} does not say what was changed", log.display());
    Ok(numbers.sum())
}

fn works(c: &Cast<'_>, pod: &Pod) -> Result<()> {
    let port = c.lab.fresh_port();
    let (_, whoami) = ask(&c.a.netns, pod.http(), port)?;
    expect_seen(&whoami, pod, SocketAddrV4::new(c.a.ip, port))
}

fn wait_for(what: &str, done: impl Fn() -> bool) -> Result<()> {
    let limit = Duration::from_secs(3);
    let end = Instant::now() + limit;
    while !done() {
        if Instant::now() > end {
            return Err(Error::Timeout { what: what.to_owned(), limit, detail: String::new() }.into());
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// A download of the large file that takes its time until it is told to hurry.
struct Transfer {
    to: SocketAddrV4,
    so_far: AtomicU64,
    hurry: AtomicBool,
}

impl Transfer {
    fn new(to: SocketAddrV4) -> Self {
        Self { to, so_far: AtomicU64::new(0), hurry: AtomicBool::new(false) }
    }

    fn so_far(&self) -> u64 {
        self.so_far.load(Ordering::Relaxed)
    }

    fn run(&self, netns: &Netns) -> Result<()> {
        let mut stream = tcp_connect(netns, 0, self.to, Duration::from_secs(2))?;
        let compare = self.read(&mut stream).map_err(Error::io(format!("transfer from {}", self.to)))?;
        ensure!(compare.offset == large::LENGTH, "{} sent {} bytes", self.to, compare.offset);
        ensure!(compare.differs_at.is_none(), "{}: byte {:?} differs", self.to, compare.differs_at);
        Ok(())
    }

    fn read(&self, stream: &mut std::net::TcpStream) -> std::io::Result<Compare> {
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        stream.write_all(b"GET /large HTTP/1.0\r\n\r\n")?;
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let mut compare = Compare::default();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let length = stream.read(&mut buffer)?;
            if length == 0 {
                return Ok(compare);
            }
            compare.feed(&buffer[..length]);
            self.so_far.store(compare.offset, Ordering::Relaxed);
            if !self.hurry.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(4));
            }
        }
    }
}

pub(super) fn fabric_violations(c: &Cast<'_>) -> Result<Proof> {
    let start = Instant::now();
    let violations = c.lab.fabric().violations()?;
    let list: Vec<String> = violations
        .iter()
        .map(|count| format!("{} {} from {}.{}", count.packets, count.kind.name(), count.port, count.vlan))
        .collect();
    ensure!(list.is_empty(), "{}", list.join(", "));
    let flows = c.lab.fabric().flows()?;
    let packets: u64 = flows.iter().map(|flow| flow.packets).sum();
    let detail = format!("none, in {} flows with {packets} packets", flows.len());
    Ok(Proof { latency: start.elapsed(), detail })
}

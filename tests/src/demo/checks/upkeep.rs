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
use serde_json::Value;

use super::{Cast, Pinned, Proof};
use crate::{
    demo::evidence::{Place, Result, Trail, expect_reach},
    ensure,
    lab::{
        Agent, Error, Netns,
        http::{Download, Request},
        ipam::request,
        large::{self, Compare},
        net::tcp_connect,
    },
};

/// How long what was killed may take to be back.
const BACK: Duration = Duration::from_secs(10);

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
    let away = during_transfers(c, |transfers| {
        let start = Instant::now();
        agent.stop(Signal::SIGKILL)?;
        still_forwards(c, transfers)?;
        let log_end = file_length(&agent.log());
        agent.start()?;
        agent.wait_ready(BACK)?;
        let away = start.elapsed();
        let operations = operations_since(agent, log_end)?;
        ensure!(operations == Some(0), "the restarted agent changed {operations:?} things");
        Ok(away)
    })?;
    let detail = format!(
        "two transfers and new connections went on without it ({} ms); restarted with 0 changes",
        away.as_millis()
    );
    Ok(Proof { latency: away, detail })
}

pub(super) fn allocator_killed(c: &Cast<'_>) -> Result<Proof> {
    let ipam = c.lab.ipam()?;
    let agents = c.lab.agents();
    let before: Vec<Value> = agents.iter().map(Agent::status).collect::<Result<_, Error>>()?;
    let away = during_transfers(c, |transfers| {
        let log_ends: Vec<u64> = agents.iter().map(|agent| file_length(&agent.log())).collect();
        let start = Instant::now();
        ipam.kill();
        for agent in agents {
            agent.wait_status("it sees no allocator", BACK, |status| status["source_down_since"].is_u64())?;
        }
        still_forwards(c, transfers)?;
        ipam.start()?;
        for (agent, before) in agents.iter().zip(&before) {
            // A new allocator begins with a snapshot of its store as it is, which other nodes' changes have moved on.
            let resumed = |status: &Value| {
                status["source_down_since"].is_null()
                    && status["revision"].as_u64() >= before["revision"].as_u64()
            };
            agent.wait_status("it goes on where it was", BACK, resumed)?;
        }
        let away = start.elapsed();
        // Each answers that all of it is in the kernel, and the allocator hands that on.
        ipam.ask(|client| async move {
            client.allocate(&request(c.a), Some(BACK)).await?;
            client.allocate(&request(c.far), Some(BACK)).await
        })?;
        for ((agent, before), log_end) in agents.iter().zip(&before).zip(log_ends) {
            let (status, operations) = (agent.status()?, operations_since(agent, log_end)?);
            let same = ["pods", "pid", "refused"].iter().all(|field| status[*field] == before[*field]);
            ensure!(same, "the agent of {} had {before}, has {status}", agent.node());
            ensure!(
                operations.unwrap_or(0) == 0,
                "the agent of {} changed {operations:?} things",
                agent.node()
            );
        }
        Ok(away)
    })?;
    let detail = format!(
        "two transfers and new connections went on without it ({} ms); back again, all agents went on from where they were with 0 changes",
        away.as_millis()
    );
    Ok(Proof { latency: away, detail })
}

/// Does something in the midst of two transfers, which must come to their end all the same.
fn during_transfers<T>(c: &Cast<'_>, act: impl FnOnce(&[Transfer]) -> Result<T>) -> Result<T> {
    let transfers = [Transfer::new(c.near.http()), Transfer::new(c.far.http())];
    thread::scope(|scope| {
        let running: Vec<_> =
            transfers.iter().map(|transfer| scope.spawn(|| transfer.run(&c.a.netns))).collect();
        let result =
            wait_for("the transfers to begin", || transfers.iter().all(|transfer| transfer.so_far() > 0))
                .and_then(|()| act(&transfers))
                .and_then(|done| {
                    ensure!(
                        transfers.iter().all(|transfer| transfer.so_far() < large::LENGTH),
                        "a transfer was over too early: nothing is proved"
                    );
                    expect_reach(c.lab, c.a, c.near)?;
                    Ok(done)
                });
        for transfer in &transfers {
            transfer.hurry.store(true, Ordering::Relaxed);
        }
        let results: Vec<_> = running.into_iter().map(thread::ScopedJoinHandle::join).collect();
        let done = result?;
        for result in results {
            result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(done)
    })
}

/// New connections work, and the transfers go on.
fn still_forwards(c: &Cast<'_>, transfers: &[Transfer]) -> Result<()> {
    let before: Vec<u64> = transfers.iter().map(Transfer::so_far).collect();
    for pod in [c.near, c.far] {
        expect_reach(c.lab, c.a, pod)?;
    }
    wait_for("the transfers to go on", || {
        transfers.iter().zip(&before).all(|(transfer, before)| transfer.so_far() > before + 1_000_000)
    })
}

fn file_length(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// What the agent says that it changed: `revision 1: 3 pods, 0 released, 0 operations, 0 faults`; none when it says nothing.
fn operations_since(agent: &Agent, log_end: u64) -> Result<Option<u64>> {
    let log = agent.log();
    let text = std::fs::read(&log).map_err(Error::io(format!("reading {}", log.display())))?;
    let news = String::from_utf8_lossy(&text[(log_end as usize).min(text.len())..]).into_owned();
    let number = |line: &str| {
        let before = line.split(" operations").next().filter(|before| before.len() < line.len())?;
        before.rsplit(' ').next()?.parse::<u64>().ok()
    };
    Ok(news.lines().filter_map(number).reduce(|a, b| a + b))
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

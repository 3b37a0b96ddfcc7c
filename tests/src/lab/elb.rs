//! The load balancer's userspace side: listeners, health checks, pins. Its packets are moved by the fabric's program.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use fabric_ebpf::{Addr, BACKENDS, ElbKey, PinKey, Service, ServiceKey};

use super::{
    error::{Error, Result},
    fabric::{Fabric, Raw, ServiceAddress as _, found, lock},
    net,
    netns::Netns,
    spec::Protocol,
};

/// Pause between two health checks of a backend.
const INTERVAL: Duration = Duration::from_millis(200);
/// How long a backend has to accept a connection.
const TIMEOUT: Duration = Duration::from_millis(250);
/// Checks that must fail in a row before a backend gets no new flows; one that succeeds brings it back.
const FALL: u32 = 2;

/// A backend and what the health checks say of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// The pod's name.
    pub pod: String,
    /// Where it serves.
    pub addr: SocketAddrV4,
    /// Whether health checks decide; otherwise it is healthy always.
    pub checked: bool,
    /// Whether it gets new flows.
    pub healthy: bool,
    /// Health checks that succeeded.
    pub passed: u64,
    /// Health checks that failed.
    pub failed: u64,
}

/// A listener as built.
#[derive(Clone, Debug)]
pub(super) struct Listener {
    pub(super) vip: SocketAddrV4,
    pub(super) protocol: Protocol,
    pub(super) target_port: u16,
    /// Pod names and addresses.
    pub(super) backends: Vec<(String, Ipv4Addr)>,
    pub(super) health_check: bool,
}

/// The load balancer of a lab.
pub struct Elb {
    shared: Arc<Shared>,
    checkers: Vec<JoinHandle<()>>,
}

struct Shared {
    fabric: Arc<Fabric>,
    listeners: Vec<Listener>,
    /// Each (address, port) once, whatever number of listeners it is behind.
    backends: Mutex<Vec<State>>,
    stop: AtomicBool,
}

struct State {
    backend: Backend,
    failed_in_a_row: u32,
}

impl Elb {
    /// Tells the fabric of the listeners and starts to check their backends from the ELB's own namespace.
    pub(super) fn start(fabric: Arc<Fabric>, netns: &Netns, listeners: Vec<Listener>) -> Result<Self> {
        let mut backends: Vec<State> = Vec::new();
        let mut checked: Vec<usize> = Vec::new();
        for listener in &listeners {
            if listener.backends.len() > BACKENDS {
                return Err(Error::Topology(format!("VIP {}: more than {BACKENDS} backends", listener.vip)));
            }
            for (pod, ip) in &listener.backends {
                let addr = SocketAddrV4::new(*ip, listener.target_port);
                let at = backends.iter().position(|state| state.backend.addr == addr).unwrap_or_else(|| {
                    let backend = Backend {
                        pod: pod.clone(),
                        addr,
                        checked: false,
                        healthy: true,
                        passed: 0,
                        failed: 0,
                    };
                    backends.push(State { backend, failed_in_a_row: FALL });
                    backends.len() - 1
                });
                if listener.health_check && !checked.contains(&at) {
                    backends[at].backend.checked = true;
                    backends[at].backend.healthy = false;
                    checked.push(at);
                }
            }
        }
        let shared = Arc::new(Shared {
            fabric,
            listeners,
            backends: Mutex::new(backends),
            stop: AtomicBool::new(false),
        });
        shared.publish(&lock(&shared.backends))?;
        let mut elb = Self { shared, checkers: Vec::new() };
        for at in checked {
            let shared = Arc::clone(&elb.shared);
            elb.checkers.push(netns.spawn(move || shared.check(at))?);
        }
        Ok(elb)
    }

    /// The backends of all listeners, each address and port once.
    pub fn backends(&self) -> Vec<Backend> {
        lock(&self.shared.backends).iter().map(|state| state.backend.clone()).collect()
    }

    /// Waits until at least so many of the backends that are checked are healthy.
    ///
    /// # Errors
    ///
    /// When they are not in time; the message lists them.
    pub fn wait_healthy(&self, count: usize, limit: Duration) -> Result<()> {
        self.wait_until(&format!("{count} healthy backends"), limit, |backends| {
            backends.iter().filter(|backend| backend.checked && backend.healthy).count() >= count
        })
    }

    /// Waits until all backends of a pod that are checked are healthy, or are not.
    ///
    /// # Errors
    ///
    /// When that does not happen in time.
    pub fn wait_backend(&self, pod: &str, healthy: bool, limit: Duration) -> Result<()> {
        self.wait_until(&format!("backend {pod} healthy = {healthy}"), limit, |backends| {
            let mut checked =
                backends.iter().filter(|backend| backend.pod == pod && backend.checked).peekable();
            checked.peek().is_some() && checked.all(|backend| backend.healthy == healthy)
        })
    }

    fn wait_until(&self, what: &str, limit: Duration, done: impl Fn(&[Backend]) -> bool) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            let backends = self.backends();
            if done(&backends) {
                return Ok(());
            }
            if Instant::now() >= end {
                return Err(Error::Timeout { what: what.into(), limit, detail: format!(": {backends:?}") });
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// From now on new flows of this client, to any VIP, go to this backend, whatever its health.
    ///
    /// # Errors
    ///
    /// When the map cannot be changed.
    pub fn pin(&self, client: Ipv4Addr, backend: Ipv4Addr) -> Result<()> {
        self.vips().try_for_each(|vip| self.pin_at(client, vip, backend))
    }

    /// As [`pin`](Self::pin), for flows to one VIP.
    ///
    /// # Errors
    ///
    /// When the map cannot be changed.
    pub fn pin_at(&self, client: Ipv4Addr, vip: Ipv4Addr, backend: Ipv4Addr) -> Result<()> {
        let key = PinKey { client: client.octets(), vip: vip.octets() };
        lock(&self.shared.fabric.pins)
            .insert(Raw(key), backend.octets(), 0)
            .map_err(|e| Error::bpf("map PINS", &e))
    }

    /// Takes all pins of a client away.
    ///
    /// # Errors
    ///
    /// When the map cannot be changed.
    pub fn unpin(&self, client: Ipv4Addr) -> Result<()> {
        let mut pins = lock(&self.shared.fabric.pins);
        for vip in self.vips() {
            let key = PinKey { client: client.octets(), vip: vip.octets() };
            found(pins.remove(&Raw(key))).map_err(|e| Error::bpf("map PINS", &e))?;
        }
        Ok(())
    }

    /// The backend of a flow, if the ELB knows the flow.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn flow(
        &self,
        client: SocketAddrV4,
        vip: SocketAddrV4,
        protocol: Protocol,
    ) -> Result<Option<SocketAddrV4>> {
        let key = ElbKey { client: addr(client), server: addr(vip), proto: u32::from(protocol as u8) };
        let flow = found(lock(&self.shared.fabric.elb_flows).get(&Raw(key), 0))
            .map_err(|e| Error::bpf("map ELB_FLOWS", &e))?;
        Ok(flow.map(|Raw(backend)| SocketAddrV4::new(backend.ip.into(), backend.port)))
    }

    fn vips(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.shared.listeners.iter().map(|listener| *listener.vip.ip())
    }
}

impl Drop for Elb {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for checker in self.checkers.drain(..) {
            checker.thread().unpark();
            let _ = checker.join();
        }
    }
}

impl Shared {
    /// Checks one backend until the end.
    fn check(&self, at: usize) {
        let to = lock(&self.backends)[at].backend.addr;
        while !self.stop.load(Ordering::Relaxed) {
            let passed = net::connect_here(0, to, TIMEOUT).is_ok();
            if let Err(error) = self.note(at, passed) {
                log::error!("{error}");
            }
            thread::park_timeout(INTERVAL);
        }
    }

    fn note(&self, at: usize, passed: bool) -> Result<()> {
        let mut backends = lock(&self.backends);
        let State { backend, failed_in_a_row } = &mut backends[at];
        if passed {
            backend.passed += 1;
            *failed_in_a_row = 0;
        } else {
            backend.failed += 1;
            *failed_in_a_row = failed_in_a_row.saturating_add(1);
        }
        let healthy = *failed_in_a_row < FALL;
        if healthy == backend.healthy {
            return Ok(());
        }
        backend.healthy = healthy;
        log::debug!("ELB: {} ({}) healthy = {healthy}", backend.pod, backend.addr);
        self.publish(&backends)
    }

    /// Gives the fabric the healthy backends of every listener.
    fn publish(&self, backends: &[State]) -> Result<()> {
        let mut services = lock(&self.fabric.services);
        for (id, listener) in (0_u32..).zip(&self.listeners) {
            let mut service = Service {
                id,
                count: 0,
                target_port: u32::from(listener.target_port),
                backends: [Addr::default(); BACKENDS],
            };
            for (_, ip) in &listener.backends {
                let at = SocketAddrV4::new(*ip, listener.target_port);
                if backends.iter().any(|state| state.backend.addr == at && state.backend.healthy) {
                    service.backends[service.count as usize] = addr(at);
                    service.count += 1;
                }
            }
            services
                .insert(Raw(ServiceKey::of(listener.vip, listener.protocol)), Raw(service), 0)
                .map_err(|e| Error::bpf("map SERVICES", &e))?;
        }
        Ok(())
    }
}

fn addr(addr: SocketAddrV4) -> Addr {
    Addr { ip: addr.ip().octets(), port: addr.port(), pad: 0 }
}

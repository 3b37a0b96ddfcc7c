//! The agent: one loop that keeps the kernel equal to what the source says.
//!
//! It starts by finding out whether it can run at all, and changes nothing until it knows. It finds its state in the
//! kernel and applies differences. It ends without undoing anything.

pub(crate) mod asks;
mod error;
mod exclusive;
mod limits;
mod listen;
mod mend;
mod parent;
mod pods;
mod policy;
mod report;
mod succession;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    rc::Rc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use aya::Ebpf;
use datapath_common::abi::{Endpoint, maps::host_dst};
use eniway_ipam::rpc::LocalSocket;
use ipnet::Ipv4Net;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{self, MissedTickBehavior},
};

pub(crate) use self::pods::pod_spec;
use self::{
    asks::Waiter,
    listen::{Feed, Held, read_snapshot},
    mend::Repairs,
    parent::Parent,
    policy::Policy,
};
pub use self::{error::AgentError, listen::confirm};
use crate::{
    api,
    attachment::Attachment,
    config::{self, Config, Metadata},
    detach,
    events::Monitor,
    feature,
    feature::TcKind,
    grace::Grace,
    kept::Kept,
    lock::{self, Lock},
    net, netlink,
    nic::Nic,
    object,
    pin::Pins,
    privilege::{self, Loader},
    reconcile::{self, Plan},
    service::Service,
    settings::Settings,
    source::{Desired, Pod, Snapshot, file::SourceError},
    status::Status,
    sys,
    tables::{Live, Tables, TablesError},
    takeover::Takeover,
};

/// The cloud's metadata service.
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// How often the agent looks at the file and at what rests in the tables.
const TICK: Duration = Duration::from_secs(1);
/// Ticks between looks at interfaces and addresses, and between attempts at what failed.
const CHECK_TICKS: u64 = 3;
/// Ticks between looks at the node's settings, which other programs (networkd among them) may undo.
const SETTINGS_TICKS: u64 = 15;
/// Ticks between looks at all that others on the node may have changed.
const NODE_TICKS: u64 = 60;
/// The one of [`NODE_TICKS`] that gives memory back: soon after the start.
const REST_TICK: u64 = 3;
/// Writers that do not rename write in several steps.
const SETTLE: Duration = Duration::from_millis(30);

/// How long the agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Until a signal ends it.
    Stopped,
    /// Until the source was applied once; an error says what could not be.
    Applied,
}

/// Runs the agent. To be called on a single-threaded runtime: attaching and netlink work in the network namespace of
/// the thread.
///
/// # Errors
///
/// When it cannot start; then what was running before runs on.
pub async fn run(config: Config, until: Until) -> Result<(), AgentError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(AgentError::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(AgentError::Signal)?;
    let mut service = Service::from_environment()?;
    let mut agent = Agent::start(config, until).await?;
    if until == Until::Applied {
        return agent.completeness();
    }
    let socket = LocalSocket::bind(&agent.config.run_dir.join(eniway_agent_api::SOCKET))?;
    let (server, mut asks) = api::serve(socket, agent.source.backing(), &agent.config.node);
    let mut monitor = Monitor::open()?;
    let mut ticks = time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // What is new goes to the status file once that is due, after everybody who waits for an answer has it.
    let mut report_due = None;
    loop {
        service.tell(agent.status.ready, agent.summary());
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            told = agent.source.next() => match told {
                Some(told) => agent.hear(told).await,
                None => {
                    time::sleep(SETTLE).await;
                    agent.look().await;
                }
            },
            _ = ticks.tick() => agent.tick().await,
            changes = monitor.next() => agent.notice(changes).await,
            Some(ask) = asks.recv() => agent.ask(ask).await,
            () = sleep_until(service.due()) => {
                // Given by the loop itself: one that hangs gives none.
                service.alive();
                continue;
            }
            () = sleep_until(report_due) => {
                agent.report();
                report_due = None;
                continue;
            }
        }
        agent.answer_waiters();
        report_due.get_or_insert(agent.next_report);
    }
    service.stopping();
    // With the socket's file gone, the plugin says at once that the agent is away.
    server.abort();
    let _ = server.await;
    agent.report();
    log::info!("stopped; {} pods keep their network", agent.tables.pods().count());
    Ok(())
}

async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

struct Agent {
    config: Config,
    pins: Pins,
    kind: TcKind,
    grace: Rc<Grace>,
    tables: Tables,
    policy: Policy,
    /// The object whose pod programs are attached.
    pods: Ebpf,
    parents: Vec<Parent>,
    source: Feed,
    /// The file's document in force.
    document: Option<Snapshot>,
    /// What runtimes asked for.
    attachments: Kept<Attachment>,
    /// ENIs that are in pods, by owner.
    nics: Kept<Nic>,
    /// Interface indexes of ENIs in pods that were given or checked since the start, by owner.
    nic_indexes: BTreeMap<u64, u32>,
    /// Settings of the node that were changed.
    settings: Settings,
    repairs: Repairs,
    waiters: Vec<Waiter>,
    /// What shall be: the snapshot in force, with the changes since.
    desired: Option<Rc<Desired>>,
    held: Option<Held>,
    /// Whether the last document could not be read, rather than not be understood.
    unreadable: bool,
    /// Host-side interfaces by owner, of pods that were wired or checked since the start.
    wired: BTreeMap<u64, String>,
    /// Owners whose pods are wired and may not speak yet.
    closed: BTreeSet<u64>,
    /// Why pods are not as asked, by owner.
    faults: BTreeMap<u64, String>,
    addresses: Vec<IpAddr>,
    ticks: u64,
    status: Status,
    written: Option<Status>,
    /// What should be, as it was written last.
    expected_text: Vec<u8>,
    /// The status file is not written before this.
    next_report: Instant,
    _locks: [Lock; 2],
}

impl Agent {
    async fn start(config: Config, until: Until) -> Result<Self, AgentError> {
        // Nothing is changed until all of this stands.
        let loader = privilege::keep_what_is_needed()?;
        let run_lock = lock::lock_run_dir(&config.run_dir)?;
        let kind = feature::probe()?;
        parent::ifindexes(&config)?;
        let pins = Pins::new(&config.pin_dir);
        let fresh = pins.all_versions()?.is_empty();
        let mut source = Feed::open(&config).await?;
        let first = match &mut source {
            Feed::File(file) => read_snapshot(file, &config),
            Feed::Allocator(_) => Ok(None),
        };
        if fresh && let Err(error @ SourceError::Document { .. }) = first {
            return Err(error.into());
        }
        let addresses = netlink::local_addresses().await?;
        pins.prepare()?;
        let pin_lock = lock::lock_pins(pins.dir())?;
        let takeover = Takeover::begin(&pins, &config.limits)?;
        let locks = [run_lock, pin_lock];

        let grace = Rc::new(Grace::new(&config.run_dir));
        let short = grace.expedite();
        let started =
            Self::attach(config, kind, Rc::clone(&grace), takeover, addresses, source, locks, &loader);
        let mut agent = started.inspect_err(|_| {
            // Where nothing was, nothing is left; what was not used yet goes.
            let removed = if fresh { pins.remove_all() } else { pins.remove_remains() };
            if let Err(error) = removed {
                log::error!("{error}");
            }
        })?;
        drop((short, loader));
        agent.take(first).await;
        if until == Until::Applied {
            agent.hear_first().await;
        }
        agent.report();
        Ok(agent)
    }

    /// Loads the programs, takes over what the tables hold, and attaches.
    #[expect(
        clippy::too_many_arguments,
        reason = "each stands before anything is changed, and becomes a part of the agent"
    )]
    fn attach(
        config: Config,
        kind: TcKind,
        grace: Rc<Grace>,
        mut takeover: Takeover,
        addresses: Vec<IpAddr>,
        source: Feed,
        locks: [Lock; 2],
        loader: &Loader,
    ) -> Result<Self, AgentError> {
        let ifindexes = parent::ifindexes(&config)?;
        let pins = takeover.pins().clone();

        // The kernel's verifier passes everything before anything is attached.
        let pods = object::load_for_pods(&config, takeover.place(), loader)?;
        let mut tables = succession::tables(&mut takeover)?;
        let indexes = parent::numbers(&ifindexes, tables.pods());
        let parents = config
            .parents
            .iter()
            .zip(ifindexes.iter().zip(indexes))
            .map(|(parent, (ifindex, index))| {
                Parent::load(&config, parent, *ifindex, index, takeover.place(), loader)
            })
            .collect::<Result<Vec<_>, _>>()?;

        let swept = tables.sweep()?;
        if swept > 0 {
            log::warn!("removed {swept} indexes that an interrupted change had left");
        }
        takeover.publish()?;
        let status = Status {
            pid: std::process::id(),
            node: config.node.clone(),
            started: unix_seconds(),
            fast_path: config.fast_path.name().to_owned(),
            // Names of pods that were programmed before, until the source gives them anew.
            pods: Status::read(&config.run_dir).map(|status| status.pods).unwrap_or_default(),
            ..Status::default()
        };
        let attachments = Kept::load(&config.run_dir, "attachments")?;
        let nics = Kept::load(&config.run_dir, "enis")?;
        let settings = Settings::load(&config.run_dir)?;
        let mut agent = Self {
            config,
            pins,
            kind,
            grace,
            tables,
            policy: Policy::default(),
            pods,
            parents,
            source,
            document: None,
            attachments,
            nics,
            nic_indexes: BTreeMap::new(),
            settings,
            repairs: Repairs::default(),
            waiters: Vec::new(),
            desired: None,
            held: None,
            unreadable: false,
            wired: BTreeMap::new(),
            closed: BTreeSet::new(),
            faults: BTreeMap::new(),
            addresses,
            ticks: 0,
            status,
            written: None,
            expected_text: Vec::new(),
            next_report: Instant::now(),
            _locks: locks,
        };
        agent.sync_host_dst()?;
        agent.take_links_over(&mut takeover, loader)?;
        agent.attach_parents()?;
        agent.attach_known_pods();
        agent.end_takeover(takeover)?;
        Ok(agent)
    }

    /// XDP comes first: it alone may find that the interface cannot do it, and then nothing else was touched.
    fn attach_parents(&mut self) -> Result<(), AgentError> {
        let mut created = Vec::new();
        let Self { parents, pins, kind, .. } = self;
        let attached = parents.iter_mut().try_for_each(|parent| parent.attach_xdp(pins, &mut created));
        if let Err(error) = attached {
            for pin in created {
                let _ = pins.remove(&pin);
            }
            return Err(error.into());
        }
        parents.iter_mut().try_for_each(|parent| parent.attach_tc(pins, *kind))
    }

    async fn tick(&mut self) {
        self.ticks += 1;
        if let Err(error) = self.tables.tidy() {
            log::error!("{error}");
        }
        self.look().await;
        self.look_for_confirmation().await;
        if self.ticks.is_multiple_of(CHECK_TICKS) {
            self.check_addresses().await;
            self.follow_queues().await;
            let moved = self.follow_parents().await;
            if !moved && (!self.faults.is_empty() || self.policy.fault.is_some() || self.lost_pods()) {
                self.reconcile(None).await;
                self.acknowledge();
            }
        }
        if self.ticks.is_multiple_of(SETTINGS_TICKS)
            && let Some(desired) = self.desired.clone()
        {
            self.prepare_parents(&desired).await;
        }
        // The first look, too, so that what is wrong from the beginning on is told at once.
        if self.ticks.is_multiple_of(SETTINGS_TICKS) || self.ticks == 1 {
            self.check_parents().await;
        }
        if self.ticks.is_multiple_of(NODE_TICKS) {
            self.check_node().await;
        }
        // What the start and each look at the whole node took is not needed any more.
        if self.ticks % NODE_TICKS == REST_TICK {
            sys::give_memory_back();
        }
    }

    fn plan(&self, desired: &Desired, scope: Option<&BTreeSet<u64>>, stuck: &BTreeSet<u64>) -> Plan {
        let mut actual: BTreeMap<u64, Live> = match scope {
            None => self.tables.pods().map(|pod| (pod.record.owner, *pod)).collect(),
            Some(owners) => {
                owners.iter().filter_map(|owner| Some((*owner, *self.tables.pod(*owner)?))).collect()
            }
        };
        // What they have stays; who wants it is refused by the tables.
        actual.retain(|owner, _| !desired.refused.contains_key(owner));
        reconcile::plan(&self.wanted(desired, scope), &actual, stuck)
    }

    /// Records of all pods, or of those of some owners, that shall be in the tables.
    fn wanted(&self, desired: &Desired, scope: Option<&BTreeSet<u64>>) -> BTreeMap<u64, Endpoint> {
        let record = |(owner, pod): (u64, &Pod)| {
            let Some(parent) = &pod.parent else { return Some((owner, pod.record(0, 0))) };
            let parent = self.parents.iter().find(|known| known.config.interface == *parent)?;
            // While its parent is away a pod keeps the record it has.
            let ifindex =
                parent.ifindex.or_else(|| self.tables.pod(owner).map(|live| live.record.parent_ifindex));
            let (policy_id, flags) = self.policy.of(&self.config, owner, pod);
            Some((owner, Endpoint { policy_id, flags, ..pod.record(parent.index, ifindex.unwrap_or(0)) }))
        };
        in_scope(desired, scope).filter(|(_, pod)| pod.is_wanted()).filter_map(record).collect()
    }

    /// Makes the kernel equal to what shall be, by the fewest operations: for all pods, or for those of some owners, to
    /// whom everybody belongs who has what they ask for.
    async fn reconcile(&mut self, scope: Option<&BTreeSet<u64>>) {
        let Some(desired) = self.desired.clone() else { return };
        let moved = self.sync_policy(&desired).await;
        // Rules that change may move any pod.
        let scope = scope.filter(|scope| moved.is_subset(scope));
        let pods: BTreeMap<u64, &Pod> = in_scope(&desired, scope).collect();
        let known_faults = match scope {
            None => std::mem::take(&mut self.faults),
            Some(owners) => owners.iter().filter_map(|owner| self.faults.remove_entry(owner)).collect(),
        };
        let mut operations = 0;
        let plan = self.plan(&desired, scope, &BTreeSet::new());

        let mut released = 0;
        for owner in &plan.release {
            match self.release(*owner).await {
                Ok(()) => released += 1,
                Err(error) => log::error!("cannot remove pod {owner:016x}: {error}"),
            }
        }
        for owner in self.wired_for_nothing(&desired, scope) {
            let ifindex = self.wired.remove(&owner).and_then(|interface| net::ifindex(&interface));
            if let Some(ifindex) = ifindex
                && let Err(error) = self.take_down(ifindex).await
            {
                log::error!("cannot remove what was wired for pod {owner:016x}: {error}");
            }
        }
        for owner in self.nics_for_nothing(&desired) {
            if let Err(error) = self.take_nic_back(owner).await {
                log::error!("cannot take the ENI of pod {owner:016x} back: {error}");
            }
        }
        if scope.is_none() {
            match self.sync_vips(&desired).and_then(|changes| Ok(changes + self.sync_host_dst()?)) {
                Ok(changes) => operations += changes,
                Err(error) => log::error!("{error}"),
            }
        }
        let prepared = |pod: &Pod| {
            pod.is_exclusive()
                || self.parents.iter().any(|parent| {
                    Some(&parent.config.interface) == pod.parent.as_ref() && parent.is_prepared_for(pod)
                })
        };
        if scope.is_none() || !pods.values().filter(|pod| pod.is_wanted()).all(|pod| prepared(pod)) {
            self.prepare_parents(&desired).await;
        }

        // A pod that cannot be wired keeps what it has, which may be what another one is to get.
        let mut stuck = BTreeSet::new();
        for (owner, error) in self.wire_all(&in_order(&desired, &plan), &pods).await {
            self.faults.insert(owner, error.to_string());
            stuck.insert(owner);
        }
        let plan = if stuck.is_empty() { plan } else { self.plan(&desired, scope, &stuck) };
        let wanted = self.wanted(&desired, scope);
        let moving: BTreeSet<u64> = plan.put.iter().copied().collect();
        for owner in in_order(&desired, &plan) {
            match self.program(pods[&owner], &wanted[&owner], &moving).await {
                Ok(changes) => operations += changes,
                Err(error) => {
                    self.faults.insert(owner, error.to_string());
                }
            }
        }
        for (owner, refusal) in &plan.refused {
            self.faults.insert(*owner, refusal.to_string());
        }

        for (owner, pod) in &pods {
            if let Some(fault) = self.faults.get(owner)
                && known_faults.get(owner) != Some(fault)
            {
                log::error!("pod {}: {fault}", pod.full_name());
            }
        }
        let revision = desired.revision;
        if released + operations > 0 || !self.status.ready {
            let level = if scope.is_none() { log::Level::Info } else { log::Level::Debug };
            log::log!(
                level,
                "revision {revision}: {} pods, {released} released, {operations} operations, {} faults",
                self.tables.pods().count(),
                self.faults.len()
            );
        }
        if !self.status.ready {
            self.remove_leftovers().await;
            self.status.ready = true;
            log::info!("ready");
        }
    }

    fn sync_vips(&mut self, desired: &Desired) -> Result<usize, TablesError> {
        let vips = desired.vips.iter().map(|vip| (vip.ip.octets(), vip.port, vip.protocol)).collect();
        self.tables.maps.set_vips(&vips)
    }

    fn sync_host_dst(&mut self) -> Result<usize, TablesError> {
        self.tables.maps.set_host_dsts(&host_dsts(&self.config.host, &self.addresses))
    }

    async fn check_addresses(&mut self) {
        match netlink::local_addresses().await {
            Ok(addresses) => self.addresses = addresses,
            Err(error) => return log::error!("{error}"),
        }
        match self.sync_host_dst() {
            Ok(0) => {}
            Ok(changes) => log::info!("the node's addresses changed: {changes} entries"),
            Err(error) => log::error!("{error}"),
        }
    }

    async fn prepare_parents(&mut self, desired: &Desired) {
        let Self { parents, settings, .. } = self;
        for parent in parents {
            parent.prepare(desired, settings).await;
        }
    }

    /// Removes what earlier agents left that nobody needs: links of pods without a record, and parents that the
    /// configuration does not name any more.
    async fn remove_leftovers(&mut self) {
        let live: BTreeSet<u32> = self.tables.pods().map(|pod| pod.record.ifindex).collect();
        let parents_in_use: BTreeSet<u32> = self.tables.pods().map(|pod| pod.record.parent_ifindex).collect();
        let (pods, parents) = match (self.pins.pinned_pods(), self.pins.pinned_parents()) {
            (Ok(pods), Ok(parents)) => (pods, parents),
            (Err(error), _) | (_, Err(error)) => return log::error!("{error}"),
        };
        for ifindex in pods.into_iter().filter(|ifindex| !live.contains(ifindex)) {
            if let Err(error) = self.take_down(ifindex).await {
                log::error!("{error}");
            }
        }
        if let Err(error) = self.pins.remove_unknown_maps() {
            log::error!("{error}");
        }
        if let Err(error) = self.remove_stray_veths().await {
            log::error!("{error}");
        }
        for parent in parents.into_iter().filter(|parent| self.config.parent(parent).is_none()) {
            if net::ifindex(&parent).is_some_and(|ifindex| parents_in_use.contains(&ifindex)) {
                log::warn!("{parent} is not configured any more, but pods are still on it");
                continue;
            }
            log::info!("removing the programs of {parent}, which is not configured any more");
            match detach::detach_parent(&self.pins, self.kind, &parent).await {
                Ok(None) => {}
                Ok(Some(problem)) => log::error!("{problem}"),
                Err(error) => log::error!("{error}"),
            }
        }
    }
}

/// The pods of some owners, or all.
fn in_scope<'d>(
    desired: &'d Desired,
    scope: Option<&'d BTreeSet<u64>>,
) -> Box<dyn Iterator<Item = (u64, &'d Pod)> + 'd> {
    match scope {
        None => Box::new(desired.pods()),
        Some(owners) => Box::new(owners.iter().filter_map(|owner| Some((*owner, desired.pod(*owner)?)))),
    }
}

/// Owners of pods that shall be in the tables and can be, in the order in which they came.
fn in_order(desired: &Desired, plan: &Plan) -> Vec<u64> {
    let mut planned: Vec<u64> = plan.put.iter().chain(&plan.keep).copied().collect();
    planned.sort_unstable_by_key(|owner| desired.place(*owner));
    planned
}

/// Destinations that are not left to the wire.
fn host_dsts(host: &config::Host, addresses: &[IpAddr]) -> BTreeMap<Ipv4Net, u32> {
    // kube-proxy may give the node every Service's address: one prefix is enough for them.
    let own = addresses.iter().filter_map(|address| match address {
        IpAddr::V4(address) if host.prefixes.iter().all(|prefix| !prefix.contains(address)) => {
            Some(Ipv4Net::from(*address))
        }
        _ => None,
    });
    let own = own.map(|address| (address, host_dst::HOST | host_dst::PREFERRED));
    let services = host.prefixes.iter().map(|prefix| (*prefix, host_dst::HOST | host_dst::SERVICE));
    let mut all: BTreeMap<Ipv4Net, u32> = own.chain(services).collect();
    match host.metadata {
        Metadata::Deny => all.insert(METADATA.into(), host_dst::DENY),
        Metadata::Host => all.insert(METADATA.into(), host_dst::HOST),
        // A flag of nothing hides a wider prefix that holds the address.
        Metadata::Wire => all.insert(METADATA.into(), 0),
    };
    // The longest prefix alone is asked: one that health checks come from says, too, what a wider one says, and all that it
    // holds say that they do.
    for checks in &host.health_checks {
        let wider = all.iter().filter(|(net, _)| net.contains(checks));
        let flags = wider.max_by_key(|(net, _)| net.prefix_len()).map_or(0, |(_, flags)| *flags);
        all.insert(checks.trunc(), flags | host_dst::PREFERRED);
    }
    for checks in &host.health_checks {
        for (_, flags) in all.iter_mut().filter(|(net, _)| checks.contains(*net)) {
            *flags |= host_dst::PREFERRED;
        }
    }
    all
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_serves_its_own_addresses_and_what_is_configured() {
        let addresses = ["10.1.0.167", "fe80::1", "10.247.0.10"].map(|address| address.parse().unwrap());
        let prefixes = vec!["10.247.0.0/16".parse().unwrap()];
        let health_checks: Vec<Ipv4Net> =
            ["100.125.0.0/16", "10.247.3.0/24"].map(|net| net.parse().unwrap()).into();
        for (metadata, flags) in
            [(Metadata::Deny, host_dst::DENY), (Metadata::Host, host_dst::HOST), (Metadata::Wire, 0)]
        {
            let host =
                config::Host { prefixes: prefixes.clone(), health_checks: health_checks.clone(), metadata };
            let expected: BTreeMap<Ipv4Net, u32> = [
                ("10.1.0.167/32", host_dst::HOST | host_dst::PREFERRED),
                ("10.247.0.0/16", host_dst::HOST | host_dst::SERVICE),
                ("10.247.3.0/24", host_dst::HOST | host_dst::SERVICE | host_dst::PREFERRED),
                ("100.125.0.0/16", host_dst::PREFERRED),
                ("169.254.169.254/32", flags),
            ]
            .into_iter()
            .map(|(net, flags)| (net.parse().unwrap(), flags))
            .collect();
            assert_eq!(host_dsts(&host, &addresses), expected);
        }
    }
}

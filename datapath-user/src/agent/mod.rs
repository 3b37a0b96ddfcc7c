//! The agent: one loop that keeps the kernel equal to what the source says.
//!
//! It starts by finding out whether it can run at all, and changes nothing until it knows. It finds its state in the
//! kernel and applies differences. It ends without undoing anything.

pub(crate) mod asks;
mod exclusive;
mod parent;
mod policy;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use aya::Ebpf;
use datapath_common::abi::{
    Endpoint,
    maps::{self, host_dst},
};
use eniway_ipam::{
    PodKey,
    api::RefusedByAgent,
    rpc::{ClientError, LocalSocket, ServeError, Tls},
};
use eniway_policy::model::Groups;
use futures_util::{StreamExt as _, stream};
use ipnet::Ipv4Net;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{self, MissedTickBehavior},
};

use self::{asks::Waiter, exclusive::is_exclusive, parent::Parent, policy::Policy};
use crate::{
    api::{self, Backing},
    attach::{self, AttachError, Target},
    attachment::Attachment,
    config::{self, Config, Metadata, Source, Xdp},
    detach,
    feature::{self, FeatureError, TcKind},
    grace::Grace,
    ipam::{IpamError, TlsFiles},
    kept::{Kept, KeptError},
    lock::{self, Lock, LockError},
    net,
    netlink::{self, NetlinkError},
    netns::NetnsError,
    nic::{Nic, NicError},
    object::{self, Constants, ObjectError, program},
    pin::{Hook, PinError, Pins},
    reconcile::{self, Plan},
    source::{
        Desired, Pod, Snapshot, State,
        allocator::{AllocatorSource, Change, Told},
        file::{self, FileSource, SourceError},
    },
    status::{PodStatus, Status, StatusError},
    tables::{GRACE, Index, Live, Maps, Tables, TablesError, is_older},
    wiring::{self, PodSpec, WiringError},
};

/// The cloud's metadata service.
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// How often the agent looks at the file and at what rests in the tables.
const TICK: Duration = Duration::from_secs(1);
/// Ticks between looks at interfaces and addresses, and between attempts at what failed.
const CHECK_TICKS: u64 = 3;
/// Ticks between looks at the node's settings, which other programs (networkd among them) may undo.
const SETTINGS_TICKS: u64 = 15;
/// Writers that do not rename write in several steps.
const SETTLE: Duration = Duration::from_millis(30);
/// How long a single run waits for the allocator.
const FIRST_WORD: Duration = Duration::from_secs(10);
/// So many pods are wired at once: most of the time goes by in their namespaces, on threads of their own.
const WIRED_AT_ONCE: usize = 8;
/// Writing the status may take this share of the time: with thousands of pods it takes longer than most changes do.
const STATUS_SHARE: u32 = 20;

/// Why the agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The process may not do it, or the kernel cannot.
    #[error(transparent)]
    Feature(#[from] FeatureError),
    /// Another agent runs.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A parent ENI does not exist.
    #[error(
        "parent ENI {interface} does not exist in this network namespace: correct `interface` of its [[parent]], or \
         attach it to the node first"
    )]
    NoParent {
        /// The interface.
        interface: String,
    },
    /// The first document is bad, and nothing runs yet that needs an agent.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The allocator cannot be asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The allocator in this process.
    #[error(transparent)]
    Ipam(#[from] IpamError),
    /// The BPF file system.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A pod's namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The programs.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// The tables.
    #[error(transparent)]
    Tables(#[from] TablesError),
    /// Attaching.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Wiring.
    #[error(transparent)]
    Wiring(#[from] WiringError),
    /// The node's addresses.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The status file.
    #[error(transparent)]
    Status(#[from] StatusError),
    /// A pod's own ENI.
    #[error(transparent)]
    Nic(Box<NicError>),
    /// What is kept between two agents.
    #[error(transparent)]
    Kept(#[from] KeptError),
    /// The socket for the CNI plugin.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// Signals.
    #[error("cannot wait for signals: {0}")]
    Signal(io::Error),
    /// A single run did not reach everything that the source asks for.
    #[error("not everything is as the source says: {}", problems.join("; "))]
    Incomplete {
        /// What is not.
        problems: Vec<String>,
    },
    /// Nothing waits for confirmation.
    #[error("no snapshot is held back, so there is nothing to confirm")]
    NothingHeld,
    /// A confirmation cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Confirm {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

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
    let mut agent = Agent::start(config, until).await?;
    if until == Until::Applied {
        return agent.completeness();
    }
    let socket = LocalSocket::bind(&agent.config.run_dir.join(eniway_agent_api::SOCKET))?;
    let (server, mut asks) = api::serve(socket, agent.source.backing(), &agent.config.node);
    let mut ticks = time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // What is new goes to the status file once that is due, after everybody who waits for an answer has it.
    let mut report_due = None;
    loop {
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
            Some(ask) = asks.recv() => agent.ask(ask).await,
            () = sleep_until(report_due) => {
                agent.report();
                report_due = None;
                continue;
            }
        }
        agent.answer_waiters();
        report_due.get_or_insert(agent.next_report);
    }
    // With the socket's file gone, the plugin says at once that the agent is away.
    server.abort();
    let _ = server.await;
    agent.report();
    log::info!("stopped; {} pods keep their network", agent.tables.pods().count());
    Ok(())
}

/// Lets the snapshot that is held back take effect. Returns what was confirmed.
///
/// # Errors
///
/// When nothing is held back.
pub fn confirm(config: &Config) -> Result<String, AgentError> {
    let status = Status::read(&config.run_dir)?;
    let (Some(id), Some(why)) = (status.held_back_id, status.held_back) else {
        return Err(AgentError::NothingHeld);
    };
    let path = confirmation(&config.run_dir);
    fs::write(&path, id).map_err(|source| AgentError::Confirm { path, source })?;
    Ok(why)
}

fn confirmation(run_dir: &Path) -> PathBuf {
    run_dir.join("confirm")
}

async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}

/// A snapshot that waits for confirmation.
struct Held {
    id: String,
    desired: Rc<Desired>,
    /// What the file said, if it is of one.
    document: Option<Snapshot>,
    /// The revision at which it came to say what it says.
    told: u64,
}

/// What tells the agent what should be.
enum Feed {
    File(FileSource),
    Allocator(AllocatorSource),
}

impl Feed {
    async fn open(config: &Config) -> Result<Self, AgentError> {
        let parents = || config.parents.iter().map(|parent| parent.interface.to_string()).collect();
        Ok(match &config.source {
            Source::File { path, .. } => Self::File(FileSource::new(path)),
            Source::Grpc { address, ca, cert, key } => {
                let tls = tls(ca.as_ref(), cert.as_ref(), key.as_ref())?;
                Self::Allocator(AllocatorSource::connect(address, tls.as_ref(), &config.node, parents())?)
            }
            Source::Embedded { config: path } => {
                Self::Allocator(AllocatorSource::embed(path, &config.node, parents()).await?)
            }
        })
    }

    /// Where interfaces for new pods come from.
    fn backing(&self) -> Backing {
        match self {
            Self::File(_) => Backing::File,
            Self::Allocator(allocator) => Backing::Allocator(allocator.allocator()),
        }
    }

    /// What the allocator tells, or none as a hint that the file may be another one.
    async fn next(&mut self) -> Option<Told> {
        match self {
            Self::File(file) => {
                file.hint().await;
                None
            }
            Self::Allocator(allocator) => Some(allocator.next().await),
        }
    }
}

fn tls(
    ca: Option<&PathBuf>,
    cert: Option<&PathBuf>,
    key: Option<&PathBuf>,
) -> Result<Option<Tls>, IpamError> {
    let (Some(ca), Some(cert), Some(key)) = (ca, cert, key) else { return Ok(None) };
    Ok(Some(TlsFiles { ca: ca.clone(), cert: cert.clone(), key: key.clone() }.read()?))
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
    /// The status file is not written before this.
    next_report: Instant,
    _locks: [Lock; 2],
}

impl Agent {
    async fn start(config: Config, until: Until) -> Result<Self, AgentError> {
        // Nothing is changed until all of this stands.
        feature::check_privileges()?;
        let run_lock = lock::lock_run_dir(&config.run_dir)?;
        let kind = feature::probe()?;
        parent::ifindexes(&config)?;
        let pins = Pins::new(&config.pin_dir);
        let fresh = !pins.map(maps::ENDPOINT).exists();
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
        let pin_lock = lock::lock_pins(&pins.version_dir())?;
        pins.check_layouts(&config.limits)?;
        let locks = [run_lock, pin_lock];

        let grace = Rc::new(Grace::new(&config.run_dir));
        let short = grace.expedite();
        let started = Self::attach(config, kind, Rc::clone(&grace), pins.clone(), addresses, source, locks);
        let mut agent = started.inspect_err(|_| {
            // Where nothing was, nothing is left.
            if fresh && let Err(error) = pins.remove_all() {
                log::error!("{error}");
            }
        })?;
        drop(short);
        agent.take(first).await;
        if until == Until::Applied {
            agent.hear_first().await;
        }
        agent.report();
        Ok(agent)
    }

    /// A single run ends with the allocator's first snapshot, or without one.
    async fn hear_first(&mut self) {
        let end = Instant::now() + FIRST_WORD;
        while self.desired.is_none() && self.held.is_none() {
            let Feed::Allocator(allocator) = &mut self.source else { return };
            match allocator.next_within(end.saturating_duration_since(Instant::now())).await {
                Some(told) => self.hear(told).await,
                None if self.status.source_error.is_some() => return,
                None => return self.source_is_away("the allocator gives no snapshot".to_owned()),
            }
        }
    }

    /// Loads the programs, takes over what the tables hold, and attaches.
    fn attach(
        config: Config,
        kind: TcKind,
        grace: Rc<Grace>,
        pins: Pins,
        addresses: Vec<IpAddr>,
        source: Feed,
        locks: [Lock; 2],
    ) -> Result<Self, AgentError> {
        let ifindexes = parent::ifindexes(&config)?;

        // The kernel's verifier passes everything before anything is attached.
        let constants = Constants { fast_path: config.fast_path, parent: 0, xdp: Xdp::Off };
        let mut pods = object::open(constants, &config.limits, Some(&pins))?;
        object::tc(&mut pods, program::POD_EGRESS)?;
        object::tc(&mut pods, program::POD_INGRESS)?;
        object::tc(&mut pods, program::NIC_INGRESS)?;
        object::tc(&mut pods, program::NIC_EGRESS)?;
        let mut tables = Tables::new(Maps::open(&pins)?)?;
        let indexes = parent::numbers(&ifindexes, tables.pods());
        let parents = config
            .parents
            .iter()
            .zip(ifindexes.iter().zip(indexes))
            .map(|(parent, (ifindex, index))| Parent::load(&config, parent, *ifindex, index, &pins))
            .collect::<Result<Vec<_>, _>>()?;

        let swept = tables.sweep()?;
        if swept > 0 {
            log::warn!("removed {swept} indexes that an interrupted change had left");
        }
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
            next_report: Instant::now(),
            _locks: locks,
        };
        agent.sync_host_dst()?;
        agent.attach_parents()?;
        agent.attach_known_pods();
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

    /// Pods that an earlier agent programmed get the programs of this one, whatever the source says or does not say.
    fn attach_known_pods(&mut self) {
        let known: Vec<Live> = self.tables.pods().copied().collect();
        for pod in known {
            let ifindex = pod.record.ifindex;
            let attached = if is_exclusive(&pod.record) {
                self.attach_nic(pod.record.owner, ifindex)
            } else {
                let Some(interface) = net::ifname(ifindex) else { continue };
                self.attach_pod(&interface, ifindex)
            };
            if let Err(error) = attached {
                log::error!("{error}");
            }
        }
    }

    fn attach_pod(&mut self, interface: &str, ifindex: u32) -> Result<(), AgentError> {
        let grace = Rc::clone(&self.grace);
        let _short = grace.expedite();
        let target = Target { interface, ifindex };
        for (name, hook) in [(program::POD_EGRESS, Hook::In), (program::POD_INGRESS, Hook::Out)] {
            let program = object::tc(&mut self.pods, name)?;
            attach::attach_tc(self.kind, program, name, target, hook, &self.pins.pod_tc(ifindex, hook))?;
        }
        Ok(())
    }

    fn detach_pod(&self, ifindex: u32) -> Result<(), AttachError> {
        let interface = net::ifname(ifindex);
        for (name, hook) in [(program::POD_EGRESS, Hook::In), (program::POD_INGRESS, Hook::Out)] {
            let pin = self.pins.pod_tc(ifindex, hook);
            attach::detach_tc(&self.pins, self.kind, name, interface.as_deref(), hook, &pin)?;
        }
        Ok(())
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
            let Self { parents, pins, kind, .. } = self;
            let mut moved = false;
            for parent in parents {
                moved |= parent.follow(pins, *kind);
            }
            if moved || !self.faults.is_empty() || self.policy.fault.is_some() || self.lost_pods() {
                self.reconcile(None).await;
                self.acknowledge();
            }
        }
        if self.ticks.is_multiple_of(SETTINGS_TICKS) {
            if let Some(desired) = self.desired.clone() {
                self.prepare_parents(&desired).await;
            }
            let Self { parents, pins, .. } = self;
            parents.iter_mut().for_each(|parent| parent.recheck_xdp(pins));
        }
    }

    /// Reads the file, if that is the source and says something new.
    async fn look(&mut self) {
        let Feed::File(file) = &mut self.source else { return };
        let next = read_snapshot(file, &self.config);
        self.take(next).await;
    }

    /// Takes in what the allocator says, and answers.
    async fn hear(&mut self, told: Told) {
        let confirmed = match told {
            Told::Away(error) => return self.source_is_away(error),
            Told::Snapshot { mut desired, confirmed } => {
                self.source_is_well();
                desired.adjust(|pod| self.adjust(pod));
                self.offer(Rc::new(desired)).await;
                confirmed
            }
            Told::Changes { revision, confirmed, groups, changes } => {
                self.source_is_well();
                self.change(revision, groups, changes).await;
                confirmed
            }
        };
        // 0: nobody has confirmed anything. An allocator that begins anew begins at 0 too.
        if let Some(held) = self.held.take_if(|held| confirmed > 0 && held.told <= confirmed) {
            log::info!("confirmed at the allocator");
            self.apply(held.desired).await;
        }
        self.acknowledge();
    }

    /// Tells the allocator how far the kernel has come. While a snapshot is held back, it has not.
    fn acknowledge(&self) {
        if self.policy.fault.is_some() {
            return;
        }
        let (Feed::Allocator(allocator), None, Some(desired)) = (&self.source, &self.held, &self.desired)
        else {
            return;
        };
        let refused = |uid: &str, container_id: &str, reason: &str| RefusedByAgent {
            key: PodKey { uid: uid.to_owned(), container_id: container_id.to_owned() },
            reason: reason.to_owned(),
        };
        let faults = self.faults.iter().filter_map(|(owner, fault)| {
            let pod = desired.pod(*owner)?;
            Some(refused(&pod.uid, &pod.container_id, fault))
        });
        let unusable = desired
            .refused
            .values()
            .map(|unusable| refused(&unusable.uid, &unusable.container_id, &unusable.reason));
        allocator.acknowledge(desired.revision, faults.chain(unusable).collect());
    }

    /// Applies changes to what is in force; to what is held back, which then is judged anew, if something is.
    async fn change(&mut self, revision: u64, groups: Option<Groups>, changes: Vec<Change>) {
        if changes.is_empty()
            && groups.is_none()
            && let Some(held) = &mut self.held
        {
            Rc::make_mut(&mut held.desired).revision = revision;
            return;
        }
        let held = self.held.take().map(|held| held.desired);
        let is_held = held.is_some();
        // Changes are of something that was told before.
        let Some(mut desired) = held.or_else(|| self.desired.take()) else { return };
        let mut touched = BTreeSet::new();
        let mut freed = false;
        let regrouped = groups.is_some();
        {
            let desired = Rc::make_mut(&mut desired);
            desired.revision = revision;
            if let Some(groups) = groups {
                desired.groups = groups;
            }
            for change in changes {
                match change {
                    Change::Put(mut pod) => {
                        self.adjust(&mut pod);
                        touched.insert(pod.owner());
                        freed |= !pod.is_wanted();
                        desired.put(*pod);
                    }
                    Change::Refused(owner, refused) => {
                        log::error!("pod {}: {}", refused.name, refused.reason);
                        touched.insert(owner);
                        desired.refuse(owner, refused);
                    }
                    Change::Gone { owner, generation } => {
                        if desired.pod(owner).is_some_and(|pod| is_older(generation, pod.generation)) {
                            continue;
                        }
                        touched.insert(owner);
                        freed = true;
                        desired.remove(owner);
                    }
                }
            }
        }
        if is_held {
            return self.offer(desired).await;
        }
        self.desired = Some(desired);
        self.status.revision = Some(revision);
        if regrouped || !touched.is_empty() {
            if freed {
                // What others wait for may be free now.
                touched.extend(self.faults.keys());
            }
            self.widen(&mut touched);
            self.reconcile(Some(&touched)).await;
        }
    }

    /// Adds those who have what others among the owners ask for: decisions over them are then the same as over all.
    fn widen(&self, owners: &mut BTreeSet<u64>) {
        let Some(desired) = &self.desired else { return };
        let mut open: Vec<u64> = owners.iter().copied().collect();
        while !open.is_empty() {
            let scope: BTreeSet<u64> = open.drain(..).collect();
            for record in self.wanted(desired, Some(&scope)).values() {
                for index in Index::of(record).filter(|index| !matches!(index, Index::Interface(_))) {
                    match self.tables.holder(index) {
                        Ok(Some(holder)) => {
                            if owners.insert(holder.record.owner) {
                                open.push(holder.record.owner);
                            }
                        }
                        Ok(None) => {}
                        Err(error) => log::error!("{error}"),
                    }
                }
            }
        }
    }

    async fn take(&mut self, next: Result<Option<Snapshot>, SourceError>) {
        match next {
            Ok(None) => {
                if self.unreadable {
                    self.source_is_well();
                }
            }
            Ok(Some(snapshot)) => {
                self.source_is_well();
                let desired = self.with_attachments(snapshot.clone());
                let before = self.document.replace(snapshot);
                self.offer(Rc::new(desired)).await;
                if let Some(held) = &mut self.held {
                    held.document = std::mem::replace(&mut self.document, before);
                }
            }
            Err(error) => {
                self.unreadable = matches!(error, SourceError::Read { .. });
                self.source_is_away(error.to_string());
            }
        }
    }

    fn source_is_away(&mut self, error: String) {
        if self.status.source_error.as_ref() != Some(&error) {
            log::error!("{error}");
        }
        self.status.source_error = Some(error);
        self.status.source_down_since.get_or_insert_with(unix_seconds);
    }

    fn source_is_well(&mut self) {
        if self.status.source_error.take().is_some() {
            log::info!("the source is well again");
        }
        self.status.source_down_since = None;
        self.unreadable = false;
    }

    /// Lets a snapshot take effect, unless it would take away most of the node's pods.
    async fn offer(&mut self, desired: Rc<Desired>) {
        // An allocator that has lost its memory says the same again each time it is asked.
        let confirm_removals = match self.config.source {
            Source::File { confirm_removals, .. } => confirm_removals,
            Source::Grpc { .. } | Source::Embedded { .. } => true,
        };
        let removals = self.plan(&desired, None, &BTreeSet::new()).release.len();
        let live = self.tables.pods().count();
        let id = format!("{:016x}", desired.fingerprint());
        let again = !confirm_removals && self.held.as_ref().is_some_and(|held| held.id == id);
        if reconcile::is_bulk(removals, live) && !again {
            let why = format!(
                "the snapshot of revision {} would remove {removals} of {live} pods",
                desired.revision
            );
            let again = match self.config.source {
                Source::File { confirm_removals: false, .. } => {
                    " or write the same document again".to_owned()
                }
                Source::File { .. } => String::new(),
                Source::Grpc { .. } | Source::Embedded { .. } => {
                    format!(" or `eniway ipam confirm {}`", self.config.node)
                }
            };
            log::warn!("held back: {why}; run `eniway confirm`{again} to let it");
            self.status.held_back = Some(why);
            self.status.held_back_id = Some(id.clone());
            let told = desired.revision;
            self.held = Some(Held { id, desired, document: None, told });
            return;
        }
        self.apply(desired).await;
    }

    async fn apply(&mut self, desired: Rc<Desired>) {
        self.held = None;
        self.status.held_back = None;
        self.status.held_back_id = None;
        self.status.revision = Some(desired.revision);
        for refused in desired.refused.values() {
            log::error!("pod {}: {}", refused.name, refused.reason);
        }
        self.desired = Some(desired);
        self.reconcile(None).await;
    }

    async fn look_for_confirmation(&mut self) {
        let path = confirmation(&self.config.run_dir);
        let Ok(id) = fs::read_to_string(&path) else { return };
        let _ = fs::remove_file(&path);
        match self.held.take_if(|held| held.id == id.trim()) {
            Some(held) => {
                log::info!("confirmed by the operator");
                let desired = match held.document {
                    Some(document) => {
                        self.document = Some(document.clone());
                        Rc::new(self.with_attachments(document))
                    }
                    None => held.desired,
                };
                self.apply(desired).await;
                self.acknowledge();
            }
            None => log::warn!("a confirmation came for a snapshot that is not held back any more"),
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

    /// Takes a pod away: first no packet finds it, then its interface goes.
    async fn release(&mut self, owner: u64) -> Result<(), AgentError> {
        let Some(live) = self.tables.release(owner)? else { return Ok(()) };
        self.wired.remove(&owner);
        self.closed.remove(&owner);
        if is_exclusive(&live.record) {
            self.take_nic_back(owner).await?;
            return Ok(self.detach_pod(live.record.ifindex)?);
        }
        self.take_down(live.record.ifindex).await
    }

    /// Removes a veth that the agent made, and only then its programs: without them it would be open to the host's
    /// stack.
    async fn take_down(&self, ifindex: u32) -> Result<(), AgentError> {
        let _short = self.grace.expedite();
        if let Some(interface) = net::ifname(ifindex)
            && let Err(error) = wiring::unwire(&interface).await
        {
            log::error!("{error}");
        }
        Ok(self.detach_pod(ifindex)?)
    }

    /// Wires pods, several at a time; answers with those that cannot be.
    async fn wire_all(&mut self, owners: &[u64], pods: &BTreeMap<u64, &Pod>) -> Vec<(u64, AgentError)> {
        let mut failed = Vec::new();
        let mut specs = Vec::new();
        for owner in owners {
            let pod = pods[owner];
            if pod.is_exclusive() {
                if let Err(error) = self.wire_nic(*owner, pod).await {
                    failed.push((*owner, error));
                }
            } else if !self.is_wired(*owner, pod) {
                self.wired.remove(owner);
                specs.push((*owner, pod_spec(pod)));
            }
        }
        let wiring = specs.into_iter().map(|(owner, spec)| async move { (owner, wiring::wire(&spec).await) });
        let mut wiring = stream::iter(wiring).buffer_unordered(WIRED_AT_ONCE);
        while let Some((owner, wired)) = wiring.next().await {
            match wired {
                Ok(wired) => {
                    log::debug!("pod {} is wired by {}", pods[&owner].full_name(), wired.host_interface);
                    self.wired.insert(owner, wired.host_interface);
                    self.closed.insert(owner);
                }
                Err(error) => failed.push((owner, error.into())),
            }
        }
        failed
    }

    /// Whether a pod was found wired since the start, and its interface is still there.
    fn is_wired(&self, owner: u64, pod: &Pod) -> bool {
        let record = self.tables.pod(owner).map(|live| live.record);
        matches!((record, self.wired.get(&owner)), (Some(record), Some(interface))
            if net::ifindex(interface) == Some(record.ifindex)
                && record.mtu == pod.mtu
                && record.mac == pod.mac.0
                && record.gateway_mac == pod.gateway_mac.0
                && record.ipv4 == pod.ipv4.octets()
                && record.gateway_ipv4 == pod.gateway.octets()
                && pod.host_interface.as_ref().is_none_or(|named| named.as_str() == interface))
    }

    /// Attaches the programs of a wired pod, writes its record, and lets it speak. Returns how much changed.
    async fn program(
        &mut self,
        pod: &Pod,
        record: &Endpoint,
        moving: &BTreeSet<u64>,
    ) -> Result<usize, AgentError> {
        if pod.is_exclusive() {
            return self.program_nic(record, moving);
        }
        let owner = record.owner;
        // Wired a moment ago, or it would be stuck; if it went away since, the next check finds it.
        let Some(interface) = self.wired.get(&owner).cloned() else { return Ok(0) };
        let Some(ifindex) = net::ifindex(&interface) else { return Ok(0) };
        let record = Endpoint { ifindex, ..*record };
        let before = self.tables.pod(owner).copied();
        let moved = before.is_none_or(|live| live.record.ifindex != ifindex);
        if (moved || !self.is_attached(ifindex))
            && let Err(error) = self.attach_pod(&interface, ifindex)
        {
            // Without its programs the interface would be open to the host's stack.
            if before.is_none() {
                self.wired.remove(&owner);
                wiring::unwire(&interface).await?;
            }
            return Err(error);
        }
        let among = |owner| moving.contains(&owner);
        let put = match self.tables.put_among(&record, &among) {
            Err(TablesError::Resting) => {
                time::sleep(GRACE).await;
                self.tables.put_among(&record, &among)?
            }
            result => result?,
        };
        if let Some(before) = before.filter(|live| live.record.ifindex != ifindex) {
            self.detach_pod(before.record.ifindex)?;
        }
        if self.closed.contains(&owner) {
            wiring::open(&pod_spec(pod), &interface).await?;
            self.closed.remove(&owner);
        }
        Ok(put.changes)
    }

    fn is_attached(&self, ifindex: u32) -> bool {
        self.kind == TcKind::Clsact
            || [Hook::In, Hook::Out].iter().all(|hook| self.pins.pod_tc(ifindex, *hook).exists())
    }

    /// Whether a pod's interface went away, or its programs.
    fn lost_pods(&self) -> bool {
        self.tables.pods().any(|pod| {
            let ifindex = pod.record.ifindex;
            let gone = match is_exclusive(&pod.record) {
                true => !self.is_alive(ifindex),
                false => net::ifname(ifindex).is_none(),
            };
            gone || !self.is_attached(ifindex)
        })
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
        for parent in &mut self.parents {
            parent.prepare(desired).await;
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

    /// Writes the status file, if it would say something new.
    fn report(&mut self) {
        let began = Instant::now();
        self.status.parents = self.parents.iter().map(|parent| parent.status(self.kind)).collect();
        self.status.node_changes =
            self.parents.iter().flat_map(|parent| parent.changes.iter().cloned()).collect();
        if let Some(desired) = self.desired.clone() {
            let mut active: Vec<_> = desired.pods().filter(|(_, pod)| pod.state == State::Active).collect();
            active.sort_by_key(|(owner, _)| desired.place(*owner));
            self.status.pods = active.into_iter().map(|(owner, pod)| self.pod_status(owner, pod)).collect();
            self.status.refused =
                desired.refused.values().map(|pod| format!("{}: {}", pod.name, pod.reason)).collect();
        }
        if let Some(desired) = self.desired.clone() {
            self.report_policy(&desired);
        }
        if self.written.as_ref() != Some(&self.status) {
            match self.status.write(&self.config.run_dir) {
                Ok(()) => self.written = Some(self.status.clone()),
                Err(error) => log::error!("{error}"),
            }
        }
        self.next_report = Instant::now() + began.elapsed() * STATUS_SHARE;
    }

    fn host_interface_of(&self, owner: u64) -> Option<String> {
        let record = self.tables.pod(owner)?.record;
        if is_exclusive(&record) { None } else { net::ifname(record.ifindex) }
    }

    fn pod_status(&self, owner: u64, pod: &Pod) -> PodStatus {
        let live = self.tables.pod(owner);
        let host_interface = self
            .wired
            .get(&owner)
            .cloned()
            .or_else(|| self.host_interface_of(owner))
            .or_else(|| pod.host_interface.as_ref().map(ToString::to_string));
        let waiting = pod.is_waiting().then(|| "waits for the runtime to bring its sandbox".to_owned());
        let lacks_vlan = pod.vlan.is_none() && !pod.is_exclusive();
        let unattached = lacks_vlan.then(|| "the source gives no VLAN id yet".to_owned()).or(waiting);
        PodStatus {
            uid: pod.uid.clone(),
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            container_id: pod.container_id.clone(),
            netns: pod.netns.as_ref().map(|path| path.display().to_string()),
            interface: pod.interface.to_string(),
            host_interface,
            id: live.map(|live| live.record.id),
            slot: live.map(|live| live.slot),
            parent: pod.parent.as_ref().map(ToString::to_string).unwrap_or_default(),
            vlan: pod.vlan.map_or(0, net::VlanId::get),
            mac: pod.mac,
            ipv4: pod.ipv4,
            generation: pod.generation,
            error: self.faults.get(&owner).cloned().or(unattached),
        }
    }

    /// Whether everything is as the source says.
    fn completeness(&self) -> Result<(), AgentError> {
        let faults =
            self.status.pods.iter().filter_map(|pod| {
                Some(format!("pod {}/{}: {}", pod.namespace, pod.name, pod.error.as_ref()?))
            });
        let notes = self.parents.iter().filter_map(|parent| parent.settings_note.clone());
        let whole = [&self.status.source_error, &self.status.held_back];
        let refused = self.status.refused.iter().map(|refused| format!("pod {refused}"));
        let problems: Vec<_> =
            whole.into_iter().flatten().cloned().chain(notes).chain(faults).chain(refused).collect();
        if problems.is_empty() { Ok(()) } else { Err(AgentError::Incomplete { problems }) }
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

fn read_snapshot(source: &mut FileSource, config: &Config) -> Result<Option<Snapshot>, SourceError> {
    let Some(text) = source.read()? else { return Ok(None) };
    let parents: Vec<&str> = config.parents.iter().map(|parent| parent.interface.as_str()).collect();
    let document = |problem| SourceError::Document { path: source.path().to_owned(), problem };
    file::parse(&text, &parents).map(Some).map_err(document)
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
    let own = own.map(|address| (address, host_dst::HOST));
    let services = host.prefixes.iter().map(|prefix| (*prefix, host_dst::HOST | host_dst::SERVICE));
    let mut all: BTreeMap<Ipv4Net, u32> = own.chain(services).collect();
    match host.metadata {
        Metadata::Deny => all.insert(METADATA.into(), host_dst::DENY),
        Metadata::Host => all.insert(METADATA.into(), host_dst::HOST),
        // A flag of nothing hides a wider prefix that holds the address.
        Metadata::Wire => all.insert(METADATA.into(), 0),
    };
    all
}

/// How a pod is wired.
pub(crate) fn pod_spec(pod: &Pod) -> PodSpec {
    PodSpec {
        owner_key: pod.container_id.clone(),
        netns: pod.netns.clone(),
        interface: pod.interface.to_string(),
        host_interface: pod.host_interface.as_ref().map(ToString::to_string),
        mac: pod.mac.0,
        ipv4: pod.ipv4,
        subnet: pod.subnet,
        gateway: pod.gateway,
        gateway_mac: pod.gateway_mac.0,
        mtu: pod.mtu,
        parent: pod.parent.as_ref().map(ToString::to_string).unwrap_or_default(),
        extras: pod.extras.clone(),
    }
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
        for (metadata, flags) in
            [(Metadata::Deny, host_dst::DENY), (Metadata::Host, host_dst::HOST), (Metadata::Wire, 0)]
        {
            let host = config::Host { prefixes: prefixes.clone(), metadata };
            let expected: BTreeMap<Ipv4Net, u32> = [
                ("10.1.0.167/32", host_dst::HOST),
                ("10.247.0.0/16", host_dst::HOST | host_dst::SERVICE),
                ("169.254.169.254/32", flags),
            ]
            .into_iter()
            .map(|(net, flags)| (net.parse().unwrap(), flags))
            .collect();
            assert_eq!(host_dsts(&host, &addresses), expected);
        }
    }
}

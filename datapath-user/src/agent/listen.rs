//! What the source says, and when it takes effect.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant},
};

use eniway_ipam::{PodKey, api::RefusedByAgent, rpc::Tls};
use eniway_policy::model::Groups;

use super::{Agent, AgentError, unix_seconds};
use crate::{
    api::Backing,
    config::{Config, Source},
    ipam::{IpamError, TlsFiles},
    reconcile,
    source::{
        Desired, Snapshot,
        allocator::{AllocatorSource, Change, Told},
        file::{self, FileSource, SourceError},
    },
    status::Status,
    tables::{Index, is_older},
};

/// How long a single run waits for the allocator.
const FIRST_WORD: Duration = Duration::from_secs(10);

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

/// A snapshot that waits for confirmation.
pub(super) struct Held {
    pub(super) id: String,
    pub(super) desired: Rc<Desired>,
    /// What the file said, if it is of one.
    pub(super) document: Option<Snapshot>,
    /// The revision at which it came to say what it says.
    pub(super) told: u64,
}

/// What tells the agent what should be.
pub(super) enum Feed {
    File(FileSource),
    Allocator(AllocatorSource),
}

impl Feed {
    pub(super) async fn open(config: &Config) -> Result<Self, AgentError> {
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
    pub(super) fn backing(&self) -> Backing {
        match self {
            Self::File(_) => Backing::File,
            Self::Allocator(allocator) => Backing::Allocator(allocator.allocator()),
        }
    }

    /// What the allocator tells, or none as a hint that the file may be another one.
    pub(super) async fn next(&mut self) -> Option<Told> {
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

impl Agent {
    /// Reads the file, if that is the source and says something new.
    pub(super) async fn look(&mut self) {
        let Feed::File(file) = &mut self.source else { return };
        let next = read_snapshot(file, &self.config);
        self.take(next).await;
    }

    /// Takes in what the allocator says, and answers.
    pub(super) async fn hear(&mut self, told: Told) {
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

    /// A single run ends with the allocator's first snapshot, or without one.
    pub(super) async fn hear_first(&mut self) {
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

    /// Tells the allocator how far the kernel has come. While a snapshot is held back, it has not.
    pub(super) fn acknowledge(&self) {
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
    pub(super) async fn change(&mut self, revision: u64, groups: Option<Groups>, changes: Vec<Change>) {
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
    pub(super) fn widen(&self, owners: &mut BTreeSet<u64>) {
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

    pub(super) async fn take(&mut self, next: Result<Option<Snapshot>, SourceError>) {
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

    pub(super) fn source_is_away(&mut self, error: String) {
        if self.status.source_error.as_ref() != Some(&error) {
            log::error!("{error}");
        }
        self.status.source_error = Some(error);
        self.status.source_down_since.get_or_insert_with(unix_seconds);
    }

    pub(super) fn source_is_well(&mut self) {
        if self.status.source_error.take().is_some() {
            log::info!("the source is well again");
        }
        self.status.source_down_since = None;
        self.unreadable = false;
    }

    /// Lets a snapshot take effect, unless it would take away most of the node's pods.
    pub(super) async fn offer(&mut self, desired: Rc<Desired>) {
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

    pub(super) async fn apply(&mut self, desired: Rc<Desired>) {
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

    pub(super) async fn look_for_confirmation(&mut self) {
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
}

pub(super) fn read_snapshot(
    source: &mut FileSource,
    config: &Config,
) -> Result<Option<Snapshot>, SourceError> {
    let Some(text) = source.read()? else { return Ok(None) };
    let parents: Vec<&str> = config.parents.iter().map(|parent| parent.interface.as_str()).collect();
    let document = |problem| SourceError::Document { path: source.path().to_owned(), problem };
    file::parse(&text, &parents).map(Some).map_err(document)
}

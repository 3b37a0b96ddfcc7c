//! What each node's agent is told: the allocations of its node, in the order of the store's revisions, and the security groups.
//!
//! A watcher holds nothing but a position. It is given what happened since, or everything when too much has happened.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use eniway_policy::model::Groups;
use tokio::sync::watch;

use crate::{api::Allocation, model::PodKey, store::Revision};

/// How many changes of one node are kept for watchers that fall behind.
const KEPT: usize = 4096;

/// How far a watcher has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// The store's id.
    pub store: String,
    /// The revision in it that was seen last.
    pub revision: Revision,
}

/// One change of a node's allocations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllocationChange {
    /// An allocation is there or has changed.
    Put(Arc<Allocation>),
    /// An allocation has ended.
    Removed {
        /// Which.
        key: PodKey,
        /// Its generation: a removal must not take away a newer one.
        generation: Revision,
    },
}

/// What a watcher is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// All allocations of the node. To be compared with what is there, never to be put in place of it.
    Snapshot {
        /// The revision this shows.
        revision: Revision,
        /// Up to which revision an operator has confirmed removals, however many.
        confirmed: Revision,
        /// The security groups.
        groups: Arc<Groups>,
        /// The allocations.
        allocations: Vec<Arc<Allocation>>,
    },
    /// What has changed since the last notice.
    Changes {
        /// The revision of the last change.
        revision: Revision,
        /// Up to which revision an operator has confirmed removals.
        confirmed: Revision,
        /// The security groups, if they have changed: what comes with them or later may need them.
        groups: Option<Arc<Groups>>,
        /// The changes in their order.
        changes: Vec<AllocationChange>,
    },
}

/// The allocations by node, and their history.
#[derive(Default)]
pub(crate) struct Feed(Mutex<Feeds>);

/// The feed under its lock: held while a batch of revisions is taken in, so that no watcher sees half of one.
#[derive(Default)]
pub(crate) struct Feeds {
    nodes: HashMap<String, NodeFeed>,
    /// On which node each interface carries an allocation.
    carriers: HashMap<String, String>,
    /// Where the history of nodes without any begins.
    start: Revision,
    /// The security groups, which are the same for all nodes, and the revision at which they came to be so.
    groups: (Revision, Arc<Groups>),
}

struct NodeFeed {
    allocations: BTreeMap<String, Arc<Allocation>>,
    history: VecDeque<(Revision, AllocationChange)>,
    /// Everything after this revision is in the history.
    complete_after: Revision,
    confirmed: Revision,
    /// The revision of the last change; moves also when only `confirmed` does.
    last: watch::Sender<Revision>,
}

impl NodeFeed {
    fn new(start: Revision, last: Revision) -> Self {
        Self {
            allocations: BTreeMap::new(),
            history: VecDeque::new(),
            complete_after: start,
            confirmed: 0,
            last: watch::Sender::new(last),
        }
    }

    fn record(&mut self, revision: Revision, change: AllocationChange) {
        self.history.push_back((revision, change));
        while self.history.len() > KEPT {
            if let Some((dropped, _)) = self.history.pop_front() {
                self.complete_after = dropped;
            }
        }
        self.last.send_replace(revision);
    }
}

impl Feeds {
    /// History begins after this revision.
    pub(crate) fn begin(&mut self, revision: Revision) {
        self.start = revision;
        for node in self.nodes.values_mut() {
            node.complete_after = revision;
            node.history.clear();
            node.last.send_replace(revision);
        }
    }

    /// An interface changed: which allocation it carries now.
    pub(crate) fn update(&mut self, revision: Revision, interface: &str, now: Option<Arc<Allocation>>) {
        if let Some(node) = self.carriers.get(interface)
            && let Some(feed) = self.nodes.get_mut(node)
            && let Some(old) = feed.allocations.get(interface)
        {
            let continues = now.as_ref().is_some_and(|new| new.key == old.key && new.node == old.node);
            if !continues {
                let removed = AllocationChange::Removed { key: old.key.clone(), generation: old.generation };
                feed.allocations.remove(interface);
                feed.record(revision, removed);
                self.carriers.remove(interface);
            }
        }
        if let Some(allocation) = now {
            self.carriers.insert(interface.to_owned(), allocation.node.clone());
            let feed = self.node(&allocation.node);
            if feed.allocations.get(interface) != Some(&allocation) {
                feed.allocations.insert(interface.to_owned(), allocation.clone());
                feed.record(revision, AllocationChange::Put(allocation));
            }
        }
    }

    /// The security groups have changed.
    pub(crate) fn regroup(&mut self, revision: Revision, groups: Arc<Groups>) {
        if self.groups.1 == groups {
            return;
        }
        self.groups = (revision, groups);
        for node in self.nodes.values() {
            node.last.send_replace(revision);
        }
    }

    /// The interfaces that carry an allocation.
    pub(crate) fn carriers(&self) -> impl Iterator<Item = &String> {
        self.carriers.keys()
    }

    /// An operator has confirmed what the node is told.
    pub(crate) fn confirm(&mut self, node: &str, revision: Revision, confirmed: Revision) {
        let feed = self.node(node);
        if confirmed > feed.confirmed {
            feed.confirmed = confirmed;
            feed.last.send_replace(revision);
        }
    }

    fn node(&mut self, name: &str) -> &mut NodeFeed {
        let (start, last) = (self.start, self.start.max(self.groups.0));
        self.nodes.entry(name.to_owned()).or_insert_with(|| NodeFeed::new(start, last))
    }
}

impl Feed {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Feeds> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends all watches.
    pub(crate) fn close(&self) {
        self.lock().nodes.clear();
    }

    /// A watcher that has seen everything up to `from`, or nothing.
    pub(crate) fn watch(self: &Arc<Self>, node: &str, from: Option<Revision>) -> Watch {
        let last = self.lock().node(node).last.subscribe();
        Watch { feed: self.clone(), node: node.to_owned(), seen: from, confirmed: None, last }
    }
}

/// A node's allocations as a stream of notices.
pub struct Watch {
    feed: Arc<Feed>,
    node: String,
    seen: Option<Revision>,
    confirmed: Option<Revision>,
    last: watch::Receiver<Revision>,
}

impl Watch {
    /// The next notice; waits until there is something to tell. None when the allocator has been closed.
    /// May be dropped and called again without losing anything.
    pub async fn next(&mut self) -> Option<Notice> {
        loop {
            self.last.mark_unchanged();
            if let Some(notice) = self.ready() {
                return Some(notice);
            }
            self.last.changed().await.ok()?;
        }
    }

    fn ready(&mut self) -> Option<Notice> {
        let feeds = self.feed.lock();
        let feed = feeds.nodes.get(&self.node)?;
        let last = *feed.last.borrow();
        let confirmed = feed.confirmed;
        // A position ahead of ours is from another store or a restored one: it says nothing about this history.
        let continues = self.seen.filter(|seen| (feed.complete_after..=last).contains(seen));
        let notice = match continues {
            None => Notice::Snapshot {
                revision: last,
                confirmed,
                groups: feeds.groups.1.clone(),
                allocations: feed.allocations.values().cloned().collect(),
            },
            Some(seen) => {
                let first = feed.history.partition_point(|(revision, _)| *revision <= seen);
                let groups = (feeds.groups.0 > seen).then(|| feeds.groups.1.clone());
                if first == feed.history.len()
                    && groups.is_none()
                    && self.confirmed.is_none_or(|known| known == confirmed)
                {
                    self.confirmed = Some(confirmed);
                    return None;
                }
                let changes = feed.history.range(first..).map(|(_, change)| change.clone()).collect();
                Notice::Changes { revision: last, confirmed, groups, changes }
            }
        };
        self.seen = Some(last);
        self.confirmed = Some(confirmed);
        Some(notice)
    }
}

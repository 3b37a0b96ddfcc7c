//! Where the allocator keeps its records: a small key-value store with revisions.
//!
//! Every successful transaction gets a revision of its own, one above the last; every key remembers the revision
//! of its last change. A transaction states for each key it cares about at which revision it last saw that key, and
//! takes effect as a whole or not at all. That is the only way anything changes, so any number of allocators may
//! share one store.

mod embedded;
mod etcd;

use async_trait::async_trait;

pub use embedded::EmbeddedStore;
pub use etcd::{EtcdSettings, EtcdStore, EtcdTls};

/// Counts the changes of a store. 0 is "before the first change"; as a key's revision it means "not there".
pub type Revision = u64;

/// The most keys one transaction may touch; etcd's default limit is 128 operations.
pub const MAX_KEYS: usize = 120;

/// Why the store could not answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// The store cannot be reached, or its answer got lost: a transaction may or may not have taken effect.
    #[error("store {store}: {reason}; the change may or may not have been made, it is safe to ask again")]
    Unavailable {
        /// Which store: a file or the endpoints.
        store: String,
        /// What happened.
        reason: String,
    },
    /// The store holds or answered something that cannot be; asking again will not help.
    #[error("store {store}: {reason}")]
    Broken {
        /// Which store: a file or the endpoints.
        store: String,
        /// What is wrong, and what to do.
        reason: String,
    },
}

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The revision of its last change.
    pub revision: Revision,
    /// The value.
    pub value: Vec<u8>,
}

/// All keys of a range at one revision.
#[derive(Clone, Debug, Default)]
pub struct Range {
    /// The store's revision that this shows.
    pub revision: Revision,
    /// The entries, by key.
    pub entries: Vec<Entry>,
}

/// One change of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The key.
    pub key: String,
    /// Its new value, or none when it was deleted.
    pub value: Option<Vec<u8>>,
}

/// What a transaction wants.
#[derive(Clone, Debug, Default)]
pub struct Transaction {
    /// Keys and the revision each must still have (0: must not be there).
    pub expect: Vec<(String, Revision)>,
    /// The changes, made only if every expectation holds. A key occurs at most once.
    pub changes: Vec<Change>,
}

/// How a transaction ended.
#[derive(Clone, Debug)]
pub enum Commit {
    /// It took effect, durably, at this revision.
    Done(Revision),
    /// An expectation did not hold: nothing changed. Holds what is there instead of every expected key.
    Conflict {
        /// The store's revision that this shows.
        revision: Revision,
        /// Every expected key: its present entry or none.
        current: Vec<(String, Option<Entry>)>,
    },
}

/// What a watch reports.
#[derive(Clone, Debug)]
pub enum Watched {
    /// The changes of one or more revisions in their order. One revision is never split.
    Changes(Vec<(Revision, Change)>),
    /// The store no longer has the changes asked for: read everything again and compare.
    Compacted,
}

/// A stream of changes.
#[async_trait]
pub trait StoreWatch: Send {
    /// The next changes. An error ends the watch; open another one from the revision after the last seen.
    async fn next(&mut self) -> Result<Watched, StoreError>;
}

/// A key-value store with revisions. Implemented by [`EmbeddedStore`] and [`EtcdStore`].
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// All keys that start with `prefix`.
    async fn range(&self, prefix: &str) -> Result<Range, StoreError>;

    /// Makes a transaction. When this returns [`Commit::Done`], the change survives a crash of the machine.
    async fn commit(&self, transaction: Transaction) -> Result<Commit, StoreError>;

    /// All changes from revision `from` on (inclusive).
    async fn watch(&self, from: Revision) -> Result<Box<dyn StoreWatch>, StoreError>;

    /// Lets the store forget the changes up to and including `revision`; the present values stay.
    async fn compact(&self, revision: Revision) -> Result<(), StoreError>;

    /// The size on disk in bytes.
    async fn size(&self) -> Result<u64, StoreError>;

    /// Whether this process is the only one that can have the store open.
    fn exclusive(&self) -> bool;
}

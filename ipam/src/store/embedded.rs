//! The embedded store: one redb file, no server.
//!
//! All transactions go through one thread, which takes whatever has queued up while the disk was busy and makes it one durable
//! commit. Alone, a transaction costs one fsync; under load, hundreds share one.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::Duration,
};

use async_trait::async_trait;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, backends::InMemoryBackend};
use tokio::sync::{oneshot, watch};

use super::{Change, Commit, Entry, Range, Revision, Store, StoreError, StoreWatch, Transaction, Watched};

/// Key to (revision of the last change, value).
const ENTRIES: TableDefinition<'_, &str, (u64, &[u8])> = TableDefinition::new("entries");
/// `revision` and `format`.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const FORMAT: u64 = 1;

/// The most transactions that share one commit.
const BATCH: usize = 2048;
/// How many changes are kept for watches that fall behind.
const KEPT_CHANGES: usize = 1 << 16;

const OPEN_RETRIES: usize = 20;
const OPEN_PAUSE: Duration = Duration::from_millis(50);

/// A [`Store`] in one file. Dropping it waits for the commits under way and releases the file.
pub struct EmbeddedStore {
    path: PathBuf,
    database: Option<Arc<Database>>,
    jobs: Option<mpsc::Sender<Job>>,
    writer: Option<thread::JoinHandle<()>>,
    log: Arc<Log>,
}

struct Job {
    transaction: Transaction,
    reply: oneshot::Sender<Result<Commit, StoreError>>,
}

/// The last changes, for watches. They live as long as the process: who asks for older ones reads everything again.
struct Log {
    changes: Mutex<Changes>,
    latest: watch::Sender<Revision>,
}

struct Changes {
    /// The oldest revision that a watch can start from.
    first: Revision,
    kept: VecDeque<(Revision, Change)>,
}

impl EmbeddedStore {
    /// Opens the file, creating it if it is not there. Fails when another process has it open.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let path = path.as_ref().to_path_buf();
        let mut database = Database::create(&path);
        for _ in 0..OPEN_RETRIES {
            // A killed predecessor holds the file until the kernel has cleaned up after it.
            if !matches!(database, Err(redb::DatabaseError::DatabaseAlreadyOpen)) {
                break;
            }
            thread::sleep(OPEN_PAUSE);
            database = Database::create(&path);
        }
        Self::with(path, database)
    }

    /// A store that keeps nothing once it is dropped: for tests.
    pub fn in_memory() -> Result<Self, StoreError> {
        Self::with(PathBuf::from("(memory)"), Database::builder().create_with_backend(InMemoryBackend::new()))
    }

    fn with(path: PathBuf, database: Result<Database, redb::DatabaseError>) -> Result<Self, StoreError> {
        let broken = |reason: String| StoreError::Broken { store: path.display().to_string(), reason };
        let database = database.map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => {
                broken("is in use by another allocator; stop that one, or use etcd to run several".to_owned())
            }
            error => broken(format!("cannot be opened: {error}")),
        })?;
        let revision = prepare(&database).map_err(|error| broken(format!("cannot be read: {error}")))??;
        let database = Arc::new(database);
        let log = Arc::new(Log {
            changes: Mutex::new(Changes { first: revision + 1, kept: VecDeque::new() }),
            latest: watch::Sender::new(revision),
        });
        let (jobs, queue) = mpsc::channel();
        let writer = thread::Builder::new()
            .name("ipam-store".to_owned())
            .spawn({
                let writer = Writer {
                    store: path.display().to_string(),
                    database: database.clone(),
                    log: log.clone(),
                    revision,
                };
                move || writer.run(&queue)
            })
            .map_err(|error| broken(format!("cannot start the writer thread: {error}")))?;
        Ok(Self { path, database: Some(database), jobs: Some(jobs), writer: Some(writer), log })
    }

    fn unavailable(&self, reason: &dyn std::fmt::Display) -> StoreError {
        StoreError::Unavailable { store: self.path.display().to_string(), reason: reason.to_string() }
    }

    fn read(&self, prefix: &str) -> Result<Range, redb::Error> {
        let Some(database) = &self.database else { return Ok(Range::default()) };
        let read = database.begin_read()?;
        let revision = read.open_table(META)?.get("revision")?.map_or(0, |value| value.value());
        let mut entries = Vec::new();
        for entry in read.open_table(ENTRIES)?.range(prefix..)? {
            let (key, value) = entry?;
            if !key.value().starts_with(prefix) {
                break;
            }
            let (revision, value) = value.value();
            entries.push(Entry { key: key.value().to_owned(), revision, value: value.to_vec() });
        }
        Ok(Range { revision, entries })
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(writer) = self.writer.take() {
            // The thread ends once the queue is empty; a panic in it has already failed its callers.
            let _ = writer.join();
        }
        self.database = None;
    }
}

/// Creates the tables and returns the revision. The outer error is redb's, the inner one a file that is not ours.
fn prepare(database: &Database) -> Result<Result<Revision, StoreError>, redb::Error> {
    let write = database.begin_write()?;
    let revision = {
        write.open_table(ENTRIES)?;
        let mut meta = write.open_table(META)?;
        let format = meta.get("format")?.map(|value| value.value());
        match format {
            None => {
                meta.insert("format", FORMAT)?;
            }
            Some(FORMAT) => {}
            Some(other) => {
                return Ok(Err(StoreError::Broken {
                    store: "the allocator's file".to_owned(),
                    reason: format!(
                        "has format {other}, this program knows format {FORMAT}; use the version that wrote it"
                    ),
                }));
            }
        }
        meta.get("revision")?.map_or(0, |value| value.value())
    };
    write.commit()?;
    Ok(Ok(revision))
}

/// The thread that makes the commits.
struct Writer {
    store: String,
    database: Arc<Database>,
    log: Arc<Log>,
    revision: Revision,
}

impl Writer {
    fn run(mut self, queue: &mpsc::Receiver<Job>) {
        while let Ok(first) = queue.recv() {
            let mut batch = vec![first];
            while batch.len() < BATCH
                && let Ok(job) = queue.try_recv()
            {
                batch.push(job);
            }
            let mut published = Vec::new();
            match self.commit(&batch, &mut published) {
                Ok((revision, results)) => {
                    self.revision = revision;
                    self.log.publish(revision, published);
                    for (job, result) in batch.into_iter().zip(results) {
                        // Who no longer waits will find the change in the store.
                        let _ = job.reply.send(Ok(result));
                    }
                }
                Err(error) => {
                    for job in batch {
                        let reason = format!("cannot be written: {error}");
                        let _ = job
                            .reply
                            .send(Err(StoreError::Unavailable { store: self.store.clone(), reason }));
                    }
                }
            }
        }
    }

    fn commit(
        &self,
        batch: &[Job],
        published: &mut Vec<(Revision, Change)>,
    ) -> Result<(Revision, Vec<Commit>), redb::Error> {
        let mut revision = self.revision;
        let mut results = Vec::with_capacity(batch.len());
        let write = self.database.begin_write()?;
        {
            let mut entries = write.open_table(ENTRIES)?;
            for job in batch {
                let Transaction { expect, changes } = &job.transaction;
                let mut holds = true;
                for (key, expected) in expect {
                    holds &= entries.get(key.as_str())?.map_or(0, |value| value.value().0) == *expected;
                }
                if !holds {
                    let mut current = Vec::with_capacity(expect.len());
                    for (key, _) in expect {
                        let entry = entries.get(key.as_str())?.map(|value| {
                            let (revision, value) = value.value();
                            Entry { key: key.clone(), revision, value: value.to_vec() }
                        });
                        current.push((key.clone(), entry));
                    }
                    results.push(Commit::Conflict { revision, current });
                    continue;
                }
                revision += 1;
                for change in changes {
                    match &change.value {
                        Some(value) => {
                            entries.insert(change.key.as_str(), (revision, value.as_slice()))?;
                        }
                        None => {
                            entries.remove(change.key.as_str())?;
                        }
                    }
                    published.push((revision, change.clone()));
                }
                results.push(Commit::Done(revision));
            }
            write.open_table(META)?.insert("revision", revision)?;
        }
        if revision == self.revision {
            write.abort()?;
        } else {
            write.commit()?;
        }
        Ok((revision, results))
    }
}

impl Log {
    fn publish(&self, revision: Revision, changes: Vec<(Revision, Change)>) {
        {
            let mut log = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
            log.kept.extend(changes);
            while log.kept.len() > KEPT_CHANGES {
                if let Some((dropped, _)) = log.kept.pop_front() {
                    log.first = dropped + 1;
                }
            }
        }
        self.latest.send_replace(revision);
    }
}

struct EmbeddedWatch {
    log: Arc<Log>,
    latest: watch::Receiver<Revision>,
    next: Revision,
    store: String,
}

#[async_trait]
impl StoreWatch for EmbeddedWatch {
    async fn next(&mut self) -> Result<Watched, StoreError> {
        loop {
            let latest = *self.latest.borrow_and_update();
            if latest >= self.next {
                let log = self.log.changes.lock().unwrap_or_else(PoisonError::into_inner);
                if self.next < log.first {
                    return Ok(Watched::Compacted);
                }
                let start = log.kept.partition_point(|(revision, _)| *revision < self.next);
                let end = log.kept.partition_point(|(revision, _)| *revision <= latest);
                let changes: Vec<_> = log.kept.range(start..end).cloned().collect();
                self.next = latest + 1;
                if !changes.is_empty() {
                    return Ok(Watched::Changes(changes));
                }
            }
            if self.latest.changed().await.is_err() {
                return Err(StoreError::Unavailable {
                    store: self.store.clone(),
                    reason: "was closed".to_owned(),
                });
            }
        }
    }
}

#[async_trait]
impl Store for EmbeddedStore {
    async fn range(&self, prefix: &str) -> Result<Range, StoreError> {
        self.read(prefix).map_err(|error| self.unavailable(&error))
    }

    async fn commit(&self, transaction: Transaction) -> Result<Commit, StoreError> {
        let (reply, result) = oneshot::channel();
        let gone = || self.unavailable(&"its writer has ended; restart the allocator");
        let jobs = self.jobs.as_ref().ok_or_else(gone)?;
        jobs.send(Job { transaction, reply }).map_err(|_| gone())?;
        result.await.map_err(|_| gone())?
    }

    async fn watch(&self, from: Revision) -> Result<Box<dyn StoreWatch>, StoreError> {
        Ok(Box::new(EmbeddedWatch {
            log: self.log.clone(),
            latest: self.log.latest.subscribe(),
            next: from,
            store: self.path.display().to_string(),
        }))
    }

    async fn compact(&self, revision: Revision) -> Result<(), StoreError> {
        let mut log = self.log.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let keep_from = log.kept.partition_point(|(kept, _)| *kept <= revision);
        log.kept.drain(..keep_from);
        log.first = log.first.max(revision + 1);
        Ok(())
    }

    async fn size(&self) -> Result<u64, StoreError> {
        std::fs::metadata(&self.path).map(|file| file.len()).map_err(|error| self.unavailable(&error))
    }

    fn exclusive(&self) -> bool {
        true
    }
}

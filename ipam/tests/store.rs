//! Both stores keep the same promises.

#![expect(clippy::unwrap_used, reason = "test code")]

#[path = "common/etcd.rs"]
mod etcd;

use std::{sync::Arc, time::Duration};

use eniway_ipam::{
    EmbeddedStore, Store,
    store::{Change, Commit, Revision, Transaction, Watched},
};
use etcd::Etcd;

fn put(key: &str, expected: Revision, value: &str) -> Transaction {
    Transaction {
        expect: vec![(key.into(), expected)],
        changes: vec![Change { key: key.into(), value: Some(value.into()) }],
    }
}

async fn done(store: &dyn Store, transaction: Transaction) -> Revision {
    match store.commit(transaction).await.unwrap() {
        Commit::Done(revision) => revision,
        conflict @ Commit::Conflict { .. } => panic!("{conflict:?}"),
    }
}

async fn promises(store: &dyn Store) {
    let start = store.range("").await.unwrap().revision;
    let mut watch = store.watch(start + 1).await.unwrap();

    // Compare and swap, of several keys or none of them.
    let first = done(store, put("a/1", 0, "one")).await;
    assert_eq!(first, start + 1);
    let Commit::Conflict { revision, current } = store.commit(put("a/1", 0, "again")).await.unwrap() else {
        panic!()
    };
    assert_eq!(revision, first);
    let (key, entry) = &current[0];
    let entry = entry.as_ref().unwrap();
    assert_eq!((key.as_str(), entry.revision, entry.value.as_slice()), ("a/1", first, b"one".as_slice()));
    let several = |seen| Transaction {
        expect: vec![("a/1".into(), seen), ("a/2".into(), 0), ("guard".into(), 0)],
        changes: vec![
            Change { key: "a/1".into(), value: Some(b"uno".to_vec()) },
            Change { key: "a/2".into(), value: Some(b"due".to_vec()) },
        ],
    };
    assert!(matches!(store.commit(several(first + 7)).await.unwrap(), Commit::Conflict { .. }));
    let second = done(store, several(first)).await;
    assert_eq!(second, first + 1);
    let other = done(store, put("b/1", 0, "other")).await;
    let deletion = Transaction {
        expect: vec![("a/1".into(), second)],
        changes: vec![Change { key: "a/1".into(), value: None }],
    };
    let third = done(store, deletion).await;

    // Ranges show one revision.
    let range = store.range("a/").await.unwrap();
    assert_eq!(range.revision, third);
    let entries: Vec<_> = range.entries.iter().map(|entry| (entry.key.as_str(), entry.revision)).collect();
    assert_eq!(entries, [("a/2", second)]);

    // The watch has seen everything, in order, no revision split.
    let expected = [
        (first, "a/1", Some("one")),
        (second, "a/1", Some("uno")),
        (second, "a/2", Some("due")),
        (other, "b/1", Some("other")),
        (third, "a/1", None),
    ];
    let mut seen = Vec::new();
    while seen.len() < expected.len() {
        match watch.next().await.unwrap() {
            Watched::Changes(changes) => seen.extend(changes),
            Watched::Compacted => panic!("compacted"),
        }
    }
    for ((revision, change), (at, key, value)) in seen.iter().zip(expected) {
        let written = change.value.as_deref().map(|value| std::str::from_utf8(value).unwrap());
        assert_eq!((*revision, change.key.as_str(), written), (at, key, value));
    }

    // From the middle, and from what is compacted.
    let mut middle = store.watch(third).await.unwrap();
    assert!(matches!(middle.next().await.unwrap(), Watched::Changes(changes) if changes[0].0 == third));
    store.compact(second).await.unwrap();
    store.compact(second).await.unwrap();
    let mut late = store.watch(first).await.unwrap();
    assert!(matches!(late.next().await.unwrap(), Watched::Compacted));
    let mut late = store.watch(other).await.unwrap();
    assert!(matches!(late.next().await.unwrap(), Watched::Changes(changes) if changes[0].0 == other));

    // Large ranges come in pages.
    for batch in 0..100 {
        let keys = (0..100).map(|index| format!("many/{batch:02}-{index:02}"));
        let changes = keys.map(|key| Change { key, value: Some(vec![b'x'; 100]) }).collect();
        done(store, Transaction { expect: Vec::new(), changes }).await;
    }
    let many = store.range("many/").await.unwrap();
    assert_eq!(many.entries.len(), 10_000);
    assert!(many.entries.is_sorted_by_key(|entry| entry.key.clone()));
    assert!(store.size().await.unwrap() > 100_000);
}

#[tokio::test]
async fn the_embedded_store_keeps_its_promises() {
    let directory = tempfile::tempdir().unwrap();
    promises(&EmbeddedStore::open(directory.path().join("ipam.redb")).unwrap()).await;
}

#[tokio::test]
async fn etcd_keeps_its_promises() {
    let etcd = Etcd::start().await;
    promises(&etcd.store()).await;
}

#[tokio::test]
async fn the_embedded_store_survives_and_is_exclusive() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ipam.redb");
    let store = EmbeddedStore::open(&path).unwrap();
    let revision = done(&store, put("a", 0, "kept")).await;
    let second = EmbeddedStore::open(&path).err().unwrap().to_string();
    assert!(second.contains("in use by another allocator"), "{second}");
    drop(store);
    let store = EmbeddedStore::open(&path).unwrap();
    let range = store.range("").await.unwrap();
    assert_eq!((range.revision, range.entries[0].value.as_slice()), (revision, b"kept".as_slice()));
    // What happened before is not told again, but not passed over in silence either.
    assert!(matches!(store.watch(revision).await.unwrap().next().await.unwrap(), Watched::Compacted));
}

#[tokio::test]
async fn concurrent_transactions_share_commits() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(EmbeddedStore::open(directory.path().join("ipam.redb")).unwrap());
    let tasks: Vec<_> = (0..500)
        .map(|index| {
            let store = store.clone();
            tokio::spawn(async move { done(&*store, put(&format!("key/{index}"), 0, "value")).await })
        })
        .collect();
    let mut revisions = Vec::new();
    for task in tasks {
        revisions.push(task.await.unwrap());
    }
    revisions.sort_unstable();
    revisions.dedup();
    assert_eq!(revisions.len(), 500, "each has a revision of its own");
}

#[tokio::test]
async fn etcd_calls_fail_while_it_is_away_and_work_again_after() {
    let mut etcd = Etcd::start().await;
    let store = etcd.store();
    let first = done(&store, put("a", 0, "one")).await;
    let mut watch = store.watch(first + 1).await.unwrap();
    etcd.kill();
    let error = store.commit(put("a", first, "two")).await.unwrap_err().to_string();
    assert!(error.contains("may or may not have been made"), "{error}");
    assert!(
        watch.next().await.is_err(),
        "the watch ends; another one continues from the revision after the last seen"
    );
    etcd.resume().await;
    let mut watch = store.watch(first + 1).await.unwrap();
    let second = done(&store, put("a", first, "two")).await;
    let next = tokio::time::timeout(Duration::from_secs(5), watch.next()).await.unwrap().unwrap();
    assert!(matches!(next, Watched::Changes(changes) if changes[0].0 == second));
}

//! Several allocators at once on one etcd.

#![expect(clippy::unwrap_used, reason = "test code")]

mod common;
#[path = "common/etcd.rs"]
mod etcd;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use common::{node, request, static_request, subnet};
use eniway_ipam::{
    Allocation, AllocationChange, Allocator, Error, MemoryVpc, Notice, Parent, Policy, Released, Settings,
    SystemClock,
    vpc::{Fault, Faults, Operation, Violations},
};
use eniway_policy::model::Groups;
use etcd::Etcd;

struct Cluster {
    etcd: Etcd,
    vpc: Arc<MemoryVpc>,
    allocators: Vec<Allocator>,
}

fn settings(name: &str) -> Settings {
    Settings {
        name: name.into(),
        // Real time here: everything that waits, waits little.
        cool_down: Duration::from_millis(500),
        take_over_after: Duration::from_millis(700),
        retry_from: Duration::from_millis(10),
        retry_to: Duration::from_millis(100),
        ..Settings::default()
    }
}

impl Cluster {
    async fn new(size: usize, nodes: usize, limit: u32, policy: Policy) -> Self {
        let etcd = Etcd::start().await;
        let vpc = Arc::new(MemoryVpc::new(Arc::new(SystemClock), 1));
        let mut cluster = Self { etcd, vpc, allocators: Vec::new() };
        for index in 0..size {
            let allocator = cluster.allocator(&format!("allocator-{index}")).await;
            allocator.start();
            cluster.allocators.push(allocator);
        }
        let net = subnet("net-a", "10.1.0.0/18");
        cluster.vpc.add_subnet("net-a", net.ipv4, net.ipv6);
        cluster.allocators[0].add_subnet(net).await.unwrap();
        for index in 0..nodes {
            let parent = format!("parent-{index}");
            cluster.vpc.add_parent(&parent, limit as usize);
            let parents = vec![Parent { id: parent, interface: "eth1".into(), limit }];
            cluster.allocators[0].put_node(node(&format!("node-{index}"), parents, policy)).await.unwrap();
        }
        cluster
    }

    async fn allocator(&self, name: &str) -> Allocator {
        Allocator::open(settings(name), Arc::new(self.etcd.store()), self.vpc.clone(), Arc::new(SystemClock))
            .await
            .unwrap()
    }
}

/// Asks again as a caller would, for as long as the answer is "later".
async fn insist(allocator: &Allocator, node: &str, pod: &str) -> Allocation {
    let request = request(node, pod);
    for _ in 0..200 {
        match allocator.allocate(&request).await {
            Ok(allocation) => return allocation,
            Err(
                Error::UnknownNode(_) | Error::NodeFull { .. } | Error::Store(_) | Error::TimedOut { .. },
            ) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(error) => panic!("{error}"),
        }
    }
    panic!("{pod} got no interface on {node}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn allocators_share_a_store_without_duplicates() {
    let policy = Policy::PreBound { minimum: 2, maximum: 4 };
    let cluster = Cluster::new(3, 4, 30, policy).await;
    cluster.vpc.set_faults(Faults { error: 0.03, throttle: 0.03, reply_lost: 0.05, ..Faults::default() });

    // All of them give to the same nodes at once; every pod is asked for by two of them.
    let mut tasks = Vec::new();
    for pod in 0..80 {
        for turn in 0..2 {
            let allocator = cluster.allocators[(pod + turn) % 3].clone();
            tasks.push(tokio::spawn(async move {
                insist(&allocator, &format!("node-{}", pod % 4), &format!("pod-{pod}")).await
            }));
        }
    }
    let mut pods: HashMap<String, Allocation> = HashMap::new();
    for task in tasks {
        let allocation = task.await.unwrap();
        if let Some(same) = pods.insert(allocation.name.clone(), allocation.clone()) {
            assert_eq!(same, allocation, "asked twice, given once");
        }
    }
    let addresses: HashSet<_> = pods.values().map(|pod| pod.addresses.ipv4).collect();
    let places: HashSet<_> = pods.values().map(|pod| (pod.parent.clone(), pod.vlan)).collect();
    assert_eq!((pods.len(), addresses.len(), places.len()), (80, 80, 80));

    // Released through another one than allocated, at once.
    for (index, pod) in pods.values().enumerate() {
        let allocator = &cluster.allocators[index % 3];
        assert_eq!(allocator.release(&pod.key, Some(pod.generation)).await.unwrap(), Released::Now);
        assert_eq!(
            cluster.allocators[(index + 1) % 3].release(&pod.key, None).await.unwrap(),
            Released::NotAllocated
        );
    }
    cluster.vpc.set_faults(Faults::default());
    tokio::time::sleep(Duration::from_secs(1)).await;
    for allocator in &cluster.allocators {
        assert!(allocator.list(None).is_empty());
    }
    let violations = cluster.vpc.violations();
    assert_eq!(violations, Violations::default(), "{violations:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_allocator_finishes_what_one_has_begun() {
    let cluster = Cluster::new(1, 1, 30, Policy::OnDemand).await;
    let doomed = cluster.allocator("doomed").await;
    // The call takes effect, its answer never comes, and then the allocator is gone.
    cluster.vpc.fail_next(Operation::Create, Fault::ReplyLost);
    cluster.vpc.set_faults(Faults {
        latency: Duration::from_millis(300)..=Duration::from_millis(300),
        ..Faults::default()
    });
    let task = {
        let doomed = doomed.clone();
        tokio::spawn(async move { doomed.allocate(&static_request("node-0", "db-0", "one")).await })
    };
    while cluster.vpc.interfaces().is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    doomed.close().await;
    assert!(task.await.unwrap().is_err());
    cluster.vpc.set_faults(Faults::default());

    let pod = cluster.allocators[0].allocate(&static_request("node-0", "db-0", "one")).await.unwrap();
    assert!(pod.is_static);
    assert_eq!(cluster.vpc.interfaces().len(), 1, "the same interface, not a second one");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_survives_the_absence_of_etcd_and_compaction() {
    let mut cluster = Cluster::new(2, 1, 30, Policy::PreBound { minimum: 5, maximum: 5 }).await;
    let first = insist(&cluster.allocators[0], "node-0", "first").await;
    // The watch is at the other allocator.
    let mut watch = cluster.allocators[1].watch("node-0", None);
    let mut known: HashSet<String> = HashSet::new();
    follow(&mut watch, &mut known, |known| known.contains("first")).await;

    cluster.etcd.kill();
    let away = cluster.allocators[0].release(&first.key, None).await;
    assert!(matches!(away, Err(Error::Store(_))), "{away:?}");
    cluster.etcd.resume().await;
    for _ in 0..100 {
        if cluster.allocators[0].release(&first.key, None).await.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    insist(&cluster.allocators[0], "node-0", "second").await;
    follow(&mut watch, &mut known, |known| known.len() == 1 && known.contains("second")).await;
}

#[tokio::test]
async fn security_groups_put_at_one_allocator_are_told_by_all() {
    let cluster = Cluster::new(2, 1, 16, Policy::OnDemand).await;
    let [one, other] = &cluster.allocators[..] else { panic!("two allocators") };
    let groups = |name: &str| -> Groups {
        serde_json::from_str(&format!(r#"{{"security_groups": [{{"id": "{name}"}}]}}"#)).unwrap()
    };
    insist(other, "node-0", "pod").await;
    let mut watch = other.watch("node-0", None);
    let Some(Notice::Snapshot { .. }) = watch.next().await else { panic!("no snapshot") };
    let put = one.put_security_groups(groups("first")).await.unwrap();
    let end = tokio::time::Instant::now() + Duration::from_secs(20);
    let mut told = Groups::default();
    while told.revision < put.revision {
        let notice = tokio::time::timeout_at(end, watch.next()).await.expect("the change arrives");
        if let Some(Notice::Changes { groups: Some(groups), .. }) = notice {
            told = Groups::clone(&groups);
        }
    }
    assert_eq!(told, Groups { revision: put.revision, ..groups("first") });

    // Both change the same revision: one of them has not read what it replaces.
    let second = |name: &str| Groups { revision: put.revision, ..groups(name) };
    let (left, right) =
        tokio::join!(one.put_security_groups(second("left")), other.put_security_groups(second("right")));
    let stale = [&left, &right].map(|put| matches!(put, Err(Error::StaleSecurityGroups { .. })));
    assert_eq!(stale.iter().filter(|stale| **stale).count(), 1, "{left:?} {right:?}");
    // Whichever allocator is asked: the pod's revision is that of the rules that were there.
    let winner = left.or(right).unwrap().revision;
    let ids = ["left".to_owned()];
    let key = other.list(None).remove(0).key;
    let set = other.set_security_groups(&key, &ids, None).await.unwrap();
    assert_eq!((&set.security_groups[..], set.security_groups_revision), (&ids[..], winner));
    assert_eq!(cluster.vpc.calls(Operation::SetSecurityGroups), 1);
}

async fn follow(
    watch: &mut eniway_ipam::Watch,
    known: &mut HashSet<String>,
    until: impl Fn(&HashSet<String>) -> bool,
) {
    let end = tokio::time::Instant::now() + Duration::from_secs(20);
    while !until(known) {
        let notice = tokio::time::timeout_at(end, watch.next()).await.expect("the change arrives").unwrap();
        match notice {
            Notice::Snapshot { allocations, .. } => {
                *known = allocations.iter().map(|allocation| allocation.name.clone()).collect();
            }
            Notice::Changes { changes, .. } => {
                for change in changes {
                    match change {
                        AllocationChange::Put(allocation) => known.insert(allocation.name.clone()),
                        AllocationChange::Removed { key, .. } => {
                            known.remove(key.uid.trim_start_matches("uid-"))
                        }
                    };
                }
            }
        }
    }
}

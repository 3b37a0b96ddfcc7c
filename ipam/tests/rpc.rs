//! The service and its client: over both kinds of listener, and across the death of the server.

#![expect(clippy::unwrap_used, reason = "test code")]

mod common;

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use self::common::request;
use eniway_ipam::{
    Acknowledgement, Allocation, AllocationChange, Allocator, Confirm, EmbeddedStore, MemoryVpc, Node,
    NodeKind, Notice, Parent, PodKey, Policy, Position, Settings, Subnet, SystemClock,
    api::{RefusedByAgent, Released},
    net::Mac,
    rpc::{self, Address, Client, ClientError, Event, Follower, Listener, ServeError, Tls, proto::Reason},
    vpc::{Fault, Faults, Operation, Violations, VpcError},
};
use eniway_policy::model::Groups;
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

const SOON: Duration = Duration::from_secs(20);

/// A VPC and a store that outlive the allocators and servers on them.
struct World {
    directory: tempfile::TempDir,
    vpc: Arc<MemoryVpc>,
}

struct Running {
    allocator: Allocator,
    stop: oneshot::Sender<()>,
    server: JoinHandle<Result<(), ServeError>>,
}

impl Running {
    async fn stop(self) {
        let _ = self.stop.send(());
        self.server.await.unwrap().unwrap();
        self.allocator.close().await;
    }
}

impl World {
    fn new() -> Self {
        let vpc = Arc::new(MemoryVpc::new(Arc::new(SystemClock), 3));
        vpc.add_subnet("net-a", "10.1.0.0/24".parse().unwrap(), None);
        vpc.add_parent("eni-1", 64);
        Self { directory: tempfile::tempdir().unwrap(), vpc }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("run/ipam.sock")
    }

    async fn allocator(&self) -> Allocator {
        let store = Arc::new(EmbeddedStore::open(self.path("ipam.redb")).unwrap());
        let allocator = Allocator::open(Settings::default(), store, self.vpc.clone(), Arc::new(SystemClock))
            .await
            .unwrap();
        allocator.add_subnet(subnet()).await.unwrap();
        allocator.put_node(node("n", 64)).await.unwrap();
        allocator.start();
        allocator
    }

    async fn serve(&self, listeners: Vec<Listener>) -> Running {
        let allocator = self.allocator().await;
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(rpc::serve(allocator.clone(), listeners, async {
            let _ = stopped.await;
        }));
        Running { allocator, stop, server }
    }

    async fn on_socket(&self) -> Running {
        self.serve(vec![Listener::unix(self.socket()).unwrap()]).await
    }

    fn client(&self) -> Client {
        Client::new(Address::Unix(self.socket()), None).unwrap()
    }
}

fn subnet() -> Subnet {
    Subnet {
        id: "net-a".into(),
        ipv4: "10.1.0.0/24".parse().unwrap(),
        gateway: [10, 1, 0, 1].into(),
        gateway_mac: Mac([2, 0, 0, 0, 0, 1]),
        ipv6: None,
        gateway_ipv6: None,
        mtu: 1500,
    }
}

fn node(name: &str, limit: u32) -> Node {
    Node {
        name: name.into(),
        kind: NodeKind::SubEni {
            parents: vec![Parent { id: "eni-1".into(), interface: "eth1".into(), limit }],
        },
        policy: Policy::PreBound { minimum: 2, maximum: 4 },
        dual_stack: false,
        subnets: vec![],
        security_groups: vec![],
        draining: false,
        confirmed: 0,
    }
}

fn key(pod: &str) -> PodKey {
    request("", pod).key
}

async fn next(follower: &mut Follower) -> Notice {
    timeout(SOON, async {
        loop {
            if let Event::Notice(notice) = follower.next().await {
                return notice;
            }
        }
    })
    .await
    .unwrap()
}

/// The names of the pods after all notices, up to where one of them was told of.
async fn follow_until(follower: &mut Follower, pods: &mut Vec<String>, name: &str) {
    while !pods.iter().any(|pod| pod == name) {
        match next(follower).await {
            Notice::Snapshot { allocations, .. } => {
                *pods = allocations.iter().map(|one| one.name.clone()).collect();
            }
            Notice::Changes { changes, .. } => {
                for change in changes {
                    match change {
                        AllocationChange::Put(put) => pods.push(put.name.clone()),
                        AllocationChange::Removed { key, .. } => {
                            pods.retain(|pod| key.uid != format!("uid-{pod}"));
                        }
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn everything_works_over_a_unix_socket() {
    let world = World::new();
    let running = world.on_socket().await;
    let mode = fs::metadata(world.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let client = world.client();

    let first = client.allocate(&request("n", "a"), None).await.unwrap();
    let again = client.allocate(&request("n", "a"), None).await.unwrap();
    assert_eq!(first, again);
    assert_eq!(first.parent_interface.as_deref(), Some("eth1"));
    assert_eq!(client.list(Some("n")).await.unwrap(), std::slice::from_ref(&first));
    assert_eq!(client.list(Some("m")).await.unwrap(), []);
    let pools = client.pools().await.unwrap();
    assert_eq!((pools[0].node.as_str(), pools[0].pods, pools[0].limit), ("n", 1, 64));
    assert_eq!(client.subnets().await.unwrap()[0].id, "net-a");

    let stale = client.release(&key("a"), Some(first.generation + 1)).await.unwrap_err();
    assert_eq!(stale.reason(), Some(Reason::StaleGeneration));
    assert!(stale.to_string().contains("out of date"), "{stale}");
    assert_eq!(client.release(&key("a"), Some(first.generation)).await.unwrap(), Released::Now);
    assert_eq!(client.release(&key("a"), None).await.unwrap(), Released::NotAllocated);
    assert_eq!(client.cooling().await.unwrap()[0].addresses, Some(first.addresses));
    assert_eq!(client.leaks().await.unwrap(), []);

    let unknown = client.allocate(&request("m", "b"), None).await.unwrap_err();
    assert_eq!(unknown.reason(), Some(Reason::UnknownNode));
    let overlap = Subnet { id: "net-b".into(), ..subnet() };
    let refused = client.add_subnet(&overlap).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::SubnetOverlap));
    assert!(refused.to_string().contains("overlaps net-a"), "{refused}");
    client.put_node(&node("m", 8)).await.unwrap();
    client.confirm(&Confirm::Node("m".into())).await.unwrap();
    client.drain_node("m").await.unwrap();
    running.stop().await;
    assert!(!world.socket().exists());
}

#[tokio::test]
async fn a_socket_has_one_server_and_outlives_a_killed_one() {
    let world = World::new();
    let first = Listener::unix(world.socket()).unwrap();
    assert!(matches!(Listener::unix(world.socket()), Err(ServeError::Taken(_))));
    // A killed server leaves its socket.
    let left = world.path("left.sock");
    drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
    assert!(left.exists());
    drop(Listener::unix(&left).unwrap());
    let file = world.path("file");
    fs::write(&file, "precious").unwrap();
    assert!(matches!(Listener::unix(&file), Err(ServeError::NoSocket(_))));
    drop(first);
}

#[tokio::test]
async fn allocation_waits_for_the_agent() {
    let world = World::new();
    let running = world.on_socket().await;
    let client = world.client();
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.allocate(&request("n", "a"), Some(SOON)).await }
    });
    let mut follower = client.follow("n");
    let mut pods = Vec::new();
    follow_until(&mut follower, &mut pods, "a").await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished());
    let revision = client.list(None).await.unwrap()[0].revision;
    // An agent that has come so far with another store has not seen this pod.
    let other = Acknowledgement { store: "other".into(), revision, refused: vec![] };
    client.acknowledge("n", &other).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished());
    let store = follower.position().unwrap().store.clone();
    client
        .acknowledge("n", &Acknowledgement { store: store.clone(), revision, refused: vec![] })
        .await
        .unwrap();
    waiting.await.unwrap().unwrap();

    // What the agent refuses is said to who waits.
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.allocate(&request("n", "b"), Some(SOON)).await }
    });
    follow_until(&mut follower, &mut pods, "b").await;
    let refused = vec![RefusedByAgent { key: key("b"), reason: "no such namespace".into() }];
    client.acknowledge("n", &Acknowledgement { store, revision: revision + 100, refused }).await.unwrap();
    let error = waiting.await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Some(Reason::RefusedByAgent));
    assert!(error.to_string().contains("no such namespace"), "{error}");

    let late = client.allocate(&request("m2", "c"), Some(Duration::ZERO)).await.unwrap_err();
    assert_eq!(late.reason(), Some(Reason::UnknownNode));
    running.stop().await;
}

#[tokio::test]
async fn a_watch_continues_or_begins_with_a_snapshot() {
    let world = World::new();
    let running = world.on_socket().await;
    let client = world.client();
    client.allocate(&request("n", "a"), None).await.unwrap();

    let mut watch = client.watch("n", None).await.unwrap();
    let Notice::Snapshot { revision, allocations, .. } = watch.next().await.unwrap() else {
        panic!("no snapshot")
    };
    assert_eq!(allocations.len(), 1);
    let store = watch.position().unwrap().store.clone();
    let at = |revision| Position { store: store.clone(), revision };
    client.allocate(&request("n", "b"), None).await.unwrap();
    let Notice::Changes { changes, .. } = timeout(SOON, watch.next()).await.unwrap().unwrap() else {
        panic!("no changes")
    };
    assert!(matches!(&changes[..], [AllocationChange::Put(put)] if put.name == "b"));

    // From before: only what is new. From now: that nothing is. From what nobody remembers, or a future: everything.
    let mut watch = client.watch("n", Some(&at(revision))).await.unwrap();
    let Notice::Changes { changes, revision: now, .. } = watch.next().await.unwrap() else {
        panic!("no changes")
    };
    assert_eq!(changes.len(), 1);
    let mut watch = client.watch("n", Some(&at(now))).await.unwrap();
    let Notice::Changes { changes, .. } = timeout(SOON, watch.next()).await.unwrap().unwrap() else {
        panic!("no changes")
    };
    assert!(changes.is_empty());
    let mut ahead = client.watch("n", Some(&at(1 << 40))).await.unwrap();
    assert!(
        matches!(ahead.next().await.unwrap(), Notice::Snapshot { allocations, .. } if allocations.len() == 2)
    );
    running.stop().await;
    let ended = timeout(SOON, watch.next()).await.unwrap().unwrap_err();
    assert!(ended.is_away(), "{ended}");

    // An allocator's memory of changes begins with its start.
    let running = world.on_socket().await;
    let client = client.patient(SOON);
    let mut watch = client.watch("n", Some(&at(revision))).await.unwrap();
    assert!(
        matches!(watch.next().await.unwrap(), Notice::Snapshot { allocations, .. } if allocations.len() == 2)
    );
    running.stop().await;
}

fn groups(revision: u64, port: u16) -> Groups {
    let text = format!(
        r#"{{"revision": {revision}, "security_groups": [{{"id": "web", "rules": [
            {{"direction": "ingress", "action": "allow", "protocol": "tcp", "ports": "{port}", "address_group": "office"}}
        ]}}], "address_groups": [{{"id": "office", "addresses": ["10.9.0.0/16"]}}]}}"#
    );
    serde_json::from_str(&text).unwrap()
}

#[tokio::test]
async fn security_groups_are_kept_with_a_revision_and_told() {
    let world = World::new();
    let running = world.on_socket().await;
    let client = world.client();
    assert_eq!(client.security_groups().await.unwrap(), Groups::default());
    let mut watch = client.watch("n", None).await.unwrap();
    let Notice::Snapshot { groups: none, .. } = watch.next().await.unwrap() else { panic!("no snapshot") };
    assert_eq!(*none, Groups::default());

    let first = client.put_security_groups(&groups(0, 80)).await.unwrap();
    assert!(first.changed && first.revision > 0);
    let Notice::Changes { groups: Some(told), revision, changes, .. } =
        timeout(SOON, watch.next()).await.unwrap().unwrap()
    else {
        panic!("no groups")
    };
    assert_eq!((&*told, revision, changes.len()), (&groups(first.revision, 80), first.revision, 0));
    // The same again is nothing new, also when it names a revision that is not there.
    for revision in [0, first.revision, first.revision + 7] {
        let again = client.put_security_groups(&groups(revision, 80)).await.unwrap();
        assert_eq!((again.revision, again.changed), (first.revision, false));
    }
    let stale = client.put_security_groups(&groups(first.revision + 7, 81)).await.unwrap_err();
    assert_eq!(stale.reason(), Some(Reason::StaleSecurityGroups));

    // A pod says which revision it needs; a continued watch gets the groups that it has missed, and no others.
    let pod = client.allocate(&request("n", "a"), None).await.unwrap();
    assert_eq!(pod.security_groups_revision, first.revision);
    let Notice::Changes { groups: None, changes, .. } = timeout(SOON, watch.next()).await.unwrap().unwrap()
    else {
        panic!("groups that have not changed")
    };
    assert_eq!(changes.len(), 1);
    let before = watch.position().unwrap().clone();
    let second = client.put_security_groups(&groups(first.revision, 81)).await.unwrap();
    assert!(second.changed && second.revision > first.revision);
    timeout(SOON, watch.next()).await.unwrap().unwrap();
    let now = watch.position().unwrap().clone();
    for (from, expected) in [(before, Some(groups(second.revision, 81))), (now, None)] {
        let mut continued = client.watch("n", Some(&from)).await.unwrap();
        let Notice::Changes { groups, .. } = timeout(SOON, continued.next()).await.unwrap().unwrap() else {
            panic!("a snapshot")
        };
        assert_eq!(groups.as_deref(), expected.as_ref());
    }
    // A node that nobody has heard of yet hears them once.
    let mut other = client.watch("m", None).await.unwrap();
    assert!(
        matches!(other.next().await.unwrap(), Notice::Snapshot { groups, .. } if groups.revision == second.revision)
    );
    assert!(timeout(Duration::from_millis(100), other.next()).await.is_err());

    // What cannot be kept is refused.
    let prefixes: Vec<String> =
        (0..100_000_u32).map(|n| std::net::Ipv4Addr::from(n << 8).to_string()).collect();
    let huge = serde_json::json!({"address_groups": [{"id": "office", "addresses": prefixes}]});
    let refused = client.put_security_groups(&serde_json::from_value(huge).unwrap()).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::Invalid));
    running.stop().await;

    let running = world.on_socket().await;
    assert_eq!(client.patient(SOON).security_groups().await.unwrap(), groups(second.revision, 81));
    running.stop().await;
}

#[tokio::test]
async fn a_pods_security_groups_change_while_it_runs() {
    let world = World::new();
    let running = world.on_socket().await;
    let client = world.client();
    let set = async |pod: &str, ids: &[&str]| {
        let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
        client.set_security_groups(&key(pod), &ids, None).await
    };
    let before = client.allocate(&request("n", "a"), None).await.unwrap();
    let rules = client.put_security_groups(&groups(0, 80)).await.unwrap();
    let mut watch = client.watch("n", None).await.unwrap();
    watch.next().await.unwrap();

    // The first answer is lost: the call is made again.
    world.vpc.fail_next(Operation::SetSecurityGroups, Fault::ReplyLost);
    let after = set("a", &["web", "db"]).await.unwrap();
    assert_eq!(after.security_groups, ["web", "db"]);
    assert_eq!((after.generation, after.security_groups_revision), (before.generation, rules.revision));
    assert!(after.revision > before.revision && !after.regrouping);
    let at_vpc = || {
        let mut all = world.vpc.interfaces().into_iter();
        all.find(|one| one.id == before.vpc_id).unwrap().security_groups
    };
    assert_eq!((at_vpc(), world.vpc.calls(Operation::SetSecurityGroups)), (after.security_groups.clone(), 2));
    // The agent is told to leave the pod to the VPC first, then what it has.
    let mut told = Vec::new();
    while told.last() != Some(&after) {
        let Notice::Changes { changes, .. } = timeout(SOON, watch.next()).await.unwrap().unwrap() else {
            panic!("a snapshot")
        };
        told.extend(changes.into_iter().map(|change| match change {
            AllocationChange::Put(put) => Allocation::clone(&put),
            AllocationChange::Removed { .. } => panic!("the pod is not gone"),
        }));
    }
    assert!(told[0].regrouping, "{told:?}");

    // Once more is nothing; what the VPC refuses leaves everything as it was.
    assert_eq!(set("a", &["web", "db"]).await.unwrap(), after);
    assert_eq!(world.vpc.calls(Operation::SetSecurityGroups), 2);
    let unknown = VpcError::Invalid { what: "there is no group sg-none".into() };
    world.vpc.fail_next(Operation::SetSecurityGroups, Fault::Error(unknown));
    let refused = set("a", &["sg-none"]).await.unwrap_err();
    assert!(refused.to_string().contains("no group sg-none"), "{refused}");
    let pod = loop {
        let pod = client.list(None).await.unwrap().remove(0);
        if !pod.regrouping {
            break pod;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!((&pod.security_groups, at_vpc()), (&after.security_groups, after.security_groups.clone()));

    for (pod, ids, reason) in [
        ("a", &["a b"][..], Reason::Invalid),
        ("a", &[], Reason::Invalid),
        ("a", &["1", "2", "3", "4", "5", "6"], Reason::Invalid),
        ("b", &["web"], Reason::UnknownPod),
    ] {
        assert_eq!(set(pod, ids).await.unwrap_err().reason(), Some(reason), "{ids:?}");
    }

    // What an allocator leaves in the midst is finished by the next one, asked or not.
    world.vpc.set_faults(Faults { error: 1.0, ..Faults::default() });
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.set_security_groups(&key("a"), &["late".to_owned()], None).await }
    });
    while !client.list(None).await.unwrap()[0].regrouping {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    running.stop().await;
    waiting.await.unwrap().unwrap_err();
    assert_ne!(at_vpc(), ["late"]);
    world.vpc.set_faults(Faults::default());
    let running = world.on_socket().await;
    timeout(SOON, async {
        while running.allocator.list(None)[0].security_groups != ["late"] {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(at_vpc(), ["late"]);
    assert_eq!(world.vpc.violations(), Violations::default());
    running.stop().await;
}

#[tokio::test]
async fn a_position_in_another_store_leads_to_a_snapshot() {
    let world = World::new();
    let running = world.on_socket().await;
    let client = world.client();
    let mut follower = client.follow("n");
    client.allocate(&request("n", "old"), None).await.unwrap();
    let mut pods = Vec::new();
    follow_until(&mut follower, &mut pods, "old").await;
    let before = follower.position().unwrap().clone();
    running.stop().await;

    // A new store, whose revisions have come past that one before the watch is there again.
    fs::remove_file(world.path("ipam.redb")).unwrap();
    let running = world.on_socket().await;
    for pod in ["a", "b", "c", "d", "e", "f", "g", "h"] {
        running.allocator.allocate(&request("n", pod)).await.unwrap();
    }
    let newest = running.allocator.list(Some("n")).iter().map(|pod| pod.revision).max().unwrap();
    assert!(newest > before.revision, "{newest} and {before:?}");
    let Notice::Snapshot { allocations, .. } = next(&mut follower).await else {
        panic!("changes since another store's revision")
    };
    assert_eq!(allocations.len(), 8);
    let after = follower.position().unwrap();
    assert_ne!(after.store, before.store);

    // The same store keeps its id.
    let store = after.store.clone();
    running.stop().await;
    let running = world.on_socket().await;
    assert_eq!(running.allocator.store_id(), store);
    running.stop().await;
}

#[tokio::test]
async fn followers_and_patient_calls_survive_the_server() {
    let world = World::new();
    let client = world.client();
    // Before there is a server at all.
    let mut follower = client.follow("n");
    let Event::Away(error) = follower.next().await else { panic!("a server where none is") };
    assert!(error.is_away() && error.to_string().contains("ipam.sock"), "{error}");
    let impatient = client.pools().await.unwrap_err();
    assert!(matches!(impatient, ClientError::Unreachable { .. }));

    let running = world.on_socket().await;
    let mut pods = Vec::new();
    client.allocate(&request("n", "a"), None).await.unwrap();
    follow_until(&mut follower, &mut pods, "a").await;

    running.stop().await;
    let Event::Away(_) = timeout(SOON, follower.next()).await.unwrap() else { panic!("the server is gone") };
    let patient = tokio::spawn({
        let client = client.clone().patient(SOON);
        async move { client.allocate(&request("n", "b"), None).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!patient.is_finished());
    let running = world.on_socket().await;
    patient.await.unwrap().unwrap();
    follow_until(&mut follower, &mut pods, "b").await;
    pods.sort();
    assert_eq!(pods, ["a", "b"]);
    running.stop().await;
}

/// An authority, and certificates signed by it.
struct Authority {
    certificate: rcgen::Certificate,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::new(vec![]).unwrap();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = parameters.self_signed(&key).unwrap();
        Self { certificate, issuer: rcgen::Issuer::new(parameters, key) }
    }

    fn sign(&self, name: &str) -> Tls {
        let key = rcgen::KeyPair::generate().unwrap();
        let parameters = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        Tls {
            ca: self.certificate.pem().into_bytes(),
            certificate: certificate.pem().into_bytes(),
            key: key.serialize_pem().into_bytes(),
        }
    }
}

#[tokio::test]
async fn tcp_wants_certificates_of_both_sides() {
    let world = World::new();
    let authority = Authority::new();
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let listener = Listener::tls(any, authority.sign("localhost")).await.unwrap();
    let port: SocketAddr = listener.address().parse().unwrap();
    let running = world.serve(vec![listener, Listener::unix(world.socket()).unwrap()]).await;
    let address: Address = format!("https://localhost:{}", port.port()).parse().unwrap();

    let client = Client::new(address.clone(), Some(&authority.sign("agent"))).unwrap();
    assert_eq!(client.pools().await.unwrap()[0].node, "n");
    client.allocate(&request("n", "a"), None).await.unwrap();
    // Both listeners give the same allocator.
    assert_eq!(world.client().list(None).await.unwrap().len(), 1);

    // A certificate of somebody else, to either side, is of no use.
    let stranger = Authority::new().sign("agent");
    let own = authority.sign("agent");
    for tls in
        [Tls { ca: own.ca.clone(), ..stranger.clone() }, Tls { ca: stranger.ca.clone(), ..own.clone() }]
    {
        let error = timeout(SOON, Client::new(address.clone(), Some(&tls)).unwrap().pools()).await.unwrap();
        assert!(matches!(error, Err(ClientError::Unreachable { .. })), "{error:?}");
    }
    assert!(matches!(Client::new(address, None), Err(ClientError::Tls { .. })));
    running.stop().await;
}

#[tokio::test]
async fn a_mode_that_was_opened_lets_nobody_else_in() {
    let world = World::new();
    let running = world.on_socket().await;
    // Another user must be able to reach the socket for this; what stops him then are his credentials.
    for path in [world.directory.path(), Path::new(&world.path("run"))] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::set_permissions(world.socket(), fs::Permissions::from_mode(0o666)).unwrap();
    let me = fs::metadata("/proc/self").map(|meta| std::os::unix::fs::MetadataExt::uid(&meta)).unwrap();
    if me != 0 {
        return running.stop().await;
    }
    // The test itself again, as nobody: that one does no more than ask.
    let ask = std::env::current_exe().unwrap();
    let copy = world.path("ask");
    fs::copy(ask, &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    let output = tokio::task::spawn_blocking({
        let socket = world.socket();
        move || {
            std::process::Command::new("setpriv")
                .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
                .arg(copy)
                .args(["--exact", "ask_as_somebody_else", "--nocapture", "--ignored"])
                .env("IPAM_SOCKET", socket)
                .output()
                .unwrap()
        }
    })
    .await
    .unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("user 65534 may not use"), "{text}");
    running.stop().await;
}

#[tokio::test]
#[ignore = "run by a_mode_that_was_opened_lets_nobody_else_in"]
async fn ask_as_somebody_else() {
    let Ok(socket) = std::env::var("IPAM_SOCKET") else { return };
    let client = Client::new(Address::Unix(socket.into()), None).unwrap();
    println!("{}", client.pools().await.unwrap_err());
}

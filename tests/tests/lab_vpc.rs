//! The fabric as the allocator's VPC: what is allocated is forwarded, what is released is nobody's.
//!
//! ```text
//!   allocator ── gRPC ──► agents of n, m          vm ── fabric ──┬── n eth1 ═ VLAN ═ pod
//!       └── VPC API ──► the fabric's tables                      └── m eth1 ═ VLAN ═ pod, after it has moved
//! ```

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    thread,
    time::{Duration, Instant},
};

use eniway_ipam::{
    AddressRequest, AllocateRequest, Allocation, MemoryVpc, PodKey, Vpc,
    net::VlanId,
    vpc::{Attachment, CreateInterface, Faults, Violations, VpcError, WantIpv6},
};
use eniway_tests::lab::{
    Error, Lab, Mac, Netns, Node, Result, Source,
    fabric::{Attached, Kind},
    net::{self, UdpEcho},
    raw::{self, Frame, Sniffer},
    spec::GATEWAY_MAC,
    vpc::PODS_SUBNET,
};

const SECOND: Duration = Duration::from_secs(1);
const SHORT: Duration = Duration::from_millis(200);
const SOON: Duration = Duration::from_secs(10);
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 1, 18, 9);

fn lab(id: &str) -> Result<Lab> {
    let lab = Lab::builder(id)
        .source(Source::Allocator { cool_down: SECOND })
        .node("n", [10, 1, 0, 10], [10, 1, 16, 10])
        .node("m", [10, 1, 0, 11], [10, 1, 16, 11])
        .vm("vm", [10, 1, 0, 20])
        .build()?;
    lab.start_agents()?;
    Ok(lab)
}

fn request(node: &str, sandbox: &Netns, address: AddressRequest) -> AllocateRequest {
    AllocateRequest {
        node: node.into(),
        key: PodKey { uid: "uid-1".into(), container_id: sandbox.name().into() },
        namespace: "default".into(),
        name: "db-0".into(),
        netns: Some(sandbox.path().display().to_string()),
        interface: "eth0".into(),
        address,
        security_groups: Some(vec!["sg-db".into()]),
        timeout: None,
    }
}

fn fixed() -> AddressRequest {
    AddressRequest::Static { ipv4: Some(ADDRESS), ipv6: None, retention: None }
}

fn vlan(allocation: &Allocation) -> u16 {
    allocation.vlan.try_into().expect("a VLAN id")
}

/// What the fabric has beyond the nodes' own NICs.
fn sub_enis(lab: &Lab) -> Result<Vec<Attached>> {
    let mut all = lab.fabric().attached()?;
    all.retain(|nic| nic.vlan != 0);
    Ok(all)
}

/// The only sub-ENI of the fabric is the one that was allocated.
fn assert_carried(lab: &Lab, node: &Node, allocation: &Allocation) -> Result<()> {
    let wanted = Attached {
        port: node.parent_port.clone(),
        vlan: vlan(allocation),
        mac: Mac(allocation.mac.0),
        ip: allocation.addresses.ipv4,
        eip: None,
    };
    assert_eq!(sub_enis(lab)?, [wanted]);
    Ok(())
}

fn wait_until(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + SOON;
    while !done()? {
        assert!(Instant::now() < end, "{what} did not happen");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn release(lab: &Lab, allocation: &Allocation) -> Result<()> {
    lab.ipam()?
        .ask(|client| async move { client.release(&allocation.key, Some(allocation.generation)).await })?;
    Ok(())
}

/// One datagram from the pod and one to it: no second attempt.
fn first_packets_pass(lab: &Lab, pod: &Netns, ip: Ipv4Addr) -> Result<()> {
    let vm = lab.vm("vm")?;
    let (from_pod, to_pod) = (SocketAddrV4::new(vm.ip, 7000), SocketAddrV4::new(ip, 7000));
    let echo = UdpEcho::start(&vm.netns, from_pod)?;
    let answer = net::udp_exchange(pod, 4000, from_pod, b"first", SECOND);
    let Ok(answer) = answer else {
        let counters: Vec<String> =
            lab.agents().iter().map(|agent| agent.cli(&["counters"])).collect::<Result<_>>()?;
        let fabric = (lab.fabric().counts()?, lab.fabric().flows_between(ip, vm.ip, 7000)?);
        panic!("{answer:?}; the VM saw {:?}; {fabric:?}; {}", echo.seen(), counters.join("\n"));
    };
    assert_eq!(answer.payload, b"first");
    assert_eq!(echo.seen(), [SocketAddrV4::new(ip, 4000)]);
    let _echo = UdpEcho::start(pod, to_pod)?;
    assert_eq!(net::udp_exchange(&vm.netns, 4001, to_pod, b"first", SECOND)?.payload, b"first");
    Ok(())
}

/// The pod that had this, or what is left of it on its node, is heard by nobody, and nothing comes to it.
fn assert_dead(lab: &Lab, node: &Node, was: &Allocation) -> Result<()> {
    let vm = lab.vm("vm")?;
    let (ip, vlan) = (was.addresses.ipv4, vlan(was));
    let mut sniffer = Sniffer::open(&vm.netns, "eth0")?;
    lab.fabric().clear_counts()?;
    let frame = Frame::new(GATEWAY_MAC, Mac(was.mac.0)).vlan(vlan);
    let frame = frame.udp(SocketAddrV4::new(ip, 4000), SocketAddrV4::new(vm.ip, 7000), b"late");
    raw::send(&node.netns, "eth1", &frame)?;
    assert_eq!(sniffer.wait(SHORT, |frame| frame.ipv4().is_some_and(|(src, ..)| *src.ip() == ip))?, None);
    let violations = lab.fabric().violations()?;
    let [count] = violations.as_slice() else { panic!("{violations:?}") };
    assert_eq!(
        (count.kind, count.packets, count.vlan, &count.port),
        (Kind::UnknownVlan, 1, vlan, &node.parent_port)
    );
    Ok(())
}

/// A pod with a static address lives on n, moves to m, and goes with its node; nobody but the VPC's API tells the fabric.
#[test]
fn what_is_allocated_is_forwarded_and_what_is_released_is_not() -> Result<()> {
    let lab = lab("v-life")?;
    let (n, m, vm, ipam) = (lab.node("n")?, lab.node("m")?, lab.vm("vm")?, lab.ipam()?);
    let (here, there) = (lab.sandbox("here")?, lab.sandbox("there")?);
    assert_eq!(sub_enis(&lab)?, []);

    let first = ipam.allocate(&request("n", here.netns(), fixed()), true)?;
    assert_eq!(first.addresses.ipv4, ADDRESS);
    assert_carried(&lab, n, &first)?;
    let interfaces = ipam.vpc().interfaces();
    let [interface] = interfaces.as_slice() else { panic!("{interfaces:?}") };
    assert_eq!((&*interface.owner, &*interface.security_groups), ("lab", &["sg-db".to_owned()][..]));
    first_packets_pass(&lab, here.netns(), ADDRESS)?;

    release(&lab, &first)?;
    wait_until("the end of the sub-ENI", || Ok(sub_enis(&lab)?.is_empty()))?;
    assert_dead(&lab, n, &first)?;
    let to = SocketAddrV4::new(ADDRESS, 7000);
    assert!(net::udp_exchange(&vm.netns, 4002, to, b"late", SHORT).is_err());
    assert_eq!(lab.fabric().count(Kind::NoRoute)?, 1);
    // The agent hears of it by itself.
    wait_until("the end of the pod's interface", || {
        Ok(!here.netns().exec(&["ip", "-br", "link"])?.contains("eth0"))
    })?;

    // The address goes with the pod's name; what it was on n stays dead.
    let moved = ipam.allocate(&request("m", there.netns(), fixed()), true)?;
    assert_eq!((moved.addresses, moved.mac), (first.addresses, first.mac));
    assert_carried(&lab, m, &moved)?;
    first_packets_pass(&lab, there.netns(), ADDRESS)?;
    assert_dead(&lab, n, &first)?;
    // A pod with an address of no name cannot get the VLAN that rests, and the fabric carries both.
    let pool = ipam.allocate(&request("n", here.netns(), AddressRequest::Pool), true)?;
    assert_ne!((pool.vlan, pool.addresses), (first.vlan, first.addresses));
    assert_eq!(sub_enis(&lab)?.len(), 2);
    first_packets_pass(&lab, here.netns(), pool.addresses.ipv4)?;
    assert_dead(&lab, n, &first)?;

    ipam.ask(|client| async move { client.drain_node("m").await })?;
    wait_until("the end of all on m", || Ok(sub_enis(&lab)?.iter().all(|nic| nic.port == n.parent_port)))?;
    assert_carried(&lab, n, &pool)?;
    assert_dead(&lab, m, &moved)?;
    // It rests in the pool first; then its node has one interface more than it may.
    release(&lab, &pool)?;
    wait_until("the end of the last one", || Ok(sub_enis(&lab)?.is_empty()))?;
    assert_dead(&lab, n, &pool)?;
    assert_eq!(ipam.vpc().violations(), Violations::default());
    lab.shutdown()
}

/// The fabric has something in the way: the VPC's call fails, leaves nothing, and succeeds once the way is free.
#[test]
fn what_the_fabric_cannot_do_has_not_happened() -> Result<()> {
    let lab = lab("v-fail")?;
    let (n, ipam) = (lab.node("n")?, lab.ipam()?);
    let here = lab.sandbox("here")?;
    let stranger = Mac([2, 0, 0, 0, 0, 9]);
    lab.fabric().attach_nic(&n.parent_port, 4000, ADDRESS, stranger, None)?;

    let request = request("n", here.netns(), fixed());
    let hurried = AllocateRequest { timeout: Some(SHORT), ..request.clone() };
    let error = ipam.allocate(&hurried, true).expect_err("the address is taken");
    assert!(matches!(&error, Error::Ipam(text) if text.contains("did not finish")), "{error}");
    assert_eq!(ipam.vpc().interfaces(), []);
    wait_until("the VPC's complaint", || {
        let pools = ipam.ask(|client| async move { client.pools().await })?;
        let problem = pools.iter().find_map(|pool| pool.problem.clone()).unwrap_or_default();
        Ok(problem.contains("in the way") && problem.contains("10.1.18.9"))
    })?;

    lab.fabric().detach_nic(&n.parent_port, 4000)?;
    let pod = ipam.allocate(&request, true)?;
    assert_carried(&lab, n, &pod)?;
    first_packets_pass(&lab, here.netns(), ADDRESS)?;
    lab.shutdown()
}

/// Many callers at once, few places and addresses, calls that fail and lose their answers: the fabric has what the VPC's
/// books say, each time all are done.
#[test]
fn books_and_tables_agree() -> Result<()> {
    let lab = Lab::builder("v-books")
        .source(Source::ALLOCATOR)
        .node("n", [10, 1, 0, 10], [10, 1, 16, 10])
        .node("m", [10, 1, 0, 11], [10, 1, 16, 11])
        .build()?;
    let vpc = lab.ipam()?.vpc();
    vpc.set_faults(Faults { error: 0.1, reply_lost: 0.1, ..Faults::default() });
    let mut most = 0;
    for round in 0..20_u64 {
        thread::scope(|scope| {
            for caller in 0..4 {
                scope.spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
                    runtime.block_on(call_at_random(vpc, round * 4 + caller));
                });
            }
        });
        let mut books: Vec<Attached> = Vec::new();
        for interface in vpc.interfaces() {
            let Some(Attachment::Parent { id, vlan }) = &interface.attachment else { continue };
            let node = lab.nodes().iter().find(|node| node.parent_id() == *id).expect("a node of the lab");
            books.push(Attached {
                port: node.parent_port.clone(),
                vlan: vlan.get(),
                mac: Mac(interface.mac.0),
                ip: interface.addresses.ipv4,
                eip: None,
            });
        }
        books.sort_unstable();
        assert_eq!(sub_enis(&lab)?, books);
        for nic in &books {
            assert_eq!(lab.fabric().nic_of(nic.ip)?, (nic.port.clone(), nic.vlan, nic.mac));
        }
        most = most.max(books.len());
    }
    assert!(most > 4, "never more than {most} interfaces: nothing is proved");
    lab.shutdown()
}

async fn call_at_random(vpc: &MemoryVpc, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    for call in 0..50 {
        let parent = random.choice(["eni-n", "eni-m"]).expect("one of two").to_owned();
        let vlan = VlanId::new(random.u16(1..=6)).expect("a VLAN id");
        let id = random.choice(vpc.interfaces()).map(|interface| interface.id).unwrap_or_default();
        let result = match random.u8(..5) {
            0 | 1 => {
                let request = CreateInterface {
                    token: format!("{seed}-{call}"),
                    name: "any".into(),
                    owner: "test".into(),
                    parent: Some((parent, vlan)),
                    subnet: PODS_SUBNET.into(),
                    ipv4: random.bool().then(|| Ipv4Addr::new(10, 1, 18, random.u8(1..=8))),
                    ipv6: WantIpv6::No,
                    security_groups: Vec::new(),
                };
                vpc.create(request).await.map(drop)
            }
            2 => vpc.attach(&id, Attachment::Parent { id: parent, vlan }).await.map(drop),
            3 => vpc.detach(&id).await,
            _ => vpc.delete(&id).await,
        };
        // The books refuse what the fabric could not do: it never has to.
        if let Err(VpcError::Failed { what }) = result {
            assert!(what.contains("injected"), "{what}");
        }
    }
}

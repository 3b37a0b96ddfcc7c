//! One test per rule of the allocator.

mod common;

use std::{collections::HashSet, time::Duration};

use common::{MINUTE, SECOND, World, node, request, static_request, subnet};
use eniway_ipam::{
    Acknowledgement, AddressRequest, AllocateRequest, AllocationChange, Confirm, Error, Node, NodeKind,
    Notice, Parent, PodKey, Policy, Position, Released, Settings,
    model::LeakKind,
    vpc::{CreateInterface, Fault, Operation, Vpc, VpcError, WantIpv6},
};

const PRE_BOUND: Policy = Policy::PreBound { minimum: 3, maximum: 6 };

#[tokio::test]
async fn rule_1_bound_stays_between_minimum_and_maximum() {
    let world = World::new().await;
    world.add_node("a", 20, PRE_BOUND).await;
    world.tick().await;
    assert_eq!(world.pool("a").idle, 3, "below the minimum: bound at once");

    // Pods come: every one is followed by a new pre-bound interface at once, up to the limit.
    let mut pods = Vec::new();
    for index in 0..17 {
        pods.push(world.allocate("a", &format!("pod-{index}")).await.unwrap());
        world.tick().await;
        assert_eq!((world.pool("a").pods, world.pool("a").idle), (index + 1, 3));
    }
    pods.push(world.allocate("a", "pod-17").await.unwrap());
    world.tick().await;
    assert_eq!((world.pool("a").pods, world.pool("a").idle), (18, 2), "the limit is 20");

    // Pods go: above the maximum one interface is given back about every two minutes.
    for pod in pods.drain(8..) {
        world.release(&pod).await;
    }
    world.pass(MINUTE).await;
    let idle = world.pool("a").idle;
    assert!((11..=12).contains(&idle), "{idle}");
    let mut last = world.at_vpc();
    let mut given_back = Vec::new();
    for second in 0..30 * 60 {
        world.pass(SECOND).await;
        let now = world.at_vpc();
        assert!(last - now <= 1, "one at a time");
        if now < last {
            given_back.push(second);
            last = now;
        }
    }
    assert_eq!((world.pool("a").pods, world.pool("a").idle), (8, 6), "until at the maximum");
    assert!(given_back.windows(2).all(|pair| (118..=125).contains(&(pair[1] - pair[0]))), "{given_back:?}");

    // The limit falls below what is bound: idle ones go at once, those of pods stay.
    let parent = |limit| vec![Parent { id: "parent-a".into(), interface: "eth1".into(), limit }];
    world.allocator().put_node(node("a", parent(10), PRE_BOUND)).await.unwrap();
    world.tick().await;
    assert_eq!((world.pool("a").pods, world.pool("a").idle), (8, 2));
    world.allocator().put_node(node("a", parent(5), PRE_BOUND)).await.unwrap();
    world.tick().await;
    assert_eq!((world.pool("a").pods, world.pool("a").idle), (8, 0));
    world.assert_no_violations();
}

#[tokio::test]
async fn rule_2_released_interfaces_cool_down_in_the_pool() {
    let mut world = World::new().await;
    world.add_node("a", 4, Policy::PreBound { minimum: 4, maximum: 4 }).await;
    world.tick().await;
    let first = world.allocate("a", "first").await.unwrap();
    world.release(&first).await;
    let created = world.vpc.calls(Operation::Create);

    // It stays at the VPC and is visible, but nobody gets it, not even when nothing else is left and after a restart.
    assert_eq!(world.pool("a").cooling, 1);
    let cooling = world.allocator().cooling();
    assert_eq!((cooling[0].addresses, cooling[0].remaining_ms), (Some(first.addresses), 60_000));
    for index in 0..3 {
        let other = world.allocate("a", &format!("other-{index}")).await.unwrap();
        assert_ne!((other.addresses, other.vlan), (first.addresses, first.vlan));
    }
    let full = world.allocate("a", "fifth").await.unwrap_err().to_string();
    assert!(full.contains("1 cooling down (the next one for 60s)"), "{full}");
    world.pass(Duration::from_secs(40)).await;
    world.restart().await;
    world.pass(Duration::from_secs(19)).await;
    assert!(matches!(world.allocate("a", "fifth").await, Err(Error::NodeFull { cooling: 1, .. })));
    world.pass(SECOND).await;
    let again = world.allocate("a", "fifth").await.unwrap();
    assert_eq!((again.addresses, again.vlan), (first.addresses, first.vlan));
    assert!(again.generation > first.generation);
    assert_eq!(world.vpc.calls(Operation::Create), created, "it never left the pool");
    world.assert_no_violations();
}

#[tokio::test]
async fn rule_2_pods_get_any_interface_of_the_pool() {
    let world = World::new().await;
    world.add_node("a", 40, Policy::PreBound { minimum: 20, maximum: 20 }).await;
    world.tick().await;
    let mut seen = HashSet::new();
    for index in 0..12 {
        let pod = world.allocate("a", &format!("pod-{index}")).await.unwrap();
        seen.insert(pod.addresses.ipv4);
        world.release(&pod).await;
    }
    assert_eq!(seen.len(), 12, "each of the released ones is cooling");
    let lowest_first: Vec<_> = (4..16).map(|host| std::net::Ipv4Addr::new(10, 1, 0, host)).collect();
    assert!(lowest_first.iter().any(|ipv4| !seen.contains(ipv4)), "not in order of address: {seen:?}");
}

#[tokio::test]
async fn rule_3_static_addresses_stay_with_the_pod_name() {
    let mut world = World::new().await;
    for name in ["a", "b"] {
        world.add_node(name, 20, Policy::OnDemand).await;
    }
    world.pass(MINUTE).await;
    assert_eq!(world.at_vpc(), 0, "no pool");

    // Bound at creation, only unbound at deletion.
    let on_a = world.allocate_as(&static_request("a", "db-0", "one")).await.unwrap();
    assert!(on_a.is_static);
    world.release(&on_a).await;
    world.tick().await;
    assert_eq!(world.at_vpc(), 1);
    assert_eq!(world.vpc.interfaces()[0].attachment, None);

    // Rescheduled to another node, after a restart, within the retention time: the same address.
    world.restart().await;
    world.pass(Duration::from_secs(200)).await;
    let on_b = world.allocate_as(&static_request("b", "db-0", "two")).await.unwrap();
    assert_eq!((on_b.addresses, on_b.mac, on_b.node.as_str()), (on_a.addresses, on_a.mac, "b"));
    assert!(on_b.generation > on_a.generation);

    // Nobody else gets it while it is in use.
    let in_use = world.allocate_as(&static_request("a", "db-0", "three")).await;
    assert!(matches!(in_use, Err(Error::StaticInUse { .. })), "{in_use:?}");

    // The same pod with a new sandbox takes its interface over; the old sandbox's release is a no-op then.
    let request = AllocateRequest {
        key: PodKey { uid: "two".into(), container_id: "second-sandbox".into() },
        ..static_request("b", "db-0", "two")
    };
    let taken_over = world.allocate_as(&request).await.unwrap();
    assert_eq!(taken_over.vpc_id, on_b.vpc_id);
    assert_eq!(world.allocator().release(&on_b.key, None).await.unwrap(), Released::NotAllocated);

    // After the retention time it is gone.
    world.release(&taken_over).await;
    world.pass(Duration::from_secs(299)).await;
    assert_eq!(world.at_vpc(), 1);
    world.pass(Duration::from_secs(2)).await;
    assert_eq!(world.at_vpc(), 0);

    // Retention zero is for ever.
    let forever = AllocateRequest {
        address: AddressRequest::Static { ipv4: None, ipv6: None, retention: Some(Duration::ZERO) },
        ..static_request("a", "db-1", "four")
    };
    let kept = world.allocate_as(&forever).await.unwrap();
    world.release(&kept).await;
    world.pass(60 * MINUTE).await;
    assert_eq!(world.at_vpc(), 1);

    // A pod without a static address on such a node: deleted at deletion, after its cool-down.
    let plain = world.allocate("a", "plain").await.unwrap();
    assert_eq!(world.at_vpc(), 2);
    world.release(&plain).await;
    world.pass(Duration::from_secs(59)).await;
    assert_eq!(world.at_vpc(), 2);
    world.pass(SECOND).await;
    assert_eq!(world.at_vpc(), 1);
    world.assert_no_violations();
}

#[tokio::test]
async fn rule_3_an_address_can_be_asked_for() {
    let world = World::new().await;
    world.add_node("a", 20, Policy::OnDemand).await;
    let ask = |pod: &str, ipv4: &str| AllocateRequest {
        address: AddressRequest::Static { ipv4: Some(ipv4.parse().unwrap()), ipv6: None, retention: None },
        ..static_request("a", pod, pod)
    };
    let pod = world.allocate_as(&ask("example-1", "10.1.2.2")).await.unwrap();
    assert_eq!(pod.addresses.ipv4.to_string(), "10.1.2.2");
    let taken = world.allocate_as(&ask("example-2", "10.1.2.2")).await.unwrap_err();
    assert!(matches!(taken, Error::Vpc(VpcError::AddressTaken { .. })), "{taken}");
    let foreign = world.allocate_as(&ask("example-3", "10.9.2.2")).await.unwrap_err().to_string();
    assert!(foreign.contains("10.9.2.2 is in no subnet"), "{foreign}");
    assert_eq!(world.at_vpc(), 1, "refused allocations leave nothing behind");
    let other = world.allocate_as(&ask("example-2", "10.1.2.3")).await.unwrap();
    assert_ne!(other.vlan, pod.vlan);
}

#[tokio::test]
async fn rule_3_the_vlan_of_an_unbound_interface_rests() {
    let world = World::new().await;
    world.add_node("a", 20, Policy::OnDemand).await;
    let pod = world.allocate_as(&static_request("a", "db-0", "one")).await.unwrap();
    world.release(&pod).await;
    world.tick().await;
    assert_eq!(world.allocator().cooling()[0].vlan.map(i32::from), Some(pod.vlan));
    let again = world.allocate_as(&static_request("a", "db-0", "two")).await.unwrap();
    assert_eq!(again.addresses, pod.addresses, "the address belongs to the name and need not rest");
    assert_ne!(again.vlan, pod.vlan);
    world.pass(MINUTE).await;
    assert!(world.allocator().cooling().is_empty());
}

#[tokio::test]
async fn rule_3_a_static_address_takes_the_place_of_a_pre_bound_interface() {
    let world = World::new().await;
    world.add_node("a", 4, Policy::PreBound { minimum: 4, maximum: 4 }).await;
    world.tick().await;
    assert_eq!(world.pool("a").idle, 4);
    let pod = world.allocate_as(&static_request("a", "db-0", "one")).await.unwrap();
    assert!(pod.is_static);
    world.tick().await;
    assert_eq!((world.pool("a").pods, world.pool("a").idle), (1, 3));
    world.assert_no_violations();
}

#[tokio::test]
async fn rule_4_the_subnet_with_the_most_available_addresses() {
    let world = World::new().await;
    let overlap = world.add_subnet("net-x", "10.1.8.0/24").await.unwrap_err().to_string();
    assert!(overlap.contains("net-x (10.1.8.0/24) overlaps net-a (10.1.0.0/20)"), "{overlap}");

    let small = World::with(Settings::default()).await;
    // /29 has 3 addresses for interfaces, /28 has 11.
    for (id, prefix) in [("net-b", "10.2.0.0/29"), ("net-c", "10.3.0.0/28")] {
        small.add_subnet(id, prefix).await.unwrap();
    }
    let only = |subnets: &[&str]| Node {
        subnets: subnets.iter().map(|&subnet| subnet.into()).collect(),
        ..node(
            "a",
            vec![Parent { id: "parent-a".into(), interface: "eth1".into(), limit: 100 }],
            Policy::OnDemand,
        )
    };
    small.vpc.add_parent("parent-a", 100);
    small.allocator().put_node(only(&["net-b", "net-c"])).await.unwrap();
    small.tick().await;
    let mut used = Vec::new();
    for index in 0..14 {
        used.push(small.allocate("a", &format!("pod-{index}")).await.unwrap().subnet_id);
    }
    assert!(used[..8].iter().all(|subnet| subnet == "net-c"), "{used:?}");
    assert_eq!(used.iter().filter(|&subnet| subnet == "net-b").count(), 3);

    // Exhaustion names subnets and counts; a subnet added live is used at once.
    let exhausted = small.allocate("a", "pod-14").await.unwrap_err().to_string();
    assert!(exhausted.contains("net-b (10.2.0.0/29): 0 of 3 addresses available, 3 are ours"), "{exhausted}");
    assert!(
        exhausted.contains("net-c (10.3.0.0/28): 0 of 11 addresses available, 11 are ours"),
        "{exhausted}"
    );
    small.add_subnet("net-d", "10.4.0.0/24").await.unwrap();
    small.allocator().put_node(only(&[])).await.unwrap();
    small.tick().await;
    let before = small.allocate("a", "pod-15").await.unwrap();
    assert_eq!(before.subnet_id, "net-a");
    small.allocator().put_node(only(&["net-b", "net-c", "net-d"])).await.unwrap();
    assert_eq!(small.allocate("a", "pod-14").await.unwrap().subnet_id, "net-d");
}

#[tokio::test]
async fn rule_4_a_subnet_that_fills_up_meanwhile_is_left_for_another() {
    let world = World::new().await;
    world.add_subnet("net-b", "10.2.0.0/24").await.unwrap();
    world.add_node("a", 20, Policy::OnDemand).await;
    world.tick().await;
    // The VPC says so although its last count was fine.
    world
        .vpc
        .fail_next(Operation::Create, Fault::Error(VpcError::SubnetExhausted { subnet: "net-a".into() }));
    assert_eq!(world.allocate("a", "pod").await.unwrap().subnet_id, "net-b");
    world.assert_no_violations();
}

#[tokio::test]
async fn rule_5_node_deletion_releases_everything_and_limits_hold() {
    let world = World::new().await;
    // An exclusive-ENI node with 5 bindable ENIs holds 4 pods.
    world.vpc.add_instance("bms-1", 5);
    let exclusive = Node {
        kind: NodeKind::ExclusiveEni { instance: "bms-1".into(), bindable: 5 },
        ..node("bms", Vec::new(), Policy::PreBound { minimum: 2, maximum: 3 })
    };
    world.allocator().put_node(exclusive).await.unwrap();
    world.tick().await;
    assert_eq!(world.pool("bms").idle, 2);
    let mut pods = Vec::new();
    for index in 0..4 {
        let pod = world.allocate("bms", &format!("bms-{index}")).await.unwrap();
        assert_eq!((pod.vlan, pod.parent.clone()), (0, None));
        pods.push(pod);
    }
    assert!(matches!(world.allocate("bms", "bms-4").await, Err(Error::NodeFull { limit: 4, pods: 4, .. })));

    // A sub-ENI node: up to the parents' limits, together.
    let parents = ["p1", "p2"].map(|id| {
        world.vpc.add_parent(id, 3);
        Parent { id: id.into(), interface: "eth1".into(), limit: 3 }
    });
    world.allocator().put_node(node("vm", parents.to_vec(), Policy::OnDemand)).await.unwrap();
    let mut on_vm = Vec::new();
    for index in 0..6 {
        on_vm.push(world.allocate("vm", &format!("vm-{index}")).await.unwrap());
    }
    assert!(matches!(world.allocate("vm", "vm-6").await, Err(Error::NodeFull { limit: 6, pods: 6, .. })));
    let keys: HashSet<_> = on_vm.iter().map(|pod| (pod.parent.clone(), pod.vlan)).collect();
    assert_eq!(keys.len(), 6, "no VLAN twice on a parent");
    let default: Parent = serde_json::from_str(r#"{"id": "p", "interface": "eth1"}"#).unwrap();
    assert_eq!(default.limit, 256);

    // Node deletion.
    for pod in &pods {
        world.vpc.set_in_use(&pod.vpc_id, false);
    }
    world.allocator().drain_node("bms").await.unwrap();
    assert!(matches!(world.allocate("bms", "late").await, Err(Error::Draining(_))));
    assert!(world.allocator().list(Some("bms")).is_empty());
    world.pass(Duration::from_secs(62)).await;
    assert_eq!(world.at_vpc(), 6, "only the other node's are left");
    assert!(world.allocator().pools().iter().all(|pool| pool.node != "bms"));
    assert!(matches!(world.allocate("bms", "late").await, Err(Error::UnknownNode(_))));
    world.assert_no_violations();
}

#[tokio::test]
async fn rule_6_targets_as_in_cce() {
    let world = World::new().await;
    world.add_node("a", 256, Policy::TARGETS).await;
    world.tick().await;
    assert_eq!(world.pool("a").idle, 10, "minimum 10");
    let mut pods = Vec::new();
    for index in 0..8 {
        pods.push(world.allocate("a", &format!("pod-{index}")).await.unwrap());
        world.tick().await;
        assert_eq!(world.at_vpc(), 10);
    }
    for index in 8..20 {
        pods.push(world.allocate("a", &format!("pod-{index}")).await.unwrap());
        world.tick().await;
        assert_eq!(world.pool("a").idle, 2, "warm target 2 once the minimum is used up");
    }
    for pod in pods.drain(15..) {
        world.release(&pod).await;
    }
    world.pass(30 * MINUTE).await;
    assert_eq!((world.pool("a").pods, world.pool("a").idle), (15, 4), "warm 2 and threshold 2 stay");
    for pod in pods {
        world.release(&pod).await;
    }
    world.pass(60 * MINUTE).await;
    assert_eq!(world.pool("a").idle, 10, "never below the minimum");

    // With a maximum, nothing is bound in advance above it, but pods still get theirs.
    world.add_node("b", 256, Policy::Targets { minimum: 3, maximum: 5, warm: 2, reclaim_above: 2 }).await;
    world.tick().await;
    for index in 0..7 {
        world.allocate("b", &format!("b-{index}")).await.unwrap();
        world.tick().await;
    }
    assert_eq!((world.pool("b").pods, world.pool("b").idle), (7, 0));
    world.assert_no_violations();
}

#[tokio::test]
async fn rule_7_dual_stack_interfaces_carry_both_addresses() {
    let world = World::new().await;
    let dual = Node {
        dual_stack: true,
        ..node("a", vec![Parent { id: "parent-a".into(), interface: "eth1".into(), limit: 9 }], PRE_BOUND)
    };
    world.vpc.add_parent("parent-a", 9);
    world.allocator().put_node(dual).await.unwrap();
    world.tick().await;
    let pod = world.allocate("a", "pod").await.unwrap();
    assert!(pod.addresses.ipv6.is_some());
    assert_eq!(pod.gateway_ipv6, subnet("net-a", "10.1.0.0/20").gateway_ipv6);
    world.release(&pod).await;
    assert_eq!(world.allocator().cooling()[0].addresses, Some(pod.addresses), "both rest together");

    // A subnet without IPv6 is never used for the node.
    let mut plain = subnet("net-b", "10.2.0.0/16");
    plain.ipv6 = None;
    world.vpc.add_subnet("net-b", plain.ipv4, None);
    world.allocator().add_subnet(plain).await.unwrap();
    world.tick().await;
    for index in 0..8 {
        assert_eq!(world.allocate("a", &format!("pod-{index}")).await.unwrap().subnet_id, "net-a");
    }

    // Static and dual: both addresses come back.
    let fixed = |uid| static_request("a", "db-0", uid);
    world.add_node("b", 9, Policy::OnDemand).await;
    let mut dual = world.allocator().nodes().into_iter().find(|node| node.name == "b").unwrap();
    dual.dual_stack = true;
    world.allocator().put_node(dual).await.unwrap();
    let first = world.allocate_as(&AllocateRequest { node: "b".into(), ..fixed("one") }).await.unwrap();
    world.release(&first).await;
    let second = world.allocate_as(&AllocateRequest { node: "b".into(), ..fixed("two") }).await.unwrap();
    assert_eq!(first.addresses, second.addresses);
    assert!(second.addresses.ipv6.is_some());
}

#[tokio::test]
async fn rule_8_leaks_are_collected_after_two_sightings() {
    let mut world = World::new().await;
    world.add_node("a", 20, PRE_BOUND).await;
    world.tick().await;
    let pod = world.allocate("a", "pod").await.unwrap();
    world.pass(SECOND).await;

    // Ours by its tag, in no record; someone else's; one that the VPC lost from the pool; one that it lost under a pod.
    let create = |owner: &str, vlan| CreateInterface {
        token: format!("{owner}-{vlan}"),
        name: "left behind".into(),
        owner: owner.into(),
        parent: Some(("parent-a".into(), eniway_ipam::net::VlanId::new(vlan).unwrap())),
        subnet: "net-a".into(),
        ipv4: None,
        ipv6: WantIpv6::No,
        security_groups: Vec::new(),
    };
    let leaked = world.vpc.create(create("eniway", 4000)).await.unwrap();
    let foreign = world.vpc.create(create("somebody", 4001)).await.unwrap();
    let lost_idle =
        world.vpc.interfaces().into_iter().find(|i| i.owner == "eniway" && i.id != pod.vpc_id).unwrap();
    world.vpc.lose(&lost_idle.id).unwrap();
    world.vpc.lose(&pod.vpc_id).unwrap();

    // Found at the start.
    world.restart().await;
    world.tick().await;
    let leaks = world.allocator().leaks();
    assert_eq!(leaks.len(), 3);
    assert!(leaks.iter().all(|leak| leak.sightings == 1 && !leak.held_back));
    assert!(leaks.iter().any(|leak| leak.vpc_id == leaked.id && leak.kind == LeakKind::Unowned));
    assert!(leaks.iter().any(|leak| leak.vpc_id == lost_idle.id && leak.kind == LeakKind::Missing));
    world.pass(9 * MINUTE).await;
    assert!(
        world.vpc.interfaces().iter().any(|interface| interface.id == leaked.id),
        "one sighting is not enough"
    );
    assert_eq!(world.allocator().list(Some("a"))[0].vlan, pod.vlan);

    world.pass(MINUTE).await;
    world.tick().await;
    let there: HashSet<_> = world.vpc.interfaces().into_iter().map(|interface| interface.id).collect();
    assert!(!there.contains(&leaked.id) && there.contains(&foreign.id));
    assert!(world.allocator().leaks().is_empty());
    assert_eq!(
        world.allocator().list(Some("a"))[0].vlan,
        -1,
        "the pod's interface must not be programmed any more"
    );
    assert!(matches!(world.allocate("a", "pod").await, Err(Error::Lost(_))));
    assert_eq!(world.pool("a").idle, 3, "the pool has replaced the lost one");
    world.allocator().release(&pod.key, None).await.unwrap();
    assert!(world.allocator().list(Some("a")).is_empty());
    world.allocate("a", "pod").await.unwrap();
    world.assert_no_violations();
}

#[tokio::test]
async fn rule_8_an_allocator_with_an_empty_store_takes_nothing_down() {
    let world = World::new().await;
    world.add_node("a", 20, Policy::PreBound { minimum: 15, maximum: 20 }).await;
    world.tick().await;
    let elsewhere = World::new().await;
    let store = std::sync::Arc::new(
        eniway_ipam::EmbeddedStore::open(tempfile::tempdir().unwrap().path().join("empty.redb")).unwrap(),
    );
    let empty =
        eniway_ipam::Allocator::open(Settings::default(), store, world.vpc.clone(), elsewhere.clock.clone())
            .await
            .unwrap();
    for _ in 0..5 {
        empty.tick().await.unwrap();
        elsewhere.clock.advance(10 * MINUTE);
    }
    assert_eq!(world.at_vpc(), 15);
    assert!(empty.leaks().iter().all(|leak| leak.held_back));
    empty.confirm(&Confirm::Leaks).await.unwrap();
    empty.tick().await.unwrap();
    elsewhere.clock.advance(10 * MINUTE);
    empty.tick().await.unwrap();
    assert_eq!(world.at_vpc(), 0);
}

#[tokio::test]
async fn allocation_is_idempotent_and_generations_are_checked() {
    let mut world = World::new().await;
    world.add_node("a", 20, PRE_BOUND).await;
    world.tick().await;
    let first = world.allocate("a", "pod").await.unwrap();
    assert_eq!(world.allocate("a", "pod").await.unwrap(), first);
    world.restart().await;
    assert_eq!(world.allocate("a", "pod").await.unwrap(), first);

    let stale = world.allocator().release(&first.key, Some(first.generation - 1)).await;
    assert!(matches!(stale, Err(Error::StaleGeneration { .. })));
    assert_eq!(world.allocator().release(&first.key, Some(first.generation)).await.unwrap(), Released::Now);
    assert_eq!(world.allocator().release(&first.key, None).await.unwrap(), Released::NotAllocated);
    assert!(world.allocate("a", "pod").await.unwrap().generation > first.generation);
}

#[tokio::test]
async fn a_lost_reply_creates_nothing_twice() {
    let world = World::new().await;
    world.add_node("a", 20, Policy::OnDemand).await;
    world.vpc.fail_next(Operation::Create, Fault::ReplyLost);
    world.vpc.fail_next(Operation::Create, Fault::Error(VpcError::TimedOut));
    world.vpc.fail_next(Operation::Create, Fault::Error(VpcError::Throttled));
    world.allocate("a", "pod").await.unwrap();
    assert_eq!(world.at_vpc(), 1);
    world.assert_no_violations();
}

#[tokio::test]
async fn refusals_are_reported_and_leave_nothing_behind() {
    let world = World::new().await;
    world.add_node("a", 20, Policy::OnDemand).await;
    world.vpc.set_quota(0);
    let error = world.allocate("a", "pod").await.unwrap_err();
    assert!(matches!(error, Error::Vpc(VpcError::QuotaExceeded { .. })), "{error}");
    assert!(world.pool("a").problem.unwrap().contains("quota"));
    assert_eq!(world.pool("a").leaving + world.pool("a").pods, 0);
    world.vpc.set_quota(10);
    world.allocate("a", "pod").await.unwrap();
}

#[tokio::test]
async fn an_allocation_that_takes_too_long_goes_on() {
    let world = World::new().await;
    world.add_node("a", 20, Policy::OnDemand).await;
    for _ in 0..12 {
        world.vpc.fail_next(Operation::Create, Fault::Error(VpcError::TimedOut));
    }
    let patient = request("a", "pod");
    let error = world
        .allocate_as(&AllocateRequest { timeout: Some(5 * SECOND), ..patient.clone() })
        .await
        .unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    world.pass(10 * MINUTE).await;
    let created = world.vpc.calls(Operation::Create);
    world.allocate_as(&patient).await.unwrap();
    assert_eq!(world.vpc.calls(Operation::Create), created, "it was ready");
}

#[tokio::test]
async fn a_pod_released_while_its_interface_is_created_leaves_it_to_the_pool() {
    let world = World::new().await;
    world.add_node("a", 20, PRE_BOUND).await;
    world.vpc.fail_next(Operation::Create, Fault::ReplyLost);
    let asked = AllocateRequest { timeout: Some(Duration::ZERO), ..request("a", "pod") };
    assert!(world.allocate_as(&asked).await.is_err());
    assert_eq!(world.allocator().release(&asked.key, None).await.unwrap(), Released::Now);
    world.pass(MINUTE).await;
    let pool = world.pool("a");
    assert_eq!((pool.pods, pool.coming, pool.leaving), (0, 0, 0));
    assert_eq!(pool.idle as usize, world.at_vpc());
}

#[tokio::test]
async fn own_security_groups_never_come_from_the_pool_or_go_back_to_it() {
    let world = World::new().await;
    world.add_node("a", 20, PRE_BOUND).await;
    world.tick().await;
    let own = AllocateRequest { security_groups: Some(vec!["sg-own".into()]), ..request("a", "pod") };
    let pod = world.allocate_as(&own).await.unwrap();
    assert_eq!(pod.security_groups, ["sg-own"]);
    world.release(&pod).await;
    world.pass(2 * MINUTE).await;
    assert!(world.vpc.interfaces().iter().all(|interface| interface.security_groups == ["sg-default"]));
    world.assert_no_violations();
}

#[tokio::test]
async fn a_watch_starts_with_a_snapshot_and_continues_from_a_revision() {
    let mut world = World::new().await;
    world.add_node("a", 20, PRE_BOUND).await;
    world.tick().await;
    let first = world.allocate("a", "first").await.unwrap();
    let (mut watch, revision, allocations) = loop {
        let mut watch = world.allocator().watch("a", None);
        let Some(Notice::Snapshot { revision, allocations, .. }) = watch.next().await else { panic!() };
        // What was allocated a moment ago may come as a change instead.
        if !allocations.is_empty() {
            break (watch, revision, allocations);
        }
    };
    assert_eq!(allocations.iter().map(|a| &**a).collect::<Vec<_>>(), [&first]);

    let second = world.allocate("a", "second").await.unwrap();
    world.release(&first).await;
    let mut changes = Vec::new();
    while changes.len() < 2 {
        let Some(Notice::Changes { changes: some, .. }) = watch.next().await else { panic!() };
        changes.extend(some);
    }
    let expected = [
        AllocationChange::Put(second.clone().into()),
        AllocationChange::Removed { key: first.key.clone(), generation: first.generation },
    ];
    assert_eq!(changes, expected);

    // Another watcher continues from where the first one was.
    let here = Position { store: world.allocator().store_id(), revision };
    let mut late = world.allocator().watch("a", Some(&here));
    assert!(matches!(late.next().await, Some(Notice::Changes { changes, .. }) if changes == expected));
    // After a restart that history is gone: a snapshot, never nothing.
    world.restart().await;
    let mut late = world.allocator().watch("a", Some(&here));
    assert!(
        matches!(late.next().await, Some(Notice::Snapshot { allocations, .. }) if *allocations[0] == second)
    );

    // An operator's confirmation reaches the node.
    world.allocator().confirm(&Confirm::Node("a".into())).await.unwrap();
    let Some(Notice::Changes { confirmed, changes, .. }) = late.next().await else { panic!() };
    assert!(confirmed > revision && changes.is_empty());
}

#[tokio::test]
async fn an_allocation_can_wait_for_the_agent() {
    let world = World::new().await;
    world.add_node("a", 20, PRE_BOUND).await;
    world.tick().await;
    let pod = world.allocate("a", "pod").await.unwrap();
    let acknowledgement =
        |refused| Acknowledgement { store: world.allocator().store_id(), revision: pod.revision, refused };
    let programmed = world.allocator().programmed(&pod, 5 * SECOND);
    tokio::pin!(programmed);
    assert!(futures_poll(&mut programmed).is_none());
    world.allocator().ack("a", acknowledgement(Vec::new()));
    programmed.await.unwrap();
    let refused =
        eniway_ipam::api::RefusedByAgent { key: pod.key.clone(), reason: "VLAN 7 has another owner".into() };
    world.allocator().ack("a", acknowledgement(vec![refused]));
    let error = world.allocator().programmed(&pod, 5 * SECOND).await.unwrap_err().to_string();
    assert!(error.contains("VLAN 7 has another owner"), "{error}");
}

fn futures_poll<F: Future>(future: &mut std::pin::Pin<&mut F>) -> Option<F::Output> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match future.as_mut().poll(&mut context) {
        std::task::Poll::Ready(output) => Some(output),
        std::task::Poll::Pending => None,
    }
}

use std::{fs::File, os::fd::AsRawFd as _, thread};

use nix::sched::{CloneFlags, unshare};

use super::*;

#[test]
fn names_of_host_sides_are_stable_and_recognised() {
    let name = host_interface_name("0123456789abcdef", "eth0");
    assert_eq!(name, "eni20cf95920f1");
    assert!(is_own_name(&name));
    assert_ne!(name, host_interface_name("0123456789abcdef", "eth1"));
    assert_ne!(host_interface_name("ab", "c"), host_interface_name("a", "bc"));
    for foreign in ["eth0", "eni", "eni0", "eni20cf95920fg", "eni20CF95920F1", "eni20cf95920f10"] {
        assert!(!is_own_name(foreign), "{foreign}");
    }
}

#[test]
fn aliases_fit_the_kernel() {
    let spec = PodSpec { owner_key: "ä".repeat(200), ..pod(Path::new("/none")) };
    assert!(alias(&spec).len() <= 255);
}

pub(crate) const MAC_OF_POD: [u8; 6] = [0xfa, 0x16, 0x3e, 0, 1, 2];
pub(crate) const MAC_OF_GATEWAY: [u8; 6] = [0xfa, 0xff, 0xff, 0, 0, 1];

pub(crate) fn pod(netns: &Path) -> PodSpec {
    PodSpec {
        owner_key: "c0ffee".to_owned(),
        netns: Some(netns.to_path_buf()),
        interface: "eth0".to_owned(),
        host_interface: None,
        mac: MAC_OF_POD,
        ipv4: Ipv4Addr::new(10, 1, 18, 2),
        subnet: "10.1.16.0/22".parse().unwrap(),
        gateway: Ipv4Addr::new(10, 1, 16, 1),
        gateway_mac: MAC_OF_GATEWAY,
        mtu: 1450,
        parent: "eth1".to_owned(),
        extras: Extras::default(),
    }
}

/// Runs `work` on a thread with a network namespace of its own, which ends with it. Namespaces need privileges;
/// elsewhere there is nothing to look at.
pub(crate) fn on_a_node(work: impl AsyncFnOnce() + Send + 'static) {
    thread::spawn(|| {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            assert!(!nix::unistd::geteuid().is_root(), "{error}");
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            // Without an address of its own, loopback's, the kernel takes every gateway for a broadcast address.
            let netlink = Netlink::open().unwrap();
            let lo = netlink.link("lo").await.unwrap();
            netlink.change_link(&lo, LinkChange { up: true, ..LinkChange::default() }).await.unwrap();
            work().await;
        });
    })
    .join()
    .unwrap();
}

/// A new network namespace, and a path to it that holds as long as it is kept.
pub(crate) fn new_netns() -> (File, PathBuf) {
    let file = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        File::open("/proc/thread-self/ns/net").unwrap()
    })
    .join()
    .unwrap();
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    (file, path)
}

pub(crate) async fn add_parent(netlink: &Netlink, name: &str) {
    let here = Namespace::current().unwrap();
    let other = format!("{name}f");
    let (a, b) =
        (VethEnd { name, mac: [2, 0, 0, 0, 1, 1] }, VethEnd { name: &other, mac: [2, 0, 0, 0, 1, 2] });
    netlink.add_veth(a, b, &here, 1500).await.unwrap();
}

#[test]
fn a_pod_is_wired_found_again_repaired_and_taken_down() {
    on_a_node(async || {
        let (_keep, path) = new_netns();
        let spec = pod(&path);
        let first = wire(&spec).await.unwrap();
        assert!(!first.adopted);
        assert_eq!(first.host_interface, host_interface_name("c0ffee", "eth0"));

        let netlink = Netlink::open().unwrap();
        assert!(!netlink.link(&first.host_interface).await.unwrap().up, "nothing guards it yet");
        open(&spec, &first.host_interface).await.unwrap();
        // A list of all, unlike the look-up of one, shows the state as the kernel has acted on it.
        let inside = Namespace::open(&path).unwrap();
        let links = inside.run(async || Netlink::open().unwrap().links().await).await.unwrap().unwrap();
        assert!(links.iter().any(|link| link.name == "eth0" && link.operational), "{links:?}");

        let again = wire(&spec).await.unwrap();
        assert!(again.adopted);
        assert_eq!((again.ifindex, &again.host_interface), (first.ifindex, &first.host_interface));

        let host = netlink.link(&first.host_interface).await.unwrap();
        assert_eq!((host.mac, host.mtu, host.up), (Some(MAC_OF_GATEWAY), 1450, true));
        assert_eq!(host.alias.as_deref(), Some("eniway eth0 c0ffee"));
        let key: sysctl::Key<'_> = &["ipv4", "conf", &host.name, "rp_filter"];
        assert_eq!(sysctl::get(key).unwrap().as_deref(), Some("2"));
        assert!(
            netlink.addresses().await.unwrap().is_empty(),
            "the host side has no address, link-local neither"
        );

        let inside = Namespace::open(&path).unwrap();
        let check = async || {
            let netlink = Netlink::open().unwrap();
            let link = netlink.link("eth0").await.unwrap();
            assert_eq!((link.mac, link.mtu, link.up), (Some(MAC_OF_POD), 1450, true));
            assert!(netlink.link("lo").await.unwrap().up);
            assert!(ethtool::get("eth0", Offload::Gro).unwrap());
            assert!(netlink.addresses().await.unwrap().contains(&Ipv4Addr::new(10, 1, 18, 2).into()));
            let default = netlink.own_default_routes().await.unwrap();
            assert_eq!(default[0].gateway, Some(Ipv4Addr::new(10, 1, 16, 1)));
        };
        inside.run(check).await.unwrap();

        inside
            .run(async || {
                let netlink = Netlink::open().unwrap();
                let route = netlink.own_default_routes().await.unwrap()[0];
                netlink.delete_route(route).await.unwrap();
                ethtool::set("eth0", Offload::Gro, false).unwrap();
            })
            .await
            .unwrap();
        wire(&spec).await.unwrap();
        inside.run(check).await.unwrap();

        unwire(&first.host_interface).await.unwrap();
        unwire(&first.host_interface).await.unwrap();
        assert_eq!(netlink.find_link(&first.host_interface).await.unwrap(), None);
    });
}

#[test]
fn a_pair_that_another_made_is_adopted_and_never_deleted() {
    on_a_node(async || {
        let (_keep, path) = new_netns();
        let namespace = Namespace::open(&path).unwrap();
        let netlink = Netlink::open().unwrap();
        let here = VethEnd { name: "lxc1", mac: [2, 0, 0, 0, 0, 9] };
        let there = VethEnd { name: "eth0", mac: MAC_OF_POD };
        netlink.add_veth(here, there, &namespace, 1500).await.unwrap();

        let wired = wire(&pod(&path)).await.unwrap();
        assert!(wired.adopted);
        assert_eq!(wired.host_interface, "lxc1");
        let host = netlink.link("lxc1").await.unwrap();
        assert_eq!((host.mac, host.mtu, host.alias), (Some(MAC_OF_GATEWAY), 1450, None));

        let named = PodSpec { host_interface: Some("lxc2".to_owned()), ..pod(&path) };
        let error = wire(&named).await.unwrap_err();
        assert!(matches!(error, WiringError::OtherHostInterface { .. }), "{error}");

        let blind = PodSpec { netns: None, host_interface: Some("lxc1".to_owned()), ..pod(&path) };
        assert_eq!(wire(&blind).await.unwrap().ifindex, wired.ifindex);

        unwire("lxc1").await.unwrap();
        assert!(netlink.find_link("lxc1").await.unwrap().is_some());
    });
}

#[test]
fn what_cannot_be_wired_is_told() {
    on_a_node(async || {
        let (_keep, path) = new_netns();
        let spec = pod(&path);
        wire(&spec).await.unwrap();

        let other_mac = PodSpec { mac: [0xfa, 0x16, 0x3e, 9, 9, 9], ..spec.clone() };
        let error = wire(&other_mac).await.unwrap_err();
        assert!(matches!(error, WiringError::Taken { .. }), "{error}");

        let gone = PodSpec { netns: Some("/run/netns/ewc-gone".into()), ..spec.clone() };
        let error = wire(&gone).await.unwrap_err();
        assert!(matches!(error, WiringError::Netns(NetnsError::Gone { .. })), "{error}");

        let host = PodSpec { netns: Some("/proc/thread-self/ns/net".into()), ..spec.clone() };
        let error = wire(&host).await.unwrap_err();
        assert!(matches!(error, WiringError::HostNetwork(_)), "{error}");

        let (_keep, second) = new_netns();
        let same_name =
            PodSpec { netns: Some(second.clone()), mac: [0xfa, 0x16, 0x3e, 9, 9, 9], ..spec.clone() };
        let moved = wire(&same_name).await.unwrap();
        assert!(!moved.adopted, "a container has one interface of a name: the stale pair gives way");

        let nothing = PodSpec { netns: None, ..spec.clone() };
        assert!(matches!(wire(&nothing).await, Err(WiringError::NothingNamed)));

        // From a third namespace, both ends of the pair are elsewhere.
        let (_keep, third) = new_netns();
        let path = second.clone();
        let error = Namespace::open(&third)
            .unwrap()
            .run(async move || {
                let spec = PodSpec { mac: [0xfa, 0x16, 0x3e, 9, 9, 9], ..pod(&path) };
                wire(&spec).await.unwrap_err()
            })
            .await
            .unwrap();
        assert!(matches!(error, WiringError::ElsewherePeer { .. }), "{error}");
    });
}

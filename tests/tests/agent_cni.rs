//! The CNI plugin, run as a runtime runs it.
//!
//! ```text
//!   node n:  agent with the allocator inside, eniway-cni        sandboxes a, b, ...: network namespaces
//! ```
//!
//! A runtime adds, checks and deletes sandboxes, makes mistakes, and forgets; what is left on the node is looked for in
//! the kernel, in the tables, in the pins and at the allocator.

use std::{fs, net::SocketAddrV4, thread, time::Duration};

use datapath_common::abi::{Direction, Outcome};
use eniway_tests::{
    lab::{
        Netns,
        agent::{eniway_binary, next_agent},
        net::{UdpEcho, udp_exchange},
    },
    runtime::{Node, Said, Sandbox},
};
use serde_json::{Value, json};

type Result<T = (), E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

#[track_caller]
fn fails(said: &Said, code: u64, word: &str) {
    assert!(!said.ok, "{said:?}");
    assert_eq!(said.code(), Some(code), "{said:?}");
    assert!(said.output["msg"].as_str().is_some_and(|text| text.contains(word)), "{said:?}");
}

fn previous(result: &Said) -> Value {
    json!({ "prevResult": result.output })
}

#[test]
fn a_sandbox_comes_is_checked_and_goes() -> Result {
    let mut node = Node::new("cni-life", 4)?;
    // Before there is an agent, nothing is half made.
    let stands = Sandbox::several("cnilife", 2)?;
    let (a, b) = (&stands[0].1, &stands[1].1);
    fails(&node.plugin("ADD", Some(a), json!({}))?, 11, "agent.sock");
    fails(&node.plugin("DEL", Some(a), json!({}))?, 11, "agent.sock");
    fails(&node.plugin("STATUS", None, json!({}))?, 50, "agent.sock");
    assert!(!stands[0].0.netns().exec(&["ip", "-br", "link"])?.contains("eth0"));
    node.start_agent()?;
    assert_eq!(node.traces()?, [""; 0]);

    let more = json!({
        "mtu": 1400,
        "routes": [{ "dst": "192.0.2.0/24" }],
        "sysctls": { "net.ipv4.conf.IFNAME.rp_filter": "0" }
    });
    let added = [node.plugin("ADD", Some(a), more)?, node.plugin("ADD", Some(b), json!({}))?];
    assert!(added.iter().all(|said| said.ok), "{added:?}");
    let interfaces = added[0].output["interfaces"].as_array().ok_or("no interfaces")?;
    assert_eq!((&interfaces[1]["name"], &interfaces[1]["sandbox"]), (&json!("eth0"), &json!(a.netns)));
    let inside = stands[0].0.netns();
    assert!(inside.exec(&["ip", "route"])?.contains("192.0.2.0/24 via 10.1.16.1"));
    assert!(inside.exec(&["ip", "link", "show", "eth0"])?.contains("mtu 1400"));
    for (key, value) in [("ipv4/conf/eth0/rp_filter", "0"), ("ipv6/conf/eth0/accept_ra", "0")] {
        let found = inside.run(|| fs::read_to_string(format!("/proc/sys/net/{key}")))??;
        assert_eq!(found.trim(), value, "{key}");
    }
    // The first packet is forwarded: no second attempt.
    let to = SocketAddrV4::new(added[1].address().ok_or("no address")?, 7000);
    let _echo = UdpEcho::start(stands[1].0.netns(), to)?;
    udp_exchange(inside, 0, to, b"first", Duration::from_secs(2))?;

    // A second ADD is a mistake, and harms nothing.
    fails(&node.plugin("ADD", Some(a), json!({}))?, 100, "eth0");
    assert!(node.plugin("CHECK", Some(a), previous(&added[0]))?.ok);
    udp_exchange(inside, 0, to, b"second", Duration::from_secs(2))?;

    // What is not as it was, is found; a new agent repairs it, with what the runtime had asked for.
    fails(&node.plugin("CHECK", Some(a), previous(&added[1]))?, 102, "its address is");
    fails(&node.plugin("CHECK", Some(a), json!({}))?, 7, "prevResult");
    inside.exec(&["ip", "route", "del", "default"])?;
    inside.exec(&["ip", "route", "del", "192.0.2.0/24"])?;
    fails(&node.plugin("CHECK", Some(a), previous(&added[0]))?, 102, "default route");
    node.kill_agent();
    node.start_agent()?;
    assert!(node.plugin("CHECK", Some(a), previous(&added[0]))?.ok);
    assert!(inside.exec(&["ip", "route"])?.contains("192.0.2.0/24 via 10.1.16.1"));
    assert!(inside.exec(&["ip", "link", "show", "eth0"])?.contains("mtu 1400"));

    // DEL: without a namespace, twice, and for a sandbox that never was.
    let gone = Sandbox { netns: String::new(), ..a.clone() };
    for sandbox in [&gone, &gone, b, b, &Sandbox { id: "never".into(), ..b.clone() }] {
        let said = node.plugin("DEL", Some(sandbox), json!({}))?;
        assert!(said.ok && said.output.is_null(), "{said:?}");
    }
    assert_eq!(node.traces()?, [""; 0]);
    fails(&node.plugin("CHECK", Some(a), previous(&added[0]))?, 102, "no such sandbox");
    Ok(())
}

#[test]
fn what_goes_wrong_half_way_is_undone() -> Result {
    let mut node = Node::new("cni-undo", 4)?;
    node.start_agent()?;
    let stands = Sandbox::several("cniundo", 12)?;
    // The interface's name is taken; the name of the pod is not known in the end.
    let sandbox = &stands[0].1;
    stands[0].0.netns().exec(&["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth9"])?;
    fails(&node.plugin("ADD", Some(sandbox), json!({}))?, 101, "eth0");
    assert_eq!(node.traces()?, [""; 0]);
    assert!(stands[0].0.netns().exec(&["ip", "-br", "link"])?.contains("eth0"), "it was not ours");
    for (wrong, code, word) in [
        (Sandbox { netns: "/run/netns/ewr-nowhere".into(), ..sandbox.clone() }, 3, "ewr-nowhere"),
        (Sandbox { netns: node.netns().path().display().to_string(), ..sandbox.clone() }, 7, "host-network"),
        (Sandbox { id: "../etc".into(), ..sandbox.clone() }, 4, "CNI_CONTAINERID"),
    ] {
        fails(&node.plugin("ADD", Some(&wrong), json!({}))?, code, word);
    }
    fails(&node.plugin("ADD", Some(&stands[1].1), json!({ "routes": [{ "dst": "x" }] }))?, 7, "`x`");
    let other = json!({ "runtimeConfig": { "io.kubernetes.cri.pod-annotations": { "eniway/mode": "exclusive-eni" } } });
    fails(&node.plugin("ADD", Some(&stands[1].1), other)?, 101, "exclusive ENI");
    assert_eq!(node.traces()?, [""; 0]);

    // The agent is killed while it works. The runtime deletes what it was not told of, and that is all it needs.
    for round in 0..3 {
        let node_ref = &node;
        let pid = node.agent_pid().ok_or("no agent")?;
        let added: Vec<bool> = thread::scope(|scope| {
            let adds: Vec<_> = stands[1..]
                .iter()
                .map(|(_, sandbox)| scope.spawn(move || node_ref.plugin("ADD", Some(sandbox), json!({}))))
                .collect();
            thread::sleep(Duration::from_millis(60 + 50 * round));
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid as i32),
                nix::sys::signal::Signal::SIGKILL,
            );
            adds.into_iter().map(|add| add.join().is_ok_and(|said| said.is_ok_and(|said| said.ok))).collect()
        });
        node.kill_agent();
        node.start_agent()?;
        for ((_, sandbox), added) in stands[1..].iter().zip(added) {
            if added {
                let said = node.plugin("ADD", Some(sandbox), json!({}))?;
                fails(&said, 100, "already");
            }
            assert!(node.plugin("DEL", Some(sandbox), json!({}))?.ok);
        }
        assert_eq!(node.traces()?, [""; 0], "round {round}\n{}", node.log());
    }
    Ok(())
}

#[test]
fn gc_takes_what_no_runtime_knows() -> Result {
    let mut node = Node::new("cni-gc", 4)?;
    node.start_agent()?;
    let stands = Sandbox::several("cnigc", 4)?;
    let mut added = Vec::new();
    for (_, sandbox) in &stands {
        added.push(node.plugin("ADD", Some(sandbox), json!({}))?);
    }
    assert!(added.iter().all(|said| said.ok), "{added:?}");
    fails(&node.plugin("GC", None, json!({}))?, 7, "valid-attachments");
    let known = json!({ "cni.dev/valid-attachments": [
        { "containerID": stands[0].1.id, "ifname": "eth0" },
        // The same sandbox by another interface is another attachment.
        { "containerID": stands[1].1.id, "ifname": "eth9" }
    ] });
    assert!(node.plugin("GC", None, known)?.ok);
    assert!(node.plugin("CHECK", Some(&stands[0].1), previous(&added[0]))?.ok);
    for (stand, said) in stands[1..].iter().zip(&added[1..]) {
        fails(&node.plugin("CHECK", Some(&stand.1), previous(said))?, 102, "no such sandbox");
    }
    // After a restart of the node there is nothing left that a runtime could name.
    let mut node = node;
    node.reboot()?;
    node.start_agent()?;
    assert!(node.plugin("GC", None, json!({ "cni.dev/valid-attachments": [] }))?.ok);
    assert_eq!(node.traces()?, [""; 0]);
    Ok(())
}

/// NICs of a node, on a bridge in the gateway's namespace.
fn add_nics(node: &Node, gateway: &Netns, count: u8) -> Result {
    for words in [
        "ip link add br0 address fa:ff:ff:00:00:01 type bridge",
        "ip link set br0 up",
        "ip addr add 10.1.16.1/20 dev br0",
    ] {
        gateway.exec(&words.split(' ').collect::<Vec<_>>())?;
    }
    node.add_nics(count)?;
    for number in 1..=count {
        let far = format!("far{number}");
        node.netns().exec(&["ip", "link", "set", &far, "netns", gateway.name()])?;
        gateway.exec(&["ip", "link", "set", &far, "up", "master", "br0"])?;
    }
    Ok(())
}

/// ```text
///   gateway's namespace: br0, 10.1.16.1 ── far1 ... far8 (MACs as the VPC gives them) ── node, then pods
/// ```
///
/// A whole NIC goes into a pod, works there, is counted there, and comes back as it was.
#[test]
fn an_exclusive_eni_goes_into_its_pod_and_comes_back() -> Result {
    const NICS: u8 = 8;
    let mut node = Node::new("cni-eni", 2)?;
    node.use_exclusive(u32::from(NICS))?;
    let stands = Sandbox::several("cnieni", 3)?;
    let gateway = stands[2].0.netns();
    add_nics(&node, gateway, NICS)?;
    node.start_agent()?;
    let before = node.netns().exec(&["ip", "-br", "link"])?;
    let _echo = UdpEcho::start(gateway, SocketAddrV4::new([10, 1, 16, 1].into(), 7000))?;
    let (stand, sandbox) = &stands[0];
    let mode = json!({ "mode": "exclusive-eni" });
    let added = node.plugin("ADD", Some(sandbox), mode.clone())?;
    assert!(added.ok, "{added:?}\n{}", node.log());
    assert_eq!(added.output["interfaces"].as_array().map(Vec::len), Some(1), "there is no host side");
    let address = added.address().ok_or("no address")?;
    let inside = stand.netns();
    let exchange = |payload: &[u8]| {
        udp_exchange(
            inside,
            0,
            SocketAddrV4::new([10, 1, 16, 1].into(), 7000),
            payload,
            Duration::from_secs(2),
        )
    };
    exchange(b"out by its own")?;
    assert!(node.plugin("CHECK", Some(sandbox), previous(&added))?.ok);
    let (ingress, egress) = (Direction::Ingress, Direction::Egress);
    let seen =
        [node.counted(address, egress, Outcome::Wire)?, node.counted(address, ingress, Outcome::Wire)?];
    assert!(seen.iter().all(|packets| *packets > 0), "{seen:?}");

    // Agents of another ABI version take over, up and down: what is inside of the pod changes its programs, too.
    for binary in [next_agent()?, eniway_binary()?] {
        node.kill_agent();
        node.start_agent_as(&binary)?;
        exchange(b"by another version")?;
        assert!(node.plugin("CHECK", Some(sandbox), previous(&added))?.ok, "{}", node.log());
    }
    let now = [node.counted(address, egress, Outcome::Wire)?, node.counted(address, ingress, Outcome::Wire)?];
    assert!(now.iter().zip(seen).all(|(now, seen)| *now >= seen + 2), "{now:?} after {seen:?}");

    // Another agent takes over without a change; what the pod may not say is dropped and counted.
    node.kill_agent();
    node.start_agent()?;
    exchange(b"once more")?;
    assert!(node.plugin("CHECK", Some(sandbox), previous(&added))?.ok, "{}", node.log());
    assert!(node.counted(address, egress, Outcome::Wire)? > seen[0], "the counters went on");
    inside.exec(&["ip", "addr", "add", "10.1.19.9/32", "dev", "eth0"])?;
    inside.exec(&[
        "ip",
        "route",
        "replace",
        "10.1.16.1",
        "dev",
        "eth0",
        "scope",
        "link",
        "src",
        "10.1.19.9",
    ])?;
    assert!(exchange(b"in another's name").is_err());
    assert!(node.counted(address, egress, Outcome::SourceAddress)? > 0);

    let second = node.plugin("ADD", Some(&stands[1].1), mode)?;
    assert!(second.ok, "{second:?}");
    assert_ne!(second.address(), Some(address));
    for (_, sandbox) in &stands[..2] {
        assert!(node.plugin("DEL", Some(sandbox), json!({}))?.ok, "{}", node.log());
    }
    assert!(!inside.exec(&["ip", "-br", "link"])?.contains("eth0"));
    let names = |text: &str| {
        let mut names: Vec<String> =
            text.lines().filter_map(|line| line.split(['@', ' ']).next()).map(str::to_owned).collect();
        names.sort();
        names
    };
    assert_eq!(names(&node.netns().exec(&["ip", "-br", "link"])?), names(&before));
    assert!(!node.netns().exec(&["ip", "link"])?.contains("mtu 1500 qdisc noqueue state DOWN"), "as it was");
    assert_eq!(node.traces()?, [""; 0]);
    Ok(())
}

/// ```text
///   pods 0 and 1: an interface that was there before has the NIC's index, so that the kernel would give it another,
///   the same in both; the node has an interface of that index, too
/// ```
///
/// Interface indexes are counted by each network namespace. The agent chooses those of ENIs, each once on the node.
#[test]
fn enis_are_told_apart_by_indexes_that_the_agent_chooses() -> Result {
    let mut node = Node::new("cni-same", 2)?;
    node.use_exclusive(3)?;
    let stands = Sandbox::several("cnisame", 3)?;
    let gateway = stands[2].0.netns();
    add_nics(&node, gateway, 3)?;
    let index = |netns: &Netns, name: &str| -> Result<String> {
        let link = netns.exec(&["ip", "-o", "link", "show", name])?;
        Ok(link.split(':').next().unwrap_or_default().to_owned())
    };
    for (stand, _) in &stands[..2] {
        for (number, nic) in ["ens1", "ens2", "ens3"].into_iter().enumerate() {
            let (taken, name) = (index(node.netns(), nic)?, format!("there{number}"));
            stand.netns().exec(&["ip", "link", "add", &name, "index", &taken, "type", "veth"])?;
        }
    }
    node.start_agent()?;
    let to = SocketAddrV4::new([10, 1, 16, 1].into(), 7000);
    let _echo = UdpEcho::start(gateway, to)?;
    let mut addresses = Vec::new();
    for (_, sandbox) in &stands[..2] {
        let added = node.plugin("ADD", Some(sandbox), json!({ "mode": "exclusive-eni" }))?;
        addresses.push(added.address().ok_or_else(|| format!("{added:?}\n{}", node.log()))?);
    }
    let indexes = [index(stands[0].0.netns(), "eth0")?, index(stands[1].0.netns(), "eth0")?];
    assert_ne!(indexes[0], indexes[1]);
    let count = |node: &Node, address| node.counted(address, Direction::Egress, Outcome::Wire);
    let told_apart = |node: &Node| -> Result {
        for (number, (stand, _)) in stands[..2].iter().enumerate() {
            let before = [count(node, addresses[0])?, count(node, addresses[1])?];
            udp_exchange(stand.netns(), 0, to, b"whose is it", Duration::from_secs(2))?;
            let after = [count(node, addresses[0])?, count(node, addresses[1])?];
            assert!(after[number] > before[number], "{before:?} {after:?}");
            assert_eq!(after[1 - number], before[1 - number], "{before:?} {after:?}");
        }
        Ok(())
    };
    told_apart(&node)?;
    // While no agent runs, somebody takes one out and puts it back, and its index is taken meanwhile.
    node.kill_agent();
    let (pod, home) = (stands[1].0.netns(), node.netns());
    let moved = |from: &Netns, to: &Netns| from.exec(&["ip", "link", "set", "eth0", "netns", to.name()]);
    moved(pod, home)?;
    pod.exec(&["ip", "link", "add", "there9", "index", &indexes[1], "type", "veth"])?;
    moved(home, pod)?;
    let foreign = index(pod, "eth0")?;
    assert_ne!(foreign, indexes[1]);
    // The next agent gives it one of its own again.
    node.start_agent()?;
    let again = index(pod, "eth0")?;
    assert!(![&foreign, &indexes[0], &indexes[1]].contains(&&again), "{again}\n{}", node.log());
    assert_eq!(index(stands[0].0.netns(), "eth0")?, indexes[0]);
    told_apart(&node)?;
    // The end of one pod is not the end of the other's programs.
    assert!(node.plugin("DEL", Some(&stands[0].1), json!({}))?.ok, "{}", node.log());
    let before = count(&node, addresses[1])?;
    udp_exchange(pod, 0, to, b"still here", Duration::from_secs(2))?;
    assert!(count(&node, addresses[1])? > before);
    assert!(node.plugin("DEL", Some(&stands[1].1), json!({}))?.ok, "{}", node.log());
    assert_eq!(node.traces()?, [""; 0]);
    Ok(())
}

#[test]
fn a_pod_of_the_file_gets_the_sandbox_that_the_runtime_brings() -> Result {
    let mut node = Node::new("cni-file", 4)?;
    let document = |pods: &[&str]| {
        let pod = |(i, name): (usize, &&str)| {
            json!({
                "uid": name, "namespace": "default", "name": name, "parent": "eth1", "vlan": 100 + i,
                "mac": format!("fa:16:3e:00:00:{i:02x}"), "ipv4": format!("10.1.16.{}", 10 + i), "generation": 1,
                "subnet": "10.1.16.0/22", "gateway": "10.1.16.1", "gateway_mac": "fa:ff:ff:00:00:01"
            })
        };
        json!({ "version": 1, "pods": pods.iter().enumerate().map(pod).collect::<Vec<_>>() }).to_string()
    };
    fs::write(node.path("pods.json"), document(&["pod-0", "pod-1"]))?;
    node.use_file(&node.path("pods.json"))?;
    node.start_agent()?;
    let stands = Sandbox::several("cnifile", 3)?;
    let first = node.plugin("ADD", Some(&stands[0].1), json!({}))?;
    assert_eq!(first.address(), Some([10, 1, 16, 10].into()), "{first:?}");
    assert!(node.plugin("ADD", Some(&stands[1].1), json!({}))?.ok);
    fails(&node.plugin("ADD", Some(&stands[2].1), json!({}))?, 101, "default/pod-2");
    // The agent's restart changes nothing; the pod's next sandbox gets what the one before had.
    node.kill_agent();
    node.start_agent()?;
    assert!(node.plugin("CHECK", Some(&stands[0].1), previous(&first))?.ok);
    let next = Sandbox { pod: "pod-0".into(), ..stands[2].1.clone() };
    let second = node.plugin("ADD", Some(&next), json!({}))?;
    assert_eq!(second.address(), first.address());
    assert!(node.plugin("DEL", Some(&stands[0].1), json!({}))?.ok);
    assert!(node.plugin("CHECK", Some(&next), previous(&second))?.ok);
    for sandbox in [&next, &stands[1].1] {
        assert!(node.plugin("DEL", Some(sandbox), json!({}))?.ok);
    }
    assert_eq!(node.traces()?, [""; 0]);
    Ok(())
}

#[test]
fn runtimes_limit_the_bandwidth_of_sandboxes() -> Result {
    let mut node = Node::new("cni-limit", 4)?;
    node.start_agent()?;
    let stands = Sandbox::several("cnilimit", 1)?;
    let sandbox = &stands[0].1;
    let runtime = |bandwidth: Value| json!({ "runtimeConfig": { "bandwidth": bandwidth } });
    for (wrong, word) in [
        (json!({ "egressRate": 10, "egressBurst": 80 }), "egress rate: 10"),
        (json!({ "ingressBurst": 80 }), "no rate"),
    ] {
        fails(&node.plugin("ADD", Some(sandbox), runtime(wrong))?, 7, word);
    }
    assert_eq!(node.traces()?, [""; 0]);
    // As containerd writes it for the annotation kubernetes.io/ingress-bandwidth: 10M.
    let asked = runtime(json!({ "ingressRate": 10_000_000, "ingressBurst": u32::MAX }));
    let said = node.plugin("ADD", Some(sandbox), asked)?;
    assert!(said.ok, "{said:?}");
    let rows = node.limits_in_force()?;
    assert_eq!(rows.len(), 1);
    assert_eq!((rows[0].ingress.nanos(1000), rows[0].egress.cost), (800_000, 0));
    assert!(node.plugin("DEL", Some(sandbox), json!({}))?.ok);
    assert_eq!(node.limits_in_force()?, []);
    // What is left to the plugin `bandwidth` is none of ours.
    let annotated = json!({ "runtimeConfig": { "io.kubernetes.cri.pod-annotations":
        { "kubernetes.io/ingress-bandwidth": "10M" } } });
    assert!(node.plugin("ADD", Some(sandbox), annotated)?.ok);
    assert_eq!(node.limits_in_force()?, []);
    Ok(())
}

//! The plugin under a real runtime: containerd with runc, in the node's namespace, asked as kubelet asks it.
//!
//! ```text
//!   node n:  agent with the allocator inside, containerd ── CRI ── this test
//!            eniway-cni, then portmap and bandwidth              sandboxes: busybox in containers of runc
//! ```
//!
//! Pods come many at once, die, and are deleted or forgotten; the runtime and the node restart. In the end nothing is left of
//! any of them.

use std::{collections::HashMap, fs, time::Duration};

use datapath_common::abi::{Bucket, Limits};
use eniway_tests::runtime::{
    Node,
    containerd::Containerd,
    cri::{Linux, Metadata, PortMapping, Runtime, SandboxConfig},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

type Result<T = (), E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const PODS: usize = 30;

fn config(containerd: &Containerd, number: usize, attempt: u32) -> SandboxConfig {
    SandboxConfig {
        metadata: Some(Metadata {
            name: format!("pod-{number}"),
            uid: format!("uid-{number}"),
            namespace: "default".into(),
            attempt,
        }),
        port_mappings: Vec::new(),
        annotations: HashMap::new(),
        linux: Some(Linux { cgroup_parent: containerd.cgroup() }),
    }
}

fn named_namespaces(node: &Node) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let dir = node.path("containerd").display().to_string();
    let ours = mounts.lines().filter(|line| line.starts_with("nsfs") && line.contains(&dir));
    ours.map(str::to_owned).collect()
}

/// The CRI answers some time after containerd does.
async fn up(runtime: &Runtime) -> Result {
    for _ in 0..600 {
        if runtime.is_up().await {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Err("the CRI does not answer".into())
}

/// A client of the CRI, which is up.
fn client(containerd: &Containerd) -> Result<(tokio::runtime::Runtime, Runtime)> {
    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let runtime = {
        let _inside = tokio.enter();
        Runtime::new(&containerd.socket())?
    };
    tokio.block_on(up(&runtime))?;
    Ok((tokio, runtime))
}

async fn start(runtime: &Runtime, containerd: &Containerd, pods: usize, attempt: u32) -> Result<Vec<String>> {
    let mut tasks = Vec::new();
    for number in 0..pods {
        let (runtime, config) = (runtime.clone(), config(containerd, number, attempt));
        tasks.push(tokio::spawn(async move { runtime.run(config).await }));
    }
    let mut ids = Vec::new();
    for task in tasks {
        ids.push(task.await?.map_err(|status| format!("{}\n{}", status.message(), containerd.log()))?);
    }
    Ok(ids)
}

async fn stop_all(runtime: &Runtime, ids: &[String]) -> Result {
    let mut tasks = Vec::new();
    for id in ids {
        let (runtime, id) = (runtime.clone(), id.clone());
        tasks.push(tokio::spawn(async move {
            runtime.stop(&id).await?;
            runtime.remove(&id).await
        }));
    }
    for task in tasks {
        task.await??;
    }
    Ok(())
}

#[test]
fn pods_of_containerd_come_and_go_without_a_trace() -> Result {
    let mut node = Node::new("containerd", 40)?;
    node.start_agent()?;
    let mut containerd = Containerd::start(&node, &[])?;
    let (tokio, runtime) = client(&containerd)?;

    // Many at once, each with an address of its own.
    let ids = tokio.block_on(start(&runtime, &containerd, PODS, 0))?;
    let mut addresses = Vec::new();
    for id in &ids {
        addresses.push(tokio.block_on(runtime.address(id))?);
    }
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), PODS, "{addresses:?}");
    assert_eq!(node.traces()?.iter().filter(|trace| trace.starts_with("map entry")).count(), PODS);

    // Sandboxes are killed, the runtime and the agent with them; the runtime comes back and cleans up.
    let mut processes = containerd.sandboxes();
    assert!(processes.len() >= PODS, "{processes:?}");
    fastrand::shuffle(&mut processes);
    for pid in &processes[..PODS / 2] {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    containerd.kill();
    node.kill_agent();
    node.start_agent()?;
    containerd.spawn(&node)?;
    tokio.block_on(up(&runtime))?;
    tokio.block_on(stop_all(&runtime, &ids))?;
    assert_eq!(node.traces()?, [""; 0], "{}", node.log());
    assert_eq!(named_namespaces(&node), [""; 0]);

    // The node restarts under its pods: no process, no namespace, no pin is left, only what is on disk.
    let ids = tokio.block_on(start(&runtime, &containerd, PODS, 1))?;
    containerd.kill_all();
    node.reboot()?;
    fs::remove_dir_all(node.path("containerd/state"))?;
    node.start_agent()?;
    containerd.spawn(&node)?;
    tokio.block_on(up(&runtime))?;
    assert_eq!(tokio.block_on(runtime.list())?.len(), ids.len(), "the runtime remembers its sandboxes");
    tokio.block_on(stop_all(&runtime, &ids))?;
    assert_eq!(node.traces()?, [""; 0], "{}", node.log());
    assert_eq!(named_namespaces(&node), [""; 0]);
    Ok(())
}

#[test]
fn other_plugins_come_after_ours_and_ctr_can_use_it_too() -> Result {
    let mut node = Node::new("chain", 4)?;
    node.start_agent()?;
    let chain = [
        json!({ "type": "portmap", "capabilities": { "portMappings": true } }),
        json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } }),
    ];
    let containerd = Containerd::start(&node, &chain)?;
    let (tokio, runtime) = client(&containerd)?;
    let mut wanted = config(&containerd, 0, 0);
    wanted.port_mappings = vec![PortMapping { protocol: 0, container_port: 80, host_port: 8080 }];
    wanted.annotations = HashMap::from([
        ("kubernetes.io/ingress-bandwidth".to_owned(), "10M".to_owned()),
        ("kubernetes.io/egress-bandwidth".to_owned(), "10M".to_owned()),
        ("eniway/mode".to_owned(), "sub-eni".to_owned()),
    ]);
    let id =
        tokio.block_on(runtime.run(wanted)).map_err(|status| format!("{status}\n{}", containerd.log()))?;
    let rules = node.netns().exec(&["iptables-save", "-t", "nat"])?;
    let address = tokio.block_on(runtime.address(&id))?;
    assert!(rules.contains(&format!("--to-destination {address}:80")), "{rules}");
    let qdiscs = node.netns().exec(&["tc", "qdisc", "show"])?;
    assert!(qdiscs.contains("tbf"), "{qdiscs}");
    tokio.block_on(stop_all(&runtime, std::slice::from_ref(&id)))?;
    assert_eq!(node.traces()?, [""; 0]);

    // The pod's mode is its annotation's choice, and this node has no exclusive ENIs.
    let mut exclusive = config(&containerd, 1, 0);
    exclusive.annotations.insert("eniway/mode".to_owned(), "exclusive-eni".to_owned());
    let refused = tokio.block_on(runtime.run(exclusive)).expect_err("there is no exclusive ENI");
    assert!(refused.message().contains("exclusive ENI"), "{refused}");
    assert_eq!(node.traces()?, [""; 0]);

    // ctr knows no pods, and names the namespace by a process.
    let said = containerd.run_with_ctr(&node, "by-ctr", "ip -4 addr show eth0; ip route")?;
    assert!(said.contains("inet 10.1.") && said.contains("default via 10.1.16.1"), "{said}");
    assert_eq!(node.traces()?, [""; 0], "{}", node.log());
    Ok(())
}

#[test]
fn limits_are_the_plugins_where_it_has_the_capability() -> Result {
    let mut node = Node::new("limits", 4)?;
    node.limits = true;
    node.start_agent()?;
    let containerd = Containerd::start(&node, &[])?;
    let (tokio, runtime) = client(&containerd)?;
    let mut wanted = config(&containerd, 0, 0);
    wanted.annotations = HashMap::from([
        ("kubernetes.io/ingress-bandwidth".to_owned(), "10M".to_owned()),
        ("kubernetes.io/egress-bandwidth".to_owned(), "20M".to_owned()),
        ("eniway/egress-burst".to_owned(), "8M".to_owned()),
    ]);
    let id =
        tokio.block_on(runtime.run(wanted)).map_err(|status| format!("{status}\n{}", containerd.log()))?;
    // The burst that containerd writes where nobody has chosen one is not taken at its word.
    let expected = Limits {
        ingress: Bucket::new(10_000_000, 10_000_000 / 8 / 4),
        egress: Bucket::new(20_000_000, 1_000_000),
        pace: 0,
    };
    assert_eq!(node.limits_in_force()?, [expected]);
    tokio.block_on(stop_all(&runtime, std::slice::from_ref(&id)))?;
    assert_eq!(node.limits_in_force()?, []);
    assert_eq!(node.traces()?, [""; 0]);
    Ok(())
}

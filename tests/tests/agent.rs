//! The agent as a process: what it says to bad input, and that what runs keeps running through its life and death.

use std::{
    fs,
    net::SocketAddrV4,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use aya::programs::{SchedClassifier, TcAttachType};
use eniway_tests::{
    demo::evidence::expect_reach,
    lab::{
        Agent, Lab, Netns, NetnsGuard,
        agent::{READY, Signal, eniway_binary},
        http,
        net::{UdpEcho, udp_exchange},
    },
};
use serde_json::{Value, json};

type Result<T = (), E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// A namespace, a directory and a configuration: the least that an agent is started with.
struct Stand {
    netns: NetnsGuard,
    dir: PathBuf,
}

impl Stand {
    /// With an interface `eth1`, one end of a veth pair.
    fn new(name: &str) -> Result<Self> {
        let name = format!("ewa-{name}");
        let dir = std::env::temp_dir().join(&name);
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        let stand = Self { netns: NetnsGuard::renew(&name)?, dir };
        let _ = fs::remove_dir_all(stand.pin_dir());
        stand.netns().exec(&["ip", "link", "add", "eth1", "type", "veth", "peer", "name", "fabric"])?;
        stand.configure("")?;
        stand.document(&json!({ "version": 1, "revision": 1, "vips": [], "pods": [] }))?;
        Ok(stand)
    }

    fn netns(&self) -> &Netns {
        self.netns.netns()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn pin_dir(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(self.netns().name())
    }

    /// Writes the configuration, with more at its end.
    fn configure(&self, more: &str) -> Result {
        self.configure_parent("eth1", "", more)
    }

    fn configure_parent(&self, interface: &str, parent: &str, more: &str) -> Result {
        let text = format!(
            "node = \"n\"\npin_dir = {:?}\nrun_dir = {:?}\n\n[source]\nkind = \"file\"\npath = {:?}\n\n\
             [[parent]]\ninterface = {interface:?}\n{parent}\n{more}",
            self.pin_dir(),
            self.path("run"),
            self.path("pods.json"),
        );
        Ok(fs::write(self.path("agent.toml"), text)?)
    }

    fn document(&self, document: &Value) -> Result {
        Ok(fs::write(self.path("pods.json"), document.to_string())?)
    }

    fn agent(&self) -> Result<Command> {
        self.agent_by(&eniway_binary()?, &[])
    }

    /// The agent started by another program, such as `setpriv`.
    fn agent_by(&self, binary: &Path, by: &[&str]) -> Result<Command> {
        let mut command = match by.split_first() {
            None => self.netns().command(binary)?,
            Some((program, arguments)) => {
                let mut command = self.netns().command(program)?;
                command.args(arguments).arg(binary);
                command
            }
        };
        command.args(["agent", "--once", "--config"]).arg(self.path("agent.toml"));
        Ok(command)
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        if let Ok(binary) = eniway_binary()
            && let Ok(mut detach) = self.netns().command(binary)
        {
            let _ = detach.args(["detach", "--config"]).arg(self.path("agent.toml")).output();
        }
        let _ = fs::remove_dir_all(self.pin_dir());
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Runs a command to its end, but not for ever.
fn finish(mut command: Command) -> Result<Output> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let end = Instant::now() + READY;
    while child.try_wait()?.is_none() {
        if Instant::now() > end {
            child.kill()?;
            return Err(format!("{command:?} did not end: {:?}", child.wait_with_output()?).into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(child.wait_with_output()?)
}

/// Fails unless the command does, with one error that holds all the words. Returns the error.
#[track_caller]
fn refuses(command: Command, words: &[&str]) -> String {
    let output = finish(command).expect("the command runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "it succeeded: {text}");
    let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("eniway: ")).collect();
    assert_eq!(errors.len(), 1, "not one error: {text}");
    for word in words {
        assert!(text.contains(word), "no {word:?} in: {text}");
    }
    assert!(!text.contains("panicked"), "{text}");
    text
}

#[track_caller]
fn succeeds(command: Command) -> String {
    let output = finish(command).expect("the command runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

/// Programs on tc of an interface: behind links, or on kernels without TCX (6.1) in filters of clsact.
fn tc_programs(netns: &Netns, interface: &str) -> Result<usize> {
    let mut count = 0;
    for (way, name) in [(TcAttachType::Ingress, "ingress"), (TcAttachType::Egress, "egress")] {
        count += match netns
            .run(|| SchedClassifier::query_tcx(interface, way).map(|(_, programs)| programs.len()))?
        {
            Ok(programs) => programs,
            Err(_) => match netns.exec(&["tc", "filter", "show", "dev", interface, name]) {
                Ok(filters) => filters.matches("direct-action").count(),
                Err(error) if error.to_string().contains("Parent Qdisc doesn't exist") => 0,
                Err(error) => return Err(error.into()),
            },
        };
    }
    Ok(count)
}

fn nothing_attached(stand: &Stand, interface: &str) -> Result {
    assert_eq!(tc_programs(stand.netns(), interface)?, 0, "programs stay on {interface}");
    let link = stand.netns().exec(&["ip", "link", "show", interface])?;
    assert!(!link.contains("xdp"), "{link}");
    Ok(())
}

#[test]
fn without_root_it_names_what_it_lacks() -> Result {
    let stand = Stand::new("root")?;
    // Where nobody may look for it otherwise.
    let binary = stand.path("eniway");
    fs::copy(eniway_binary()?, &binary)?;
    let by = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"];
    refuses(stand.agent_by(&binary, &by)?, &["root", "CAP_BPF"]);
    nothing_attached(&stand, "eth1")
}

#[test]
fn without_a_bpf_file_system_it_says_how_to_mount_one() -> Result {
    let stand = Stand::new("bpffs")?;
    let script = "umount /sys/fs/bpf && exec \"$@\"";
    let by = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"];
    refuses(stand.agent_by(&eniway_binary()?, &by)?, &["BPF file system", "mount -t bpf"]);
    nothing_attached(&stand, "eth1")
}

#[test]
fn a_parent_that_does_not_exist_is_named() -> Result {
    let stand = Stand::new("parent")?;
    stand.configure_parent("eth7", "", "")?;
    refuses(stand.agent()?, &["eth7", "does not exist", "[[parent]]"]);
    assert!(!stand.pin_dir().exists(), "{} was made", stand.pin_dir().display());
    Ok(())
}

#[test]
fn a_nic_without_native_xdp_is_refused_whole() -> Result {
    let stand = Stand::new("xdp")?;
    stand.netns().exec(&["ip", "link", "add", "br0", "type", "bridge"])?;
    stand.configure_parent("br0", "xdp = \"guard\"", "")?;
    refuses(stand.agent()?, &["br0", "no native XDP", "xdp = \"off\"", "generic_xdp = true"]);
    nothing_attached(&stand, "br0")?;
    // Both ways out work.
    stand.configure_parent("br0", "xdp = \"off\"", "")?;
    succeeds(stand.agent()?);
    stand.configure_parent("br0", "xdp = \"guard\"\ngeneric_xdp = true", "")?;
    succeeds(stand.agent()?);
    let link = stand.netns().exec(&["ip", "link", "show", "br0"])?;
    assert!(link.contains("xdpgeneric"), "{link}");
    Ok(())
}

#[test]
fn an_unknown_key_is_told_with_its_line() -> Result {
    let stand = Stand::new("key")?;
    stand.configure("[limits]\nendpoint = 3\n")?;
    let text = fs::read_to_string(stand.path("agent.toml"))?;
    let line = text.lines().position(|line| line.starts_with("endpoint")).map_or(0, |line| line + 1);
    refuses(stand.agent()?, &["agent.toml", "endpoint", &format!("line {line}")]);
    nothing_attached(&stand, "eth1")
}

#[test]
fn tables_of_another_size_or_version_stay_as_they_are() -> Result {
    let stand = Stand::new("layout")?;
    succeeds(stand.agent()?);
    assert_eq!(tc_programs(stand.netns(), "eth1")?, 2);
    stand.configure("[limits]\nendpoints = 77\n")?;
    refuses(stand.agent()?, &["pinned map", "eniway detach", "Nothing was changed"]);
    assert_eq!(tc_programs(stand.netns(), "eth1")?, 2, "the old programs are gone");
    stand.configure("")?;
    succeeds(stand.agent()?);

    let other = stand.pin_dir().join("v9999");
    fs::create_dir(&other)?;
    refuses(stand.agent()?, &["v9999", "another version", "eniway detach"]);
    assert_eq!(tc_programs(stand.netns(), "eth1")?, 2, "the old programs are gone");
    fs::remove_dir(&other)?;
    Ok(())
}

#[test]
fn a_bad_first_document_ends_it() -> Result {
    let stand = Stand::new("first")?;
    fs::write(stand.path("pods.json"), "{ \"version\": 1, ")?;
    refuses(stand.agent()?, &["pods.json", "line 1"]);
    nothing_attached(&stand, "eth1")
}

#[test]
fn a_pod_whose_namespace_is_gone_is_a_fault_of_that_pod() -> Result {
    let stand = Stand::new("gone")?;
    stand.document(&json!({ "version": 1, "revision": 1, "vips": [], "pods": [{
        "uid": "u", "namespace": "default", "name": "lost", "container_id": "c",
        "netns": "/run/netns/ewa-no-such", "interface": "eth0", "state": "active", "generation": 1,
        "parent": "eth1", "vlan": 101, "mac": "fa:16:3e:00:01:02", "ipv4": "10.1.18.2",
        "subnet": "10.1.16.0/22", "gateway": "10.1.16.1", "gateway_mac": "fa:ff:ff:00:00:01", "mtu": 1500
    }]}))?;
    refuses(stand.agent()?, &["default/lost", "/run/netns/ewa-no-such"]);
    let status: Value = serde_json::from_str(&fs::read_to_string(stand.path("run/status.json"))?)?;
    assert_eq!(status["ready"], true, "{status}");
    let error = status["pods"][0]["error"].as_str().unwrap_or_default();
    assert!(error.contains("/run/netns/ewa-no-such"), "{status}");
    Ok(())
}

/// Two nodes, two pods on the first, one on the other.
fn lab(id: &str) -> Result<Lab> {
    let lab = Lab::builder(id)
        .node("n", [10, 1, 0, 10], [10, 1, 16, 10])
        .node("m", [10, 1, 0, 11], [10, 1, 16, 11])
        .pod("a", "n", [10, 1, 18, 1])
        .pod("b", "n", [10, 1, 18, 2])
        .pod("c", "m", [10, 1, 18, 3])
        .vm("vm", [10, 1, 0, 20])
        .http_vip([10, 1, 0, 200], 80)
        .build()?;
    lab.start_agents()?;
    Ok(lab)
}

/// Fails unless `a` reaches its neighbour and the other node.
#[track_caller]
fn everything_works(lab: &Lab) {
    for to in ["b", "c"] {
        let reach = || -> Result { Ok(expect_reach(lab, lab.pod("a")?, lab.pod(to)?)?) };
        reach().expect("pods reach each other");
    }
}

/// The line in which the agent says what its last start changed.
fn last_summary(agent: &Agent) -> Result<String> {
    let text = fs::read_to_string(agent.log())?;
    let line = text.lines().rfind(|line| line.contains(" operations"));
    Ok(line.ok_or("the agent does not say what it changed")?.to_owned())
}

#[test]
fn two_agents_do_not_share_a_node() -> Result {
    let lab = lab("a-two")?;
    let first = lab.agent("n")?;
    let pid = first.pid().ok_or("no agent")?;
    let second = |config: &Path| -> Result<Command> {
        let mut command = lab.node("n")?.netns.command(eniway_binary()?)?;
        command.args(["agent", "--config"]).arg(config);
        Ok(command)
    };
    refuses(second(&first.config())?, &["another agent", &pid.to_string(), "Stop it first"]);

    // Another run directory does not make it another node: the pins are the same.
    let text = fs::read_to_string(first.config())?;
    let run_dir = format!("{:?}", first.run_dir());
    let config = lab.dir().join("second.toml");
    fs::write(&config, text.replace(&run_dir, &format!("{:?}", lab.dir().join("second"))))?;
    refuses(second(&config)?, &["another agent"]);
    assert_eq!(first.pid(), Some(pid), "the first agent is gone");
    everything_works(&lab);
    lab.shutdown()?;
    Ok(())
}

#[test]
fn a_bad_document_changes_nothing_and_is_told_with_the_place() -> Result {
    let lab = lab("a-bad")?;
    let agent = lab.agent("n")?;
    let good = agent.document()?;
    type Edit = fn(&mut Value);
    let cases: [(&str, Edit, &[&str]); 5] = [
        ("VLAN id", |document| document["pods"][0]["vlan"] = 5000.into(), &["pods[0].vlan", "5000"]),
        (
            "VLAN twice",
            |document| document["pods"][1]["vlan"] = document["pods"][0]["vlan"].clone(),
            &["pods[1]", "pods[0]"],
        ),
        (
            "address twice",
            |document| document["pods"][1]["ipv4"] = document["pods"][0]["ipv4"].clone(),
            &["pods[1]", "pods[0]"],
        ),
        ("unknown key", |document| document["pods"][1]["vlam"] = 3.into(), &["pods[1]", "vlam"]),
        (
            "missing key",
            |document| _ = document["pods"][1].as_object_mut().map(|pod| pod.remove("mac")),
            &["pods[1]", "mac"],
        ),
    ];
    for (what, edit, words) in cases {
        agent.change(|document| {
            let revision = document["revision"].clone();
            *document = good.clone();
            document["revision"] = revision;
            // A pod less, so that half a document would be noticed.
            edit(document);
        })?;
        let told = |status: &Value| {
            let error = status["source_error"].as_str().unwrap_or_default();
            words.iter().all(|word| error.contains(word))
        };
        agent.wait_status(&format!("{what}: an error with {words:?}"), Duration::from_secs(5), told)?;
        let text = agent.cli(&["status"])?;
        assert!(
            words.iter().all(|word| text.contains(word)),
            "{what}: `eniway status` does not tell: {text}"
        );
        everything_works(&lab);
    }
    fs::write(agent.source(), "{")?;
    agent.wait_status("an error for what is no JSON", Duration::from_secs(5), |status| {
        status["source_error"].as_str().is_some_and(|error| error.contains("line 1"))
    })?;
    everything_works(&lab);
    // A restart with a bad document keeps all that runs, too.
    agent.stop(Signal::SIGKILL)?;
    agent.start()?;
    agent.wait_status("an error after a restart", READY, |status| !status["source_error"].is_null())?;
    everything_works(&lab);

    let mut better = good;
    better["revision"] = 100.into();
    fs::write(agent.source(), better.to_string())?;
    agent.wait_ready(READY)?;
    assert!(agent.status()?["source_error"].is_null());
    lab.shutdown()?;
    Ok(())
}

#[test]
fn pods_come_and_go_and_the_others_do_not_notice() -> Result {
    let lab = lab("a-come")?;
    let agent = lab.agent("n")?;
    let (a, b) = (lab.pod("a")?, lab.pod("b")?);
    let mut entry = Value::Null;
    agent.change(|document| {
        let pods = document["pods"].as_array_mut().expect("pods");
        let at = pods.iter().position(|pod| pod["name"] == "b").expect("b");
        entry = pods.remove(at);
    })?;
    agent.wait_ready(READY)?;
    assert!(http::get(&a.netns, b.http(), "/").is_err(), "b is still there");
    assert!(b.netns.exec(&["ip", "link", "show", "eth0"]).is_err(), "b still has an interface");
    let c = lab.pod("c")?;
    http::get(&a.netns, c.http(), "/")?;

    // The same address and VLAN, but another container.
    entry["container_id"] = "another".into();
    entry["uid"] = "another".into();
    agent.change(|document| document["pods"].as_array_mut().expect("pods").push(entry))?;
    agent.wait_ready(READY)?;
    everything_works(&lab);
    lab.shutdown()?;
    Ok(())
}

#[test]
fn ended_under_traffic_it_loses_no_packet_and_changes_nothing_when_back() -> Result {
    const PORT: u16 = 7007;
    let lab = lab("a-kill")?;
    let agent = lab.agent("n")?;
    let a = lab.pod("a")?;
    let stop = AtomicBool::new(false);
    let sent = AtomicU64::new(0);
    let servers: Vec<UdpEcho> = ["b", "c"]
        .iter()
        .map(|name| {
            let pod = lab.pod(name)?;
            UdpEcho::start(&pod.netns, SocketAddrV4::new(pod.ip, PORT))
        })
        .collect::<std::result::Result<_, _>>()?;
    let lost = thread::scope(|scope| -> Result<Vec<String>> {
        let clients: Vec<_> = servers
            .iter()
            .map(|server| {
                scope.spawn(|| {
                    let mut lost = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        // Each is answered or lost; there is no second try.
                        let result =
                            udp_exchange(&a.netns, 0, server.addr(), b"ping", Duration::from_secs(1));
                        sent.fetch_add(1, Ordering::Relaxed);
                        lost.extend(result.err().map(|error| error.to_string()));
                    }
                    lost
                })
            })
            .collect();
        let work = || -> Result {
            for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGKILL, Signal::SIGTERM] {
                thread::sleep(Duration::from_millis(100));
                agent.stop(signal)?;
                thread::sleep(Duration::from_millis(200));
                agent.start()?;
                agent.wait_ready(READY)?;
                let summary = last_summary(agent)?;
                assert!(summary.contains(" 0 released, 0 operations, 0 faults"), "{summary}");
            }
            Ok(())
        };
        let result = work();
        stop.store(true, Ordering::Relaxed);
        let lost = clients.into_iter().flat_map(|client| client.join().expect("no panic")).collect();
        result.map(|()| lost)
    })?;
    let sent = sent.into_inner();
    assert!(sent > 100, "only {sent} datagrams were sent");
    assert!(lost.is_empty(), "{} of {sent} datagrams were lost: {lost:?}", lost.len());
    everything_works(&lab);
    lab.shutdown()?;
    Ok(())
}

#[test]
fn detach_leaves_nothing() -> Result {
    let lab = Lab::builder("a-detach")
        .node("n", [10, 1, 0, 10], [10, 1, 16, 10])
        .pod("a", "n", [10, 1, 18, 1])
        .pod("b", "n", [10, 1, 18, 2])
        .vm("vm", [10, 1, 0, 20])
        .http_vip([10, 1, 0, 200], 80)
        .build()?;
    let (netns, agent) = (&lab.node("n")?.netns, lab.agent("n")?);
    let state = || -> Result<String> {
        let mut text = String::new();
        for words in [
            &["ip", "rule"][..],
            &["ip", "-4", "route", "show", "table", "all"],
            &["ip", "-o", "link"],
            // Those that eniway adds stand for ever; others come and go.
            &["ip", "neighbour", "show", "nud", "permanent"],
        ] {
            text.push_str(&netns.exec(words)?);
        }
        Ok(text)
    };
    let before = state()?;
    lab.start_agents()?;
    assert_eq!(tc_programs(netns, "eth1")?, 2);
    assert_ne!(state()?, before);

    let mut early = netns.command(eniway_binary()?)?;
    early.args(["detach", "--config"]).arg(agent.config());
    refuses(early, &["another agent"]);
    agent.stop(Signal::SIGTERM)?;
    http::get(&lab.vm("vm")?.netns, lab.pod("a")?.http(), "/")?;
    agent.cli(&["detach"])?;
    assert_eq!(state()?, before);
    assert_eq!(tc_programs(netns, "eth1")?, 0);
    assert!(!agent.pin_dir().exists(), "{} is still there", agent.pin_dir().display());
    for pod in lab.pods() {
        assert!(pod.netns.exec(&["ip", "link", "show", "eth0"]).is_err(), "{} has an interface", pod.name);
    }
    // Twice is fine, and so is a new beginning.
    agent.cli(&["detach"])?;
    agent.start()?;
    agent.wait_ready(READY)?;
    http::get(&lab.vm("vm")?.netns, lab.pod("a")?.http(), "/")?;
    lab.shutdown()?;
    Ok(())
}

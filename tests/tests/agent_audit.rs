//! `eniway audit [--fix]`, and what the agent does by itself when somebody changes the node.
//!
//! ```text
//!   pod a ─┐                              ┌─ pod c
//!   pod b ─┴─ node n ═ fabric (VPC) ═ node m      VM vm
//! ```
//!
//! Somebody damages the node by hand, in every way there is a check for. The agent is stopped meanwhile (SIGSTOP), so that
//! the audit finds it first; then it lives on and repairs, and packets flow again where they had stopped.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use datapath_common::abi::Endpoint;
use datapath_user::{
    pin::{Hook, Pins},
    tables::{Index, Maps},
};
use eniway_tests::{
    demo::evidence::expect_reach,
    lab::{
        Agent, Lab, Netns, NetnsGuard, XdpMode,
        agent::{READY, Signal, eniway_binary},
        net,
    },
    programs::pass_before_all,
};
use nix::{sys::signal::kill, unistd::Pid};
use serde_json::Value;

type Result<T = (), E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Generous: what is wanted is a second, which is reported and not asserted.
const SOON: Duration = Duration::from_secs(10);

fn lab(id: &str, xdp: XdpMode) -> Result<Lab> {
    let lab = Lab::builder(id)
        .node("n", [10, 1, 0, 10], [10, 1, 16, 10])
        .node("m", [10, 1, 0, 11], [10, 1, 16, 11])
        .pod("a", "n", [10, 1, 18, 1])
        .pod("b", "n", [10, 1, 18, 2])
        .pod("c", "m", [10, 1, 18, 3])
        .vm("vm", [10, 1, 0, 20])
        .http_vip([10, 1, 0, 200], 80)
        .xdp(xdp)
        .build()?;
    lab.start_agents()?;
    Ok(lab)
}

/// What `eniway audit` said: exit status and JSON.
struct Said {
    status: Option<i32>,
    report: Value,
    text: String,
}

impl Said {
    fn findings(&self) -> Vec<String> {
        let line = |finding: &Value| {
            ["place", "kind", "what", "expected", "found"]
                .map(|key| finding[key].as_str().unwrap_or("?").to_owned())
                .join(" | ")
        };
        self.report["findings"].as_array().into_iter().flatten().map(line).collect()
    }
}

fn audit(lab: &Lab, words: &[&str]) -> Result<Said> {
    let mut command = lab.node("n")?.netns.command(eniway_binary()?)?;
    command.arg("audit").args(words).args(["--json", "--config"]).arg(lab.agent("n")?.config());
    let output = command.output()?;
    let text =
        format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let report = serde_json::from_slice(&output.stdout).unwrap_or_default();
    Ok(Said { status: output.status.code(), report, text })
}

#[track_caller]
fn is_clean(lab: &Lab) {
    let said = audit(lab, &[]).expect("the audit runs");
    assert_eq!(said.status, Some(0), "{}", said.text);
    assert!(said.findings().is_empty() && said.report["clean"] == true, "{}", said.text);
    assert!(said.report["checks"].as_u64() > Some(50) && said.report["pods"] == 2, "{}", said.text);
}

/// Fails unless `a` reaches its neighbour and the other node, and its own node reaches it.
#[track_caller]
fn everything_works(lab: &Lab) {
    let work = || -> Result {
        let a = lab.pod("a")?;
        for to in ["b", "c"] {
            expect_reach(lab, a, lab.pod(to)?)?;
        }
        net::ping(&lab.node("n")?.netns, a.ip, Duration::from_secs(2))?;
        Ok(())
    };
    work().expect("pods reach each other, and their node reaches them");
}

/// The process stands still, and goes on when this is dropped.
struct Paused(Pid);

impl Paused {
    fn agent(agent: &Agent) -> Result<Self> {
        let pid = Pid::from_raw(agent.pid().ok_or("no agent")? as i32);
        kill(pid, Signal::SIGSTOP)?;
        Ok(Self(pid))
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// The node, as whoever damages it sees it.
struct Victim<'l> {
    lab: &'l Lab,
    netns: &'l Netns,
    pins: Pins,
    /// Where somebody else pins a link.
    other: PathBuf,
    /// Host side of pod a, with its record.
    host: String,
    record: Endpoint,
    slot: u32,
}

impl<'l> Victim<'l> {
    fn of(lab: &'l Lab) -> Result<Self> {
        let agent = lab.agent("n")?;
        let pins = Pins::new(agent.pin_dir());
        let a = lab.pod("a")?;
        let all = Maps::open(&pins)?.pods()?;
        let live = all.iter().find(|pod| pod.record.ipv4 == a.ip.octets()).ok_or("a is in no table")?;
        let status = agent.status()?;
        let pods = status["pods"].as_array().ok_or("no pods")?;
        let host = pods.iter().find(|pod| pod["name"] == "a").and_then(|pod| pod["host_interface"].as_str());
        Ok(Self {
            lab,
            netns: &lab.node("n")?.netns,
            other: agent.pin_dir().join("other"),
            pins,
            host: host.ok_or("a has no host side")?.to_owned(),
            record: live.record,
            slot: live.slot,
        })
    }

    fn on_node(&self, words: &str) -> Result {
        let words = words.replace("{host}", &self.host);
        self.netns.exec(&words.split(' ').collect::<Vec<_>>())?;
        Ok(())
    }

    fn in_pod(&self, words: &str) -> Result {
        self.lab.pod("a")?.netns.exec(&words.split(' ').collect::<Vec<_>>())?;
        Ok(())
    }

    fn sysctl(&self, key: &str, value: &str) -> Result {
        let path = format!("/proc/sys/net/{}", key.replace("{host}", &self.host));
        Ok(self.netns.run(|| fs::write(&path, value))??)
    }

    fn maps(&self) -> Result<Maps> {
        Ok(Maps::open(&self.pins)?)
    }

    /// One more program before ours.
    fn attach_before(&self, interface: &str) -> Result {
        let interface = interface.replace("{host}", &self.host);
        Ok(self.netns.run(|| pass_before_all(&interface, &self.other))??)
    }
}

type Damage = (&'static str, fn(&Victim<'_>) -> Result, &'static [&'static str]);

/// What is done by hand, and words of the finding that it has to make.
const DAMAGES: &[Damage] = &[
    (
        "host neighbour",
        |it| it.on_node("ip neigh del 10.1.18.1 dev {host}"),
        &["default/a", "neighbour 10.1.18.1"],
    ),
    (
        "host route",
        |it| it.on_node("ip route del 10.1.18.1 dev {host}"),
        &["default/a", "route to 10.1.18.1"],
    ),
    ("host side down", |it| it.on_node("ip link set {host} down"), &["default/a", "state of", "down"]),
    ("host side's MTU", |it| it.on_node("ip link set {host} mtu 1280"), &["default/a", "MTU of", "1280"]),
    (
        "host side's MAC",
        |it| it.on_node("ip link set {host} address 02:00:00:00:00:99"),
        &["default/a", "MAC of", "02:00:00:00:00:99"],
    ),
    ("alias", |it| it.on_node("ip link set {host} alias mine"), &["default/a", "alias of", "mine"]),
    (
        "host setting",
        |it| it.sysctl("ipv4/conf/{host}/rp_filter", "1"),
        &["default/a", "rp_filter", "| 2 | 1"],
    ),
    ("pair", |it| it.on_node("ip link del {host}"), &["default/a", "link", "no such interface"]),
    (
        "pod's neighbour",
        |it| it.in_pod("ip neigh del 10.1.16.1 dev eth0"),
        &["default/a", "neighbour 10.1.16.1"],
    ),
    ("pod's MTU", |it| it.in_pod("ip link set eth0 mtu 1300"), &["default/a", "MTU of eth0", "1300"]),
    ("pod's default route", |it| it.in_pod("ip route del default"), &["default/a", "default route"]),
    ("pod's address", |it| it.in_pod("ip addr del 10.1.18.1/32 dev eth0"), &["default/a", "address of eth0"]),
    ("pod's GRO", |it| it.in_pod("ethtool -K eth0 gro off"), &["default/a", "gro of eth0", "off"]),
    (
        "pod's programs",
        |it| Ok(fs::remove_file(it.pins.pod_tc(it.record.ifindex, Hook::In))?),
        &["default/a", "attachment", "tc ingress", "no link"],
    ),
    (
        "a program before the pod's",
        |it| it.attach_before("{host}"),
        &["default/a", "attachment", "tc ingress", "after"],
    ),
    ("a program before the parent's", |it| it.attach_before("eth1"), &["eth1", "attachment", "after"]),
    (
        "parent's program",
        |it| Ok(fs::remove_file(it.pins.parent_tc("eth1", Hook::Out))?),
        &["eth1", "attachment", "tc egress"],
    ),
    (
        "XDP",
        |it| Ok(fs::remove_file(it.pins.parent_xdp("eth1", false))?),
        &["eth1", "attachment", "XDP of eth1"],
    ),
    ("offload", |it| it.on_node("ethtool -K eth1 rxvlan on"), &["eth1", "rxvlan of eth1", "| off | on"]),
    ("forwarding", |it| it.sysctl("ipv4/ip_forward", "0"), &["eth1", "net.ipv4.ip_forward"]),
    ("parent's setting", |it| it.sysctl("ipv4/conf/eth1/rp_filter", "1"), &["eth1", "rp_filter"]),
    (
        "parent's neighbour",
        |it| it.on_node("ip neigh del 10.1.16.1 dev eth1"),
        &["eth1", "neighbour 10.1.16.1"],
    ),
    ("rule", |it| it.on_node("ip rule del pref 2101"), &["eth1", "rule", "2101"]),
    ("table", |it| it.on_node("ip route flush table 2100"), &["eth1", "default route"]),
    ("parent down", |it| it.on_node("ip link set eth1 down"), &["eth1", "state of eth1", "down"]),
    (
        "stale rule",
        |it| it.on_node("ip rule add pref 2101 from 192.0.2.0/24 lookup 2100 protocol 221"),
        &["routing policy", "192.0.2.0/24"],
    ),
    (
        "record",
        |it| {
            let record = Endpoint { vid: 4000, gateway_mac: [2; 6], ..it.record };
            Ok(it.maps()?.set_record(it.slot, &record)?)
        },
        &["tables", "vlan", "4000"],
    ),
    (
        "index",
        |it| it.maps()?.clear_slot(Index::Ipv4(it.record.ipv4), it.slot).map(drop).map_err(Into::into),
        &["tables", "POD_IP4 of address 10.1.18.1", "none"],
    ),
    (
        "index of another",
        |it| Ok(it.maps()?.set_slot(Index::Vlan { parent: 0, vid: it.record.vid }, it.slot + 1)?),
        &["tables", "SUBENI of VLAN"],
    ),
    (
        "stale index",
        |it| Ok(it.maps()?.set_slot(Index::Ipv4([10, 1, 18, 77]), it.slot)?),
        &["tables", "10.1.18.77", "no entry"],
    ),
    (
        "destinations of the host",
        |it| Ok(it.maps()?.set_host_dsts(&[("192.0.2.0/24".parse()?, 1)].into()).map(drop)?),
        &["tables", "HOST_DST of 192.0.2.0/24"],
    ),
    (
        "virtual addresses",
        |it| Ok(it.maps()?.set_vips(&[([192, 0, 2, 1], 80, 6)].into()).map(drop)?),
        &["tables", "VIPS", "192.0.2.1:80"],
    ),
    ("epoch", |it| Ok(it.maps()?.policy.set_epoch(77)?), &["tables", "EPOCH"]),
    (
        "map's pin",
        |it| Ok(fs::remove_file(it.pins.map("POD_IP4"))?),
        &["tables", "pin", "map POD_IP4", "no pin"],
    ),
    (
        "leaked pin",
        |it| {
            let pin = it.pins.pod_tc(it.record.ifindex, Hook::In);
            it.attach_before("eth1")?;
            Ok(fs::rename(&it.other, pin.with_file_name("pod-999999-in"))?)
        },
        &["leftovers", "interface 999999"],
    ),
    (
        "leaked veth",
        |it| {
            it.on_node("ip link add eni0123456789a type veth peer name leak0")?;
            Ok(it
                .netns
                .exec(&["ip", "link", "set", "eni0123456789a", "alias", "eniway eth0 gone"])
                .map(drop)?)
        },
        &["leftovers", "eni0123456789a"],
    ),
];

/// Story: the agent stands still, somebody damages the node, and the audit names it; the agent goes on, repairs it on request or
/// has done so by itself, and everything works.
#[test]
fn every_damage_is_named_and_repaired() -> Result {
    let lab = lab("a-audit", XdpMode::Guard)?;
    let agent = lab.agent("n")?;
    is_clean(&lab);
    everything_works(&lab);
    // Others' veths are none of ours, whatever they are called.
    let netns = &lab.node("n")?.netns;
    netns.exec(&["ip", "link", "add", "enifedcba98765", "type", "veth", "peer", "name", "theirs"])?;
    is_clean(&lab);
    for (what, damage, words) in DAMAGES {
        let victim = Victim::of(&lab)?;
        let paused = Paused::agent(agent)?;
        damage(&victim).map_err(|error| format!("{what}: {error}"))?;
        let said = audit(&lab, &[])?;
        drop(paused);
        let named = said.findings().iter().any(|line| words.iter().all(|word| line.contains(word)));
        assert!(named && said.status == Some(1), "{what}: {words:?} is not in\n{}", said.text);
        let fixed = audit(&lab, &["--fix"])?;
        assert_eq!(fixed.status, Some(0), "{what}: {}", fixed.text);
        let _ = fs::remove_file(&victim.other);
        is_clean(&lab);
        everything_works(&lab);
    }
    let links = netns.exec(&["ip", "-br", "link"])?;
    assert!(links.contains("enifedcba98765") && !links.contains("eni0123456789a"), "{links}");
    lab.shutdown()?;
    Ok(())
}

/// Story: there is no agent. The audit still says what is wrong, and that an agent has to repair it; the next one does.
#[test]
fn without_an_agent_the_audit_names_and_says_how_to_go_on() -> Result {
    let lab = lab("a-alone", XdpMode::Off)?;
    let agent = lab.agent("n")?;
    let victim = Victim::of(&lab)?;
    agent.stop(Signal::SIGKILL)?;
    is_clean(&lab);
    victim.on_node("ip neigh del 10.1.16.1 dev eth1")?;
    // As an agent leaves it that is killed while it attaches programs.
    fs::write(agent.run_dir().join("rcu-expedited"), "")?;
    let said = audit(&lab, &["--fix"])?;
    assert_eq!(said.status, Some(1), "{}", said.text);
    assert!(
        said.text.contains("neighbour 10.1.16.1") && said.text.contains("no agent is running"),
        "{}",
        said.text
    );
    assert!(said.report["repaired"].to_string().contains("rcu_expedited"), "{}", said.text);
    agent.start()?;
    agent.wait_ready(READY)?;
    is_clean(&lab);
    // Where no agent has ever run there is nothing to compare with.
    let config = lab.dir().join("never.toml");
    let text = fs::read_to_string(agent.config())?;
    fs::write(&config, text.replace("run_dir = ", "run_dir = \"/nonexistent\" #"))?;
    let mut never = lab.node("n")?.netns.command(eniway_binary()?)?;
    let output = never.args(["audit", "--config"]).arg(config).output()?;
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    lab.shutdown()?;
    Ok(())
}

/// Waits until something is so, and says how long it took.
#[track_caller]
fn detected(what: &str, is: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < SOON, "{what}: not within {SOON:?}");
        thread::sleep(Duration::from_millis(5));
    }
    println!("{what}: {} ms", begun.elapsed().as_millis());
}

/// Story: the agent runs, and is told by the kernel what others do to the node.
#[test]
fn events_are_followed_repaired_or_reported() -> Result {
    let lab = lab("a-event", XdpMode::Guard)?;
    let agent = lab.agent("n")?;
    let netns = &lab.node("n")?.netns;
    let victim = Victim::of(&lab)?;
    let shows = |words: &[&str], text: &str| netns.exec(words).is_ok_and(|out| out.contains(text));
    let parent = |status: &Value| status["parents"][0].clone();
    let noted =
        |text: &str| agent.status().is_ok_and(|status| parent(&status)["notes"].to_string().contains(text));
    // Its first looks are over.
    detected("first status", || agent.status().is_ok_and(|status| status["ready"] == true));

    netns.exec(&["ethtool", "-K", "eth1", "rxvlan", "on"])?;
    detected("rxvlan turned on", || shows(&["ethtool", "-k", "eth1"], "rx-vlan-offload: off"));
    netns.exec(&["ip", "link", "set", "eth1", "mtu", "1300"])?;
    detected("parent's MTU below the pods'", || noted("MTU of eth1"));
    netns.exec(&["ip", "link", "set", "eth1", "mtu", "1500"])?;
    detected("parent's MTU raised again", || !noted("MTU of eth1"));
    netns.exec(&["ip", "link", "set", "eth1", "down"])?;
    detected("parent set down", || {
        shows(&["ip", "-br", "link", "show", "eth1"], "LOWER_UP")
            && shows(&["ip", "route", "show", "table", "2100"], "via 10.1.16.1")
    });
    everything_works(&lab);
    netns.exec(&["ip", "rule", "del", "pref", "2100"])?;
    detected("rule deleted", || shows(&["ip", "rule"], "2100:"));
    netns.exec(&["ip", "neigh", "del", "10.1.16.1", "dev", "eth1"])?;
    detected("parent's neighbour deleted", || shows(&["ip", "neigh"], "10.1.16.1 dev eth1"));
    victim.on_node("ip link set {host} down")?;
    detected("pod's host side set down", || {
        shows(&["ip", "-br", "link", "show", &victim.host], "LOWER_UP")
            && shows(&["ip", "route"], "10.1.18.1 dev")
    });
    everything_works(&lab);
    victim.on_node("ip link set {host} mtu 1280")?;
    detected("pod's MTU changed", || shows(&["ip", "link", "show", &victim.host], "mtu 1500"));
    victim.in_pod("ip link set eth0 down")?;
    detected("pod's interface set down", || shows(&["ip", "-br", "link", "show", &victim.host], "LOWER_UP"));
    let index = victim.record.ifindex;
    victim.on_node("ip link del {host}")?;
    let back = || {
        let pods = Maps::open(&victim.pins).and_then(|maps| maps.pods()).unwrap_or_default();
        let record = pods.iter().find(|pod| pod.record.ipv4 == victim.record.ipv4).map(|pod| pod.record);
        record.is_some_and(|record| record.ifindex != index)
    };
    detected("pod's veth deleted", back);
    detected("pod's veth is open", || shows(&["ip", "-br", "link", "show", &victim.host], "LOWER_UP"));
    everything_works(&lab);
    netns.exec(&["ip", "addr", "add", "192.0.2.7/32", "dev", "lo"])?;
    detected("address added", || {
        let maps = Maps::open(&victim.pins).and_then(|maps| maps.host_dsts()).unwrap_or_default();
        "192.0.2.7/32".parse().is_ok_and(|net| maps.contains_key(&net))
    });

    // The other end of the parent's wire goes down and comes back.
    let set_port = |state: &str| {
        lab.fabric().netns().exec(&["ip", "link", "set", &lab.node("n")?.parent_port, state]).map(drop)
    };
    set_port("down")?;
    detected("carrier lost", || {
        noted("no carrier") && agent.status().is_ok_and(|status| parent(&status)["no_carrier_since"].is_u64())
    });
    set_port("up")?;
    detected("carrier back", || !noted("no carrier"));
    everything_works(&lab);
    for _ in 0..5 {
        set_port("down")?;
        set_port("up")?;
    }
    detected("after flaps", || !noted("no carrier"));
    everything_works(&lab);
    let status = agent.status()?;
    let lately = status["events"].to_string();
    assert!(lately.contains("has its carrier again") && lately.contains("rxvlan"), "{lately}");
    is_clean(&lab);
    lab.shutdown()?;
    Ok(())
}

/// Story: a parent goes away and comes back as another interface; its pods wait and go on.
#[test]
fn a_parent_that_went_away_is_followed_when_it_comes_back() -> Result {
    let dir = std::env::temp_dir().join("ewa-away");
    let guard = stand("ewa-away", &dir)?;
    let netns = guard.netns();
    let mut agent = netns.command(eniway_binary()?)?;
    let log = fs::File::create(dir.join("log"))?;
    let mut agent = agent.args(["agent", "--config"]).arg(dir.join("agent.toml")).stderr(log).spawn()?;
    let status = || -> Value {
        let text = fs::read_to_string(dir.join("run/status.json")).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    };
    let work = || -> Result {
        detected("ready", || status()["ready"] == true);
        let before = status()["parents"][0]["ifindex"].clone();
        netns.exec(&["ip", "link", "del", "eth1"])?;
        detected("parent gone", || status()["parents"][0]["gone_since"].is_u64());
        netns.exec(&["ip", "link", "add", "eth1", "type", "veth", "peer", "name", "fabric"])?;
        netns.exec(&["ip", "link", "set", "fabric", "up"])?;
        detected("parent back", || {
            let parent = &status()["parents"][0];
            parent["gone_since"].is_null() && parent["ifindex"] != before
        });
        let binary = eniway_binary()?;
        let (binary, config) = (binary.to_string_lossy(), dir.join("agent.toml"));
        let words = [&*binary, "audit", "--config", &*config.to_string_lossy()];
        detected("all is as it should be", || netns.exec(&words).is_ok_and(|text| text.contains("clean:")));
        Ok(())
    };
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    agent.kill()?;
    agent.wait()?;
    let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
    let mut detach = netns.command(eniway_binary()?)?;
    let _ = detach.args(["detach", "--config"]).arg(dir.join("agent.toml")).output();
    let _ = fs::remove_dir_all(&dir);
    match result {
        Ok(result) => result,
        Err(_) => Err(log.into()),
    }
}

/// A namespace with `eth1`, and a configuration for an agent without pods.
fn stand(name: &str, dir: &Path) -> Result<NetnsGuard> {
    let _ = fs::remove_dir_all(dir);
    fs::create_dir_all(dir)?;
    let guard = NetnsGuard::renew(name)?;
    guard.netns().exec(&["ip", "link", "add", "eth1", "type", "veth", "peer", "name", "fabric"])?;
    let text = format!(
        "node = \"n\"\npin_dir = \"/sys/fs/bpf/{name}\"\nrun_dir = {:?}\n[source]\nkind = \"file\"\npath = {:?}\n\
         [[parent]]\ninterface = \"eth1\"\n",
        dir.join("run"),
        dir.join("pods.json"),
    );
    fs::write(dir.join("agent.toml"), text)?;
    fs::write(dir.join("pods.json"), "{ \"version\": 1, \"revision\": 1, \"vips\": [], \"pods\": [] }")?;
    Ok(guard)
}

/// Story: what was before eniway is known to every agent after the first, shown, and put back in the end, unless somebody else
/// has changed it since.
#[test]
fn settings_are_shown_with_what_was_and_put_back() -> Result {
    let dir = std::env::temp_dir().join("ewa-changes");
    let guard = stand("ewa-changes", &dir)?;
    let netns = guard.netns();
    let config = dir.join("agent.toml");
    let eniway = |words: &[&str]| -> Result<String> {
        let binary = eniway_binary()?;
        let (binary, config) = (binary.to_string_lossy(), config.to_string_lossy());
        let mut all = vec![&*binary];
        all.extend(words);
        all.extend(["--config", &*config]);
        Ok(netns.exec(&all)?)
    };
    let read = |key: &str| -> Result<String> {
        Ok(netns.run(|| fs::read_to_string(format!("/proc/sys/net/ipv4/{key}")))??.trim().to_owned())
    };
    netns.run(|| fs::write("/proc/sys/net/ipv4/ip_forward", "0"))??;
    netns.run(|| fs::write("/proc/sys/net/ipv4/conf/eth1/rp_filter", "1"))??;
    for _ in 0..2 {
        eniway(&["agent", "--once"])?;
        let text = eniway(&["status", "--node-changes"])?;
        for (change, before) in [
            ("net.ipv4.ip_forward = 1", "0"),
            ("net.ipv4.conf.eth1.rp_filter = 2", "1"),
            ("eth1: rxvlan off", "on"),
            ("eth1: up", "down"),
        ] {
            let line = text.lines().find(|line| line.starts_with(change)).unwrap_or_default();
            assert!(line.ends_with(&format!(" {before}")), "{change}: {text}");
        }
    }
    netns.run(|| fs::write("/proc/sys/net/ipv4/conf/eth1/rp_filter", "0"))??;
    let said = eniway(&["detach"])?;
    assert!(said.contains("left: net.ipv4.conf.eth1.rp_filter is 0"), "{said}");
    assert_eq!((read("ip_forward")?.as_str(), read("conf/eth1/rp_filter")?.as_str()), ("0", "0"));
    assert!(netns.exec(&["ethtool", "-k", "eth1"])?.contains("rx-vlan-offload: on"));
    assert!(netns.exec(&["ip", "link", "show", "eth1"])?.contains("state DOWN"));
    assert!(!eniway(&["detach"])?.contains("left"));
    fs::remove_dir_all(&dir)?;
    Ok(())
}

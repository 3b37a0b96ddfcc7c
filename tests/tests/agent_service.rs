//! The agent as a service: the capabilities that it needs and holds, and what it tells a service manager.

use std::{
    fs, io,
    net::SocketAddrV4,
    os::unix::net::UnixDatagram,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use datapath_user::privilege::{NEEDS, Need};
use eniway_tests::{
    lab::net::{UdpEcho, udp_exchange},
    runtime::{Node, SOON, Sandbox, plugin_binary},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

type Result<T = (), E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// `setpriv` with these of the needed capabilities and nothing else, as a unit's bounding set does it.
fn only(which: impl Fn(&Need) -> bool) -> Vec<String> {
    let kept = NEEDS.iter().filter(|need| which(need));
    let kept = kept.map(|need| format!(",+{}", need.capability.to_string().trim_start_matches("CAP_")));
    let set = format!("-all{}", kept.collect::<String>().to_lowercase());
    ["setpriv", "--inh-caps=-all", "--bounding-set", &set].map(str::to_owned).to_vec()
}

fn launch_with(node: &mut Node, which: impl Fn(&Need) -> bool) {
    let words = only(which);
    node.launch_by(&words.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Names by mask, of all threads.
fn masks(pid: u32, field: &str) -> Result<Vec<u64>> {
    let mut masks = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(task?.path().join("status"))?;
        let value = text.lines().find_map(|line| line.strip_prefix(field)).ok_or("no such field")?;
        masks.push(u64::from_str_radix(value.trim(), 16)?);
    }
    Ok(masks)
}

fn mask(which: impl Fn(&Need) -> bool) -> u64 {
    NEEDS.iter().filter(|need| which(need)).map(|need| need.capability.bitmask()).sum()
}

/// No thread may do more than what an agent needs that has loaded its programs, nor ever get more.
fn holds_the_least(node: &Node) -> Result {
    let pid = node.agent_pid().ok_or("no agent")?;
    // One thread still loads for a moment after the agent is ready.
    let names = || -> Result<Vec<String>> {
        let tasks = fs::read_dir(format!("/proc/{pid}/task"))?;
        Ok(tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("comm")).ok()).collect())
    };
    let begin = Instant::now();
    while names()?.iter().any(|name| name.trim() == "loader") {
        assert!(begin.elapsed() < Duration::from_secs(30), "the loader does not end");
        thread::sleep(Duration::from_millis(20));
    }
    let kept = mask(|need| need.kept);
    let awake = mask(|need| need.kept && need.capability.to_string() != "CAP_SYS_ADMIN");
    assert_eq!(kept & mask(|need| need.capability.to_string() == "CAP_PERFMON"), 0);
    let [permitted, effective] = [masks(pid, "CapPrm:")?, masks(pid, "CapEff:")?];
    assert!(permitted.iter().all(|mask| *mask == kept), "{permitted:x?} is not {kept:x}");
    assert!(effective.iter().all(|mask| *mask == awake), "{effective:x?} is not {awake:x}");
    let bounding = masks(pid, "CapBnd:")?;
    assert!(bounding.iter().all(|bound| *bound == mask(|_| true)), "{bounding:x?}");
    assert!(masks(pid, "NoNewPrivs:")?.iter().all(|set| *set == 1));

    let shown = node.run_eniway(&["status", "--json"])?;
    let shown: Value = serde_json::from_slice(&shown.stdout)?;
    assert_eq!(shown["capabilities"]["permitted"], json!(["CAP_BPF", "CAP_NET_ADMIN", "CAP_SYS_ADMIN"]));
    assert_eq!(shown["capabilities"]["effective"], json!(["CAP_BPF", "CAP_NET_ADMIN"]));
    let text = node.run_eniway(&["status"])?;
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN (not in effect)"), "{text}");
    Ok(())
}

/// ```text
///   setpriv: CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_ADMIN ── agent ── two pods
/// ```
///
/// What the documents name is enough for a pod's whole life, over a restart of the agent; afterwards less is held.
#[test]
fn with_the_documented_capabilities_it_does_everything() -> Result {
    let mut node = Node::new("svc-caps", 4)?;
    launch_with(&mut node, |_| true);
    node.start_agent()?;
    holds_the_least(&node)?;
    let stands = Sandbox::several("svccaps", 2)?;
    let more = json!({ "sysctls": { "net.ipv4.conf.IFNAME.rp_filter": "0" } });
    let added =
        [node.plugin("ADD", Some(&stands[0].1), more)?, node.plugin("ADD", Some(&stands[1].1), json!({}))?];
    assert!(added.iter().all(|said| said.ok), "{added:?}\n{}", node.log());
    let to = SocketAddrV4::new(added[1].address().ok_or("no address")?, 7000);
    let _echo = UdpEcho::start(stands[1].0.netns(), to)?;
    let exchange = |payload: &[u8]| udp_exchange(stands[0].0.netns(), 0, to, payload, Duration::from_secs(2));
    exchange(b"first")?;
    holds_the_least(&node)?;

    node.kill_agent();
    exchange(b"without an agent")?;
    node.start_agent()?;
    exchange(b"with the next")?;
    let previous = json!({ "prevResult": added[0].output });
    assert!(node.plugin("CHECK", Some(&stands[0].1), previous)?.ok, "{}", node.log());
    holds_the_least(&node)?;
    for (_, sandbox) in &stands {
        assert!(node.plugin("DEL", Some(sandbox), json!({}))?.ok, "{}", node.log());
    }
    assert_eq!(node.traces()?, [""; 0]);
    Ok(())
}

#[test]
fn with_the_documented_capabilities_it_gives_a_whole_nic() -> Result {
    let mut node = Node::new("svc-eni", 2)?;
    node.use_exclusive(2)?;
    node.add_nics(2)?;
    launch_with(&mut node, |_| true);
    node.start_agent()?;
    let stands = Sandbox::several("svceni", 1)?;
    let (stand, sandbox) = &stands[0];
    let added = node.plugin("ADD", Some(sandbox), json!({ "mode": "exclusive-eni" }))?;
    assert!(added.ok, "{added:?}\n{}", node.log());
    let address = added.address().ok_or("no address")?.to_string();
    assert!(stand.netns().exec(&["ip", "addr", "show", "eth0"])?.contains(&address));
    node.kill_agent();
    node.start_agent()?;
    holds_the_least(&node)?;
    assert!(node.plugin("CHECK", Some(sandbox), json!({ "prevResult": added.output }))?.ok, "{}", node.log());
    assert!(node.plugin("DEL", Some(sandbox), json!({}))?.ok, "{}", node.log());
    assert!(!stand.netns().exec(&["ip", "-br", "link"])?.contains("eth0"));
    assert_eq!(node.traces()?, [""; 0]);
    Ok(())
}

#[test]
fn each_capability_that_is_missing_is_named_with_its_purpose() -> Result {
    let mut node = Node::new("svc-missing", 2)?;
    for missing in NEEDS {
        launch_with(&mut node, |need| *need != missing);
        let output = node.run_eniway(&["agent", "--once"])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{said}");
        for need in NEEDS {
            let told = said.contains(&format!("{}, {}", need.capability, need.purpose));
            assert_eq!(told, need == missing, "{}: {said}", need.capability);
        }
    }
    assert!(!node.path("run/status.json").exists(), "nothing was done");
    Ok(())
}

/// A service manager's end.
struct Manager(UnixDatagram);

impl Manager {
    fn bind(node: &mut Node, watchdog: Duration) -> Result<Self> {
        let path = node.path("notify.sock");
        let socket = UnixDatagram::bind(&path)?;
        node.set_variable("NOTIFY_SOCKET", &path.display().to_string());
        node.set_variable("WATCHDOG_USEC", &watchdog.as_micros().to_string());
        Ok(Self(socket))
    }

    /// The next word; none when there is none in time.
    fn hear(&self, limit: Duration) -> Result<Option<String>> {
        self.0.set_read_timeout(Some(limit))?;
        let mut buffer = [0; 1024];
        match self.0.recv(&mut buffer) {
            Ok(length) => Ok(Some(String::from_utf8_lossy(&buffer[..length]).into_owned())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Listens until it hears one that begins so. Answers with what came before.
    fn until(&self, start: &str) -> Result<Vec<String>> {
        let end = Instant::now() + SOON;
        let mut before = Vec::new();
        while Instant::now() < end {
            match self.hear(SOON)? {
                Some(word) if word.starts_with(start) => {
                    before.push(word);
                    return Ok(before);
                }
                other => before.extend(other),
            }
        }
        Err(format!("no {start}, but {before:?}").into())
    }
}

#[test]
fn it_tells_a_service_manager_how_it_is() -> Result {
    const WATCHDOG: Duration = Duration::from_millis(600);
    let mut node = Node::new("svc-notify", 4)?;
    node.start_agent()?;
    let stands = Sandbox::several("svcnotify", 1)?;
    let added = node.plugin("ADD", Some(&stands[0].1), json!({}))?;
    assert!(added.ok, "{added:?}");
    node.kill_agent();

    // Ready is said when the kernel leads to the pods, and the plugin is served.
    let manager = Manager::bind(&mut node, WATCHDOG)?;
    node.spawn_agent()?;
    let words = manager.until("READY=1")?;
    assert!(node.plugin("CHECK", Some(&stands[0].1), json!({ "prevResult": added.output }))?.ok);
    let ready = words.last().ok_or("nothing")?;
    assert!(ready.contains("STATUS=1 pods, 0 with errors; source: ok"), "{ready}");
    for word in words.iter().filter(|word| word.starts_with("WATCHDOG=1")) {
        assert!(word.contains("EXTEND_TIMEOUT_USEC=600000"), "{words:?}");
    }
    for (probe, told) in [("ready", true), ("alive", true)] {
        assert_eq!(node.run_eniway(&["status", "--probe", probe])?.status.success(), told, "{probe}");
    }

    // Signs of life come as long as the loop turns. How often: the unit tests of `service`.
    for _ in 0..5 {
        manager.until("WATCHDOG=1")?;
    }
    let pid = Pid::from_raw(i32::try_from(node.agent_pid().ok_or("no agent")?)?);
    kill(pid, Signal::SIGSTOP)?;
    // What was sent before.
    thread::sleep(Duration::from_millis(50));
    while manager.hear(Duration::from_millis(1))?.is_some() {}
    assert_eq!(manager.hear(WATCHDOG * 2)?, None, "a loop that hangs gives no sign");
    kill(pid, Signal::SIGCONT)?;
    manager.until("WATCHDOG=1")?;

    assert!(node.plugin("DEL", Some(&stands[0].1), json!({}))?.ok);
    manager.until("STATUS=0 pods")?;
    kill(pid, Signal::SIGTERM)?;
    manager.until("STOPPING=1")?;
    node.stop_agent();
    let probe = node.run_eniway(&["status", "--probe", "alive"])?;
    assert!(!probe.status.success());
    assert!(String::from_utf8_lossy(&probe.stderr).contains("agent.sock"), "{probe:?}");
    Ok(())
}

#[test]
fn the_network_configuration_waits_for_the_agent() -> Result {
    let mut node = Node::new("svc-install", 4)?;
    let (bin, conf) = (node.path("bin"), node.path("net.d"));
    fs::create_dir_all(&bin)?;
    let mut install = Command::new(plugin_binary()?);
    install.arg("install").arg("--bin-dir").arg(&bin).arg("--conf-dir").arg(&conf).arg("--agent");
    install.arg(node.path("run/agent.sock")).args(["--when-ready", "--stay"]).stdout(Stdio::null());
    let mut install = install.spawn()?;
    let mut work = || -> Result {
        node.wait("the program is there", |_| Ok(bin.join("eniway-cni").exists()))?;
        thread::sleep(Duration::from_millis(700));
        assert!(!conf.join("10-eniway.conflist").exists(), "there is no agent yet");
        node.start_agent()?;
        node.wait("the configuration is there", |_| Ok(conf.join("10-eniway.conflist").exists()))?;
        let text = fs::read_to_string(conf.join("10-eniway.conflist"))?;
        let list: Value = serde_json::from_str(&text)?;
        let plugin = list["plugins"][0].clone();
        // What was installed works.
        let said = node.program(&bin.join("eniway-cni"), plugin, "STATUS", None, json!({}))?;
        assert!(said.ok, "{said:?}");
        Ok(())
    };
    let result = work();
    let stays = install.try_wait()?.is_none();
    kill(Pid::from_raw(i32::try_from(install.id())?), Signal::SIGTERM)?;
    let ended = install.wait()?;
    result?;
    assert!(stays && ended.success(), "it ends by a signal, and well: {ended}");
    Ok(())
}

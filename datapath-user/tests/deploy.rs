//! What is in `deploy/` against what the programs need: systemd's own checks of the units, and the manifest's capabilities,
//! paths and commands.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use datapath_user::{config::Config, privilege::NEEDS};
use serde_yaml_ng::Value;

/// systemd's measure of what a service could do, from 0 to 10, in tenths: the agent with what is listed at the end of its unit
/// as needed, and the allocator, which needs its sockets only.
const AGENT_EXPOSURE: u32 = 28;
const ALLOCATOR_EXPOSURE: u32 = 16;

fn deploy(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file)
}

fn text(file: &str) -> String {
    let path = deploy(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn analyze(words: &[&str], unit: &Path) -> (bool, String) {
    let output = Command::new("systemd-analyze")
        .args(words)
        .arg(unit)
        .output()
        .expect("systemd-analyze (package systemd: `cargo xtask setup` installs it)");
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    let dir = std::env::temp_dir().join(format!("eniway-units-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    for (name, most) in [("eniway.service", AGENT_EXPOSURE), ("eniway-ipam.service", ALLOCATOR_EXPOSURE)] {
        // The check looks whether the program is there.
        let unit = text(&format!("systemd/{name}"));
        let installed = unit.replace("/usr/local/bin/eniway", env!("CARGO_BIN_EXE_eniway"));
        assert_ne!(unit, installed, "{name} starts something else");
        let path = dir.join(name);
        fs::write(&path, installed).unwrap();
        let (good, said) = analyze(&["verify", "--man=no"], &path);
        assert!(good && said.is_empty(), "{name}: {said}");
        let threshold = format!("--threshold={most}");
        let (good, said) = analyze(&["security", "--offline=true", "--no-pager", &threshold], &path);
        assert!(good, "{name} is exposed more than {most}/10:\n{said}");
        assert!(said.contains("Overall exposure level"), "{said}");
    }
    fs::remove_dir_all(dir).unwrap();
}

/// The value of a unit's only line of a key.
fn setting<'a>(unit: &'a str, key: &str) -> &'a str {
    let mut lines = unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let value = lines.next().unwrap_or_else(|| panic!("no {key}"));
    assert_eq!(lines.next(), None, "{key} twice");
    value
}

#[test]
fn the_units_give_the_capabilities_that_the_agent_needs_and_no_other() {
    let unit = text("systemd/eniway.service");
    let given: BTreeSet<String> =
        setting(&unit, "CapabilityBoundingSet").split_whitespace().map(str::to_owned).collect();
    let needed: BTreeSet<String> = NEEDS.iter().map(|need| need.capability.to_string()).collect();
    assert_eq!(given, needed);
    assert_eq!(setting(&text("systemd/eniway-ipam.service"), "CapabilityBoundingSet"), "");
    for (key, value) in [("Type", "notify"), ("KillMode", "process"), ("RuntimeDirectoryPreserve", "yes")] {
        assert_eq!(setting(&unit, key), value, "{key}");
    }
    assert!(setting(&unit, "WatchdogSec").parse::<u32>().is_ok_and(|seconds| seconds > 0));
}

struct Manifest {
    config: String,
    pod: Value,
}

fn manifest() -> Manifest {
    use serde::Deserialize as _;
    let text = text("kubernetes/eniway.yaml");
    let documents = serde_yaml_ng::Deserializer::from_str(&text);
    let documents: Vec<Value> = documents.map(|one| Value::deserialize(one).expect("YAML")).collect();
    let kind = |kind: &str| {
        let mut found = documents.iter().filter(|document| document["kind"] == kind);
        found.next().unwrap_or_else(|| panic!("no {kind}")).clone()
    };
    assert_eq!(documents.len(), 2, "and no RBAC: the agent asks no API server");
    let set = kind("DaemonSet");
    let labels = &set["spec"]["template"]["metadata"]["labels"];
    assert_eq!(&set["spec"]["selector"]["matchLabels"], labels);
    let config = kind("ConfigMap")["data"]["agent.toml"].as_str().expect("a configuration").to_owned();
    Manifest { config, pod: set["spec"]["template"]["spec"].clone() }
}

fn list(value: &Value) -> Vec<Value> {
    value.as_sequence().cloned().unwrap_or_default()
}

fn words(value: &Value) -> Vec<String> {
    list(value).iter().map(|word| word.as_str().expect("a word").to_owned()).collect()
}

impl Manifest {
    fn containers(&self) -> Vec<Value> {
        ["initContainers", "containers"].iter().flat_map(|kind| list(&self.pod[*kind])).collect()
    }

    fn container(&self, name: &str) -> Value {
        let mut all = self.containers().into_iter().filter(|container| container["name"] == name);
        all.next().unwrap_or_else(|| panic!("no container {name}"))
    }
}

/// Where a container sees what: path in the container to path on the node, or the configuration.
fn mounts(pod: &Value, container: &Value) -> BTreeMap<PathBuf, String> {
    let volumes = list(&pod["volumes"]);
    let mount = |mount: &Value| {
        let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]);
        let volume = volume.unwrap_or_else(|| panic!("no volume {:?}", mount["name"]));
        let source = volume["hostPath"]["path"].as_str().unwrap_or("ConfigMap").to_owned();
        (PathBuf::from(mount["mountPath"].as_str().expect("a path")), source)
    };
    list(&container["volumeMounts"]).iter().map(mount).collect()
}

#[test]
fn the_manifest_gives_the_capabilities_that_the_agent_needs_and_no_other() {
    let manifest = manifest();
    for container in manifest.containers() {
        let security = &container["securityContext"];
        assert_eq!(words(&security["capabilities"]["drop"]), ["ALL"]);
        let given: BTreeSet<String> = words(&security["capabilities"]["add"]).into_iter().collect();
        let needed = NEEDS.iter().map(|need| need.capability.to_string()["CAP_".len()..].to_owned());
        let needed: BTreeSet<String> = needed.filter(|_| container["name"] == "agent").collect();
        assert_eq!(given, needed, "{:?}", container["name"]);
        assert_eq!(security["readOnlyRootFilesystem"], true);
        assert!(security["privileged"].is_null());
    }
    assert_eq!(manifest.pod["hostNetwork"], true);
    assert_eq!(manifest.pod["priorityClassName"], "system-node-critical");
}

#[test]
fn the_manifest_mounts_what_its_configuration_names() {
    let manifest = manifest();
    let agent = manifest.container("agent");
    let mounts = mounts(&manifest.pod, &agent);
    let command = words(&agent["command"]);
    assert_eq!(command[..3], ["/usr/local/bin/eniway", "agent", "--config"]);
    let dir = Path::new(&command[3]).parent().unwrap();
    assert_eq!(mounts[dir], "ConfigMap");
    assert_eq!(list(&agent["env"])[0]["name"], "ENIWAY_NODE");

    let full = format!("node = \"by the environment\"\n{}", manifest.config);
    let config = Config::parse(&full, &dir.join("agent.toml")).unwrap();
    assert!(!manifest.config.contains("\nnode"), "one configuration is for all nodes");
    // What outlives the container is at the same place on the node, where `eniway` by hand looks for it.
    for path in [config.pin_dir.parent().unwrap(), &config.run_dir] {
        assert_eq!(mounts[path], path.to_str().unwrap());
    }
    let files = manifest.config.lines().filter_map(|line| {
        let (key, value) = line.split_once(" = ")?;
        ["ca", "cert", "key"].contains(&key).then(|| PathBuf::from(value.trim_matches('"')))
    });
    let files: Vec<PathBuf> = files.collect();
    assert_eq!(files.len(), 3);
    for file in files {
        assert!(mounts.contains_key(file.parent().unwrap()), "{} is in no volume", file.display());
    }
    // Namespaces come later than the agent.
    for path in ["/run/netns", "/var/run/netns"] {
        let mount = list(&agent["volumeMounts"]).into_iter().find(|mount| mount["mountPath"] == path);
        assert_eq!(mount.unwrap()["mountPropagation"], "HostToContainer", "{path}");
    }
    assert_eq!(mounts[Path::new("/host/proc/sys/net")], "/proc/sys/net");
    // Runtimes refuse mounts there.
    assert!(mounts.keys().all(|path| !path.starts_with("/proc")), "{mounts:?}");
}

#[test]
fn the_plugin_is_installed_before_the_agent_and_configured_after_it() {
    let manifest = manifest();
    let first = list(&manifest.pod["initContainers"])[0].clone();
    for (container, flag, on_node) in [
        (first, "--bin-dir", "/opt/cni/bin"),
        (manifest.container("cni-conf"), "--conf-dir", "/etc/cni/net.d"),
    ] {
        let command = words(&container["command"]);
        assert_eq!(command[..2], ["/usr/local/bin/eniway-cni", "install"]);
        let at = command.iter().position(|word| word == flag).expect("the flag") + 1;
        assert_eq!(mounts(&manifest.pod, &container)[Path::new(&command[at])], on_node);
    }
    let conf = words(&manifest.container("cni-conf")["command"]);
    assert!(["--when-ready", "--stay"].iter().all(|flag| conf.iter().any(|word| word == flag)));
    assert!(mounts(&manifest.pod, &manifest.container("cni-conf")).contains_key(Path::new("/run/eniway")));
}

#[test]
fn the_probes_are_commands_that_exist() {
    let agent = manifest().container("agent");
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        let command = words(&agent[probe]["exec"]["command"]);
        assert_eq!(command[0], "/usr/local/bin/eniway", "{probe}");
        // A configuration that is not there is told after the command line was understood.
        let output = Command::new(env!("CARGO_BIN_EXE_eniway"))
            .args(&command[1..])
            .args(["--config", "/nonexistent/agent.toml"])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("/nonexistent/agent.toml"), "{probe}: {said}");
    }
}

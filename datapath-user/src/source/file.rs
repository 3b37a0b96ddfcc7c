//! The file source: a JSON document, described in `docs/ipam-file.md`, watched, and replaced by rename.

use std::{
    collections::HashMap,
    fmt::Display,
    fs::File,
    hash::Hash,
    io::{self, Read as _},
    net::{Ipv4Addr, Ipv6Addr},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use eniway_policy::model::{AddressGroup, GroupList, Groups, Membership, SecurityGroup};
use ipnet::Ipv4Net;
use notify::{RecursiveMode, Watcher as _};
use serde::{Deserialize, Deserializer, de};
use tokio::sync::mpsc;

use super::{Pod, Snapshot, State, Vip, vlan_id};
use crate::{
    attachment::Extras,
    bandwidth::{Asked, Bandwidth},
    config::FastPath,
    net::{InterfaceName, Mac, VlanId},
};

/// The only version of the document so far.
const VERSION: u64 = 1;

/// Why a document is not used.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}; what is programmed stays until it is back", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The document is not what it should be. Nothing of it is used.
    #[error("{}: {problem}", path.display())]
    Document {
        /// The file.
        path: PathBuf,
        /// Where in the document, and what.
        problem: Problem,
    },
}

/// What is wrong in a document.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{at}: {what}")]
pub struct Problem {
    /// The path in the document.
    pub at: String,
    /// What is there, and what should be.
    pub what: String,
}

impl Problem {
    fn new(at: impl Into<String>, what: impl Into<String>) -> Self {
        Self { at: at.into(), what: what.into() }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u64,
    #[serde(default)]
    revision: u64,
    #[serde(default)]
    vips: Vec<VipEntry>,
    #[serde(default)]
    security_groups: Vec<SecurityGroup>,
    #[serde(default)]
    address_groups: Vec<AddressGroup>,
    pods: Vec<PodEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VipEntry {
    ip: Ipv4Addr,
    port: u16,
    protocol: Protocol,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Protocol {
    Tcp = 6,
    Udp = 17,
    Sctp = 132,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PodEntry {
    uid: String,
    namespace: String,
    name: String,
    #[serde(default)]
    container_id: Option<String>,
    #[serde(default)]
    netns: Option<PathBuf>,
    #[serde(default)]
    interface: Option<InterfaceName>,
    #[serde(default)]
    host_interface: Option<InterfaceName>,
    #[serde(default)]
    state: StateEntry,
    #[serde(default)]
    generation: u32,
    parent: InterfaceName,
    #[serde(deserialize_with = "vlan")]
    vlan: Option<VlanId>,
    mac: Mac,
    #[serde(default)]
    wire_mac: Option<Mac>,
    ipv4: Ipv4Addr,
    #[serde(default)]
    ipv6: Option<Ipv6Addr>,
    subnet: Ipv4Net,
    gateway: Ipv4Addr,
    gateway_mac: Mac,
    #[serde(default)]
    gateway_ipv6: Option<Ipv6Addr>,
    #[serde(default = "default_mtu")]
    mtu: u16,
    #[serde(default)]
    security_groups: GroupList,
    #[serde(default)]
    security_groups_revision: u64,
    #[serde(default)]
    fast_path: Option<FastPath>,
    #[serde(default)]
    bandwidth: Option<Asked>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum StateEntry {
    #[default]
    Active,
    Releasing,
}

fn default_mtu() -> u16 {
    1500
}

fn vlan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<VlanId>, D::Error> {
    vlan_id(i64::deserialize(deserializer)?).map_err(de::Error::custom)
}

/// Reads a document. `parents` are the interfaces that the configuration knows.
///
/// # Errors
///
/// When anything in it is wrong: nothing of it is used then.
pub fn parse(text: &[u8], parents: &[&str]) -> Result<Snapshot, Problem> {
    let mut json = serde_json::Deserializer::from_slice(text);
    let document: Document = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let at = error.path().to_string();
        Problem::new(if at == "." { "document".to_owned() } else { at }, error.inner().to_string())
    })?;
    json.end().map_err(|error| Problem::new("document", error.to_string()))?;
    if document.version != VERSION {
        return Err(Problem::new(
            "version",
            format!("{} is not known; this eniway reads version {VERSION}", document.version),
        ));
    }

    let mut vips = Vec::with_capacity(document.vips.len());
    let mut unique = Unique::default();
    for (i, vip) in document.vips.iter().enumerate() {
        let at = format!("vips[{i}]");
        if vip.port == 0 {
            return Err(Problem::new(format!("{at}.port"), "0 is not a port (1-65535)"));
        }
        let vip = Vip { ip: vip.ip, port: vip.port, protocol: vip.protocol as u8 };
        unique.add(&at, "", vip, format_args!("{}:{} ({})", vip.ip, vip.port, vip.protocol))?;
        vips.push(vip);
    }
    let pods = document
        .pods
        .into_iter()
        .enumerate()
        .map(|(i, entry)| check(&format!("pods[{i}]"), entry, parents))
        .collect::<Result<Vec<_>, _>>()?;
    check_unique(&pods)?;
    let groups = Groups::new(document.revision, document.security_groups, document.address_groups)
        .map_err(|error| Problem::new("security_groups, address_groups", error.to_string()))?;
    Ok(Snapshot { revision: document.revision, vips, groups, pods })
}

fn check(at: &str, entry: PodEntry, parents: &[&str]) -> Result<Pod, Problem> {
    let state = match entry.state {
        StateEntry::Active => State::Active,
        StateEntry::Releasing => State::Releasing,
    };
    if entry.container_id.is_none() && (entry.netns.is_some() || entry.host_interface.is_some()) {
        return Err(Problem::new(
            format!("{at}.container_id"),
            "is missing; only a pod whose sandbox the runtime will bring has none, and then no `netns` and no \
             `host_interface` either",
        ));
    }
    let bandwidth = Bandwidth::new(&entry.bandwidth.unwrap_or_default())
        .map_err(|what| Problem::new(format!("{at}.bandwidth"), what))?;
    let pod = Pod {
        uid: entry.uid,
        namespace: entry.namespace,
        name: entry.name,
        container_id: entry.container_id.unwrap_or_default(),
        netns: entry.netns,
        interface: entry
            .interface
            .or_else(|| InterfaceName::new("eth0"))
            .ok_or_else(|| Problem::new(format!("{at}.interface"), "must be given"))?,
        host_interface: entry.host_interface,
        state,
        generation: entry.generation,
        parent: Some(entry.parent),
        vlan: entry.vlan,
        mac: entry.mac,
        wire_mac: entry.wire_mac.unwrap_or(entry.mac),
        ipv4: entry.ipv4,
        ipv6: entry.ipv6,
        subnet: entry.subnet.trunc(),
        gateway: entry.gateway,
        gateway_mac: entry.gateway_mac,
        gateway_ipv6: entry.gateway_ipv6,
        mtu: entry.mtu,
        membership: Membership { groups: entry.security_groups, revision: entry.security_groups_revision },
        fast_path: entry.fast_path,
        bandwidth,
        extras: Extras::default(),
    };
    pod.check(parents).map_err(|(field, what)| Problem::new(format!("{at}.{field}"), what))?;
    Ok(pod)
}

/// What only one pod may have. A pod that is going away still may share its sub-ENI's values with its successor.
fn check_unique(pods: &[Pod]) -> Result<(), Problem> {
    let mut owners = Unique::default();
    let mut vlans = Unique::default();
    let mut ipv4 = Unique::default();
    let mut ipv6 = Unique::default();
    let mut macs = Unique::default();
    let mut host_interfaces = Unique::default();
    let mut interfaces = Unique::default();
    for (i, pod) in pods.iter().enumerate() {
        let at = format!("pods[{i}]");
        let owner = (&pod.uid, &pod.container_id);
        owners.add(&at, ".container_id", owner, format_args!("container {} of pod {}", owner.1, owner.0))?;
        if pod.state != State::Active {
            continue;
        }
        if let Some(vlan) = pod.vlan {
            let parent = pod.parent.as_ref().map_or("", InterfaceName::as_str);
            let what = format_args!("VLAN {vlan} of {parent}");
            vlans.add(&at, ".vlan", (&pod.parent, vlan), what)?;
        }
        ipv4.add(&at, ".ipv4", pod.ipv4, pod.ipv4)?;
        macs.add(&at, ".mac", pod.mac, pod.mac)?;
        if let Some(address) = pod.ipv6 {
            ipv6.add(&at, ".ipv6", address, address)?;
        }
        if let Some(name) = &pod.host_interface {
            host_interfaces.add(&at, ".host_interface", name, name)?;
        }
        if let Some(netns) = &pod.netns {
            let what = format_args!("{} in {}", pod.interface, netns.display());
            interfaces.add(&at, ".interface", (netns, &pod.interface), what)?;
        }
    }
    Ok(())
}

/// Values seen, with where they were.
struct Unique<K>(HashMap<K, String>);

impl<K> Default for Unique<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Eq + Hash> Unique<K> {
    fn add(&mut self, at: &str, field: &str, key: K, what: impl Display) -> Result<(), Problem> {
        let at = format!("{at}{field}");
        match self.0.get(&key) {
            Some(first) => Err(Problem::new(at, format!("{what} is given to {first} already"))),
            None => {
                self.0.insert(key, at);
                Ok(())
            }
        }
    }
}

/// The file, and whether it has changed.
pub struct FileSource {
    path: PathBuf,
    seen: Option<Stamp>,
    hints: mpsc::Receiver<()>,
    /// Ends with the source. Where there is none (the directory does not exist yet), asking now and then finds out.
    watcher: Option<notify::RecommendedWatcher>,
    hint: mpsc::Sender<()>,
}

/// Which file it was: a document that is written anew counts as another one, be its text the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    modified: (i64, i64),
    size: u64,
}

impl FileSource {
    /// Starts to watch. The file need not exist.
    pub fn new(path: &Path) -> Self {
        // One hint waiting is as good as many.
        let (hint, hints) = mpsc::channel(1);
        let mut source = Self { path: path.to_owned(), seen: None, hints, watcher: None, hint };
        source.watch();
        source
    }

    /// A rename is seen in the directory, not in the file.
    fn watch(&mut self) {
        let Some(dir) = self.path.parent() else { return };
        let hint = self.hint.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| !event.kind.is_access()) {
                let _ = hint.try_send(());
            }
        });
        self.watcher = watcher
            .and_then(|mut watcher| watcher.watch(dir, RecursiveMode::NonRecursive).map(|()| watcher))
            .inspect_err(|error| log::debug!("cannot watch {}: {error}", dir.display()))
            .ok();
    }

    /// Waits for a hint that something in the file's directory changed.
    pub async fn hint(&mut self) {
        // `self` holds a sender, so the channel never closes.
        let _ = self.hints.recv().await;
    }

    /// The file's text, if the file is not the one that was read last. Cheap when nothing changed.
    ///
    /// # Errors
    ///
    /// When the file cannot be read; said once for each change of the error.
    pub fn read(&mut self) -> Result<Option<Vec<u8>>, SourceError> {
        if self.watcher.is_none() {
            self.watch();
        }
        let failed = |source| SourceError::Read { path: self.path.clone(), source };
        let mut file = File::open(&self.path).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        let stamp = Stamp {
            device: meta.dev(),
            inode: meta.ino(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            size: meta.size(),
        };
        if self.seen == Some(stamp) {
            return Ok(None);
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(failed)?;
        self.seen = Some(stamp);
        Ok(Some(text))
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::source::Desired;

    fn pod(n: u8) -> Value {
        json!({
            "uid": format!("uid-{n}"), "namespace": "default", "name": format!("example-{n}"),
            "container_id": format!("c{n}"), "netns": format!("/run/netns/p{n}"), "interface": "eth0",
            "host_interface": null, "state": "active", "generation": 1,
            "parent": "eth1", "vlan": 100 + u16::from(n), "mac": format!("fa:16:3e:00:01:{n:02x}"), "wire_mac": null,
            "ipv4": format!("10.1.18.{n}"), "ipv6": null, "subnet": "10.1.16.0/22", "gateway": "10.1.16.1",
            "gateway_mac": "fa:ff:ff:00:00:01", "gateway_ipv6": null, "mtu": 1500, "security_groups": []
        })
    }

    fn document(pods: &[Value]) -> Value {
        json!({ "version": 1, "revision": 7, "vips": [{"ip": "10.1.0.200", "port": 80, "protocol": "tcp"}], "pods": pods })
    }

    fn read(document: &Value) -> Result<Snapshot, Problem> {
        parse(document.to_string().as_bytes(), &["eth1"])
    }

    #[test]
    fn the_documented_example_is_read() {
        let snapshot = read(&document(&[pod(2)])).unwrap();
        assert_eq!(snapshot.revision, 7);
        assert_eq!(snapshot.vips, [Vip { ip: [10, 1, 0, 200].into(), port: 80, protocol: 6 }]);
        let pod = &snapshot.pods[0];
        assert_eq!(pod.vlan.unwrap().get(), 102);
        assert_eq!(pod.wire_mac, pod.mac);
        let record = pod.record(3, 9);
        assert_eq!((record.vid, record.parent, record.parent_ifindex), (102, 3, 9));
        assert_eq!(record.ipv4, [10, 1, 18, 2]);
    }

    #[test]
    fn what_may_be_left_out_has_defaults() {
        let mut entry = pod(2);
        let fields = entry.as_object_mut().unwrap();
        for field in [
            "interface",
            "host_interface",
            "state",
            "generation",
            "wire_mac",
            "ipv6",
            "gateway_ipv6",
            "mtu",
            "security_groups",
        ] {
            fields.remove(field);
        }
        let snapshot = read(&json!({ "version": 1, "pods": [entry] })).unwrap();
        assert_eq!(snapshot.pods[0].interface.as_str(), "eth0");
        assert_eq!(snapshot.pods[0].mtu, 1500);
        assert!(snapshot.pods[0].is_wanted());
    }

    #[test]
    fn errors_name_the_path() {
        for (field, value, at, word) in [
            ("vlan", json!(5000), "pods[1].vlan", "5000 is not a VLAN id (1-4094)"),
            ("vlan", json!("a"), "pods[1].vlan", "string"),
            ("mac", json!("fa:16"), "pods[1].mac", "fa:16"),
            ("mac", json!("01:00:5e:00:00:01"), "pods[1].mac", "multicast"),
            ("ipv4", json!("10.9.0.1"), "pods[1].ipv4", "10.1.16.0/22"),
            ("ipv4", json!("10.1.16.1"), "pods[1].ipv4", "gateway"),
            ("gateway", json!("10.9.0.1"), "pods[1].gateway", "10.1.16.0/22"),
            ("parent", json!("eth7"), "pods[1].parent", "eth1"),
            ("state", json!("gone"), "pods[1].state", "gone"),
            ("netns", json!(null), "pods[1].netns", "host_interface"),
            ("netns", json!("x"), "pods[1].netns", "absolute"),
            ("interface", json!("a/b"), "pods[1].interface", "a/b"),
            ("uid", json!(""), "pods[1].uid", "empty"),
            ("container_id", json!(""), "pods[1].container_id", "empty"),
            ("container_id", json!(null), "pods[1].container_id", "missing"),
            ("mtu", json!(100), "pods[1].mtu", "576"),
            ("vlna", json!(1), "pods[1]", "vlna"),
            ("bandwidth", json!({"egress_rate": 10}), "pods[1].bandwidth", "egress rate: 10 bits"),
            ("bandwidth", json!({"ingress_burst": 10}), "pods[1].bandwidth", "no rate"),
            ("bandwidth", json!({"ingress": 10}), "pods[1].bandwidth", "ingress"),
            ("bandwidth", json!({"egress_rate": "10M"}), "pods[1].bandwidth.egress_rate", "10M"),
        ] {
            let mut bad = pod(3);
            bad[field] = value;
            let problem = read(&document(&[pod(2), bad])).unwrap_err();
            assert!(problem.at.starts_with(at) && problem.what.contains(word), "{field}: {problem}");
        }
    }

    #[test]
    fn whole_documents_can_be_bad() {
        for (text, at) in [
            ("", "document"),
            ("[]", "document"),
            ("{\"version\": 2, \"pods\": []}", "version"),
            ("{\"version\": 1}", "document"),
            ("{\"version\": 1, \"pods\": []} x", "document"),
            ("{\"version\": 1, \"pods\": [], \"pod\": 1}", "pod"),
        ] {
            let problem = parse(text.as_bytes(), &[]).unwrap_err();
            assert!(problem.at == at || problem.what.contains(at), "{text}: {problem}");
        }
    }

    #[test]
    fn what_two_pods_share_is_refused_with_both_paths() {
        for (field, fields) in [
            ("vlan", &["vlan"][..]),
            ("ipv4", &["ipv4"]),
            ("mac", &["mac"]),
            ("container_id", &["uid", "container_id"]),
            ("interface", &["netns", "interface"]),
        ] {
            let mut second = pod(3);
            for field in fields {
                second[field] = pod(2)[field].clone();
            }
            let problem = read(&document(&[pod(2), second.clone()])).unwrap_err();
            assert_eq!(problem.at, format!("pods[1].{field}"));
            assert!(problem.what.contains(&format!("pods[0].{field}")), "{problem}");
            // Who goes away may leave its things to another.
            second["state"] = json!("releasing");
            assert_eq!(read(&document(&[pod(2), second])).is_ok(), field != "container_id");
        }
        let mut vips = document(&[]);
        vips["vips"] = json!([vips["vips"][0], vips["vips"][0]]);
        let problem = read(&vips).unwrap_err();
        assert!(problem.at == "vips[1]" && problem.what.contains("vips[0]"), "{problem}");
    }

    #[test]
    fn pods_without_a_vlan_are_listed_and_not_wanted() {
        for vlan in [0, -1] {
            let mut entry = pod(2);
            entry["vlan"] = json!(vlan);
            entry["netns"] = json!(null);
            let snapshot = read(&document(&[entry])).unwrap();
            assert!(!snapshot.pods[0].is_wanted());
        }
    }

    #[test]
    fn a_pod_whose_sandbox_the_runtime_brings_waits() {
        let mut entry = pod(2);
        for field in ["container_id", "netns", "host_interface"] {
            entry.as_object_mut().unwrap().remove(field);
        }
        let snapshot = read(&document(&[entry])).unwrap();
        assert!(snapshot.pods[0].is_waiting() && !snapshot.pods[0].is_wanted());
    }

    #[test]
    fn owners_differ_by_container_and_stay_the_same() {
        let snapshot = read(&document(&[pod(2), pod(3)])).unwrap();
        let mut again = snapshot.pods[0].clone();
        assert_eq!(again.owner(), 0x8d4d_fb90_7d07_4d53);
        again.container_id = "other".to_owned();
        assert_ne!(again.owner(), snapshot.pods[0].owner());
        assert_ne!(snapshot.pods[0].owner(), snapshot.pods[1].owner());
    }

    #[test]
    fn fingerprints_leave_the_revision_out() {
        let mut snapshot = read(&document(&[pod(2)])).unwrap();
        let fingerprint = |snapshot: &Snapshot| Desired::from(snapshot.clone()).fingerprint();
        let before = fingerprint(&snapshot);
        snapshot.revision += 1;
        assert_eq!(fingerprint(&snapshot), before);
        snapshot.pods[0].generation += 1;
        assert_ne!(fingerprint(&snapshot), before);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_renamed_file_is_seen_once() {
        let dir = std::env::temp_dir().join(format!("eniway-source-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("pods.json");
        let mut source = FileSource::new(&path);
        assert!(matches!(source.read(), Err(SourceError::Read { .. })));
        for text in ["a", "a"] {
            std::fs::write(dir.join("new"), text).unwrap();
            std::fs::rename(dir.join("new"), &path).unwrap();
            tokio::time::timeout(std::time::Duration::from_secs(5), source.hint()).await.unwrap();
            assert_eq!(source.read().unwrap().unwrap(), b"a");
            assert!(source.read().unwrap().is_none());
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

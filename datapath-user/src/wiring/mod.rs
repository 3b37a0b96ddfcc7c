//! Pods on the node's links: the veth pair of a pod with all that stands at both ends; [`parent`]: what the node itself
//! needs on a parent ENI.
//!
//! ```text
//!   pod's namespace                                    node
//!   eth0  <ipv4>/32, MAC of the sub-ENI  ── veth ──    eni<hash>  MAC of the gateway
//!         <gateway>/32 dev eth0 scope link             <ipv4>/32 dev eni<hash> scope link
//!         default via <gateway> onlink                 <ipv4> is at the sub-ENI's MAC, for ever
//!         <gateway> is at its MAC, for ever
//!         GRO on: a veth takes redirected XDP frames only while it runs NAPI
//! ```

pub mod parent;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    hash::Hasher as _,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::{
    attachment::{Extras, Route},
    audit,
    ethtool::{self, EthtoolError, Offload},
    fnv::Fnv,
    net::{InterfaceName, Mac, mac_text},
    netlink::{Existing, Link, LinkChange, MAIN, Netlink, NetlinkError, VethEnd},
    netns::{Namespace, NetnsError},
    settings::SettingError,
    sysctl::{self, SysctlError},
};

/// Why a pod or a parent could not be wired.
#[derive(Debug, thiserror::Error)]
pub enum WiringError {
    /// The pod's namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A request to the kernel.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A request to the kernel, made inside a pod.
    #[error("in network namespace {}: {source}", netns.display())]
    InPod {
        /// The pod's namespace.
        netns: PathBuf,
        /// What went wrong there.
        source: Box<WiringError>,
    },
    /// A setting of the kernel.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// An offload.
    #[error(transparent)]
    Ethtool(#[from] EthtoolError),
    /// A setting of the node.
    #[error(transparent)]
    Setting(Box<SettingError>),
    /// The pod has another interface of that name.
    #[error(
        "interface {interface} in {} exists with MAC {}, but the sub-ENI's is {}; give the pod another \
         interface name, or remove that interface", netns.display(), mac_text(*found), Mac(*wanted)
    )]
    Taken {
        /// The pod's namespace.
        netns: PathBuf,
        /// The interface.
        interface: String,
        /// Its MAC.
        found: Option<[u8; 6]>,
        /// The sub-ENI's MAC.
        wanted: [u8; 6],
    },
    /// The pod's interface leads elsewhere.
    #[error(
        "interface {interface} in {} has the sub-ENI's MAC, but its other end is not a veth of this node's \
         namespace; remove that interface, or run the agent where its other end is", netns.display()
    )]
    ElsewherePeer {
        /// The pod's namespace.
        netns: PathBuf,
        /// The interface.
        interface: String,
    },
    /// The host side is not the one that was named.
    #[error(
        "interface {interface} in {} ends at {found}, but `host_interface` says {wanted}", netns.display()
    )]
    OtherHostInterface {
        /// The pod's namespace.
        netns: PathBuf,
        /// The interface in the pod.
        interface: String,
        /// Where it ends.
        found: String,
        /// Where it should end.
        wanted: String,
    },
    /// The named host side is wired to something else than this pod.
    #[error("`host_interface` {host_interface} exists, but not as the other end of {interface} in {}", netns.display())]
    NotOfPod {
        /// The pod's namespace.
        netns: PathBuf,
        /// The interface in the pod.
        interface: String,
        /// The host side that was named.
        host_interface: String,
    },
    /// The name is made from a hash, and another pod has the same.
    #[error(
        "interface {interface} is of `{alias}` and cannot also be of `{wanted}`; delete it if that pod is gone"
    )]
    NameInUse {
        /// The name.
        interface: String,
        /// Whose it is.
        alias: String,
        /// Who wants it.
        wanted: String,
    },
    /// The pod's namespace is the node's.
    #[error("{} is the node's own network namespace: host-network pods have no sub-ENI", .0.display())]
    HostNetwork(PathBuf),
    /// Neither a namespace nor a host side.
    #[error("neither `netns` nor `host_interface` is given, so there is nothing to wire the pod to")]
    NothingNamed,
    /// Not a name of an interface.
    #[error("`{0}` is no interface name: 1 to 15 characters without `/`, `:` and blanks are allowed")]
    BadName(String),
}

impl From<SettingError> for WiringError {
    fn from(error: SettingError) -> Self {
        Self::Setting(Box::new(error))
    }
}

/// A pod to be wired.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodSpec {
    /// Whose the interface is, for the name of the host side: the container id.
    pub owner_key: String,
    /// The pod's network namespace. `None`: the pod is out of reach, and only the host side is seen to.
    pub netns: Option<PathBuf>,
    /// Name of the interface in the pod.
    pub interface: String,
    /// Name of a host side that somebody else made. `None`: found by way of the pod, or made.
    pub host_interface: Option<String>,
    /// MAC of the sub-ENI.
    pub mac: [u8; 6],
    /// Address of the pod.
    pub ipv4: Ipv4Addr,
    /// The subnet that the address is of.
    pub subnet: Ipv4Net,
    /// Gateway of the subnet.
    pub gateway: Ipv4Addr,
    /// MAC of the gateway.
    pub gateway_mac: [u8; 6],
    /// IP MTU.
    pub mtu: u16,
    /// Name of the parent ENI.
    pub parent: String,
    /// What else is set up in the pod.
    pub extras: Extras,
}

/// A wired pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wired {
    /// Index of the host side.
    pub ifindex: u32,
    /// Name of the host side.
    pub host_interface: String,
    /// Whether the pair stood already.
    pub adopted: bool,
}

/// How long the pod's side may take to transmit.
const CARRIER: Duration = Duration::from_secs(1);

/// Wires a pod, or finds that it is wired, and repairs what is missing. A new host side stays down until [`open`].
pub async fn wire(spec: &PodSpec) -> Result<Wired, WiringError> {
    check_name(&spec.interface)?;
    spec.host_interface.as_deref().map_or(Ok(()), check_name)?;
    let netlink = Netlink::open()?;
    let (host, adopted) = match (&spec.netns, &spec.host_interface) {
        (Some(path), named) => wire_pod(&netlink, spec, path, named.as_deref()).await?,
        (None, Some(name)) => (netlink.link(name).await?, true),
        (None, None) => return Err(WiringError::NothingNamed),
    };
    wire_host_side(&netlink, spec, &host).await?;
    Ok(Wired { ifindex: host.index, host_interface: host.name, adopted })
}

/// Deletes the host side of a pod's veth, and so the pair, if [`wire`] made it. One that is gone is no error.
pub async fn unwire(host_interface: &str) -> Result<(), WiringError> {
    if !is_own_name(host_interface) {
        return Ok(());
    }
    let netlink = Netlink::open()?;
    if let Some(link) = netlink.find_link(host_interface).await?.filter(|link| link.veth) {
        netlink.delete_link(&link).await?;
    }
    Ok(())
}

/// The name of a pod's host side: the same for the same container and interface, for ever.
pub fn host_interface_name(owner_key: &str, interface: &str) -> String {
    let mut hash = Fnv::default();
    [owner_key.as_bytes(), &[0], interface.as_bytes()].into_iter().for_each(|part| hash.write(part));
    let hash = hash.finish();
    let folded = (hash ^ (hash >> 44)) & 0x0fff_ffff_ffff;
    format!("{OWN_PREFIX}{folded:011x}")
}

const OWN_PREFIX: &str = "eni";
const ALIAS_PREFIX: &str = "eniway ";

/// Whether a name is one that [`host_interface_name`] makes.
pub(crate) fn is_own_name(name: &str) -> bool {
    name.strip_prefix(OWN_PREFIX).is_some_and(|hash| {
        hash.len() == 11 && hash.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// Whether [`wire`] made a link: by its name and by its alias, so that nobody else's is taken for ours.
pub(crate) fn is_ours(link: &Link) -> bool {
    link.veth
        && is_own_name(&link.name)
        && link.alias.as_ref().is_some_and(|alias| alias.starts_with(ALIAS_PREFIX))
}

fn check_name(name: &str) -> Result<(), WiringError> {
    if InterfaceName::new(name).is_none() {
        return Err(WiringError::BadName(name.to_owned()));
    }
    Ok(())
}

/// Sees to the veth pair and the pod's side of it; answers with the host side and whether it stood already.
async fn wire_pod(
    netlink: &Netlink,
    spec: &PodSpec,
    path: &Path,
    named: Option<&str>,
) -> Result<(Link, bool), WiringError> {
    let namespace = Namespace::open(path)?;
    if namespace.same_as(&Namespace::current()?) {
        return Err(WiringError::HostNetwork(path.to_path_buf()));
    }
    if named.is_none() {
        // Nearly always the pair is one that we made, or there is none yet: both are seen from this side, and the pod's
        // namespace is entered once only.
        match netlink.find_link(&host_interface_name(&spec.owner_key, &spec.interface)).await? {
            Some(host) => {
                if adopt(netlink, spec, &namespace, &host).await? {
                    return Ok((host, true));
                }
            }
            None => match add_pair(netlink, spec, &namespace).await {
                Ok(host) => return finish_pair(netlink, spec, &namespace, host).await,
                // The pod has an interface of that name: whose it is, is to be seen.
                Err(WiringError::Netlink(error)) if error.is(libc::EEXIST) => {}
                Err(error) => return Err(error),
            },
        }
    }
    if let Some(host) = find_pair(netlink, spec, &namespace, named).await? {
        let by_us = is_own_name(&host.name);
        wire_pod_side(spec, &namespace, if by_us { Existing::Replace } else { Existing::Keep }).await?;
        return Ok((host, true));
    }
    if let Some(name) = named {
        // Made by somebody else, so it must stand; the error of a missing one lists those that do.
        netlink.link(name).await?;
        return Err(WiringError::NotOfPod {
            netns: path.to_path_buf(),
            interface: spec.interface.clone(),
            host_interface: name.to_owned(),
        });
    }
    let host = make_pair(netlink, spec, &namespace).await?;
    finish_pair(netlink, spec, &namespace, host).await
}

/// Sets up the pod's side of a pair, when that is the other end of this host side. Returns whether it is.
async fn adopt(
    netlink: &Netlink,
    spec: &PodSpec,
    namespace: &Namespace,
    host: &Link,
) -> Result<bool, WiringError> {
    let is_there = host.peer_namespace.is_some()
        && host.peer_namespace == netlink.namespace_id(namespace).await?
        && host.alias.as_ref() == Some(&alias(spec));
    if !host.veth || !is_there {
        return Ok(false);
    }
    let (spec, host) = (spec.clone(), host.clone());
    in_pod(namespace, async move || {
        let netlink = Netlink::open()?;
        let Some(inside) = netlink.find_link(&spec.interface).await? else { return Ok(false) };
        let is_its_end = inside.veth && inside.peer == Some(host.index) && host.peer == Some(inside.index);
        if !is_its_end || inside.mac != Some(spec.mac) {
            return Ok(false);
        }
        set_up_inside(&netlink, &spec, &inside, Existing::Replace).await?;
        Ok(true)
    })
    .await
}

async fn finish_pair(
    netlink: &Netlink,
    spec: &PodSpec,
    namespace: &Namespace,
    host: Link,
) -> Result<(Link, bool), WiringError> {
    match wire_pod_side(spec, namespace, Existing::Replace).await {
        Ok(()) => Ok((host, false)),
        Err(error) => {
            // Half a pod helps nobody, and the next attempt would take it for one to adopt.
            if let Err(cleanup) = netlink.delete_link(&host).await {
                log::warn!("{cleanup}");
            }
            Err(error)
        }
    }
}

/// The host side of the pod's interface, when that exists with the sub-ENI's MAC.
async fn find_pair(
    netlink: &Netlink,
    spec: &PodSpec,
    namespace: &Namespace,
    named: Option<&str>,
) -> Result<Option<Link>, WiringError> {
    let name = spec.interface.clone();
    let inside = in_pod(namespace, async move || Ok(Netlink::open()?.find_link(&name).await?)).await?;
    let Some(inside) = inside else {
        return Ok(None);
    };
    let netns = namespace.path().to_path_buf();
    let interface = spec.interface.clone();
    if inside.mac != Some(spec.mac) {
        return Err(WiringError::Taken { netns, interface, found: inside.mac, wanted: spec.mac });
    }
    // Interface indices are numbered per namespace: the other end is here only if it leads back to that namespace.
    let host = match inside.peer.filter(|_| inside.veth) {
        Some(index) => netlink.find_link_by_index(index).await?,
        None => None,
    };
    let leads_back = match &host {
        Some(host) if host.veth && host.peer == Some(inside.index) => {
            host.peer_namespace.is_some() && host.peer_namespace == netlink.namespace_id(namespace).await?
        }
        _ => false,
    };
    match host.filter(|_| leads_back) {
        None => Err(WiringError::ElsewherePeer { netns, interface }),
        Some(host) => match named {
            Some(wanted) if wanted != host.name => {
                let wanted = wanted.to_owned();
                Err(WiringError::OtherHostInterface { netns, interface, found: host.name, wanted })
            }
            _ => Ok(Some(host)),
        },
    }
}

async fn make_pair(netlink: &Netlink, spec: &PodSpec, namespace: &Namespace) -> Result<Link, WiringError> {
    let name = host_interface_name(&spec.owner_key, &spec.interface);
    let owner = alias(spec);
    if let Some(stale) = netlink.find_link(&name).await? {
        match stale.alias.clone() {
            Some(alias) if alias != owner => {
                return Err(WiringError::NameInUse { interface: name, alias, wanted: owner });
            }
            // Its other end is no longer the pod's interface: renamed, or moved to where it is of no use.
            _ => netlink.delete_link(&stale).await?,
        }
    }
    add_pair(netlink, spec, namespace).await
}

async fn add_pair(netlink: &Netlink, spec: &PodSpec, namespace: &Namespace) -> Result<Link, WiringError> {
    let name = host_interface_name(&spec.owner_key, &spec.interface);
    let here = VethEnd { name: &name, mac: spec.gateway_mac };
    let there = VethEnd { name: &spec.interface, mac: spec.mac };
    netlink.add_veth(here, there, namespace, u32::from(spec.mtu)).await?;
    Ok(netlink.link(&name).await?)
}

/// What `ip link` shows beside the host side.
pub(crate) fn alias(spec: &PodSpec) -> String {
    let mut alias = format!("{ALIAS_PREFIX}{} {}", spec.interface, spec.owner_key);
    // IFALIASZ is 256 with the final zero.
    let mut end = alias.len().min(255);
    while !alias.is_char_boundary(end) {
        end -= 1;
    }
    alias.truncate(end);
    alias
}

async fn in_pod<T: Send + 'static>(
    namespace: &Namespace,
    work: impl AsyncFnOnce() -> Result<T, WiringError> + Send + 'static,
) -> Result<T, WiringError> {
    namespace
        .run(work)
        .await?
        .map_err(|source| WiringError::InPod { netns: namespace.path().to_path_buf(), source: source.into() })
}

pub(crate) async fn wire_pod_side(
    spec: &PodSpec,
    namespace: &Namespace,
    existing: Existing,
) -> Result<(), WiringError> {
    let spec = spec.clone();
    in_pod(namespace, async move || {
        let netlink = Netlink::open()?;
        let link = netlink.link(&spec.interface).await?;
        set_up_inside(&netlink, &spec, &link, existing).await
    })
    .await
}

async fn set_up_inside(
    netlink: &Netlink,
    spec: &PodSpec,
    link: &Link,
    existing: Existing,
) -> Result<(), WiringError> {
    let lo = netlink.link("lo").await?;
    netlink.change_link(&lo, LinkChange { up: true, ..LinkChange::default() }).await?;
    ethtool::set(&spec.interface, Offload::Gro, true)?;
    // Its addresses and routes are given; whoever sends router advertisements is not to add others.
    sysctl::set(&["ipv6", "conf", &spec.interface, "accept_ra"], "0")?;
    netlink.add_address(link, spec.ipv4.into()).await?;
    let change = LinkChange { mtu: Some(u32::from(spec.mtu)), up: true, ..LinkChange::default() };
    netlink.change_link(link, change).await?;
    netlink.set_neighbour(link, spec.gateway, spec.gateway_mac).await?;
    netlink.add_link_route(spec.gateway.into(), link, existing).await?;
    netlink.add_default_route(spec.gateway, link, MAIN, existing).await?;
    set_up_extras(netlink, spec, link, existing).await
}

async fn set_up_extras(
    netlink: &Netlink,
    spec: &PodSpec,
    link: &Link,
    existing: Existing,
) -> Result<(), WiringError> {
    for Route { destination, gateway } in &spec.extras.routes {
        netlink.add_gateway_route(*destination, gateway.unwrap_or(spec.gateway), link, existing).await?;
    }
    for (key, value) in &spec.extras.sysctls {
        let parts: Vec<&str> = key.iter().map(String::as_str).collect();
        sysctl::set(&parts, value)?;
    }
    Ok(())
}

async fn wire_host_side(netlink: &Netlink, spec: &PodSpec, host: &Link) -> Result<(), WiringError> {
    let name = host.name.as_str();
    // Before the link is up.
    for (key, value) in host_settings(name) {
        sysctl::set(&key, value)?;
    }
    // The pod sends to the gateway's MAC whichever door the packet takes, so the node's end answers to it.
    let change = LinkChange {
        mac: Some(spec.gateway_mac),
        mtu: Some(u32::from(spec.mtu)),
        alias: is_own_name(name).then(|| alias(spec)),
        up: false,
    };
    Ok(netlink.change_link(host, change).await?)
}

/// Settings of a host side. With IPv6 as it comes, the node would give it an address and take a pod's router
/// advertisements for the network's.
pub(crate) fn host_settings(name: &str) -> [([&str; 4], &'static str); 5] {
    [
        (["ipv6", "conf", name, "addr_gen_mode"], "1"),
        (["ipv6", "conf", name, "accept_ra"], "0"),
        (["ipv6", "conf", name, "autoconf"], "0"),
        (["ipv4", "conf", name, "accept_redirects"], "0"),
        // Loose. Zero would leave it to `all`, of which the stricter one holds.
        (["ipv4", "conf", name, "rp_filter"], "2"),
    ]
}

/// Lets a wired pod speak: sets the host side up, with the node's route to the pod. Not before the programs are attached:
/// until then whatever the pod sends would reach the node's stack. Idempotent.
pub async fn open(spec: &PodSpec, host_interface: &str) -> Result<(), WiringError> {
    let netlink = Netlink::open()?;
    let host = netlink.link(host_interface).await?;
    netlink.change_link(&host, LinkChange { up: true, ..LinkChange::default() }).await?;
    netlink.set_neighbour(&host, spec.ipv4, spec.mac).await?;
    netlink.add_link_route(spec.ipv4.into(), &host, Existing::Replace).await?;
    match &spec.netns {
        Some(path) if !host.up => wait_for_carrier(spec, &Namespace::open(path)?).await,
        _ => Ok(()),
    }
}

/// Returns when the pod's side transmits. It was set up before the host's side and so without a carrier; the kernel gives
/// it a queue some time later, in a work item that waits for the lock of all network settings, and until then drops what the pod sends.
async fn wait_for_carrier(spec: &PodSpec, namespace: &Namespace) -> Result<(), WiringError> {
    let name = spec.interface.clone();
    in_pod(namespace, async move || {
        let netlink = Netlink::open()?;
        let end = Instant::now() + CARRIER;
        // Since 6.8 the kernel catches up with itself before it answers.
        while !netlink.link(&name).await?.operational {
            if Instant::now() >= end {
                log::warn!(
                    "{name} has no carrier after {CARRIER:?}; what the pod sends is dropped until it has"
                );
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    })
    .await
}

/// Why a pod's interface is not as it was set up.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// It cannot be looked at.
    #[error(transparent)]
    Wiring(#[from] WiringError),
    /// It is another than it should be.
    #[error("interface {interface} in {}: {what}", netns.display())]
    Differs {
        /// The interface.
        interface: String,
        /// The pod's namespace.
        netns: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

/// Looks whether a pod's side is as [`wire`] left it; changes nothing.
pub async fn verify(spec: &PodSpec) -> Result<(), VerifyError> {
    let Some(path) = &spec.netns else { return Ok(()) };
    let namespace = Namespace::open(path).map_err(WiringError::from)?;
    let wanted = spec.clone();
    let checks = in_pod(&namespace, async move || audit::pod::inside(&wanted).await).await?;
    if checks.differences.is_empty() {
        return Ok(());
    }
    let what = checks.differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    Err(VerifyError::Differs { interface: spec.interface.clone(), netns: path.clone(), what })
}

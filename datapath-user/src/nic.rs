//! Exclusive ENIs: the NIC itself goes into the pod's namespace, and comes back.
//!
//! ```text
//!   node                                   pod's namespace
//!   eth3  MAC of the ENI, no address  ──►  eth0  <ipv4>/32, MAC of the ENI
//!                                          <gateway>/32 dev eth0 scope link
//!                                          default via <gateway> onlink
//! ```
//!
//! The NIC is known by its MAC. When a namespace ends, the kernel gives a NIC back to the namespace that the machine began
//! with, under some name; what it was called and how it was set is kept, so that it is put back as it was.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{
    net::Mac,
    netlink::{Existing, Link, LinkChange, Netlink, NetlinkError},
    netns::{Namespace, NetnsError},
    wiring::{self, PodSpec, WiringError},
};

/// A NIC that was given to a pod, and how it was before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Its MAC.
    pub mac: Mac,
    /// Its name on the node.
    pub name: String,
    /// Its MTU on the node.
    pub mtu: u32,
    /// Its name in the pod.
    pub interface: String,
    /// The pod's namespace.
    pub netns: PathBuf,
}

/// Why a NIC is not where it should be.
#[derive(Debug, thiserror::Error)]
pub enum NicError {
    /// The node has none with this MAC.
    #[error(
        "no interface of the node has MAC {mac}, which the allocator gave to the pod: the ENI is not attached to the \
         node (yet), or was moved by somebody else"
    )]
    Missing {
        /// The MAC.
        mac: Mac,
    },
    /// It carries something else.
    #[error("interface {interface} has MAC {mac}, which the allocator gave to the pod, but it {used}")]
    Used {
        /// Its name.
        interface: String,
        /// The MAC.
        mac: Mac,
        /// By what.
        used: &'static str,
    },
    /// The pod's namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A request to the kernel.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// Setting up the pod's side.
    #[error(transparent)]
    Wiring(#[from] WiringError),
}

/// The NIC for a pod, as it is on the node now; none when it is in the pod already.
///
/// # Errors
///
/// When there is none, or it is in use.
pub async fn find(spec: &PodSpec, parents: &[&str]) -> Result<Option<Nic>, NicError> {
    let (mac, netns) = (Mac(spec.mac), spec.netns.clone().unwrap_or_default());
    let namespace = Namespace::open(&netns)?;
    if namespace.same_as(&Namespace::current()?) {
        return Err(WiringError::HostNetwork(netns).into());
    }
    if inside(&namespace, spec).await?.is_some() {
        return Ok(None);
    }
    let netlink = Netlink::open()?;
    let link = by_mac(&netlink, mac).await?.ok_or(NicError::Missing { mac })?;
    let used = |used| NicError::Used { interface: link.name.clone(), mac, used };
    if parents.contains(&link.name.as_str()) {
        return Err(used("is a [[parent]] of the configuration"));
    }
    if netlink.has_addresses(&link).await? {
        return Err(used("has addresses of the node: it is the node's own, or something else configures it"));
    }
    let Link { name, mtu, .. } = link;
    Ok(Some(Nic { mac, name, mtu, interface: spec.interface.clone(), netns }))
}

/// Moves a NIC into its pod, unless it is there, and sets it up. Answers with its interface index there.
///
/// # Errors
///
/// When it cannot be moved or set up; the caller puts it back.
pub async fn give(spec: &PodSpec, nic: &Nic) -> Result<u32, NicError> {
    let namespace = Namespace::open(&nic.netns)?;
    if inside(&namespace, spec).await?.is_none() {
        let netlink = Netlink::open()?;
        let link = by_mac(&netlink, nic.mac).await?.ok_or(NicError::Missing { mac: nic.mac })?;
        netlink.move_link(&link, &namespace, &nic.interface).await?;
    }
    wiring::wire_pod_side(spec, &namespace, Existing::Replace).await?;
    let link = inside(&namespace, spec).await?.ok_or(NicError::Missing { mac: nic.mac })?;
    Ok(link.index)
}

/// Takes a NIC back, as it was. One that went with its namespace is found where the kernel has put it; one that is
/// nowhere is none to take back.
///
/// # Errors
///
/// When it cannot be moved.
pub async fn take_back(nic: &Nic) -> Result<(), NicError> {
    let home = Namespace::current()?;
    match Namespace::open(&nic.netns) {
        Ok(namespace) if !namespace.same_as(&home) => {
            let (gone, to) = (nic.clone(), home.clone());
            let moved = namespace.run(async move || send_home(&gone, &to).await).await;
            // What is mounted there no longer need not be a namespace.
            match moved {
                Err(NetnsError::Enter { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {}
                moved => moved??,
            }
        }
        _ => {}
    }
    let netlink = Netlink::open()?;
    let Some(link) = by_mac(&netlink, nic.mac).await? else {
        log::warn!("the ENI {} is nowhere on the node any more", nic.mac);
        return Ok(());
    };
    netlink.set_down(&link).await?;
    netlink.change_link(&link, LinkChange { mtu: Some(nic.mtu), ..LinkChange::default() }).await?;
    if link.name != nic.name {
        match netlink.rename(&link, &nic.name).await {
            // Another one came meanwhile and took the name.
            Err(error) if error.is(libc::EEXIST) => log::warn!("{error}; it stays {}", link.name),
            renamed => renamed?,
        }
    }
    Ok(())
}

async fn send_home(nic: &Nic, home: &Namespace) -> Result<(), NicError> {
    let netlink = Netlink::open()?;
    let Some(link) = by_mac(&netlink, nic.mac).await? else { return Ok(()) };
    // Down, it loses its routes; on its way out, its addresses.
    netlink.set_down(&link).await?;
    match netlink.move_link(&link, home, &nic.name).await {
        Err(error) if error.is(libc::EEXIST) => {
            let [.., a, b, c] = nic.mac.0;
            Ok(netlink.move_link(&link, home, &format!("eni{a:02x}{b:02x}{c:02x}")).await?)
        }
        moved => Ok(moved?),
    }
}

/// The pod's interface, when it is the NIC.
async fn inside(namespace: &Namespace, spec: &PodSpec) -> Result<Option<Link>, NicError> {
    let name = spec.interface.clone();
    let found = namespace
        .run(async move || -> Result<Option<Link>, NicError> { Ok(Netlink::open()?.find_link(&name).await?) })
        .await??;
    match found {
        Some(link) if link.mac == Some(spec.mac) => Ok(Some(link)),
        Some(link) => Err(WiringError::Taken {
            netns: namespace.path().to_owned(),
            interface: spec.interface.clone(),
            found: link.mac,
            wanted: spec.mac,
        }
        .into()),
        None => Ok(None),
    }
}

async fn by_mac(netlink: &Netlink, mac: Mac) -> Result<Option<Link>, NetlinkError> {
    Ok(netlink.links().await?.into_iter().find(|link| link.mac == Some(mac.0)))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsRawFd as _, thread};

    use nix::sched::{CloneFlags, unshare};

    use super::*;
    use crate::{attachment::Extras, netlink::VethEnd};

    const MAC: [u8; 6] = [0xfa, 0x16, 0x3e, 0, 7, 7];

    #[test]
    fn a_nic_goes_into_its_pod_and_comes_back_as_it_was() {
        let node = || {
            if unshare(CloneFlags::CLONE_NEWNET).is_err() {
                return;
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let netlink = Netlink::open().unwrap();
                let here = Namespace::current().unwrap();
                let ends =
                    (VethEnd { name: "ens7", mac: MAC }, VethEnd { name: "far", mac: [2, 0, 0, 0, 0, 1] });
                netlink.add_veth(ends.0, ends.1, &here, 1600).await.unwrap();
                let pod: File = thread::spawn(|| {
                    unshare(CloneFlags::CLONE_NEWNET).unwrap();
                    File::open("/proc/thread-self/ns/net").unwrap()
                })
                .join()
                .unwrap();
                let spec = PodSpec {
                    owner_key: "c".to_owned(),
                    netns: Some(format!("/proc/self/fd/{}", pod.as_raw_fd()).into()),
                    interface: "eth0".to_owned(),
                    host_interface: None,
                    mac: MAC,
                    ipv4: [10, 1, 18, 2].into(),
                    subnet: "10.1.16.0/22".parse().unwrap(),
                    gateway: [10, 1, 16, 1].into(),
                    gateway_mac: [0xfa, 0xff, 0xff, 0, 0, 1],
                    mtu: 1400,
                    parent: String::new(),
                    extras: Extras::default(),
                };
                let used = find(&spec, &["ens7"]).await.unwrap_err();
                assert!(matches!(used, NicError::Used { .. }), "{used}");
                let nic = find(&spec, &[]).await.unwrap().unwrap();
                assert_eq!((nic.name.as_str(), nic.mtu), ("ens7", 1600));
                give(&spec, &nic).await.unwrap();
                give(&spec, &nic).await.unwrap();
                assert_eq!(netlink.find_link("ens7").await.unwrap(), None);
                assert_eq!(find(&spec, &[]).await.unwrap(), None);
                wiring::verify(&spec).await.unwrap();

                take_back(&nic).await.unwrap();
                take_back(&nic).await.unwrap();
                let back = netlink.link("ens7").await.unwrap();
                assert_eq!((back.mac, back.mtu, back.up), (Some(MAC), 1600, false));
                let missing = find(&PodSpec { mac: [2; 6], ..spec.clone() }, &[]).await.unwrap_err();
                assert!(matches!(missing, NicError::Missing { .. }), "{missing}");
            });
        };
        thread::spawn(node).join().unwrap();
    }
}

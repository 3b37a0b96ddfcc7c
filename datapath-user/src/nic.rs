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

use std::{collections::BTreeSet, path::PathBuf};

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
    /// Its index on the node; 0 = nobody knows any more.
    #[serde(default)]
    pub home_index: u32,
    /// The index that the agent chose for it in the pod; 0 = none yet.
    #[serde(default)]
    pub index: u32,
}

/// Where a pod's NIC was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// As it is on the node; `None` = it is in the pod already.
    pub on_node: Option<Nic>,
    /// Its index in the pod, when it is there.
    pub inside: Option<u32>,
    /// Indexes that it cannot have: those of all other interfaces of the node and of the pod.
    pub taken: BTreeSet<u32>,
}

/// The first index that the agent gives. The kernel counts from 1 and does not come here; the low 16 bits are not those
/// of a node's first interfaces, which would share entries of `POD_IF_DIRECT` with them.
const FIRST_INDEX: u32 = (1 << 30) + (1 << 15);

/// An index for a NIC in its pod that is not taken: the first of `preferred` that will do, or the lowest.
///
/// Each network namespace counts its interfaces anew, so that what the kernel gives is not one of its kind on the node.
/// The programs, their pins and the tables know a NIC by its index.
pub fn choose_index(preferred: impl IntoIterator<Item = u32>, taken: &BTreeSet<u32>) -> u32 {
    let free = |index: &u32| !taken.contains(index);
    let mut own = preferred.into_iter().filter(|index| *index >= FIRST_INDEX);
    // More indexes than a node can have NICs.
    own.find(free).or_else(|| (FIRST_INDEX..=i32::MAX.unsigned_abs()).find(free)).unwrap_or(FIRST_INDEX)
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

/// The NIC for a pod, on the node or in the pod already.
///
/// # Errors
///
/// When there is none, or it is in use.
pub async fn find(spec: &PodSpec, parents: &[&str]) -> Result<Found, NicError> {
    let (mac, netns) = (Mac(spec.mac), spec.netns.clone().unwrap_or_default());
    let namespace = Namespace::open(&netns)?;
    if namespace.same_as(&Namespace::current()?) {
        return Err(WiringError::HostNetwork(netns).into());
    }
    let netlink = Netlink::open()?;
    let in_pod = links(&namespace).await?;
    let inside = own(&in_pod, &namespace, spec)?.map(|link| link.index);
    let all = netlink.links().await?.into_iter().chain(in_pod);
    let taken = all.filter(|link| link.mac != Some(spec.mac)).map(|link| link.index).collect();
    if inside.is_some() {
        return Ok(Found { on_node: None, inside, taken });
    }
    let link = by_mac(&netlink, mac).await?.ok_or(NicError::Missing { mac })?;
    let used = |used| NicError::Used { interface: link.name.clone(), mac, used };
    if parents.contains(&link.name.as_str()) {
        return Err(used("is a [[parent]] of the configuration"));
    }
    if netlink.has_addresses(&link).await? {
        return Err(used("has addresses of the node: it is the node's own, or something else configures it"));
    }
    let Link { name, mtu, index: home_index, .. } = link;
    let nic = Nic { mac, name, mtu, interface: spec.interface.clone(), netns, home_index, index: 0 };
    Ok(Found { on_node: Some(nic), inside, taken })
}

/// Moves a NIC into its pod, unless it is there, and sets it up. There it has the index that was chosen for it; what comes
/// with another one goes home first.
///
/// # Errors
///
/// When it cannot be moved or set up; the caller puts it back.
pub async fn give(spec: &PodSpec, nic: &Nic) -> Result<(), NicError> {
    let namespace = Namespace::open(&nic.netns)?;
    let found = own(&links(&namespace).await?, &namespace, spec)?.map(|link| link.index);
    if found.is_some_and(|index| index != nic.index) {
        take_back(nic).await?;
    }
    if found != Some(nic.index) {
        let netlink = Netlink::open()?;
        let link = by_mac(&netlink, nic.mac).await?.ok_or(NicError::Missing { mac: nic.mac })?;
        netlink.move_link(&link, &namespace, &nic.interface, Some(nic.index)).await?;
    }
    wiring::wire_pod_side(spec, &namespace, Existing::Replace).await?;
    Ok(())
}

/// Takes a NIC back, as it was. One that went with its namespace is found where the kernel has put it; one that is
/// nowhere is none to take back.
///
/// # Errors
///
/// When it cannot be moved.
pub async fn take_back(nic: &Nic) -> Result<(), NicError> {
    let home = Namespace::current()?;
    let mut hidden = None;
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
        Ok(_) | Err(NetnsError::Gone { .. }) => {}
        Err(error) => hidden = Some(error),
    }
    let netlink = Netlink::open()?;
    let Some(link) = by_mac(&netlink, nic.mac).await? else {
        // It may be where nobody can look.
        if let Some(error) = hidden {
            return Err(error.into());
        }
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
    let (mut name, other) = (nic.name.clone(), name_by_mac(nic.mac));
    let mut index = Some(nic.home_index).filter(|index| *index != 0);
    loop {
        match netlink.move_link(&link, home, &name, index).await {
            // Another one came meanwhile and took the name, or the index.
            Err(error) if error.is(libc::EEXIST) && name != other => name.clone_from(&other),
            Err(error) if error.is(libc::EBUSY) && index.is_some() => index = None,
            moved => return Ok(moved?),
        }
    }
}

/// A name for a NIC whose own is taken, or that nobody knows.
pub(crate) fn name_by_mac(mac: Mac) -> String {
    let [.., a, b, c] = mac.0;
    format!("eni{a:02x}{b:02x}{c:02x}")
}

async fn links(namespace: &Namespace) -> Result<Vec<Link>, NicError> {
    Ok(namespace.run(async || Netlink::open()?.links().await).await??)
}

/// The pod's interface, when it is the NIC.
fn own<'l>(links: &'l [Link], namespace: &Namespace, spec: &PodSpec) -> Result<Option<&'l Link>, NicError> {
    match links.iter().find(|link| link.name == spec.interface) {
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
    use super::*;
    use crate::{
        netlink::VethEnd,
        wiring::tests::{new_netns, on_a_node, pod},
    };

    const MAC: [u8; 6] = [0xfa, 0x16, 0x3e, 0, 7, 7];

    #[test]
    fn indexes_are_chosen_from_a_range_of_their_own() {
        let taken = BTreeSet::from([1, 2, FIRST_INDEX, FIRST_INDEX + 2]);
        assert_eq!(choose_index([], &taken), FIRST_INDEX + 1);
        assert_eq!(choose_index([FIRST_INDEX + 9, FIRST_INDEX + 1], &taken), FIRST_INDEX + 9);
        assert_eq!(choose_index([0, 7, FIRST_INDEX + 2, FIRST_INDEX + 3], &taken), FIRST_INDEX + 3);
    }

    #[test]
    fn a_nic_goes_into_its_pod_and_comes_back_as_it_was() {
        on_a_node(async || {
            let netlink = Netlink::open().unwrap();
            let here = Namespace::current().unwrap();
            let ends = (VethEnd { name: "ens7", mac: MAC }, VethEnd { name: "far", mac: [2, 0, 0, 0, 0, 1] });
            netlink.add_veth(ends.0, ends.1, &here, 1600).await.unwrap();
            let (_keep, path) = new_netns();
            let spec = PodSpec { mac: MAC, mtu: 1400, parent: String::new(), ..pod(&path) };
            let used = find(&spec, &["ens7"]).await.unwrap_err();
            assert!(matches!(used, NicError::Used { .. }), "{used}");
            let found = find(&spec, &[]).await.unwrap();
            let home_index = netlink.link("ens7").await.unwrap().index;
            assert!(!found.taken.contains(&home_index) && found.taken.contains(&1), "{found:?}");
            let mut nic = found.on_node.unwrap();
            assert_eq!((nic.name.as_str(), nic.mtu, nic.home_index), ("ens7", 1600, home_index));
            // The second index is given to what has the first.
            for index in [FIRST_INDEX, FIRST_INDEX + 7] {
                nic.index = index;
                give(&spec, &nic).await.unwrap();
                give(&spec, &nic).await.unwrap();
                assert_eq!(netlink.find_link("ens7").await.unwrap(), None);
                let found = find(&spec, &[]).await.unwrap();
                assert_eq!((found.on_node, found.inside), (None, Some(index)));
                wiring::verify(&spec).await.unwrap();
            }
            // A file has no namespaces below it.
            let hidden = Nic { netns: "/proc/self/exe/net".into(), ..nic.clone() };
            let error = take_back(&hidden).await.unwrap_err();
            assert!(matches!(error, NicError::Netns(NetnsError::Open { .. })), "{error}");

            take_back(&nic).await.unwrap();
            take_back(&nic).await.unwrap();
            let back = netlink.link("ens7").await.unwrap();
            assert_eq!((back.mac, back.mtu, back.up), (Some(MAC), 1600, false));
            assert_eq!(back.index, home_index);
            let missing = find(&PodSpec { mac: [2; 6], ..spec.clone() }, &[]).await.unwrap_err();
            assert!(matches!(missing, NicError::Missing { .. }), "{missing}");
        });
    }
}

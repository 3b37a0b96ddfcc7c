//! The allocator as the source: over gRPC, or in the same process.
//!
//! Either way a task of its own follows the allocator's watch and hands on what it tells; the agent takes it when it can,
//! and what it acknowledges goes back, the newest first and older ones not at all.

use std::{path::Path, sync::Arc, thread, time::Duration};

use eniway_ipam::{
    Acknowledgement, AllocationChange, Allocator, Notice, PodKey,
    api::{Allocation, RefusedByAgent},
    rpc::{Address, Client, ClientError, Event, Tls},
    vpc::Kind,
};
use eniway_policy::model::{GroupId, GroupList, Groups, Invalid, Membership};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot, watch},
};

use super::{Desired, Pod, Refused, State, owner_of, vlan_id};
use crate::{
    attachment::Extras,
    bandwidth::Bandwidth,
    ipam::{self, IpamError},
    net::InterfaceName,
    wiring,
};

/// How many notices wait for an agent that is busy. The allocator keeps what does not fit.
const WAITING: usize = 16;

/// What the allocator says, in the agent's words.
#[derive(Debug)]
pub enum Told {
    /// The allocator is away.
    Away(String),
    /// All pods of the node.
    Snapshot {
        /// The pods.
        desired: Desired,
        /// Up to which revision an operator has confirmed removals.
        confirmed: u64,
    },
    /// What has changed since.
    Changes {
        /// The allocator's number for the state after it.
        revision: u64,
        /// Up to which revision an operator has confirmed removals.
        confirmed: u64,
        /// The security groups, if they have changed.
        groups: Option<Groups>,
        /// The changes, in their order.
        changes: Vec<Change>,
    },
}

/// One change.
#[derive(Clone, Debug)]
pub enum Change {
    /// A pod is there or has changed.
    Put(Box<Pod>),
    /// What the allocator says of a pod cannot be.
    Refused(u64, Refused),
    /// A pod is gone.
    Gone {
        /// Which.
        owner: u64,
        /// Its generation; a newer allocation of the same owner stays.
        generation: u32,
    },
}

/// A notice and the id of the store that it is of, or why there is none.
type Heard = Result<(Notice, String), String>;

/// Where to ask an allocator for interfaces.
#[derive(Clone)]
pub(crate) enum Allocators {
    /// Elsewhere.
    Remote(Client),
    /// In this process, on a runtime of its own.
    Embedded(Allocator, Handle),
}

/// The allocator, seen from the agent.
pub struct AllocatorSource {
    allocator: Allocators,
    told: mpsc::Receiver<Heard>,
    /// The store that the last notice was of.
    store: String,
    acknowledged: watch::Sender<Option<Acknowledgement>>,
    parents: Arc<[String]>,
}

impl AllocatorSource {
    /// Follows an allocator that runs elsewhere, for ever. To be called on the agent's runtime.
    ///
    /// # Errors
    ///
    /// When the certificates cannot be used.
    pub fn connect(
        address: &Address,
        tls: Option<&Tls>,
        node: &str,
        parents: Vec<String>,
    ) -> Result<Self, ClientError> {
        let client = Client::new(address.clone(), tls)?;
        let allocator = Allocators::Remote(client.clone());
        let mut follower = client.follow(node);
        let (tell, told) = mpsc::channel(WAITING);
        tokio::spawn(async move {
            loop {
                let event = match follower.next().await {
                    Event::Notice(notice) => {
                        Ok((notice, follower.position().map(|at| at.store.clone()).unwrap_or_default()))
                    }
                    Event::Away(error) => Err(error.to_string()),
                };
                if tell.send(event).await.is_err() {
                    return;
                }
            }
        });
        let (acknowledged, mut newest) = watch::channel(None::<Acknowledgement>);
        let node = node.to_owned();
        tokio::spawn(async move {
            while newest.changed().await.is_ok() {
                let Some(acknowledgement) = newest.borrow_and_update().clone() else { continue };
                // Lost with the connection: the next notice, which every new watch begins with, brings another one.
                if let Err(error) = client.acknowledge(&node, &acknowledgement).await {
                    log::debug!("{error}");
                }
            }
        });
        Ok(Self { allocator, told, store: String::new(), acknowledged, parents: parents.into() })
    }

    /// Runs an allocator on a thread of its own, which ends with this value, and follows it.
    ///
    /// # Errors
    ///
    /// When its configuration or its store cannot be used.
    pub async fn embed(config: &Path, node: &str, parents: Vec<String>) -> Result<Self, IpamError> {
        let config = ipam::Config::load(config)?;
        let (tell, told) = mpsc::channel(WAITING);
        let (acknowledged, newest) = watch::channel(None::<Acknowledgement>);
        let (started, start) = oneshot::channel();
        let node = node.to_owned();
        let run = move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(started.send(Err(IpamError::Runtime(error)))),
            };
            runtime.block_on(embedded(config, node, started, tell, newest));
        };
        thread::Builder::new().name("ipam".to_owned()).spawn(run).map_err(IpamError::Runtime)?;
        let allocator = start.await.map_err(|_| IpamError::Died)??;
        Ok(Self { allocator, told, store: String::new(), acknowledged, parents: parents.into() })
    }

    /// Where to ask for interfaces.
    pub(crate) fn allocator(&self) -> Allocators {
        self.allocator.clone()
    }

    /// The next thing that the allocator says. May be dropped and called again without losing anything.
    pub async fn next(&mut self) -> Told {
        let Some(told) = self.told.recv().await else {
            // The task goes on for ever, so it has panicked: what is programmed stays.
            std::future::pending::<()>().await;
            return Told::Away("the allocator's thread has ended".to_owned());
        };
        let told = told.map(|(notice, store)| {
            self.store = store;
            notice
        });
        self.translate(told)
    }

    /// The next thing, if the allocator says one soon.
    pub async fn next_within(&mut self, time: Duration) -> Option<Told> {
        tokio::time::timeout(time, self.next()).await.ok()
    }

    /// Says how far the kernel has come, and what could not be done.
    pub fn acknowledge(&self, revision: u64, refused: Vec<RefusedByAgent>) {
        self.acknowledged.send_replace(Some(Acknowledgement {
            store: self.store.clone(),
            revision,
            refused,
        }));
    }

    fn translate(&self, told: Result<Notice, String>) -> Told {
        match told {
            Err(error) => Told::Away(error),
            Ok(Notice::Snapshot { revision, confirmed, groups, mut allocations }) => {
                // For people, who see the pods in the order in which they came.
                allocations.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
                let mut desired =
                    Desired { revision, groups: Arc::unwrap_or_clone(groups), ..Desired::default() };
                for allocation in &allocations {
                    match self.change(allocation) {
                        Change::Put(pod) => desired.put(*pod),
                        Change::Refused(owner, refused) => desired.refuse(owner, refused),
                        Change::Gone { owner, .. } => desired.remove(owner),
                    }
                }
                Told::Snapshot { desired, confirmed }
            }
            Ok(Notice::Changes { revision, confirmed, groups, changes }) => {
                let change = |change: &AllocationChange| match change {
                    AllocationChange::Put(allocation) => self.change(allocation),
                    AllocationChange::Removed { key, generation } => {
                        Change::Gone { owner: owner(key), generation: low_half(*generation) }
                    }
                };
                let changes = changes.iter().map(change).collect();
                Told::Changes { revision, confirmed, groups: groups.map(Arc::unwrap_or_clone), changes }
            }
        }
    }

    fn change(&self, allocation: &Allocation) -> Change {
        match pod(allocation, &self.parents) {
            Ok(pod) => Change::Put(Box::new(pod)),
            Err(reason) => {
                let refused = Refused {
                    uid: allocation.key.uid.clone(),
                    container_id: allocation.key.container_id.clone(),
                    name: format!("{}/{}", allocation.namespace, allocation.name),
                    reason,
                };
                Change::Refused(owner(&allocation.key), refused)
            }
        }
    }
}

/// The allocator's thread.
async fn embedded(
    config: ipam::Config,
    node: String,
    started: oneshot::Sender<Result<Allocators, IpamError>>,
    tell: mpsc::Sender<Heard>,
    mut newest: watch::Receiver<Option<Acknowledgement>>,
) {
    let (allocator, listeners) = match ipam::open(&config).await {
        Ok(opened) => opened,
        Err(error) => return drop(started.send(Err(error))),
    };
    let mut notices = allocator.watch(&node, None);
    let (teller, store) = (tell.clone(), allocator.store_id());
    let follow = async move {
        while let Some(notice) = notices.next().await {
            if teller.send(Ok((notice, store.clone()))).await.is_err() {
                return;
            }
        }
    };
    let acknowledge = async {
        while newest.changed().await.is_ok() {
            let acknowledgement = newest.borrow_and_update().clone();
            if let Some(acknowledgement) = acknowledgement {
                allocator.ack(&node, acknowledgement);
            }
        }
    };
    let _ = started.send(Ok(Allocators::Embedded(allocator.clone(), Handle::current())));
    let ended = async {
        tokio::select! {
            ((), ()) = async { tokio::join!(follow, acknowledge) } => {}
            () = tell.closed() => {}
        }
    };
    if let Err(error) = eniway_ipam::rpc::serve(allocator.clone(), listeners, ended).await {
        let _ = tell.send(Err(error.to_string())).await;
        // Without the socket nothing new can be asked of it, but what it knows stays in force.
        tell.closed().await;
    }
}

/// Who owns the record of an allocation.
pub(crate) fn owner(key: &PodKey) -> u64 {
    owner_of(&key.uid, &key.container_id)
}

/// The tables hold 32 bits of a generation, and compare them so that a turn of the counter does no harm.
pub(crate) fn low_half(generation: u64) -> u32 {
    (generation & u64::from(u32::MAX)) as u32
}

/// The ids of a pod's security groups.
fn groups(ids: &[String]) -> Result<GroupList, String> {
    let problem = |invalid: Invalid| format!("security_groups: {invalid}");
    let ids = ids.iter().map(|id| id.parse()).collect::<Result<Vec<GroupId>, _>>().map_err(problem)?;
    ids.try_into().map_err(problem)
}

/// The agent's view of an allocation, or why there is none.
fn pod(allocation: &Allocation, parents: &[String]) -> Result<Pod, String> {
    let name = |what: &str, text: &str| {
        InterfaceName::new(text).ok_or_else(|| format!("{what}: `{text}` cannot be an interface's name"))
    };
    let interface = name("interface", &allocation.interface)?;
    let parent = match allocation.kind {
        Kind::Eni => None,
        Kind::SubEni => {
            let parent = allocation.parent_interface.as_deref().ok_or_else(|| {
                let id = allocation.parent.as_deref().unwrap_or("none");
                format!(
                    "parent: the allocator does not know the interface of {id}; correct the node's settings there"
                )
            })?;
            Some(name("parent", parent)?)
        }
    };
    let netns = allocation.netns.as_ref().filter(|netns| !netns.is_empty()).map(Into::into);
    // Without a namespace somebody else wires the pod, and names the host's side as we would.
    let host_interface = match &netns {
        Some(_) => None,
        None if parent.is_none() => {
            return Err("netns: an ENI of its own can only be moved to a namespace".to_owned());
        }
        None => Some(wiring::host_interface_name(&allocation.key.container_id, interface.as_str())),
    };
    // Without groups that can be read, or while they change, the VPC decides for the pod, which it does in any case on the wire.
    let groups = match allocation.regrouping {
        true => GroupList::default(),
        false => groups(&allocation.security_groups)
            .inspect_err(|problem| log::warn!("pod {}/{}: {problem}", allocation.namespace, allocation.name))
            .unwrap_or_default(),
    };
    let mac = allocation.mac;
    let pod = Pod {
        uid: allocation.key.uid.clone(),
        namespace: allocation.namespace.clone(),
        name: allocation.name.clone(),
        container_id: allocation.key.container_id.clone(),
        netns,
        interface,
        host_interface: host_interface.as_deref().map(|text| name("host_interface", text)).transpose()?,
        state: State::Active,
        generation: low_half(allocation.generation),
        parent,
        vlan: vlan_id(allocation.vlan.into()).map_err(|problem| format!("vlan: {problem}"))?,
        mac,
        wire_mac: mac,
        ipv4: allocation.addresses.ipv4,
        ipv6: allocation.addresses.ipv6,
        subnet: allocation.subnet.trunc(),
        gateway: allocation.gateway,
        gateway_mac: allocation.gateway_mac,
        gateway_ipv6: allocation.gateway_ipv6,
        mtu: allocation.mtu,
        membership: Membership { groups, revision: allocation.security_groups_revision },
        fast_path: None,
        bandwidth: Bandwidth::default(),
        extras: Extras::default(),
    };
    pod.check(parents).map_err(|(field, what)| format!("{field}: {what}"))?;
    Ok(pod)
}

#[cfg(test)]
mod tests {
    use eniway_ipam::net::{Addresses, Mac};

    use super::*;

    fn allocation() -> Allocation {
        Allocation {
            key: PodKey { uid: "u".to_owned(), container_id: "c".to_owned() },
            namespace: "default".to_owned(),
            name: "a".to_owned(),
            node: "n".to_owned(),
            netns: Some("/run/netns/a".to_owned()),
            interface: "eth0".to_owned(),
            generation: (7 << 32) | 5,
            interface_id: "i".to_owned(),
            vpc_id: "v".to_owned(),
            kind: Kind::SubEni,
            parent: Some("eni-1".to_owned()),
            parent_interface: Some("eth1".to_owned()),
            vlan: 101,
            mac: Mac([2, 0, 0, 0, 0, 1]),
            addresses: Addresses { ipv4: [10, 1, 0, 5].into(), ipv6: None },
            subnet_id: "s".to_owned(),
            subnet: "10.1.0.0/24".parse().unwrap(),
            gateway: [10, 1, 0, 1].into(),
            gateway_mac: Mac([2, 0, 0, 0, 0, 9]),
            subnet_ipv6: None,
            gateway_ipv6: None,
            mtu: 1500,
            security_groups: Vec::new(),
            security_groups_revision: 0,
            regrouping: false,
            is_static: false,
            revision: 9,
        }
    }

    #[test]
    fn an_allocation_becomes_a_pod() {
        let parents = ["eth1".to_owned()];
        let wired = pod(&allocation(), &parents).unwrap();
        assert_eq!((wired.generation, wired.is_wanted()), (5, true));
        assert_eq!(wired.owner(), owner(&allocation().key));
        let lost = pod(&Allocation { vlan: -1, ..allocation() }, &parents).unwrap();
        assert!(!lost.is_wanted());
        let own =
            Allocation { kind: Kind::Eni, vlan: 0, parent: None, parent_interface: None, ..allocation() };
        let own = pod(&own, &parents).unwrap();
        assert!(own.is_exclusive() && own.is_wanted());
        let adopted = pod(&Allocation { netns: None, ..allocation() }, &parents).unwrap();
        let expected = wiring::host_interface_name("c", "eth0");
        assert_eq!(adopted.host_interface.map(|name| name.to_string()), Some(expected));
    }

    #[test]
    fn what_cannot_be_is_named() {
        let parents = ["eth1".to_owned()];
        for (wrong, word) in [
            (Allocation { vlan: 5000, ..allocation() }, "5000"),
            (Allocation { parent_interface: Some("eth7".to_owned()), ..allocation() }, "eth7"),
            (Allocation { parent_interface: None, ..allocation() }, "eni-1"),
            (Allocation { kind: Kind::Eni, netns: None, ..allocation() }, "namespace"),
            (Allocation { gateway: [10, 2, 0, 1].into(), ..allocation() }, "10.2.0.1"),
        ] {
            let reason = pod(&wrong, &parents).unwrap_err();
            assert!(reason.contains(word), "{reason}");
        }
    }
}

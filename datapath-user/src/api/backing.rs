//! Where a new pod's interface comes from, and where it goes back to.

use eniway_agent_api::{self as proto, Mode, Reason};
use eniway_ipam::{
    AddressRequest, AllocateRequest, Allocation, PodKey,
    api::Error,
    rpc::{ClientError, proto::Reason as Refusal},
    vpc::Kind,
};
use tonic::Status;

use crate::{
    attachment::Attachment,
    source::allocator::{Allocators, low_half, owner},
};

/// Where interfaces come from.
#[derive(Clone)]
pub(crate) enum Backing {
    /// The file names the pods that may come.
    File,
    /// An allocator gives them.
    Allocator(Allocators),
}

/// A new interface for a pod: the owner of its record, and the record's generation.
pub(super) async fn allocate(
    allocators: &Allocators,
    node: &str,
    wanted: &Attachment,
    mode: Mode,
) -> Result<(u64, u32), Status> {
    let request = AllocateRequest {
        node: node.to_owned(),
        key: PodKey { uid: wanted.uid.clone(), container_id: wanted.container_id.clone() },
        namespace: wanted.namespace.clone(),
        name: wanted.name.clone(),
        netns: Some(wanted.netns.display().to_string()),
        interface: wanted.interface.to_string(),
        address: AddressRequest::Pool,
        security_groups: None,
        timeout: None,
    };
    let allocation = match allocators.clone() {
        Allocators::Remote(client) => {
            client.allocate(&request, None).await.map_err(|error| remote(&error))?
        }
        Allocators::Embedded(allocator, runtime) => {
            let work = runtime.spawn(async move { allocator.allocate(&request).await });
            work.await.map_err(|_| closed())?.map_err(|error| embedded(&error))?
        }
    };
    let other = match (mode, allocation.kind) {
        (Mode::SubEni, Kind::Eni) => Some(("a sub-ENI", "exclusive ENIs")),
        (Mode::ExclusiveEni, Kind::SubEni) => Some(("an exclusive ENI", "sub-ENIs")),
        _ => None,
    };
    if let Some((asked, has)) = other {
        let message =
            format!("the pod asks for {asked}, and node {node} has {has} by the allocator's settings");
        return Err(proto::status(Reason::Refused, message));
    }
    Ok((owner(&allocation.key), low_half(allocation.generation)))
}

/// Gives back what a sandbox has. Answers with the owners of its records.
pub(super) async fn release(
    allocators: &Allocators,
    node: &str,
    container_id: &str,
    uid: &str,
) -> Result<Vec<u64>, Status> {
    let uid = if uid.is_empty() { container_id } else { uid };
    let key = PodKey { uid: uid.to_owned(), container_id: container_id.to_owned() };
    if release_one(allocators, &key).await? {
        return Ok(vec![owner(&key)]);
    }
    // Runtimes do not always name the pod in the end as they did in the beginning.
    let mut owners = Vec::new();
    for allocation in list(allocators, node).await? {
        if allocation.key.container_id == container_id && release_one(allocators, &allocation.key).await? {
            owners.push(owner(&allocation.key));
        }
    }
    Ok(owners)
}

async fn release_one(allocators: &Allocators, key: &PodKey) -> Result<bool, Status> {
    let released = match allocators.clone() {
        Allocators::Remote(client) => client.release(key, None).await.map_err(|error| remote(&error))?,
        Allocators::Embedded(allocator, runtime) => {
            let key = key.clone();
            let work = runtime.spawn(async move { allocator.release(&key, None).await });
            work.await.map_err(|_| closed())?.map_err(|error| embedded(&error))?
        }
    };
    Ok(released == eniway_ipam::api::Released::Now)
}

/// Container id, interface and uid of all sandboxes that runtimes have brought to this node.
pub(super) async fn brought(
    allocators: &Allocators,
    node: &str,
) -> Result<Vec<(String, String, String)>, Status> {
    // Without a namespace somebody else wires the pod, and takes it away again.
    let brought = list(allocators, node).await?.into_iter().filter(|allocation| allocation.netns.is_some());
    Ok(brought.map(|Allocation { key, interface, .. }| (key.container_id, interface, key.uid)).collect())
}

async fn list(allocators: &Allocators, node: &str) -> Result<Vec<Allocation>, Status> {
    match allocators {
        Allocators::Remote(client) => client.list(Some(node)).await.map_err(|error| remote(&error)),
        Allocators::Embedded(allocator, _) => Ok(allocator.list(Some(node))),
    }
}

fn remote(error: &ClientError) -> Status {
    let later = error.is_away()
        || matches!(
            error.reason(),
            Some(Refusal::TimedOut | Refusal::Store | Refusal::Vpc | Refusal::Internal)
        );
    proto::status(if later { Reason::TryAgain } else { Reason::Refused }, error.to_string())
}

fn embedded(error: &Error) -> Status {
    let later = matches!(error, Error::Closed | Error::TimedOut { .. } | Error::Store(_) | Error::Vpc(_));
    proto::status(if later { Reason::TryAgain } else { Reason::Refused }, error.to_string())
}

fn closed() -> Status {
    embedded(&Error::Closed)
}

//! Between the wire's messages and the allocator's own values.

use std::{fmt::Display, str::FromStr, sync::Arc, time::Duration};

use eniway_policy::model::Groups;
use prost::Message as _;
use tonic::{Code, Status};

use super::proto;
use crate::{
    api::{
        Acknowledgement, AddressRequest, AllocateRequest, Allocation, Confirm, CoolingStatus, Error,
        LeakStatus, PoolStatus, RefusedByAgent, SubnetStatus,
    },
    clock::Instant,
    feed::{AllocationChange, Notice, Position},
    model::{LeakKind, Node, NodeKind, Parent, PodKey, Policy, Subnet},
    net::Addresses,
    vpc::{Kind, VpcError},
};

/// A message that does not say what it must.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Bad(String);

impl From<Bad> for Status {
    fn from(bad: Bad) -> Self {
        error(&Error::Invalid(bad.0))
    }
}

type Result<T> = std::result::Result<T, Bad>;

fn need<T>(value: Option<T>, field: &str) -> Result<T> {
    value.ok_or_else(|| Bad(format!("the message lacks `{field}`")))
}

fn read<T: FromStr<Err: Display>>(text: &str, field: &str) -> Result<T> {
    text.parse().map_err(|error| Bad(format!("`{field}`: `{text}`: {error}")))
}

fn read_some<T: FromStr<Err: Display>>(text: Option<&String>, field: &str) -> Result<Option<T>> {
    text.map(|text| read(text, field)).transpose()
}

fn show<T: Display>(value: Option<T>) -> Option<String> {
    value.map(|value| value.to_string())
}

fn small(value: u32, field: &str) -> Result<u16> {
    value.try_into().map_err(|_| Bad(format!("`{field}`: {value} is above {}", u16::MAX)))
}

pub(super) fn millis(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}

pub(super) fn key(key: &PodKey) -> proto::PodKey {
    proto::PodKey { uid: key.uid.clone(), container_id: key.container_id.clone() }
}

pub(super) fn read_key(key: Option<proto::PodKey>) -> Result<PodKey> {
    let proto::PodKey { uid, container_id } = need(key, "key")?;
    Ok(PodKey { uid, container_id })
}

pub(super) fn allocate_request(request: &AllocateRequest, wait: Option<Duration>) -> proto::AllocateRequest {
    let fixed = match &request.address {
        AddressRequest::Pool => None,
        AddressRequest::Static { ipv4, ipv6, retention } => Some(proto::StaticAddress {
            ipv4: show(*ipv4),
            ipv6: show(*ipv6),
            retention_ms: retention.map(millis),
        }),
    };
    proto::AllocateRequest {
        node: request.node.clone(),
        key: Some(key(&request.key)),
        namespace: request.namespace.clone(),
        name: request.name.clone(),
        netns: request.netns.clone(),
        interface: request.interface.clone(),
        r#static: fixed,
        security_groups: request.security_groups.clone().map(|ids| proto::SecurityGroups { ids }),
        timeout_ms: request.timeout.map(millis),
        wait_for_agent_ms: wait.map(millis),
    }
}

pub(super) fn read_allocate_request(
    request: proto::AllocateRequest,
) -> Result<(AllocateRequest, Option<Duration>)> {
    let address = match request.r#static {
        None => AddressRequest::Pool,
        Some(fixed) => AddressRequest::Static {
            ipv4: read_some(fixed.ipv4.as_ref(), "static.ipv4")?,
            ipv6: read_some(fixed.ipv6.as_ref(), "static.ipv6")?,
            retention: fixed.retention_ms.map(Duration::from_millis),
        },
    };
    let interface = if request.interface.is_empty() { "eth0".to_owned() } else { request.interface };
    let asked = AllocateRequest {
        node: request.node,
        key: read_key(request.key)?,
        namespace: request.namespace,
        name: request.name,
        netns: request.netns,
        interface,
        address,
        security_groups: request.security_groups.map(|groups| groups.ids),
        timeout: request.timeout_ms.map(Duration::from_millis),
    };
    Ok((asked, request.wait_for_agent_ms.map(Duration::from_millis)))
}

pub(super) fn allocation(allocation: &Allocation) -> proto::Allocation {
    proto::Allocation {
        key: Some(key(&allocation.key)),
        namespace: allocation.namespace.clone(),
        name: allocation.name.clone(),
        node: allocation.node.clone(),
        netns: allocation.netns.clone(),
        interface: allocation.interface.clone(),
        generation: allocation.generation,
        interface_id: allocation.interface_id.clone(),
        vpc_id: allocation.vpc_id.clone(),
        kind: kind(allocation.kind).into(),
        parent: allocation.parent.clone(),
        parent_interface: allocation.parent_interface.clone(),
        vlan: allocation.vlan,
        mac: allocation.mac.to_string(),
        ipv4: allocation.addresses.ipv4.to_string(),
        ipv6: show(allocation.addresses.ipv6),
        subnet_id: allocation.subnet_id.clone(),
        subnet: allocation.subnet.to_string(),
        gateway: allocation.gateway.to_string(),
        gateway_mac: allocation.gateway_mac.to_string(),
        subnet_ipv6: show(allocation.subnet_ipv6),
        gateway_ipv6: show(allocation.gateway_ipv6),
        mtu: allocation.mtu.into(),
        security_groups: allocation.security_groups.clone(),
        security_groups_revision: allocation.security_groups_revision,
        regrouping: allocation.regrouping,
        r#static: allocation.is_static,
        revision: allocation.revision,
    }
}

pub(super) fn read_allocation(allocation: proto::Allocation) -> Result<Allocation> {
    let kind = read_kind(allocation.kind())?;
    Ok(Allocation {
        key: read_key(allocation.key)?,
        namespace: allocation.namespace,
        name: allocation.name,
        node: allocation.node,
        netns: allocation.netns,
        interface: allocation.interface,
        generation: allocation.generation,
        interface_id: allocation.interface_id,
        vpc_id: allocation.vpc_id,
        kind,
        parent: allocation.parent,
        parent_interface: allocation.parent_interface,
        vlan: allocation.vlan,
        mac: read(&allocation.mac, "mac")?,
        addresses: Addresses {
            ipv4: read(&allocation.ipv4, "ipv4")?,
            ipv6: read_some(allocation.ipv6.as_ref(), "ipv6")?,
        },
        subnet_id: allocation.subnet_id,
        subnet: read(&allocation.subnet, "subnet")?,
        gateway: read(&allocation.gateway, "gateway")?,
        gateway_mac: read(&allocation.gateway_mac, "gateway_mac")?,
        subnet_ipv6: read_some(allocation.subnet_ipv6.as_ref(), "subnet_ipv6")?,
        gateway_ipv6: read_some(allocation.gateway_ipv6.as_ref(), "gateway_ipv6")?,
        mtu: small(allocation.mtu, "mtu")?,
        security_groups: allocation.security_groups,
        security_groups_revision: allocation.security_groups_revision,
        regrouping: allocation.regrouping,
        is_static: allocation.r#static,
        revision: allocation.revision,
    })
}

fn kind(kind: Kind) -> proto::Kind {
    match kind {
        Kind::SubEni => proto::Kind::SubEni,
        Kind::Eni => proto::Kind::Eni,
    }
}

fn read_kind(kind: proto::Kind) -> Result<Kind> {
    match kind {
        proto::Kind::SubEni => Ok(Kind::SubEni),
        proto::Kind::Eni => Ok(Kind::Eni),
        proto::Kind::Unspecified => Err(Bad("the message lacks `kind`".to_owned())),
    }
}

pub(super) fn notice(notice: &Notice, store: &str) -> proto::WatchResponse {
    use proto::{change, watch_response::What};
    let (revision, confirmed, groups, what) = match notice {
        Notice::Snapshot { revision, confirmed, groups, allocations } => {
            let allocations = allocations.iter().map(|one| allocation(one)).collect();
            (revision, confirmed, Some(groups), What::Snapshot(proto::Snapshot { allocations }))
        }
        Notice::Changes { revision, confirmed, groups, changes } => {
            let change = |one: &AllocationChange| match one {
                AllocationChange::Put(put) => change::What::Put(allocation(put)),
                AllocationChange::Removed { key: gone, generation } => {
                    change::What::Removed(proto::Removed { key: Some(key(gone)), generation: *generation })
                }
            };
            let changes = changes.iter().map(|one| proto::Change { what: Some(change(one)) }).collect();
            (revision, confirmed, groups.as_ref(), What::Changes(proto::Changes { changes }))
        }
    };
    proto::WatchResponse {
        revision: *revision,
        confirmed: *confirmed,
        what: Some(what),
        store: store.to_owned(),
        security_groups: groups.map(|groups| security_groups(groups)),
    }
}

pub(super) fn read_notice(answer: proto::WatchResponse) -> Result<(Notice, Position)> {
    use proto::{change, watch_response::What};
    let proto::WatchResponse { revision, confirmed, what, store, security_groups } = answer;
    let groups =
        security_groups.map(|document| read_security_groups(Some(document))).transpose()?.map(Arc::new);
    let notice = match need(what, "what")? {
        What::Snapshot(proto::Snapshot { allocations }) => {
            let allocations = allocations.into_iter().map(|one| read_allocation(one).map(Into::into));
            // Without any, nothing is judged on the node.
            let groups = groups.unwrap_or_default();
            Notice::Snapshot { revision, confirmed, groups, allocations: allocations.collect::<Result<_>>()? }
        }
        What::Changes(proto::Changes { changes }) => {
            let change = |one: proto::Change| match need(one.what, "change.what")? {
                change::What::Put(put) => Ok(AllocationChange::Put(read_allocation(put)?.into())),
                change::What::Removed(proto::Removed { key, generation }) => {
                    Ok(AllocationChange::Removed { key: read_key(key)?, generation })
                }
            };
            Notice::Changes {
                revision,
                confirmed,
                groups,
                changes: changes.into_iter().map(change).collect::<Result<_>>()?,
            }
        }
    };
    Ok((notice, Position { store, revision }))
}

pub(super) fn security_groups(groups: &Groups) -> proto::SecurityGroupsDocument {
    let document = serde_json::json!({
        "security_groups": groups.security_groups.values().collect::<Vec<_>>(),
        "address_groups": groups.address_groups.values().collect::<Vec<_>>(),
    });
    proto::SecurityGroupsDocument { revision: groups.revision, json: document.to_string() }
}

pub(super) fn read_security_groups(document: Option<proto::SecurityGroupsDocument>) -> Result<Groups> {
    let document = need(document, "document")?;
    let groups: Groups =
        serde_json::from_str(&document.json).map_err(|error| Bad(format!("`security_groups`: {error}")))?;
    // The text may name one too, as what `show --json` prints.
    let revision = if document.revision == 0 { groups.revision } else { document.revision };
    Ok(Groups { revision, ..groups })
}

pub(super) fn acknowledgement(node: &str, acknowledgement: &Acknowledgement) -> proto::AcknowledgeRequest {
    let refused = |refused: &RefusedByAgent| proto::Refused {
        key: Some(key(&refused.key)),
        reason: refused.reason.clone(),
    };
    proto::AcknowledgeRequest {
        node: node.to_owned(),
        revision: acknowledgement.revision,
        refused: acknowledgement.refused.iter().map(refused).collect(),
        store: acknowledgement.store.clone(),
    }
}

pub(super) fn read_acknowledgement(request: proto::AcknowledgeRequest) -> Result<(String, Acknowledgement)> {
    let refused =
        |refused: proto::Refused| Ok(RefusedByAgent { key: read_key(refused.key)?, reason: refused.reason });
    let refused = request.refused.into_iter().map(refused).collect::<Result<_>>()?;
    Ok((request.node, Acknowledgement { store: request.store, revision: request.revision, refused }))
}

fn policy(policy: Policy) -> proto::Policy {
    use proto::policy::Policy as Wire;
    let policy = match policy {
        Policy::PreBound { minimum, maximum } => Wire::PreBound(proto::PreBound { minimum, maximum }),
        Policy::Targets { minimum, maximum, warm, reclaim_above } => {
            Wire::Targets(proto::Targets { minimum, maximum, warm, reclaim_above })
        }
        Policy::OnDemand => Wire::OnDemand(proto::OnDemand {}),
    };
    proto::Policy { policy: Some(policy) }
}

fn read_policy(policy: Option<proto::Policy>) -> Result<Policy> {
    use proto::policy::Policy as Wire;
    Ok(match need(policy.and_then(|policy| policy.policy), "policy")? {
        Wire::PreBound(proto::PreBound { minimum, maximum }) => Policy::PreBound { minimum, maximum },
        Wire::Targets(proto::Targets { minimum, maximum, warm, reclaim_above }) => {
            Policy::Targets { minimum, maximum, warm, reclaim_above }
        }
        Wire::OnDemand(proto::OnDemand {}) => Policy::OnDemand,
    })
}

pub(super) fn pool(pool: &PoolStatus) -> proto::Pool {
    proto::Pool {
        node: pool.node.clone(),
        kind: kind(pool.kind).into(),
        policy: Some(policy(pool.policy)),
        limit: pool.limit,
        pods: pool.pods,
        idle: pool.idle,
        cooling: pool.cooling,
        coming: pool.coming,
        leaving: pool.leaving,
        draining: pool.draining,
        problem: pool.problem.clone(),
        acknowledged: pool.acknowledged,
    }
}

pub(super) fn read_pool(pool: proto::Pool) -> Result<PoolStatus> {
    Ok(PoolStatus {
        kind: read_kind(pool.kind())?,
        node: pool.node,
        policy: read_policy(pool.policy)?,
        limit: pool.limit,
        pods: pool.pods,
        idle: pool.idle,
        cooling: pool.cooling,
        coming: pool.coming,
        leaving: pool.leaving,
        draining: pool.draining,
        problem: pool.problem,
        acknowledged: pool.acknowledged,
    })
}

fn read_addresses(ipv4: Option<&String>, ipv6: Option<&String>) -> Result<Option<Addresses>> {
    let ipv6 = read_some(ipv6, "ipv6")?;
    Ok(read_some(ipv4, "ipv4")?.map(|ipv4| Addresses { ipv4, ipv6 }))
}

pub(super) fn cooling(cooling: &CoolingStatus) -> proto::Cooling {
    proto::Cooling {
        interface_id: cooling.interface_id.clone(),
        node: cooling.node.clone(),
        parent: cooling.parent.clone(),
        vlan: cooling.vlan.map(Into::into),
        ipv4: show(cooling.addresses.map(|addresses| addresses.ipv4)),
        ipv6: show(cooling.addresses.and_then(|addresses| addresses.ipv6)),
        until: cooling.until.0,
        remaining_ms: cooling.remaining_ms,
    }
}

pub(super) fn read_cooling(cooling: proto::Cooling) -> Result<CoolingStatus> {
    Ok(CoolingStatus {
        addresses: read_addresses(cooling.ipv4.as_ref(), cooling.ipv6.as_ref())?,
        interface_id: cooling.interface_id,
        node: cooling.node,
        parent: cooling.parent,
        vlan: cooling.vlan.map(|vlan| small(vlan, "vlan")).transpose()?,
        until: Instant(cooling.until),
        remaining_ms: cooling.remaining_ms,
    })
}

pub(super) fn leak(leak: &LeakStatus) -> proto::Leak {
    let kind = match leak.kind {
        LeakKind::Unowned => proto::LeakKind::Unowned,
        LeakKind::Missing => proto::LeakKind::Missing,
    };
    proto::Leak {
        vpc_id: leak.vpc_id.clone(),
        kind: kind.into(),
        interface_id: leak.interface_id.clone(),
        ipv4: show(leak.addresses.map(|addresses| addresses.ipv4)),
        ipv6: show(leak.addresses.and_then(|addresses| addresses.ipv6)),
        first_seen: leak.first_seen.0,
        sightings: leak.sightings,
        held_back: leak.held_back,
    }
}

pub(super) fn read_leak(leak: proto::Leak) -> Result<LeakStatus> {
    let kind = match leak.kind() {
        proto::LeakKind::Unowned => LeakKind::Unowned,
        proto::LeakKind::Missing => LeakKind::Missing,
        proto::LeakKind::Unspecified => return Err(Bad("the message lacks `kind`".to_owned())),
    };
    Ok(LeakStatus {
        kind,
        addresses: read_addresses(leak.ipv4.as_ref(), leak.ipv6.as_ref())?,
        vpc_id: leak.vpc_id,
        interface_id: leak.interface_id,
        first_seen: Instant(leak.first_seen),
        sightings: leak.sightings,
        held_back: leak.held_back,
    })
}

pub(super) fn subnet_use(subnet: &SubnetStatus) -> proto::SubnetUse {
    proto::SubnetUse {
        id: subnet.id.clone(),
        subnet: subnet.subnet.to_string(),
        available: subnet.available,
        total: subnet.total,
        ours: subnet.ours,
    }
}

pub(super) fn read_subnet_use(subnet: proto::SubnetUse) -> Result<SubnetStatus> {
    Ok(SubnetStatus {
        subnet: read(&subnet.subnet, "subnet")?,
        id: subnet.id,
        available: subnet.available,
        total: subnet.total,
        ours: subnet.ours,
    })
}

pub(super) fn subnet(subnet: &Subnet) -> proto::Subnet {
    proto::Subnet {
        id: subnet.id.clone(),
        ipv4: subnet.ipv4.to_string(),
        gateway: subnet.gateway.to_string(),
        gateway_mac: subnet.gateway_mac.to_string(),
        ipv6: show(subnet.ipv6),
        gateway_ipv6: show(subnet.gateway_ipv6),
        mtu: subnet.mtu.into(),
    }
}

pub(super) fn read_subnet(subnet: Option<proto::Subnet>) -> Result<Subnet> {
    let subnet = need(subnet, "subnet")?;
    Ok(Subnet {
        ipv4: read(&subnet.ipv4, "ipv4")?,
        gateway: read(&subnet.gateway, "gateway")?,
        gateway_mac: read(&subnet.gateway_mac, "gateway_mac")?,
        ipv6: read_some(subnet.ipv6.as_ref(), "ipv6")?,
        gateway_ipv6: read_some(subnet.gateway_ipv6.as_ref(), "gateway_ipv6")?,
        mtu: if subnet.mtu == 0 { 1500 } else { small(subnet.mtu, "mtu")? },
        id: subnet.id,
    })
}

pub(super) fn node(node: &Node) -> proto::Node {
    use proto::node::Kind as Wire;
    let kind = match &node.kind {
        NodeKind::SubEni { parents } => {
            let parent = |Parent { id, interface, limit }: &Parent| proto::Parent {
                id: id.clone(),
                interface: interface.clone(),
                limit: *limit,
            };
            Wire::SubEni(proto::SubEniNode { parents: parents.iter().map(parent).collect() })
        }
        NodeKind::ExclusiveEni { instance, bindable } => {
            Wire::ExclusiveEni(proto::ExclusiveEniNode { instance: instance.clone(), bindable: *bindable })
        }
    };
    proto::Node {
        name: node.name.clone(),
        kind: Some(kind),
        policy: Some(policy(node.policy)),
        dual_stack: node.dual_stack,
        subnets: node.subnets.clone(),
        security_groups: node.security_groups.clone(),
    }
}

pub(super) fn read_node(node: Option<proto::Node>) -> Result<Node> {
    use proto::node::Kind as Wire;
    let node = need(node, "node")?;
    let kind = match need(node.kind, "kind")? {
        Wire::SubEni(proto::SubEniNode { parents }) => {
            let parent = |proto::Parent { id, interface, limit }| Parent { id, interface, limit };
            NodeKind::SubEni { parents: parents.into_iter().map(parent).collect() }
        }
        Wire::ExclusiveEni(proto::ExclusiveEniNode { instance, bindable }) => {
            NodeKind::ExclusiveEni { instance, bindable }
        }
    };
    Ok(Node {
        name: node.name,
        kind,
        policy: read_policy(node.policy)?,
        dual_stack: node.dual_stack,
        subnets: node.subnets,
        security_groups: node.security_groups,
        draining: false,
        confirmed: 0,
    })
}

pub(super) fn confirm(what: &Confirm) -> proto::ConfirmRequest {
    use proto::confirm_request::What;
    let what = match what {
        Confirm::Node(node) => What::Node(node.clone()),
        Confirm::Leaks => What::Leaks(proto::Leaks {}),
    };
    proto::ConfirmRequest { what: Some(what) }
}

pub(super) fn read_confirm(request: proto::ConfirmRequest) -> Result<Confirm> {
    use proto::confirm_request::What;
    Ok(match need(request.what, "what")? {
        What::Node(node) => Confirm::Node(node),
        What::Leaks(proto::Leaks {}) => Confirm::Leaks,
    })
}

/// The allocator's error as a status: code and detail for programs, its own words for people.
pub(super) fn error(error: &Error) -> Status {
    use proto::Reason;
    let (code, reason) = match error {
        Error::Invalid(_) => (Code::InvalidArgument, Reason::Invalid),
        Error::UnknownNode(_) => (Code::NotFound, Reason::UnknownNode),
        Error::Draining(_) => (Code::FailedPrecondition, Reason::Draining),
        Error::NodeFull { .. } => (Code::ResourceExhausted, Reason::NodeFull),
        Error::SubnetsExhausted { .. } => (Code::ResourceExhausted, Reason::SubnetsExhausted),
        Error::SubnetOverlap { .. } => (Code::AlreadyExists, Reason::SubnetOverlap),
        Error::StaticInUse { .. } => (Code::FailedPrecondition, Reason::StaticInUse),
        Error::StaleGeneration { .. } => (Code::FailedPrecondition, Reason::StaleGeneration),
        Error::UnknownPod(_) => (Code::NotFound, Reason::UnknownPod),
        Error::StaleSecurityGroups { .. } => (Code::FailedPrecondition, Reason::StaleSecurityGroups),
        Error::Lost(_) => (Code::DataLoss, Reason::Lost),
        Error::TimedOut { .. } => (Code::DeadlineExceeded, Reason::TimedOut),
        Error::RefusedByAgent { .. } => (Code::Aborted, Reason::RefusedByAgent),
        Error::Vpc(VpcError::QuotaExceeded { .. } | VpcError::SubnetExhausted { .. }) => {
            (Code::ResourceExhausted, Reason::Vpc)
        }
        Error::Vpc(_) => (Code::Aborted, Reason::Vpc),
        Error::Store(crate::store::StoreError::Unavailable { .. }) => (Code::Aborted, Reason::Store),
        Error::Store(_) => (Code::Internal, Reason::Store),
        Error::WrongStep(_) => (Code::Internal, Reason::Internal),
        Error::Closed => (Code::Unavailable, Reason::Closed),
    };
    let detail = proto::ErrorDetail { reason: reason.into() };
    Status::with_details(code, error.to_string(), detail.encode_to_vec().into())
}

/// Which error of the allocator a status is; none when it is not the allocator's.
pub(super) fn reason(status: &Status) -> Option<proto::Reason> {
    let detail = proto::ErrorDetail::decode(status.details()).ok()?;
    Some(detail.reason()).filter(|reason| *reason != proto::Reason::Unspecified)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_keep_their_words_and_their_kind() {
        let full =
            Error::NodeFull { node: "n".to_owned(), limit: 2, pods: 1, cooling: 1, next: String::new() };
        for (one, code, kind) in [
            (Error::UnknownNode("n".to_owned()), Code::NotFound, proto::Reason::UnknownNode),
            (full, Code::ResourceExhausted, proto::Reason::NodeFull),
            (Error::Closed, Code::Unavailable, proto::Reason::Closed),
        ] {
            let status = error(&one);
            assert_eq!((status.code(), status.message()), (code, one.to_string().as_str()));
            assert_eq!(reason(&status), Some(kind));
        }
        assert_eq!(reason(&Status::unavailable("no server")), None);
    }

    #[test]
    fn nodes_and_requests_survive_the_wire() {
        let parents = vec![Parent { id: "eni-1".to_owned(), interface: "eth1".to_owned(), limit: 256 }];
        for (kind, policy) in [
            (NodeKind::SubEni { parents }, Policy::PreBound { minimum: 1, maximum: 4 }),
            (NodeKind::ExclusiveEni { instance: "i".to_owned(), bindable: 3 }, Policy::TARGETS),
        ] {
            let sent = Node {
                name: "n".to_owned(),
                kind,
                policy,
                dual_stack: true,
                subnets: vec!["s".to_owned()],
                security_groups: vec![],
                draining: false,
                confirmed: 0,
            };
            assert_eq!(read_node(Some(node(&sent))), Ok(sent));
        }
        let request = AllocateRequest {
            node: "n".to_owned(),
            key: PodKey { uid: "u".to_owned(), container_id: "c".to_owned() },
            namespace: "default".to_owned(),
            name: "a".to_owned(),
            netns: Some("/run/netns/a".to_owned()),
            interface: "eth0".to_owned(),
            address: AddressRequest::Static {
                ipv4: Some([10, 0, 0, 1].into()),
                ipv6: None,
                retention: Some(Duration::ZERO),
            },
            security_groups: Some(vec![]),
            timeout: None,
        };
        let wait = Some(Duration::from_secs(3));
        assert_eq!(read_allocate_request(allocate_request(&request, wait)), Ok((request, wait)));
    }
}

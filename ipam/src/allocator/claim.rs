//! Giving interfaces to pods and taking them back.

use std::{sync::Arc, time::Duration};

use tokio::sync::oneshot;

use super::{Inner, allocation, groups::group_list, grow::Wanted};
use crate::{
    api::{AddressRequest, AllocateRequest, Allocation, Error, Released},
    clock::Instant,
    model::{Claim, Event, Interface, Next, Node, PodKey, State, StaticAddress, keys},
    net::Addresses,
    store::Transaction,
    view::{Draft, View},
};

/// How an attempt to allocate ended.
enum Attempt {
    /// The pod has its interface.
    Done(Box<Allocation>),
    /// This transaction gives the pod an interface or a claim to one. The interface is reserved until it is through.
    Commit(Transaction, String),
    /// An interface has to change first.
    Wait(oneshot::Receiver<Result<(), Error>>),
    /// A new interface is needed.
    Grow(Box<Wanted>),
    /// This idle interface has to make room.
    Evict(String),
    /// The view says no; the store may know more.
    Absent(String, Error),
}

/// What an allocation is about, with defaults filled in.
struct Ask<'r> {
    request: &'r AllocateRequest,
    deadline: Instant,
    timeout: Error,
    /// `namespace/name`.
    pod: String,
}

impl Inner {
    pub(super) async fn allocate(self: &Arc<Self>, request: &AllocateRequest) -> Result<Allocation, Error> {
        check(request)?;
        let waited = request.timeout.unwrap_or(self.settings.allocate_timeout);
        let ask = Ask {
            request,
            deadline: self.clock.now().after(waited),
            timeout: Error::TimedOut {
                what: format!("the allocation of an interface to {}", request.key),
                waited,
            },
            pod: format!("{}/{}", request.namespace, request.name),
        };
        loop {
            let attempt = {
                let mut view = self.view();
                let attempt = self.attempt(&view, &ask)?;
                if let Attempt::Commit(_, interface) = &attempt {
                    view.reserved.insert(interface.clone());
                }
                attempt
            };
            match attempt {
                Attempt::Done(allocation) => return Ok(*allocation),
                Attempt::Commit(transaction, interface) => {
                    let reservation = Reservation { inner: self, interface: &interface };
                    let done = self.commit(transaction).await?;
                    drop(reservation);
                    if done.is_some() {
                        self.drive(&interface);
                    }
                }
                Attempt::Wait(woken) => woken.await.map_err(|_| Error::Closed)??,
                Attempt::Grow(wanted) => self.grow_claimed(&request.node, &wanted).await?,
                Attempt::Evict(interface) => self.discard(&[interface]).await?,
                Attempt::Absent(key, error) => {
                    if self.really_absent(&key).await? {
                        return Err(error);
                    }
                }
            }
        }
    }

    fn attempt(&self, view: &View, ask: &Ask<'_>) -> Result<Attempt, Error> {
        let AllocateRequest { node: name, key, address, .. } = ask.request;
        if let Some(id) = view.pods.get(key) {
            return self.allocated(view, ask, id);
        }
        let Some(node) = view.nodes.get(name) else {
            return Ok(Attempt::Absent(keys::node(name), Error::UnknownNode(name.clone())));
        };
        if node.draining {
            return Err(Error::Draining(name.clone()));
        }
        if let AddressRequest::Static { ipv4, ipv6, retention } = address {
            let retention = retention.unwrap_or(self.settings.static_retention);
            if ipv4.is_none() && ipv6.is_some() {
                return Err(Error::Invalid(format!(
                    "{}: a fixed IPv6 address needs a fixed IPv4 address: both are on one interface",
                    ask.pod
                )));
            }
            let addresses = ipv4.map(|ipv4| Addresses { ipv4, ipv6: *ipv6 });
            return self.attempt_static(view, ask, node, addresses, retention);
        }
        let groups = ask.request.security_groups.as_ref().unwrap_or(&node.security_groups);
        let suits = |interface: &&Arc<Interface>| {
            interface.claim.is_none()
                && interface.static_for.is_none()
                && interface.security_groups == *groups
                && interface.regroup.is_none()
                && interface.dual_stack == node.dual_stack
                && interface.kind == node.kind.kind()
                && !view.reserved.contains(&interface.id)
        };
        let now = self.clock.now();
        let ready: Vec<_> =
            view.idle_on_node(name).filter(|interface| !interface.is_cooling(now)).filter(suits).collect();
        // Any of them, so that no address is favoured and two allocators seldom want the same one.
        let chosen = fastrand::choice(&ready).copied().or_else(|| {
            view.on_node(name)
                .filter(|interface| matches!(interface.state, State::Creating | State::Attaching))
                .find(suits)
        });
        if let Some(chosen) = chosen {
            return self.claim(view, ask, node, chosen);
        }
        let wanted = Wanted { claim: claim(view, ask), security_groups: groups.clone(), fixed: None };
        self.make_room(view, ask, node, wanted)
    }

    /// The pod has a claim already.
    fn allocated(&self, view: &View, ask: &Ask<'_>, id: &str) -> Result<Attempt, Error> {
        let Some(interface) = view.interfaces.get(id) else {
            // The two records change together; the watch has brought only one of them so far.
            return Ok(self.wait(ask, id));
        };
        if interface.node != ask.request.node {
            return Err(Error::Invalid(format!(
                "{} has an interface on node {}, not on {}; release it first",
                ask.request.key, interface.node, ask.request.node
            )));
        }
        match interface.state {
            State::Lost => Err(Error::Lost(ask.request.key.clone())),
            State::Bound => {
                let revision = view.revision(&keys::interface(id));
                let allocation = allocation(view, interface, revision).ok_or_else(|| {
                    Error::Invalid(format!(
                        "interface {id} of {} is in subnet {}, which is not configured; add the subnet",
                        ask.request.key, interface.subnet
                    ))
                })?;
                Ok(Attempt::Done(Box::new(allocation)))
            }
            _ => Ok(self.wait(ask, id)),
        }
    }

    fn wait(&self, ask: &Ask<'_>, id: &str) -> Attempt {
        Attempt::Wait(self.wait_for(id, ask.deadline, ask.timeout.clone()))
    }

    /// Takes an idle interface, or one that is on its way.
    fn claim(
        &self,
        view: &View,
        ask: &Ask<'_>,
        node: &Node,
        chosen: &Arc<Interface>,
    ) -> Result<Attempt, Error> {
        let mut interface = Interface::clone(chosen);
        if interface.state == State::Idle
            && let Next::To(state) = interface.next(Event::Claim)?
        {
            interface.state = state;
            interface.since = self.clock.now();
        }
        interface.claim = Some(claim(view, ask));
        let mut draft = Draft::new(view);
        draft.guard(&keys::node(&node.name));
        draft.put_interface(&interface)?;
        draft.put(keys::pod(&ask.request.key), &interface.id)?;
        Ok(Attempt::Commit(draft.build(), interface.id))
    }

    /// Nothing suitable is there: a new interface if there is room, else the place of an idle one.
    fn make_room(&self, view: &View, ask: &Ask<'_>, node: &Node, wanted: Wanted) -> Result<Attempt, Error> {
        let now = self.clock.now();
        let limit = node.kind.limit();
        let counts = view.counts(&node.name, now);
        if counts.room(limit) > 0 {
            return Ok(Attempt::Grow(Box::new(wanted)));
        }
        // One that leaves, or comes for the pool, is waited for before another one is given up.
        let on_its_way = |interface: &&Arc<Interface>| match interface.state {
            State::Detaching | State::Deleting => true,
            State::Creating | State::Attaching => interface.claim.is_none(),
            _ => view.reserved.contains(&interface.id),
        };
        if let Some(interface) = view.on_node(&node.name).find(on_its_way) {
            return Ok(self.wait(ask, &interface.id));
        }
        if let Some(interface) = view.idle_on_node(&node.name).find(|interface| !interface.is_cooling(now)) {
            return Ok(Attempt::Evict(interface.id.clone()));
        }
        let next = view
            .cooling(now)
            .find(|interface| interface.node == node.name)
            .map(|next| format!(" (the next one for {:?})", now.until(next.available_at)));
        Err(Error::NodeFull {
            node: node.name.clone(),
            limit,
            pods: counts.pods,
            cooling: counts.cooling,
            next: next.unwrap_or_default(),
        })
    }

    fn attempt_static(
        &self,
        view: &View,
        ask: &Ask<'_>,
        node: &Node,
        addresses: Option<Addresses>,
        retention: Duration,
    ) -> Result<Attempt, Error> {
        let Some(kept) = view.statics.get(&ask.pod) else {
            let groups = ask.request.security_groups.clone().unwrap_or_else(|| node.security_groups.clone());
            let fixed = Some((ask.pod.clone(), retention, addresses));
            let wanted = Wanted { claim: claim(view, ask), security_groups: groups, fixed };
            return self.make_room(view, ask, node, wanted);
        };
        let Some(interface) = view.interfaces.get(&kept.interface) else {
            return Ok(self.wait(ask, &kept.interface));
        };
        if let (Some(asked), Some(present)) = (addresses, interface.addresses)
            && (asked.ipv4 != present.ipv4 || asked.ipv6.is_some() && asked.ipv6 != present.ipv6)
        {
            return Err(Error::Invalid(format!(
                "{} keeps the address {present} and asks for {asked}; delete the pod and wait until the address is no longer kept",
                ask.pod
            )));
        }
        let mut interface = Interface::clone(interface);
        if let Some(holder) = &interface.claim {
            // The same pod with a new sandbox takes its own interface over; anyone else must wait for its release.
            if holder.key.uid != ask.request.key.uid || interface.node != node.name {
                return Err(Error::StaticInUse {
                    pod: ask.pod.clone(),
                    uid: holder.key.uid.clone(),
                    node: interface.node.clone(),
                });
            }
            let mut draft = Draft::new(view);
            draft.guard(&keys::node(&node.name));
            draft.delete(keys::pod(&holder.key));
            return self.hold_static(view, ask, draft, interface, retention);
        }
        match interface.state {
            State::Unbound if interface.kind != node.kind.kind() => Err(Error::Invalid(format!(
                "the static address of {} is on another kind of interface than node {} uses",
                ask.pod, node.name
            ))),
            State::Unbound => {
                let Some((parent, vlan, pool)) = self.place(view, node) else {
                    let wanted = Wanted { claim: claim(view, ask), security_groups: Vec::new(), fixed: None };
                    return match self.make_room(view, ask, node, wanted)? {
                        // The node as a whole has room, but no parent has: too many interfaces of one that shrank.
                        Attempt::Grow(_) => Err(Error::NodeFull {
                            node: node.name.clone(),
                            limit: node.kind.limit(),
                            pods: view.counts(&node.name, self.clock.now()).pods,
                            cooling: 0,
                            next: String::new(),
                        }),
                        other => Ok(other),
                    };
                };
                if let Next::To(state) = interface.next(Event::Claim)? {
                    interface.state = state;
                }
                interface.node.clone_from(&node.name);
                interface.parent = Some(parent);
                interface.vlan = vlan;
                interface.by.clone_from(&self.settings.name);
                let mut draft = Draft::new(view);
                draft.guard(&keys::node(&node.name));
                draft.put(keys::pool(&node.name), &pool)?;
                self.hold_static(view, ask, draft, interface, retention)
            }
            State::Creating | State::Attaching if interface.node == node.name => {
                let mut draft = Draft::new(view);
                draft.guard(&keys::node(&node.name));
                self.hold_static(view, ask, draft, interface, retention)
            }
            // On its way to being free, or to being gone.
            _ => Ok(self.wait(ask, &interface.id)),
        }
    }

    fn hold_static(
        &self,
        view: &View,
        ask: &Ask<'_>,
        mut draft: Draft<'_>,
        mut interface: Interface,
        retention: Duration,
    ) -> Result<Attempt, Error> {
        interface.since = self.clock.now();
        interface.claim = Some(claim(view, ask));
        draft.put_interface(&interface)?;
        let kept = StaticAddress { interface: interface.id.clone(), retention, released: None };
        draft.put(keys::static_address(&ask.pod), &kept)?;
        draft.put(keys::pod(&ask.request.key), &interface.id)?;
        Ok(Attempt::Commit(draft.build(), interface.id))
    }

    pub(super) async fn release(
        self: &Arc<Self>,
        key: &PodKey,
        generation: Option<u64>,
    ) -> Result<Released, Error> {
        loop {
            let drafted = {
                let view = self.view();
                match view.pods.get(key) {
                    None => None,
                    Some(id) => match view.interfaces.get(id) {
                        // The two records change together; the watch has brought only one of them so far.
                        None => None,
                        Some(interface) => {
                            Some((self.draft_release(&view, interface, key, generation)?, id.clone()))
                        }
                    },
                }
            };
            let Some((transaction, interface)) = drafted else {
                if self.really_absent(&keys::pod(key)).await? {
                    return Ok(Released::NotAllocated);
                }
                tokio::task::yield_now().await;
                continue;
            };
            if self.commit(transaction).await?.is_some() {
                self.drive(&interface);
                return Ok(Released::Now);
            }
        }
    }

    fn draft_release(
        &self,
        view: &View,
        interface: &Interface,
        key: &PodKey,
        generation: Option<u64>,
    ) -> Result<Transaction, Error> {
        let current = interface.claim.as_ref().map_or(0, |claim| claim.generation);
        if let Some(asked) = generation
            && asked != current
        {
            return Err(Error::StaleGeneration { key: key.clone(), asked, current });
        }
        let now = self.clock.now();
        let mut draft = Draft::new(view);
        draft.delete(keys::pod(key));
        let mut released = Interface { claim: None, ..interface.clone() };
        if matches!(interface.state, State::Bound | State::Lost) {
            match interface.next(Event::Release)? {
                Next::Gone => {
                    remove(view, &mut draft, interface);
                    return Ok(draft.build());
                }
                Next::To(state) => {
                    released.state = state;
                    released.since = now;
                    released.by.clone_from(&self.settings.name);
                }
            }
        }
        match released.state {
            State::Idle => released.available_at = now.after(self.settings.cool_down),
            State::Detaching => rest_vlan(&mut draft, interface, now.after(self.settings.cool_down))?,
            _ => {}
        }
        if let Some(pod) = &interface.static_for
            && let Some(kept) = view.statics.get(pod)
        {
            draft.put(keys::static_address(pod), &StaticAddress { released: Some(now), ..kept.clone() })?;
        }
        draft.put_interface(&released)?;
        Ok(draft.build())
    }
}

/// The VLAN of an interface that leaves its node must not be used at once.
pub(super) fn rest_vlan(draft: &mut Draft<'_>, interface: &Interface, until: Instant) -> Result<(), Error> {
    if let (Some(parent), Some(vlan)) = (&interface.parent, interface.vlan) {
        draft.put(keys::vlan(parent, vlan), &until)?;
    }
    Ok(())
}

/// The record of an interface goes, and with it what it alone carried.
pub(super) fn remove(view: &View, draft: &mut Draft<'_>, interface: &Interface) {
    draft.delete(keys::interface(&interface.id));
    if let Some(pod) = &interface.static_for
        && view.statics.get(pod).is_some_and(|kept| kept.interface == interface.id)
    {
        draft.delete(keys::static_address(pod));
    }
}

fn claim(view: &View, ask: &Ask<'_>) -> Claim {
    let AllocateRequest { key, namespace, name, netns, interface, .. } = ask.request;
    Claim {
        key: key.clone(),
        namespace: namespace.clone(),
        name: name.clone(),
        netns: netns.clone(),
        interface: interface.clone(),
        generation: view.latest + 1,
        security_groups_revision: view.groups.revision,
    }
}

fn check(request: &AllocateRequest) -> Result<(), Error> {
    let PodKey { uid, container_id } = &request.key;
    let wrong = |what: &str, value: &str| Err(Error::Invalid(format!("`{value}` is not {what}")));
    if uid.is_empty() || uid.contains('/') {
        return wrong("a pod uid: it must not be empty or contain `/`", uid);
    }
    if container_id.is_empty() {
        return wrong("a container id: it must not be empty", container_id);
    }
    for part in [&request.namespace, &request.name] {
        if part.is_empty() || part.contains('/') {
            return wrong("a namespace or name of a pod: it must not be empty or contain `/`", part);
        }
    }
    if let Some(ids) = &request.security_groups {
        group_list(ids)?;
    }
    Ok(())
}

/// An interface that this process is about to give to a pod: others look elsewhere in the meantime.
struct Reservation<'i> {
    inner: &'i Inner,
    interface: &'i str,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.inner.view().reserved.remove(self.interface);
        self.inner.wake(self.interface);
    }
}

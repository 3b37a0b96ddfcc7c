//! The VPC calls of intents. A call is made until its outcome is certain; then the next step is written.

use std::{sync::Arc, time::Duration};

use super::{Inner, Problem, Retry, claim::remove, lock};
use crate::{
    api::Error,
    model::{Event, Interface, Next, State, StaticAddress, keys},
    net::Addresses,
    view::{Draft, View},
    vpc::{Attachment, CreateInterface, Kind, VpcError, VpcInterface, WantIpv6},
};

/// What a call led to.
pub(super) enum Outcome {
    /// The next state is written; it may be an intent again.
    Stepped,
    /// Someone else has changed the record; look again.
    Overtaken,
    /// Try again later.
    Retry(Error),
    /// Refused for good, the record says so; who waits gets this.
    Refused(Error),
}

impl Inner {
    /// Carries out the intent of an interface in the background, if it has one and no task of ours does so already.
    pub(super) fn drive(self: &Arc<Self>, id: &str) {
        if !self.view().intents.contains(id) || !lock(&self.driven).insert(id.to_owned()) {
            return;
        }
        let inner = self.clone();
        let id = id.to_owned();
        self.spawn(async move { inner.carry_out(&id).await });
    }

    async fn carry_out(self: &Arc<Self>, id: &str) {
        let mut refusal = None;
        loop {
            let current = self.view().interfaces.get(id).cloned();
            let Some(interface) = current.filter(|interface| interface.is_intent()) else { break };
            if interface.by != self.settings.name {
                break;
            }
            let outcome = match self.calls.acquire().await {
                Ok(_permit) => self.step(&interface).await.unwrap_or_else(Outcome::Retry),
                Err(_) => break,
            };
            match outcome {
                Outcome::Stepped => {
                    lock(&self.retries).remove(id);
                    self.problem_is_over(&interface.node);
                }
                Outcome::Overtaken => {}
                Outcome::Refused(error) => {
                    lock(&self.retries).remove(id);
                    log::warn!("interface {id} on node {}: {error}", interface.node);
                    self.note_problem(&interface.node, &error, self.settings.refused_pause);
                    refusal = Some(error);
                }
                Outcome::Retry(error) => {
                    let pause = self.schedule_retry(id);
                    log::info!("interface {id} on node {}: {error}; next try in {pause:?}", interface.node);
                    self.note_problem(&interface.node, &error, Duration::ZERO);
                    break;
                }
            }
        }
        lock(&self.driven).remove(id);
        let present = self.view().interfaces.get(id).cloned();
        match (refusal, present) {
            (Some(error), _) => self.answer(id, &Err(error)),
            (None, None) => self.answer(id, &Ok(())),
            // A new intent was written after the loop had ended.
            (None, Some(interface))
                if interface.is_intent()
                    && interface.by == self.settings.name
                    && !lock(&self.retries).contains_key(id) =>
            {
                self.drive(id);
            }
            _ => {}
        }
        self.idle.notify_waiters();
    }

    async fn step(self: &Arc<Self>, interface: &Interface) -> Result<Outcome, Error> {
        match interface.state {
            State::Creating => self.create(interface).await,
            State::Attaching => self.attach(interface).await,
            State::Detaching => self.detach(interface).await,
            State::Deleting => self.delete(interface).await,
            State::Idle | State::Bound | State::Unbound => self.regroup(interface).await,
            State::Lost => Ok(Outcome::Overtaken),
        }
    }

    async fn create(self: &Arc<Self>, interface: &Interface) -> Result<Outcome, Error> {
        let parent = match (interface.kind, &interface.parent, interface.vlan) {
            (Kind::SubEni, Some(parent), Some(vlan)) => Some((parent.clone(), vlan)),
            _ => None,
        };
        let wanted = interface.addresses;
        let request = CreateInterface {
            token: interface.token.clone(),
            name: interface.id.clone(),
            owner: self.settings.owner.clone(),
            parent,
            subnet: interface.subnet.clone(),
            ipv4: wanted.map(|addresses| addresses.ipv4),
            ipv6: match wanted.and_then(|addresses| addresses.ipv6) {
                Some(ipv6) => WantIpv6::Exactly(ipv6),
                None if interface.dual_stack => WantIpv6::Any,
                None => WantIpv6::No,
            },
            security_groups: interface.security_groups.clone(),
        };
        match self.vpc.create(request).await {
            Ok(created) => self.created(interface, &created).await,
            Err(error) if error.is_transient() => Ok(Outcome::Retry(error.into())),
            Err(VpcError::SubnetExhausted { subnet }) => {
                self.subnet_is_full(&subnet);
                self.create_elsewhere(interface).await
            }
            Err(VpcError::VlanTaken { .. }) => self.create_elsewhere(interface).await,
            Err(error) => self.refused(interface, error.into()).await,
        }
    }

    async fn created(
        self: &Arc<Self>,
        interface: &Interface,
        created: &VpcInterface,
    ) -> Result<Outcome, Error> {
        let VpcInterface { id: vpc_id, mac, addresses, .. } = created;
        let done = self
            .change(interface, |view, current, draft| {
                let mut next = Interface {
                    vpc_id: Some(vpc_id.clone()),
                    mac: Some(*mac),
                    addresses: Some(*addresses),
                    ..current.clone()
                };
                let problem = unusable(view, current, addresses);
                let event = if problem.is_none() { Event::Done } else { Event::Unusable };
                if problem.is_some() {
                    self.drop_claim(view, draft, &mut next)?;
                    // The record no longer stands for the address; it only remains to be deleted.
                    if let Some(pod) = next.static_for.take() {
                        draft.delete(keys::static_address(&pod));
                    }
                }
                self.put_next(view, draft, current, next, event)?;
                Ok(problem)
            })
            .await?;
        Ok(match done {
            None => Outcome::Overtaken,
            Some(None) => Outcome::Stepped,
            Some(Some(problem)) => Outcome::Refused(problem),
        })
    }

    /// The call had no effect and can have none: the same interface with another subnet or VLAN, under a new token.
    async fn create_elsewhere(self: &Arc<Self>, interface: &Interface) -> Result<Outcome, Error> {
        let mut failure = None;
        let done = self
            .change(interface, |view, current, draft| {
                let Some(node) = view.nodes.get(&current.node) else { return Ok(()) };
                let address = current.addresses.map(|addresses| addresses.ipv4);
                let mut next = current.clone();
                match self.choose_subnet(view, node, address) {
                    Ok(subnet) => next.subnet.clone_from(&subnet.id),
                    Err(error) => {
                        failure = Some(error);
                        draft.guard(&keys::interface(&current.id));
                        return Ok(());
                    }
                }
                if let Some((parent, vlan, pool)) = self.place(view, node) {
                    next.parent = Some(parent);
                    next.vlan = vlan;
                    draft.put(keys::pool(&node.name), &pool)?;
                }
                let attempt =
                    current.token.rsplit_once('-').and_then(|(_, number)| number.parse::<u32>().ok());
                next.token = format!("{}-{}", current.id, attempt.unwrap_or(1) + 1);
                draft.put_interface(&next)?;
                Ok(())
            })
            .await?;
        match (done, failure) {
            (None, _) => Ok(Outcome::Overtaken),
            (Some(()), None) => Ok(Outcome::Stepped),
            (Some(()), Some(error)) => {
                self.refresh_usage_soon();
                self.refused(interface, error).await
            }
        }
    }

    async fn attach(self: &Arc<Self>, interface: &Interface) -> Result<Outcome, Error> {
        let (Some(vpc_id), Some(parent)) = (&interface.vpc_id, &interface.parent) else {
            return self
                .refused(interface, Error::Invalid("the record of an interface is incomplete".to_owned()))
                .await;
        };
        let to = match interface.vlan {
            Some(vlan) => Attachment::Parent { id: parent.clone(), vlan },
            None => Attachment::Instance { id: parent.clone() },
        };
        match self.vpc.attach(vpc_id, to).await {
            Ok(_) => {
                let stepped = self
                    .change(interface, |view, current, draft| {
                        self.put_next(view, draft, current, current.clone(), Event::Done)
                    })
                    .await?;
                Ok(stepped.map_or(Outcome::Overtaken, |()| Outcome::Stepped))
            }
            Err(error) if error.is_transient() => Ok(Outcome::Retry(error.into())),
            Err(error) => self.refused(interface, error.into()).await,
        }
    }

    async fn detach(self: &Arc<Self>, interface: &Interface) -> Result<Outcome, Error> {
        let vpc_id = interface.vpc_id.as_deref().unwrap_or_default();
        match self.vpc.detach(vpc_id).await {
            Ok(()) | Err(VpcError::NotFound { .. }) => {
                let stepped = self
                    .change(interface, |view, current, draft| {
                        let next = Interface { parent: None, vlan: None, ..current.clone() };
                        self.put_next(view, draft, current, next, Event::Done)
                    })
                    .await?;
                Ok(stepped.map_or(Outcome::Overtaken, |()| Outcome::Stepped))
            }
            Err(error) => Ok(Outcome::Retry(error.into())),
        }
    }

    async fn delete(self: &Arc<Self>, interface: &Interface) -> Result<Outcome, Error> {
        let vpc_id = interface.vpc_id.as_deref().unwrap_or_default();
        match self.delete_at_vpc(vpc_id).await {
            Ok(()) => {
                let stepped = self
                    .change(interface, |view, current, draft| {
                        self.put_next(view, draft, current, current.clone(), Event::Done)
                    })
                    .await?;
                self.address_is_free(&interface.subnet);
                Ok(stepped.map_or(Outcome::Overtaken, |()| Outcome::Stepped))
            }
            Err(error) => Ok(Outcome::Retry(error.into())),
        }
    }

    /// Deletes an interface, detaching it first if the VPC insists. Not being there is success.
    pub(super) async fn delete_at_vpc(&self, vpc_id: &str) -> Result<(), VpcError> {
        match self.vpc.delete(vpc_id).await {
            Ok(()) | Err(VpcError::NotFound { .. }) => Ok(()),
            Err(VpcError::Conflict { .. }) => match self.vpc.detach(vpc_id).await {
                Ok(()) => self.vpc.delete(vpc_id).await,
                Err(VpcError::NotFound { .. }) => Ok(()),
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    async fn refused(self: &Arc<Self>, interface: &Interface, error: Error) -> Result<Outcome, Error> {
        let done = self
            .change(interface, |view, current, draft| {
                let mut next = current.clone();
                self.drop_claim(view, draft, &mut next)?;
                if current.static_for.is_some() && current.state == State::Attaching {
                    next.parent = None;
                    next.vlan = None;
                }
                self.put_next(view, draft, current, next, Event::Refused)
            })
            .await?;
        Ok(done.map_or(Outcome::Overtaken, |()| Outcome::Refused(error)))
    }

    /// The pod that waits for the interface does not get it.
    fn drop_claim(&self, view: &View, draft: &mut Draft<'_>, interface: &mut Interface) -> Result<(), Error> {
        if let Some(claim) = interface.claim.take() {
            draft.delete(keys::pod(&claim.key));
        }
        if let Some(pod) = &interface.static_for
            && let Some(kept) = view.statics.get(pod)
            && kept.released.is_none()
        {
            let kept = StaticAddress { released: Some(self.clock.now()), ..kept.clone() };
            draft.put(keys::static_address(pod), &kept)?;
        }
        Ok(())
    }

    /// Writes `next` in the state that follows from `event`.
    fn put_next(
        &self,
        view: &View,
        draft: &mut Draft<'_>,
        current: &Interface,
        mut next: Interface,
        event: Event,
    ) -> Result<(), Error> {
        match current.next(event)? {
            Next::Gone => remove(view, draft, current),
            Next::To(state) => {
                next.state = state;
                next.since = self.clock.now();
                next.by = if next.is_intent() { self.settings.name.clone() } else { String::new() };
                draft.put_interface(&next)?;
            }
        }
        Ok(())
    }

    /// Changes an interface as long as it still is in the intent that `seen` shows. None when it is not.
    pub(super) async fn change<T>(
        &self,
        seen: &Interface,
        mut edit: impl FnMut(&View, &Interface, &mut Draft<'_>) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        loop {
            let (transaction, result) = {
                let view = self.view();
                let Some(current) = view.interfaces.get(&seen.id) else { return Ok(None) };
                let same = current.state == seen.state
                    && current.token == seen.token
                    && current.parent == seen.parent
                    && current.vlan == seen.vlan
                    && current.regroup == seen.regroup;
                if !same {
                    return Ok(None);
                }
                let mut draft = Draft::new(&view);
                let result = edit(&view, current, &mut draft)?;
                (draft.build(), result)
            };
            if self.commit(transaction).await?.is_some() {
                return Ok(Some(result));
            }
        }
    }

    fn schedule_retry(&self, id: &str) -> Duration {
        let mut retries = lock(&self.retries);
        let attempts = retries.get(id).map_or(0, |retry| retry.attempts);
        let (from, to) = (self.settings.retry_from, self.settings.retry_to);
        // Half of the pause is random, so that failed calls do not come back all at once.
        let pause = from.saturating_mul(1 << attempts.min(16)).min(to).mul_f64(0.5 + fastrand::f64() / 2.0);
        let at = self.clock.now().after(pause);
        retries.insert(id.to_owned(), Retry { attempts: attempts + 1, at });
        pause
    }

    pub(super) fn note_problem(&self, node: &str, error: &Error, pause: Duration) {
        let quiet_until = self.clock.now().after(pause);
        lock(&self.problems).insert(node.to_owned(), Problem { text: error.to_string(), quiet_until });
    }

    fn problem_is_over(&self, node: &str) {
        let now = self.clock.now();
        let mut problems = lock(&self.problems);
        if problems.get(node).is_some_and(|problem| problem.quiet_until <= now) {
            problems.remove(node);
        }
    }
}

/// Why a created interface cannot be used, if so.
fn unusable(view: &View, interface: &Interface, addresses: &Addresses) -> Option<Error> {
    let other = view.with_address(addresses.ipv4).filter(|other| other.id != interface.id);
    if let Some(other) = other {
        return Some(Error::Invalid(format!(
            "the VPC gave {addresses} to a new interface, but interface {} ({:?}) has that address in our records; \
             the next leak scan will tell which is wrong",
            other.id, other.state
        )));
    }
    if interface.dual_stack && addresses.ipv6.is_none() {
        return Some(Error::Invalid(format!(
            "subnet {} gave an interface without IPv6 to a dual-stack node; enable IPv6 on it or take it from the node",
            interface.subnet
        )));
    }
    None
}

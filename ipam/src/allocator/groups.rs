//! Security groups: the document of all of them, and which of them a pod has.

use std::{sync::Arc, time::Duration};

use eniway_policy::model::{GroupId, GroupList, Groups, Invalid};

use super::{Inner, allocation, drive::Outcome};
use crate::{
    api::{Allocation, Error, SecurityGroupsPut},
    model::{Claim, Interface, PodKey, State, keys},
    view::Draft,
};

/// The most that the document may take, in bytes of JSON: a record of etcd holds 1.5 MiB with everything around it.
const MAX_DOCUMENT: usize = 1 << 20;

impl Inner {
    /// Puts the document in place of what is there. One that names a revision replaces that revision only.
    pub(super) async fn put_security_groups(&self, groups: Groups) -> Result<SecurityGroupsPut, Error> {
        let asked = groups.revision;
        let groups = Groups { revision: 0, ..groups };
        let size = serde_json::to_vec(&groups).map_or(usize::MAX, |text| text.len());
        if size > MAX_DOCUMENT {
            return Err(Error::Invalid(format!(
                "the security groups take {size} bytes as JSON, and at most {MAX_DOCUMENT} can be kept; \
                 use address groups or fewer rules"
            )));
        }
        loop {
            // Decided on a view that may be behind: it holds only if the store agrees.
            let (transaction, decided) = {
                let view = self.view();
                let known = view.groups.revision;
                let mut draft = Draft::new(&view);
                let decided = if *view.groups == (Groups { revision: known, ..groups.clone() }) {
                    Some(Ok(SecurityGroupsPut { revision: known, changed: false }))
                } else if asked != 0 && asked != known {
                    Some(Err(Error::StaleSecurityGroups { asked, current: known }))
                } else {
                    None
                };
                match decided {
                    Some(_) => draft.guard(keys::SECURITY_GROUPS),
                    None => draft.put(keys::SECURITY_GROUPS.to_owned(), &groups)?,
                }
                (draft.build(), decided)
            };
            if let Some(revision) = self.commit(transaction).await? {
                return decided.unwrap_or(Ok(SecurityGroupsPut { revision, changed: true }));
            }
        }
    }

    /// Gives a pod other security groups, at the VPC and then everywhere. Returns when the VPC has them.
    pub(super) async fn set_security_groups(
        self: &Arc<Self>,
        key: &PodKey,
        ids: &[String],
        timeout: Option<Duration>,
    ) -> Result<Allocation, Error> {
        if group_list(ids)?.is_empty() {
            return Err(Error::Invalid(format!("{key}: a pod has at least one security group")));
        }
        let waited = timeout.unwrap_or(self.settings.allocate_timeout);
        let deadline = self.clock.now().after(waited);
        let late = Error::TimedOut { what: format!("the change of the security groups of {key}"), waited };
        let mut asked = false;
        loop {
            let step = {
                let view = self.view();
                match view.pods.get(key).and_then(|id| view.interfaces.get(id)) {
                    None => Step::Absent,
                    Some(interface) if interface.state == State::Lost => {
                        return Err(Error::Lost(key.clone()));
                    }
                    Some(interface) if interface.state != State::Bound || interface.regroup.is_some() => {
                        Step::Wait(interface.id.clone(), self.wait_for(&interface.id, deadline, late.clone()))
                    }
                    Some(interface) if interface.security_groups == ids => {
                        let revision = view.revision(&keys::interface(&interface.id));
                        let allocated = allocation(&view, interface, revision);
                        return allocated.ok_or_else(|| {
                            Error::Invalid(format!(
                                "interface {} of {key} is in subnet {}, which is not configured; add the subnet",
                                interface.id, interface.subnet
                            ))
                        });
                    }
                    Some(_) if asked => {
                        return Err(Error::Invalid(format!(
                            "the VPC has refused the security groups of {key}, or somebody has changed them since; \
                             `eniway ipam pools` shows what the VPC said last"
                        )));
                    }
                    Some(interface) => {
                        let mut draft = Draft::new(&view);
                        // The revision below is that of the rules that are there, or nothing happens.
                        draft.guard(keys::SECURITY_GROUPS);
                        draft.put_interface(&Interface {
                            regroup: Some(ids.to_vec()),
                            claim: interface.claim.clone().map(|claim| Claim {
                                security_groups_revision: view.groups.revision,
                                ..claim
                            }),
                            by: self.settings.name.clone(),
                            since: self.clock.now(),
                            ..Interface::clone(interface)
                        })?;
                        Step::Commit(draft.build())
                    }
                }
            };
            match step {
                Step::Absent => {
                    if self.really_absent(&keys::pod(key)).await? {
                        return Err(Error::UnknownPod(key.clone()));
                    }
                    tokio::task::yield_now().await;
                }
                Step::Commit(transaction) => asked |= self.commit(transaction).await?.is_some(),
                Step::Wait(interface, woken) => {
                    // Only now: whoever waits shall hear why the VPC refuses.
                    self.drive(&interface);
                    woken.await.map_err(|_| Error::Closed)??;
                }
            }
        }
    }

    /// The call of [`Interface::regroup`].
    pub(super) async fn regroup(self: &Arc<Self>, interface: &Interface) -> Result<Outcome, Error> {
        let (Some(vpc_id), Some(groups)) = (&interface.vpc_id, &interface.regroup) else {
            return Ok(Outcome::Overtaken);
        };
        let refusal = match self.vpc.set_security_groups(vpc_id, groups).await {
            Ok(()) => None,
            // That it is gone is for the comparison with the VPC's list to find.
            Err(error @ crate::vpc::VpcError::NotFound { .. }) => return Ok(Outcome::Retry(error.into())),
            Err(error) if error.is_transient() => return Ok(Outcome::Retry(error.into())),
            Err(error) => Some(Error::from(error)),
        };
        if let Some(refusal) = &refusal {
            self.answer(&interface.id, &Err(refusal.clone()));
        }
        let done = self
            .change(interface, |_, current, draft| {
                let security_groups = match refusal {
                    None => groups.clone(),
                    Some(_) => current.security_groups.clone(),
                };
                let by = if current.state.is_intent() { current.by.clone() } else { String::new() };
                Ok(draft.put_interface(&Interface {
                    security_groups,
                    regroup: None,
                    by,
                    ..current.clone()
                })?)
            })
            .await?;
        Ok(match (done, refusal) {
            (None, _) => Outcome::Overtaken,
            (Some(()), None) => Outcome::Stepped,
            (Some(()), Some(refusal)) => Outcome::Refused(refusal),
        })
    }
}

/// What comes next in giving a pod other groups.
enum Step {
    /// The view knows no such pod; the store may.
    Absent,
    /// An interface has to change first.
    Wait(String, tokio::sync::oneshot::Receiver<Result<(), Error>>),
    /// This writes down what is to be done.
    Commit(crate::store::Transaction),
}

/// The ids of a pod's groups: what the rest of the system can understand.
pub(super) fn group_list(ids: &[String]) -> Result<GroupList, Error> {
    let wrong = |invalid: Invalid| Error::Invalid(format!("security groups: {invalid}"));
    let ids = ids.iter().map(|id| id.parse()).collect::<Result<Vec<GroupId>, _>>().map_err(wrong)?;
    ids.try_into().map_err(wrong)
}

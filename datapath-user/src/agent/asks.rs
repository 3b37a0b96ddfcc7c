//! What the local API asks of the agent, and the answers.

use std::{collections::BTreeSet, rc::Rc};

use tokio::sync::oneshot;

use super::{Agent, Feed, exclusive::is_exclusive};
use crate::{
    attachment::Attachment,
    audit::Target,
    net,
    source::{Desired, Pod, Snapshot},
    tables::Index,
};

/// A question to the agent.
pub(crate) enum Ask {
    /// Keep what a runtime asked for. Where pods come from a file, the pod's owner and generation are the answer.
    Attach(Box<Attachment>, Answer<Result<Option<(u64, u32)>, Refused>>),
    /// Forget it.
    Detach(String, Answer<()>),
    /// Say when a pod of this owner and generation is forwarded for, or why it never will be.
    Up(u64, u32, Answer<Result<Box<View>, String>>),
    /// Say when nothing of an owner is left.
    Gone(u64, Answer<()>),
    /// What is known of a sandbox.
    Look(String, Answer<Option<Box<View>>>),
    /// What runtimes asked for.
    Attachments(Answer<Vec<Attachment>>),
    /// Write down what should be.
    Expect(Answer<()>),
    /// Repair what is said of these; the answer is what could not be.
    Repair(BTreeSet<Target>, Answer<Vec<String>>),
    /// Why no pod could be added now.
    Problem(Answer<Option<String>>),
}

/// The way back.
pub(crate) type Answer<T> = oneshot::Sender<T>;

/// Why an attachment is not kept.
#[derive(Debug)]
pub(crate) enum Refused {
    /// The sandbox has one.
    Exists(Box<Attachment>),
    /// The file does not know the pod, or it cannot be written down.
    Because(String),
}

/// A pod as the agent knows it.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) owner: u64,
    pub(crate) pod: Pod,
    pub(crate) host_interface: Option<String>,
    /// Why it is not forwarded for.
    pub(crate) problem: Option<String>,
}

/// Who waits for something to become true.
pub(super) enum Waiter {
    Up(u64, u32, Answer<Result<Box<View>, String>>),
    Gone(u64, Answer<()>),
}

enum Standing {
    Up,
    NotYet(&'static str),
    Failed(String),
}

impl Agent {
    /// Answers, now or when it can. Nobody may be listening any more, which is fine.
    pub(super) async fn ask(&mut self, ask: Ask) {
        match ask {
            Ask::Attach(attachment, answer) => drop(answer.send(self.attach_sandbox(*attachment).await)),
            Ask::Detach(container_id, answer) => {
                if self.attachments.remove(&container_id).is_some() {
                    self.follow_attachments().await;
                }
                let _ = answer.send(());
            }
            Ask::Up(owner, generation, answer) => self.waiters.push(Waiter::Up(owner, generation, answer)),
            Ask::Gone(owner, answer) => self.waiters.push(Waiter::Gone(owner, answer)),
            Ask::Look(container_id, answer) => {
                let desired = self.desired.clone();
                let mut pods = desired.iter().flat_map(|desired| desired.pods());
                let found = pods.find(|(_, pod)| pod.container_id == container_id);
                drop(answer.send(found.map(|(owner, pod)| Box::new(self.view(owner, pod)))));
            }
            Ask::Attachments(answer) => drop(answer.send(self.attachments.iter().cloned().collect())),
            Ask::Expect(answer) => {
                self.write_expected();
                let _ = answer.send(());
            }
            Ask::Repair(targets, answer) => {
                let what: Vec<String> = targets.iter().map(ToString::to_string).collect();
                self.tell(log::Level::Info, format!("repairing on request: {}", what.join(", ")));
                let problems = self.mend(&targets).await;
                self.acknowledge();
                let _ = answer.send(problems);
            }
            Ask::Problem(answer) => drop(answer.send(self.problem())),
        }
    }

    /// Answers those for whom something has become true.
    pub(super) fn answer_waiters(&mut self) {
        for waiter in std::mem::take(&mut self.waiters) {
            match waiter {
                Waiter::Up(_, _, answer) if answer.is_closed() => {}
                Waiter::Gone(_, answer) if answer.is_closed() => {}
                Waiter::Up(owner, generation, answer) => match self.standing(owner, Some(generation)) {
                    Standing::NotYet(_) => self.waiters.push(Waiter::Up(owner, generation, answer)),
                    Standing::Failed(problem) => drop(answer.send(Err(problem))),
                    Standing::Up => match self.desired.clone().as_ref().and_then(|all| all.pod(owner)) {
                        Some(pod) => drop(answer.send(Ok(Box::new(self.view(owner, pod))))),
                        None => self.waiters.push(Waiter::Up(owner, generation, answer)),
                    },
                },
                Waiter::Gone(owner, answer) => {
                    let desired = self.desired.as_ref().is_some_and(|all| all.pod(owner).is_some());
                    if desired || self.tables.pod(owner).is_some() {
                        self.waiters.push(Waiter::Gone(owner, answer));
                    } else {
                        let _ = answer.send(());
                    }
                }
            }
        }
    }

    /// Whether the kernel forwards for a pod: asked of the kernel, not of what was written.
    fn standing(&self, owner: u64, generation: Option<u32>) -> Standing {
        if let Some(fault) = self.faults.get(&owner) {
            return Standing::Failed(fault.clone());
        }
        if let Some(refused) = self.desired.as_ref().and_then(|all| all.refused.get(&owner)) {
            return Standing::Failed(refused.reason.clone());
        }
        let Some(live) = self.tables.pod(owner) else { return Standing::NotYet("it is in no table") };
        if generation.is_some_and(|generation| generation != live.record.generation) {
            return Standing::NotYet("an older allocation is in force");
        }
        if self.closed.contains(&owner) {
            return Standing::NotYet("its interface is still closed");
        }
        if is_exclusive(&live.record) {
            if !self.is_alive(live.record.ifindex) {
                return Standing::NotYet("its ENI is gone");
            }
        } else if net::ifname(live.record.ifindex).is_none() {
            return Standing::NotYet("its interface on the host's side is gone");
        }
        if !self.is_attached(live.record.ifindex) {
            return Standing::NotYet("its programs are not attached");
        }
        let points = |index| self.tables.maps.slot(index).is_ok_and(|slot| slot == live.slot);
        if !Index::of(&live.record).all(points) {
            return Standing::NotYet("not all tables lead to it");
        }
        Standing::Up
    }

    fn view(&self, owner: u64, pod: &Pod) -> View {
        let problem = match self.standing(owner, None) {
            Standing::Up => None,
            Standing::NotYet(what) => Some(what.to_owned()),
            Standing::Failed(what) => Some(what),
        };
        let host_interface = self.host_interface_of(owner);
        View { owner, pod: pod.clone(), host_interface, problem }
    }

    fn problem(&self) -> Option<String> {
        let away = match self.source {
            // The document in force still serves.
            Feed::File(_) if self.desired.is_some() => None,
            _ => self.status.source_error.clone(),
        };
        away.or_else(|| self.status.held_back.clone()).or_else(|| {
            self.desired.is_none().then(|| "the allocator has not told the node's pods yet".to_owned())
        })
    }

    async fn attach_sandbox(&mut self, attachment: Attachment) -> Result<Option<(u64, u32)>, Refused> {
        if let Some(known) = self.attachments.get(&attachment.container_id) {
            return Err(Refused::Exists(Box::new(known.clone())));
        }
        let container_id = attachment.container_id.clone();
        if let Feed::File(file) = &self.source {
            let path = file.path().to_owned();
            let Some(document) = &self.document else {
                return Err(Refused::Because(format!("{} was not read yet", path.display())));
            };
            let Some(pod) = document.pods.iter().find(|pod| is_for(&attachment, pod)) else {
                return Err(Refused::Because(format!(
                    "pod {}/{} is not in {}, or not as one that waits for its sandbox",
                    attachment.namespace,
                    attachment.name,
                    path.display()
                )));
            };
            // The pod's newest sandbox has its sub-ENI.
            let older: Vec<String> = self
                .attachments
                .iter()
                .filter(|other| is_for(other, pod))
                .map(|other| other.container_id.clone())
                .collect();
            for container_id in older {
                self.attachments.remove(&container_id);
            }
        }
        let kept = self.attachments.put(&container_id, attachment);
        kept.map_err(|error| Refused::Because(error.to_string()))?;
        self.follow_attachments().await;
        let claimed = self
            .document
            .as_ref()
            .and(self.desired.as_ref())
            .and_then(|desired| desired.pods().find(|(_, pod)| pod.container_id == container_id));
        Ok(claimed.map(|(owner, pod)| (owner, pod.generation)))
    }

    /// Where pods come from a file: applies it anew, with the sandboxes that are there now.
    async fn follow_attachments(&mut self) {
        let Some(document) = &self.document else { return };
        // Another document waits for its confirmation: this one is still in force.
        let held = self.held.take();
        let notes = (self.status.held_back.clone(), self.status.held_back_id.clone());
        let desired = self.with_attachments(document.clone());
        self.apply(Rc::new(desired)).await;
        if held.is_some() {
            self.held = held;
            (self.status.held_back, self.status.held_back_id) = notes;
        }
    }

    /// A document with the sandboxes that runtimes have brought.
    pub(super) fn with_attachments(&self, mut document: Snapshot) -> Desired {
        for pod in &mut document.pods {
            let Some(attachment) = self.attachments.iter().find(|attachment| is_for(attachment, pod)) else {
                continue;
            };
            if pod.is_waiting() {
                pod.container_id.clone_from(&attachment.container_id);
                pod.netns = Some(attachment.netns.clone());
                pod.interface.clone_from(&attachment.interface);
            }
            pod.attach(attachment);
        }
        document.into()
    }

    /// A pod of the allocator's, with what its runtime asked for.
    pub(super) fn adjust(&self, pod: &mut Pod) {
        if let Some(attachment) = self.attachments.get(&pod.container_id) {
            pod.attach(attachment);
        }
    }

    /// Owners whose pods were wired, never came into the tables, and are not wanted any more.
    pub(super) fn wired_for_nothing(&self, desired: &Desired, scope: Option<&BTreeSet<u64>>) -> Vec<u64> {
        let unwanted = |owner: &u64| {
            scope.is_none_or(|scope| scope.contains(owner))
                && desired.pod(*owner).is_none_or(|pod| !pod.is_wanted())
                && !desired.refused.contains_key(owner)
                && self.tables.pod(*owner).is_none()
        };
        self.wired.keys().copied().filter(unwanted).collect()
    }
}

fn is_for(attachment: &Attachment, pod: &Pod) -> bool {
    if !pod.is_waiting() {
        return pod.container_id == attachment.container_id;
    }
    pod.uid == attachment.uid || pod.namespace == attachment.namespace && pod.name == attachment.name
}

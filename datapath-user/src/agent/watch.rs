//! What the agent does when the kernel tells of changes.

use std::collections::BTreeSet;

use super::{Agent, exclusive::is_exclusive};
use crate::{
    audit::{self, Depth, Seen, Target},
    events::Changes,
    netlink::HostState,
};

impl Agent {
    /// Follows, repairs or reports what has changed. What the agent itself has changed is found to be as it should be.
    pub(super) async fn notice(&mut self, changes: Changes) {
        if changes.lost {
            log::warn!("the kernel had more to tell than there was room for; looking at everything");
        }
        if changes.addresses || changes.lost {
            self.check_addresses().await;
        }
        self.notice_parents(&changes).await;
        match changes.lost {
            true => self.check_node().await,
            false => self.notice_pods(&changes).await,
        }
    }

    async fn notice_parents(&mut self, changes: &Changes) {
        if changes.lost || !changes.links.is_empty() {
            self.follow_parents().await;
        }
        let concerned = |index: u32| changes.links.contains_key(&index) || changes.routing.contains(&index);
        let all = changes.lost || changes.rules;
        if self.parents.iter().any(|parent| all || parent.ifindex.is_some_and(concerned)) {
            self.check_parents().await;
        }
    }

    /// Follows parents that went away or came back as other interfaces.
    pub(super) async fn follow_parents(&mut self) -> bool {
        let mut told = Vec::new();
        let Self { parents, pins, kind, .. } = self;
        for parent in parents {
            if parent.follow(pins, *kind) {
                let name = parent.name();
                told.push(match parent.ifindex {
                    None => format!("parent ENI {name} is gone; its pods wait for it"),
                    Some(index) => format!("parent ENI {name} is there as interface {index}"),
                });
            }
        }
        if told.is_empty() {
            return false;
        }
        told.into_iter().for_each(|what| self.tell(log::Level::Warn, what));
        self.reconcile(None).await;
        self.acknowledge();
        true
    }

    /// Compares the parents, and the node's routing for them, with what they should be; repairs what can be.
    pub(super) async fn check_parents(&mut self) {
        let host = match HostState::read().await {
            Ok(host) => host,
            Err(error) => return log::error!("{error}"),
        };
        let expected = self.expected_parents();
        let seen = Seen::of(&host);
        let mut broken = Vec::new();
        let mut told = Vec::new();
        for (parent, expected) in self.parents.iter_mut().zip(&expected) {
            // One that went, or came back as another, meanwhile: that is told next, and followed.
            if parent.ifindex.is_none() || host.link(parent.name()).map(|link| link.index) != parent.ifindex {
                continue;
            }
            let checks = audit::parent::checks(expected, &seen);
            told.extend(parent.observe(&checks.differences));
            let repairable = checks.differences.iter().filter(|difference| difference.kind.is_repairable());
            let what: Vec<String> = repairable.map(ToString::to_string).collect();
            if !what.is_empty() {
                broken.push((parent.name().to_owned(), what.join("; ")));
            }
        }
        for (level, what) in told {
            self.tell(level, what);
        }
        for (name, what) in broken {
            self.mend_after(Target::Parent(name.clone()), format!("parent ENI {name}: {what}")).await;
        }
        let Self { parents, pins, .. } = self;
        parents.iter_mut().for_each(|parent| parent.recheck_xdp(pins));
    }

    async fn notice_pods(&mut self, changes: &Changes) {
        if changes.links.is_empty() && changes.routing.is_empty() {
            return;
        }
        let concerned = |index: u32| {
            changes.routing.contains(&index) || changes.links.get(&index).is_some_and(|link| !is_well(link))
        };
        let suspects: BTreeSet<u64> = self
            .tables
            .pods()
            .map(|live| live.record)
            .filter(|record| !is_exclusive(record) && !self.closed.contains(&record.owner))
            .filter(|record| concerned(record.ifindex) || changes.differs(record))
            .map(|record| record.owner)
            .collect();
        if suspects.is_empty() {
            return;
        }
        // What was told may be over: what counts is what is.
        let host = match HostState::read().await {
            Ok(host) => host,
            Err(error) => return log::error!("{error}"),
        };
        let seen = Seen::of(&host);
        let mut broken = Vec::new();
        for owner in suspects {
            let pod = self.expected_one(owner);
            let Some(live) = pod.live else { continue };
            let mut checks = audit::Checks::default();
            audit::pod::host_side(&mut checks, &pod, &live.record, &seen, Depth::Node);
            let carrier = host.link(&pod.host_interface).is_none_or(|link| !link.up || link.carrier);
            checks.holds(carrier, audit::Kind::Link, "the pod's end of its veth", "up", "down");
            if !checks.differences.is_empty() {
                let what: Vec<String> = checks.differences.iter().map(ToString::to_string).collect();
                broken.push((owner, format!("pod {}: {}", pod.name, what.join("; "))));
            }
        }
        for (owner, what) in broken {
            self.mend_after(Target::Pod(owner), what).await;
        }
        self.acknowledge();
    }
}

/// Whether a host side is there, up, and has a carrier.
fn is_well(link: &Option<crate::netlink::Link>) -> bool {
    link.as_ref().is_some_and(|link| link.up && link.carrier)
}

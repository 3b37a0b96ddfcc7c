//! A case: groups, pods, and what happens one after the other.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::Ipv4Addr,
};

use eniway_policy::model::{GroupId, GroupList, Groups, Membership, Remote};

use crate::lab::groups::{Members, Packet};

/// A pod of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its address, which it keeps.
    pub address: Ipv4Addr,
    /// Its groups; none: the VPC does not judge it, and the agent cannot.
    pub list: GroupList,
    /// Whether the agent is told to judge it by newer groups than it has.
    pub stale: bool,
}

/// What is to be run.
#[derive(Clone, Debug)]
pub struct Case {
    /// The groups at first.
    pub groups: Groups,
    /// Groups and address groups that the VPC knows and the agent does not.
    pub hidden: BTreeSet<GroupId>,
    /// The pods at first.
    pub pods: Vec<Pod>,
    /// What happens.
    pub steps: Vec<Step>,
}

/// What happens.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// A pod sends a packet to another one, with so many bytes behind the headers.
    Send(Packet, u16),
    /// So many seconds pass.
    Wait(u32),
    /// The groups are replaced.
    Groups(Groups),
    /// A pod gets other groups.
    List(usize, GroupList),
    /// A pod is deleted, and another one gets its address and these groups.
    Replace(usize, GroupList),
}

/// The state that changes lead to.
#[derive(Clone, Debug)]
pub struct State {
    /// The groups.
    pub groups: Groups,
    /// The pods.
    pub pods: Vec<Pod>,
    hidden: BTreeSet<GroupId>,
}

impl Case {
    /// The state at first.
    pub fn state(&self) -> State {
        State { groups: self.groups.clone(), pods: self.pods.clone(), hidden: self.hidden.clone() }
    }
}

impl State {
    /// Makes a change; other steps are none.
    pub fn apply(&mut self, step: &Step) {
        match step {
            Step::Send(..) | Step::Wait(_) => return,
            Step::Groups(groups) => self.groups = groups.clone(),
            Step::List(pod, list) | Step::Replace(pod, list) => self.pods[*pod].list = list.clone(),
        }
        self.groups.revision += 1;
    }

    /// The groups as the agent has them.
    pub fn of_the_agent(&self) -> Groups {
        let mut groups = self.groups.clone();
        groups.security_groups.retain(|id, _| !self.hidden.contains(id));
        groups.address_groups.retain(|id, _| !self.hidden.contains(id));
        groups
    }

    /// What the agent is told of a pod.
    pub fn membership(&self, pod: &Pod) -> Membership {
        let revision = if pod.stale { self.groups.revision + 1 } else { 0 };
        Membership { groups: pod.list.clone(), revision }
    }

    /// Whether the agent knows enough to judge a pod.
    pub fn is_decidable(&self, pod: &Pod) -> bool {
        let known = |id: &GroupId| {
            let group = self.groups.security_groups.get(id).filter(|_| !self.hidden.contains(id));
            group.is_some_and(|group| {
                group.rules.iter().all(|rule| match &rule.remote {
                    Remote::AddressGroup(id) => !self.hidden.contains(id),
                    _ => true,
                })
            })
        };
        !pod.stale && !pod.list.is_empty() && pod.list.as_slice().iter().all(known)
    }

    /// Whom the VPC judges.
    pub fn members(&self) -> Members {
        let judged = self.pods.iter().filter(|pod| !pod.list.is_empty());
        judged.map(|pod| (pod.address, Membership { groups: pod.list.clone(), revision: 0 })).collect()
    }
}

/// Groups as a document, one rule a line.
fn write_groups(f: &mut fmt::Formatter<'_>, groups: &Groups) -> fmt::Result {
    for (id, group) in &groups.security_groups {
        writeln!(f, "  {id}")?;
        let mut rules: Vec<_> = group.rules.iter().collect();
        rules.sort_by_key(|rule| rule.priority);
        for rule in rules {
            writeln!(f, "    {}", serde_json::to_string(rule).map_err(|_| fmt::Error)?)?;
        }
    }
    for (id, group) in &groups.address_groups {
        writeln!(f, "  {id} = {:?}", group.addresses)?;
    }
    Ok(())
}

fn ids(list: &GroupList) -> Vec<&str> {
    list.as_slice().iter().map(GroupId::as_str).collect()
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "groups:")?;
        write_groups(f, &self.groups)?;
        if !self.hidden.is_empty() {
            writeln!(f, "not known to the agent: {:?}", self.hidden)?;
        }
        for (number, Pod { address, list, stale }) in self.pods.iter().enumerate() {
            let stale = if *stale { ", asks for newer ones" } else { "" };
            writeln!(f, "pod {number}: {address} {:?}{stale}", ids(list))?;
        }
        let names: BTreeMap<_, _> = self.pods.iter().zip(0..).map(|(pod, n)| (pod.address, n)).collect();
        for (number, step) in self.steps.iter().enumerate() {
            write!(f, "{number:4} ")?;
            match step {
                Step::Send(packet, 0) => {
                    writeln!(f, "pod {} > pod {}: {packet}", names[&packet.src], names[&packet.dst])?;
                }
                Step::Send(packet, more) => {
                    let (from, to) = (names[&packet.src], names[&packet.dst]);
                    writeln!(f, "pod {from} > pod {to}: {packet}, {more} bytes")?;
                }
                Step::Wait(seconds) => writeln!(f, "{seconds} s pass")?,
                Step::Groups(groups) => {
                    writeln!(f, "the groups become")?;
                    write_groups(f, groups)?;
                }
                Step::List(pod, list) => writeln!(f, "pod {pod} gets {:?}", ids(list))?,
                Step::Replace(pod, list) => writeln!(f, "pod {pod} is another one, with {:?}", ids(list))?,
            }
        }
        Ok(())
    }
}

//! From groups and the pods of a node to what the kernel judges by ([`datapath_common::abi::policy`]).
//!
//! The cost follows what differs, not what is there: pods that no rule tells apart are one class; a group is asked about
//! a class once, and about classes that look alike to its rules once in all.

mod bits;
mod program;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use datapath_common::abi::{
    Admitted, Endpoint, PairKey,
    endpoint::flag,
    policy::{ALLOW, CLASSES, ClassGroups, DENY, MAX_GROUPS, NOTHING, Verdict},
};

use ipnet::IpNet;

use self::{
    bits::Bits,
    program::{Decider, OverBudget, Side, Store},
};
use crate::model::{Direction, GroupId, Groups, Membership, Remote, Rule};

/// What the compiler needs to know of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// Its IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// Its groups.
    pub membership: Membership,
    /// The class it has now, which is kept if possible; 0 = none.
    pub class: u32,
}

/// Which packets are judged: a rule's prefixes are compared with addresses of that family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Why a pod cannot be judged on the node, so that the VPC decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Undecidable {
    /// It has no groups that we know of.
    NoGroups,
    /// It has a group that is not among the groups.
    UnknownGroup(GroupId),
    /// A rule of one of its groups names an address group that is not among the address groups.
    UnknownAddressGroup {
        /// The security group.
        group: GroupId,
        /// The address group.
        address_group: GroupId,
    },
    /// Its groups are of a later revision than the rules.
    Stale {
        /// The revision that it asks for.
        asked: u64,
        /// The revision of the rules.
        known: u64,
    },
    /// There is no room for it or its groups in the tables.
    OverBudget,
}

impl fmt::Display for Undecidable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoGroups => f.write_str("no security groups are known for it"),
            Self::UnknownGroup(group) => write!(f, "security group {group} is not known"),
            Self::UnknownAddressGroup { group, address_group } => {
                write!(f, "security group {group} names address group {address_group}, which is not known")
            }
            Self::Stale { asked, known } => {
                write!(f, "its groups are of revision {asked}, and the rules of revision {known}")
            }
            Self::OverBudget => f.write_str("its groups have more rules than the tables have room for"),
        }
    }
}

/// What came out.
#[derive(Clone, Debug, Default)]
pub struct Compiled<K> {
    /// The class of each pod that can be judged, 1 and up.
    pub classes: BTreeMap<K, u32>,
    /// Why others cannot; their class is 0.
    pub undecidable: BTreeMap<K, Undecidable>,
    /// What goes to the kernel.
    pub tables: Tables,
}

/// Rows of the kernel's tables. Classes without a row have verdict "wire" towards all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// The security groups in use, numbered from 1 in this order.
    pub groups: Vec<GroupId>,
    /// By class, then by class of the receiver: a [`Verdict`].
    pub verdicts: BTreeMap<u32, Vec<u8>>,
    /// By class.
    pub lists: BTreeMap<u32, ClassGroups>,
    /// By number of the group and whether it is egress, then by class of the other end: where the program begins.
    pub programs: BTreeMap<(u32, bool), Vec<u32>>,
    /// The programs.
    pub words: Vec<u32>,
}

impl Tables {
    /// What holds between two classes.
    pub fn verdict(&self, from: u32, to: u32) -> Verdict {
        let number = self.verdicts.get(&from).and_then(|row| row.get(to as usize)).copied().unwrap_or(0);
        Verdict::ALL.into_iter().find(|verdict| *verdict as u8 == number).unwrap_or(Verdict::Wire)
    }

    /// Whether a flow that was admitted between two pods is one that would be admitted, given their records as they are to be:
    /// the rules allow what opened it, and flows between the two are still remembered. What is not, is over.
    pub fn keeps(&self, low: &Endpoint, high: &Endpoint, key: &PairKey, flow: &Admitted) -> bool {
        let flags = low.flags | high.flags;
        let judged = flags & flag::OFF == 0 && flags & (flag::GROUPS | flag::OBSERVE) != 0;
        let (from, to) = if flow.opener == key.low { (low, high) } else { (high, low) };
        judged
            && low.mtu == high.mtu
            && self.verdict(from.policy_id, to.policy_id) == Verdict::Check
            && self.allows(from.policy_id, to.policy_id, flow.opening(key))
    }

    /// Whether a flow from a pod of class `from` to one of class `to` may begin with traffic `key`.
    pub fn allows(&self, from: u32, to: u32, key: u32) -> bool {
        self.says(true, from, to, key) == ALLOW && self.says(false, to, from, key) == ALLOW
    }

    /// What the groups of class `own` say of traffic with class `peer`.
    fn says(&self, egress: bool, own: u32, peer: u32, key: u32) -> u32 {
        let groups = self.lists.get(&own).map_or([0; 8], |list| list.groups);
        let programs = groups.iter().take_while(|group| **group != 0).filter_map(|group| {
            let start = *self.programs.get(&(u32::from(*group), egress))?.get(peer as usize)? as usize;
            let intervals = self.words.get(start + 1..)?.get(..*self.words.get(start)? as usize)?;
            (start != 0).then_some(intervals)
        });
        let mut says = programs.map(|intervals| {
            let behind = intervals.partition_point(|word| word >> 8 <= key);
            behind.checked_sub(1).map_or(NOTHING, |at| intervals[at] & 0xff)
        });
        says.find(|says| *says != NOTHING).unwrap_or(DENY)
    }
}

/// Pods that no rule tells apart.
struct Class {
    id: u32,
    /// Numbers of its groups, from 1.
    groups: Vec<u32>,
    bits: Bits,
}

/// Compiles. `classes` is how many classes the tables have room for, at most [`CLASSES`], the 0 included.
pub fn compile<K: Ord + Copy>(
    groups: &Groups,
    pods: &BTreeMap<K, PodFacts>,
    family: Family,
    classes: usize,
) -> Compiled<K> {
    let mut compiled =
        Compiled { classes: BTreeMap::new(), undecidable: BTreeMap::new(), tables: Tables::default() };
    let mut decidable: BTreeMap<K, &PodFacts> = BTreeMap::new();
    for (key, pod) in pods {
        match decidability(groups, &pod.membership) {
            Ok(()) => drop(decidable.insert(*key, pod)),
            Err(why) => drop(compiled.undecidable.insert(*key, why)),
        }
    }

    let (mut numbers, in_use) = number_groups(&decidable);
    // A group whose programs do not fit is left out with its pods, and the rest is compiled again.
    loop {
        let world = World::new(groups, &in_use, &numbers, family);
        let members = world.partition(&decidable);
        let (chosen, dropped) = choose_ids(members, &decidable, classes.min(CLASSES));
        for key in dropped {
            decidable.remove(&key);
            compiled.undecidable.insert(key, Undecidable::OverBudget);
        }
        match world.tables(&chosen) {
            Ok(tables) => {
                for (class, keys) in &chosen {
                    compiled.classes.extend(keys.iter().map(|key| (*key, class.id)));
                }
                compiled.tables = tables;
                return compiled;
            }
            Err(group) => drop(numbers.remove(&in_use[group as usize - 1])),
        }
    }
}

/// Whether a pod with these groups can be judged by the rules that are known.
///
/// # Errors
///
/// Why not.
pub fn decidability(groups: &Groups, membership: &Membership) -> Result<(), Undecidable> {
    if membership.groups.is_empty() {
        return Err(Undecidable::NoGroups);
    }
    if membership.revision > groups.revision {
        return Err(Undecidable::Stale { asked: membership.revision, known: groups.revision });
    }
    for id in membership.groups.as_slice() {
        let Some(group) = groups.security_groups.get(id) else {
            return Err(Undecidable::UnknownGroup(id.clone()));
        };
        for rule in &group.rules {
            if let Remote::AddressGroup(address_group) = &rule.remote
                && !groups.address_groups.contains_key(address_group)
            {
                return Err(Undecidable::UnknownAddressGroup {
                    group: id.clone(),
                    address_group: address_group.clone(),
                });
            }
        }
    }
    Ok(())
}

/// Numbers the groups that pods have, from 1; those beyond the tables' room get none.
fn number_groups<K: Ord>(pods: &BTreeMap<K, &PodFacts>) -> (BTreeMap<GroupId, u32>, Vec<GroupId>) {
    let in_use: BTreeSet<&GroupId> = pods.values().flat_map(|pod| pod.membership.groups.as_slice()).collect();
    let in_use: Vec<GroupId> = in_use.into_iter().cloned().collect();
    let numbers = in_use.iter().cloned().zip(1..).take(MAX_GROUPS as usize - 1).collect();
    (numbers, in_use)
}

/// What the rules ask of peers, as numbers.
struct World<'a> {
    all: &'a Groups,
    numbers: &'a BTreeMap<GroupId, u32>,
    in_use: &'a [GroupId],
    asked: Vec<Asked<'a>>,
    /// By number of the group less 1: ingress and egress.
    deciders: Vec<[Decider; 2]>,
}

/// What a rule's remote may ask of a peer.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Asked<'a> {
    Prefix(IpNet),
    /// One bit for each family (IPv6 or not): the two differ.
    Addresses(&'a GroupId, bool),
    Member(u32),
}

impl<'a> World<'a> {
    fn new(
        groups: &'a Groups,
        in_use: &'a [GroupId],
        numbers: &'a BTreeMap<GroupId, u32>,
        family: Family,
    ) -> Self {
        let mut asked = Vec::new();
        let mut places: HashMap<Asked<'a>, usize> = HashMap::new();
        let mut place = |what: Asked<'a>| {
            *places.entry(what.clone()).or_insert_with(|| {
                asked.push(what);
                asked.len() - 1
            })
        };
        // Both families' bits, whatever family is compiled for: then a pod has one class.
        let mut needs = HashMap::new();
        for id in in_use {
            for rule in &groups.security_groups[id].rules {
                let bit = match &rule.remote {
                    Remote::Any => Ok(None),
                    Remote::Cidr(prefix) => {
                        let bit = place(Asked::Prefix(*prefix));
                        let fits = matches!(prefix, IpNet::V4(_)) == (family == Family::V4);
                        if fits { Ok(Some(bit)) } else { Err(()) }
                    }
                    Remote::AddressGroup(id) => {
                        let bits = [false, true].map(|v6| place(Asked::Addresses(id, v6)));
                        Ok(Some(bits[usize::from(family == Family::V6)]))
                    }
                    Remote::Group(id) => match numbers.get(id) {
                        Some(number) => Ok(Some(place(Asked::Member(*number)))),
                        // Nobody who can be judged has it.
                        None => Err(()),
                    },
                };
                needs.insert(std::ptr::from_ref(rule), bit);
            }
        }
        let decider = |id: &GroupId, direction| {
            let rules = groups.security_groups[id].rules.iter().filter(|rule| rule.direction == direction);
            Decider::new(rules, |rule: &Rule| needs[&std::ptr::from_ref(rule)])
        };
        let deciders =
            in_use.iter().map(|id| [Direction::Ingress, Direction::Egress].map(|d| decider(id, d))).collect();
        Self { all: groups, numbers, in_use, asked, deciders }
    }

    /// What a pod has of what rules ask for.
    fn bits(&self, pod: &PodFacts) -> Bits {
        let mut bits = Bits::default();
        let v4 = pod.ipv4.map(IpAddr::V4);
        let v6 = pod.ipv6.map(IpAddr::V6);
        for (bit, asked) in self.asked.iter().enumerate() {
            let has = match asked {
                Asked::Prefix(prefix) => v4.iter().chain(&v6).any(|address| prefix.contains(address)),
                Asked::Addresses(id, is_v6) => {
                    let address = if *is_v6 { v6 } else { v4 };
                    address.is_some_and(|address| self.all.address_groups[*id].holds(address))
                }
                Asked::Member(number) => {
                    let is = |id: &GroupId| self.numbers.get(id) == Some(number);
                    pod.membership.groups.as_slice().iter().any(is)
                }
            };
            if has {
                bits.set(bit);
            }
        }
        bits
    }

    /// The pods by what tells them apart: their groups in their order, and what they are to others' rules.
    fn partition<K: Ord + Copy>(&self, pods: &BTreeMap<K, &PodFacts>) -> BTreeMap<(Vec<u32>, Bits), Vec<K>> {
        let mut parts: BTreeMap<_, Vec<K>> = BTreeMap::new();
        for (key, pod) in pods {
            let number = |id: &GroupId| self.numbers.get(id).copied();
            // A group beyond the tables' room: `choose_ids` leaves such a pod out.
            let list: Option<Vec<u32>> = pod.membership.groups.as_slice().iter().map(number).collect();
            parts.entry((list.unwrap_or_default(), self.bits(pod))).or_default().push(*key);
        }
        parts
    }

    /// The rows; or the number of a group that there is no room for.
    fn tables<K>(&self, classes: &[(Class, Vec<K>)]) -> Result<Tables, u32> {
        let mut store = Store::new();
        let mut tables = Tables { groups: self.in_use.to_vec(), ..Tables::default() };
        let width = classes.iter().map(|(class, _)| class.id as usize + 1).max().unwrap_or(0);
        let mut scratch = Vec::new();
        let used: BTreeSet<u32> =
            classes.iter().flat_map(|(class, _)| class.groups.iter().copied()).collect();
        // By group and direction, in the order of `classes`.
        let mut programs: HashMap<(u32, bool), Vec<u32>> = HashMap::new();
        for group in used {
            for (egress, decider) in [false, true].into_iter().zip(&self.deciders[group as usize - 1]) {
                let mut known: HashMap<Bits, u32> = HashMap::new();
                let mut row = vec![0; width];
                let mut in_order = Vec::with_capacity(classes.len());
                for (class, _) in classes {
                    let peer = decider.relevant(&class.bits);
                    let at = match known.get(&peer) {
                        Some(at) => *at,
                        None => {
                            let program = decider.decide(&peer, &mut scratch);
                            let at = store.add(program).map_err(|OverBudget| group)?;
                            known.insert(peer, at);
                            at
                        }
                    };
                    row[class.id as usize] = at;
                    in_order.push(at);
                }
                tables.programs.insert((group, egress), row);
                programs.insert((group, egress), in_order);
            }
        }
        // By class, direction and other class.
        let mut sides = |egress: bool| -> Vec<Vec<Side>> {
            let mut list = Vec::new();
            classes
                .iter()
                .map(|(class, _)| {
                    let rows: Vec<&Vec<u32>> =
                        class.groups.iter().map(|group| &programs[&(*group, egress)]).collect();
                    (0..classes.len())
                        .map(|other| {
                            list.clear();
                            list.extend(rows.iter().map(|row| row[other]));
                            store.side(&list)
                        })
                        .collect()
                })
                .collect()
        };
        let (ingress, egress) = (sides(false), sides(true));
        for (from, (class, _)) in classes.iter().enumerate() {
            let mut row = vec![Verdict::Wire as u8; width];
            for (to, (other, _)) in classes.iter().enumerate() {
                let there = (egress[from][to], ingress[to][from]);
                let back = (egress[to][from], ingress[from][to]);
                row[other.id as usize] = verdict(there, back) as u8;
            }
            tables.verdicts.insert(class.id, row);
            let mut list = ClassGroups::default();
            for (place, group) in list.groups.iter_mut().zip(&class.groups) {
                *place = *group as u16;
            }
            tables.lists.insert(class.id, list);
        }
        tables.words = store.words;
        Ok(tables)
    }
}

/// What holds for a pair, by what either side says of the way there and of the way back.
fn verdict(there: (Side, Side), back: (Side, Side)) -> Verdict {
    let open = |way| way == (Side::AllowsAll, Side::AllowsAll);
    let shut = |(egress, ingress)| egress == Side::DeniesAll || ingress == Side::DeniesAll;
    if open(there) && open(back) {
        Verdict::Open
    } else if shut(there) && shut(back) {
        Verdict::Refused
    } else {
        // One way may be shut: answers to the other way's flows need it.
        Verdict::Check
    }
}

/// Gives each class the number that most of its pods have already, as far as that goes. What finds no number, or has a group
/// without one, is left out.
fn choose_ids<K: Ord + Copy>(
    parts: BTreeMap<(Vec<u32>, Bits), Vec<K>>,
    pods: &BTreeMap<K, &PodFacts>,
    classes: usize,
) -> (Vec<(Class, Vec<K>)>, Vec<K>) {
    let mut dropped = Vec::new();
    let mut taken = BTreeSet::from([0]);
    let mut chosen: Vec<(Class, Vec<K>)> = Vec::new();
    for ((groups, bits), keys) in parts {
        if groups.is_empty() {
            dropped.extend(keys);
            continue;
        }
        chosen.push((Class { id: 0, groups, bits }, keys));
    }
    let mut claims: Vec<(usize, usize, u32)> = Vec::new();
    for (place, (_, keys)) in chosen.iter().enumerate() {
        let mut votes: BTreeMap<u32, usize> = BTreeMap::new();
        for key in keys {
            *votes.entry(pods[key].class).or_default() += 1;
        }
        claims.extend(votes.into_iter().map(|(id, votes)| (votes, place, id)));
    }
    claims.sort_unstable_by_key(|(votes, place, id)| (std::cmp::Reverse(*votes), *place, *id));
    for (_, place, id) in claims {
        if chosen[place].0.id == 0 && (id as usize) < classes && taken.insert(id) {
            chosen[place].0.id = id;
        }
    }
    // A number that a pod has which goes elsewhere now may be given away: it is taken from that pod first.
    let mut free = (1..classes as u32).filter(|id| !taken.contains(id));
    chosen.retain_mut(|(class, keys)| {
        if class.id == 0 {
            match free.next() {
                Some(id) => class.id = id,
                None => {
                    dropped.append(keys);
                    return false;
                }
            }
        }
        true
    });
    (chosen, dropped)
}

//! A VPC in memory, as strict as a real one and stricter: it refuses and counts every violation, and it can be slow, fail,
//! and lose its answers. By itself it carries no packets; something that does can be put behind it.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::RangeInclusive,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use ipnet::{Ipv4Net, Ipv6Net};

use super::{Attachment, CreateInterface, Kind, Page, SubnetUsage, Vpc, VpcError, VpcInterface, WantIpv6};
use crate::{
    clock::Clock,
    net::{Addresses, Mac, VlanId},
};

/// Addresses the VPC keeps for itself at the start of each subnet (network, gateway, DHCP) and one at its end.
const RESERVED: u32 = 4;
const PAGE: usize = 500;

/// A call of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// [`Vpc::create`].
    Create,
    /// [`Vpc::delete`].
    Delete,
    /// [`Vpc::attach`].
    Attach,
    /// [`Vpc::detach`].
    Detach,
    /// [`Vpc::set_security_groups`].
    SetSecurityGroups,
    /// [`Vpc::list`].
    List,
    /// [`Vpc::usage`].
    Usage,
}

/// What goes wrong with a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this error and has no effect.
    Error(VpcError),
    /// It takes effect, but the caller gets [`VpcError::TimedOut`].
    ReplyLost,
}

/// How often calls go wrong, as probabilities, and how long they take.
#[derive(Clone, Debug)]
pub struct Faults {
    /// Fails with a random error that leaves the outcome open, without effect.
    pub error: f64,
    /// Asks for fewer calls.
    pub throttle: f64,
    /// Takes effect, but the answer is lost.
    pub reply_lost: f64,
    /// How long a call takes.
    pub latency: RangeInclusive<Duration>,
}

impl Default for Faults {
    fn default() -> Self {
        Self { error: 0.0, throttle: 0.0, reply_lost: 0.0, latency: Duration::ZERO..=Duration::ZERO }
    }
}

/// What callers did that they must not do. All calls counted here were refused too, except the deletion and detaching of used interfaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Violations {
    /// Asked for an address that another interface has.
    pub double_address: u64,
    /// Asked for a VLAN id that is taken on the parent.
    pub double_vlan: u64,
    /// Deleted an interface that a pod used.
    pub deleted_in_use: u64,
    /// Detached an interface that a pod used.
    pub detached_in_use: u64,
    /// Went over a parent's or an instance's limit.
    pub over_limit: u64,
    /// Used one client token for two different calls.
    pub token_reused: u64,
}

/// A change of what is attached, for whatever carries the interfaces' packets.
#[derive(Clone, Copy, Debug)]
pub enum Rewire<'i> {
    /// The interface is to be carried at its attachment, from now on.
    Attach(&'i VpcInterface),
    /// It is at its attachment no longer.
    Detach(&'i VpcInterface),
    /// It has other security groups from now on.
    Regroup(&'i VpcInterface),
}

type Carrier = Box<dyn Fn(Rewire<'_>) -> Result<(), String> + Send + Sync>;

/// How many calls have met a fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Injected {
    /// Failed without effect.
    pub errors: u64,
    /// Got no answer and had no effect.
    pub timeouts: u64,
    /// Were asked to come later.
    pub throttled: u64,
    /// Took effect without an answer.
    pub replies_lost: u64,
}

/// A [`Vpc`] in memory.
pub struct MemoryVpc {
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
}

struct State {
    random: fastrand::Rng,
    faults: Faults,
    scripted: HashMap<Operation, VecDeque<Fault>>,
    calls: HashMap<Operation, u64>,
    violations: Violations,
    injected: Injected,
    subnets: BTreeMap<String, Subnet>,
    parents: HashMap<String, Parent>,
    instances: HashMap<String, Instance>,
    interfaces: BTreeMap<String, VpcInterface>,
    tokens: HashMap<String, (CreateInterface, String)>,
    in_use: HashSet<String>,
    quota: usize,
    next_id: u64,
    carrier: Option<Carrier>,
}

struct Subnet {
    ipv4: Ipv4Net,
    ipv6: Option<Ipv6Net>,
    used: HashSet<Ipv4Addr>,
    used_ipv6: HashSet<Ipv6Addr>,
    /// Freed addresses, given out again at once and the last one first: the worst for those who do not wait.
    freed: Vec<Ipv4Addr>,
    /// Where the search goes on when none was freed.
    next: u32,
}

struct Parent {
    limit: usize,
    vlans: HashMap<VlanId, String>,
}

struct Instance {
    limit: usize,
    attached: HashSet<String>,
}

impl MemoryVpc {
    /// An empty VPC. `seed` decides all random choices.
    pub fn new(clock: Arc<dyn Clock>, seed: u64) -> Self {
        let state = State {
            random: fastrand::Rng::with_seed(seed),
            faults: Faults::default(),
            scripted: HashMap::new(),
            calls: HashMap::new(),
            violations: Violations::default(),
            injected: Injected::default(),
            subnets: BTreeMap::new(),
            parents: HashMap::new(),
            instances: HashMap::new(),
            interfaces: BTreeMap::new(),
            tokens: HashMap::new(),
            in_use: HashSet::new(),
            quota: usize::MAX,
            next_id: 1,
            carrier: None,
        };
        Self { clock, state: Mutex::new(state) }
    }

    /// Puts something behind the VPC that carries the packets of attached interfaces. It is told of every change before the
    /// call that makes it returns, one at a time. What it says to be impossible does not happen: the call
    /// fails with [`VpcError::Failed`] and nothing has changed.
    #[must_use]
    pub fn carried_by(
        self,
        carrier: impl Fn(Rewire<'_>) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.state().carrier = Some(Box::new(carrier));
        self
    }

    /// Adds a subnet.
    pub fn add_subnet(&self, id: &str, ipv4: Ipv4Net, ipv6: Option<Ipv6Net>) {
        let subnet = Subnet {
            ipv4,
            ipv6,
            used: HashSet::new(),
            used_ipv6: HashSet::new(),
            freed: Vec::new(),
            next: 0,
        };
        self.state().subnets.insert(id.to_owned(), subnet);
    }

    /// Takes an address for something else than the interfaces made here, such as a parent ENI.
    ///
    /// # Errors
    ///
    /// When there is no such subnet, or the address is not of it or taken.
    pub fn reserve(&self, subnet: &str, ipv4: Ipv4Addr) -> Result<(), VpcError> {
        self.state().take_addresses(subnet, Some(ipv4), WantIpv6::No).map(drop)
    }

    /// Adds a parent ENI that can carry this many sub-ENIs.
    pub fn add_parent(&self, id: &str, limit: usize) {
        self.state().parents.insert(id.to_owned(), Parent { limit, vlans: HashMap::new() });
    }

    /// Adds an instance that can carry this many ENIs besides its primary one.
    pub fn add_instance(&self, id: &str, limit: usize) {
        self.state().instances.insert(id.to_owned(), Instance { limit, attached: HashSet::new() });
    }

    /// Limits the number of interfaces in the whole VPC.
    pub fn set_quota(&self, interfaces: usize) {
        self.state().quota = interfaces;
    }

    /// Makes calls fail from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.state().faults = faults;
    }

    /// Makes the next call of this kind fail; several queue up.
    pub fn fail_next(&self, operation: Operation, fault: Fault) {
        self.state().scripted.entry(operation).or_default().push_back(fault);
    }

    /// Says that a pod uses the interface: detaching or deleting it is then a violation.
    pub fn set_in_use(&self, id: &str, used: bool) {
        let mut state = self.state();
        if used {
            state.in_use.insert(id.to_owned());
        } else {
            state.in_use.remove(id);
        }
    }

    /// Deletes an interface behind the allocator's back.
    ///
    /// # Errors
    ///
    /// When there is none, or what carries it fails.
    pub fn lose(&self, id: &str) -> Result<(), VpcError> {
        let mut state = self.state();
        state.remove(id)?;
        state.in_use.remove(id);
        Ok(())
    }

    /// All interfaces.
    pub fn interfaces(&self) -> Vec<VpcInterface> {
        self.state().interfaces.values().cloned().collect()
    }

    /// How often a call was made, failed ones included.
    pub fn calls(&self, operation: Operation) -> u64 {
        self.state().calls.get(&operation).copied().unwrap_or_default()
    }

    /// The violations so far.
    pub fn violations(&self) -> Violations {
        self.state().violations
    }

    /// The faults so far.
    pub fn injected(&self) -> Injected {
        self.state().injected
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One call: its latency, its fault, its effect.
    async fn call<T>(
        &self,
        operation: Operation,
        effect: impl FnOnce(&mut State) -> Result<T, VpcError>,
    ) -> Result<T, VpcError> {
        let (latency, fault) = {
            let mut state = self.state();
            *state.calls.entry(operation).or_default() += 1;
            let (latency, fault) = (state.latency(), state.fault(operation));
            match &fault {
                None => {}
                Some(Fault::ReplyLost) => state.injected.replies_lost += 1,
                Some(Fault::Error(VpcError::TimedOut)) => state.injected.timeouts += 1,
                Some(Fault::Error(VpcError::Throttled)) => state.injected.throttled += 1,
                Some(Fault::Error(_)) => state.injected.errors += 1,
            }
            (latency, fault)
        };
        // Half of the time passes before the effect: callers that are dropped in between see both cases.
        self.pass(latency / 2).await;
        if let Some(Fault::Error(error)) = fault {
            self.pass(latency / 2).await;
            return Err(error);
        }
        let result = effect(&mut self.state());
        self.pass(latency / 2).await;
        if fault == Some(Fault::ReplyLost) { Err(VpcError::TimedOut) } else { result }
    }

    async fn pass(&self, time: Duration) {
        if time.is_zero() {
            tokio::task::yield_now().await;
        } else {
            self.clock.sleep(time).await;
        }
    }
}

impl State {
    fn latency(&mut self) -> Duration {
        let (low, high) = (self.faults.latency.start().as_micros(), self.faults.latency.end().as_micros());
        let micros = self.random.u128(low..=high.max(low));
        Duration::from_micros(micros.try_into().unwrap_or(u64::MAX))
    }

    fn fault(&mut self, operation: Operation) -> Option<Fault> {
        if let Some(fault) = self.scripted.get_mut(&operation).and_then(VecDeque::pop_front) {
            return Some(fault);
        }
        let roll = self.random.f64();
        let Faults { error, throttle, reply_lost, .. } = self.faults;
        if roll < error {
            let failed = VpcError::Failed { what: "internal error (injected)".to_owned() };
            Some(Fault::Error(if self.random.bool() { VpcError::TimedOut } else { failed }))
        } else if roll < error + throttle {
            Some(Fault::Error(VpcError::Throttled))
        } else if roll < error + throttle + reply_lost {
            Some(Fault::ReplyLost)
        } else {
            None
        }
    }

    fn create(&mut self, request: CreateInterface) -> Result<VpcInterface, VpcError> {
        if let Some((first, id)) = self.tokens.get(&request.token) {
            if *first != request {
                self.violations.token_reused += 1;
                return Err(VpcError::Invalid {
                    what: format!("token {} was used for another call", request.token),
                });
            }
            return self.interfaces.get(id).cloned().ok_or_else(|| VpcError::NotFound {
                what: format!("interface {id} that token {} created: it was deleted", request.token),
            });
        }
        if self.interfaces.len() >= self.quota {
            return Err(VpcError::QuotaExceeded { what: format!("interfaces in the VPC ({})", self.quota) });
        }
        let id = format!("{}-{:08x}", if request.parent.is_some() { "sub" } else { "eni" }, self.next_id);
        let attachment = request.parent.clone().map(|(id, vlan)| Attachment::Parent { id, vlan });
        if let Some(attachment) = &attachment {
            self.check_room(attachment)?;
        }
        let addresses = self.take_addresses(&request.subnet, request.ipv4, request.ipv6)?;
        self.next_id += 1;
        let [.., a, b, c] = self.next_id.to_be_bytes();
        let interface = VpcInterface {
            id: id.clone(),
            kind: if request.parent.is_some() { Kind::SubEni } else { Kind::Eni },
            name: request.name.clone(),
            owner: request.owner.clone(),
            attachment,
            subnet: request.subnet.clone(),
            mac: Mac([0xfa, 0x16, 0x3e, a, b, c]),
            addresses,
            security_groups: request.security_groups.clone(),
        };
        if interface.attachment.is_some()
            && let Err(error) = self.rewire(Rewire::Attach(&interface))
        {
            self.free_addresses(&interface);
            return Err(error);
        }
        if let Some(attachment) = &interface.attachment {
            self.occupy(attachment, &id);
        }
        self.interfaces.insert(id.clone(), interface.clone());
        self.tokens.insert(request.token.clone(), (request, id));
        Ok(interface)
    }

    fn attach(&mut self, id: &str, to: &Attachment) -> Result<VpcInterface, VpcError> {
        let mut interface = self.known(id)?;
        match &interface.attachment {
            Some(attached) if attached == to => return Ok(interface),
            Some(attached) => {
                return Err(VpcError::Conflict {
                    what: format!("interface {id} is attached to {attached:?}"),
                });
            }
            None => {}
        }
        self.check_room(to)?;
        interface.attachment = Some(to.clone());
        self.rewire(Rewire::Attach(&interface))?;
        self.occupy(to, id);
        self.interfaces.insert(id.to_owned(), interface.clone());
        Ok(interface)
    }

    fn detach(&mut self, id: &str) -> Result<(), VpcError> {
        let interface = self.known(id)?;
        let Some(attachment) = &interface.attachment else { return Ok(()) };
        self.rewire(Rewire::Detach(&interface))?;
        if self.in_use.contains(id) {
            self.violations.detached_in_use += 1;
        }
        self.vacate(attachment, id);
        self.interfaces.insert(id.to_owned(), VpcInterface { attachment: None, ..interface });
        Ok(())
    }

    fn delete(&mut self, id: &str) -> Result<(), VpcError> {
        let interface = self.known(id)?;
        if interface.kind == Kind::Eni && interface.attachment.is_some() {
            return Err(VpcError::Conflict { what: format!("ENI {id} is attached") });
        }
        self.remove(id)?;
        if self.in_use.contains(id) {
            self.violations.deleted_in_use += 1;
        }
        Ok(())
    }

    fn set_security_groups(&mut self, id: &str, groups: &[String]) -> Result<(), VpcError> {
        let mut interface = self.known(id)?;
        if groups.is_empty() {
            return Err(VpcError::Invalid { what: format!("interface {id} without a security group") });
        }
        if interface.security_groups != groups {
            interface.security_groups = groups.to_vec();
            self.rewire(Rewire::Regroup(&interface))?;
            self.interfaces.insert(id.to_owned(), interface);
        }
        Ok(())
    }

    fn rewire(&self, change: Rewire<'_>) -> Result<(), VpcError> {
        let Some(carrier) = &self.carrier else { return Ok(()) };
        carrier(change).map_err(|what| VpcError::Failed { what })
    }

    fn take_addresses(
        &mut self,
        id: &str,
        ipv4: Option<Ipv4Addr>,
        ipv6: WantIpv6,
    ) -> Result<Addresses, VpcError> {
        let unknown = || VpcError::NotFound { what: format!("subnet {id}") };
        let subnet = self.subnets.get_mut(id).ok_or_else(unknown)?;
        let ipv4 = match ipv4 {
            None => subnet.free().ok_or_else(|| VpcError::SubnetExhausted { subnet: id.to_owned() })?,
            Some(ipv4) if !subnet.holds(ipv4) => {
                return Err(VpcError::Invalid { what: format!("{ipv4} is not an address of subnet {id}") });
            }
            Some(ipv4) => ipv4,
        };
        let ipv6 = match (ipv6, subnet.ipv6) {
            (WantIpv6::No, _) => None,
            (_, None) => {
                return Err(VpcError::Invalid { what: format!("subnet {id} has no IPv6") });
            }
            (WantIpv6::Any, Some(net)) => {
                let host: u128 = u32::from(ipv4).into();
                Some(Ipv6Addr::from(u128::from(net.network()) | host))
            }
            (WantIpv6::Exactly(ipv6), Some(_)) => Some(ipv6),
        };
        let taken = if subnet.used.contains(&ipv4) {
            Some(IpAddr::V4(ipv4))
        } else {
            ipv6.filter(|ipv6| subnet.used_ipv6.contains(ipv6)).map(IpAddr::V6)
        };
        if let Some(address) = taken {
            self.violations.double_address += 1;
            return Err(VpcError::AddressTaken {
                address: address.to_string(),
                by: "another interface".to_owned(),
            });
        }
        subnet.used.insert(ipv4);
        subnet.used_ipv6.extend(ipv6);
        Ok(Addresses { ipv4, ipv6 })
    }

    fn check_room(&mut self, attachment: &Attachment) -> Result<(), VpcError> {
        match attachment {
            Attachment::Parent { id, vlan } => {
                let unknown = || VpcError::NotFound { what: format!("parent ENI {id}") };
                let parent = self.parents.get(id).ok_or_else(unknown)?;
                if parent.vlans.contains_key(vlan) {
                    self.violations.double_vlan += 1;
                    return Err(VpcError::VlanTaken { parent: id.clone(), vlan: *vlan });
                }
                if parent.vlans.len() >= parent.limit {
                    self.violations.over_limit += 1;
                    return Err(VpcError::QuotaExceeded {
                        what: format!("sub-ENIs on parent {id} ({})", parent.limit),
                    });
                }
            }
            Attachment::Instance { id } => {
                let unknown = || VpcError::NotFound { what: format!("instance {id}") };
                let instance = self.instances.get(id).ok_or_else(unknown)?;
                if instance.attached.len() >= instance.limit {
                    self.violations.over_limit += 1;
                    return Err(VpcError::QuotaExceeded {
                        what: format!("ENIs on instance {id} ({})", instance.limit),
                    });
                }
            }
        }
        Ok(())
    }

    fn occupy(&mut self, attachment: &Attachment, interface: &str) {
        match attachment {
            Attachment::Parent { id, vlan } => {
                if let Some(parent) = self.parents.get_mut(id) {
                    parent.vlans.insert(*vlan, interface.to_owned());
                }
            }
            Attachment::Instance { id } => {
                if let Some(instance) = self.instances.get_mut(id) {
                    instance.attached.insert(interface.to_owned());
                }
            }
        }
    }

    fn vacate(&mut self, attachment: &Attachment, interface: &str) {
        match attachment {
            Attachment::Parent { id, vlan } => {
                if let Some(parent) = self.parents.get_mut(id) {
                    parent.vlans.remove(vlan);
                }
            }
            Attachment::Instance { id } => {
                if let Some(instance) = self.instances.get_mut(id) {
                    instance.attached.remove(interface);
                }
            }
        }
    }

    fn remove(&mut self, id: &str) -> Result<(), VpcError> {
        let interface = self.known(id)?;
        if let Some(attachment) = &interface.attachment {
            self.rewire(Rewire::Detach(&interface))?;
            self.vacate(attachment, id);
        }
        self.interfaces.remove(id);
        self.free_addresses(&interface);
        Ok(())
    }

    fn free_addresses(&mut self, interface: &VpcInterface) {
        if let Some(subnet) = self.subnets.get_mut(&interface.subnet) {
            subnet.used.remove(&interface.addresses.ipv4);
            subnet.freed.push(interface.addresses.ipv4);
            if let Some(ipv6) = interface.addresses.ipv6 {
                subnet.used_ipv6.remove(&ipv6);
            }
        }
    }

    fn known(&self, id: &str) -> Result<VpcInterface, VpcError> {
        self.interfaces.get(id).cloned().ok_or_else(|| VpcError::NotFound { what: format!("interface {id}") })
    }
}

impl Subnet {
    fn total(&self) -> u32 {
        let size = 1u64 << (32 - self.ipv4.prefix_len());
        u32::try_from(size).unwrap_or(u32::MAX).saturating_sub(RESERVED + 1)
    }

    fn holds(&self, ipv4: Ipv4Addr) -> bool {
        let first = u32::from(self.ipv4.network()) + RESERVED;
        (first..first + self.total()).contains(&u32::from(ipv4))
    }

    fn free(&mut self) -> Option<Ipv4Addr> {
        while let Some(ipv4) = self.freed.pop() {
            if !self.used.contains(&ipv4) {
                return Some(ipv4);
            }
        }
        let first = u32::from(self.ipv4.network()) + RESERVED;
        while self.next < self.total() {
            let ipv4 = Ipv4Addr::from(first + self.next);
            self.next += 1;
            if !self.used.contains(&ipv4) {
                return Some(ipv4);
            }
        }
        None
    }
}

#[async_trait]
impl Vpc for MemoryVpc {
    async fn create(&self, request: CreateInterface) -> Result<VpcInterface, VpcError> {
        self.call(Operation::Create, |state| state.create(request)).await
    }

    async fn delete(&self, id: &str) -> Result<(), VpcError> {
        self.call(Operation::Delete, |state| state.delete(id)).await
    }

    async fn attach(&self, id: &str, to: Attachment) -> Result<VpcInterface, VpcError> {
        self.call(Operation::Attach, |state| state.attach(id, &to)).await
    }

    async fn detach(&self, id: &str) -> Result<(), VpcError> {
        self.call(Operation::Detach, |state| state.detach(id)).await
    }

    async fn set_security_groups(&self, id: &str, groups: &[String]) -> Result<(), VpcError> {
        self.call(Operation::SetSecurityGroups, |state| state.set_security_groups(id, groups)).await
    }

    async fn list(&self, owner: &str, page: Option<String>) -> Result<Page, VpcError> {
        self.call(Operation::List, |state| {
            let start = page.unwrap_or_default();
            let mut interfaces: Vec<_> = state
                .interfaces
                .range(start..)
                .map(|(_, interface)| interface)
                .filter(|interface| interface.owner == owner)
                .take(PAGE + 1)
                .cloned()
                .collect();
            let next = if interfaces.len() > PAGE { interfaces.pop().map(|next| next.id) } else { None };
            Ok(Page { interfaces, next })
        })
        .await
    }

    async fn usage(&self, subnets: &[String]) -> Result<Vec<SubnetUsage>, VpcError> {
        self.call(Operation::Usage, |state| {
            let usage = |id: &String| {
                let subnet = state.subnets.get(id)?;
                let total = u64::from(subnet.total());
                Some(SubnetUsage { id: id.clone(), available: total - subnet.used.len() as u64, total })
            };
            Ok(subnets.iter().filter_map(usage).collect())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::SystemClock;

    #[tokio::test]
    async fn what_its_carrier_cannot_do_does_not_happen() {
        let (broken, told) = (Arc::new(AtomicBool::new(true)), Arc::new(Mutex::new(Vec::new())));
        let (breaks, tell) = (broken.clone(), told.clone());
        let vpc = MemoryVpc::new(Arc::new(SystemClock), 1).carried_by(move |change| {
            if breaks.load(Ordering::SeqCst) {
                return Err("the switch is broken".to_owned());
            }
            let (word, interface) = match change {
                Rewire::Attach(interface) => ("attach", interface),
                Rewire::Detach(interface) => ("detach", interface),
                Rewire::Regroup(interface) => ("regroup", interface),
            };
            tell.lock().unwrap().push(format!("{word} {:?}", interface.attachment));
            Ok(())
        });
        // One address: a failed call that kept it would make the next one fail.
        vpc.add_subnet("net", "10.1.0.0/29".parse().unwrap(), None);
        vpc.reserve("net", [10, 1, 0, 4].into()).unwrap();
        vpc.reserve("net", [10, 1, 0, 5].into()).unwrap();
        assert!(matches!(vpc.reserve("net", [10, 1, 0, 5].into()), Err(VpcError::AddressTaken { .. })));
        vpc.add_parent("eni", 1);
        let vlan = VlanId::new(7).unwrap();
        let request = CreateInterface {
            token: "t".to_owned(),
            name: "i".to_owned(),
            owner: "o".to_owned(),
            parent: Some(("eni".to_owned(), vlan)),
            subnet: "net".to_owned(),
            ipv4: None,
            ipv6: WantIpv6::No,
            security_groups: vec!["sg-1".to_owned()],
        };
        let failed = |error: VpcError| assert!(error.to_string().contains("the switch is broken"), "{error}");
        let place = Attachment::Parent { id: "eni".to_owned(), vlan };

        failed(vpc.create(request.clone()).await.unwrap_err());
        assert_eq!(vpc.interfaces(), []);
        broken.store(false, Ordering::SeqCst);
        let made = vpc.create(request.clone()).await.unwrap();
        assert_eq!(
            (made.addresses.ipv4, &made.security_groups),
            ([10, 1, 0, 6].into(), &request.security_groups)
        );

        broken.store(true, Ordering::SeqCst);
        failed(vpc.detach(&made.id).await.unwrap_err());
        failed(vpc.delete(&made.id).await.unwrap_err());
        assert_eq!(vpc.interfaces(), std::slice::from_ref(&made));
        broken.store(false, Ordering::SeqCst);
        vpc.detach(&made.id).await.unwrap();
        // What changes nothing is not told.
        vpc.detach(&made.id).await.unwrap();
        broken.store(true, Ordering::SeqCst);
        failed(vpc.attach(&made.id, place.clone()).await.unwrap_err());
        assert_eq!(vpc.interfaces()[0].attachment, None);
        broken.store(false, Ordering::SeqCst);
        vpc.attach(&made.id, place).await.unwrap();
        vpc.delete(&made.id).await.unwrap();
        let words: Vec<String> = told.lock().unwrap().clone();
        let at = "Some(Parent { id: \"eni\", vlan: VlanId(7) })";
        assert_eq!(words, ["attach", "detach", "attach", "detach"].map(|word| format!("{word} {at}")));
        // The address asked for twice.
        assert_eq!(vpc.violations(), Violations { double_address: 1, ..Violations::default() });
    }
}

//! A VPC in memory, as strict as a real one and stricter: it refuses and counts every violation, and it can be slow, fail,
//! and lose its answers.

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
        };
        Self { clock, state: Mutex::new(state) }
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
    pub fn lose(&self, id: &str) {
        let mut state = self.state();
        state.in_use.remove(id);
        state.remove(id);
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
        let addresses = self.take_addresses(&request)?;
        self.next_id += 1;
        if let Some(attachment) = &attachment {
            self.occupy(attachment, &id);
        }
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
        self.interfaces.insert(id.clone(), interface.clone());
        self.tokens.insert(request.token.clone(), (request, id));
        Ok(interface)
    }

    fn take_addresses(&mut self, request: &CreateInterface) -> Result<Addresses, VpcError> {
        let unknown = || VpcError::NotFound { what: format!("subnet {}", request.subnet) };
        let subnet = self.subnets.get_mut(&request.subnet).ok_or_else(unknown)?;
        let ipv4 = match request.ipv4 {
            None => {
                subnet.free().ok_or_else(|| VpcError::SubnetExhausted { subnet: request.subnet.clone() })?
            }
            Some(ipv4) if !subnet.holds(ipv4) => {
                return Err(VpcError::Invalid {
                    what: format!("{ipv4} is not an address of subnet {}", request.subnet),
                });
            }
            Some(ipv4) => ipv4,
        };
        let ipv6 = match (request.ipv6, subnet.ipv6) {
            (WantIpv6::No, _) => None,
            (_, None) => {
                return Err(VpcError::Invalid { what: format!("subnet {} has no IPv6", request.subnet) });
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

    fn remove(&mut self, id: &str) {
        let Some(interface) = self.interfaces.remove(id) else { return };
        if let Some(attachment) = &interface.attachment {
            self.vacate(attachment, id);
        }
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
        self.call(Operation::Delete, |state| {
            let interface = state.known(id)?;
            if interface.kind == Kind::Eni && interface.attachment.is_some() {
                return Err(VpcError::Conflict { what: format!("ENI {id} is attached") });
            }
            if state.in_use.contains(id) {
                state.violations.deleted_in_use += 1;
            }
            state.remove(id);
            Ok(())
        })
        .await
    }

    async fn attach(&self, id: &str, to: Attachment) -> Result<VpcInterface, VpcError> {
        self.call(Operation::Attach, |state| {
            let mut interface = state.known(id)?;
            match &interface.attachment {
                Some(attached) if *attached == to => return Ok(interface),
                Some(attached) => {
                    return Err(VpcError::Conflict {
                        what: format!("interface {id} is attached to {attached:?}"),
                    });
                }
                None => {}
            }
            state.check_room(&to)?;
            state.occupy(&to, id);
            interface.attachment = Some(to);
            state.interfaces.insert(id.to_owned(), interface.clone());
            Ok(interface)
        })
        .await
    }

    async fn detach(&self, id: &str) -> Result<(), VpcError> {
        self.call(Operation::Detach, |state| {
            let mut interface = state.known(id)?;
            let Some(attachment) = interface.attachment.take() else { return Ok(()) };
            if state.in_use.contains(id) {
                state.violations.detached_in_use += 1;
            }
            state.vacate(&attachment, id);
            state.interfaces.insert(id.to_owned(), interface);
            Ok(())
        })
        .await
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

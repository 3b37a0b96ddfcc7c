//! The client.

use std::time::{Duration, Instant};

use eniway_policy::model::Groups;
use tonic::{
    Code, Status, Streaming,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use super::{
    Address, MAX_MESSAGE, Tls, convert,
    proto::{self, Reason, ipam_client::IpamClient},
};
use crate::{
    api::{
        Acknowledgement, AllocateRequest, Allocation, Confirm, CoolingStatus, LeakStatus, PoolStatus,
        Released, SecurityGroupsPut, SubnetStatus,
    },
    feed::{Notice, Position},
    model::{Node, PodKey, Subnet},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A server that is gone without a word, or a network that is, is noticed in this time twice.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// Why a call has no result.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientError {
    /// The allocator refused; its own words.
    #[error("{message}")]
    Refused {
        /// Which error it is.
        reason: Reason,
        /// What the allocator said.
        message: String,
    },
    /// No answer.
    #[error("the allocator at {address} does not answer: {problem}")]
    Unreachable {
        /// Where it should be.
        address: Address,
        /// What happened.
        problem: String,
    },
    /// The server does not let us in, or does not know the call.
    #[error("the allocator at {address}: {problem}")]
    Denied {
        /// Where it is.
        address: Address,
        /// What it said.
        problem: String,
    },
    /// An answer that makes no sense.
    #[error("the allocator at {address} gave an answer that this version does not understand: {problem}")]
    Answer {
        /// Where it is.
        address: Address,
        /// What is wrong with it.
        problem: String,
    },
    /// The certificates cannot be used.
    #[error("the certificates for {address} are not usable: {problem}")]
    Tls {
        /// For which server.
        address: Address,
        /// What is wrong.
        problem: String,
    },
}

impl ClientError {
    /// Whether the same call may succeed when the server is back.
    pub fn is_away(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Refused { reason: Reason::Closed, .. })
    }

    /// Which of the allocator's errors it is, if it is one.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Refused { reason, .. } => Some(*reason),
            _ => None,
        }
    }
}

/// Growing pauses between attempts, each at random between half and the whole of its length, so that a thousand agents
/// do not come back at the same instant.
#[derive(Clone, Debug)]
pub struct Backoff {
    from: Duration,
    to: Duration,
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new(Duration::from_millis(50), Duration::from_secs(10))
    }
}

impl Backoff {
    /// Pauses that double from one length up to another.
    pub fn new(from: Duration, to: Duration) -> Self {
        Self { from, to, next: from }
    }

    /// The next pause.
    pub fn pause(&mut self) -> Duration {
        let whole = self.next;
        self.next = (whole * 2).min(self.to);
        whole.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    /// Something succeeded: begin anew.
    pub fn reset(&mut self) {
        self.next = self.from;
    }
}

/// A client. Cheap to clone; connects when it is first used, and again whenever that is needed.
#[derive(Clone, Debug)]
pub struct Client {
    address: Address,
    channel: Channel,
    patience: Duration,
}

impl Client {
    /// A client for a server that need not be there yet. `tls` is needed for `https`. To be called on a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the certificates cannot be used.
    pub fn new(address: Address, tls: Option<&Tls>) -> Result<Self, ClientError> {
        let problem = |problem: String| ClientError::Tls { address: address.clone(), problem };
        let mut endpoint = Endpoint::from_shared(address.to_string())
            .map_err(|error| problem(chain(&error)))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        match (&address, tls) {
            (Address::Unix(_), _) => {}
            (Address::Https(_), None) => return Err(problem("ca, cert and key must be given".to_owned())),
            (Address::Https(_), Some(tls)) => {
                let config = ClientTlsConfig::new()
                    .ca_certificate(Certificate::from_pem(&tls.ca))
                    .identity(Identity::from_pem(&tls.certificate, &tls.key));
                endpoint = endpoint.tls_config(config).map_err(|error| problem(chain(&error)))?;
            }
        }
        let channel = endpoint.connect_lazy();
        Ok(Self { address, channel, patience: Duration::ZERO })
    }

    /// The same client, whose calls are repeated for so long while the server is away.
    #[must_use]
    pub fn patient(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Where the server is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    fn stub(&self) -> IpamClient<Channel> {
        IpamClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    fn error(&self, status: &Status) -> ClientError {
        if let Some(reason) = convert::reason(status) {
            return ClientError::Refused { reason, message: status.message().to_owned() };
        }
        let address = self.address.clone();
        let problem = words(status);
        match status.code() {
            Code::PermissionDenied | Code::Unauthenticated | Code::Unimplemented | Code::OutOfRange => {
                ClientError::Denied { address, problem }
            }
            _ => ClientError::Unreachable { address, problem },
        }
    }

    fn bad(&self, bad: &convert::Bad) -> ClientError {
        ClientError::Answer { address: self.address.clone(), problem: bad.to_string() }
    }

    /// Every call may be made again, so while the server is away this is done until the patience ends.
    async fn call<T, C: Future<Output = Result<tonic::Response<T>, Status>>>(
        &self,
        call: impl Fn(IpamClient<Channel>) -> C,
    ) -> Result<T, ClientError> {
        let end = Instant::now() + self.patience;
        let mut backoff = Backoff::default();
        loop {
            let error = match call(self.stub()).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) => self.error(&status),
            };
            let pause = backoff.pause();
            if !error.is_away() || Instant::now() + pause > end {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Asks for an interface. With `wait_for_agent`, returns only when the node's agent has put it into the kernel.
    ///
    /// # Errors
    ///
    /// When the allocator or the agent refuses, or nobody answers. The same call may be made again.
    pub async fn allocate(
        &self,
        request: &AllocateRequest,
        wait_for_agent: Option<Duration>,
    ) -> Result<Allocation, ClientError> {
        let request = convert::allocate_request(request, wait_for_agent);
        let answer = self
            .call(|mut stub| {
                let request = request.clone();
                async move { stub.allocate(request).await }
            })
            .await?;
        self.allocation(answer.allocation)
    }

    /// Gives an interface back.
    ///
    /// # Errors
    ///
    /// When the allocator refuses, or nobody answers.
    pub async fn release(&self, key: &PodKey, generation: Option<u64>) -> Result<Released, ClientError> {
        let request = proto::ReleaseRequest { key: Some(convert::key(key)), generation };
        let answer = self
            .call(|mut stub| {
                let request = request.clone();
                async move { stub.release(request).await }
            })
            .await?;
        Ok(if answer.released { Released::Now } else { Released::NotAllocated })
    }

    /// The allocations of one node or of all.
    ///
    /// # Errors
    ///
    /// When nobody answers.
    pub async fn list(&self, node: Option<&str>) -> Result<Vec<Allocation>, ClientError> {
        let request = proto::ListRequest { node: node.map(ToOwned::to_owned) };
        let answer = self
            .call(|mut stub| {
                let request = request.clone();
                async move { stub.list(request).await }
            })
            .await?;
        self.read_all(answer.allocations, convert::read_allocation)
    }

    /// Opens a watch. It ends when the server does; [`Client::follow`] does not.
    ///
    /// # Errors
    ///
    /// When nobody answers.
    pub async fn watch(&self, node: &str, from: Option<&Position>) -> Result<Notices, ClientError> {
        let request = proto::WatchRequest {
            node: node.to_owned(),
            from_revision: from.map(|position| position.revision),
            store: from.map(|position| position.store.clone()).unwrap_or_default(),
        };
        let stream = self
            .call(|mut stub| {
                let request = request.clone();
                async move { stub.watch(request).await }
            })
            .await?;
        Ok(Notices { client: self.clone(), stream, position: None })
    }

    /// A watch that goes on for ever.
    pub fn follow(&self, node: &str) -> Follower {
        let client = Self { patience: Duration::ZERO, ..self.clone() };
        Follower {
            client,
            node: node.to_owned(),
            seen: None,
            notices: None,
            backoff: Backoff::default(),
            wait: None,
        }
    }

    /// Tells how far the kernel of a node has come.
    ///
    /// # Errors
    ///
    /// When nobody answers.
    pub async fn acknowledge(
        &self,
        node: &str,
        acknowledgement: &Acknowledgement,
    ) -> Result<(), ClientError> {
        let request = convert::acknowledgement(node, acknowledgement);
        self.call(|mut stub| {
            let request = request.clone();
            async move { stub.acknowledge(request).await }
        })
        .await
        .map(drop)
    }

    /// The nodes' pools.
    ///
    /// # Errors
    ///
    /// When nobody answers.
    pub async fn pools(&self) -> Result<Vec<PoolStatus>, ClientError> {
        let answer = self
            .call(|mut stub| {
                let request = proto::PoolsRequest {};
                async move { stub.pools(request).await }
            })
            .await?;
        self.read_all(answer.pools, convert::read_pool)
    }

    /// What rests after a release.
    ///
    /// # Errors
    ///
    /// When nobody answers.
    pub async fn cooling(&self) -> Result<Vec<CoolingStatus>, ClientError> {
        let answer = self
            .call(|mut stub| {
                let request = proto::CoolingRequest {};
                async move { stub.cooling(request).await }
            })
            .await?;
        self.read_all(answer.cooling, convert::read_cooling)
    }

    /// What only the allocator or only the VPC knows.
    ///
    /// # Errors
    ///
    /// When nobody answers.
    pub async fn leaks(&self) -> Result<Vec<LeakStatus>, ClientError> {
        let answer = self
            .call(|mut stub| {
                let request = proto::LeaksRequest {};
                async move { stub.leaks(request).await }
            })
            .await?;
        self.read_all(answer.leaks, convert::read_leak)
    }

    /// The container subnets.
    ///
    /// # Errors
    ///
    /// When nobody answers.
    pub async fn subnets(&self) -> Result<Vec<SubnetStatus>, ClientError> {
        let answer = self
            .call(|mut stub| {
                let request = proto::SubnetsRequest {};
                async move { stub.subnets(request).await }
            })
            .await?;
        self.read_all(answer.subnets, convert::read_subnet_use)
    }

    /// Adds a container subnet.
    ///
    /// # Errors
    ///
    /// When the allocator refuses it, or nobody answers.
    pub async fn add_subnet(&self, subnet: &Subnet) -> Result<(), ClientError> {
        let request = proto::AddSubnetRequest { subnet: Some(convert::subnet(subnet)) };
        self.call(|mut stub| {
            let request = request.clone();
            async move { stub.add_subnet(request).await }
        })
        .await
        .map(drop)
    }

    /// Registers a node or changes its settings.
    ///
    /// # Errors
    ///
    /// When the allocator refuses it, or nobody answers.
    pub async fn put_node(&self, node: &Node) -> Result<(), ClientError> {
        let request = proto::PutNodeRequest { node: Some(convert::node(node)) };
        self.call(|mut stub| {
            let request = request.clone();
            async move { stub.put_node(request).await }
        })
        .await
        .map(drop)
    }

    /// Empties a node that is going away.
    ///
    /// # Errors
    ///
    /// When there is no such node, or nobody answers.
    pub async fn drain_node(&self, node: &str) -> Result<(), ClientError> {
        let request = proto::DrainNodeRequest { node: node.to_owned() };
        self.call(|mut stub| {
            let request = request.clone();
            async move { stub.drain_node(request).await }
        })
        .await
        .map(drop)
    }

    /// All security groups and address groups, with their revision.
    ///
    /// # Errors
    ///
    /// When nobody answers.
    pub async fn security_groups(&self) -> Result<Groups, ClientError> {
        let answer = self
            .call(|mut stub| {
                let request = proto::GetSecurityGroupsRequest {};
                async move { stub.get_security_groups(request).await }
            })
            .await?;
        convert::read_security_groups(answer.document).map_err(|bad| self.bad(&bad))
    }

    /// Puts security groups and address groups in place of those that are there; if a revision other than 0 is named, in place of that
    /// revision only.
    ///
    /// # Errors
    ///
    /// When the allocator refuses them, or nobody answers.
    pub async fn put_security_groups(&self, groups: &Groups) -> Result<SecurityGroupsPut, ClientError> {
        let request = proto::PutSecurityGroupsRequest { document: Some(convert::security_groups(groups)) };
        let answer = self
            .call(|mut stub| {
                let request = request.clone();
                async move { stub.put_security_groups(request).await }
            })
            .await?;
        Ok(SecurityGroupsPut { revision: answer.revision, changed: answer.changed })
    }

    /// Gives a pod other security groups. With `wait_for_agent`, returns only when they are in force on the pod's node.
    ///
    /// # Errors
    ///
    /// When the allocator, the VPC or the agent refuses, or nobody answers. The same call may be made again.
    pub async fn set_security_groups(
        &self,
        key: &PodKey,
        groups: &[String],
        wait_for_agent: Option<Duration>,
    ) -> Result<Allocation, ClientError> {
        let request = proto::SetSecurityGroupsRequest {
            key: Some(convert::key(key)),
            security_groups: groups.to_vec(),
            timeout_ms: None,
            wait_for_agent_ms: wait_for_agent.map(convert::millis),
        };
        let answer = self
            .call(|mut stub| {
                let request = request.clone();
                async move { stub.set_security_groups(request).await }
            })
            .await?;
        self.allocation(answer.allocation)
    }

    fn allocation(&self, allocation: Option<proto::Allocation>) -> Result<Allocation, ClientError> {
        let missing =
            || ClientError::Answer { address: self.address.clone(), problem: "no allocation".to_owned() };
        convert::read_allocation(allocation.ok_or_else(missing)?).map_err(|bad| self.bad(&bad))
    }

    /// An operator's yes to what is held back.
    ///
    /// # Errors
    ///
    /// When there is nothing of that name, or nobody answers.
    pub async fn confirm(&self, what: &Confirm) -> Result<(), ClientError> {
        let request = convert::confirm(what);
        self.call(|mut stub| {
            let request = request.clone();
            async move { stub.confirm(request).await }
        })
        .await
        .map(drop)
    }

    fn read_all<M, T>(
        &self,
        messages: Vec<M>,
        read: impl Fn(M) -> Result<T, convert::Bad>,
    ) -> Result<Vec<T>, ClientError> {
        messages.into_iter().map(read).collect::<Result<_, _>>().map_err(|bad| self.bad(&bad))
    }
}

/// An error with those that led to it; libraries keep the interesting one at the end.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    text
}

fn words(status: &Status) -> String {
    match std::error::Error::source(status) {
        Some(source) => chain(source),
        None => status.message().to_owned(),
    }
}

/// One watch.
#[derive(Debug)]
pub struct Notices {
    client: Client,
    stream: Streaming<proto::WatchResponse>,
    position: Option<Position>,
}

impl Notices {
    /// The next notice.
    ///
    /// # Errors
    ///
    /// When the watch has ended.
    pub async fn next(&mut self) -> Result<Notice, ClientError> {
        match self.stream.message().await {
            Ok(Some(message)) => {
                let (notice, position) =
                    convert::read_notice(message).map_err(|bad| self.client.bad(&bad))?;
                self.position = Some(position);
                Ok(notice)
            }
            Ok(None) => Err(ClientError::Unreachable {
                address: self.client.address.clone(),
                problem: "it has ended the watch".to_owned(),
            }),
            Err(status) => Err(self.client.error(&status)),
        }
    }

    /// How far it has come: where another watch can go on.
    pub fn position(&self) -> Option<&Position> {
        self.position.as_ref()
    }
}

/// What a [`Follower`] meets.
#[derive(Clone, Debug)]
pub enum Event {
    /// Something to tell. Comes at least once after each [`Event::Away`], if only to say that nothing has changed.
    Notice(Notice),
    /// The server is away, or does not give a watch. It is tried again.
    Away(ClientError),
}

/// A node's watch that goes on after the server was away: from where it was, or, when the server no longer knows what happened since, with
/// a snapshot.
#[derive(Debug)]
pub struct Follower {
    client: Client,
    node: String,
    seen: Option<Position>,
    notices: Option<Notices>,
    backoff: Backoff,
    /// Until when to wait before the next attempt.
    wait: Option<tokio::time::Instant>,
}

impl Follower {
    /// The client, for acknowledging.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The next event. May be dropped and called again without losing anything.
    pub async fn next(&mut self) -> Event {
        if let Some(until) = self.wait {
            tokio::time::sleep_until(until).await;
            self.wait = None;
        }
        let result = match &mut self.notices {
            Some(notices) => notices.next().await,
            None => match self.client.watch(&self.node, self.seen.as_ref()).await {
                Ok(notices) => self.notices.insert(notices).next().await,
                Err(error) => Err(error),
            },
        };
        match result {
            Ok(notice) => {
                self.backoff.reset();
                self.seen = self.notices.as_ref().and_then(Notices::position).cloned();
                Event::Notice(notice)
            }
            Err(error) => {
                self.notices = None;
                self.wait = Some(tokio::time::Instant::now() + self.backoff.pause());
                Event::Away(error)
            }
        }
    }

    /// How far it has come.
    pub fn position(&self) -> Option<&Position> {
        self.seen.as_ref()
    }

    /// Forgets where it was: the next notice is a snapshot.
    pub fn restart(&mut self) {
        self.notices = None;
        self.seen = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound_and_differ() {
        let (from, to) = (Duration::from_millis(100), Duration::from_secs(1));
        let mut backoff = Backoff::new(from, to);
        for whole in [100, 200, 400, 800, 1000, 1000] {
            let pause = backoff.pause();
            assert!((whole / 2..=whole).contains(&pause.as_millis()), "{pause:?} of {whole} ms");
        }
        backoff.reset();
        assert!(backoff.pause() <= from);
        let pauses: std::collections::HashSet<_> = (0..8).map(|_| Backoff::new(from, to).pause()).collect();
        assert!(pauses.len() > 1);
    }
}

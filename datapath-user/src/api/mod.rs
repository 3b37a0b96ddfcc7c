//! The agent's service for the CNI plugin, `eniway.agent.v1`, on a unix socket in the run directory.
//!
//! What a runtime asks for takes several steps, and runtimes give up half way: each call runs as a task of its own,
//! to its end, and calls for one sandbox wait for each other.

mod backing;
mod request;

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use eniway_agent_api::{
    self as proto, AddRequest, AddResponse, CheckRequest, CheckResponse, DelRequest, DelResponse,
    ExpectRequest, ExpectResponse, GcRequest, GcResponse, Reason, RepairRequest, RepairResponse,
    StatusRequest, StatusResponse,
    agent_server::{Agent, AgentServer},
};
use eniway_ipam::rpc::{LocalSocket, local_only};
use tokio::{
    sync::{Mutex as AsyncMutex, OwnedMutexGuard, mpsc, oneshot},
    task::JoinHandle,
    time::timeout,
};
use tonic::{
    Request, Response, Status, service::interceptor::InterceptedService, transport::Server as Transport,
};

pub(crate) use self::backing::Backing;
use crate::{
    agent::asks::{Answer, Ask, Refused, View},
    attachment::Attachment,
    audit::Target,
    netns::{Namespace, NetnsError},
    wiring,
};

/// Questions that wait for a busy agent.
const WAITING: usize = 64;
/// How long a pod that has its interface waits for the kernel to forward.
const FORWARDING: Duration = Duration::from_secs(30);
/// How long an end waits for the kernel to be rid of the pod.
const REMOVAL: Duration = Duration::from_secs(30);

/// Serves until the task is aborted. Answers with the questions that the agent has to answer.
pub(crate) fn serve(
    mut socket: LocalSocket,
    backing: Backing,
    node: &str,
) -> (JoinHandle<()>, mpsc::Receiver<Ask>) {
    let (ask, asks) = mpsc::channel(WAITING);
    let service = Service {
        inner: Arc::new(Inner { ask, backing, node: node.to_owned(), sandboxes: Mutex::default() }),
    };
    let server = async move {
        let service = InterceptedService::new(AgentServer::new(service), local_only);
        let router = Transport::builder().add_service(service);
        if let Err(error) = router.serve_with_incoming(socket.incoming()).await {
            log::error!("the CNI plugin cannot be served any more: {error}");
        }
    };
    (tokio::spawn(server), asks)
}

struct Service {
    inner: Arc<Inner>,
}

struct Inner {
    ask: mpsc::Sender<Ask>,
    backing: Backing,
    node: String,
    sandboxes: Mutex<HashMap<String, Weak<AsyncMutex<()>>>>,
}

impl Service {
    /// Runs a call to its end, whether or not the client waits for it.
    async fn call<T: Send + 'static, C: Future<Output = Result<T, Status>> + Send + 'static>(
        &self,
        call: impl FnOnce(Arc<Inner>) -> C,
    ) -> Result<Response<T>, Status> {
        match tokio::spawn(call(Arc::clone(&self.inner))).await {
            Ok(answer) => answer.map(Response::new),
            Err(error) => Err(Status::internal(format!("the call ended early: {error}"))),
        }
    }
}

#[tonic::async_trait]
impl Agent for Service {
    async fn add(&self, request: Request<AddRequest>) -> Result<Response<AddResponse>, Status> {
        self.call(|inner| async move { inner.add(request.into_inner()).await }).await
    }

    async fn del(&self, request: Request<DelRequest>) -> Result<Response<DelResponse>, Status> {
        self.call(|inner| async move { inner.del(request.into_inner()).await }).await
    }

    async fn check(&self, request: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        self.call(|inner| async move { inner.check(request.into_inner()).await }).await
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let problem = self.inner.ask(Ask::Problem).await?.unwrap_or_default();
        Ok(Response::new(StatusResponse { problem }))
    }

    async fn gc(&self, request: Request<GcRequest>) -> Result<Response<GcResponse>, Status> {
        self.call(|inner| async move { inner.gc(request.into_inner()).await }).await
    }

    async fn expect(&self, _: Request<ExpectRequest>) -> Result<Response<ExpectResponse>, Status> {
        self.inner.ask(Ask::Expect).await?;
        Ok(Response::new(ExpectResponse {}))
    }

    async fn repair(&self, request: Request<RepairRequest>) -> Result<Response<RepairResponse>, Status> {
        let RepairRequest { pods, parents, tables, leftovers } = request.into_inner();
        let mut targets: BTreeSet<Target> = pods.into_iter().map(Target::Pod).collect();
        targets.extend(parents.into_iter().map(Target::Parent));
        targets.extend(tables.then_some(Target::Tables));
        targets.extend(leftovers.then_some(Target::Leftovers));
        let repair = async |inner: Arc<Inner>| {
            let problems = inner.ask(|answer| Ask::Repair(targets, answer)).await?;
            Ok(RepairResponse { problems })
        };
        self.call(repair).await
    }
}

impl Inner {
    async fn ask<T>(&self, ask: impl FnOnce(Answer<T>) -> Ask) -> Result<T, Status> {
        let (answer, answered) = oneshot::channel();
        let stopping = || proto::status(Reason::TryAgain, "the agent is stopping");
        self.ask.send(ask(answer)).await.map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())
    }

    async fn lock(&self, container_id: &str) -> OwnedMutexGuard<()> {
        let mutex = {
            let mut sandboxes = self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner);
            sandboxes.retain(|_, mutex| mutex.strong_count() > 0);
            let known = sandboxes.get(container_id).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let mutex = Arc::default();
                sandboxes.insert(container_id.to_owned(), Arc::downgrade(&mutex));
                mutex
            })
        };
        mutex.lock_owned().await
    }

    async fn add(&self, request: AddRequest) -> Result<AddResponse, Status> {
        let wanted = request::attachment(&request)?;
        let _alone = self.lock(&wanted.container_id).await;
        check_namespace(&wanted.netns)?;
        let container_id = wanted.container_id.clone();
        let claimed = match self.ask(|answer| Ask::Attach(Box::new(wanted.clone()), answer)).await? {
            Ok(claimed) => claimed,
            Err(Refused::Exists(known)) => {
                let message = format!(
                    "container {container_id} has interface {} in {} already; delete it first",
                    known.interface,
                    known.netns.display()
                );
                return Err(proto::status(Reason::Exists, message));
            }
            Err(Refused::Because(message)) => {
                return Err(proto::status(Reason::Refused, message));
            }
        };
        match self.connect(&wanted, claimed, request.mode()).await {
            Ok(view) => request::answer(&view),
            Err(error) => {
                // Nothing half made: the interface goes back, the kernel forgets the pod, and then we do.
                let undone = self.disconnect(&container_id, &wanted.uid).await;
                if let Err(undo) = undone {
                    log::error!("container {container_id}: {}", undo.message());
                }
                Err(error)
            }
        }
    }

    async fn connect(
        &self,
        wanted: &Attachment,
        claimed: Option<(u64, u32)>,
        mode: proto::Mode,
    ) -> Result<Box<View>, Status> {
        let (owner, generation) = match (claimed, &self.backing) {
            (Some(claimed), _) => claimed,
            (None, Backing::Allocator(allocator)) => {
                backing::allocate(allocator, &self.node, wanted, mode).await?
            }
            (None, Backing::File) => {
                let message = format!("pod {}/{} has left the file", wanted.namespace, wanted.name);
                return Err(proto::status(Reason::Refused, message));
            }
        };
        let up = self.ask(|answer| Ask::Up(owner, generation, answer));
        match timeout(FORWARDING, up).await {
            Ok(Ok(Ok(view))) => Ok(view),
            Ok(Ok(Err(problem))) => Err(proto::status(Reason::Refused, problem)),
            Ok(Err(stopping)) => Err(stopping),
            Err(_) => {
                let message = format!("the kernel did not forward for the pod within {FORWARDING:?}");
                Err(proto::status(Reason::TryAgain, message))
            }
        }
    }

    async fn del(&self, request: DelRequest) -> Result<DelResponse, Status> {
        let (container_id, interface) = request::identity(request.attachment)?;
        let _alone = self.lock(&container_id).await;
        let known = self.attachments().await?.into_iter().find(|known| known.container_id == container_id);
        if known.as_ref().is_some_and(|known| known.interface != interface) {
            return Ok(DelResponse {});
        }
        let uid = known.map(|known| known.uid).or(request.pod.map(|pod| pod.uid));
        self.disconnect(&container_id, &uid.unwrap_or_default()).await?;
        Ok(DelResponse {})
    }

    /// Takes everything of a sandbox back.
    async fn disconnect(&self, container_id: &str, uid: &str) -> Result<(), Status> {
        let owners = match &self.backing {
            Backing::File => {
                let view = self.ask(|answer| Ask::Look(container_id.to_owned(), answer)).await?;
                let brought =
                    self.attachments().await?.iter().any(|known| known.container_id == container_id);
                view.filter(|_| brought).map(|view| view.owner).into_iter().collect()
            }
            Backing::Allocator(allocator) => {
                backing::release(allocator, &self.node, container_id, uid).await?
            }
        };
        self.ask(|answer| Ask::Detach(container_id.to_owned(), answer)).await?;
        self.wait_until_gone(owners).await
    }

    async fn wait_until_gone(&self, owners: Vec<u64>) -> Result<(), Status> {
        for owner in owners {
            let gone = timeout(REMOVAL, self.ask(|answer| Ask::Gone(owner, answer))).await;
            gone.map_err(|_| {
                let message = format!("the kernel still forwards for the pod after {REMOVAL:?}");
                proto::status(Reason::TryAgain, message)
            })??;
        }
        Ok(())
    }

    async fn check(&self, request: CheckRequest) -> Result<CheckResponse, Status> {
        let (container_id, interface) = request::identity(request.attachment)?;
        let _alone = self.lock(&container_id).await;
        let wrong =
            |message: String| proto::status(Reason::Check, format!("container {container_id}: {message}"));
        let view = self.ask(|answer| Ask::Look(container_id.clone(), answer)).await?;
        let view = view.ok_or_else(|| wrong("the agent knows no such sandbox".to_owned()))?;
        if view.pod.interface != interface {
            return Err(wrong(format!("its interface is {}, not {interface}", view.pod.interface)));
        }
        if let Some(problem) = view.problem {
            return Err(wrong(problem));
        }
        let address = |text: &String| text.split('/').next().unwrap_or_default() == view.pod.ipv4.to_string();
        if let Some(other) = request.addresses.iter().find(|text| !address(text)) {
            return Err(wrong(format!("its address is {}, not {other}", view.pod.ipv4)));
        }
        let path = if request.netns.is_empty() { view.pod.netns.clone() } else { Some(request.netns.into()) };
        if let Some(path) = path {
            check_namespace(&path)?;
            let mut spec = crate::agent::pod_spec(&view.pod);
            spec.netns = Some(path);
            wiring::verify(&spec).await.map_err(|error| wrong(error.to_string()))?;
        }
        Ok(CheckResponse {})
    }

    async fn gc(&self, request: GcRequest) -> Result<GcResponse, Status> {
        let mut valid = Vec::new();
        for attachment in request.valid {
            valid.push(request::identity(Some(attachment))?);
        }
        let is_valid = |container_id: &str, interface: &str| {
            valid.iter().any(|(id, name)| id == container_id && name.as_str() == interface)
        };
        let mut stale: Vec<(String, String, String)> = match &self.backing {
            Backing::File => Vec::new(),
            Backing::Allocator(allocator) => backing::brought(allocator, &self.node).await?,
        };
        let known = self.attachments().await?;
        stale.extend(
            known.into_iter().map(|known| (known.container_id, known.interface.to_string(), known.uid)),
        );
        stale.retain(|(container_id, interface, _)| !is_valid(container_id, interface));
        stale.sort_unstable();
        stale.dedup();
        let mut removed = Vec::new();
        let mut failed = Vec::new();
        for (container_id, interface, uid) in stale {
            let _alone = self.lock(&container_id).await;
            match self.disconnect(&container_id, &uid).await {
                Ok(()) => removed.push(proto::Attachment { container_id, interface }),
                Err(error) => failed.push((container_id, error)),
            }
        }
        match failed.into_iter().next() {
            None => Ok(GcResponse { removed }),
            Some((container_id, error)) => {
                let message = format!("container {container_id}: {}", error.message());
                Err(proto::status(proto::reason(&error).unwrap_or(Reason::Refused), message))
            }
        }
    }

    async fn attachments(&self) -> Result<Vec<Attachment>, Status> {
        self.ask(Ask::Attachments).await
    }
}

fn check_namespace(path: &Path) -> Result<(), Status> {
    let wrong = |error: NetnsError| {
        let reason = match error {
            NetnsError::Gone { .. } => Reason::NoNamespace,
            _ => Reason::Invalid,
        };
        proto::status(reason, error.to_string())
    };
    let namespace = Namespace::open(path).map_err(wrong)?;
    let own = Namespace::current().map_err(wrong)?;
    if namespace.same_as(&own) {
        let message = wiring::WiringError::HostNetwork(path.to_owned()).to_string();
        return Err(proto::status(Reason::Invalid, message));
    }
    Ok(())
}

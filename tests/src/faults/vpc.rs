//! A VPC that outlives the allocators: [`MemoryVpc`] behind a unix socket, one JSON line for a call and one for its answer.
//!
//! What a caller has sent takes effect whether the caller lives on or not. [`Server::at`] stops a process at the worst
//! moments: when its call has arrived, when it has taken effect, when it has been answered.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use eniway_ipam::{
    MemoryVpc, Vpc,
    vpc::{Attachment, CreateInterface, Page, SubnetUsage, VpcError, VpcInterface},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
};

/// The longest a call may take. The server's latency and its injected faults stay far below.
const LIMIT: Duration = Duration::from_secs(5);

#[derive(Serialize, Deserialize)]
enum Call {
    Create(CreateInterface),
    Delete(String),
    Attach(String, Attachment),
    Detach(String),
    SetSecurityGroups(String, Vec<String>),
    List(String, Option<String>),
    Usage(Vec<String>),
}

#[derive(Serialize, Deserialize)]
struct Request {
    /// Which allocator.
    caller: String,
    call: Call,
}

#[derive(Serialize, Deserialize)]
enum Answer {
    Interface(VpcInterface),
    Done,
    Page(Page),
    Usage(Vec<SubnetUsage>),
}

/// A moment in the life of a call that changes something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    /// It has arrived and has no effect yet.
    Arrived,
    /// It has taken effect, and nobody knows.
    Effective,
    /// The answer is on its way.
    Answered,
}

type Action = Box<dyn FnOnce() + Send>;

/// The server; ends with the runtime that it was started on.
pub(super) struct Server {
    vpc: Arc<MemoryVpc>,
    armed: Mutex<HashMap<String, (Moment, Action)>>,
}

impl Server {
    /// Serves the VPC on a socket. To be called on a tokio runtime.
    pub(super) fn start(vpc: Arc<MemoryVpc>, socket: &Path) -> io::Result<Arc<Self>> {
        let listener = UnixListener::bind(socket)?;
        let server = Arc::new(Self { vpc, armed: Mutex::default() });
        let accepting = server.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let server = accepting.clone();
                // A caller that has died does not want the answer any more.
                tokio::spawn(async move { server.answer(stream).await.unwrap_or_default() });
            }
        });
        Ok(server)
    }

    /// Does this at that moment of the caller's next call that changes something.
    pub(super) fn at(&self, caller: &str, moment: Moment, action: Action) {
        self.armed().insert(caller.to_owned(), (moment, action));
    }

    /// No longer. Returns false when it has been done.
    pub(super) fn disarm(&self, caller: &str) -> bool {
        self.armed().remove(caller).is_some()
    }

    fn armed(&self) -> std::sync::MutexGuard<'_, HashMap<String, (Moment, Action)>> {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reach(&self, caller: &str, moment: Moment) {
        let mut armed = self.armed();
        if armed.get(caller).is_some_and(|(wanted, _)| *wanted == moment)
            && let Some((_, action)) = armed.remove(caller)
        {
            action();
        }
    }

    async fn answer(&self, stream: UnixStream) -> io::Result<()> {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        let Request { caller, call } = serde_json::from_str(&line)?;
        let changes = !matches!(call, Call::List(..) | Call::Usage(_));
        if changes {
            self.reach(&caller, Moment::Arrived);
        }
        let answer = self.make(call).await;
        if changes {
            self.reach(&caller, Moment::Effective);
        }
        let mut text = serde_json::to_vec(&answer)?;
        text.push(b'\n');
        stream.get_mut().write_all(&text).await?;
        if changes {
            self.reach(&caller, Moment::Answered);
        }
        Ok(())
    }

    async fn make(&self, call: Call) -> Result<Answer, VpcError> {
        let vpc = &self.vpc;
        Ok(match call {
            Call::Create(request) => Answer::Interface(vpc.create(request).await?),
            Call::Attach(id, to) => Answer::Interface(vpc.attach(&id, to).await?),
            Call::Delete(id) => {
                vpc.delete(&id).await?;
                Answer::Done
            }
            Call::Detach(id) => {
                vpc.detach(&id).await?;
                Answer::Done
            }
            Call::SetSecurityGroups(id, groups) => {
                vpc.set_security_groups(&id, &groups).await?;
                Answer::Done
            }
            Call::List(owner, page) => Answer::Page(vpc.list(&owner, page).await?),
            Call::Usage(subnets) => Answer::Usage(vpc.usage(&subnets).await?),
        })
    }
}

/// The VPC, seen from an allocator's process.
pub(super) struct RemoteVpc {
    pub(super) caller: String,
    pub(super) socket: PathBuf,
}

impl RemoteVpc {
    async fn call(&self, call: Call) -> Result<Answer, VpcError> {
        let request = Request { caller: self.caller.clone(), call };
        match tokio::time::timeout(LIMIT, self.exchange::<Result<Answer, VpcError>>(&request)).await {
            Ok(Ok(answer)) => answer,
            // Nobody knows whether the call has arrived.
            Ok(Err(_)) | Err(_) => Err(VpcError::TimedOut),
        }
    }

    async fn exchange<T: DeserializeOwned>(&self, request: &Request) -> io::Result<T> {
        let mut stream = BufReader::new(UnixStream::connect(&self.socket).await?);
        let mut text = serde_json::to_vec(request)?;
        text.push(b'\n');
        stream.get_mut().write_all(&text).await?;
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        Ok(serde_json::from_str(&line)?)
    }

    async fn interface(&self, call: Call) -> Result<VpcInterface, VpcError> {
        match self.call(call).await? {
            Answer::Interface(interface) => Ok(interface),
            _ => Err(other_answer()),
        }
    }
}

fn other_answer() -> VpcError {
    VpcError::Failed { what: "the answer is to another call".to_owned() }
}

#[tonic::async_trait]
impl Vpc for RemoteVpc {
    async fn create(&self, request: CreateInterface) -> Result<VpcInterface, VpcError> {
        self.interface(Call::Create(request)).await
    }

    async fn delete(&self, id: &str) -> Result<(), VpcError> {
        self.call(Call::Delete(id.to_owned())).await.map(drop)
    }

    async fn attach(&self, id: &str, to: Attachment) -> Result<VpcInterface, VpcError> {
        self.interface(Call::Attach(id.to_owned(), to)).await
    }

    async fn detach(&self, id: &str) -> Result<(), VpcError> {
        self.call(Call::Detach(id.to_owned())).await.map(drop)
    }

    async fn set_security_groups(&self, id: &str, groups: &[String]) -> Result<(), VpcError> {
        self.call(Call::SetSecurityGroups(id.to_owned(), groups.to_vec())).await.map(drop)
    }

    async fn list(&self, owner: &str, page: Option<String>) -> Result<Page, VpcError> {
        match self.call(Call::List(owner.to_owned(), page)).await? {
            Answer::Page(page) => Ok(page),
            _ => Err(other_answer()),
        }
    }

    async fn usage(&self, subnets: &[String]) -> Result<Vec<SubnetUsage>, VpcError> {
        match self.call(Call::Usage(subnets.to_vec())).await? {
            Answer::Usage(usage) => Ok(usage),
            _ => Err(other_answer()),
        }
    }
}

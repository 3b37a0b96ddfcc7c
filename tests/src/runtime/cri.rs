//! As much of the container runtime interface (`runtime.v1`) as kubelet uses for sandboxes.

#![expect(missing_docs, reason = "the messages are the interface's")]

use std::{collections::HashMap, path::Path};

use tonic::{
    Request, Status,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

#[derive(Clone, PartialEq, prost::Message)]
pub struct Metadata {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub uid: String,
    #[prost(string, tag = "3")]
    pub namespace: String,
    #[prost(uint32, tag = "4")]
    pub attempt: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct PortMapping {
    /// 0: TCP.
    #[prost(int32, tag = "1")]
    pub protocol: i32,
    #[prost(int32, tag = "2")]
    pub container_port: i32,
    #[prost(int32, tag = "3")]
    pub host_port: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Linux {
    #[prost(string, tag = "1")]
    pub cgroup_parent: String,
}

/// A sandbox to be.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SandboxConfig {
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<Metadata>,
    #[prost(message, repeated, tag = "5")]
    pub port_mappings: Vec<PortMapping>,
    #[prost(map = "string, string", tag = "7")]
    pub annotations: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    pub linux: Option<Linux>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RunRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<SandboxConfig>,
}

/// The messages that hold nothing but a sandbox's id.
#[derive(Clone, PartialEq, prost::Message)]
struct Id {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Empty {}

#[derive(Clone, PartialEq, prost::Message)]
struct List {
    #[prost(message, repeated, tag = "1")]
    items: Vec<Id>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Network {
    #[prost(string, tag = "1")]
    ip: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SandboxStatus {
    #[prost(message, optional, tag = "5")]
    network: Option<Network>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusAnswer {
    #[prost(message, optional, tag = "1")]
    status: Option<SandboxStatus>,
}

/// A connection to a runtime. Cheap to clone.
#[derive(Clone)]
pub struct Runtime(Channel);

impl Runtime {
    /// Connects when it is first used. To be called on a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the path cannot be a socket's.
    pub fn new(socket: &Path) -> Result<Self, tonic::transport::Error> {
        Ok(Self(Endpoint::from_shared(format!("unix:{}", socket.display()))?.connect_lazy()))
    }

    async fn call<Q, A>(&self, method: &'static str, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let mut client = Grpc::new(self.0.clone());
        client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let path = PathAndQuery::from_static(method);
        let answer = client.unary(Request::new(request), path, ProstCodec::<Q, A>::default()).await?;
        Ok(answer.into_inner())
    }

    /// Whether it answers.
    pub async fn is_up(&self) -> bool {
        self.list().await.is_ok()
    }

    /// Starts a sandbox, with its network. Answers with its id.
    ///
    /// # Errors
    ///
    /// The runtime's.
    pub async fn run(&self, config: SandboxConfig) -> Result<String, Status> {
        let request = RunRequest { config: Some(config) };
        let Id { id } = self.call("/runtime.v1.RuntimeService/RunPodSandbox", request).await?;
        Ok(id)
    }

    /// Stops a sandbox and takes its network away.
    ///
    /// # Errors
    ///
    /// The runtime's.
    pub async fn stop(&self, id: &str) -> Result<(), Status> {
        let _: Empty =
            self.call("/runtime.v1.RuntimeService/StopPodSandbox", Id { id: id.to_owned() }).await?;
        Ok(())
    }

    /// Removes a sandbox.
    ///
    /// # Errors
    ///
    /// The runtime's.
    pub async fn remove(&self, id: &str) -> Result<(), Status> {
        let _: Empty =
            self.call("/runtime.v1.RuntimeService/RemovePodSandbox", Id { id: id.to_owned() }).await?;
        Ok(())
    }

    /// The ids of all sandboxes.
    ///
    /// # Errors
    ///
    /// The runtime's.
    pub async fn list(&self) -> Result<Vec<String>, Status> {
        let List { items } = self.call("/runtime.v1.RuntimeService/ListPodSandbox", Empty {}).await?;
        Ok(items.into_iter().map(|item| item.id).collect())
    }

    /// A sandbox's address, as kubelet learns it.
    ///
    /// # Errors
    ///
    /// The runtime's.
    pub async fn address(&self, id: &str) -> Result<String, Status> {
        let request = Id { id: id.to_owned() };
        let answer: StatusAnswer = self.call("/runtime.v1.RuntimeService/PodSandboxStatus", request).await?;
        Ok(answer.status.and_then(|status| status.network).map(|network| network.ip).unwrap_or_default())
    }
}

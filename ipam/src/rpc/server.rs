//! The service.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_stream::wrappers;
use tonic::{
    Request, Response, Status,
    transport::{Certificate, Identity, Server, ServerTlsConfig},
};

use super::{
    LocalSocket, MAX_MESSAGE, Tls, convert, local_only,
    proto::{self, ipam_server::IpamServer},
};
use crate::{
    Allocator,
    api::{Released, SecurityGroupsPut},
    feed::{Notice, Position},
};

/// How long calls under way may take once the server ends. Whoever is cut off asks again.
const FAREWELL: Duration = Duration::from_secs(3);
/// A watcher that does not read holds this many notices at most; the feed keeps the rest.
const NOTICES: usize = 4;
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Why the service cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket cannot be made.
    #[error("cannot serve on {address}: {source}")]
    Bind {
        /// Where.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody else serves there.
    #[error("another server listens on {}; stop it, or give this one another socket", .0.display())]
    Taken(PathBuf),
    /// A file that is no socket.
    #[error("{} is not a socket; remove it, or give the server another path", .0.display())]
    NoSocket(PathBuf),
    /// Certificate, key or authority.
    #[error("the certificates for {address} are not usable: {source}")]
    Tls {
        /// Where.
        address: String,
        /// What is wrong.
        source: tonic::transport::Error,
    },
    /// It stopped by itself.
    #[error("serving on {address} ended: {source}")]
    Ended {
        /// Where.
        address: String,
        /// What happened.
        source: tonic::transport::Error,
    },
}

/// A place to serve on, already bound.
pub struct Listener {
    address: String,
    kind: Kind,
}

enum Kind {
    Unix(LocalSocket),
    Tcp { listener: TcpListener, tls: Tls },
}

impl Listener {
    /// A unix socket for root and this process' user. What a server that was killed has left there is replaced.
    ///
    /// # Errors
    ///
    /// When another server listens there, or the directory cannot be made or written.
    pub fn unix(path: impl AsRef<Path>) -> Result<Self, ServeError> {
        let path = path.as_ref();
        let address = format!("unix:{}", path.display());
        Ok(Self { address, kind: Kind::Unix(LocalSocket::bind(path)?) })
    }

    /// A TCP port, for clients that show a certificate.
    ///
    /// # Errors
    ///
    /// When the port is taken.
    pub async fn tls(address: SocketAddr, tls: Tls) -> Result<Self, ServeError> {
        let failed = |source| ServeError::Bind { address: address.to_string(), source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?.to_string();
        Ok(Self { address, kind: Kind::Tcp { listener, tls } })
    }

    /// Where it is, with the port that the system has chosen.
    pub fn address(&self) -> &str {
        &self.address
    }
}

/// Answers on all listeners until `shutdown` returns. The allocator goes on.
///
/// # Errors
///
/// When one of the listeners cannot be served.
pub async fn serve(
    allocator: Allocator,
    listeners: Vec<Listener>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let (end, ending) = watch::channel(false);
    let mut servers = JoinSet::new();
    for Listener { address, kind } in listeners {
        let service = IpamServer::new(Service { allocator: allocator.clone(), ending: ending.clone() })
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        let mut server = Server::builder()
            .tcp_nodelay(true)
            .http2_keepalive_interval(Some(KEEP_ALIVE))
            .http2_keepalive_timeout(Some(KEEP_ALIVE));
        let mut ending = ending.clone();
        let ended = async move {
            // The sender outlives all servers.
            let _ = ending.wait_for(|end| *end).await;
        };
        match kind {
            Kind::Unix(mut socket) => {
                let router = server
                    .add_service(tonic::service::interceptor::InterceptedService::new(service, local_only));
                servers.spawn(async move {
                    let result = router.serve_with_incoming_shutdown(socket.incoming(), ended).await;
                    drop(socket);
                    result.map_err(|source| ServeError::Ended { address, source })
                });
            }
            Kind::Tcp { listener, tls } => {
                let config = ServerTlsConfig::new()
                    .identity(Identity::from_pem(&tls.certificate, &tls.key))
                    .client_ca_root(Certificate::from_pem(&tls.ca));
                let unusable = |source| ServeError::Tls { address: address.clone(), source };
                let router = server.tls_config(config).map_err(unusable)?.add_service(service);
                let incoming = wrappers::TcpListenerStream::new(listener);
                servers.spawn(async move {
                    let result = router.serve_with_incoming_shutdown(incoming, ended).await;
                    result.map_err(|source| ServeError::Ended { address, source })
                });
            }
        }
    }
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            // A server that ends by itself has failed; the others are of no use to those who ask it.
            Some(ended) = servers.join_next() => if let Ok(result) = ended { result? },
            else => {
                shutdown.await;
                break;
            }
        }
    }
    end.send_replace(true);
    let farewell = async { while servers.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(FAREWELL, farewell).await;
    servers.shutdown().await;
    Ok(())
}

struct Service {
    allocator: Allocator,
    ending: watch::Receiver<bool>,
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl proto::ipam_server::Ipam for Service {
    async fn allocate(&self, request: Request<proto::AllocateRequest>) -> Answer<proto::AllocateResponse> {
        let (request, wait) = convert::read_allocate_request(request.into_inner())?;
        let allocated = self.allocator.allocate(&request).await.map_err(|error| convert::error(&error))?;
        if let Some(wait) = wait {
            self.allocator.programmed(&allocated, wait).await.map_err(|error| convert::error(&error))?;
        }
        Ok(Response::new(proto::AllocateResponse { allocation: Some(convert::allocation(&allocated)) }))
    }

    async fn release(&self, request: Request<proto::ReleaseRequest>) -> Answer<proto::ReleaseResponse> {
        let proto::ReleaseRequest { key, generation } = request.into_inner();
        let key = convert::read_key(key)?;
        let found = self.allocator.release(&key, generation).await.map_err(|error| convert::error(&error))?;
        Ok(Response::new(proto::ReleaseResponse { released: found == Released::Now }))
    }

    async fn list(&self, request: Request<proto::ListRequest>) -> Answer<proto::ListResponse> {
        let mut allocations = self.allocator.list(request.into_inner().node.as_deref());
        allocations.sort_by(|a, b| (&a.node, &a.namespace, &a.name).cmp(&(&b.node, &b.namespace, &b.name)));
        Ok(Response::new(proto::ListResponse {
            allocations: allocations.iter().map(convert::allocation).collect(),
        }))
    }

    type WatchStream = wrappers::ReceiverStream<Result<proto::WatchResponse, Status>>;

    async fn watch(&self, request: Request<proto::WatchRequest>) -> Answer<Self::WatchStream> {
        let proto::WatchRequest { node, from_revision, store } = request.into_inner();
        let from = from_revision.map(|revision| Position { store, revision });
        let mut watch = self.allocator.watch(&node, from.as_ref());
        let store = self.allocator.store_id();
        let mut ending = self.ending.clone();
        let confirmed =
            self.allocator.nodes().iter().find(|known| known.name == node).map_or(0, |node| node.confirmed);
        let (send, receive) = mpsc::channel(NOTICES);
        tokio::spawn(async move {
            // A watch that continues and has nothing to tell says that much, so that its client knows where it stands.
            let mut first = tokio::select! {
                biased;
                notice = watch.next() => notice,
                () = std::future::ready(()) => from.map(|position| Notice::Changes {
                    revision: position.revision,
                    confirmed,
                    groups: None,
                    changes: Vec::new(),
                }),
            };
            loop {
                let notice = match first.take() {
                    Some(notice) => notice,
                    None => tokio::select! {
                        notice = watch.next() => match notice {
                            Some(notice) => notice,
                            None => break,
                        },
                        _ = ending.wait_for(|end| *end) => break,
                        () = send.closed() => return,
                    },
                };
                if send.send(Ok(convert::notice(&notice, &store))).await.is_err() {
                    return;
                }
            }
            let _ = send.try_send(Err(convert::error(&crate::Error::Closed)));
        });
        Ok(Response::new(wrappers::ReceiverStream::new(receive)))
    }

    async fn acknowledge(
        &self,
        request: Request<proto::AcknowledgeRequest>,
    ) -> Answer<proto::AcknowledgeResponse> {
        let (node, acknowledgement) = convert::read_acknowledgement(request.into_inner())?;
        self.allocator.ack(&node, acknowledgement);
        Ok(Response::new(proto::AcknowledgeResponse {}))
    }

    async fn pools(&self, _: Request<proto::PoolsRequest>) -> Answer<proto::PoolsResponse> {
        let pools = self.allocator.pools().iter().map(convert::pool).collect();
        Ok(Response::new(proto::PoolsResponse { pools }))
    }

    async fn cooling(&self, _: Request<proto::CoolingRequest>) -> Answer<proto::CoolingResponse> {
        let cooling = self.allocator.cooling().iter().map(convert::cooling).collect();
        Ok(Response::new(proto::CoolingResponse { cooling }))
    }

    async fn leaks(&self, _: Request<proto::LeaksRequest>) -> Answer<proto::LeaksResponse> {
        let leaks = self.allocator.leaks().iter().map(convert::leak).collect();
        Ok(Response::new(proto::LeaksResponse { leaks }))
    }

    async fn subnets(&self, _: Request<proto::SubnetsRequest>) -> Answer<proto::SubnetsResponse> {
        let subnets = self.allocator.subnets().iter().map(convert::subnet_use).collect();
        Ok(Response::new(proto::SubnetsResponse { subnets }))
    }

    async fn add_subnet(
        &self,
        request: Request<proto::AddSubnetRequest>,
    ) -> Answer<proto::AddSubnetResponse> {
        let subnet = convert::read_subnet(request.into_inner().subnet)?;
        self.allocator.add_subnet(subnet).await.map_err(|error| convert::error(&error))?;
        Ok(Response::new(proto::AddSubnetResponse {}))
    }

    async fn put_node(&self, request: Request<proto::PutNodeRequest>) -> Answer<proto::PutNodeResponse> {
        let node = convert::read_node(request.into_inner().node)?;
        self.allocator.put_node(node).await.map_err(|error| convert::error(&error))?;
        Ok(Response::new(proto::PutNodeResponse {}))
    }

    async fn drain_node(
        &self,
        request: Request<proto::DrainNodeRequest>,
    ) -> Answer<proto::DrainNodeResponse> {
        let node = request.into_inner().node;
        self.allocator.drain_node(&node).await.map_err(|error| convert::error(&error))?;
        Ok(Response::new(proto::DrainNodeResponse {}))
    }

    async fn put_security_groups(
        &self,
        request: Request<proto::PutSecurityGroupsRequest>,
    ) -> Answer<proto::PutSecurityGroupsResponse> {
        let groups = convert::read_security_groups(request.into_inner().document)?;
        let put = self.allocator.put_security_groups(groups).await.map_err(|error| convert::error(&error))?;
        let SecurityGroupsPut { revision, changed } = put;
        Ok(Response::new(proto::PutSecurityGroupsResponse { revision, changed }))
    }

    async fn get_security_groups(
        &self,
        _: Request<proto::GetSecurityGroupsRequest>,
    ) -> Answer<proto::GetSecurityGroupsResponse> {
        let document = Some(convert::security_groups(&self.allocator.security_groups()));
        Ok(Response::new(proto::GetSecurityGroupsResponse { document }))
    }

    async fn set_security_groups(
        &self,
        request: Request<proto::SetSecurityGroupsRequest>,
    ) -> Answer<proto::SetSecurityGroupsResponse> {
        let proto::SetSecurityGroupsRequest { key, security_groups, timeout_ms, wait_for_agent_ms } =
            request.into_inner();
        let (key, timeout) = (convert::read_key(key)?, timeout_ms.map(Duration::from_millis));
        let set = self.allocator.set_security_groups(&key, &security_groups, timeout).await;
        let allocation = set.map_err(|error| convert::error(&error))?;
        if let Some(wait) = wait_for_agent_ms.map(Duration::from_millis) {
            self.allocator.programmed(&allocation, wait).await.map_err(|error| convert::error(&error))?;
        }
        Ok(Response::new(proto::SetSecurityGroupsResponse {
            allocation: Some(convert::allocation(&allocation)),
        }))
    }

    async fn confirm(&self, request: Request<proto::ConfirmRequest>) -> Answer<proto::ConfirmResponse> {
        let what = convert::read_confirm(request.into_inner())?;
        self.allocator.confirm(&what).await.map_err(|error| convert::error(&error))?;
        Ok(Response::new(proto::ConfirmResponse {}))
    }
}

//! etcd as the store, for any number of allocators at once.
//!
//! Speaks etcd's v3 API directly: the few calls needed are in `proto/etcd/rpc.proto`, because the usual client crate
//! cannot be built without a system protoc.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use tonic::{
    Code, Status, Streaming,
    metadata::MetadataValue,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use super::{Change, Commit, Entry, Range, Revision, Store, StoreError, StoreWatch, Transaction, Watched};
use proto::{kv_client::KvClient, maintenance_client::MaintenanceClient, watch_client::WatchClient};

#[expect(clippy::all, clippy::allow_attributes_without_reason, reason = "generated")]
mod proto {
    tonic::include_proto!("etcdserverpb");
}

/// How many keys one read of a range asks for; keeps answers well under the message limit.
const PAGE: i64 = 4000;
/// etcd's own limit for a request is 1.5 MiB; an answer to a range or a watch may be larger.
const MAX_ANSWER: usize = 256 << 20;

/// Where etcd is and how to reach it.
#[derive(Clone, Debug)]
pub struct EtcdSettings {
    /// URLs such as `https://10.0.0.5:2379`. Calls go to all of them in turn.
    pub endpoints: Vec<String>,
    /// The prefix of all keys, such as `/eniway/ipam/`. Allocators with the same prefix work together.
    pub root: String,
    /// Certificates; needed for `https` endpoints with a private authority.
    pub tls: Option<EtcdTls>,
    /// The longest one call may take.
    pub timeout: Duration,
    /// Connections per endpoint. One is enough except for benchmarks.
    pub connections: usize,
}

impl EtcdSettings {
    /// The usual settings for these endpoints.
    pub fn new(endpoints: Vec<String>) -> Self {
        Self {
            endpoints,
            root: "/eniway/ipam/".to_owned(),
            tls: None,
            timeout: Duration::from_secs(5),
            connections: 1,
        }
    }
}

/// Certificates in PEM.
#[derive(Clone, Debug)]
pub struct EtcdTls {
    /// The authority that signed etcd's certificate.
    pub ca: Vec<u8>,
    /// Our certificate and its key, when etcd asks for one.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

/// A [`Store`] in etcd.
pub struct EtcdStore {
    name: String,
    root: String,
    timeout: Duration,
    channels: Vec<Channel>,
    turn: AtomicUsize,
}

impl EtcdStore {
    /// Connects. Succeeds also while etcd is away: calls then fail until it is there.
    pub fn connect(settings: &EtcdSettings) -> Result<Self, StoreError> {
        let name = settings.endpoints.join(",");
        let broken = |reason: String| StoreError::Broken { store: name.clone(), reason };
        if settings.endpoints.is_empty() {
            return Err(broken(
                "no etcd endpoint is given; name at least one, such as http://127.0.0.1:2379".to_owned(),
            ));
        }
        let mut channels = Vec::new();
        for url in &settings.endpoints {
            for _ in 0..settings.connections.max(1) {
                let mut endpoint = Endpoint::from_shared(url.clone())
                    .map_err(|error| broken(format!("`{url}` is not an etcd endpoint: {error}")))?
                    .connect_timeout(settings.timeout)
                    .tcp_nodelay(true)
                    .http2_keep_alive_interval(Duration::from_secs(10))
                    .keep_alive_timeout(settings.timeout)
                    .keep_alive_while_idle(true);
                if let Some(tls) = &settings.tls {
                    let mut config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&tls.ca));
                    if let Some((certificate, key)) = &tls.identity {
                        config = config.identity(Identity::from_pem(certificate, key));
                    }
                    endpoint = endpoint.tls_config(config).map_err(|error| {
                        broken(format!("the certificates for {url} are not usable: {error}"))
                    })?;
                }
                channels.push(endpoint.connect_lazy());
            }
        }
        Ok(Self {
            name,
            root: settings.root.clone(),
            timeout: settings.timeout,
            channels,
            turn: AtomicUsize::new(0),
        })
    }

    /// Returns the file space that compaction freed to the disk. etcd blocks while it does so.
    pub async fn defragment(&self) -> Result<(), StoreError> {
        let mut client = MaintenanceClient::new(self.channel());
        client.defragment(proto::DefragmentRequest {}).await.map_err(|status| self.error(&status))?;
        Ok(())
    }

    fn channel(&self) -> Channel {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        self.channels[turn % self.channels.len()].clone()
    }

    fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel()).max_decoding_message_size(MAX_ANSWER)
    }

    fn full_key(&self, key: &str) -> Vec<u8> {
        [self.root.as_bytes(), key.as_bytes()].concat()
    }

    fn entry(&self, kv: proto::KeyValue) -> Result<Entry, StoreError> {
        Ok(Entry {
            key: strip(&self.name, &self.root, &kv.key)?,
            revision: number(kv.mod_revision),
            value: kv.value,
        })
    }

    fn error(&self, status: &Status) -> StoreError {
        let reason = format!("etcd: {}", status.message());
        match status.code() {
            Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated | Code::Unimplemented => {
                StoreError::Broken { store: self.name.clone(), reason }
            }
            _ => StoreError::Unavailable { store: self.name.clone(), reason },
        }
    }

    async fn within<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, StoreError> {
        match tokio::time::timeout(self.timeout, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(status)) => Err(self.error(&status)),
            Err(_) => Err(StoreError::Unavailable {
                store: self.name.clone(),
                reason: format!("etcd did not answer within {:?}", self.timeout),
            }),
        }
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn range(&self, prefix: &str) -> Result<Range, StoreError> {
        let mut start = self.full_key(prefix);
        let end = after_prefix(&start);
        let mut revision = 0;
        let mut entries = Vec::new();
        loop {
            let request = proto::RangeRequest {
                key: start.clone(),
                range_end: end.clone(),
                limit: PAGE,
                // All pages show the revision of the first one.
                revision: signed(revision),
            };
            let answer = self.within(async { self.kv().range(request).await }).await?.into_inner();
            if revision == 0 {
                revision = number(answer.header.unwrap_or_default().revision);
            }
            if let Some(last) = answer.kvs.last() {
                start = [last.key.as_slice(), &[0]].concat();
            }
            for kv in answer.kvs {
                entries.push(self.entry(kv)?);
            }
            if !answer.more {
                return Ok(Range { revision, entries });
            }
        }
    }

    async fn commit(&self, transaction: Transaction) -> Result<Commit, StoreError> {
        let keys: Vec<String> = transaction.expect.iter().map(|(key, _)| key.clone()).collect();
        let compare = transaction
            .expect
            .iter()
            .map(|(key, revision)| proto::Compare {
                result: proto::compare::CompareResult::Equal.into(),
                target: proto::compare::CompareTarget::Mod.into(),
                key: self.full_key(key),
                target_union: Some(proto::compare::TargetUnion::ModRevision(signed(*revision))),
            })
            .collect();
        let success = transaction
            .changes
            .into_iter()
            .map(|change| {
                let key = self.full_key(&change.key);
                let request = match change.value {
                    Some(value) => proto::request_op::Request::RequestPut(proto::PutRequest { key, value }),
                    None => proto::request_op::Request::RequestDeleteRange(proto::DeleteRangeRequest {
                        key,
                        range_end: Vec::new(),
                    }),
                };
                proto::RequestOp { request: Some(request) }
            })
            .collect();
        let failure = keys
            .iter()
            .map(|key| proto::RequestOp {
                request: Some(proto::request_op::Request::RequestRange(proto::RangeRequest {
                    key: self.full_key(key),
                    ..proto::RangeRequest::default()
                })),
            })
            .collect();
        let request = proto::TxnRequest { compare, success, failure };
        let answer = self.within(async { self.kv().txn(request).await }).await?.into_inner();
        let revision = number(answer.header.unwrap_or_default().revision);
        if answer.succeeded {
            return Ok(Commit::Done(revision));
        }
        let mut current = Vec::with_capacity(keys.len());
        for (key, response) in keys.into_iter().zip(answer.responses) {
            let entry = match response.response {
                Some(proto::response_op::Response::ResponseRange(range)) => range.kvs.into_iter().next(),
                _ => None,
            };
            current.push((key, entry.map(|kv| self.entry(kv)).transpose()?));
        }
        Ok(Commit::Conflict { revision, current })
    }

    async fn watch(&self, from: Revision) -> Result<Box<dyn StoreWatch>, StoreError> {
        let key = self.full_key("");
        let range_end = after_prefix(&key);
        let create =
            proto::WatchCreateRequest { key, range_end, start_revision: signed(from), progress_notify: true };
        let request = proto::WatchRequest {
            request_union: Some(proto::watch_request::RequestUnion::CreateRequest(create)),
        };
        // etcd ends the watch when the request stream ends: the sender lives as long as the watch.
        let (keep_open, requests) = tokio::sync::mpsc::channel(1);
        let gone = |_| StoreError::Unavailable {
            store: self.name.clone(),
            reason: "the watch was closed".to_owned(),
        };
        keep_open.send(request).await.map_err(gone)?;
        let mut client = WatchClient::new(self.channel()).max_decoding_message_size(MAX_ANSWER);
        let mut request = tonic::Request::new(Requests(requests));
        // A member that has lost the others ends the watch instead of keeping silent.
        request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
        let answers = self.within(async { client.watch(request).await }).await?.into_inner();
        Ok(Box::new(EtcdWatch {
            name: self.name.clone(),
            root: self.root.clone(),
            answers,
            _keep_open: keep_open,
        }))
    }

    async fn compact(&self, revision: Revision) -> Result<(), StoreError> {
        let request = proto::CompactionRequest { revision: signed(revision) };
        match self.kv().compact(request).await {
            Ok(_) => Ok(()),
            // Already compacted by another allocator, or not that far yet.
            Err(status) if status.code() == Code::OutOfRange => Ok(()),
            Err(status) => Err(self.error(&status)),
        }
    }

    async fn size(&self) -> Result<u64, StoreError> {
        let mut client = MaintenanceClient::new(self.channel());
        let status = self.within(async { client.status(proto::StatusRequest {}).await }).await?.into_inner();
        Ok(number(status.db_size))
    }

    fn exclusive(&self) -> bool {
        false
    }
}

/// The request side of a watch as a stream.
struct Requests(tokio::sync::mpsc::Receiver<proto::WatchRequest>);

impl tonic::codegen::tokio_stream::Stream for Requests {
    type Item = proto::WatchRequest;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}

struct EtcdWatch {
    name: String,
    root: String,
    answers: Streaming<proto::WatchResponse>,
    _keep_open: tokio::sync::mpsc::Sender<proto::WatchRequest>,
}

#[async_trait]
impl StoreWatch for EtcdWatch {
    async fn next(&mut self) -> Result<Watched, StoreError> {
        let unavailable = |reason: String| StoreError::Unavailable { store: self.name.clone(), reason };
        loop {
            let answer = self
                .answers
                .message()
                .await
                .map_err(|status| unavailable(format!("the watch failed: {}", status.message())))?
                .ok_or_else(|| unavailable("etcd ended the watch".to_owned()))?;
            if answer.compact_revision > 0 {
                return Ok(Watched::Compacted);
            }
            if answer.canceled {
                return Err(unavailable(format!("etcd cancelled the watch: {}", answer.cancel_reason)));
            }
            let mut changes = Vec::with_capacity(answer.events.len());
            for event in answer.events {
                let deleted = event.r#type() == proto::event::EventType::Delete;
                let Some(kv) = event.kv else { continue };
                let key = strip(&self.name, &self.root, &kv.key)?;
                let value = if deleted { None } else { Some(kv.value) };
                changes.push((number(kv.mod_revision), Change { key, value }));
            }
            if !changes.is_empty() {
                return Ok(Watched::Changes(changes));
            }
        }
    }
}

fn strip(name: &str, root: &str, key: &[u8]) -> Result<String, StoreError> {
    std::str::from_utf8(key).ok().and_then(|key| key.strip_prefix(root)).map(str::to_owned).ok_or_else(|| {
        StoreError::Broken {
            store: name.to_owned(),
            reason: format!(
                "etcd holds the key `{}` under {root}, which the allocator did not write; remove it",
                String::from_utf8_lossy(key)
            ),
        }
    })
}

/// The first key after all keys with this prefix.
fn after_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.last_mut() {
        if *last < u8::MAX {
            *last += 1;
            return end;
        }
        end.pop();
    }
    // "From the key on, without end."
    vec![0]
}

/// etcd counts in signed numbers, from 0 up.
fn number(revision: i64) -> u64 {
    revision.try_into().unwrap_or_default()
}

fn signed(revision: u64) -> i64 {
    revision.try_into().unwrap_or(i64::MAX)
}

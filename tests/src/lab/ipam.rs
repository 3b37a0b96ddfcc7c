//! The lab's allocator: the real one with its gRPC service on a socket, and the fabric as its VPC.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use datapath_user::ipam;
use eniway_ipam::{
    AddressRequest, AllocateRequest, Allocation, MemoryVpc, PodKey,
    rpc::{self, Address, Client, ClientError},
};
use tokio::runtime::{Builder, Runtime};

use super::{
    agent::READY,
    error::{Error, Result},
    fabric::{Fabric, lock},
    spec::{GATEWAY_MAC, Mac, Subnet},
    topology::{Node, Pod},
    vpc::{self, PARENT_LIMIT, PODS_SUBNET},
};

/// The allocator, running or not, and the VPC, which is always there. Dropped, it ends.
pub struct Ipam {
    socket: PathBuf,
    config: ipam::Config,
    vpc: Arc<MemoryVpc>,
    /// While it runs.
    server: Mutex<Option<Runtime>>,
    client: Client,
    callers: Runtime,
}

impl Ipam {
    /// Writes the configuration, with all nodes in it. Nothing runs yet.
    pub(super) fn prepare(
        dir: &Path,
        fabric: &Arc<Fabric>,
        nodes: &[Node],
        pods: &[Pod],
        mtu: u32,
        cool_down: Duration,
    ) -> Result<Self> {
        let dir = dir.join("ipam");
        fs::create_dir_all(&dir).map_err(Error::io(format!("making {}", dir.display())))?;
        let socket = dir.join("ipam.sock");
        let path = dir.join("ipam.toml");
        let text = config(&dir, &socket, nodes, mtu, cool_down);
        fs::write(&path, &text).map_err(Error::io(format!("writing {}", path.display())))?;
        let config = ipam::Config::parse(&text, &path).map_err(|error| failed(&error))?;
        let eips = pods.iter().filter_map(|pod| Some((pod.ip, pod.eip?))).collect();
        let vpc = Arc::new(vpc::of(fabric, nodes, eips)?);
        let callers = runtime("ipam-client")?;
        let client = {
            let _inside = callers.enter();
            Client::new(Address::Unix(socket.clone()), None).map_err(|error| failed(&error))?.patient(READY)
        };
        Ok(Self { socket, config, vpc, server: Mutex::new(None), client, callers })
    }

    /// Starts it. On return it serves.
    ///
    /// # Errors
    ///
    /// When it runs already, or cannot use its store or socket.
    pub fn start(&self) -> Result<()> {
        let mut server = lock(&self.server);
        if server.is_some() {
            return Err(Error::Ipam("it runs already".into()));
        }
        let runtime = runtime("ipam")?;
        let (allocator, listeners) = runtime
            .block_on(ipam::open_with_vpc(&self.config, self.vpc.clone()))
            .map_err(|error| failed(&error))?;
        runtime.spawn(async move {
            if let Err(error) = rpc::serve(allocator, listeners, std::future::pending()).await {
                log::error!("{error}");
            }
        });
        *server = Some(runtime);
        Ok(())
    }

    /// Ends it where it is, without a word to anybody. The VPC and the store stay as they are.
    pub fn kill(&self) {
        if let Some(runtime) = lock(&self.server).take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }

    /// The VPC that it allocates from.
    pub fn vpc(&self) -> &MemoryVpc {
        &self.vpc
    }

    /// Where it serves.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks it something over its socket; for so long as the agents may take to be ready, also while it is away.
    ///
    /// # Errors
    ///
    /// When it refuses, or does not answer.
    pub fn ask<T, F>(&self, call: impl FnOnce(Client) -> F) -> Result<T>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        self.callers.block_on(call(self.client.clone())).map_err(|error| failed(&error))
    }

    /// Allocates a pod's interface; with `wait`, returns when the node's agent has put it into the kernel.
    ///
    /// # Errors
    ///
    /// When the allocator or the agent refuses.
    pub fn allocate(&self, request: &AllocateRequest, wait: bool) -> Result<Allocation> {
        self.ask(|client| async move { client.allocate(request, wait.then_some(READY)).await })
    }

    /// Gives the pods of the lab the addresses that they shall have, and writes down with which VLAN and MAC they got them.
    pub(super) fn admit(&self, pods: &mut [Pod]) -> Result<()> {
        for pod in pods {
            let allocation = self.allocate(&request(pod), false)?;
            pod.vlan = u16::try_from(allocation.vlan)
                .map_err(|_| Error::Ipam(format!("VLAN {} for {}", allocation.vlan, pod.name)))?;
            pod.mac = Mac(allocation.mac.0);
        }
        Ok(())
    }

    /// Returns when the agents have all these pods in the kernel.
    pub(super) fn wait_programmed(&self, pods: &[Pod]) -> Result<()> {
        pods.iter().try_for_each(|pod| self.allocate(&request(pod), true).map(drop))
    }
}

impl Drop for Ipam {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a CNI plugin would ask for: the pod's own address, by static mode.
pub fn request(pod: &Pod) -> AllocateRequest {
    AllocateRequest {
        node: pod.node.clone(),
        key: PodKey { uid: format!("uid-{}", pod.name), container_id: format!("container-{}", pod.name) },
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        netns: Some(pod.netns.path().display().to_string()),
        interface: "eth0".into(),
        address: AddressRequest::Static { ipv4: Some(pod.ip), ipv6: None, retention: None },
        security_groups: None,
        timeout: None,
    }
}

fn config(dir: &Path, socket: &Path, nodes: &[Node], mtu: u32, cool_down: Duration) -> String {
    let mut text = format!(
        "listen = [{:?}]\n\n[store]\nkind = \"embedded\"\npath = {:?}\n\n\
         [settings]\nowner = \"lab\"\ncool_down = {}\n\n\
         [[subnet]]\nid = {PODS_SUBNET:?}\nipv4 = \"{}\"\ngateway = \"{}\"\ngateway_mac = \"{GATEWAY_MAC}\"\nmtu = {mtu}\n",
        format!("unix:{}", socket.display()),
        dir.join("ipam.redb"),
        cool_down.as_secs(),
        Subnet::PODS,
        Subnet::PODS.gateway,
    );
    for node in nodes {
        text.push_str(&format!(
            "\n[[node]]\nname = {:?}\npolicy = \"on-demand\"\n\
             kind = {{ sub-eni = {{ parents = [{{ id = {:?}, interface = \"eth1\", limit = {PARENT_LIMIT} }}] }} }}\n",
            node.name,
            node.parent_id(),
        ));
    }
    text
}

fn runtime(name: &str) -> Result<Runtime> {
    let runtime = Builder::new_multi_thread().worker_threads(1).thread_name(name).enable_all().build();
    runtime.map_err(Error::io(format!("starting the threads {name}")))
}

fn failed(error: &dyn std::error::Error) -> Error {
    Error::Ipam(error.to_string())
}

//! Building a lab and taking it down.

use std::{
    collections::HashSet,
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use datapath_user::config::Limits;
use eniway_policy::model::{GroupList, Groups, Membership};

use super::{
    agent::{Agent, READY, Settings, put_groups},
    elb::{Elb, Listener},
    error::{Error, Result},
    fabric::{Fabric, Port},
    groups::{Gate, Vpc},
    ipam::Ipam,
    large,
    netns::{Netns, NetnsGuard},
    nginx::{Access, Nginx},
    remains::{Places, Remains, is_name},
    spec::{
        ELB_IP, Mac, NodeSpec, OUTSIDE_IP, PodSpec, Protocol, Source, Subnet, VM_IP, VipSpec, VmSpec, XdpMode,
    },
};

/// A node of the lab.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its namespace: `eth0` is the primary NIC, `eth1` the parent ENI.
    pub netns: Netns,
    /// Address of `eth0`.
    pub ip: Ipv4Addr,
    /// MAC of `eth0`.
    pub mac: Mac,
    /// Address of `eth1`.
    pub parent_ip: Ipv4Addr,
    /// MAC of `eth1`.
    pub parent_mac: Mac,
    /// The fabric's port of `eth0`: `<name>-e0`.
    pub primary_port: String,
    /// The fabric's port of `eth1`: `<name>-e1`.
    pub parent_port: String,
}

impl Node {
    /// The VPC's id of the parent ENI.
    pub fn parent_id(&self) -> String {
        format!("eni-{}", self.name)
    }
}

/// A pod of the lab.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Name of its node.
    pub node: String,
    /// Its namespace, with nothing but `lo` until the agent wires it; then with `eth0`.
    pub netns: Netns,
    /// Its address.
    pub ip: Ipv4Addr,
    /// MAC of its sub-ENI.
    pub mac: Mac,
    /// VLAN id on the node's parent ENI.
    pub vlan: u16,
    /// The fabric's port of its node's parent ENI.
    pub port: String,
    /// Its elastic IP.
    pub eip: Option<Ipv4Addr>,
}

impl Pod {
    /// `namespace/name`, as the agent shows it.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Where its nginx serves.
    pub fn http(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.ip, 80)
    }
}

/// A host without an agent: a virtual machine, the ELB's own NIC, the client outside. Its interface is `eth0`.
#[derive(Clone, Debug)]
pub struct Client {
    /// Its name, which is that of its port of the fabric too.
    pub name: String,
    /// Its namespace.
    pub netns: Netns,
    /// Its address.
    pub ip: Ipv4Addr,
    /// Its MAC.
    pub mac: Mac,
}

/// Collects what a lab shall have. Nothing is made before [`build`](Self::build).
#[derive(Clone, Debug)]
pub struct LabBuilder {
    id: String,
    nodes: Vec<NodeSpec>,
    pods: Vec<PodSpec>,
    vms: Vec<VmSpec>,
    vips: Vec<VipSpec>,
    source: Source,
    fast_path: bool,
    xdp: XdpMode,
    mtu: u32,
    flow_log: bool,
    host_prefixes: Vec<String>,
    limits: Limits,
    elb_flows: u32,
    groups: Option<Groups>,
    lists: Vec<(String, GroupList)>,
}

impl LabBuilder {
    /// Adds a node.
    #[must_use]
    pub fn node(mut self, name: &str, ip: [u8; 4], parent_ip: [u8; 4]) -> Self {
        self.nodes.push(NodeSpec { name: name.into(), ip: ip.into(), parent_ip: parent_ip.into() });
        self
    }

    /// Adds a pod in Kubernetes namespace `default`, with nginx and without EIP. The VLAN ids of a node's pods count
    /// from 101; other nodes use the same ones again.
    #[must_use]
    pub fn pod(self, name: &str, node: &str, ip: [u8; 4]) -> Self {
        let before = self.pods.iter().filter(|pod| pod.node == node).count();
        self.pod_spec(PodSpec { nginx: true, ..PodSpec::bare(name, node, ip, 101 + before as u16) })
    }

    /// Adds a pod with all its properties.
    #[must_use]
    pub fn pod_spec(mut self, pod: PodSpec) -> Self {
        self.pods.push(pod);
        self
    }

    /// Gives an EIP to a pod that was added before.
    #[must_use]
    pub fn eip(mut self, pod: &str, eip: [u8; 4]) -> Self {
        for spec in self.pods.iter_mut().filter(|spec| spec.name == pod) {
            spec.eip = Some(eip.into());
        }
        self
    }

    /// Adds a virtual machine.
    #[must_use]
    pub fn vm(mut self, name: &str, ip: [u8; 4]) -> Self {
        self.vms.push(VmSpec { name: name.into(), ip: ip.into() });
        self
    }

    /// Adds a listener of the ELB.
    #[must_use]
    pub fn vip(mut self, vip: VipSpec) -> Self {
        self.vips.push(vip);
        self
    }

    /// Adds a TCP listener in front of port 80 of all pods, with health checks.
    #[must_use]
    pub fn http_vip(self, ip: [u8; 4], port: u16) -> Self {
        self.vip(VipSpec {
            ip: ip.into(),
            port,
            protocol: Protocol::Tcp,
            target_port: 80,
            backends: Vec::new(),
            health_check: true,
        })
    }

    /// Where the agents know their pods from; a file unless said here.
    #[must_use]
    pub fn source(mut self, source: Source) -> Self {
        self.source = source;
        self
    }

    /// Whether the agents run with a fast path (the default; `"all"`, or `"security-groups"` in a lab that has them) or `"off"`.
    #[must_use]
    pub fn fast_path(mut self, on: bool) -> Self {
        self.fast_path = on;
        self
    }

    /// How the agents use XDP; not at all unless said here.
    #[must_use]
    pub fn xdp(mut self, mode: XdpMode) -> Self {
        self.xdp = mode;
        self
    }

    /// The MTU of all interfaces, 1500 unless said here.
    #[must_use]
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// Whether the fabric logs flows. It does unless told otherwise; benchmarks do.
    #[must_use]
    pub fn flow_log(mut self, on: bool) -> Self {
        self.flow_log = on;
        self
    }

    /// Prefixes that the nodes serve for their pods (`host.prefixes` of the agent), 10.247.0.0/16 unless said here.
    #[must_use]
    pub fn host_prefixes(mut self, prefixes: &[&str]) -> Self {
        self.host_prefixes = prefixes.iter().map(|prefix| (*prefix).into()).collect();
        self
    }

    /// Sizes of the agents' tables (`limits` of the agent), the defaults unless said here.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// How many flows the ELB knows at once, 65,536 unless said here.
    #[must_use]
    pub fn elb_flows(mut self, flows: u32) -> Self {
        self.elb_flows = flows;
        self
    }

    /// Has the VPC enforce security groups, in this process: a lab that is [kept](Lab::keep) forwards nothing any more.
    /// Without this the fabric knows of none, and pays nothing.
    #[must_use]
    pub fn security_groups(mut self, groups: Groups) -> Self {
        self.groups = Some(groups);
        self
    }

    /// Gives security groups to a pod. Pods without any are not judged.
    #[must_use]
    pub fn groups_of(mut self, pod: &str, list: GroupList) -> Self {
        self.lists.push((pod.into(), list));
        self
    }

    /// Makes it all; what an earlier lab of this id has left behind is removed first. On return the fabric forwards,
    /// the ELB checks its backends, and nginx listens in the pods' namespaces, which have no interface yet:
    /// [`Lab::start_agents`] comes next.
    ///
    /// # Errors
    ///
    /// Without root, when the description contradicts itself, when nginx is not installed, when another living
    /// process has a lab of this id. What was made until then is removed.
    pub fn build(self) -> Result<Lab> {
        self.check()?;
        // First, so that it goes last: also when the next line fails.
        let remains = Remains::begin(&self.id)?;
        let places = remains.places().clone();
        let mut hosts = self.make_hosts(&remains)?;
        let fabric = Arc::new(self.make_fabric(&places, &hosts)?);
        self.address(&hosts)?;
        let ipam = self.attach_pods(&places, &fabric, &mut hosts)?;
        let nginx = self.start_nginx(&places, &hosts)?;
        let agents = self.prepare_agents(&places, &hosts, ipam.as_ref())?;
        let listeners = self.vips.iter().map(|vip| self.listener(vip)).collect();
        let gate = self.start_gate(&fabric, &hosts)?;
        let elb = Elb::start(Arc::clone(&fabric), &hosts.elb.netns, listeners)?;
        Ok(Lab {
            elb,
            gate,
            agents,
            nginx,
            ipam,
            fabric,
            hosts,
            vips: self.vips.iter().map(|vip| SocketAddrV4::new(vip.ip, vip.port)).collect(),
            next_port: AtomicU16::new(20_000),
            remains,
            dir: places.run(),
        })
    }

    fn check(&self) -> Result<()> {
        let wrong = |text: String| Err(Error::Topology(text));
        let mut names = HashSet::from(["fabric", "elb", "outside"]);
        let hosts = self.nodes.iter().map(|node| &node.name).chain(self.vms.iter().map(|vm| &vm.name));
        if let Some(long) = hosts.clone().find(|name| name.len() > 10) {
            return wrong(format!("{long}: at most 10 characters, please"));
        }
        for name in hosts.chain(self.pods.iter().map(|pod| &pod.name)) {
            if !is_name(name) {
                return wrong(format!("name {name:?}: lower-case letters, digits and `-`, please"));
            }
            if !names.insert(name) {
                return wrong(format!("the name {name} is there twice"));
            }
        }
        let mut addresses = HashSet::from([ELB_IP, Subnet::NODES.gateway, Subnet::PODS.gateway]);
        let in_nodes = self.nodes.iter().map(|node| node.ip).chain(self.vms.iter().map(|vm| vm.ip));
        let in_pods = self.nodes.iter().map(|node| node.parent_ip).chain(self.pods.iter().map(|pod| pod.ip));
        let placed = in_nodes.map(|ip| (ip, Subnet::NODES)).chain(in_pods.map(|ip| (ip, Subnet::PODS)));
        for (ip, subnet) in placed {
            if !subnet.contains(ip) {
                return wrong(format!("{ip} is not in {subnet}"));
            }
            if !addresses.insert(ip) {
                return wrong(format!("the address {ip} is there twice"));
            }
        }
        let mut places = HashSet::new();
        for pod in &self.pods {
            if !self.nodes.iter().any(|node| node.name == pod.node) {
                return wrong(format!("pod {} is on node {}, which is not there", pod.name, pod.node));
            }
            if !(1..=4094).contains(&pod.vlan) || !places.insert((&pod.node, pod.vlan)) {
                return wrong(format!("pod {}: VLAN id {} is not free on {}", pod.name, pod.vlan, pod.node));
            }
        }
        for vip in &self.vips {
            if addresses.contains(&vip.ip) || !Subnet::NODES.contains(vip.ip) {
                return wrong(format!("VIP {} is taken or not in {}", vip.ip, Subnet::NODES));
            }
            if let Some(name) =
                vip.backends.iter().find(|name| !self.pods.iter().any(|pod| pod.name == **name))
            {
                return wrong(format!("VIP {}: there is no pod {name}", vip.ip));
            }
        }
        Ok(())
    }

    fn make_hosts(&self, remains: &Remains) -> Result<Hosts> {
        let mut guards = Vec::new();
        let mut make = |member: &str| {
            let netns = remains.places().netns(member);
            remains.note_netns(&netns)?;
            guards.push(NetnsGuard::create(netns.name())?);
            Ok(netns)
        };
        make("fabric")?;
        let mut client = |name: &str, ip: Ipv4Addr| {
            Ok(Client { name: name.into(), netns: make(name)?, ip, mac: Mac::of(ip) })
        };
        let elb = client("elb", ELB_IP)?;
        let outside = client("outside", OUTSIDE_IP)?;
        let vms = self.vms.iter().map(|vm| client(&vm.name, vm.ip)).collect::<Result<_>>()?;
        let node = |node: &NodeSpec| {
            Ok(Node {
                name: node.name.clone(),
                netns: make(&node.name)?,
                ip: node.ip,
                mac: Mac::of(node.ip),
                parent_ip: node.parent_ip,
                parent_mac: Mac::of(node.parent_ip),
                primary_port: format!("{}-e0", node.name),
                parent_port: format!("{}-e1", node.name),
            })
        };
        let nodes = self.nodes.iter().map(node).collect::<Result<_>>()?;
        let pod = |pod: &PodSpec| {
            Ok(Pod {
                namespace: pod.namespace.clone(),
                name: pod.name.clone(),
                node: pod.node.clone(),
                netns: make(&pod.name)?,
                ip: pod.ip,
                mac: Mac::of(pod.ip),
                vlan: pod.vlan,
                port: format!("{}-e1", pod.node),
                eip: pod.eip,
            })
        };
        let pods = self.pods.iter().map(pod).collect::<Result<_>>()?;
        Ok(Hosts { guards, elb, outside, vms, nodes, pods })
    }

    fn make_fabric(&self, places: &Places, hosts: &Hosts) -> Result<Fabric> {
        let port = |name: &str, interface: &'static str, netns: &Netns, mac: Mac| Port {
            name: name.into(),
            interface,
            netns: netns.clone(),
            mac,
            trunk: interface == "eth1",
            checksums: interface == "eth1" && self.xdp == XdpMode::Redirect,
        };
        let mut ports = Vec::new();
        for client in hosts.clients() {
            ports.push(port(&client.name, "eth0", &client.netns, client.mac));
        }
        for node in &hosts.nodes {
            ports.push(port(&node.primary_port, "eth0", &node.netns, node.mac));
            ports.push(port(&node.parent_port, "eth1", &node.netns, node.parent_mac));
        }
        let vips: Vec<Ipv4Addr> = self.vips.iter().map(|vip| vip.ip).collect();
        let fabric = Fabric::create(
            places,
            &ports,
            self.mtu,
            self.elb_flows,
            self.flow_log,
            &vips,
            self.groups.is_some(),
        )?;
        for client in hosts.clients() {
            let flags = if client.ip == OUTSIDE_IP { fabric_ebpf::nic::OUTSIDE } else { 0 };
            fabric.add_nic(&client.name, 0, client.ip, client.mac, None, flags)?;
        }
        for node in &hosts.nodes {
            fabric.attach_nic(&node.primary_port, 0, node.ip, node.mac, None)?;
            fabric.attach_nic(&node.parent_port, 0, node.parent_ip, node.parent_mac, None)?;
        }
        Ok(fabric)
    }

    /// Makes the pods' sub-ENIs: here, or by an allocator.
    fn attach_pods(&self, places: &Places, fabric: &Arc<Fabric>, hosts: &mut Hosts) -> Result<Option<Ipam>> {
        let Source::Allocator { cool_down } = self.source else {
            for pod in &hosts.pods {
                fabric.attach_nic(&pod.port, pod.vlan, pod.ip, pod.mac, pod.eip)?;
            }
            return Ok(None);
        };
        let ipam = Ipam::prepare(&places.run(), fabric, &hosts.nodes, &hosts.pods, self.mtu, cool_down)?;
        ipam.start()?;
        ipam.admit(&mut hosts.pods)?;
        Ok(Some(ipam))
    }

    /// Addresses and routes as the cloud's images set them up.
    fn address(&self, hosts: &Hosts) -> Result<()> {
        for client in hosts.clients() {
            client.netns.sysctl("net/ipv6/conf/all/disable_ipv6", "1")?;
            let gateway =
                if client.ip == OUTSIDE_IP { Ipv4Addr::new(198, 51, 100, 1) } else { Subnet::NODES.gateway };
            client.netns.ip_batch(&format!(
                "addr add {}/24 dev eth0\nlink set eth0 up\nroute add default via {gateway}\n",
                client.ip
            ))?;
        }
        for node in &hosts.nodes {
            let Node { ip, parent_ip, .. } = node;
            let gateway = Subnet::NODES.gateway;
            let parent_gateway = Subnet::PODS.gateway;
            let prefix = Subnet::PODS.prefix;
            // What has the parent's own address leaves by the parent (the VPC drops it elsewhere), except to the
            // node's own pods, whose routes are /32s. The subnet is not reached directly: eth0 is the node's way.
            node.netns.ip_batch(&format!(
                "addr add {ip}/24 dev eth0\nlink set eth0 up\nroute add default via {gateway}\n\
                 addr add {parent_ip}/{prefix} dev eth1 noprefixroute\nlink set eth1 up\n\
                 route add default via {parent_gateway} dev eth1 onlink table 1000\n\
                 rule add pref 1000 from {parent_ip} lookup main suppress_prefixlength 31\n\
                 rule add pref 1001 from {parent_ip} lookup 1000\n"
            ))?;
            node.netns.sysctl("net/ipv4/ip_forward", "1")?;
        }
        Ok(())
    }

    fn start_nginx(&self, places: &Places, hosts: &Hosts) -> Result<Vec<Nginx>> {
        let serving = hosts.pods.iter().zip(&self.pods).filter(|(_, spec)| spec.nginx);
        let mut all = serving
            .map(|(pod, _)| Nginx::start(places, &pod.netns, &pod.name))
            .collect::<Result<Vec<_>>>()?;
        all.iter_mut().try_for_each(|nginx| nginx.wait(Duration::from_secs(5)))?;
        Ok(all)
    }

    fn prepare_agents(&self, places: &Places, hosts: &Hosts, ipam: Option<&Ipam>) -> Result<Vec<Agent>> {
        let settings = Settings {
            allocator: ipam.map(Ipam::socket),
            fast_path: self.fast_path,
            xdp: self.xdp,
            host_prefixes: &self.host_prefixes,
            limits: self.limits,
            mtu: self.mtu,
            vips: &self.vips,
            groups: self.groups.as_ref(),
            lists: &self.lists,
        };
        let prepare = |node: &Node| {
            let pods: Vec<&Pod> = hosts.pods.iter().filter(|pod| pod.node == node.name).collect();
            Agent::prepare(places, &node.name, &node.netns, &pods, &settings)
        };
        hosts.nodes.iter().map(prepare).collect()
    }

    fn start_gate(&self, fabric: &Fabric, hosts: &Hosts) -> Result<Option<Gate>> {
        let Some(groups) = &self.groups else { return Ok(None) };
        let mut vpc = Vpc::default();
        vpc.set_groups(groups.clone());
        for (name, list) in &self.lists {
            let pod = hosts.pods.iter().find(|pod| pod.name == *name);
            let pod = pod.ok_or_else(|| Error::Unknown(format!("pod {name}, which is to have groups")))?;
            vpc.set_member(pod.ip, Membership { groups: list.clone(), revision: 0 });
        }
        Gate::open(fabric.netns(), vpc).map(Some)
    }

    fn listener(&self, vip: &VipSpec) -> Listener {
        let behind = |pod: &&PodSpec| vip.backends.is_empty() || vip.backends.contains(&pod.name);
        Listener {
            vip: SocketAddrV4::new(vip.ip, vip.port),
            protocol: vip.protocol,
            target_port: vip.target_port,
            backends: self.pods.iter().filter(behind).map(|pod| (pod.name.clone(), pod.ip)).collect(),
            health_check: vip.health_check,
        }
    }
}

/// The namespaces and what they stand for.
struct Hosts {
    guards: Vec<NetnsGuard>,
    elb: Client,
    outside: Client,
    vms: Vec<Client>,
    nodes: Vec<Node>,
    pods: Vec<Pod>,
}

impl Hosts {
    fn clients(&self) -> impl Iterator<Item = &Client> {
        [&self.elb, &self.outside].into_iter().chain(&self.vms)
    }
}

/// A lab that stands. When dropped, everything of it is removed. All methods take `&self`: threads may share it.
pub struct Lab {
    // In the order in which they must go.
    elb: Elb,
    agents: Vec<Agent>,
    nginx: Vec<Nginx>,
    ipam: Option<Ipam>,
    gate: Option<Gate>,
    fabric: Arc<Fabric>,
    hosts: Hosts,
    vips: Vec<SocketAddrV4>,
    next_port: AtomicU16,
    dir: PathBuf,
    remains: Remains,
}

impl Lab {
    /// An empty lab. The id is part of all names: at most 16 lower-case letters, digits and `-`.
    pub fn builder(id: &str) -> LabBuilder {
        LabBuilder {
            id: id.into(),
            nodes: Vec::new(),
            pods: Vec::new(),
            vms: Vec::new(),
            vips: Vec::new(),
            source: Source::File,
            fast_path: true,
            xdp: XdpMode::Off,
            mtu: 1500,
            flow_log: true,
            host_prefixes: vec!["10.247.0.0/16".into()],
            limits: Limits::default(),
            elb_flows: 65_536,
            groups: None,
            lists: Vec::new(),
        }
    }

    /// The published walk-through of Cloud Native Network 2.0: nodes `node-144`, `node-167`, `node-186`; pods `example-1`
    /// to `example-6`, on 167, 186, 144, 167, 144, 167; EIPs 203.0.113.1 and 203.0.113.2 for the first two; virtual
    /// machine `vm`; VIP 10.1.0.200:80 in front of all six.
    pub fn walkthrough(id: &str) -> LabBuilder {
        Self::builder(id)
            .node("node-144", [10, 1, 0, 144], [10, 1, 16, 20])
            .node("node-167", [10, 1, 0, 167], [10, 1, 17, 172])
            .node("node-186", [10, 1, 0, 186], [10, 1, 18, 40])
            .pod("example-1", "node-167", [10, 1, 18, 2])
            .pod("example-2", "node-186", [10, 1, 18, 216])
            .pod("example-3", "node-144", [10, 1, 16, 63])
            .pod("example-4", "node-167", [10, 1, 16, 125])
            .pod("example-5", "node-144", [10, 1, 16, 89])
            .pod("example-6", "node-167", [10, 1, 17, 111])
            .eip("example-1", [203, 0, 113, 1])
            .eip("example-2", [203, 0, 113, 2])
            .vm("vm", VM_IP.octets())
            .http_vip([10, 1, 0, 200], 80)
    }

    /// The lab's id.
    pub fn id(&self) -> &str {
        self.remains.places().id()
    }

    /// Where logs, configurations and documents are: `/run/eniway-lab/<id>`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The fabric.
    pub fn fabric(&self) -> &Fabric {
        &self.fabric
    }

    /// The allocator.
    ///
    /// # Errors
    ///
    /// When the lab was built with another [`Source`].
    pub fn ipam(&self) -> Result<&Ipam> {
        self.ipam
            .as_ref()
            .ok_or_else(|| Error::Unknown("allocator: build it with `Source::Allocator`".into()))
    }

    /// The load balancer.
    pub fn elb(&self) -> &Elb {
        &self.elb
    }

    /// Changes security groups: in the VPC first, then in the documents of the agents that run, which have put them in force on
    /// return.
    ///
    /// # Errors
    ///
    /// When the lab was built without any, or an agent does not take them.
    pub fn set_groups(&self, groups: &Groups) -> Result<()> {
        self.security_groups()?.set_groups(groups.clone());
        self.change_agents(|document| put_groups(document, groups))
    }

    /// Changes the security groups of a pod, as [`set_groups`](Self::set_groups) does those of all.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn set_list(&self, pod: &Pod, list: &GroupList) -> Result<()> {
        self.security_groups()?.set_member(pod.ip, list.clone());
        let uid = format!("uid-{}", pod.name);
        self.change_agents(|document| {
            let entries = document["pods"].as_array_mut().into_iter().flatten();
            for entry in entries.filter(|entry| entry["uid"] == uid) {
                entry["security_groups"] = serde_json::json!(list);
            }
        })
    }

    fn change_agents(&self, edit: impl Fn(&mut serde_json::Value)) -> Result<()> {
        let running = || self.agents.iter().filter(|agent| agent.pid().is_some());
        self.agents.iter().try_for_each(|agent| agent.change(&edit))?;
        running().try_for_each(|agent| agent.wait_ready(READY))
    }

    /// The security groups of the VPC.
    ///
    /// # Errors
    ///
    /// When it was built without any.
    pub fn security_groups(&self) -> Result<&Gate> {
        self.gate
            .as_ref()
            .ok_or_else(|| Error::Unknown("security groups (`LabBuilder::security_groups`)".into()))
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.hosts.nodes
    }

    /// A node by name.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn node(&self, name: &str) -> Result<&Node> {
        let node = self.nodes().iter().find(|node| node.name == name);
        node.ok_or_else(|| Error::Unknown(format!("node {name}")))
    }

    /// All pods.
    pub fn pods(&self) -> &[Pod] {
        &self.hosts.pods
    }

    /// A pod by its name, without the Kubernetes namespace.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        let pod = self.pods().iter().find(|pod| pod.name == name);
        pod.ok_or_else(|| Error::Unknown(format!("pod {name}")))
    }

    /// The node that a pod of this lab is on.
    ///
    /// # Errors
    ///
    /// When the pod is of another lab.
    pub fn node_of(&self, pod: &Pod) -> Result<&Node> {
        self.node(&pod.node)
    }

    /// A virtual machine by name.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn vm(&self, name: &str) -> Result<&Client> {
        let vm = self.hosts.vms.iter().find(|vm| vm.name == name);
        vm.ok_or_else(|| Error::Unknown(format!("virtual machine {name}")))
    }

    /// The client in the outside network.
    pub fn outside(&self) -> &Client {
        &self.hosts.outside
    }

    /// The ELB's own NIC, from which its health checks come.
    pub fn elb_host(&self) -> &Client {
        &self.hosts.elb
    }

    /// The listeners of the ELB, as built.
    pub fn vips(&self) -> &[SocketAddrV4] {
        &self.vips
    }

    /// The first listener of the ELB.
    ///
    /// # Errors
    ///
    /// When it was built without one.
    pub fn vip(&self) -> Result<SocketAddrV4> {
        self.vips.first().copied().ok_or_else(|| Error::Unknown("VIP".into()))
    }

    /// Starts the agents of all nodes at once and waits until all are ready, and have told the allocator, if there is one,
    /// that all pods are in the kernel.
    ///
    /// # Errors
    ///
    /// When one ends or is not ready in time; the message holds the end of its log.
    pub fn start_agents(&self) -> Result<()> {
        self.agents.iter().try_for_each(Agent::start)?;
        self.agents.iter().try_for_each(|agent| agent.wait_ready(READY))?;
        self.ipam.as_ref().map_or(Ok(()), |ipam| ipam.wait_programmed(self.pods()))
    }

    /// All agents, started or not.
    pub fn agents(&self) -> &[Agent] {
        &self.agents
    }

    /// The agent of a node, started or not.
    ///
    /// # Errors
    ///
    /// When there is no such node.
    pub fn agent(&self, node: &str) -> Result<&Agent> {
        let agent = self.agents.iter().find(|agent| agent.node() == node);
        agent.ok_or_else(|| Error::Unknown(format!("node {node}")))
    }

    /// Makes the namespace of one more pod, which nobody has allocated anything to yet. The lab removes it if its guard
    /// cannot.
    ///
    /// # Errors
    ///
    /// When a member of the lab has this name.
    pub fn sandbox(&self, name: &str) -> Result<NetnsGuard> {
        let netns = self.remains.places().netns(name);
        self.remains.note_netns(&netns)?;
        NetnsGuard::create(netns.name())
    }

    /// What the nginx of a pod has answered so far.
    ///
    /// # Errors
    ///
    /// When the pod has no nginx.
    pub fn access_log(&self, pod: &Pod) -> Result<Vec<Access>> {
        let nginx = self.nginx.iter().find(|nginx| nginx.netns() == &pod.netns);
        nginx.ok_or_else(|| Error::Unknown(format!("nginx in pod {}", pod.name)))?.access_log()
    }

    /// Makes the file that every nginx serves as `/large`, see [`large`]; 100 MB ([`large::LENGTH`]) take some 0.2 s.
    ///
    /// # Errors
    ///
    /// When there is no room.
    pub fn make_large_file(&self, bytes: u64) -> Result<()> {
        let dir = self.remains.places().bulk();
        let path = dir.join("large");
        fs::create_dir_all(&dir)
            .and_then(|()| large::write(&path, bytes))
            .map_err(Error::io(format!("writing {bytes} bytes to {}", path.display())))
    }

    /// A source port that no other caller of this lab gets, so that a flow is found in the fabric's log by it. It is
    /// below the range from which the kernel chooses.
    pub fn fresh_port(&self) -> u16 {
        self.next_port.fetch_add(1, Ordering::Relaxed)
    }

    /// Leaves the lab standing; [`remove`](super::remove) takes it down, from any process. The health checks and the
    /// allocator end with this process: the ELB's backends keep the state that they have, and the pods what they got.
    pub fn keep(mut self) {
        self.hosts.guards.iter_mut().for_each(NetnsGuard::keep);
        self.agents.iter_mut().for_each(Agent::leave);
        self.nginx.iter_mut().for_each(Nginx::leave);
        self.remains.keep();
    }

    /// Takes the lab down now, as dropping it would, and says whether everything went.
    ///
    /// # Errors
    ///
    /// When something resists.
    pub fn shutdown(self) -> Result<()> {
        let Self { elb, agents, nginx, ipam, gate, fabric, hosts, remains, .. } = self;
        drop((elb, agents, nginx, ipam, gate, fabric, hosts));
        remains.finish()
    }
}

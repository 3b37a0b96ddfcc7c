//! The fabric's userspace side: its ports, tables, counts, flow log.

use std::{
    collections::HashMap as StdHashMap,
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
    sync::Mutex,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, Map, MapData, PerCpuHashMap},
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        links::FdLink,
        tc::{NlOptions, TcAttachOptions, qdisc_add_clsact},
    },
};
pub use fabric_ebpf::Kind;
use fabric_ebpf::{Addr, CountKey, ElbKey, FlowCount, FlowKey, Nic, PinKey, PortVlan, Service, ServiceKey};

use super::{
    capture::Capture,
    error::{Error, Result},
    groups,
    netns::Netns,
    remains::Places,
    spec::{GATEWAY_MAC, Mac, Protocol, Subnet},
    sys::{self, Offload},
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/fabric"));

/// The maps, by their names in the object.
const MAPS: [&str; 10] =
    ["NICS", "ROUTES", "EIPS", "VIPS", "SERVICES", "PINS", "ELB_FLOWS", "ELB_RETURNS", "COUNTS", "FLOW_LOG"];

/// What `aya::Pod` asks for, given to types of another crate.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Raw<T>(pub(super) T);

macro_rules! raw {
    ($($type:ty),+) => {
        $(
            // SAFETY: `#[repr(C)]`, plain integers and byte arrays, every padding byte a field (asserted in fabric-ebpf).
            unsafe impl aya::Pod for Raw<$type> {}
        )+
    };
}

raw!(Addr, CountKey, ElbKey, FlowCount, FlowKey, Nic, PinKey, PortVlan, Service, ServiceKey);

/// A count of the fabric, by port and VLAN id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count {
    /// The port that the frames came from, such as `node-167-e1`.
    pub port: String,
    /// Their VLAN id; 0 = untagged.
    pub vlan: u16,
    /// Why they were not forwarded. [`Kind::is_violation`] says whether the sender broke a rule of the VPC.
    pub kind: Kind,
    /// How many.
    pub packets: u64,
}

/// Which way a flow crossed a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// The NIC sent it; as it was sent, before any translation.
    FromNic,
    /// The NIC got it; as it was delivered, after all translation.
    ToNic,
}

/// One flow in one direction at one (port, VLAN id), as the fabric saw it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlowRecord {
    /// Source. For ICMP echo the port is the identifier.
    pub src: SocketAddrV4,
    /// Destination. For ICMP the port is the type.
    pub dst: SocketAddrV4,
    /// IP protocol number.
    pub proto: u8,
    /// Which way.
    pub direction: Direction,
    /// The port, such as `node-167-e1` or `vm`.
    pub port: String,
    /// VLAN id on it; 0 = untagged.
    pub vlan: u16,
    /// Packets as on a wire: the segments of a GSO packet count one by one.
    pub packets: u64,
    /// Bytes of the frames as they crossed, a GSO packet's headers once.
    pub bytes: u64,
}

/// A NIC or sub-ENI as the fabric has it in its tables.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attached {
    /// The port, such as `node-167-e1`.
    pub port: String,
    /// VLAN id on it; 0 = untagged.
    pub vlan: u16,
    /// Its MAC.
    pub mac: Mac,
    /// Its address.
    pub ip: Ipv4Addr,
    /// Its elastic IP.
    pub eip: Option<Ipv4Addr>,
}

/// A port of the fabric to be connected: one veth pair.
pub(super) struct Port {
    /// The fabric's end.
    pub(super) name: String,
    /// The other end.
    pub(super) interface: &'static str,
    pub(super) netns: Netns,
    pub(super) mac: Mac,
    /// Carries VLANs: the tag must cross inside the frame.
    pub(super) trunk: bool,
    /// Checksums are in the frames, as on a wire: a frame that XDP redirects has no other place for them.
    pub(super) checksums: bool,
}

/// The fabric of a lab: all its ports are in one namespace, where one kernel program moves the packets.
pub struct Fabric {
    netns: Netns,
    /// Names of the ports by interface index.
    ports: StdHashMap<u32, String>,
    nics: Mutex<HashMap<MapData, Raw<PortVlan>, Raw<Nic>>>,
    routes: Mutex<HashMap<MapData, [u8; 4], Raw<Nic>>>,
    eips: Mutex<HashMap<MapData, [u8; 4], [u8; 4]>>,
    vips: Mutex<HashMap<MapData, [u8; 4], u32>>,
    pub(super) services: Mutex<HashMap<MapData, Raw<ServiceKey>, Raw<Service>>>,
    pub(super) pins: Mutex<HashMap<MapData, Raw<PinKey>, [u8; 4]>>,
    pub(super) elb_flows: Mutex<HashMap<MapData, Raw<ElbKey>, Raw<Addr>>>,
    counts: Mutex<PerCpuHashMap<MapData, Raw<CountKey>, u64>>,
    flow_log: Mutex<PerCpuHashMap<MapData, Raw<FlowKey>, Raw<FlowCount>>>,
}

impl Fabric {
    /// Connects the ports, loads the program and attaches it. The links and maps are pinned: the fabric outlives
    /// this process until the lab is removed. The ELB knows `elb_flows` flows at once. With a `gate`, IPv4 packets pass only as long as a
    /// [`Gate`](groups::Gate) judges them.
    pub(super) fn create(
        places: &Places,
        ports: &[Port],
        mtu: u32,
        elb_flows: u32,
        log_flows: bool,
        vips: &[Ipv4Addr],
        gate: bool,
    ) -> Result<Self> {
        let netns = &places.netns("fabric");
        connect(netns, ports, mtu)?;
        if gate {
            groups::connect_gate(netns, mtu)?;
        }
        let names: Vec<&str> = ports.iter().map(|port| port.name.as_str()).collect();
        netns.run(|| load(places, &names, elb_flows, log_flows, gate))??;
        let fabric = Self::open(places.id())?;
        for vip in vips {
            lock(&fabric.vips).insert(vip.octets(), 1, 0).map_err(|e| Error::bpf("map VIPS", &e))?;
        }
        Ok(fabric)
    }

    /// The fabric of a standing lab, for a look from another process too.
    ///
    /// # Errors
    ///
    /// When no such lab stands.
    pub fn open(id: &str) -> Result<Self> {
        let places = Places::of(id)?;
        let netns = places.netns("fabric");
        let ports = netns
            .run(|| {
                nix::net::if_::if_nameindex()
                    .map(|list| list.iter().map(|i| (i.index(), i.name().to_owned())).collect::<Vec<_>>())
            })?
            .map_err(Error::errno(format!("interfaces of {netns}")))?
            .into_iter()
            .map(|(index, name)| (index, name.to_string_lossy().into_owned()))
            .collect();
        let map = |name: &str| {
            let path = places.pins().join("fabric").join(name);
            MapData::from_pin(&path)
                .and_then(Map::from_map_data)
                .map_err(|error| Error::bpf(format!("map {}", path.display()), &error))
        };
        macro_rules! typed {
            ($name:literal) => {
                Mutex::new(
                    map($name)?.try_into().map_err(|error| {
                        Error::bpf(concat!("map ", $name), &error as &aya::maps::MapError)
                    })?,
                )
            };
        }
        Ok(Self {
            ports,
            nics: typed!("NICS"),
            routes: typed!("ROUTES"),
            eips: typed!("EIPS"),
            vips: typed!("VIPS"),
            services: typed!("SERVICES"),
            pins: typed!("PINS"),
            elb_flows: typed!("ELB_FLOWS"),
            counts: typed!("COUNTS"),
            flow_log: typed!("FLOW_LOG"),
            netns,
        })
    }

    /// The namespace with the fabric's ends of all ports.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// All counts, violations and others.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn counts(&self) -> Result<Vec<Count>> {
        let counts = lock(&self.counts);
        let mut all = Vec::new();
        for key in counts.keys() {
            let key = key.map_err(|e| Error::bpf("map COUNTS", &e))?;
            let Some(packets) = found(counts.get(&key, 0)).map_err(|e| Error::bpf("map COUNTS", &e))? else {
                continue;
            };
            let Some(kind) = Kind::ALL.iter().copied().find(|kind| *kind as u32 == key.0.kind) else {
                continue;
            };
            all.push(Count {
                port: self.port_name(key.0.at.ifindex),
                vlan: key.0.at.vid,
                kind,
                packets: packets.iter().sum(),
            });
        }
        all.sort_by(|a, b| (&a.port, a.vlan, a.kind).cmp(&(&b.port, b.vlan, b.kind)));
        Ok(all)
    }

    /// The counts that are violations of the VPC's rules.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn violations(&self) -> Result<Vec<Count>> {
        Ok(self.counts()?.into_iter().filter(|count| count.kind.is_violation()).collect())
    }

    /// How many frames of this kind there were, at all ports.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn count(&self, kind: Kind) -> Result<u64> {
        Ok(self.counts()?.iter().filter(|count| count.kind == kind).map(|count| count.packets).sum())
    }

    /// Forgets all counts.
    ///
    /// # Errors
    ///
    /// When the map cannot be changed.
    pub fn clear_counts(&self) -> Result<()> {
        clear_per_cpu(&self.counts, "map COUNTS")
    }

    /// The flow log.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn flows(&self) -> Result<Vec<FlowRecord>> {
        let log = lock(&self.flow_log);
        let mut all = Vec::new();
        for key in log.keys() {
            let Raw(key) = key.map_err(|e| Error::bpf("map FLOW_LOG", &e))?;
            // An entry may go while the table is read.
            let Some(counts) = found(log.get(&Raw(key), 0)).map_err(|e| Error::bpf("map FLOW_LOG", &e))?
            else {
                continue;
            };
            all.push(FlowRecord {
                port: self.port_name(key.at.ifindex),
                vlan: key.at.vid,
                direction: if key.to_nic == 0 { Direction::FromNic } else { Direction::ToNic },
                src: SocketAddrV4::new(key.src.into(), key.sport),
                dst: SocketAddrV4::new(key.dst.into(), key.dport),
                proto: key.proto,
                packets: counts.iter().map(|count| count.0.packets).sum(),
                bytes: counts.iter().map(|count| count.0.bytes).sum(),
            });
        }
        all.sort_unstable();
        // The reading of a table that changes may begin anew.
        all.dedup_by(|a, b| {
            (a.src, a.dst, a.proto, a.direction, a.vlan, &a.port)
                == (b.src, b.dst, b.proto, b.direction, b.vlan, &b.port)
        });
        Ok(all)
    }

    /// The flows between two addresses, either way; with `port` at either end, 0 = any.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn flows_between(&self, a: Ipv4Addr, b: Ipv4Addr, port: u16) -> Result<Vec<FlowRecord>> {
        let mut flows = self.flows()?;
        flows.retain(|flow| {
            let ends = (*flow.src.ip(), *flow.dst.ip());
            (ends == (a, b) || ends == (b, a))
                && (port == 0 || flow.src.port() == port || flow.dst.port() == port)
        });
        Ok(flows)
    }

    /// Forgets the flow log.
    ///
    /// # Errors
    ///
    /// When the map cannot be changed.
    pub fn clear_flows(&self) -> Result<()> {
        clear_per_cpu(&self.flow_log, "map FLOW_LOG")
    }

    /// Everything that is attached, in the order of ports and VLAN ids.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn attached(&self) -> Result<Vec<Attached>> {
        let nics = lock(&self.nics);
        let mut all = Vec::new();
        for entry in nics.iter() {
            let (_, Raw(nic)) = entry.map_err(|e| Error::bpf("map NICS", &e))?;
            all.push(Attached {
                port: self.port_name(nic.at.ifindex),
                vlan: nic.at.vid,
                mac: Mac(nic.mac),
                ip: nic.ip.into(),
                eip: (nic.eip != [0; 4]).then(|| nic.eip.into()),
            });
        }
        all.sort_unstable();
        Ok(all)
    }

    /// Where the NIC with this address is: port, VLAN id (0 = untagged), MAC.
    ///
    /// # Errors
    ///
    /// When no NIC has it.
    pub fn nic_of(&self, ip: Ipv4Addr) -> Result<(String, u16, Mac)> {
        let Raw(nic) = found(lock(&self.routes).get(&ip.octets(), 0))
            .map_err(|e| Error::bpf("map ROUTES", &e))?
            .ok_or_else(|| Error::Unknown(format!("NIC with {ip}")))?;
        Ok((self.port_name(nic.at.ifindex), nic.at.vid, Mac(nic.mac)))
    }

    /// Attaches a NIC or sub-ENI to a port, as the cloud does when one is allocated. An old one at this place goes.
    ///
    /// # Errors
    ///
    /// When there is no such port.
    pub fn attach_nic(
        &self,
        port: &str,
        vlan: u16,
        ip: Ipv4Addr,
        mac: Mac,
        eip: Option<Ipv4Addr>,
    ) -> Result<()> {
        self.add_nic(port, vlan, ip, mac, eip, 0)
    }

    pub(super) fn add_nic(
        &self,
        port: &str,
        vlan: u16,
        ip: Ipv4Addr,
        mac: Mac,
        eip: Option<Ipv4Addr>,
        flags: u32,
    ) -> Result<()> {
        self.detach_nic(port, vlan)?;
        let at = self.place(port, vlan)?;
        let outside = flags & fabric_ebpf::nic::OUTSIDE != 0;
        let nic = Nic {
            at,
            mac: mac.0,
            pad: [0; 2],
            ip: ip.octets(),
            eip: eip.map_or([0; 4], |eip| eip.octets()),
            flags,
        };
        lock(&self.nics).insert(Raw(at), Raw(nic), 0).map_err(|e| Error::bpf("map NICS", &e))?;
        let route = if outside { [0; 4] } else { nic.ip };
        lock(&self.routes).insert(route, Raw(nic), 0).map_err(|e| Error::bpf("map ROUTES", &e))?;
        if let Some(eip) = eip {
            lock(&self.eips).insert(eip.octets(), nic.ip, 0).map_err(|e| Error::bpf("map EIPS", &e))?;
        }
        Ok(())
    }

    /// Switches the source check of a port's untagged NIC off and routes these addresses to it, as a VPC does for a node
    /// that forwards for its pods.
    ///
    /// # Errors
    ///
    /// When there is no such NIC.
    pub fn forwards(&self, port: &str, addresses: &[Ipv4Addr]) -> Result<()> {
        let at = self.place(port, 0)?;
        let mut nics = lock(&self.nics);
        let Raw(mut nic) = found(nics.get(&Raw(at), 0))
            .map_err(|e| Error::bpf("map NICS", &e))?
            .ok_or_else(|| Error::Unknown(format!("NIC of port {port}")))?;
        nic.flags |= fabric_ebpf::nic::FORWARDS;
        nics.insert(Raw(at), Raw(nic), 0).map_err(|e| Error::bpf("map NICS", &e))?;
        let mut routes = lock(&self.routes);
        for address in addresses {
            routes.insert(address.octets(), Raw(nic), 0).map_err(|e| Error::bpf("map ROUTES", &e))?;
        }
        Ok(())
    }

    /// Detaches what is at this place, if anything.
    ///
    /// # Errors
    ///
    /// When there is no such port.
    pub fn detach_nic(&self, port: &str, vlan: u16) -> Result<()> {
        let at = self.place(port, vlan)?;
        let mut nics = lock(&self.nics);
        let Some(Raw(nic)) = found(nics.get(&Raw(at), 0)).map_err(|e| Error::bpf("map NICS", &e))? else {
            return Ok(());
        };
        let mut routes = lock(&self.routes);
        // The address may have moved to another place already.
        if found(routes.get(&nic.ip, 0))
            .map_err(|e| Error::bpf("map ROUTES", &e))?
            .is_some_and(|r| r.0.at == at)
        {
            routes.remove(&nic.ip).map_err(|e| Error::bpf("map ROUTES", &e))?;
        }
        if nic.eip != [0; 4] {
            found(lock(&self.eips).remove(&nic.eip)).map_err(|e| Error::bpf("map EIPS", &e))?;
        }
        nics.remove(&Raw(at)).map_err(|e| Error::bpf("map NICS", &e))
    }

    /// Writes every frame that crosses the ports, both ways, to a pcapng file with the ports' names, until the
    /// capture is dropped or stopped.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn capture(&self, path: &Path) -> Result<Capture> {
        Capture::start(&self.netns, path)
    }

    fn place(&self, port: &str, vlan: u16) -> Result<PortVlan> {
        let found = self.ports.iter().find(|(_, name)| *name == port);
        let (ifindex, _) = found.ok_or_else(|| Error::Unknown(format!("port {port}")))?;
        Ok(PortVlan { ifindex: *ifindex, vid: vlan, pad: 0 })
    }

    fn port_name(&self, ifindex: u32) -> String {
        self.ports.get(&ifindex).cloned().unwrap_or_else(|| format!("interface {ifindex}"))
    }
}

impl ServiceAddress for ServiceKey {
    fn of(addr: SocketAddrV4, protocol: Protocol) -> Self {
        Self { ip: addr.ip().octets(), port: addr.port(), proto: protocol as u8, pad: 0 }
    }
}

/// From an address to a key.
pub(super) trait ServiceAddress {
    fn of(addr: SocketAddrV4, protocol: Protocol) -> Self;
}

/// Makes the veth pairs and sets the fabric's ends up.
fn connect(netns: &Netns, ports: &[Port], mtu: u32) -> Result<()> {
    // The fabric's ends send nothing of their own.
    for scope in ["all", "default"] {
        netns.sysctl(&format!("net/ipv6/conf/{scope}/disable_ipv6"), "1")?;
    }
    let mut batch = String::new();
    for (number, port) in ports.iter().enumerate() {
        if port.name.len() > 15 {
            return Err(Error::Topology(format!("port name {} has more than 15 characters", port.name)));
        }
        let own_mac = Mac([0xfe, 0xff, 0xff, 0, (number >> 8) as u8, number as u8]);
        let Port { name, interface, netns: other, mac, .. } = port;
        batch.push_str(&format!(
            "link add name {name} address {own_mac} mtu {mtu} type veth peer name {interface} address {mac} mtu {mtu} netns {other}\n\
             link set dev {name} up\n"
        ));
    }
    netns.ip_batch(&batch)?;
    let off = ports.iter().flat_map(|port| {
        let vlan = port.trunk.then_some(Offload::TxVlan);
        let checksum = port.checksums.then_some(Offload::TxChecksum);
        vlan.into_iter().chain(checksum).map(|offload| (port.name.as_str(), offload))
    });
    let off: Vec<_> = off.collect();
    netns.run(|| {
        for (port, offload) in off {
            sys::offload_off(port, offload)
                .map_err(Error::io(format!("switching {offload:?} of {port} in {netns} off")))?;
        }
        Ok(())
    })?
}

/// Runs in the fabric's namespace.
fn load(places: &Places, ports: &[&str], elb_flows: u32, log_flows: bool, gate: bool) -> Result<()> {
    if OBJECT.is_empty() {
        return Err(Error::Bpf {
            what: "program".into(),
            message: "it was built without bpf-linker; `cargo xtask setup` installs it".into(),
        });
    }
    let network = Subnet::VPC.network.to_bits();
    let mask = Subnet::VPC.mask();
    let log_flows = u8::from(log_flows);
    let gate_index = if gate {
        nix::net::if_::if_nametoindex(groups::GATE).map_err(Error::errno(groups::GATE))?
    } else {
        0
    };
    let mut bpf = EbpfLoader::new()
        .override_global("LOG_FLOWS", &log_flows, true)
        .override_global("VPC_NETWORK", &network, true)
        .override_global("VPC_MASK", &mask, true)
        .override_global("GATEWAY_MAC", &GATEWAY_MAC.0, true)
        .override_global("GATE", &gate_index, true)
        .map_max_entries("ELB_FLOWS", elb_flows)
        .map_max_entries("ELB_RETURNS", elb_flows)
        .load(OBJECT)
        .map_err(|e| Error::bpf("object", &e))?;
    let dir = places.pins().join("fabric");
    std::fs::create_dir_all(&dir).map_err(Error::io(format!("making {}", dir.display())))?;
    for name in MAPS {
        let map = bpf.map(name).ok_or_else(|| Error::Unknown(format!("map {name}")))?;
        map.pin(dir.join(name)).map_err(|e| Error::bpf(format!("map {name}"), &e))?;
    }
    let program = program(&mut bpf, "fabric_port")?;
    for port in ports {
        attach(program, port, &dir)?;
    }
    if gate {
        attach(self::program(&mut bpf, "fabric_judged")?, groups::GATE, &dir)?;
    }
    Ok(())
}

fn program<'a>(bpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    let program: &mut SchedClassifier = bpf
        .program_mut(name)
        .ok_or_else(|| Error::Unknown(format!("program {name}")))?
        .try_into()
        .map_err(|e: aya::programs::ProgramError| Error::bpf(format!("program {name}"), &e))?;
    program.load().map_err(|e| Error::bpf(format!("program {name}"), &e))?;
    Ok(program)
}

fn attach(program: &mut SchedClassifier, port: &str, dir: &Path) -> Result<()> {
    let what = || format!("program at port {port}");
    let tcx = TcAttachOptions::TcxOrder(LinkOrder::default());
    if let Ok(id) = program.attach_with_options(port, TcAttachType::Ingress, tcx) {
        let link = program.take_link(id).map_err(|e| Error::bpf(what(), &e))?;
        let link: FdLink =
            link.try_into().map_err(|e: aya::programs::links::LinkError| Error::bpf(what(), &e))?;
        link.pin(dir.join(format!("link-{port}"))).map_err(|e| Error::bpf(what(), &e))?;
        return Ok(());
    }
    // A kernel before 6.6. The filter stays until the interface goes.
    qdisc_add_clsact(port).map_err(|e| Error::bpf(what(), &e))?;
    let id = program
        .attach_with_options(port, TcAttachType::Ingress, TcAttachOptions::Netlink(NlOptions::default()))
        .map_err(|e| Error::bpf(what(), &e))?;
    std::mem::forget(program.take_link(id).map_err(|e| Error::bpf(what(), &e))?);
    Ok(())
}

/// A panic elsewhere leaves the maps as good as they were.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A missing entry is an answer, not an error.
pub(super) fn found<T>(result: Result<T, aya::maps::MapError>) -> Result<Option<T>, aya::maps::MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(aya::maps::MapError::KeyNotFound | aya::maps::MapError::ElementNotFound) => Ok(None),
        Err(aya::maps::MapError::SyscallError(error))
            if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn clear_per_cpu<K: aya::Pod, V: aya::Pod>(
    map: &Mutex<PerCpuHashMap<MapData, K, V>>,
    what: &str,
) -> Result<()> {
    let mut map = lock(map);
    let keys: Vec<K> = map.keys().collect::<Result<_, _>>().map_err(|e| Error::bpf(what, &e))?;
    for key in keys {
        found(map.remove(&key)).map_err(|e| Error::bpf(what, &e))?;
    }
    Ok(())
}

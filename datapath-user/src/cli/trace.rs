//! `eniway trace`: what the datapath would do with a packet, step by step.
//!
//! The packet is built byte by byte and given to the functions that the kernel's programs are compiled from, over the
//! pinned tables as they are now. It is never sent. Where it would reach another pod of this node, the story goes on
//! there, and back with the reply.

use std::{fmt::Write as _, net::Ipv4Addr, str::FromStr};

use clap::ValueEnum;
use datapath_common::{
    abi::{
        Endpoint, Outcome,
        endpoint::flag,
        maps::{SERVICE_MARK, host_dst},
    },
    decide::{Decision, eni_ingress, pod_egress, pod_ingress},
    packet::{
        ipv4,
        l4::ECHO_REQUEST,
        link::{TPID_8021Q, Tag},
    },
};
use eniway_policy::explain::Traffic;
use etherparse::PacketBuilder;
use serde::Serialize;

use super::{
    CliError, Node, Target,
    counters::{kind, meaning},
    full_name, print, print_json,
};
use crate::{
    live::{LiveTables, Step},
    net::Mac,
    policy::PolicyState,
};

/// Show, step by step, what the datapath would do with a packet of a pod
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("other-end").required(true))]
pub struct Args {
    #[command(flatten)]
    target: Target,
    /// The pod: its name, namespace/name, or address
    #[arg(long, value_name = "NAME")]
    pod: String,
    /// The pod sends to this address (port 80 unless given)
    #[arg(long, value_name = "ADDR[:PORT]", group = "other-end")]
    to: Option<End>,
    /// The pod receives from this address (port 40000 unless given)
    #[arg(long, value_name = "ADDR[:PORT]", group = "other-end")]
    from: Option<End>,
    /// The protocol; for icmp, an echo request
    #[arg(long, value_enum, default_value_t = Proto::Tcp)]
    proto: Proto,
    /// The pod's own port (40000 with --to, 80 with --from), or the identifier of icmp
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// A packet that opens a TCP connection; this is what is traced unless --no-syn is given
    #[arg(long, overrides_with = "no_syn")]
    syn: bool,
    /// A packet in the middle of a TCP connection
    #[arg(long)]
    no_syn: bool,
    /// How a packet --from elsewhere arrives; by default from the pod with that address, from the node's stack if
    /// that serves the address, else on the wire
    #[arg(long, value_enum, requires = "from")]
    via: Option<Via>,
    /// Length of the IP packet in bytes, which may be more than fits a pod's MTU
    #[arg(long, value_name = "BYTES")]
    size: Option<u16>,
}

/// An address and perhaps a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct End {
    address: Ipv4Addr,
    port: Option<u16>,
}

impl FromStr for End {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, port) = match text.split_once(':') {
            Some((address, port)) => (address, Some(port)),
            None => (text, None),
        };
        let address = address.parse().map_err(|_| format!("`{address}` is not an IPv4 address"))?;
        let port =
            port.map(|port| port.parse().map_err(|_| format!("`{port}` is not a port"))).transpose()?;
        Ok(Self { address, port })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Proto {
    Tcp,
    Udp,
    Icmp,
}

impl Proto {
    const fn number(self) -> u8 {
        match self {
            Self::Tcp => ipv4::TCP,
            Self::Udp => ipv4::UDP,
            Self::Icmp => ipv4::ICMP,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Via {
    /// Tagged, from the fabric: also what a load balancer sends back into this node
    Wire,
    /// From the node's own stack
    Host,
    /// From the pod of this node that has the address
    Pod,
}

/// What a packet is to its flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Opens,
    Middle,
    Answers,
}

/// A packet to be traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Packet {
    proto: Proto,
    turn: Turn,
    src: Ipv4Addr,
    src_port: u16,
    dst: Ipv4Addr,
    dst_port: u16,
    size: Option<u16>,
}

impl Packet {
    fn reply(self) -> Self {
        Self {
            turn: if self.turn == Turn::Middle { Turn::Middle } else { Turn::Answers },
            src: self.dst,
            src_port: self.dst_port,
            dst: self.src,
            dst_port: self.src_port,
            size: None,
            ..self
        }
    }

    /// The frame's bytes, from the Ethernet header on, without a tag.
    fn frame(self, src_mac: [u8; 6], dst_mac: [u8; 6]) -> Result<Vec<u8>, CliError> {
        let failed = |error: &dyn std::fmt::Display| CliError::Packet(error.to_string());
        let ip = PacketBuilder::ethernet2(src_mac, dst_mac).ipv4(self.src.octets(), self.dst.octets(), 64);
        let headers = match self.proto {
            Proto::Tcp => 40,
            Proto::Udp | Proto::Icmp => 28,
        };
        let size = self.size.unwrap_or(headers);
        let payload = size.checked_sub(headers).ok_or_else(|| {
            CliError::Packet(format!("--size {size} is less than the {headers} bytes of its headers"))
        })?;
        let payload = vec![0; payload.into()];
        let mut frame = Vec::with_capacity(14 + usize::from(size));
        match self.proto {
            Proto::Tcp => {
                let tcp = ip.tcp(self.src_port, self.dst_port, 1, 65_535);
                let tcp = match self.turn {
                    Turn::Opens => tcp.syn(),
                    Turn::Middle => tcp.ack(1),
                    Turn::Answers => tcp.syn().ack(1),
                };
                tcp.write(&mut frame, &payload).map_err(|error| failed(&error))?;
            }
            Proto::Udp => {
                let udp = ip.udp(self.src_port, self.dst_port);
                udp.write(&mut frame, &payload).map_err(|error| failed(&error))?;
            }
            Proto::Icmp => {
                let icmp = match self.turn {
                    Turn::Opens | Turn::Middle => ip.icmpv4_echo_request(self.src_port, 1),
                    Turn::Answers => ip.icmpv4_echo_reply(self.src_port, 1),
                };
                icmp.write(&mut frame, &payload).map_err(|error| failed(&error))?;
            }
        }
        Ok(frame)
    }
}

impl std::fmt::Display for Packet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { src, src_port, dst, dst_port, .. } = self;
        match (self.proto, self.turn) {
            (Proto::Tcp, Turn::Opens) => write!(f, "TCP SYN {src}:{src_port} -> {dst}:{dst_port}"),
            (Proto::Tcp, Turn::Middle) => write!(f, "TCP ACK {src}:{src_port} -> {dst}:{dst_port}"),
            (Proto::Tcp, Turn::Answers) => write!(f, "TCP SYN+ACK {src}:{src_port} -> {dst}:{dst_port}"),
            (Proto::Udp, _) => write!(f, "UDP {src}:{src_port} -> {dst}:{dst_port}"),
            (Proto::Icmp, Turn::Answers) => {
                write!(f, "ICMP echo reply {src} -> {dst}, identifier {src_port}")
            }
            (Proto::Icmp, _) => write!(f, "ICMP echo request {src} -> {dst}, identifier {src_port}"),
        }?;
        match self.size {
            Some(size) => write!(f, ", {size} bytes"),
            None => Ok(()),
        }
    }
}

/// A frame as it goes out on the wire.
#[derive(Debug, Serialize)]
struct Wire {
    parent: String,
    vlan: u16,
    src_mac: String,
    dst_mac: String,
}

/// What one program does with a packet.
#[derive(Debug, Serialize)]
struct Leg {
    program: &'static str,
    place: String,
    packet: String,
    steps: Vec<Step>,
    outcome: &'static str,
    kind: &'static str,
    meaning: String,
    remark: Option<&'static str>,
    remark_meaning: Option<String>,
    /// What happens to the frame.
    action: String,
    /// With the outcome `wire` of a packet that leaves.
    wire: Option<Wire>,
    /// Between pods of the node: what security groups say, rule by rule.
    groups: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Report {
    pod: String,
    legs: Vec<Leg>,
    notes: Vec<String>,
}

/// Runs the command.
///
/// # Errors
///
/// When there is no such pod, it is not in the tables, or these cannot be read.
pub fn run(args: &Args) -> Result<(), CliError> {
    let node = Node::read(&args.target)?;
    let report = report(&node, &node.tables()?, args)?;
    if args.target.json { print_json(&report) } else { print(&text(&report)) }
}

fn report(node: &Node, tables: &LiveTables, args: &Args) -> Result<Report, CliError> {
    let (name, address, error) = find(node, &args.pod)?;
    let not_programmed = || CliError::NotProgrammed { name: name.clone(), error };
    let pod = tables.pod(address)?.ok_or_else(not_programmed)?;
    let mut trace = Trace { node, tables, legs: Vec::new(), notes: Vec::new() };
    match (args.to, args.from) {
        (Some(to), _) => trace.to(pod, args, to)?,
        (None, Some(from)) => trace.from(pod, args, from)?,
        (None, None) => unreachable!("clap requires one of them"),
    }
    if tables.flow_involved() {
        trace.notes.push(AMBIGUITY.to_owned());
    }
    Ok(Report { pod: name, legs: trace.legs, notes: trace.notes })
}

const AMBIGUITY: &str = "A memory stands for a 5-tuple. When one client reaches this pod from one source port by two \
    ways at once (two load-balancer addresses that both chose it, or one and the pod's own address), the node sees the \
    same 5-tuple twice and cannot tell them apart: the replies of both take the door of the request that came last.";

/// Name, address and error of the pod. Without a status, an address will do.
fn find(node: &Node, name: &str) -> Result<(String, Ipv4Addr, Option<String>), CliError> {
    match node.pod(name) {
        Ok(pod) => Ok((full_name(pod), pod.ipv4, pod.error.clone())),
        Err(error) => match name.parse() {
            Ok(address) => Ok((name.to_owned(), address, None)),
            Err(_) => Err(error),
        },
    }
}

struct Trace<'a> {
    node: &'a Node,
    tables: &'a LiveTables,
    legs: Vec<Leg>,
    notes: Vec<String>,
}

impl<'a> Trace<'a> {
    fn to(&mut self, pod: &'a Endpoint, args: &Args, to: End) -> Result<(), CliError> {
        let own_port = args.port.unwrap_or(40_000);
        let packet = Packet {
            proto: args.proto,
            turn: if args.no_syn { Turn::Middle } else { Turn::Opens },
            src: pod.ipv4.into(),
            src_port: own_port,
            dst: to.address,
            dst_port: if args.proto == Proto::Icmp { own_port } else { to.port.unwrap_or(80) },
            size: args.size,
        };
        if self.tables.maps().is_vip(packet.dst.octets(), packet.dst_port, packet.proto.number())? {
            self.notes.push(format!(
                "{}:{} is a load balancer's: the VPC picks a backend, which sees this pod's address. For a backend on \
                 this node, see `eniway trace --pod BACKEND --from {}:{} --via wire`.",
                packet.dst, packet.dst_port, packet.src, packet.src_port
            ));
        }
        self.exchange(pod, packet)
    }

    fn from(&mut self, pod: &'a Endpoint, args: &Args, from: End) -> Result<(), CliError> {
        let own_port = args.port.unwrap_or(80);
        let packet = Packet {
            proto: args.proto,
            turn: if args.no_syn { Turn::Middle } else { Turn::Opens },
            src: from.address,
            src_port: if args.proto == Proto::Icmp { own_port } else { from.port.unwrap_or(40_000) },
            dst: pod.ipv4.into(),
            dst_port: own_port,
            size: args.size,
        };
        let sender = self.tables.pod(from.address)?;
        let via = match (args.via, sender) {
            (Some(via), _) => via,
            (None, Some(_)) => Via::Pod,
            (None, None) => {
                let flags = self.tables.maps().host_dst(from.address.octets())?;
                if flags & host_dst::HOST != 0 { Via::Host } else { Via::Wire }
            }
        };
        let delivered = match (via, sender) {
            (Via::Pod, Some(sender)) => return self.exchange(sender, packet),
            (Via::Pod, None) => {
                let problem =
                    format!("no pod of this node has the address {}, as --via pod says", from.address);
                return Err(CliError::Packet(problem));
            }
            (Via::Wire, _) => self.eni_ingress(pod, packet)?,
            (Via::Host, _) => self.pod_ingress(pod, packet)?,
        };
        // And no further: what the VPC makes of the reply depends on who it was that sent the request.
        if delivered {
            let _ = self.pod_egress(pod, packet.reply())?;
        }
        Ok(())
    }

    /// A pod's packet, and, if it reaches a pod of this node, that one's reply.
    fn exchange(&mut self, sender: &'a Endpoint, packet: Packet) -> Result<(), CliError> {
        if let Some(receiver) = self.send(sender, packet)? {
            self.send(receiver, packet.reply())?;
        }
        Ok(())
    }

    /// A pod's packet, up to the pod of this node that gets it.
    fn send(&mut self, sender: &'a Endpoint, packet: Packet) -> Result<Option<&'a Endpoint>, CliError> {
        let decision = self.pod_egress(sender, packet)?;
        if decision.outcome == Outcome::Local {
            return Ok(decision.to);
        }
        // The VPC brings it back on the VLAN of the pod that has the address.
        match self.tables.pod(packet.dst)?.filter(|_| decision.outcome == Outcome::Wire) {
            Some(receiver) => Ok(self.eni_ingress(receiver, packet)?.then_some(receiver)),
            None => Ok(None),
        }
    }

    fn pod_egress(&mut self, pod: &'a Endpoint, packet: Packet) -> Result<Decision<'a>, CliError> {
        let frame = packet.frame(pod.mac, pod.gateway_mac)?;
        let decision = pod_egress::decide(self.tables, frame.as_slice(), None, pod.ifindex, 0);
        let name = self.tables.name(pod.id);
        let (action, wire) = match (decision.outcome, decision.to) {
            (Outcome::Wire, _) => {
                let wire = Wire {
                    parent: self.node.parent_name(pod),
                    vlan: pod.vid,
                    src_mac: Mac(pod.wire_mac).to_string(),
                    dst_mac: Mac(pod.gateway_mac).to_string(),
                };
                let Wire { parent, vlan, src_mac, dst_mac } = &wire;
                (format!("out of {parent} on VLAN {vlan}, from {src_mac} to {dst_mac}"), Some(wire))
            }
            (Outcome::Local, Some(to)) => {
                let (src, dst) = (Mac(pod.gateway_mac), Mac(to.mac));
                (format!("straight into {}, from {src} to {dst}", self.tables.name(to.id)), None)
            }
            (Outcome::Host, _) => ("to the node's stack".to_owned(), None),
            (Outcome::HostService, _) => {
                let parent = self.node.parent_name(pod);
                let then = format!(
                    "to the node's stack, marked {SERVICE_MARK:#x}: what that forwards out of {parent} with this source \
                     leaves on VLAN {}",
                    pod.vid
                );
                (then, None)
            }
            _ => (ends(&decision), None),
        };
        let place = format!("{}, what {name} sends", self.node.host_interface(pod));
        self.leg("pod_egress", place, packet, &decision, action, wire)?;
        self.explain_groups(pod, packet)?;
        Ok(decision)
    }

    /// Whether the pod gets it.
    fn eni_ingress(&mut self, pod: &'a Endpoint, packet: Packet) -> Result<bool, CliError> {
        self.tables.at_parent(pod.parent);
        let frame = packet.frame(pod.gateway_mac, pod.wire_mac)?;
        let tag = Tag { tpid: TPID_8021Q, tci: pod.vid };
        let decision = eni_ingress::decide(self.tables, frame.as_slice(), Some(tag));
        let action = match decision.outcome {
            Outcome::Wire => format!("without its tag into {}", self.tables.name(pod.id)),
            Outcome::HostReturn => "without its tag to the node's stack, which translates it back".to_owned(),
            _ => ends(&decision),
        };
        let place = format!("{}, what the VPC sends on VLAN {}", self.node.parent_name(pod), pod.vid);
        self.leg("eni_ingress", place, packet, &decision, action, None)?;
        Ok(decision.outcome == Outcome::Wire)
    }

    /// Whether the pod gets it.
    fn pod_ingress(&mut self, pod: &'a Endpoint, packet: Packet) -> Result<bool, CliError> {
        let frame = packet.frame(pod.gateway_mac, pod.mac)?;
        let decision = pod_ingress::decide(self.tables, frame.as_slice(), None, pod.ifindex);
        let name = self.tables.name(pod.id);
        let action = match decision.outcome {
            Outcome::Host => format!("on to {name}"),
            _ => ends(&decision),
        };
        let place = format!("{}, what the node's stack sends to {name}", self.node.host_interface(pod));
        self.leg("pod_ingress", place, packet, &decision, action, None)?;
        Ok(decision.outcome == Outcome::Host)
    }

    fn leg(
        &mut self,
        program: &'static str,
        place: String,
        packet: Packet,
        decision: &Decision<'_>,
        action: String,
        wire: Option<Wire>,
    ) -> Result<(), CliError> {
        self.legs.push(Leg {
            program,
            place,
            packet: packet.to_string(),
            steps: self.tables.take_steps()?,
            outcome: decision.outcome.name(),
            kind: kind(decision.outcome),
            meaning: meaning(decision.outcome),
            remark: decision.remark.map(Outcome::name),
            remark_meaning: decision.remark.map(meaning),
            action,
            wire,
            groups: Vec::new(),
        });
        Ok(())
    }

    /// Adds to the last leg what security groups say of a packet to another pod of the node. An answer follows its flow.
    fn explain_groups(&mut self, pod: &Endpoint, packet: Packet) -> Result<(), CliError> {
        let Some(to) = self.tables.pod(packet.dst)?.filter(|to| to.id != pod.id) else { return Ok(()) };
        if packet.turn == Turn::Answers || (pod.flags | to.flags) & (flag::GROUPS | flag::OBSERVE) == 0 {
            return Ok(());
        }
        let state = PolicyState::read(&self.node.config.run_dir)?.unwrap_or_default();
        let port = match packet.proto {
            Proto::Icmp => u16::from(ECHO_REQUEST) << 8,
            Proto::Tcp | Proto::Udp => packet.dst_port,
        };
        let traffic = Traffic { proto: packet.proto.number(), port };
        let (from, towards) = ((packet.src, pod), (packet.dst, to));
        let lines = super::policy::rule_by_rule(&state, self.tables, from, towards, traffic);
        if let Some(leg) = self.legs.last_mut() {
            leg.groups = lines;
        }
        self.tables.take_steps()?;
        Ok(())
    }
}

fn ends(decision: &Decision<'_>) -> String {
    match decision.pod {
        Some(_) => "it ends here, counted for the pod".to_owned(),
        None => "it ends here, counted for no pod".to_owned(),
    }
}

fn text(report: &Report) -> String {
    let mut out = String::new();
    for (i, leg) in report.legs.iter().enumerate() {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{}. {} at {}\n   {}", i + 1, leg.program, leg.place, leg.packet);
        let width = |column: fn(&Step) -> &str| {
            leg.steps.iter().map(|step| column(step).chars().count()).max().unwrap_or(0)
        };
        let (tables, keys) = (width(|step| step.table), width(|step| &step.key));
        for Step { table, key, answer } in &leg.steps {
            let _ = writeln!(out, "     {table:<tables$}  {key:<keys$}  {answer}");
        }
        for line in &leg.groups {
            let _ = writeln!(out, "   groups: {line}");
        }
        if let (Some(remark), Some(meaning)) = (leg.remark, &leg.remark_meaning) {
            let _ = writeln!(out, "   remark: {remark} ({meaning})");
        }
        let _ = writeln!(out, "   {}: {} ({})\n   {}\n", leg.kind, leg.outcome, leg.meaning, leg.action);
    }
    for note in &report.notes {
        let _ = writeln!(out, "note: {note}");
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use clap::Parser as _;
    use datapath_common::packet::l4::Role;

    use super::*;
    use crate::{
        cli, config,
        tables::{Index, Maps},
    };

    fn packet(proto: Proto, turn: Turn) -> Packet {
        Packet {
            proto,
            turn,
            src: Ipv4Addr::new(10, 1, 18, 2),
            src_port: 40_000,
            dst: Ipv4Addr::new(10, 1, 16, 125),
            dst_port: 80,
            size: None,
        }
    }

    #[test]
    fn frames_are_what_the_datapath_reads() {
        for (proto, turn, role) in [
            (Proto::Tcp, Turn::Opens, Role::Opens),
            (Proto::Tcp, Turn::Middle, Role::Continues),
            (Proto::Tcp, Turn::Answers, Role::Answers),
            (Proto::Udp, Turn::Opens, Role::Either),
            (Proto::Icmp, Turn::Opens, Role::Either),
            (Proto::Icmp, Turn::Answers, Role::Either),
        ] {
            let frame = packet(proto, turn).frame([2; 6], [4; 6]).unwrap();
            let ip = ipv4::parse(frame.as_slice(), 14).unwrap();
            assert_eq!((ip.src, ip.dst), ([10, 1, 18, 2], [10, 1, 16, 125]));
            assert_eq!(ip.proto, proto.number());
            assert_eq!(ip.l4.role, role, "{proto:?} {turn:?}");
            assert_eq!(ip.l4.src_port, 40_000);
        }
    }

    #[test]
    fn a_size_is_that_of_the_ip_packet() {
        let big = Packet { size: Some(1500), ..packet(Proto::Udp, Turn::Opens) };
        assert_eq!(big.frame([2; 6], [4; 6]).unwrap().len(), 1514);
        let small = Packet { size: Some(39), ..packet(Proto::Tcp, Turn::Opens) };
        assert!(matches!(small.frame([2; 6], [4; 6]), Err(CliError::Packet(_))));
    }

    #[test]
    fn replies_turn_round() {
        let reply = packet(Proto::Tcp, Turn::Opens).reply();
        assert_eq!(reply.to_string(), "TCP SYN+ACK 10.1.16.125:80 -> 10.1.18.2:40000");
        assert_eq!(packet(Proto::Tcp, Turn::Middle).reply().turn, Turn::Middle);
    }

    const A: &str = "10.1.18.2";
    const B: &str = "10.1.16.125";

    /// Two pods of one node, over maps that no program uses. Maps need privileges; elsewhere there is nothing to see.
    fn node(fast_path: bool) -> Option<(Node, LiveTables)> {
        let limits = config::Limits { endpoints: 8, flows: 1024 };
        let mut maps = match Maps::create(&limits) {
            Ok(maps) => maps,
            Err(error) => {
                assert!(!nix::unistd::geteuid().is_root(), "{error}");
                return None;
            }
        };
        let mut names = HashMap::new();
        for (slot, address) in [(1_u32, A), (2, B)] {
            let record = Endpoint {
                owner: slot.into(),
                id: slot,
                ifindex: 1000 + slot,
                parent_ifindex: 999,
                ipv4: address.parse::<Ipv4Addr>().unwrap().octets(),
                gateway_ipv4: [10, 1, 16, 1],
                mac: [0xfa, 0x16, 0x3e, 0, 0, slot as u8],
                wire_mac: [0xfa, 0x16, 0x3e, 0, 0, slot as u8],
                gateway_mac: [0xfa, 0xff, 0xff, 0, 0, 1],
                vid: 100 + slot as u16,
                mtu: 1500,
                ..Endpoint::ZERO
            };
            maps.set_record(slot, &record).unwrap();
            for index in Index::of(&record) {
                maps.set_slot(index, slot).unwrap();
            }
            names.insert(slot, format!("default/{slot}"));
        }
        let dsts = [("10.1.0.167/32", host_dst::HOST), ("169.254.169.254/32", host_dst::DENY)];
        maps.set_host_dsts(&dsts.map(|(net, flags)| (net.parse().unwrap(), flags)).into()).unwrap();
        maps.set_vips(&[([10, 1, 0, 200], 80, ipv4::TCP)].into()).unwrap();
        let node = Node { status: None, ..cli::tests::node(Vec::new()) };
        Some((node, LiveTables::new(maps, fast_path, names)))
    }

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    /// What `eniway trace` says of a node: (program, outcome) of each leg, and the notes.
    fn traced(node: &(Node, LiveTables), line: &str) -> (Vec<(&'static str, &'static str)>, Vec<String>) {
        let (node, tables) = node;
        let line = Line::parse_from(std::iter::once("trace").chain(line.split(' ')));
        let report = report(node, tables, &line.args).unwrap();
        let told = text(&report);
        assert!(report.legs.iter().all(|leg| told.contains(leg.outcome)), "{told}");
        assert!(tables.maps().flows().unwrap().is_empty(), "looking leaves no trace");
        (report.legs.iter().map(|leg| (leg.program, leg.outcome)).collect(), report.notes)
    }

    #[test]
    fn two_pods_of_a_node_by_the_fast_path() {
        let Some(node) = node(true) else { return };
        let there_and_back = vec![("pod_egress", "local"), ("pod_egress", "local")];
        assert_eq!(traced(&node, &format!("--pod {A} --to {B}:80")), (there_and_back.clone(), vec![]));
        assert_eq!(traced(&node, &format!("--pod {B} --from {A}")).0, there_and_back);
        let (legs, _) = traced(&node, &format!("--pod {A} --to {B} --proto udp --size 1501"));
        assert_eq!(legs[0], ("pod_egress", "wire"), "too big for the fast path");
    }

    #[test]
    fn two_pods_of_a_node_without_the_fast_path() {
        let Some(node) = node(false) else { return };
        let (legs, notes) = traced(&node, &format!("--pod {A} --to {B}:80"));
        let hairpin = [("pod_egress", "wire"), ("eni_ingress", "wire")];
        assert_eq!(legs, [hairpin, hairpin].concat());
        assert_eq!(notes, [AMBIGUITY], "the request's door is remembered");
    }

    #[test]
    fn a_load_balancer_between_two_pods_of_a_node() {
        let Some(node) = node(true) else { return };
        let (legs, notes) = traced(&node, &format!("--pod {A} --to 10.1.0.200:80"));
        assert_eq!(legs, [("pod_egress", "wire")]);
        assert!(notes[0].contains("a load balancer's"), "{notes:?}");
        let (legs, notes) = traced(&node, &format!("--pod {B} --from {A} --via wire"));
        assert_eq!(legs, [("eni_ingress", "wire"), ("pod_egress", "wire")], "not by the fast path");
        assert_eq!(notes, [AMBIGUITY]);
    }

    #[test]
    fn a_pod_and_itself() {
        let Some(node) = node(true) else { return };
        let (legs, _) = traced(&node, &format!("--pod {A} --to {A}"));
        assert_eq!(legs, [("pod_egress", "wire"), ("eni_ingress", "self-hairpin")]);
    }

    #[test]
    fn the_node_and_beyond() {
        let Some(node) = node(true) else { return };
        assert_eq!(traced(&node, &format!("--pod {A} --to 10.1.0.167")).0, [("pod_egress", "host")]);
        let probe = [("pod_ingress", "host"), ("pod_egress", "host")];
        assert_eq!(traced(&node, &format!("--pod {A} --from 10.1.0.167 --proto icmp")).0, probe);
        let (legs, _) = traced(&node, &format!("--pod {A} --from 10.9.9.8 --no-syn"));
        assert_eq!(legs, [("eni_ingress", "wire"), ("pod_egress", "wire")]);
        let (legs, _) = traced(&node, &format!("--pod {A} --from 10.9.9.9 --via host"));
        assert_eq!(legs, probe, "a node port that keeps its client");
        let (legs, _) = traced(&node, &format!("--pod {A} --to 169.254.169.254"));
        assert_eq!(legs, [("pod_egress", "denied-destination")]);
    }

    #[test]
    fn ends_are_addresses_with_or_without_a_port() {
        assert_eq!("10.0.0.1".parse(), Ok(End { address: Ipv4Addr::new(10, 0, 0, 1), port: None }));
        assert_eq!("10.0.0.1:53".parse(), Ok(End { address: Ipv4Addr::new(10, 0, 0, 1), port: Some(53) }));
        for bad in ["", "10.0.0", "10.0.0.1:", "10.0.0.1:66000", "fe80::1"] {
            assert!(bad.parse::<End>().is_err(), "{bad}");
        }
    }
}

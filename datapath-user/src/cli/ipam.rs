//! `eniway ipam`: run the allocator, and ask it.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Subcommand;
use eniway_ipam::{
    Confirm, Policy, Subnet,
    api::{
        AddressRequest, AllocateRequest, Allocation, CoolingStatus, LeakStatus, PoolStatus, Released,
        SubnetStatus,
    },
    model::{LeakKind, PodKey},
    rpc::{self, Address, Client},
};
use eniway_policy::model::Groups;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::{
    CliError, print, print_json,
    table::{Align, Table, duration, number},
};
use crate::{
    config,
    ipam::{self, IpamError, TlsFiles},
};

/// Run the allocator, or ask it
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the allocator
    Serve {
        /// The allocator's configuration file
        #[arg(long, value_name = "FILE", default_value = ipam::DEFAULT_PATH)]
        config: PathBuf,
    },
    /// List the nodes' pools of interfaces
    Pools(Server),
    /// List the container subnets
    Subnets(Server),
    /// List what pods have
    Allocations {
        #[command(flatten)]
        server: Server,
        /// Of one node only
        #[arg(long)]
        node: Option<String>,
    },
    /// List what rests after a release
    Cooling(Server),
    /// List interfaces that only the allocator or only the VPC knows
    Leaks(Server),
    /// Give a pod an interface
    Allocate(Allocate),
    /// Take a pod's interface back
    Release {
        #[command(flatten)]
        server: Server,
        #[command(flatten)]
        key: Key,
        /// Only if this is its generation
        #[arg(long)]
        generation: Option<u64>,
    },
    /// Add a container subnet
    AddSubnet(AddSubnet),
    /// Show or change the security groups and their rules
    SecurityGroups {
        #[command(subcommand)]
        command: SecurityGroups,
    },
    /// Give a pod other security groups
    SetGroups {
        #[command(flatten)]
        server: Server,
        #[command(flatten)]
        key: Key,
        /// The groups, the one that decides first in front
        #[arg(required = true, value_name = "GROUP")]
        groups: Vec<String>,
        /// Return when they are in force on the pod's node; wait so many seconds at most
        #[arg(long, value_name = "SECONDS")]
        wait: Option<u64>,
    },
    /// Empty a node that is going away: no more pods, all interfaces given back
    Drain {
        #[command(flatten)]
        server: Server,
        /// The node
        node: String,
    },
    /// Confirm what is held back: removals on a node, or the collection of leaks
    Confirm {
        #[command(flatten)]
        server: Server,
        /// The node
        #[arg(required_unless_present = "leaks", conflicts_with = "leaks")]
        node: Option<String>,
        /// The leaks seen so far
        #[arg(long)]
        leaks: bool,
    },
}

#[derive(Debug, Subcommand)]
enum SecurityGroups {
    /// Put the groups of a file in place of those that are there
    Apply {
        #[command(flatten)]
        server: Server,
        /// A JSON document with `security_groups` and `address_groups`; with a `revision`, it replaces that one only
        file: PathBuf,
    },
    /// Show the groups; with --json, as `apply` reads them
    Show(Server),
}

/// Which allocator is asked.
#[derive(Debug, Clone, clap::Args)]
struct Server {
    /// Where the allocator is: unix:/path or https://host:port
    #[arg(long, value_name = "ADDRESS", default_value = rpc::DEFAULT_ADDRESS)]
    server: Address,
    /// PEM file of the authority of the allocator's certificate, for https
    #[arg(long, value_name = "FILE", requires = "cert")]
    ca: Option<PathBuf>,
    /// PEM file of the certificate to show
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// PEM file of its key
    #[arg(long, value_name = "FILE", requires = "ca")]
    key: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, clap::Args)]
struct Key {
    /// The pod's uid
    #[arg(long)]
    uid: String,
    /// The sandbox' container id
    #[arg(long)]
    container_id: String,
}

impl Key {
    fn key(&self) -> PodKey {
        PodKey { uid: self.uid.clone(), container_id: self.container_id.clone() }
    }
}

#[derive(Debug, clap::Args)]
struct Allocate {
    #[command(flatten)]
    server: Server,
    #[command(flatten)]
    key: Key,
    /// The node
    #[arg(long)]
    node: String,
    /// The pod, as namespace/name
    pod: String,
    /// The pod's network namespace, if the agent shall wire the pod
    #[arg(long, value_name = "PATH")]
    netns: Option<String>,
    /// The interface's name in the pod
    #[arg(long, default_value = "eth0")]
    interface: String,
    /// An address tied to the pod's name: this one, or `any`
    #[arg(long = "static", value_name = "ADDRESS")]
    fixed: Option<String>,
    /// Return when the node's agent has put it into the kernel; wait so many seconds at most
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u64>,
}

#[derive(Debug, clap::Args)]
struct AddSubnet {
    #[command(flatten)]
    server: Server,
    /// The VPC's id of the subnet
    id: String,
    /// The prefix
    prefix: ipnet::Ipv4Net,
    /// The gateway; the first address by default
    #[arg(long)]
    gateway: Option<Ipv4Addr>,
    /// The gateway's MAC address
    #[arg(long)]
    gateway_mac: eniway_ipam::net::Mac,
    /// The IPv6 prefix
    #[arg(long, requires = "gateway_ipv6")]
    ipv6: Option<ipnet::Ipv6Net>,
    /// The IPv6 gateway
    #[arg(long, requires = "ipv6")]
    gateway_ipv6: Option<std::net::Ipv6Addr>,
    /// The MTU of the pods' interfaces
    #[arg(long, default_value_t = 1500)]
    mtu: u16,
}

impl Server {
    fn client(&self) -> Result<Client, CliError> {
        let tls = match (&self.ca, &self.cert, &self.key) {
            (Some(ca), Some(cert), Some(key)) => {
                Some(TlsFiles { ca: ca.clone(), cert: cert.clone(), key: key.clone() }.read()?)
            }
            _ => None,
        };
        Ok(Client::new(self.server.clone(), tls.as_ref())?)
    }

    fn show<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> Result<(), CliError> {
        if self.json { print_json(value) } else { print(&text(value)) }
    }

    fn done(&self, text: &str) -> Result<(), CliError> {
        self.show(&serde_json::json!({ "done": text }), |_| format!("{text}\n"))
    }
}

/// Runs the command.
///
/// # Errors
///
/// When the allocator refuses, or cannot be reached.
pub fn run(args: &Args) -> Result<(), CliError> {
    let runtime =
        || tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::Runtime);
    if let Command::Serve { config } = &args.command {
        let config = ipam::Config::load(config)?;
        config::start_log(&config.log);
        // The store has a thread of its own; this many more do not help.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        return Ok(runtime.map_err(CliError::Runtime)?.block_on(serve(&config))?);
    }
    runtime()?.block_on(ask(&args.command))
}

async fn serve(config: &ipam::Config) -> Result<(), IpamError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(IpamError::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(IpamError::Runtime)?;
    let (allocator, listeners) = ipam::open(config).await?;
    log::info!("ready");
    let stop = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    rpc::serve(allocator.clone(), listeners, stop).await?;
    allocator.close().await;
    log::info!("stopped");
    Ok(())
}

async fn ask(command: &Command) -> Result<(), CliError> {
    match command {
        Command::Serve { .. } => Ok(()),
        Command::Pools(server) => server.show(&server.client()?.pools().await?, |pools| self::pools(pools)),
        Command::Subnets(server) => {
            server.show(&server.client()?.subnets().await?, |subnets| self::subnets(subnets))
        }
        Command::Allocations { server, node } => {
            server.show(&server.client()?.list(node.as_deref()).await?, |all| allocations(all))
        }
        Command::Cooling(server) => {
            server.show(&server.client()?.cooling().await?, |cooling| self::cooling(cooling))
        }
        Command::Leaks(server) => server.show(&server.client()?.leaks().await?, |leaks| self::leaks(leaks)),
        Command::Allocate(args) => allocate(args).await,
        Command::Release { server, key, generation } => {
            let released = server.client()?.release(&key.key(), *generation).await?;
            server.done(match released {
                Released::Now => "released",
                Released::NotAllocated => "there was no such allocation",
            })
        }
        Command::AddSubnet(args) => add_subnet(args).await,
        Command::SecurityGroups { command: SecurityGroups::Show(server) } => {
            server.show(&server.client()?.security_groups().await?, security_groups)
        }
        Command::SecurityGroups { command: SecurityGroups::Apply { server, file } } => {
            apply_security_groups(server, file).await
        }
        Command::SetGroups { server, key, groups, wait } => {
            let wait = wait.map(Duration::from_secs);
            let allocation = server.client()?.set_security_groups(&key.key(), groups, wait).await?;
            server.show(&allocation, |one| allocations(std::slice::from_ref(one)))
        }
        Command::Drain { server, node } => {
            server.client()?.drain_node(node).await?;
            server.done(&format!("{node} takes no more pods; `eniway ipam pools` shows when it is empty"))
        }
        Command::Confirm { server, node, .. } => {
            let what = node.clone().map_or(Confirm::Leaks, Confirm::Node);
            server.client()?.confirm(&what).await?;
            server.done("confirmed")
        }
    }
}

async fn allocate(args: &Allocate) -> Result<(), CliError> {
    let wrong = |what: String| CliError::Argument(what);
    let Some((namespace, name)) = args.pod.split_once('/') else {
        return Err(wrong(format!("`{}` is not namespace/name", args.pod)));
    };
    let address = match args.fixed.as_deref() {
        None => AddressRequest::Pool,
        Some(text) => {
            let ipv4 = match text {
                "any" => None,
                text => Some(
                    text.parse().map_err(|_| wrong(format!("`{text}` is neither an address nor `any`")))?,
                ),
            };
            AddressRequest::Static { ipv4, ipv6: None, retention: None }
        }
    };
    let request = AllocateRequest {
        node: args.node.clone(),
        key: args.key.key(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        netns: args.netns.clone(),
        interface: args.interface.clone(),
        address,
        security_groups: None,
        timeout: None,
    };
    let allocation = args.server.client()?.allocate(&request, args.wait.map(Duration::from_secs)).await?;
    args.server.show(&allocation, |one| allocations(std::slice::from_ref(one)))
}

async fn add_subnet(args: &AddSubnet) -> Result<(), CliError> {
    let first = || args.prefix.hosts().next().unwrap_or(args.prefix.network());
    let subnet = Subnet {
        id: args.id.clone(),
        ipv4: args.prefix,
        gateway: args.gateway.unwrap_or_else(first),
        gateway_mac: args.gateway_mac,
        ipv6: args.ipv6,
        gateway_ipv6: args.gateway_ipv6,
        mtu: args.mtu,
    };
    args.server.client()?.add_subnet(&subnet).await?;
    args.server.done(&format!("{} ({}) is used for new interfaces from now on", subnet.id, subnet.ipv4))
}

async fn apply_security_groups(server: &Server, file: &Path) -> Result<(), CliError> {
    let wrong = |problem: String| CliError::Argument(format!("{}: {problem}", file.display()));
    let text = fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
    let groups: Groups = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let put = server.client()?.put_security_groups(&groups).await?;
    server.show(&put, |put| match put.changed {
        true => format!("the security groups are at revision {} now\n", put.revision),
        false => format!("nothing to change, the security groups stay at revision {}\n", put.revision),
    })
}

fn security_groups(groups: &Groups) -> String {
    if groups.revision == 0 {
        return "no security groups\n".to_owned();
    }
    let mut table = Table::new(&[("GROUP", Align::Left), ("RULE", Align::Left)]);
    for group in groups.security_groups.values() {
        if group.rules.is_empty() {
            table.row([group.id.to_string(), "none: nothing is allowed".to_owned()]);
        }
        for rule in &group.rules {
            table.row([group.id.to_string(), rule.to_string()]);
        }
    }
    let mut text = format!("revision {}\n{table}", groups.revision);
    for group in groups.address_groups.values() {
        let addresses: Vec<String> = group.addresses.iter().map(ToString::to_string).collect();
        text.push_str(&format!("address group {}: {}\n", group.id, addresses.join(", ")));
    }
    text
}

fn dash() -> String {
    "-".to_owned()
}

fn pools(pools: &[PoolStatus]) -> String {
    if pools.is_empty() {
        return "no nodes\n".to_owned();
    }
    let mut table = Table::new(&[
        ("NODE", Align::Left),
        ("POLICY", Align::Left),
        ("PODS", Align::Right),
        ("IDLE", Align::Right),
        ("COOLING", Align::Right),
        ("COMING", Align::Right),
        ("LEAVING", Align::Right),
        ("LIMIT", Align::Right),
        ("ACKNOWLEDGED", Align::Right),
        ("PROBLEM", Align::Left),
    ]);
    for pool in pools {
        let policy = match pool.policy {
            _ if pool.draining => "draining".to_owned(),
            Policy::PreBound { minimum, maximum } => format!("pre-bound {minimum}-{maximum}"),
            Policy::Targets { minimum, maximum: 0, warm, .. } => format!("minimum {minimum}, warm {warm}"),
            Policy::Targets { minimum, maximum, warm, .. } => format!("{minimum}-{maximum}, warm {warm}"),
            Policy::OnDemand => "on demand".to_owned(),
        };
        table.row([
            pool.node.clone(),
            policy,
            pool.pods.to_string(),
            pool.idle.to_string(),
            pool.cooling.to_string(),
            pool.coming.to_string(),
            pool.leaving.to_string(),
            pool.limit.to_string(),
            pool.acknowledged.map_or_else(dash, |revision| revision.to_string()),
            pool.problem.clone().unwrap_or_default(),
        ]);
    }
    table.to_string()
}

fn subnets(subnets: &[SubnetStatus]) -> String {
    if subnets.is_empty() {
        return "no subnets\n".to_owned();
    }
    let mut table = Table::new(&[
        ("SUBNET", Align::Left),
        ("PREFIX", Align::Left),
        ("AVAILABLE", Align::Right),
        ("OF", Align::Right),
        ("OURS", Align::Right),
    ]);
    for subnet in subnets {
        table.row([
            subnet.id.clone(),
            subnet.subnet.to_string(),
            subnet.available.map_or_else(dash, number),
            subnet.total.map_or_else(dash, number),
            number(subnet.ours),
        ]);
    }
    table.to_string()
}

fn allocations(allocations: &[Allocation]) -> String {
    if allocations.is_empty() {
        return "no allocations\n".to_owned();
    }
    let mut table = Table::new(&[
        ("POD", Align::Left),
        ("NODE", Align::Left),
        ("IP", Align::Left),
        ("PARENT", Align::Left),
        ("VLAN", Align::Right),
        ("MAC", Align::Left),
        ("SUBNET", Align::Left),
        ("STATIC", Align::Left),
        ("GENERATION", Align::Right),
        ("SECURITY GROUPS", Align::Left),
    ]);
    for one in allocations {
        let ip = match one.addresses.ipv6 {
            Some(ipv6) => format!("{},{ipv6}", one.addresses.ipv4),
            None => one.addresses.ipv4.to_string(),
        };
        table.row([
            format!("{}/{}", one.namespace, one.name),
            one.node.clone(),
            ip,
            one.parent_interface.clone().or_else(|| one.parent.clone()).unwrap_or_else(dash),
            if one.vlan < 0 { "lost".to_owned() } else { one.vlan.to_string() },
            one.mac.to_string(),
            one.subnet_id.clone(),
            if one.is_static { "yes" } else { "no" }.to_owned(),
            one.generation.to_string(),
            groups_of(one),
        ]);
    }
    table.to_string()
}

fn groups_of(allocation: &Allocation) -> String {
    let groups = allocation.security_groups.join(",");
    match (allocation.regrouping, groups.is_empty()) {
        (true, _) => format!("{groups} (changing)"),
        (false, true) => dash(),
        (false, false) => groups,
    }
}

fn cooling(cooling: &[CoolingStatus]) -> String {
    if cooling.is_empty() {
        return "nothing is cooling down\n".to_owned();
    }
    let mut table = Table::new(&[
        ("IP", Align::Left),
        ("NODE", Align::Left),
        ("PARENT", Align::Left),
        ("VLAN", Align::Right),
        ("INTERFACE", Align::Left),
        ("AVAILABLE IN", Align::Right),
    ]);
    for one in cooling {
        table.row([
            one.addresses.map_or_else(dash, |addresses| addresses.ipv4.to_string()),
            one.node.clone().unwrap_or_else(dash),
            one.parent.clone().unwrap_or_else(dash),
            one.vlan.map_or_else(dash, |vlan| vlan.to_string()),
            one.interface_id.clone().unwrap_or_else(|| "(VLAN only)".to_owned()),
            duration(one.remaining_ms.div_ceil(1000)),
        ]);
    }
    table.to_string()
}

fn leaks(leaks: &[LeakStatus]) -> String {
    if leaks.is_empty() {
        return "no leaks\n".to_owned();
    }
    let mut table = Table::new(&[
        ("VPC ID", Align::Left),
        ("KNOWN TO", Align::Left),
        ("IP", Align::Left),
        ("INTERFACE", Align::Left),
        ("SEEN", Align::Right),
        ("HELD BACK", Align::Left),
    ]);
    for leak in leaks {
        let known = match leak.kind {
            LeakKind::Unowned => "the VPC only",
            LeakKind::Missing => "the allocator only",
        };
        table.row([
            leak.vpc_id.clone(),
            known.to_owned(),
            leak.addresses.map_or_else(dash, |addresses| addresses.ipv4.to_string()),
            leak.interface_id.clone().unwrap_or_else(dash),
            leak.sightings.to_string(),
            if leak.held_back { "yes (`eniway ipam confirm --leaks`)" } else { "no" }.to_owned(),
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use eniway_ipam::vpc::Kind;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn commands_are_understood() {
        for line in [
            "x pools --json",
            "x allocations --node n --server unix:/a.sock",
            "x allocate --uid u --container-id c --node n default/a --static any --wait 5",
            "x release --uid u --container-id c --generation 7",
            "x add-subnet s 10.0.0.0/24 --gateway-mac fa:ff:ff:00:00:01",
            "x drain n",
            "x security-groups apply groups.json",
            "x security-groups show --json",
            "x set-groups --uid u --container-id c sg-a sg-b --wait 5",
            "x confirm --leaks",
            "x leaks --server https://ipam:7443 --ca a --cert b --key c",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
        for line in ["x confirm", "x pools --server http://a:1", "x pools --ca a", "x confirm n --leaks"] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }

    #[test]
    fn tables_say_what_matters() {
        let pool = PoolStatus {
            node: "node-167".to_owned(),
            kind: Kind::SubEni,
            policy: Policy::PreBound { minimum: 4, maximum: 16 },
            limit: 256,
            pods: 3,
            idle: 4,
            cooling: 1,
            coming: 0,
            leaving: 0,
            draining: false,
            problem: Some("the VPC asks for fewer calls".to_owned()),
            acknowledged: None,
        };
        let text = pools(&[pool]);
        assert!(text.contains("pre-bound 4-16") && text.contains("fewer calls"), "{text}");
        assert_eq!(pools(&[]), "no nodes\n");
        assert_eq!(leaks(&[]), "no leaks\n");
    }
}

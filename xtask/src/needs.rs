//! What the tasks need from the machine, and whether it is there. Looking takes milliseconds, so that every
//! task can look each time.

use std::{
    fmt::{self, Display, Formatter},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use bpf_build::{Compiler, find_in_path};

/// The linker's version: later ones need an LLVM of their own, this one uses rustc's.
pub(crate) const BPF_LINKER: &str = "0.10.3";

/// Where programs, maps and links are pinned.
pub(crate) const BPFFS: &str = "/sys/fs/bpf";

/// What a task is about to do, which decides what it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Build, and run the lab or anything else that loads programs.
    Lab,
    /// Build, and run the tests of the host crates.
    HostTests,
    /// All that [`Scope::Lab`] and [`Scope::HostTests`] do, also in virtual machines.
    Tests,
    /// All that [`Scope::Lab`] does, and benchmarks, also in virtual machines.
    Bench,
    /// Build, and lint the BPF crates.
    Check,
    /// Everything.
    All,
}

/// A program that the lab runs, and Debian's package that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tool {
    pub(crate) program: &'static str,
    pub(crate) package: &'static str,
    pub(crate) why: &'static str,
}

const fn tool(program: &'static str, package: &'static str, why: &'static str) -> Tool {
    Tool { program, package, why }
}

/// The programs that the lab runs.
pub(crate) const LAB_TOOLS: [Tool; 6] = [
    tool("nginx", "nginx", "serves in every pod of the lab"),
    tool("ip", "iproute2", "namespaces, links and routes of the lab"),
    tool("nft", "nftables", "NodePort in the lab"),
    tool("tcpdump", "tcpdump", "reads the lab's captures"),
    tool("curl", "curl", "requests by hand in a lab that was kept"),
    tool("nsenter", "util-linux", "enters a namespace of the lab to look around"),
];

/// The programs that the tests of the host crates run.
const TEST_TOOLS: [Tool; 2] = [
    tool("etcd", "etcd-server", "a store of the allocator, in its tests and benchmark"),
    tool("systemd-analyze", "systemd", "checks the units in deploy/"),
];

/// The programs that virtual machines are made with.
const VM_TOOLS: [Tool; 2] = [
    tool("depmod", "kmod", "the modules of a virtual machine's kernel"),
    tool("strip", "binutils", "programs for a virtual machine"),
];

/// The programs that benchmarks run.
pub(crate) const BENCH_TOOLS: [Tool; 1] =
    [tool("iptables-legacy-restore", "iptables", "kube-proxy's rules, in benchmarks")];

/// The programs that the tests of agent and CNI plugin, and their benchmark, run besides.
const RUNTIME_TOOLS: [Tool; 7] = [
    tool("ethtool", "ethtool", "changes an interface, for the agent to notice"),
    tool("containerd", "containerd", "runs pods in the tests of the CNI plugin"),
    tool("runc", "runc", "runs containerd's containers"),
    tool("busybox", "busybox-static", "is what runs in those pods"),
    tool("ptp", "containernetworking-plugins", "other plugins of the chain, and those to compare with"),
    tool("iptables", "iptables", "ports of the node, by the plugin portmap"),
    tool("unshare", "util-linux", "gives ctr the directories that it looks for plugins in"),
];

/// Something a scope needs and the machine lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lack {
    /// A program of the lab.
    Tool(Tool),
    /// The sources of the core library.
    Sources,
    /// clippy of the release that compiles the BPF crates, where that is Debian's.
    DebianClippy,
    /// The linker, with the version that is there instead.
    Linker(Option<String>),
    /// The BPF file system.
    Bpffs,
}

/// What `scope` needs and the machine lacks.
pub(crate) fn lacks(scope: Scope) -> Vec<Lack> {
    let mut lacks = Vec::new();
    let compiler = Compiler::find().ok();
    if compiler.is_none() {
        lacks.push(Lack::Sources);
    }
    let lint = matches!(scope, Scope::Check | Scope::All);
    if lint && compiler.is_some_and(|c| c.is_debian() && !c.tool("cargo-clippy").exists()) {
        lacks.push(Lack::DebianClippy);
    }
    let linker = linker_version();
    if linker.as_deref() != Some(BPF_LINKER) {
        lacks.push(Lack::Linker(linker));
    }
    let missing = |tool: &Tool| find_tool(tool.program).is_none();
    lacks.extend(tools(scope).filter(missing).map(Lack::Tool));
    if matches!(scope, Scope::Lab | Scope::Tests | Scope::Bench | Scope::All) && !bpffs_mounted() {
        lacks.push(Lack::Bpffs);
    }
    lacks
}

/// The programs that `scope` runs.
pub(crate) fn tools(scope: Scope) -> impl Iterator<Item = Tool> {
    use Scope::{All, Bench, HostTests, Lab, Tests};
    const SETS: [(&[Tool], &[Scope]); 5] = [
        (&LAB_TOOLS, &[Lab, Tests, Bench, All]),
        (&TEST_TOOLS, &[HostTests, Tests, All]),
        (&RUNTIME_TOOLS, &[Tests, All]),
        (&VM_TOOLS, &[Tests, Bench, All]),
        (&BENCH_TOOLS, &[Bench, All]),
    ];
    let wanted = SETS.into_iter().filter(move |(_, scopes)| scopes.contains(&scope));
    wanted.flat_map(|(tools, _)| tools.iter().copied())
}

/// The version of the `bpf-linker` that the compiler will find.
pub(crate) fn linker_version() -> Option<String> {
    let output = Command::new("bpf-linker").arg("--version").output().ok()?;
    String::from_utf8(output.stdout).ok()?.split_whitespace().nth(1).map(str::to_owned)
}

/// Whether the BPF file system is mounted where pins go.
pub(crate) fn bpffs_mounted() -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|mount| {
        let mut fields = mount.split(' ').skip(1);
        fields.next() == Some(BPFFS) && fields.next() == Some("bpf")
    })
}

/// A program, also when `PATH` lacks the directories of the system's programs, and those where CNI plugins are.
pub(crate) fn find_tool(program: &str) -> Option<PathBuf> {
    let system = || {
        ["/usr/sbin", "/sbin", "/usr/lib/cni"]
            .iter()
            .map(|dir| Path::new(dir).join(program))
            .find(|p| p.is_file())
    };
    find_in_path(program).or_else(system)
}

impl Display for Lack {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tool(Tool { program, package, why }) => {
                write!(f, "{program} ({why}), in the package {package}")
            }
            Self::Sources => write!(
                f,
                "sources of the core library, by `rustup component add rust-src` or the packages rustc-web and rust-web-src"
            ),
            Self::DebianClippy => write!(f, "clippy of Debian's compiler, in the package rust-web-clippy"),
            Self::Linker(None) => {
                write!(f, "bpf-linker, by `cargo install bpf-linker --version {BPF_LINKER} --locked`")
            }
            Self::Linker(Some(version)) => write!(
                f,
                "bpf-linker {BPF_LINKER} (here is {version}), by `cargo install bpf-linker --version {BPF_LINKER} --locked`"
            ),
            Self::Bpffs => write!(f, "the BPF file system, by `mount -t bpf bpf {BPFFS}`"),
        }
    }
}

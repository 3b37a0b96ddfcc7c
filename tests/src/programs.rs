//! The kernel programs under BPF_PROG_TEST_RUN: loaded unpinned, with maps of their own, run on one packet at a time.
//!
//! The kernel knows no tag beside the frame there and does not say what tag a program leaves; the programs of
//! `fabric-ebpf/src/probe.rs` run around the ones under test where that matters.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fmt,
    os::fd::{AsFd as _, AsRawFd as _},
    process::Command,
    sync::atomic::Ordering::Relaxed,
    time::Duration,
};

use aya::{
    Ebpf, EbpfError, TestRun as _, TestRunOptions,
    maps::{Map, MapError},
    programs::{ProgramError, ProgramFd, SchedClassifier, TestRunResult, Xdp},
};
use datapath_common::{
    abi::{Direction, Outcome, Spent},
    packet::link::Tag,
    testing::{MemoryTables, rules::Row},
};
use datapath_user::{
    config::Limits,
    object::{self, Constants, ObjectError, program},
    tables::{Index, Maps, TablesError},
};
use nix::sched::CloneFlags;

mod probe;

pub use probe::{Probe, pass_before_all};

/// What tc programs return.
pub mod tc {
    /// Left to whoever comes next.
    pub const NEXT: i32 = -1;
    /// Dropped.
    pub const SHOT: i32 = 2;
    /// Redirected.
    pub const REDIRECT: i32 = 7;
}

/// What XDP programs return.
pub mod xdp {
    /// Dropped.
    pub const DROP: i32 = 1;
    /// Left to the stack.
    pub const PASS: i32 = 2;
    /// Redirected.
    pub const REDIRECT: i32 = 4;
}

/// A program, by its hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// XDP of the parent ENI.
    EniXdp,
    /// tc ingress of the parent ENI.
    EniIngress,
    /// tc egress of the parent ENI.
    EniEgress,
    /// tc ingress of a pod's host side.
    PodEgress,
    /// tc egress of a pod's host side.
    PodIngress,
    /// tc ingress of an exclusive ENI in its pod.
    NicIngress,
    /// tc egress of an exclusive ENI in its pod.
    NicEgress,
}

impl Hook {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::EniXdp,
        Self::EniIngress,
        Self::EniEgress,
        Self::PodEgress,
        Self::PodIngress,
        Self::NicIngress,
        Self::NicEgress,
    ];
    /// Those at tc.
    pub const TC: &[Self] = {
        let [Self::EniXdp, tc @ ..] = &Self::ALL else { panic!("XDP is not the first") };
        tc
    };

    /// The program's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::EniXdp => program::ENI_XDP,
            Self::EniIngress => program::ENI_INGRESS,
            Self::EniEgress => program::ENI_EGRESS,
            Self::PodEgress => program::POD_EGRESS,
            Self::PodIngress => program::POD_INGRESS,
            Self::NicIngress => program::NIC_INGRESS,
            Self::NicEgress => program::NIC_EGRESS,
        }
    }
}

/// A packet and what comes with it.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The frame.
    pub frame: &'a [u8],
    /// The tag beside the frame; tc programs only.
    pub tag: Option<Tag>,
    /// The interface, which must exist in the thread's namespace (see [`private_netns`]); tc programs only.
    pub ifindex: u32,
    /// Payload of one segment; tc programs only.
    pub gso_size: u32,
    /// Number of segments; tc programs only.
    pub gso_segs: u32,
}

impl<'a> Input<'a> {
    /// A frame at an interface.
    pub const fn new(frame: &'a [u8], ifindex: u32) -> Self {
        Self { frame, tag: None, ifindex, gso_size: 0, gso_segs: 0 }
    }

    /// The `__sk_buff` that the kernel makes the socket buffer by (net/bpf/test_run.c, `convert___skb_to_skb`).
    pub fn context(&self) -> [u8; SkBuff::SIZE] {
        let mut context = [0; SkBuff::SIZE];
        let mut put = |offset: usize, value: u32| {
            context[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
        };
        if let Some(tag) = self.tag {
            put(SkBuff::CB + 12, u32::from(tag.tpid) << 16 | u32::from(tag.tci));
        }
        put(SkBuff::IFINDEX, self.ifindex);
        put(SkBuff::GSO_SEGS, self.gso_segs);
        put(SkBuff::GSO_SIZE, self.gso_size);
        context
    }
}

/// Offsets in `struct __sk_buff` (include/uapi/linux/bpf.h).
struct SkBuff;

impl SkBuff {
    const MARK: usize = 8;
    const IFINDEX: usize = 40;
    const CB: usize = 48;
    const TSTAMP: usize = 152;
    const GSO_SEGS: usize = 164;
    const GSO_SIZE: usize = 176;
    const SIZE: usize = 192;
}

fn word(bytes: &[u8; SkBuff::SIZE], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// What came of a packet.
#[derive(Clone, PartialEq, Eq)]
pub struct Output {
    /// What the program returned.
    pub action: i32,
    /// The frame that it left.
    pub frame: Vec<u8>,
    /// The mark that it left; 0 for XDP programs.
    pub mark: u32,
    /// When the packet is to leave, in nanoseconds of the monotonic clock; 0 = at once, and for XDP programs.
    pub at: u64,
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { action, frame, mark, at } = self;
        write!(f, "action {action}, mark {mark:#x}, at {at}, frame {}", hex(frame))
    }
}

/// Bytes as tools print them.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Packets and bytes by endpoint id, direction and outcome; what is zero is left out.
pub type Counts = BTreeMap<(u32, Direction, Outcome), (u64, u64)>;

/// Why a test cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ProgramsError {
    /// The object.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// A table.
    #[error(transparent)]
    Tables(#[from] TablesError),
    /// The probe's object or one of its programs.
    #[error("cannot load the probe: {0}")]
    Probe(#[from] EbpfError),
    /// A program cannot be used.
    #[error("{name}: {source}")]
    Program {
        /// Which.
        name: &'static str,
        /// Why.
        source: ProgramError,
    },
    /// The array that the probe calls from.
    #[error("cannot chain the probe to {name}: {source}")]
    Chain {
        /// To which program.
        name: &'static str,
        /// Why.
        source: MapError,
    },
}

fn program_error(name: &'static str) -> impl FnOnce(ProgramError) -> ProgramsError {
    move |source| ProgramsError::Program { name, source }
}

/// The programs, and their tables.
pub struct Programs {
    /// The tables.
    pub maps: Maps,
    ebpf: Ebpf,
    probes: BTreeMap<Hook, Probe>,
}

impl Programs {
    /// Loads all of them.
    ///
    /// # Errors
    ///
    /// When the kernel refuses one.
    pub fn load(constants: Constants, limits: &Limits) -> Result<Self, ProgramsError> {
        let mut ebpf = object::open(constants, limits, None)?;
        for hook in Hook::ALL {
            match hook {
                Hook::EniXdp => {
                    object::xdp(&mut ebpf, hook.name())?;
                }
                _ => {
                    object::tc(&mut ebpf, hook.name())?;
                }
            }
        }
        let mut programs = Self { maps: Maps::of(&ebpf)?, ebpf, probes: BTreeMap::new() };
        for &hook in Hook::TC {
            let probe = Probe::before(hook.name(), programs.fd(hook)?)?;
            programs.probes.insert(hook, probe);
        }
        Ok(programs)
    }

    /// Makes the tables say what `node` says.
    ///
    /// # Errors
    ///
    /// When one cannot be written.
    pub fn fill(&mut self, node: &MemoryTables) -> Result<(), TablesError> {
        for (slot, record) in (1..).zip(node.endpoints.iter().skip(1)) {
            self.maps.set_record(slot, record)?;
        }
        for (&(parent, vid), &slot) in &node.subeni {
            self.maps.set_slot(Index::Vlan { parent, vid }, slot)?;
        }
        for (&ifindex, &slot) in &node.pod_if {
            self.maps.set_slot(Index::Interface(ifindex), slot)?;
        }
        for (&address, &slot) in &node.pod_ip4 {
            self.maps.set_slot(Index::Ipv4(address), slot)?;
        }
        let prefixes = node.host_dst.iter().map(|(prefix, len, flags)| {
            let net = ipnet::Ipv4Net::new_assert((*prefix).into(), *len as u8);
            (net, *flags)
        });
        self.maps.set_host_dsts(&prefixes.collect())?;
        self.maps.set_vips(&node.vips)?;
        self.fill_rules(node)?;
        self.fill_memory(node)
    }

    /// Makes the tables of security groups say what `node` says.
    ///
    /// # Errors
    ///
    /// When one cannot be written.
    pub fn fill_rules(&mut self, node: &MemoryTables) -> Result<(), TablesError> {
        let maps = &mut self.maps.policy;
        for row in node.rules.rows() {
            match row {
                Row::Verdict(at, row) => maps.set_verdicts(at, row)?,
                Row::Class(at, row) => maps.set_class_groups(at, row)?,
                Row::Program(at, row) => maps.set_programs(at, row)?,
                Row::Rules(at, row) => maps.set_page(at, row)?,
            }
        }
        maps.set_epoch(node.rules.epoch)
    }

    /// Adds what `node` remembers, limits and how far they are used up among it.
    ///
    /// # Errors
    ///
    /// When a table cannot be written.
    pub fn fill_memory(&mut self, node: &MemoryTables) -> Result<(), TablesError> {
        for (key, flow) in &node.flows {
            self.maps.set_flow(key, flow)?;
        }
        for (key, fragment) in &node.fragments {
            self.maps.set_fragment(key, fragment)?;
        }
        for (key, flow) in &node.pairs {
            self.maps.policy.set_pair(key, flow)?;
        }
        self.fill_limits(node)
    }

    /// Makes the tables of limits say what `node` says, how far they are used up included.
    ///
    /// # Errors
    ///
    /// When one cannot be written.
    pub fn fill_limits(&mut self, node: &MemoryTables) -> Result<(), TablesError> {
        for (&id, (limits, spent)) in &node.limits {
            self.maps.set_limits(id, limits)?;
            let until = spent.each_ref().map(|spent| spent.0.load(Relaxed));
            self.maps.set_spent(id, &Spent { until })?;
        }
        Ok(())
    }

    /// Forgets flows and fragments, and sets the counters to zero.
    ///
    /// # Errors
    ///
    /// When a table cannot be written.
    pub fn reset(&mut self, node: &MemoryTables) -> Result<(), TablesError> {
        std::iter::once(0).chain(ids(node)).try_for_each(|id| self.maps.forget(id))
    }

    /// Everything that was counted for the pods of `node` and for none.
    ///
    /// # Errors
    ///
    /// When the counters cannot be read.
    pub fn counts(&self, node: &MemoryTables) -> Result<Counts, TablesError> {
        let mut counts = Counts::new();
        for id in std::iter::once(0).chain(ids(node)) {
            let row = self.maps.counters(id)?;
            for direction in Direction::ALL {
                for &outcome in Outcome::ALL {
                    let counter = row.get(direction, outcome);
                    if counter.packets != 0 || counter.bytes != 0 {
                        counts.insert((id, direction, outcome), (counter.packets, counter.bytes));
                    }
                }
            }
        }
        Ok(counts)
    }

    /// Runs a program on a packet.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the packet.
    pub fn run(&self, hook: Hook, input: &Input<'_>) -> Result<Output, ProgramsError> {
        let mut frame = vec![0; input.frame.len() + 64];
        let context = input.context();
        let mut left = [0; SkBuff::SIZE];
        let options = TestRunOptions {
            data_in: Some(input.frame),
            data_out: Some(&mut frame),
            ctx_in: (hook != Hook::EniXdp).then_some(&context),
            ctx_out: if hook == Hook::EniXdp { None } else { Some(&mut left) },
            ..TestRunOptions::new()
        };
        let result = match self.probes.get(&hook) {
            Some(probe) if input.tag.is_some() => probe.run(Probe::TAGGED, options)?,
            _ => self.test_run(hook, options)?,
        };
        frame.truncate(result.data_size_out as usize);
        let at = u64::from_ne_bytes(std::array::from_fn(|byte| left[SkBuff::TSTAMP + byte]));
        Ok(Output { action: result.return_value as i32, frame, mark: word(&left, SkBuff::MARK), at })
    }

    /// Runs a tc program on a packet and says which tag it left beside the frame. Counts and remembers a second time.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the packet.
    pub fn tag_left(&self, hook: Hook, input: &Input<'_>) -> Result<Option<u16>, ProgramsError> {
        let context = input.context();
        let mut left = [0; SkBuff::SIZE];
        let options = TestRunOptions {
            data_in: Some(input.frame),
            ctx_in: Some(&context),
            ctx_out: Some(&mut left),
            repeat: 2,
            ..TestRunOptions::new()
        };
        self.probes[&hook].run(Probe::LOOK, options)?;
        let present = word(&left, SkBuff::CB + 4) != 0;
        Ok(present.then_some(word(&left, SkBuff::CB + 8) as u16))
    }

    fn test_run(&self, hook: Hook, options: TestRunOptions<'_>) -> Result<TestRunResult, ProgramsError> {
        test_run(&self.ebpf, hook.name(), options)
    }

    /// Runs a program many times on one packet that it leaves as it was, and says how long one run takes.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the packet.
    pub fn time(&self, hook: Hook, input: &Input<'_>, repeat: u32) -> Result<Duration, ProgramsError> {
        let context = input.context();
        let options = TestRunOptions {
            data_in: Some(input.frame),
            ctx_in: (hook != Hook::EniXdp).then_some(&context),
            repeat,
            ..TestRunOptions::new()
        };
        Ok(self.test_run(hook, options)?.duration)
    }

    /// Memory that the kernel has for a map, in bytes, by what it says of the descriptor.
    ///
    /// # Errors
    ///
    /// When there is no such array or LRU map, or the kernel does not say.
    pub fn map_memory(&self, name: &'static str) -> std::io::Result<u64> {
        let missing = || std::io::Error::other(format!("no memory is told of map {name}"));
        let (Map::Array(data) | Map::LruHashMap(data)) = self.ebpf.map(name).ok_or_else(missing)? else {
            return Err(missing());
        };
        let path = format!("/proc/self/fdinfo/{}", data.fd().as_fd().as_raw_fd());
        let text = std::fs::read_to_string(path)?;
        let memory = text.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok());
        memory.ok_or_else(missing)
    }

    /// The program itself.
    ///
    /// # Errors
    ///
    /// When it is not there.
    pub fn fd(&self, hook: Hook) -> Result<&ProgramFd, ProgramsError> {
        fd(&self.ebpf, hook.name())
    }

    /// The object that the programs are in.
    pub const fn ebpf(&self) -> &Ebpf {
        &self.ebpf
    }
}

fn ids(node: &MemoryTables) -> impl Iterator<Item = u32> {
    node.endpoints.iter().skip(1).map(|pod| pod.id)
}

fn fd<'a>(ebpf: &'a Ebpf, name: &'static str) -> Result<&'a ProgramFd, ProgramsError> {
    let program = ebpf.program(name).ok_or(ObjectError::Missing { name })?;
    program.fd().map_err(program_error(name))
}

fn test_run(
    ebpf: &Ebpf,
    name: &'static str,
    options: TestRunOptions<'_>,
) -> Result<TestRunResult, ProgramsError> {
    let program = ebpf.program(name).ok_or(ObjectError::Missing { name })?;
    let result = if let Ok(program) = <&SchedClassifier>::try_from(program) {
        program.test_run(options)
    } else {
        <&Xdp>::try_from(program).and_then(|program| program.test_run(options))
    };
    result.map_err(program_error(name))
}

/// Moves this thread into a network namespace of its own with interfaces of these indexes, so that packets can be said to
/// come from them. The namespace ends with the thread.
///
/// # Panics
///
/// When that fails: tests only, which have nothing to do without it.
pub fn private_netns(ifindexes: &[u32]) {
    nix::sched::unshare(CloneFlags::CLONE_NEWNET).expect("unshare(CLONE_NEWNET): needs root");
    for pair in ifindexes.chunks(2) {
        let end = |index: u32| [format!("test{index}"), "index".to_owned(), index.to_string()];
        let mut ip = Command::new("ip");
        ip.args(["link", "add", "name"]).args(end(pair[0])).args(["type", "veth"]);
        if let Some(&other) = pair.get(1) {
            ip.args(["peer", "name"]).args(end(other));
        }
        let status = ip.status().unwrap_or_else(|error| panic!("cannot run {ip:?}: {error}"));
        assert!(status.success(), "{ip:?} failed: {status}");
    }
}

/// Seconds of the clock that the programs ask (`bpf_ktime_get_coarse_ns`).
pub fn now() -> u32 {
    let clock = nix::time::ClockId::CLOCK_MONOTONIC_COARSE;
    nix::time::clock_gettime(clock).map_or(0, |time| time.tv_sec() as u32)
}

/// Nanoseconds of the clock that limits go by (`bpf_ktime_get_ns`).
pub fn nanos() -> u64 {
    let clock = nix::time::ClockId::CLOCK_MONOTONIC;
    nix::time::clock_gettime(clock)
        .map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

/// Writes frames as a pcap file.
///
/// # Errors
///
/// When the file cannot be written.
pub fn write_pcap(path: impl AsRef<OsStr>, frames: &[&[u8]]) -> std::io::Result<()> {
    const SNAPLEN: u32 = 0x4_0000;
    const ETHERNET: u32 = 1;
    let mut file = Vec::new();
    file.extend(0xa1b2_c3d4_u32.to_ne_bytes());
    file.extend(2_u16.to_ne_bytes());
    file.extend(4_u16.to_ne_bytes());
    file.extend([0; 8]);
    file.extend(SNAPLEN.to_ne_bytes());
    file.extend(ETHERNET.to_ne_bytes());
    for frame in frames {
        file.extend([0; 8]);
        file.extend((frame.len() as u32).to_ne_bytes());
        file.extend((frame.len() as u32).to_ne_bytes());
        file.extend(*frame);
    }
    std::fs::write(path.as_ref(), file)
}

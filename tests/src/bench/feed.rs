//! Frames that a kernel program sends by BPF_PROG_TEST_RUN with live frames: they leave by an interface as if XDP had
//! redirected them there, and the other end of the veth pair receives them by NAPI, as a NIC does. What sending costs is
//! the same for everybody, and as little as can be.

use std::{
    fs, io,
    time::{Duration, Instant},
};

use aya::{
    Ebpf, EbpfLoader, TestRun as _, TestRunOptions,
    programs::{TestRunAttrs, Xdp},
};
use nix::net::if_::if_nametoindex;

use super::load::Limit;
use crate::lab::Netns;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/load"));

/// Frames in one batch of the kernel: what one poll of a NIC takes.
const BATCH: u32 = 64;
/// Frames between two looks at the clock.
const CHUNK: u64 = 100 * BATCH as u64;

/// Which frame is sent where.
#[derive(Clone, Debug)]
pub struct Source {
    /// Where it leaves: namespace and interface.
    pub from: (Netns, String),
    /// Where it arrives.
    pub into: (Netns, String),
    /// The frame.
    pub frame: Vec<u8>,
}

/// A source that is ready.
pub struct Feed {
    source: Source,
    ebpf: Ebpf,
}

impl Feed {
    /// Loads the program, in the namespace that the frames leave from.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it, or there is no such interface.
    pub fn open(source: &Source) -> io::Result<Self> {
        let begin = source.frame.first_chunk().ok_or_else(|| io::Error::other("the frame is too short"))?;
        let mut ebpf = load_object(if_nametoindex(source.from.1.as_str())?, *begin)?;
        program(&mut ebpf)?.load().map_err(io::Error::other)?;
        Ok(Self { source: source.clone(), ebpf })
    }

    /// As [`Client::measure`](super::load::Client::measure).
    ///
    /// # Errors
    ///
    /// When a frame does not arrive.
    pub fn measure(&mut self, limit: Limit) -> io::Result<(u64, Duration)> {
        let before = self.arrived()?;
        let start = Instant::now();
        let mut done = 0;
        let mut took = Duration::ZERO;
        while limit.goes_on(done, start) {
            let frames = match limit {
                Limit::Count(count) => count - done,
                Limit::Time(_) => CHUNK,
            };
            let options = TestRunOptions {
                data_in: Some(&self.source.frame),
                repeat: frames as u32,
                attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
                ..TestRunOptions::new()
            };
            let run = program(&mut self.ebpf)?.test_run(options).map_err(io::Error::other)?;
            // The kernel's own figure, for one frame: the call as a whole waits for a grace period at its end, and so for a tick.
            took += run.duration * frames as u32;
            done += frames;
        }
        let arrived = self.arrived()? - before;
        // Others may have sent a frame meanwhile; none may be missing.
        if arrived < done {
            return Err(io::Error::other(format!(
                "{arrived} of {done} frames arrived at {:?}",
                self.source.into
            )));
        }
        Ok((done, took))
    }

    /// Frames that the interface has received.
    fn arrived(&self) -> io::Result<u64> {
        let (netns, interface) = &self.source.into;
        let text =
            netns.run(|| fs::read_to_string("/proc/thread-self/net/dev")).map_err(io::Error::other)??;
        let counts = text.lines().find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'));
        let packets = counts.and_then(|counts| counts.split_whitespace().nth(1)?.parse().ok());
        packets.ok_or_else(|| io::Error::other(format!("no interface {interface} in {netns}")))
    }
}

fn program(ebpf: &mut Ebpf) -> io::Result<&mut Xdp> {
    let program = ebpf.program_mut("load_feed").ok_or_else(|| io::Error::other("no program load_feed"))?;
    program.try_into().map_err(io::Error::other)
}

/// The object of the programs that make loads (`fabric-ebpf/src/load.rs`); frames leave by the interface with this index,
/// and begin so.
pub(super) fn load_object(out: u32, begin: [u8; 16]) -> io::Result<Ebpf> {
    let [begin, rest] = [0, 8].map(|at| u64::from_ne_bytes(std::array::from_fn(|i| begin[at + i])));
    EbpfLoader::new()
        .override_global("OUT", &out, true)
        .override_global("BEGIN", &begin, true)
        .override_global("BEGIN_REST", &rest, true)
        .load(OBJECT)
        .map_err(io::Error::other)
}

//! The programs around the ones under test (`fabric-ebpf/src/probe.rs`).

use std::{io, path::Path};

use aya::{
    Ebpf, EbpfLoader, TestRunOptions,
    maps::ProgramArray,
    programs::{
        LinkOrder, ProgramError, ProgramFd, SchedClassifier, TcAttachType, TestRunResult, Xdp, links::FdLink,
        tc::TcAttachOptions,
    },
};
use datapath_user::object::ObjectError;

use super::{ProgramsError, fd, program_error, test_run};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/probe"));

/// The programs of `fabric-ebpf/src/probe.rs`, some of which call the program under test.
pub struct Probe(Ebpf);

impl Probe {
    /// Does nothing.
    pub const EMPTY: &str = "empty_tc";
    /// Does nothing.
    pub const EMPTY_XDP: &str = "empty_xdp";
    /// Takes the tag beside the frame off.
    pub const POP: &str = "pop_tc";
    /// Puts a tag beside the frame.
    pub const PUSH: &str = "push_tc";
    /// Takes the tag out of the frame.
    pub const POP_XDP: &str = "pop_xdp";
    /// Tags the frame, then runs the next program.
    pub const TAGGED: &str = "tagged";
    /// Untags the frame, then runs the next program.
    pub const UNTAGGED: &str = "untagged";
    /// Runs the next program, then says which tag it left.
    pub const LOOK: &str = "look";
    /// Puts a tag into the frame, then runs the next program.
    pub const TAGGED_XDP: &str = "tagged_xdp";

    /// The tc programs.
    const TC: [&str; 6] = [Self::EMPTY, Self::POP, Self::PUSH, Self::TAGGED, Self::UNTAGGED, Self::LOOK];
    const XDP: [&str; 3] = [Self::EMPTY_XDP, Self::POP_XDP, Self::TAGGED_XDP];

    /// Loads them. `vid` is the VLAN id that [`Probe::TAGGED_XDP`] tags with.
    ///
    /// # Errors
    ///
    /// When the kernel refuses one.
    pub fn load(vid: u16) -> Result<Self, ProgramsError> {
        if bpf_build::is_stub(OBJECT) {
            return Err(ObjectError::Stub.into());
        }
        let mut ebpf = EbpfLoader::new().override_global("TAG_CONTROL", &vid, true).load(OBJECT)?;
        for name in Self::TC {
            let program = ebpf.program_mut(name).ok_or(ObjectError::Missing { name })?;
            <&mut SchedClassifier>::try_from(program)
                .and_then(SchedClassifier::load)
                .map_err(program_error(name))?;
        }
        for name in Self::XDP {
            let program = ebpf.program_mut(name).ok_or(ObjectError::Missing { name })?;
            <&mut Xdp>::try_from(program).and_then(Xdp::load).map_err(program_error(name))?;
        }
        Ok(Self(ebpf))
    }

    /// Loads them, to call the tc program `next`.
    pub(super) fn before(name: &'static str, next: &ProgramFd) -> Result<Self, ProgramsError> {
        let mut probe = Self::load(0)?;
        probe.chain("NEXT", name, next)?;
        Ok(probe)
    }

    /// Makes the programs call `next`, a program of the kind that `array` (`NEXT` or `NEXT_XDP`) is for.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it.
    pub fn chain(
        &mut self,
        array: &'static str,
        name: &'static str,
        next: &ProgramFd,
    ) -> Result<(), ProgramsError> {
        let map = self.0.map_mut(array).ok_or(ObjectError::Missing { name: array })?;
        ProgramArray::try_from(map)
            .and_then(|mut array| array.set(0, next, 0))
            .map_err(|source| ProgramsError::Chain { name, source })
    }

    /// Runs one of them.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the packet.
    pub fn run(
        &self,
        name: &'static str,
        options: TestRunOptions<'_>,
    ) -> Result<TestRunResult, ProgramsError> {
        test_run(&self.0, name, options)
    }

    /// One of them.
    ///
    /// # Errors
    ///
    /// When it is not there.
    pub fn fd(&self, name: &'static str) -> Result<&ProgramFd, ProgramsError> {
        fd(&self.0, name)
    }
}

/// Attaches a program that does nothing to tc ingress of an interface of this thread's namespace, before all others that are
/// there, and pins its link.
///
/// # Errors
///
/// When the kernel has no TCX, or refuses it.
pub fn pass_before_all(interface: &str, pin: &Path) -> Result<(), ProgramsError> {
    let name = Probe::EMPTY;
    let Probe(mut ebpf) = Probe::load(0)?;
    let program = ebpf.program_mut(name).ok_or(ObjectError::Missing { name })?;
    let attach = |program: &mut SchedClassifier| {
        let first = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = program.attach_with_options(interface, TcAttachType::Ingress, first)?;
        let link = FdLink::try_from(program.take_link(id)?).map_err(other)?;
        link.pin(pin).map(drop).map_err(other)
    };
    <&mut SchedClassifier>::try_from(program).and_then(attach).map_err(program_error(name))
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> ProgramError {
    ProgramError::IOError(io::Error::other(error))
}

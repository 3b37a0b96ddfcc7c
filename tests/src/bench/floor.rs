//! The programs that do the least (`fabric-ebpf/src/floor.rs`), attached.

use aya::{
    Ebpf, EbpfLoader,
    programs::{
        LinkOrder, ProgramError, ProgramFd, SchedClassifier, TcAttachType, Xdp, XdpMode,
        tc::{TcAttachOptions, qdisc_add_clsact},
    },
};

use crate::lab::{Error, Netns, Result};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/floor"));

/// Attaches a program to tc ingress of an interface; it is gone with the value.
///
/// # Errors
///
/// When the kernel refuses it.
pub fn attach(netns: &Netns, interface: &str, program: &'static str, target: u32, vid: u16) -> Result<Ebpf> {
    let mut ebpf = load(program, target, vid)?;
    attach_at(&mut ebpf, netns, interface, program)?;
    Ok(ebpf)
}

/// Attaches a program to XDP of an interface, in the driver; it is gone with the value.
///
/// # Errors
///
/// When the kernel refuses it.
pub fn attach_xdp(netns: &Netns, interface: &str, program: &'static str) -> Result<Ebpf> {
    let what = || format!("{program} at {interface} of {netns}");
    let mut ebpf = open(program, 0, 0)?;
    let xdp: &mut Xdp = find(&mut ebpf, program)?;
    xdp.load().map_err(|e| Error::bpf(what(), &e))?;
    netns.run(|| xdp.attach(interface, XdpMode::Driver))?.map_err(|e| Error::bpf(what(), &e))?;
    Ok(ebpf)
}

/// Loads a tc program.
///
/// # Errors
///
/// When the kernel refuses it.
pub(super) fn load(program: &'static str, target: u32, vid: u16) -> Result<Ebpf> {
    let mut ebpf = open(program, target, vid)?;
    let tc: &mut SchedClassifier = find(&mut ebpf, program)?;
    tc.load().map_err(|e| Error::bpf(program, &e))?;
    Ok(ebpf)
}

/// A loaded program.
///
/// # Errors
///
/// When there is none of this name.
pub(super) fn fd<'a>(ebpf: &'a Ebpf, program: &'static str) -> Result<&'a ProgramFd> {
    let found = ebpf.program(program).ok_or_else(|| Error::Unknown(program.into()))?;
    found.fd().map_err(|e| Error::bpf(program, &e))
}

/// Attaches a loaded program to tc ingress of an interface.
///
/// # Errors
///
/// When the kernel refuses it.
pub(super) fn attach_at(
    ebpf: &mut Ebpf,
    netns: &Netns,
    interface: &str,
    program: &'static str,
) -> Result<()> {
    let what = || format!("{program} at {interface} of {netns}");
    let tc: &mut SchedClassifier = find(ebpf, program)?;
    if tc.fd().is_err() {
        tc.load().map_err(|e| Error::bpf(what(), &e))?;
    }
    netns.run(|| {
        let tcx = TcAttachOptions::TcxOrder(LinkOrder::default());
        if tc.attach_with_options(interface, TcAttachType::Ingress, tcx).is_err() {
            // A kernel before 6.6.
            qdisc_add_clsact(interface).map_err(|e| Error::bpf(what(), &e))?;
            tc.attach(interface, TcAttachType::Ingress).map_err(|e| Error::bpf(what(), &e))?;
        }
        Ok(())
    })?
}

fn open(program: &'static str, target: u32, vid: u16) -> Result<Ebpf> {
    EbpfLoader::new()
        .override_global("TARGET", &target, true)
        .override_global("VID", &vid, true)
        .load(OBJECT)
        .map_err(|e| Error::bpf(program, &e))
}

fn find<'a, P>(ebpf: &'a mut Ebpf, program: &'static str) -> Result<&'a mut P>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let found = ebpf.program_mut(program).ok_or_else(|| Error::Unknown(program.into()))?;
    found.try_into().map_err(|e: ProgramError| Error::bpf(program, &e))
}

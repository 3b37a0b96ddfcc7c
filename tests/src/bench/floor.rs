//! The programs that do the least (`fabric-ebpf/src/floor.rs`), attached.

use aya::{
    Ebpf, EbpfLoader,
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
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
    let what = || format!("{program} at {interface} of {netns}");
    let mut ebpf = EbpfLoader::new()
        .override_global("TARGET", &target, true)
        .override_global("VID", &vid, true)
        .load(OBJECT)
        .map_err(|e| Error::bpf(what(), &e))?;
    netns.run(|| {
        let found = ebpf.program_mut(program).ok_or_else(|| Error::Unknown(what()))?;
        let tc: &mut SchedClassifier =
            found.try_into().map_err(|e: aya::programs::ProgramError| Error::bpf(what(), &e))?;
        tc.load().map_err(|e| Error::bpf(what(), &e))?;
        let tcx = TcAttachOptions::TcxOrder(LinkOrder::default());
        if tc.attach_with_options(interface, TcAttachType::Ingress, tcx).is_err() {
            // A kernel before 6.6.
            qdisc_add_clsact(interface).map_err(|e| Error::bpf(what(), &e))?;
            tc.attach(interface, TcAttachType::Ingress).map_err(|e| Error::bpf(what(), &e))?;
        }
        Ok(())
    })??;
    Ok(ebpf)
}

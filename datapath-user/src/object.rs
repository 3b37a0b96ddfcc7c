//! The embedded kernel programs and how they are loaded: once for the pods, and once for each parent ENI, with its
//! number as a constant. All loads share the pinned maps.

use std::os::fd::AsFd as _;

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    programs::{Program, ProgramError, ProgramFd, SchedClassifier, Xdp},
};
use datapath_common::abi::maps;

use crate::{
    config::{self, Config, FastPath, Limits},
    error::whole,
    pin::{MapLayout, Pins, layouts},
    privilege::Loader,
};

/// The object: seven programs and the maps.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/eniway"));

/// Names of the programs.
pub mod program {
    /// XDP on a parent ENI.
    pub const ENI_XDP: &str = "eni_xdp";
    /// tc ingress on a parent ENI.
    pub const ENI_INGRESS: &str = "eni_ingress";
    /// tc egress on a parent ENI.
    pub const ENI_EGRESS: &str = "eni_egress";
    /// tc ingress on an exclusive ENI, inside its pod.
    pub const NIC_INGRESS: &str = "nic_ingress";
    /// tc egress on an exclusive ENI, inside its pod.
    pub const NIC_EGRESS: &str = "nic_egress";
    /// tc ingress on the host side of a pod's veth: what the pod sends.
    pub const POD_EGRESS: &str = "pod_egress";
    /// tc egress on the host side of a pod's veth: what the host's stack sends to the pod.
    pub const POD_INGRESS: &str = "pod_ingress";
}

/// Why the programs are not loaded.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// The object is a stand-in.
    #[error(
        "this eniway was built without its kernel programs, because bpf-linker was missing: \
         run `cargo xtask setup` and build again"
    )]
    Stub,
    /// The object cannot be read, or a map cannot be made.
    #[error("cannot load the kernel programs: {}", whole(.0))]
    Load(#[from] EbpfError),
    /// A map of the object is not what this program takes it for.
    #[error(
        "map {map} of the kernel programs is {found}, and {expected} was meant: the object and eniway were built from \
         different sources"
    )]
    Layout {
        /// The map.
        map: &'static str,
        /// What it is.
        found: MapLayout,
        /// What it should be.
        expected: MapLayout,
    },
    /// A program or map is not in the object.
    #[error("the kernel programs lack {name}: the object and eniway were built from different sources")]
    Missing {
        /// What.
        name: &'static str,
    },
    /// A map cannot be pinned again.
    #[error("cannot pin map {name}: {source}")]
    Pin {
        /// Which.
        name: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The kernel refused a program.
    #[error("the kernel refused program {name}: {}", shortened(source))]
    Program {
        /// Which.
        name: &'static str,
        /// Why, at the end of the verifier's log.
        source: Box<ProgramError>,
    },
}

/// The verifier says what is wrong at the end of its log.
fn shortened(error: &ProgramError) -> String {
    const LINES: usize = 12;
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let lines: Vec<_> = log.lines().filter(|line| !line.is_empty()).collect();
            let end = lines[lines.len().saturating_sub(LINES)..].join("\n  ");
            format!("{io_error}. The verifier's last lines:\n  {end}")
        }
        other => whole(other),
    }
}

/// What is fixed when programs are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Constants {
    /// Whether pod-to-pod traffic on the node may take the fast path.
    pub fast_path: FastPath,
    /// The number of the parent ENI that the programs are for.
    pub parent: u16,
    /// What XDP does.
    pub xdp: config::Xdp,
}

/// Opens the object and makes or opens its maps; programs are loaded one by one with [`tc`] and [`xdp`]. Without
/// `pins` the maps are private to this load: for tests.
///
/// # Errors
///
/// When the object is a stub, a map cannot be made, or its layout differs from the ABI.
pub fn open(constants: Constants, limits: &Limits, pins: Option<&Pins>) -> Result<Ebpf, ObjectError> {
    open_other(OBJECT, constants, limits, pins)
}

/// As [`open`], with an object that was built in another way, for benchmarks.
///
/// # Errors
///
/// As for [`open`].
pub fn open_other(
    object: &[u8],
    constants: Constants,
    limits: &Limits,
    pins: Option<&Pins>,
) -> Result<Ebpf, ObjectError> {
    if bpf_build::is_stub(object) {
        return Err(ObjectError::Stub);
    }
    let fast_path = u8::from(constants.fast_path != FastPath::Off);
    let parent = u32::from(constants.parent);
    let xdp_redirect = u8::from(constants.xdp == config::Xdp::Redirect);
    let layouts = layouts(limits);

    let mut loader = EbpfLoader::new();
    loader
        .override_global(maps::FAST_PATH, &fast_path, true)
        .override_global(maps::PARENT_INDEX, &parent, true)
        .override_global(maps::XDP_REDIRECT, &xdp_redirect, true);
    for (name, layout) in &layouts {
        loader.map_max_entries(name, layout.entries);
        if let Some(pins) = pins {
            loader.map_pin_path(name, pins.map(name));
        }
    }
    let ebpf = loader.load(object)?;

    for (map, expected) in layouts {
        let data = ebpf.map(map).ok_or(ObjectError::Missing { name: map })?;
        let found = crate::tables::layout_of(data).map_err(EbpfError::MapError)?;
        if found != expected {
            return Err(ObjectError::Layout { map, found, expected });
        }
    }
    Ok(ebpf)
}

/// Makes or opens the maps, and loads the programs of all pods.
///
/// # Errors
///
/// As [`open`] and [`tc`].
pub(crate) fn load_for_pods(config: &Config, pins: &Pins, loader: &Loader) -> Result<Ebpf, ObjectError> {
    let constants = Constants { fast_path: config.fast_path, parent: 0, xdp: config::Xdp::Off };
    let (limits, pins) = (config.limits, pins.clone());
    loader.run(move || {
        let mut ebpf = open(constants, &limits, Some(&pins))?;
        for name in [program::POD_EGRESS, program::POD_INGRESS, program::NIC_INGRESS, program::NIC_EGRESS] {
            tc(&mut ebpf, name)?;
        }
        Ok(ebpf)
    })
}

/// Loads the programs of a parent ENI. All that it may ever need: nothing is loaded later on.
///
/// # Errors
///
/// As [`open`], [`tc`] and [`xdp`].
pub(crate) fn load_for_parent(
    config: &Config,
    parent: &config::Parent,
    index: u16,
    pins: &Pins,
    loader: &Loader,
) -> Result<Ebpf, ObjectError> {
    let constants = Constants { fast_path: config.fast_path, parent: index, xdp: parent.xdp };
    let (limits, pins) = (config.limits, pins.clone());
    loader.run(move || {
        let mut ebpf = open(constants, &limits, Some(&pins))?;
        tc(&mut ebpf, program::ENI_INGRESS)?;
        tc(&mut ebpf, program::ENI_EGRESS)?;
        if constants.xdp != config::Xdp::Off {
            xdp(&mut ebpf, program::ENI_XDP)?;
        }
        Ok(ebpf)
    })
}

/// Gives maps their pins again that somebody removed. The programs hold the maps.
///
/// # Errors
///
/// When one cannot be pinned.
pub fn pin_again(ebpf: &Ebpf, pins: &Pins) -> Result<(), ObjectError> {
    for name in maps::ALL {
        let pin = pins.map(name);
        if pin.exists() {
            continue;
        }
        let map = ebpf.map(name).and_then(crate::tables::map_data).ok_or(ObjectError::Missing { name })?;
        crate::sys::pin(map.fd().as_fd(), &pin).map_err(|source| ObjectError::Pin { name, source })?;
    }
    Ok(())
}

/// A tc program, loaded.
///
/// # Errors
///
/// When the kernel refuses it.
pub fn tc<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, ObjectError> {
    let program = find::<SchedClassifier>(ebpf, name)?;
    loaded(name, program.load())?;
    Ok(program)
}

/// An XDP program, loaded.
///
/// # Errors
///
/// When the kernel refuses it.
pub fn xdp<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Xdp, ObjectError> {
    let program = find::<Xdp>(ebpf, name)?;
    loaded(name, program.load())?;
    Ok(program)
}

/// A loaded program of either kind, as what belongs behind a link.
///
/// # Errors
///
/// When there is none of that name, or the kernel refuses it.
pub fn program_fd(ebpf: &mut Ebpf, name: &'static str) -> Result<ProgramFd, ObjectError> {
    let failed = |source| ObjectError::Program { name, source: Box::new(source) };
    let program = match name {
        program::ENI_XDP => xdp(ebpf, name)?.fd(),
        _ => tc(ebpf, name)?.fd(),
    };
    program.and_then(|fd| fd.try_clone().map_err(Into::into)).map_err(failed)
}

fn find<'a, P>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, ObjectError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program = ebpf.program_mut(name).ok_or(ObjectError::Missing { name })?;
    program.try_into().map_err(|source| ObjectError::Program { name, source: Box::new(source) })
}

fn loaded(name: &'static str, result: Result<(), ProgramError>) -> Result<(), ObjectError> {
    match result {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(()),
        Err(source) => Err(ObjectError::Program { name, source: Box::new(source) }),
    }
}

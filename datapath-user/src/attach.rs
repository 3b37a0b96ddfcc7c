//! Putting programs on interfaces so that they stay without the agent, and replacing them without a gap.
//!
//! With TCX and XDP a link is pinned; a new program is swapped in behind the pin in one step. Without TCX, filters of
//! the clsact qdisc, which belong to the interface, are replaced by priority and handle.

use std::{
    io,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::{
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp,
        links::{FdLink, LinkError, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle},
        xdp::XdpLink,
    },
    sys::SyscallError,
};

use crate::{
    error::whole,
    feature::TcKind,
    object::program,
    pin::{Hook, PinError, Pins},
    sys,
};

/// Where our filters stand among those of clsact. Nobody else is likely to have chosen it.
pub(crate) const CLSACT_PRIORITY: u16 = 0x656e;
const CLSACT_HANDLE: TcHandle = TcHandle::new(0, 1);

/// Why a program is not on its interface.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The driver cannot do XDP.
    #[error(
        "interface {interface} has no native XDP ({source}): set `xdp = \"off\"` for this [[parent]], \
         or `generic_xdp = true` to use the kernel's slower generic XDP"
    )]
    NoNativeXdp {
        /// The interface.
        interface: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another XDP program is there.
    #[error(
        "interface {interface} has an XDP program that is not ours ({source}): remove it \
         (`ip link set {interface} xdp off`) or set `xdp = \"off\"` for this [[parent]]"
    )]
    XdpTaken {
        /// The interface.
        interface: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// XDP cannot be attached for another reason.
    #[error(
        "cannot attach XDP to {interface}: {source}; the driver may want a smaller MTU or fewer queues for XDP, \
         or set `xdp = \"off\"` for this [[parent]]"
    )]
    Xdp {
        /// The interface.
        interface: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A tc program cannot be attached.
    #[error("cannot attach {program} to tc {hook} of {interface}: {}", whole(source))]
    Tc {
        /// The program.
        program: &'static str,
        /// The interface.
        interface: String,
        /// Which way.
        hook: Hook,
        /// What the kernel said.
        source: Box<ProgramError>,
    },
    /// A pinned link cannot be used.
    #[error("cannot {action} the link {}: {source}", path.display())]
    Link {
        /// What was tried.
        action: &'static str,
        /// The pin.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A pin cannot be removed.
    #[error(transparent)]
    Pin(#[from] PinError),
}

/// What became of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attached {
    /// There was none.
    Created,
    /// The program behind it was swapped.
    Replaced,
}

/// The tc programs of a kind of interface.
#[derive(Clone, Copy, Debug)]
pub struct Programs {
    ingress: &'static str,
    egress: &'static str,
}

/// Those of a parent ENI.
pub const PARENT: Programs = Programs { ingress: program::ENI_INGRESS, egress: program::ENI_EGRESS };
/// Those of the host side of a pod's veth.
pub const POD: Programs = Programs { ingress: program::POD_EGRESS, egress: program::POD_INGRESS };
/// Those of an exclusive ENI, inside its pod.
pub const NIC: Programs = Programs { ingress: program::NIC_INGRESS, egress: program::NIC_EGRESS };

impl Programs {
    /// The one on a hook.
    pub fn on(self, hook: Hook) -> &'static str {
        match hook {
            Hook::In => self.ingress,
            Hook::Out => self.egress,
        }
    }

    /// Both, with their hooks.
    pub fn all(self) -> [(&'static str, Hook); 2] {
        [(self.ingress, Hook::In), (self.egress, Hook::Out)]
    }
}

/// An interface to attach to.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// Its name.
    pub interface: &'a str,
    /// Its index.
    pub ifindex: u32,
}

/// Attaches a loaded tc program, or replaces the one that is behind the pin.
///
/// # Errors
///
/// When the kernel refuses it; a program that was attached stays then.
pub fn attach_tc(
    kind: TcKind,
    program: &mut SchedClassifier,
    name: &'static str,
    target: Target<'_>,
    hook: Hook,
    pin: &Path,
) -> Result<Attached, AttachError> {
    let refused = |source: ProgramError| AttachError::Tc {
        program: name,
        interface: target.interface.to_owned(),
        hook,
        source: Box::new(source),
    };
    match kind {
        TcKind::Tcx => {
            let attached = attach_tcx(program, target, hook, pin, refused)?;
            // Of an agent that was killed in the middle of [`attach_first`].
            unpin(&stand_in(pin))?;
            Ok(attached)
        }
        TcKind::Clsact => attach_clsact(program, target, hook).map_err(refused),
    }
}

fn attach_tcx(
    program: &mut SchedClassifier,
    target: Target<'_>,
    hook: Hook,
    pin: &Path,
    refused: impl Fn(ProgramError) -> AttachError,
) -> Result<Attached, AttachError> {
    if let Some(link) = pinned_link(pin, target.ifindex)? {
        let link = SchedClassifierLink::try_from(link).map_err(link_error("use", pin))?;
        match program.attach_to_link(link) {
            Ok(id) => {
                // The pin holds the link; ours is only closed.
                drop(program.take_link(id).map_err(refused)?);
                return Ok(Attached::Replaced);
            }
            Err(error) if is_defunct(&error) => unpin(pin)?,
            Err(error) => return Err(refused(error)),
        }
    }
    // Before whatever else is attached: what another program redirects or accepts must have passed the checks.
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program.attach_with_options(target.interface, hook.into(), options).map_err(&refused)?;
    let link = program.take_link(id).map_err(&refused)?;
    let link = FdLink::try_from(link).map_err(link_error("use", pin))?;
    link.pin(pin).map_err(|error| AttachError::Link {
        action: "pin",
        path: pin.to_owned(),
        source: io::Error::other(whole(&error)),
    })?;
    Ok(Attached::Created)
}

/// Brings a loaded tc program before all others on its hook, by TCX. The kernel takes a program only once on a hook: one that drops
/// everything comes to the new place, takes the pin over, and is swapped for the program there. What arrives between these few
/// system calls is lost, and nothing passes unchecked.
///
/// # Errors
///
/// When the kernel refuses it. Then what stood there stands, or the program that drops in its place, pinned; calling again goes
/// on from there.
pub fn attach_first(
    program: &mut SchedClassifier,
    name: &'static str,
    target: Target<'_>,
    hook: Hook,
    pin: &Path,
) -> Result<(), AttachError> {
    let refused = |source: ProgramError| AttachError::Tc {
        program: name,
        interface: target.interface.to_owned(),
        hook,
        source: Box::new(source),
    };
    let link = |action, source| AttachError::Link { action, path: pin.to_owned(), source };
    let stand_in = stand_in(pin);
    unpin(&stand_in)?;
    let drops = sys::load_drop().map_err(|error| link("load a stand-in for", error))?;
    let first = sys::tcx_link_create_first(drops, target.ifindex, hook)
        .map_err(|error| link("attach a stand-in for", error))?;
    sys::pin(first.as_fd(), &stand_in).map_err(|error| link("pin a stand-in for", error))?;
    match sys::link_detach(pin) {
        Err(error)
            if error.kind() != io::ErrorKind::NotFound && error.raw_os_error() != Some(libc::ENOLINK) =>
        {
            unpin(&stand_in)?;
            return Err(link("detach", error));
        }
        _ => std::fs::rename(&stand_in, pin).map_err(|error| link("replace", error))?,
    }
    attach_tcx(program, target, hook, pin, refused).map(drop)
}

/// Where the link of a stand-in is pinned until it takes the program's pin over. Not the name of a pod's or a parent's link.
fn stand_in(pin: &Path) -> PathBuf {
    let name = pin.file_name().unwrap_or_default().to_string_lossy();
    pin.with_file_name(format!("stand-in-{name}"))
}

fn attach_clsact(
    program: &mut SchedClassifier,
    target: Target<'_>,
    hook: Hook,
) -> Result<Attached, ProgramError> {
    match tc::qdisc_add_clsact(target.interface) {
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
        result => result?,
    }
    let options = || NlOptions { priority: CLSACT_PRIORITY, handle: CLSACT_HANDLE, ..NlOptions::default() };
    let attached =
        program.attach_with_options(target.interface, hook.into(), TcAttachOptions::Netlink(options()));
    let (id, what) = match attached {
        Ok(id) => (id, Attached::Created),
        Err(ProgramError::TcError(TcError::NetlinkError(error)))
            if error.raw_os_error() == Some(libc::EEXIST) =>
        {
            let NlOptions { priority, handle, .. } = options();
            let link = SchedClassifierLink::attached(target.interface, hook.into(), priority, handle, None)
                .map_err(TcError::IoError)?;
            (program.attach_to_link(link)?, Attached::Replaced)
        }
        Err(error) => return Err(error),
    };
    // Dropping the link would remove the filter, which is to stay.
    std::mem::forget(program.take_link(id)?);
    Ok(what)
}

/// Attaches a loaded XDP program, or replaces the one that is behind the pin. Native mode unless `generic` says
/// otherwise, and never another mode than the one asked for.
///
/// # Errors
///
/// When the driver cannot do it; a program that was attached stays then.
pub fn attach_xdp(
    program: &mut Xdp,
    target: Target<'_>,
    generic: bool,
    pin: &Path,
) -> Result<Attached, AttachError> {
    let interface = || target.interface.to_owned();
    let other = |error: ProgramError| AttachError::Xdp {
        interface: interface(),
        source: io::Error::other(whole(&error)),
    };
    if let Some(link) = pinned_link(pin, target.ifindex)? {
        let link = XdpLink::try_from(link).map_err(link_error("use", pin))?;
        match program.attach_to_link(link) {
            Ok(id) => {
                drop(program.take_link(id).map_err(other)?);
                return Ok(Attached::Replaced);
            }
            Err(error) if is_defunct(&error) => unpin(pin)?,
            Err(error) => return Err(other(error)),
        }
    }
    let fd = program.fd().map_err(other)?;
    let link = sys::xdp_link_create(fd, target.ifindex, generic).map_err(|source| {
        let interface = interface();
        match source.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EINVAL) if !generic => {
                AttachError::NoNativeXdp { interface, source }
            }
            Some(libc::EBUSY | libc::EEXIST) => AttachError::XdpTaken { interface, source },
            _ => AttachError::Xdp { interface, source },
        }
    })?;
    sys::pin(link.as_fd(), pin).map_err(|source| AttachError::Link {
        action: "pin",
        path: pin.to_owned(),
        source,
    })?;
    Ok(Attached::Created)
}

/// Removes a tc program from an interface.
///
/// # Errors
///
/// When the kernel refuses; a program that is not there is fine.
pub fn detach_tc(
    pins: &Pins,
    kind: TcKind,
    name: &'static str,
    interface: Option<&str>,
    hook: Hook,
    pin: &Path,
) -> Result<(), AttachError> {
    pins.remove(pin)?;
    let (TcKind::Clsact, Some(interface)) = (kind, interface) else { return Ok(()) };
    match tc::qdisc_detach_program(interface, hook.into(), name) {
        Ok(()) => Ok(()),
        Err(TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(TcError::IoError(error)) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        // No clsact qdisc, so no filter.
        Err(TcError::NetlinkError(error))
            if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT | libc::ENODEV)) =>
        {
            Ok(())
        }
        Err(error) => Err(AttachError::Tc {
            program: name,
            interface: interface.to_owned(),
            hook,
            source: Box::new(error.into()),
        }),
    }
}

/// The link behind a pin, if there is one and it belongs to this interface. One of another interface, or of one that
/// is gone, is unpinned.
fn pinned_link(pin: &Path, ifindex: u32) -> Result<Option<FdLink>, AttachError> {
    let failed = |source| AttachError::Link { action: "open", path: pin.to_owned(), source };
    match sys::link_info(pin) {
        Ok(info) if info.ifindex == ifindex => {
            PinnedLink::from_pin(pin).map(|link| Some(link.into())).map_err(link_error("open", pin))
        }
        Ok(_) => unpin(pin).map(|()| None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

fn unpin(pin: &Path) -> Result<(), AttachError> {
    match std::fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(AttachError::Link { action: "remove", path: pin.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

/// The interface went away and took what the link was on with it.
fn is_defunct(error: &ProgramError) -> bool {
    matches!(error, ProgramError::SyscallError(SyscallError { io_error, .. })
        if io_error.raw_os_error() == Some(libc::ENOLINK))
}

fn link_error<'a>(action: &'static str, pin: &'a Path) -> impl FnOnce(LinkError) -> AttachError + 'a {
    move |error| AttachError::Link { action, path: pin.to_owned(), source: io::Error::other(whole(&error)) }
}

impl From<Hook> for TcAttachType {
    fn from(hook: Hook) -> Self {
        match hook {
            Hook::In => Self::Ingress,
            Hook::Out => Self::Egress,
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};

    use super::*;
    use crate::{
        config::{FastPath, Limits, Xdp as XdpWish},
        net,
        object::{self, Constants, ObjectError},
    };

    const CONSTANTS: Constants = Constants { fast_path: FastPath::Off, parent: 0, xdp: XdpWish::Guard };

    /// Runs in a namespace of its own, where there is only the loopback interface; not at all without privileges or
    /// without the programs.
    fn on_loopback(test: impl FnOnce(&mut aya::Ebpf, Target<'_>) + Send + 'static) {
        let thread = std::thread::spawn(|| {
            if unshare(CloneFlags::CLONE_NEWNET).is_err() {
                return;
            }
            let limits = Limits { endpoints: 4, flows: 1024 };
            let mut ebpf = match object::open(CONSTANTS, &limits, None) {
                Err(ObjectError::Stub) => return,
                ebpf => ebpf.unwrap(),
            };
            test(&mut ebpf, Target { interface: "lo", ifindex: net::ifindex("lo").unwrap() });
        });
        thread.join().unwrap();
    }

    /// A directory for pins, where there is a file system for them.
    fn pins(name: &str) -> Option<Pins> {
        let pins = Pins::new(Path::new(&format!("/sys/fs/bpf/eniway-test-{}-{name}", std::process::id())));
        pins.prepare().and_then(|()| pins.make_dirs()).ok().map(|()| pins)
    }

    fn attached(hook: Hook) -> Vec<u32> {
        let (_, programs) = SchedClassifier::query_tcx("lo", hook.into()).unwrap();
        programs.iter().map(aya::programs::ProgramInfo::id).collect()
    }

    #[test]
    fn filters_are_replaced_and_removed_by_name() {
        on_loopback(|ebpf, lo| {
            let none = Path::new("/nonexistent");
            let pins = Pins::new(none);
            let mut attach = |hook| {
                let program = object::tc(ebpf, program::ENI_INGRESS).unwrap();
                attach_tc(TcKind::Clsact, program, program::ENI_INGRESS, lo, hook, none).unwrap()
            };
            let detach = |hook| {
                detach_tc(&pins, TcKind::Clsact, program::ENI_INGRESS, Some("lo"), hook, none).unwrap();
            };
            detach(Hook::In);
            assert_eq!(attach(Hook::In), Attached::Created);
            assert_eq!(attach(Hook::In), Attached::Replaced);
            assert_eq!(attach(Hook::Out), Attached::Created);
            detach(Hook::In);
            detach(Hook::In);
            assert_eq!(attach(Hook::Out), Attached::Replaced);
            assert_eq!(attach(Hook::In), Attached::Created);
        });
    }

    #[test]
    fn links_outlive_their_maker_and_are_replaced_behind_their_pin() {
        let Some(pins) = pins("tcx") else { return };
        let dir = pins.clone();
        on_loopback(move |ebpf, lo| {
            let pin = pins.pod_tc(lo.ifindex, Hook::In);
            let mut attach = |name| {
                attach_tc(TcKind::Tcx, object::tc(ebpf, name).unwrap(), name, lo, Hook::In, &pin).unwrap()
            };
            assert_eq!(attach(program::POD_EGRESS), Attached::Created);
            let before = attached(Hook::In);
            assert_eq!(attach(program::ENI_INGRESS), Attached::Replaced);
            let after = attached(Hook::In);
            assert!(before.len() == 1 && after.len() == 1 && before != after);
            detach_tc(&pins, TcKind::Tcx, program::ENI_INGRESS, Some("lo"), Hook::In, &pin).unwrap();
            // The kernel takes a link away in a work item after its last reference (bpf_link_put, kernel/bpf/syscall.c).
            let gone = || attached(Hook::In).is_empty();
            let begin = std::time::Instant::now();
            while !gone() {
                assert!(begin.elapsed().as_secs() < 5, "the program is still attached");
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        dir.remove_all().unwrap();
    }

    #[test]
    fn what_drops_stays_when_the_program_cannot_take_its_place() {
        let Some(pins) = pins("first") else { return };
        let dir = pins.clone();
        on_loopback(move |ebpf, lo| {
            let pin = pins.pod_tc(lo.ifindex, Hook::In);
            let mut attach = |name, pin: &Path| {
                attach_tc(TcKind::Tcx, object::tc(ebpf, name).unwrap(), name, lo, Hook::In, pin).unwrap()
            };
            attach(program::POD_INGRESS, &pin);
            // What is to come first stands on the hook by a link of somebody else's, so the kernel refuses it.
            let other = pins.pod_tc(lo.ifindex + 1, Hook::In);
            attach(program::ENI_INGRESS, &other);
            let mut first = || {
                let program = object::tc(ebpf, program::ENI_INGRESS).unwrap();
                let original = program.info().unwrap().id();
                (attach_first(program, program::ENI_INGRESS, lo, Hook::In, &pin), original)
            };
            for _ in 0..2 {
                let (refused, original) = first();
                assert!(matches!(refused, Err(AttachError::Tc { .. })), "{refused:?}");
                let [drops, last] = attached(Hook::In)[..] else { panic!("{:?}", attached(Hook::In)) };
                assert!(drops != original && last == original);
                assert_eq!(sys::link_info(&pin).unwrap().prog_id, drops);
            }
            sys::link_detach(&other).unwrap();
            let (done, original) = first();
            done.unwrap();
            assert_eq!(attached(Hook::In), [original]);
            assert_eq!(sys::link_info(&pin).unwrap().prog_id, original);
            assert!(!stand_in(&pin).exists());
        });
        dir.remove_all().unwrap();
    }

    #[test]
    fn a_link_of_another_interface_is_not_taken_for_this_ones() {
        let Some(pins) = pins("foreign") else { return };
        let pin = pins.parent_tc("lo", Hook::In);
        let attach = |pin: PathBuf| {
            on_loopback(move |ebpf, lo| {
                let name = program::ENI_INGRESS;
                let program = object::tc(ebpf, name).unwrap();
                let attached_ = attach_tc(TcKind::Tcx, program, name, lo, Hook::In, &pin).unwrap();
                assert_eq!(attached_, Attached::Created);
                assert_eq!(attached(Hook::In).len(), 1);
            });
        };
        attach(pin.clone());
        // That namespace is gone, and its interface with it, or soon will be.
        for _ in 0..100 {
            if !sys::link_info(&pin).is_ok_and(|info| info.ifindex != 0) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        attach(pin);
        pins.remove_all().unwrap();
    }

    #[test]
    fn xdp_runs_in_the_mode_that_was_asked_for() {
        let Some(pins) = pins("xdp") else { return };
        let dir = pins.clone();
        on_loopback(move |ebpf, lo| {
            let xdp = object::xdp(ebpf, program::ENI_XDP).unwrap();
            let native = pins.parent_xdp("lo", false);
            // The loopback interface has no native XDP.
            let error = attach_xdp(xdp, lo, false, &native).unwrap_err();
            assert!(matches!(error, AttachError::NoNativeXdp { .. }), "{error}");
            assert!(!native.exists());
            let generic = pins.parent_xdp("lo", true);
            assert_eq!(attach_xdp(xdp, lo, true, &generic).unwrap(), Attached::Created);
            assert_eq!(attach_xdp(xdp, lo, true, &generic).unwrap(), Attached::Replaced);
        });
        dir.remove_all().unwrap();
    }
}

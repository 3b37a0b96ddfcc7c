//! What the agent may do: the capabilities that it needs, what each is for, and how it lives without the others.
//!
//! Capabilities belong to threads. The agent gives up what it does not need before it starts any other thread. One
//! thread alone keeps CAP_PERFMON, makes the maps and loads the programs, and ends. CAP_SYS_ADMIN contains all the
//! others in the kernel's eyes, so it is not in effect on any thread but one that is about to enter a pod's namespace.

use std::{
    any::Any,
    fs, io,
    sync::mpsc::{self, Sender},
    thread::{self, JoinHandle},
};

use caps::{CapSet, Capability, CapsHashSet, errors::CapsError};

/// Why the agent does not start.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// Capabilities are missing.
    #[error(
        "this needs root, or at least these capabilities that it lacks: {} (a systemd unit gives them by \
         `CapabilityBoundingSet`, Kubernetes by `capabilities.add`)",
        list(missing)
    )]
    Missing {
        /// Which, and what each is for.
        missing: Vec<Need>,
    },
    /// The kernel does not tell or take them.
    #[error("cannot read or set the capabilities of this process: {0}")]
    Caps(#[from] CapsError),
    /// The thread that loads.
    #[error("cannot start the thread that loads programs: {0}")]
    Thread(#[from] io::Error),
}

/// A capability that the agent needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// Which.
    pub capability: Capability,
    /// What for.
    pub purpose: &'static str,
    /// Whether it is needed after the programs were loaded.
    pub kept: bool,
}

/// Everything that the agent needs, and nothing else. The units and manifests in `deploy/` give this.
pub const NEEDS: [Need; 4] = [
    Need {
        capability: Capability::CAP_BPF,
        purpose: "to make and open maps, load programs and pin them",
        kept: true,
    },
    Need {
        capability: Capability::CAP_NET_ADMIN,
        purpose: "to attach programs, and to set up links, addresses, routes and their settings",
        kept: true,
    },
    Need {
        capability: Capability::CAP_PERFMON,
        purpose: "to load programs: without it the verifier refuses some, and guards look-ups in others",
        kept: false,
    },
    Need {
        capability: Capability::CAP_SYS_ADMIN,
        purpose: "to enter the network namespaces of pods",
        kept: true,
    },
];

/// What the agent keeps where it is given, and does without where it is not.
pub const WELCOME: Need = Need {
    capability: Capability::CAP_SYS_PTRACE,
    purpose: "to open network namespaces that are named by /proc/PID/ns/net, as `ctr` does",
    kept: true,
};

fn list(missing: &[Need]) -> String {
    let words: Vec<_> = missing.iter().map(|need| format!("{}, {}", need.capability, need.purpose)).collect();
    words.join("; ")
}

/// Gives up everything that is not in [`NEEDS`] or [`WELCOME`], and hands CAP_PERFMON to the thread that loads programs. To be called
/// before there are other threads.
///
/// # Errors
///
/// When a capability is missing; says which, and changes nothing.
pub fn keep_what_is_needed() -> Result<Loader, PrivilegeError> {
    check(|_| true)?;
    no_new_privileges()?;
    let mut permitted = needed(|need| need.kept);
    if caps::has_cap(None, CapSet::Permitted, WELCOME.capability)? {
        permitted.insert(WELCOME.capability);
    }
    // Only with CAP_SETPCAP, which services are not given: for them the bounding set is their manager's.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        let bounding = caps::read(None, CapSet::Bounding)?;
        let needed = needed(|_| true);
        for capability in bounding.iter().filter(|one| !needed.contains(one) && !permitted.contains(one)) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    caps::clear(None, CapSet::Inheritable)?;
    let loading = |need: &Need| need.capability != Capability::CAP_SYS_ADMIN;
    let while_loading = permitted.union(&needed(|_| true)).copied().collect();
    hold(&needed(loading), &while_loading)?;
    let loader = Loader::start()?;
    hold(&needed(|need| need.kept && loading(need)), &permitted)?;
    Ok(loader)
}

/// Checks that the process may do what an agent does that has loaded its programs. Changes nothing.
///
/// # Errors
///
/// When a capability is missing; says which.
pub fn check_kept() -> Result<(), PrivilegeError> {
    check(|need| need.kept)
}

fn check(which: impl Fn(&Need) -> bool) -> Result<(), PrivilegeError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let lacks = |need: &Need| which(need) && !permitted.contains(&need.capability);
    let missing: Vec<Need> = NEEDS.into_iter().filter(lacks).collect();
    if missing.is_empty() { Ok(()) } else { Err(PrivilegeError::Missing { missing }) }
}

fn needed(which: impl Fn(&Need) -> bool) -> CapsHashSet {
    NEEDS.iter().filter(|need| which(need)).map(|need| need.capability).collect()
}

/// In this order an effective one is always permitted.
fn hold(effective: &CapsHashSet, permitted: &CapsHashSet) -> Result<(), CapsError> {
    caps::set(None, CapSet::Effective, effective)?;
    caps::set(None, CapSet::Permitted, permitted)
}

/// Nothing that this process runs gets more than it has.
fn no_new_privileges() -> io::Result<()> {
    // SAFETY: no pointers; the unused arguments are zero, as prctl(2) wants it.
    let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Runs `enter`, which enters a namespace, with CAP_SYS_ADMIN in effect on the calling thread. Without the capability it
/// runs all the same, and the kernel refuses.
pub(crate) fn entering<T>(enter: impl FnOnce() -> T) -> T {
    with(Capability::CAP_SYS_ADMIN, enter)
}

/// The same for opening the namespace of another process, with [`WELCOME`].
pub(crate) fn opening<T>(open: impl FnOnce() -> T) -> T {
    with(WELCOME.capability, open)
}

fn with<T>(capability: Capability, work: impl FnOnce() -> T) -> T {
    let had = caps::has_cap(None, CapSet::Effective, capability).unwrap_or(true);
    let raised = !had && caps::raise(None, CapSet::Effective, capability).is_ok();
    let done = work();
    if raised && let Err(error) = caps::drop(None, CapSet::Effective, capability) {
        log::error!("{capability} stays in effect on one thread: {error}");
    }
    done
}

type Job = Box<dyn FnOnce() + Send>;

/// The thread that makes maps and loads programs: the one with CAP_PERFMON. It ends with this value.
#[derive(Debug)]
pub struct Loader {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Loader {
    fn start() -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let body = move || queue.into_iter().for_each(|job| job());
        let thread = thread::Builder::new().name("loader".to_owned()).spawn(body)?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Runs `job` on the thread, and waits for it. A panic goes on in the caller.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, answered) = mpsc::sync_channel::<Result<T, Box<dyn Any + Send>>>(1);
        let job: Job = Box::new(move || {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
            // The caller waits for it.
            let _ = answer.send(done);
        });
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        assert!(sent, "the loader's thread lives as long as the loader");
        match answered.recv().expect("the thread answers each job") {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // Jobs catch their panics, so there is none of the thread's own.
            let _ = thread.join();
        }
    }
}

/// Capabilities that a process holds, by name.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Held {
    /// Those that any of its threads may put into effect.
    pub permitted: Vec<String>,
    /// Those that are in effect on its main thread.
    pub effective: Vec<String>,
}

/// What a process holds; `None` when it is gone or hidden.
pub fn held_by(pid: u32) -> Option<Held> {
    let own = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let mut permitted = mask(&own, "CapPrm:")?;
    for task in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        // A thread may end meanwhile.
        let of_task = fs::read_to_string(task.path().join("status")).ok();
        permitted |= of_task.and_then(|text| mask(&text, "CapPrm:")).unwrap_or(0);
    }
    Some(Held { permitted: names(permitted), effective: names(mask(&own, "CapEff:")?) })
}

fn mask(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// All that this kernel knows are one word: a process without limits has some forty.
fn names(mask: u64) -> Vec<String> {
    let mut names: Vec<_> =
        caps::all().into_iter().filter(|one| mask & one.bitmask() != 0).map(|one| one.to_string()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_told_with_their_purpose() {
        let error = PrivilegeError::Missing { missing: vec![NEEDS[0], NEEDS[3]] }.to_string();
        for words in ["CAP_BPF, to make and open maps", "CAP_SYS_ADMIN, to enter", "CapabilityBoundingSet"] {
            assert!(error.contains(words), "{error}");
        }
        assert!(!error.contains("CAP_PERFMON"), "{error}");
    }

    #[test]
    fn what_a_process_holds_is_read_by_name() {
        let text = "Name:\tx\nCapPrm:\t0000008000201000\nCapEff:\t0000000000001000\n";
        assert_eq!(names(mask(text, "CapPrm:").unwrap()), ["CAP_BPF", "CAP_NET_ADMIN", "CAP_SYS_ADMIN"]);
        assert_eq!(names(mask(text, "CapEff:").unwrap()), ["CAP_NET_ADMIN"]);
        assert!(held_by(std::process::id()).is_some());
        assert!(held_by(u32::MAX).is_none());
    }

    #[test]
    fn a_loader_answers_and_passes_panics_on() {
        let loader = Loader::start().unwrap();
        assert_eq!(loader.run(|| 6 * 7), 42);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| loader.run(|| panic!("no"))));
        assert!(panicked.is_err());
        assert_eq!(loader.run(|| thread::current().name().map(str::to_owned)), Some("loader".to_owned()));
    }
}

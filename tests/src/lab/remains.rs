//! What a lab leaves in the system, noted before it is made, so that it is found and removed after a crash, and
//! nothing else is.

use std::{
    fs, io,
    io::Write as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::{
        signal::{Signal, kill},
        statfs::{BPF_FS_MAGIC, statfs},
    },
    unistd::Pid,
};

use super::{
    error::{Error, Result},
    netns,
    netns::Netns,
};

const RUN: &str = "/run/eniway-lab";
const BPFFS: &str = "/sys/fs/bpf";
const PINS: &str = "/sys/fs/bpf/eniway-lab";
/// Not under `/run`, which is memory and may be small.
const BULK: &str = "/var/tmp/eniway-lab";

/// Notes of one lab. The lab is this process's own as long as the value lives.
#[derive(Debug)]
pub(super) struct Remains {
    places: Places,
    keep: bool,
    lock: PathBuf,
    // The last field: what is in the way of another process goes after all else.
    _flock: Flock<fs::File>,
}

impl Drop for Remains {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(error) = self.clean() {
            log::warn!("{error}");
        }
        self.leave();
    }
}

/// Where a lab's files are.
#[derive(Clone, Debug)]
pub(super) struct Places {
    id: String,
}

impl Places {
    pub(super) fn of(id: &str) -> Result<Self> {
        if id.is_empty() || id.len() > 16 || !is_name(id) {
            return Err(Error::Topology(format!(
                "lab id {id:?}: 1 to 16 lower-case letters, digits and `-`, please"
            )));
        }
        Ok(Self { id: id.into() })
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Logs, configurations, notes.
    pub(super) fn run(&self) -> PathBuf {
        Path::new(RUN).join(&self.id)
    }

    /// Pins of the fabric and the agents.
    pub(super) fn pins(&self) -> PathBuf {
        Path::new(PINS).join(&self.id)
    }

    /// Large files.
    pub(super) fn bulk(&self) -> PathBuf {
        Path::new(BULK).join(&self.id)
    }

    /// The namespace of a member of the lab.
    pub(super) fn netns(&self, member: &str) -> Netns {
        Netns::named(format!("ew-{}-{member}", self.id))
    }

    fn processes(&self) -> PathBuf {
        self.run().join("processes")
    }

    fn namespaces(&self) -> PathBuf {
        self.run().join("namespaces")
    }
}

/// Lower-case letters, digits and `-`: fit for interfaces, files, bpffs and host names alike.
pub(super) fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

impl Remains {
    /// Takes the id, removes what an earlier lab of this id has left, and prepares the directories.
    pub(super) fn begin(id: &str) -> Result<Self> {
        let remains = Self::take(id)?;
        remains.clean()?;
        let places = &remains.places;
        mount_bpffs()?;
        for dir in [places.processes(), places.namespaces(), places.pins()] {
            fs::create_dir_all(&dir).map_err(Error::io(format!("making {}", dir.display())))?;
        }
        Ok(remains)
    }

    fn take(id: &str) -> Result<Self> {
        let places = Places::of(id)?;
        fs::create_dir_all(RUN).map_err(Error::io(format!("making {RUN} (root is needed)")))?;
        let path = Path::new(RUN).join(format!("{id}.lock"));
        let file = fs::File::create(&path).map_err(Error::io(format!("lock file {}", path.display())))?;
        let flock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            Errno::EAGAIN => Error::Topology(format!(
                "lab {id} is in use by another process (it holds {}): end that one, or take another id",
                path.display()
            )),
            errno => Error::errno(format!("locking {}", path.display()))(errno),
        })?;
        Ok(Self { places, keep: false, lock: path, _flock: flock })
    }

    /// Lets everything stand when this value goes.
    pub(super) fn keep(&mut self) {
        self.keep = true;
    }

    /// As dropping does, and says what went wrong.
    pub(super) fn finish(mut self) -> Result<()> {
        let result = self.clean();
        if result.is_ok() {
            self.leave();
        }
        // Dropped, it would try again.
        self.keep = true;
        result
    }

    /// Gives the id back. The last lab takes the directories that all share with it; they stay while another has something
    /// there.
    fn leave(&self) {
        let _ = fs::remove_file(&self.lock);
        for shared in [RUN, PINS, BULK] {
            let _ = fs::remove_dir(shared);
        }
    }

    pub(super) fn places(&self) -> &Places {
        &self.places
    }

    /// Notes a namespace that is about to be made.
    pub(super) fn note_netns(&self, netns: &Netns) -> Result<()> {
        note(&self.places.namespaces().join(netns.name()), "")
    }

    /// Kills the processes and removes namespaces, pins and files. Goes on after an error and returns the first one.
    pub(super) fn clean(&self) -> Result<()> {
        let places = &self.places;
        let mut result = end_processes(&places.processes());
        let mut also = |next: Result<()>| {
            if result.is_ok() {
                result = next;
            }
        };
        also(remove_tree(&places.pins()));
        match names_in(&places.namespaces()) {
            Ok(names) => {
                for name in names {
                    also(netns::remove(&Netns::named(name)));
                }
            }
            Err(error) => also(Err(error)),
        }
        also(remove_tree(&places.bulk()));
        // The notes go last, and only when all that they speak of is gone.
        if result.is_ok() {
            result = remove_tree(&places.run());
        }
        result
    }
}

/// Removes everything of the lab with this id: processes, namespaces, pins, files. Says whether there was anything.
///
/// # Errors
///
/// When the lab is in use by a living process, or something resists.
pub fn remove(id: &str) -> Result<bool> {
    if !Places::of(id)?.run().exists() {
        return Ok(false);
    }
    Remains::take(id)?.finish()?;
    Ok(true)
}

/// Notes a process, by its start time too: a process id may come back.
pub(super) fn note_process(places: &Places, pid: u32, what: &str) -> Result<()> {
    let started = start_time(pid).unwrap_or_default();
    note(&places.processes().join(pid.to_string()), &format!("{started} {what}\n"))
}

/// Strikes out the note of a process that has ended.
pub(super) fn strike_process(places: &Places, pid: u32) {
    let _ = fs::remove_file(places.processes().join(pid.to_string()));
}

fn note(path: &Path, text: &str) -> Result<()> {
    let write = || {
        let mut file = fs::File::create(path)?;
        file.write_all(text.as_bytes())
    };
    write().map_err(Error::io(format!("writing {}", path.display())))
}

fn end_processes(notes: &Path) -> Result<()> {
    let mut living: Vec<u32> = Vec::new();
    for name in names_in(notes)? {
        let Ok(pid) = name.parse::<u32>() else { continue };
        let note = fs::read_to_string(notes.join(&name)).unwrap_or_default();
        let noted = note.split(' ').next().and_then(|text| text.parse().ok());
        if noted.is_some() && start_time(pid) == noted {
            living.push(pid);
        }
    }
    for (signal, limit) in
        [(Signal::SIGTERM, Duration::from_secs(2)), (Signal::SIGKILL, Duration::from_secs(5))]
    {
        for pid in &living {
            // ESRCH: it has just ended.
            let _ = kill(Pid::from_raw(*pid as i32), signal);
        }
        let end = Instant::now() + limit;
        while !living.is_empty() && Instant::now() < end {
            living.retain(|pid| start_time(*pid).is_some());
            thread::sleep(Duration::from_millis(5));
        }
    }
    match living.as_slice() {
        [] => Ok(()),
        pids => Err(Error::Topology(format!("processes {pids:?} of the lab do not end"))),
    }
}

/// When a living process started, in ticks since boot; none for zombies, which only their parent can bury.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, second, stands in parentheses and may contain anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    if fields.next() == Some("Z") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

fn names_in(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(Error::io(format!("reading {}", dir.display())))?,
    };
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("removing {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}

fn mount_bpffs() -> Result<()> {
    let mounted = statfs(BPFFS).is_ok_and(|info| info.filesystem_type() == BPF_FS_MAGIC);
    if mounted {
        return Ok(());
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .map_err(Error::errno(format!("mounting a bpf file system at {BPFFS}")))
}

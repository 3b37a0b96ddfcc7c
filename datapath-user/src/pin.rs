//! Where everything lives on the BPF file system, and whether what lives there fits.
//!
//! ```text
//! <pin_dir>/v<ABI version>/maps/<MAP>
//!                          links/parent-<interface>-{in,out,xdp,xdpg}
//!                          links/pod-<host-side ifindex>-{in,out}
//! ```
//!
//! A version's directory appears whole, by a rename of `draft-v<version>`, and goes by a rename to `old-v<version>`: what has such
//! a name is nobody's any more, and is removed by whoever holds the lock.

use std::{
    fs, io,
    mem::size_of,
    path::{Path, PathBuf},
};

use aya::{
    maps::{MapError, MapInfo, MapType, lpm_trie::Key},
    sys::SyscallError,
};
use datapath_common::abi::{
    self, Admitted, CounterRow, Endpoint, Flow, FlowKey, Fragment, FragmentKey, Limits as Bandwidth, PairKey,
    Spent,
    maps::{self, MAX_FRAGS, MAX_HOST_DST, MAX_PARENTS, MAX_VIPS, SLOTS_PER_ENDPOINT, VLANS, VipKey},
    policy::{ClassGroups, MAX_GROUPS, PAGES, Page, ProgramRow, VerdictRow},
};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::{config::Limits, error::whole};

/// Why the pins cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The directory is not on a BPF file system.
    #[error(
        "pin_dir {} is not on a BPF file system, which keeps maps and programs while no agent runs: \
         run `mount -t bpf bpf {}`",
        pin_dir.display(), mount_point.display()
    )]
    NotBpffs {
        /// The configured directory.
        pin_dir: PathBuf,
        /// Where one should be mounted.
        mount_point: PathBuf,
    },
    /// A file or directory cannot be made, read or removed.
    #[error("cannot {action} {}: {source}{}", path.display(), hint(path, source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A map's information cannot be had.
    #[error("cannot inspect the pinned map {}: {}", path.display(), whole(source))]
    Inspect {
        /// The pin.
        path: PathBuf,
        /// What the kernel said.
        source: MapError,
    },
    /// A pinned map is not what this version needs.
    #[error(
        "the pinned map {} is {found}, and {expected} is needed. Nothing was changed. Either set [limits] to what the \
         tables were made with, or run `eniway detach` (pods lose their network until the agent is started again)",
        path.display()
    )]
    Layout {
        /// The pin.
        path: PathBuf,
        /// What is there.
        found: MapLayout,
        /// What should be.
        expected: MapLayout,
    },
}

fn hint(path: &Path, error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::PermissionDenied && path.to_string_lossy().contains('.') {
        "; a BPF file system refuses names with a dot"
    } else {
        ""
    }
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> PinError + 'a {
    move |source| PinError::Io { action, path: path.to_owned(), source }
}

/// What must agree between a map and the programs that use it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MapLayout {
    /// Kind of map.
    pub kind: MapType,
    /// Bytes of a key.
    pub key: u32,
    /// Bytes of a value.
    pub value: u32,
    /// Entries.
    pub entries: u32,
}

impl std::fmt::Display for MapLayout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kind, key, value, entries } = self;
        write!(f, "{kind:?} of {entries} entries with keys of {key} and values of {value} bytes")
    }
}

impl MapLayout {
    /// The layout of an existing map.
    ///
    /// # Errors
    ///
    /// When the kernel has a kind of map that this program does not know.
    pub fn of(info: &MapInfo) -> Result<Self, MapError> {
        Ok(Self {
            kind: info.map_type()?,
            key: info.key_size(),
            value: info.value_size(),
            entries: info.max_entries(),
        })
    }
}

/// All maps as this version and these limits need them.
pub fn layouts(limits: &Limits) -> [(&'static str, MapLayout); maps::ALL.len()] {
    const fn layout<K, V>(kind: MapType, entries: u32) -> MapLayout {
        MapLayout { kind, key: size_of::<K>() as u32, value: size_of::<V>() as u32, entries }
    }
    let pods = limits.endpoints;
    [
        (maps::ENDPOINT, layout::<u32, Endpoint>(MapType::Array, pods * SLOTS_PER_ENDPOINT + 1)),
        (maps::SUBENI, layout::<u32, u32>(MapType::Array, MAX_PARENTS * VLANS)),
        (maps::POD_IF, layout::<u32, u32>(MapType::Hash, pods)),
        (maps::POD_IF_DIRECT, layout::<u32, u32>(MapType::Array, maps::DIRECT)),
        (maps::POD_IP4, layout::<[u8; 4], u32>(MapType::Hash, pods)),
        (maps::POD_IP4_DIRECT, layout::<u32, u32>(MapType::Array, maps::DIRECT)),
        (maps::POD_IP6, layout::<[u8; 16], u32>(MapType::Hash, pods)),
        (maps::HOST_DST, layout::<Key<[u8; 4]>, u32>(MapType::LpmTrie, MAX_HOST_DST)),
        (maps::HOST_DST_BITS, layout::<u32, u64>(MapType::Array, maps::HOST_DST_WORDS)),
        (maps::VIPS, layout::<VipKey, u32>(MapType::Hash, MAX_VIPS)),
        (maps::FLOWS, layout::<FlowKey, Flow>(MapType::LruHash, limits.flows)),
        (maps::FLOW_MARK, layout::<u32, u32>(MapType::Array, pods + 1)),
        (maps::FRAGS, layout::<FragmentKey, Fragment>(MapType::LruHash, MAX_FRAGS)),
        (maps::COUNTERS, layout::<u32, CounterRow>(MapType::PerCpuArray, pods + 1)),
        (maps::EPOCH, layout::<u32, u32>(MapType::Array, 1)),
        (maps::VERDICT, layout::<u32, VerdictRow>(MapType::Array, limits.classes())),
        (maps::CLASS, layout::<u32, ClassGroups>(MapType::Array, 2 * limits.classes())),
        (maps::PROGRAM, layout::<u32, ProgramRow>(MapType::Array, 4 * MAX_GROUPS)),
        (maps::RULES, layout::<u32, Page>(MapType::Array, 2 * PAGES)),
        (maps::PAIRS, layout::<PairKey, Admitted>(MapType::LruHash, limits.flows)),
        (maps::PAIR_MARK, layout::<u32, u32>(MapType::Array, pods + 1)),
        (maps::LIMITS, layout::<u32, Bandwidth>(MapType::Array, pods + 1)),
        (maps::SPENT, layout::<u32, Spent>(MapType::Array, pods + 1)),
    ]
}

/// Which way a tc program looks, as part of a link's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// tc ingress of the interface.
    In,
    /// tc egress of the interface.
    Out,
}

/// What a pinned link is of a parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// tc.
    Tc(Hook),
    /// XDP, in either mode.
    Xdp,
}

/// A pinned link, by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkOf {
    /// A pod's, by its host-side interface index.
    Pod(u32, Hook),
    /// A parent's, by its interface.
    Parent(String, LinkKind),
}

impl LinkOf {
    /// What a link's name says.
    pub fn parse(name: &str) -> Option<Self> {
        let (of, kind) = name.rsplit_once('-')?;
        let kind = match kind {
            "in" => LinkKind::Tc(Hook::In),
            "out" => LinkKind::Tc(Hook::Out),
            "xdp" | "xdpg" => LinkKind::Xdp,
            _ => return None,
        };
        match (of.strip_prefix("pod-"), kind) {
            (Some(ifindex), LinkKind::Tc(hook)) => Some(Self::Pod(ifindex.parse().ok()?, hook)),
            (Some(_), LinkKind::Xdp) => None,
            (None, kind) => Some(Self::Parent(of.strip_prefix("parent-")?.replace(':', "."), kind)),
        }
    }
}

/// The pins of one version.
#[derive(Clone, Debug)]
pub struct Pins {
    pin_dir: PathBuf,
    version: u32,
    /// Before it is whole: below another name.
    draft: bool,
}

impl Pins {
    /// Those of this ABI version below `pin_dir`; nothing is touched yet.
    pub fn new(pin_dir: &Path) -> Self {
        Self { pin_dir: pin_dir.to_owned(), version: abi::VERSION, draft: false }
    }

    /// The directory of all versions.
    pub fn dir(&self) -> &Path {
        &self.pin_dir
    }

    /// The version.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The directory of the version.
    pub fn version_dir(&self) -> PathBuf {
        let prefix = if self.draft { DRAFT } else { "" };
        self.pin_dir.join(format!("{prefix}v{}", self.version))
    }

    /// Whether the version has pins.
    pub fn exist(&self) -> bool {
        self.version_dir().exists()
    }

    /// All versions that have pins, by number.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn all_versions(&self) -> Result<Vec<Self>, PinError> {
        let names = names_in(&self.pin_dir)?;
        let mut versions: Vec<u32> = names.iter().filter_map(|name| version_of(name)).collect();
        versions.sort_unstable();
        let pins = |version| Self { version, draft: false, ..self.clone() };
        Ok(versions.into_iter().map(pins).collect())
    }

    /// A draft of this version, which becomes real by [`publish`](Self::publish).
    pub fn draft(&self) -> Self {
        Self { draft: true, ..self.clone() }
    }

    /// Gives a draft its name. What has been opened by way of it stays open.
    ///
    /// # Errors
    ///
    /// When it cannot be renamed.
    pub fn publish(&self) -> Result<Self, PinError> {
        let published = Self { draft: false, ..self.clone() };
        let dir = self.version_dir();
        fs::rename(&dir, published.version_dir()).map_err(io_error("rename", &dir))?;
        Ok(published)
    }

    /// Removes the pins of this version: from one moment to the next they are no more.
    ///
    /// # Errors
    ///
    /// When something cannot be removed; what is left has no meaning.
    pub fn retire(&self) -> Result<(), PinError> {
        let dir = self.version_dir();
        let old = self.pin_dir.join(format!("{OLD}v{}", self.version));
        fs::rename(&dir, old).map_err(io_error("rename", &dir))?;
        self.remove_remains()
    }

    /// Removes what has no meaning any more: drafts, and what was retired.
    ///
    /// # Errors
    ///
    /// When something cannot be removed.
    pub fn remove_remains(&self) -> Result<(), PinError> {
        for name in names_in(&self.pin_dir)? {
            let rest = name.strip_prefix(DRAFT).or_else(|| name.strip_prefix(OLD));
            if rest.and_then(version_of).is_some() {
                remove_tree(&self.pin_dir.join(name))?;
            }
        }
        Ok(())
    }

    /// Moves the pin of a link here. The link itself does not notice.
    ///
    /// # Errors
    ///
    /// When it cannot be renamed.
    pub fn adopt_link(&self, from: &Self, name: &str) -> Result<(), PinError> {
        let pin = from.links_dir().join(name);
        fs::rename(&pin, self.links_dir().join(name)).map_err(io_error("rename", &pin))
    }

    /// The directory of maps.
    pub fn maps_dir(&self) -> PathBuf {
        self.version_dir().join("maps")
    }

    /// The directory of links.
    pub fn links_dir(&self) -> PathBuf {
        self.version_dir().join("links")
    }

    /// The pin of a map.
    pub fn map(&self, name: &str) -> PathBuf {
        self.maps_dir().join(name)
    }

    /// The pin of a parent's tc link.
    pub fn parent_tc(&self, interface: &str, hook: Hook) -> PathBuf {
        self.links_dir().join(format!("{}{}", parent_prefix(interface), hook.suffix()))
    }

    /// The pin of a parent's XDP link. A link's mode cannot be changed, so it is part of the name.
    pub fn parent_xdp(&self, interface: &str, generic: bool) -> PathBuf {
        self.links_dir().join(format!("{}{}", parent_prefix(interface), if generic { "xdpg" } else { "xdp" }))
    }

    /// The pin of a pod's tc link.
    pub fn pod_tc(&self, ifindex: u32, hook: Hook) -> PathBuf {
        self.links_dir().join(format!("pod-{ifindex}-{}", hook.suffix()))
    }

    /// Host-side interface indexes of all pods that have a link pinned.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn pinned_pods(&self) -> Result<Vec<u32>, PinError> {
        let pod = |name: &String| match LinkOf::parse(name)? {
            LinkOf::Pod(ifindex, _) => Some(ifindex),
            LinkOf::Parent(..) => None,
        };
        let mut pods: Vec<u32> = self.link_names()?.iter().filter_map(pod).collect();
        pods.sort_unstable();
        pods.dedup();
        Ok(pods)
    }

    /// Interfaces of all parents that have a link pinned.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn pinned_parents(&self) -> Result<Vec<String>, PinError> {
        let parent = |name: &String| match LinkOf::parse(name)? {
            LinkOf::Parent(interface, _) => Some(interface),
            LinkOf::Pod(..) => None,
        };
        let mut parents: Vec<String> = self.link_names()?.iter().filter_map(parent).collect();
        parents.sort_unstable();
        parents.dedup();
        Ok(parents)
    }

    /// Names of all links, in order.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn link_names(&self) -> Result<Vec<String>, PinError> {
        names_in(&self.links_dir())
    }

    /// Checks that the directory of all versions can hold pins, and makes it.
    ///
    /// # Errors
    ///
    /// When it is not on a BPF file system, or cannot be made.
    pub fn prepare(&self) -> Result<(), PinError> {
        self.check_bpffs()?;
        fs::create_dir_all(&self.pin_dir).map_err(io_error("make the directory", &self.pin_dir))
    }

    /// Makes the directories of this version.
    ///
    /// # Errors
    ///
    /// When they cannot be made.
    pub fn make_dirs(&self) -> Result<(), PinError> {
        for dir in [self.maps_dir(), self.links_dir()] {
            fs::create_dir_all(&dir).map_err(io_error("make the directory", &dir))?;
        }
        Ok(())
    }

    fn check_bpffs(&self) -> Result<(), PinError> {
        let existing = self.pin_dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
        let file_system = statfs(existing).map_err(|errno| io_error("inspect", existing)(errno.into()))?;
        if file_system.filesystem_type() == BPF_FS_MAGIC {
            return Ok(());
        }
        let usual = Path::new("/sys/fs/bpf");
        let mount_point = if self.pin_dir.starts_with(usual) { usual } else { &self.pin_dir };
        Err(PinError::NotBpffs { pin_dir: self.pin_dir.clone(), mount_point: mount_point.to_owned() })
    }

    /// Compares the maps that exist with what is needed. aya opens a pinned map without looking.
    ///
    /// # Errors
    ///
    /// When one differs.
    pub fn check_layouts(&self, limits: &Limits) -> Result<(), PinError> {
        for (name, expected) in layouts(limits) {
            let path = self.map(name);
            let info = match MapInfo::from_pin(&path) {
                Ok(info) => info,
                Err(MapError::SyscallError(SyscallError { io_error, .. }))
                    if io_error.kind() == io::ErrorKind::NotFound =>
                {
                    continue;
                }
                Err(source) => return Err(PinError::Inspect { path, source }),
            };
            let found =
                MapLayout::of(&info).map_err(|source| PinError::Inspect { path: path.clone(), source })?;
            if found != expected {
                return Err(PinError::Layout { path, found, expected });
            }
        }
        Ok(())
    }

    /// Removes one pin; one that is gone is fine.
    ///
    /// # Errors
    ///
    /// When it is there and cannot be removed.
    pub fn remove(&self, path: &Path) -> Result<bool, PinError> {
        match fs::remove_file(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(io_error("remove", path)(error)),
        }
    }

    /// Names of pinned maps that this version does not have.
    pub fn unknown_maps(&self) -> Vec<String> {
        let known = |name: &str| maps::ALL.contains(&name) || [maps::LAYOUT, maps::CARRIED].contains(&name);
        let names = names_in(&self.maps_dir()).unwrap_or_default();
        names.into_iter().filter(|name| !known(name)).collect()
    }

    /// Removes them.
    ///
    /// # Errors
    ///
    /// When one cannot be removed.
    pub fn remove_unknown_maps(&self) -> Result<(), PinError> {
        self.unknown_maps().iter().try_for_each(|name| self.remove(&self.map(name)).map(drop))
    }

    /// Removes all pins of all versions, and the directories that hold them.
    ///
    /// # Errors
    ///
    /// When something cannot be removed.
    pub fn remove_all(&self) -> Result<(), PinError> {
        for pins in self.all_versions()? {
            remove_tree(&pins.version_dir())?;
        }
        self.remove_remains()?;
        // The operator may keep other things beside ours.
        let _ = fs::remove_dir(&self.pin_dir);
        Ok(())
    }
}

const DRAFT: &str = "draft-";
const OLD: &str = "old-";

/// The version whose directory has this name.
fn version_of(name: &str) -> Option<u32> {
    name.strip_prefix('v')?.parse().ok()
}

/// Names of what a directory holds, in order; one that is not there holds nothing.
fn names_in(dir: &Path) -> Result<Vec<String>, PinError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error("read", dir)(error)),
    };
    let mut names = entries
        .map(|entry| Ok(entry.map_err(io_error("read", dir))?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>, _>>()?;
    names.sort_unstable();
    Ok(names)
}

/// Removes a version's directory, links before maps.
fn remove_tree(dir: &Path) -> Result<(), PinError> {
    for name in names_in(dir)? {
        let part = dir.join(name);
        for pin in names_in(&part)? {
            let pin = part.join(pin);
            fs::remove_file(&pin).map_err(io_error("remove", &pin))?;
        }
        fs::remove_dir(&part).map_err(io_error("remove", &part))?;
    }
    fs::remove_dir(dir).map_err(io_error("remove", dir))
}

impl std::fmt::Display for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::In => "ingress",
            Self::Out => "egress",
        })
    }
}

impl Hook {
    fn suffix(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out",
        }
    }
}

/// A BPF file system refuses dots, and no interface's name has a colon.
fn parent_prefix(interface: &str) -> String {
    format!("parent-{}-", interface.replace('.', ":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_map_has_a_layout() {
        let names: Vec<_> = layouts(&Limits::default()).iter().map(|(name, _)| *name).collect();
        assert_eq!(names, maps::ALL);
    }

    #[test]
    fn limits_size_the_maps() {
        let layouts = layouts(&Limits { endpoints: 10, flows: 2048 });
        let entries = |wanted| layouts.iter().find(|(name, _)| *name == wanted).unwrap().1.entries;
        assert_eq!(entries(maps::ENDPOINT), 21);
        assert_eq!(entries(maps::COUNTERS), 11);
        assert_eq!(entries(maps::FLOW_MARK), 11);
        assert_eq!(entries(maps::POD_IF), 10);
        assert_eq!(entries(maps::FLOWS), 2048);
        assert_eq!(entries(maps::SUBENI), 8 * 4096);
    }

    #[test]
    fn paths_hold_the_version_and_no_dot_of_an_interface() {
        let pins = Pins::new(Path::new("/sys/fs/bpf/x"));
        assert_eq!(pins.map("ENDPOINT"), Path::new("/sys/fs/bpf/x/v4/maps/ENDPOINT"));
        assert_eq!(pins.parent_tc("eth1.5", Hook::In), Path::new("/sys/fs/bpf/x/v4/links/parent-eth1:5-in"));
        assert_eq!(pins.parent_xdp("eth1", true), Path::new("/sys/fs/bpf/x/v4/links/parent-eth1-xdpg"));
        assert_eq!(pins.pod_tc(7, Hook::Out), Path::new("/sys/fs/bpf/x/v4/links/pod-7-out"));
    }

    #[test]
    fn pins_are_found_again_by_name() {
        let dir = std::env::temp_dir().join(format!("eniway-pin-{}", std::process::id()));
        let pins = Pins::new(&dir);
        pins.make_dirs().unwrap();
        for path in [
            pins.pod_tc(7, Hook::In),
            pins.pod_tc(7, Hook::Out),
            pins.pod_tc(12, Hook::In),
            pins.parent_tc("eth-1.5", Hook::In),
            pins.parent_xdp("eth-1.5", false),
        ] {
            fs::write(path, []).unwrap();
        }
        assert_eq!(pins.pinned_pods().unwrap(), [7, 12]);
        assert_eq!(pins.pinned_parents().unwrap(), ["eth-1.5"]);
        assert!(matches!(pins.prepare(), Err(PinError::NotBpffs { .. })));
        pins.remove_all().unwrap();
        assert!(!dir.exists());
    }
}

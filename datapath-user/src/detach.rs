//! The end of the datapath on a node: everything that the agent made is removed, and nothing else.

use std::{collections::BTreeSet, fs};

use crate::{
    attach::{self, AttachError},
    audit::Expected,
    config::Config,
    feature::{self, FeatureError},
    grace::Grace,
    kept::Kept,
    lock::{self, LockError},
    net,
    nic::{self, Nic},
    pin::{PinError, Pins},
    policy::PolicyState,
    privilege::{self, PrivilegeError},
    settings::Settings,
    status::Status,
    takeover, wiring,
};

/// Why not everything was removed.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// The process may not do it.
    #[error(transparent)]
    Privilege(#[from] PrivilegeError),
    /// The kernel is not one that eniway runs on.
    #[error(transparent)]
    Feature(#[from] FeatureError),
    /// An agent runs, and would put everything back.
    #[error(transparent)]
    Running(#[from] LockError),
    /// A program cannot be taken from its interface.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// A pin cannot be removed.
    #[error(transparent)]
    Pin(#[from] PinError),
}

/// What was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Detached {
    /// Host-side interfaces of pods that had programs.
    pub pods: Vec<String>,
    /// Parent ENIs.
    pub parents: Vec<String>,
    /// Settings that somebody else has changed since, and that were left to them.
    pub left: Vec<String>,
    /// What could not be put back as it was; programs and tables are gone all the same.
    pub problems: Vec<String>,
}

/// Removes pods' wiring, programs, rules and routes, tables and the status file. Pods lose their network. Doing it
/// twice is fine.
///
/// # Errors
///
/// When an agent is running, or a program or pin cannot be removed.
pub async fn detach(config: &Config) -> Result<Detached, DetachError> {
    privilege::check_kept()?;
    let _lock = lock::lock_run_dir(&config.run_dir)?;
    let pins = Pins::new(&config.pin_dir);
    let _pin_lock = if pins.dir().exists() { Some(lock::lock_pins(pins.dir())?) } else { None };
    let versions = pins.all_versions()?;
    let kind = feature::probe()?;
    let grace = Grace::new(&config.run_dir);
    let _short = grace.expedite();
    let mut report = Detached::default();

    take_nics_back(config, &mut report).await;

    let mut pods = BTreeSet::new();
    for version in &versions {
        pods.extend(version.pinned_pods()?);
        pods.extend(takeover::interfaces(version));
    }
    for ifindex in pods {
        // The veth goes first: without its program an interface would be open to the host's stack.
        let name = net::ifname(ifindex);
        if let Some(name) = &name {
            if let Err(error) = wiring::unwire(name).await {
                report.problems.push(error.to_string());
            }
            report.pods.push(name.clone());
        }
        let name = name.as_deref().filter(|name| net::ifindex(name) == Some(ifindex));
        for pins in &versions {
            for (program, hook) in attach::POD.all() {
                attach::detach_tc(pins, kind, program, name, hook, &pins.pod_tc(ifindex, hook))?;
            }
        }
    }

    let mut parents = BTreeSet::new();
    for version in &versions {
        parents.extend(version.pinned_parents()?);
    }
    parents.extend(config.parents.iter().map(|parent| parent.interface.to_string()));
    for parent in parents {
        for version in versions.iter().filter(|version| version.version() != pins.version()) {
            detach_links(version, kind, &parent)?;
        }
        detach_parent(&pins, kind, &parent)
            .await?
            .into_iter()
            .for_each(|problem| report.problems.push(problem));
        report.parents.push(parent);
    }

    match Settings::load(&config.run_dir) {
        Ok(mut settings) => report.left = settings.restore().await,
        Err(error) => report.problems.push(error.to_string()),
    }
    pins.remove_all()?;
    let _ = fs::remove_file(Status::path(&config.run_dir));
    let _ = fs::remove_file(Expected::path(&config.run_dir));
    let _ = fs::remove_file(PolicyState::path(&config.run_dir));
    Ok(report)
}

/// Takes the ENIs that are in pods back to the node, as they were.
async fn take_nics_back(config: &Config, report: &mut Detached) {
    match Kept::<Nic>::load(&config.run_dir, "enis") {
        Ok(mut nics) => {
            let given: Vec<(String, Nic)> =
                nics.keys().filter_map(|key| Some((key.clone(), nics.get(key)?.clone()))).collect();
            for (key, nic) in given {
                match nic::take_back(&nic).await {
                    Ok(()) => drop(nics.remove(&key)),
                    Err(error) => report.problems.push(error.to_string()),
                }
                report.pods.push(nic.name);
            }
        }
        Err(error) => report.problems.push(error.to_string()),
    }
}

/// Removes programs, rules and routes of one parent ENI. Returns what could not be put back.
///
/// # Errors
///
/// When a program cannot be removed.
pub(crate) async fn detach_parent(
    pins: &Pins,
    kind: feature::TcKind,
    interface: &str,
) -> Result<Option<String>, AttachError> {
    detach_links(pins, kind, interface)?;
    Ok(wiring::parent::restore(interface).await.err().map(|error| error.to_string()))
}

fn detach_links(pins: &Pins, kind: feature::TcKind, interface: &str) -> Result<(), AttachError> {
    let present = net::ifindex(interface).is_some().then_some(interface);
    for (program, hook) in attach::PARENT.all() {
        attach::detach_tc(pins, kind, program, present, hook, &pins.parent_tc(interface, hook))?;
    }
    for generic in [false, true] {
        pins.remove(&pins.parent_xdp(interface, generic))?;
    }
    Ok(())
}

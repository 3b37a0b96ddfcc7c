//! Settings of the node that eniway holds, with what they were before: kept in the run directory, so that every agent knows
//! them and `eniway detach` can put them back.
//!
//! What was is written down before anything is changed. A setting that somebody else changed after eniway did is left to them.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{
    ethtool::{self, EthtoolError, Offload},
    kept::Kept,
    net,
    netlink::{LinkChange, Netlink, NetlinkError},
    run_file::RunFileError,
    sysctl::{self, SysctlError},
};

/// Why a setting is not as wanted.
#[derive(Debug, thiserror::Error)]
pub enum SettingError {
    /// A kernel setting.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// An offload.
    #[error(transparent)]
    Ethtool(#[from] EthtoolError),
    /// An interface.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// What was before cannot be written down, so nothing was changed.
    #[error(transparent)]
    Kept(#[from] RunFileError),
}

/// A change that eniway holds on the node, for people to read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeChange {
    /// What is so.
    pub what: String,
    /// What was before eniway; none where there was nothing, or where it was so already.
    pub was: Option<String>,
}

impl NodeChange {
    /// Something that was not there before.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), was: None }
    }
}

impl std::fmt::Display for NodeChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.was {
            Some(was) => write!(f, "{} (was {was})", self.what),
            None => f.write_str(&self.what),
        }
    }
}

/// What kind of setting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum What {
    /// Below `/proc/sys/net`, by parts of its name.
    Sysctl(Vec<String>),
    /// An interface's VLAN offload: `on` or `off`.
    RxVlan(String),
    /// Whether an interface is `up` or `down`.
    State(String),
}

/// A setting that eniway holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Changed {
    what: What,
    was: String,
    set: String,
    /// The interface that it is of: another one of the same name has settings of its own.
    ifindex: Option<u32>,
}

/// The settings that eniway holds.
#[derive(Debug)]
pub struct Settings(Kept<Changed>);

impl Settings {
    /// Reads what earlier agents have written down.
    ///
    /// # Errors
    ///
    /// When the directory cannot be made or read.
    pub fn load(run_dir: &Path) -> Result<Self, RunFileError> {
        Ok(Self(Kept::load(run_dir, "settings")?))
    }

    /// Sets a kernel setting, of an interface or of all.
    ///
    /// # Errors
    ///
    /// When it cannot be read or written.
    pub fn sysctl(
        &mut self,
        key: sysctl::Key<'_>,
        value: &str,
        interface: Option<&str>,
    ) -> Result<NodeChange, SettingError> {
        let name = format!("net.{}", key.join("."));
        let what = What::Sysctl(key.iter().map(|part| (*part).to_owned()).collect());
        let ifindex = interface.and_then(net::ifindex);
        if let Some(was) = sysctl::get(key)? {
            self.remember(&name, Changed { what, was, set: value.to_owned(), ifindex })?;
            sysctl::set(key, value)?;
        }
        Ok(NodeChange { what: format!("{name} = {value}"), was: self.was(&name, ifindex) })
    }

    /// Turns an interface's VLAN offload off. None: the driver does not let it.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn rxvlan_off(&mut self, interface: &str) -> Result<Option<NodeChange>, SettingError> {
        let name = format!("{interface}.rxvlan");
        let ifindex = net::ifindex(interface);
        let on = ethtool::get(interface, Offload::RxVlan)?;
        let (what, was) = (What::RxVlan(interface.to_owned()), if on { "on" } else { "off" }.to_owned());
        self.remember(&name, Changed { what, was, set: "off".to_owned(), ifindex })?;
        let stays_on = match ethtool::set(interface, Offload::RxVlan, false) {
            Ok(on) => on,
            // Some drivers have it fixed. The caller does without XDP then.
            Err(error @ EthtoolError::Refused { .. }) => {
                log::debug!("{error}");
                true
            }
            Err(error) => return Err(error.into()),
        };
        if stays_on {
            return Ok(None);
        }
        Ok(Some(NodeChange { what: format!("{interface}: rxvlan off"), was: self.was(&name, ifindex) }))
    }

    /// Sets an interface up. None: it was up before eniway.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub async fn up(
        &mut self,
        netlink: &Netlink,
        interface: &str,
    ) -> Result<Option<NodeChange>, SettingError> {
        let link = netlink.link(interface).await?;
        let name = format!("{interface}.state");
        let (what, was) = (What::State(interface.to_owned()), if link.up { "up" } else { "down" }.to_owned());
        self.remember(&name, Changed { what, was, set: "up".to_owned(), ifindex: Some(link.index) })?;
        netlink.change_link(&link, LinkChange { up: true, ..LinkChange::default() }).await?;
        let was = self.was(&name, Some(link.index));
        Ok(was.map(|was| NodeChange { what: format!("{interface}: up"), was: Some(was) }))
    }

    /// What was at first counts, be it what eniway wants: whoever changed it since was not the one who had set it.
    fn remember(&mut self, name: &str, changed: Changed) -> Result<(), RunFileError> {
        if self.0.get(name).is_some_and(|known| known.ifindex == changed.ifindex) {
            return Ok(());
        }
        self.0.put(name, changed)
    }

    /// What was before, if that was something else.
    fn was(&self, name: &str, ifindex: Option<u32>) -> Option<String> {
        let known = self.0.get(name).filter(|known| known.ifindex == ifindex && known.was != known.set);
        known.map(|known| known.was.clone())
    }

    /// Puts back what was, and forgets it. Answers with what was left as it is, and why.
    pub async fn restore(&mut self) -> Vec<String> {
        let mut left = Vec::new();
        let names: Vec<String> = self.0.keys().cloned().collect();
        for name in names {
            let Some(changed) = self.0.get(&name).cloned() else { continue };
            match put_back(&changed).await {
                Ok(None) => {}
                Ok(Some(now)) => {
                    left.push(format!(
                        "{name} is {now}, which is not what eniway had set it to ({}): left as it is (was {})",
                        changed.set, changed.was
                    ));
                }
                Err(error) => {
                    left.push(format!("{error}; it was {}", changed.was));
                    continue;
                }
            }
            self.0.remove(&name);
        }
        left
    }
}

/// Answers with what it is, if that is not what was set.
async fn put_back(changed: &Changed) -> Result<Option<String>, SettingError> {
    let Changed { what, was, set, ifindex } = changed;
    if was == set {
        return Ok(None);
    }
    let same = |interface: &str| net::ifindex(interface).is_some_and(|index| Some(index) == *ifindex);
    match what {
        What::Sysctl(key) => {
            let parts: Vec<&str> = key.iter().map(String::as_str).collect();
            let own = ifindex.is_none_or(|index| net::ifname(index).is_some_and(|name| key.contains(&name)));
            let Some(now) = sysctl::get(&parts)?.filter(|_| own) else { return Ok(None) };
            if now != *set {
                return Ok((now != *was).then_some(now));
            }
            sysctl::set(&parts, was)?;
        }
        What::RxVlan(interface) if same(interface) => {
            ethtool::set(interface, Offload::RxVlan, was == "on")?;
        }
        What::State(interface) if same(interface) => {
            let netlink = Netlink::open()?;
            let link = netlink.link(interface).await?;
            if link.up {
                netlink.set_down(&link).await?;
            }
        }
        // It went, and its settings with it.
        What::RxVlan(_) | What::State(_) => {}
    }
    Ok(None)
}

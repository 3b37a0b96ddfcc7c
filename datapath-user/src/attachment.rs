//! What the runtime asked for, by sandbox: kept in the run directory, which a restart of the agent leaves alone and a
//! restart of the node empties, together with the sandboxes.

use std::{
    collections::BTreeMap,
    fs, io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::net::InterfaceName;

/// Why an attachment cannot be kept.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}", path.display())]
pub struct AttachmentError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// A route inside a pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Route {
    /// Where to.
    pub destination: Ipv4Net,
    /// By which gateway; the subnet's when none.
    pub gateway: Option<Ipv4Addr>,
}

/// What is set up inside a pod besides its interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Extras {
    /// Routes besides the default route.
    pub routes: Vec<Route>,
    /// Settings below `net`, in parts, with their values.
    pub sysctls: Vec<(Vec<String>, String)>,
}

/// A sandbox's attachment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The runtime's id of the sandbox.
    pub container_id: String,
    /// The interface in it.
    pub interface: String,
    /// Path of its network namespace.
    pub netns: PathBuf,
    /// Kubernetes' namespace of the pod.
    pub namespace: String,
    /// Kubernetes' name of the pod.
    pub name: String,
    /// Kubernetes' uid of the pod, or the sandbox's id where the runtime does not tell it.
    pub uid: String,
    /// The highest MTU that it shall have.
    pub mtu: Option<u16>,
    /// What else is set up.
    pub extras: Extras,
}

/// All attachments of the node.
#[derive(Debug)]
pub struct Attachments {
    dir: PathBuf,
    all: BTreeMap<String, Attachment>,
}

impl Attachments {
    /// Reads what an earlier agent has kept. What cannot be read is told and left out.
    ///
    /// # Errors
    ///
    /// When the directory cannot be made or read.
    pub fn load(run_dir: &Path) -> Result<Self, AttachmentError> {
        let dir = run_dir.join("attachments");
        let failed = |action| {
            let path = dir.clone();
            move |source| AttachmentError { action, path, source }
        };
        fs::create_dir_all(&dir).map_err(failed("make the directory"))?;
        let mut all = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(failed("read"))? {
            let path = entry.map_err(failed("read"))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                // A draft that was cut short.
                let _ = fs::remove_file(&path);
                continue;
            }
            match fs::read(&path).map(|text| serde_json::from_slice::<Attachment>(&text)) {
                Ok(Ok(attachment)) => _ = all.insert(attachment.container_id.clone(), attachment),
                Ok(Err(error)) => log::error!("{}: {error}; left out", path.display()),
                Err(error) => log::error!("cannot read {}: {error}", path.display()),
            }
        }
        Ok(Self { dir, all })
    }

    /// Keeps an attachment.
    ///
    /// # Errors
    ///
    /// When it cannot be written; then it is not kept.
    pub fn put(&mut self, attachment: Attachment) -> Result<(), AttachmentError> {
        let path = self.path(&attachment.container_id);
        let draft = path.with_extension("new");
        let failed = |source| AttachmentError { action: "write", path: path.clone(), source };
        let text = serde_json::to_vec(&attachment).map_err(|error| failed(error.into()))?;
        fs::write(&draft, text).and_then(|()| fs::rename(&draft, &path)).map_err(failed)?;
        self.all.insert(attachment.container_id.clone(), attachment);
        Ok(())
    }

    /// Forgets an attachment.
    pub fn remove(&mut self, container_id: &str) -> Option<Attachment> {
        let removed = self.all.remove(container_id)?;
        let path = self.path(container_id);
        if let Err(error) = fs::remove_file(&path) {
            log::error!("cannot remove {}: {error}", path.display());
        }
        Some(removed)
    }

    /// A sandbox's attachment.
    pub fn get(&self, container_id: &str) -> Option<&Attachment> {
        self.all.get(container_id)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Attachment> {
        self.all.values()
    }

    fn path(&self, container_id: &str) -> PathBuf {
        self.dir.join(format!("{container_id}.json"))
    }
}

/// Whether a runtime's id of a sandbox is as the CNI specification wants it; it becomes part of a file's name.
pub fn is_container_id(id: &str) -> bool {
    id.starts_with(|first: char| first.is_ascii_alphanumeric())
        && id.len() <= 128
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// The parts of a setting's name, with the interface's name put in. Only what belongs to a pod alone may be set.
///
/// # Errors
///
/// Says what is wrong with the name.
pub fn sysctl_parts(key: &str, interface: &InterfaceName) -> Result<Vec<String>, String> {
    let parts: Vec<&str> = key.split('.').collect();
    match parts.as_slice() {
        ["net", rest @ ..]
            if !rest.is_empty() && rest.iter().all(|part| !part.is_empty() && !part.contains('/')) =>
        {
            let part = |part: &&str| match *part {
                "IFNAME" => interface.to_string(),
                part => part.to_owned(),
            };
            Ok(rest.iter().map(part).collect())
        }
        _ => Err(format!("sysctl `{key}` is not of the form net.ipv4.conf.IFNAME.rp_filter")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attachments_outlive_the_agent() {
        let dir = std::env::temp_dir().join(format!("eniway-attachments-{}", std::process::id()));
        let attachment = Attachment {
            container_id: "c0ffee".to_owned(),
            interface: "eth0".to_owned(),
            netns: "/run/netns/a".into(),
            namespace: "default".to_owned(),
            name: "a".to_owned(),
            uid: "u".to_owned(),
            mtu: Some(1400),
            extras: Extras {
                routes: vec![Route { destination: "10.0.0.0/8".parse().unwrap(), gateway: None }],
                sysctls: vec![(vec!["ipv4".to_owned(), "ip_forward".to_owned()], "0".to_owned())],
            },
        };
        let mut attachments = Attachments::load(&dir).unwrap();
        attachments.put(attachment.clone()).unwrap();
        fs::write(dir.join("attachments/x.new"), "half").unwrap();
        let mut again = Attachments::load(&dir).unwrap();
        assert_eq!(again.iter().collect::<Vec<_>>(), [&attachment]);
        assert_eq!(again.remove("c0ffee"), Some(attachment));
        assert_eq!(again.remove("c0ffee"), None);
        assert_eq!(fs::read_dir(dir.join("attachments")).unwrap().count(), 0);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn ids_and_settings_cannot_lead_elsewhere() {
        assert!(is_container_id("a-1_b.c"));
        for bad in ["", ".", "../a", "a/b", "-a", "ä"] {
            assert!(!is_container_id(bad), "{bad}");
        }
        let eth0 = InterfaceName::new("eth0").unwrap();
        let parts = sysctl_parts("net.ipv6.conf.IFNAME.accept_ra", &eth0).unwrap();
        assert_eq!(parts, ["ipv6", "conf", "eth0", "accept_ra"]);
        for bad in ["kernel.panic", "net", "net..x", "net.a/b", ""] {
            assert!(sysctl_parts(bad, &eth0).is_err(), "{bad}");
        }
    }
}

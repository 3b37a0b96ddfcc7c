//! What the runtime asked for, by sandbox.

use std::{net::Ipv4Addr, path::PathBuf};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::{bandwidth::Bandwidth, net::InterfaceName};

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
    pub interface: InterfaceName,
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
    /// Limits of its bandwidth.
    #[serde(default)]
    pub bandwidth: Bandwidth,
    /// What else is set up.
    pub extras: Extras,
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
    fn settings_cannot_lead_elsewhere() {
        let eth0 = InterfaceName::new("eth0").unwrap();
        let parts = sysctl_parts("net.ipv6.conf.IFNAME.accept_ra", &eth0).unwrap();
        assert_eq!(parts, ["ipv6", "conf", "eth0", "accept_ra"]);
        for bad in ["kernel.panic", "net", "net..x", "net.a/b", ""] {
            assert!(sysctl_parts(bad, &eth0).is_err(), "{bad}");
        }
    }
}

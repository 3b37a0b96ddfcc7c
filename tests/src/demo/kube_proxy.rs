//! What kube-proxy does on a node, as far as the lab needs it: nftables rules that send an address of a Service, or a port
//! of the node, to pods.

use std::net::Ipv4Addr;

use crate::lab::{Netns, Node, Pod, Result};

const TABLE: &str = "eniway-lab";

/// Rules on a node, until the value is dropped.
#[derive(Debug)]
pub struct Rules {
    netns: Netns,
}

/// What becomes of the client's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// It stays, as with `externalTrafficPolicy: Local`, and for pods that use a Service.
    Kept,
    /// It becomes the node's, as with `externalTrafficPolicy: Cluster`.
    Node,
}

impl Rules {
    /// What is sent to `address:port` goes to port 80 of these pods, in turn.
    ///
    /// # Errors
    ///
    /// When `nft` is missing or refuses.
    pub fn install(node: &Node, address: Ipv4Addr, port: u16, pods: &[&Pod], source: Source) -> Result<Self> {
        let targets: Vec<String> =
            pods.iter().enumerate().map(|(i, pod)| format!("{i} : {}", pod.ip)).collect();
        let (count, targets) = (pods.len(), targets.join(", "));
        let mut table = format!(
            "table ip {TABLE} {{ chain prerouting {{ type nat hook prerouting priority dstnat; \
             ip daddr {address} tcp dport {port} dnat to numgen inc mod {count} map {{ {targets} }} : 80; }}; "
        );
        if source == Source::Node {
            table.push_str(
                "chain postrouting { type nat hook postrouting priority srcnat; ct status dnat masquerade; }; ",
            );
        }
        table.push('}');
        let rules = Self { netns: node.netns.clone() };
        rules.netns.exec(&["nft", &table])?;
        Ok(rules)
    }
}

impl Drop for Rules {
    fn drop(&mut self) {
        if let Err(error) = self.netns.exec(&["nft", "delete", "table", "ip", TABLE]) {
            log::warn!("{error}");
        }
    }
}

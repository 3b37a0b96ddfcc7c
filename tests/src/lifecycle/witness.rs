//! Everything that counts packets which go no further: where a packet was lost is told by what has risen.

use std::{collections::BTreeMap, fs};

use crate::lab::{Error, Lab, Netns, Result};

/// Counters by what they count.
#[derive(Clone, Debug, Default)]
pub(super) struct Witness(BTreeMap<String, u64>);

impl Witness {
    /// Looks at the fabric, at the agents' tables, and at the interfaces and sockets of all namespaces.
    pub(super) fn look(lab: &Lab) -> Result<Self> {
        let mut counts = BTreeMap::new();
        for count in lab.fabric().counts()? {
            counts.insert(
                format!("fabric: {} VLAN {}: {:?}", count.port, count.vlan, count.kind),
                count.packets,
            );
        }
        for agent in lab.agents() {
            for row in agent.counters()? {
                let word = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
                if word("kind") != "forward" {
                    let what = format!(
                        "eniway on {}: {} {} {}",
                        agent.node(),
                        word("pod"),
                        word("direction"),
                        word("outcome")
                    );
                    *counts.entry(what).or_default() += row["packets"].as_u64().unwrap_or(0);
                }
            }
        }
        let nodes = lab.nodes().iter().map(|node| (format!("node {}", node.name), node.netns.clone()));
        let pods = lab.pods().iter().map(|pod| (format!("pod {}", pod.name), pod.netns.clone()));
        let fabric = [("fabric".to_owned(), lab.fabric().netns().clone())];
        for (name, netns) in nodes.chain(pods).chain(fabric) {
            namespace(&name, &netns, &mut counts)?;
        }
        Ok(Self(counts))
    }

    /// What has risen since.
    pub(super) fn risen(&self, since: &Self) -> Vec<String> {
        let risen = |(what, count): (&String, &u64)| {
            let more = count.saturating_sub(since.0.get(what).copied().unwrap_or(0));
            (more > 0).then(|| format!("{what}: {more}"))
        };
        self.0.iter().filter_map(risen).collect()
    }
}

/// Packets that a full queue of a processor (`net.core.netdev_max_backlog`) has dropped, on the whole machine.
pub(super) fn backlog_drops() -> Result<u64> {
    let path = "/proc/net/softnet_stat";
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    // A line for each processor, in hexadecimal; the second number is what was dropped.
    let dropped = |line: &str| u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok();
    Ok(text.lines().filter_map(dropped).sum())
}

fn namespace(name: &str, netns: &Netns, counts: &mut BTreeMap<String, u64>) -> Result<()> {
    let read = || {
        let read = |file: &str| fs::read_to_string(format!("/proc/thread-self/net/{file}"));
        std::io::Result::Ok((read("dev")?, read("snmp")?))
    };
    let (interfaces, protocols) = netns.run(read)?.map_err(Error::io(format!("counters of {netns}")))?;
    for line in interfaces.lines() {
        let Some((interface, numbers)) = line.split_once(':') else { continue };
        let numbers: Vec<u64> = numbers.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        // `bytes packets errs drop …`, eight numbers of what was received and eight of what was sent.
        for (what, column) in
            [("receive errors", 2), ("receive drops", 3), ("send errors", 10), ("send drops", 11)]
        {
            if let Some(count) = numbers.get(column) {
                counts.insert(format!("{name}: {}: {what}", interface.trim()), *count);
            }
        }
    }
    let mut lines = protocols.lines();
    while let (Some(keys), Some(values)) = (lines.next(), lines.next()) {
        for (key, value) in keys.split_whitespace().zip(values.split_whitespace()) {
            let wrong = ["Errors", "Discards", "NoRoutes", "NoPorts", "DestUnreachs"]
                .iter()
                .any(|end| key.ends_with(end));
            if let (true, Ok(count)) = (wrong, value.parse()) {
                let protocol = keys.split(':').next().unwrap_or_default();
                counts.insert(format!("{name}: {protocol} {key}"), count);
            }
        }
    }
    Ok(())
}

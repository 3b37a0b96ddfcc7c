//! A parent ENI: its programs, its settings, its number in the tables.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::Ipv4Addr,
    path::PathBuf,
};

use aya::{Ebpf, programs::ProgramFd};
use datapath_common::abi::maps::MAX_PARENTS;
use ipnet::Ipv4Net;

use super::{AgentError, unix_seconds};
use crate::{
    attach::{self, AttachError, Attached, Target},
    audit::{Difference, ExpectedParent, Kind, is_first},
    config::{self, Config, Xdp},
    ethtool::{self, Offload},
    feature::TcKind,
    net,
    object::{self, ObjectError, program},
    pin::{LinkKind, Pins},
    privilege::Loader,
    settings::{NodeChange, Settings},
    source::{Desired, Pod},
    status::ParentStatus,
    tables::Live,
    wiring::parent::{self, ParentSpec},
};

const OFF: &str = "off";

type Gateway = (Ipv4Net, Ipv4Addr, [u8; 6]);

fn gateway(pod: &Pod) -> Gateway {
    (pod.subnet, pod.gateway, pod.gateway_mac.0)
}

/// A parent ENI with its programs.
pub(super) struct Parent {
    pub(super) config: config::Parent,
    pub(super) index: u16,
    /// `None` while the interface is away.
    pub(super) ifindex: Option<u32>,
    ebpf: Ebpf,
    xdp_mode: &'static str,
    /// Why XDP does not run as configured.
    xdp_note: Option<String>,
    /// Bytes of a pod that may wait in its queue for their time: 0 where it keeps no packet.
    pub(super) queue: u64,
    /// What is wrong with the node's settings for it.
    pub(super) settings_note: Option<String>,
    /// What was changed in the node's settings for it.
    pub(super) changes: Vec<NodeChange>,
    /// The gateways that the node is prepared for, in order.
    gateways: Vec<Gateway>,
    /// Whether its driver let the VLAN offload be turned off.
    rxvlan_off: bool,
    /// Since when it is away, in seconds since 1970.
    gone_since: Option<u64>,
    /// Since when it has no carrier.
    no_carrier_since: Option<u64>,
    /// What is wrong with its MTU.
    mtu_note: Option<String>,
}

impl Parent {
    /// Loads the programs of a parent; nothing is attached yet.
    pub(super) fn load(
        config: &Config,
        parent: &config::Parent,
        ifindex: u32,
        index: u16,
        pins: &Pins,
        loader: &Loader,
    ) -> Result<Self, ObjectError> {
        let ebpf = object::load_for_parent(config, parent, index, pins, loader)?;
        Ok(Self {
            config: parent.clone(),
            index,
            ifindex: Some(ifindex),
            ebpf,
            xdp_mode: OFF,
            xdp_note: None,
            queue: 0,
            settings_note: None,
            changes: Vec::new(),
            gateways: Vec::new(),
            rxvlan_off: false,
            gone_since: None,
            no_carrier_since: None,
            mtu_note: None,
        })
    }

    /// The program that belongs behind a link of this parent, if it is to have one.
    pub(super) fn program(&mut self, kind: LinkKind) -> Result<Option<ProgramFd>, ObjectError> {
        if kind == LinkKind::Xdp && self.config.xdp == Xdp::Off {
            return Ok(None);
        }
        object::program_fd(&mut self.ebpf, program_behind(kind)).map(Some)
    }

    pub(super) fn name(&self) -> &str {
        self.config.interface.as_str()
    }

    /// Brings XDP to what is configured, or, where the tag would not reach it, to nothing. A pin that was made is
    /// added to `created`.
    pub(super) fn attach_xdp(&mut self, pins: &Pins, created: &mut Vec<PathBuf>) -> Result<(), AttachError> {
        let Some(ifindex) = self.ifindex else { return Ok(()) };
        let interface = self.config.interface.as_str();
        let generic = self.config.generic_xdp;
        let wanted = self.config.xdp != Xdp::Off;
        let hidden = if wanted { rxvlan_off(interface).err() } else { None };
        if !wanted || hidden.is_some() {
            for generic in [false, true] {
                pins.remove(&pins.parent_xdp(interface, generic))?;
            }
            if let Some(note) = &hidden {
                log::warn!("parent ENI {interface}: {note}");
            }
            self.xdp_mode = OFF;
            self.xdp_note = hidden;
            return Ok(());
        }
        // The kernel takes one mode at a time. Meanwhile tc checks the same.
        pins.remove(&pins.parent_xdp(interface, !generic))?;
        let pin = pins.parent_xdp(interface, generic);
        let program = object::xdp(&mut self.ebpf, program::ENI_XDP).map_err(|error| AttachError::Xdp {
            interface: interface.to_owned(),
            source: io::Error::other(error),
        })?;
        if attach::attach_xdp(program, Target { interface, ifindex }, generic, &pin)? == Attached::Created {
            created.push(pin);
        }
        self.xdp_mode = if generic { "generic" } else { "native" };
        self.xdp_note = None;
        Ok(())
    }

    pub(super) fn attach_tc(&mut self, pins: &Pins, kind: TcKind) -> Result<(), AgentError> {
        let Some(ifindex) = self.ifindex else { return Ok(()) };
        let interface = self.config.interface.as_str();
        let target = Target { interface, ifindex };
        for (name, hook) in attach::PARENT.all() {
            let program = object::tc(&mut self.ebpf, name)?;
            attach::attach_tc(kind, program, name, target, hook, &pins.parent_tc(interface, hook))?;
        }
        Ok(())
    }

    /// Attaches whatever is not attached, or not before all others.
    pub(super) fn attach_again(&mut self, pins: &Pins, kind: TcKind) -> Result<(), AgentError> {
        let Some(ifindex) = self.ifindex else { return Ok(()) };
        self.attach_xdp(pins, &mut Vec::new())?;
        if kind == TcKind::Clsact {
            return self.attach_tc(pins, kind);
        }
        let interface = self.config.interface.as_str();
        for (name, hook) in attach::PARENT.all() {
            let pin = pins.parent_tc(interface, hook);
            if !is_first(&pin, ifindex, hook) {
                let program = object::tc(&mut self.ebpf, name)?;
                attach::attach_first(program, name, Target { interface, ifindex }, hook, &pin)?;
            }
        }
        Ok(())
    }

    /// Takes note of what nothing on the node can repair. Answers with what is new.
    pub(super) fn observe(&mut self, differences: &[Difference]) -> Vec<(log::Level, String)> {
        let mut told = Vec::new();
        let name = self.config.interface.as_str();
        let of = |kind| differences.iter().find(|difference| difference.kind == kind);
        match (of(Kind::Carrier), self.no_carrier_since) {
            (Some(_), None) => {
                self.no_carrier_since = Some(unix_seconds());
                told.push((log::Level::Error, format!("parent ENI {name} has lost its carrier")));
            }
            (None, Some(since)) => {
                self.no_carrier_since = None;
                let lasted = unix_seconds().saturating_sub(since);
                told.push((
                    log::Level::Info,
                    format!("parent ENI {name} has its carrier again, after {lasted} s"),
                ));
            }
            _ => {}
        }
        let note = of(Kind::ParentMtu).map(|difference| {
            format!(
                "{difference}: what the pods send larger is lost; raise it, or give the pods a smaller one"
            )
        });
        if let Some(note) = &note
            && self.mtu_note.as_ref() != Some(note)
        {
            told.push((log::Level::Error, format!("parent ENI {name}: {note}")));
        } else if note.is_none() && self.mtu_note.is_some() {
            told.push((log::Level::Info, format!("parent ENI {name} carries what its pods send again")));
        }
        self.mtu_note = note;
        told
    }

    /// What should be of it, but for its pods' MTU.
    pub(super) fn expected(&self) -> ExpectedParent {
        ExpectedParent {
            interface: self.name().to_owned(),
            ifindex: self.ifindex,
            gateways: self.gateways.clone(),
            xdp_generic: (self.xdp_mode != OFF).then_some(self.config.generic_xdp),
            rxvlan_off: self.rxvlan_off,
            mtu: 0,
        }
    }

    /// Follows the interface if it went away or came back, as another one of the same name. Returns whether it did.
    pub(super) fn follow(&mut self, pins: &Pins, kind: TcKind) -> bool {
        let ifindex = net::ifindex(self.name());
        if ifindex == self.ifindex {
            return false;
        }
        self.ifindex = ifindex;
        self.gone_since = if ifindex.is_none() { Some(unix_seconds()) } else { None };
        self.no_carrier_since = None;
        if ifindex.is_none() {
            return true;
        }
        let attached = self.attach_xdp(pins, &mut Vec::new()).map_err(AgentError::from);
        if let Err(error) = attached.and_then(|()| self.attach_tc(pins, kind)) {
            log::error!("{error}");
            // Tried again at the next check.
            self.ifindex = None;
        }
        true
    }

    /// Another program may have turned the VLAN offload on again, which takes the tag from XDP's sight.
    pub(super) fn recheck_xdp(&mut self, pins: &Pins) {
        if self.config.xdp == Xdp::Off || self.ifindex.is_none() {
            return;
        }
        let running = self.xdp_mode != OFF;
        if rxvlan_off(self.name()).is_ok() != running
            && let Err(error) = self.attach_xdp(pins, &mut Vec::new())
        {
            log::error!("{error}");
        }
    }

    /// Readies the interface and the node's routing for the pods of a snapshot.
    pub(super) async fn prepare(&mut self, desired: &Desired, known: &mut Settings) {
        if self.ifindex.is_none() {
            return;
        }
        let mut gateways: Vec<_> = desired
            .pods()
            .filter(|(_, pod)| pod.is_wanted() && pod.parent.as_ref() == Some(&self.config.interface))
            .map(|(_, pod)| gateway(pod))
            .collect();
        gateways.sort_unstable();
        gateways.dedup();
        let spec = ParentSpec {
            interface: self.name().to_owned(),
            gateways: gateways.clone(),
            fair_queue: self.config.fair_queue,
        };
        let (ready, note) = match parent::prepare(&spec, known).await {
            Ok(prepared) => {
                self.changes = prepared.changes;
                self.rxvlan_off = prepared.rxvlan_off;
                (true, prepared.queue_fault)
            }
            Err(error) => (false, Some(error.to_string())),
        };
        self.look_at_queue().await;
        if let Some(note) = &note
            && self.settings_note.as_ref() != Some(note)
        {
            log::error!("parent ENI {}: {note}", self.name());
        }
        self.gateways = if ready { gateways } else { Vec::new() };
        self.settings_note = note;
    }

    /// Whether the node is prepared for what a pod needs of it.
    pub(super) fn is_prepared_for(&self, pod: &Pod) -> bool {
        self.gateways.binary_search(&gateway(pod)).is_ok()
    }

    pub(super) fn status(&self, kind: TcKind) -> ParentStatus {
        let since = |since: Option<u64>| since.map(|since| format!(" since {since} (seconds since 1970)"));
        let gone = self.ifindex.is_none();
        let gone =
            gone.then(|| format!("the interface is gone{}", since(self.gone_since).unwrap_or_default()));
        let carrier = since(self.no_carrier_since).map(|since| format!("no carrier{since}"));
        let notes = [gone, carrier, self.mtu_note.clone(), self.xdp_note.clone(), self.settings_note.clone()];
        ParentStatus {
            interface: self.name().to_owned(),
            index: self.index,
            ifindex: self.ifindex.unwrap_or(0),
            xdp_wanted: self.config.xdp.name().to_owned(),
            xdp_mode: self.xdp_mode.to_owned(),
            tc: kind.name().to_owned(),
            gone_since: self.gone_since,
            no_carrier_since: self.no_carrier_since,
            notes: notes.into_iter().flatten().collect(),
        }
    }
}

/// The program that is behind a link of a parent.
pub(super) fn program_behind(kind: LinkKind) -> &'static str {
    match kind {
        LinkKind::Tc(hook) => attach::PARENT.on(hook),
        LinkKind::Xdp => program::ENI_XDP,
    }
}

/// Turns the VLAN offload off, or says why XDP has to do without.
fn rxvlan_off(interface: &str) -> Result<(), String> {
    match ethtool::set(interface, Offload::RxVlan, false) {
        Ok(false) => Ok(()),
        Ok(true) => Err("rxvlan stays on, which hides the VLAN tag from XDP: tc does all".to_owned()),
        Err(error) => Err(format!("{error}; XDP would not see the VLAN tag: tc does all")),
    }
}

/// Interface indexes of the configured parents, which must all be there.
pub(super) fn ifindexes(config: &Config) -> Result<Vec<u32>, AgentError> {
    let parents = config.parents.iter().map(|parent| {
        let interface = parent.interface.as_str();
        net::ifindex(interface).ok_or_else(|| AgentError::NoParent { interface: interface.to_owned() })
    });
    parents.collect()
}

/// Numbers of the parents: those that live records know them by, else the lowest that no record uses.
pub(super) fn numbers<'a>(ifindexes: &[u32], pods: impl Iterator<Item = &'a Live>) -> Vec<u16> {
    let known: BTreeMap<u32, u16> = pods
        .map(|pod| (pod.record.parent_ifindex, pod.record.parent))
        // Exclusive ENIs have no parent.
        .filter(|(ifindex, _)| *ifindex != 0)
        .collect();
    let mut taken: BTreeSet<u16> = known.values().copied().collect();
    let mut given = BTreeSet::new();
    let mut indexes: Vec<Option<u16>> = ifindexes
        .iter()
        .map(|ifindex| known.get(ifindex).copied().filter(|index| given.insert(*index)))
        .collect();
    for index in indexes.iter_mut().filter(|index| index.is_none()) {
        let all = || 0..MAX_PARENTS as u16;
        // Records of parents that are gone give way when there is no other.
        let free = all()
            .find(|index| !taken.contains(index) && !given.contains(index))
            .or_else(|| all().find(|index| !given.contains(index)));
        *index = free.inspect(|free| {
            taken.insert(*free);
            given.insert(*free);
        });
    }
    indexes.into_iter().map(Option::unwrap_or_default).collect()
}

#[cfg(test)]
mod tests {
    use datapath_common::abi::Endpoint;

    use super::*;

    fn live(parent: u16, parent_ifindex: u32) -> Live {
        Live { slot: 1, record: Endpoint { parent, parent_ifindex, ..Endpoint::ZERO }, missing: 0 }
    }

    #[test]
    fn parents_keep_the_numbers_that_records_know() {
        let pods = [live(1, 7), live(0, 5)];
        assert_eq!(numbers(&[7, 5], pods.iter()), [1, 0]);
        assert_eq!(numbers(&[9, 5], pods.iter()), [2, 0]);
        assert_eq!(numbers(&[9, 8], [].iter()), [0, 1]);
    }

    #[test]
    fn numbers_of_lost_parents_are_given_when_there_is_no_other() {
        let pods: Vec<_> = (0..8).map(|i| live(i, 100 + u32::from(i))).collect();
        assert_eq!(numbers(&[103, 9], pods.iter()), [3, 0]);
    }
}

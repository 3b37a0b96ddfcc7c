//! The agent's part in taking over from another version: its tables, and programs for the other's links.

use std::{collections::BTreeMap, time::Instant};

use aya::Ebpf;
use datapath_common::abi::maps::MAX_PARENTS;

use super::{Agent, AgentError, exclusive::is_exclusive, parent::program_behind};
use crate::{
    attach::{self, Target},
    config::{self, Xdp},
    feature::TcKind,
    net::{self, InterfaceName},
    object,
    pin::{Hook, LinkKind, LinkOf},
    privilege::Loader,
    tables::{Maps, Tables},
    takeover::Takeover,
};

/// A parent that the configuration does not name any more, with pods on it.
struct Orphan {
    ifindex: u32,
    ebpf: Ebpf,
}

/// The tables of this version, filled from those of the other one if there is one.
pub(super) fn tables(takeover: &mut Takeover) -> Result<Tables, AgentError> {
    takeover.fill()?;
    let mut tables = Tables::new(Maps::open(takeover.place())?)?;
    if let Some(version) = takeover.other() {
        log::info!("taking over from ABI version {version}: {} pods", tables.pods().count());
        takeover.carry_counters(&ids(&tables))?;
        // Indexes that this version keeps otherwise.
        tables.point_all()?;
    }
    Ok(tables)
}

/// The ids whose counters count: those of pods, and that of packets without one.
fn ids(tables: &Tables) -> Vec<u32> {
    [0].into_iter().chain(tables.pods().map(|pod| pod.record.id)).collect()
}

impl Agent {
    /// Puts this version's programs behind all links of the other one: pods' first, which read more memories than they write,
    /// then parents'.
    pub(super) fn take_links_over(
        &mut self,
        takeover: &mut Takeover,
        loader: &Loader,
    ) -> Result<(), AgentError> {
        if takeover.other().is_none() {
            return Ok(());
        }
        let mut orphans = self.orphans(loader)?;
        let began = Instant::now();
        let parsed = |name: String| LinkOf::parse(&name).map(|of| (name, of));
        let links: Vec<(String, LinkOf)> = takeover.links()?.into_iter().filter_map(parsed).collect();
        for (name, of) in &links {
            if let LinkOf::Pod(ifindex, hook) = of {
                self.take_pod_link(takeover, name, *ifindex, *hook)?;
            }
        }
        takeover.copy_memories()?;
        for (name, of) in &links {
            if let LinkOf::Parent(interface, kind) = of {
                self.take_parent_link(takeover, &mut orphans, name, interface, *kind)?;
            }
        }
        takeover.copy_memories()?;
        log::debug!("swapped {} links in {:.1} ms", links.len(), began.elapsed().as_secs_f64() * 1e3);
        self.attach_orphans(&mut orphans)
    }

    /// Copies for the last time, when none of the other version's programs runs any more, and removes its pins.
    pub(super) fn end_takeover(&self, mut takeover: Takeover) -> Result<(), AgentError> {
        if let Some(version) = takeover.other() {
            self.tables.maps.policy.wait_for_programs();
            takeover.copy_memories()?;
            takeover.carry_counters(&ids(&self.tables))?;
            takeover.finish()?;
            log::info!("took over from ABI version {version}");
        }
        Ok(())
    }

    fn take_pod_link(
        &mut self,
        takeover: &Takeover,
        name: &str,
        ifindex: u32,
        hook: Hook,
    ) -> Result<(), AgentError> {
        let record = self.tables.pods().find(|pod| pod.record.ifindex == ifindex).map(|pod| pod.record);
        // One without a record is of no pod any more, or not yet: it is removed once the source has spoken.
        let nic = record.is_some_and(|record| is_exclusive(&record));
        let programs = if nic { attach::NIC } else { attach::POD };
        let program = object::program_fd(&mut self.pods, programs.on(hook))?;
        Ok(takeover.swap(name, &program)?)
    }

    fn take_parent_link(
        &mut self,
        takeover: &Takeover,
        orphans: &mut BTreeMap<String, Orphan>,
        name: &str,
        interface: &str,
        kind: LinkKind,
    ) -> Result<(), AgentError> {
        let program = if let Some(parent) = self.parents.iter_mut().find(|parent| parent.name() == interface)
        {
            parent.program(kind)?
        } else if let Some(orphan) = orphans.get_mut(interface) {
            Some(object::program_fd(&mut orphan.ebpf, program_behind(kind))?)
        } else {
            None
        };
        match program {
            Some(program) => Ok(takeover.swap(name, &program)?),
            // Nobody is on it, or tc does the same.
            None => Ok(takeover.remove_link(name)?),
        }
    }

    /// Parents that are not configured, with programs for them.
    fn orphans(&self, loader: &Loader) -> Result<BTreeMap<String, Orphan>, AgentError> {
        let mut orphans = BTreeMap::new();
        for record in self.tables.pods().map(|pod| pod.record) {
            let (ifindex, index) = (record.parent_ifindex, record.parent);
            if self.parents.iter().any(|parent| parent.ifindex == Some(ifindex))
                || u32::from(index) >= MAX_PARENTS
            {
                continue;
            }
            let Some(interface) = net::ifname(ifindex).filter(|name| !orphans.contains_key(name)) else {
                continue;
            };
            let Some(name) = InterfaceName::new(&interface) else { continue };
            let parent =
                config::Parent { interface: name, xdp: Xdp::Guard, generic_xdp: false, fair_queue: false };
            let ebpf = object::load_for_parent(&self.config, &parent, index, &self.pins, loader)?;
            orphans.insert(interface, Orphan { ifindex, ebpf });
        }
        Ok(orphans)
    }

    /// Without links, programs are replaced where they are.
    fn attach_orphans(&self, orphans: &mut BTreeMap<String, Orphan>) -> Result<(), AgentError> {
        if self.kind == TcKind::Tcx {
            return Ok(());
        }
        for (interface, Orphan { ifindex, ebpf }) in orphans {
            let target = Target { interface, ifindex: *ifindex };
            for (name, hook) in attach::PARENT.all() {
                let program = object::tc(ebpf, name)?;
                let pin = self.pins.parent_tc(interface, hook);
                attach::attach_tc(self.kind, program, name, target, hook, &pin)?;
            }
        }
        Ok(())
    }
}

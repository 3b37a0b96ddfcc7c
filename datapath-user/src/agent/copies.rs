//! The programs once more: what stands on a hook while one of them changes its place there.

use std::collections::BTreeMap;

use aya::Ebpf;

use super::Agent;
use crate::{
    object::{self, ObjectError},
    privilege::{Last, Loader},
};

/// Copies of all tc programs.
pub(super) struct Copies {
    pub(super) pods: Ebpf,
    /// By interface.
    parents: BTreeMap<String, Ebpf>,
}

/// Copies that are being loaded.
pub(super) type Coming = Last<Result<Copies, ObjectError>>;

impl Copies {
    /// Has them loaded, last of all and by the way: they are rarely needed, and a start does not wait for them.
    pub(super) fn load(agent: &Agent, loader: Loader) -> Coming {
        let (config, pins) = (agent.config.clone(), agent.pins.clone());
        let indexes: Vec<u16> = agent.parents.iter().map(|parent| parent.index).collect();
        loader.last(move || {
            let parents = config.parents.iter().zip(indexes).map(|(parent, index)| {
                let programs = object::programs_for_parent(&config, parent, index, &pins)?;
                Ok((parent.interface.to_string(), programs))
            });
            Ok(Self {
                pods: object::programs_for_pods(&config, &pins)?,
                parents: parents.collect::<Result<_, ObjectError>>()?,
            })
        })
    }

    /// The copies, as soon as they are loaded; none where the kernel refused them, which is told.
    pub(super) fn of(coming: &mut Option<Coming>) -> Option<&mut Self> {
        match coming.as_mut()?.get()? {
            Ok(copies) => Some(copies),
            Err(error) => {
                log::error!("{error}");
                None
            }
        }
    }

    /// Those of a parent ENI.
    pub(super) fn of_parent<'c>(coming: &'c mut Option<Coming>, interface: &str) -> Option<&'c mut Ebpf> {
        Self::of(coming)?.parents.get_mut(interface)
    }
}

//! Comparing the records with the VPC's list. What only one side knows is collected when it has been seen twice, half a
//! scan interval apart: by then no call under way can explain it.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::{Inner, claim::remove};
use crate::{
    api::{Error, LeakStatus},
    model::{Event, Interface, Leak, LeakKind, Next, State, keys},
    view::{Draft, View},
    vpc::VpcInterface,
};

/// Up to this many leaks are collected without asking, whatever their share.
const FEW: usize = 10;

impl Inner {
    pub(super) async fn scan_leaks(self: &Arc<Self>) -> Result<(), Error> {
        let began = self.clock.now();
        let mut listed = HashMap::new();
        let mut page = None;
        loop {
            let answer = match self.vpc.list(&self.settings.owner, page).await {
                Ok(answer) => answer,
                Err(error) => {
                    // A partial list must not be compared; the next scan comes soon enough.
                    log::warn!("leak scan: {error}");
                    return Ok(());
                }
            };
            listed.extend(answer.interfaces.into_iter().map(|interface| (interface.id.clone(), interface)));
            page = answer.next;
            if page.is_none() {
                break;
            }
        }
        let (seen, gone) = {
            let view = self.view();
            let mut seen = unowned(&view, &listed);
            seen.extend(missing(&view, &listed, began));
            let found: HashSet<&String> = seen.iter().map(|leak| &leak.vpc_id).collect();
            let gone: Vec<String> = view.leaks.keys().filter(|id| !found.contains(id)).cloned().collect();
            (seen, gone)
        };
        for vpc_id in gone {
            self.forget_leak(&vpc_id).await?;
        }
        for leak in seen {
            self.sight(leak).await?;
        }
        self.collect_leaks(listed.len()).await
    }

    /// Counts a sighting, unless another allocator has just done so.
    async fn sight(&self, leak: Leak) -> Result<(), Error> {
        let now = self.clock.now();
        loop {
            let transaction = {
                let view = self.view();
                let next = match view.leaks.get(&leak.vpc_id) {
                    Some(known) if known.kind == leak.kind => {
                        if known.last_seen.after(self.settings.leak_interval / 2) > now {
                            return Ok(());
                        }
                        Leak { last_seen: now, sightings: known.sightings + 1, ..known.clone() }
                    }
                    _ => Leak { first_seen: now, last_seen: now, sightings: 1, ..leak.clone() },
                };
                let mut draft = Draft::new(&view);
                // Not counted if the record that makes the difference is on its way to us.
                if let Some(interface) = &leak.interface {
                    draft.guard(&keys::interface(interface));
                }
                draft.put(keys::leak(&leak.vpc_id), &next)?;
                draft.build()
            };
            if self.commit(transaction).await?.is_some() {
                log::warn!("leak: {} ({:?}), {:?}", leak.vpc_id, leak.kind, leak.addresses);
                return Ok(());
            }
            if !self.still_leaked(&leak) {
                return Ok(());
            }
        }
    }

    fn still_leaked(&self, leak: &Leak) -> bool {
        let view = self.view();
        let record = leak.interface.as_ref().and_then(|id| view.interfaces.get(id));
        match leak.kind {
            LeakKind::Unowned => record.is_none_or(|interface| is_other(interface, &leak.vpc_id)),
            LeakKind::Missing => {
                record.is_some_and(|interface| interface.vpc_id.as_ref() == Some(&leak.vpc_id))
            }
        }
    }

    async fn collect_leaks(self: &Arc<Self>, listed: usize) -> Result<(), Error> {
        let due: Vec<Leak> = {
            let view = self.view();
            let held_back = held_back(&view, listed);
            view.leaks
                .values()
                .filter(|leak| {
                    leak.sightings >= 2 && !(held_back && leak.kind == LeakKind::Unowned && !leak.confirmed)
                })
                .cloned()
                .collect()
        };
        for leak in due {
            if !self.still_leaked(&leak) {
                self.forget_leak(&leak.vpc_id).await?;
                continue;
            }
            match leak.kind {
                // The leak's record is the intent; it goes when the deletion is certain.
                LeakKind::Unowned => match self.delete_at_vpc(&leak.vpc_id).await {
                    Ok(()) => self.forget_leak(&leak.vpc_id).await?,
                    Err(error) => log::info!("leak {}: {error}; the next scan tries again", leak.vpc_id),
                },
                LeakKind::Missing => self.collect_missing(&leak).await?,
            }
        }
        Ok(())
    }

    async fn collect_missing(&self, leak: &Leak) -> Result<(), Error> {
        loop {
            let transaction = {
                let view = self.view();
                let Some(interface) = leak.interface.as_ref().and_then(|id| view.interfaces.get(id)) else {
                    return Ok(());
                };
                let mut draft = Draft::new(&view);
                draft.delete(keys::leak(&leak.vpc_id));
                if is_at_rest(interface.state) {
                    match interface.next(Event::Missing)? {
                        Next::Gone => remove(&view, &mut draft, interface),
                        Next::To(state) => {
                            let since = self.clock.now();
                            draft.put_interface(&Interface {
                                state,
                                since,
                                ..Interface::clone(interface)
                            })?;
                        }
                    }
                }
                draft.build()
            };
            if self.commit(transaction).await?.is_some() {
                return Ok(());
            }
        }
    }

    async fn forget_leak(&self, vpc_id: &str) -> Result<(), Error> {
        loop {
            let transaction = {
                let view = self.view();
                if !view.leaks.contains_key(vpc_id) {
                    return Ok(());
                }
                let mut draft = Draft::new(&view);
                draft.delete(keys::leak(vpc_id));
                draft.build()
            };
            if self.commit(transaction).await?.is_some() {
                return Ok(());
            }
        }
    }

    pub(super) async fn confirm_leaks(&self) -> Result<(), Error> {
        let ids: Vec<String> = self.view().leaks.keys().cloned().collect();
        for id in ids {
            loop {
                let transaction = {
                    let view = self.view();
                    let Some(leak) = view.leaks.get(&id) else { break };
                    let mut draft = Draft::new(&view);
                    draft.put(keys::leak(&id), &Leak { confirmed: true, ..leak.clone() })?;
                    draft.build()
                };
                if self.commit(transaction).await?.is_some() {
                    break;
                }
            }
        }
        Ok(())
    }

    pub(super) fn leak_status(&self) -> Vec<LeakStatus> {
        let view = self.view();
        let held_back = held_back(&view, view.interfaces.len() + view.leaks.len());
        let mut leaks: Vec<_> = view
            .leaks
            .values()
            .map(|leak| LeakStatus {
                vpc_id: leak.vpc_id.clone(),
                kind: leak.kind,
                interface_id: leak.interface.clone(),
                addresses: leak.addresses,
                first_seen: leak.first_seen,
                sightings: leak.sightings,
                held_back: held_back
                    && leak.kind == LeakKind::Unowned
                    && leak.sightings >= 2
                    && !leak.confirmed,
            })
            .collect();
        leaks.sort_by(|a, b| a.vpc_id.cmp(&b.vpc_id));
        leaks
    }
}

/// An allocator whose store was lost would take the whole cluster's interfaces for leaked.
fn held_back(view: &View, listed: usize) -> bool {
    let unowned = view.leaks.values().filter(|leak| leak.kind == LeakKind::Unowned).count();
    unowned > FEW && unowned * 2 > listed
}

fn is_at_rest(state: State) -> bool {
    matches!(state, State::Idle | State::Bound | State::Unbound)
}

/// Whether a record with the name of a listed interface stands for another one.
fn is_other(record: &Interface, vpc_id: &str) -> bool {
    record.vpc_id.as_deref().is_some_and(|known| known != vpc_id)
}

fn unowned(view: &View, listed: &HashMap<String, VpcInterface>) -> Vec<Leak> {
    listed
        .values()
        .filter(|listed| view.interfaces.get(&listed.name).is_none_or(|record| is_other(record, &listed.id)))
        .map(|listed| Leak {
            vpc_id: listed.id.clone(),
            kind: LeakKind::Unowned,
            interface: Some(listed.name.clone()),
            addresses: Some(listed.addresses),
            first_seen: Default::default(),
            last_seen: Default::default(),
            sightings: 0,
            confirmed: false,
        })
        .collect()
}

fn missing(view: &View, listed: &HashMap<String, VpcInterface>, began: crate::clock::Instant) -> Vec<Leak> {
    view.interfaces
        .values()
        .filter(|record| is_at_rest(record.state) && record.since < began)
        .filter_map(|record| {
            let vpc_id = record.vpc_id.clone()?;
            (!listed.contains_key(&vpc_id)).then(|| Leak {
                vpc_id,
                kind: LeakKind::Missing,
                interface: Some(record.id.clone()),
                addresses: record.addresses,
                first_seen: Default::default(),
                last_seen: Default::default(),
                sightings: 0,
                confirmed: false,
            })
        })
        .collect()
}

//! What callers were told, and what that forbids.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use eniway_ipam::{PodKey, api::Allocation};

use super::allocator::RETENTION;

/// What must not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrong {
    /// Two pods have the same.
    Duplicate,
    /// What a caller was told does not hold.
    Lost,
    /// Something is left that nobody has.
    Leak,
}

/// What callers know. Shared by all of them.
#[derive(Default)]
pub(super) struct Ledger(Mutex<Books>);

#[derive(Default)]
pub(super) struct Books {
    /// From the answer to an allocation until its release is asked for.
    pub(super) held: BTreeMap<PodKey, Allocation>,
    /// Static addresses by `namespace/name`, and when their release was asked for.
    kept: HashMap<String, (Allocation, Instant)>,
    pub(super) allocations: u64,
    pub(super) releases: u64,
    pub(super) refused: u64,
    pub(super) wrong: Vec<(Wrong, String)>,
}

impl Books {
    pub(super) fn count(&self, kind: Wrong) -> usize {
        self.wrong.iter().filter(|(other, _)| *other == kind).count()
    }
}

impl Ledger {
    pub(super) fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn note(&self, kind: Wrong, what: String) {
        eprintln!("{kind:?}: {what}");
        self.books().wrong.push((kind, what));
    }

    /// An allocator has answered.
    pub(super) fn allocated(&self, allocation: &Allocation) {
        let mut wrong = Vec::new();
        let mut books = self.books();
        if let Some(known) = books.held.get(&allocation.key) {
            if known != allocation {
                wrong.push((Wrong::Lost, format!("{known:?} has become {allocation:?}")));
            }
        } else {
            for other in books.held.values() {
                if let Some(what) = common(other, allocation) {
                    wrong.push((Wrong::Duplicate, format!("{what}: {other:?} and {allocation:?}")));
                }
            }
            let pod = format!("{}/{}", allocation.namespace, allocation.name);
            if allocation.is_static
                && let Some((kept, since)) = books.kept.remove(&pod)
                && since.elapsed() < RETENTION
                && kept.addresses != allocation.addresses
            {
                wrong.push((Wrong::Lost, format!("{pod} had {} and got {allocation:?}", kept.addresses)));
            }
            books.held.insert(allocation.key.clone(), allocation.clone());
            books.allocations += 1;
        }
        drop(books);
        for (kind, what) in wrong {
            self.note(kind, what);
        }
    }

    /// A release is about to be asked for.
    pub(super) fn releasing(&self, key: &PodKey) -> Option<Allocation> {
        let mut books = self.books();
        let allocation = books.held.remove(key)?;
        books.releases += 1;
        if allocation.is_static {
            let pod = format!("{}/{}", allocation.namespace, allocation.name);
            books.kept.insert(pod, (allocation.clone(), Instant::now()));
        }
        Some(allocation)
    }
}

/// What two pods have in common that only one may have.
fn common(a: &Allocation, b: &Allocation) -> Option<&'static str> {
    if a.addresses.ipv4 == b.addresses.ipv4 {
        Some("one address")
    } else if a.parent == b.parent && a.vlan == b.vlan {
        Some("one VLAN")
    } else if a.mac == b.mac {
        Some("one MAC address")
    } else if a.vpc_id == b.vpc_id || a.interface_id == b.interface_id {
        Some("one interface")
    } else {
        None
    }
}

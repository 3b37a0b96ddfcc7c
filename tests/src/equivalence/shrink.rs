//! Making a case that fails small.

use eniway_policy::model::{GroupList, Groups};

use super::{Case, Step};

/// The smallest case that still fails, as far as taking away alone leads: steps, then rules, groups and what pods have.
pub fn shrink(case: &Case, fails: impl Fn(&Case) -> bool) -> Case {
    let mut best = case.clone();
    loop {
        let before = weight(&best);
        steps(&mut best, &fails);
        parts(&mut best, &fails);
        if weight(&best) == before {
            return best;
        }
    }
}

fn weight(case: &Case) -> usize {
    let in_groups = |groups: &Groups| {
        let rules: usize = groups.security_groups.values().map(|group| 1 + group.rules.len()).sum();
        let addresses: usize = groups.address_groups.values().map(|group| 1 + group.addresses.len()).sum();
        rules + addresses
    };
    let in_steps: usize = case
        .steps
        .iter()
        .map(|step| match step {
            Step::Groups(groups) => 1 + in_groups(groups),
            Step::List(_, list) | Step::Replace(_, list) => 1 + list.as_slice().len(),
            Step::Send(..) | Step::Wait(_) => 1,
        })
        .sum();
    let in_pods: usize = case.pods.iter().map(|pod| pod.list.as_slice().len() + usize::from(pod.stale)).sum();
    in_groups(&case.groups) + in_steps + in_pods + case.hidden.len()
}

/// Takes steps away, first many at once.
fn steps(best: &mut Case, fails: &impl Fn(&Case) -> bool) {
    let mut chunk = best.steps.len().next_power_of_two();
    while chunk > 0 {
        let mut at = 0;
        while at < best.steps.len() {
            let mut smaller = best.clone();
            smaller.steps.drain(at..(at + chunk).min(best.steps.len()));
            if fails(&smaller) {
                *best = smaller;
            } else {
                at += chunk;
            }
        }
        chunk /= 2;
    }
}

/// Takes rules, groups, members of lists away, one at a time.
fn parts(best: &mut Case, fails: &impl Fn(&Case) -> bool) {
    let mut attempt = |edit: &dyn Fn(&mut Case) -> bool| {
        // As long as the same place has something to take.
        loop {
            let mut smaller = best.clone();
            if !edit(&mut smaller) || !fails(&smaller) {
                return;
            }
            *best = smaller;
        }
    };
    const PLACES: usize = 40;
    for place in (0..PLACES).rev() {
        for holder in 0..PLACES {
            attempt(&|case| remove_rule(case, holder, place));
        }
        attempt(&|case| remove_group(case, place));
        for pod in 0..PLACES {
            attempt(&|case| {
                let Some(pod) = case.pods.get_mut(pod) else { return false };
                without(&mut pod.list, place)
            });
        }
        attempt(&|case| {
            let changes = case.steps.iter_mut().filter_map(|step| match step {
                Step::List(_, list) | Step::Replace(_, list) => Some(list),
                _ => None,
            });
            changes.map(|list| without(list, place)).fold(false, |any, one| any | one)
        });
        attempt(&|case| {
            let Some(id) = case.hidden.iter().nth(place).cloned() else { return false };
            case.hidden.remove(&id)
        });
        attempt(&|case| case.pods.get_mut(place).is_some_and(|pod| std::mem::take(&mut pod.stale)));
    }
}

/// All versions of the groups in a case.
fn versions(case: &mut Case) -> impl Iterator<Item = &mut Groups> {
    let later = case.steps.iter_mut().filter_map(|step| match step {
        Step::Groups(groups) => Some(groups),
        _ => None,
    });
    std::iter::once(&mut case.groups).chain(later)
}

/// Removes one rule of the `holder`th version of the groups.
fn remove_rule(case: &mut Case, holder: usize, place: usize) -> bool {
    let Some(groups) = versions(case).nth(holder) else { return false };
    let mut place = place;
    for group in groups.security_groups.values_mut() {
        if place < group.rules.len() {
            group.rules.remove(place);
            return true;
        }
        place -= group.rules.len();
    }
    false
}

/// Removes a security group that no pod ever has, or an address group that no rule names.
fn remove_group(case: &mut Case, place: usize) -> bool {
    let lists =
        case.pods.iter().map(|pod| &pod.list).chain(case.steps.iter().filter_map(|step| match step {
            Step::List(_, list) | Step::Replace(_, list) => Some(list),
            _ => None,
        }));
    let used: Vec<_> = lists.flat_map(|list| list.as_slice().to_vec()).collect();
    let Some(id) = case.groups.security_groups.keys().filter(|id| !used.contains(id)).nth(place).cloned()
    else {
        return false;
    };
    for groups in versions(case) {
        groups.security_groups.remove(&id);
    }
    true
}

fn without(list: &mut GroupList, place: usize) -> bool {
    let mut ids = list.as_slice().to_vec();
    if place >= ids.len() || ids.len() == 1 {
        return false;
    }
    ids.remove(place);
    match GroupList::try_from(ids) {
        Ok(shorter) => {
            *list = shorter;
            true
        }
        Err(_) => false,
    }
}

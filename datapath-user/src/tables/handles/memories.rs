//! What programs keep of ids: flows, fragments, counters, and how far limits of bandwidth are used up.

use aya::maps::PerCpuValues;
use datapath_common::abi::{
    CounterRow, Flow, FlowKey, Fragment, FragmentKey, Limits as Bandwidth, Spent, maps,
};

use super::{super::TablesError, Maps, Raw, entries, failed, found, gone, remove_where};

impl Maps {
    /// The memory of a flow.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn flow(&self, key: &FlowKey) -> Result<Option<Flow>, TablesError> {
        Ok(found(maps::FLOWS, self.flows.get(&Raw(*key), 0))?.map(|raw| raw.0))
    }

    /// All remembered flows.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn flows(&self) -> Result<Vec<(FlowKey, Flow)>, TablesError> {
        Ok(entries(maps::FLOWS, &self.flows)?.into_iter().map(|(key, flow)| (key.0, flow.0)).collect())
    }

    /// Remembers a flow, as the kernel programs do, and marks its pod.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn set_flow(&mut self, key: &FlowKey, flow: &Flow) -> Result<(), TablesError> {
        self.set_mark(key.id, 1)?;
        self.flows.insert(Raw(*key), Raw(*flow), 0).map_err(failed(maps::FLOWS, "write"))
    }

    /// Where the first fragment of a datagram went.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn fragment(&self, key: &FragmentKey) -> Result<Option<Fragment>, TablesError> {
        Ok(found(maps::FRAGS, self.frags.get(&Raw(*key), 0))?.map(|raw| raw.0))
    }

    /// Remembers a first fragment, as the kernel programs do, and marks its pod.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn set_fragment(&mut self, key: &FragmentKey, fragment: &Fragment) -> Result<(), TablesError> {
        self.set_mark(key.id, 1)?;
        self.frags.insert(Raw(*key), Raw(*fragment), 0).map_err(failed(maps::FRAGS, "write"))
    }

    /// Whether a pod has, or had, a remembered flow or fragment.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn marked(&self, id: u32) -> Result<bool, TablesError> {
        Ok(self.flow_mark.get(&id, 0).map_err(failed(maps::FLOW_MARK, "read"))? != 0)
    }

    fn set_mark(&mut self, id: u32, mark: u32) -> Result<(), TablesError> {
        self.flow_mark.set(id, mark, 0).map_err(failed(maps::FLOW_MARK, "write"))
    }

    /// A pod's counters (id 0: packets without a pod), summed over the CPUs, with what was carried over.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn counters(&self, id: u32) -> Result<CounterRow, TablesError> {
        let rows = self.counters.get(&id, 0).map_err(failed(maps::COUNTERS, "read"))?;
        let mut sum = CounterRow::ZERO;
        rows.iter().for_each(|Raw(row)| sum.add(row));
        if let Some(carried) = &self.carried
            && let Some(Raw(carried)) = found(maps::CARRIED, carried.get(&id, 0))?
        {
            sum.add(&carried.base);
            sum.add(&carried.pending);
        }
        Ok(sum)
    }

    /// Counters of all ids that counted anything.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn all_counters(&self) -> Result<Vec<(u32, CounterRow)>, TablesError> {
        let mut all = Vec::new();
        for id in 0..self.ids() {
            let row = self.counters(id)?;
            if row != CounterRow::ZERO {
                all.push((id, row));
            }
        }
        Ok(all)
    }

    /// Sets a pod's counters to zero on all CPUs.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn reset_counters(&mut self, id: u32) -> Result<(), TablesError> {
        if let Some(carried) = &mut self.carried {
            gone(maps::CARRIED, carried.remove(&id))?;
        }
        let zeros = PerCpuValues::try_from(vec![Raw(CounterRow::ZERO); self.cpus])
            .map_err(|source| TablesError::Cpus { file: "the number of values", source })?;
        self.counters.set(id, zeros, 0).map_err(failed(maps::COUNTERS, "write"))
    }

    /// Forgets which doors flows with an address came in by, and where fragments to it went: another pod may come to have it.
    ///
    /// # Errors
    ///
    /// When a map cannot be written.
    pub fn forget_remote(&mut self, address: [u8; 4]) -> Result<(), TablesError> {
        remove_where(maps::FLOWS, &mut self.flows, |key, _| key.0.remote == address)?;
        remove_where(maps::FRAGS, &mut self.frags, |key, _| key.0.dst == address)?;
        Ok(())
    }

    /// Forgets the flows and fragments of an id, admitted flows among them.
    ///
    /// # Errors
    ///
    /// When a map cannot be written.
    pub fn forget_flows(&mut self, id: u32) -> Result<(), TablesError> {
        if self.marked(id)? {
            remove_where(maps::FLOWS, &mut self.flows, |key, _| key.0.id == id)?;
            remove_where(maps::FRAGS, &mut self.frags, |key, _| key.0.id == id)?;
            self.set_mark(id, 0)?;
        }
        self.policy.forget(id)
    }

    /// The limits of bandwidth of an id.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn limits(&self, id: u32) -> Result<Bandwidth, TablesError> {
        self.limits.get(&id, 0).map(|raw| raw.0).map_err(failed(maps::LIMITS, "read"))
    }

    /// How far the limits of an id are used up.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn spent(&self, id: u32) -> Result<Spent, TablesError> {
        self.spent.get(&id, 0).map(|raw| raw.0).map_err(failed(maps::SPENT, "read"))
    }

    /// Says how far the limits of an id are used up, as the kernel programs do.
    ///
    /// # Errors
    ///
    /// When the map cannot be written.
    pub fn set_spent(&mut self, id: u32, spent: &Spent) -> Result<(), TablesError> {
        self.spent.set(id, Raw(*spent), 0).map_err(failed(maps::SPENT, "write"))
    }

    /// Limits an id. What changes begins anew, with the whole burst: at a lower rate than now what was spent would take ages
    /// to be paid for. Returns whether anything changed.
    ///
    /// # Errors
    ///
    /// When a map cannot be read or written.
    pub fn set_limits(&mut self, id: u32, wanted: &Bandwidth) -> Result<bool, TablesError> {
        let known = self.limits(id)?;
        if known == *wanted {
            return Ok(false);
        }
        self.limits.set(id, Raw(*wanted), 0).map_err(failed(maps::LIMITS, "write"))?;
        if (known.ingress, known.egress) != (wanted.ingress, wanted.egress) {
            self.set_spent(id, &Spent::ZERO)?;
        }
        Ok(true)
    }

    /// Forgets everything about an id: flows, admitted flows, fragments, marks, limits, counters.
    ///
    /// # Errors
    ///
    /// When a map cannot be written.
    pub fn forget(&mut self, id: u32) -> Result<(), TablesError> {
        self.forget_flows(id)?;
        self.limits.set(id, Raw(Bandwidth::ZERO), 0).map_err(failed(maps::LIMITS, "write"))?;
        self.set_spent(id, &Spent::ZERO)?;
        self.reset_counters(id)
    }
}

//! Limits of bandwidth: the rows of pods, and the queues of their parents.

use super::{Agent, parent::Parent};
use crate::{
    netlink::{Netlink, NetlinkError},
    source::Pod,
    tables::TablesError,
};

/// Bytes of a pod that may wait in its parent's queue, at the most: a few of the largest packets, milliseconds at the rates that
/// pods are limited to.
const QUEUE: u64 = 256 << 10;
/// What the smallest packets count as. A queue that holds fewer packets of a flow than may wait would drop what is charged.
const SMALLEST: u64 = 64;

impl Agent {
    /// Makes a pod's row what is asked for. Returns how much changed. To be called once its record stands, which says whether
    /// there is a row to be looked at.
    pub(super) fn limit(&mut self, pod: &Pod, id: u32) -> Result<usize, TablesError> {
        let parent = self.parents.iter().find(|parent| Some(&parent.config.interface) == pod.parent.as_ref());
        let row = pod.bandwidth.row(parent.map_or(0, |parent| parent.queue));
        self.tables.maps.set_limits(id, &row).map(usize::from)
    }

    /// Follows the queues of the parents, which anybody may change.
    pub(super) async fn follow_queues(&mut self) {
        let Some(desired) = self.desired.clone() else { return };
        let limited = desired.pods().filter(|(_, pod)| pod.bandwidth.flag() != 0);
        let limited: Vec<_> =
            limited.filter_map(|(owner, pod)| Some((pod, self.tables.pod(owner)?.record.id))).collect();
        if limited.is_empty() {
            return;
        }
        for parent in &mut self.parents {
            parent.look_at_queue().await;
        }
        for (pod, id) in limited {
            if let Err(error) = self.limit(pod, id) {
                log::error!("pod {}: {error}", pod.full_name());
            }
        }
    }
}

impl Parent {
    /// Finds out whether its queue keeps packets.
    pub(super) async fn look_at_queue(&mut self) {
        let Some(ifindex) = self.ifindex else { return };
        match queue(ifindex).await {
            Ok(queue) => self.queue = queue,
            Err(error) => log::error!("parent ENI {}: {error}", self.name()),
        }
    }
}

/// Bytes of a pod that may wait in the queue of an interface.
async fn queue(ifindex: u32) -> Result<u64, NetlinkError> {
    let packets = Netlink::open()?.fair_queue(ifindex).await?;
    Ok(packets.map_or(0, |packets| QUEUE.min(u64::from(packets) * SMALLEST)))
}

//! The queues of an interface: whether they keep packets until their time, and making them do so.

use futures_util::TryStreamExt as _;
use rtnetlink::{
    packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_REPLACE, Nla as _},
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcAttribute, TcHandle, TcMessage, TcOption},
    },
};

use super::{Link, Netlink, NetlinkError, refused};

/// By this handle a queue that eniway has put in place is found again. `tc` shows it as `2100:`.
const HANDLE: u16 = 0x2100;
/// Packets of one flow that may wait, where eniway chooses: all that pods may have waiting, be they of the smallest packets.
const FLOW_LIMIT: u32 = 4096;
/// Packets that may wait altogether, where eniway chooses.
const LIMIT: u32 = 10 * FLOW_LIMIT;

/// `TCA_FQ_PLIMIT` and `TCA_FQ_FLOW_PLIMIT` (include/uapi/linux/pkt_sched.h).
const FQ_PLIMIT: u16 = 1;
const FQ_FLOW_PLIMIT: u16 = 2;
/// `TCA_OPTIONS` (include/uapi/linux/rtnetlink.h).
const OPTIONS: u16 = 2;

/// A queue of an interface.
struct Queue {
    kind: String,
    handle: TcHandle,
    parent: TcHandle,
    flow_limit: Option<u32>,
}

impl Queue {
    fn of(message: &TcMessage) -> Self {
        let mut queue = Self {
            kind: String::new(),
            handle: message.header.handle,
            parent: message.header.parent,
            flow_limit: None,
        };
        for attribute in &message.attributes {
            match attribute {
                TcAttribute::Kind(kind) => queue.kind.clone_from(kind),
                TcAttribute::Options(options) if queue.kind == "fq" => {
                    queue.flow_limit = options.iter().find_map(|option| match option {
                        TcOption::Other(nested) => flow_limit(nested),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        queue
    }
}

/// The limit of a flow among the options of `fq`: attributes of two bytes of length, two of kind, and the value.
fn flow_limit(options: &DefaultNla) -> Option<u32> {
    let mut bytes = vec![0; options.value_len()];
    options.emit_value(&mut bytes);
    let mut rest = bytes.as_slice();
    while let [a, b, c, d, value @ ..] = rest {
        let len = usize::from(u16::from_ne_bytes([*a, *b]));
        if u16::from_ne_bytes([*c, *d]) == FQ_FLOW_PLIMIT {
            return Some(u32::from_ne_bytes(value.get(..4)?.try_into().ok()?));
        }
        rest = rest.get(len.next_multiple_of(4).max(4)..)?;
    }
    None
}

impl Netlink {
    /// How many packets of a flow may wait for their time in the queues of an interface; `None` where a packet that is given a
    /// time leaves at once all the same.
    ///
    /// # Errors
    ///
    /// When the kernel does not list the queues.
    pub async fn fair_queue(&self, index: u32) -> Result<Option<u32>, NetlinkError> {
        let queues = self.queues(index).await?;
        let Some(root) = queues.iter().find(|queue| queue.parent == TcHandle::ROOT) else { return Ok(None) };
        let fair = |queue: &Queue| (queue.kind == "fq").then_some(queue.flow_limit.unwrap_or(0));
        if root.kind != "mq" {
            return Ok(fair(root));
        }
        // One for each of the driver's queues; all must be fair.
        let below = queues.iter().filter(|queue| {
            queue.parent != TcHandle::ROOT
                && queue.parent != TcHandle::INGRESS
                && queue.parent.major == root.handle.major
        });
        let limits: Option<Vec<u32>> = below.map(fair).collect();
        Ok(limits.and_then(|limits| limits.into_iter().min()))
    }

    /// Puts fair queues in place of what an interface has, unless they are there from before. Returns what was there.
    ///
    /// # Errors
    ///
    /// When the kernel has no `fq` (module `sch_fq`), or refuses it.
    pub async fn set_fair_queue(&self, link: &Link) -> Result<Option<String>, NetlinkError> {
        let queues = self.queues(link.index).await?;
        let root = queues.iter().find(|queue| queue.parent == TcHandle::ROOT);
        if root.is_some_and(|root| root.handle.major == HANDLE)
            && self.fair_queue(link.index).await?.is_some()
        {
            return Ok(None);
        }
        if link.queues > 1 {
            self.put_queue(link, TcHandle::ROOT, HANDLE, "mq").await?;
            for n in 1..=link.queues {
                let parent = TcHandle { major: HANDLE, minor: u16::try_from(n).unwrap_or(u16::MAX) };
                self.put_queue(link, parent, 0, "fq").await?;
            }
        } else {
            self.put_queue(link, TcHandle::ROOT, HANDLE, "fq").await?;
        }
        Ok(root.map(|root| root.kind.clone()))
    }

    /// Leaves the queues of an interface to the kernel again, if [`set_fair_queue`](Self::set_fair_queue) has put them in place.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub async fn reset_fair_queue(&self, link: &Link) -> Result<bool, NetlinkError> {
        let queues = self.queues(link.index).await?;
        let ours = |queue: &&Queue| queue.parent == TcHandle::ROOT && queue.handle.major == HANDLE;
        if queues.iter().find(ours).is_none() {
            return Ok(false);
        }
        let mut request = self.handle.qdisc().del(link.index.cast_signed());
        request.message_mut().header.parent = TcHandle::ROOT;
        let what = format!("remove the fair queue of {}", link.name);
        request.execute().await.map_err(|error| refused(what, error))?;
        Ok(true)
    }

    async fn queues(&self, index: u32) -> Result<Vec<Queue>, NetlinkError> {
        let request = self.handle.qdisc().get().index(index.cast_signed());
        let all: Vec<TcMessage> = request
            .execute()
            .try_collect()
            .await
            .map_err(|error| refused(format!("list the queues of interface {index}"), error))?;
        let own = all.iter().filter(|message| message.header.index == index.cast_signed());
        Ok(own.map(Queue::of).collect())
    }

    async fn put_queue(
        &self,
        link: &Link,
        parent: TcHandle,
        handle: u16,
        kind: &str,
    ) -> Result<(), NetlinkError> {
        let mut message = TcMessage::with_index(link.index.cast_signed());
        message.header.parent = parent;
        message.header.handle = TcHandle { major: handle, minor: 0 };
        message.attributes.push(TcAttribute::Kind(kind.to_owned()));
        if kind == "fq" {
            let mut options = Vec::new();
            for (kind, value) in [(FQ_PLIMIT, LIMIT), (FQ_FLOW_PLIMIT, FLOW_LIMIT)] {
                options.extend(8u16.to_ne_bytes());
                options.extend(kind.to_ne_bytes());
                options.extend(value.to_ne_bytes());
            }
            message.attributes.push(TcAttribute::Other(DefaultNla::new(OPTIONS, options)));
        }
        let request = RouteNetlinkMessage::NewQueueDiscipline(message);
        let what = format!("give {} the queue `{kind}`", link.name);
        self.request(request, NLM_F_CREATE | NLM_F_REPLACE, &what).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_a_flow_is_found_among_the_options() {
        let attribute = |kind: u16, value: &[u8]| {
            let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let options = |parts: &[Vec<u8>]| flow_limit(&DefaultNla::new(OPTIONS, parts.concat()));
        let limit = attribute(FQ_FLOW_PLIMIT, &100u32.to_ne_bytes());
        assert_eq!(
            options(&[attribute(FQ_PLIMIT, &[1, 0, 0, 0]), attribute(9, &[7]), limit.clone()]),
            Some(100)
        );
        assert_eq!(options(&[attribute(FQ_PLIMIT, &[1, 0, 0, 0])]), None);
        assert_eq!(options(&[limit[..6].to_vec()]), None);
        assert_eq!(options(&[vec![0; 9]]), None);
    }
}

//! Where packets of the lab meet the evaluator. The fabric's program sends every IPv4 packet, when it knows both ends, out of
//! the interface `gate0`; this end of the pair reads it, asks, and gives it back, marked where groups deny it.
//!
//! ```text
//!   port ─ fabric_port ─ gate0 ══ gate1 ─ the judge ─ gate1 ══ gate0 ─ fabric_judged ─ port
//! ```

use std::{
    collections::VecDeque,
    net::Ipv4Addr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use eniway_policy::model::{GroupList, Groups, Membership};
use fabric_ebpf::REFUSED;

use super::{Packet, Verdict, Vpc, Why};
use crate::lab::{
    error::{Error, Result},
    fabric::lock,
    netns::Netns,
    sys::{self, Offload, PacketSocket},
};

/// The fabric's end.
pub(in crate::lab) const GATE: &str = "gate0";
/// The judge's end.
const JUDGE: &str = "gate1";
/// How many refused packets are kept for those who ask.
const KEPT: usize = 10_000;
/// How often what is over is forgotten.
const TIDY: Duration = Duration::from_secs(60);
const ETH_LEN: usize = 14;

/// Makes the pair. What goes out is cut into segments and carries its checksums, as on a wire.
pub(in crate::lab) fn connect_gate(netns: &Netns, mtu: u32) -> Result<()> {
    netns.ip_batch(&format!(
        "link add name {GATE} mtu {mtu} type veth peer name {JUDGE} mtu {mtu}\n\
         link set dev {GATE} up\nlink set dev {JUDGE} arp off up\n"
    ))?;
    netns
        .run(|| sys::offload_off(GATE, Offload::TxChecksum))?
        .map_err(Error::io(format!("switching the checksum offload of {GATE} in {netns} off")))
}

/// A packet that did not pass.
#[derive(Clone, Debug)]
pub struct Refused {
    /// The packet, with the addresses of both ends inside the VPC.
    pub packet: Packet,
    /// Why.
    pub why: Why,
}

/// The VPC's security groups, enforced as long as this value lives.
#[derive(Debug)]
pub struct Gate {
    court: Arc<Court>,
    judge: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Court {
    vpc: Mutex<Vpc>,
    refused: Mutex<VecDeque<Refused>>,
    over: AtomicBool,
}

impl Gate {
    /// Begins to judge.
    pub(in crate::lab) fn open(netns: &Netns, vpc: Vpc) -> Result<Self> {
        let open = || {
            let ifindex = nix::net::if_::if_nametoindex(JUDGE)?;
            // A socket that sends alone does not see what it sends.
            Ok((PacketSocket::open(ifindex, true)?, PacketSocket::open(ifindex, false)?))
        };
        let (source, sink) = netns.run(open)?.map_err(Error::io(format!("{JUDGE} of {netns}")))?;
        let court = Arc::new(Court {
            vpc: Mutex::new(vpc),
            refused: Mutex::new(VecDeque::new()),
            over: AtomicBool::new(false),
        });
        let judge = {
            let court = Arc::clone(&court);
            thread::Builder::new()
                .name("judge".into())
                .spawn(move || court.sit(source, &sink))
                .map_err(Error::io("starting a thread"))?
        };
        Ok(Self { court, judge: Some(judge) })
    }

    /// Replaces all groups. On return no packet is judged by the old ones any more.
    pub fn set_groups(&self, groups: Groups) {
        lock(&self.court.vpc).set_groups(groups);
    }

    /// Changes the groups.
    pub fn change(&self, edit: impl FnOnce(&mut Groups)) {
        let mut vpc = lock(&self.court.vpc);
        let mut groups = vpc.groups().clone();
        edit(&mut groups);
        vpc.set_groups(groups);
    }

    /// The groups as they are.
    pub fn groups(&self) -> Groups {
        lock(&self.court.vpc).groups().clone()
    }

    /// Changes the groups of the pod with this address. On return no packet is judged by its old ones any more.
    pub fn set_member(&self, address: Ipv4Addr, list: GroupList) {
        lock(&self.court.vpc).set_member(address, Membership { groups: list, revision: 0 });
    }

    /// The pod with this address is gone: its flows are over, and whoever has the address is not judged.
    pub fn remove_member(&self, address: Ipv4Addr) {
        lock(&self.court.vpc).remove_member(address);
    }

    /// What was refused, the oldest first; at most the last 10,000 packets.
    pub fn refused(&self) -> Vec<Refused> {
        lock(&self.court.refused).iter().cloned().collect()
    }

    /// Forgets what was refused.
    pub fn clear_refused(&self) {
        lock(&self.court.refused).clear();
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.court.over.store(true, Ordering::Relaxed);
        if self.judge.take().is_some_and(|judge| judge.join().is_err()) {
            log::error!("the judge of security groups has panicked");
        }
    }
}

impl Court {
    fn sit(&self, mut source: PacketSocket, sink: &PacketSocket) {
        let start = Instant::now();
        let mut tidied = Duration::ZERO;
        while !self.over.load(Ordering::Relaxed) {
            let frame = match source.receive(Duration::from_millis(50)) {
                Ok(Some(received)) if !received.outgoing => received.data,
                Ok(_) => continue,
                Err(error) => {
                    log::error!("reading at {JUDGE}: {error}");
                    return;
                }
            };
            let now = start.elapsed();
            let judged = self.judge(now, frame);
            if let Err(error) = sink.send(&judged) {
                log::warn!("sending at {JUDGE}: {error}");
            }
            if now.saturating_sub(tidied) >= TIDY {
                tidied = now;
                lock(&self.vpc).tidy(now);
            }
        }
    }

    /// The frame as it goes back.
    fn judge(&self, now: Duration, frame: Vec<u8>) -> Vec<u8> {
        // The fabric's program has read all headers already.
        let Some(packet) = frame.get(ETH_LEN..).and_then(Packet::read) else { return refuse(frame) };
        let verdict = lock(&self.vpc).see(now, &packet);
        let (Verdict::Drop(why) | Verdict::Undecidable(why)) = verdict else { return frame };
        let mut refused = lock(&self.refused);
        if refused.len() == KEPT {
            refused.pop_front();
        }
        refused.push_back(Refused { packet, why });
        refuse(frame)
    }
}

fn refuse(mut frame: Vec<u8>) -> Vec<u8> {
    if let Some(ethertype) = frame.get_mut(ETH_LEN - 2..ETH_LEN) {
        ethertype.copy_from_slice(&REFUSED.to_be_bytes());
    }
    frame
}

//! Our programs without the checks that plain packets pass: what is left is what the checks cost.

use datapath_user::{
    attach::{Attached, Target, attach_tc},
    config::{FastPath, Limits, Xdp},
    feature::TcKind,
    object::{self, Constants, program},
    pin::{Hook, Pins},
    tables::Maps,
};
use nix::net::if_::if_indextoname;

use super::{labs, system::System};
use crate::lab::{Agent, Error, Result, XdpMode, agent::Signal};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/eniway"));

/// As agents set it up; then they are stopped, and what is behind the links is replaced.
pub(super) fn eniway() -> Result<System> {
    let lab = labs::with_agents("bench-unchecked", true, XdpMode::Off)?;
    for node in lab.nodes() {
        let agent = lab.agent(&node.name)?;
        agent.stop(Signal::SIGKILL)?;
        let replace = || replace(agent).map_err(|error| Error::Topology(format!("{}: {error}", node.netns)));
        node.netns.run(replace)??;
    }
    labs::everywhere(lab)
}

/// Replaces the programs that packets between pods meet.
fn replace(agent: &Agent) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let pins = Pins::new(agent.pin_dir());
    let constants = Constants { fast_path: FastPath::SecurityGroups, parent: 0, xdp: Xdp::Off };
    let mut ebpf = object::open_other(OBJECT, constants, &Limits::default(), Some(&pins))?;
    for live in Maps::open(&pins)?.pods()? {
        let pod = live.record.ifindex;
        for (ifindex, name, pin) in [
            (pod, program::POD_EGRESS, pins.pod_tc(pod, Hook::In)),
            (live.record.parent_ifindex, program::ENI_INGRESS, pins.parent_tc("eth1", Hook::In)),
        ] {
            let interface = if_indextoname(ifindex)?.to_string_lossy().into_owned();
            let target = Target { interface: &interface, ifindex };
            let program = object::tc(&mut ebpf, name)?;
            let attached = attach_tc(TcKind::Tcx, program, name, target, Hook::In, &pin)?;
            if attached != Attached::Replaced {
                return Err(format!("{} held no link", pin.display()).into());
            }
        }
    }
    Ok(())
}

//! The least that a datapath of each kind can do, for benchmarks: no look-up, no check, one packet's way compiled in.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(
    target_arch = "bpf",
    expect(clippy::needless_pass_by_value, reason = "aya's macros hand a hook its context by value")
)]

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{
        Global,
        bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action},
        helpers::{bpf_redirect, bpf_redirect_peer, bpf_skb_vlan_pop, bpf_skb_vlan_push},
        macros::{classifier, xdp},
        programs::{TcContext, XdpContext},
    };

    const TPID_8021Q: u16 = 0x8100;

    /// Where everything goes: an interface's index.
    #[unsafe(no_mangle)]
    static TARGET: Global<u32> = Global::new(0);
    /// The VLAN id that `floor_wire` puts on.
    #[unsafe(no_mangle)]
    static VID: Global<u16> = Global::new(0);

    /// Into the pod behind another veth.
    #[classifier]
    pub fn floor_peer(_: TcContext) -> i32 {
        // SAFETY: a helper without pointers.
        unsafe { bpf_redirect_peer(TARGET.load(), 0) as i32 }
    }

    /// Tagged, out by the parent.
    #[classifier]
    pub fn floor_wire(ctx: TcContext) -> i32 {
        // SAFETY: the pointer is the hook's argument.
        unsafe {
            if bpf_skb_vlan_push(ctx.skb.skb, TPID_8021Q.to_be(), VID.load()) != 0 {
                return TC_ACT_SHOT;
            }
            bpf_redirect(TARGET.load(), 0) as i32
        }
    }

    /// From the parent, untagged, into a pod; what has no tag goes on.
    #[classifier]
    pub fn floor_pod(ctx: TcContext) -> i32 {
        // SAFETY: the pointer is the hook's argument.
        unsafe {
            let skb = ctx.skb.skb;
            if (*skb).vlan_present == 0 {
                return TC_ACT_UNSPEC;
            }
            if bpf_skb_vlan_pop(skb) != 0 {
                return TC_ACT_SHOT;
            }
            bpf_redirect_peer(TARGET.load(), 0) as i32
        }
    }

    /// Out of another interface, which may be the host's end of a pod's.
    #[classifier]
    pub fn floor_to(_: TcContext) -> i32 {
        // SAFETY: a helper without pointers.
        unsafe { bpf_redirect(TARGET.load(), 0) as i32 }
    }

    /// Nothing gets out.
    #[classifier]
    pub fn floor_shot(_: TcContext) -> i32 {
        TC_ACT_SHOT
    }

    /// Nothing gets in.
    #[xdp]
    pub fn floor_drop(_: XdpContext) -> u32 {
        xdp_action::XDP_DROP
    }
}

fabric_ebpf::frame!();

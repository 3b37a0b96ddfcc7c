//! Programs around the ones under test in BPF_PROG_TEST_RUN, which knows no VLAN tag beside the frame and runs a program
//! again on what the run before has left: they tag or untag the frame first, look at what came of it, or do nothing
//! (the yardstick for what the others cost).

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(
    target_arch = "bpf",
    expect(clippy::needless_pass_by_value, reason = "aya's macros hand a hook its context by value")
)]

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{
        Global,
        bindings::{TC_ACT_UNSPEC, xdp_action},
        helpers::{bpf_skb_vlan_pop, bpf_skb_vlan_push, bpf_xdp_adjust_head},
        macros::{classifier, map, xdp},
        maps::ProgramArray,
        programs::{TcContext, XdpContext},
    };

    const TPID_8021Q: [u8; 2] = [0x81, 0x00];

    /// The tag that `tagged_xdp` puts on. The others take theirs from `cb[3]`: tag protocol, tag control information.
    #[unsafe(no_mangle)]
    static TAG_CONTROL: Global<u16> = Global::new(0);

    /// The program under test, or a yardstick.
    #[map]
    static NEXT: ProgramArray = ProgramArray::with_max_entries(1, 0);
    #[map]
    static NEXT_XDP: ProgramArray = ProgramArray::with_max_entries(1, 0);

    #[classifier]
    pub fn empty_tc(_: TcContext) -> i32 {
        TC_ACT_UNSPEC
    }

    #[classifier]
    pub fn pop_tc(ctx: TcContext) -> i32 {
        pop(&ctx);
        TC_ACT_UNSPEC
    }

    #[classifier]
    pub fn push_tc(ctx: TcContext) -> i32 {
        push(&ctx);
        TC_ACT_UNSPEC
    }

    /// Runs the next program on the frame with a tag beside it.
    #[classifier]
    pub fn tagged(ctx: TcContext) -> i32 {
        push(&ctx);
        next(&ctx)
    }

    /// Runs the next program on the frame without a tag.
    #[classifier]
    pub fn untagged(ctx: TcContext) -> i32 {
        pop(&ctx);
        next(&ctx)
    }

    /// Runs the next program, and when it is run again says in `cb` what it left: 1, whether there is a tag, the tag.
    #[classifier]
    pub fn look(ctx: TcContext) -> i32 {
        // SAFETY: the pointer is the hook's argument; the verifier checks each field.
        unsafe {
            let skb = ctx.skb.skb;
            if (*skb).cb[0] == 0 {
                (*skb).cb[0] = 1;
                return next(&ctx);
            }
            (*skb).cb[1] = (*skb).vlan_present;
            (*skb).cb[2] = (*skb).vlan_tci;
        }
        TC_ACT_UNSPEC
    }

    #[inline(always)]
    fn push(ctx: &TcContext) {
        // SAFETY: the pointer is the hook's argument.
        unsafe {
            let skb = ctx.skb.skb;
            if (*skb).vlan_present == 0 {
                let tag = (*skb).cb[3];
                bpf_skb_vlan_push(skb, ((tag >> 16) as u16).to_be(), tag as u16);
            }
        }
    }

    #[inline(always)]
    fn pop(ctx: &TcContext) {
        // SAFETY: the pointer is the hook's argument.
        unsafe {
            let skb = ctx.skb.skb;
            if (*skb).vlan_present != 0 {
                bpf_skb_vlan_pop(skb);
            }
        }
    }

    #[inline(always)]
    fn next(ctx: &TcContext) -> i32 {
        // SAFETY: nothing of this program is used again.
        unsafe { NEXT.tail_call(ctx, 0) };
        TC_ACT_UNSPEC
    }

    #[xdp(frags)]
    pub fn empty_xdp(_: XdpContext) -> u32 {
        xdp_action::XDP_PASS
    }

    #[xdp(frags)]
    pub fn pop_xdp(ctx: XdpContext) -> u32 {
        // SAFETY: within the frame's memory, which is checked.
        unsafe {
            let start = ctx.data();
            if start + 18 <= ctx.data_end() {
                let macs = *(start as *const [u8; 12]);
                *((start + 4) as *mut [u8; 12]) = macs;
                bpf_xdp_adjust_head(ctx.ctx, 4);
            }
        }
        xdp_action::XDP_PASS
    }

    /// Runs the next program on the frame with a tag in it.
    #[xdp(frags)]
    pub fn tagged_xdp(ctx: XdpContext) -> u32 {
        // SAFETY: within the frame's memory, which is checked; nothing of this program is used after the tail call.
        unsafe {
            if ctx.data() + 14 <= ctx.data_end() && *((ctx.data() + 12) as *const [u8; 2]) != TPID_8021Q {
                bpf_xdp_adjust_head(ctx.ctx, -4);
                let start = ctx.data();
                if start + 18 <= ctx.data_end() {
                    let macs = *((start + 4) as *const [u8; 12]);
                    *(start as *mut [u8; 12]) = macs;
                    *((start + 12) as *mut [u8; 2]) = TPID_8021Q;
                    *((start + 14) as *mut [u8; 2]) = TAG_CONTROL.load().to_be_bytes();
                }
            }
            NEXT_XDP.tail_call(&ctx, 0);
        }
        xdp_action::XDP_ABORTED
    }
}

fabric_ebpf::frame!();

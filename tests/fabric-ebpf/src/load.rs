//! Programs that make the load of benchmarks: frames that nobody has to send by a socket, and one socket for answers to
//! many ports.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(
    target_arch = "bpf",
    expect(clippy::needless_pass_by_value, reason = "aya's macros hand a hook its context by value")
)]

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{
        Global,
        bindings::{sk_action::SK_PASS, xdp_action::XDP_ABORTED},
        helpers::bpf_redirect,
        macros::{map, sk_lookup, xdp},
        maps::SockMap,
        programs::{SkLookupContext, XdpContext},
    };

    /// The interface that frames leave by.
    #[unsafe(no_mangle)]
    static OUT: Global<u32> = Global::new(0);

    /// How frames begin: MACs, and a tag where there is one.
    #[unsafe(no_mangle)]
    static BEGIN: Global<u64> = Global::new(0);
    /// The next eight bytes.
    #[unsafe(no_mangle)]
    static BEGIN_REST: Global<u64> = Global::new(0);

    /// The socket that gets what comes for any port. Written by the client.
    #[map]
    static REPLIES: SockMap = SockMap::with_max_entries(1, 0);

    /// Sends each frame of a test run out of an interface. Frames come back here from where they were dropped, and a stack
    /// that took a tag out has moved the MACs: each begins anew as it should.
    #[xdp]
    pub fn load_feed(ctx: XdpContext) -> u32 {
        let start = ctx.data();
        if start + 16 > ctx.data_end() {
            return XDP_ABORTED;
        }
        // SAFETY: within the frame's memory, as just checked; a helper without pointers.
        unsafe {
            *(start as *mut [u64; 2]) = [BEGIN.load(), BEGIN_REST.load()];
            bpf_redirect(OUT.load(), 0) as u32
        }
    }

    /// Gives the socket what no other socket is connected for. Where there is none, the look-up goes on.
    #[sk_lookup]
    pub fn load_steer(ctx: SkLookupContext) -> u32 {
        let _ = REPLIES.redirect_sk_lookup(&ctx, 0, 0);
        SK_PASS
    }
}

fabric_ebpf::frame!();

//! What the kernel can do, asked before anything is changed. Probes decide, never
//! version numbers.

use std::fs;

use aya::{
    maps::MapType,
    programs::{ProgramError, ProgramType, SchedClassifier, TcAttachType},
    sys::{BpfHelper, SyscallError, is_helper_supported, is_map_supported},
};

use crate::error::whole;

/// Why the datapath cannot run here.
#[derive(Debug, thiserror::Error)]
pub enum FeatureError {
    /// The kernel lacks something.
    #[error(
        "this kernel ({kernel}) has no {feature}; eniway needs Linux 6.1 or later with CONFIG_BPF_SYSCALL, \
             CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS"
    )]
    Missing {
        /// What.
        feature: &'static str,
        /// The kernel's release.
        kernel: String,
    },
    /// A probe itself failed.
    #[error("cannot find out whether the kernel has {feature}: {}", whole(source))]
    Probe {
        /// What.
        feature: &'static str,
        /// What happened instead of an answer.
        source: ProgramError,
    },
}

/// How tc programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcKind {
    /// By links, which survive the agent as pins and are replaced in one step.
    Tcx,
    /// By filters of the clsact qdisc, on kernels without TCX.
    Clsact,
}

impl TcKind {
    /// As the status shows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// Probes for everything that the programs cannot do without, and says how tc programs are attached.
///
/// # Errors
///
/// When something is missing.
pub fn probe() -> Result<TcKind, FeatureError> {
    for (kind, feature) in [
        (MapType::PerCpuArray, "BPF per-CPU arrays"),
        (MapType::LruHash, "BPF LRU hash maps"),
        (MapType::LpmTrie, "BPF longest-prefix maps"),
    ] {
        need(feature, is_map_supported(kind).map_err(ProgramError::from))?;
    }
    need(
        "bpf_redirect_peer()",
        is_helper_supported(ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_redirect_peer),
    )?;
    // Only asks which programs the loopback interface has; nothing is attached.
    match SchedClassifier::query_tcx("lo", TcAttachType::Ingress) {
        Ok(_) => Ok(TcKind::Tcx),
        Err(ProgramError::SyscallError(SyscallError { io_error, .. }))
            if io_error.raw_os_error() == Some(libc::EINVAL) =>
        {
            Ok(TcKind::Clsact)
        }
        Err(source) => Err(FeatureError::Probe { feature: "TCX", source }),
    }
}

fn need(feature: &'static str, answer: Result<bool, ProgramError>) -> Result<(), FeatureError> {
    match answer {
        Ok(true) => Ok(()),
        Ok(false) => Err(FeatureError::Missing { feature, kernel: kernel_release() }),
        Err(source) => Err(FeatureError::Probe { feature, source }),
    }
}

fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "unknown release".to_owned(), |text| text.trim().to_owned())
}

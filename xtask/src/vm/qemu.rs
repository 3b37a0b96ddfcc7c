//! qemu: the machine's own, or Debian's unpacked.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use super::{Kernel, packages};
use crate::needs;

const PROGRAM: &str = "qemu-system-x86_64";
const PACKAGE: &str = "qemu-system-x86";

/// qemu for a machine that boots `kernel`, prints on our output and reports into a file.
pub(super) fn command(kernel: &Kernel, initramfs: &Path, report: &Path) -> Result<Command> {
    let mut qemu = program()?;
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    // Five levels of page tables would only make each walk longer.
    qemu.args(["-machine", "pc", "-cpu", "max,la57=off", "-m", "2048"]);
    qemu.args(["-accel", "tcg,thread=single", "-smp", "1", "-icount", "shift=0,sleep=off"]);
    // Seeds of hash tables and the place of the kernel decide what shares a bucket or a cache line.
    qemu.args(["-seed", "1", "-rtc", "base=2026-01-01,clock=vm"]);
    qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(initramfs);
    qemu.args(["-append", "console=ttyS0 loglevel=4 panic=-1 tsc=reliable nokaslr"]);
    qemu.args(["-serial", "stdio", "-serial"]).arg(format!("file:{}", report.display()));
    Ok(qemu)
}

fn program() -> Result<Command> {
    if let Some(installed) = needs::find_tool(PROGRAM) {
        return Ok(Command::new(installed));
    }
    let root = packages::with_needs(PACKAGE)?;
    let mut qemu = Command::new(root.join("usr/bin").join(PROGRAM));
    let libraries: Vec<PathBuf> =
        ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|dir| root.join(dir)).into();
    qemu.env("LD_LIBRARY_PATH", env::join_paths(libraries)?);
    qemu.env("QEMU_MODULE_DIR", root.join("usr/lib/x86_64-linux-gnu/qemu"));
    for data in ["qemu", "seabios"] {
        qemu.arg("-L").arg(root.join("usr/share").join(data));
    }
    Ok(qemu)
}

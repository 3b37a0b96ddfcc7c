//! Compiles a crate of BPF programs for `bpfel-unknown-none` from another crate's build script and leaves
//! the objects in that crate's `OUT_DIR`, where `aya::include_bytes_aligned!` finds them.
//!
//! Two toolchains can do it, tried in this order:
//!
//! 1. the active one (`RUSTC` if that is set), when it carries the sources of the core library;
//! 2. Debian's `rustc-web` with `rust-web-src`, as `RUSTC=/usr/bin/rustc`.
//!
//! Either runs with `RUSTC_BOOTSTRAP=1` and `-Z build-std=core`, and links with `bpf-linker`. Without
//! `bpf-linker` (or with `ENIWAY_BPF_STUB=1`) the objects are empty files, so that `cargo check`, clippy and
//! rustdoc work on any machine; a program that loads such a stub says so (see [`is_stub`]).

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

/// Debian's compiler with its own sources, for toolchains without `rust-src`.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// Whether an embedded object is the empty stand-in that is written where `bpf-linker` is missing.
pub const fn is_stub(object: &[u8]) -> bool {
    object.is_empty()
}

/// Builds every binary of the package `package`, found in `dir`, with these features, and copies the objects named in
/// `objects` into `OUT_DIR`. `watch` lists further directories (relative to `dir`) whose change asks for a rebuild.
///
/// # Errors
///
/// When neither toolchain can build the core library, or when compiling or linking fails.
pub fn build(package: &str, dir: &Path, objects: &[&str], watch: &[&str], features: &[&str]) -> Result<()> {
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR: not run from a build script")?);
    let dir = dir.canonicalize().with_context(|| format!("the BPF crate {}", dir.display()))?;
    println!("cargo::rerun-if-env-changed=ENIWAY_BPF_STUB");
    println!("cargo::rerun-if-changed={}", dir.join("src").display());
    println!("cargo::rerun-if-changed={}", dir.join("Cargo.toml").display());
    for extra in watch {
        println!("cargo::rerun-if-changed={}", dir.join(extra).display());
    }

    let linker = find_in_path("bpf-linker");
    match &linker {
        Some(path) => println!("cargo::rerun-if-changed={}", path.display()),
        // A file that does not exist makes cargo run the script again: the linker may be there by then.
        None => println!("cargo::rerun-if-changed={}", out_dir.join("no-bpf-linker").display()),
    }
    if linker.is_none() || env::var_os("ENIWAY_BPF_STUB").is_some_and(|v| v == "1") {
        for object in objects {
            fs::write(out_dir.join(object), [])?;
        }
        println!(
            "cargo::warning={package}: no bpf-linker, so the BPF objects are empty; `cargo xtask setup` installs it"
        );
        return Ok(());
    }

    // OUT_DIR is <target>/<profile>/build/<package>/out. All crates and profiles share one directory beside the profiles,
    // so that the core library is built once; cargo's lock on it is not the one that the calling cargo holds. With features it
    // is one of their own: the objects have the same names there.
    let target_dir =
        out_dir.ancestors().nth(4).unwrap_or(&out_dir).join([&["bpf"][..], features].concat().join("-"));
    let arch = env::var("CARGO_CFG_TARGET_ARCH").context("CARGO_CFG_TARGET_ARCH")?;
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(&dir)
        .args(["build", "--package", package, "--bins", "--release", "--locked"])
        .args(TARGET_ARGS)
        .arg("--target-dir")
        .arg(&target_dir)
        .args(["--features", &features.join(",")]);
    Compiler::find()?.prepare(&mut cargo, &arch);
    let status = cargo.status().with_context(|| format!("cannot run {cargo:?}"))?;
    if !status.success() {
        bail!("building {package} failed ({status}): {cargo:?}");
    }
    for object in objects {
        let built = target_dir.join("bpfel-unknown-none/release").join(object);
        fs::copy(&built, out_dir.join(object)).with_context(|| format!("copying {}", built.display()))?;
    }
    Ok(())
}

/// `--cfg bpf_target_arch` is what aya-ebpf selects its kernel bindings by; `--btf` makes the linker write
/// type information.
fn rustflags(arch: &str) -> String {
    [&format!("--cfg=bpf_target_arch=\"{arch}\""), "-Cdebuginfo=2", "-Clink-arg=--btf", "-Ctarget-cpu=v3"]
        .join("\x1f")
}

/// What a cargo command needs, besides the environment of [`Compiler::prepare`], to compile for BPF.
pub const TARGET_ARGS: [&str; 4] = ["--target", "bpfel-unknown-none", "-Z", "build-std=core"];

/// A compiler that has the sources of its own core library, which a target without a prebuilt one needs.
#[derive(Debug, Clone)]
pub struct Compiler {
    rustc: PathBuf,
}

impl Compiler {
    /// The active compiler if it has the sources, else Debian's.
    ///
    /// # Errors
    ///
    /// When neither has them; the text says how to get them.
    pub fn find() -> Result<Self> {
        let active = PathBuf::from(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
        if has_sources(&active) {
            return Ok(Self { rustc: active });
        }
        if has_sources(Path::new(DEBIAN_RUSTC)) {
            return Ok(Self { rustc: DEBIAN_RUSTC.into() });
        }
        bail!(
            "no compiler with the sources of the core library: neither {} nor {DEBIAN_RUSTC} has them. \
             Run `rustup component add rust-src`, or `apt-get install rustc-web rust-web-src`, or `cargo xtask setup`",
            active.display()
        )
    }

    /// The compiler's path, or its bare name where `PATH` decides.
    pub fn rustc(&self) -> &Path {
        &self.rustc
    }

    /// Whether this is Debian's compiler, which comes without cargo and with its tools in further packages.
    pub fn is_debian(&self) -> bool {
        self.rustc == Path::new(DEBIAN_RUSTC)
    }

    /// A tool of the same release (`rustdoc`, `cargo-clippy`): it lies beside the compiler.
    pub fn tool(&self, name: &str) -> PathBuf {
        self.rustc.with_file_name(name)
    }

    /// Sets the environment in which `cargo`, called with [`TARGET_ARGS`], compiles for BPF with this
    /// compiler, for kernels of the architecture `arch` (as in `CARGO_CFG_TARGET_ARCH`).
    pub fn prepare(&self, cargo: &mut Command, arch: &str) {
        cargo
            // Flags meant for the host (coverage, a native CPU) must not reach the BPF target.
            .env_remove("RUSTFLAGS")
            .env_remove("RUSTC_WRAPPER")
            .env_remove("RUSTC_WORKSPACE_WRAPPER")
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", rustflags(arch))
            .env("RUSTC", &self.rustc);
    }
}

fn has_sources(rustc: &Path) -> bool {
    let Ok(output) = Command::new(rustc).args(["--print", "sysroot"]).output() else { return false };
    let Ok(sysroot) = String::from_utf8(output.stdout) else { return false };
    output.status.success()
        && Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs").exists()
}

/// The first file named `program` in the directories of `PATH`.
pub fn find_in_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(program)).find(|path| path.is_file())
}

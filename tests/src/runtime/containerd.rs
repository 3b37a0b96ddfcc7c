//! containerd in the node's namespace, with its own files, and images made on the spot.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::{Node, SOON, io_error, plugin_binary};
use crate::lab::{Error, Result};

/// The image of every sandbox and container: busybox, which sleeps.
pub const IMAGE: &str = "localhost/busybox:1";

/// A containerd. Dropped, it is ended, with all that it had started.
pub struct Containerd {
    dir: PathBuf,
    child: Option<Child>,
}

impl Containerd {
    /// Writes its files and starts it on the node. Other plugins of the network's chain come after ours.
    ///
    /// # Errors
    ///
    /// When something cannot be made, or it does not answer.
    pub fn start(node: &Node, chain: &[Value]) -> Result<Self> {
        let dir = node.path("containerd");
        fs::create_dir_all(&dir).map_err(io_error("making containerd's directory"))?;
        let mut plugins = vec![node.plugin_conf()];
        plugins.extend_from_slice(chain);
        let conf = json!({ "cniVersion": "1.0.0", "name": "eniway", "plugins": plugins });
        fs::write(node.path("net.d/10-eniway.conflist"), conf.to_string())
            .map_err(io_error("writing the network configuration"))?;
        let bin = node.path("bin");
        fs::create_dir_all(&bin).map_err(io_error("making the plugins' directory"))?;
        let _ = std::os::unix::fs::symlink(plugin_binary()?, bin.join("eniway-cni"));
        for plugin in ["loopback", "portmap", "bandwidth"] {
            let _ = std::os::unix::fs::symlink(Path::new("/usr/lib/cni").join(plugin), bin.join(plugin));
        }
        let text = format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\n\
             disabled_plugins = [\"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.zfs\", \
             \"io.containerd.snapshotter.v1.aufs\", \"io.containerd.snapshotter.v1.devmapper\"]\n\
             [grpc]\naddress = {socket:?}\n\
             [plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"{IMAGE}\"\n\
             disable_apparmor = true\nrestrict_oom_score_adj = true\nnetns_mounts_under_state_dir = true\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"native\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = {bin:?}\nconf_dir = {conf:?}\n",
            root = dir.join("root"),
            state = dir.join("state"),
            socket = dir.join("containerd.sock"),
            conf = node.path("net.d"),
        );
        fs::write(dir.join("config.toml"), text).map_err(io_error("writing containerd's configuration"))?;
        let mut containerd = Self { dir, child: None };
        containerd.spawn(node)?;
        containerd.import(node)?;
        Ok(containerd)
    }

    /// Starts it again, after [`kill`](Self::kill).
    ///
    /// # Errors
    ///
    /// When it cannot be started or does not answer.
    pub fn spawn(&mut self, node: &Node) -> Result<()> {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.join("log"));
        let mut command = node.netns().command("containerd")?;
        command.arg("--config").arg(self.dir.join("config.toml"));
        command.stdout(Stdio::null()).stderr(log.map_err(io_error("opening containerd's log"))?);
        self.child = Some(command.spawn().map_err(io_error("starting containerd"))?);
        let end = Instant::now() + SOON;
        while !self.ctr(node)?.args(["version"]).output().is_ok_and(|output| output.status.success()) {
            if Instant::now() > end {
                return Err(Error::Unknown(format!("containerd does not answer\n{}", self.log())));
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Its socket, which serves the CRI, too.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    /// The last lines that it has logged.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }

    /// `ctr` of the CRI's containerd namespace.
    ///
    /// # Errors
    ///
    /// When the node has no namespace.
    pub fn ctr(&self, node: &Node) -> Result<Command> {
        let mut command = node.netns().command("ctr")?;
        command.arg("--address").arg(self.socket()).args(["--namespace", "k8s.io"]);
        Ok(command)
    }

    /// `ctr run --cni`, which looks for plugins and networks in fixed places: they are put there for it alone.
    ///
    /// # Errors
    ///
    /// When the container fails, with what it wrote.
    pub fn run_with_ctr(&self, node: &Node, id: &str, command: &str) -> Result<String> {
        let script = format!(
            "set -e; mkdir -p {up}/etc {up}/etcw {up}/opt {up}/optw; \
             mount -t overlay overlay -o lowerdir=/etc,upperdir={up}/etc,workdir={up}/etcw /etc; \
             mount -t overlay overlay -o lowerdir=/opt,upperdir={up}/opt,workdir={up}/optw /opt; \
             mkdir -p /etc/cni /opt/cni; ln -sfn {net} /etc/cni/net.d; ln -sfn {bin} /opt/cni/bin; \
             exec ctr --address {socket} --namespace k8s.io run --rm --cni --snapshotter native {IMAGE} {id} \
             /bin/sh -c '{command}'",
            up = self.dir.join("ctr").display(),
            net = node.path("net.d").display(),
            bin = node.path("bin").display(),
            socket = self.socket().display(),
        );
        // overlayfs wants its upper directory on another file system than overlay.
        fs::create_dir_all(self.dir.join("ctr")).map_err(io_error("making ctr's directory"))?;
        let mount = format!("mount -t tmpfs tmpfs {}; {script}", self.dir.join("ctr").display());
        node.netns().exec(&["unshare", "--mount", "--propagation", "private", "sh", "-c", &mount])
    }

    /// Kills the runtime. Sandboxes go on, as they do.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Kills everything that it ever started and that still runs, and takes its mounts away.
    pub fn kill_all(&mut self) {
        self.kill();
        let mark = self.dir.to_string_lossy().into_owned();
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let processes = self.processes(&mark);
            if processes.is_empty() || Instant::now() > end {
                break;
            }
            for pid in processes {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            thread::sleep(Duration::from_millis(50));
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let ours =
            mounts.lines().filter_map(|line| line.split(' ').nth(1)).filter(|path| path.starts_with(&mark));
        for path in ours.collect::<Vec<_>>().into_iter().rev() {
            let _ = nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH);
        }
    }

    /// The process ids of sandboxes and their shims: shims name the socket, sandboxes are their children.
    pub fn sandboxes(&self) -> Vec<i32> {
        let mark = self.dir.to_string_lossy().into_owned();
        let shims = shims(&mark);
        self.processes(&mark).into_iter().filter(|pid| !shims.contains(pid)).collect()
    }

    fn processes(&self, mark: &str) -> Vec<i32> {
        let mut found = shims(mark);
        let all = all_processes();
        loop {
            let more: Vec<i32> = all
                .iter()
                .filter(|(pid, parent)| found.contains(parent) && !found.contains(pid))
                .map(|(pid, _)| *pid)
                .collect();
            if more.is_empty() {
                // Of a shim that is dead: the sandbox runs on, with init for a parent, in a cgroup of ours.
                let cgroup = self.cgroup();
                let orphan = |pid: &i32| {
                    fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| text.contains(&cgroup))
                };
                found.extend(all.iter().map(|(pid, _)| *pid).filter(orphan));
                found.sort_unstable();
                found.dedup();
                return found;
            }
            found.extend(more);
        }
    }

    /// The cgroup below which sandboxes are.
    pub fn cgroup(&self) -> String {
        let name = self.dir.parent().and_then(Path::file_name).unwrap_or_default();
        format!("/{}", name.to_string_lossy())
    }

    fn import(&self, node: &Node) -> Result<()> {
        let build = self.dir.join("image");
        let run = |command: &mut Command| {
            let line = format!("{command:?}");
            let output = command.output().map_err(io_error(line.clone()))?;
            if output.status.success() {
                return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
            }
            Err(Error::Unknown(format!("{line}: {}", String::from_utf8_lossy(&output.stderr))))
        };
        let root = build.join("root/bin");
        fs::create_dir_all(&root).map_err(io_error("making the image"))?;
        fs::copy("/bin/busybox", root.join("busybox"))
            .map_err(io_error("copying busybox (package busybox-static)"))?;
        for name in ["sh", "sleep", "ip", "cat"] {
            let _ = std::os::unix::fs::symlink("busybox", root.join(name));
        }
        let layer = build.join("layer.tar");
        run(Command::new("tar").arg("-C").arg(build.join("root")).arg("-cf").arg(&layer).arg("."))?;
        let sum = run(Command::new("sha256sum").arg(&layer))?;
        let digest = sum.split(' ').next().unwrap_or_default();
        let config = json!({
            "architecture": if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" },
            "os": "linux",
            "config": { "Entrypoint": ["/bin/sleep", "1000000"], "Env": ["PATH=/bin"] },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] }
        });
        let manifest = json!([{ "Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"] }]);
        for (name, value) in [("config.json", &config), ("manifest.json", &manifest)] {
            fs::write(build.join(name), value.to_string()).map_err(io_error("writing the image"))?;
        }
        let archive = build.join("image.tar");
        let names = ["config.json", "manifest.json", "layer.tar"];
        run(Command::new("tar").arg("-C").arg(&build).arg("-cf").arg(&archive).args(names))?;
        run(self.ctr(node)?.args(["images", "import", "--snapshotter", "native"]).arg(&archive))?;
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.kill_all();
        for controller in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            remove_cgroups(&controller.path().join(self.cgroup().trim_start_matches('/')));
        }
        remove_cgroups(&Path::new("/sys/fs/cgroup").join(self.cgroup().trim_start_matches('/')));
    }
}

fn remove_cgroups(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    for _ in 0..50 {
        match fs::remove_dir(dir) {
            // A process that was killed takes a moment to leave.
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {
                thread::sleep(Duration::from_millis(20));
            }
            _ => return,
        }
    }
}

/// Shims of the containerd whose files are in this directory.
fn shims(dir: &str) -> Vec<i32> {
    let ours = |pid: &i32| {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| {
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains("containerd-shim") && line.contains(dir)
        })
    };
    all_processes().into_iter().map(|(pid, _)| pid).filter(ours).collect()
}

/// All processes, with their parents.
fn all_processes() -> Vec<(i32, i32)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // The name is in brackets and may hold anything.
            let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?;
            Some((pid, parent))
        })
        .collect()
}

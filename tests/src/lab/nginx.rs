//! nginx in a pod's namespace: `/` (the pod's name), `/whoami`, `/large`.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    path::PathBuf,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    error::{Error, Result},
    net,
    netns::Netns,
    remains::{self, Places},
};

/// A line of a pod's access log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// The client's end, as nginx saw it.
    pub remote: SocketAddrV4,
    /// nginx's own end.
    pub server: SocketAddrV4,
    /// The status of the answer.
    pub status: u16,
    /// The request, such as `GET /whoami HTTP/1.0`.
    pub request: String,
}

/// nginx of one pod.
pub(super) struct Nginx {
    dir: PathBuf,
    netns: Netns,
    places: Places,
    child: Child,
    leave: bool,
}

impl Nginx {
    /// Starts it without waiting. It listens on all addresses, so that the pod's own may come later.
    pub(super) fn start(places: &Places, netns: &Netns, pod: &str) -> Result<Self> {
        let dir = places.run().join("pods").join(pod);
        fs::create_dir_all(&dir).map_err(Error::io(format!("making {}", dir.display())))?;
        let file = dir.join("nginx.conf");
        let large = places.bulk().join("large");
        // One process, so that whoever kills it leaves no worker behind.
        let conf = format!(
            r#"master_process off;
pid nginx.pid;
error_log error.log;
events {{ worker_connections 1024; }}
http {{
  log_format lab '$remote_addr:$remote_port $server_addr:$server_port $status $request';
  access_log access.log lab;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  default_type text/plain;
  sendfile on;
  tcp_nopush on;
  server {{
    listen 80;
    location = / {{ return 200 "{pod}\n"; }}
    location = /whoami {{
      return 200 "pod {pod}\nserver $server_addr:$server_port\nremote $remote_addr:$remote_port\n";
    }}
    location = /large {{ alias {large}; }}
    location / {{ return 404; }}
  }}
}}
"#,
            large = large.display(),
        );
        fs::write(&file, conf).map_err(Error::io(format!("writing {}", file.display())))?;
        let child = netns
            .command("nginx")?
            .arg("-p")
            .arg(&dir)
            .arg("-c")
            .arg(&file)
            .args(["-e", "error.log", "-g", "daemon off;"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(Error::io("starting nginx (`apt-get install nginx-light`, or `cargo xtask setup`)"))?;
        remains::note_process(places, child.id(), &format!("nginx of {pod}"))?;
        Ok(Self { dir, netns: netns.clone(), places: places.clone(), child, leave: false })
    }

    /// Waits until it listens.
    pub(super) fn wait(&mut self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        let here = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 80);
        while net::tcp_connect(&self.netns, 0, here, Duration::from_millis(200)).is_err() {
            let ended = self.child.try_wait().ok().flatten();
            if let Some(status) = ended {
                return Err(Error::Command {
                    command: "nginx".into(),
                    netns: self.netns.name().into(),
                    status: status.to_string(),
                    stderr: fs::read_to_string(self.dir.join("error.log")).unwrap_or_default(),
                });
            }
            if Instant::now() > end {
                let what = format!("nginx listening in {}", self.netns);
                return Err(Error::Timeout { what, limit, detail: String::new() });
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    pub(super) fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Lets it run on when this value goes.
    pub(super) fn leave(&mut self) {
        self.leave = true;
    }

    pub(super) fn access_log(&self) -> Result<Vec<Access>> {
        let path = self.dir.join("access.log");
        let text = fs::read_to_string(&path).map_err(Error::io(format!("reading {}", path.display())))?;
        let line = |line: &str| {
            let mut words = line.splitn(4, ' ');
            Some(Access {
                remote: words.next()?.parse().ok()?,
                server: words.next()?.parse().ok()?,
                status: words.next()?.parse().ok()?,
                request: words.next()?.into(),
            })
        };
        Ok(text.lines().filter_map(line).collect())
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        if self.leave {
            return;
        }
        let pid = self.child.id();
        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        let _ = self.child.wait();
        remains::strike_process(&self.places, pid);
    }
}

//! An etcd of our own: on loopback, with free ports and a temporary directory, ended with the test.

#![expect(clippy::unwrap_used, reason = "test code")]
#![allow(dead_code, reason = "each test file uses its part")]

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::Duration,
};

use eniway_ipam::{EtcdSettings, EtcdStore, Store};

pub struct Etcd {
    process: Option<Child>,
    directory: tempfile::TempDir,
    client: u16,
    peer: u16,
}

impl Etcd {
    pub async fn start() -> Self {
        let (client, peer) = (free_port(), free_port());
        let mut etcd = Self { process: None, directory: tempfile::tempdir().unwrap(), client, peer };
        etcd.resume().await;
        etcd
    }

    /// Ends the server at once, as a crash does; the data stay.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    pub async fn resume(&mut self) {
        let client = format!("http://127.0.0.1:{}", self.client);
        let peer = format!("http://127.0.0.1:{}", self.peer);
        let process = Command::new("etcd")
            .arg("--data-dir")
            .arg(self.directory.path())
            .args(["--name", "test", "--log-level", "error"])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("test={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd cannot be started; install Debian's etcd-server (`cargo xtask setup`)");
        self.process = Some(process);
        let store = self.store();
        for _ in 0..200 {
            if store.range("").await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("etcd does not answer on {client}");
    }

    pub fn settings(&self) -> EtcdSettings {
        EtcdSettings::new(vec![format!("http://127.0.0.1:{}", self.client)])
    }

    pub fn store(&self) -> EtcdStore {
        EtcdStore::connect(&self.settings()).unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.process.as_ref().map_or(0, Child::id)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

//! A capture of what crosses the fabric's ports, as pcapng with the ports' names (for Wireshark, tshark, tcpdump).

use std::{
    fs::File,
    io::{self, BufWriter, Write as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    error::{Error, Result},
    netns::Netns,
    raw,
    sys::{PacketSocket, Received},
};

/// A running capture; ends when dropped.
#[derive(Debug)]
pub struct Capture {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Capture {
    pub(super) fn start(netns: &Netns, path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(Error::io(format!("capture file {}", path.display())))?;
        let (mut socket, ports) = netns
            .run(|| {
                let ports: Vec<(u32, String)> = nix::net::if_::if_nameindex()?
                    .iter()
                    .map(|port| (port.index(), port.name().to_string_lossy().into_owned()))
                    .collect();
                Ok((PacketSocket::open(0, true)?, ports))
            })?
            .map_err(Error::io(format!("capturing in {netns}")))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let name = path.display().to_string();
        let thread = std::thread::Builder::new()
            .name("capture".into())
            .spawn(move || {
                let work = || -> io::Result<()> {
                    let mut writer = Writer::new(BufWriter::new(file), &ports)?;
                    loop {
                        // What came before the end is written before the end.
                        let last = stopped.load(Ordering::Relaxed);
                        while let Some(frame) = socket.receive(Duration::ZERO)? {
                            writer.write(&frame)?;
                        }
                        writer.out.flush()?;
                        if last {
                            return Ok(());
                        }
                        if let Some(frame) = socket.receive(Duration::from_millis(20))? {
                            writer.write(&frame)?;
                        }
                    }
                };
                if let Err(error) = work() {
                    log::error!("capture {name}: {error}");
                }
            })
            .map_err(Error::io("starting a thread"))?;
        Ok(Self { path: path.into(), stop, thread: Some(thread) })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ends it. The file is complete on return.
    pub fn stop(self) {}
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Blocks of draft-ietf-opsawg-pcapng.
struct Writer<W> {
    out: W,
    /// By number of the interface block.
    ports: Vec<u32>,
}

impl<W: io::Write> Writer<W> {
    const SECTION: u32 = 0x0a0d_0d0a;
    const INTERFACE: u32 = 1;
    const PACKET: u32 = 6;

    fn new(out: W, ports: &[(u32, String)]) -> io::Result<Self> {
        let mut writer = Self { out, ports: Vec::new() };
        let mut section = Vec::new();
        section.extend(0x1a2b_3c4d_u32.to_ne_bytes());
        section.extend(1_u16.to_ne_bytes());
        section.extend(0_u16.to_ne_bytes());
        section.extend(u64::MAX.to_ne_bytes());
        writer.block(Self::SECTION, &section)?;
        for (ifindex, name) in ports {
            let mut interface = Vec::new();
            interface.extend(1_u16.to_ne_bytes());
            interface.extend(0_u16.to_ne_bytes());
            interface.extend(0_u32.to_ne_bytes());
            option(&mut interface, 2, name.as_bytes());
            option(&mut interface, 0, &[]);
            writer.block(Self::INTERFACE, &interface)?;
            writer.ports.push(*ifindex);
        }
        Ok(writer)
    }

    fn write(&mut self, frame: &Received) -> io::Result<()> {
        let Some(interface) = self.ports.iter().position(|port| *port == frame.ifindex) else {
            return Ok(());
        };
        let data = raw::with_tag(&frame.data, frame.tag);
        let micros = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
        let mut packet = Vec::with_capacity(data.len() + 40);
        packet.extend((interface as u32).to_ne_bytes());
        packet.extend(((micros >> 32) as u32).to_ne_bytes());
        packet.extend((micros as u32).to_ne_bytes());
        packet.extend((data.len() as u32).to_ne_bytes());
        packet.extend((data.len() as u32).to_ne_bytes());
        packet.extend(&data);
        pad(&mut packet);
        // epb_flags: 1 = inbound, 2 = outbound.
        option(&mut packet, 2, &(1 + u32::from(frame.outgoing)).to_ne_bytes());
        option(&mut packet, 0, &[]);
        self.block(Self::PACKET, &packet)
    }

    fn block(&mut self, kind: u32, body: &[u8]) -> io::Result<()> {
        let length = (body.len() as u32 + 12).to_ne_bytes();
        self.out.write_all(&kind.to_ne_bytes())?;
        self.out.write_all(&length)?;
        self.out.write_all(body)?;
        self.out.write_all(&length)
    }
}

fn option(block: &mut Vec<u8>, code: u16, value: &[u8]) {
    block.extend(code.to_ne_bytes());
    block.extend((value.len() as u16).to_ne_bytes());
    block.extend(value);
    pad(block);
}

/// Everything in the file stands at a multiple of four bytes.
fn pad(block: &mut Vec<u8>) {
    block.resize(block.len().next_multiple_of(4), 0);
}

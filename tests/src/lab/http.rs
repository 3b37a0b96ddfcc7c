//! A small HTTP client that chooses its source port and says what it saw.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    time::{Duration, Instant},
};

use super::{
    error::{Error, Result},
    large::Compare,
    net,
    netns::Netns,
};

/// A GET request.
#[derive(Clone, Debug)]
pub struct Request {
    to: SocketAddrV4,
    path: String,
    from: SocketAddrV4,
    timeout: Duration,
}

/// A response.
#[derive(Clone, Debug)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: Vec<u8>,
    /// The client's own end of the connection.
    pub local: SocketAddrV4,
    /// From the first SYN to the last byte.
    pub elapsed: Duration,
}

/// What `/whoami` of a pod's nginx says: the connection as the server saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whoami {
    /// The pod's name.
    pub pod: String,
    /// The server's end.
    pub server: SocketAddrV4,
    /// The client's end.
    pub remote: SocketAddrV4,
}

/// A download that was compared with the large file, byte by byte.
#[derive(Clone, Debug)]
pub struct Download {
    /// How long the body was.
    pub bytes: u64,
    /// The first byte that differed from the file.
    pub differs_at: Option<u64>,
    /// The client's own end of the connection.
    pub local: SocketAddrV4,
    /// From the first SYN to the last byte.
    pub elapsed: Duration,
}

impl Download {
    /// How fast it was.
    pub fn gbit_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.elapsed.as_secs_f64() / 1e9
    }
}

/// A GET with a source port of the kernel's choice.
///
/// # Errors
///
/// When there is no answer.
pub fn get(netns: &Netns, to: SocketAddrV4, path: &str) -> Result<Response> {
    Request::get(to, path).send(netns)
}

impl Request {
    /// A GET request.
    pub fn get(to: SocketAddrV4, path: &str) -> Self {
        Self {
            to,
            path: path.into(),
            from: SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0),
            timeout: Duration::from_secs(3),
        }
    }

    /// From this port; 0 (the default) = the kernel's choice. [`Lab::fresh_port`](super::Lab::fresh_port) gives one.
    #[must_use]
    pub fn from_port(mut self, port: u16) -> Self {
        self.from.set_port(port);
        self
    }

    /// From this address of the namespace.
    #[must_use]
    pub fn from_ip(mut self, ip: Ipv4Addr) -> Self {
        self.from.set_ip(ip);
        self
    }

    /// How long connecting may take, and any pause in the answer; default 3 s.
    #[must_use]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = limit;
        self
    }

    /// Sends it from a namespace and reads the answer.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn send(&self, netns: &Netns) -> Result<Response> {
        let mut body = Vec::new();
        let (status, local, elapsed) = self.receive(netns, |bytes| body.extend_from_slice(bytes))?;
        Ok(Response { status, body, local, elapsed })
    }

    /// Sends it from a namespace and compares the answer with the large file while it comes.
    ///
    /// # Errors
    ///
    /// When there is none. A difference is part of the result.
    pub fn send_large(&self, netns: &Netns) -> Result<Download> {
        let mut compare = Compare::default();
        let (status, local, elapsed) = self.receive(netns, |bytes| compare.feed(bytes))?;
        if status != 200 {
            return Err(Error::Protocol(format!("{} of {}: status {status}", self.path, self.to)));
        }
        Ok(Download { bytes: compare.offset, differs_at: compare.differs_at, local, elapsed })
    }

    fn receive(&self, netns: &Netns, body: impl FnMut(&[u8])) -> Result<(u16, SocketAddrV4, Duration)> {
        let what = || format!("GET {} of {} from {netns} port {}", self.path, self.to, self.from.port());
        // The thread's start is not the network's time.
        let connected = netns.run(|| {
            let start = Instant::now();
            net::connect_from(self.from, self.to, self.timeout).map(|stream| (stream, start))
        })?;
        let (mut stream, start) = connected.map_err(Error::io(what()))?;
        let local = net::v4(stream.local_addr().map_err(Error::io(what()))?);
        let status = self.exchange(&mut stream, body).map_err(Error::io(what()))?;
        Ok((status, local, start.elapsed()))
    }

    fn exchange(&self, stream: &mut TcpStream, mut body: impl FnMut(&[u8])) -> io::Result<u16> {
        stream.set_read_timeout(Some(self.timeout))?;
        stream.set_write_timeout(Some(self.timeout))?;
        // HTTP/1.0: the server closes at the end of the body, and never sends it in chunks.
        stream.write_all(format!("GET {} HTTP/1.0\r\nHost: {}\r\n\r\n", self.path, self.to).as_bytes())?;
        let mut buffer = vec![0; 256 << 10];
        let mut head: Vec<u8> = Vec::new();
        let status = loop {
            let length = stream.read(&mut buffer)?;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            head.extend(&buffer[..length]);
            if let Some(end) = head.windows(4).position(|window| window == b"\r\n\r\n") {
                let text = String::from_utf8_lossy(&head[..end]).into_owned();
                let status = text.split(' ').nth(1).and_then(|status| status.parse().ok());
                let status = status.ok_or_else(|| io::Error::other(format!("not HTTP: {text:?}")))?;
                body(&head[end + 4..]);
                let declared = text.lines().find_map(|line| {
                    let (name, value) = line.split_once(':')?;
                    name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<u64>().ok())?
                });
                break (status, declared, (head.len() - end - 4) as u64);
            }
        };
        let (status, declared, mut received) = status;
        loop {
            match stream.read(&mut buffer)? {
                0 => break,
                length => {
                    received += length as u64;
                    body(&buffer[..length]);
                }
            }
        }
        match declared {
            Some(declared) if declared != received => {
                Err(io::Error::other(format!("{received} of {declared} bytes came")))
            }
            _ => Ok(status),
        }
    }
}

impl Response {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body of `/whoami`.
    ///
    /// # Errors
    ///
    /// When it is something else.
    pub fn whoami(&self) -> Result<Whoami> {
        let text = self.text();
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let parse = || {
            Some(Whoami {
                pod: field("pod")?.into(),
                server: field("server")?.parse().ok()?,
                remote: field("remote")?.parse().ok()?,
            })
        };
        parse()
            .ok_or_else(|| Error::Protocol(format!("status {}, not a /whoami answer: {text:?}", self.status)))
    }
}

//! The large file: content that both ends know, so that every byte of a download is compared, at memory speed and
//! without a copy of the file.

use std::{
    fs::File,
    io::{self, Write as _},
    path::Path,
    sync::OnceLock,
};

/// The usual length: 100 MB.
pub const LENGTH: u64 = 100_000_000;

const BLOCK: usize = 1 << 20;

/// Every block begins with its number, so that a block out of place is found; the rest is the same noise.
const NUMBER: usize = 8;

fn noise() -> &'static [u8] {
    static NOISE: OnceLock<Vec<u8>> = OnceLock::new();
    NOISE.get_or_init(|| {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut noise = Vec::with_capacity(BLOCK);
        while noise.len() < BLOCK {
            // xorshift64 (Marsaglia).
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            noise.extend(state.to_le_bytes());
        }
        noise
    })
}

/// Writes a large file.
pub(super) fn write(path: &Path, length: u64) -> io::Result<()> {
    let mut file = File::create(path)?;
    let mut block = noise().to_vec();
    let mut left = length;
    for number in 0_u64.. {
        if left == 0 {
            break;
        }
        block[..NUMBER].copy_from_slice(&number.to_le_bytes());
        let part = left.min(BLOCK as u64);
        file.write_all(&block[..part as usize])?;
        left -= part;
    }
    file.flush()
}

/// Compares a stream with the large file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compare {
    /// Bytes so far.
    pub offset: u64,
    /// The first byte that differs.
    pub differs_at: Option<u64>,
}

impl Compare {
    /// Takes the next bytes of the stream.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let at = (self.offset % BLOCK as u64) as usize;
            let number = (self.offset / BLOCK as u64).to_le_bytes();
            let expected = if at < NUMBER { &number[at..] } else { &noise()[at..] };
            let (part, rest) = bytes.split_at(bytes.len().min(expected.len()));
            if part != &expected[..part.len()] && self.differs_at.is_none() {
                let same = part.iter().zip(expected).take_while(|(a, b)| a == b).count();
                self.differs_at = Some(self.offset + same as u64);
            }
            self.offset += part.len() as u64;
            bytes = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_byte_that_differs() {
        let path = std::env::temp_dir().join(format!("eniway-large-{}", std::process::id()));
        write(&path, 3 * BLOCK as u64 + 5).expect("writing a temporary file");
        let mut content = std::fs::read(&path).expect("reading it");
        std::fs::remove_file(&path).expect("removing it");
        assert_eq!(content.len(), 3 * BLOCK + 5);

        let mut good = Compare::default();
        content.chunks(1460).for_each(|chunk| good.feed(chunk));
        assert_eq!(good, Compare { offset: content.len() as u64, differs_at: None });

        content[2 * BLOCK + 3] ^= 1;
        let mut bad = Compare::default();
        content.chunks(65_000).for_each(|chunk| bad.feed(chunk));
        assert_eq!(bad.differs_at, Some(2 * BLOCK as u64 + 3));
    }
}

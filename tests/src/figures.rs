//! What benchmarks by the clock make figures with.

use std::{fs, io};

/// The value that so many of a hundred are not above; not a number where there are none.
pub fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    let index = (values.len() * percent).div_ceil(100).saturating_sub(1);
    values.get(index).copied().unwrap_or(f64::NAN)
}

/// To three places.
pub fn rounded(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// Memory of a process (`VmRSS`), in KiB.
///
/// # Errors
///
/// When there is no such process.
pub fn rss_kib(pid: u32) -> io::Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path)?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
    kib.ok_or_else(|| io::Error::other(format!("{path} does not say VmRSS")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let mut values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(
            [0, 25, 26, 50, 99, 100].map(|p| percentile(&mut values, p)),
            [1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
        );
        assert!(percentile(&mut [], 50).is_nan());
    }
}

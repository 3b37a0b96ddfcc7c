//! The lab itself: what it makes, and that nothing of it stays, while what others made does.

use std::{fs, path::Path, time::Duration};

use eniway_tests::lab::{self, Error, Lab, LabBuilder, NetnsGuard, Result, large, net};

fn small(id: &str) -> LabBuilder {
    Lab::builder(id)
        .node("n", [10, 1, 0, 10], [10, 1, 16, 10])
        .pod("p", "n", [10, 1, 18, 1])
        .vm("vm", [10, 1, 0, 20])
        .http_vip([10, 1, 0, 200], 80)
}

/// What there is of a lab: namespaces, directories, nginx processes.
fn traces(id: &str) -> Vec<String> {
    let prefix = format!("ew-{id}-");
    let dirs = ["/run/eniway-lab", "/sys/fs/bpf/eniway-lab", "/var/tmp/eniway-lab"];
    let paths = dirs.iter().map(|dir| format!("{dir}/{id}")).filter(|path| Path::new(path).exists());
    let namespaces = names("/run/netns").into_iter().filter(|name| name.starts_with(&prefix));
    let own = |pid: &String| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&format!("/run/eniway-lab/{id}/"))
    };
    paths.chain(namespaces).chain(names("/proc").into_iter().filter(own)).collect()
}

fn names(dir: &str) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

#[test]
fn leaves_nothing_behind() -> Result<()> {
    let lab = small("l-clean").build()?;
    lab.make_large_file(1000)?;
    assert_eq!(traces("l-clean").len(), 3 + 6 + 1, "{:?}", traces("l-clean"));
    assert!(matches!(small("l-clean").build(), Err(Error::Topology(text)) if text.contains("in use")));
    assert!(lab::remove("l-clean").is_err());
    lab.shutdown()?;
    assert_eq!(traces("l-clean"), [""; 0]);
    assert!(!Path::new("/run/eniway-lab/l-clean.lock").exists());
    Ok(())
}

#[test]
fn leftovers_are_found_and_strangers_are_left_alone() -> Result<()> {
    // What `keep` leaves is what a crash leaves.
    small("l-crash").build()?.keep();
    let stranger = NetnsGuard::create("ew-l-crash-stranger")?;
    assert!(net::ping(&stranger.netns().clone(), [127, 0, 0, 1].into(), Duration::from_secs(1)).is_ok());

    let lab = small("l-crash").build()?;
    net::ping(&lab.vm("vm")?.netns, lab.node("n")?.ip, Duration::from_secs(1))?;
    lab.keep();
    assert!(lab::remove("l-crash")?);
    assert_eq!(traces("l-crash"), ["ew-l-crash-stranger"]);
    assert!(!lab::remove("l-crash")?);
    drop(stranger);
    assert_eq!(traces("l-crash"), [""; 0]);
    Ok(())
}

#[test]
fn a_topology_that_cannot_be_is_refused() {
    let refused = |builder: LabBuilder, part: &str| match builder.build() {
        Err(Error::Topology(text)) => assert!(text.contains(part), "{text}"),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("built: {part}"),
    };
    refused(small("l-bad").pod("q", "n", [10, 1, 18, 1]), "twice");
    refused(small("l-bad").pod("q", "n", [10, 1, 0, 30]), "not in 10.1.16.0/22");
    refused(small("l-bad").pod("q", "m", [10, 1, 18, 2]), "node m");
    refused(small("l-bad").pod("vm", "n", [10, 1, 18, 2]), "twice");
    refused(small("l-bad").http_vip([10, 1, 0, 10], 80), "VIP");
    refused(small("L.bad"), "lab id");
    assert_eq!(traces("l-bad"), [""; 0]);
}

#[test]
fn the_large_file_is_as_long_as_asked() -> Result<()> {
    let lab = small("l-large").build()?;
    lab.make_large_file(3_000_000)?;
    let path = "/var/tmp/eniway-lab/l-large/large";
    let content = fs::read(path).map_err(Error::io(path))?;
    let mut compare = large::Compare::default();
    compare.feed(&content);
    assert_eq!((compare.offset, compare.differs_at), (3_000_000, None));
    lab.shutdown()
}

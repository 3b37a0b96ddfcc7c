//! Compiles the protobuf files under `proto/` without a system protoc.

use std::{error::Error, fs, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    // Of etcd we are only ever the client.
    compile("proto/etcd", false)?;
    compile("proto/eniway", true)
}

fn compile(directory: &str, server: bool) -> Result<(), Box<dyn Error>> {
    let mut files = Vec::new();
    find(Path::new(directory), &mut files)?;
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().build_server(server).compile_fds(descriptors)?;
    Ok(())
}

fn find(directory: &Path, files: &mut Vec<std::path::PathBuf>) -> Result<(), Box<dyn Error>> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "proto") {
            files.push(path);
        }
    }
    files.sort();
    Ok(())
}

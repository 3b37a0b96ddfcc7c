//! `eniway-cni install`: puts this program, and a network configuration that names it, where a runtime looks for them. An
//! image needs no shell for it.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use eniway_agent_api::{DEFAULT_SOCKET, StatusRequest};
use serde_json::{Value, json};

use crate::agent;

const USAGE: &str = "usage: eniway-cni install [--bin-dir DIR] [--conf-dir DIR] [--conf FILE] [--agent SOCKET] \
                     [--when-ready] [--stay]";

/// The program's name in the runtime's directory: what the configuration's `type` says.
const PROGRAM: &str = "eniway-cni";
/// Runtimes take the first by name.
const CONFIGURATION: &str = "10-eniway.conflist";
/// Between two questions to an agent that is not ready.
const PAUSE: Duration = Duration::from_millis(500);

/// Why nothing, or not all, is installed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InstallError {
    #[error("{0}; {USAGE}")]
    Usage(String),
    #[error("cannot {action} {}: {source}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is no list of plugins with {PROGRAM} in it: {problem}; see docs/cni.md", path.display())]
    Configuration { path: PathBuf, problem: String },
    #[error("cannot start: {0}")]
    Runtime(io::Error),
}

/// What the command line asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// Where the program goes.
    bin_dir: Option<PathBuf>,
    /// Where the configuration goes.
    conf_dir: Option<PathBuf>,
    /// Instead of the configuration that is built in.
    conf: Option<PathBuf>,
    agent: Option<String>,
    /// The configuration waits until the agent would add a pod: with it, kubelet takes the node for ready.
    when_ready: bool,
    /// Do not end: for a container that would be started again.
    stay: bool,
}

impl Options {
    pub(crate) fn parse(words: impl Iterator<Item = String>) -> Result<Self, InstallError> {
        let mut options = Self::default();
        let mut words = words;
        while let Some(word) = words.next() {
            let mut value = || {
                words.next().ok_or_else(|| InstallError::Usage(format!("`{word}` needs a value after it")))
            };
            match word.as_str() {
                "--bin-dir" => options.bin_dir = Some(value()?.into()),
                "--conf-dir" => options.conf_dir = Some(value()?.into()),
                "--conf" => options.conf = Some(value()?.into()),
                "--agent" => options.agent = Some(value()?),
                "--when-ready" => options.when_ready = true,
                "--stay" => options.stay = true,
                other => return Err(InstallError::Usage(format!("`{other}` is not known"))),
            }
        }
        if options.bin_dir.is_none() && options.conf_dir.is_none() {
            return Err(InstallError::Usage("neither --bin-dir nor --conf-dir is given".to_owned()));
        }
        Ok(options)
    }

    fn socket(&self) -> &str {
        self.agent.as_deref().unwrap_or(DEFAULT_SOCKET)
    }
}

/// Does it.
pub(crate) fn run(options: &Options) -> Result<(), InstallError> {
    // What is wrong with it is said before anything is changed.
    let configuration = configuration(options)?;
    if let Some(dir) = &options.bin_dir {
        let own = Path::new("/proc/self/exe");
        let read = |source| InstallError::File { action: "read", path: own.to_owned(), source };
        put(dir, PROGRAM, &fs::read(own).map_err(read)?, 0o755)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(InstallError::Runtime)?.block_on(async {
        // The first process of a container ends by no signal that it does not ask for.
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
            .map_err(InstallError::Runtime)?;
        tokio::select! {
            done = finish(options, &configuration) => done,
            _ = terminate.recv() => Ok(()),
        }
    })
}

async fn finish(options: &Options, configuration: &[u8]) -> Result<(), InstallError> {
    if options.when_ready {
        wait(options.socket()).await;
    }
    if let Some(dir) = &options.conf_dir {
        put(dir, CONFIGURATION, configuration, 0o644)?;
    }
    if options.stay {
        std::future::pending::<()>().await;
    }
    Ok(())
}

/// Waits until the agent would add a pod. Says on standard error what it waits for, once for each reason.
async fn wait(socket: &str) {
    let mut told = String::new();
    loop {
        let asked = agent::call(socket, async |mut agent| agent.status(StatusRequest {}).await).await;
        let problem = match asked {
            Ok(status) if status.problem.is_empty() => return,
            Ok(status) => status.problem,
            Err(error) => error.to_string(),
        };
        if problem != told {
            eprintln!("eniway-cni: waiting: {problem}");
            told = problem;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn configuration(options: &Options) -> Result<Vec<u8>, InstallError> {
    let Some(path) = &options.conf else {
        let capabilities = json!({ "io.kubernetes.cri.pod-annotations": true, "bandwidth": true });
        let mut plugin = json!({ "type": PROGRAM, "capabilities": capabilities });
        if let Some(agent) = &options.agent {
            plugin["agent"] = json!(agent);
        }
        let port_map = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
        let list = json!({ "cniVersion": "1.0.0", "name": "eniway", "plugins": [plugin, port_map] });
        return Ok(format!("{list:#}\n").into_bytes());
    };
    let read = |source| InstallError::File { action: "read", path: path.clone(), source };
    let text = fs::read(path).map_err(read)?;
    let wrong = |problem: String| InstallError::Configuration { path: path.clone(), problem };
    let list: Value = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    let plugins = list["plugins"].as_array().ok_or_else(|| wrong("it has no `plugins`".to_owned()))?;
    if plugins.iter().any(|plugin| plugin["type"] == PROGRAM) {
        Ok(text)
    } else {
        Err(wrong(format!("none of its plugins has the type {PROGRAM}")))
    }
}

/// Puts a file into a directory whole: who looks meanwhile sees the old one or the new one, and a program that runs is not
/// written to.
fn put(dir: &Path, name: &str, content: &[u8], mode: u32) -> Result<(), InstallError> {
    let path = dir.join(name);
    // No name that a runtime would read as a configuration.
    let draft = dir.join(format!(".{name}.new"));
    let error = |action, path: &Path| {
        let path = path.to_owned();
        move |source| InstallError::File { action, path, source }
    };
    // One that an interrupted installation has left may have other rights.
    match fs::remove_file(&draft) {
        Err(gone) if gone.kind() != io::ErrorKind::NotFound => return Err(error("remove", &draft)(gone)),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&draft)
        .map_err(error("make", &draft))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(error("write", &draft))?;
    drop(file);
    fs::rename(&draft, &path).map_err(error("replace", &path))?;
    println!("installed {}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use super::*;

    fn options(words: &str) -> Result<Options, String> {
        let words = words.split_whitespace().map(str::to_owned);
        Options::parse(words).map_err(|error| error.to_string())
    }

    fn dir(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("ewc-install-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn the_command_line_is_read_in_full_or_refused() {
        let read = options("--bin-dir /b --conf-dir /c --agent /a.sock --when-ready --stay").unwrap();
        assert_eq!(read.bin_dir.as_deref(), Some(Path::new("/b")));
        assert_eq!(read.socket(), "/a.sock");
        assert!(read.when_ready && read.stay);
        assert_eq!(options("--conf-dir /c").unwrap().socket(), "/run/eniway/agent.sock");
        for (words, said) in [
            ("", "neither"),
            ("--bin-dir", "needs a value"),
            ("--bin-dir /b --wait", "`--wait` is not known"),
        ] {
            let error = options(words).unwrap_err();
            assert!(error.contains(said) && error.contains("usage: "), "{error}");
        }
    }

    #[test]
    fn the_program_is_replaced_whole_while_it_runs() {
        let dir = dir("program");
        fs::write(dir.join(PROGRAM), "old").unwrap();
        fs::write(dir.join(".eniway-cni.new"), "left by an interrupted one").unwrap();
        let before = fs::File::open(dir.join(PROGRAM)).unwrap();
        run(&options(&format!("--bin-dir {}", dir.display())).unwrap()).unwrap();
        let path = dir.join(PROGRAM);
        let metadata = path.metadata().unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o755);
        assert_eq!(metadata.len(), fs::metadata("/proc/self/exe").unwrap().len());
        assert_ne!(metadata.ino(), before.metadata().unwrap().ino());
        assert_eq!(before.metadata().unwrap().len(), 3, "who had it open keeps what it was");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_configuration_that_does_not_name_the_plugin_changes_nothing() {
        let dir = dir("conf");
        let conf = dir.join("mine.json");
        let target = dir.join("net.d");
        fs::create_dir(&target).unwrap();
        let words = format!("--bin-dir {0} --conf-dir {0} --conf {1}", target.display(), conf.display());
        for (text, said) in [("{", "EOF"), ("{}", "no `plugins`"), (r#"{"plugins":[{"type":"x"}]}"#, "none")]
        {
            fs::write(&conf, text).unwrap();
            let error = run(&options(&words).unwrap()).unwrap_err().to_string();
            assert!(error.contains(said) && error.contains("mine.json"), "{error}");
            assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
        }
        let good = r#"{"plugins":[{"type":"eniway-cni"}]}"#;
        fs::write(&conf, good).unwrap();
        let words = format!("--conf-dir {} --conf {}", target.display(), conf.display());
        run(&options(&words).unwrap()).unwrap();
        assert_eq!(fs::read_to_string(target.join(CONFIGURATION)).unwrap(), good);
        fs::remove_dir_all(dir).unwrap();
    }

    /// As docs/cni.md shows it: limits of bandwidth, among others, are handed over only where the list claims them.
    #[test]
    fn the_configuration_that_is_built_in_is_the_documented_one() {
        let page = include_str!("../../docs/cni.md");
        let shown = page.split("```json\n").nth(1).unwrap().split("```").next().unwrap();
        let built_in = configuration(&options("--conf-dir /c").unwrap()).unwrap();
        let read = |text: &[u8]| serde_json::from_slice::<Value>(text).unwrap();
        assert_eq!(read(&built_in), read(shown.as_bytes()));
    }

    #[test]
    fn the_configuration_that_is_built_in_names_the_socket_it_was_told() {
        let text = configuration(&options("--conf-dir /c --agent /x/a.sock").unwrap()).unwrap();
        let list: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(list["plugins"][0]["type"], PROGRAM);
        assert_eq!(list["plugins"][0]["agent"], "/x/a.sock");
        assert_eq!(list["plugins"][1]["type"], "portmap");
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let error = run(&options("--bin-dir /nonexistent/bin").unwrap()).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/bin"), "{error}");
    }
}

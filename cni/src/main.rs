//! `eniway-cni`: what a container runtime runs to give a sandbox its network, after the CNI specification 1.1. It knows
//! nothing; it asks the node's agent over its socket, and says what the agent says in the runtime's words. Run by people
//! or by a container of its own, `eniway-cni install` puts it in place.

mod agent;
mod config;
mod error;
mod install;
mod result;

use std::{
    io::{Read as _, Write as _},
    process::ExitCode,
};

use eniway_agent_api::{AddRequest, Attachment, CheckRequest, DelRequest, GcRequest, StatusRequest};
use serde_json::json;

use self::{
    config::{Command, Environment, NetConf, VERSIONS, Version},
    error::{Code, Error},
    result::NetResult,
};

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    // Runtimes give no arguments.
    if words.next().as_deref() == Some("install") {
        let done = install::Options::parse(words).and_then(|options| install::run(&options));
        return match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("eniway-cni: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let mut text = Vec::new();
    let read = std::io::stdin().read_to_end(&mut text);
    let asked = Version::asked(&text);
    let done = match read {
        Ok(_) => run(&text),
        Err(error) => Err(Error::new(Code::Io, format!("cannot read the network configuration: {error}"))),
    };
    let (output, exit) = match done {
        Ok(output) => (output, ExitCode::SUCCESS),
        Err(error) => (error.json(asked.as_deref()), ExitCode::FAILURE),
    };
    if output.is_empty() {
        return exit;
    }
    // A runtime that does not read has gone; there is nobody to tell.
    let _ = std::io::stdout().write_all(output.as_bytes());
    exit
}

/// Does what is asked. Answers with what goes to standard output.
fn run(text: &[u8]) -> Result<String, Error> {
    let environment = Environment::read()?;
    if environment.command == Command::Version {
        let version = Version::asked(text).unwrap_or_else(|| Version::NEWEST.to_string());
        return Ok(json!({ "cniVersion": version, "supportedVersions": VERSIONS }).to_string());
    }
    let conf = NetConf::parse(text, environment.command)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::new(Code::Io, format!("cannot start: {error}")))?;
    runtime.block_on(ask(&environment, conf))
}

async fn ask(environment: &Environment, conf: NetConf) -> Result<String, Error> {
    let socket = conf.socket();
    match environment.command {
        Command::Version => Ok(String::new()),
        Command::Add => {
            let request = add_request(environment, &conf)?;
            let netns = request.netns.clone();
            let answer = agent::call(socket, async |mut agent| agent.add(request).await).await?;
            let previous = conf.previous()?;
            let result = NetResult::of(&answer, environment.interface()?, &netns).after(previous);
            Ok(result.json(conf.version))
        }
        Command::Del => {
            let request =
                DelRequest { attachment: Some(environment.attachment()?), pod: Some(environment.pod()) };
            agent::call(socket, async |mut agent| agent.del(request).await).await?;
            Ok(String::new())
        }
        Command::Check => {
            let attachment = environment.attachment()?;
            let previous = conf.previous()?.ok_or_else(|| {
                Error::new(Code::Config, "prevResult is missing: CHECK compares with what ADD has said")
            })?;
            let netns = environment.netns()?.to_owned();
            let addresses = previous.addresses_of(&attachment.interface, &netns)?;
            let request = CheckRequest { attachment: Some(attachment), netns, addresses };
            agent::call(socket, async |mut agent| agent.check(request).await).await?;
            Ok(String::new())
        }
        Command::Status => {
            let asked = agent::call(socket, async |mut agent| agent.status(StatusRequest {}).await).await;
            match asked {
                Ok(status) if status.problem.is_empty() => Ok(String::new()),
                Ok(status) => Err(Error::new(Code::NotAvailable, status.problem)),
                Err(error) => Err(error.with(Code::NotAvailable)),
            }
        }
        Command::Gc => {
            let valid = conf.valid_attachments()?.iter().map(|valid| Attachment {
                container_id: valid.container_id.clone(),
                interface: valid.ifname.clone(),
            });
            let request = GcRequest { valid: valid.collect() };
            agent::call(socket, async |mut agent| agent.gc(request).await).await?;
            Ok(String::new())
        }
    }
}

fn add_request(environment: &Environment, conf: &NetConf) -> Result<AddRequest, Error> {
    Ok(AddRequest {
        attachment: Some(environment.attachment()?),
        pod: Some(environment.pod()),
        netns: environment.netns()?.to_owned(),
        mode: conf.mode()?.into(),
        mtu: conf.mtu,
        routes: conf.routes(),
        sysctls: conf.sysctls(),
        bandwidth: conf.bandwidth()?,
    })
}

//! What the runtime hands over: variables of the environment, and the network configuration on standard input.

use std::{collections::BTreeMap, env};

use eniway_agent_api::{self as api, DEFAULT_SOCKET, Mode};
use serde::{Deserialize, Deserializer};

use crate::{
    error::{Code, Error},
    result::NetResult,
};

/// The versions of the specification that are spoken, oldest first.
pub(crate) const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// One of [`VERSIONS`]; newer ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(usize);

impl Version {
    pub(crate) const NEWEST: Self = Self(VERSIONS.len() - 1);
    /// The first with CHECK.
    const CHECK: Self = Self(2);
    /// The first whose addresses do not say of which family they are.
    pub(crate) const PLAIN_ADDRESSES: Self = Self(3);
    /// The first with STATUS and GC, and with more to say of interfaces.
    pub(crate) const STATUS: Self = Self(4);

    pub(crate) fn name(self) -> &'static str {
        VERSIONS[self.0]
    }

    fn parse(name: &str) -> Option<Self> {
        VERSIONS.iter().position(|version| *version == name).map(Self)
    }

    /// What the runtime speaks, as far as it can be read.
    pub(crate) fn asked(text: &[u8]) -> Option<String> {
        #[derive(Deserialize)]
        struct Only {
            #[serde(rename = "cniVersion")]
            version: String,
        }
        serde_json::from_slice::<Only>(text).ok().map(|only| only.version)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Add,
    Del,
    Check,
    Status,
    Gc,
    Version,
}

/// The environment.
#[derive(Debug)]
pub(crate) struct Environment {
    pub(crate) command: Command,
    variables: BTreeMap<&'static str, String>,
    arguments: BTreeMap<String, String>,
}

const CONTAINER: &str = "CNI_CONTAINERID";
const NETNS: &str = "CNI_NETNS";
const INTERFACE: &str = "CNI_IFNAME";

impl Environment {
    pub(crate) fn read() -> Result<Self, Error> {
        let variable = |name| env::var(name).ok().filter(|value| !value.is_empty());
        let command = match variable("CNI_COMMAND").as_deref() {
            Some("ADD") => Command::Add,
            Some("DEL") => Command::Del,
            Some("CHECK") => Command::Check,
            Some("STATUS") => Command::Status,
            Some("GC") => Command::Gc,
            Some("VERSION") => Command::Version,
            Some(other) => {
                return Err(wrong(format!("CNI_COMMAND is {other}, which this plugin does not know")));
            }
            None => {
                return Err(wrong(
                    "CNI_COMMAND is not set: this program is run by container runtimes, see docs/cni.md"
                        .to_owned(),
                ));
            }
        };
        let variables = [CONTAINER, NETNS, INTERFACE]
            .into_iter()
            .filter_map(|name| Some((name, variable(name)?)))
            .collect();
        Ok(Self { command, variables, arguments: arguments(&variable("CNI_ARGS").unwrap_or_default())? })
    }

    fn need(&self, name: &'static str) -> Result<&str, Error> {
        self.variables.get(name).map(String::as_str).ok_or_else(|| wrong(format!("{name} is not set")))
    }

    pub(crate) fn interface(&self) -> Result<&str, Error> {
        let name = self.need(INTERFACE)?;
        let fits = name.len() < 16 && name != "." && name != "..";
        if !fits || name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control()) {
            return Err(wrong(format!("{INTERFACE}: `{name}` cannot be an interface's name")));
        }
        Ok(name)
    }

    pub(crate) fn netns(&self) -> Result<&str, Error> {
        self.need(NETNS)
    }

    pub(crate) fn attachment(&self) -> Result<api::Attachment, Error> {
        let id = self.need(CONTAINER)?;
        if !api::is_container_id(id) {
            let rule = "1 to 128 letters, digits, `_`, `.` and `-`, the first a letter or digit";
            return Err(wrong(format!("{CONTAINER}: `{id}` is not {rule}")));
        }
        Ok(api::Attachment { container_id: id.to_owned(), interface: self.interface()?.to_owned() })
    }

    /// The pod, as far as the runtime names it.
    pub(crate) fn pod(&self) -> api::Pod {
        let argument = |name| self.arguments.get(name).cloned().unwrap_or_default();
        api::Pod {
            namespace: argument("K8S_POD_NAMESPACE"),
            name: argument("K8S_POD_NAME"),
            uid: argument("K8S_POD_UID"),
        }
    }
}

fn wrong(message: String) -> Error {
    Error::new(Code::Environment, message)
}

/// `A=1;B=2`. Arguments of other plugins are none of ours.
fn arguments(text: &str) -> Result<BTreeMap<String, String>, Error> {
    text.split(';')
        .filter(|pair| !pair.is_empty())
        .map(|pair| match pair.split_once('=') {
            Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
            None => Err(wrong(format!("CNI_ARGS: `{pair}` is not of the form NAME=VALUE"))),
        })
        .collect()
}

/// The network configuration. What other plugins of the chain read is left to them.
#[derive(Debug, Deserialize)]
pub(crate) struct NetConf {
    #[serde(skip, default = "newest")]
    pub(crate) version: Version,
    #[serde(default)]
    name: String,
    /// The agent's socket.
    #[serde(default)]
    agent: Option<String>,
    #[serde(default)]
    mode: Option<String>,
    #[serde(default)]
    pub(crate) mtu: u32,
    #[serde(default, deserialize_with = "or_null")]
    routes: Vec<Route>,
    #[serde(default, deserialize_with = "or_null")]
    sysctls: BTreeMap<String, String>,
    #[serde(default, rename = "runtimeConfig", deserialize_with = "or_null")]
    runtime: RuntimeConfig,
    #[serde(default, rename = "prevResult")]
    previous: Option<serde_json::Value>,
    #[serde(default, rename = "cni.dev/valid-attachments")]
    valid: Option<Vec<Valid>>,
}

/// What is not there is null at times: containerd writes so of a pod without annotations.
pub(crate) fn or_null<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

fn newest() -> Version {
    Version::NEWEST
}

#[derive(Debug, Deserialize)]
struct Route {
    dst: String,
    #[serde(default)]
    gw: String,
}

/// What the runtime hands over for capabilities that the configuration claims.
#[derive(Debug, Default, Deserialize)]
struct RuntimeConfig {
    #[serde(default, rename = "io.kubernetes.cri.pod-annotations", deserialize_with = "or_null")]
    annotations: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "or_null")]
    bandwidth: Bandwidth,
}

/// Capability `bandwidth`, as of the CNI's conventions: bits per second, and bits. Runtimes make it of the pod annotations
/// `kubernetes.io/ingress-bandwidth` and `kubernetes.io/egress-bandwidth`. containerd writes the names with a capital (go-cni
/// gives none of its own), which the Go plugins read as well.
#[derive(Debug, Default, Deserialize)]
struct Bandwidth {
    #[serde(default, rename = "ingressRate", alias = "IngressRate", deserialize_with = "or_null")]
    ingress_rate: u64,
    #[serde(default, rename = "ingressBurst", alias = "IngressBurst", deserialize_with = "or_null")]
    ingress_burst: u64,
    #[serde(default, rename = "egressRate", alias = "EgressRate", deserialize_with = "or_null")]
    egress_rate: u64,
    #[serde(default, rename = "egressBurst", alias = "EgressBurst", deserialize_with = "or_null")]
    egress_burst: u64,
}

/// An attachment that a runtime knows.
#[derive(Debug, Deserialize)]
pub(crate) struct Valid {
    #[serde(rename = "containerID")]
    pub(crate) container_id: String,
    pub(crate) ifname: String,
}

/// The pod annotation that chooses the mode.
const MODE_ANNOTATION: &str = "eniway/mode";
/// Pod annotations for bursts, in bits, which the runtime's own annotations know nothing of.
const INGRESS_BURST_ANNOTATION: &str = "eniway/ingress-burst";
const EGRESS_BURST_ANNOTATION: &str = "eniway/egress-burst";

impl NetConf {
    pub(crate) fn parse(text: &[u8], command: Command) -> Result<Self, Error> {
        let decode = |error| {
            Error::new(Code::Decode, format!("the network configuration is not as it should be: {error}"))
        };
        let mut conf: Self = serde_json::from_slice(text).map_err(decode)?;
        // The specification's default.
        let asked = Version::asked(text).unwrap_or_else(|| "0.1.0".to_owned());
        conf.version = Version::parse(&asked).ok_or_else(|| {
            let known = VERSIONS.join(", ");
            Error::new(Code::Version, format!("cniVersion {asked} is not spoken here, but {known} are"))
        })?;
        let first = match command {
            Command::Check => Version::CHECK,
            Command::Status | Command::Gc => Version::STATUS,
            Command::Add | Command::Del | Command::Version => Version(0),
        };
        if conf.version < first {
            let message =
                format!("cniVersion {asked} does not have this command; {first} is the first that has");
            return Err(Error::new(Code::Version, message));
        }
        if conf.name.is_empty() {
            return Err(Error::new(Code::Config, "`name` of the network is missing"));
        }
        Ok(conf)
    }

    pub(crate) fn socket(&self) -> &str {
        self.agent.as_deref().unwrap_or(DEFAULT_SOCKET)
    }

    /// The pod's annotation holds before the network's setting.
    pub(crate) fn mode(&self) -> Result<Mode, Error> {
        let annotation = self.runtime.annotations.get(MODE_ANNOTATION);
        match annotation.or(self.mode.as_ref()).map(String::as_str) {
            None | Some("") => Ok(Mode::Unspecified),
            Some("sub-eni") => Ok(Mode::SubEni),
            Some("exclusive-eni") => Ok(Mode::ExclusiveEni),
            Some(other) => {
                let place = if annotation.is_some() { "annotation eniway/mode" } else { "`mode`" };
                let message = format!("{place}: `{other}` is neither `sub-eni` nor `exclusive-eni`");
                Err(Error::new(Code::Config, message))
            }
        }
    }

    /// What the runtime asks for. Without the capability there is nothing, and limits are left to other plugins of the chain.
    pub(crate) fn bandwidth(&self) -> Result<Option<api::Bandwidth>, Error> {
        let asked = &self.runtime.bandwidth;
        let burst = |annotation: &str, rate: u64, asked: u64| match self.runtime.annotations.get(annotation) {
            // Without a rate there is no limit that it could be the burst of.
            Some(text) if rate != 0 => quantity(text).ok_or_else(|| {
                let message =
                    format!("annotation {annotation}: `{text}` is not a number of bits, such as 4M or 4Mi");
                Error::new(Code::Config, message)
            }),
            _ => Ok(asked),
        };
        let bandwidth = api::Bandwidth {
            ingress_rate: asked.ingress_rate,
            ingress_burst: burst(INGRESS_BURST_ANNOTATION, asked.ingress_rate, asked.ingress_burst)?,
            egress_rate: asked.egress_rate,
            egress_burst: burst(EGRESS_BURST_ANNOTATION, asked.egress_rate, asked.egress_burst)?,
        };
        Ok((bandwidth != api::Bandwidth::default()).then_some(bandwidth))
    }

    pub(crate) fn routes(&self) -> Vec<api::Route> {
        let route = |route: &Route| api::Route { destination: route.dst.clone(), gateway: route.gw.clone() };
        self.routes.iter().map(route).collect()
    }

    pub(crate) fn sysctls(&self) -> Vec<api::Sysctl> {
        let sysctl =
            |(key, value): (&String, &String)| api::Sysctl { key: key.clone(), value: value.clone() };
        self.sysctls.iter().map(sysctl).collect()
    }

    /// What the chain has said so far.
    pub(crate) fn previous(&self) -> Result<Option<NetResult>, Error> {
        let Some(previous) = &self.previous else { return Ok(None) };
        serde_json::from_value(previous.clone())
            .map(Some)
            .map_err(|error| Error::new(Code::Decode, format!("prevResult is not as it should be: {error}")))
    }

    /// What the runtime knows. Without a list nothing is known, and nothing may be removed.
    pub(crate) fn valid_attachments(&self) -> Result<&[Valid], Error> {
        self.valid.as_deref().ok_or_else(|| {
            Error::new(Code::Config, "`cni.dev/valid-attachments` is missing: GC removes what is not in it")
        })
    }
}

/// A whole number with one of Kubernetes' suffixes.
fn quantity(text: &str) -> Option<u64> {
    const UNITS: [(&str, u64); 8] = [
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
    ];
    let unit = UNITS.iter().find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit)));
    let (digits, unit) = unit.unwrap_or((text, 1));
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse::<u64>().ok()?.checked_mul(unit))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, command: Command) -> Result<NetConf, Error> {
        NetConf::parse(text.as_bytes(), command)
    }

    #[test]
    fn versions_are_negotiated() {
        let conf =
            |version: &str| format!(r#"{{"cniVersion": "{version}", "name": "n", "type": "eniway-cni"}}"#);
        for version in VERSIONS {
            assert_eq!(parse(&conf(version), Command::Add).unwrap().version.name(), version);
        }
        for (version, command) in [
            ("0.2.0", Command::Add),
            ("2.0.0", Command::Add),
            ("0.3.1", Command::Check),
            ("1.0.0", Command::Gc),
        ] {
            assert_eq!(parse(&conf(version), command).unwrap_err().code, Code::Version, "{version}");
        }
        assert_eq!(parse("{", Command::Add).unwrap_err().code, Code::Decode);
        assert_eq!(parse(r#"{"cniVersion": "1.0.0"}"#, Command::Add).unwrap_err().code, Code::Config);
    }

    #[test]
    fn the_annotation_holds_before_the_network() {
        let conf = |mode: &str, annotation: &str| {
            let text = format!(
                r#"{{"cniVersion": "1.1.0", "name": "n", "mode": "{mode}",
                "runtimeConfig": {{"io.kubernetes.cri.pod-annotations": {{"eniway/mode": "{annotation}"}}}}}}"#
            );
            parse(&text, Command::Add).unwrap().mode()
        };
        assert_eq!(conf("sub-eni", "exclusive-eni").unwrap(), Mode::ExclusiveEni);
        assert_eq!(conf("sub-eni", "").unwrap(), Mode::Unspecified);
        assert_eq!(conf("", "eni").unwrap_err().code, Code::Config);
    }

    #[test]
    fn limits_are_the_runtimes_with_bursts_of_annotations() {
        let conf = |bandwidth: &str, annotations: &str| {
            let text = format!(
                r#"{{"cniVersion": "1.1.0", "name": "n", "runtimeConfig": {{"bandwidth": {bandwidth},
                "io.kubernetes.cri.pod-annotations": {annotations}}}}}"#
            );
            parse(&text, Command::Add).and_then(|conf| conf.bandwidth())
        };
        let egress = r#"{"egressRate": 10000000, "egressBurst": 4294967295, "ingressRate": 0}"#;
        let asked = conf(egress, "null").unwrap().unwrap();
        assert_eq!(
            (asked.egress_rate, asked.egress_burst, asked.ingress_rate),
            (10_000_000, 4_294_967_295, 0)
        );
        let bursts = r#"{"eniway/egress-burst": "4Mi", "eniway/ingress-burst": "?"}"#;
        assert_eq!(conf(egress, bursts).unwrap().unwrap().egress_burst, 4 << 20);
        let wrong = r#"{"eniway/egress-burst": "4 MB"}"#;
        assert_eq!(conf(egress, wrong).unwrap_err().code, Code::Config);
        // As containerd 1.6 writes it.
        let capital =
            r#"{"IngressRate": 5000, "IngressBurst": 4294967295, "EgressRate": 0, "EgressBurst": 0}"#;
        assert_eq!(conf(capital, "null").unwrap().unwrap().ingress_rate, 5000);
        // Annotations alone, without the capability, are for other plugins.
        for nothing in ["null", "{}", r#"{"egressRate": 0}"#] {
            assert_eq!(conf(nothing, r#"{"kubernetes.io/egress-bandwidth": "10M"}"#).unwrap(), None);
        }
        assert_eq!(conf(r#"{"egressRate": -1}"#, "null").unwrap_err().code, Code::Decode);
    }

    #[test]
    fn quantities_are_as_in_kubernetes() {
        let known = [("0", 0), ("12", 12), ("1k", 1000), ("4Mi", 4 << 20), ("2G", 2_000_000_000)];
        for (text, value) in known {
            assert_eq!(quantity(text), Some(value), "{text}");
        }
        for text in ["", "M", "-1", "+1", "1.5M", "1m", "99999999999T", "1 M"] {
            assert_eq!(quantity(text), None, "{text}");
        }
    }

    #[test]
    fn null_is_nothing() {
        let text = r#"{"cniVersion": "1.0.0", "name": "n", "routes": null, "prevResult": null,
            "runtimeConfig": {"io.kubernetes.cri.pod-annotations": null}}"#;
        assert_eq!(parse(text, Command::Add).unwrap().mode().unwrap(), Mode::Unspecified);
    }

    #[test]
    fn arguments_are_pairs() {
        let found = arguments("IgnoreUnknown=1;K8S_POD_NAME=a;X=b=c").unwrap();
        assert_eq!(found["K8S_POD_NAME"], "a");
        assert_eq!(found["X"], "b=c");
        assert_eq!(arguments("").unwrap().len(), 0);
        assert_eq!(arguments("K8S").unwrap_err().code, Code::Environment);
    }

    #[test]
    fn without_a_list_nothing_is_collected() {
        let conf = parse(r#"{"cniVersion": "1.1.0", "name": "n"}"#, Command::Gc).unwrap();
        assert_eq!(conf.valid_attachments().unwrap_err().code, Code::Config);
    }
}

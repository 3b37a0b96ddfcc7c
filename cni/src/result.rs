//! The result of ADD, in each version's shape.

use std::net::IpAddr;

use eniway_agent_api::AddResponse;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    config::{Version, or_null},
    error::{Code, Error},
};

/// A result. What is not known here (of other plugins, or of later versions) is passed on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct NetResult {
    #[serde(default, rename = "cniVersion")]
    version: String,
    #[serde(default, deserialize_with = "or_null")]
    interfaces: Vec<Interface>,
    #[serde(default, deserialize_with = "or_null")]
    ips: Vec<Address>,
    #[serde(default, deserialize_with = "or_null")]
    routes: Vec<Route>,
    #[serde(default)]
    dns: Value,
    #[serde(flatten)]
    other: Map<String, Value>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Interface {
    name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    mac: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mtu: Option<u32>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    sandbox: String,
    #[serde(flatten)]
    other: Map<String, Value>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Address {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    address: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gateway: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    interface: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Route {
    dst: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gw: Option<String>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

impl NetResult {
    /// What the agent has made: the node's side of the pair, if there is one, and the sandbox's.
    pub(crate) fn of(answer: &AddResponse, interface: &str, netns: &str) -> Self {
        let mut interfaces = Vec::new();
        if !answer.host_interface.is_empty() {
            let (name, mac) = (answer.host_interface.clone(), answer.host_mac.clone());
            interfaces.push(Interface { name, mac, mtu: Some(answer.mtu), ..Interface::default() });
        }
        interfaces.push(Interface {
            name: interface.to_owned(),
            mac: answer.mac.clone(),
            mtu: Some(answer.mtu),
            sandbox: netns.to_owned(),
            other: Map::new(),
        });
        let ips = vec![Address {
            version: None,
            address: answer.ipv4.clone(),
            gateway: Some(answer.gateway.clone()),
            interface: Some(interfaces.len() - 1),
        }];
        let routes = answer.routes.iter().map(|route| Route {
            dst: route.destination.clone(),
            gw: Some(route.gateway.clone()),
            other: Map::new(),
        });
        Self { interfaces, ips, routes: routes.collect(), ..Self::default() }
    }

    /// The same, added to what the plugins before have said.
    pub(crate) fn after(mut self, previous: Option<Self>) -> Self {
        let Some(mut all) = previous else { return self };
        let first = all.interfaces.len();
        for address in &mut self.ips {
            address.interface = address.interface.map(|index| index + first);
        }
        all.interfaces.append(&mut self.interfaces);
        all.ips.append(&mut self.ips);
        all.routes.append(&mut self.routes);
        all
    }

    /// The addresses that the sandbox's interface should have.
    pub(crate) fn addresses_of(&self, interface: &str, netns: &str) -> Result<Vec<String>, Error> {
        let is_ours = |found: &Interface| found.name == interface && !found.sandbox.is_empty();
        let Some(index) = self.interfaces.iter().position(is_ours) else {
            let message = format!("prevResult: no interface {interface} in a sandbox (CNI_NETNS is {netns})");
            return Err(Error::new(Code::Config, message));
        };
        let addresses = self.ips.iter().filter(|address| address.interface == Some(index));
        Ok(addresses.map(|address| address.address.clone()).collect())
    }

    pub(crate) fn json(mut self, version: Version) -> String {
        self.version = version.to_string();
        if self.dns.is_null() {
            self.dns = Value::Object(Map::new());
        }
        for address in &mut self.ips {
            address.version =
                (version < Version::PLAIN_ADDRESSES).then(|| family(&address.address).to_owned());
        }
        if version < Version::STATUS {
            self.interfaces.iter_mut().for_each(|interface| interface.mtu = None);
        }
        // Maps with text for keys cannot fail.
        serde_json::to_string(&self).unwrap_or_default()
    }
}

fn family(address: &str) -> &'static str {
    match address.split('/').next().unwrap_or_default().parse() {
        Ok(IpAddr::V6(_)) => "6",
        _ => "4",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::{Command, NetConf};

    fn answer() -> AddResponse {
        AddResponse {
            host_interface: "eni0".to_owned(),
            host_mac: "fa:ff:ff:00:00:01".to_owned(),
            mac: "fa:16:3e:00:01:02".to_owned(),
            ipv4: "10.1.18.2/32".to_owned(),
            gateway: "10.1.16.1".to_owned(),
            mtu: 1500,
            routes: vec![eniway_agent_api::Route {
                destination: "0.0.0.0/0".to_owned(),
                gateway: "10.1.16.1".to_owned(),
            }],
        }
    }

    fn version(name: &str) -> Version {
        let text = format!(r#"{{"cniVersion": "{name}", "name": "n"}}"#);
        NetConf::parse(text.as_bytes(), Command::Add).unwrap().version
    }

    #[test]
    fn each_version_has_its_shape() {
        let result = NetResult::of(&answer(), "eth0", "/run/netns/a");
        let newest: Value = serde_json::from_str(&result.clone().json(Version::NEWEST)).unwrap();
        let expected = json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                { "name": "eni0", "mac": "fa:ff:ff:00:00:01", "mtu": 1500 },
                { "name": "eth0", "mac": "fa:16:3e:00:01:02", "mtu": 1500, "sandbox": "/run/netns/a" }
            ],
            "ips": [{ "address": "10.1.18.2/32", "gateway": "10.1.16.1", "interface": 1 }],
            "routes": [{ "dst": "0.0.0.0/0", "gw": "10.1.16.1" }],
            "dns": {}
        });
        assert_eq!(newest, expected);
        let old: Value = serde_json::from_str(&result.json(version("0.4.0"))).unwrap();
        assert_eq!(old["ips"][0]["version"], "4");
        assert_eq!(old["interfaces"][0].get("mtu"), None);
    }

    #[test]
    fn what_came_before_stays() {
        let before = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{ "name": "lo", "sandbox": "/run/netns/a", "pciID": "x" }],
            "ips": [{ "address": "127.0.0.1/8", "interface": 0 }],
            "dns": { "nameservers": ["10.0.0.2"] }, "later": 1
        });
        let previous: NetResult = serde_json::from_value(before).unwrap();
        let all = NetResult::of(&answer(), "eth0", "/run/netns/a").after(Some(previous));
        assert_eq!(all.addresses_of("eth0", "/run/netns/a").unwrap(), ["10.1.18.2/32"]);
        assert_eq!(all.addresses_of("eth1", "/run/netns/a").unwrap_err().code, Code::Config);
        let all: Value = serde_json::from_str(&all.json(Version::NEWEST)).unwrap();
        assert_eq!(all["ips"][1]["interface"], 2);
        assert_eq!(all["dns"]["nameservers"][0], "10.0.0.2");
        assert_eq!((&all["later"], &all["interfaces"][0]["pciID"]), (&json!(1), &json!("x")));
    }
}

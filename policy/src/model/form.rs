//! The JSON form: what is written, before it is a value of the model.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{
    Action, Direction, GroupId, IcmpMatch, Invalid, Ports, Priority, Protocol, Remote, SecurityGroup,
};

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Rule {
    direction: Direction,
    action: Action,
    #[serde(default = "first")]
    priority: u64,
    #[serde(default)]
    protocol: ProtocolName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ports: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    icmp_type: Option<u8>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    icmp_code: Option<u8>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cidr: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group: Option<GroupId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    address_group: Option<GroupId>,
}

/// A number, or a name (or a number as text).
#[derive(Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum ProtocolName {
    Number(u64),
    Name(String),
}

const fn first() -> u64 {
    Priority::FIRST.get() as u64
}

impl Default for ProtocolName {
    fn default() -> Self {
        Self::Name("any".to_owned())
    }
}

impl fmt::Display for ProtocolName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl ProtocolName {
    /// The number; `None` = any.
    fn number(&self) -> Result<Option<u8>, Invalid> {
        let invalid = || Invalid::Protocol(self.to_string());
        let number = match self {
            Self::Number(number) => u8::try_from(*number).map_err(|_| invalid())?,
            Self::Name(name) => match name.as_str() {
                "any" => return Ok(None),
                "tcp" => Protocol::TCP,
                "udp" => Protocol::UDP,
                "icmp" => Protocol::ICMP,
                "icmpv6" => Protocol::ICMPV6,
                "gre" => Protocol::GRE,
                digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                    digits.parse().map_err(|_| invalid())?
                }
                _ => return Err(invalid()),
            },
        };
        Ok(Some(number))
    }
}

impl TryFrom<Rule> for super::Rule {
    type Error = Invalid;

    fn try_from(rule: Rule) -> Result<Self, Invalid> {
        Ok(Self {
            direction: rule.direction,
            action: rule.action,
            priority: rule.priority.try_into()?,
            protocol: protocol(&rule)?,
            remote: remote(rule)?,
        })
    }
}

fn protocol(rule: &Rule) -> Result<Protocol, Invalid> {
    let number = rule.protocol.number()?;
    if rule.ports.is_some() && !matches!(number, Some(Protocol::TCP | Protocol::UDP)) {
        return Err(Invalid::PortsWithout(rule.protocol.to_string()));
    }
    if (rule.icmp_type.is_some() || rule.icmp_code.is_some())
        && !matches!(number, Some(Protocol::ICMP | Protocol::ICMPV6))
    {
        return Err(Invalid::IcmpWithout(rule.protocol.to_string()));
    }
    let ports = || rule.ports.as_deref().map_or(Ok(Ports::ALL), str::parse);
    let icmp = || match (rule.icmp_type, rule.icmp_code) {
        (None, None) => Ok(IcmpMatch::Any),
        (Some(icmp_type), None) => Ok(IcmpMatch::Type(icmp_type)),
        (Some(icmp_type), Some(code)) => Ok(IcmpMatch::Code(icmp_type, code)),
        (None, Some(code)) => Err(Invalid::CodeWithoutType(code)),
    };
    Ok(match number {
        None => Protocol::Any,
        Some(Protocol::TCP) => Protocol::Tcp(ports()?),
        Some(Protocol::UDP) => Protocol::Udp(ports()?),
        Some(Protocol::ICMP) => Protocol::Icmp(icmp()?),
        Some(Protocol::ICMPV6) => Protocol::Icmpv6(icmp()?),
        Some(number) => Protocol::Number(number),
    })
}

fn remote(rule: Rule) -> Result<Remote, Invalid> {
    match (rule.cidr, rule.group, rule.address_group) {
        (None, None, None) => Ok(Remote::Any),
        (Some(cidr), None, None) => Ok(Remote::Cidr(prefix(&cidr)?)),
        (None, Some(group), None) => Ok(Remote::Group(group)),
        (None, None, Some(group)) => Ok(Remote::AddressGroup(group)),
        _ => Err(Invalid::Remotes),
    }
}

/// A prefix, or an address as the prefix that holds it alone. Host bits are cleared.
fn prefix(text: &str) -> Result<IpNet, Invalid> {
    let address = text.parse::<IpAddr>().map(IpNet::from);
    let prefix = address.or_else(|_| text.parse()).map_err(|_| Invalid::Prefix(text.to_owned()))?;
    Ok(prefix.trunc())
}

impl From<super::Rule> for Rule {
    fn from(rule: super::Rule) -> Self {
        let name = |name: &str| ProtocolName::Name(name.to_owned());
        let written = |ports: &Ports| if ports.is_all() { None } else { Some(ports.to_string()) };
        let icmp = |of: IcmpMatch| match of {
            IcmpMatch::Any => (None, None),
            IcmpMatch::Type(icmp_type) => (Some(icmp_type), None),
            IcmpMatch::Code(icmp_type, code) => (Some(icmp_type), Some(code)),
        };
        let (protocol, ports, (icmp_type, icmp_code)) = match rule.protocol {
            Protocol::Any => (name("any"), None, (None, None)),
            Protocol::Tcp(ports) => (name("tcp"), written(&ports), (None, None)),
            Protocol::Udp(ports) => (name("udp"), written(&ports), (None, None)),
            Protocol::Icmp(of) => (name("icmp"), None, icmp(of)),
            Protocol::Icmpv6(of) => (name("icmpv6"), None, icmp(of)),
            Protocol::Number(Protocol::GRE) => (name("gre"), None, (None, None)),
            Protocol::Number(number) => (ProtocolName::Number(number.into()), None, (None, None)),
        };
        let (cidr, group, address_group) = match rule.remote {
            Remote::Any => (None, None, None),
            Remote::Cidr(prefix) => (Some(prefix.to_string()), None, None),
            Remote::Group(group) => (None, Some(group), None),
            Remote::AddressGroup(group) => (None, None, Some(group)),
        };
        Self {
            direction: rule.direction,
            action: rule.action,
            priority: rule.priority.get().into(),
            protocol,
            ports,
            icmp_type,
            icmp_code,
            cidr,
            group,
            address_group,
        }
    }
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AddressGroup {
    id: GroupId,
    #[serde(default)]
    addresses: Vec<String>,
}

impl TryFrom<AddressGroup> for super::AddressGroup {
    type Error = Invalid;

    fn try_from(group: AddressGroup) -> Result<Self, Invalid> {
        let addresses = group.addresses.iter().map(|text| prefix(text)).collect::<Result<_, _>>()?;
        Ok(Self { id: group.id, addresses })
    }
}

impl From<super::AddressGroup> for AddressGroup {
    fn from(group: super::AddressGroup) -> Self {
        Self { id: group.id, addresses: group.addresses.iter().map(ToString::to_string).collect() }
    }
}

/// A group whose rules are not values yet, so that an error can name the rule.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    id: GroupId,
    #[serde(default)]
    rules: Vec<Rule>,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Groups {
    #[serde(default)]
    revision: u64,
    #[serde(default)]
    security_groups: Vec<Group>,
    #[serde(default)]
    address_groups: Vec<AddressGroup>,
}

impl TryFrom<Groups> for super::Groups {
    type Error = Invalid;

    fn try_from(form: Groups) -> Result<Self, Invalid> {
        let group = |Group { id, rules }| {
            let in_rule = |(place, rule): (usize, Rule)| {
                let named = |source| Invalid::InRule {
                    group: String::from(GroupId::clone(&id)),
                    rule: place + 1,
                    source: Box::new(source),
                };
                super::Rule::try_from(rule).map_err(named)
            };
            let rules = rules.into_iter().enumerate().map(in_rule).collect::<Result<_, _>>()?;
            Ok(SecurityGroup { id, rules })
        };
        let security_groups = form.security_groups.into_iter().map(group).collect::<Result<_, Invalid>>()?;
        let address_groups =
            form.address_groups.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?;
        Self::new(form.revision, security_groups, address_groups)
    }
}

impl From<super::Groups> for Groups {
    fn from(groups: super::Groups) -> Self {
        let group = |group: SecurityGroup| Group {
            id: group.id,
            rules: group.rules.into_iter().map(Into::into).collect(),
        };
        Self {
            revision: groups.revision,
            security_groups: groups.security_groups.into_values().map(group).collect(),
            address_groups: groups.address_groups.into_values().map(Into::into).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{GroupList, Groups};

    const DOCUMENT: &str = r#"{
        "revision": 7,
        "security_groups": [
            {"id": "sg-web", "rules": [
                {"direction": "ingress", "action": "allow", "protocol": "tcp", "ports": "80,443,8000-8100"},
                {"direction": "ingress", "action": "deny", "priority": 5, "protocol": "icmp", "icmp_type": 8,
                 "icmp_code": 0, "cidr": "10.1.0.0/16"},
                {"direction": "ingress", "action": "allow", "protocol": 50, "address_group": "ag-office"},
                {"direction": "egress", "action": "allow", "priority": 100, "group": "sg-web"}
            ]},
            {"id": "sg-empty"}
        ],
        "address_groups": [{"id": "ag-office", "addresses": ["10.9.0.1", "2001:db8::/32"]}]
    }"#;

    fn error(document: &str) -> String {
        serde_json::from_str::<Groups>(document).expect_err(document).to_string()
    }

    fn in_rule(fields: &str) -> String {
        error(&format!(
            r#"{{"security_groups":[{{"id":"sg","rules":[{{"direction":"ingress","action":"allow",{fields}}}]}}]}}"#
        ))
    }

    #[test]
    fn a_document_survives_being_written() {
        let read: Groups = serde_json::from_str(DOCUMENT).unwrap();
        assert_eq!(read.security_groups.len(), 2);
        let written = serde_json::to_string(&read).unwrap();
        assert_eq!(serde_json::from_str::<Groups>(&written).unwrap(), read);
    }

    #[test]
    fn errors_name_the_rule_and_the_way_out() {
        for (fields, says) in [
            (r#""priority":0"#, "priority 0: it is 1"),
            (r#""priority":101"#, "priority 101"),
            (r#""protocol":"tpc""#, "any, tcp, udp"),
            (r#""protocol":256"#, "0 to 255"),
            (r#""protocol":"tcp","ports":"90-80""#, "8000-8100"),
            (r#""protocol":"tcp","ports":"+80""#, "8000-8100"),
            (r#""protocol":"tcp","ports":"0""#, "1 to 65535"),
            (r#""protocol":"gre","ports":"80""#, "only tcp and udp have ports"),
            (r#""protocol":"tcp","icmp_type":8"#, "only icmp and icmpv6"),
            (r#""protocol":"icmp","icmp_code":8"#, "without icmp_type"),
            (r#""cidr":"10.0.0.0/33""#, "10.0.0.0/8"),
            (r#""cidr":"10.0.0.0/8","group":"x""#, "one remote"),
        ] {
            let said = in_rule(fields);
            assert!(said.contains("security group sg, rule 1") && said.contains(says), "{fields}: {said}");
        }
        assert!(error(r#"{"security_groups":[{"id":"a"},{"id":"a"}]}"#).contains("a is there twice"));
        assert!(error(r#"{"security_groups":[{"id":"a b"}]}"#).contains("no id of a group"));
    }

    #[test]
    fn a_pod_has_five_groups_none_twice() {
        let list = |json: &str| serde_json::from_str::<GroupList>(json);
        assert_eq!(list(r#"["b","a"]"#).unwrap().as_slice()[0].as_str(), "b");
        assert!(list(r#"["a","b","a"]"#).unwrap_err().to_string().contains("twice"));
        assert!(list(r#"["a","b","c","d","e","f"]"#).unwrap_err().to_string().contains("at most 5"));
    }
}

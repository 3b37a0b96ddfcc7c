//! What is measured: which load, from where to where.

use std::fmt;

use super::load::Load;

/// From where to where, and how much else there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// Between two pods of a node.
    SameNode,
    /// Between pods of two nodes.
    CrossNode,
    /// From a host of the VPC to a virtual address of the ELB, and from there to a pod.
    Elb,
    /// The same, from a pod of the node that the ELB chooses.
    ElbHairpin,
    /// Frames that nobody may send, as fast as they come.
    Attack,
    /// As [`Place::SameNode`], on nodes with more and more pods.
    PodsLocal,
    /// As [`Place::CrossNode`], on nodes with more and more pods.
    PodsWire,
    /// As [`Place::SameNode`], over more and more flows, each of which security groups have admitted.
    FlowsLocal,
    /// As [`Place::CrossNode`], over more and more flows.
    FlowsWire,
    /// As [`Place::ElbHairpin`], over more and more flows, each of which is remembered.
    FlowsElb,
}

/// Systems that stand at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// All systems, side by side.
    Traffic,
    /// What drops frames.
    Attack,
    /// One system in several sizes.
    Scale,
}

impl Group {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Traffic, Self::Attack, Self::Scale];
}

impl Place {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::SameNode,
        Self::CrossNode,
        Self::Elb,
        Self::ElbHairpin,
        Self::Attack,
        Self::PodsLocal,
        Self::PodsWire,
        Self::FlowsLocal,
        Self::FlowsWire,
        Self::FlowsElb,
    ];

    /// Its name in cases.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SameNode => "same-node",
            Self::CrossNode => "cross-node",
            Self::Elb => "elb",
            Self::ElbHairpin => "elb-hairpin",
            Self::Attack => "attack",
            Self::PodsLocal => "pods-local",
            Self::PodsWire => "pods-wire",
            Self::FlowsLocal => "flows-local",
            Self::FlowsWire => "flows-wire",
            Self::FlowsElb => "flows-elb",
        }
    }

    /// Which systems it needs.
    pub const fn group(self) -> Group {
        match self {
            Self::SameNode | Self::CrossNode | Self::Elb | Self::ElbHairpin => Group::Traffic,
            Self::Attack => Group::Attack,
            Self::PodsLocal | Self::PodsWire | Self::FlowsLocal | Self::FlowsWire | Self::FlowsElb => {
                Group::Scale
            }
        }
    }

    const fn loads(self) -> &'static [Load] {
        match self {
            Self::SameNode | Self::CrossNode => &[Load::TcpRr, Load::TcpCrr, Load::TcpStream, Load::Udp],
            Self::Elb | Self::ElbHairpin => &[Load::TcpRr, Load::TcpCrr],
            Self::Attack => &[Load::UnknownVlan, Load::WrongMac, Load::WrongAddress, Load::SpoofingPod],
            Self::PodsLocal | Self::PodsWire => &[Load::TcpRr],
            Self::FlowsLocal | Self::FlowsWire | Self::FlowsElb => &[Load::UdpRr],
        }
    }
}

/// What is sent where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Case {
    /// Where.
    pub place: Place,
    /// What.
    pub load: Load,
}

impl Case {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        Place::ALL
            .into_iter()
            .flat_map(|place| place.loads().iter().map(move |load| Self { place, load: *load }))
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.place.name(), self.load.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_is_part_of_another() {
        let names: Vec<String> = Case::all().map(|case| case.to_string()).collect();
        for name in &names {
            let found = names.iter().filter(|other| other.contains(name.as_str())).count();
            assert_eq!(found, 1, "{name} asks for {found} cases");
        }
    }
}

//! Security groups: what they are, what they mean, and what the fast path makes of them.
//!
//! [`model`] holds the types, with their JSON form; a value that exists is valid. This page says what they mean. Whoever
//! judges packets by groups (the compiler here, the lab's VPC) is held to it.
//!
//! # What the rules mean
//!
//! After the public documentation of the VPC of Huawei Cloud (User Guide, "Access Control Overview" and "Security Group
//! and Security Group Rule Overview"); where that is silent, the decision is ours and says so.
//!
//! **Who is judged.** A packet from pod A to pod B passes if A's egress rules allow it *and* B's ingress rules allow it. For
//! A's rules the remote is B, for B's rules it is A.
//!
//! **Which rules match.** A rule matches a packet of its direction whose protocol and ports it names and whose remote it
//! covers. Ports are destination ports in both directions. A CIDR and an address group cover the addresses in them,
//! compared with the address the packet carries, so an IPv4 prefix matches IPv4 packets only. A remote group covers every
//! pod that has the group anywhere in its list, whatever the pod's address. A rule without a remote covers everybody.
//! `any` matches every protocol; `icmp` is protocol 1 and `icmpv6` protocol 58, each with an optional type and code.
//!
//! **Which rule decides.** Of the rules that match, the first in this order:
//!
//! 1. by group, in the order of the pod's list;
//! 2. within a group by priority, 1 before 100;
//! 3. within a priority, deny before allow.
//!
//! Order of the list first is what the "Access Control Overview" says today; older pages speak of a union of all rules,
//! which gives the same answer unless one group denies what another allows. A group in which no rule matches says nothing:
//! the next one is asked. Where no rule of any group matches, the packet is denied, in both directions: a group that lets
//! everything out has a rule that says so. A pod without any group has no rules that we know of: it is *not decidable*, and
//! neither is one with a group or an address group that is not known, or whose groups are older than the revision it
//! asks for ([`model::Membership::revision`]).
//!
//! **Flows.** Groups are stateful: only the first packet of a flow is judged by rules. What belongs to a flow that was allowed
//! passes in both directions, whatever the rules of the reverse direction say.
//!
//! - A *TCP* or *UDP* flow is a pair of (address, port) and the protocol. A TCP SYN without ACK opens a flow, and is judged
//!   by the rules of its own direction even where a flow of the same addresses and ports stands. Any other packet without a
//!   flow is judged as if it were a first one, whatever its flags, and opens a flow if it is allowed (a VPC picks up
//!   connections that are older than its memory); only an RST opens none.
//! - An *ICMP query* (echo, timestamp, information: types 8, 13, 15) opens a flow of its type, identifier and direction. Only
//!   answers of the matching type (0, 14, 16) in the other direction belong to it. An answer without a flow is judged by the
//!   rules as what it is, and opens none.
//! - An *ICMP error* (types 3, 4, 11, 12) belongs to the flow of the packet it quotes, if its receiver is the sender of the
//!   quoted packet and its sender is the quoted packet's destination. One that belongs to no flow is judged by the rules as
//!   what it is, and opens none. So is every other ICMP type.
//! - *Other protocols* (GRE, ESP, …) have one flow for each pair of addresses and protocol.
//! - Of a *fragmented* datagram the first fragment is judged, and later ones share its fate. One that comes before its first
//!   fragment, or without it, cannot be judged: it is left to the VPC. (The VPC may drop or reassemble.)
//!
//! A flow ends when nothing was seen of it for the time in [`timeout`]; a FIN or an RST in either direction shortens that time.
//!
//! **Changes.** A change of rules, of a group's members or of a pod's groups holds for running flows too: the flow's first
//! packet is judged again by the rules of the direction in which it was opened, and where the answer is no longer "allow",
//! the flow is over. (The VPC is documented to do so for flows that came in; for flows that went out it may go on as
//! long as they live. A flow that ends here goes on by the wire, where the VPC has its say.)

pub mod compile;
pub mod explain;
pub mod model;

pub use datapath_common::abi::policy::timeout;

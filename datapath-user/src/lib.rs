//! The eniway agent as a library: everything between the IPAM allocator's word and the kernel's tables.
//!
//! Top down: [`agent`] is the loop; [`source`] says what should be, [`tables`] what is, [`reconcile`] the difference;
//! [`object`], [`pin`] and [`attach`] put the programs in place; [`wiring`] connects pods and prepares parents.
//! [`detach`] takes everything down again. [`cli`] shows what runs.

pub mod agent;
mod api;
pub mod attach;
pub mod attachment;
pub mod audit;
pub mod bandwidth;
pub mod cli;
pub mod config;
pub mod detach;
mod error;
pub mod ethtool;
pub mod events;
pub mod feature;
mod fnv;
pub mod grace;
pub mod ipam;
pub mod kept;
pub mod live;
pub mod lock;
pub mod net;
pub mod netlink;
pub mod netns;
pub mod nic;
pub mod object;
pub mod pin;
pub mod policy;
pub mod privilege;
pub mod reconcile;
pub mod run_file;
pub mod service;
pub mod settings;
pub mod source;
pub mod status;
mod sys;
pub mod sysctl;
pub mod tables;
pub mod takeover;
pub mod wiring;

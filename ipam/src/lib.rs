//! The IPAM allocator of eniway.
//!
//! Owns the sub-ENIs and ENIs of a cluster's nodes: keeps a pool of them on every node, gives them to pods, takes them back, and tells
//! every node's agent what its pods have. Its records are in a [`store`]: a file ([`EmbeddedStore`]) or etcd
//! ([`EtcdStore`], any number of allocators at once). Interfaces are made and unmade through the [`vpc`] API.
//!
//! Nothing depends on a process staying alive. Before every call that changes something at the VPC, what is about to be done is written
//! to the store; after a crash it is done again, and every such call may be repeated. The life of an interface is one
//! table: [`model::State`].
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use eniway_ipam::{Allocator, EmbeddedStore, Settings, SystemClock, vpc::MemoryVpc};
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let clock = Arc::new(SystemClock);
//! let store = Arc::new(EmbeddedStore::open("/var/lib/eniway/ipam.redb")?);
//! let vpc = Arc::new(MemoryVpc::new(clock.clone(), 0));
//! let allocator = Allocator::open(Settings::default(), store, vpc, clock).await?;
//! allocator.start();
//! # Ok(())
//! # }
//! ```

pub mod allocator;
pub mod api;
pub mod clock;
pub mod feed;
pub mod model;
pub mod net;
mod plan;
pub mod rpc;
pub mod store;
mod view;
pub mod vpc;

pub use allocator::Allocator;
pub use api::{
    Acknowledgement, AddressRequest, AllocateRequest, Allocation, Confirm, Error, Released, Settings,
};
pub use clock::{Clock, ManualClock, SystemClock};
pub use feed::{AllocationChange, Notice, Position, Watch};
pub use model::{Node, NodeKind, Parent, PodKey, Policy, Subnet};
pub use store::{EmbeddedStore, EtcdSettings, EtcdStore, EtcdTls, Store};
pub use vpc::{MemoryVpc, Vpc};

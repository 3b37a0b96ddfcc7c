//! What the maps hold, field by field: what an agent leaves beside its pins, so that one of another version can read them, and
//! what `tests/abi.txt` is a snapshot of.
//!
//! Names are the contract between versions: what has the same name means the same. A field that changes its meaning takes a new
//! name; one that a version does not know is left out, and one that it lacks is zero.

use core::mem::{offset_of, size_of};

use super::{
    Admitted, Bucket, Carried, Counter, CounterRow, Endpoint, Flow, FlowKey, Fragment, FragmentKey, Limits,
    PairKey, Spent,
    maps::{self, VipKey},
    outcome::OUTCOMES,
    policy::{ClassGroups, Page, ProgramRow, VerdictRow},
};

/// A field of a key or value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Where it begins, in bytes.
    pub offset: usize,
    /// Its size, in bytes.
    pub size: usize,
}

/// A key or a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its name here; other versions may call it otherwise.
    pub name: &'static str,
    /// Its size, in bytes.
    pub size: usize,
    /// Its fields.
    pub fields: &'static [Field],
}

/// A map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its name.
    pub map: &'static str,
    /// Its key.
    pub key: Record,
    /// Its value.
    pub value: Record,
}

const fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// The fields of a struct; does not compile when one is left out.
macro_rules! record {
    ($type:ident { $($(#[$attribute:meta])* $field:ident),+ $(,)? }) => {{
        const fn all(it: &$type) {
            let $type { $($(#[$attribute])* $field: _),+ } = it;
        }
        const _: fn(&$type) = all;
        Record {
            name: stringify!($type),
            size: size_of::<$type>(),
            fields: &[$(
                $(#[$attribute])*
                Field {
                    name: stringify!($field),
                    offset: offset_of!($type, $field),
                    size: size_of_field(|it: &$type| &it.$field),
                }
            ),+],
        }
    }};
}

/// A key or value without fields, by what it means.
macro_rules! plain {
    ($type:ty, $meaning:literal) => {
        Record {
            name: $meaning,
            size: size_of::<$type>(),
            fields: &[Field { name: $meaning, offset: 0, size: size_of::<$type>() }],
        }
    };
}

const ENDPOINT: Record = record!(Endpoint {
    #[cfg(feature = "next-abi")]
    spare,
    owner,
    id,
    generation,
    ifindex,
    parent_ifindex,
    policy_id,
    flags,
    ipv4,
    gateway_ipv4,
    ipv6,
    gateway_ipv6,
    mac,
    wire_mac,
    gateway_mac,
    vid,
    mtu,
    parent,
});
const FLOW_KEY: Record = record!(FlowKey { id, remote, remote_port, local_port, proto, pad });
const FLOW: Record = record!(Flow { door, origin, pad, seen });
const FRAGMENT_KEY: Record = record!(FragmentKey { src, dst, id, ident, proto, pad });
const FRAGMENT: Record = record!(Fragment { door, pad, epoch });
const VERDICT_ROW: Record = record!(VerdictRow { verdicts });
const CLASS_GROUPS: Record = record!(ClassGroups { groups });
const PROGRAM_ROW: Record = record!(ProgramRow { programs });
const PAGE: Record = record!(Page { words });
const PAIR_KEY: Record = record!(PairKey { low, high, low_port, high_port, proto, query, pad });
const ADMITTED: Record = record!(Admitted { epoch, seen, opener, state, code, pad });
const VIP_KEY: Record = record!(VipKey { addr, port, proto, pad });
const COUNTER: Record = record!(Counter { packets, bytes });
const HALF: usize = OUTCOMES * size_of::<Counter>();
/// Two rows of counters, by outcome.
const COUNTER_ROW: Record = Record {
    name: "CounterRow",
    size: size_of::<CounterRow>(),
    fields: &[
        Field { name: "ingress (packets, bytes)", offset: 0, size: HALF },
        Field { name: "egress (packets, bytes)", offset: HALF, size: HALF },
    ],
};
const ROW: usize = size_of::<CounterRow>();
const CARRIED_ROW: Record = Record {
    name: "Carried",
    size: size_of::<Carried>(),
    fields: &[
        Field { name: "from", offset: 0, size: 8 },
        Field { name: "base ingress (packets, bytes)", offset: 8, size: HALF },
        Field { name: "base egress (packets, bytes)", offset: 8 + HALF, size: HALF },
        Field { name: "pending ingress (packets, bytes)", offset: 8 + ROW, size: HALF },
        Field { name: "pending egress (packets, bytes)", offset: 8 + ROW + HALF, size: HALF },
    ],
};
const BUCKET: usize = size_of::<Bucket>();
const LIMITS: Record = Record {
    name: "Limits",
    size: size_of::<Limits>(),
    fields: &[
        Field { name: "ingress (cost, depth, reserve)", offset: offset_of!(Limits, ingress), size: BUCKET },
        Field { name: "egress (cost, depth, reserve)", offset: offset_of!(Limits, egress), size: BUCKET },
        Field { name: "pace", offset: offset_of!(Limits, pace), size: 8 },
    ],
};
const SPENT: Record = record!(Spent { until });
const PREFIX: Record = Record {
    name: "prefix",
    size: 8,
    fields: &[Field { name: "length", offset: 0, size: 4 }, Field { name: "address", offset: 4, size: 4 }],
};
const SLOT: Record = plain!(u32, "slot");
const ID: Record = plain!(u32, "id");
const MARK: Record = plain!(u32, "mark");
const IFINDEX: Record = plain!(u32, "ifindex");
const IPV4: Record = plain!([u8; 4], "ipv4");
const IPV6: Record = plain!([u8; 16], "ipv6");
const FLAGS: Record = plain!(u32, "flags");

/// All structs.
pub const RECORDS: [Record; 17] = [
    ENDPOINT,
    FLOW_KEY,
    FLOW,
    FRAGMENT_KEY,
    FRAGMENT,
    VERDICT_ROW,
    CLASS_GROUPS,
    PROGRAM_ROW,
    PAGE,
    PAIR_KEY,
    ADMITTED,
    VIP_KEY,
    COUNTER,
    COUNTER_ROW,
    CARRIED_ROW,
    LIMITS,
    SPENT,
];

/// All maps, as in [`maps::ALL`].
pub const TABLES: [Table; maps::ALL.len()] = [
    Table { map: maps::ENDPOINT, key: SLOT, value: ENDPOINT },
    Table { map: maps::SUBENI, key: plain!(u32, "parent * 4096 + vid"), value: SLOT },
    Table { map: maps::POD_IF, key: IFINDEX, value: SLOT },
    Table { map: maps::POD_IF_DIRECT, key: plain!(u32, "ifindex % 65536"), value: SLOT },
    Table { map: maps::POD_IP4, key: IPV4, value: SLOT },
    Table { map: maps::POD_IP4_DIRECT, key: plain!(u32, "ipv4 % 65536"), value: SLOT },
    Table { map: maps::POD_IP6, key: IPV6, value: SLOT },
    Table { map: maps::HOST_DST, key: PREFIX, value: FLAGS },
    Table {
        map: maps::HOST_DST_BITS,
        key: plain!(u32, "(ipv4 >> 8) % 65536"),
        value: plain!(u64, "bit ipv4 % 256 / 4"),
    },
    Table { map: maps::VIPS, key: VIP_KEY, value: plain!(u32, "vip") },
    Table { map: maps::FLOWS, key: FLOW_KEY, value: FLOW },
    Table { map: maps::FLOW_MARK, key: ID, value: MARK },
    Table { map: maps::FRAGS, key: FRAGMENT_KEY, value: FRAGMENT },
    Table { map: maps::COUNTERS, key: ID, value: COUNTER_ROW },
    Table { map: maps::EPOCH, key: plain!(u32, "0"), value: plain!(u32, "epoch") },
    Table { map: maps::VERDICT, key: plain!(u32, "class"), value: VERDICT_ROW },
    Table { map: maps::CLASS, key: plain!(u32, "2 * class + epoch % 2"), value: CLASS_GROUPS },
    Table {
        map: maps::PROGRAM,
        key: plain!(u32, "2 * (2 * group + egress) + epoch % 2"),
        value: PROGRAM_ROW,
    },
    Table { map: maps::RULES, key: plain!(u32, "2 * page + epoch % 2"), value: PAGE },
    Table { map: maps::PAIRS, key: PAIR_KEY, value: ADMITTED },
    Table { map: maps::PAIR_MARK, key: ID, value: MARK },
    Table { map: maps::LIMITS, key: ID, value: LIMITS },
    Table { map: maps::SPENT, key: ID, value: SPENT },
];

/// [`maps::CARRIED`], which no program uses.
pub const CARRIED: Table = Table { map: maps::CARRIED, key: ID, value: CARRIED_ROW };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_map_is_described() {
        assert_eq!(TABLES.map(|table| table.map), maps::ALL);
    }

    #[test]
    fn fields_fill_their_records() {
        let records = TABLES.iter().flat_map(|table| [table.key, table.value]).chain(RECORDS);
        for Record { name, size, fields } in records {
            assert_eq!(fields.iter().map(|field| field.size).sum::<usize>(), size, "{name}");
        }
    }
}

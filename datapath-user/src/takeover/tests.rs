use std::path::Path;

use datapath_common::abi::{
    Admitted, Endpoint, PairKey,
    policy::{CLASSES, Verdict, VerdictRow},
};

use super::{description::Description, *};
use crate::{
    config::{FastPath, Xdp},
    object::{self, Constants, ObjectError},
    tables::{Index, Maps},
};

const LIMITS: Limits = Limits { endpoints: 4, flows: 1024 };
const CONSTANTS: Constants = Constants { fast_path: FastPath::Off, parent: 0, xdp: Xdp::Off };
const PAIR: PairKey =
    PairKey { low: 1, high: 2, low_port: 3, high_port: 4, proto: 17, query: 0, pad: [0; 2] };
const ADMITTED: Admitted = Admitted { epoch: 7, seen: 100, opener: 1, state: 1, code: 0, pad: [0; 2] };
const RECORD: Endpoint =
    Endpoint { owner: 5, id: 3, ifindex: 70, vid: 101, ipv4: [10, 0, 0, 5], ..Endpoint::ZERO };

/// A directory for pins; none without privileges, a file system for them, or the programs.
struct Place(Pins);

impl Place {
    fn new(name: &str) -> Option<Self> {
        let pins =
            Pins::new(Path::new(&format!("/sys/fs/bpf/eniway-takeover-{}-{name}", std::process::id())));
        pins.prepare().ok()?;
        let place = Self(pins);
        match place.take_over(&LIMITS) {
            Err(Failure::Object(ObjectError::Stub)) => None,
            other => {
                other.unwrap();
                Some(place)
            }
        }
    }

    /// As an agent does that starts, without programs.
    fn take_over(&self, limits: &Limits) -> Result<Takeover, Failure> {
        let mut takeover = Takeover::begin(&self.0, limits).map_err(Failure::Takeover)?;
        object::open(CONSTANTS, limits, Some(takeover.place())).map_err(Failure::Object)?;
        takeover.fill().map_err(Failure::Takeover)?;
        takeover.publish().map_err(Failure::Takeover)?;
        Ok(takeover)
    }

    fn maps(&self) -> Maps {
        Maps::open(&self.0).unwrap()
    }

    /// Makes what this version has left that of another one.
    fn becomes(&self, version: u32, change: impl FnOnce(&mut Description)) -> Pins {
        let other = self.0.dir().join(format!("v{version}"));
        std::fs::rename(self.0.version_dir(), other).unwrap();
        let other = self.0.all_versions().unwrap().pop().unwrap();
        std::fs::remove_file(other.map(maps::LAYOUT)).unwrap();
        let mut description = Description::own();
        change(&mut description);
        description.write(&other).unwrap();
        other
    }

    fn id(&self, name: &str) -> u32 {
        RawMap::open(&self.0, name).unwrap().unwrap().id
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.0.remove_all();
    }
}

#[derive(Debug)]
enum Failure {
    Takeover(TakeoverError),
    Object(ObjectError),
}

fn fill(maps: &mut Maps) {
    maps.set_record(2, &RECORD).unwrap();
    for key in Index::of(&RECORD) {
        maps.set_slot(key, 2).unwrap();
    }
    maps.policy.set_epoch(7).unwrap();
    maps.policy.set_verdicts(1, &VerdictRow { verdicts: [Verdict::Open as u8; CLASSES] }).unwrap();
    maps.policy.set_pair(&PAIR, &ADMITTED).unwrap();
}

#[test]
fn what_is_the_same_is_shared_and_groups_that_differ_decide_nothing() {
    let Some(place) = Place::new("groups") else { return };
    fill(&mut place.maps());
    let names = [maps::ENDPOINT, maps::SUBENI, maps::FLOWS, maps::COUNTERS, maps::VERDICT, maps::CLASS];
    let before = names.map(|name| place.id(name));
    let other = place.becomes(9, |_| {});
    place.take_over(&LIMITS).unwrap().finish().unwrap();
    assert!(!other.exist());
    assert_eq!(names.map(|name| place.id(name)), before);

    place.becomes(9, |description| description.rename_key(maps::CLASS, "class"));
    place.take_over(&LIMITS).unwrap().finish().unwrap();
    let maps = place.maps();
    assert_eq!(names[..4].iter().map(|name| place.id(name)).collect::<Vec<_>>(), before[..4]);
    assert!(place.id(maps::VERDICT) != before[4] && place.id(maps::CLASS) != before[5]);
    // The epoch goes on, so that no flow is taken for one that newer rules have admitted.
    assert_eq!(maps.policy.epoch().unwrap(), 7);
    assert_eq!(maps.policy.verdicts(1).unwrap().verdicts, [Verdict::Wire as u8; CLASSES]);
    assert_eq!(maps.policy.pair(&PAIR).unwrap(), Some(ADMITTED));
}

#[test]
fn other_limits_need_room_for_all_that_run() {
    let Some(place) = Place::new("room") else { return };
    fill(&mut place.maps());
    let other = place.becomes(9, |_| {});
    let few = Limits { endpoints: 2, flows: 1024 };
    let error = place.take_over(&few).err().unwrap();
    assert!(
        matches!(error, Failure::Takeover(TakeoverError::Room { what: "id", number: 3, limit: 3, .. })),
        "{error:?}"
    );
    let versions: Vec<u32> = place.0.all_versions().unwrap().iter().map(Pins::version).collect();
    assert_eq!(versions, [9]);

    // A record whose number is larger than this version's is as bad.
    let described = Description::own();
    let records = RawMap::open(&other, maps::ENDPOINT).unwrap().unwrap();
    let record = records.get(&2_u32.to_ne_bytes()).unwrap().unwrap();
    std::fs::remove_file(other.map(maps::LAYOUT)).unwrap();
    let mut wider = described.clone();
    // What follows the VLAN id is taken for its upper half.
    wider.widen(maps::ENDPOINT, "vid", 4);
    wider.write(&other).unwrap();
    let mut odd = record.clone();
    described.table(maps::ENDPOINT).unwrap().value.field_mut("wire_mac", &mut odd).unwrap().fill(1);
    records.set(&2_u32.to_ne_bytes(), &odd).unwrap();
    let error = place.take_over(&LIMITS).err().unwrap();
    assert!(matches!(error, Failure::Takeover(TakeoverError::Narrow { .. })), "{error:?}");
    records.set(&2_u32.to_ne_bytes(), &record).unwrap();
    let versions: Vec<u32> = place.0.all_versions().unwrap().iter().map(Pins::version).collect();
    assert_eq!(versions, [9]);

    let takeover = place.take_over(&Limits { endpoints: 40, flows: 2048 }).unwrap();
    let maps = place.maps();
    assert_eq!((maps.ids(), maps.record(2).unwrap()), (41, RECORD));
    assert_eq!(maps.slot(Index::Interface(70)).unwrap(), 2);
    assert_eq!(maps.policy.pair(&PAIR).unwrap(), Some(ADMITTED));
    takeover.finish().unwrap();
}

#[test]
fn what_was_remembered_meanwhile_is_copied_and_what_was_forgotten_is_not() {
    let Some(place) = Place::new("merge") else { return };
    fill(&mut place.maps());
    let other = place.becomes(9, |description| description.rename_key(maps::CLASS, "class"));
    // Other sizes: nothing of it is shared.
    let mut takeover = place.take_over(&Limits { endpoints: 8, flows: 2048 }).unwrap();
    let (pairs, table) = (RawMap::open(&other, maps::PAIRS).unwrap().unwrap(), Description::own());
    let fields = table.table(maps::PAIRS).unwrap();
    let key = |port: u16| {
        let mut key = pairs.entries().unwrap().remove(0).key;
        fields.key.field_mut("low_port", &mut key).unwrap().copy_from_slice(&port.to_ne_bytes());
        key
    };
    let value = pairs.get(&key(3)).unwrap().unwrap();
    // One comes, and comes again later; one goes.
    pairs.set(&key(30), &value).unwrap();
    takeover.copy_memories().unwrap();
    let maps = place.maps();
    let pair = |low_port| maps.policy.pair(&PairKey { low_port, ..PAIR }).unwrap();
    assert_eq!((pair(3), pair(30)), (Some(ADMITTED), Some(ADMITTED)));
    let mut later = value.clone();
    fields.value.field_mut("seen", &mut later).unwrap().copy_from_slice(&200_u32.to_ne_bytes());
    pairs.set(&key(30), &later).unwrap();
    let other_key = key(3);
    pairs.set(&key(31), &value).unwrap();
    pairs.remove(&other_key).unwrap();
    takeover.copy_memories().unwrap();
    assert_eq!((pair(3), pair(30)), (None, Some(Admitted { seen: 200, ..ADMITTED })));
    assert_eq!(pair(31), Some(ADMITTED));

    // Whoever begins anew with both merges them.
    drop(takeover);
    let takeover = place.take_over(&Limits { endpoints: 8, flows: 2048 }).unwrap();
    assert_eq!(takeover.other(), Some(9));
    assert_eq!(pair(31), Some(ADMITTED));
    std::fs::create_dir(place.0.dir().join("v8")).unwrap();
    let error = place.take_over(&LIMITS).err().unwrap();
    assert!(matches!(error, Failure::Takeover(TakeoverError::Unfinished { .. })), "{error:?}");
}

//! How long compiling takes: pods with random lists of random groups, no two alike if chance has it so. Prints the figures as
//! JSON. The seed is fixed: the same rules each time.

use std::{collections::BTreeMap, time::Instant};

use eniway_policy::{
    compile::{Compiled, Family, PodFacts, compile},
    model::{
        Action, Direction, GroupId, Groups, Membership, PortRange, Ports, Priority, Protocol, Remote, Rule,
        SecurityGroup,
    },
};

const PODS: u32 = 256;
const GROUPS: u64 = 50;
const RULES: usize = 100;
const ROUNDS: usize = 9;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

fn id(n: u64) -> GroupId {
    format!("sg-{n}").parse().expect("an id")
}

fn rule(dice: &mut Dice) -> Rule {
    let ports = |dice: &mut Dice| {
        let ranges = (0..=dice.below(3)).map(|_| {
            let first = 1 + dice.below(20_000) as u16;
            PortRange::new(first, first + dice.below(3) as u16 * 50).expect("a range")
        });
        Ports::of(ranges.collect())
    };
    let remote = match dice.below(10) {
        0..4 => Remote::Group(id(dice.below(GROUPS))),
        4 => Remote::Any,
        _ => {
            let length = 16 + dice.below(13);
            let text = format!("10.1.{}.{}/{length}", dice.below(4), dice.below(256));
            Remote::Cidr(text.parse::<ipnet::IpNet>().expect("a prefix").trunc())
        }
    };
    Rule {
        direction: if dice.below(2) == 0 { Direction::Ingress } else { Direction::Egress },
        action: if dice.below(5) == 0 { Action::Deny } else { Action::Allow },
        priority: Priority::try_from(1 + dice.below(100)).expect("a priority"),
        protocol: match dice.below(10) {
            0 => Protocol::Any,
            1 | 2 => Protocol::Udp(ports(dice)),
            _ => Protocol::Tcp(ports(dice)),
        },
        remote,
    }
}

fn main() {
    let mut dice = Dice(1);
    let mut groups = Groups::default();
    for n in 0..GROUPS {
        let rules = (0..RULES).map(|_| rule(&mut dice)).collect();
        groups.security_groups.insert(id(n), SecurityGroup { id: id(n), rules });
    }
    let mut pods: BTreeMap<u32, PodFacts> = BTreeMap::new();
    for n in 0..PODS {
        let mut list: Vec<GroupId> = Vec::new();
        for _ in 0..=dice.below(5) {
            let group = id(dice.below(GROUPS));
            if !list.contains(&group) {
                list.push(group);
            }
        }
        let membership = Membership { groups: list.try_into().expect("a list"), revision: 0 };
        let ipv4 = Some([10, 1, (n / 200) as u8, (n % 200 + 2) as u8].into());
        pods.insert(n, PodFacts { ipv4, membership, ..PodFacts::default() });
    }

    let mut times = Vec::new();
    let mut compiled = Compiled::default();
    for round in 1..=ROUNDS {
        let began = Instant::now();
        compiled = compile(&groups, &pods, Family::V4, 1024);
        times.push(began.elapsed().as_secs_f64() * 1000.0);
        eprintln!("compiling, {round} of {ROUNDS}: {:.1} ms", times[round - 1]);
    }
    times.sort_by(f64::total_cmp);
    let tables = &compiled.tables;
    assert!(compiled.undecidable.is_empty(), "{} pods do not fit", compiled.undecidable.len());
    let programs: usize = tables.programs.values().map(Vec::len).sum();
    println!(
        "{{\n  \"compile_ms\": {:.2},\n  \"compile_classes\": {},\n  \"compile_programs\": {programs},\n  \
         \"compile_words\": {}\n}}",
        times[ROUNDS / 2],
        tables.verdicts.len(),
        tables.words.len()
    );
}

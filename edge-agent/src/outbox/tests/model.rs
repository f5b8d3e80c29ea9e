//! Against a reference: what must be true of every message that was ever sealed, whatever happened since.
//!
//! * It is held, or it was acknowledged, or a gap names it; and never held when one of the others. So nothing is
//!   forgotten early, nothing is doubled, and nothing is dropped in silence.
//! * An acknowledgement that was written down (by the lane's next append, or by upkeep) is never taken back.
//! * Gaps count the rows of what they name, once. Closing records and the census say what was sealed.
//! * Only a damaged generation may cost more: what was sealed since its manifest was renewed, in the time that the
//!   interruption names.
//!
//! | planted bug | found by this test | and by |
//! |---|---|---|
//! | an acknowledgement forgets one message too many | yes | `acknowledgements_are_matched_with_what_was_sealed` |
//! | a gap is not written | yes | four others |
//! | forgotten messages are not written down with an append | yes | |
//! | a generation between others is removed before it is written down that it was forgotten | yes | |
//! | the manifest is not renewed | yes | `a_damaged_generation_is_set_aside_and_declared` |
//! | counts are declared before the manifest is renewed | yes | |
//! | counts are declared twice | yes | three others |
//! | what came after the manifest is not read at a start | yes | five others |
//! | an epoch is used twice | yes | nine others |
//! | what is missing is found again and again | it hangs | |
//! | trees that a crash left behind stay | | `what_a_crash_left_behind_does_not_come_back` |
//! | all messages in one tree | | `nothing_lies_in_files_that_nobody_syncs` |
//! | no fdatasync | | `a_power_cut_costs_nothing_that_was_accepted` |
//! | a snapshot of sled that is ahead of its log is believed | | `a_full_disk_costs_the_oldest_readings_and_nothing_else` |
//! | a full disk goes unnoticed; the reserve is not kept | | the same |
//! | anomalies give way before readings | | `when_full_the_oldest_readings_give_way_and_are_declared` |
//! | the caller's entries are not carried over; a drained generation stays | | `what_is_drained_and_idle_is_given_back` |
//! | counts go on every minute in an outage | | `an_outage_of_years_does_not_fill_the_control_lane` |
//! | counts of a fast replay pile up | | `counts_of_a_fast_replay_do_not_pile_up` |
//! | another lane's time stands for the readings' | | `an_interruption_covers_what_a_damaged_log_has_cost` |
//! | no lock | | `two_processes_cannot_have_it` |
//!
//! Those of delivery are found by its own model: forgetting on PUBACK in mode cloud, a window of one more, no rewind,
//! one message too many unacknowledged, packet ids that are one off, sending again at once or to nobody.

use std::{collections::BTreeSet, fs};

use super::*;
use crate::outbox::{generation::Manifest, lane::numbers, room::GIVE_WAY};

type Name = (Uuid, Lane, u64);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Acked {
    No,
    /// Not yet written down: a kill takes it back.
    InMemory,
    Noted,
}

#[derive(Clone, Copy, Debug)]
struct Sealed {
    rows: u64,
    acked: Acked,
    /// Highest event time.
    at: Timestamp,
}

/// The reference queue.
#[derive(Default)]
struct Reference {
    sealed: BTreeMap<Name, Sealed>,
    /// Names that gaps have declared.
    declared: BTreeSet<Name>,
    /// Rows of the control lane as they were read, by message.
    records: BTreeMap<(Uuid, u64), Vec<Row>>,
    polled: i64,
    lost_rows: i64,
}

impl Reference {
    fn append(&mut self, epoch: Uuid, lane: Lane, rows: u64, at: Timestamp) {
        let seq = self.sealed.range((epoch, lane, 0)..=(epoch, lane, u64::MAX)).count() as u64;
        self.sealed.insert((epoch, lane, seq), Sealed { rows, acked: Acked::No, at });
        self.note(lane);
    }

    fn ack(&mut self, epoch: Uuid, lane: Lane, seqs: std::ops::RangeInclusive<u64>) {
        for (name, sealed) in self.sealed.range_mut((epoch, lane, *seqs.start())..=(epoch, lane, *seqs.end()))
        {
            if sealed.acked == Acked::No && !self.declared.contains(name) {
                sealed.acked = Acked::InMemory;
            }
        }
    }

    fn note(&mut self, lane: Lane) {
        for (name, sealed) in &mut self.sealed {
            if name.1 == lane && sealed.acked == Acked::InMemory {
                sealed.acked = Acked::Noted;
            }
        }
    }

    /// The agent was killed: what was not written down may be held again; with `all`, whatever was acknowledged.
    fn killed(&mut self, outbox: &Outbox, all: Option<Lane>) {
        for lane in GIVE_WAY {
            let held: BTreeSet<Name> = names(outbox, lane).collect();
            for (name, sealed) in self.sealed.iter_mut().filter(|(name, _)| name.1 == lane) {
                if held.contains(name) && (sealed.acked == Acked::InMemory || all == Some(lane)) {
                    sealed.acked = Acked::No;
                }
            }
            self.note(lane);
        }
    }

    /// A generation of `lane` was damaged, whose manifest named everything before the index `known`: what came after
    /// it may be gone.
    fn damaged(&mut self, outbox: &Outbox, lane: Lane, known: u64) {
        self.read_control(outbox);
        let next = outbox.lanes()[lane as usize].next;
        let in_order: Vec<Name> = {
            let mut names: Vec<_> = self.sealed.keys().filter(|name| name.1 == lane).copied().collect();
            names.sort();
            names
        };
        // UUIDv7 sort by time, so this is the order of the indices, but for those lost by earlier damage.
        for (index, name) in in_order.into_iter().enumerate().skip(next as usize) {
            assert!(index as u64 >= known, "{name:?} was in the manifest and is neither held nor declared");
            let sealed = self.sealed.remove(&name).unwrap();
            let covers = |r: &Row| lane != Lane::Readings || r.7 <= Some(sealed.at);
            let interrupted = self.rows().any(|r| r.0 == "interruption" && r.1 == name.0 && covers(r));
            assert!(interrupted, "{name:?} is gone and no interruption covers it");
            self.lost_rows += if lane == Lane::Readings { sealed.rows as i64 } else { 0 };
        }
    }

    fn rows(&self) -> impl Iterator<Item = &Row> {
        self.records.values().flatten()
    }

    /// Takes in what the control lane says, and checks that every gap is new and counts right.
    fn read_control(&mut self, outbox: &Outbox) {
        for (epoch, seq, rows) in control_messages(outbox) {
            if self.records.contains_key(&(epoch, seq)) {
                continue;
            }
            for row in rows.iter().filter(|r| r.0 == "gap" && r.2.as_deref() != Some("control")) {
                let lane: Lane = row.2.as_deref().unwrap().parse().unwrap();
                let mut expected = 0;
                for seq in row.3.unwrap()..=row.4.unwrap() {
                    let name = (row.1, lane, seq as u64);
                    let sealed =
                        self.sealed.get(&name).unwrap_or_else(|| panic!("{name:?} was never sealed"));
                    expected += sealed.rows as i64;
                    assert!(self.declared.insert(name), "{name:?} is declared twice");
                }
                assert_eq!(row.5, expected, "{row:?}");
            }
            self.records.insert((epoch, seq), rows);
        }
    }

    fn check(&mut self, outbox: &Outbox) {
        let mut held = BTreeMap::new();
        for lane in GIVE_WAY {
            let mut last = None;
            for message in super::held(outbox, lane) {
                assert!(last < Some(message.index), "in the order of sealing");
                last = Some(message.index);
                let name = (message.identity.epoch, lane, message.identity.seq);
                assert!(held.insert(name, message.identity.rows).is_none(), "{name:?} is held twice");
            }
        }
        self.read_control(outbox);
        for (name, sealed) in &self.sealed {
            let is_held = held.remove(name);
            let gone = sealed.acked != Acked::No || self.declared.contains(name);
            assert_eq!(is_held.is_none(), gone, "{name:?} {sealed:?}");
            assert!(is_held.is_none_or(|rows| rows == sealed.rows));
        }
        assert!(held.is_empty(), "nobody sealed {held:?}");
    }

    /// After the last epoch was closed: the census, and what each epoch says of itself.
    fn check_end(&self) {
        let rows: Vec<Row> = self.rows().cloned().collect();
        let sealed = self.sealed.iter().filter(|(name, _)| name.1 == Lane::Readings);
        let sealed: i64 = sealed.map(|(_, s)| s.rows as i64).sum();
        assert_eq!(counted(&rows, "sealed"), sealed);
        assert_eq!(counted(&rows, "polled"), self.polled - self.lost_rows);
        for row in rows.iter().filter(|r| r.0 == "closing" && r.2.as_deref() != Some("control")) {
            let lane: Lane = row.2.as_deref().unwrap().parse().unwrap();
            let of_lane = self.sealed.range((row.1, lane, 0)..=(row.1, lane, u64::MAX));
            let (messages, readings) =
                of_lane.fold((0, 0), |(n, rows), (_, s)| (n + 1, rows + s.rows as i64));
            assert_eq!((row.4.map_or(0, |last| last + 1), row.5), (messages, readings), "{row:?}");
        }
    }
}

fn names(outbox: &Outbox, lane: Lane) -> impl Iterator<Item = Name> {
    super::held(outbox, lane).into_iter().map(move |m| (m.identity.epoch, lane, m.identity.seq))
}

#[derive(Clone, Debug)]
enum Step {
    Append(Vec<(Lane, usize)>),
    /// Of the epoch so many before the present one; seqs from..=from + n, in any order, twice, or past the end.
    Ack {
        lane: Lane,
        epoch: usize,
        from: u64,
        n: u64,
    },
    AckStranger(Lane),
    Upkeep,
    Wait(i64),
    Kill,
    /// The folder is copied while the agent runs, and the copy goes on.
    Copy,
    Stop,
    Damage {
        lane: Lane,
        oldest: bool,
        part: u8,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let lane =
        || prop_oneof![3 => Just(Lane::Readings), 1 => Just(Lane::Aggregates), 1 => Just(Lane::Anomalies)];
    prop_oneof![
        8 => proptest::collection::vec((lane(), 0usize..40), 1..4).prop_map(Step::Append),
        5 => (lane(), 0usize..3, 0u64..12, 0u64..6)
            .prop_map(|(lane, epoch, from, n)| Step::Ack { lane, epoch, from, n }),
        1 => lane().prop_map(Step::AckStranger),
        1 => Just(Step::Upkeep),
        1 => (0i64..7200).prop_map(Step::Wait),
        1 => Just(Step::Kill),
        1 => Just(Step::Copy),
        1 => Just(Step::Stop),
        1 => (lane(), any::<bool>(), 0u8..8).prop_map(|(lane, oldest, part)| Step::Damage { lane, oldest, part }),
    ]
}

/// Limits of a case: small generations; tight ones drop for room, short ones for age.
fn some_limits() -> impl Strategy<Value = Limits> {
    (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(tight, short, often)| Limits {
        generation_bytes: 6000,
        max_bytes: if tight { 48 << 10 } else { 1 << 30 },
        max_age: Duration::from_secs(if short { 6 * 3600 } else { 30 * 86_400 }),
        census_every: if often { Duration::ZERO } else { Duration::from_secs(3600) },
        ..limits()
    })
}

/// Overwrites an eighth of a generation's log; the index up to which its manifest names everything.
fn damage_part(dir: &Path, lane: Lane, oldest: bool, part: u8) -> Option<u64> {
    let lane_dir = dir.join(lane.as_str());
    let numbers = numbers(&lane_dir).unwrap();
    let number = if oldest { numbers.first() } else { numbers.last() }?;
    let folder = lane_dir.join(format!("{number:08}"));
    let mut bytes = fs::read(folder.join("db")).unwrap();
    let eighth = bytes.len() / 8;
    bytes[eighth * usize::from(part)..][..eighth].iter_mut().for_each(|b| *b ^= 0xa5);
    fs::write(folder.join("db"), bytes).unwrap();
    Some(Manifest::load(&lane_dir.join(format!("{:08}", numbers.last()?))).unwrap().range().end)
}

struct World {
    dir: TempDir,
    limits: Limits,
    outbox: Option<Outbox>,
    epochs: Vec<Uuid>,
    reference: Reference,
    now: i64,
}

impl World {
    fn outbox(&self) -> &Outbox {
        self.outbox.as_ref().unwrap()
    }

    fn start(&mut self) {
        self.now += 60;
        let outbox = Outbox::open(self.dir.path(), self.limits.clone(), at(self.now)).unwrap();
        self.epochs.push(outbox.epoch());
        self.outbox = Some(outbox);
    }

    fn take(&mut self, step: Step) {
        self.now += 60;
        let now = at(self.now);
        match step {
            Step::Append(drafts) => {
                for (lane, n) in drafts.iter().filter(|(_, n)| *n > 0) {
                    let latest = at(self.now + *n as i64 - 1);
                    self.reference.append(self.outbox().epoch(), *lane, *n as u64, latest);
                    self.reference.polled += if *lane == Lane::Readings { *n as i64 } else { 0 };
                }
                let drafts = drafts.into_iter().map(|(lane, n)| draft(lane, self.now, n)).collect();
                let mark = self.now.to_string().into_bytes();
                self.outbox().append(now, drafts, &[("at", mark.clone())]).unwrap();
                assert_eq!(self.outbox().get_meta("at").unwrap(), Some(mark));
            }
            Step::Ack { lane, epoch, from, n } => {
                let epoch = self.epochs[self.epochs.len().saturating_sub(1 + epoch)];
                let located = self.outbox().locate(&[AckRange { epoch, lane, from, to: from + n }]);
                for (lane, range) in located.ranges {
                    self.outbox().forget(lane, range).unwrap();
                }
                self.reference.ack(epoch, lane, from..=from + n);
            }
            Step::AckStranger(lane) => {
                let stranger = AckRange { epoch: Uuid::from_u128(7), lane, from: 0, to: 99 };
                let located = self.outbox().locate(&[stranger]);
                assert!(located.ranges.is_empty() && located.unknown == 1);
            }
            Step::Upkeep => {
                self.outbox().upkeep(now).unwrap();
                GIVE_WAY.into_iter().for_each(|lane| self.reference.note(lane));
            }
            Step::Wait(seconds) => self.now += seconds,
            Step::Kill => {
                self.outbox = None;
                self.start();
                self.reference.killed(self.outbox.as_ref().unwrap(), None);
            }
            Step::Copy => {
                let copy = quick_dir();
                copy_dir(self.dir.path(), copy.path());
                self.outbox = None;
                self.dir = copy;
                self.start();
                self.reference.killed(self.outbox.as_ref().unwrap(), None);
            }
            Step::Stop => {
                self.outbox().close(now).unwrap();
                self.outbox = None;
                self.start();
                self.reference.killed(self.outbox.as_ref().unwrap(), None);
            }
            Step::Damage { lane, oldest, part } => {
                // What the control lane says is read before: its own gaps are not what is looked at here.
                self.reference.read_control(self.outbox.as_ref().unwrap());
                self.outbox = None;
                let known = damage_part(self.dir.path(), lane, oldest, part);
                self.start();
                // Reading is what finds a damaged message.
                self.reference.killed(self.outbox.as_ref().unwrap(), Some(lane));
                self.reference.damaged(self.outbox.as_ref().unwrap(), lane, known.unwrap_or(0));
            }
        }
        self.reference.check(self.outbox.as_ref().unwrap());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 160, ..ProptestConfig::default() })]

    #[test]
    fn every_sealed_message_is_held_acknowledged_or_declared(
        limits in some_limits(), steps in proptest::collection::vec(step(), 1..50)
    ) {
        let (dir, epochs, reference) = (quick_dir(), Vec::new(), Reference::default());
        let mut world = World { dir, limits, outbox: None, epochs, reference, now: 0 };
        world.start();
        for step in steps {
            world.take(step);
        }
        world.outbox().close(at(world.now)).unwrap();
        world.reference.check(world.outbox.as_ref().unwrap());
        world.reference.check_end();
    }
}

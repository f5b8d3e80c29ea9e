//! What to publish next, what may be forgotten, and when to send again (pure).
//!
//! A message is named by its lane and its index in the outbox. On its way it is
//!
//! ```text
//!         ┌───── due, and the cloud is there ─────┐
//!         ▼                                       │
//! held ─publish─▶ flying ────────PUBACK───────▶ landed ─cloud's ack─▶ done
//!   ▲                │
//!   └── connection ──┘
//! ```
//!
//! In [`Mode::Broker`] PUBACK ends it. Only what is done may be forgotten, and whatever was not done when the
//! agent ended is held again.
//!
//! # Invariants
//!
//! * **Window**: publish `n + window` of a connection never goes out before publish `n` was acknowledged, in the
//!   order of sending. MQTT clients number packets 1..=window in a circle, so no packet id is ever in use twice.
//! * **Pairing**: packet ids are handed out in the order of publishing; the k-th `sent` belongs to the k-th publish
//!   of the connection.
//! * **Rewind**: a lost connection makes everything that flew held again, oldest first.
//! * **Bounded**: at most `unacked` messages are flying or landed; only those are in memory.
//! * An acknowledgement of what this agent does not know is counted and changes nothing.
//! * Order: what is sent again first, then live messages (sealed since the connection was made), of which a share
//!   gives way to the backlog; within each, lanes in the order of [`Lane::ALL`], every fourth pick in reverse, so
//!   that no lane starves.
//!
//! Time is a [`Duration`] since any fixed point, monotonic, and handed in.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Range,
    time::Duration,
};

use common::wire::Lane;

use crate::outbox::RangeSet;

/// When a message is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// When the cloud has acknowledged it.
    Cloud,
    /// When the broker has.
    Broker,
}

/// How to deliver.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// When a message is done.
    pub mode: Mode,
    /// Publishes without PUBACK at a time, 1 or more.
    pub window: usize,
    /// Messages flying or landed at a time, 1 or more.
    pub unacked: usize,
    /// Share of publishes that go to the backlog while there is live data too, 0 to 1.
    pub backlog_share: f64,
    /// Wait for the cloud's acknowledgement; doubles with each repetition, ±25 % by `seed`.
    pub resend_after: Duration,
    /// Longest wait.
    pub max_resend_after: Duration,
    /// A heartbeat of the cloud counts for this long.
    pub heartbeat_for: Duration,
    /// Of the jitter.
    pub seed: u64,
}

/// A message: lane and index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageRef {
    /// The queue.
    pub lane: Lane,
    /// Index in the outbox.
    pub index: u64,
}

/// What happened so far, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Publishes.
    pub published: u64,
    /// Publishes of a message that had been published before.
    pub repeated: u64,
    /// Acknowledgements of the broker that belong to nothing.
    pub stray: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Held,
    Flying,
    Landed { due: Duration },
}

#[derive(Clone, Copy, Debug)]
struct Open {
    stage: Stage,
    /// How often it has landed.
    landings: u32,
}

#[derive(Debug)]
struct Slot {
    message: MessageRef,
    pkid: Option<u16>,
    acked: bool,
}

#[derive(Debug, Default)]
struct Queue {
    /// Index of the next message to be sealed.
    head: u64,
    /// Index from which on messages are live.
    live: u64,
    /// Published at least once in this life, or done.
    begun: RangeSet,
    /// Flew when a connection was lost, and to be published again.
    again: BTreeSet<u64>,
}

/// The delivery of one agent.
#[derive(Debug)]
pub struct Delivery {
    rules: Rules,
    window: usize,
    queues: [Queue; 4],
    /// Published in this life and not done.
    open: BTreeMap<MessageRef, Open>,
    /// Landed ones by the time at which they are due.
    due: BTreeSet<(Duration, MessageRef)>,
    /// In the order of publishing; an acknowledged one leaves when all before it have left.
    flight: VecDeque<Slot>,
    connected: bool,
    cloud_until: Option<Duration>,
    credit: f64,
    picks: u64,
    jitter: u64,
    counts: Counts,
}

impl Delivery {
    /// Starts from what an outbox says of each lane, in the order of [`Lane::ALL`]: what is done already, and the
    /// next index.
    pub fn new(rules: Rules, lanes: [(RangeSet, u64); 4]) -> Self {
        let queues = lanes.map(|(begun, head)| Queue { head, live: head, begun, again: BTreeSet::new() });
        Self {
            rules,
            window: rules.window.max(1),
            queues,
            open: BTreeMap::new(),
            due: BTreeSet::new(),
            flight: VecDeque::new(),
            connected: false,
            cloud_until: None,
            credit: 0.0,
            picks: 0,
            jitter: rules.seed,
            counts: Counts::default(),
        }
    }

    /// Messages up to index `head` were sealed in the lane.
    pub fn appended(&mut self, lane: Lane, head: u64) {
        let queue = &mut self.queues[lane as usize];
        queue.head = queue.head.max(head);
    }

    /// A new connection stands; the broker takes `receive_maximum` publishes at a time. What is held now is
    /// backlog.
    pub fn connected(&mut self, receive_maximum: Option<u16>) {
        self.disconnected();
        self.connected = true;
        self.window = self.rules.window.min(receive_maximum.map_or(usize::MAX, usize::from)).max(1);
        for queue in &mut self.queues {
            queue.live = queue.head;
        }
    }

    /// The connection is gone: everything that flew is held again.
    pub fn disconnected(&mut self) {
        self.connected = false;
        for slot in std::mem::take(&mut self.flight) {
            if let Some(open) = self.open.get_mut(&slot.message).filter(|open| open.stage == Stage::Flying) {
                open.stage = Stage::Held;
                self.queues[slot.message.lane as usize].again.insert(slot.message.index);
            }
        }
    }

    /// A heartbeat of the cloud came, or its farewell.
    pub fn heartbeat(&mut self, online: bool, now: Duration) {
        let was_there = self.cloud_is_there(now);
        self.cloud_until = online.then(|| now + self.rules.heartbeat_for);
        if online && !was_there {
            // It may have much to catch up with: what fell due while it was away gets a full wait again.
            let late: Vec<_> = self.due.iter().take_while(|(due, _)| *due <= now).copied().collect();
            for (due, message) in late {
                let landings = self.open.get(&message).map_or(1, |open| open.landings);
                self.due.remove(&(due, message));
                self.land(message, landings, now);
            }
        }
    }

    /// Whether the cloud's heartbeat is fresh.
    pub fn cloud_is_there(&self, now: Duration) -> bool {
        self.cloud_until.is_some_and(|until| now < until)
    }

    /// The message to publish now, if any; [`Self::published`] or [`Self::absent`] must follow before the next call
    /// makes a difference.
    pub fn next(&mut self, now: Duration) -> Option<MessageRef> {
        if !self.connected || self.flight.len() >= self.window {
            return None;
        }
        let reverse = self.picks % 4 == 3;
        let pick = |index_in: &dyn Fn(&Queue) -> Option<u64>| {
            let find =
                |lane: Lane| index_in(&self.queues[lane as usize]).map(|index| MessageRef { lane, index });
            let mut lanes = Lane::ALL.into_iter();
            if reverse { lanes.rev().find_map(find) } else { lanes.find_map(find) }
        };
        if let Some(again) = pick(&|queue| queue.again.first().copied()) {
            return Some(again);
        }
        if self.cloud_is_there(now)
            && let Some((due, message)) = self.due.first()
            && *due <= now
        {
            return Some(*message);
        }
        if self.open.len() >= self.rules.unacked {
            return None;
        }
        let first_in = |queue: &Queue, range: Range<u64>| {
            Some(queue.begun.next_absent(range.start)).filter(|index| *index < range.end)
        };
        let live = pick(&|queue| first_in(queue, queue.live..queue.head));
        let backlog = pick(&|queue| first_in(queue, 0..queue.live));
        if live.is_some() && backlog.is_some() && self.credit + self.rules.backlog_share < 1.0 {
            return live;
        }
        backlog.or(live)
    }

    /// The message that [`Self::next`] named was handed to the client.
    pub fn published(&mut self, message: MessageRef) {
        let queue = &mut self.queues[message.lane as usize];
        queue.again.remove(&message.index);
        let repeated = self.open.contains_key(&message);
        if !repeated {
            self.credit += self.rules.backlog_share;
            if self.credit >= 1.0 || message.index < queue.live {
                self.credit = (self.credit - 1.0).max(0.0);
            }
        }
        queue.begun.insert(message.index..message.index + 1);
        self.picks += 1;
        self.counts.published += 1;
        self.counts.repeated += u64::from(repeated);
        let open = self.open.entry(message).or_insert(Open { stage: Stage::Held, landings: 0 });
        if let Stage::Landed { due } = std::mem::replace(&mut open.stage, Stage::Flying) {
            self.due.remove(&(due, message));
        }
        self.flight.push_back(Slot { message, pkid: None, acked: false });
    }

    /// The outbox no longer has the messages of `range`: they were dropped and declared, or are done.
    pub fn absent(&mut self, lane: Lane, range: Range<u64>) {
        self.finish(lane, range);
    }

    /// The client gave the oldest publish without one this packet id.
    pub fn sent(&mut self, pkid: u16) {
        match self.flight.iter_mut().find(|slot| slot.pkid.is_none()) {
            Some(slot) => slot.pkid = Some(pkid),
            None => self.counts.stray += 1,
        }
    }

    /// The broker has it. In [`Mode::Broker`] the message may be forgotten.
    pub fn acked(&mut self, pkid: u16, now: Duration) -> Option<MessageRef> {
        let Some(slot) = self.flight.iter_mut().find(|slot| slot.pkid == Some(pkid) && !slot.acked) else {
            self.counts.stray += 1;
            return None;
        };
        slot.acked = true;
        let message = slot.message;
        while self.flight.front().is_some_and(|slot| slot.acked) {
            self.flight.pop_front();
        }
        // The cloud may have been faster than the broker.
        let landings = self.open.get(&message)?.landings + 1;
        match self.rules.mode {
            Mode::Broker => {
                self.open.remove(&message);
                Some(message)
            }
            Mode::Cloud => {
                self.land(message, landings, now);
                None
            }
        }
    }

    /// The cloud has these; the outbox has found that they are messages of its own. They may be forgotten.
    pub fn durable(&mut self, lane: Lane, range: Range<u64>) {
        self.finish(lane, range);
    }

    /// When [`Self::next`] may have something though nothing else happened.
    pub fn next_deadline(&self, now: Duration) -> Option<Duration> {
        let (due, _) = self.due.first()?;
        // Without room in the window it is the broker's acknowledgement that is waited for.
        let can_go = self.connected && self.flight.len() < self.window && self.cloud_is_there(now);
        can_go.then_some(*due)
    }

    /// Whether nothing is left to publish and no publish lacks its PUBACK.
    pub fn is_drained(&self) -> bool {
        let begun = |queue: &Queue| queue.again.is_empty() && queue.begun.covers(0..queue.head);
        self.flight.is_empty() && self.queues.iter().all(begun)
    }

    /// Messages that are sealed and not done.
    pub fn unacknowledged(&self) -> u64 {
        let held = self.queues.iter().flat_map(|queue| queue.begun.absent(0..queue.head));
        held.map(|range| range.end - range.start).sum::<u64>() + self.open.len() as u64
    }

    /// Messages that the broker has and the cloud has not acknowledged.
    pub fn landed(&self) -> usize {
        self.due.len()
    }

    /// Publishes without PUBACK, and those that wait for an older one.
    pub fn in_flight(&self) -> usize {
        self.flight.len()
    }

    /// What happened so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    fn land(&mut self, message: MessageRef, landings: u32, now: Duration) {
        let doubled = self.rules.resend_after.saturating_mul(1 << landings.saturating_sub(1).min(16));
        let due = now + doubled.min(self.rules.max_resend_after).mul_f64(0.75 + 0.5 * self.random());
        self.open.insert(message, Open { stage: Stage::Landed { due }, landings });
        self.due.insert((due, message));
    }

    fn finish(&mut self, lane: Lane, range: Range<u64>) {
        let queue = &mut self.queues[lane as usize];
        queue.begun.insert(range.start..range.end.min(queue.head));
        let at = |index| MessageRef { lane, index };
        let done: Vec<MessageRef> =
            self.open.range(at(range.start)..at(range.end)).map(|(m, _)| *m).collect();
        for message in done {
            queue.again.remove(&message.index);
            if let Some(Open { stage: Stage::Landed { due }, .. }) = self.open.remove(&message) {
                self.due.remove(&(due, message));
            }
        }
    }

    /// Uniform in 0..1, by splitmix64.
    fn random(&mut self) -> f64 {
        self.jitter = self.jitter.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.jitter;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WINDOW: usize = 4;

    fn rules(mode: Mode) -> Rules {
        Rules {
            mode,
            window: WINDOW,
            unacked: 9,
            backlog_share: 0.25,
            resend_after: Duration::from_secs(60),
            max_resend_after: Duration::from_secs(900),
            heartbeat_for: Duration::from_secs(90),
            seed: 7,
        }
    }

    fn delivery(mode: Mode, heads: [u64; 4]) -> Delivery {
        Delivery::new(rules(mode), heads.map(|head| (RangeSet::default(), head)))
    }

    fn seconds(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    /// Publishes while it may; returns the messages as (lane, index).
    fn pump(d: &mut Delivery, now: Duration) -> Vec<(Lane, u64)> {
        std::iter::from_fn(|| d.next(now).inspect(|m| d.published(*m)).map(|m| (m.lane, m.index))).collect()
    }

    #[test]
    fn the_window_slides_by_its_oldest() {
        let mut d = delivery(Mode::Broker, [0, 0, 0, 10]);
        d.connected(None);
        assert_eq!(pump(&mut d, seconds(0)).len(), WINDOW);
        (1..=4).for_each(|pkid| d.sent(pkid));
        // 2, 3 and 4 are there, but 1 is not: packet id 1 would be next.
        for pkid in 2..=4 {
            assert!(d.acked(pkid, seconds(0)).is_some());
            assert_eq!(pump(&mut d, seconds(0)), []);
        }
        assert_eq!(d.acked(1, seconds(0)), Some(MessageRef { lane: Lane::Readings, index: 0 }));
        assert_eq!(pump(&mut d, seconds(0)).len(), WINDOW);
        assert_eq!(d.acked(9, seconds(0)), None);
        assert_eq!(d.counts().stray, 1);
    }

    #[test]
    fn a_broker_with_less_room_narrows_the_window() {
        let mut d = delivery(Mode::Broker, [0, 0, 0, 10]);
        d.connected(Some(2));
        assert_eq!(pump(&mut d, seconds(0)).len(), 2);
        d.connected(None);
        assert_eq!(pump(&mut d, seconds(0)).len(), WINDOW);
    }

    #[test]
    fn a_lost_connection_rewinds() {
        let mut d = delivery(Mode::Broker, [0, 0, 0, 10]);
        d.connected(None);
        pump(&mut d, seconds(0));
        (1..=3).for_each(|pkid| d.sent(pkid));
        d.acked(2, seconds(0));
        d.disconnected();
        assert_eq!(d.next(seconds(0)), None);
        d.connected(None);
        let order: Vec<u64> = pump(&mut d, seconds(1)).into_iter().map(|(_, index)| index).collect();
        assert_eq!(order, [0, 2, 3, 4]);
    }

    #[test]
    fn urgent_lanes_first_live_before_backlog_and_nobody_starves() {
        let mut d = Delivery::new(
            Rules { window: 100, unacked: 100, ..rules(Mode::Broker) },
            [0, 0, 0, 8].map(|head| (RangeSet::default(), head)),
        );
        d.connected(None);
        d.appended(Lane::Readings, 24);
        d.appended(Lane::Anomalies, 2);
        let order = pump(&mut d, seconds(0));
        assert_eq!(order[..2], [(Lane::Anomalies, 0), (Lane::Anomalies, 1)]);
        let backlog =
            |part: &[(Lane, u64)]| part.iter().filter(|(l, i)| *l == Lane::Readings && *i < 8).count();
        assert_eq!(backlog(&order[..12]), 3, "a quarter: {order:?}");
        assert_eq!(order.len(), 26);
        // Anomalies without end do not keep a reading back.
        d.appended(Lane::Anomalies, 60);
        d.appended(Lane::Readings, 25);
        let order = pump(&mut d, seconds(0));
        assert!(order[..4].contains(&(Lane::Readings, 24)), "{order:?}");
    }

    #[test]
    fn without_the_clouds_acknowledgement_it_is_sent_again_while_the_cloud_is_there() {
        let mut d = delivery(Mode::Cloud, [0, 0, 0, 1]);
        d.connected(None);
        d.heartbeat(true, seconds(0));
        let mut waits = Vec::new();
        let mut now = seconds(0);
        for _ in 0..7 {
            assert_eq!(pump(&mut d, now).len(), 1);
            d.sent(1);
            assert_eq!(d.acked(1, now), None, "the broker's word is not enough");
            let due = d.next_deadline(now).unwrap();
            waits.push((due - now).as_secs_f64());
            // One heartbeat before it is due and one when it is.
            while now < due {
                now = due.min(now + seconds(30));
                if now < due {
                    d.heartbeat(true, now);
                    assert_eq!(d.next(now), None);
                }
            }
        }
        for (wait, expected) in waits.iter().zip([60.0, 120.0, 240.0, 480.0, 900.0, 900.0, 900.0]) {
            assert!((0.75 * expected..=1.25 * expected).contains(wait), "{waits:?}");
        }
        // A cloud that is away gets nothing, and after its return no more than after a first publish.
        pump(&mut d, now);
        d.sent(1);
        d.acked(1, now);
        let later = now + seconds(5000);
        assert_eq!((d.next(later), d.next_deadline(later)), (None, None));
        d.heartbeat(true, later);
        assert_eq!(d.next(later), None);
        assert!(d.next_deadline(later).is_some_and(|due| due > later + seconds(600)));
        d.durable(Lane::Readings, 0..1);
        assert_eq!((d.next_deadline(later), d.landed(), d.is_drained()), (None, 0, true));
    }

    #[test]
    fn what_fell_due_with_no_room_in_the_window_waits_for_a_cloud_that_left_meanwhile() {
        let mut d = delivery(Mode::Cloud, [0, 0, 0, 1]);
        d.connected(None);
        d.heartbeat(true, seconds(0));
        pump(&mut d, seconds(0));
        d.sent(1);
        d.acked(1, seconds(0));
        d.appended(Lane::Readings, 5);
        assert_eq!(pump(&mut d, seconds(0)).len(), WINDOW);
        d.heartbeat(true, seconds(80));
        assert_eq!(d.next(seconds(80)), None, "it is due and the window is full");
        assert_eq!(d.next_deadline(seconds(80)), None, "so there is nothing to wake up for");
        d.heartbeat(false, seconds(80));
        (2..=5).for_each(|n| d.sent((n - 1) % WINDOW as u16 + 1));
        (2..=5).for_each(|n| assert_eq!(d.acked((n - 1) % WINDOW as u16 + 1, seconds(80)), None));
        assert_eq!((d.in_flight(), d.next(seconds(80))), (0, None));
        d.heartbeat(true, seconds(200));
        d.heartbeat(true, seconds(280));
        assert_eq!(pump(&mut d, seconds(280)).len(), WINDOW, "there again, and waited for");
    }

    #[test]
    fn agents_do_not_send_again_in_step() {
        let wait = |seed| {
            let mut d = Delivery::new(
                Rules { seed, ..rules(Mode::Cloud) },
                [0, 0, 0, 1].map(|n| (RangeSet::default(), n)),
            );
            d.connected(None);
            d.heartbeat(true, seconds(0));
            pump(&mut d, seconds(0));
            d.sent(1);
            d.acked(1, seconds(0));
            d.next_deadline(seconds(0)).unwrap()
        };
        let waits: BTreeSet<Duration> = (0..20).map(wait).collect();
        assert_eq!(waits.len(), 20);
        assert!(waits.last().unwrap().saturating_sub(*waits.first().unwrap()) > seconds(15), "{waits:?}");
    }

    #[test]
    fn unacked_messages_are_bounded() {
        let mut d = delivery(Mode::Cloud, [0, 0, 0, 100]);
        d.connected(None);
        let mut published = 0;
        let mut pkid = 0;
        loop {
            let n = pump(&mut d, seconds(0)).len();
            if n == 0 {
                break;
            }
            published += n;
            for _ in 0..n {
                pkid = pkid % WINDOW as u16 + 1;
                d.sent(pkid);
                d.acked(pkid, seconds(0));
            }
        }
        assert_eq!((published, d.landed()), (9, 9));
        d.durable(Lane::Readings, 3..5);
        assert_eq!(pump(&mut d, seconds(0)), [(Lane::Readings, 9), (Lane::Readings, 10)]);
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Append(usize),
        Connect,
        Lose,
        Pump,
        /// The network carries the n-th publish that has no PUBACK, out of order.
        Ack(usize),
        /// The cloud acknowledges some of what the broker has.
        Cloud(usize),
        Stray(u16),
        Heartbeat(bool),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0usize..4).prop_map(Step::Append),
            1 => Just(Step::Connect),
            1 => Just(Step::Lose),
            5 => Just(Step::Pump),
            6 => (0usize..5).prop_map(Step::Ack),
            4 => (0usize..9).prop_map(Step::Cloud),
            1 => (5u16..9).prop_map(Step::Stray),
            1 => any::<bool>().prop_map(Step::Heartbeat),
            2 => (0u64..400).prop_map(Step::Wait),
        ]
    }

    /// A client as MQTT describes it, a broker that never forgets, and a cloud.
    #[derive(Default)]
    struct World {
        heads: [u64; 4],
        up: bool,
        /// Of this connection, by number of the publish: message, and whether PUBACK came.
        publishes: Vec<(MessageRef, bool)>,
        broker: BTreeSet<MessageRef>,
        cloud: BTreeSet<MessageRef>,
        forgotten: BTreeSet<MessageRef>,
        /// When the broker acknowledged what the cloud has not.
        landed: BTreeMap<MessageRef, Duration>,
        heard: Option<Duration>,
    }

    impl World {
        fn pump(&mut self, d: &mut Delivery, now: Duration) {
            let before = self.publishes.len();
            while let Some(message) = d.next(now) {
                assert!(self.up, "published without a connection");
                assert!(message.index < self.heads[message.lane as usize], "published what is not there");
                assert!(!self.forgotten.contains(&message), "published what was forgotten");
                let n = self.publishes.len();
                assert!(
                    n < WINDOW || self.publishes[..=n - WINDOW].iter().all(|(_, acked)| *acked),
                    "packet id in use twice"
                );
                if let Some(landed) = self.landed.remove(&message) {
                    let fresh = self.heard.is_some_and(|heard| now < heard + seconds(90));
                    assert!(fresh, "sent again though the cloud is away");
                    assert!(now >= landed + seconds(45), "sent again after {:?}", now - landed);
                }
                self.publishes.push((message, false));
                d.published(message);
            }
            // The client numbers what was queued for it some time after that.
            (before..self.publishes.len()).for_each(|n| d.sent((n % WINDOW) as u16 + 1));
        }

        fn ack(&mut self, d: &mut Delivery, n: usize, mode: Mode, now: Duration) {
            let open: Vec<usize> = (0..self.publishes.len()).filter(|i| !self.publishes[*i].1).collect();
            let Some(&at) = open.get(n) else { return };
            self.publishes[at].1 = true;
            let message = self.publishes[at].0;
            self.broker.insert(message);
            if !self.cloud.contains(&message) {
                self.landed.insert(message, now);
            }
            if let Some(done) = d.acked((at % WINDOW) as u16 + 1, now) {
                assert_eq!((mode, done), (Mode::Broker, message), "paired with another message");
                self.forgotten.insert(done);
            }
        }

        fn heartbeat(&mut self, d: &mut Delivery, online: bool, now: Duration) {
            self.heard = online.then_some(now);
            d.heartbeat(online, now);
        }

        fn acknowledge(&mut self, d: &mut Delivery, n: usize) {
            let Some(&message) = self.broker.difference(&self.cloud).nth(n) else { return };
            self.cloud.insert(message);
            self.landed.remove(&message);
            d.durable(message.lane, message.index..message.index + 1);
            self.forgotten.insert(message);
        }

        fn check(&self, mode: Mode, d: &Delivery) {
            let owner = if mode == Mode::Broker { &self.broker } else { &self.cloud };
            assert!(self.forgotten.is_subset(owner), "forgotten early");
            assert!(d.open.len() <= 9, "too many unacknowledged");
            let sealed: u64 = self.heads.iter().sum();
            assert_eq!(d.unacknowledged(), sealed - self.forgotten.len() as u64);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

        #[test]
        fn nothing_is_forgotten_early_and_everything_arrives(
            cloud in any::<bool>(), steps in proptest::collection::vec(step(), 1..120)
        ) {
            let mode = if cloud { Mode::Cloud } else { Mode::Broker };
            let mut world = World::default();
            let mut d = delivery(mode, [0; 4]);
            let mut now = Duration::ZERO;
            for step in steps {
                match step {
                    Step::Append(lane) => {
                        world.heads[lane] += 1;
                        d.appended(Lane::ALL[lane], world.heads[lane]);
                    }
                    Step::Connect => {
                        (world.up, world.publishes) = (true, Vec::new());
                        d.connected(None);
                    }
                    Step::Lose => {
                        (world.up, world.publishes) = (false, Vec::new());
                        d.disconnected();
                    }
                    Step::Pump => world.pump(&mut d, now),
                    Step::Ack(n) => world.ack(&mut d, n, mode, now),
                    Step::Cloud(n) if cloud => world.acknowledge(&mut d, n),
                    Step::Cloud(_) => {}
                    Step::Stray(pkid) => prop_assert_eq!(d.acked(pkid, now), None),
                    Step::Heartbeat(online) => world.heartbeat(&mut d, online, now),
                    Step::Wait(s) => now += seconds(s),
                }
                world.check(mode, &d);
            }
            // A calm end: everything is delivered.
            (world.up, world.publishes) = (true, Vec::new());
            d.connected(None);
            let all: u64 = world.heads.iter().sum();
            for _ in 0..4 * all + 4 {
                now += seconds(1);
                world.heartbeat(&mut d, true, now);
                world.pump(&mut d, now);
                world.ack(&mut d, 0, mode, now);
                if cloud {
                    world.acknowledge(&mut d, 0);
                }
                world.check(mode, &d);
            }
            prop_assert_eq!(world.broker.len() as u64, all);
            prop_assert_eq!(world.forgotten.len() as u64, all);
            prop_assert!(d.is_drained() && d.open.is_empty() && d.due.is_empty());
            prop_assert_eq!(d.unacknowledged(), 0);
        }
    }
}

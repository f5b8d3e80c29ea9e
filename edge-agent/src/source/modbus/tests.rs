//! The source against slaves that speak the protocol by themselves: over TCP, and on a pseudo-terminal.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use common::time::{Clock, SystemClock};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Mutex, mpsc, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_serial::{SerialPort, SerialStream};

use super::{
    attendance::FIRST_PAUSE,
    plan::{Limits, Register, plan},
    value::{Encoding, Form},
    *,
};
use crate::{
    census::Outcome,
    metrics::Metrics,
    source::{Context, LinuxHardware, bus},
};

const TIMEOUT: Duration = Duration::from_millis(250);

/// What a slave does with a request for `count` values from `start`.
#[derive(Clone, Debug)]
enum Answer {
    Words(Vec<u16>),
    Exception(u8),
    Late(Duration, Vec<u16>),
    /// With a wrong checksum, or over TCP a wrong length.
    Garbled,
    Silence,
    HangUp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asked {
    unit: u8,
    function: u8,
    start: u16,
    count: u16,
}

/// Slaves, and what they were asked.
struct Slaves {
    answer: Box<dyn Fn(Asked, usize) -> Answer + Send + Sync>,
    asked: std::sync::Mutex<Vec<Asked>>,
    connections: AtomicUsize,
}

impl Slaves {
    /// `answer` is given the request and how many came before it.
    fn new(answer: impl Fn(Asked, usize) -> Answer + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            answer: Box::new(answer),
            asked: std::sync::Mutex::default(),
            connections: AtomicUsize::default(),
        })
    }

    /// Takes the unit, the function and its data off a request.
    fn take(&self, unit: u8, pdu: &[u8]) -> (Asked, Answer) {
        let word = |at: usize| u16::from_be_bytes([pdu[at], pdu[at + 1]]);
        let asked = Asked { unit, function: pdu[0], start: word(1), count: word(3) };
        let mut all = self.asked.lock().unwrap();
        all.push(asked);
        (asked, (self.answer)(asked, all.len() - 1))
    }

    fn asked(&self, unit: u8) -> usize {
        self.asked.lock().unwrap().iter().filter(|asked| asked.unit == unit).count()
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// Listens on a free port, or on the given one.
    async fn tcp(self: &Arc<Self>, port: u16) -> (Address, JoinHandle<()>) {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let slaves = Arc::clone(self);
        let serving = tokio::spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                slaves.connections.fetch_add(1, Ordering::SeqCst);
                open.spawn(serve_tcp(Arc::clone(&slaves), stream));
            }
        });
        (Address::Tcp { host: "127.0.0.1".into(), port }, serving)
    }

    /// Slaves on a pseudo-terminal.
    fn rtu(self: &Arc<Self>) -> (Address, JoinHandle<()>) {
        let (master, line) = SerialStream::pair().unwrap();
        let path = line.name().unwrap();
        let address = Address::Rtu {
            path,
            baud: 115_200,
            parity: tokio_serial::Parity::Even,
            stop_bits: tokio_serial::StopBits::One,
        };
        (address, tokio::spawn(serve_rtu(Arc::clone(self), master)))
    }
}

/// Function and data of an answer; nothing where there is none.
fn pdu(function: u8, answer: &Answer) -> Vec<u8> {
    match answer {
        Answer::Exception(code) => vec![function | 0x80, *code],
        Answer::Words(words) | Answer::Late(_, words) => {
            let data: Vec<u8> = match function {
                // A bit a word, eight in a byte, the first one least significant.
                1 | 2 => words
                    .chunks(8)
                    .map(|eight| eight.iter().rev().fold(0, |b, w| b << 1 | *w as u8))
                    .collect(),
                _ => words.iter().flat_map(|word| word.to_be_bytes()).collect(),
            };
            [vec![function, data.len() as u8], data].concat()
        }
        Answer::Garbled => vec![function, 2, 0],
        Answer::Silence | Answer::HangUp => Vec::new(),
    }
}

async fn serve_tcp(slaves: Arc<Slaves>, stream: TcpStream) {
    let (mut from, to) = stream.into_split();
    let to = Arc::new(Mutex::new(to));
    let mut request = [0; 12];
    while from.read_exact(&mut request).await.is_ok() {
        let (asked, answer) = slaves.take(request[6], &request[7..]);
        if matches!(answer, Answer::HangUp) {
            return;
        }
        let pdu = pdu(asked.function, &answer);
        if pdu.is_empty() {
            continue;
        }
        let length = (pdu.len() as u16 + 1).to_be_bytes();
        let frame = [&request[..4], &length, &[asked.unit], &pdu].concat();
        let to = Arc::clone(&to);
        tokio::spawn(async move {
            if let Answer::Late(by, _) = answer {
                sleep(by).await;
            }
            // The other end may be gone.
            let _ = to.lock().await.write_all(&frame).await;
        });
    }
}

async fn serve_rtu(slaves: Arc<Slaves>, master: SerialStream) {
    let (mut from, to) = tokio::io::split(master);
    let to = Arc::new(Mutex::new(to));
    let mut request = [0; 8];
    loop {
        if from.read_exact(&mut request).await.is_err() {
            // Nobody has opened the other end.
            sleep(Duration::from_millis(5)).await;
            continue;
        }
        assert_eq!(crc(&request), [0, 0], "the agent's checksum");
        let (asked, answer) = slaves.take(request[0], &request[1..]);
        let pdu = pdu(asked.function, &answer);
        if pdu.is_empty() {
            continue;
        }
        let mut frame = [vec![asked.unit], pdu].concat();
        let sum = crc(&frame);
        frame.extend(sum);
        if matches!(answer, Answer::Garbled) {
            frame.extend([0xAA, 0x55]);
        }
        let to = Arc::clone(&to);
        tokio::spawn(async move {
            if let Answer::Late(by, _) = answer {
                sleep(by).await;
            }
            to.lock().await.write_all(&frame).await.unwrap();
        });
    }
}

/// CRC-16/MODBUS as it is sent, low byte first; zero over a frame that ends with its own.
fn crc(bytes: &[u8]) -> [u8; 2] {
    let mut crc = 0xFFFF_u16;
    for byte in bytes {
        crc ^= u16::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xA001 } else { crc >> 1 };
        }
    }
    crc.to_le_bytes()
}

/// One device for each (unit, table, address, form), in this order, all with the same period.
fn settings(address: &Address, period: Duration, wanted: &[(u8, Table, u16, Form)]) -> Settings {
    let mut units: BTreeMap<u8, Vec<Register>> = BTreeMap::new();
    for ((unit, table, address, form), device) in wanted.iter().zip(0..) {
        let encoding = Encoding {
            form: *form,
            little_words: false,
            little_bytes: false,
            no_value: vec![0xDEAD],
            scale: 1.0,
            offset: 0.0,
        };
        let register =
            Register { table: *table, address: *address, period, encoding, device: DeviceIx(device) };
        units.entry(*unit).or_default().push(register);
    }
    let limits = Limits { max_registers: 125, max_gap: 0 };
    let requests = units.into_iter().flat_map(|(unit, registers)| plan(unit, limits, registers)).collect();
    Settings { address: address.clone(), timeout: TIMEOUT, requests }
}

/// Everything is due; values by device.
async fn poll(bus: &mut ModbusBus) -> (Vec<Option<f64>>, Vec<&'static str>) {
    let at = Timestamp::from_micros(1);
    let all: Vec<usize> = (0..bus.settings.requests.len()).collect();
    let poll = bus.read(at, &all).await;
    let mut readings = poll.readings;
    readings.sort_by_key(|reading| reading.device);
    for (reading, device) in readings.iter().zip(0..) {
        assert_eq!((reading.ts, reading.device), (at, DeviceIx(device)), "one reading a device");
        assert_eq!(reading.quality == Quality::Bad, reading.value.is_nan());
    }
    (readings.iter().map(|reading| Some(reading.value).filter(|v| v.is_finite())).collect(), poll.faults)
}

/// Long enough for the first pause, and for what is still under way.
async fn after_the_pause() {
    sleep(FIRST_PAUSE + TIMEOUT).await;
}

#[tokio::test]
async fn all_four_tables_are_read() {
    let slaves = Slaves::new(|asked, _| match asked.function {
        1 => Answer::Words(vec![0, 1, 1, 0, 0, 0, 0, 0, 1]),
        2 => Answer::Words(vec![1]),
        3 => Answer::Words(vec![0xDEAD, 5]),
        4 => Answer::Words(vec![0x4366, 0x3333]),
        _ => Answer::Exception(1),
    });
    let wanted = [
        (3, Table::Coil, 20, Form::Bit(0)),
        (3, Table::Coil, 21, Form::Bit(0)),
        (3, Table::Discrete, 0, Form::Bit(0)),
        (3, Table::Holding, 7, Form::U16),
        (3, Table::Holding, 8, Form::U16),
        (3, Table::Input, 0, Form::F32),
    ];
    let values =
        [0.0, 1.0, 1.0, f64::NAN, 5.0, f64::from(230.2_f32)].map(|v| Some(v).filter(|v| v.is_finite()));
    for (address, serving) in [slaves.tcp(0).await, slaves.rtu()] {
        let mut wanted = wanted.to_vec();
        // Nine bits are two bytes.
        wanted.extend((22..29).map(|at| (3, Table::Coil, at, Form::Bit(0))));
        let mut bus = ModbusBus::new(settings(&address, Duration::from_secs(1), &wanted));
        let (got, faults) = poll(&mut bus).await;
        assert_eq!((&got[..6], faults), (&values[..], vec![]), "{address}");
        assert_eq!(got[12], Some(1.0));
        serving.abort();
    }
    let coils = slaves.asked.lock().unwrap()[0];
    assert_eq!(coils, Asked { unit: 3, function: 1, start: 20, count: 9 });
}

#[tokio::test]
async fn an_exception_is_one_requests_own() {
    let slaves = Slaves::new(|asked, _| match asked.start {
        0 => Answer::Exception(2),
        start => Answer::Words(vec![start]),
    });
    let (address, _serving) = slaves.tcp(0).await;
    let wanted = [(1, Table::Input, 0, Form::U16), (1, Table::Input, 9, Form::U16)];
    let mut bus = ModbusBus::new(settings(&address, Duration::from_secs(1), &wanted));
    for _ in 0..3 {
        assert_eq!(poll(&mut bus).await, (vec![None, Some(9.0)], vec!["exception"]));
    }
    assert_eq!(slaves.connections(), 1);
}

#[tokio::test]
async fn a_dead_slave_leaves_the_others_unharmed() {
    let wanted = [
        (1, Table::Input, 4, Form::U16),
        (2, Table::Input, 5, Form::U16),
        (2, Table::Input, 50, Form::U16),
        (3, Table::Input, 6, Form::U16),
    ];
    let alive = vec![Some(4.0), None, None, Some(6.0)];
    let slaves = Slaves::new(|asked, _| match asked.unit {
        2 => Answer::Silence,
        _ => Answer::Words(vec![asked.start]),
    });
    for (address, serving) in [slaves.tcp(0).await, slaves.rtu()] {
        let before = slaves.asked(2);
        let mut bus = ModbusBus::new(settings(&address, Duration::from_secs(1), &wanted));
        assert_eq!(poll(&mut bus).await, (alive.clone(), vec!["timeout", "away"]), "{address}");
        let began = Instant::now();
        for _ in 0..10 {
            assert_eq!(poll(&mut bus).await, (alive.clone(), vec!["away", "away"]), "{address}");
        }
        assert!(began.elapsed() < 5 * TIMEOUT, "nobody waits for it: {:?}", began.elapsed());
        assert_eq!(slaves.asked(2) - before, 1, "it is left alone until its pause is over");
        after_the_pause().await;
        assert_eq!(poll(&mut bus).await, (alive.clone(), vec!["timeout", "away"]), "{address}");
        assert_eq!(slaves.asked(2) - before, 2);
        serving.abort();
    }
}

#[tokio::test]
async fn a_slave_that_comes_back_is_read_again() {
    let slaves = Slaves::new(|asked, _| Answer::Words(vec![asked.start]));
    let (address, serving) = slaves.tcp(0).await;
    let wanted = [(1, Table::Holding, 8, Form::U16)];
    let mut bus = ModbusBus::new(settings(&address, Duration::from_secs(1), &wanted));
    assert_eq!(poll(&mut bus).await, (vec![Some(8.0)], vec![]));
    serving.abort();
    assert!(serving.await.unwrap_err().is_cancelled());
    // The connection is found dead, and nobody accepts another.
    assert_eq!(poll(&mut bus).await, (vec![None], vec!["open"]));
    assert_eq!(poll(&mut bus).await, (vec![None], vec!["away"]));
    let Address::Tcp { port, .. } = address else { panic!("{address}") };
    let (_, _serving) = slaves.tcp(port).await;
    after_the_pause().await;
    assert_eq!(poll(&mut bus).await, (vec![Some(8.0)], vec![]));
}

#[tokio::test]
async fn a_server_that_closes_idle_connections_is_read_at_every_poll() {
    let slaves = Slaves::new(|asked, n| match n % 2 {
        0 => Answer::Words(vec![asked.start]),
        _ => Answer::HangUp,
    });
    let (address, _serving) = slaves.tcp(0).await;
    let mut bus =
        ModbusBus::new(settings(&address, Duration::from_secs(1), &[(1, Table::Input, 8, Form::U16)]));
    for connections in 1..4 {
        assert_eq!(poll(&mut bus).await, (vec![Some(8.0)], vec![]));
        assert_eq!(slaves.connections(), connections);
    }
}

/// The first request is answered with 111, too late; all others with 222, at once.
fn late() -> Arc<Slaves> {
    Slaves::new(|_, n| match n {
        0 => Answer::Late(2 * TIMEOUT, vec![111]),
        _ => Answer::Words(vec![222]),
    })
}

async fn check_late(slaves: &Slaves, address: &Address) {
    let wanted = [(1, Table::Input, 8, Form::U16)];
    let mut bus = ModbusBus::new(settings(address, Duration::from_secs(1), &wanted));
    assert_eq!(poll(&mut bus).await, (vec![None], vec!["timeout"]));
    after_the_pause().await;
    assert_eq!(poll(&mut bus).await, (vec![Some(222.0)], vec![]));
    assert_eq!(slaves.asked(1), 2, "nothing was asked twice for it");
}

#[tokio::test]
async fn a_late_answer_is_not_taken_for_the_next_ones_over_tcp() {
    let slaves = late();
    check_late(&slaves, &slaves.tcp(0).await.0).await;
}

#[tokio::test]
async fn a_late_answer_is_not_taken_for_the_next_ones_on_a_line() {
    let slaves = late();
    check_late(&slaves, &slaves.rtu().0).await;
}

#[tokio::test]
async fn a_late_answer_amid_another_slaves_request_costs_that_one_nothing() {
    let slaves = Slaves::new(|asked, n| match (asked.unit, n) {
        (1, 0) => Answer::Late(TIMEOUT * 3 / 2, vec![111]),
        // Its request comes after the timeout, so this is after the late answer.
        (2, 1) => Answer::Late(TIMEOUT * 4 / 5, vec![222]),
        _ => Answer::Words(vec![333]),
    });
    let (address, _serving) = slaves.rtu();
    let wanted = [(1, Table::Input, 8, Form::U16), (2, Table::Input, 8, Form::U16)];
    let mut bus = ModbusBus::new(settings(&address, Duration::from_secs(1), &wanted));
    assert_eq!(poll(&mut bus).await, (vec![None, Some(333.0)], vec!["timeout"]));
}

#[tokio::test]
async fn a_damaged_answer_is_no_value_and_no_absence() {
    let check = async |rtu: bool, first: Answer, wanted: (Vec<Option<f64>>, Vec<&'static str>)| {
        let slaves = Slaves::new(move |_, n| if n == 0 { first.clone() } else { Answer::Words(vec![5]) });
        let (address, _serving) = if rtu { slaves.rtu() } else { slaves.tcp(0).await };
        let wanted_registers = [(1, Table::Input, 8, Form::U16)];
        let mut bus = ModbusBus::new(settings(&address, Duration::from_secs(1), &wanted_registers));
        assert_eq!(poll(&mut bus).await, wanted, "{address}");
        assert_eq!(poll(&mut bus).await, (vec![Some(5.0)], vec![]), "{address}");
    };
    check(false, Answer::Garbled, (vec![None], vec!["protocol"])).await;
    check(false, Answer::Words(vec![1, 2]), (vec![None], vec!["protocol"])).await;
    check(true, Answer::Words(vec![1, 2]), (vec![None], vec!["protocol"])).await;
    // A disturbance on a line is worth a second try.
    check(true, Answer::Garbled, (vec![Some(5.0)], vec![])).await;
}

#[tokio::test]
async fn a_gateways_word_counts_for_the_slave_alone() {
    let slaves = Slaves::new(|asked, _| match asked.unit {
        1 => Answer::Exception(0x0B),
        _ => Answer::Words(vec![5]),
    });
    let (address, _serving) = slaves.tcp(0).await;
    let wanted = [(1, Table::Input, 0, Form::U16), (2, Table::Input, 0, Form::U16)];
    let mut bus = ModbusBus::new(settings(&address, Duration::from_secs(1), &wanted));
    assert_eq!(poll(&mut bus).await, (vec![None, Some(5.0)], vec!["unreached"]));
    assert_eq!(poll(&mut bus).await, (vec![None, Some(5.0)], vec!["away"]));
    assert_eq!((slaves.connections(), slaves.asked(1)), (1, 1));
}

#[tokio::test]
async fn a_converter_that_is_pulled_out_and_put_back() {
    let slaves = Slaves::new(|_, _| Answer::Words(vec![5]));
    let (address, serving) = slaves.rtu();
    let mut bus =
        ModbusBus::new(settings(&address, Duration::from_secs(1), &[(1, Table::Input, 8, Form::U16)]));
    assert_eq!(poll(&mut bus).await, (vec![Some(5.0)], vec![]));
    serving.abort();
    assert!(serving.await.unwrap_err().is_cancelled());
    assert_eq!(poll(&mut bus).await, (vec![None], vec!["open"]));
    // Another one, under the old name.
    let (again, _serving) = slaves.rtu();
    bus.link = Link::new(again, TIMEOUT);
    after_the_pause().await;
    assert_eq!(poll(&mut bus).await, (vec![Some(5.0)], vec![]));
}

#[tokio::test]
async fn probing_lists_who_answers() {
    let slaves = Slaves::new(|asked, _| match asked.unit {
        2 => Answer::Words(vec![5]),
        4 => Answer::Exception(2),
        5 => Answer::Exception(0x0B),
        _ => Answer::Silence,
    });
    for address in [slaves.tcp(0).await.0, slaves.rtu().0] {
        assert_eq!(probe(&address, 1..=5, TIMEOUT / 3).await.unwrap(), [2, 4], "{address}");
    }
    let nowhere = Address::Rtu {
        path: "/dev/does-not-exist".into(),
        baud: 9_600,
        parity: tokio_serial::Parity::None,
        stop_bits: tokio_serial::StopBits::One,
    };
    let error = format!("{:#}", probe(&nowhere, 1..=5, TIMEOUT).await.unwrap_err());
    assert!(error.starts_with("opening rtu:///dev/does-not-exist: "), "{error}");
}

#[tokio::test]
async fn every_tick_is_accounted_for() {
    const PERIOD: Duration = Duration::from_millis(40);
    let slaves = Slaves::new(|asked, _| match asked.unit {
        2 => Answer::Silence,
        _ => Answer::Words(vec![asked.start]),
    });
    let (address, _serving) = slaves.rtu();
    let bus = settings(&address, PERIOD, &[(1, Table::Input, 4, Form::U16), (2, Table::Input, 5, Form::U16)]);
    let (out, mut polled) = mpsc::channel(4);
    let (stop, stopped) = watch::channel(false);
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let context = Context {
        hardware: Arc::new(LinuxHardware),
        clock,
        resume_after: None,
        out,
        stop: stopped,
        metrics: Arc::new(Metrics::default()),
    };
    let longest = bus.longest_poll();
    let task = tokio::spawn(bus::run(move || ModbusBus::new(bus.clone()), longest, context));
    let mut next = None;
    let mut skipped = 0;
    for _ in 0..20 {
        let batch = timeout(Duration::from_secs(5), polled.recv()).await.unwrap().unwrap();
        let good = batch.readings.iter().filter(|reading| reading.quality == Quality::Good).count();
        assert_eq!((batch.readings.len(), good), (2, 1), "{batch:?}");
        // A tick is read or skipped, and none comes twice.
        assert_eq!(batch.at, next.unwrap_or(batch.at));
        let missed = batch.census.total(Outcome::Skipped);
        assert_eq!(batch.census.total(Outcome::Polled), 2 + missed);
        next = Some(batch.at + PERIOD + PERIOD * u32::try_from(missed / 2).unwrap());
        skipped += missed;
    }
    assert!(skipped >= 4, "the timeout of the dead slave is several periods long: {skipped}");
    stop.send_replace(true);
    // One more batch may be on its way.
    while polled.recv().await.is_some() {}
    task.await.unwrap();
}

use std::{
    fs::OpenOptions,
    io::{Read as _, Write as _},
    sync::atomic::{AtomicI64, Ordering},
};

use smart_node::rtu::crc16;

use super::*;
use crate::{bus::SimI2c, chip::SimDelay, plant::Signal, register_map::agent};

const ADDRESS: u8 = 9;

/// The firmware at the press of a plant, whose clock shows µs since the anchor.
fn at_the_press(clock: &Arc<AtomicI64>) -> (Node<SimI2c, SimDelay>, Arc<Plant>, Timestamp) {
    let anchor: Timestamp = ANCHOR.parse().unwrap();
    let plant = Arc::new(Plant::demo(anchor, 0).unwrap());
    let clock = Arc::clone(clock);
    let time =
        SimTime::new(move || Timestamp::from_micros(anchor.as_micros() + clock.load(Ordering::Relaxed)));
    let hardware = SimHardware::of_plant(&plant, Faults::new(0, Rates::default()), time);
    let i2c = hardware.i2c("/dev/i2c-1").unwrap();
    let slave = Slave::new(ADDRESS, BAUD).unwrap();
    let node = Node::new(i2c, hardware.delay(), node::Address::Address0x44, slave, 0);
    (node, plant, anchor)
}

/// A request of this PDU as it is on the wire.
fn frame(pdu: &[u8]) -> Vec<u8> {
    let frame = [&[ADDRESS], pdu].concat();
    [&frame[..], &crc16(&frame).to_le_bytes()].concat()
}

#[test]
fn the_window_of_the_press_is_what_the_plant_says() {
    let clock = Arc::new(AtomicI64::new(0));
    let (mut node, plant, anchor) = at_the_press(&clock);
    let mut ask = |now: u64, pdu: &[u8]| {
        clock.store(now as i64, Ordering::Relaxed);
        node.poll(now);
        node.receive(now, &frame(pdu));
        let reply = node.poll(now + 2_100);
        assert_eq!(crc16(reply), 0);
        reply[1..reply.len() - 2].to_vec()
    };
    // The window of 5 s begins anew after the sample of second 0.
    assert_eq!(ask(0, &[6, 0, 0, 0, 5]), [6, 0, 0, 0, 5]);
    let seconds = 1..=5;
    seconds.clone().for_each(|second| {
        ask(second * 1_000_000, &[4, 0, 0, 0, 4]);
    });
    let features = ask(5_500_000, &[4, 0, 4, 0, 16]);
    let shown: Vec<f64> = features[2..]
        .chunks(4)
        .map(|bytes| f64::from(i32::from_be_bytes(bytes.try_into().unwrap())) / 1e3)
        .collect();

    for (signal, shown) in [Signal::PressTemperature, Signal::PressHumidity].into_iter().zip(shown.chunks(4))
    {
        let values: Vec<f64> =
            seconds.clone().map(|s| plant.value(signal, anchor + Duration::from_secs(s))).collect();
        let mean = values.iter().sum::<f64>() / 5.0;
        let wanted = [
            mean,
            values.iter().copied().fold(f64::INFINITY, f64::min),
            values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 5.0).sqrt(),
        ];
        for (got, wanted) in shown.iter().zip(wanted) {
            // Half a step of the chip's word is 0.0013 °C, half a thousandth comes on top.
            assert!((got - wanted).abs() < 0.003, "{signal:?}: {shown:?} is not {wanted}");
        }
    }
}

#[tokio::test]
async fn answers_on_a_pseudo_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("tty");
    let mut line = Line::open(link.clone()).unwrap();
    let (node, ..) = at_the_press(&Arc::default());
    let master = tokio::task::spawn_blocking({
        let link = link.clone();
        move || {
            let mut port = OpenOptions::new().read(true).write(true).open(link).unwrap();
            let mut exchange = |pdu: &[u8], length: usize| {
                port.write_all(&frame(pdu)).unwrap();
                let mut reply = vec![0; length];
                port.read_exact(&mut reply).unwrap();
                reply
            };
            // All bytes pass as they are: 0x0D and 0x0A are no ends of lines, 0x03 and 0x04 no signals.
            let setting = exchange(&[6, 0, 0, 0x0d, 0x0a], 8);
            let read = exchange(&[3, 0, 0, 0, 1], 7);
            let busy = exchange(&[4, 0, 4, 0, 16], 5);
            [setting, read, busy]
        }
    });
    let answers = tokio::select! {
        answers = master => answers.unwrap(),
        ended = main_loop(node, &mut line.master) => panic!("the line ended: {ended:?}"),
    };
    assert_eq!(answers, [frame(&[6, 0, 0, 0x0d, 0x0a]), frame(&[3, 2, 0x0d, 0x0a]), frame(&[0x84, 6]),]);
    drop(line);
    assert!(fs::symlink_metadata(link).is_err(), "the link goes with the line");
}

#[tokio::test]
async fn the_agent_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("tty");
    let mut line = Line::open(link.clone()).unwrap();
    // The chip's time stands still, the node's goes on: all samples are the same.
    let (node, plant, anchor) = at_the_press(&Arc::default());
    let rows = rows(plant.layout(), ADDRESS);
    let url = format!("rtu://{}", link.display());
    let window_of_1_s = tokio::task::spawn_blocking(move || {
        OpenOptions::new().write(true).open(link)?.write_all(&frame(&[6, 0, 0, 0, 1]))
    });
    let agent = async {
        window_of_1_s.await.unwrap().unwrap();
        tokio::time::sleep(Duration::from_millis(2_500)).await;
        agent::read(&url, &rows).await
    };
    let read = tokio::select! {
        read = agent => read,
        ended = main_loop(node, &mut line.master) => panic!("the line ended: {ended:?}"),
    };
    assert_eq!(read.len(), 8);
    for (signal, name) in [(Signal::PressTemperature, "temperature"), (Signal::PressHumidity, "humidity")] {
        for (feature, wanted) in [("mean", None), ("min", None), ("max", None), ("rms", Some(0.0))] {
            let got = read[&format!("smart-node/{name}-{feature}")];
            let wanted = wanted.unwrap_or_else(|| plant.value(signal, anchor));
            assert!((got - wanted).abs() < 0.003, "{name} {feature}: {got} is not {wanted}");
        }
    }
}

#[tokio::test]
async fn a_link_is_replaced_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("tty");
    symlink("/dev/pts/of-a-node-that-was-killed", &link).unwrap();
    let first = Line::open(link.clone()).unwrap();
    let second = Line::open(link.clone()).unwrap();
    drop(first);
    assert_eq!(fs::read_link(&link).unwrap(), Path::new(&second.target), "it belongs to the second");
    drop(second);

    fs::write(&link, "precious").unwrap();
    let refusal = Line::open(link.clone()).map(|_| ()).unwrap_err().to_string();
    assert!(refusal.contains("is there already and no symbolic link"), "{refusal}");
    assert_eq!(fs::read_to_string(&link).unwrap(), "precious");
}

#[test]
fn the_map_is_the_firmware_s() {
    let rows = rows(&Layout::demo().unwrap(), 1);
    let shown: Vec<_> = rows.iter().map(|row| (row.address, row.device.as_str())).collect();
    assert_eq!(shown[..2], [(4, "smart-node/temperature-mean"), (6, "smart-node/temperature-min")]);
    assert_eq!(shown[6..], [(16, "smart-node/humidity-max"), (18, "smart-node/humidity-rms")]);
}

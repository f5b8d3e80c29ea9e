//! The agent's own drivers on the simulated plant: what goes in at the chip comes out of the driver.

use std::{
    sync::atomic::{AtomicBool, AtomicI64, Ordering},
    time::Duration,
};

use common::reading::{DeviceIx, Quality};
use edge_agent::{
    discover::{self, Answer, Findings},
    settings::{BurstOutput, Settings},
    source::{
        self, Bus,
        chip::{self, ChipError, Ne43, ads1115, ism330dhcx, loop_current, ne43},
        spi::Accelerometer,
    },
    vibration::{self, Feature},
};

use super::*;
use crate::faults::Rates;

fn anchor() -> Timestamp {
    "2026-03-01T00:00:00Z".parse().unwrap()
}

/// A plant, its gateway and the hands of its clock.
fn gateway(rates: Rates) -> (Arc<Plant>, SimHardware, Arc<AtomicI64>) {
    let plant = Arc::new(Plant::demo(anchor(), 0).unwrap());
    let clock = Arc::new(AtomicI64::new(anchor().as_micros()));
    let time = SimTime::new({
        let clock = Arc::clone(&clock);
        move || Timestamp::from_micros(clock.load(Ordering::Relaxed))
    });
    let hardware = SimHardware::of_plant(&plant, Faults::new(1, rates), time);
    (plant, hardware, clock)
}

fn current(hardware: &SimHardware, channel: &Channel) -> Result<f64, ChipError> {
    let mut i2c = hardware.i2c(&format!("/dev/{}", channel.bus)).unwrap();
    let adc = chip::Ads1115::new(channel.address).unwrap();
    let input = ads1115::Channel::new(channel.input).unwrap();
    let volts = adc.read_volts(&mut i2c, &mut hardware.delay(), input)?;
    Ok(loop_current(volts, 150.0))
}

#[test]
fn all_loops_read_what_the_plant_shows() {
    let (plant, hardware, clock) = gateway(Rates::default());
    for hours in [0u32, 5, 7, 11, 17, 23] {
        let t = anchor() + Duration::from_secs(3_600) * hours;
        // A tick handled 20 ms late is still the tick.
        clock.store(t.as_micros() + 20_000, Ordering::Relaxed);
        for (index, channel) in plant.layout().channels.iter().enumerate() {
            let current = current(&hardware, channel).unwrap();
            assert_eq!(ne43(current), Ne43::Good, "{} at {hours} h: {current} A", channel.device);
            let span = channel.at_20ma - channel.at_4ma;
            let value = channel.at_4ma + span * (current - 0.004) / 0.016;
            let error = (value - plant.value(Signal::Channel(index), t)).abs() / span;
            // Half a step of the converter is 0.026 ‰ of the span.
            assert!(error < 3e-5, "{} at {hours} h is off by {error} of its span", channel.device);
        }
    }
}

#[test]
fn the_press_reads_what_the_plant_shows() {
    let (plant, hardware, clock) = gateway(Rates::default());
    let press = &plant.layout().press;
    let sensor = chip::Sht4x::new(press.address).unwrap();
    for hours in [0, 30, 700] {
        let t = anchor() + Duration::from_secs(3_600 * hours);
        clock.store(t.as_micros(), Ordering::Relaxed);
        let mut i2c = hardware.i2c(&press.bus).unwrap();
        let climate = sensor.measure(&mut i2c, &mut hardware.delay()).unwrap();
        assert!((climate.temperature_c - plant.value(Signal::PressTemperature, t)).abs() < 2e-3);
        assert!((climate.humidity_pct - plant.value(Signal::PressHumidity, t)).abs() < 2e-3);
    }
}

#[test]
fn a_burst_is_the_waveform() {
    let (plant, hardware, clock) = gateway(Rates::default());
    let settings = ism330dhcx::Settings::default();
    let mut sensor = chip::Ism330dhcx::new(settings);
    let mut spi = hardware.spi("/dev/spidev0.0").unwrap();
    let mut impulsiveness = Vec::new();
    for hours in [0, 22] {
        let t = anchor() + Duration::from_secs(3_600 * hours);
        clock.store(t.as_micros(), Ordering::Relaxed);
        let burst = sensor.burst(&mut spi, &mut hardware.delay()).unwrap();
        assert_eq!(burst.samples.len(), settings.samples);
        let waveform = plant.vibration(t);
        for (sample, n) in burst.samples.iter().zip(1..) {
            let wanted = waveform.at(f64::from(n) / burst.rate_hz);
            assert!((sample - wanted).abs() <= 0.0024, "sample {n}: {sample} for {wanted}");
        }
        impulsiveness.extend(vibration::measure(&burst, [Feature::Kurtosis]));
    }
    assert!(impulsiveness[1] > 1.3 * impulsiveness[0], "the bearing wears: {impulsiveness:?}");
}

/// A gateway whose thread is held up, or not, for longer than a driver wants to wait.
struct Late(SimHardware, Arc<AtomicBool>);

#[derive(Clone)]
struct LateDelay(SimDelay, Arc<AtomicBool>);

impl Hardware for Late {
    type I2c = SimI2c;
    type Spi = SimSpi;
    type Delay = LateDelay;

    fn i2c(&self, path: &str) -> anyhow::Result<SimI2c> {
        self.0.i2c(path)
    }

    fn spi(&self, path: &str) -> anyhow::Result<SimSpi> {
        self.0.spi(path)
    }

    fn delay(&self) -> LateDelay {
        LateDelay(self.0.delay(), Arc::clone(&self.1))
    }
}

impl DelayNs for LateDelay {
    fn delay_ns(&mut self, ns: u32) {
        self.0.delay_ns(ns);
        if self.1.load(Ordering::Relaxed) {
            self.0.delay_us(ns / 800);
        }
    }
}

#[test]
fn a_late_reader_discards_the_burst() {
    let (_, hardware, _) = gateway(Rates::default());
    let late = Arc::new(AtomicBool::new(true));
    let rms = BurstOutput { feature: Feature::Rms, device: DeviceIx(7), scale: 1.0 };
    let velocity =
        BurstOutput { feature: Feature::Velocity { low_hz: 10.0 }, device: DeviceIx(8), scale: 1.0 };
    let mut bus = Accelerometer::new(
        Arc::new(Late(hardware, Arc::clone(&late))),
        "/dev/spidev0.0".into(),
        Duration::from_secs(60),
        ism330dhcx::Settings::default(),
        vec![rms, velocity],
    );
    let poll = bus.poll(anchor(), &[0]);
    assert_eq!(poll.faults, ["overrun"]);
    let bad = |r: &common::reading::Reading| r.quality == Quality::Bad && r.value.is_nan();
    assert!(poll.readings.len() == 2 && poll.readings.iter().all(bad), "{poll:?}");
    late.store(false, Ordering::Relaxed);
    let poll = bus.poll(anchor(), &[0]);
    assert!(poll.faults.is_empty(), "the next burst is whole: {poll:?}");
    assert_eq!(poll.readings.iter().map(|r| r.device).collect::<Vec<_>>(), [DeviceIx(7), DeviceIx(8)]);
    assert!(poll.readings.iter().all(|r| r.quality == Quality::Good && r.value > 0.0), "{poll:?}");
}

#[test]
fn absent_chips_and_buses() {
    let (_, hardware, _) = gateway(Rates::default());
    let mut i2c = hardware.i2c("/dev/i2c-2").unwrap();
    let got = chip::Sht4x::new(0x45).unwrap().measure(&mut i2c, &mut hardware.delay());
    assert_eq!(got, Err(ChipError::Nack));
    let error = hardware.i2c("/dev/i2c-9").err().unwrap().to_string();
    assert_eq!(error, "no simulated i2c bus at /dev/i2c-9; there are: /dev/i2c-1, /dev/i2c-2");
    assert!(hardware.spi("/dev/spidev0.1").is_err());
}

#[test]
fn a_driver_that_does_not_wait_meets_a_busy_chip() {
    struct Hasty;
    impl DelayNs for Hasty {
        fn delay_ns(&mut self, _: u32) {}
    }
    let (plant, hardware, _) = gateway(Rates::default());
    let mut i2c = hardware.i2c("i2c-1").unwrap();
    let sensor = chip::Sht4x::new(plant.layout().press.address).unwrap();
    assert_eq!(sensor.measure(&mut i2c, &mut Hasty), Err(ChipError::Nack));
    let adc = chip::Ads1115::new(0x48).unwrap();
    let got = adc.read_volts(&mut i2c, &mut Hasty, ads1115::Channel::A0);
    assert!(matches!(got, Err(ChipError::Timeout { .. })), "{got:?}");
}

#[test]
fn open_loops_are_bad_and_nacks_are_reported() {
    let often = Rates { drop_out: 24.0, nack: 24.0, ..Rates::default() };
    let (plant, hardware, clock) = gateway(often);
    let (mut open, mut nacks) = (0, 0);
    for tick in 0..720u32 {
        let t = anchor() + Duration::from_secs(5) * tick;
        clock.store(t.as_micros(), Ordering::Relaxed);
        match current(&hardware, &plant.layout().channels[4]) {
            Ok(current) => open += u32::from(ne43(current) == Ne43::Bad),
            Err(ChipError::Nack) => nacks += 1,
            Err(other) => panic!("{other}"),
        }
    }
    // One drop-out of 30 s and one NACK of 10 s, polled every 5 s.
    assert!((4..=6).contains(&open) && nacks == 2, "{open} open, {nacks} nacks");
}

#[test]
fn what_is_discovered_can_be_run_as_it_is() {
    let (plant, hardware, clock) = gateway(Rates::default());
    let buses = ["/dev/i2c-1".to_owned(), "/dev/i2c-2".to_owned()];
    let i2c = discover::scan_i2c(&hardware, &buses, |_| {});
    let findings = Findings { i2c, ..Findings::default() };
    let layout = plant.layout();
    let mut wanted: BTreeMap<(String, u8), Answer> = layout
        .channels
        .iter()
        .map(|channel| ((format!("/dev/{}", channel.bus), channel.address), Answer::Ads1115))
        .collect();
    let (press, serial) = (&layout.press, 0x5a17_0000 | u32::from(layout.press.address));
    wanted.insert((format!("/dev/{}", press.bus), press.address), Answer::Sht4x { serial });
    let found: BTreeMap<_, _> = findings
        .i2c
        .iter()
        .flat_map(|bus| {
            bus.answers.iter().flatten().map(|(at, answer)| ((bus.path.clone(), *at), answer.clone()))
        })
        .collect();
    assert_eq!(found, wanted);

    // The three keys that only the plant knows; then every sensor is read through the agent's own sources.
    let text =
        ["site", "gateway", "data_dir"].iter().fold(discover::configuration(&findings), |text, key| {
            text.replacen(&format!("\n{key} = \"\""), &format!("\n{key} = \"x\""), 1)
        });
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("edge-agent.toml");
    std::fs::write(&file, &text).unwrap();
    let settings = Settings::load(Some(&file)).unwrap_or_else(|mistakes| panic!("{mistakes}\n{text}"));
    let now = Timestamp::from_micros(clock.load(Ordering::Relaxed));
    let hardware = Arc::new(hardware);
    let read: BTreeMap<String, f64> = settings
        .sources
        .iter()
        .flat_map(|source| source::read_once(source, &hardware, now))
        .filter(|reading| reading.value.is_finite())
        .map(|reading| (settings.registry.device(reading.device).id.clone(), reading.value))
        .collect();
    for (index, channel) in layout.channels.iter().enumerate() {
        let id = format!("{}/{:#04x}/{}", channel.bus, channel.address, channel.input);
        let current_ma = plant.current(channel, plant.value(Signal::Channel(index), now)) * 1e3;
        // One step of the converter over 150 ohm is 0.83 uA.
        assert!((read[&id] - current_ma).abs() < 1e-3, "{id}: {} mA, not {current_ma}", read[&id]);
    }
    let temperature = read[&format!("{}/{:#04x}/temperature", press.bus, press.address)];
    assert!((temperature - plant.value(Signal::PressTemperature, now)).abs() < 2e-3, "{temperature}");
    assert_eq!(read.len(), layout.channels.len() + 2, "inputs without a transmitter show no value");
}

//! `firmware-sim node`: the firmware of [`smart_node`] on a pseudo-terminal, with a simulated SHT4x on its bus.
//!
//! Whoever opens the link has the other end of the node's serial line: 19,200 Bd 8E1, the default of *MODBUS over
//! Serial Line V1.02*, 2.5.1; a pseudo-terminal knows neither speed nor parity, but the node keeps the silence of
//! that speed. The line is there as long as the node, so what is sent while nobody listens waits for the next one
//! who opens it, up to the terminal's buffer: a master throws away what comes before it asked. What the buffer does
//! not take is gone, as on a wire. A master that is killed while it has the line for itself alone (TIOCEXCL) leaves
//! that mark on it, which only root passes by: start the node again.
//!
//! The chip is the one at the press of the recorded plant, so the node shows, window by window, what `press/…` of
//! `firmware-sim plc --map` shows instant by instant.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use common::{
    telemetry::print_line,
    time::{Clock as _, SystemClock, Timestamp},
};
use edge_agent::source::Hardware as _;
use embedded_hal::{delay::DelayNs, i2c::I2c};
use smart_node::{
    node::{self, Node},
    pdu::Table,
    rtu::{MAX_FRAME, Slave},
};
use tokio::{
    io::AsyncReadExt as _,
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep_until},
};
use tokio_serial::{SerialPort as _, SerialStream};

use crate::{
    bus::SimHardware,
    chip::SimTime,
    faults::{Faults, Rates},
    plant::{Layout, Plant},
    plc::ANCHOR,
    register_map::{self, Form, Row},
};

/// Speed of the line in Bd.
const BAUD: u32 = 19_200;

/// What to serve, or to print.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where the serial line appears, as a symbolic link
    #[arg(long, default_value = "./smart-node.tty")]
    link: PathBuf,
    /// Its address on the line, 1 to 247
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=247))]
    address: u8,
    /// Where the plant's loop of 24 h began
    #[arg(long, default_value = ANCHOR)]
    anchor: Timestamp,
    /// Print the registers, and end
    #[arg(long)]
    map: bool,
    /// Print the asset, devices and registers as a part of edge-agent's configuration, and end
    #[arg(long, conflicts_with = "map")]
    agent_config: bool,
}

/// Runs the firmware until SIGTERM or SIGINT.
///
/// # Errors
/// When there is no pseudo-terminal to be had, or no link to be made.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let Options { link, address, anchor, map, agent_config } = options;
    if map {
        print_line("# input 0: seconds since start, u32; 2: windows; 3: samples in the last window");
        print_line(format_args!("# holding 0: length of a window in s, 1 to {}", node::MAX_WINDOW_S));
        print_line(register_map::HEADER);
        rows(&Layout::demo()?, address).iter().for_each(print_line);
        return Ok(());
    }
    if agent_config {
        let path = std::path::absolute(&link).with_context(|| format!("finding {}", link.display()))?;
        let url = format!("rtu://{}", path.display());
        print_line(register_map::agent_config(&url, &rows(&Layout::demo()?, address)));
        return Ok(());
    }
    let plant = Arc::new(Plant::demo(anchor, 0)?);
    let hardware =
        SimHardware::of_plant(&plant, Faults::new(0, Rates::default()), SimTime::new(|| SystemClock.now()));
    let i2c = hardware.i2c(&format!("/dev/{}", plant.layout().press.bus))?;
    let slave = Slave::new(address, BAUD).with_context(|| format!("--address {address} is not 1 to 247"))?;
    let node = Node::new(i2c, hardware.delay(), node::Address::Address0x44, slave, 0);

    let mut line = Line::open(link)?;
    print_line(format_args!("slave {address} on {}", line.link.display()));
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    tokio::select! {
        done = main_loop(node, &mut line.master) => done.context("reading the pseudo-terminal"),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

/// What the board's main loop does: hands bytes and the time to the firmware, and sends what it answers.
async fn main_loop(mut node: Node<impl I2c, impl DelayNs>, master: &mut SerialStream) -> io::Result<()> {
    let start = Instant::now();
    let mut buffer = [0; MAX_FRAME];
    let mut came = 0;
    loop {
        let now = start.elapsed().as_micros() as u64;
        let reply = node.poll(now);
        if !reply.is_empty() {
            // Short or failed writes are bytes that the line did not take: the CRC tells the master.
            let _ = master.try_write(reply);
        }
        node.receive(now, &buffer[..came]);
        came = 0;
        tokio::select! {
            read = master.read(&mut buffer) => came = read?,
            () = sleep_until(start + Duration::from_micros(node.next_deadline())) => {}
        }
    }
}

/// A pseudo-terminal and the link to its other end, which goes with it.
struct Line {
    master: SerialStream,
    /// Held open, so that the line stays when a master closes it.
    _other_end: SerialStream,
    target: String,
    link: PathBuf,
}

impl Line {
    fn open(link: PathBuf) -> anyhow::Result<Self> {
        let (master, other_end) = SerialStream::pair().context("opening a pseudo-terminal")?;
        let target = other_end.name().context("a pseudo-terminal has a name")?;
        place(&link, &target)?;
        Ok(Self { master, _other_end: other_end, target, link })
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // A node that came later may have taken the name over.
        if fs::read_link(&self.link).is_ok_and(|target| target == Path::new(&self.target)) {
            let _ = fs::remove_file(&self.link);
        }
    }
}

/// Makes `link` point to `target`. A link that was left behind is replaced, nothing else.
fn place(link: &Path, target: &str) -> anyhow::Result<()> {
    if let Ok(there) = fs::symlink_metadata(link) {
        ensure!(
            there.is_symlink(),
            "--link {} is there already and no symbolic link; give another path",
            link.display()
        );
        fs::remove_file(link).with_context(|| format!("replacing {}", link.display()))?;
    }
    symlink(target, link).with_context(|| format!("linking {} to {target}", link.display()))
}

/// The features as the agent reads them: as often as a window ends.
fn rows(layout: &Layout, slave: u8) -> Vec<Row> {
    let press = &layout.press;
    let (temperature, humidity) = (&press.temperature, &press.humidity);
    let quantities = [
        (
            node::TEMPERATURE,
            "temperature",
            &temperature.device_type,
            &temperature.unit,
            [-45.0, 130.0],
            175.0,
        ),
        (node::HUMIDITY, "humidity", &humidity.device_type, &humidity.unit, [0.0, 100.0], 100.0),
    ];
    let mut rows = Vec::new();
    for (first, name, device_type, unit, range, span) in quantities {
        for (address, feature) in (first..).step_by(2).zip(["mean", "min", "max", "rms"]) {
            rows.push(Row {
                slave,
                table: Table::Input,
                address,
                form: Form::I32,
                scale: 0.001,
                offset: 0.0,
                device: format!("smart-node/{name}-{feature}"),
                asset: "smart-node".to_owned(),
                device_type: device_type.clone(),
                unit: unit.clone(),
                range: if feature == "rms" { [0.0, span / 2.0] } else { range },
                period_s: node::DEFAULT_WINDOW_S.into(),
            });
        }
    }
    rows
}

#[cfg(test)]
mod tests;

//! `firmware-sim plc`: a Modbus TCP server whose registers show the recorded plant.
//!
//! [`units`] is what it shows; `--map` prints it with the values of an instant, `--agent-config` prints the part of a
//! configuration by which `edge-agent` reads it. The protocol is [`smart_node::pdu`] behind the header of *MODBUS
//! Messaging on TCP/IP, Implementation Guide V1.0b*, 3.1.3:
//!
//! ```text
//! transaction u16 │ protocol u16 = 0 │ length u16: of what follows │ unit u8 │ PDU, 1 to 253 bytes
//! ```
//!
//! A unit that is not there is answered like a gateway does, with exception 11. A header that is not Modbus's ends
//! the connection, since nothing tells where the next request begins. Requests of one connection are answered in
//! their order.
//!
//! # Faults
//! With `--faults`, lines on standard input say what goes wrong from then on, one thing at a time, and each is
//! confirmed on standard output:
//!
//! | line | what happens |
//! |---|---|
//! | `late MS` | every answer comes so many milliseconds late |
//! | `silent` | no request is answered |
//! | `dead UNIT` | no request to this unit is answered |
//! | `exception CODE` | every request is refused with this exception |
//! | `cut` | connections are closed, and new ones, too |
//! | `ok` | nothing |

pub mod units;

use std::{net::SocketAddr, str::FromStr, sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use common::{
    telemetry::print_line,
    time::{Clock as _, SystemClock, Timestamp},
};
use smart_node::pdu::{self, Exception};
use tokio::{
    io::{self, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    sync::watch,
};

use self::units::Units;
use crate::register_map;

/// Where the loop of the simulated Modbus devices begins: so their values are the same function of time for everybody.
pub(crate) const ANCHOR: &str = "2026-01-01T00:00:00Z";
/// Bytes of the header.
const HEADER: usize = 7;

/// What to serve, or to print.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where to listen; with port 0, where there is room
    #[arg(long, default_value = "127.0.0.1:1502")]
    listen: SocketAddr,
    /// Listen beyond loopback, too: Modbus knows no password
    #[arg(long)]
    beyond_loopback: bool,
    /// Take faults from standard input: late MS, silent, dead UNIT, exception CODE, cut, ok
    #[arg(long)]
    faults: bool,
    /// Where the plant's loop of 24 h began
    #[arg(long, default_value = ANCHOR)]
    anchor: Timestamp,
    /// Print the registers and what they show, and end
    #[arg(long)]
    map: bool,
    /// With --map: the instant, now by default
    #[arg(long, requires = "map")]
    at: Option<Timestamp>,
    /// Print the assets, devices and registers as a part of edge-agent's configuration, and end
    #[arg(long, conflicts_with = "map")]
    agent_config: bool,
}

/// Serves until the process is ended.
///
/// # Errors
/// When the address is refused or taken.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let Options { listen, beyond_loopback, faults, anchor, map, at, agent_config } = options;
    let units = Units::demo(anchor)?;
    if map {
        print_map(&units, at.unwrap_or_else(|| SystemClock.now()));
        return Ok(());
    }
    if agent_config {
        let rows: Vec<_> = units.rows().cloned().collect();
        print_line(register_map::agent_config(&format!("tcp://{listen}"), &rows));
        return Ok(());
    }
    ensure!(
        beyond_loopback || listen.ip().is_loopback(),
        "--listen {listen} is not a loopback address, and Modbus knows no password; give 127.0.0.1, or \
         --beyond-loopback if the network is trusted"
    );
    let listener = TcpListener::bind(listen).await.with_context(|| format!("listening on {listen}"))?;
    let (set_fault, fault) = watch::channel(Fault::None);
    print_line(format_args!("listening on {}", listener.local_addr()?));
    if faults {
        tokio::spawn(take_faults(BufReader::new(io::stdin()), set_fault));
    }
    serve(listener, Arc::new(units), fault).await
}

/// Prints every register with its value at `at`.
fn print_map(units: &Units, at: Timestamp) {
    print_line(format_args!(
        "# values at {at}; registers 0 to 3 of each unit: the instant, u64, ms since 1970"
    ));
    print_line(format_args!("{}value", register_map::HEADER));
    for (row, value) in units.rows().zip(units.values(at)) {
        print_line(format_args!("{row}{value}"));
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    Late(Duration),
    Silent,
    Dead(u8),
    Refuse(Exception),
    Cut,
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let mut words = line.split_whitespace();
        let (name, number) = (words.next(), words.next().map(str::parse::<u16>));
        let small = |number: u16| u8::try_from(number).ok();
        let fault = match (name, number, words.next()) {
            (Some("ok"), None, None) => Some(Self::None),
            (Some("silent"), None, None) => Some(Self::Silent),
            (Some("cut"), None, None) => Some(Self::Cut),
            (Some("late"), Some(Ok(ms)), None) => Some(Self::Late(Duration::from_millis(ms.into()))),
            (Some("dead"), Some(Ok(unit)), None) => small(unit).map(Self::Dead),
            (Some("exception"), Some(Ok(code)), None) => {
                small(code).map(|code| Self::Refuse(Exception(code)))
            }
            _ => None,
        };
        fault.ok_or_else(|| {
            format!("{line:?} is no fault; there are: late MS, silent, dead UNIT, exception CODE, cut, ok")
        })
    }
}

/// Sets the faults that come in line by line, until the input ends; the last one stays.
async fn take_faults(input: impl io::AsyncBufRead + Unpin, set: watch::Sender<Fault>) {
    let mut lines = input.lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match line.parse() {
            Ok(fault) => {
                set.send_replace(fault);
                print_line(format_args!("fault: {}", line.trim()));
            }
            Err(mistake) => eprintln!("{mistake}"),
        }
    }
}

async fn serve(
    listener: TcpListener,
    units: Arc<Units>,
    fault: watch::Receiver<Fault>,
) -> anyhow::Result<()> {
    loop {
        let (stream, peer) = listener.accept().await.context("accepting connections")?;
        let (units, fault, mut cut) = (Arc::clone(&units), fault.clone(), fault.clone());
        tokio::spawn(async move {
            let done = tokio::select! {
                done = converse(stream, &units, fault) => done,
                Ok(_) = cut.wait_for(|fault| *fault == Fault::Cut) => Ok(()),
            };
            if let Err(error) = done {
                tracing::info!(%peer, %error, "connection ended");
            }
        });
    }
}

/// Answers the requests of one connection until it ends.
async fn converse(mut stream: TcpStream, units: &Units, fault: watch::Receiver<Fault>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut request = [0; pdu::MAX_BYTES];
    loop {
        let mut header = [0; HEADER];
        if stream.read(&mut header[..1]).await? == 0 {
            return Ok(());
        }
        stream.read_exact(&mut header[1..]).await?;
        let length = pdu_length(header).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{header:02x?} is no header of Modbus TCP"))
        })?;
        let request = &mut request[..length];
        stream.read_exact(request).await?;
        let unit = header[6];
        let mut reply = [0; pdu::MAX_BYTES];
        let fault = *fault.borrow();
        let reply = match fault {
            Fault::Silent => continue,
            Fault::Dead(dead) if dead == unit => continue,
            Fault::Refuse(exception) => pdu::refuse(request[0], exception, &mut reply),
            _ => units.answer(unit, request, SystemClock.now(), &mut reply),
        };
        if let Fault::Late(by) = fault {
            tokio::time::sleep(by).await;
        }
        stream.write_all(&framed(header, reply)).await?;
    }
}

/// The length of the PDU behind a header; none when it is not one of Modbus TCP.
fn pdu_length(header: [u8; HEADER]) -> Option<usize> {
    let [_, _, 0, 0, high, low, _] = header else { return None };
    let length = usize::from(u16::from_be_bytes([high, low])).checked_sub(1)?;
    (1..=pdu::MAX_BYTES).contains(&length).then_some(length)
}

/// An answer behind its header: the request's, with another length.
fn framed(request: [u8; HEADER], pdu: &[u8]) -> Vec<u8> {
    let [t0, t1, p0, p1, _, _, unit] = request;
    let [high, low] = (1 + pdu.len() as u16).to_be_bytes();
    [&[t0, t1, p0, p1, high, low, unit], pdu].concat()
}

#[cfg(test)]
mod tests;

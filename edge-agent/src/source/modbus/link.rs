//! One way to the slaves: a TCP connection or a serial line, opened when it is needed.
//!
//! A client of `tokio-modbus` is used again only after a whole answer. A request that was given up leaves its answer
//! to come, which would be taken for the next one's: over TCP the connection is closed, so that it has nowhere to go
//! (slowtec/tokio-modbus#324); on a serial line, whatever has come in is thrown away before the next request is
//! sent. RTU answers carry neither a number nor an address, so one that comes later than the timeout and the pause
//! of its slave, in the very moment of another request of the same shape, cannot be told: choose a timeout that the
//! slowest slave keeps.
//!
//! A serial port stays open while it works: closing it drops DTR, which feeds many converters.

use std::{
    fmt, io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_modbus::{
    Error, ExceptionCode, ProtocolError, Request, Response, Slave,
    client::{self, Client},
    slave::SlaveContext,
};
use tokio_serial::{ClearBuffer, SerialPort, SerialStream};

use super::plan::Table;

/// Bits of a character: start, 8 data, parity or a second stop, stop (Modbus over serial line V1.02, 2.5.1).
const CHARACTER_BITS: u32 = 11;
/// Bytes of a request, and of an answer around its data.
const FRAME_BYTES: u32 = 8 + 5;
/// From this speed on the silence between frames is fixed (same, 2.5.1.1).
const FIXED_SILENCE_BAUD: u32 = 19_200;
const FIXED_SILENCE: Duration = Duration::from_micros(1_750);

/// Where slaves are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Modbus TCP.
    Tcp {
        /// Name or address.
        host: String,
        /// 502 by convention.
        port: u16,
    },
    /// Modbus RTU on a serial line.
    Rtu {
        /// Such as `/dev/ttyUSB0`.
        path: String,
        /// Bits a second.
        baud: u32,
        /// None, even or odd.
        parity: tokio_serial::Parity,
        /// One or two.
        stop_bits: tokio_serial::StopBits,
    },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Rtu { path, .. } => write!(f, "rtu://{path}"),
        }
    }
}

impl Address {
    /// How long a read of `count` registers or bits and its answer are on the wire; nothing over TCP.
    pub fn wire_time(&self, table: Table, count: u16) -> Duration {
        let Self::Rtu { baud, .. } = self else { return Duration::ZERO };
        let data = if table.is_bits() { u32::from(count).div_ceil(8) } else { 2 * u32::from(count) };
        self.silence() + Duration::from_secs(1) * ((FRAME_BYTES + data) * CHARACTER_BITS) / *baud
    }

    /// How long the line must be silent before a request: 3.5 characters; nothing over TCP.
    fn silence(&self) -> Duration {
        match self {
            Self::Tcp { .. } => Duration::ZERO,
            Self::Rtu { baud, .. } if *baud > FIXED_SILENCE_BAUD => FIXED_SILENCE,
            Self::Rtu { baud, .. } => Duration::from_secs(1) * (7 * CHARACTER_BITS) / (2 * *baud),
        }
    }
}

/// Why a read gave nothing, grouped by what the caller does next.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// Nobody can be asked.
    #[error("cannot be opened: {0}")]
    Open(io::Error),
    /// This slave is away.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// This slave is as good as away: something came, also when it was asked again, and no frame was in it.
    #[error("nothing intelligible within {0:?}; check baud, parity, stop_bits and the line's termination")]
    Garbled(Duration),
    /// This slave is away: the connection ended instead of an answer.
    #[error("connection broke: {0}")]
    Broken(io::Error),
    /// This slave is away: the gateway before it says so.
    #[error("the gateway does not reach it: {0}")]
    Unreached(ExceptionCode),
    /// This request has no answer, the slave is there.
    #[error("exception: {0}")]
    Exception(ExceptionCode),
    /// This request has no answer; the next one may have.
    #[error("damaged answer: {0}")]
    Damaged(String),
    /// An answer to somebody else's request.
    #[error("an answer to another request: {0}")]
    Stray(String),
}

impl Fault {
    /// A short label for metrics.
    pub(super) const fn reason(&self) -> &'static str {
        match self {
            Self::Open(_) => "open",
            Self::Timeout(_) => "timeout",
            Self::Broken(_) => "bus",
            Self::Unreached(_) => "unreached",
            Self::Exception(_) => "exception",
            Self::Garbled(_) | Self::Damaged(_) | Self::Stray(_) => "protocol",
        }
    }

    /// Whether nobody answered in the slave's name.
    pub(super) const fn is_absence(&self) -> bool {
        matches!(self, Self::Timeout(_) | Self::Garbled(_) | Self::Broken(_) | Self::Unreached(_))
    }
}

/// A connection or line that reads one thing at a time.
pub(super) struct Link {
    address: Address,
    timeout: Duration,
    /// Idle and sound.
    client: Option<client::Context>,
    port: Option<Line>,
}

impl Link {
    /// Opened by the first read.
    pub(super) fn new(address: Address, timeout: Duration) -> Self {
        Self { address, timeout, client: None, port: None }
    }

    /// Reads `count` registers from `start` of a slave's table; of bits, a word a bit.
    pub(super) async fn read(
        &mut self,
        unit: u8,
        table: Table,
        start: u16,
        count: u16,
    ) -> Result<Vec<u16>, Fault> {
        let was_open = self.client.is_some();
        match self.try_read(unit, table, start, count).await {
            // Many servers close a connection that was idle for a while.
            Err(Fault::Broken(_)) if was_open => self.try_read(unit, table, start, count).await,
            // A disturbance on the line.
            Err(Fault::Garbled(_)) => self.try_read(unit, table, start, count).await,
            // Somebody was late. Once the line is quiet again, this one gets its chance.
            Err(Fault::Stray(_)) => {
                tokio::time::sleep(self.timeout).await;
                self.try_read(unit, table, start, count).await
            }
            read => read,
        }
    }

    async fn try_read(&mut self, unit: u8, table: Table, start: u16, count: u16) -> Result<Vec<u16>, Fault> {
        // Taken out, and put back only by a whole answer.
        let mut client = match self.client.take() {
            Some(client) => client,
            None => self.open().await.map_err(Fault::Open)?,
        };
        let request = match table {
            Table::Coil => Request::ReadCoils(start, count),
            Table::Discrete => Request::ReadDiscreteInputs(start, count),
            Table::Holding => Request::ReadHoldingRegisters(start, count),
            Table::Input => Request::ReadInputRegisters(start, count),
        };
        client.set_slave(Slave(unit));
        if !self.address.silence().is_zero() {
            tokio::time::sleep(self.address.silence()).await;
        }
        let patience = self.timeout + self.address.wire_time(table, count);
        let answer = match tokio::time::timeout(patience, client.call(request)).await {
            Err(_) if self.port.as_ref().is_some_and(Line::heard) => return Err(Fault::Garbled(patience)),
            Err(_) => return Err(Fault::Timeout(patience)),
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(self.judge(error)),
        };
        let words = match answer {
            Ok(Response::ReadHoldingRegisters(words) | Response::ReadInputRegisters(words))
                if words.len() == usize::from(count) =>
            {
                Ok(words)
            }
            // Bits come in whole bytes.
            Ok(Response::ReadCoils(bits) | Response::ReadDiscreteInputs(bits))
                if bits.len() == usize::from(count).next_multiple_of(8) =>
            {
                Ok(bits.into_iter().take(usize::from(count)).map(u16::from).collect())
            }
            Ok(other) => return Err(Fault::Damaged(format!("{count} values were asked for: {other:?}"))),
            Err(code @ (ExceptionCode::GatewayPathUnavailable | ExceptionCode::GatewayTargetDevice)) => {
                Err(Fault::Unreached(code))
            }
            Err(code) => Err(Fault::Exception(code)),
        };
        self.client = Some(client);
        words
    }

    /// What an error of the client means. A port that failed is closed.
    fn judge(&mut self, error: Error) -> Fault {
        match error {
            Error::Protocol(ProtocolError::HeaderMismatch { message, .. }) => Fault::Stray(message),
            Error::Protocol(ProtocolError::FunctionCodeMismatch { .. }) => Fault::Stray(error.to_string()),
            // What the codec cannot read.
            Error::Transport(error)
                if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
            {
                Fault::Damaged(error.to_string())
            }
            Error::Transport(error) => {
                self.port = None;
                Fault::Broken(error)
            }
        }
    }

    async fn open(&mut self) -> io::Result<client::Context> {
        match &self.address {
            Address::Tcp { host, port } => {
                let connecting = TcpStream::connect((host.as_str(), *port));
                let late = |_| io::Error::new(io::ErrorKind::TimedOut, "nobody answers there");
                let stream = tokio::time::timeout(self.timeout, connecting).await.map_err(late)??;
                stream.set_nodelay(true)?;
                Ok(client::tcp::attach(stream))
            }
            Address::Rtu { path, baud, parity, stop_bits } => {
                let port = match self.port.take() {
                    Some(port) => port,
                    None => {
                        let settings = tokio_serial::new(path, *baud).parity(*parity).stop_bits(*stop_bits);
                        Line(Arc::new(Mutex::new(Port {
                            stream: SerialStream::open(&settings)?,
                            heard: false,
                        })))
                    }
                };
                self.port = Some(port.clone());
                Ok(client::rtu::attach(port))
            }
        }
    }
}

/// A serial port behind one client after another.
#[derive(Clone)]
struct Line(Arc<Mutex<Port>>);

struct Port {
    stream: SerialStream,
    /// Something came in since the last request.
    heard: bool,
}

impl Line {
    fn port(&self) -> MutexGuard<'_, Port> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn heard(&self) -> bool {
        self.port().heard
    }
}

impl AsyncRead for Line {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut port = self.port();
        let before = buf.filled().len();
        let polled = Pin::new(&mut port.stream).poll_read(cx, buf);
        port.heard |= buf.filled().len() > before;
        polled
    }
}

impl AsyncWrite for Line {
    /// Sends a request whole, or fails: the kernel's buffer holds hundreds, so it is full only where the converter
    /// is stuck. Whatever came in before belongs to no request any more.
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, request: &[u8]) -> Poll<io::Result<usize>> {
        let mut port = self.port();
        port.heard = false;
        port.stream.clear(ClearBuffer::Input)?;
        match port.stream.try_write(request)? {
            sent if sent == request.len() => Poll::Ready(Ok(sent)),
            _ => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
        }
    }

    /// Waits for nothing: `tcdrain` blocks its thread, for ever where the converter is stuck.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

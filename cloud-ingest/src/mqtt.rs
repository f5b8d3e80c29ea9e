//! MQTT 5 for much that comes and is acknowledged late: rumqttc's packets, on a connection of our own.
//!
//! rumqttc's event loop writes an acknowledgement that it does not give by itself with a system call of its own, is woken
//! for each message that a busy broker writes, and copies it: a single JSON reading took 12 µs of CPU time on its whole
//! way with it, and 6.5 without (BENCHMARKS.md). So a connection has two halves here:
//!
//! * [`Reader`] takes whatever has come, up to 64 KiB, and then lets a millisecond pass.
//! * [`Writer`] sends what [`Client`]s have asked for, all of it at once, and pings.
//!
//! Either ends with the connection; nothing is sent again on the next one. No more publishes are under way than
//! the broker's receive maximum allows (MQTT 5, section 3.3.4); whoever has one more waits, so reading must go on.

use std::{io, sync::Arc, time::Duration};

use bytes::BytesMut;
use rumqttc::{
    TlsConfiguration, Transport,
    tokio_rustls::{TlsConnector, rustls::pki_types::ServerName},
    v5::{
        MqttOptions,
        mqttbytes::{
            self,
            v5::{
                ConnAckProperties, Connect, ConnectReturnCode, Disconnect, DisconnectReasonCode, Packet,
                PingReq, PubAck, PubAckReason, Publish, SubAck, SubscribeReasonCode,
            },
        },
    },
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf},
    net::TcpStream,
    sync::{Semaphore, mpsc},
    time::{Instant, MissedTickBehavior, interval_at, sleep_until, timeout},
};

/// Read at once.
const READ: usize = 64 * 1024;
/// With less room than this a new buffer is begun; what was read keeps the old one for as long as it is held.
const ROOM: usize = 4 * 1024;
/// Between two reads.
const MOMENT: Duration = Duration::from_millis(1);
/// Requests that may wait to be written.
const REQUESTS: usize = 1024;
/// Publishes under way at most, whatever the broker allows.
const WINDOW: u16 = 1024;

/// Why there is no connection, or none any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Lost {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the broker closed the connection")]
    Closed,
    #[error("nothing was heard of the broker for {0:?}")]
    Silent(Duration),
    #[error("the broker refuses the connection: {0:?}")]
    Refused(ConnectReturnCode),
    #[error("the broker ended the connection: {0:?}")]
    Ended(DisconnectReasonCode),
    #[error("the broker sent what cannot be read: {0}")]
    Unreadable(#[from] mqttbytes::Error),
    #[error("mqtt.url: {0} is no name that a certificate could hold")]
    NoName(String),
}

/// What the sockets have in common.
trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Socket for S {}

/// A connection that the broker has accepted.
pub(crate) struct Connection {
    /// Whether the broker has kept the session.
    pub(crate) session_present: bool,
    /// What comes.
    pub(crate) reader: Reader,
    /// What goes; to be run.
    pub(crate) writer: Writer,
    /// Asks the writer.
    pub(crate) client: Client,
}

impl Connection {
    /// Connects and waits for the broker's answer.
    pub(crate) async fn open(options: &MqttOptions) -> Result<Self, Lost> {
        let patience = Duration::from_secs(options.connection_timeout());
        let opening = async {
            let socket = connect(options).await?;
            Self::greet(socket, options).await
        };
        timeout(patience, opening).await.map_err(|_| Lost::Silent(patience))?
    }

    async fn greet(mut socket: Box<dyn Socket>, options: &MqttOptions) -> Result<Self, Lost> {
        let mut bytes = BytesMut::new();
        let connect = Connect {
            keep_alive: options.keep_alive().as_secs() as u16,
            client_id: options.client_id(),
            clean_start: options.clean_start(),
            properties: options.connect_properties(),
        };
        Packet::Connect(connect, options.last_will(), options.credentials()).write(&mut bytes, None)?;
        socket.write_all(&bytes).await?;
        socket.flush().await?;

        let (half, write) = tokio::io::split(socket);
        let window = Arc::new(Semaphore::new(0));
        let max_packet = options.max_packet_size();
        let mut reader = Reader::new(half, Arc::clone(&window), max_packet, options.keep_alive().max(MOMENT));
        let ack = loop {
            match reader.next().await? {
                Packet::ConnAck(ack) if ack.code == ConnectReturnCode::Success => break ack,
                Packet::ConnAck(ack) => return Err(Lost::Refused(ack.code)),
                _ => {}
            }
        };
        let of_broker = |get: fn(&ConnAckProperties) -> Option<u16>| ack.properties.as_ref().and_then(get);
        window.add_permits(of_broker(|p| p.receive_max).unwrap_or(WINDOW).min(WINDOW).into());
        let keep_alive = of_broker(|p| p.server_keep_alive);
        let keep_alive = keep_alive.map_or(options.keep_alive(), |s| Duration::from_secs(s.into()));
        // A ping is answered at once, so within another half something has come.
        let ping = (keep_alive / 2).max(Duration::from_millis(500));
        reader.patience = ping * 2;
        let max_packet = ack.properties.as_ref().and_then(|p| p.max_packet_size);
        let (requests, requested) = mpsc::channel(REQUESTS);
        let writer = Writer { half: write, requested, ping, max_packet, last_pkid: 0 };
        let client = Client { requests, window };
        Ok(Self { session_present: ack.session_present, reader, writer, client })
    }
}

async fn connect(options: &MqttOptions) -> Result<Box<dyn Socket>, Lost> {
    let (host, port) = options.broker_address();
    let tcp = TcpStream::connect((host.as_str(), port)).await?;
    // What is written is whole already.
    tcp.set_nodelay(true)?;
    match options.transport() {
        Transport::Tls(TlsConfiguration::Rustls(config)) => {
            let name =
                ServerName::try_from(host.as_str()).map_err(|_| Lost::NoName(host.clone()))?.to_owned();
            Ok(Box::new(TlsConnector::from(config).connect(name, tcp).await?))
        }
        Transport::Tcp => Ok(Box::new(tcp)),
        _ => Err(io::Error::new(io::ErrorKind::Unsupported, "neither TCP nor TLS as configured here").into()),
    }
}

/// What comes from the broker.
pub(crate) struct Reader {
    half: ReadHalf<Box<dyn Socket>>,
    buffer: BytesMut,
    window: Arc<Semaphore>,
    max_packet: Option<u32>,
    /// How long nothing may come.
    patience: Duration,
    /// Not read before.
    next: Instant,
}

impl Reader {
    fn new(
        half: ReadHalf<Box<dyn Socket>>,
        window: Arc<Semaphore>,
        max_packet: Option<u32>,
        patience: Duration,
    ) -> Self {
        Self { half, buffer: BytesMut::new(), window, max_packet, patience, next: Instant::now() }
    }

    /// Appends what has come, at least one packet. To be cancelled loses nothing. Answers to pings and to our own
    /// publishes are seen to here.
    pub(crate) async fn read(&mut self, packets: &mut Vec<Packet>) -> Result<(), Lost> {
        packets.push(self.next().await?);
        while let Some(packet) = self.packet()? {
            packets.push(packet);
        }
        Ok(())
    }

    /// The next packet, when it is there. To be cancelled loses nothing.
    async fn next(&mut self) -> Result<Packet, Lost> {
        loop {
            if let Some(packet) = self.packet()? {
                return Ok(packet);
            }
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> Result<(), Lost> {
        sleep_until(self.next).await;
        if self.buffer.capacity() - self.buffer.len() < ROOM {
            self.buffer.reserve(READ);
        }
        let read = timeout(self.patience, self.half.read_buf(&mut self.buffer));
        let read = read.await.map_err(|_| Lost::Silent(self.patience))??;
        if read == 0 {
            return Err(Lost::Closed);
        }
        if self.buffer.len() < self.buffer.capacity() {
            self.next = Instant::now() + MOMENT;
        }
        Ok(())
    }

    /// The first packet of the buffer for whoever reads, if it is complete.
    fn packet(&mut self) -> Result<Option<Packet>, Lost> {
        loop {
            match Packet::read(&mut self.buffer, self.max_packet) {
                Ok(Packet::PubAck(ack)) => {
                    self.window.add_permits(1);
                    if !matches!(ack.reason, PubAckReason::Success | PubAckReason::NoMatchingSubscribers) {
                        tracing::error!(reason = ?ack.reason, "the broker refuses a publish; see its ACL");
                    }
                }
                Ok(Packet::PingResp(_)) => {}
                Ok(Packet::Disconnect(end)) => return Err(Lost::Ended(end.reason_code)),
                Ok(packet) => return Ok(Some(packet)),
                Err(mqttbytes::Error::InsufficientBytes(more)) => {
                    self.buffer.reserve(more);
                    return Ok(None);
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl Drop for Reader {
    /// Whoever waits for an answer waits no longer.
    fn drop(&mut self) {
        self.window.close();
    }
}

/// Says so if the broker refuses one of `filters`; the connection goes on without what it would have brought.
pub(crate) fn check_granted(ack: &SubAck, filters: &impl std::fmt::Debug) {
    let refused = |code: &&SubscribeReasonCode| !matches!(code, SubscribeReasonCode::Success(_));
    if let Some(code) = ack.return_codes.iter().find(refused) {
        tracing::error!(?code, ?filters, "the broker refuses a subscription; see its ACL");
    }
}

/// What a [`Client`] asks for.
enum Request {
    Acknowledge(Vec<u16>),
    Send(Box<Packet>),
}

/// Asks for what goes to the broker; clones ask for the same connection.
#[derive(Clone)]
pub(crate) struct Client {
    requests: mpsc::Sender<Request>,
    window: Arc<Semaphore>,
}

impl Client {
    /// Acknowledges messages by their packet ids; false when the connection is gone.
    pub(crate) async fn acknowledge(&self, pkids: Vec<u16>) -> bool {
        self.requests.send(Request::Acknowledge(pkids)).await.is_ok()
    }

    /// Acknowledges one message if that can be asked for now.
    pub(crate) fn try_acknowledge(&self, pkid: u16) {
        // If it is not sent, the message comes again on the next connection.
        let _ = self.requests.try_send(Request::Acknowledge(vec![pkid]));
    }

    /// Publishes with quality of service 1 once the broker has room for it; false when the connection is gone.
    pub(crate) async fn publish(&self, publish: Publish) -> bool {
        let Ok(permit) = self.window.acquire().await else { return false };
        permit.forget();
        self.send(Packet::Publish(publish)).await
    }

    /// The same if the broker has room now.
    pub(crate) fn try_publish(&self, publish: Publish) -> bool {
        let Ok(permit) = self.window.try_acquire() else { return false };
        let asked = self.requests.try_send(Request::Send(Box::new(Packet::Publish(publish)))).is_ok();
        if asked {
            permit.forget();
        }
        asked
    }

    /// Sends a packet, which gets its number; false when the connection is gone.
    pub(crate) async fn send(&self, packet: Packet) -> bool {
        self.requests.send(Request::Send(Box::new(packet))).await.is_ok()
    }

    /// Ends the connection once everything asked for before is sent.
    pub(crate) async fn disconnect(&self) {
        let end = Disconnect::new(DisconnectReasonCode::NormalDisconnection);
        self.send(Packet::Disconnect(end)).await;
    }
}

/// What goes to the broker.
pub(crate) struct Writer {
    half: WriteHalf<Box<dyn Socket>>,
    requested: mpsc::Receiver<Request>,
    ping: Duration,
    max_packet: Option<u32>,
    last_pkid: u16,
}

impl Writer {
    /// Writes until it has said farewell, or the last client is gone. It is for the broker to close the connection.
    pub(crate) async fn run(mut self) -> Result<(), Lost> {
        let mut ping = interval_at(Instant::now() + self.ping, self.ping);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut bytes = BytesMut::new();
        let mut farewell = false;
        while !farewell {
            let mut next = tokio::select! {
                request = self.requested.recv() => match request {
                    Some(request) => Some(request),
                    None => return Ok(()),
                },
                _ = ping.tick() => Some(Request::Send(Box::new(Packet::PingReq(PingReq)))),
            };
            while let Some(request) = next {
                farewell =
                    matches!(&request, Request::Send(packet) if matches!(**packet, Packet::Disconnect(_)));
                self.encode(request, &mut bytes)?;
                next = if farewell || bytes.len() >= READ { None } else { self.requested.try_recv().ok() };
            }
            self.half.write_all(&bytes).await?;
            self.half.flush().await?;
            bytes.clear();
        }
        Ok(())
    }

    fn encode(&mut self, request: Request, bytes: &mut BytesMut) -> Result<(), Lost> {
        let mut packet = match request {
            Request::Acknowledge(pkids) => {
                for pkid in pkids {
                    Packet::PubAck(PubAck::new(pkid, None)).write(bytes, None)?;
                }
                return Ok(());
            }
            Request::Send(packet) => packet,
        };
        match packet.as_mut() {
            Packet::Publish(publish) => publish.pkid = self.number(),
            Packet::Subscribe(subscribe) => subscribe.pkid = self.number(),
            Packet::Unsubscribe(unsubscribe) => unsubscribe.pkid = self.number(),
            _ => {}
        }
        packet.write(bytes, self.max_packet)?;
        Ok(())
    }

    /// Far fewer are under way than there are numbers, so none is under way twice.
    fn number(&mut self) -> u16 {
        self.last_pkid = self.last_pkid.checked_add(1).unwrap_or(1);
        self.last_pkid
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;
    use rumqttc::v5::mqttbytes::{
        QoS,
        v5::{ConnAck, Filter, PubAckProperties, Subscribe},
    };
    use tokio::io::DuplexStream;

    use super::*;

    /// A broker that does as it is told.
    pub(crate) struct Broker<S> {
        pub(crate) socket: S,
        pub(crate) buffer: BytesMut,
    }

    impl<S: AsyncRead + AsyncWrite + Unpin> Broker<S> {
        pub(crate) async fn hear(&mut self) -> Packet {
            loop {
                match Packet::read(&mut self.buffer, None) {
                    Ok(packet) => return packet,
                    Err(mqttbytes::Error::InsufficientBytes(_)) => {
                        assert_ne!(self.socket.read_buf(&mut self.buffer).await.unwrap(), 0);
                    }
                    Err(e) => panic!("{e}"),
                }
            }
        }

        pub(crate) async fn say(&mut self, packet: Packet) {
            let mut bytes = BytesMut::new();
            packet.write(&mut bytes, None).unwrap();
            self.socket.write_all(&bytes).await.unwrap();
        }
    }

    fn options() -> MqttOptions {
        let mut options = MqttOptions::new("cloud", "localhost", 1883);
        options.set_keep_alive(Duration::from_secs(5)).set_max_packet_size(Some(1 << 20));
        options
    }

    pub(crate) fn properties(set: impl FnOnce(&mut ConnAckProperties)) -> ConnAckProperties {
        let mut properties = ConnAckProperties {
            session_expiry_interval: None,
            receive_max: None,
            max_qos: None,
            retain_available: None,
            max_packet_size: None,
            assigned_client_identifier: None,
            topic_alias_max: None,
            reason_string: None,
            user_properties: Vec::new(),
            wildcard_subscription_available: None,
            subscription_identifiers_available: None,
            shared_subscription_available: None,
            server_keep_alive: None,
            response_information: None,
            server_reference: None,
            authentication_method: None,
            authentication_data: None,
        };
        set(&mut properties);
        properties
    }

    async fn greeted(
        code: ConnectReturnCode,
        properties: ConnAckProperties,
    ) -> (Broker<DuplexStream>, Result<Connection, Lost>) {
        let (ours, socket) = tokio::io::duplex(1 << 16);
        let mut broker = Broker { socket, buffer: BytesMut::new() };
        let options = options();
        let (connection, ()) = tokio::join!(Connection::greet(Box::new(ours), &options), async {
            let Packet::Connect(connect, ..) = broker.hear().await else { panic!() };
            assert_eq!((connect.client_id.as_str(), connect.clean_start), ("cloud", true));
            broker
                .say(Packet::ConnAck(ConnAck { session_present: true, code, properties: Some(properties) }))
                .await;
        });
        (broker, connection)
    }

    async fn connected(properties: ConnAckProperties) -> (Broker<DuplexStream>, Connection) {
        let (broker, connection) = greeted(ConnectReturnCode::Success, properties).await;
        (broker, connection.unwrap())
    }

    fn publish(pkid: u16, bytes: usize) -> Publish {
        let payload: Vec<u8> = (0..bytes).map(|n| (n + usize::from(pkid)) as u8).collect();
        Publish { pkid, ..Publish::new("tailrace/v1/a/b/readings", QoS::AtLeastOnce, payload, None) }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// Whatever the broker writes comes as it was written, however it is cut up on the way and however often
        /// reading is broken off.
        #[test]
        fn packets_come_whole_and_in_order(
            sizes in prop::collection::vec(prop_oneof![0usize..300, 0usize..100_000], 1..40),
            cuts in prop::collection::vec(1usize..70_000, 1..20),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (mut broker, mut connection) = connected(properties(|_| {})).await;
                let sent: Vec<_> = (1u16..).zip(&sizes).map(|(pkid, size)| publish(pkid, *size)).collect();
                let mut bytes = BytesMut::new();
                for publish in &sent {
                    Packet::Publish(publish.clone()).write(&mut bytes, None).unwrap();
                }
                let writing = tokio::spawn(async move {
                    for cut in cuts.iter().cycle() {
                        let piece = bytes.split_to(bytes.len().min(*cut));
                        broker.socket.write_all(&piece).await.unwrap();
                        if bytes.is_empty() {
                            return broker;
                        }
                    }
                    unreachable!()
                });
                let mut packets = Vec::new();
                while packets.len() < sent.len() {
                    let _ = timeout(Duration::from_micros(300), connection.reader.read(&mut packets)).await;
                }
                writing.await.unwrap();
                let sent: Vec<_> = sent.into_iter().map(Packet::Publish).collect();
                assert!(packets == sent);
            });
        }
    }

    #[tokio::test]
    async fn requests_go_out_in_order_and_numbered() {
        let (mut broker, connection) = connected(properties(|_| {})).await;
        let writing = tokio::spawn(connection.writer.run());
        let client = connection.client;
        let everything = Filter::new("#", QoS::AtLeastOnce);
        assert!(client.send(Packet::Subscribe(Subscribe::new(everything, None))).await);
        assert!(client.acknowledge((1..=500).collect()).await);
        assert!(client.publish(publish(0, 5)).await);
        client.disconnect().await;
        assert!(matches!(broker.hear().await, Packet::Subscribe(Subscribe { pkid: 1, .. })));
        for pkid in 1..=500 {
            assert_eq!(broker.hear().await, Packet::PubAck(PubAck::new(pkid, None)));
        }
        assert_eq!(broker.hear().await, Packet::Publish(Publish { pkid: 2, ..publish(0, 5) }));
        writing.await.unwrap().unwrap();
        drop(connection.reader);
        let mut end = broker.buffer.to_vec();
        broker.socket.read_to_end(&mut end).await.unwrap();
        assert_eq!(end, [0xE0, 0], "a farewell, and the end of the connection");
    }

    #[tokio::test]
    async fn no_more_is_published_than_the_broker_allows() {
        let (mut broker, mut connection) = connected(properties(|p| p.receive_max = Some(2))).await;
        let _writing = tokio::spawn(connection.writer.run());
        let client = connection.client.clone();
        assert!(client.publish(publish(0, 1)).await);
        assert!(client.try_publish(publish(0, 2)));
        assert!(!client.try_publish(publish(0, 3)));
        let third = tokio::spawn(async move { client.publish(publish(0, 3)).await });
        for pkid in [1, 2] {
            assert!(matches!(broker.hear().await, Packet::Publish(p) if p.pkid == pkid));
        }
        let refused = PubAck { reason: PubAckReason::NotAuthorized, ..PubAck::new(1, None) };
        broker.say(Packet::PubAck(refused)).await;
        broker.say(Packet::Publish(publish(7, 3))).await;
        let mut packets = Vec::new();
        connection.reader.read(&mut packets).await.unwrap();
        assert_eq!(packets, [Packet::Publish(publish(7, 3))]);
        assert!(third.await.unwrap());
        assert!(matches!(broker.hear().await, Packet::Publish(p) if p.pkid == 3));

        // Nobody waits for the answers of a connection that is gone.
        let client = connection.client.clone();
        let fourth = tokio::spawn(async move { client.publish(publish(0, 4)).await });
        tokio::task::yield_now().await;
        drop(connection.reader);
        assert!(!fourth.await.unwrap());
        assert!(!connection.client.try_publish(publish(0, 5)));
    }

    #[tokio::test]
    async fn a_connection_is_lost_for_a_reason() {
        let (_broker, refused) = greeted(ConnectReturnCode::NotAuthorized, properties(|_| {})).await;
        assert!(matches!(refused, Err(Lost::Refused(ConnectReturnCode::NotAuthorized))));

        let lost = async |said: &'static [u8]| {
            let (mut broker, mut connection) = connected(properties(|p| p.server_keep_alive = Some(1))).await;
            broker.socket.write_all(said).await.unwrap();
            let broker = (!said.is_empty()).then_some(broker);
            let lost = connection.reader.read(&mut Vec::new()).await.unwrap_err();
            drop(broker);
            lost
        };
        assert!(matches!(lost(b"").await, Lost::Closed));
        assert!(matches!(
            lost(&[0xE0, 2, 0x8E, 0]).await,
            Lost::Ended(DisconnectReasonCode::SessionTakenOver)
        ));
        assert!(matches!(lost(&[0x30, 0xFF, 0xFF, 0x7F]).await, Lost::Unreadable(_)));
        // The beginning of a message, and then nothing.
        assert!(matches!(lost(&[0x30, 100]).await, Lost::Silent(_)));
    }

    #[tokio::test]
    async fn a_quiet_connection_is_kept_alive() {
        let (mut broker, mut connection) = connected(properties(|p| p.server_keep_alive = Some(1))).await;
        let _writing = tokio::spawn(connection.writer.run());
        let mut packets = Vec::new();
        let (read, ()) = tokio::join!(connection.reader.read(&mut packets), async {
            for _ in 0..3 {
                assert_eq!(broker.hear().await, Packet::PingReq(PingReq));
                broker.say(Packet::PingResp(mqttbytes::v5::PingResp)).await;
            }
            let properties = PubAckProperties { reason_string: None, user_properties: Vec::new() };
            broker.say(Packet::PubAck(PubAck::new(9, Some(properties)))).await;
            broker.say(Packet::Publish(publish(1, 2))).await;
        });
        read.unwrap();
        let payload = Bytes::from_static(&[1, 2]);
        assert!(matches!(&packets[..], [Packet::Publish(p)] if p.payload == payload));
    }
}

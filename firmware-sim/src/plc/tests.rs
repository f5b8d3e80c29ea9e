use tokio::time::{Instant, timeout};

use super::*;

/// For what is to come.
const SOON: Duration = Duration::from_secs(10);
/// For what is not to come.
const A_WHILE: Duration = Duration::from_millis(200);

#[test]
fn headers_of_modbus_tcp() {
    // Guide V1.0b, 4.4.2.1: a read of one register.
    let request = [0x15, 0x01, 0x00, 0x00, 0x00, 0x06, 0xff];
    assert_eq!(pdu_length(request), Some(5));
    assert_eq!(
        framed(request, &[0x03, 0x02, 0x00, 0x05]),
        [0x15, 0x01, 0x00, 0x00, 0x00, 0x05, 0xff, 0x03, 0x02, 0x00, 0x05]
    );
    for (protocol, length, wanted) in [
        (0u16, 2u16, Some(1)),
        (0, 254, Some(253)),
        (0, 255, None),
        (0, 1, None),
        (0, 0, None),
        (0, u16::MAX, None),
        (1, 6, None),
        (0x4754, 6, None),
    ] {
        let ([p0, p1], [l0, l1]) = (protocol.to_be_bytes(), length.to_be_bytes());
        assert_eq!(pdu_length([0, 0, p0, p1, l0, l1, 1]), wanted, "protocol {protocol}, length {length}");
    }
}

#[test]
fn faults_are_one_thing_with_its_number() {
    for (line, wanted) in [
        (" ok\t", Fault::None),
        ("late 250", Fault::Late(Duration::from_millis(250))),
        ("silent", Fault::Silent),
        ("dead 3", Fault::Dead(3)),
        ("exception 6", Fault::Refuse(Exception::DEVICE_BUSY)),
        ("cut", Fault::Cut),
    ] {
        assert_eq!(line.parse(), Ok(wanted), "{line}");
    }
    for line in ["", "late", "late soon", "late 1 2", "silent 3", "dead 256", "dead -1", "exception", "Cut"] {
        let mistake = Fault::from_str(line).unwrap_err();
        assert!(mistake.contains("there are: late MS"), "{mistake}");
    }
}

#[tokio::test]
async fn faults_come_by_lines_and_the_last_one_stays() {
    let (set, fault) = watch::channel(Fault::None);
    take_faults(&b"silent\nno such thing\ndead 2"[..], set).await;
    assert_eq!(*fault.borrow(), Fault::Dead(2));
}

/// A PLC that serves, the port, and its faults.
async fn plc() -> (SocketAddr, watch::Sender<Fault>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (set, fault) = watch::channel(Fault::None);
    let units = Units::demo(ANCHOR.parse().unwrap()).unwrap();
    tokio::spawn(serve(listener, Arc::new(units), fault));
    (address, set)
}

/// A read of the instant in unit `unit`, which has input registers (1) or holding registers (2).
fn request(transaction: u8, unit: u8) -> [u8; 12] {
    [0, transaction, 0, 0, 0, 6, unit, if unit == 1 { 4 } else { 3 }, 0, 0, 0, 4]
}

/// The next answer: transaction, unit, and PDU.
async fn answer(stream: &mut TcpStream) -> (u8, u8, Vec<u8>) {
    let mut header = [0; HEADER];
    timeout(SOON, stream.read_exact(&mut header)).await.expect("an answer").unwrap();
    let mut pdu = vec![0; pdu_length(header).unwrap()];
    stream.read_exact(&mut pdu).await.unwrap();
    (header[1], header[6], pdu)
}

async fn assert_silent(stream: &mut TcpStream) {
    assert!(timeout(A_WHILE, stream.read_u8()).await.is_err(), "an answer came");
}

#[tokio::test]
async fn requests_are_answered_one_by_one_however_they_are_cut() {
    let (address, _set) = plc().await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let both = [request(1, 1), request(2, 2)].concat();
    for cut in [1, 6, 7, 11, 12, 13, 20] {
        stream.write_all(&both[..cut]).await.unwrap();
        stream.flush().await.unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
        stream.write_all(&both[cut..]).await.unwrap();
        let ((t1, u1, first), (t2, u2, second)) = (answer(&mut stream).await, answer(&mut stream).await);
        assert_eq!((t1, u1, t2, u2), (1, 1, 2, 2), "cut at {cut}");
        assert_eq!((&first[..2], first.len(), &second[..2]), (&[4, 8][..], 10, &[3, 8][..]));
    }
    // What is not Modbus ends the connection, and no other one.
    let mut stranger = TcpStream::connect(address).await.unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    let _ = timeout(SOON, stranger.read_to_end(&mut rest)).await.expect("the end");
    assert!(rest.is_empty());
    stream.write_all(&request(3, 1)).await.unwrap();
    assert_eq!(answer(&mut stream).await.0, 3);
}

#[tokio::test]
async fn faults_do_what_they_say() {
    let (address, set) = plc().await;
    let mut stream = TcpStream::connect(address).await.unwrap();

    set.send_replace(Fault::Late(A_WHILE));
    let asked = Instant::now();
    stream.write_all(&request(1, 1)).await.unwrap();
    assert_eq!(answer(&mut stream).await.0, 1);
    assert!(asked.elapsed() >= A_WHILE);

    set.send_replace(Fault::Refuse(Exception::DEVICE_BUSY));
    stream.write_all(&request(2, 1)).await.unwrap();
    assert_eq!(answer(&mut stream).await, (2, 1, vec![0x84, 6]));

    set.send_replace(Fault::Dead(1));
    stream.write_all(&request(3, 1)).await.unwrap();
    assert_silent(&mut stream).await;
    stream.write_all(&request(4, 2)).await.unwrap();
    assert_eq!(answer(&mut stream).await.0, 4, "the other unit lives");

    set.send_replace(Fault::Silent);
    stream.write_all(&request(5, 2)).await.unwrap();
    assert_silent(&mut stream).await;

    set.send_replace(Fault::Cut);
    let mut rest = Vec::new();
    let _ = timeout(SOON, stream.read_to_end(&mut rest)).await.expect("the connection is closed");
    let mut refused = TcpStream::connect(address).await.unwrap();
    let _ = timeout(SOON, refused.read_to_end(&mut rest)).await.expect("a new one, too");
    assert!(rest.is_empty());

    set.send_replace(Fault::None);
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&request(6, 1)).await.unwrap();
    assert_eq!(answer(&mut stream).await.0, 6);
}

#[tokio::test]
async fn the_agent_reads_every_register() {
    let (address, _set) = plc().await;
    let units = Units::demo(ANCHOR.parse().unwrap()).unwrap();
    let rows: Vec<_> = units.rows().cloned().collect();
    let begun = SystemClock.now();
    let read = register_map::agent::read(&format!("tcp://{address}"), &rows).await;
    let ended = SystemClock.now();
    assert_eq!(read.len(), rows.len());
    // Each value is that of some instant of the grid of 100 ms since we began, to half a step of its register.
    let instants = (0..).map(|n| begun + Duration::from_millis(100) * n);
    let instants = instants.take_while(|at| at.since(ended) < Duration::from_millis(100));
    let shown: Vec<Vec<f64>> = instants.map(|at| units.values(at).collect()).collect();
    for (index, row) in rows.iter().enumerate() {
        let got = read[&row.device];
        let near = |values: &Vec<f64>| {
            let half_step = if row.scale == 1.0 { values[index].abs() * 1e-7 } else { row.scale / 2.0 };
            (got - values[index]).abs() <= half_step * (1.0 + 1e-9)
        };
        assert!(shown.iter().any(near), "{}: {got}", row.device);
    }
}

#[tokio::test]
async fn beyond_loopback_is_refused() {
    let options = Options {
        listen: "0.0.0.0:0".parse().unwrap(),
        beyond_loopback: false,
        faults: false,
        anchor: ANCHOR.parse().unwrap(),
        map: false,
        at: None,
        agent_config: false,
    };
    let refusal = run(options).await.unwrap_err().to_string();
    assert!(refusal.contains("--listen 0.0.0.0:0 is not a loopback address"), "{refusal}");
}

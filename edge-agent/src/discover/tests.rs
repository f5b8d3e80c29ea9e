use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::*;
use crate::settings::{I2cChip, Settings, Source, tests::load};

/// The configuration of these findings with the three keys that nobody but the plant knows.
fn filled_in(findings: &Findings) -> (String, Settings) {
    let text = configuration(findings);
    let filled = ["site", "gateway", "data_dir"].iter().fold(text.clone(), |text, key| {
        let empty = format!("\n{key} = \"\"");
        assert!(text.contains(&empty), "{text}");
        text.replacen(&empty, &format!("\n{key} = \"x\""), 1)
    });
    let settings = load(&filled, &[]).unwrap_or_else(|mistakes| panic!("{mistakes}\n{filled}"));
    (text, settings)
}

fn bus(path: &str, answers: Result<Vec<(u8, Answer)>, &str>) -> I2cFinding {
    I2cFinding { path: path.to_owned(), answers: answers.map_err(str::to_owned) }
}

#[test]
fn the_configuration_is_complete_and_says_the_rest() {
    let answers = vec![
        (0x20, Answer::Unknown),
        (0x44, Answer::Sht4x { serial: 0x5a17_0044 }),
        (0x48, Answer::Ads1115),
        (0x4b, Answer::Ads1115),
        (0x68, Answer::Fault),
        (0x70, Answer::Unknown),
    ];
    let findings = Findings {
        modbus: Vec::new(),
        i2c: vec![
            bus("/dev/i2c-1", Ok(answers)),
            bus("/dev/i2c-3", Ok(vec![(0x45, Answer::Sht4x { serial: 1 })])),
            bus("/dev/i2c-4", Ok((0x08..=0x77).map(|at| (at, Answer::Fault)).collect())),
            bus("/dev/i2c-9", Err("opening i2c bus /dev/i2c-9; is the bus enabled")),
        ],
    };
    let (text, settings) = filled_in(&findings);
    assert_eq!(settings.registry.devices.len(), 2 + 4 + 4 + 2);
    let probes: Vec<_> = settings
        .sources
        .iter()
        .map(|source| match source {
            Source::I2c { path, probes } => {
                let loops = probes.iter().filter(|p| matches!(p.chip, I2cChip::Loop { .. })).count();
                (path.as_str(), loops, probes.len() - loops)
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(probes, [("/dev/i2c-1", 8, 1), ("/dev/i2c-3", 0, 1)]);
    for part in [
        "# 0x44: SHT4x, serial number 1511456836 (0x5a170044).",
        "#   0x20: often a port expander (PCF8574, MCP23017)\n#   0x70\n",
        "# At 0x68 the bus failed: Linux itself holds that chip, or the wiring is bad.",
        "# At 112 addresses the bus failed.",
        "# It could not be scanned: opening i2c bus /dev/i2c-9; is the bus enabled",
    ] {
        assert!(text.contains(part), "{part:?} not in {text}");
    }
    assert!(text.lines().all(|line| line.len() <= 120), "{text}");
}

#[test]
fn nothing_found_is_a_configuration_too() {
    let findings = Findings { i2c: vec![bus("/dev/i2c-1", Ok(Vec::new()))], modbus: Vec::new() };
    let (text, settings) = filled_in(&findings);
    assert!(
        settings.sources.is_empty() && text.contains("# No chip that this agent has a driver for."),
        "{text}"
    );
}

#[test]
fn modbus_units_wait_as_comments_that_are_right() {
    let line = Address::Rtu {
        path: "/dev/ttyUSB0".into(),
        baud: 9_600,
        parity: tokio_serial::Parity::None,
        stop_bits: tokio_serial::StopBits::Two,
    };
    let host = |port| Address::Tcp { host: "192.0.2.7".into(), port };
    let found = |address, units: &[u8]| ModbusFinding { address, units: Ok(units.to_vec()) };
    let all: Vec<u8> = (1..=247).collect();
    let refused = Err("opening tcp://192.0.2.7:505: refused".to_owned());
    let modbus = vec![
        found(line.clone(), &[1, 17]),
        found(host(502), &all),
        found(host(504), &[]),
        ModbusFinding { address: host(505), units: refused },
    ];
    let (text, settings) = filled_in(&Findings { i2c: Vec::new(), modbus });
    assert!(settings.sources.is_empty());
    for part in [
        "# Answers: unit 1, 17\n",
        "# 247 units answer: one device, most likely",
        "# No unit answers.",
        "# Nobody could be asked: opening tcp://192.0.2.7:505: refused",
    ] {
        assert!(text.contains(part), "{part:?} not in {text}");
    }
    // Somebody takes the marks away.
    let mut within = false;
    let bare: Vec<&str> = text
        .lines()
        .map(|row| {
            within = row.starts_with("# ") && (within || row == "# [[modbus]]");
            if within { &row[2..] } else { row }
        })
        .collect();
    let bare = ["site", "gateway", "data_dir"].iter().fold(bare.join("\n"), |text, key| {
        text.replacen(&format!("\n{key} = \"\""), &format!("\n{key} = \"x\""), 1)
    });
    let settings = load(&bare, &[]).unwrap_or_else(|mistakes| panic!("{mistakes}\n{bare}"));
    assert_eq!(settings.registry.devices.len(), 3);
    let [Source::Modbus(serial), Source::Modbus(tcp)] = &settings.sources[..] else { panic!("{bare}") };
    assert_eq!((&serial.address, serial.requests.len()), (&line, 2));
    assert_eq!((&tcp.address, tcp.requests.len()), (&host(502), 1));
}

#[tokio::test]
async fn modbus_units_are_those_that_answer() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut asked = [0; 12];
                while stream.read_exact(&mut asked).await.is_ok() {
                    let [high, low, .., unit, function, _, _, _, _] = asked;
                    let answer = match unit {
                        3 => vec![high, low, 0, 0, 0, 5, unit, function, 2, 0, 7],
                        // Exception 2: no such register.
                        255 => vec![high, low, 0, 0, 0, 3, unit, function | 0x80, 2],
                        _ => continue,
                    };
                    stream.write_all(&answer).await.unwrap();
                }
            });
        }
    });
    let nowhere = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let addresses = [port, nowhere].map(|port| Address::Tcp { host: "127.0.0.1".into(), port });
    let mut lines = Vec::new();
    let patience = Duration::from_millis(100);
    let found =
        scan_modbus(&addresses, &[1..=4, 255..=255], patience, |line| lines.push(line.to_owned())).await;
    assert_eq!(found[0].units, Ok(vec![3, 255]));
    assert!(found[1].units.as_ref().is_err_and(|error| error.starts_with("opening tcp://127.0.0.1:")));
    assert!(lines[0].ends_with("asking units 1 to 4; takes 1 s at most"), "{lines:?}");
    assert_eq!(lines[2], format!("tcp://127.0.0.1:{port}: 2 units answer"));
}

//! From findings to a configuration (pure).

use std::fmt::Write as _;

use super::{Answer, Findings, I2cFinding, ModbusFinding, i2c};
use crate::source::modbus::Address;

const HEAD: &str = r#"# Written by edge-agent discover. Fill in the three keys below; then
#   edge-agent check --config THIS_FILE      says what is missing or wrong
#   edge-agent sensors --config THIS_FILE    reads every sensor once
# Ids are free: call devices what the plant calls them, and change them at both places. Every other key stands in
# default.toml, with its unit and its reason.

site = ""       # the plant, in A-Z a-z 0-9 - _ .
gateway = ""    # this machine's name in the plant, in the same letters
data_dir = ""   # a folder on a local disk, such as "/var/lib/tailrace"

# The machine that the sensors belong to. Rename it, and add one for each other machine.
[[asset]]
id = "machine-1"
"#;

/// So many units are one device that pays no attention to the unit it is asked as.
const ANY_UNIT: usize = 100;
/// One address in so many may fail before that is how the adapter says that nobody is there.
const FAULTS: usize = 8;

/// A configuration of what was found: `edge-agent check` takes it once its first three keys are filled in.
pub fn configuration(findings: &Findings) -> String {
    let mut text = HEAD.to_owned();
    for I2cFinding { path, answers } in &findings.i2c {
        heading(&mut text, &format!("I2C bus {path}"));
        match answers {
            Ok(answers) => bus(&mut text, path, answers),
            Err(error) => line(&mut text, &format!("# It could not be scanned: {error}")),
        }
    }
    for (number, ModbusFinding { address, units }) in findings.modbus.iter().enumerate() {
        heading(&mut text, &format!("Modbus {address}"));
        match units {
            Ok(units) if units.is_empty() => line(&mut text, "# No unit answers."),
            Ok(units) => slaves(&mut text, number + 1, address, units),
            Err(error) => line(&mut text, &format!("# Nobody could be asked: {error}")),
        }
    }
    text
}

/// What a scan found, for a person who waits.
pub(super) fn summary(answers: &[(u8, Answer)]) -> String {
    let known = answers.iter().filter(|(_, a)| matches!(a, Answer::Ads1115 | Answer::Sht4x { .. })).count();
    let unknown = answers.iter().filter(|(_, a)| *a == Answer::Unknown).count();
    format!("{known} chips recognised, {unknown} others answer")
}

fn bus(text: &mut String, path: &str, answers: &[(u8, Answer)]) {
    let name = path.trim_start_matches("/dev/");
    let is_known = |answer: &Answer| matches!(answer, Answer::Ads1115 | Answer::Sht4x { .. });
    if answers.iter().any(|(_, answer)| is_known(answer)) {
        line(text, &format!("[[i2c]]\npath = {path:?}"));
    } else {
        line(text, "# No chip that this agent has a driver for.");
    }
    for (address, answer) in answers {
        match answer {
            Answer::Ads1115 => ads1115(text, name, *address),
            Answer::Sht4x { serial } => sht4x(text, name, *address, *serial),
            Answer::Unknown | Answer::Fault => {}
        }
    }
    let unknown: Vec<u8> = answers.iter().filter(|(_, a)| *a == Answer::Unknown).map(|(at, _)| *at).collect();
    if !unknown.is_empty() {
        line(text, "\n# These answer and were not recognised:");
        for address in unknown {
            let usual = i2c::usual(address).map(|what| format!(": often {what}")).unwrap_or_default();
            line(text, &format!("#   {address:#04x}{usual}"));
        }
    }
    let faults: Vec<String> =
        answers.iter().filter(|(_, a)| *a == Answer::Fault).map(|(at, _)| format!("{at:#04x}")).collect();
    match faults.len() {
        0 => {}
        1..FAULTS => {
            let at = faults.join(", ");
            line(
                text,
                &format!("\n# At {at} the bus failed: Linux itself holds that chip, or the wiring is bad."),
            );
        }
        n => line(
            text,
            &format!(
                "\n# At {n} addresses the bus failed. Some adapters say so of absent chips; or it is stuck."
            ),
        ),
    }
    line(
        text,
        &format!(
            "\n# {:#04x} was not asked: a read there can hang a bus with a clock generator.",
            i2c::LEFT_OUT
        ),
    );
}

fn ads1115(text: &mut String, bus: &str, address: u8) {
    line(
        text,
        &format!(
            "\n# {address:#04x}: looks like an ADS1115 (an ADS1113, ADS1114 or ADS1015 shows the same registers).\n\
             # It is taken to read 4-20 mA loops, of which only the current is known: give each device the type and\n\
             # unit of what its transmitter measures, and each loop its low (at 4 mA) and high (at 20 mA) in that unit.\n\
             # Delete the channels that have no transmitter; `sensors` shows no value for them."
        ),
    );
    for channel in 0..4 {
        device(text, &format!("{bus}/{address:#04x}/{channel}"), "current", "mA");
    }
    line(
        text,
        &format!(
            "[[i2c.ads1115]]\naddress = {address:#04x}\nperiod = \"5s\"\n\
             burden_ohm = 150.0   # the resistor across the input, as the board has it"
        ),
    );
    for channel in 0..4 {
        line(
            text,
            &format!(
                "[[i2c.ads1115.loop]]\nchannel = {channel}\ndevice = \"{bus}/{address:#04x}/{channel}\"\n\
                 low = 4.0\nhigh = 20.0"
            ),
        );
    }
}

fn sht4x(text: &mut String, bus: &str, address: u8, serial: u32) {
    line(text, &format!("\n# {address:#04x}: SHT4x, serial number {serial} ({serial:#010x})."));
    let [temperature, humidity] =
        ["temperature", "humidity"].map(|what| format!("{bus}/{address:#04x}/{what}"));
    device(text, &temperature, "temperature", "Cel");
    device(text, &humidity, "humidity", "%");
    line(
        text,
        &format!(
            "[[i2c.sht4x]]\naddress = {address:#04x}\nperiod = \"30s\"\n\
             temperature = \"{temperature}\"\nhumidity = \"{humidity}\""
        ),
    );
}

fn slaves(text: &mut String, number: usize, address: &Address, units: &[u8]) {
    let shown = if units.len() >= ANY_UNIT {
        line(
            text,
            &format!("# {} units answer: one device, most likely, which looks at no unit.", units.len()),
        );
        &units[..1]
    } else {
        let list: Vec<String> = units.iter().map(u8::to_string).collect();
        for row in list.chunks(20) {
            line(text, &format!("# Answers: unit {}", row.join(", ")));
        }
        units
    };
    line(
        text,
        "# Modbus does not say what a device is, nor what its registers hold: its manual does. Take the \"# \" below away\n\
         # and say for each value where it is and what it is; default.toml has all keys and the shipped profiles.",
    );
    let mut block = format!("[[modbus]]\nurl = \"{address}\"\n");
    if let Address::Rtu { baud, parity, stop_bits, .. } = address {
        let (parity, stop_bits) = (format!("{parity:?}").to_lowercase(), u8::from(*stop_bits));
        line(&mut block, &format!("baud = {baud}\nparity = \"{parity}\"\nstop_bits = {stop_bits}"));
    }
    for unit in shown {
        let id = format!("modbus-{number}/unit-{unit}/value");
        line(
            &mut block,
            &format!(
                "[[modbus.slave]]\nunit = {unit}\nperiod = \"10s\"\n[[modbus.slave.register]]\ndevice = \"{id}\"\n\
                 table = \"holding\"\naddress = 0\ntype = \"u16\""
            ),
        );
        device(&mut block, &id, "count", "1");
    }
    for row in block.lines() {
        line(text, &format!("# {row}"));
    }
}

fn device(text: &mut String, id: &str, device_type: &str, unit: &str) {
    line(
        text,
        &format!(
            "[[device]]\nid = \"{id}\"\ntype = \"{device_type}\"\nasset = \"machine-1\"\nunit = \"{unit}\""
        ),
    );
}

fn heading(text: &mut String, what: &str) {
    line(text, &format!("\n# --- {what} {}", "-".repeat(100usize.saturating_sub(what.len()))));
}

fn line(text: &mut String, line: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{line}");
}

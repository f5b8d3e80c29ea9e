//! From `[[modbus]]` as typed to a bus with its requests; profiles of device types.

use std::{path::Path, time::Duration};

use common::{config::Mistakes, units::Unit};
use tokio_serial::{Parity, StopBits};

use super::{
    Source,
    check::{Binding, at_least, check_period},
    file::{ModbusBus, ModbusProfile, ModbusRegister, ModbusSlave, Span},
};
use crate::source::modbus::{
    Address, Settings,
    plan::{self, Limits, Register, Request, Table},
    value::{Encoding, Form},
};

/// Profiles that are compiled in, by name.
const PROFILES: [(&str, &str); 2] = [
    ("eastron-sdm120", include_str!("../../profiles/eastron-sdm120.toml")),
    ("eastron-sdm630", include_str!("../../profiles/eastron-sdm630.toml")),
];

/// For an answer, besides its time on the wire.
const TIMEOUT: Duration = Duration::from_secs(1);
/// What serial devices have to speak (Modbus over serial line V1.02, 2.1 and 2.5.1).
const BAUD: u32 = 19_200;

pub(super) fn check(bus: ModbusBus, bind: &mut Binding<'_>, m: &mut Mistakes) -> Option<Source> {
    let key = format!("modbus {:?}", bus.url);
    let address = check_address(&key, &bus, m);
    let timeout = bus.timeout.map_or(TIMEOUT, |span| span.0);
    let timeout = at_least(&format!("{key} timeout"), timeout, Duration::from_millis(20), m);
    let serial = matches!(address, Some(Address::Rtu { .. }));
    let mut requests = Vec::new();
    for (i, slave) in bus.slave.iter().enumerate() {
        let key = format!("{key} unit {}", slave.unit);
        let twice = bus.slave[..i].iter().any(|other| other.unit == slave.unit);
        m.require(!twice, &key, "the unit stands twice", "put all registers of a slave under one table");
        let known = !serial || (1..=247).contains(&slave.unit);
        m.require(known, &key, "no slave on a line has this unit", "write 1 to 247");
        requests.extend(check_slave(&key, slave, bind, m));
    }
    m.require(!bus.slave.is_empty(), &key, "nothing is read on it", "add a [[modbus.slave]]");
    let settings = Settings { address: address?, timeout, requests };
    check_load(&key, &settings, m);
    Some(Source::Modbus(settings))
}

/// Where a command's option says that slaves are.
///
/// # Errors
/// What is wrong with it, with the fix.
pub(crate) fn address(option: &str, bus: &ModbusBus) -> Result<Address, Mistakes> {
    let mut m = Mistakes::of("the command line");
    let address = check_address(option, bus, &mut m);
    match (address, m.list.is_empty()) {
        (Some(address), true) => Ok(address),
        _ => Err(m),
    }
}

fn check_address(key: &str, bus: &ModbusBus, m: &mut Mistakes) -> Option<Address> {
    if let Some(path) = bus.url.strip_prefix("rtu://") {
        let absolute = Path::new(path).is_absolute();
        m.require(absolute, key, format!("{path:?} is no path of a port"), "write it as rtu:///dev/ttyUSB0");
        let baud = bus.baud.unwrap_or(BAUD);
        let sane = (300..=4_000_000).contains(&baud);
        m.require(sane, key, format!("baud = {baud} is no speed"), "write 300 to 4000000, such as 19200");
        let parity = match bus.parity.as_deref() {
            None | Some("even") => Parity::Even,
            Some("odd") => Parity::Odd,
            Some("none") => Parity::None,
            Some(other) => {
                m.add(key, format!("parity {other:?} is unknown"), "write even, odd or none");
                Parity::Even
            }
        };
        let stop_bits = match bus.stop_bits {
            None | Some(1) => StopBits::One,
            Some(2) => StopBits::Two,
            Some(other) => {
                m.add(key, format!("stop_bits = {other} is unknown"), "write 1 or 2");
                StopBits::One
            }
        };
        return Some(Address::Rtu { path: path.to_owned(), baud: baud.max(300), parity, stop_bits });
    }
    let is_line = bus.baud.is_some() || bus.parity.is_some() || bus.stop_bits.is_some();
    m.require(!is_line, key, "baud, parity and stop_bits are a serial line's", "leave them out");
    let address = bus.url.strip_prefix("tcp://").and_then(|rest| {
        let (host, port) = rest.rsplit_once(':')?;
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        (!host.is_empty()).then_some(Address::Tcp { host: host.to_owned(), port: port.parse().ok()? })
    });
    if address.is_none() {
        m.add(key, "url is no address", "write tcp://HOST:502 or rtu:///dev/ttyUSB0");
    }
    address
}

fn check_slave(key: &str, slave: &ModbusSlave, bind: &mut Binding<'_>, m: &mut Mistakes) -> Vec<Request> {
    let profile = slave.profile.as_deref().and_then(|name| load_profile(key, name, m));
    let mut registers = Vec::new();
    for (name, device) in &slave.devices {
        let key = format!("{key} devices.{name}");
        let Some(profile) = &profile else {
            if slave.profile.is_none() {
                m.add(
                    &key,
                    "there is no profile to find it in",
                    "name a profile, or use [[modbus.slave.register]]",
                );
            }
            continue;
        };
        match profile.register.iter().find(|register| register.name == *name) {
            Some(register) => registers.extend(check_register(&key, register, device, slave.period, bind, m)),
            None => {
                let known: Vec<&str> = profile.register.iter().map(|r| r.name.as_str()).collect();
                m.add(&key, "the profile has no such register", format!("it has {}", known.join(", ")));
            }
        }
    }
    for register in &slave.register {
        let key = format!("{key} register {} {}", register.table, register.address);
        registers.extend(check_register(&key, register, &register.name, slave.period, bind, m));
    }
    let feeds = !slave.devices.is_empty() || !slave.register.is_empty();
    m.require(feeds, key, "it feeds no device", "fill in devices, or add a [[modbus.slave.register]]");
    let of_profile = |limit: fn(&ModbusProfile) -> Option<u16>| profile.as_ref().and_then(limit);
    let max_registers =
        slave.max_registers.or(of_profile(|p| p.max_registers)).unwrap_or(plan::MAX_REGISTERS);
    let max_gap = slave.max_gap.or(of_profile(|p| p.max_gap)).unwrap_or(0);
    let sane = (4..=plan::MAX_REGISTERS).contains(&max_registers);
    m.require(sane, key, format!("max_registers = {max_registers}"), "write 4 to 125");
    plan::plan(
        slave.unit,
        Limits { max_registers: max_registers.clamp(4, plan::MAX_REGISTERS), max_gap },
        registers,
    )
}

fn load_profile(key: &str, name: &str, m: &mut Mistakes) -> Option<ModbusProfile> {
    let key = format!("{key} profile {name:?}");
    let text = match PROFILES.iter().find(|(shipped, _)| *shipped == name) {
        Some((_, text)) => (*text).to_owned(),
        None if name.ends_with(".toml") => match std::fs::read_to_string(name) {
            Ok(text) => text,
            Err(error) => {
                m.add(key, format!("it cannot be read: {error}"), "write the path of a TOML file");
                return None;
            }
        },
        None => {
            let shipped = PROFILES.map(|(name, _)| name).join(", ");
            m.add(key, "there is none of this name", format!("write {shipped} or the path of a .toml file"));
            return None;
        }
    };
    match toml::from_str(&text) {
        Ok(profile) => Some(profile),
        Err(error) => {
            m.add(key, error.to_string().trim_end().replace('\n', " "), "see modbus in default.toml");
            None
        }
    }
}

/// Notes everything that is wrong with a register, so that none hides another.
fn check_register(
    key: &str,
    register: &ModbusRegister,
    device: &str,
    period: Option<Span>,
    bind: &mut Binding<'_>,
    m: &mut Mistakes,
) -> Option<Register> {
    let table = Table::parse(&register.table);
    let problem = format!("table {:?} is unknown", register.table);
    m.require(table.is_some(), key, problem, "write holding, input, coil or discrete");
    let form = check_form(key, register, table, m);
    let little = |name: &str, order: &Option<String>, m: &mut Mistakes| match order.as_deref() {
        None | Some("big") => false,
        Some("little") => true,
        Some(other) => {
            m.add(key, format!("{name} {other:?} is unknown"), "write big or little");
            false
        }
    };
    let little_words = little("word_order", &register.word_order, m);
    let little_bytes = little("byte_order", &register.byte_order, m);
    let scales = register.scale.is_finite() && register.scale != 0.0 && register.offset.is_finite();
    m.require(scales, key, "scale and offset give no value", "write a scale other than 0");
    let period = register.period.or(period);
    m.require(period.is_some(), key, "it has no period", "write one here or in the slave, such as \"5s\"");
    let period = check_period(key, period.map_or(TIMEOUT, |span| span.0), m);
    let unit_known = register.unit.as_deref().is_none_or(|unit| Unit::parse(unit).is_some());
    let problem = format!("unknown unit {:?}", register.unit.as_deref().unwrap_or_default());
    m.require(unit_known, key, problem, "write a UCUM code such as V, A, W, kW.h, Hz, Cel, or 1");
    let target = match &register.unit {
        Some(unit) if unit_known => bind.convert(key, Some(&device.to_owned()), unit, m),
        _ => bind.device(key, device, m).map(|device| (device, 1.0, 0.0)),
    };
    let form = form?;
    let mut no_value = Vec::new();
    for code in &register.no_value {
        let pattern = form.pattern(*code);
        m.require(
            pattern.is_some(),
            key,
            format!("no_value {code} does not fit"),
            "write what the device sends",
        );
        no_value.extend(pattern);
    }
    let (device, scale, shift) = target?;
    let encoding = Encoding {
        form,
        little_words,
        little_bytes,
        no_value,
        scale: register.scale * scale,
        offset: register.offset * scale + shift,
    };
    Some(Register { table: table?, address: register.address, period, encoding, device })
}

fn check_form(key: &str, register: &ModbusRegister, table: Option<Table>, m: &mut Mistakes) -> Option<Form> {
    let form = match (register.form.as_deref(), register.bit) {
        (None, None) if table.is_some_and(Table::is_bits) => Some(Form::Bit(0)),
        (None, Some(bit @ 0..=15)) => Some(Form::Bit(bit)),
        (Some(name), None) => Form::parse(name),
        _ => None,
    };
    let bits = table.is_some_and(Table::is_bits);
    if bits && form != Some(Form::Bit(0)) {
        m.add(key, "a coil or discrete input is one bit", "leave type and bit out");
        return None;
    }
    let problem = match (register.form.as_deref(), register.bit) {
        (Some(_), Some(_)) => "it has a type and a bit".to_owned(),
        (None, Some(bit)) => format!("bit = {bit} is in no register"),
        (name, None) => format!("type {:?} is unknown", name.unwrap_or_default()),
    };
    m.require(
        form.is_some(),
        key,
        problem,
        "write type = u16, i16, u32, i32, u64, i64, f32 or f64, or bit = 0 to 15",
    );
    let form = form?;
    let ends = u32::from(register.address) + u32::from(form.words()) <= 65_536;
    m.require(ends, key, "it ends beyond register 65535", "write the address as on the wire, from 0");
    ends.then_some(form)
}

/// A serial line must be able to carry what it is asked for.
fn check_load(key: &str, bus: &Settings, m: &mut Mistakes) {
    let load: f64 = bus
        .requests
        .iter()
        .map(|r| bus.address.wire_time(r.table, r.count).as_secs_f64() / r.period.as_secs_f64())
        .sum();
    let problem = format!("the line would be busy for {:.0} % of the time", load * 100.0);
    m.require(load <= 1.0, key, problem, "read less often, or at a higher baud");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Settings as All, tests::load};

    const BASE: &str = r#"
site = "plant"
gateway = "gw-1"
data_dir = "/var/lib/tailrace/edge"
[[asset]]
id = "main"
[[device]]
id = "main/power"
type = "power"
asset = "main"
unit = "kW"
[[device]]
id = "main/energy"
type = "energy"
asset = "main"
unit = "kW.h"
kind = "counter"
[[device]]
id = "main/temperature"
type = "temperature"
asset = "main"
unit = "[degF]"
[[device]]
id = "main/door"
type = "state"
asset = "main"
unit = "1"
kind = "state"
[[modbus]]
url = "rtu:///dev/ttyUSB0"
baud = 9600
parity = "none"
timeout = "300ms"
[[modbus.slave]]
unit = 1
period = "10s"
profile = "eastron-sdm630"
devices = { power = "main/power", energy-import = "main/energy" }
[[modbus.slave]]
unit = 2
[[modbus.slave.register]]
device = "main/temperature"
table = "input"
address = 0
type = "i16"
scale = 0.1
offset = -40.0
unit = "Cel"
no_value = [0x8000]
period = "1s"
[[modbus.slave.register]]
device = "main/door"
table = "discrete"
address = 7
period = "1s"
"#;

    fn bus(settings: &All) -> &Settings {
        let [Source::Modbus(bus)] = &settings.sources[..] else { panic!("{:?}", settings.sources) };
        bus
    }

    #[test]
    fn a_bus_becomes_requests_in_the_devices_units() {
        let settings = load(BASE, &[]).unwrap();
        let bus = bus(&settings);
        assert_eq!(settings.sources[0].name(), "rtu:///dev/ttyUSB0");
        let Address::Rtu { path, baud, parity, stop_bits } = &bus.address else { panic!("{bus:?}") };
        assert_eq!((path.as_str(), *baud), ("/dev/ttyUSB0", 9_600));
        assert_eq!((*parity, *stop_bits), (Parity::None, StopBits::One));
        assert_eq!(bus.timeout, Duration::from_millis(300));
        let requests: Vec<_> =
            bus.requests.iter().map(|r| (r.unit, r.table, r.start, r.count, r.period.as_secs())).collect();
        // Power and energy lie 18 registers apart, more than the profile's gap.
        assert_eq!(
            requests,
            [
                (1, Table::Input, 52, 2, 10),
                (1, Table::Input, 72, 2, 10),
                (2, Table::Discrete, 7, 1, 1),
                (2, Table::Input, 0, 1, 1)
            ]
        );
        let value = |request: usize, words: &[u16]| bus.requests[request].values(words).next().unwrap().1;
        // 1500 W are 1.5 kW; 653 tenths, less 40 °C, are 77.54 °F.
        assert_eq!(value(0, &[0x44BB, 0x8000]), Some(1.5));
        assert!((value(3, &[653]).unwrap() - 77.54).abs() < 1e-9);
        assert_eq!(value(3, &[0x8000]), None);
        assert_eq!(value(2, &[1]), Some(1.0));
    }

    #[test]
    fn addresses() {
        let line = "url = \"rtu:///dev/ttyUSB0\"\nbaud = 9600\nparity = \"none\"\n";
        for (url, name) in [
            ("tcp://10.0.0.7:502", "tcp://10.0.0.7:502"),
            ("tcp://plc.example:1502", "tcp://plc.example:1502"),
            ("tcp://[fd00::7]:502", "tcp://[fd00::7]:502"),
        ] {
            let settings = load(&BASE.replacen(line, &format!("url = {url:?}\n"), 1), &[]).unwrap();
            assert_eq!(settings.sources[0].name(), name);
        }
    }

    #[test]
    fn shipped_profiles_hold() {
        for (name, text) in PROFILES {
            let profile: ModbusProfile = toml::from_str(text).unwrap();
            let mut m = Mistakes::default();
            for (i, register) in profile.register.iter().enumerate() {
                let key = format!("{name} {}", register.name);
                assert!(
                    profile.register[..i].iter().all(|other| other.name != register.name),
                    "{key} stands twice"
                );
                let table = Table::parse(&register.table);
                assert!(table.is_some() && check_form(&key, register, table, &mut m).is_some(), "{key}");
                assert!(register.unit.as_deref().is_some_and(|unit| Unit::parse(unit).is_some()), "{key}");
            }
            assert_eq!(m.list, []);
            // All of it in a few requests, none of which the meter refuses.
            let devices = profile.register.iter().map(|r| format!("{} = \"{}\"", r.name, r.name));
            let mut text = BASE[..BASE.find("[[device]]").unwrap()].to_owned();
            for register in &profile.register {
                let unit = register.unit.as_deref().unwrap();
                text += &format!(
                    "[[device]]\nid = {:?}\ntype = \"own\"\nasset = \"main\"\nunit = {unit:?}\n",
                    register.name
                );
            }
            text += &format!(
                "[[modbus]]\nurl = \"tcp://meter:502\"\n[[modbus.slave]]\nunit = 1\nperiod = \"1s\"\nprofile = {name:?}\ndevices = {{ {} }}\n",
                devices.collect::<Vec<_>>().join(", ")
            );
            let settings = load(&text, &[]).unwrap();
            let requests = &bus(&settings).requests;
            assert!(requests.len() <= 4, "{name}: {}", requests.len());
            for request in requests {
                assert!(request.start % 2 == 0 && request.count % 2 == 0, "{name} {}", request.start);
                assert!(request.count <= profile.max_registers.unwrap(), "{name} {}", request.start);
            }
        }
    }

    #[test]
    fn a_profile_may_be_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("own.toml");
        let own = "[[register]]\nname = \"power\"\ntable = \"holding\"\naddress = 3\ntype = \"u16\"\nunit = \"W\"\n";
        std::fs::write(&path, format!("{own}[[register]]\nname = \"energy-import\"\ntable = \"holding\"\naddress = 4\ntype = \"u32\"\nword_order = \"little\"\nunit = \"kW.h\"\n")).unwrap();
        let text = BASE.replacen("eastron-sdm630", path.to_str().unwrap(), 1);
        let settings = load(&text, &[]).unwrap();
        let request = &bus(&settings).requests[0];
        assert_eq!((request.start, request.count), (3, 3));
        let values: Vec<_> = request.values(&[250, 1, 2]).map(|(_, value)| value.unwrap()).collect();
        assert_eq!(values, [0.25, 131_073.0]);

        std::fs::write(&path, own.replacen("table", "tabel", 1)).unwrap();
        let report = load(&text, &[]).unwrap_err().to_string();
        assert!(report.contains("own.toml\"") && report.contains("tabel"), "{report}");
        std::fs::remove_file(&path).unwrap();
        let report = load(&text, &[]).unwrap_err().to_string();
        assert!(report.contains("it cannot be read"), "{report}");
    }

    #[test]
    fn every_mistake_is_reported_at_once_with_its_fix() {
        let changes = [
            ("baud = 9600", "baud = 96", "baud = 96 is no speed; write 300 to 4000000"),
            (
                "parity = \"none\"",
                "parity = \"no\"\nstop_bits = 3",
                "parity \"no\" is unknown; write even, odd or none",
            ),
            ("timeout = \"300ms\"", "timeout = \"3ms\"", "timeout: 3ms is below 20ms; raise it"),
            (
                "unit = 1\n",
                "unit = 2\nmax_registers = 2\n",
                "unit 2: the unit stands twice; put all registers",
            ),
            (
                "power = \"main/power\"",
                "powr = \"main/power\"",
                "devices.powr: the profile has no such register; it has voltage-l1, ",
            ),
            (
                "energy-import = \"main/energy\"",
                "voltage-l1 = \"main/energy\"",
                "it shows \"V\", device \"main/energy\" has \"kW.h\"",
            ),
            (
                "device = \"main/temperature\"",
                "device = \"main/temp\"",
                "no device \"main/temp\"; add a [[device]]",
            ),
            (
                "table = \"input\"",
                "table = \"inputs\"",
                "table \"inputs\" is unknown; write holding, input, coil or discrete",
            ),
            (
                "type = \"i16\"",
                "type = \"int16\"\nword_order = \"up\"",
                "type \"int16\" is unknown; write type = u16",
            ),
            ("scale = 0.1", "scale = 0.0", "scale and offset give no value; write a scale other than 0"),
            ("unit = \"Cel\"", "unit = \"degC\"", "unknown unit \"degC\"; write a UCUM code"),
            (
                "address = 7\nperiod = \"1s\"",
                "address = 7\ntype = \"u16\"",
                "a coil or discrete input is one bit; leave type and bit out",
            ),
        ];
        let mut text = BASE.to_owned();
        for (from, to, _) in changes {
            assert!(text.contains(from), "{from}");
            text = text.replacen(from, to, 1);
        }
        let report = load(&text, &[]).unwrap_err().to_string();
        let others = [
            "stop_bits = 3 is unknown; write 1 or 2",
            "max_registers = 2; write 4 to 125",
            "word_order \"up\" is unknown; write big or little",
            "register discrete 7: it has no period; write one here or in the slave",
        ];
        for expected in changes.iter().map(|(_, _, expected)| *expected).chain(others) {
            assert!(report.contains(expected), "{expected:?} not in {report}");
        }
    }

    #[test]
    fn one_mistake_at_a_time() {
        let check = |from: &str, to: &str, expected: &str| {
            assert!(BASE.contains(from), "{from}");
            let report = load(&BASE.replacen(from, to, 1), &[]).unwrap_err().to_string();
            assert!(report.contains(expected), "{expected:?} not in {report}");
        };
        check(
            "rtu:///dev/ttyUSB0",
            "rtu://ttyUSB0",
            "\"ttyUSB0\" is no path of a port; write it as rtu:///dev/ttyUSB0",
        );
        check(
            "rtu:///dev/ttyUSB0",
            "tcp://plc:502",
            "baud, parity and stop_bits are a serial line's; leave them out",
        );
        check(
            "rtu:///dev/ttyUSB0",
            "plc:502",
            "url is no address; write tcp://HOST:502 or rtu:///dev/ttyUSB0",
        );
        check("unit = 2", "unit = 248", "no slave on a line has this unit; write 1 to 247");
        check(
            "\"eastron-sdm630\"",
            "\"sdm630\"",
            "there is none of this name; write eastron-sdm120, eastron-sdm630 or",
        );
        check("profile = \"eastron-sdm630\"\n", "", "there is no profile to find it in; name a profile");
        check("power = \"main/power\"", "power = \"main/door\"", "device \"main/door\" is already read by");
        check(
            "no_value = [0x8000]",
            "no_value = [65536]",
            "no_value 65536 does not fit; write what the device sends",
        );
        check("type = \"i16\"", "bit = 16", "bit = 16 is in no register; write type = u16");
        check("type = \"i16\"", "type = \"i16\"\nbit = 1", "it has a type and a bit");
        check(
            "address = 0\ntype = \"i16\"",
            "address = 65535\ntype = \"f32\"",
            "it ends beyond register 65535",
        );
        // 15 bytes of 11 bits and 3.5 characters of silence last 21 ms.
        check("period = \"1s\"\n[[", "period = \"20ms\"\n[[", "the line would be busy for 1");
        check("type = \"i16\"", "typ = \"i16\"", "typ");
    }
}

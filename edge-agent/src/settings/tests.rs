use super::*;

const BASE: &str = r#"
site = "plant"
gateway = "gw-1"
data_dir = "/var/lib/tailrace/edge"
[[asset]]
id = "pump"
[[device]]
id = "pump/pressure"
type = "pressure"
asset = "pump"
unit = "bar"
range = [0.0, 16.0]
stuck_after = "10min"
deadband = 0.1
heartbeat = "5min"
[[device]]
id = "pump/temperature"
type = "temperature"
asset = "pump"
unit = "[degF]"
[[device]]
id = "pump/vibration"
type = "vibration"
asset = "pump"
unit = "m/s2"
[[i2c]]
path = "/dev/i2c-1"
[[i2c.ads1115]]
address = 0x48
period = "5s"
burden_ohm = 150.0
[[i2c.ads1115.loop]]
channel = 0
device = "pump/pressure"
low = 0.0
high = 16.0
period = "6min"
[[i2c.sht4x]]
address = 0x44
period = "30s"
temperature = "pump/temperature"
[[spi]]
path = "/dev/spidev0.0"
[spi.ism330dhcx]
period = "60s"
samples = 4096
rate_hz = 3333
range_g = 16
axis = "x"
rms = "pump/vibration"
"#;

/// A configuration file with this text, and this environment.
pub(crate) fn load(text: &str, env: &[(&str, &str)]) -> Result<Settings, Mistakes> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge-agent.toml");
    std::fs::write(&path, text).unwrap();
    let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Settings::read(&Layers { defaults: DEFAULTS, file: Some(&path), env_prefix: "TAILRACE_EDGE" }, env)
}

#[test]
fn a_configuration_becomes_indices_and_drivers() {
    let settings = load(BASE, &[("TAILRACE_EDGE__OUTBOX__LINGER", "2s")]).unwrap();
    assert_eq!(settings.outbox.linger, Duration::from_secs(2));
    assert_eq!(settings.outbox.dir, Path::new("/var/lib/tailrace/edge/outbox"));
    assert_eq!(settings.sha256.len(), 64);
    assert_eq!(
        (settings.mqtt.host.as_str(), settings.mqtt.port, settings.mqtt.tls),
        ("127.0.0.1", 1883, false)
    );
    let [pressure, temperature, _] = settings.checks[..] else { panic!("{:?}", settings.checks) };
    assert_eq!((pressure.range, pressure.stuck_after), (Some([0.0, 16.0]), Some(Duration::from_secs(600))));
    assert_eq!(pressure.deadband, Some(Deadband { width: 0.1, heartbeat: Duration::from_secs(300) }));
    assert_eq!(temperature, Checks::default());
    let [Source::I2c { probes, .. }, Source::Spi { outputs, .. }] = &settings.sources[..] else {
        panic!("{:?}", settings.sources)
    };
    assert_eq!(probes.iter().map(|p| p.period.as_secs()).collect::<Vec<_>>(), [360, 30]);
    let I2cChip::Climate { temperature: Some((device, scale, shift)), humidity: None, .. } = probes[1].chip
    else {
        panic!("{probes:?}")
    };
    assert_eq!(device, DeviceIx(1));
    assert!((scale - 1.8).abs() < 1e-12 && (shift - 32.0).abs() < 1e-9, "{scale} {shift}");
    let rms = BurstOutput { feature: Feature::Rms, device: DeviceIx(2), scale: 1.0 };
    assert_eq!(outputs[..], [rms]);
}

#[test]
fn every_mistake_is_reported_at_once_with_its_fix() {
    let changes = [
        ("gateway = \"gw-1\"", "gateway = \"gw 1\"", "gateway: \"gw 1\" is no name; write"),
        (
            "unit = \"bar\"",
            "unit = \"bars\"",
            "device \"pump/pressure\": unknown unit \"bars\"; write a UCUM",
        ),
        ("heartbeat = \"5min\"", "", "deadband and heartbeat need each other"),
        (
            "type = \"temperature\"",
            "type = \"flow\"",
            "\"[degF]\" does not measure flow; write one that converts to",
        ),
        (
            "asset = \"pump\"\nunit = \"m/s2\"",
            "asset = \"pmp\"\nunit = \"m/s2\"",
            "no asset \"pmp\"; add an [[asset]]",
        ),
        ("address = 0x48", "address = 0x50", "the chip has no such address; write 0x48 to 0x4b"),
        ("burden_ohm = 150.0", "burden_ohm = 250.0", "burden_ohm = 250 does not suit a range of 4.096 V"),
        ("channel = 0", "channel = 4", "the chip has no such channel; write 0 to 3"),
        ("high = 16.0", "high = 0.0", "low and high span nothing"),
        (
            "temperature = \"pump/temperature\"",
            "temperature = \"pump/temp\"",
            "no device \"pump/temp\"; add a [[device]]",
        ),
        ("rate_hz = 3333", "rate_hz = 1000", "rate_hz = 1000 is none of the chip's"),
        ("axis = \"x\"", "axis = \"up\"", "axis \"up\" is unknown; write x, y or z"),
    ];
    let mut text = BASE.to_owned();
    for (from, to, _) in changes {
        assert!(text.contains(from), "{from}");
        text = text.replacen(from, to, 1);
    }
    text.push_str(
        "[mqtt]\nurl = \"mqtt://broker.example:1883\"\npassword = \"env:P\"\nkeep_alive = \"2s\"\n",
    );
    text.push_str("[metrics]\nlisten = \"0.0.0.0:9464\"\n");
    let report = load(&text, &[]).unwrap_err().to_string();
    let others = [
        "mqtt.password: it would travel in plain text to broker.example; use mqtts://",
        "mqtt.keep_alive: 2s is below 5s; raise it",
        "metrics.listen: 0.0.0.0:9464 is beyond loopback",
    ];
    for expected in changes.iter().map(|(_, _, expected)| *expected).chain(others) {
        assert!(report.contains(expected), "{expected:?} not in {report}");
    }
}

#[test]
fn a_recorded_file_is_its_agents_only_source() {
    let replay = "[[replay]]\nfile = \"/rows.csv\"\n";
    // For `calibrate` and `try` it says how a recording is read.
    let beside = load(&format!("{BASE}\n{replay}"), &[]).unwrap();
    let refused = beside.check_run().unwrap_err().to_string();
    assert!(refused.contains("a recorded file beside other sources"), "{refused}");
    assert!(refused.contains("Give each file an agent of its own"), "{refused}");
    let alone = "site = \"s\"\ngateway = \"g\"\ndata_dir = \"/d\"\n[[asset]]\nid = \"p\"\n[[device]]\nid = \"a\"\n\
                 type = \"flow\"\nasset = \"p\"\nunit = \"L/min\"\n";
    load(&format!("{alone}{replay}"), &[]).unwrap().check_run().unwrap();
    let other = replay.replace("rows", "others");
    load(&format!("{alone}{replay}{other}"), &[]).unwrap().check_run().unwrap_err();
}

#[test]
fn a_device_has_one_source_and_one_name() {
    let check = |from: &str, to: &str, expected: &str| {
        let report = load(&BASE.replacen(from, to, 1), &[]).unwrap_err().to_string();
        assert!(report.contains(expected), "{expected:?} not in {report}");
    };
    check("temperature = \"pump/temperature\"", "temperature = \"pump/vibration\"", "it shows \"Cel\"");
    check(
        "device = \"pump/pressure\"",
        "device = \"pump/vibration\"",
        "is already read by i2c \"/dev/i2c-1\"",
    );
    check("id = \"pump/vibration\"", "id = \"pump/pressure\"", "the id stands twice");
    check("address = 0x44", "address = 0x48", "the address stands twice");
    check("stuck_after", "stuck_afer", "unknown field `stuck_afer`");
    check("[[asset]]\n", "[[asset]]\nclas = \"pump\"\n", "unknown field `clas`");
    check("[[i2c]]", "[[i2cc]]", "i2cc: unknown key; did you mean i2c?");
}

/// [`BASE`] with every feature of a burst.
fn vibrating() -> String {
    let machine = "rated_speed_rpm = 590.0\nsupport = \"flexible\"\nmachine_group = 2\n";
    let chip = "velocity = \"pump/velocity\"\nzone = \"pump/zone\"\ncrest_factor = \"pump/crest\"\n\
                kurtosis = \"pump/kurtosis\"\npeak = \"pump/peak\"\n\
                [[spi.ism330dhcx.band]]\nlow_hz = 500.0\nhigh_hz = 1600.0\ndevice = \"pump/band\"\n";
    let state = "kind = \"state\"\nlabels = { 1 = \"A\", 2 = \"B\", 3 = \"C\", 4 = \"D\" }\n";
    let devices = [
        ("velocity", "vibration_velocity", "[in_i]/s", ""),
        ("zone", "state", "1", state),
        ("crest", "crest_factor", "1", ""),
        ("kurtosis", "kurtosis", "1", ""),
        ("peak", "vibration", "[g]", ""),
        ("band", "vibration", "m/s2", ""),
    ]
    .map(|(id, kind, unit, more)| {
        format!(
            "[[device]]\nid = \"pump/{id}\"\ntype = \"{kind}\"\nasset = \"pump\"\nunit = \"{unit}\"\n{more}"
        )
    });
    BASE.replacen("id = \"pump\"\n", &format!("id = \"pump\"\n{machine}"), 1)
        .replacen("samples = 4096", "samples = 20000", 1)
        .replacen("[[i2c]]", &format!("{}[[i2c]]", devices.concat()), 1)
        + chip
}

#[test]
fn a_burst_feeds_the_devices_of_its_features() {
    let settings = load(&vibrating(), &[]).unwrap();
    let Some(Source::Spi { outputs, .. }) = settings.sources.last() else { panic!("{:?}", settings.sources) };
    let shown: Vec<_> =
        outputs.iter().map(|o| (settings.registry.device(o.device).id.as_str(), o.feature)).collect();
    // Below 600 r/min the band begins at 2 Hz.
    let expected = [
        ("pump/vibration", Feature::Rms),
        ("pump/peak", Feature::Peak),
        ("pump/crest", Feature::CrestFactor),
        ("pump/kurtosis", Feature::Kurtosis),
        ("pump/velocity", Feature::Velocity { low_hz: 2.0 }),
        ("pump/zone", Feature::Zone { low_hz: 2.0, limits: [2.3, 4.5, 7.1] }),
        ("pump/band", Feature::Band { low_hz: 500.0, high_hz: 1_600.0 }),
    ];
    assert_eq!(shown, expected);
    let scale = |ix: usize| outputs[ix].scale;
    assert!((scale(1) - 1.0 / 9.806_65).abs() < 1e-12 && (scale(4) - 1.0 / 25.4).abs() < 1e-12);
}

#[test]
fn a_burst_that_cannot_show_a_feature_is_a_mistake_with_its_fix() {
    let check = |from: &str, to: &str, expected: &str| {
        assert!(vibrating().contains(from), "{from}");
        let report = load(&vibrating().replacen(from, to, 1), &[]).unwrap_err().to_string();
        assert!(report.contains(expected), "{expected:?} not in {report}");
    };
    check(
        "rate_hz = 3333",
        "rate_hz = 833",
        "velocity: it reaches up to 1000 Hz, and at rate_hz = 833 the chip shows 417 Hz; write rate_hz = 3333 or \
         more, or leave it out",
    );
    check(
        "samples = 20000",
        "samples = 4096",
        "velocity: it needs a burst of 5.00 s, and samples = 4096 last 1.23 s; write samples = 16667 or more, or leave \
         it out",
    );
    check(
        "high_hz = 1600.0",
        "high_hz = 1700.0",
        "band: it reaches up to 1700 Hz, and at rate_hz = 3333 the chip",
    );
    check("high_hz = 1600.0", "high_hz = 4000.0", "the chip shows 1667 Hz; end it lower");
    check(
        "high_hz = 1600.0",
        "high_hz = 500.1",
        "band: it needs a burst of 40.00 s, and samples = 20000 last 6.00 s; make it wider",
    );
    check("high_hz = 1600.0", "high_hz = 500.0", "band: low_hz = 500 and high_hz = 500 span nothing");
    check("\"[in_i]/s\"", "\"mm\"", "\"mm\" does not measure vibration_velocity");
    check(
        "type = \"kurtosis\"\nasset = \"pump\"\nunit = \"1\"",
        "type = \"kurtosis\"\nasset = \"pump\"\nunit = \"mm/s\"",
        "kurtosis: it shows \"1\"",
    );
    check(
        "4 = \"D\"",
        "4 = \"E\"",
        "zone: device \"pump/zone\" cannot show a zone; give it kind = \"state\"",
    );
    check(
        "machine_group = 2\n",
        "",
        "zone: asset \"pump\" does not declare both its group and its support; write its",
    );
    check("machine_group = 2", "machine_group = 3", "machine_group is none of ISO 20816-3; write 1 (large)");
    check("\"flexible\"", "\"soft\"", "support is none of ISO 20816-1; write \"rigid\"");
    check("device = \"pump/band\"", "device = \"pump/zone\"", "device \"pump/zone\" is already read by");
}

#[test]
fn the_manual_alone_lacks_only_what_must_be_said() {
    let layers = Layers { defaults: DEFAULTS, file: None, env_prefix: "TAILRACE_EDGE" };
    let mistakes = Settings::read(&layers, []).unwrap_err();
    let keys: Vec<_> = mistakes.list.iter().map(|m| m.key.as_str()).collect();
    assert_eq!(keys, ["site", "gateway", "data_dir"]);
}

/// A broker in the plant that feeds the device without a source.
const BROKER: &str = r#"
[[device]]
id = "pump/speed"
type = "speed"
asset = "pump"
unit = "Hz"
[[mqtt_source]]
url = "mqtt://127.0.0.1:1884"
[[mqtt_source.topic]]
filter = "shop/+/state"
value = "/rpm"
level = 2
devices = { "p-7" = "pump/speed" }
time = "/ts"
unit = "/min"
scale = 10.0
offset = -60.0
"#;

#[test]
fn a_broker_in_the_plant_becomes_topics() {
    let settings = load(&format!("{BASE}{BROKER}"), &[]).unwrap();
    let Some(Source::Mqtt { broker, client_id, topics, .. }) = settings.sources.last() else {
        panic!("{:?}", settings.sources)
    };
    assert_eq!((broker.port, broker.max_backoff), (1884, Duration::from_secs(30)));
    assert!(client_id.starts_with("plant.gw-1.source-0-"), "{client_id}");
    let [topic] = &topics[..] else { panic!("{topics:?}") };
    assert_eq!((topic.filter.as_str(), topic.max_age), ("shop/+/state", Duration::from_secs(30 * 86_400)));
    let Whose::Named { at: NameAt::Level(1), names } = &topic.whose else { panic!("{topic:?}") };
    // 156 is sent, that is 1500 /min, that is 25 Hz.
    let Target { device, scale, shift } = names["p-7"];
    assert_eq!(device, DeviceIx(3));
    assert!((156.0 * scale + shift - 25.0).abs() < 1e-9, "{scale} {shift}");
}

#[test]
fn mistakes_about_a_broker_in_the_plant() {
    let check = |from: &str, to: &str, expected: &str| {
        assert!(BROKER.contains(from), "{from}");
        let report = load(&format!("{BASE}{}", BROKER.replacen(from, to, 1)), &[]).unwrap_err().to_string();
        assert!(report.contains(expected), "{expected:?} not in {report}");
    };
    let second = |filter: &str| {
        let topic = "\n[[mqtt_source.topic]]\nvalue = \"/t\"\nunit = \"Cel\"\ndevice = \"pump/other\"\n";
        let device =
            "\n[[device]]\nid = \"pump/other\"\ntype = \"temperature\"\nasset = \"pump\"\nunit = \"K\"\n";
        format!("offset = -60.0\n{topic}filter = \"{filter}\"\n{device}")
    };
    check("127.0.0.1:1884", "broker", "\"mqtt://broker\" is no broker's address; write mqtt://HOST:PORT");
    check(
        "127.0.0.1:1884\"",
        "b.example:1\"\npassword = \"env:P\"",
        "would travel in plain text to b.example",
    );
    check("mqtt://127.0.0.1:1884", "mqtts://127.0.0.1:8884", "1:8884\" ca: mqtts:// needs it");
    check("shop/+/state", "shop/+x/state", "it is no topic filter; write levels");
    check("shop/+/state", "shop/#/state", "it is no topic filter; write levels");
    check("\"/rpm\"", "\"rpm\"", "value = \"rpm\" is no JSON pointer; write it as /a/b");
    check("\"/ts\"", "\"/a~2\"", "time = \"/a~2\" is no JSON pointer");
    check("level = 2", "level = 4", "it has no such level; write 1 to 3");
    check("level = 2", "level = 2\nname = \"/id\"", "it does not say whose value it is; write one of");
    check("level = 2", "device = \"pump/speed\"", "device and devices exclude each other");
    check("\"p-7\" = \"pump/speed\"", "", "devices is empty; list their names");
    check("pump/speed\" }", "pump/sped\" }", "devices \"p-7\": no device \"pump/sped\"");
    check("pump/speed\" }", "pump/vibration\" }", "is already read by spi");
    check("\"/min\"", "\"Cel\"", "it shows \"Cel\", device \"pump/speed\" has \"Hz\"");
    check("10.0", "0", "scale is of no use");
    check("offset = -60.0", "max_age = \"1s\"", "max_age: 1s is below 1min; raise it");
    check("offset = -60.0", &second("shop/x/#"), "it meets \"shop/+/state\"; a message could come twice");
}

#[test]
fn a_source_does_not_listen_to_the_agent_itself() {
    for (port, filter, echoes) in [(1883, "#", true), (1883, "tailrace/+/gw", true), (1884, "#", false)] {
        let text = BROKER.replacen("1884", &port.to_string(), 1).replacen("shop/+/state", filter, 1);
        let text = text.replacen("level = 2", "name = \"/id\"", 1);
        let loaded = load(&format!("{BASE}{text}"), &[]);
        let report = loaded.err().map(|m| m.to_string()).unwrap_or_default();
        let named = report.contains("the agent itself writes under tailrace/v1; narrow it");
        assert_eq!((named, report.is_empty()), (echoes, !echoes), "{filter} at {port}: {report}");
    }
}

#[test]
fn a_filter_by_pattern_fills_what_the_device_leaves_out() {
    let text = format!(
        "{BASE}[[filter]]\ndevices = \"pump/*\"\nstuck_after = \"1h\"\n\
         [[filter]]\ndevices = \"*/*ratu*e\"\nstuck_after = \"2h\"\nrate_limit = 3.0\n\
         spike_limit = 6.0\nwindow = \"10s\"\n"
    );
    let settings = load(&text, &[]).unwrap();
    let found: Vec<_> =
        settings.checks.iter().map(|c| (c.stuck_after.unwrap().as_secs(), c.rate_limit)).collect();
    assert_eq!(found, [(600, None), (3_600, Some(3.0)), (3_600, None)]);
    assert_eq!(settings.checks[1].spike_limit, Some(6.0));
    assert_eq!(settings.widths, [60, 10, 60].map(Duration::from_secs));
    for (table, part) in [
        ("devices = \"pump\"", "filter \"pump\": no device's id matches"),
        ("stuck_after = \"1h\"", "missing field `devices`"),
        ("devices = \"*\"\nrange = [0, 1]", "unknown field `range`"),
        ("devices = \"pump/vibration\"\ndeadband = 1.0", "deadband and heartbeat need each other"),
        ("devices = \"*\"\nspike_limit = 0.0", "spike_limit is not above 0"),
        ("devices = \"*\"\nwindow = \"500ms\"", "window 500ms is below 1s; raise it"),
    ] {
        let error = load(&format!("{BASE}[[filter]]\n{table}\n"), &[]).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

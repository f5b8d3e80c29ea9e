//! From the configuration as typed to the one that is used: every mistake is noted, none ends the checking.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use common::{
    config::{Mistakes, SecretRef},
    reading::{Asset, Device, DeviceIx, Registry},
    time::duration,
    units::{DeviceType, Unit},
    wire,
};

use super::{
    Checks, ClockSettings, Deadband, I2cChip, I2cProbe, ModelSettings, MqttSettings, OutboxSettings,
    ReplayForm, Settings, Source, UplinkSettings, WindowSettings,
    file::{self, File},
    modbus, mqtt_source,
};
use crate::source::chip::{Ads1115, Sht4x, ads1115};

mod spi;

/// NE 43's highest meaningful current with some room, which the converter's range must hold.
const MAX_LOOP_A: f64 = 0.0215;
/// The converter's range in V.
const ADC_FULL_SCALE_V: f64 = 4.096;
/// Width of the narrowest windows.
const NARROWEST: Duration = Duration::from_secs(1);
/// Windows of a device that are kept for late readings.
const MOST_WINDOWS: u32 = 1_000;

/// `folder` is the one of the configuration file.
pub(super) fn check(file: File, sha256: String, origin: String, folder: &Path) -> Result<Settings, Mistakes> {
    let mut m = Mistakes::of(origin);
    for (key, name) in [("site", &file.site), ("gateway", &file.gateway)] {
        m.require(
            wire::is_name(name),
            key,
            format!("{name:?} is no name"),
            "write 1 to 64 of A-Z a-z 0-9 - _ . , not starting with _ or .",
        );
    }
    let no_dir = file.data_dir.as_os_str().is_empty();
    m.require(!no_dir, "data_dir", "it is empty", "name a folder on a local disk");
    let assets: Vec<Asset> = file.asset.into_iter().map(|entry| entry.0).collect();
    check_assets(&assets, &file.device, &mut m);
    let window = check_window(&file.window, &mut m);
    let (checks, widths) =
        check_devices(&file.device, &file.filter, &assets, &window, &mut m).into_iter().unzip();
    let registry = Registry { assets, devices: file.device.into_iter().map(|entry| entry.device).collect() };
    let mut bind = Binding { registry: &registry, bound: BTreeMap::new() };
    let mut sources = Vec::new();
    for bus in file.i2c {
        sources.push(check_i2c(bus, &mut bind, &mut m));
    }
    for spi in file.spi {
        sources.extend(spi::check(spi, &mut bind, &mut m));
    }
    for bus in file.modbus {
        sources.extend(modbus::check(bus, &mut bind, &mut m));
    }
    let (mqtt, root) = check_mqtt(file.mqtt, &mut m);
    for (i, broker) in file.mqtt_source.into_iter().enumerate() {
        let name = format!("{}.{}.source-{i}", file.site, file.gateway);
        sources.push(mqtt_source::check(broker, name, (&mqtt, &root), &mut bind, &mut m));
    }
    for replay in file.replay {
        sources.push(check_replay(replay, &mut bind, &mut m));
    }
    check_paths(&sources, &mut m);
    let settings = Settings {
        mqtt,
        root,
        uplink: check_uplink(file.uplink, &mut m),
        outbox: check_outbox(file.outbox, file.data_dir.join("outbox"), &mut m),
        window,
        models: check_models(&file.models, folder, &mut m),
        listen: check_listen(&file.metrics.listen, &mut m),
        clock: ClockSettings { trust: file.clock.trust, wait: file.clock.wait },
        source_timeout: at_least("source.timeout", file.source.timeout, Duration::from_millis(100), &mut m),
        site: file.site,
        gateway: file.gateway,
        data_dir: file.data_dir,
        sha256,
        registry: Arc::new(registry),
        checks,
        widths,
        sources,
    };
    m.into_result(settings)
}

fn check_assets(assets: &[Asset], devices: &[file::DeviceEntry], m: &mut Mistakes) {
    for (i, asset) in assets.iter().enumerate() {
        let key = format!("asset {:?}", asset.id);
        m.require(!asset.id.is_empty(), &key, "its id is empty", "give it a name of its own");
        let twice = assets[..i].iter().any(|a| a.id == asset.id);
        m.require(!twice, &key, "the id stands twice", "give each asset a name of its own");
        let group = asset.machine_group.is_none_or(|group| [1, 2].contains(&group));
        m.require(group, &key, "machine_group is none of ISO 20816-3", "write 1 (large) or 2 (medium)");
        let support = asset.support.as_deref().is_none_or(|support| ["rigid", "flexible"].contains(&support));
        m.require(support, &key, "support is none of ISO 20816-1", "write \"rigid\" or \"flexible\"");
        if let Some(when) = &asset.running_when {
            let known = devices.iter().any(|d| d.device.id == when.device);
            let key = format!("{key} running_when");
            m.require(known, &key, format!("no device {:?}", when.device), "name a [[device]] of this file");
        }
    }
}

fn check_devices(
    entries: &[file::DeviceEntry],
    filters: &[file::FilterTable],
    assets: &[Asset],
    windows: &WindowSettings,
    m: &mut Mistakes,
) -> Vec<(Checks, Duration)> {
    for table in filters {
        let some = entries.iter().any(|entry| table.matches(&entry.device.id));
        let key = format!("filter {:?}", table.devices);
        m.require(some, &key, "no device's id matches", "write * for any text, such as \"pump-*/speed\"");
    }
    let mut all = Vec::with_capacity(entries.len());
    for (i, file::DeviceEntry { device, filter }) in entries.iter().enumerate() {
        let key = format!("device {:?}", device.id);
        // The device's own keys, then those of the tables that mean it, in their order.
        let tables = filters.iter().filter(|table| table.matches(&device.id));
        let filter = tables.fold(filter.clone(), |filter, table| filter.or(&table.filter));
        m.require(!device.id.is_empty(), &key, "its id is empty", "name it, such as \"pump-01/speed\"");
        let twice = entries[..i].iter().any(|e| e.device.id == device.id);
        m.require(!twice, &key, "the id stands twice", "give each device a name of its own");
        let known = assets.iter().any(|a| a.id == device.asset);
        m.require(known, &key, format!("no asset {:?}", device.asset), "add an [[asset]] with this id");
        check_unit(&key, device, m);
        if let Some([low, high]) = device.range {
            m.require(low < high, &key, format!("range [{low}, {high}] is empty"), "write [low, high]");
        }
        let limits = [filter.rate_limit, filter.spike_limit, filter.deadband];
        for (name, value) in ["rate_limit", "spike_limit", "deadband"].into_iter().zip(limits) {
            let positive = value.is_none_or(|v| v.is_finite() && v > 0.0);
            m.require(positive, &key, format!("{name} is not above 0"), "leave it out to switch it off");
        }
        let deadband = match (filter.deadband, filter.heartbeat) {
            (Some(width), Some(heartbeat)) => Some(Deadband { width, heartbeat: heartbeat.0 }),
            (None, None) => None,
            _ => {
                m.add(&key, "deadband and heartbeat need each other", "write both or neither");
                None
            }
        };
        let width = filter.window.map_or(windows.width, |span| span.0);
        let least = NARROWEST.max(windows.revise_for / MOST_WINDOWS);
        m.require(
            filter.window.is_none() || width >= least,
            &key,
            format!("window {} is below {}", duration::format(width), duration::format(least)),
            "raise it, or lower window.revise_for",
        );
        let checks = Checks {
            range: device.range,
            stuck_after: filter.stuck_after.map(|span| span.0),
            rate_limit: filter.rate_limit,
            spike_limit: filter.spike_limit,
            deadband,
        };
        all.push((checks, width));
    }
    all
}

fn check_unit(key: &str, device: &Device, m: &mut Mistakes) {
    let Some(unit) = Unit::parse(&device.unit) else {
        let fix = "write a UCUM code such as Cel, bar, L/min, mm/s, %, or 1";
        return m.add(key, format!("unknown unit {:?}", device.unit), fix);
    };
    if let Some(shipped) = DeviceType::parse(&device.device_type) {
        m.require(
            unit.into_unit(shipped.canonical()).is_some(),
            key,
            format!("unit {:?} does not measure {}", device.unit, shipped.name),
            &format!("write one that converts to {:?}, or another type", shipped.unit),
        );
    }
}

/// Finds the devices that sources name, and sees to it that each has one source.
pub(super) struct Binding<'a> {
    registry: &'a Registry,
    bound: BTreeMap<DeviceIx, String>,
}

impl Binding<'_> {
    pub(super) fn device(&mut self, key: &str, id: &str, m: &mut Mistakes) -> Option<DeviceIx> {
        let Some(ix) = self.registry.find(id) else {
            m.add(key, format!("no device {id:?}"), "add a [[device]] with this id");
            return None;
        };
        match self.bound.insert(ix, key.to_owned()) {
            None => Some(ix),
            Some(other) => {
                m.add(key, format!("device {id:?} is already read by {other}"), "read a device once");
                None
            }
        }
    }

    /// The device and the affine map from `unit` into its own.
    pub(super) fn convert(
        &mut self,
        key: &str,
        id: Option<&String>,
        unit: &str,
        m: &mut Mistakes,
    ) -> Option<(DeviceIx, f64, f64)> {
        let ix = self.device(key, id?, m)?;
        let device = self.registry.device(ix);
        // An unknown unit has been noted with the device.
        let own = Unit::parse(&device.unit)?;
        let Some((scale, shift)) = Unit::parse(unit).and_then(|from| from.into_unit(own)) else {
            let fix = format!("give the device a unit that converts from {unit:?}");
            m.add(key, format!("it shows {unit:?}, device {:?} has {:?}", device.id, device.unit), fix);
            return None;
        };
        Some((ix, scale, shift))
    }
}

fn check_i2c(bus: file::I2cBus, bind: &mut Binding<'_>, m: &mut Mistakes) -> Source {
    let mut probes = Vec::new();
    let mut addresses = Vec::new();
    let mut once = |key: &str, address: u8, m: &mut Mistakes| {
        m.require(
            !addresses.contains(&address),
            key,
            "the address stands twice",
            "set one chip's address pin",
        );
        addresses.push(address);
    };
    for chip in bus.ads1115 {
        let key = format!("i2c {:?} ads1115 {:#04x}", bus.path, chip.address);
        once(&key, chip.address, m);
        let adc = Ads1115::new(chip.address);
        m.require(adc.is_some(), &key, "the chip has no such address", "write 0x48 to 0x4b");
        let period = check_period(&key, chip.period, m);
        let fits = chip.burden_ohm >= 1.0 && chip.burden_ohm * MAX_LOOP_A <= ADC_FULL_SCALE_V;
        let problem =
            format!("burden_ohm = {} does not suit a range of {ADC_FULL_SCALE_V} V", chip.burden_ohm);
        m.require(fits, &key, problem, "write 1 to 190");
        let mut used = Vec::new();
        for entry in chip.loops {
            let key = format!("{key} channel {}", entry.channel);
            let channel = ads1115::Channel::new(entry.channel);
            m.require(channel.is_some(), &key, "the chip has no such channel", "write 0 to 3");
            m.require(!used.contains(&entry.channel), &key, "it stands twice", "read a channel once");
            used.push(entry.channel);
            let spans = entry.low.is_finite() && entry.high.is_finite() && entry.low != entry.high;
            m.require(spans, &key, "low and high span nothing", "write the values at 4 mA and 20 mA");
            let period = entry.period.map_or(period, |span| check_period(&key, span.0, m));
            let device = bind.device(&key, &entry.device, m);
            if let (Some(adc), Some(channel), Some(device)) = (adc.clone(), channel, device) {
                let (burden_ohm, low, high) = (chip.burden_ohm, entry.low, entry.high);
                let chip = I2cChip::Loop { adc, channel, burden_ohm, device, low, high };
                probes.push(I2cProbe { period, chip });
            }
        }
    }
    for entry in bus.sht4x {
        let key = format!("i2c {:?} sht4x {:#04x}", bus.path, entry.address);
        once(&key, entry.address, m);
        let chip = Sht4x::new(entry.address);
        m.require(chip.is_some(), &key, "the chip has no such address", "write 0x44 to 0x46");
        let some = entry.temperature.is_some() || entry.humidity.is_some();
        m.require(some, &key, "it feeds no device", "name the device of temperature or of humidity");
        let period = check_period(&key, entry.period, m);
        let temperature = bind.convert(&key, entry.temperature.as_ref(), "Cel", m);
        let humidity = bind.convert(&key, entry.humidity.as_ref(), "%", m);
        if let Some(chip) = chip {
            probes.push(I2cProbe { period, chip: I2cChip::Climate { chip, temperature, humidity } });
        }
    }
    m.require(!probes.is_empty(), &format!("i2c {:?}", bus.path), "nothing is read on it", "add a chip");
    Source::I2c { path: bus.path, probes }
}

fn check_replay(entry: file::Replay, bind: &mut Binding<'_>, m: &mut Mistakes) -> Source {
    let key = format!("replay {:?}", entry.file);
    if entry.columns.is_empty() {
        m.require(
            entry.time.is_empty(),
            &key,
            "time without columns",
            "say whose values the columns are, or leave it out",
        );
        return Source::Replay { file: entry.file, form: ReplayForm::Long };
    }
    m.require(!entry.time.is_empty(), &key, "columns without time", "name the column with the instant");
    let columns = entry.columns.into_iter().filter_map(|(column, device)| {
        let key = format!("{key} columns {column:?}");
        Some((column, bind.device(&key, &device, m)?))
    });
    let columns = columns.collect();
    Source::Replay {
        file: entry.file,
        form: ReplayForm::Wide { separator: entry.separator, time: entry.time, columns },
    }
}

fn check_paths(sources: &[Source], m: &mut Mistakes) {
    for (i, source) in sources.iter().enumerate() {
        let name = source.name();
        let twice = sources[..i].iter().any(|s| s.name() == name);
        m.require(!twice, &name, "it stands twice", "put all that is read there under one table");
    }
}

pub(super) fn check_period(key: &str, period: Duration, m: &mut Mistakes) -> Duration {
    at_least(&format!("{key} period"), period, Duration::from_millis(10), m)
}

pub(super) fn at_least(key: &str, value: Duration, least: Duration, m: &mut Mistakes) -> Duration {
    let problem = format!("{} is below {}", duration::format(value), duration::format(least));
    m.require(value >= least, key, problem, "raise it");
    value.max(least)
}

fn check_mqtt(mqtt: file::Mqtt, m: &mut Mistakes) -> (MqttSettings, String) {
    let root_ok = !mqtt.root.is_empty()
        && !mqtt.root.starts_with('/')
        && !mqtt.root.ends_with('/')
        && !mqtt.root.contains(['#', '+', '$']);
    m.require(root_ok, "mqtt.root", format!("{:?} is no root", mqtt.root), "write it as tailrace/v1");
    let address = check_broker(|field| format!("mqtt.{field}"), &mqtt.url, &mqtt.password, &mqtt.ca, m);
    let settings = MqttSettings {
        keep_alive: at_least("mqtt.keep_alive", mqtt.keep_alive, Duration::from_secs(5), m),
        backoff: at_least("mqtt.backoff", mqtt.backoff, Duration::from_millis(10), m),
        max_backoff: at_least("mqtt.max_backoff", mqtt.max_backoff, mqtt.backoff, m),
        username: mqtt.username,
        password: mqtt.password,
        ca: (!mqtt.ca.as_os_str().is_empty()).then_some(mqtt.ca),
        host: address.0,
        port: address.1,
        tls: address.2,
    };
    (settings, mqtt.root)
}

/// Host, port and whether by TLS; `key` names a field of the broker's table.
pub(super) fn check_broker(
    key: impl Fn(&str) -> String,
    url: &str,
    password: &SecretRef,
    ca: &Path,
    m: &mut Mistakes,
) -> (String, u16, bool) {
    let (tls, rest) = match (url.strip_prefix("mqtts://"), url.strip_prefix("mqtt://")) {
        (Some(rest), _) => (true, rest),
        (_, Some(rest)) => (false, rest),
        _ => (false, ""),
    };
    let parts = rest.trim_end_matches('/').rsplit_once(':');
    let address = parts.and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    let address = address.filter(|(host, _)| !host.is_empty() && !host.contains(['@', '/']));
    let problem = format!("{url:?} is no broker's address");
    m.require(address.is_some(), &key("url"), problem, "write mqtt://HOST:PORT or mqtts://HOST:PORT");
    let (host, port) = address.unwrap_or(("", 0));
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let loopback = host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
    m.require(
        tls || loopback || !password.is_set() || host.is_empty(),
        &key("password"),
        format!("it would travel in plain text to {host}"),
        "use mqtts://",
    );
    let no_ca = ca.as_os_str().is_empty();
    m.require(!tls || !no_ca, &key("ca"), "mqtts:// needs it", "name the PEM file of the broker's authority");
    (host, port, tls)
}

fn check_uplink(uplink: file::Uplink, m: &mut Mistakes) -> UplinkSettings {
    let problem = format!("{} is outside of 1 to 1000", uplink.inflight);
    m.require((1..=1000).contains(&uplink.inflight), "uplink.inflight", problem, "32 suits most brokers");
    let problem = format!("{} is below uplink.inflight = {}", uplink.unacked, uplink.inflight);
    m.require(uplink.unacked >= usize::from(uplink.inflight), "uplink.unacked", problem, "raise it");
    let problem = format!("{} is outside of 0.05 to 0.95", uplink.backlog_share);
    m.require((0.05..=0.95).contains(&uplink.backlog_share), "uplink.backlog_share", problem, "write 0.5");
    let second = Duration::from_secs(1);
    UplinkSettings {
        mode: uplink.mode,
        inflight: uplink.inflight,
        unacked: uplink.unacked,
        resend_after: at_least("uplink.resend_after", uplink.resend_after, second, m),
        max_resend_after: at_least(
            "uplink.max_resend_after",
            uplink.max_resend_after,
            uplink.resend_after,
            m,
        ),
        backlog_share: uplink.backlog_share,
        max_bytes_per_s: (uplink.max_bytes_per_s > 0).then_some(uplink.max_bytes_per_s),
        status_every: at_least("uplink.status_every", uplink.status_every, second, m),
        drain: uplink.drain,
    }
}

fn check_outbox(outbox: file::Outbox, dir: PathBuf, m: &mut Mistakes) -> OutboxSettings {
    for (key, value, least) in [
        ("outbox.max_rows", outbox.max_rows as u64, 1),
        ("outbox.max_message_bytes", outbox.max_message_bytes as u64, 16 << 10),
        ("outbox.max_bytes", outbox.max_bytes, 64 << 20),
        ("outbox.generation_bytes", outbox.generation_bytes, 1 << 20),
    ] {
        m.require(value >= least, key, format!("{value} is below {least}"), "raise it");
    }
    let (rows, most) = (outbox.max_rows, wire::MAX_ROWS);
    m.require(
        rows as u64 <= most.unsigned_abs(),
        "outbox.max_rows",
        format!("{rows} is above {most}"),
        "lower it",
    );
    OutboxSettings {
        dir,
        linger: at_least("outbox.linger", outbox.linger, Duration::from_millis(1), m),
        max_linger: at_least("outbox.max_linger", outbox.max_linger, outbox.linger, m),
        linger_rows: outbox.linger_rows,
        max_rows: outbox.max_rows,
        max_message_bytes: outbox.max_message_bytes,
        max_bytes: outbox.max_bytes,
        max_age: at_least("outbox.max_age", outbox.max_age, Duration::from_secs(3_600), m),
        min_free_disk: outbox.min_free_disk,
        generation_bytes: outbox.generation_bytes,
        census_every: at_least("outbox.census_every", outbox.census_every, Duration::from_secs(1), m),
    }
}

fn check_window(window: &file::Window, m: &mut Mistakes) -> WindowSettings {
    let width = at_least("window.width", window.width, NARROWEST, m);
    let kept = window.revise_for <= width.saturating_mul(MOST_WINDOWS);
    let problem = format!("{} is more than {MOST_WINDOWS} windows", duration::format(window.revise_for));
    m.require(kept, "window.revise_for", problem, "lower it; older readings still reach the lake");
    WindowSettings { width, lateness: window.lateness, revise_for: window.revise_for }
}

fn check_models(models: &file::Models, folder: &Path, m: &mut Mistakes) -> ModelSettings {
    ModelSettings {
        dir: (!models.dir.as_os_str().is_empty()).then(|| folder.join(&models.dir)),
        poll: (!models.poll.is_zero())
            .then(|| at_least("models.poll", models.poll, Duration::from_millis(100), m)),
        budget: at_least("models.budget", models.budget, Duration::from_millis(1), m),
        calibrate_over: (!models.calibrate_over.is_zero()).then(|| {
            let minute = Duration::from_secs(60);
            let over = at_least("models.calibrate_over", models.calibrate_over, minute, m);
            let problem = format!("{} is more than 7d", duration::format(over));
            m.require(over <= 7 * 24 * 60 * minute, "models.calibrate_over", problem, "lower it");
            over
        }),
    }
}

fn check_listen(listen: &str, m: &mut Mistakes) -> Option<SocketAddr> {
    if listen.is_empty() {
        return None;
    }
    let Ok(address) = listen.parse::<SocketAddr>() else {
        m.add("metrics.listen", format!("{listen:?} is no address"), "write it as 127.0.0.1:9464");
        return None;
    };
    let problem = format!("{address} is beyond loopback and asks for no password");
    m.require(address.ip().is_loopback(), "metrics.listen", problem, "listen on 127.0.0.1, or use a proxy");
    Some(address)
}

//! The accelerometers on SPI, and what is made of their bursts.

use common::{
    config::Mistakes,
    reading::{Asset, Kind},
};

use super::{Binding, check_period};
use crate::{
    settings::{BurstOutput, Source, file},
    source::{
        chip::ism330dhcx::{Axis, DataRate, Range, Settings},
        spi::duration,
    },
    vibration::{self, Feature, Needs, ZONES},
};

/// Samples of the longest burst: 10 s at the highest rate.
const MAX_SAMPLES: usize = 65_536;

pub(super) fn check(entry: file::SpiDevice, bind: &mut Binding<'_>, m: &mut Mistakes) -> Option<Source> {
    let key = format!("spi {:?} ism330dhcx", entry.path);
    let chip = entry.ism330dhcx;
    let rate = DataRate::ALL.into_iter().find(|rate| rate.hz().round() == f64::from(chip.rate_hz));
    let problem = format!("rate_hz = {} is none of the chip's", chip.rate_hz);
    m.require(rate.is_some(), &key, problem, "write 833, 1667, 3333 or 6667");
    let range = match chip.range_g {
        2 => Some(Range::G2),
        4 => Some(Range::G4),
        8 => Some(Range::G8),
        16 => Some(Range::G16),
        _ => None,
    };
    let problem = format!("range_g = {} is none of the chip's", chip.range_g);
    m.require(range.is_some(), &key, problem, "write 2, 4, 8 or 16");
    let axis = match chip.axis.as_str() {
        "x" => Some(Axis::X),
        "y" => Some(Axis::Y),
        "z" => Some(Axis::Z),
        _ => None,
    };
    m.require(axis.is_some(), &key, format!("axis {:?} is unknown", chip.axis), "write x, y or z");
    let sane = (16..=MAX_SAMPLES).contains(&chip.samples);
    let problem = format!("samples = {} is no burst", chip.samples);
    m.require(sane, &key, problem, &format!("write 16 to {MAX_SAMPLES}"));
    let period = check_period(&key, chip.period, m);

    let wanted: Vec<_> = features(&chip, bind).collect();
    m.require(!wanted.is_empty(), &key, "it feeds no device", "name the device of a feature, such as rms");
    if let Some(id) = &chip.zone {
        check_zone(&format!("{key} zone"), id, bind, m);
    }
    let mut outputs = Vec::new();
    for (name, id, feature) in wanted {
        let key = format!("{key} {name}");
        if let Feature::Band { low_hz, high_hz } = feature
            && !(low_hz >= 0.0 && low_hz < high_hz)
        {
            m.add(
                &key,
                format!("low_hz = {low_hz} and high_hz = {high_hz} span nothing"),
                "write its ends in Hz",
            );
        } else if let Some(rate) = rate {
            check_needs(&key, feature.needs(), rate, chip.samples, m);
        }
        let bound = bind.convert(&key, Some(id), feature.unit(), m);
        outputs.extend(bound.map(|(device, scale, _)| BurstOutput { feature, device, scale }));
    }

    let burst = Settings { rate: rate?, range: range?, axis: axis?, samples: chip.samples };
    let lasts = duration(&burst);
    let problem = format!("a burst of {:.1} s does not fit into its period", lasts.as_secs_f64());
    m.require(lasts < period, &key, problem, "take fewer samples, or take them less often");
    Some(Source::Spi { path: entry.path, period, burst, outputs })
}

/// The features that are asked for: key, device, what.
fn features<'a>(
    chip: &'a file::Ism330dhcx,
    bind: &Binding<'_>,
) -> impl Iterator<Item = (&'static str, &'a String, Feature)> {
    let machine = |id: &Option<String>| asset_of(bind, id.as_ref()?);
    let low_hz = |id| vibration::lowest_hz(machine(id).and_then(|asset| asset.rated_speed_rpm));
    // Without limits there is a mistake: see `check_zone`.
    let limits = machine(&chip.zone).and_then(limits).unwrap_or_default();
    let single = [
        ("rms", &chip.rms, Feature::Rms),
        ("peak", &chip.peak, Feature::Peak),
        ("crest_factor", &chip.crest_factor, Feature::CrestFactor),
        ("kurtosis", &chip.kurtosis, Feature::Kurtosis),
        ("velocity", &chip.velocity, Feature::Velocity { low_hz: low_hz(&chip.velocity) }),
        ("zone", &chip.zone, Feature::Zone { low_hz: low_hz(&chip.zone), limits }),
    ];
    let bands = chip.band.iter().map(|file::Band { low_hz, high_hz, device }| {
        ("band", device, Feature::Band { low_hz: *low_hz, high_hz: *high_hz })
    });
    single.into_iter().filter_map(|(name, id, feature)| Some((name, id.as_ref()?, feature))).chain(bands)
}

/// The machine of a device.
fn asset_of<'a>(bind: &Binding<'a>, id: &str) -> Option<&'a Asset> {
    let device = bind.registry.device(bind.registry.find(id)?);
    bind.registry.assets.iter().find(|asset| asset.id == device.asset)
}

fn limits(asset: &Asset) -> Option<[f64; 3]> {
    vibration::zone_limits(asset.machine_group?, asset.support.as_deref()?)
}

/// Whether the chip, so configured, shows what the feature needs.
fn check_needs(key: &str, needs: Needs, rate: DataRate, samples: usize, m: &mut Mistakes) {
    let Needs { reach_hz, duration_s } = needs;
    let enough = DataRate::ALL.into_iter().find(|rate| rate.hz() / 2.0 >= reach_hz);
    let fix = match enough {
        Some(enough) => format!("write rate_hz = {:.0} or more, or leave it out", enough.hz()),
        None => "end it lower".to_owned(),
    };
    let shows = rate.hz() / 2.0;
    let problem = format!(
        "it reaches up to {reach_hz} Hz, and at rate_hz = {:.0} the chip shows {shows:.0} Hz",
        rate.hz()
    );
    m.require(shows >= reach_hz, key, problem, &fix);
    let least = (duration_s * rate.hz()).ceil();
    let problem = format!(
        "it needs a burst of {duration_s:.2} s, and samples = {samples} last {:.2} s",
        samples as f64 / rate.hz()
    );
    let fix = if least <= MAX_SAMPLES as f64 {
        format!("write samples = {least} or more, or leave it out")
    } else {
        "make it wider".to_owned()
    };
    m.require(samples as f64 >= least, key, problem, &fix);
}

/// Whether `id` is a device that can show a zone, of a machine for which the standard has limits.
fn check_zone(key: &str, id: &str, bind: &Binding<'_>, m: &mut Mistakes) {
    // An unknown device is noted where it is bound, an unknown asset with its device.
    let (Some(ix), Some(asset)) = (bind.registry.find(id), asset_of(bind, id)) else { return };
    m.require(
        limits(asset).is_some(),
        key,
        format!("asset {:?} does not declare both its group and its support", asset.id),
        "write its machine_group (1, 2) and support (\"rigid\", \"flexible\"), or leave zone out",
    );
    let device = bind.registry.device(ix);
    let labelled =
        ZONES.iter().all(|(code, word)| device.labels.get(*code).is_some_and(|label| label == word));
    m.require(
        device.kind == Kind::State && device.unit == "1" && labelled,
        key,
        format!("device {id:?} cannot show a zone"),
        "give it kind = \"state\", unit = \"1\" and labels = { 1 = \"A\", 2 = \"B\", 3 = \"C\", 4 = \"D\" }",
    );
}

//! Units of measure: the UCUM codes that factory sensors use, and each device type's canonical unit.
//!
//! Codes follow UCUM 2.1 (<https://ucum.org/ucum>), case sensitive. A unit is a point of one
//! [`Dimension`] and an affine map into that dimension's base: `base = value * factor + offset`.
//! Absolute and relative (gauge) pressure share a dimension; which one is meant belongs to the device.

use std::{fmt, ops::RangeInclusive};

/// What a unit measures. Two units convert exactly when their dimensions are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub enum Dimension {
    Temperature,
    Pressure,
    VolumeFlow,
    MassFlow,
    Acceleration,
    Velocity,
    Length,
    Frequency,
    Current,
    Voltage,
    Power,
    Energy,
    Mass,
    Torque,
    Time,
    Ratio,
}

/// A UCUM unit that this build can convert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Unit {
    /// The UCUM code, such as `Cel` or `m/s2`.
    pub code: &'static str,
    /// What it measures.
    pub dimension: Dimension,
    factor: f64,
    offset: f64,
}

const fn unit(code: &'static str, dimension: Dimension, factor: f64) -> Unit {
    Unit { code, dimension, factor, offset: 0.0 }
}

/// Every known unit. Bases: K, Pa, m³/s, kg/s, m/s², m/s, m, Hz, A, V, W, J, kg, N·m, s, 1.
static UNITS: &[Unit] = {
    use Dimension::{
        Acceleration, Current, Energy, Frequency, Length, Mass, MassFlow, Power, Pressure, Ratio,
        Temperature, Time, Torque, Velocity, Voltage, VolumeFlow,
    };
    &[
        Unit { code: "Cel", dimension: Temperature, factor: 1.0, offset: 273.15 },
        unit("K", Temperature, 1.0),
        Unit { code: "[degF]", dimension: Temperature, factor: 5.0 / 9.0, offset: 459.67 * 5.0 / 9.0 },
        unit("bar", Pressure, 1e5),
        unit("mbar", Pressure, 1e2),
        unit("Pa", Pressure, 1.0),
        unit("hPa", Pressure, 1e2),
        unit("kPa", Pressure, 1e3),
        unit("MPa", Pressure, 1e6),
        unit("[psi]", Pressure, 6_894.757_293_168),
        unit("atm", Pressure, 101_325.0),
        unit("L/min", VolumeFlow, 1e-3 / 60.0),
        unit("L/s", VolumeFlow, 1e-3),
        unit("L/h", VolumeFlow, 1e-3 / 3600.0),
        unit("m3/h", VolumeFlow, 1.0 / 3600.0),
        unit("m3/s", VolumeFlow, 1.0),
        unit("[gal_us]/min", VolumeFlow, 3.785_411_784e-3 / 60.0),
        unit("kg/h", MassFlow, 1.0 / 3600.0),
        unit("kg/s", MassFlow, 1.0),
        unit("t/h", MassFlow, 1e3 / 3600.0),
        unit("m/s2", Acceleration, 1.0),
        unit("[g]", Acceleration, 9.806_65),
        unit("mm/s", Velocity, 1e-3),
        unit("m/s", Velocity, 1.0),
        unit("[in_i]/s", Velocity, 0.0254),
        unit("m", Length, 1.0),
        unit("cm", Length, 1e-2),
        unit("mm", Length, 1e-3),
        unit("um", Length, 1e-6),
        unit("Hz", Frequency, 1.0),
        unit("kHz", Frequency, 1e3),
        unit("/s", Frequency, 1.0),
        unit("/min", Frequency, 1.0 / 60.0),
        unit("{rpm}", Frequency, 1.0 / 60.0),
        unit("A", Current, 1.0),
        unit("mA", Current, 1e-3),
        unit("V", Voltage, 1.0),
        unit("mV", Voltage, 1e-3),
        unit("kV", Voltage, 1e3),
        unit("W", Power, 1.0),
        unit("kW", Power, 1e3),
        unit("MW", Power, 1e6),
        unit("J", Energy, 1.0),
        unit("kW.h", Energy, 3.6e6),
        unit("kg", Mass, 1.0),
        unit("g", Mass, 1e-3),
        unit("t", Mass, 1e3),
        unit("N.m", Torque, 1.0),
        unit("s", Time, 1.0),
        unit("min", Time, 60.0),
        unit("h", Time, 3600.0),
        unit("1", Ratio, 1.0),
        unit("%", Ratio, 1e-2),
    ]
};

impl Unit {
    /// The unit with this UCUM code, if it is known.
    pub fn parse(code: &str) -> Option<&'static Unit> {
        UNITS.iter().find(|u| u.code == code)
    }

    /// The affine map `(scale, shift)` from this unit into `target`: `target = value * scale + shift`.
    /// `None` when the dimensions differ. The map of a unit onto itself is exactly `(1, 0)`.
    pub fn into_unit(&self, target: &Unit) -> Option<(f64, f64)> {
        if self.code == target.code {
            return Some((1.0, 0.0));
        }
        (self.dimension == target.dimension)
            .then(|| (self.factor / target.factor, (self.offset - target.offset) / target.factor))
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code)
    }
}

/// What a device measures, as silver partitions it: its canonical unit and its plausible range in it.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceType {
    /// Lower-case name, such as `temperature`.
    pub name: &'static str,
    /// The unit that silver stores.
    pub unit: &'static str,
    /// Inclusive limits in the canonical unit; configuration may move them for a type or a device.
    pub range: RangeInclusive<f64>,
}

/// Range of a device whose type is unknown and which states no unit (DESIGN.md, section 5).
pub const UNKNOWN_RANGE: RangeInclusive<f64> = -100.0..=500.0;

const fn device_type(name: &'static str, unit: &'static str, low: f64, high: f64) -> DeviceType {
    DeviceType { name, unit, range: low..=high }
}

/// The device types that ship with Tailrace.
pub static DEVICE_TYPES: &[DeviceType] = &[
    device_type("temperature", "Cel", -100.0, 500.0),
    device_type("pressure", "bar", -1.0, 1_000.0),
    device_type("flow", "L/min", -10_000_000.0, 10_000_000.0),
    device_type("mass_flow", "kg/h", -1_000_000.0, 1_000_000.0),
    device_type("level", "%", -5.0, 105.0),
    device_type("humidity", "%", 0.0, 100.0),
    device_type("vibration", "m/s2", -2_000.0, 2_000.0),
    device_type("vibration_velocity", "mm/s", -1_000.0, 1_000.0),
    device_type("current", "A", -10_000.0, 10_000.0),
    device_type("voltage", "V", -100_000.0, 100_000.0),
    device_type("power", "kW", -100_000.0, 100_000.0),
    device_type("energy", "kW.h", 0.0, 1e12),
    device_type("speed", "/min", -100_000.0, 100_000.0),
    device_type("frequency", "Hz", 0.0, 1e9),
    device_type("position", "%", -5.0, 105.0),
    device_type("composition", "%", -1.0, 101.0),
    device_type("mass", "kg", -1e6, 1e9),
    device_type("length", "mm", -1e9, 1e9),
    device_type("torque", "N.m", -1e7, 1e7),
    device_type("time", "s", 0.0, 1e12),
    device_type("state", "1", -2_147_483_648.0, 2_147_483_647.0),
    device_type("count", "1", 0.0, 9_007_199_254_740_992.0),
];

impl DeviceType {
    /// The shipped device type of this name.
    pub fn parse(name: &str) -> Option<&'static DeviceType> {
        DEVICE_TYPES.iter().find(|t| t.name == name)
    }

    /// The canonical unit as a [`Unit`].
    pub fn canonical(&self) -> &'static Unit {
        Unit::parse(self.unit).expect("every shipped device type names a known unit (tested)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions() {
        for (value, from, to, expected) in [
            (212.0, "[degF]", "Cel", 100.0),
            (-40.0, "[degF]", "Cel", -40.0),
            (0.0, "K", "Cel", -273.15),
            (2_705.2, "kPa", "bar", 27.052),
            (1.0, "[psi]", "bar", 0.068_947_572_931_68),
            (60.0, "m3/h", "L/min", 1_000.0),
            (1.0, "[g]", "m/s2", 9.806_65),
            (3_000.0, "/min", "Hz", 50.0),
            (50.0, "%", "1", 0.5),
        ] {
            let (scale, shift) = Unit::parse(from).unwrap().into_unit(Unit::parse(to).unwrap()).unwrap();
            let got = value * scale + shift;
            assert!((got - expected).abs() < 1e-9 * expected.abs().max(1.0), "{value} {from} = {got} {to}");
        }
    }

    #[test]
    fn another_dimension_does_not_convert() {
        assert_eq!(Unit::parse("bar").unwrap().into_unit(Unit::parse("Cel").unwrap()), None);
    }

    #[test]
    fn codes_are_unique_and_types_name_known_units() {
        for (i, unit) in UNITS.iter().enumerate() {
            assert!(UNITS[..i].iter().all(|u| u.code != unit.code), "{unit} stands twice");
            assert_eq!(unit.into_unit(unit), Some((1.0, 0.0)));
        }
        for device_type in DEVICE_TYPES {
            assert!(Unit::parse(device_type.unit).is_some(), "{}", device_type.name);
            assert!(device_type.range.start() < device_type.range.end());
        }
    }
}

//! `firmware-sim chips`: which chips are simulated, and what they show.

use std::collections::BTreeMap;

use common::telemetry::print_line;

use crate::plant::{Channel, Layout};

/// Prints the demo gateway's chips by bus and address.
///
/// # Errors
/// When the plant's layout cannot be read.
pub fn list() -> anyhow::Result<()> {
    let layout = Layout::demo()?;
    let mut converters: BTreeMap<(&str, u8), Vec<&Channel>> = BTreeMap::new();
    for channel in &layout.channels {
        converters.entry((&channel.bus, channel.address)).or_default().push(channel);
    }
    for ((bus, address), mut channels) in converters {
        channels.sort_by_key(|c| c.input);
        print_line(format_args!(
            "/dev/{bus} {address:#04x}  ADS1115, four 4-20 mA loops over {} ohm",
            layout.adc.shunt_ohm
        ));
        for c in channels {
            let span = format!("{} to {} {}", c.at_4ma, c.at_20ma, c.unit);
            print_line(format_args!(
                "  A{}  {:<30} {span:<22} every {:>3} s  {}",
                c.input, c.device, c.period_s, c.description
            ));
        }
    }
    let press = &layout.press;
    print_line(format_args!("/dev/{} {:#04x}  SHT4x", press.bus, press.address));
    print_line(format_args!(
        "      {:<30} {:<22} every {:>3} s  {}",
        press.temperature.device, press.temperature.unit, press.period_s, press.temperature.description
    ));
    print_line(format_args!(
        "      {:<30} {:<22} every {:>3} s  {}",
        press.humidity.device, press.humidity.unit, press.period_s, press.humidity.description
    ));
    let vibration = &layout.vibration;
    print_line(format_args!("/dev/{}   ISM330DHCX, accelerometer with FIFO", vibration.bus));
    for output in &vibration.outputs {
        print_line(format_args!(
            "      {:<30} {:<22} every {:>3} s  {}, {}",
            output.device, output.unit, vibration.period_s, vibration.description, output.feature
        ));
    }
    Ok(())
}

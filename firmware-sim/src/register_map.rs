//! The registers of the simulated Modbus devices: as a table for people and tests, and as the configuration by which
//! `edge-agent` reads them.

use std::fmt::{self, Write as _};

use smart_node::pdu::Table;

/// How a value lies in its registers; bytes are in Modbus's order, the high one first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Two's complement in one register.
    I16,
    /// Two's complement in two registers, the high word first.
    I32,
    /// IEEE 754 in two registers, the high word first.
    F32,
    /// IEEE 754 in two registers, the low word first.
    F32LowFirst,
}

impl Form {
    /// The registers that it takes.
    pub fn words(self) -> u16 {
        if self == Self::I16 { 1 } else { 2 }
    }

    /// Type and word order by their names in the configuration.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::I16 => ("i16", "big"),
            Self::I32 => ("i32", "big"),
            Self::F32 => ("f32", "big"),
            Self::F32LowFirst => ("f32", "little"),
        }
    }
}

/// A value in a simulated device: value = registers × scale + offset.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Address of the slave.
    pub slave: u8,
    /// In which table.
    pub table: Table,
    /// Its first register, from 0 as on the wire.
    pub address: u16,
    /// How it lies there.
    pub form: Form,
    /// See above.
    pub scale: f64,
    /// See above.
    pub offset: f64,
    /// Device id.
    pub device: String,
    /// Asset that it belongs to.
    pub asset: String,
    /// Device type.
    pub device_type: String,
    /// UCUM unit.
    pub unit: String,
    /// What a working instrument can show, in `unit`.
    pub range: [f64; 2],
    /// How often it is worth reading, in s.
    pub period_s: u32,
}

/// One line of the table; [`HEADER`] names its columns.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { slave, address, scale, offset, device, unit, .. } = self;
        let (form, words) = self.form.names();
        let table = table_name(self.table);
        write!(
            f,
            "{slave:<5} {table:<7} {address:<7} {form:<4} {words:<6} {scale:<22} {offset:<8} {device:<31} {unit:<5}"
        )
    }
}

/// The columns of a [`Row`] as text; none has a blank in it.
pub const HEADER: &str =
    "slave table   address type words  scale                  offset   device                          unit ";

/// The assets, devices and registers of `rows` as a part of the agent's configuration, with their slaves at `url`.
/// Rows of one slave stand together.
pub fn agent_config(url: &str, rows: &[Row]) -> String {
    let mut t = String::new();
    let mut assets: Vec<&str> = rows.iter().map(|row| row.asset.as_str()).collect();
    assets.dedup();
    for asset in assets {
        let _ = writeln!(t, "[[asset]]\nid = \"{asset}\"\n");
    }
    for Row { device, asset, device_type, unit, range: [low, high], period_s, .. } in rows {
        let _ = writeln!(
            t,
            "[[device]]\nid = \"{device}\"\nasset = \"{asset}\"\ntype = \"{device_type}\"\nunit = \"{unit}\"\n\
             range = [{low:?}, {high:?}]\ninterval = \"{period_s}s\"\n"
        );
    }
    let _ = writeln!(t, "[[modbus]]\nurl = \"{url}\"");
    let mut slave = None;
    for row in rows {
        if slave.replace(row.slave) != Some(row.slave) {
            let _ = writeln!(t, "\n[[modbus.slave]]\nunit = {}", row.slave);
        }
        let (form, words) = row.form.names();
        let _ = writeln!(
            t,
            "[[modbus.slave.register]]\ndevice = \"{}\"\ntable = \"{}\"\naddress = {}\ntype = \"{form}\"\n\
             word_order = \"{words}\"\nscale = {:?}\noffset = {:?}\nperiod = \"{}s\"",
            row.device,
            table_name(row.table),
            row.address,
            row.scale,
            row.offset,
            row.period_s
        );
    }
    t
}

/// The table by its name in the configuration.
fn table_name(table: Table) -> &'static str {
    match table {
        Table::Holding => "holding",
        Table::Input => "input",
    }
}

#[cfg(test)]
pub(crate) mod agent {
    //! The agent's own Modbus source, as the other side in tests.

    use std::{collections::BTreeMap, sync::Arc};

    use common::time::{Clock as _, SystemClock};
    use edge_agent::{
        settings::Settings,
        source::{self, LinuxHardware},
    };

    use super::{Row, agent_config};

    /// What the agent reads once of `rows` at `url`, by device; NaN where it got no value.
    pub(crate) async fn read(url: &str, rows: &[Row]) -> BTreeMap<String, f64> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("edge-agent.toml");
        let head = format!("site = \"lab\"\ngateway = \"gw-1\"\ndata_dir = {:?}\n\n", folder.path());
        std::fs::write(&file, head + &agent_config(url, rows)).unwrap();
        let settings = Settings::load(Some(&file)).unwrap();
        let done = tokio::task::spawn_blocking(move || {
            let hardware = Arc::new(LinuxHardware);
            let readings =
                settings.sources.iter().flat_map(|s| source::read_once(s, &hardware, SystemClock.now()));
            readings.map(|r| (settings.registry.device(r.device).id.clone(), r.value)).collect()
        });
        done.await.unwrap()
    }
}

//! `edge-agent outbox`: what lies in the outbox of an agent that is stopped, whether it is sound, and how to save it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use arrow::{
    array::{ArrayRef, Int64Array, RecordBatch, StringArray},
    compute::cast,
    datatypes::{DataType, Field, Schema, SchemaRef},
    ipc::{
        CompressionType,
        writer::{IpcWriteOptions, StreamWriter},
    },
};
use clap::Subcommand;
use common::{
    telemetry::print_line,
    time::{Clock, SystemClock, Timestamp},
    wire::{self, Lane},
};

use crate::{
    outbox::{Checked, GenerationView, Inspection, Limits, Message, Outbox, Standing},
    settings::OutboxSettings,
};

const LS_EXAMPLES: &str = "Examples:
  edge-agent outbox ls --config /etc/tailrace/edge-agent.toml
  edge-agent outbox ls --json --config edge-agent.toml | jq '[.[].spans[].held] | add'

One line an epoch in a generation. A message that is not held was acknowledged; what a quarantined generation
held was declared as a gap. Event times, in UTC.";

const FSCK_EXAMPLES: &str = "Examples:
  edge-agent outbox fsck --config /etc/tailrace/edge-agent.toml
  edge-agent outbox export --out /mnt/usb/rescue --config edge-agent.toml && edge-agent outbox fsck --repair --config edge-agent.toml

Nothing is changed without --repair. Exit status: 0 all is sound or was repaired, 1 otherwise.";

const EXPORT_EXAMPLES: &str = "Examples:
  edge-agent outbox export --out /mnt/usb/rescue --config /etc/tailrace/edge-agent.toml
  edge-agent outbox export --out rescue --lane readings --quarantine --config edge-agent.toml
  TAILRACE_EDGE__DATA_DIR=/mnt/sd/var/lib/tailrace edge-agent outbox export --out rescue --config /mnt/sd/etc/tailrace/edge-agent.toml
  python -c 'import pyarrow as pa; print(pa.ipc.open_stream(\"rescue/readings.arrows\").read_pandas())'

One Arrow IPC stream a lane (.arrows, zstd, a record batch a message) with the columns of the lane, and before
them message_epoch, message_seq and message_sealed_at. To send the data on instead, start an agent on the folder.
Exit status: 0 everything that is held was written, 1 something could not be read.";

/// What to do with the outbox.
#[derive(Debug, Subcommand)]
pub(super) enum OutboxCommand {
    /// List lanes and generations: messages, rows, bytes, epochs, seqs, times
    #[command(after_help = LS_EXAMPLES)]
    Ls {
        /// A JSON array instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Read every message and compare it with its manifest
    #[command(after_help = FSCK_EXAMPLES)]
    Fsck {
        /// Set damaged generations aside in quarantine/ and declare what they held, as a start of the agent does
        #[arg(long)]
        repair: bool,
        /// A JSON object instead of text
        #[arg(long)]
        json: bool,
    },
    /// Write the held messages to files that Arrow tools read
    #[command(after_help = EXPORT_EXAMPLES)]
    Export {
        /// Folder for the files; it is made where it does not exist
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Only this lane: readings, aggregates, anomalies or control
        #[arg(long)]
        lane: Option<Lane>,
        /// What can still be read in quarantine/ too
        #[arg(long)]
        quarantine: bool,
    },
}

/// Carries it out.
pub(super) fn execute(command: &OutboxCommand, settings: &OutboxSettings) -> anyhow::Result<ExitCode> {
    let inspection = Inspection::open(&settings.dir).with_context(|| {
        format!("looking at the outbox of data_dir, {}; the agent must be stopped", settings.dir.display())
    })?;
    match command {
        OutboxCommand::Ls { json } => {
            if *json {
                print_line(serde_json::to_string_pretty(&inspection.generations)?);
            } else {
                list(&inspection.generations);
            }
            Ok(ExitCode::SUCCESS)
        }
        OutboxCommand::Fsck { repair, json } => fsck(inspection, settings, *repair, *json),
        OutboxCommand::Export { out, lane, quarantine } => export(&inspection, out, *lane, *quarantine),
    }
}

const HEADER: [&str; 12] = [
    "lane",
    "generation",
    "state",
    "disk",
    "epoch",
    "seqs",
    "messages",
    "held",
    "rows",
    "rows held",
    "from",
    "to",
];

fn list(generations: &[GenerationView]) {
    let mut table = vec![HEADER.map(str::to_owned)];
    for generation in generations {
        let head = [
            generation.lane.to_string(),
            generation.number.to_string(),
            generation.standing.as_str().to_owned(),
            bytes(generation.disk_bytes),
        ];
        let spans = generation.spans.iter().map(|span| {
            [
                span.epoch.to_string(),
                format!("{}-{}", span.first_seq, span.last_seq),
                span.messages.to_string(),
                span.held.to_string(),
                span.rows.to_string(),
                span.held_rows.to_string(),
                span.from.to_string(),
                span.to.to_string(),
            ]
        });
        let mut rows: Vec<_> = spans.collect();
        if let Some(problem) = &generation.problem {
            rows.push([problem.as_str(), "", "", "", "", "", "", ""].map(str::to_owned));
        } else if rows.is_empty() {
            rows.push(["-", "-", "0", "0", "0", "0", "-", "-"].map(str::to_owned));
        }
        for row in rows {
            let mut cells = head.iter().cloned().chain(row);
            table.push(std::array::from_fn(|_| cells.next().unwrap_or_default()));
        }
    }
    print_table(&table);
    for lane in Lane::ALL {
        let of_lane = generations.iter().filter(|g| g.lane == lane);
        let (mut messages, mut rows, mut disk, mut n) = (0, 0, 0, 0);
        for generation in of_lane {
            let held = generation.held();
            (messages, rows) = (messages + held.0, rows + held.1);
            (disk, n) = (disk + generation.disk_bytes, n + 1);
        }
        print_line(format_args!(
            "{lane}: {messages} messages with {rows} rows held, {n} generations, {}",
            bytes(disk)
        ));
    }
}

/// Columns as wide as their widest cell; numbers to the right. A problem may run over the end.
fn print_table<const N: usize>(table: &[[String; N]]) {
    let width = |column: usize| {
        let cells = table.iter().filter(|row| row[N - 1].is_empty() == table[0][N - 1].is_empty());
        cells.map(|row| row[column].chars().count()).max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    for row in table {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let is_number = cell.starts_with(|c: char| c.is_ascii_digit()) && !cell.contains(['-', ':']);
            let padded = if is_number { format!("{cell:>width$}  ") } else { format!("{cell:<width$}  ") };
            line.push_str(&padded);
        }
        print_line(line.trim_end());
    }
}

/// `1.5 MiB`.
fn bytes(n: u64) -> String {
    let mut value = n as f64;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") }
}

fn fsck(
    inspection: Inspection,
    settings: &OutboxSettings,
    repair: bool,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let checked = inspection.check()?;
    // The agent's own code repairs, and wants the outbox for itself.
    drop(inspection);
    let repaired = repair && !checked.findings.is_empty();
    if repaired {
        set_aside(&checked, &settings.dir, SystemClock.now())?;
    }
    if json {
        let mut document = serde_json::to_value(&checked)?;
        document["repaired"] = repaired.into();
        print_line(serde_json::to_string_pretty(&document)?);
    } else {
        for finding in &checked.findings {
            print_line(format_args!("{} generation {}: {}", finding.lane, finding.number, finding.problem));
        }
        let Checked { generations, messages, rows, findings } = &checked;
        let end = match (findings.len(), repaired) {
            (0, _) => "all sound".to_owned(),
            (n, false) => {
                format!("{n} findings; --repair sets the generations aside and declares what they held")
            }
            (n, true) => {
                format!("{n} findings; the generations lie in quarantine/, what they held is declared")
            }
        };
        print_line(format_args!(
            "{generations} generations, {messages} messages with {rows} rows are sound; {end}"
        ));
    }
    Ok(if checked.findings.is_empty() || repaired { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A start and a stop of the outbox, which drops nothing for its age or for room.
fn set_aside(checked: &Checked, dir: &Path, now: Timestamp) -> anyhow::Result<()> {
    let limits = Limits {
        max_bytes: u64::MAX,
        max_age: Duration::MAX,
        min_free_disk: 0,
        generation_bytes: u64::MAX,
        max_message_bytes: wire::MAX_MESSAGE,
        census_every: Duration::MAX,
    };
    let outbox = Outbox::open(dir, limits, now)?;
    for finding in &checked.findings {
        outbox.set_aside(finding.lane, finding.number, now)?;
    }
    Ok(outbox.close(now)?)
}

fn export(
    inspection: &Inspection,
    out: &Path,
    lane: Option<Lane>,
    quarantine: bool,
) -> anyhow::Result<ExitCode> {
    fs::create_dir_all(out).with_context(|| format!("making --out {}", out.display()))?;
    for path in Lane::ALL.map(|lane| file_of(out, lane)) {
        anyhow::ensure!(!path.exists(), "{} exists; choose an empty folder for --out", path.display());
    }
    let mut files: BTreeMap<Lane, LaneFile> = BTreeMap::new();
    let mut problems = Vec::new();
    let wanted = |g: &&GenerationView| {
        lane.is_none_or(|lane| g.lane == lane) && (quarantine || g.standing != Standing::Quarantined)
    };
    for generation in inspection.generations.iter().filter(wanted) {
        let aside = generation.standing == Standing::Quarantined;
        let unreadable = inspection.read(generation, |held, message| match message {
            Ok(message) if held || aside => {
                let lane = generation.lane;
                let file = match files.entry(lane) {
                    std::collections::btree_map::Entry::Occupied(file) => file.into_mut(),
                    std::collections::btree_map::Entry::Vacant(none) => {
                        none.insert(LaneFile::create(out, lane)?)
                    }
                };
                file.write(&message)
            }
            Ok(_) => Ok(()),
            Err(problem) => {
                if held || aside {
                    problems.push(problem);
                }
                Ok(())
            }
        })?;
        let (lane, number) = (generation.lane, generation.number);
        problems.extend(unreadable.map(|problem| format!("{lane} generation {number}: {problem}")));
    }
    for file in files.into_values() {
        print_line(file.finish()?);
    }
    for problem in &problems {
        print_line(format_args!("not written: {problem}"));
    }
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn file_of(out: &Path, lane: Lane) -> PathBuf {
    out.join(format!("{lane}.arrows"))
}

/// The messages of one lane as one table.
struct LaneFile {
    path: PathBuf,
    schema: SchemaRef,
    writer: StreamWriter<BufWriter<File>>,
    messages: u64,
    rows: u64,
}

impl LaneFile {
    fn create(out: &Path, lane: Lane) -> io::Result<Self> {
        let path = file_of(out, lane);
        let file = File::create_new(&path)?;
        let mut fields = vec![
            Field::new("message_epoch", DataType::Utf8, false),
            Field::new("message_seq", DataType::Int64, false),
            Field::new("message_sealed_at", DataType::Utf8, false),
        ];
        // Each message has dictionaries of its own, which not every reader follows: plain text for all.
        fields.extend(wire::schema(lane).fields().iter().map(|field| match field.data_type() {
            DataType::Dictionary(_, values) => field.as_ref().clone().with_data_type(values.as_ref().clone()),
            _ => field.as_ref().clone(),
        }));
        let schema = Arc::new(Schema::new(fields));
        let options = IpcWriteOptions::default().try_with_compression(Some(CompressionType::ZSTD));
        let writer = options
            .and_then(|options| StreamWriter::try_new_with_options(BufWriter::new(file), &schema, options));
        Ok(Self { path, schema, writer: writer.map_err(io::Error::other)?, messages: 0, rows: 0 })
    }

    fn write(&mut self, message: &Message) -> io::Result<()> {
        let identity = &message.identity;
        let batch = wire::decode(identity.lane, &message.payload).map_err(io::Error::other)?;
        let n = batch.num_rows();
        let mut columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from(vec![identity.epoch.to_string(); n])),
            Arc::new(Int64Array::from(vec![identity.seq.cast_signed(); n])),
            Arc::new(StringArray::from(vec![identity.sealed_at.to_string(); n])),
        ];
        for (column, field) in batch.columns().iter().zip(&self.schema.fields()[3..]) {
            columns.push(cast(column, field.data_type()).map_err(io::Error::other)?);
        }
        let batch = RecordBatch::try_new(Arc::clone(&self.schema), columns).map_err(io::Error::other)?;
        self.writer.write(&batch).map_err(io::Error::other)?;
        self.messages += 1;
        self.rows += n as u64;
        Ok(())
    }

    /// On the disk when this returns; a line that says what was written.
    fn finish(self) -> anyhow::Result<String> {
        let Self { path, writer, messages, rows, .. } = self;
        let at = || format!("writing {}", path.display());
        writer.into_inner().with_context(at)?.into_inner().with_context(at)?.sync_all().with_context(at)?;
        Ok(format!("{}: {messages} messages, {rows} rows", path.display()))
    }
}

#[cfg(test)]
mod tests;

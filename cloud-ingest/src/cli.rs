//! The command line. Exit status: 0 done, 1 failed, 2 bad usage or configuration.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::Context;
use arrow::util::pretty::pretty_format_batches_with_schema;
use clap::{Parser, Subcommand};
use common::{
    telemetry,
    time::{Clock, SystemClock, Timestamp},
};
use tokio::sync::watch;

use crate::{
    doctor,
    drain::{self, Drained},
    ledger,
    metrics::Metrics,
    pipeline,
    plan::Selection,
    quarantine, rebuild,
    refine::Refiner,
    rules::{self, trial},
    serve,
    settings::{Role, Settings, StoreSettings},
    store::Store,
    tables::Tables,
    upkeep,
};

/// What is logged unless `TAILRACE_LOG` says otherwise: the libraries below Delta tell of every snapshot at INFO,
/// and Delta's kernel three times of each failure that its caller tells of.
pub const LOG_FILTER: &str = "info,buoyant_kernel=off,deltalake_core=warn,datafusion=warn";

/// Keeps a bronze, silver and gold lake of factory sensor data and serves it by SQL.
#[derive(Debug, Parser)]
#[command(name = "cloud-ingest", version)]
pub struct Cli {
    /// Configuration file; `default.toml` documents every key.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run until SIGINT or SIGTERM; then finish what was taken, and end.
    Run {
        /// What this process does, instead of what the configuration says.
        #[arg(long, value_delimiter = ',')]
        roles: Option<Vec<Role>>,
    },
    /// Take one replica away: store what the broker still holds for it, and end its session.
    ///
    /// The replica must have been stopped. Its share of what comes from now on goes to the others.
    #[command(
        after_help = "Example:\n  cloud-ingest drain --config cloud-ingest.toml --client-id tailrace-cloud-3"
    )]
    Drain {
        /// Client id of the replica, instead of the configured one.
        #[arg(long, value_name = "ID")]
        client_id: Option<String>,
    },
    /// Prove by trying that the configured broker will not lose data; exit 1 if it would.
    ///
    /// Uses topics and client ids of its own and cleans up, so replicas and gateways may go on meanwhile.
    #[command(after_help = "Examples:\n  cloud-ingest doctor --config cloud-ingest.toml\n  \
                            cloud-ingest doctor --messages 50000 --restart-command \"systemctl restart mosquitto\"")]
    Doctor {
        /// How many messages wait for a subscriber that is away or slow; by default 5,000 more than mqtt.inflight.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        messages: Option<u32>,
        /// Restarts the broker, to try whether it keeps sessions and messages; all its clients are cut off.
        #[arg(long, value_name = "CMD")]
        restart_command: Option<String>,
        /// As one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Check the configuration and that the lake can be opened.
    Check,
    /// Answer a query over the lake's newest snapshots and print the rows.
    Query {
        /// Such as "select count(*) from silver.sensor_readings".
        sql: String,
    },
    /// Pack bronze, put small files together, and delete what nobody needs, as the role refine does now and then;
    /// exit 1 when some of it could not be done.
    ///
    /// May run beside any number of others, and be killed at any time: the next run finishes.
    #[command(
        after_help = "Examples:\n  cloud-ingest maintain --config cloud-ingest.toml\n  cloud-ingest maintain --json"
    )]
    Maintain {
        /// As one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Make silver and gold from bronze once more, by the same plans and rules, and compare: exit 1 when anything
    /// differs.
    ///
    /// --verify compares with what stands and lists what differs, and what bronze no longer holds. It may run beside
    /// a lake that goes on: what came later is left out. gold/maintenance_schedule is not compared, since it hangs on
    /// when it was computed. It needs disk for a second silver and gold, in --into or in the folder for temporary
    /// files (TMPDIR).
    ///
    /// --into without --verify writes silver, gold and ops of a complete new lake: stop cloud-ingest, put these three
    /// folders in the place of the lake's, and start it again. One that was interrupted goes on.
    #[command(after_help = "Examples:\n  cloud-ingest rebuild --verify\n  \
        cloud-ingest rebuild --verify --json --from 2026-03-01T00:00:00Z --to 2026-03-02T00:00:00Z\n  \
        cloud-ingest rebuild --into file:///var/lib/tailrace/rebuilt")]
    Rebuild {
        /// Compare with what stands.
        #[arg(long)]
        verify: bool,
        /// First hour of reception that is replayed; what came before is taken from silver as it stands.
        #[arg(long, value_name = "TIME")]
        from: Option<Timestamp>,
        /// Hour of reception up to which is replayed.
        #[arg(long, value_name = "TIME")]
        to: Option<Timestamp>,
        /// URL or path of the lake to write; it stays. Without it a temporary one is made and removed.
        #[arg(long, value_name = "URL")]
        into: Option<String>,
        /// As one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// See what is in quarantine and why, and judge it again once a rule was changed.
    #[command(subcommand)]
    Quarantine(Quarantine),
    /// Look at rules, and try them on what has come before they are enabled.
    Rule {
        #[command(subcommand)]
        rule: RuleCommand,
    },
    /// Account for every reading; exit 1 unless every lane balances.
    Audit {
        /// As one JSON object.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
enum Quarantine {
    /// What is held: readings by rule and device, a sample, and the line of configuration that lets it pass.
    #[command(
        after_help = "Examples:\n  cloud-ingest quarantine ls\n  cloud-ingest quarantine ls --rule range --json"
    )]
    Ls {
        #[command(flatten)]
        of: Selected,
        /// As one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Judge what is held again, by the rules of this configuration.
    ///
    /// Readings that pass now go to silver, and gold is corrected; their rows in quarantine stay, marked as resolved. It
    /// may run beside any number of refiners, and be killed at any time: what it has begun they
    /// finish. Give their configuration the same rules and restart them, else what comes next is judged by the old ones.
    #[command(after_help = "Examples:\n  cloud-ingest quarantine replay --config cloud-ingest.toml\n  \
        cloud-ingest quarantine replay --rule range --device kiln-1/wall")]
    Replay {
        #[command(flatten)]
        of: Selected,
        /// As one JSON object.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
enum RuleCommand {
    /// List the rules, what is wrong with them, and where they stand; exit 1 when one that is enabled cannot run.
    #[command(
        after_help = "Examples:\n  cloud-ingest rule ls --config cloud-ingest.toml\n  cloud-ingest rule ls --json"
    )]
    Ls {
        /// As one JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Run a rule, enabled or not, over what was received in a period, and print what it would have done; exit 1 when
    /// it failed on any of it.
    ///
    /// Nothing is written and nobody is told. On silver the batches are those that rules saw then. On bronze messages
    /// are decoded anew, with the quality rules as they are configured now. Whatever else the rule joins is as it is
    /// now, and nothing is in `live`.
    #[command(
        after_help = "Examples:\n  cloud-ingest rule try anomalies --from 2026-03-01T00:00:00Z --to 2026-03-02T00:00:00Z\n  \
        cloud-ingest rule try hot-bearings --config cloud-ingest.toml --on bronze --show 5\n  \
        cloud-ingest rule try hot-bearings --json"
    )]
    Try {
        /// Name of the rule.
        name: String,
        /// Received from then on; by default a day before --to.
        #[arg(long, value_name = "TIME")]
        from: Option<Timestamp>,
        /// Received before then; by default now.
        #[arg(long, value_name = "TIME")]
        to: Option<Timestamp>,
        /// Layer to try on.
        #[arg(long, value_name = "LAYER", default_value = "silver")]
        on: trial::On,
        /// Most alerts, messages or rows that are printed.
        #[arg(long, value_name = "N", default_value_t = 20)]
        show: usize,
        /// As one JSON object.
        #[arg(long)]
        json: bool,
    },
}

/// Which rows of quarantine.
#[derive(Debug, clap::Args)]
struct Selected {
    /// Held by this rule only.
    #[arg(long, value_name = "NAME")]
    rule: Option<String>,
    /// Of this plant only.
    #[arg(long, value_name = "NAME")]
    site: Option<String>,
    /// Of this device only.
    #[arg(long, value_name = "ID")]
    device: Option<String>,
}

impl From<Selected> for Selection {
    fn from(Selected { rule, site, device }: Selected) -> Selection {
        Selection { rule, site, device }
    }
}

/// Runs a command line.
pub async fn main(cli: Cli) -> ExitCode {
    telemetry::init_logs(LOG_FILTER);
    // Two providers are linked; without a choice the first use of TLS would panic.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let settings = match Settings::load(cli.config.as_deref()) {
        Ok(settings) => settings,
        Err(mistakes) => {
            eprintln!("{mistakes}");
            return ExitCode::from(2);
        }
    };
    let done = match cli.command {
        Command::Run { roles } => run(settings, roles).await.map(|()| true),
        Command::Drain { client_id } => drain(settings, client_id).await.map(|()| true),
        Command::Doctor { messages, restart_command, json } => {
            let messages = messages.map_or(usize::from(settings.mqtt.inflight) + 5_000, |n| n as usize);
            doctor(&settings, doctor::Options { messages, restart_command }, json).await
        }
        Command::Check => check(&settings).await.map(|()| true),
        Command::Query { sql } => query(&settings, &sql).await.map(|()| true),
        Command::Rebuild { verify, from, to, into, json } => {
            rebuild(&settings, rebuild::Options { verify, from, to, into: None }, into, json).await
        }
        Command::Maintain { json } => maintain(&settings, json).await,
        Command::Quarantine(Quarantine::Ls { of, json }) => {
            held(&settings, of.into(), json).await.map(|()| true)
        }
        Command::Quarantine(Quarantine::Replay { of, json }) => {
            replay(&settings, of.into(), json).await.map(|()| true)
        }
        Command::Rule { rule: RuleCommand::Ls { json } } => list_rules(&settings, json).await,
        Command::Rule { rule: RuleCommand::Try { name, from, to, on, show, json } } => {
            let to = to.unwrap_or_else(|| SystemClock.now());
            let from = from.unwrap_or_else(|| to - std::time::Duration::from_secs(86_400));
            try_rule(&settings, &name, &trial::Options { on, from, to, show }, json).await
        }
        Command::Audit { json } => audit(&settings, json).await,
    };
    match done {
        Ok(false) => ExitCode::FAILURE,
        Ok(true) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(mut settings: Settings, roles: Option<Vec<Role>>) -> anyhow::Result<()> {
    if let Some(roles) = roles {
        settings.roles = roles;
    }
    let (stop, stopped) = watch::channel(false);
    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .context("listening for SIGTERM")?;
    tokio::spawn(async move {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminated.recv() => {}
        }
        tracing::info!("stopping: finishing what was taken");
        stop.send_replace(true);
    });
    pipeline::run(settings, Arc::new(SystemClock), None, stopped).await
}

async fn drain(mut settings: Settings, client_id: Option<String>) -> anyhow::Result<()> {
    settings.mqtt.client_id = client_id.unwrap_or(settings.mqtt.client_id);
    let client_id = settings.mqtt.client_id.clone();
    match drain::drain(&settings, Arc::new(SystemClock)).await? {
        Drained::NoSession => telemetry::print_line(format_args!(
            "the broker keeps no session of {client_id}: there is nothing to store"
        )),
        Drained::Stored(messages) => telemetry::print_line(format_args!(
            "{messages} messages stored; the session of {client_id} is ended"
        )),
    }
    Ok(())
}

/// Whether nothing was found.
async fn doctor(settings: &Settings, options: doctor::Options, json: bool) -> anyhow::Result<bool> {
    let report = doctor::doctor(settings, &options).await;
    if json {
        telemetry::print_line(serde_json::to_string(&report)?);
    } else {
        telemetry::print_line(&report);
    }
    Ok(report.ok)
}

async fn check(settings: &Settings) -> anyhow::Result<()> {
    pipeline::serve_settings(settings)?;
    let store = Store::configured(&settings.store)?;
    let tables = Tables::open(&store).await.with_context(|| format!("opening the lake {}", store.url()))?;
    store.prove_put_if_absent().await?;
    let (rules, _) = rules::plan(settings, &tables).await?;
    telemetry::print_line(format_args!(
        "the configuration is good; quality rules {}, {} rules enabled",
        pipeline::rules(settings).hash(),
        rules.len()
    ));
    Ok(())
}

/// Whether nothing differs.
async fn rebuild(
    settings: &Settings,
    mut options: rebuild::Options,
    into: Option<String>,
    json: bool,
) -> anyhow::Result<bool> {
    let store = Store::configured(&settings.store)?;
    let new = into.map(|url| Store::configured(&StoreSettings { url, ..settings.store.clone() }));
    options.into = new.transpose()?;
    let gold = pipeline::gold(settings);
    let progress = |text: &str| eprintln!("{text}");
    let report = rebuild::rebuild(&store, &options, &gold, SystemClock.now(), progress).await?;
    if json {
        telemetry::print_line(serde_json::to_string(&report)?);
    } else {
        telemetry::print_line(&report);
    }
    Ok(report.identical != Some(false))
}

/// Whether everything was done.
async fn maintain(settings: &Settings, json: bool) -> anyhow::Result<bool> {
    let store = Store::configured(&settings.store)?;
    let tables = Tables::open(&store).await.with_context(|| format!("opening the lake {}", store.url()))?;
    let tables = rules::known(settings, &tables).await?;
    let done =
        upkeep::maintain(&tables, &settings.upkeep, &pipeline::gold(settings), SystemClock.now()).await;
    if json {
        telemetry::print_line(serde_json::to_string(&done)?);
    } else {
        telemetry::print_line(&done);
    }
    Ok(done.failed.is_empty())
}

async fn held(settings: &Settings, of: Selection, json: bool) -> anyhow::Result<()> {
    let store = Store::configured(&settings.store)?;
    let held = quarantine::held(&Tables::open(&store).await?, &of).await?;
    if json {
        telemetry::print_line(serde_json::to_string(&held)?);
    } else {
        telemetry::print_line(&held);
    }
    Ok(())
}

async fn replay(settings: &Settings, of: Selection, json: bool) -> anyhow::Result<()> {
    let store = Store::configured(&settings.store)?;
    let tables = Tables::open(&store).await.with_context(|| format!("opening the lake {}", store.url()))?;
    store.prove_put_if_absent().await?;
    let (rules, limits) = (pipeline::rules(settings), pipeline::limits(settings));
    let mut refiner = Refiner::new(&store, &tables, rules, limits, Metrics::default());
    let gold = pipeline::gold(settings);
    let done = quarantine::replay(&mut refiner, &tables, &of, &gold, SystemClock.now()).await?;
    if json {
        telemetry::print_line(serde_json::to_string(&done)?);
    } else {
        telemetry::print_line(&done);
    }
    Ok(())
}

/// Whether every rule that is enabled can run.
async fn list_rules(settings: &Settings, json: bool) -> anyhow::Result<bool> {
    let store = Store::configured(&settings.store)?;
    let listed = rules::list(settings, &Tables::open(&store).await?).await?;
    if json {
        telemetry::print_line(serde_json::to_string(&listed)?);
    } else {
        listed.iter().for_each(telemetry::print_line);
    }
    Ok(listed.iter().all(|rule| !rule.enabled || rule.mistake.is_none()))
}

/// Whether the rule failed on nothing.
async fn try_rule(
    settings: &Settings,
    name: &str,
    options: &trial::Options,
    json: bool,
) -> anyhow::Result<bool> {
    let store = Store::configured(&settings.store)?;
    let tables = Tables::open(&store).await?;
    let rule = rules::find(settings, &tables, name).await?;
    let report = trial::run(settings, &tables, Arc::new(SystemClock), &rule, options).await?;
    if json {
        telemetry::print_line(serde_json::to_string(&report)?);
    } else {
        telemetry::print_line(&report);
    }
    Ok(report.failed == 0)
}

/// Whether everything balances.
async fn audit(settings: &Settings, json: bool) -> anyhow::Result<bool> {
    let store = Store::configured(&settings.store)?;
    let audit = ledger::audit(&Tables::open(&store).await?, SystemClock.now()).await?;
    if json {
        telemetry::print_line(serde_json::to_string(&audit)?);
    } else {
        telemetry::print_line(&audit);
    }
    Ok(audit.balances())
}

async fn query(settings: &Settings, sql: &str) -> anyhow::Result<()> {
    let serve = pipeline::serve_settings(settings)?;
    let store = Store::configured(&settings.store)?;
    let tables = Tables::open(&store).await?;
    let tables = rules::known(settings, &tables).await?;
    let answer = serve::query(&serve, &tables, Arc::new(SystemClock), sql).await?;
    telemetry::print_line(pretty_format_batches_with_schema(answer.schema, &answer.batches)?);
    Ok(())
}

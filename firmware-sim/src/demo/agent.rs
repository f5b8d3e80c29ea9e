//! The demo's agent: the real edge agent on simulated chips, at the plant's own time.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use common::time::{Clock as _, Timestamp};
use edge_agent::{outbox::Outbox, settings::Settings};
use tokio::sync::{mpsc, watch};

use super::{
    child::{self, Event, Order},
    configs,
};
use crate::{
    bus::SimHardware,
    chip::SimTime,
    clock::SimClock,
    faults::{Faults, Rates},
    plant::{Intervention, Phase, Plant},
};

/// The fault that key `f` causes: the loss of the reactor's A feed.
const MANUAL_FAULT: &str = "d06";

/// The model that ships with the demo; it stands in every gateway's models folder.
const BUNDLE: [(&str, &[u8]); 3] = [
    ("model.onnx", include_bytes!("../../data/models/tep-process/model.onnx")),
    ("model.toml", include_bytes!("../../data/models/tep-process/model.toml")),
    ("golden.json", include_bytes!("../../data/models/tep-process/golden.json")),
];

/// How one agent of the demo is started.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Its configuration
    #[arg(long)]
    pub(super) config: PathBuf,
    /// Which gateway it is, from 0
    #[arg(long)]
    pub(super) gateway: usize,
    /// Where the plant's loop began
    #[arg(long)]
    pub(super) anchor: Timestamp,
}

impl Options {
    /// The arguments that parse as these options.
    pub(super) fn to_args(&self) -> Vec<String> {
        let config = self.config.display().to_string();
        let (gateway, anchor) = (self.gateway.to_string(), self.anchor.to_string());
        ["agent", "--config", &config, "--gateway", &gateway, "--anchor", &anchor].map(str::to_owned).to_vec()
    }
}

/// Puts the shipped model where a gateway's configuration looks for it; one that was changed is left alone.
///
/// # Errors
/// When the folder cannot be written to.
pub(super) fn install_model(home: &Path) -> anyhow::Result<()> {
    let folder = home.join(configs::MODELS).join("tep-process");
    if folder.exists() {
        return Ok(());
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot write to {}", folder.display()))?;
    for (file, bytes) in BUNDLE {
        fs::write(folder.join(file), bytes)
            .with_context(|| format!("writing {file} to {}", folder.display()))?;
    }
    Ok(())
}

/// Runs the agent until it is told to stop.
///
/// # Errors
/// When the configuration is wrong or a stage fails.
pub(super) async fn run(options: Options, mut orders: mpsc::Receiver<Order>) -> anyhow::Result<()> {
    let settings = Settings::load(Some(&options.config))?;
    let plant = Arc::new(Plant::demo(options.anchor, options.gateway as u64)?);
    // Time goes on where it was when the outbox was last written to.
    let start = Outbox::last_sealed(&settings.outbox.dir)?.unwrap_or(options.anchor);
    let clock = SimClock::new(start, settings.sources.len());
    let of_chips = clock.clone();
    let time = SimTime::new(move || of_chips.now());
    let faults = Faults::new(options.gateway as u64, Rates::DEMO);
    let hardware = SimHardware::of_plant(&plant, faults, time);

    let (stop, stopped) = watch::channel(false);
    let (broken, now) = (Arc::clone(&plant), clock.clone());
    tokio::spawn(async move {
        while let Some(order) = orders.recv().await {
            let intervention = match order {
                Order::Stop => {
                    stop.send_replace(true);
                    continue;
                }
                Order::Break => Intervention::Break { fault: MANUAL_FAULT.to_owned() },
                Order::Repair => Intervention::Repair,
            };
            if let Err(e) = broken.intervene(now.now(), &intervention) {
                tracing::error!(error = %e, ?intervention, "the plant cannot be changed");
            }
        }
    });
    let (shown, position) = (Arc::clone(&plant), clock.clone());
    tokio::spawn(async move {
        let mut tick = tokio::time::interval(Duration::from_millis(500));
        loop {
            tick.tick().await;
            let at = position.now();
            let phase = match shown.phase(at) {
                Phase::Normal => "normal".to_owned(),
                Phase::Fault(name) => format!("fault {name}"),
                Phase::Recovery => "recovering".to_owned(),
            };
            child::tell_parent(&Event::Position { at, live: position.caught_up(), phase });
        }
    });
    edge_agent::pipeline::run(settings, hardware, Arc::new(clock), stopped).await
}

//! READ FIRST: the stages, in the order in which data flows.
//!
//! ```text
//! source ─┐
//! source ─┼─ Polled ─▶ refine: filter → windows, models ─ Processed ─▶ seal ─ drafts ─▶ outbox ─▶ uplink
//! source ─┘  (64)                                         (16)                 (disk)
//! ```
//!
//! | stage | core | shell | ends when |
//! |---|---|---|---|
//! | sources, one task a bus | [`crate::source::chip`] and a schedule | [`crate::source`] | stop signal, or the end of a recorded file |
//! | refine | [`Filter`], [`Windows`], [`Models`] | [`refine`] | the last source has dropped its sender; flushes windows, ends episodes |
//! | seal | [`Sealer`] | [`seal`] | refine has dropped its sender; cuts what waits |
//! | outbox | [`crate::outbox`] | called by seal, blocking | closed once seal has ended |
//! | uplink | [`crate::delivery`] | [`crate::uplink`] | told so once the outbox is closed; drains for `uplink.drain` at most |
//!
//! Only sources see the stop signal. Channels are bounded (numbers above) and disk is the only long buffer: a slow
//! disk fills the channels, then sources wait, miss ticks, and count them as skipped. A stage that fails drops its
//! receiver; those before it end, everything behind it flushes, and [`run`] returns the first error.
//!
//! Accounting: a source counts what was due, refine adds what was held, the outbox counts what is sealed; all of it
//! travels with the batch and becomes durable in its transaction.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use common::{
    documents::ModelStatus,
    telemetry,
    time::{Clock, Timestamp},
};
use tokio::{
    sync::{mpsc, watch},
    task::{self, JoinSet},
};

use crate::{
    census::Outcome,
    filter::Filter,
    metrics::{self, Metrics},
    model::{
        Models,
        episode::Event,
        folder::{self, Change, Folder},
        machine::Purpose,
    },
    outbox::{Limits, Outbox, OutboxError},
    page::{Latest, Page},
    seal::{Cut, Processed, Sealer},
    settings::Settings,
    source::{self, Hardware, Polled},
    uplink,
    window::{Missed, Windows},
};

/// Polls that wait for refine: a few seconds of a busy gateway.
const POLLED: usize = 64;
/// Batches that wait to be sealed.
const PROCESSED: usize = 4;
/// Batches that are sealed in one transaction where so many wait: an fsync costs as much as a few messages.
const TOGETHER: usize = 4;
/// Bundles that wait to be taken over.
const CHANGES: usize = 4;
/// How long a batch waits for room on a full disk before it is tried again.
const FULL_AGAIN: Duration = Duration::from_secs(1);
/// How long the uplink may take its leave when the clock begins anew; what it holds is in the outbox too.
const LEAVE: Duration = Duration::from_millis(500);
/// Where the outbox keeps the open episodes and the models' states.
const EPISODES: &str = "episodes";
/// How often, in the gateway's time, the states are kept: as much of their memory a kill may cost.
const KEEP_STATES: Duration = Duration::from_secs(60);

/// Runs the agent until `stop` turns true or its sender is dropped, until every recorded file has ended and there are
/// no buses, or until the clock has ended: then the agent is to be run again by another one ([`crate::clock`]). Where
/// `clock` is a little behind what an earlier run has sealed, sources go on right after that.
///
/// # Errors
/// When the outbox, the metrics' port or a recorded file cannot be used, or the disk fails.
pub async fn run<H: Hardware>(
    settings: Settings,
    hardware: H,
    clock: Arc<dyn Clock>,
    mut stop: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    settings.check_run()?;
    let settings = Arc::new(settings);
    let mut registry = telemetry::registry();
    let metrics = Arc::new(Metrics::register(&mut registry));
    let delivery_metrics = uplink::Metrics::register(&mut registry);
    let listener = match settings.listen {
        Some(address) => Some(metrics::listen(address).await?),
        None => None,
    };
    let (outbox, mut models, folder) = open(Arc::clone(&settings), clock.now()).await?;
    metrics.clock_set(!clock.now().is_provisional());
    let resumed = resume(&outbox, &mut models, clock.now())?;
    let resume_after = outbox.last_event_time();
    tracing::info!(
        site = settings.site, gateway = settings.gateway, epoch = %outbox.epoch(),
        devices = settings.registry.devices.len(), sources = settings.sources.len(),
        resume_after = resume_after.map(|at| at.to_string()), "agent starts"
    );
    let (status, model_status) = watch::channel(models.status());
    let latest = Arc::new(Latest::new(settings.registry.devices.len()));
    let page = Page {
        settings: Arc::clone(&settings),
        epoch: outbox.epoch(),
        started_at: clock.now(),
        clock: Arc::clone(&clock),
        latest: Arc::clone(&latest),
        models: model_status.clone(),
        delivery: delivery_metrics.clone(),
    };
    let served =
        listener.map(|at| tokio::spawn(metrics::serve(at, Arc::new(Mutex::new(registry)), page.routes())));

    // From the last stage to the first, so that each finds its reader running.
    let (stop_uplink, uplink_stopped) = watch::channel(false);
    let mut uplink = tokio::spawn(uplink::run(
        outbox.clone(),
        uplink_settings(&settings, model_status),
        Arc::clone(&settings.registry),
        Arc::clone(&clock),
        delivery_metrics,
        uplink_stopped,
    ));
    let (processed, to_seal) = mpsc::channel(PROCESSED);
    let sealer = Sealer::new(settings.outbox.clone(), &settings.registry);
    let mut seal =
        tokio::spawn(seal(sealer, to_seal, outbox.clone(), Arc::clone(&clock), Arc::clone(&metrics)));
    let (polled, to_refine) = mpsc::channel(POLLED);
    let (changed, changes) = mpsc::channel(CHANGES);
    let watched = folder.zip(settings.models.poll);
    let watched = watched.map(|(folder, every)| tokio::spawn(folder::watch(folder, every, changed)));
    let stages = Refine::new(&settings, models, Arc::clone(&metrics), status, latest);
    let max_rows = settings.outbox.max_rows;
    let refine = tokio::spawn(refine(stages, max_rows, resumed, to_refine, changes, processed));
    let (stop_sources, sources_stopped) = watch::channel(false);
    let context = source::Context {
        hardware: Arc::new(hardware),
        clock: Arc::clone(&clock),
        resume_after,
        out: polled,
        stop: sources_stopped,
        metrics,
    };
    let mut sources = JoinSet::new();
    for source in settings.sources.clone() {
        sources.spawn(source::run(source, Arc::clone(&settings), context.clone()));
    }
    // Refine must end with the last source.
    drop(context);

    let mut errors = Vec::new();
    let mut note = |stage: &'static str, ended: Result<anyhow::Result<()>, task::JoinError>| {
        if let Err(error) = ended.map_err(anyhow::Error::from).and_then(|result| result) {
            tracing::error!(stage, error = format!("{error:#}"), "stage failed; the agent stops");
            errors.push(error.context(stage));
        }
    };
    let (mut seal_ended, mut uplink_ended, mut anew) = (false, false, false);
    tokio::select! {
        () = clock.ended() => { anew = true; }
        _ = stop.wait_for(|stop| *stop) => {}
        () = first_failure_or_end(&mut sources, &mut note) => {}
        ended = &mut seal => { seal_ended = true; note("seal", ended); }
        ended = &mut uplink => { uplink_ended = true; note("uplink", ended); }
    }
    stop_sources.send_replace(true);
    while let Some(ended) = sources.join_next().await {
        note("source", ended);
    }
    note("refine", refine.await.map(Ok));
    if let Some(watched) = watched {
        note("models", watched.await);
    }
    if !seal_ended {
        note("seal", seal.await);
    }
    let (closing, now) = (outbox.clone(), clock.now());
    note("outbox", task::spawn_blocking(move || closing.close(now).context("closing the outbox")).await);
    stop_uplink.send_replace(true);
    if anew && !uplink_ended {
        match tokio::time::timeout(LEAVE, &mut uplink).await {
            Ok(ended) => note("uplink", ended),
            Err(_) => {
                uplink.abort();
                let _ = uplink.await;
            }
        }
        // What it left to blocking threads ends by itself; only then can the outbox be opened again.
        while !outbox.is_last_handle() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    } else if !uplink_ended {
        note("uplink", uplink.await);
    }
    if let Some(served) = served {
        served.abort();
        let _ = served.await;
    }
    errors.into_iter().next().map_or(Ok(()), Err)
}

/// Opens what blocks: the outbox, and the models with their verification.
async fn open(settings: Arc<Settings>, now: Timestamp) -> anyhow::Result<(Outbox, Models, Option<Folder>)> {
    let opened = task::spawn_blocking(move || {
        let outbox = Outbox::open(&settings.outbox.dir, Limits::from(&settings.outbox), now)?;
        let (models, folder) = load_models(&settings, Purpose::Score);
        anyhow::Ok((outbox, models, folder))
    });
    opened.await?
}

/// The models as their folder holds them. Blocks.
pub(crate) fn load_models(settings: &Settings, purpose: Purpose) -> (Models, Option<Folder>) {
    let (registry, lateness) = (Arc::clone(&settings.registry), settings.window.lateness);
    let mut models = Models::new(registry, lateness, settings.models.budget, purpose);
    if purpose == Purpose::Score {
        models.calibrate_over(settings.models.calibrate_over);
    }
    let mut folder = settings.models.dir.clone().map(Folder::new);
    for change in folder.iter_mut().flat_map(Folder::load) {
        models.apply(change);
    }
    (models, folder)
}

fn uplink_settings(settings: &Settings, models: watch::Receiver<Vec<ModelStatus>>) -> uplink::Settings {
    uplink::Settings {
        site: settings.site.clone(),
        gateway: settings.gateway.clone(),
        mqtt: settings.mqtt.clone(),
        root: settings.root.clone(),
        uplink: settings.uplink.clone(),
        max_message_bytes: settings.outbox.max_message_bytes,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        config_sha256: settings.sha256.clone(),
        models,
    }
}

/// Goes on with the episodes of an earlier run; what is to be sealed of it.
fn resume(outbox: &Outbox, models: &mut Models, now: Timestamp) -> anyhow::Result<Option<Processed>> {
    let Some(kept) = outbox.get_meta(EPISODES).context("reading the open episodes")? else { return Ok(None) };
    let mut events = models.resume(&kept, now);
    // They may have begun before the clock was set.
    let settle = |at| outbox.settle_kept(at).unwrap_or(now);
    models.settle(settle);
    events.iter_mut().for_each(|event| event.started_at = settle(event.started_at));
    let episodes = Some(models.state());
    Ok((!events.is_empty()).then(|| Processed { events, episodes, ..Processed::default() }))
}

/// Returns once a source has failed, or all have ended.
async fn first_failure_or_end(
    sources: &mut JoinSet<anyhow::Result<()>>,
    note: &mut impl FnMut(&'static str, Result<anyhow::Result<()>, task::JoinError>),
) {
    while let Some(ended) = sources.join_next().await {
        let failed = !matches!(ended, Ok(Ok(())));
        note("source", ended);
        if failed {
            return;
        }
    }
}

/// The cores between sources and seal.
pub(crate) struct Refine {
    filter: Filter,
    windows: Windows,
    pub(crate) models: Models,
    metrics: Arc<Metrics>,
    latest: Arc<Latest>,
    status: watch::Sender<Vec<ModelStatus>>,
    last_at: Timestamp,
    /// When the models' state was kept.
    kept_at: Timestamp,
}

impl Refine {
    pub(crate) fn new(
        settings: &Settings,
        models: Models,
        metrics: Arc<Metrics>,
        status: watch::Sender<Vec<ModelStatus>>,
        latest: Arc<Latest>,
    ) -> Self {
        let mut stages = Self {
            filter: Filter::new(settings.checks.clone()),
            windows: Windows::new(settings.window, &settings.widths),
            models,
            metrics,
            latest,
            status,
            last_at: Timestamp::default(),
            kept_at: Timestamp::default(),
        };
        stages.tell();
        stages
    }

    pub(crate) fn process(&mut self, polled: Polled) -> Processed {
        let Polled { at, mut readings, mut census } = polled;
        self.last_at = self.last_at.max(at);
        self.metrics.polled(&census);
        let given = readings.len() as u64;
        // A sender's clock that is ahead of ours must not keep our own sources waiting after a restart.
        let last_event = readings.iter().map(|reading| reading.ts.min(at)).max();
        let marks = self.filter.mark(&mut readings);
        self.latest.update(&readings);
        let mut missed = Missed::default();
        let aggregates = self.windows.push(at, &readings, &mut missed);
        self.metrics.windowed(given, missed, aggregates.len() as u64);
        let events = self.models.push(at, &readings, &self.metrics);
        let held = self.filter.hold(&mut readings);
        for reading in &held {
            census.add(reading.ts, Outcome::Held, 1);
        }
        self.metrics.filtered(marks, held.len() as u64, readings.len() as u64);
        let episodes = self.changed(&events);
        Processed { readings, aggregates, events, census, last_event, episodes }
    }

    /// Takes over what has changed in the models' folder.
    fn exchange(&mut self, change: Change) -> Processed {
        let events = self.models.apply(change);
        let episodes = self.changed(&events);
        Processed { events, episodes, ..Processed::default() }
    }

    fn finish(&mut self) -> Processed {
        let aggregates = self.windows.flush();
        let events = self.models.stop(&self.metrics);
        let episodes = Some(self.models.state());
        Processed { aggregates, events, episodes, ..Processed::default() }
    }

    /// What is to be kept of the models over a restart, if it is time to.
    fn changed(&mut self, events: &[Event]) -> Option<Vec<u8>> {
        self.tell();
        let due = self.models.stateful() && self.last_at.since(self.kept_at) >= KEEP_STATES;
        if events.is_empty() && !due {
            return None;
        }
        self.kept_at = self.last_at;
        Some(self.models.state())
    }

    fn tell(&mut self) {
        if let Some(status) = self.models.news(&self.metrics) {
            self.status.send_replace(status);
        }
    }
}

/// What waits is taken at once and passed on in batches of up to `max_rows` readings: a source that is faster than
/// this stage costs a wake-up of the next one for every message, not for every poll.
async fn refine(
    mut stages: Refine,
    max_rows: usize,
    resumed: Option<Processed>,
    mut polled: mpsc::Receiver<Polled>,
    mut changes: mpsc::Receiver<Change>,
    processed: mpsc::Sender<Processed>,
) {
    if let Some(resumed) = resumed
        && processed.send(resumed).await.is_err()
    {
        return;
    }
    let mut polls = Vec::with_capacity(POLLED);
    loop {
        let mut batch = tokio::select! {
            received = polled.recv_many(&mut polls, POLLED) => match received {
                0 => break,
                _ => Processed::default(),
            },
            // Without a watched folder, no change ever comes.
            Some(change) = changes.recv() => stages.exchange(change),
        };
        for poll in polls.drain(..) {
            let next = stages.process(poll);
            if batch.readings.len() + next.readings.len() > max_rows
                && processed.send(std::mem::take(&mut batch)).await.is_err()
            {
                return;
            }
            batch.append(next);
        }
        if processed.send(batch).await.is_err() {
            return;
        }
    }
    // Whether anybody listens makes no difference any more: seal says why it ended.
    let _ = processed.send(stages.finish()).await;
}

async fn seal(
    mut sealer: Sealer,
    mut processed: mpsc::Receiver<Processed>,
    outbox: Outbox,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
) -> anyhow::Result<()> {
    let mut batches = Vec::with_capacity(TOGETHER);
    loop {
        let deadline = sealer.next_deadline();
        let cut = tokio::select! {
            received = processed.recv_many(&mut batches, TOGETHER) => match received {
                0 => break,
                _ => {
                    let now = Instant::now();
                    batches.drain(..).flat_map(|batch| sealer.push(now, batch)).reduce(Cut::and)
                }
            },
            () = sleep_until(deadline) => sealer.cut(),
        };
        if let Some(cut) = cut {
            append(&outbox, &*clock, cut, &metrics, || !processed.is_closed()).await?;
        }
    }
    match sealer.cut() {
        Some(cut) => append(&outbox, &*clock, cut, &metrics, || false).await,
        None => Ok(()),
    }
}

/// Never ends without a deadline.
async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// Seals a batch. While the disk is full and `may_wait`, it is tried again: the channels fill behind it, and sources
/// skip and count.
async fn append(
    outbox: &Outbox,
    clock: &dyn Clock,
    cut: Cut,
    metrics: &Metrics,
    may_wait: impl Fn() -> bool,
) -> anyhow::Result<()> {
    loop {
        let (outbox, drafts, episodes, now) =
            (outbox.clone(), cut.drafts.clone(), cut.episodes.clone(), clock.now());
        let appended = task::spawn_blocking(move || {
            let meta: Vec<_> = episodes.map(|state| (EPISODES, state)).into_iter().collect();
            outbox.append(now, drafts, &meta)
        });
        match appended.await? {
            Err(error @ OutboxError::Full { .. }) if may_wait() => {
                tracing::error!(%error, "sealing waits");
                tokio::time::sleep(FULL_AGAIN).await;
            }
            appended => {
                appended.context("sealing a batch")?;
                metrics.sealed(cut.readings() as u64);
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests;

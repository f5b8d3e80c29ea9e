//! Commits that take files out of a table: compaction, retention, vacuum, and the tidying of the log.
//!
//! **The fence.** delta-rs lets a commit through that removes files which a compaction has replaced in the
//! meantime, so two compactions of the same files, or a compaction and a replacement, would double rows (tested
//! below). Every commit of this program that removes files therefore carries `txn("rewrite", …)`, and of two such
//! commits from the same snapshot one fails with a conflict. Appends carry none: they and rewrites never wait for
//! each other, so files are packed while writers go on.
//!
//! **Sizes.** Files are packed by tiers, so that a row is written a few times, not once for every 24 commits:
//! small ones into files of [`TIERS`] each in turn, the larger ones without decoding them ([`splice`]). One file is
//! written at a time, and its bytes stream to the store: a compaction takes the memory of a row group.
//!
//! **Retention** removes whole files all of whose rows are older than the cutoff, so it rewrites nothing and a row
//! may live longer, up to its file's youngest. The cutoff stands in the table as `txn("retain", µs)`.
//!
//! **Vacuum** deletes what is in no snapshot of the last `keep`, the leavings of crashed writers too; **the log**
//! is cut at a checkpoint that is older than that. So whoever opened a snapshot can read it for `keep`. Each checkpoint
//! names every file that was removed lately, by Delta's default in the last week: at a commit a second hundreds of
//! megabytes, every 100 commits. So the table itself says that `keep` is enough.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use arrow::{
    array::{ArrayRef, RecordBatch},
    compute::cast,
};
use common::time::Timestamp;
use datafusion::prelude::{SessionConfig, SessionContext};
use deltalake::{
    DeltaTable, checkpoints,
    delta_datafusion::{DeltaScanConfig, DeltaScanNext},
    kernel::{Action, MetadataExt, Transaction, transaction::CommitProperties},
    operations::vacuum::{self, VacuumMode},
    protocol::DeltaOperation,
    writer::{DeltaWriter, RecordBatchWriter},
};
use futures::{StreamExt, TryStreamExt};
use object_store::{ObjectStore, ObjectStoreExt, path::Path};

use super::{Tables, TablesError, splice::splice, version, writer_properties};
use crate::lake::Table;

/// Most bytes of a file that compaction makes, by tier.
pub const TIERS: [u64; 3] = [2 << 20, 16 << 20, 128 << 20];
/// App id of every commit that removes files.
const REWRITE: &str = "rewrite";
/// App id of the instant before which retention has removed rows.
pub(crate) const RETAIN: &str = "retain";
/// Bytes that are rewritten in one commit, unless a single file takes more.
const COMMIT_BYTES: u64 = 128 << 20;
/// Property of a table: for how long its checkpoints name a file that was removed (Delta protocol, "Tombstones").
const REMEMBER_REMOVED: &str = "delta.deletedFileRetentionDuration";
/// A checkpoint is written when the last one is this many versions behind.
const CHECKPOINT_LAG: u64 = 10;

/// What makes a commit of files that are removed fail when another such commit came first.
pub(super) fn fenced(properties: CommitProperties, base: &DeltaTable) -> CommitProperties {
    properties.with_application_transaction(Transaction::new(REWRITE, version(base)))
}

/// A data file, as far as compaction cares.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct File {
    /// When it came, in ms; then its path.
    order: (i64, String),
    size: u64,
}

/// Which files of one partition become one: bins of at least two files and at most a tier's bytes, in the order in
/// which the files came. A tier is due when it has more than `most` files of less than half its bytes; the
/// lowest that is due is taken.
fn bins(mut files: Vec<File>, tiers: &[u64], most: usize) -> Vec<Vec<File>> {
    files.sort();
    let small = |tier: u64| files.iter().filter(move |file| file.size < tier / 2);
    let Some(tier) = tiers.iter().copied().find(|tier| small(*tier).count() > most) else {
        return Vec::new();
    };
    let mut bins: Vec<(u64, Vec<File>)> = Vec::new();
    for file in small(tier) {
        match bins.last_mut().filter(|(bytes, _)| bytes + file.size <= tier) {
            Some((bytes, bin)) => {
                *bytes += file.size;
                bin.push(file.clone());
            }
            None => bins.push((file.size, vec![file.clone()])),
        }
    }
    bins.into_iter().map(|(_, bin)| bin).filter(|bin| bin.len() > 1).collect()
}

impl Tables {
    /// Packs small files of the partitions in which a tier of `tiers` has more than `most`. Returns whether there
    /// was something to do. May run beside any writer, and any number of times at once.
    ///
    /// # Errors
    /// See [`TablesError`]; leaving it undone does no harm.
    pub async fn compact(&self, table: Table, tiers: &[u64], most: usize) -> Result<bool, TablesError> {
        let mut done = false;
        loop {
            let snapshot = self.snapshot(table).await.map_err(|e| TablesError::failed(table, e))?;
            let Some(base) = snapshot else { return Ok(done) };
            let mut bins = due(&base, tiers, most).map_err(|e| TablesError::failed(table, e))?;
            if bins.is_empty() {
                return Ok(done);
            }
            // As many as one commit takes; the rest follows from the next snapshot.
            let mut bytes = 0;
            let taken = bins.iter().take_while(|bin| {
                let fits = bytes < COMMIT_BYTES;
                bytes += bin.iter().map(|file| file.size).sum::<u64>();
                fits
            });
            let taken = taken.count();
            bins.truncate(taken);
            self.rewrite(table, base, &bins).await?;
            done = true;
        }
    }

    async fn rewrite(&self, table: Table, base: DeltaTable, bins: &[Vec<File>]) -> Result<(), TablesError> {
        let failed = |e| TablesError::of(table, e);
        let mut actions = Vec::new();
        for bin in bins {
            let paths: Vec<String> = bin.iter().map(|file| file.order.1.clone()).collect();
            let spliced = splice(self.store(), table, &base, &paths).await;
            if let Some(add) = spliced.map_err(|e| TablesError::failed(table, e))? {
                actions.push(Action::Add(add));
                continue;
            }
            let mut writer = RecordBatchWriter::for_table(&base)
                .map_err(failed)?
                .with_writer_properties(writer_properties(table));
            let mut rows = scan(&base, &paths).await.map_err(|e| TablesError::failed(table, e))?;
            while let Some(batch) = rows.try_next().await.map_err(|e| TablesError::failed(table, e))? {
                let batch = conform(&batch, table).map_err(|e| TablesError::failed(table, e))?;
                writer.write(batch).await.map_err(failed)?;
            }
            let added = writer.flush().await.map_err(failed)?;
            actions.extend(added.into_iter().map(|mut add| {
                add.data_change = false;
                Action::Add(add)
            }));
        }
        let gone: HashSet<&str> = bins.iter().flatten().map(|file| file.order.1.as_str()).collect();
        for file in base.snapshot().map_err(failed)?.log_data().iter() {
            if gone.contains(file.path().as_ref()) {
                actions.push(Action::Remove(file.remove_action(false)));
            }
        }
        let operation = DeltaOperation::Optimize {
            predicate: None,
            target_size: i64::try_from(COMMIT_BYTES).expect("128 MiB"),
        };
        let files = actions.len();
        self.commit_rewrite(table, base, actions, operation, None).await?;
        tracing::debug!(table = table.path(), removed = gone.len(), added = files - gone.len(), "compacted");
        Ok(())
    }

    /// Removes the files all of whose rows have a `time` before `cutoff`, of those that `judged` has already, and notes
    /// it ([`Tables::retained`]). Returns how many. Without such a file nothing is noted.
    ///
    /// # Errors
    /// See [`TablesError`]; leaving it undone does no harm.
    pub async fn remove_before(
        &self,
        table: Table,
        judged: Option<&DeltaTable>,
        time: &str,
        cutoff: Timestamp,
    ) -> Result<usize, TablesError> {
        let failed = |e| TablesError::of(table, e);
        let Some(judged) = judged else { return Ok(0) };
        let judged: HashSet<String> = judged
            .snapshot()
            .map_err(failed)?
            .log_data()
            .iter()
            .map(|file| file.path().into_owned())
            .collect();
        // A removal that follows from an older state than another's append is refused.
        let snapshot = self.snapshot(table).await.map_err(|e| TablesError::failed(table, e))?;
        let Some(base) = snapshot else { return Ok(0) };
        let mut actions = Vec::new();
        for file in base.snapshot().map_err(failed)?.log_data().iter() {
            // Statistics cut instants down to milliseconds.
            let newest = file.stats().and_then(|stats| newest(&stats, time));
            let expired = newest.is_some_and(|newest| newest + Duration::from_millis(1) <= cutoff);
            if expired && judged.contains(file.path().as_ref()) {
                actions.push(Action::Remove(file.remove_action(true)));
            }
        }
        let files = actions.len();
        if files > 0 {
            let before = Tables::retained(&base).await.map_err(|e| TablesError::failed(table, e))?;
            let cutoff = before.map_or(cutoff, |before| before.max(cutoff));
            let operation = DeltaOperation::Delete { predicate: Some(format!("{time} < '{cutoff}'")) };
            let note = Transaction::new(RETAIN, cutoff.as_micros());
            self.commit_rewrite(table, base, actions, operation, Some(note)).await?;
        }
        Ok(files)
    }

    /// The instant before which retention has removed rows of a table, so that its rows before it prove nothing.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub async fn retained(snapshot: &DeltaTable) -> anyhow::Result<Option<Timestamp>> {
        Ok(Tables::progress(snapshot, RETAIN).await?.map(Timestamp::from_micros))
    }

    async fn commit_rewrite(
        &self,
        table: Table,
        base: DeltaTable,
        actions: Vec<Action>,
        operation: DeltaOperation,
        note: Option<Transaction>,
    ) -> Result<(), TablesError> {
        let mut properties =
            fenced(CommitProperties::default(), &base).with_cleanup_expired_logs(Some(false));
        if let Some(note) = note {
            properties = properties.with_application_transaction(note);
        }
        self.commit(table, base, actions, operation, properties).await.map(drop)
    }

    /// Deletes the files that are in no snapshot of the last `keep`. Returns how many.
    ///
    /// # Errors
    /// See [`TablesError`]; what was deleted until then is gone for good, and nobody needs it.
    pub async fn vacuum(&self, table: Table, keep: Duration, now: Timestamp) -> Result<usize, TablesError> {
        let snapshot = self.snapshot(table).await.map_err(|e| TablesError::failed(table, e))?;
        let Some(base) = snapshot else { return Ok(0) };
        let keep = chrono::Duration::from_std(keep).map_err(|e| TablesError::failed(table, e))?;
        // delta-rs would name what is long gone at each run, and commit twice to say so.
        let (_, metrics) = base
            .vacuum()
            .with_mode(VacuumMode::Full)
            .with_retention_period(keep)
            .with_enforce_retention_duration(false)
            .with_clock(Arc::new(At(now)))
            .with_dry_run(true)
            .await
            .map_err(|e| TablesError::of(table, e))?;
        let needless: HashSet<String> =
            metrics.files_deleted.into_iter().map(|path| format!("{}/{path}", table.path())).collect();
        self.delete_of(table, &needless).await.map_err(|e| TablesError::failed(table, e))
    }

    /// Deletes those objects of a table that are there.
    async fn delete_of(&self, table: Table, paths: &HashSet<String>) -> object_store::Result<usize> {
        if paths.is_empty() {
            return Ok(0);
        }
        let objects = self.store().objects();
        let mut listed = objects.list(Some(&Path::from(table.path())));
        let mut found = Vec::new();
        while let Some(object) = listed.try_next().await? {
            if paths.contains(object.location.as_ref()) {
                found.push(Ok(object.location));
            }
        }
        let deleted = objects.delete_stream(futures::stream::iter(found).boxed());
        // Another run may have been faster.
        let gone = |result: &object_store::Result<Path>| {
            !matches!(result, Err(object_store::Error::NotFound { .. }))
        };
        Ok(deleted.filter(|result| std::future::ready(gone(result))).try_collect::<Vec<Path>>().await?.len())
    }

    /// Has checkpoints name removed files for `keep`, writes one when the last one lies behind, and deletes the log before
    /// one that is older than `keep`. Returns how many entries went.
    ///
    /// # Errors
    /// See [`TablesError`]; nothing is half done.
    pub async fn tidy_log(&self, table: Table, keep: Duration, now: Timestamp) -> Result<usize, TablesError> {
        let failed = |e| TablesError::of(table, e);
        let Some(base) = self.remember_removed(table, keep).await? else { return Ok(0) };
        let at = base.version().unwrap_or(0);
        let last = self.last_checkpoint(table).await.map_err(|e| TablesError::failed(table, e))?;
        if at - last.min(at) >= CHECKPOINT_LAG {
            checkpoints::create_checkpoint(&base, None).await.map_err(failed)?;
        }
        let cutoff = (now - keep).as_micros() / 1_000;
        let log = base.log_store();
        checkpoints::cleanup_expired_logs_for(at, log.as_ref(), cutoff, None).await.map_err(failed)
    }

    /// Sets [`REMEMBER_REMOVED`]; a commit that is under way meanwhile meets a conflict, once. Returns the newest snapshot.
    async fn remember_removed(
        &self,
        table: Table,
        keep: Duration,
    ) -> Result<Option<DeltaTable>, TablesError> {
        let newest = async || self.snapshot(table).await.map_err(|e| TablesError::failed(table, e));
        let Some(base) = newest().await? else { return Ok(None) };
        let (key, wanted) = (REMEMBER_REMOVED.to_owned(), format!("interval {} seconds", keep.as_secs()));
        let metadata = base.snapshot().map_err(|e| TablesError::of(table, e))?.metadata();
        if metadata.configuration().get(&key) == Some(&wanted) {
            return Ok(Some(base));
        }
        let changed = metadata.clone().add_config_key(key.clone(), wanted.clone());
        let actions = vec![Action::Metadata(changed.map_err(|e| TablesError::failed(table, e))?)];
        let operation = DeltaOperation::SetTableProperties { properties: [(key, wanted)].into() };
        let properties = CommitProperties::default().with_cleanup_expired_logs(Some(false));
        self.commit(table, base, actions, operation, properties).await?;
        newest().await
    }

    /// Version of the table's last checkpoint; 0 for none.
    async fn last_checkpoint(&self, table: Table) -> anyhow::Result<u64> {
        let path = Path::from(format!("{}/_delta_log/_last_checkpoint", table.path()));
        match self.store().objects().get(&path).await {
            Ok(found) => {
                let hint: serde_json::Value = serde_json::from_slice(&found.bytes().await?)
                    .with_context(|| format!("reading {path}"))?;
                Ok(hint.get("version").and_then(serde_json::Value::as_u64).unwrap_or(0))
            }
            Err(object_store::Error::NotFound { .. }) => Ok(0),
            Err(e) => Err(e.into()),
        }
    }
}

/// The time that a vacuum is handed.
#[derive(Debug)]
struct At(Timestamp);

impl vacuum::Clock for At {
    fn current_timestamp_millis(&self) -> i64 {
        self.0.as_micros() / 1_000
    }
}

fn due(base: &DeltaTable, tiers: &[u64], most: usize) -> anyhow::Result<Vec<Vec<File>>> {
    let mut partitions = BTreeMap::<String, Vec<File>>::new();
    for file in base.snapshot()?.log_data().iter() {
        let path = file.path().into_owned();
        let partition = path.rsplit_once('/').map_or(String::new(), |(folder, _)| folder.to_owned());
        let size = u64::try_from(file.size()).unwrap_or(0);
        partitions.entry(partition).or_default().push(File { order: (file.modification_time(), path), size });
    }
    Ok(partitions.into_values().flat_map(|files| bins(files, tiers, most)).collect())
}

/// The rows of some files, one file after the other.
async fn scan(
    base: &DeltaTable,
    paths: &[String],
) -> anyhow::Result<datafusion::execution::SendableRecordBatchStream> {
    let config = SessionConfig::new()
        .with_target_partitions(1)
        .set_bool("datafusion.execution.parquet.schema_force_view_types", false);
    let context = SessionContext::new_with_config(config);
    let state = context.state();
    base.update_datafusion_session(&state)?;
    let scan = DeltaScanConfig::new_from_session(&state).with_wrap_partition_values(false);
    let files = base.snapshot()?.snapshot().clone();
    let provider = DeltaScanNext::new(files, scan)?.with_file_paths(paths.iter().cloned());
    Ok(context.read_table(Arc::new(provider))?.execute_stream().await?)
}

/// The table's columns, in its types.
pub(crate) fn conform(batch: &RecordBatch, table: Table) -> anyhow::Result<RecordBatch> {
    let schema = table.schema();
    let columns = schema.fields().iter().map(|field| -> anyhow::Result<ArrayRef> {
        let column =
            batch.column_by_name(field.name()).with_context(|| format!("no column {}", field.name()))?;
        Ok(cast(column, field.data_type())?)
    });
    let columns: Vec<ArrayRef> = columns.collect::<Result<_, _>>()?;
    Ok(RecordBatch::try_new(schema, columns)?)
}

fn newest(stats: &str, time: &str) -> Option<Timestamp> {
    let stats: serde_json::Value = serde_json::from_str(stats).ok()?;
    stats.get("maxValues")?.get(time)?.as_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use arrow::{
        array::{Array, AsArray, Int64Array, StringArray, TimestampMicrosecondArray},
        datatypes::Int64Type,
    };
    use common::time::{Clock, SystemClock};
    use parquet::arrow::arrow_reader::ParquetRecordBatchReader;
    use proptest::prelude::*;

    use super::*;
    use crate::store::Store;

    const TABLE: Table = Table::QualityResults;
    const EVERY: [u64; 1] = [TIERS[2]];

    fn row(plan: i64, rule: &str) -> Vec<RecordBatch> {
        let columns: Vec<ArrayRef> = vec![
            Arc::new(Int64Array::from(vec![plan])),
            Arc::new(StringArray::from(vec![rule])),
            Arc::new(Int64Array::from(vec![1])),
            Arc::new(Int64Array::from(vec![2])),
            Arc::new(StringArray::from(vec![None::<&str>])),
            Arc::new(TimestampMicrosecondArray::from(vec![plan * 1_000_000]).with_timezone("UTC")),
        ];
        vec![RecordBatch::try_new(TABLE.schema(), columns).unwrap()]
    }

    async fn append(tables: &Tables, plan: i64) -> Result<i64, TablesError> {
        let base = tables.snapshot(TABLE).await.unwrap();
        tables.append(TABLE, base, row(plan, "a"), ("refine", plan)).await
    }

    /// Rows, and distinct ones.
    async fn count(tables: &Tables) -> (i64, i64) {
        let sql = "select count(*), count(distinct plan) from ops.quality_results";
        let rows = tables.session().await.unwrap().sql(sql).await.unwrap().collect().await.unwrap();
        let at = |column: usize| rows[0].column(column).as_primitive::<Int64Type>().value(0);
        (at(0), at(1))
    }

    async fn with_rows(n: i64) -> Tables {
        let tables = Tables::open(&Store::open("memory:///").unwrap()).await.unwrap();
        for plan in 1..=n {
            append(&tables, plan).await.unwrap();
        }
        tables
    }

    proptest! {
        #[test]
        fn bins_hold_small_files_once_in_order(
            sizes in prop::collection::vec(1u64..3_000_000, 0..80), most in 1usize..30,
        ) {
            let tiers = [1_000_000, 4_000_000];
            let files: Vec<File> = (0..).zip(&sizes).map(|(n, size)| File { order: (n, "f".into()), size: *size }).collect();
            let bins = bins(files.clone(), &tiers, most);
            let small = |tier: u64| files.iter().filter(|file| file.size < tier / 2).count();
            prop_assert!(bins.is_empty() || tiers.iter().any(|tier| small(*tier) > most));
            let tier = if small(tiers[0]) > most { tiers[0] } else { tiers[1] };
            let taken: Vec<&File> = bins.iter().flatten().collect();
            prop_assert!(taken.windows(2).all(|pair| pair[0].order < pair[1].order));
            prop_assert!(taken.iter().all(|file| file.size < tier / 2));
            for bin in &bins {
                prop_assert!(bin.len() > 1 && bin.iter().map(|file| file.size).sum::<u64>() <= tier);
            }
            if small(tier) > most {
                // Two files of less than half always fit together, so at most the last is alone.
                prop_assert!(taken.len() + 1 >= small(tier));
            }
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn of_two_rewrites_of_the_same_files_one_fails() {
        let tables = with_rows(8).await;
        let base = tables.snapshot(TABLE).await.unwrap().unwrap();
        let bins = due(&base, &EVERY, 2).unwrap();
        assert_eq!((bins.len(), bins[0].len()), (1, 8));
        tables.rewrite(TABLE, base.clone(), &bins).await.unwrap();
        let again = tables.rewrite(TABLE, base.clone(), &bins).await;
        assert_eq!(count(&tables).await, (8, 8), "{again:?}");
        assert!(matches!(again, Err(TablesError::Conflict { .. })), "{again:?}");

        let replaced =
            tables.replace(TABLE, Some(base.clone()), Some("plan = 3"), row(3, "b"), ("x", 1)).await;
        assert_eq!(count(&tables).await, (8, 8), "{replaced:?}");
        assert!(matches!(replaced, Err(TablesError::Conflict { .. })), "{replaced:?}");

        // The other way round, and a whole replacement.
        let tables = with_rows(8).await;
        let base = tables.snapshot(TABLE).await.unwrap().unwrap();
        let bins = due(&base, &EVERY, 2).unwrap();
        tables.replace(TABLE, Some(base.clone()), None, row(3, "b"), ("x", 1)).await.unwrap();
        let late = tables.rewrite(TABLE, base, &bins).await;
        assert_eq!(count(&tables).await, (1, 1), "{late:?}");
        assert!(matches!(late, Err(TablesError::Conflict { .. })), "{late:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn files_are_packed_while_a_writer_goes_on() {
        let tables = with_rows(8).await;
        let base = tables.snapshot(TABLE).await.unwrap().unwrap();
        let bins = due(&base, &EVERY, 2).unwrap();
        // Appended after the compaction has read, before it commits; and from a snapshot before it.
        append(&tables, 9).await.unwrap();
        tables.rewrite(TABLE, base, &bins).await.unwrap();
        let stale = tables.snapshot(TABLE).await.unwrap();
        append(&tables, 10).await.unwrap();
        assert!(tables.compact(TABLE, &EVERY, 1).await.unwrap());
        tables.append(TABLE, stale, row(11, "a"), ("another", 11)).await.unwrap();
        assert_eq!(count(&tables).await, (11, 11));
        assert_eq!(
            Tables::progress(&tables.snapshot(TABLE).await.unwrap().unwrap(), "refine").await.unwrap(),
            Some(10)
        );
    }

    async fn expire(tables: &Tables, cutoff: Timestamp) -> usize {
        let judged = tables.snapshot(TABLE).await.unwrap();
        tables.remove_before(TABLE, judged.as_ref(), "received_at", cutoff).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_comes_while_files_expire_stays() {
        let tables = with_rows(4).await;
        let judged = tables.snapshot(TABLE).await.unwrap();
        append(&tables, 5).await.unwrap();
        let cutoff = Timestamp::from_micros(9_000_000);
        let removed = tables.remove_before(TABLE, judged.as_ref(), "received_at", cutoff).await;
        assert_eq!(removed.unwrap(), 4);
        assert_eq!(count(&tables).await, (1, 1));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn whole_files_expire_and_old_versions_are_vacuumed() {
        let tables = with_rows(12).await;
        let old = tables.snapshot(TABLE).await.unwrap().unwrap();
        let at = |seconds: i64| Timestamp::from_micros(seconds * 1_000_000);
        assert_eq!(expire(&tables, at(1)).await, 0);
        assert_eq!(Tables::retained(&old).await.unwrap(), None);
        // The statistics are of milliseconds: the one at 5 s may be up to 1 ms younger.
        assert_eq!(expire(&tables, at(5)).await, 4);
        assert_eq!(expire(&tables, at(5)).await, 0);
        let now = tables.snapshot(TABLE).await.unwrap().unwrap();
        assert_eq!(Tables::retained(&now).await.unwrap(), Some(at(5)));
        assert_eq!(count(&tables).await, (8, 8));

        let hour = Duration::from_secs(3600);
        let real: Timestamp = Timestamp::from_micros(
            now.snapshot().unwrap().log_data().iter().map(|f| f.modification_time()).max().unwrap() * 1_000,
        );
        assert_eq!(tables.vacuum(TABLE, hour, real + hour / 2).await.unwrap(), 0, "a reader may need them");
        assert_eq!(tables.vacuum(TABLE, hour, real + 2 * hour).await.unwrap(), 4);
        assert_eq!(tables.vacuum(TABLE, hour, real + 2 * hour).await.unwrap(), 0);
        assert_eq!(tables.tidy_log(TABLE, hour, real + hour / 2).await.unwrap(), 0);
        assert!(tables.tidy_log(TABLE, hour, real + 2 * hour).await.unwrap() >= 12);
        assert_eq!(tables.tidy_log(TABLE, hour, real + 2 * hour).await.unwrap(), 0);
        append(&tables, 20).await.unwrap();
        let reopened = Tables::open(tables.store()).await.unwrap();
        assert_eq!(count(&reopened).await, (9, 9));
        assert_eq!(
            Tables::retained(&reopened.snapshot(TABLE).await.unwrap().unwrap()).await.unwrap(),
            Some(at(5))
        );
    }

    /// Removed files that the newest checkpoint names.
    async fn removed(tables: &Tables) -> usize {
        let version = tables.last_checkpoint(TABLE).await.unwrap();
        let path = format!("{}/_delta_log/{version:020}.checkpoint.parquet", TABLE.path());
        let bytes = tables.store().objects().get(&Path::from(path)).await.unwrap().bytes().await.unwrap();
        let rows = ParquetRecordBatchReader::try_new(bytes, 1_024).unwrap().map(Result::unwrap);
        let remove = |batch: RecordBatch| batch.column_by_name("remove").unwrap().clone();
        rows.map(remove).map(|remove| remove.len() - remove.null_count()).sum()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_checkpoint_forgets_what_was_removed_before_the_versions_that_are_kept() {
        let tables = with_rows(12).await;
        assert_eq!(expire(&tables, Timestamp::from_micros(5_000_000)).await, 4);
        let (hour, now) = (Duration::from_secs(3600), SystemClock.now());
        tables.tidy_log(TABLE, hour, now).await.unwrap();
        assert_eq!(removed(&tables).await, 4);
        // What is under way when a table's word changes is taken again.
        let stale = tables.snapshot(TABLE).await.unwrap();
        for plan in 13..=23 {
            append(&tables, plan).await.unwrap();
        }
        tables.tidy_log(TABLE, Duration::ZERO, now).await.unwrap();
        let late = tables.append(TABLE, stale, row(24, "a"), ("another", 24)).await;
        assert!(matches!(late, Err(TablesError::Conflict { .. })), "{late:?}");
        assert_eq!((removed(&tables).await, count(&tables).await), (0, (19, 19)));
        let version = version(&tables.snapshot(TABLE).await.unwrap().unwrap());
        tables.tidy_log(TABLE, Duration::ZERO, now).await.unwrap();
        let same = tables.snapshot(TABLE).await.unwrap().unwrap();
        assert_eq!(super::version(&same), version, "it stands there already");
    }
}

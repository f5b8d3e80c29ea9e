//! The columns of tables that stand there, when another build made them.
//!
//! What is in silver and ops is nowhere else: with other columns than this build writes, they stop the start. Gold
//! follows from silver: **one commit** gives such a table its columns, and takes its progress back
//! ([`Tables::progress`] says `None`), so gold's next step makes it again, as it does after any crash in between.
//!
//! * Files stay where all columns that are new may be null: then their rows stand until gold has computed them, and
//!   those whose readings retention has removed stay for good. Otherwise they are removed in the same commit.
//! * Where retention has removed readings, removing the hours that were made of them would lose them: that, too, stops
//!   the start.
//! * Tables of rules have the columns of their rule, see [`crate::rules`].

use std::fmt;

use anyhow::Context;
use deltalake::{
    DeltaTable,
    kernel::{Action, MetadataExt, StructType, engine::arrow_conversion::TryIntoKernel, new_metadata},
    protocol::{DeltaOperation, SaveMode},
};

use super::{Tables, TablesError, properties, rewrite::fenced};
use crate::{gold, lake::Table};

/// How the columns that stand there differ from those of this build.
#[derive(Debug, Default, PartialEq, Eq)]
struct Difference {
    /// What the table lacks; `false` for a column that may not be null.
    lacking: Vec<(String, bool)>,
    /// What this build does not know.
    unknown: Vec<String>,
    /// What is something else, and what it is.
    other: Vec<String>,
}

impl Difference {
    fn between(stands: &StructType, wanted: &StructType) -> Difference {
        let mut difference = Difference::default();
        for field in wanted.fields() {
            let name = field.name();
            match stands.field(name) {
                None => difference.lacking.push((name.clone(), field.is_nullable())),
                Some(old) if old.data_type() != field.data_type() => {
                    let (old, new) = (old.data_type(), field.data_type());
                    difference.other.push(format!("{name} is {old} instead of {new}"));
                }
                Some(old) if old.is_nullable() && !field.is_nullable() => {
                    difference.other.push(format!("{name} may be null"));
                }
                Some(_) => {}
            }
        }
        let unknown = stands.fields().map(|field| field.name()).filter(|name| wanted.field(name).is_none());
        difference.unknown = unknown.cloned().collect();
        difference
    }

    fn is_none(&self) -> bool {
        *self == Difference::default()
    }

    /// Whether rows that stand there are rows of the new columns.
    fn spares_rows(&self) -> bool {
        self.other.is_empty() && self.lacking.iter().all(|(_, nullable)| *nullable)
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lacking: Vec<&str> = self.lacking.iter().map(|(name, _)| name.as_str()).collect();
        let parts = [
            (!lacking.is_empty()).then(|| format!("lacks {}", lacking.join(", "))),
            (!self.unknown.is_empty())
                .then(|| format!("has {}, which this build does not know", self.unknown.join(", "))),
            (!self.other.is_empty()).then(|| self.other.join(", ")),
        ];
        f.write_str(&parts.into_iter().flatten().collect::<Vec<_>>().join("; "))
    }
}

impl Tables {
    /// Sees to it that every table has the columns of this build, before anything is written.
    ///
    /// # Errors
    /// Names a table that cannot be given them, its columns, and what to do; or the store that fails.
    pub async fn settle_columns(&self) -> anyhow::Result<()> {
        for table in Table::ALL {
            // Until it is done, by this process or another.
            while let Some(base) = self.snapshot(table).await? {
                let wanted: StructType = table.schema().as_ref().try_into_kernel()?;
                let stands = base.snapshot()?.schema();
                let difference = Difference::between(&stands, &wanted);
                if difference.is_none() {
                    break;
                }
                self.may_be_made_again(table, &difference).await?;
                let path = table.path();
                match self.make_again(table, base, &wanted, &difference).await {
                    Ok(()) => tracing::warn!(
                        table = path,
                        columns = %difference,
                        "another build made this table; it is made again from silver"
                    ),
                    Err(TablesError::Conflict { .. }) => {}
                    Err(e) => return Err(e).context("giving it the columns of this build"),
                }
            }
        }
        Ok(())
    }

    async fn may_be_made_again(&self, table: Table, difference: &Difference) -> anyhow::Result<()> {
        let (path, url) = (table.path(), self.store.url());
        if table.layer() != "gold" {
            anyhow::bail!(
                "{path} in {url} {difference}: another build made it, and this one can neither write nor change it; \
                 run that build, or make another lake of this one's bronze: `cloud-ingest rebuild --into URL`, copy \
                 the folder bronze there too, and set store.url to it"
            );
        }
        if difference.spares_rows() {
            return Ok(());
        }
        for silver in [Table::SensorReadings, Table::Aggregates] {
            let Some(silver) = self.snapshot(silver).await? else { continue };
            if let Some(cutoff) = Tables::retained(&silver).await? {
                anyhow::bail!(
                    "{path} in {url} {difference}: another build made it. It cannot be made again as it was: retention \
                     has removed readings before {cutoff}. Run that build; or move the folder {path} away to have the \
                     table made of what silver holds"
                );
            }
        }
        Ok(())
    }

    async fn make_again(
        &self,
        table: Table,
        base: DeltaTable,
        wanted: &StructType,
        difference: &Difference,
    ) -> Result<(), TablesError> {
        let state = base.snapshot().map_err(|e| TablesError::of(table, e))?;
        let old = state.metadata();
        let metadata = new_metadata(wanted, table.partitions().iter().copied(), old.configuration())
            .and_then(|new| new.with_table_id(old.id().to_owned()))
            .and_then(|new| new.with_name(table.name().to_owned()))
            .map_err(|e| TablesError::failed(table, e))?;
        let mut actions = vec![Action::Metadata(metadata)];
        if !difference.spares_rows() {
            actions.extend(state.log_data().iter().map(|file| Action::Remove(file.remove_action(true))));
        }
        let operation =
            DeltaOperation::Write { mode: SaveMode::Overwrite, partition_by: None, predicate: None };
        let taken_back = fenced(properties((gold::SILVER, gold::NONE)), &base);
        self.commit(table, base, actions, operation, taken_back).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use arrow::datatypes::{DataType, Field, Schema};

    use super::*;

    fn columns(fields: &[(&str, DataType, bool)]) -> StructType {
        let fields = fields.iter().map(|(name, of, nullable)| Field::new(*name, of.clone(), *nullable));
        (&Schema::new(fields.collect::<Vec<_>>())).try_into_kernel().unwrap()
    }

    #[test]
    fn what_differs_is_named() {
        let wanted = columns(&[
            ("a", DataType::Int64, false),
            ("b", DataType::Utf8, true),
            ("c", DataType::Float64, false),
        ]);
        let check = |stands: &[(&str, DataType, bool)], text: &str, spares_rows: bool| {
            let difference = Difference::between(&columns(stands), &wanted);
            assert_eq!((difference.to_string().as_str(), difference.spares_rows()), (text, spares_rows));
        };
        let (a, b, c) =
            (("a", DataType::Int64, false), ("b", DataType::Utf8, true), ("c", DataType::Float64, false));
        // Their order is no difference, nor that more may be null than is.
        check(&[c.clone(), b.clone(), a.clone()], "", true);
        check(&[a.clone(), ("b", DataType::Utf8, false), c.clone()], "", true);
        check(&[a.clone(), c.clone()], "lacks b", true);
        check(
            &[b.clone(), ("d", DataType::Utf8, true)],
            "lacks a, c; has d, which this build does not know",
            false,
        );
        check(&[("a", DataType::Utf8, false), b.clone(), c.clone()], "a is string instead of long", false);
        check(&[a, b, ("c", DataType::Float64, true)], "c may be null", false);
    }
}

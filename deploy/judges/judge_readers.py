"""Judges whether readers that share no code with a lake's writer say the same of every column of its tables.

    judge_readers.py LAKE

Polars and Sail, an engine that speaks Spark's protocol, beside Python deltalake with pyarrow (DuckDB is in judge_lake.py).
Of a column of text: values, different values, least and greatest; of numbers and instants the sum, least and greatest.
"""

import math
import os
import sys
import time
from datetime import UTC
from pathlib import Path

os.environ["TZ"] = "UTC"  # Spark's clients show instants in the zone of the process
time.tzset()

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from pysail.spark import SparkConnectServer
from pyspark.sql import SparkSession

from report import Report


# No column's name.
ROWS = "|rows"


def kind(of):
    if pa.types.is_string(of) or pa.types.is_large_string(of) or pa.types.is_string_view(of):
        return "text"
    if pa.types.is_temporal(of):
        return "instant"
    return "truth" if pa.types.is_boolean(of) else "number"


def different(column):
    return pc.count_distinct(column, mode="only_valid")


def by_arrow(path):
    """Kinds of columns, and what pyarrow says of them."""
    table = DeltaTable(path).to_pyarrow_dataset().to_table()
    kinds = {field.name: kind(field.type) for field in table.schema}
    told = {ROWS: table.num_rows}
    for name, of in kinds.items():
        column = table[name]
        told[name] = [len(column) - column.null_count]
        if of == "text":
            told[name] += [f(column).as_py() for f in (different, pc.min, pc.max)]
        elif of == "truth":
            told[name] += [pc.sum(column).as_py()]
        else:
            ends = (pc.min, pc.max, pc.sum) if of == "number" else (pc.min, pc.max)
            told[name] += [f(column).as_py() for f in ends]
    return kinds, told


def by_polars(path, kinds):
    table = pl.scan_delta(path)
    wanted = [pl.len().alias(ROWS)]
    for name, of in kinds.items():
        column = pl.col(name)
        parts = {"count": column.count()}
        if of == "text":
            parts |= {"distinct": column.drop_nulls().n_unique(), "min": column.min(), "max": column.max()}
        elif of == "truth":
            parts |= {"sum": column.sum()}
        else:
            parts |= {"min": column.min(), "max": column.max()} | ({"sum": column.sum()} if of == "number" else {})
        wanted += [part.alias(f"{name}|{what}") for what, part in parts.items()]
    return told(table.select(wanted).collect().to_dicts()[0])


def by_sail(spark, path, kinds):
    wanted = [f"count(*) AS `{ROWS}`"]
    for name, of in kinds.items():
        whats = {"text": ["distinct", "min", "max"], "truth": ["sum"], "instant": ["min", "max"]}
        for what in ["count", *whats.get(of, ["min", "max", "sum"])]:
            column = f"`{name}`"
            sql = {"distinct": f"count(DISTINCT {column})"}.get(what, f"{what}({column})")
            sql = f"sum(CAST({column} AS INT))" if of == "truth" and what == "sum" else sql
            wanted.append(f"{sql} AS `{name}|{what}`")
    return told(spark.read.format("delta").load(path).selectExpr(*wanted).collect()[0].asDict())


def told(row):
    """One row of aggregates as by_arrow has it."""
    columns = {ROWS: row.pop(ROWS)}
    for name, value in row.items():
        columns.setdefault(name.split("|")[0], []).append(value)
    return columns


def same(a, b):
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if hasattr(a, "astimezone") and hasattr(b, "astimezone"):
        return a.astimezone(UTC) == b.astimezone(UTC)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    # A sum over nothing is nothing to some, and 0 to others.
    return a == b or {a, b} == {None, 0}


def main():
    lake = Path(sys.argv[1]).resolve()
    report = Report("readers")
    server = SparkConnectServer()
    server.start(background=True)
    spark = SparkSession.builder.remote(f"sc://127.0.0.1:{server.listening_address[1]}").getOrCreate()
    tables = sorted(log.parent for layer in ("silver", "gold", "ops") for log in (lake / layer).glob("*/_delta_log"))
    report.check(bool(tables), f"{lake} has tables")
    for table in tables:
        path, name = str(table), f"{table.parent.name}/{table.name}"
        kinds, arrow = by_arrow(path)
        for reader, says in (("Polars", by_polars(path, kinds)), ("Sail", by_sail(spark, path, kinds))):
            other = [f"{c}: {says.get(c)} instead of {arrow[c]}" for c in arrow if not same(arrow[c], says.get(c))]
            report.none(other, f"{reader} reads {name}: {arrow[ROWS]} rows, {len(kinds)} columns")
    spark.stop()
    server.stop()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

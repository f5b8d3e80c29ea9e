"""Reads the golden messages of the wire with pyarrow and checks their columns, values and metadata.

    judge_wire.py common/tests/golden
"""

import sys
from datetime import datetime, timezone
from pathlib import Path
from uuid import UUID

import pyarrow as pa

from report import Report

INSTANT, TEXT, FLOAT, INT = pa.timestamp("us", tz="UTC"), pa.dictionary(pa.int32(), pa.string()), pa.float64(), pa.int64()
DEVICE = [("device_id", TEXT), ("device_type", TEXT), ("asset_id", TEXT), ("unit", TEXT), ("kind", TEXT)]

# As the table in common/src/wire.rs has them.
COLUMNS = {
    "readings": [("ts", INSTANT), *DEVICE, ("value", FLOAT), ("quality", pa.uint8())],
    "aggregates": [
        ("window_start", INSTANT), ("window_end", INSTANT), *DEVICE, ("count", INT), ("bad_count", INT),
        *((name, FLOAT) for name in ("min", "max", "mean", "stddev", "first", "last")),
        ("covered_from", INSTANT), ("covered_to", INSTANT), ("partial", pa.bool_()), ("revision", pa.int32())],
    "anomalies": [
        ("event_id", pa.string()),
        *((name, TEXT) for name in ("state", "asset_id", "device_id", "model", "model_sha256", "severity")),
        ("score", FLOAT), ("threshold", FLOAT), ("started_at", INSTANT), ("ended_at", INSTANT), ("reason", pa.string())],
    "control": [
        ("record", TEXT), ("ts", INSTANT), ("epoch", pa.string()), ("lane", TEXT), ("first_seq", INT),
        ("last_seq", INT), ("readings", INT), ("from", INSTANT), ("to", INSTANT), ("reason", pa.string())],
}
NUMBERS = ["seq", "rows", "rows_before", "oldest"]


def judge_file(report, path, lane):
    try:
        with pa.ipc.open_stream(path) as reader:
            schema, batches = reader.schema, list(reader)
    except (OSError, pa.ArrowInvalid) as e:
        report.check(False, f"{path.name} is an Arrow IPC stream", e)
        return None
    report.check(len(batches) == 1, f"{path.name} holds one batch", f"{len(batches)} batches")
    got = [(field.name, field.type) for field in schema]
    report.check(got == COLUMNS[lane], f"{path.name} has the columns of {lane}", f"has   {got}\nwants {COLUMNS[lane]}")
    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    try:
        report.check(int(metadata["v"]) == 1, f"{path.name}: wire version 1", metadata)
        report.check(metadata["lane"] == lane, f"{path.name}: lane", metadata)
        report.check(UUID(metadata["epoch"]).version == 7, f"{path.name}: the epoch is a UUIDv7", metadata)
        report.check(all(int(metadata[key]) >= 0 for key in NUMBERS), f"{path.name}: {', '.join(NUMBERS)}", metadata)
        rows = sum(batch.num_rows for batch in batches)
        report.check(int(metadata["rows"]) == rows, f"{path.name}: rows = {rows}", metadata)
        sealed = datetime.fromisoformat(metadata["sealed_at"])
        report.check(sealed.utcoffset() is not None, f"{path.name}: sealed_at has a time zone", metadata)
        report.check(metadata["clock"] in ("synced", "unsynced"), f"{path.name}: clock", metadata)
    except (KeyError, ValueError) as e:
        report.check(False, f"{path.name}: the identity can be read", f"{e!r} in {metadata}")
    return batches[0].to_pylist() if batches else None


def main():
    folder = Path(sys.argv[1])
    report = Report("judge_wire")
    rows = {lane: judge_file(report, folder / f"v1-{lane}.arrow", lane) for lane in COLUMNS}
    for lane in COLUMNS:
        # The same as its sender has signed it.
        path = folder / f"v1-{lane}-signed.arrow"
        report.check(judge_file(report, path, lane) == rows[lane], f"{path.name} holds the same rows")
        with pa.ipc.open_stream(path) as reader:
            said = [reader.schema.metadata.get(key) for key in (b"site", b"gateway")]
        report.check(said == [b"plant", b"gw-1"], f"{path.name} says whose it is", said)
    # Values, as common/tests/wire.rs wrote them.
    if rows["readings"]:
        first, second = rows["readings"]
        report.check(
            first == {
                "ts": datetime(2026, 3, 1, 6, tzinfo=timezone.utc), "device_id": "reactor/temp",
                "device_type": "temperature", "asset_id": "reactor", "unit": "Cel", "kind": "gauge", "value": 120.4,
                "quality": 0},
            "the first reading is what was written", first)
        report.check(second["value"] is None and second["quality"] == 2, "a bad reading is null", second)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

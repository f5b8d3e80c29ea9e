"""A judge that cannot fail is worthless: a small sound lake passes, and every planted defect is found.

    test_judge_lake.py
"""

import hashlib
import math
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from deltalake import write_deltalake

from report import Report

HERE = Path(__file__).parent
ANCHOR = datetime(2026, 3, 1, tzinfo=timezone.utc)
HOURS = 24
STEP = timedelta(minutes=7)
SITE, GATEWAY, EPOCH = "plant-1", "gw-1", "0197a000-0000-7000-8000-00000000000e"
TYPES = ["temperature", "pressure", "flow", "level"]
INSTANT = pa.timestamp("us", tz="UTC")
PLANT = """
[loop]
row_s = 180
start_s = 5400
crossfade_s = 1800
""" + "".join(f'[[loop.segment]]\nfault = "{f}"\nfirst_row = 39\nonset_row = 159\nend_row = 199\n' for f in ("d01", "d02", "d06"))


def minutes(n):
    return ANCHOR + timedelta(minutes=n)


def sound():
    """Every table of a lake in which all is right, as lists of rows."""
    base = {"site": SITE, "gateway_id": GATEWAY, "epoch": EPOCH}
    readings, messages, bronze = [], [], []
    at, seq = ANCHOR, 0
    while at < ANCHOR + timedelta(hours=HOURS):
        for n, device_type in enumerate(TYPES):
            step = (at - ANCHOR) // STEP
            bad = step % 50 == 7
            readings.append(base | {
                "ts": at, "device_id": f"reactor/{device_type}", "device_type": device_type, "asset_id": "reactor",
                "value": None if bad else 100.0 * n + math.sin(step / 9.0), "unit": "1", "kind": "gauge",
                "quality": "bad" if bad else "good", "received_at": at, "seq": seq, "segment": "s",
                "year": at.year, "month": at.month})
        name = base | {"lane": "readings", "seq": seq, "rows": len(TYPES), "rows_before": seq * len(TYPES), "oldest": 0,
                       "sealed_at": at, "received_at": at}
        messages.append(name | {"readings": len(TYPES), "stored": len(TYPES), "duplicates": 0, "quarantined": 0,
                                "redelivered": False, "payload_sha256": hashlib.sha256(b"").hexdigest()})
        bronze.append({"topic": f"tailrace/v1/{SITE}/{GATEWAY}/readings", "epoch": EPOCH, "lane": "readings", "seq": seq})
        at, seq = at + STEP, seq + 1
    census = {"record": "census", "lane": None, "first_seq": None, "last_seq": None}
    control = [base | census | {"reason": reason, "readings": n} for reason, n in
               [("polled", len(readings) + 12), ("sealed", len(readings)), ("held", 9), ("skipped", 2),
                ("rejected:malformed", 1)]]
    control.append(base | {"record": "closing", "lane": "readings", "first_seq": None, "last_seq": seq - 1,
                           "readings": len(readings), "reason": None})
    control.append(base | {"record": "gap", "lane": "aggregates", "first_seq": 0, "last_seq": 2, "readings": 9, "reason": "full"})
    events = []
    for n, (start, end, device, severity) in enumerate([
            (280, 430, "flow", "warning"), (300, 330, "level", "critical"), (790, 900, None, "critical"),
            (1237, None, "flow", "warning")]):
        events.append({"event_id": f"e{n}", "asset_id": "reactor", "device_id": device and f"reactor/{device}",
                       "model": "tep-process", "started_at": minutes(start), "ended_at": end and minutes(end), "site": SITE,
                       "severity": severity})
    devices = [{"site": SITE, "device_id": f"reactor/{t}"} for t in TYPES]
    hours = grouped(readings, "hour", lambda t: t.replace(minute=0))
    return {
        "bronze": bronze, "silver/sensor_readings": readings, "silver/messages": messages, "silver/control": control,
        "silver/quarantine": [], "gold/anomaly_events": events, "gold/devices": devices,
        "gold/assets": [{"site": SITE, "asset_id": "reactor"}],
        "gold/maintenance_schedule": [{"site": SITE, "asset_id": "reactor", "action": "inspect"}],
        "gold/hourly_aggregates": hours,
        "gold/daily_aggregates": [
            row | {"day": row["starts_at"].date(), "shift": None, "ends_at": row["starts_at"] + timedelta(days=1)}
            for row in grouped(readings, "starts_at", lambda t: t.replace(hour=0, minute=0, second=0))],
        "gold/asset_health": [health(hour, readings, events) for hour in sorted({row["hour"] for row in hours})],
        "gold/timeseries_1m": grouped(readings, "time", lambda t: t.replace(second=0)),
    }


def grouped(readings, column, floor):
    """What gold makes of readings, in plain Python."""
    groups = {}
    for r in readings:
        groups.setdefault((r["device_id"], floor(r["ts"])), []).append(r)
    rows = []
    for (device, at), members in groups.items():
        values = [r["value"] for r in members if r["quality"] != "bad"]
        row = {"site": SITE, "device_id": device, "device_type": members[0]["device_type"], "unit": members[0]["unit"],
               "asset_id": members[0]["asset_id"]}
        row |= {column: at, "count": len(values), "bad_count": len(members) - len(values)}
        for name, function in (("min", min), ("max", max), ("mean", statistics.fmean), ("first", lambda v: v[0]),
                               ("last", lambda v: v[-1]), ("p50", lambda v: quantile(v, 0.5)),
                               ("p95", lambda v: quantile(v, 0.95))):
            row[name] = function(values) if values else None
        row["stddev"] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def health(hour, readings, events):
    """An hour of the asset minute by minute: all events begin and end with one."""
    known = max(r["ts"] for r in readings if r["quality"] != "bad" and r["ts"] < hour + timedelta(hours=1))
    known += timedelta(minutes=16)
    weights, anomalous = {}, 0
    for minute in (hour + timedelta(minutes=n) for n in range(60)):
        lasting = {}
        for e in events:
            if e["started_at"] <= minute < (e["ended_at"] or known):
                weight = 1.0 if e["severity"] == "critical" else 0.5
                lasting[e["device_id"]] = max(weight, lasting.get(e["device_id"], 0.0))
        anomalous += bool(lasting)
        for device, weight in lasting.items():
            weights[device] = weights.get(device, 0.0) + weight / 60
    heaviest = max(weights.values(), default=0.0)
    device = next((device for device, weight in weights.items() if weight == heaviest), None)
    return {"site": SITE, "asset_id": "reactor", "hour": hour, "health_index": 100 * (1 - heaviest),
            "anomaly_minutes": float(anomalous), "device_id": device}


def quantile(values, p):
    values, at = sorted(values), p * (len(values) - 1)
    low = math.floor(at)
    return values[low] + (values[min(low + 1, len(values) - 1)] - values[low]) * (at - low)


TEXTS = ["site", "gateway_id", "epoch", "lane", "reason", "record", "device_id", "segment", "model", "shift"]
INTS = ["seq", "rows", "first_seq", "last_seq", "readings", "count", "bad_count", "year", "month"]
FLOATS = ["value", "min", "max", "mean", "stddev", "first", "last", "p50", "p95", "health_index", "anomaly_minutes"]
TIMES = ["starts_at", "ends_at", "ts", "received_at", "sealed_at", "started_at", "ended_at", "hour", "time", "resolved_at"]


def write(lake, tables):
    types = dict.fromkeys(TEXTS, pa.string()) | dict.fromkeys(INTS, pa.int64()) | dict.fromkeys(FLOATS, pa.float64())
    types |= dict.fromkeys(TIMES, INSTANT)
    for path, rows in tables.items():
        columns = list(rows[0]) if rows else ["epoch", "lane", "readings", "resolved_at"]
        arrays = [pa.array([row[c] for row in rows], types.get(c)) for c in columns]
        table = pa.table(arrays, columns)
        if path == "bronze":
            folder = lake / "bronze/sensor_data/year=2026/month=03/day=01/hour=00"
            folder.mkdir(parents=True)
            pyarrow.parquet.write_table(table, folder / "w-0.parquet")
        else:
            write_deltalake(str(lake / path), table)


def at(path, index, **changes):
    """Changes one row of a table."""
    return lambda tables: tables[path][index].update(changes)


def again(path):
    """Doubles a row."""
    return lambda tables: tables[path].append(dict(tables[path][5 % len(tables[path])]))


def gone(path, index=5):
    """Removes a row."""
    return lambda tables: tables[path].pop(index)


def every(path, **changes):
    return lambda tables: [row.update(changes) for row in tables[path]]


def extra_event(start, end):
    return lambda t: t["gold/anomaly_events"].append(
        t["gold/anomaly_events"][0] | {"event_id": "x", "started_at": minutes(start), "ended_at": end and minutes(end)})


READINGS, MESSAGES, CONTROL = "silver/sensor_readings", "silver/messages", "silver/control"
HOURLY, MINUTES, EVENTS = "gold/hourly_aggregates", "gold/timeseries_1m", "gold/anomaly_events"
DAYS, HEALTH = "gold/daily_aggregates", "gold/asset_health"

# (what is planted, how, a part of the line with which the judge must find it)
DEFECTS = [
    ("a reading stored twice", again(READINGS), "(site, device_id, ts) is unique"),
    ("three device types", lambda t: [r.update(device_type="flow") for r in t[READINGS] if r["device_type"] == "level"],
     "four device types"),
    ("a null that is good", at(READINGS, 0, value=None), "values, qualities and partitions"),
    ("a wrong partition", at(READINGS, 0, month=4), "values, qualities and partitions"),
    ("a reading lost in refining", gone(READINGS), "missing 0"),
    ("a reading lost on the edge", at(CONTROL, 1, readings=800), "edge: polled = sealed"),
    ("a message refined twice", again(MESSAGES), "one row a message name"),
    ("a message that does not balance", at(MESSAGES, 3, stored=3), "in every message"),
    ("a message lost on the way", gone(MESSAGES), "every seq from 0"),
    ("a first message lost", gone(MESSAGES, 0), "every seq from 0"),
    ("a last message lost", gone(MESSAGES, -1), "every closing"),
    ("a count that is not the edge's", at(MESSAGES, 3, rows_before=13), "rows_before agrees"),
    ("a segment that no plan took", gone(MESSAGES), "every named message of bronze"),
    ("a reading sealed twice", at(MESSAGES, 3, stored=3, duplicates=1), "no reading was sealed twice"),
    ("an unknown outcome", at(CONTROL, 2, reason="forgotten"), "no other outcome"),
    ("an hour missing", gone(HOURLY), "no hour of silver is missing"),
    ("a day missing", gone(DAYS, 1), "within a day"),
    ("a day with another mean", at(DAYS, 1, mean=1.0), "every day and shift equals"),
    ("a day that ends early", at(DAYS, 1, ends_at=minutes(60)), "every day and shift equals"),
    ("an hour of nothing", at(HOURLY, 5, hour=minutes(60 * 30)), "without readings in silver"),
    ("an hour twice", again(HOURLY), "(site, device_id, hour) is unique"),
    ("a wrong count", at(HOURLY, 5, count=2), "count of every hour"),
    ("a type in quotes", at(HOURLY, 5, device_type="'flow'"), "type and unit of every device"),
    ("a mean off by 1e-7", lambda t: t[HOURLY][5].update(mean=t[HOURLY][5]["mean"] * (1 + 1e-7)), "mean of every hour"),
    ("a null mean", at(HOURLY, 5, mean=None), "mean of every hour"),
    ("a wrong minimum", at(HOURLY, 5, min=-1.0), "min of every hour"),
    ("a wrong maximum", at(HOURLY, 5, max=1e4), "max of every hour"),
    ("an hour without its health", gone(HEALTH), "in gold_asset_health"),
    ("health of no hour", at(HEALTH, 5, hour=minutes(60 * 30)), "in health"),
    ("an asset that is well", at(HEALTH, 5, health_index=100.0), "health, anomaly minutes and heaviest device"),
    ("a minute of anomaly too much", lambda t: t[HEALTH][13].update(anomaly_minutes=t[HEALTH][13]["anomaly_minutes"] + 1),
     "health, anomaly minutes and heaviest device"),
    ("the wrong device", at(HEALTH, 5, device_id="reactor/level"), "health, anomaly minutes and heaviest device"),
    ("a minute missing", gone(MINUTES), "no minute of silver is missing"),
    ("a wrong minute", at(MINUTES, 5, max=1e4), "of every minute"),
    ("an empty gold table", lambda t: t.update({"gold/assets": [{"site": SITE, "asset_id": "a"}] * 2}), "unique in gold.assets"),
    ("an unregistered device", gone("gold/devices", 0), "every device of silver"),
    ("a false alarm", extra_event(200, 210), "d01: no event starts in normal operation"),
    ("a fault not found", lambda t: [t[EVENTS].pop(0) for _ in range(2)], "d01: an event starts within"),
    ("a fault found late", at(EVENTS, 3, started_at=minutes(1270)), "d06: an event starts within"),
    ("an event that never ends", at(EVENTS, 0, ended_at=None), "d01: every event ends"),
    ("an event that ends late", at(EVENTS, 2, ended_at=minutes(1000)), "d02: every event ends"),
]


def judge(tables):
    """(exit status, output) of the judge over a lake of these tables."""
    with tempfile.TemporaryDirectory(prefix="tailrace-judged-") as name:
        folder = Path(name)
        write(folder / "lake", tables)
        (folder / "plant.toml").write_text(PLANT)
        (folder / "demo.json").write_text(f'{{"anchor": "{ANCHOR.isoformat()}"}}')
        run = subprocess.run(
            [sys.executable, HERE / "judge_lake.py", folder / "lake", "--plant", folder / "plant.toml", "--demo", folder / "demo.json"],
            capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def main():
    report = Report("test_judge_lake")
    status, output = judge(sound())
    report.check(status == 0 and "FAIL" not in output, "a sound lake passes", output)
    for what, plant, part in DEFECTS:
        tables = sound()
        plant(tables)
        status, output = judge(tables)
        found = [line for line in output.splitlines() if line.startswith("  FAIL") and part in line]
        report.check(status == 1 and found, f"{what} is found", f"expected a failure with {part!r}:\n{output}")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

"""Runs the demo as a user does and judges it from outside, while it runs and when it is done.

    judge_demo.py whole BINARY --data-dir DIR [--backfill 24h] [--for 60s]
    judge_demo.py sigkill BINARY --data-dir DIR [--backfill 1h] [--for 15s]

`whole`: psql, psycopg and HTTP against the live programs; a clean end and the equation; then judge_lake with the
faults of the plant, and judge_readers. `sigkill`: the demo is killed in the middle with SIGKILL; no child may survive; a second run on
the same folder must finish cleanly, with nothing missing and nothing stored twice.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psycopg

from process import descendants, free_port, running, started_at, wait_for_port
from report import Report

HERE = Path(__file__).parent
PLANT = HERE.parent.parent / "firmware-sim/data/plant.toml"
TABLES = {
    "silver": ["sensor_readings", "quarantine", "messages"],
    "gold": ["hourly_aggregates", "timeseries_1m", "daily_aggregates", "anomaly_events", "asset_health", "assets", "devices",
             "maintenance_schedule"],
}
# Every one of these must be refused, and must change nothing.
WRITES = [
    "INSERT INTO gold.assets (site, asset_id) VALUES ('judge', 'judge')",
    "UPDATE gold.assets SET site = 'judge'",
    "DELETE FROM silver.sensor_readings",
    "DROP TABLE gold.assets",
    "CREATE TABLE gold.judge (n INT)",
    "CREATE EXTERNAL TABLE judge (n INT) STORED AS CSV LOCATION '/etc/passwd'",
    "COPY (SELECT 1) TO '{file}'",
    "TRUNCATE gold.assets",
]
EQUATION = re.compile(
    r"polled (\d+) = stored (\d+) \+ held (\d+) \+ rejected (\d+) \+ skipped (\d+)"
    r" \+ quarantined (\d+) \+ declared (\d+)(?: \+ [a-z]+ (\d+))* · missing (\d+)$")


class Demo:
    """The command line of a run on free ports."""

    def __init__(self, args):
        self.binary, self.data, self.log = args.binary, args.data_dir, args.data_dir / "demo.log"
        self.mqtt, self.pg, self.http = free_port(), free_port(), free_port()
        self.command = [
            str(args.binary.resolve()), "demo", "--", "--data-dir", str(args.data_dir), "--backfill", args.backfill,
            "--for", getattr(args, "for"), "--mqtt-port", str(self.mqtt), "--pg-port", str(self.pg),
            "--http-port", str(self.http)]

    def tail(self, lines=40):
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def psql(self, sql):
        return subprocess.run(
            ["psql", "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", str(self.pg), "-U", "tailrace",
             "-d", "tailrace", "-c", sql],
            capture_output=True, text=True, timeout=120, env=os.environ | {"PGCONNECT_TIMEOUT": "10"})

    def get(self, path, body=None):
        """(status, text) of an HTTP request; body, if any, is posted as JSON."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}{path}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode(errors="replace")
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode(errors="replace")
        except OSError as e:
            return 0, str(e)


def rows_yet(demo):
    """Rows in silver, as far as the demo can say so already."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        answer = demo.psql("SELECT count(*) FROM silver.sensor_readings")
        if answer.returncode == 0 and answer.stdout.strip().isdigit():
            return int(answer.stdout)
    return 0


def gold_yet(demo):
    """Whether gold has something of everything; a step makes its tables one after the other."""
    tables = ("hourly_aggregates", "timeseries_1m", "daily_aggregates", "asset_health", "maintenance_schedule")
    counts = " UNION ALL ".join(f"SELECT count(*) AS n FROM gold.{table}" for table in tables)
    with contextlib.suppress(subprocess.TimeoutExpired):
        answer = demo.psql(f"SELECT min(n) FROM ({counts}) AS each")
        return answer.returncode == 0 and answer.stdout.strip() not in ("", "0")
    return False


def wait(condition, process, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if condition():
            return True
        time.sleep(0.5)
    return False


def judge_psql(report, demo):
    listed = demo.psql("\\dt *.*")
    names = {tuple(line.split("|")[:2]) for line in listed.stdout.splitlines()}
    absent = [f"{s}.{t}" for s, tables in TABLES.items() for t in tables if (s, t) not in names]
    report.check(listed.returncode == 0 and not absent, "psql lists the tables",
                 f"missing {absent}\n{listed.stdout}{listed.stderr}")
    for sql in (
        "SELECT device_type, count(*), avg(value) FROM silver.sensor_readings WHERE quality <> 'bad' GROUP BY 1",
        "SELECT asset_id, sum(count), max(max) FROM gold.hourly_aggregates GROUP BY 1 ORDER BY 1",
        "SELECT device_id, max(time) FROM gold.timeseries_1m GROUP BY 1",
        "SELECT basis, count(*) FROM gold.maintenance_schedule GROUP BY 1",
    ):
        answer = demo.psql(sql)
        report.check(answer.returncode == 0 and answer.stdout.strip(), f"psql: {sql}", answer.stdout + answer.stderr)
    before = demo.psql("SELECT count(*) FROM gold.assets").stdout
    file = demo.data / "written-by-sql"
    for sql in WRITES:
        sql = sql.format(file=file)
        answer = demo.psql(sql)
        report.check(answer.returncode != 0 and "ERROR" in answer.stderr, f"refused: {sql}", answer.stdout + answer.stderr)
    report.check(not file.exists(), "no statement wrote a file on the server")
    after = demo.psql("SELECT count(*) FROM gold.assets")
    report.check(after.returncode == 0 and after.stdout == before, "the refused statements changed nothing", after)


def judge_psycopg(report, demo):
    try:
        with psycopg.connect(host="127.0.0.1", port=demo.pg, user="tailrace", dbname="tailrace", connect_timeout=10) as db:
            device = db.execute("SELECT device_id FROM gold.devices ORDER BY 1 LIMIT 1").fetchone()[0]
            sql = "SELECT count(*), min(ts), max(value) FROM silver.sensor_readings WHERE device_id = %s AND value > %s"
            for binary in (False, True):
                count, first, highest = db.execute(sql, (device, -1e9), binary=binary).fetchone()
                report.check(
                    isinstance(count, int) and (count == 0 or (first.utcoffset() is not None and isinstance(highest, float))),
                    f"psycopg with parameters, binary={binary}: {device} has {count} rows", (count, first, highest))
            none = db.execute(sql, ("'; DROP TABLE gold.assets; --", 0.0)).fetchone()
            report.check(none[0] == 0, "a parameter is data, whatever stands in it", none)
    except (psycopg.Error, TypeError, AttributeError) as e:
        report.check(False, "psycopg 3 connects and queries with parameters", repr(e))


def judge_http(report, demo):
    for path, part in (("/healthz", ""), ("/readyz", ""), ("/metrics", "# TYPE tailrace_"), ("/", "<html")):
        status, text = demo.get(path)
        report.check(status == 200 and part in text.lower().replace("# type", "# TYPE"), f"GET {path}", f"{status} {text[:300]}")
    status, text = demo.get("/api/v1/sql", {"sql": "SELECT count(*) AS n FROM gold.hourly_aggregates"})
    report.check(status == 200 and re.search(r"\d", text), "POST /api/v1/sql answers", f"{status} {text[:300]}")
    status, text = demo.get("/api/v1/sql", {"sql": "DROP TABLE gold.assets"})
    report.check(400 <= status < 500, "POST /api/v1/sql refuses to write", f"{status} {text[:300]}")
    status, text = demo.get("/api/v1/sql", {"sql": "SELEC nonsense"})
    report.check(400 <= status < 500, "a mistake in SQL is the client's", f"{status} {text[:300]}")


def judge_end(report, demo, process, seconds):
    """A clean end within the time, and the equation as the last line."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        report.check(False, f"the demo ends within {seconds} s", demo.tail())
        return
    report.check(status == 0, "the demo's exit status is 0", f"{status}\n{demo.tail()}")
    last = next((line.strip() for line in reversed(demo.tail().splitlines()) if line.strip()), "")
    match = EQUATION.search(last)
    if report.check(match, "its last line is the equation", last or "no output"):
        print(f"        {last}")
        numbers = [int(n) for n in re.findall(r" (\d+)", last)]
        polled, *right = numbers[:-1]
        report.check(polled > 0 and numbers[-1] == 0, "missing 0", last)
        report.check(polled == sum(right), "the equation balances", f"{polled} <> {sum(right)}")


def judge_lake(report, demo, *options):
    command = [sys.executable, HERE / "judge_lake.py", demo.data / "lake", *options]
    report.check(subprocess.run(command).returncode == 0, "judge_lake is content", "see above")


def whole(report, args):
    demo = Demo(args)
    began = time.monotonic()
    with running(demo.command, demo.log) as process:
        up = wait_for_port(demo.pg, 120, process) and wait_for_port(demo.http, 60, process)
        if not report.check(up, "SQL and HTTP are there", demo.tail()):
            return
        # While it is still catching up, as soon as there is something to ask for.
        if report.check(wait(lambda: gold_yet(demo), process, 600), "gold answers", demo.tail()):
            judge_psql(report, demo)
            judge_psycopg(report, demo)
            judge_http(report, demo)
        judge_end(report, demo, process, args.limit)
    print(f"        the demo took {time.monotonic() - began:.0f} s", flush=True)
    judge_lake(report, demo, "--plant", PLANT, "--demo", demo.data / "demo.json")
    command = [sys.executable, "-W", "ignore", HERE / "judge_readers.py", demo.data / "lake"]
    report.check(subprocess.run(command).returncode == 0, "judge_readers is content", "see above")


def sigkill(report, args):
    demo = Demo(args)
    with running(demo.command, demo.log) as process:
        busy = wait(lambda: rows_yet(demo) > 0, process, 300)
        if not report.check(busy, "there are rows in silver before the SIGKILL", demo.tail()):
            return
        below = [(pid, started_at(pid)) for pid in descendants(process.pid)]
        report.check(len(below) >= 3, f"the demo has {len(below)} processes below it", below)
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 15
        alive = below
        while alive and time.monotonic() < deadline:
            time.sleep(0.2)
            alive = [(pid, began) for pid, began in alive if began is not None and started_at(pid) == began]
        report.none(alive, "no child outlives the SIGKILL by 15 s")
        for pid, _ in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    again = Demo(args)
    with running(again.command, again.log) as process:
        judge_end(report, again, process, args.limit)
    judge_lake(report, again, "--duplicates")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("judge", choices=["whole", "sigkill"])
    parser.add_argument("binary", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--backfill", default="24h")
    parser.add_argument("--for", default="60s")
    parser.add_argument("--limit", type=int, default=1200, help="seconds until the demo must have ended")
    args = parser.parse_args()
    args.data_dir.mkdir(parents=True, exist_ok=True)
    report = Report(f"judge_demo {args.judge}")
    (whole if args.judge == "whole" else sigkill)(report, args)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

"""Seals a recorded table with the agent, without a broker, and looks at its outbox as a person would: `outbox ls`,
`fsck`, `export`, and what pyarrow and DuckDB read of the exported files. Then damages a database.

    judge_outbox.py PATH/TO/edge-agent
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from datetime import datetime, timedelta, timezone
from pathlib import Path

import duckdb
import pyarrow as pa

from report import Report

ROWS = 5000
BEGIN = datetime(2026, 3, 1, tzinfo=timezone.utc)
CONFIG = """
site = "plant"
gateway = "gw-1"
data_dir = "{home}/data"
[[asset]]
id = "p"
[[device]]
id = "p/flow"
type = "flow"
asset = "p"
unit = "L/min"
kind = "gauge"
[[device]]
id = "p/level"
type = "level"
asset = "p"
unit = "%"
kind = "gauge"
[[replay]]
file = "{home}/rows.csv"
[mqtt]
url = "mqtt://127.0.0.1:9"
[uplink]
drain = "0s"
[metrics]
listen = ""
"""


def value(n, device):
    return n / 8 if device == "p/flow" else float(n % 100)


def contents(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "lock")
    return [(str(p), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def main(agent):
    report = Report("outbox")
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        rows = [(BEGIN + timedelta(seconds=n), d, value(n, d)) for n in range(ROWS) for d in ("p/flow", "p/level")]
        lines = [f"{ts.isoformat().replace('+00:00', 'Z')},{device},{v}" for ts, device, v in rows]
        (home / "rows.csv").write_text("\n".join(["ts,device_id,value", *lines]) + "\n")
        config = home / "agent.toml"
        config.write_text(CONFIG.format(home=home))
        environment = {**os.environ, "TAILRACE_LOG": "error"}

        def run(*arguments):
            command = [agent, *arguments, "--config", str(config)]
            return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

        done = run("run")
        report.check(done.returncode == 0, "the agent seals the table and ends", done.stderr)
        before = contents(home / "data")
        listed = run("outbox", "ls", "--json")
        generations = json.loads(listed.stdout or "[]")
        held = sum(s["held_rows"] for g in generations if g["lane"] == "readings" for s in g["spans"])
        report.check(held == len(rows), f"ls counts {len(rows)} readings", f"{held}: {listed.stderr}")
        table = run("outbox", "ls").stdout
        report.check("readings" in table and "open" in table, "ls prints a table", table)
        sound = run("outbox", "fsck")
        report.check(sound.returncode == 0 and "all sound" in sound.stdout, "fsck: all sound", sound.stdout + sound.stderr)
        out = home / "out"
        exported = run("outbox", "export", "--out", str(out))
        report.check(exported.returncode == 0, "export writes everything", exported.stdout + exported.stderr)
        report.check(contents(home / "data") == before, "looking changes nothing", "files of data_dir differ")

        readings = pa.ipc.open_stream(out / "readings.arrows").read_all()
        got = sorted(zip(*(readings[c].to_pylist() for c in ("ts", "device_id", "value"))))
        report.check(got == sorted(rows), "pyarrow reads every reading as it was recorded", f"{len(got)} of {len(rows)}")
        count, total = duckdb.sql("SELECT count(*), sum(value) FROM readings").fetchone()
        wanted = (len(rows), sum(v for *_, v in rows))
        report.check((count, total) == wanted, "DuckDB counts and adds them", f"{(count, total)}, wants {wanted}")
        control = pa.ipc.open_stream(out / "control.arrows").read_all().to_pylist()
        sealed = sum(r["readings"] for r in control if r["record"] == "census" and r["reason"] == "sealed")
        report.check(sealed == len(rows), "the census in the control lane says as much", sealed)

        database = max((home / "data").rglob("readings/*/db"))
        database.write_bytes(database.read_bytes()[: database.stat().st_size // 2])
        before = contents(home / "data")
        found = run("outbox", "fsck", "--json")
        findings = json.loads(found.stdout or "{}").get("findings")
        report.check(found.returncode == 1 and findings, "fsck finds half a database", found.stdout + found.stderr)
        report.check(contents(home / "data") == before, "and leaves it as it is", "files of data_dir differ")
        repaired = run("outbox", "fsck", "--repair")
        report.check(repaired.returncode == 0, "fsck --repair sets it aside", repaired.stdout + repaired.stderr)
        again = run("outbox", "fsck")
        report.check(again.returncode == 0, "then all is sound", again.stdout + again.stderr)
        rescue = run("outbox", "export", "--out", str(home / "rescue"), "--quarantine")
        control = pa.ipc.open_stream(home / "rescue" / "control.arrows").read_all().to_pylist()
        gaps = sum(r["readings"] for r in control if r["record"] == "gap" and r["lane"] == "readings")
        left = json.loads(run("outbox", "ls", "--json").stdout)
        held = sum(s["held_rows"] for g in left if g["lane"] == "readings" for s in g["spans"])
        report.check(gaps > 0 and gaps + held == len(rows), "held + declared = sealed", f"{held} + {gaps}")
        report.check(rescue.returncode == 1, "export says that quarantine is not whole", rescue.stdout)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

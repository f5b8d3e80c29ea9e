"""Runs `firmware-sim chaos` and judges its lake with readers that share no code with it.

    judge_chaos.py BINARY --data-dir DIR [--kills N] [--seed S] [--only agent,broker] [--store WEED] [--replicas N]

The truth is the file that the agent replayed; DuckDB compares it with silver value by value. Then messages, gaps,
closings, the census, and gold computed again from silver, as judge_lake has them; and every payload says whose it is.
A lake that was on a server is copied to `DIR/lake` first, by Arrow's own S3 client, from a server that was started again
on the same data.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from judge_lake import judge_account, judge_days, judge_hours, judge_keys, judge_messages, judge_minutes, number, open_lake
from report import Report
from seaweed import client, seaweed

KEYS = ["kills", "kills_with_inflight", "readings", "missing", "doubled", "declared"]


def judge_result(report, args):
    """The command's own verdict: exit status and last line."""
    command = [args.binary, "chaos", "--kills", str(args.kills), "--seed", str(args.seed), "--data-dir", args.data_dir]
    command += ["--only", args.only] if args.only else []
    command += ["--store", args.store] if args.store else []
    command += ["--replicas", str(args.replicas)]
    began = time.monotonic()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    print(f"        it took {time.monotonic() - began:.0f} s")
    last = done.stdout.rstrip().rpartition("\n")[2]
    print(f"        {last}")
    report.check(done.returncode == 0, "chaos's exit status is 0", done.returncode)
    try:
        result = json.loads(last)
    except ValueError:
        report.check(False, "its last line is a JSON object", last or "no output")
        return None
    report.check(list(result) == KEYS, f"its keys are {', '.join(KEYS)}", list(result))
    report.check(result["kills"] == args.kills, f"{args.kills} kills", result["kills"])
    report.check(result["kills_with_inflight"] >= args.kills / 4, "messages were in flight at a quarter of them or more",
                 result["kills_with_inflight"])
    report.check(result["readings"] >= 1000 * args.kills, "at least 1,000 readings a kill", result["readings"])
    report.check(result["missing"] == 0 and result["doubled"] == 0, "nothing is missing, nothing doubled", last)
    return result


def judge_values(report, db, rows, result):
    """Every value of the file once in silver, but for as many as are declared, and nothing else."""
    db.execute(f"""
        CREATE OR REPLACE TEMP TABLE truth AS
        SELECT device_id, time::TIMESTAMPTZ AS ts, value::DOUBLE AS value, 'good' AS quality FROM (
            UNPIVOT (SELECT * FROM read_csv('{rows}', header = true, all_varchar = true))
            ON COLUMNS(* EXCLUDE time) INTO NAME device_id VALUE value)""")
    told = number(db, "SELECT count(*) FROM truth")
    report.check(told == result["readings"], f"the file has {told} values, as the last line says", result)
    doubled = db.execute("""
        SELECT site, device_id, ts, count(*) AS n FROM silver_sensor_readings GROUP BY ALL HAVING n > 1 ORDER BY ALL""")
    report.none(doubled.fetchall(), "(site, device_id, ts) is unique in silver")
    db.execute("""
        CREATE OR REPLACE TEMP TABLE stored AS SELECT device_id, ts, value, quality FROM silver_sensor_readings""")
    cell = "device_id, ts, value, quality"
    foreign = db.execute(f"SELECT {cell} FROM stored ANTI JOIN truth USING ({cell})").fetchall()
    report.none(foreign, "every row of silver stands in the file, with its value")
    absent = db.execute(f"SELECT {cell} FROM truth ANTI JOIN stored USING ({cell})").fetchall()
    report.none(absent[result["declared"]:], f"every value of the file is in silver, or one of {result['declared']} declared")


def judge_senders(report, db, lake):
    """Every payload of bronze repeats site and gateway, and they are its topic's."""
    messages = db.execute(f"""
        SELECT topic, content_type, payload FROM read_parquet('{lake}/bronze/sensor_data/**/*.parquet')""").fetchall()
    wrong = []
    for topic, content_type, payload in messages:
        if content_type == "application/vnd.apache.arrow.stream":
            with pa.ipc.open_stream(payload) as reader:
                said = {key.decode(): value.decode() for key, value in reader.schema.metadata.items()}
                reader.read_all()
        else:
            said = json.loads(payload)
        if topic.split("/")[-3:-1] != [said.get("site"), said.get("gateway")]:
            wrong.append((topic, said))
    report.none(wrong, f"each of {len(messages)} payloads says whose it is")


def fetch(args, lake):
    """The lake of a run with --store, as a folder."""
    key, secret = ((args.data_dir / name).read_text() for name in ("store.key-id", "store.secret"))
    with seaweed(args.store, args.data_dir / "store", key, secret, "chaos") as port:
        fs.copy_files(
            "chaos/lake", str(lake),
            source_filesystem=client(port, key, secret), destination_filesystem=fs.LocalFileSystem(),
        )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="agent,broker,cloud,store: who is killed")
    parser.add_argument("--store", type=Path, help="SeaweedFS's program: the lake is on it, and it is killed too")
    parser.add_argument("--replicas", type=int, default=1, help="processes of the cloud")
    args = parser.parse_args()
    report = Report("judge_chaos")
    result = judge_result(report, args)
    if result is not None:
        lake = args.data_dir / "lake"
        if args.store:
            fetch(args, lake)
        db = open_lake(lake)
        judge_values(report, db, args.data_dir / "load.csv", result)
        judge_messages(report, db, lake)
        # Which instants an agent has sealed, it knows also after a SIGKILL: none is sealed twice.
        judge_account(report, db, False)
        judge_senders(report, db, lake)
        judge_keys(report, db)
        judge_hours(report, db)
        judge_minutes(report, db)
        judge_days(report, db)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

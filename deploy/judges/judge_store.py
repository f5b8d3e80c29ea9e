"""Judges the lake on a real server that speaks S3 (SeaweedFS), with faults on the way to it.

    judge_store.py WEED CLOUD_INGEST FIRMWARE_SIM --data-dir DIR [--seeds 1 2]

Runs the ignored tests `..._on_s3` of cloud-ingest: the contracts of store and tables on a line without faults; the
way from segments to silver, two writers and two refiners at once, and upkeep, on lines that answer 503, are slow, or are
cut before or after the work is done. So does the program itself, from mosquitto to gold, killed midway. Then the tables
are read with Python deltalake. Also: wrong keys, a missing bucket, a server that hangs, and one that ignores the
condition of a put.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deltalake import DeltaTable

from faulty import FAULTS, Faulty
from process import free_port, running, wait_for_port
from report import Report
from seaweed import seaweed

BUCKET = "lake"
KEY, SECRET = "tailrace", "a secret that stays one"
SHARE = 0.12


def environment(port, folder, **more):
    """What tells cloud-ingest, and its tests, where the lake is."""
    settings = {
        "STORE__URL": f"s3://{BUCKET}/{folder}",
        "STORE__S3__ENDPOINT": f"http://127.0.0.1:{port}",
        # Short, so that what a line does for longer comes through to the callers.
        "STORE__TIMEOUT": "2s",
        "STORE__RETRY_FOR": "2s",
        **more,
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TAILRACE_CLOUD"))}
    ours = {f"TAILRACE_CLOUD__{name}": value for name, value in settings.items()}
    return {**clean, **ours, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}


def test_programs():
    """The test programs of cloud-ingest: its unit tests and its integration tests."""
    command = "cargo test --workspace --profile demo --locked --lib --test lake --no-run --message-format json"
    built = subprocess.run(command.split(), check=True, stdout=subprocess.PIPE, text=True).stdout
    found = {}
    for line in filter(lambda line: line.startswith("{"), built.splitlines()):
        message = json.loads(line)
        if message.get("executable") and message.get("target", {}).get("name") in ("cloud_ingest", "lake"):
            found[message["target"]["name"]] = message["executable"]
    return found["cloud_ingest"], found["lake"]


def judge_test(report, program, name, env):
    """One ignored Rust test; a filter that matches nothing is a failure."""
    began = time.monotonic()
    command = [program, "--ignored", "--exact", name, "--test-threads", "1"]
    run = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                         text=True, timeout=600)  # fmt: skip
    ok = run.returncode == 0 and "1 passed" in run.stdout
    report.check(ok, f"{name} ({time.monotonic() - began:.1f} s)", run.stdout[-4000:])


def read(port, table):
    """All of a Delta table."""
    options = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
    }  # fmt: skip
    return DeltaTable(f"s3://{BUCKET}/{table}", storage_options=options).to_pyarrow_dataset().to_table()


def judge_outside(report, port, folder):
    """What another program finds in silver."""
    rows = read(port, f"{folder}/silver/sensor_readings")
    keys = rows.group_by(["site", "device_id", "ts"]).aggregate([([], "count_all")])
    doubled = [row for row in keys.to_pylist() if row["count_all"] > 1]
    report.none(doubled, f"{folder}: (site, device_id, ts) is unique in {rows.num_rows} rows of silver.sensor_readings")
    messages = read(port, f"{folder}/silver/messages")
    total = {name: sum(messages[name].to_pylist()) for name in ("readings", "stored", "duplicates", "quarantined")}
    accounted = total["stored"] + total["duplicates"] + total["quarantined"]
    report.check(
        total["readings"] == accounted and total["stored"] == rows.num_rows > 0,
        f"{folder}: {total['readings']} readings = {total['stored']} stored + {total['duplicates']} duplicates "
        f"+ {total['quarantined']} quarantined",
        f"{total}, and {rows.num_rows} rows",
    )


def judge_refusal(report, program, arguments, env, parts, what):
    """The program ends with 1 and says what to check, and not what the secret is."""
    began = time.monotonic()
    run = subprocess.run([program, *arguments], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, timeout=120)  # fmt: skip
    secrets = [secret for secret in (SECRET, "another secret") if secret in run.stdout]
    ok = run.returncode == 1 and all(part in run.stdout for part in parts) and not secrets
    report.check(ok, f"{what} ({time.monotonic() - began:.1f} s)", f"exit {run.returncode}\n{run.stdout}")


def judge_refusals(report, program, port):
    query = ["query", "select 1"]
    place = f"bucket {BUCKET} at http://127.0.0.1:{port}"
    for name, value in (("AWS_SECRET_ACCESS_KEY", "another secret"), ("AWS_ACCESS_KEY_ID", "nobody")):
        env = {**environment(port, "refused"), name: value, "TAILRACE_LOG": "debug"}
        parts = [place, name, "does not accept the keys"]
        judge_refusal(report, program, query, env, parts, f"a wrong {name} is named")
    env = environment(port, "refused", STORE__URL="s3://no-such-bucket/lake")
    judge_refusal(report, program, query, env, ["no-such-bucket at", "no such bucket"], "a missing bucket is named")
    with Faulty(port, 1.0, only=["hang after"]) as line:
        env = environment(line.port, "refused")
        judge_refusal(report, program, query, env, ["store.s3.endpoint"], "a server that hangs stalls nothing for ever")
    with Faulty(port, deaf=True) as line:
        env = environment(line.port, "refused")
        parts = ["If-None-Match"]
        judge_refusal(report, program, ["check"], env, parts, "a server without conditional writes is refused")
    run = subprocess.run([program, "check"], env=environment(port, "fine"), stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True)  # fmt: skip
    report.check(run.returncode == 0, "SeaweedFS is accepted", run.stdout)


def judge_program(report, arguments, port, folder):
    """A fleet's readings through broker and program, which is killed once, on a line with faults; then its ledger."""
    readings = 60_000
    with Faulty(port, SHARE, seed=3) as line, contextlib.ExitStack() as stack:
        mqtt, sql, http = free_port(), free_port(), free_port()
        broker = folder / "mosquitto.conf"
        limits = "max_inflight_messages 0\nmax_queued_messages 0\nmessage_size_limit 0"
        broker.write_text(f"listener {mqtt} 127.0.0.1\nallow_anonymous true\n{limits}\n")
        server = stack.enter_context(running(["mosquitto", "-c", broker], folder / "mosquitto.log"))
        if not wait_for_port(mqtt, 30, server):
            sys.exit("mosquitto did not start")
        more = {
            "MQTT__URL": f"mqtt://127.0.0.1:{mqtt}",
            "SERVE__PG_PORT": str(sql),
            "SERVE__HTTP_PORT": str(http),
            "GOLD__INTERVAL": "1s",
            # Two tries of a request are not enough for a start that makes 16 tables.
            "STORE__RETRY_FOR": "10s",
        }
        env = environment(line.port, "program", **more)
        log = folder / "cloud-ingest.log"
        fleet = [arguments.firmware_sim, "fleet", "--url", f"mqtt://127.0.0.1:{mqtt}"]
        fleet += ["--gateways", "2", "--devices", "8", "--readings", str(readings), "--batch", "100", "--rate", "6000"]

        def ready(process):
            report.check(wait_for_port(http, 120, process), "the program starts", log.read_text()[-2000:])

        with running([arguments.cloud_ingest, "run"], log, env=env) as first:
            ready(first)
            load = stack.enter_context(running(fleet, folder / "fleet.log"))
            time.sleep(4)
            first.kill()
        with running([arguments.cloud_ingest, "run"], log, env=env) as second:
            ready(second)
            report.check(load.wait(300) == 0, "every message was acknowledged", (folder / "fleet.log").read_text())
            second.terminate()
            report.check(second.wait(120) == 0, "the program ends cleanly", log.read_text()[-2000:])
        report.check(sum(line.counts[fault] for fault in FAULTS) > 20, f"through faults: {dict(line.counts)}")
        text = log.read_text()
        report.check(SECRET not in text, "the secret is not in its log")
        # Of a client without a session; the lake is opened all the same.
        drain = subprocess.run([arguments.cloud_ingest, "drain", "--client-id", "nobody"], stdout=subprocess.PIPE,
                               env={**env, **environment(port, "program")}, stderr=subprocess.STDOUT, text=True)  # fmt: skip
        report.check(drain.returncode == 0, f"a replica of this lake is drained: {drain.stdout.strip()}", drain.stdout)
    audit = subprocess.run([arguments.cloud_ingest, "audit"], env=environment(port, "program"), stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)  # fmt: skip
    verdict = audit.stdout.strip().rpartition("\n")[2]
    report.check(audit.returncode == 0 and f"stored {readings}" in verdict, f"audit: {verdict}", audit.stdout)
    judge_outside(report, port, "program")
    hours = read(port, "program/gold/hourly_aggregates")
    counted = sum(hours["count"].to_pylist())
    report.check(counted == readings, f"gold.hourly_aggregates counts {counted} readings")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("weed")
    arguments.add_argument("cloud_ingest")
    arguments.add_argument("firmware_sim")
    arguments.add_argument("--data-dir", type=Path, required=True)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    arguments = arguments.parse_args()
    unit, lake = test_programs()
    report = Report("store")
    arguments.data_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=arguments.data_dir))
    data = folder / "seaweed"
    data.mkdir()
    with seaweed(arguments.weed, data, KEY, SECRET, BUCKET) as port:
        judge_test(report, unit, "store::tests::contract_on_s3", environment(port, "contract"))
        judge_test(report, unit, "tables::tests::tables_on_s3", environment(port, "tables"))
        judge_refusals(report, arguments.cloud_ingest, port)
        for seed in [0, *arguments.seeds]:
            share = SHARE if seed else 0.0
            with Faulty(port, share, seed) as line:
                print(f"seed {seed}: faults for {share:.0%} of the requests", flush=True)
                env = environment(line.port, f"seed-{seed}")
                env["TAILRACE_S3_WITHOUT_FAULTS"] = f"http://127.0.0.1:{port}"
                for test, lane in (("one_of_each_on_s3", "one"), ("two_of_each_on_s3", "two")):
                    judge_test(report, lake, f"on_s3::{test}", env)
                    judge_outside(report, port, f"seed-{seed}/{lane}")
                # Through faults it takes minutes until a run of all jobs meets none.
                if seed in [0, *arguments.seeds[:1]]:
                    judge_test(report, lake, "on_s3::upkeep_on_s3", env)
            print(f"        {dict(line.counts)}")
            if seed:
                missing = [fault for fault in FAULTS if not line.counts[fault]]
                report.none(missing, f"seed {seed}: every fault occurred")
        judge_program(report, arguments, port, folder)
    sys.exit(report.finish())


if __name__ == "__main__":
    main()

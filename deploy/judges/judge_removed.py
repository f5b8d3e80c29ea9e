"""Takes a message out of the broker's queue by hand, and asks the ledger what became of it.

    judge_removed.py BIN_DIR

The cloud is away, and its session at a real mosquitto holds what a real agent has sent. The judge connects in the
cloud's name, acknowledges one message of readings as if it were stored, and leaves. Then the cloud comes back.

In mode `broker` the agent has forgotten what the broker took: the ledger must call that message missing, by its number.
In mode `cloud` the agent still holds it, though the broker took it: the ledger must call it pending, and it must be stored
once the agent sends it again.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

from judge_broker import ROOT, Client, wait
from process import free_port, running, wait_for_port
from report import Report

GATEWAY = "plant-1/gw-1"
ROWS = 1_000
BATCH = 100
CLOUD = """
[store]
url = "file://{home}/lake"
[mqtt]
url = "mqtt://127.0.0.1:{port}"
heartbeat = "1s"
[bronze]
max_age = "500ms"
[serve]
pg_port = {pg}
http_port = {http}
"""
AGENT = """
site = "plant-1"
gateway = "gw-1"
data_dir = "{home}/data"
[[asset]]
id = "p"
[[device]]
id = "p/flow"
type = "flow"
asset = "p"
unit = "L/min"
[[replay]]
file = "{home}/rows.csv"
[mqtt]
url = "mqtt://127.0.0.1:{port}"
[outbox]
linger = "100ms"
linger_rows = {batch}
max_rows = {batch}
[uplink]
mode = "{mode}"
drain = "90s"
[metrics]
listen = "127.0.0.1:{metrics}"
"""


def name(message):
    properties = dict(getattr(message.properties, "UserProperty", []))
    return properties.get("epoch"), properties.get("lane"), int(properties.get("seq", -1)), int(properties.get("rows", 0))


def remove(port):
    """Acknowledges the second message of readings that the cloud's session holds, and nothing else."""
    client = Client(port, None, client_id="tailrace-cloud", clean=False, manual=True)
    of_readings = lambda: [m for m in client.messages if m.topic == f"{ROOT}/{GATEWAY}/readings"]
    wait(lambda: len(of_readings()) >= ROWS // BATCH, 30)
    found = of_readings()
    if len(found) > 1:
        client.mqtt.ack(found[1].mid, 1)
        time.sleep(1)  # until it is sent
    client.close()
    return name(found[1]) if len(found) > 1 else None


class Cloud:
    def __init__(self, programs, home, port):
        config = home / "cloud.toml"
        config.write_text(CLOUD.format(home=home, port=port, pg=free_port(), http=free_port()))
        self.programs, self.config, self.log = programs, config, home / "cloud.log"

    @contextlib.contextmanager
    def up(self):
        before = self.connections()
        with running([self.programs / "cloud-ingest", "run", "--config", self.config], self.log) as process:
            wait(lambda: self.connections() > before, 30)
            time.sleep(1)  # its subscriptions follow
            yield process

    def connections(self):
        return self.log.read_text().count("connected to the broker") if self.log.exists() else 0

    def audit(self):
        """Exit status, totals, and the lines of the lane of readings."""
        done = subprocess.run([self.programs / "cloud-ingest", "audit", "--json", "--config", self.config],
                              capture_output=True, text=True, timeout=120)
        ledger = json.loads(done.stdout or "{}")
        lanes = [row for row in ledger.get("lanes", []) if row["lane"] == "readings"]
        return done.returncode, ledger.get("totals", {}), lanes

    def until(self, condition, seconds):
        deadline = time.monotonic() + seconds
        while True:
            answer = self.audit()
            if condition(*answer) or time.monotonic() > deadline:
                return answer
            time.sleep(0.5)


def judge(report, mode, programs, folder):
    home = folder / mode
    home.mkdir()
    port = free_port()
    (home / "mosquitto.conf").write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_inflight_messages 0\nmax_queued_messages 0\n")
    begin = datetime(2026, 3, 1, tzinfo=timezone.utc)
    lines = [f"{(begin + timedelta(seconds=n)).isoformat()},p/flow,{n}" for n in range(ROWS)]
    (home / "rows.csv").write_text("\n".join(["ts,device_id,value", *lines]) + "\n")
    given = {"home": home, "port": port, "mode": mode, "batch": BATCH, "metrics": free_port()}
    (home / "agent.toml").write_text(AGENT.format(**given))
    stored = lambda lanes: sum(row["stored"] for row in lanes)
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(running(["mosquitto", "-c", home / "mosquitto.conf"], home / "mosquitto.log"))
        wait_for_port(port, 10, broker)
        cloud = Cloud(programs, home, port)
        with cloud.up() as process:
            process.terminate()
            process.wait(60)
        agent = [programs / "edge-agent", "run", "--config", home / "agent.toml"]
        log = home / "agent.log"
        # Nobody is there who could acknowledge, so it ends once the broker has everything.
        with running(agent, log) as process:
            report.check(process.wait(90) == 0, f"{mode}: the broker has everything", log.read_text()[-2000:])
        removed = remove(port)
        if not report.check(removed, f"{mode}: a message is removed from the broker's queue: {removed}"):
            return
        epoch, _, seq, rows = removed
        with cloud.up():
            status, totals, lanes = cloud.until(lambda _s, _t, lanes: stored(lanes) >= ROWS - rows, 60)
            report.check(stored(lanes) == ROWS - rows, f"{mode}: everything else is stored", lanes)
            if mode == "broker":
                status, totals, lanes = cloud.until(lambda _s, totals, _l: totals.get("missing"), 60)
                named = [(row["epoch"], row["missing_seqs"]) for row in lanes if row["missing"]]
                report.check(status == 1, "broker: the audit's exit status is 1", status)
                report.check(totals["missing"] == rows, f"broker: {rows} readings are missing", totals)
                report.check(named == [(epoch, str(seq))], f"broker: by the number of their message, {seq}", named)
                return
            pending = sum(row["pending"] for row in lanes)
            report.check(totals["missing"] == 0 and pending == rows, f"cloud: {rows} readings are pending", lanes)
            with running(agent, log) as process:
                report.check(process.wait(90) == 0, "cloud: the agent sends it again, and ends", log.read_text()[-2000:])
            status, totals, lanes = cloud.until(lambda _s, _t, lanes: stored(lanes) == ROWS, 60)
            report.check(stored(lanes) == ROWS, "cloud: then they are stored", lanes)
            status, totals, lanes = cloud.until(lambda status, totals, _l: status == 0 and not totals["pending"], 30)
            report.check(status == 0 and totals["missing"] == 0, "cloud: the ledger balances", totals)
            report.check(sum(row["duplicates"] for row in lanes) == 0, "cloud: nothing is stored twice", lanes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=Path, help="folder with edge-agent and cloud-ingest")
    args = parser.parse_args()
    report = Report("judge_removed")
    with tempfile.TemporaryDirectory(prefix="tailrace-removed-") as folder:
        folder = Path(folder)
        # Started by root, mosquitto becomes a user who must be able to pass.
        folder.chmod(0o755)
        for mode in ("broker", "cloud"):
            judge(report, mode, args.programs.resolve(), folder)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

"""Replicas of cloud-ingest behind a real mosquitto with the shipped configuration.

    judge_replicas.py deploy/mosquitto FOLDER_OF_PROGRAMS

Three replicas share out a fleet's messages and those of JSON devices that nobody sends again. One after the other
is restarted, by SIGTERM and by SIGKILL, two are drained away, one is added: every reading must be in silver once,
with the value that the fleet's formula gives, and gold must be what DuckDB makes of silver. Then: an acknowledgement
that is late by a connection, acknowledgements that a gateway does not own, and what `doctor` says of the shipped
broker and of one as Debian sets it up.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import paho.mqtt.client as mqtt
import pyarrow.parquet as pq
from deltalake import DeltaTable

from judge_broker import CLOUD, GATEWAY, OTHER, ROOT, Client, configure, password, wait
from judge_lake import judge_days, judge_hours, judge_keys, judge_minutes, open_lake
from process import free_port, running, wait_for_port
from report import Report

FLEET = {"gateways": 6, "devices": 20, "readings": 192_000, "seed": 7}
RATE, BATCH = 12_000, 200
KINDS = [("Cel", 20.0, 90.0), ("bar", 1.0, 16.0), ("m/s2", 0.0, 20.0), ("L/min", 0.0, 500.0)]
FLEET_USERS = [f"fleet/gw-{g}" for g in range(FLEET["gateways"])]
SECRET = "password of all"
JSON_BEGIN = datetime(2026, 1, 1, tzinfo=timezone.utc)
JSON_RATE = 400
CONFIG = """
[store]
url = "file://{lake}"
[mqtt]
url = "{url}"
heartbeat = "1s"
max_backoff = "1s"
"""
SHARED = CONFIG + """
share = "ingest"
username = "_cloud"
password = "env:JUDGE_PASSWORD"
ca = "{ca}"
"""


def tls(lake, port, broker):
    """The configuration of a replica behind a broker with the shipped configuration, as it comes from elsewhere."""
    return SHARED.format(lake=lake, url=f"mqtts://localhost:{port}", ca=broker / "certs/ca.crt")


class Replicas:
    """Processes of cloud-ingest by client id, each with a log of its own."""

    def __init__(self, stack, program, config, folder):
        self.stack, self.program, self.config, self.folder = stack, program, config, folder
        self.processes = {}

    def environment(self, client_id=None, **more):
        given = {"JUDGE_PASSWORD": password(CLOUD), "TAILRACE_LOG": "info", **more}
        if client_id is not None:
            given["TAILRACE_CLOUD__MQTT__CLIENT_ID"] = client_id
        return {**os.environ, **given}

    def log(self, name):
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def start(self, name, roles="ingest", **environment):
        before = self.log(name).count("connected to the broker")
        command = [self.program, "run", "--roles", roles, "--config", str(self.config)]
        environment = self.environment(name, **environment)
        process = running(command, self.folder / f"{name}.log", env=environment)
        self.processes[name] = self.stack.enter_context(process)
        if "ingest" in roles:
            wait(lambda: self.log(name).count("connected to the broker") > before, 30)
        return self

    def stop(self, name, signum=signal.SIGTERM):
        """Its exit status."""
        process = self.processes.pop(name)
        process.send_signal(signum)
        return process.wait(60)

    def run(self, *arguments, client_id=None):
        command = [self.program, *arguments, "--config", str(self.config)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=self.environment(client_id))


class JsonDevices(threading.Thread):
    """Publishes single readings until told to stop; done when the broker has them, as such devices are."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.client, self.ended, self.sent = Client(port, GATEWAY), threading.Event(), 0
        self.start()

    def run(self):
        while not self.ended.wait(1 / JSON_RATE):
            ts = JSON_BEGIN + timedelta(seconds=self.sent)
            reading = {"device_id": f"json-{self.sent % 10}", "timestamp": ts.isoformat(), "value": self.sent % 800 / 8}
            self.client.mqtt.publish(f"{ROOT}/{GATEWAY}/json", json.dumps(reading), 1)
            self.sent += 1

    def finish(self):
        self.ended.set()
        self.join()
        taken = wait(lambda: len(self.client.reasons) == self.sent, 60)
        refused = [r for r in self.client.reasons.values() if r.is_failure]
        self.client.close()
        return taken and not refused


def splitmix64(z):
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def fleet_values(start):
    """(device, ts in µs) → (value, unit) of every reading that the fleet sends, by the formula that it documents."""
    expected = {}
    for g in range(FLEET["gateways"]):
        i = np.arange(FLEET["readings"] // FLEET["gateways"], dtype=np.uint64)
        m, n = i % np.uint64(FLEET["devices"]), i // np.uint64(FLEET["devices"])
        number = np.uint64(FLEET["seed"] + (g << 48)) + (m << np.uint64(32)) + n
        u = (splitmix64(number) >> np.uint64(11)).astype(np.float64) / 2.0**53
        low = np.array([k[1] for k in KINDS])[m % np.uint64(4)]
        high = np.array([k[2] for k in KINDS])[m % np.uint64(4)]
        values = low + (high - low) * u
        for m, n, value in zip(m.tolist(), n.tolist(), values.tolist()):
            expected[f"gw-{g}/dev-{m}", start + n * 1_000_000] = (value, KINDS[m % 4][0])
    return expected


def judge_heartbeat(report, replicas, cloud):
    """Nobody's own heartbeat is due for an hour: what is heard after a replica's end is an answer to it."""
    for name in ("cloud-1", "cloud-2"):
        replicas.start(name, TAILRACE_CLOUD__MQTT__HEARTBEAT="1h")
    for signum in (signal.SIGKILL, signal.SIGTERM):
        cloud.messages.clear()
        replicas.stop("cloud-2", signum)
        beats = lambda: [json.loads(m.payload)["online"] for m in cloud.messages if m.topic.endswith("_cloud/status")]
        wait(lambda: beats()[-1:] == [True] and False in beats())
        what = f"{signum.name} of one replica: another one says that the cloud is there"
        # The first beat of a replica that was just started may come late.
        since = beats()[beats().index(False):] if False in beats() else beats()
        report.check(since == [False, True], what, beats())
        replicas.start("cloud-2", TAILRACE_CLOUD__MQTT__HEARTBEAT="1h")
    cloud.messages.clear()
    for name in ("cloud-2", "cloud-1"):
        replicas.stop(name)
    wait(lambda: len(cloud.messages) >= 3)
    last = json.loads(cloud.messages[-1].payload)
    report.check(last["online"] is False and last["client_id"] == "cloud-1", "the last one's farewell stands", last)


def judge_restarts(report, replicas, busy):
    """Rolling restarts, two replicas drained away, one added, all under load."""
    names = ["cloud-1", "cloud-2", "cloud-3"]
    for name in names:
        replicas.start(name)
    for name, signum in [*zip(names, [signal.SIGTERM, signal.SIGKILL, signal.SIGTERM]), ("cloud-1", signal.SIGKILL)]:
        time.sleep(0.5)
        status = replicas.stop(name, signum)
        if signum == signal.SIGTERM:
            report.check(status == 0, f"{name} ends with 0", replicas.log(name)[-2000:])
        time.sleep(0.5)
        replicas.start(name)
    connected = replicas.log("cloud-2").count("connected to the broker")
    refused = replicas.run("drain", "--client-id", "cloud-2")
    report.check(
        refused.returncode == 1 and "is running" in refused.stderr, "drain refuses a replica that runs", refused)
    undisturbed = replicas.log("cloud-2").count("connected to the broker") == connected
    report.check(undisturbed, "and does not disturb it", replicas.log("cloud-2")[-2000:])
    replicas.stop("cloud-3")
    drain(report, replicas, "cloud-3", busy)
    again = replicas.run("drain", "--client-id", "cloud-3")
    report.check(again.returncode == 0 and "no session" in again.stdout, "its session is ended", again)
    replicas.start("cloud-4")
    time.sleep(1)
    replicas.stop("cloud-4", signal.SIGKILL)
    drain(report, replicas, "cloud-4", busy)


def drain(report, replicas, name, busy):
    drained = replicas.run("drain", "--client-id", name)
    stored = re.match(r"(\d+) messages stored", drained.stdout)
    under_load = busy()
    report.check(drained.returncode == 0 and stored, f"{name} is drained away: {drained.stdout.strip()}", drained)
    if under_load and stored:
        report.check(int(stored[1]) > 0, f"the broker held messages for {name}", drained.stdout)


def judge_silver(report, replicas, lake, fleet, sent):
    audit = replicas.run("audit", "--json")
    totals = json.loads(audit.stdout or "{}").get("totals", {})
    report.check(audit.returncode == 0, "every lane balances", audit.stdout[:2000] + audit.stderr)
    report.check(totals.get("missing") == 0, "missing 0", totals)
    report.check(totals.get("stored") == fleet["readings"], f"stored = {fleet['readings']} readings sent", totals)
    doubled = replicas.run("query", "select count(*) as doubled from (select 1 from silver.sensor_readings"
                                    " group by site, device_id, ts having count(*) > 1)")
    report.check(re.search(r"\|\s*0\s*\|", doubled.stdout), "no (site, device_id, ts) twice", doubled)
    silver = DeltaTable(str(lake / "silver/sensor_readings")).to_pyarrow_dataset()
    columns = ["site", "device_id", "ts", "value", "unit", "quality"]
    rows = silver.to_table(columns=columns).to_pydict()
    micros = [int(ts.timestamp() * 1e6 + 0.5) for ts in rows["ts"]]
    keyed = {(s, d, t): (v, u) for s, d, t, v, u in
             zip(rows["site"], rows["device_id"], micros, rows["value"], rows["unit"])}
    start = int(datetime.fromisoformat(fleet["start"].replace("Z", "+00:00")).timestamp()) * 1_000_000
    expected = {("fleet", *key): value for key, value in fleet_values(start).items()}
    of_fleet = {key: value for key, value in keyed.items() if key[0] == "fleet"}
    report.none([k for k in expected if k not in of_fleet], "every reading of the fleet is in silver")
    report.none([k for k in of_fleet if k not in expected], "and nothing that it did not send")
    unequal = [(k, of_fleet[k], v) for k, v in expected.items() if k in of_fleet and of_fleet[k] != v]
    report.none(unequal, "with the values of the fleet's formula, to the bit")
    begin = int(JSON_BEGIN.timestamp())
    json_sent = {("plant-1", f"json-{n % 10}", (begin + n) * 1_000_000): n % 800 / 8 for n in range(sent)}
    of_json = {key: value for key, (value, _) in keyed.items() if key[0] == "plant-1"}
    missing = [key for key in json_sent if key not in of_json]
    report.none(missing, f"every one of {sent} JSON readings that the broker took is in silver")
    report.check(of_json == json_sent, "with its value, and no other", f"{len(of_json)} in silver")


def judge_replicas(report, shipped, programs, folder):
    home = folder / "replicas"
    home.mkdir()
    (folder / "broker").mkdir()
    port, tls_port = free_port(), free_port()
    configure(shipped, folder / "broker", port, tls_port, {user: SECRET for user in FLEET_USERS})
    config, lake = home / "cloud.toml", home / "lake"
    config.write_text(tls(lake, tls_port, folder / "broker"))
    with contextlib.ExitStack() as stack:
        broker = running(["mosquitto", "-c", str(folder / "broker/mosquitto.conf")], folder / "broker.log")
        broker = stack.enter_context(broker)
        if not report.check(wait_for_port(port, 10, broker), "mosquitto starts", (folder / "broker.log").read_text()):
            return
        replicas = Replicas(stack, programs / "cloud-ingest", config, home)
        same = replicas.run("run", "--roles", "ingest")
        report.check(same.returncode == 1 and "client_id" in same.stderr, "replicas need names of their own", same)
        cloud = Client(port, CLOUD)
        cloud.subscribe(f"{ROOT}/_cloud/status")
        judge_heartbeat(report, replicas, cloud)
        replicas.start("refiner", roles="refine")
        options = [f"--{name}={value}" for name, value in FLEET.items()]
        options += [f"--rate={RATE}", f"--batch={BATCH}", f"--url=mqtt://127.0.0.1:{port}"]
        options += ["--password=env:FLEET_PASSWORD"]
        with open(home / "fleet.json", "wb") as out, open(home / "fleet.log", "wb") as log:
            # Sessions first, so that nobody misses what comes before.
            for name in ("cloud-1", "cloud-2", "cloud-3"):
                replicas.start(name)
            secret = os.environ | {"FLEET_PASSWORD": SECRET}
            fleet = subprocess.Popen([programs / "firmware-sim", "fleet", *options], stdout=out, stderr=log, env=secret)
            stack.callback(lambda: fleet.poll() is None and fleet.kill())
            devices = JsonDevices(port)
            for name in ("cloud-1", "cloud-2", "cloud-3"):
                replicas.stop(name)
            judge_restarts(report, replicas, lambda: fleet.poll() is None)
            report.check(devices.finish(), f"{devices.sent} JSON messages are taken by the broker")
            ended = fleet.wait(240)
        if not report.check(ended == 0, "the fleet is acknowledged to its end", (home / "fleet.log").read_text()[-2000:]):
            return
        # What a session still holds comes to its replica, which is there until nothing came for a while.
        quiet(replicas, lake)
        for name in list(replicas.processes):
            report.check(replicas.stop(name) == 0, f"{name} ends with 0", replicas.log(name)[-2000:])
        replicas.start("refiner", roles="refine").stop("refiner")
        judge_silver(report, replicas, lake, json.loads((home / "fleet.json").read_text()), devices.sent)
        db = open_lake(lake)
        for judge in (judge_keys, judge_hours, judge_minutes, judge_days):
            judge(report, db)
        cloud.close()


def quiet(replicas, lake):
    """Until bronze has not grown for two seconds."""
    count = lambda: sum(1 for _ in (lake / "bronze").rglob("*.parquet"))
    seen, since = count(), time.monotonic()
    while time.monotonic() - since < 2:
        time.sleep(0.1)
        if count() != seen:
            seen, since = count(), time.monotonic()


def metric(port, name):
    """A counter of cloud-ingest or the agent; 0 while nobody answers."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
        lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}(\{{.*\}})? ", line))
    return 0


def judge_epochs(report, programs, folder):
    """The broker forgets everything while bronze stands still, and gives the packet ids of what was received to other
    messages. Were the late acknowledgements sent on the new connection, the broker would take them for those."""
    home = folder / "epochs"
    (home / "lake/bronze/sensor_data").mkdir(parents=True)
    port, http = free_port(), free_port()
    conf = home / "mosquitto.conf"
    conf.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    config = home / "cloud.toml"
    serve = f'[serve]\npg_port = {free_port()}\nhttp_port = {http}\n[bronze]\nmax_age = "5s"\n'
    config.write_text(CONFIG.format(lake=home / "lake", url=f"mqtt://127.0.0.1:{port}") + serve)
    command = ["mosquitto", "-c", str(conf)]
    publish = lambda client, words: [client.publish(f"{ROOT}/{GATEWAY}/json", word.encode()) for word in words]
    # A file where the year's folder should be: nothing can be put.
    block = home / f"lake/bronze/sensor_data/year={datetime.now(timezone.utc):%Y}"
    block.write_text("")
    received = "tailrace_cloud_messages_received_total"
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(running(command, home / "broker.log"))
        wait_for_port(port, 10, broker)
        replicas = Replicas(stack, programs / "cloud-ingest", config, home).start("cloud", roles="ingest,serve")
        first = [f"first {n}" for n in range(5)]
        publish(sender := Client(port, None), first)
        sender.mqtt.loop_stop()
        wait(lambda: metric(http, "tailrace_cloud_bronze_put_retries_total") > 0, 30)
        broker.kill()
        broker.wait()
        connected = replicas.log("cloud").count("connected to the broker")
        broker = stack.enter_context(running(command, home / "broker.log"))
        wait_for_port(port, 10, broker)
        wait(lambda: replicas.log("cloud").count("connected to the broker") > connected, 30)
        second = [f"second {n}" for n in range(5)]
        # The subscription follows the connection.
        listener = Client(port, None)
        wait(lambda: (publish(listener, ["probe"]), metric(http, received) > 5)[1], 30)
        publish(listener, second)
        wait(lambda: metric(http, received) >= 11, 30)
        block.unlink()
        late = wait(lambda: metric(http, "tailrace_cloud_acknowledgements_stale_total") >= 5, 60)
        report.check(late, "acknowledgements of an earlier connection are not sent", replicas.log("cloud")[-2000:])
        replicas.stop("cloud", signal.SIGKILL)
        before = stored(home / "lake")
        if before & set(second):
            print("        this machine is slow: the second messages were stored before the SIGKILL")
        replicas.start("cloud", roles="ingest,serve")
        wait(lambda: set(second) <= stored(home / "lake"), 30)
        replicas.stop("cloud")
        missing = [word for word in first + second if word not in stored(home / "lake")]
        report.none(missing, "and what got their packet ids is delivered again and stored")
        listener.close()


def stored(lake):
    """Payloads in bronze."""
    tables = (pq.read_table(file, columns=["payload"]) for file in (lake / "bronze").rglob("*.parquet"))
    return {payload.decode() for table in tables for payload in table["payload"].to_pylist()}


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
username = "plant-1/gw-1"
password = "env:JUDGE_PASSWORD"
[uplink]
drain = "60s"
[metrics]
listen = "127.0.0.1:{metrics}"
"""


def judge_agent(report, shipped, programs, folder):
    """A real agent holds messages that are not acknowledged; the judge is the cloud, and another gateway."""
    home = folder / "agent"
    home.mkdir()
    (folder / "agents-broker").mkdir()
    port, metrics = free_port(), free_port()
    configure(shipped, folder / "agents-broker", port, free_port())
    begin = datetime(2026, 3, 1, tzinfo=timezone.utc)
    lines = [f"{(begin + timedelta(seconds=n)).isoformat()},p/flow,{n}" for n in range(1000)]
    (home / "rows.csv").write_text("\n".join(["ts,device_id,value", *lines]) + "\n")
    (home / "agent.toml").write_text(AGENT.format(home=home, port=port, metrics=metrics))
    topic = f"{ROOT}/{GATEWAY}/ack"
    with contextlib.ExitStack() as stack:
        command = ["mosquitto", "-c", str(folder / "agents-broker/mosquitto.conf")]
        broker = stack.enter_context(running(command, folder / "agents-broker.log"))
        wait_for_port(port, 10, broker)
        cloud, other = Client(port, CLOUD), Client(port, OTHER)
        cloud.subscribe(f"{ROOT}/{GATEWAY}/#")
        nobody = "00000000-0000-0000-0000-000000000000"
        beat = {"v": 1, "online": True, "at": "2026-03-01T00:00:00Z", "writer": nobody}
        cloud.publish(f"{ROOT}/_cloud/status", json.dumps(beat).encode(), retain=True)
        environment = {**os.environ, "JUDGE_PASSWORD": password(GATEWAY)}
        command = [programs / "edge-agent", "run", "--config", str(home / "agent.toml")]
        agent = stack.enter_context(running(command, home / "log", env=environment))

        def names():
            properties = [dict(getattr(m.properties, "UserProperty", [])) for m in cloud.messages]
            return {(p["epoch"], p["lane"], int(p["seq"])) for p in properties if "seq" in p}

        def ack(*ranges):
            keys = ("epoch", "lane", "from", "to")
            return json.dumps({"v": 1, "ranges": [dict(zip(keys, r)) for r in ranges]}).encode()

        wait(lambda: any(lane == "readings" for _, lane, _ in names()), 30)
        time.sleep(1.5)  # the rest of the file, and the closing of its batches
        held = names()
        epoch = next(epoch for epoch, *_ in held)
        everything = [(epoch, lane, 0, 10_000) for lane in ("readings", "control", "aggregates", "anomalies")]
        reason = other.publish(topic, ack(*everything))
        report.check(reason is not None and reason.is_failure, "another gateway's ack is refused", reason)
        foreign = [("01900000-0000-7000-8000-000000000001", lane, 0, 10) for lane in ("readings", "control")]
        cloud.publish(topic, ack(*foreign))
        counted = wait(lambda: metric(metrics, "tailrace_edge_unknown_acks_total") == 2)
        report.check(counted, "an ack for what the agent does not hold is counted",
                     f"{metric(metrics, 'tailrace_edge_unknown_acks_total')}\n{(home / 'log').read_text()[-1500:]}")
        unacknowledged = metric(metrics, "tailrace_edge_unacknowledged_messages")
        report.check(unacknowledged >= len(held) > 0, "and the agent still holds everything",
                     f"{unacknowledged} of {len(held)}")
        deadline = time.monotonic() + 30
        while agent.poll() is None and time.monotonic() < deadline:
            cloud.publish(topic, ack(*((e, lane, seq, seq) for e, lane, seq in names())))
            time.sleep(0.2)
        ended = agent.poll() == 0
        report.check(ended, "the cloud's own ack lets it forget, and end", (home / "log").read_text()[-1500:])
        for client in (cloud, other):
            client.close()


def judge_doctor(report, shipped, programs, folder):
    """The shipped broker passes, over a SIGKILL too; one as Debian delivers it does not, and is told why."""
    home = folder / "doctor"
    home.mkdir()

    def examine(name):
        port, box = free_port(), home / name
        box.mkdir()
        config = home / f"{name}.toml"
        if name == "shipped":
            tls_port = free_port()
            configure(shipped, box, port, tls_port)
            config.write_text(tls(home / "lake", tls_port, box))
        else:
            (box / "mosquitto.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
            config.write_text(CONFIG.format(lake=home / "lake", url=f"mqtt://127.0.0.1:{port}") + 'share = "ingest"\n')
        with open(box / "mosquitto.conf", "a", encoding="utf-8") as conf:
            conf.write("sys_interval 1\n")  # less to wait for
        # Starts the broker again whenever it has ended.
        loop = f"while :; do mosquitto -c {box}/mosquitto.conf & echo $! > {box}/now; wait $!; done"
        with running(["sh", "-c", loop], box / "log") as supervisor:
            wait_for_port(port, 10, supervisor)
            replicas = Replicas(None, programs / "cloud-ingest", config, home)
            restart = f"kill -9 $(cat {box}/now)"
            done = replicas.run("doctor", "--json", "--restart-command", restart, client_id="examined")
            left = Client(port, CLOUD if name == "shipped" else None)
            left.subscribe(f"{ROOT}/_cloud/doctor/#")
            left.publish(f"{ROOT}/_cloud/doctor/end")
            wait(lambda: left.messages)
            left.close()
        return done, json.loads(done.stdout or '{"checks": []}')["checks"], left.topics()

    with ThreadPoolExecutor() as pool:
        brokers = dict(zip(("shipped", "debian"), pool.map(examine, ("shipped", "debian"))))
    for name, (done, checks, left) in brokers.items():
        expected = {"shipped": 0, "debian": 1}[name]
        table = "\n".join(f"{c['check']}: {c['outcome']}: {c['saw']}" for c in checks) + done.stderr
        report.check(done.returncode == expected, f"doctor of the {name} broker: exit status {expected}", table)
        loses = {c["check"] for c in checks if c["outcome"] == "loses"}
        wanted = set() if name == "shipped" else {"slow subscriber", "absent subscriber", "restart"}
        report.check(loses == wanted, f"it names {sorted(wanted) or 'nothing'}", table)
        report.check(left == {f"{ROOT}/_cloud/doctor/end"}, "it leaves nothing retained", left)
    _, checks, _ = brokers["shipped"]
    report.none([c for c in checks if c["outcome"] != "ok"], f"all of {len(checks)} checks are tried, and well")
    changes = " ".join(check["change"] for check in brokers["debian"][1])
    told = all(option in changes for option in ("max_queued_messages", "persistence true"))
    report.check(told, "it says which options to set", changes)


def main():
    shipped, programs = Path(sys.argv[1]), Path(sys.argv[2])
    report, doctors = Report("judge_replicas"), Report("judge_replicas, doctor")
    with tempfile.TemporaryDirectory(prefix="tailrace-replicas-") as name:
        folder = Path(name)
        # mosquitto, which leaves root, must get at its folder in here.
        folder.chmod(0o755)
        parts = {
            "replicas": lambda: judge_replicas(report, shipped, programs, folder),
            "epochs": lambda: judge_epochs(report, programs, folder),
            "agent": lambda: judge_agent(report, shipped, programs, folder),
            "doctor": lambda: judge_doctor(doctors, shipped, programs, folder),
        }
        chosen = [name for name in parts if name in (sys.argv[3:] or parts)]

        def run(names):
            for part in names:
                began = time.monotonic()
                parts[part]()
                print(f"  {part}: {time.monotonic() - began:.0f} s", flush=True)

        # The doctor mostly waits.
        with ThreadPoolExecutor() as pool:
            examined = pool.submit(run, [name for name in chosen if name == "doctor"])
            run([name for name in chosen if name != "doctor"])
            examined.result()
    reports = [r for r in (report, doctors) if r.passed + r.failed > 0 or not chosen]
    return max((r.finish() for r in reports), default=1)


if __name__ == "__main__":
    sys.exit(main())

"""The agent's `mqtt_source` against a real mosquitto that is late, killed, and made to forget.

    judge_mqtt_source.py EDGE_AGENT

Whatever other people's devices publish must be polled, and every polled reading be sealed or rejected with its
reason. What is published with QoS 1 while the agent is stopped must come when it is back.
"""

import base64
import contextlib
import glob
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from process import free_port, running, wait_for_port
from report import Report

CONFIG = """
site = "judge"
gateway = "gw"
data_dir = "{folder}/agent"
[[asset]]
id = "press"
[[device]]
id = "press/temperature"
type = "temperature"
asset = "press"
unit = "Cel"
[[device]]
id = "press/state"
type = "state"
asset = "press"
unit = "1"
kind = "state"
[[device]]
id = "press/speed"
type = "speed"
asset = "press"
unit = "/min"
[[mqtt_source]]
url = "mqtt://127.0.0.1:{port}"
username = "agent"
password = "file:{folder}/secret"
[[mqtt_source.topic]]
filter = "shop/+/state"
value = "/temp"
level = 2
devices = {{ "p-7" = "press/temperature" }}
time = "/ts"
unit = "[degF]"
[[mqtt_source.topic]]
filter = "shop/+/state"
value = "/state"
level = 2
devices = {{ "p-7" = "press/state" }}
time = "/ts"
words = {{ "RUNNING" = 1, "IDLE" = 0 }}
[[mqtt_source.topic]]
filter = "shop/speed"
value = ""
device = "press/speed"
[[mqtt_source.topic]]
filter = "secret/x"
value = ""
device = "press/speed-2"
[[device]]
id = "press/speed-2"
type = "speed"
asset = "press"
unit = "/min"
[mqtt]
url = "mqtt://127.0.0.1:{nowhere}"
backoff = "100ms"
max_backoff = "500ms"
[metrics]
listen = "127.0.0.1:{metrics}"
"""
BROKER = """
listener {port} 127.0.0.1
plugin {security}
plugin_opt_config_file {folder}/security.json
persistence true
autosave_interval 1
persistence_location {folder}/broker/
pid_file {folder}/broker.pid
"""
# An acl_file only keeps messages back; this plugin of mosquitto's refuses the subscription itself.
SECURITY = "/usr/lib/*/mosquitto_dynamic_security.so"
ALLOWED = {"agent": "subscribePattern", "device": "publishClientSend"}


class Shop:
    """Other people's devices."""

    def __init__(self, port):
        self.mqtt = mqtt.Client(CallbackAPIVersion.VERSION2, f"shop-{time.monotonic_ns()}", protocol=mqtt.MQTTv5)
        self.mqtt.username_pw_set("device", "device")
        self.mqtt.max_inflight_messages_set(500)
        self.mqtt.connect("127.0.0.1", port)
        self.mqtt.loop_start()
        self.micros = time.time_ns() // 1000

    def publish(self, topic, payloads, qos=1, retain=False):
        sent = [self.mqtt.publish(topic, payload, qos, retain) for payload in payloads]
        for message in sent:
            message.wait_for_publish(30)

    def states(self, n, device="p-7"):
        """`n` messages of two readings, each later than the one before."""
        payloads = []
        for _ in range(n):
            self.micros += 1000
            payloads.append(json.dumps({"temp": 212, "state": "RUNNING", "ts": self.micros}))
        self.publish(f"shop/{device}/state", payloads)

    def close(self):
        self.mqtt.disconnect()
        self.mqtt.loop_stop()


def wait(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


class Agent:
    """What its own metrics say."""

    def __init__(self, port):
        self.port = port

    def metrics(self):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as page:
            return page.read().decode()
        return ""

    def count(self, stage, outcome):
        found = re.search(
            rf'^tailrace_edge_readings_total{{stage="{stage}",outcome="{outcome}"}} (\d+)$', self.metrics(), re.M)
        return int(found[1]) if found else 0

    def rejected(self):
        pairs = re.findall(
            r'^tailrace_edge_readings_total{stage="source",outcome="rejected:(\w+)"} (\d+)$', self.metrics(), re.M)
        return {reason: int(n) for reason, n in pairs}

    def faults(self, reason):
        found = re.search(rf'^tailrace_edge_source_faults_total{{reason="{reason}"}} (\d+)$', self.metrics(), re.M)
        return int(found[1]) if found else 0

    def polled(self):
        return self.count("source", "polled")

    def balances(self):
        return self.polled() == self.count("seal", "sealed") + sum(self.rejected().values())


def security():
    """Both users, each with its name for a password; what each may do with `shop/#`, and nothing else."""
    closed = {"publishClientSend": False, "publishClientReceive": True, "subscribe": False, "unsubscribe": True}
    clients, roles = [], []
    for user, allowed in ALLOWED.items():
        salt, iterations = user.encode().ljust(12), 101  # the plugin wants 12 bytes
        digest = hashlib.pbkdf2_hmac("sha512", user.encode(), salt, iterations, 64)
        clients.append({
            "username": user, "password": base64.b64encode(digest).decode(), "salt": base64.b64encode(salt).decode(),
            "iterations": iterations, "roles": [{"rolename": user}],
        })
        roles.append({"rolename": user, "acls": [{"acltype": allowed, "topic": "shop/#", "allow": True}]})
    return {"defaultACLAccess": closed, "clients": clients, "roles": roles}


def prepare(folder, port):
    (folder / "broker").mkdir()
    (folder / "secret").write_text("agent\n")
    (folder / "security.json").write_text(json.dumps(security()))
    plugin = next(iter(glob.glob(SECURITY)), SECURITY)
    (folder / "mosquitto.conf").write_text(BROKER.format(folder=folder, port=port, security=plugin))
    # Started by root, mosquitto becomes the user `mosquitto`, who must be able to read and write here.
    with contextlib.suppress(LookupError, PermissionError):
        for path in (folder, *folder.rglob("*")):
            shutil.chown(path, "mosquitto")


class Judge:
    """The processes, and what is checked in which order; each starts and ends one of them."""

    def __init__(self, report, binary, folder, stack):
        self.report, self.folder, self.stack = report, folder, stack
        self.port, metrics = free_port(), free_port()
        prepare(folder, self.port)
        self.config = folder / "agent.toml"
        text = CONFIG.format(folder=folder, port=self.port, nowhere=free_port(), metrics=metrics)
        self.config.write_text(text)
        self.binary, self.agent = binary, Agent(metrics)

    def start_agent(self):
        command = [self.binary, "run", "--config", str(self.config)]
        return self.stack.enter_context(running(command, self.folder / "agent.log"))

    def start_broker(self):
        command = ["mosquitto", "-c", str(self.folder / "mosquitto.conf")]
        process = self.stack.enter_context(running(command, self.folder / "broker.log"))
        self.report.check(wait_for_port(self.port, 10, process), "mosquitto starts",
                          (self.folder / "broker.log").read_text())
        return process, Shop(self.port)

    def balances(self):
        self.report.check(wait(self.agent.balances), "polled = sealed + rejected", self.agent.metrics())

    def first_hour(self):
        """A broker that is late, and messages of all kinds."""
        report, agent = self.report, self.agent
        broker, shop = self.start_broker()
        shop.publish("shop/speed", ["1450"], retain=True)
        shop.close()
        broker.terminate()
        broker.wait()
        process = self.start_agent()
        report.check(wait(lambda: agent.faults("broker") > 0), "the agent runs though the broker is down",
                     agent.metrics())
        broker, shop = self.start_broker()
        report.check(wait(lambda: agent.faults("refused") == 1), "a filter that the ACL refuses is a source fault",
                     agent.metrics())
        shop.states(100)
        shop.states(3, device="p-9")
        shop.publish("shop/p-7/state", ["what is this", b"\xff\x00", '{"temp":', "[]", '{"temp": null}'])
        late = json.dumps({"temp": 1, "ts": shop.micros + 3_600_000_000})
        shop.publish("shop/p-7/state", [late, '{"temp": 1, "ts": 1}'])
        wanted = {"unknown_device": 6, "malformed": 4, "no_value": 1, "future": 1, "past": 1}
        report.check(wait(lambda: agent.rejected() == wanted), "what is no reading is rejected by its reason",
                     f"{agent.rejected()}, wanted {wanted}")
        report.check(agent.polled() == 213, "all of it is polled, and the retained message of unknown age is not sent",
                     f"{agent.polled()} of 213")
        self.balances()
        process.terminate()
        report.check(process.wait(20) == 0, "the agent stops cleanly", process.returncode)
        return broker, shop

    def absence(self, shop):
        """The agent is stopped while devices go on: the broker has a session for it."""
        report, agent = self.report, self.agent
        shop.states(300)
        shop.publish("shop/speed", ["1500"] * 5)
        self.start_agent()
        report.check(wait(lambda: agent.polled() >= 600), "what was published meanwhile comes", agent.metrics())
        shop.publish("shop/speed", ["1510"])
        report.check(wait(lambda: agent.polled() == 601), "but what has no time of its own is read as it arrives only",
                     f"{agent.polled()} of 601")
        report.check(not agent.rejected(), "nothing is rejected", agent.rejected())
        self.balances()

    def kill(self, broker, shop, forgets):
        """SIGKILL for the broker."""
        report, agent = self.report, self.agent
        time.sleep(2)  # autosave_interval 1
        faults, polled = agent.faults("broker"), agent.polled()
        broker.kill()
        broker.wait()
        shop.close()
        if forgets:
            (self.folder / "broker/mosquitto.db").unlink()
        report.check(wait(lambda: agent.faults("broker") > faults), "a killed broker is a source fault")
        broker, shop = self.start_broker()
        what = "without" if forgets else "with"
        # Until the subscription stands, a broker without a session keeps nothing for the agent.
        arrived = wait(lambda: shop.states(1) or agent.polled() > polled)
        report.check(arrived, f"it is listened to again, {what} its sessions")
        self.balances()
        return broker, shop

    def sensors(self, shop):
        """The command beside the running agent; one device has left a retained message."""
        shop.publish("shop/p-7/state", [json.dumps({"temp": 212, "ts": shop.micros})], retain=True)
        command = [self.binary, "sensors", "--config", str(self.config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        for what, line in [
            ("what has come, in the device's unit", r"press/temperature: (100|99\.9999|100\.0000)\d* Cel \(good\)"),
            ("what has not", r"press/speed: nothing came within 5s"),
            ("what the broker refuses", r"mqtt://127\.0\.0\.1:\d+: the broker refuses secret/x .*; see its ACL"),
        ]:
            found = re.search(f"^{line}$", done.stdout, re.M)
            self.report.check(found, f"sensors says {what}", done.stdout + done.stderr)
        self.report.check(done.returncode == 1, "and fails, since the broker refuses something", done.returncode)


def main():
    report = Report("judge_mqtt_source")
    with tempfile.TemporaryDirectory(prefix="tailrace-mqtt-source-") as name, contextlib.ExitStack() as stack:
        judge = Judge(report, sys.argv[1], Path(name), stack)
        broker, shop = judge.first_hour()
        judge.absence(shop)
        for forgets in (False, True):
            broker, shop = judge.kill(broker, shop, forgets)
        judge.sensors(shop)
        shop.close()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

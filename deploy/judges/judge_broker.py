"""Starts a real mosquitto with the shipped configuration and tries what the ACL must allow and refuse.

    judge_broker.py deploy/mosquitto

Also: strangers are refused, sessions, queues and retained documents survive SIGKILL, and a slow subscriber with
5,000 messages outstanding loses none (mosquitto's own defaults lose four fifths of them).
"""

import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from process import free_port, running, wait_for_port
from report import Report

ROOT = "tailrace/v1"
CLOUD, GATEWAY, OTHER = "_cloud", "plant-1/gw-1", "plant-1/gw-2"
STREAMS = ["readings", "aggregates", "anomalies", "control", "json", "status", "devices"]
BACKLOG = 5000


def password(user):
    return f"password of {user}"


def configure(shipped, folder, port, tls_port, others=None):
    """The shipped files with nothing replaced but paths and ports, and certificates of its own. `others` are further
    users and their passwords."""
    certificates = [shipped.parent / "certificates.sh", folder / "certs", "localhost"]
    subprocess.run(certificates, check=True, stdout=subprocess.DEVNULL)
    text = (shipped / "mosquitto.conf").read_text()
    for old, new in [
        (r"^listener 1883 127.0.0.1$", f"listener {port} 127.0.0.1"),
        (r"^listener 8883$", f"listener {tls_port} 127.0.0.1"),
        (r"^(certfile|keyfile|cafile) /mosquitto/certs/", rf"\1 {folder}/certs/"),
        (r"^password_file .*$", f"password_file {folder}/passwords"),
        (r"^acl_file .*$", f"acl_file {folder}/acl"),
        (r"^persistence_location .*$", f"persistence_location {folder}/data/"),
    ]:
        text, n = re.subn(old, new, text, flags=re.M)
        expected = 3 if "certfile" in old else 1
        if n != expected:
            sys.exit(f"mosquitto.conf: {n} lines match {old}, expected {expected}")
    (folder / "data").mkdir()
    (folder / "mosquitto.conf").write_text(text + f"pid_file {folder}/pid\n")
    shutil.copy(shipped / "acl", folder / "acl")
    passwords = folder / "passwords"
    passwords.touch()
    users = {user: password(user) for user in (CLOUD, GATEWAY, OTHER)} | (others or {})
    for user, secret in users.items():
        subprocess.run(["mosquitto_passwd", "-b", passwords, user, secret], check=True)
    # Started by root, mosquitto becomes the user `mosquitto`, who must be able to read and write here.
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            shutil.chown(path, "mosquitto")


class Client:
    """A connected MQTT 5 client that remembers what it got and what became of what it sent."""

    def __init__(self, port, user, secret=None, client_id=None, clean=True, manual=False, ca=None, will=None):
        self.messages, self.reasons, self.connack = [], {}, None
        c = self.mqtt = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id or f"judge-{time.monotonic_ns()}",
            protocol=mqtt.MQTTv5,
            manual_ack=manual,
        )
        c.max_inflight_messages_set(500)
        c.max_queued_messages_set(0)
        if user is not None:
            c.username_pw_set(user, password(user) if secret is None else secret)
        if ca is not None:
            c.tls_set(ca)
        c.on_connect = lambda _c, _u, _f, reason, _p: setattr(self, "connack", reason)
        c.on_message = lambda _c, _u, message: self.messages.append(message)
        c.on_publish = lambda _c, _u, mid, reason, _p: self.reasons.__setitem__(mid, reason)
        c.on_subscribe = lambda _c, _u, mid, reasons, _p: self.reasons.__setitem__(mid, reasons[0])
        if will is not None:
            c.will_set(*will, qos=1)
        properties = Properties(PacketTypes.CONNECT)
        if not clean:
            properties.SessionExpiryInterval = 3600
        c.connect("127.0.0.1" if ca is None else "localhost", port, clean_start=clean, properties=properties)
        c.loop_start()
        wait(lambda: self.connack is not None)

    def publish(self, topic, payload=b"x", retain=False):
        """The broker's reason code for a publish with QoS 1."""
        return self.outcome(self.mqtt.publish(topic, payload, 1, retain).mid)

    def subscribe(self, topic):
        """The broker's reason code for a subscription with QoS 1."""
        return self.outcome(self.mqtt.subscribe(topic, 1)[1])

    def outcome(self, mid):
        wait(lambda: mid in self.reasons)
        return self.reasons.get(mid)

    def topics(self):
        return {message.topic for message in self.messages}

    def close(self):
        self.mqtt.disconnect()
        self.mqtt.loop_stop()


def wait(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def judge_entry(report, port):
    for what, user, secret in [
        ("no name", None, None),
        ("an unknown name", "plant-1/gw-9", "x"),
        ("a wrong password", GATEWAY, "x"),
    ]:
        client = Client(port, user, secret)
        refused = client.connack is not None and client.connack.is_failure
        report.check(refused, f"{what} is refused", f"CONNACK {client.connack}")
        client.close()


def judge_tls(report, tls_port, folder):
    client = Client(tls_port, GATEWAY, ca=folder / "certs/ca.crt")
    entered = client.connack is not None and not client.connack.is_failure
    report.check(entered, "a gateway enters by TLS", f"CONNACK {client.connack}")
    client.close()
    try:
        client = Client(tls_port, GATEWAY, ca="/etc/ssl/certs/ca-certificates.crt")
        report.check(False, "another authority's certificate is not believed", f"CONNACK {client.connack}")
        client.close()
    except ssl.SSLCertVerificationError:
        report.check(True, "another authority's certificate is not believed")


def judge_topics(report, port):
    """Both what the broker says (reason code) and what it does (what arrives)."""
    cloud, gateway, other = (Client(port, user) for user in (CLOUD, GATEWAY, OTHER))
    for subscription in (f"$share/ingest/{ROOT}/+/+/readings", f"{ROOT}/#"):
        reason = cloud.subscribe(subscription)
        report.check(reason is not None and not reason.is_failure, f"cloud subscribes {subscription}", reason)
    for topic in (f"{ROOT}/{GATEWAY}/ack", f"{ROOT}/{GATEWAY}/cmd/#", f"{ROOT}/_cloud/status"):
        gateway.subscribe(topic)
    own, foreign = f"{ROOT}/{GATEWAY}", f"{ROOT}/{OTHER}"
    allowed = [(gateway, f"{own}/{stream}") for stream in STREAMS]
    allowed += [(cloud, f"{own}/ack"), (cloud, f"{own}/cmd/model"), (cloud, f"{ROOT}/_cloud/status")]
    allowed += [(cloud, f"{ROOT}/_cloud/doctor/7/flood"), (cloud, f"{ROOT}/_cloud/rules/hot")]
    denied = [(gateway, f"{foreign}/{stream}") for stream in [*STREAMS, "ack", "cmd/model"]]
    denied += [(gateway, f"{own}/{stream}") for stream in ("ack", "cmd/model", "rumours", "status/more")]
    denied += [(gateway, topic) for topic in (f"{ROOT}/_cloud/status", f"{ROOT}/plant-2/gw-1/status", "other")]
    denied += [(gateway, f"{ROOT}/_cloud/doctor/7/flood"), (gateway, f"{ROOT}/_cloud/rules/hot")]
    denied += [(cloud, f"{own}/readings"), (cloud, f"{own}/status")]
    names = {id(cloud): "cloud", id(gateway): "gateway"}
    for client, topic in allowed:
        reason = client.publish(topic)
        report.check(reason is not None and not reason.is_failure, f"{names[id(client)]} writes {topic}", reason)
    for client, topic in denied:
        reason = client.publish(topic, b"denied")
        refused = reason is not None and reason.getName() == "Not authorized"
        report.check(refused, f"{names[id(client)]} may not write {topic}", f"PUBACK {reason}")
    # The gateways' own streams reach the cloud; a foreign listener gets nothing that it subscribed to.
    wanted = {topic for _, topic in allowed}
    report.check(wait(lambda: wanted <= cloud.topics()), "the cloud receives what was allowed",
                 f"missing {sorted(wanted - cloud.topics())}")
    leaked = [message.topic for message in cloud.messages if message.payload == b"denied"]
    report.none(leaked, "nothing that was denied is delivered")
    heard = {f"{own}/ack", f"{own}/cmd/model", f"{ROOT}/_cloud/status"}
    report.check(wait(lambda: heard == gateway.topics()), "a gateway hears ack, cmd and heartbeat", gateway.topics())
    for topic in (f"{ROOT}/#", "#", f"{own}/ack", f"{own}/cmd/#", f"{own}/readings"):
        other.subscribe(topic)
    cloud.publish(f"{own}/ack")
    cloud.publish(f"{own}/cmd/model")
    gateway.publish(f"{own}/readings")
    cloud.publish(f"{foreign}/ack")  # what it may hear comes last, so that the rest would have come before
    arrived = wait(lambda: f"{foreign}/ack" in other.topics())
    strange = {t for t in other.topics() if not t.startswith(f"{foreign}/") and t != f"{ROOT}/_cloud/status"}
    report.check(arrived and not strange, "a gateway hears nothing of another", f"it heard {sorted(other.topics())}")
    for client in (cloud, gateway, other):
        client.close()


def judge_forgery(report, port):
    """An agent forgets what `ack` names, so nobody but the cloud may write another gateway's, in whatever way."""
    topic = f"{ROOT}/{GATEWAY}/ack"
    victim, cloud = Client(port, GATEWAY), Client(port, CLOUD)
    for filter in (topic, f"{ROOT}/{GATEWAY}/#"):
        victim.subscribe(filter)
    attacker = Client(port, OTHER, will=(topic, b"by last will"))
    for retain in (False, True):
        reason = attacker.publish(topic, b"forged", retain)
        refused = reason is not None and reason.getName() == "Not authorized"
        report.check(refused, f"a forged ack (retain {retain}) is refused", f"PUBACK {reason}")
    # Gone without a word: the broker publishes the last will, if it may.
    attacker.mqtt.loop_stop()
    attacker.mqtt.socket().close()
    listener = Client(port, GATEWAY)
    listener.subscribe(topic)
    cloud.publish(topic, b"by the cloud")
    heard = wait(lambda: any(m.payload == b"by the cloud" for m in victim.messages))
    report.check(heard, "the cloud's own ack arrives")
    forged = [m.payload for m in victim.messages + listener.messages if m.payload != b"by the cloud"]
    report.none(forged, "no forged ack arrives, not by a last will, nor retained")
    for client in (victim, cloud, listener):
        client.close()


def judge_durability(report, command, log, port, process):
    """SIGKILL with a backlog for a slow subscriber; the process that runs afterwards."""
    slow = Client(port, CLOUD, client_id="ingest", clean=False, manual=True)
    slow.subscribe(f"{ROOT}/+/+/readings")
    sender = Client(port, GATEWAY)
    sender.publish(f"{ROOT}/{GATEWAY}/status", b"born", retain=True)
    mids = [sender.mqtt.publish(f"{ROOT}/{GATEWAY}/readings", str(n).encode(), 1).mid for n in range(BACKLOG)]
    wait(lambda: all(mid in sender.reasons for mid in mids), 60)
    accepted = sum(1 for mid in mids if mid in sender.reasons and not sender.reasons[mid].is_failure)
    report.check(accepted == BACKLOG, f"{BACKLOG} messages are accepted", f"{accepted} were")
    time.sleep(3)  # autosave_interval 1, and the time that it takes to write
    process.kill()
    process.wait()
    slow.mqtt.loop_stop()
    sender.mqtt.loop_stop()
    with running(command, log) as process:
        if not report.check(wait_for_port(port, 10, process), "mosquitto starts again after SIGKILL", log.read_text()):
            return
        cloud = Client(port, CLOUD, client_id="ingest", clean=False)
        wait(lambda: len({m.payload for m in cloud.messages}) >= BACKLOG, 60)
        got = {m.payload for m in cloud.messages}
        missing = [n for n in range(BACKLOG) if str(n).encode() not in got]
        report.none(missing, "none of them is lost to a subscriber that acknowledged none before the SIGKILL")
        cloud.subscribe(f"{ROOT}/+/+/status")
        status = wait(lambda: any(m.topic.endswith("/status") and m.payload == b"born" for m in cloud.messages))
        report.check(status, "the retained status is still there")
        cloud.close()


def main():
    shipped = Path(sys.argv[1])
    report = Report("judge_broker")
    with tempfile.TemporaryDirectory(prefix="tailrace-broker-") as name:
        folder, port, tls_port = Path(name), free_port(), free_port()
        configure(shipped, folder, port, tls_port)
        log = folder / "log"
        command = ["mosquitto", "-c", str(folder / "mosquitto.conf")]
        with running(command, log) as process:
            if not report.check(wait_for_port(port, 10, process), "mosquitto accepts the configuration", log.read_text()):
                return report.finish()
            judge_entry(report, port)
            judge_tls(report, tls_port, folder)
            judge_topics(report, port)
            judge_forgery(report, port)
            judge_durability(report, command, log, port, process)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

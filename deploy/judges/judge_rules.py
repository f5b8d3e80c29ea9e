"""Rules of cloud-ingest with a real mosquitto (the shipped configuration), a real Alertmanager, and a webhook over TLS.

    judge_rules.py deploy/mosquitto FOLDER_OF_PROGRAMS

Readings of a device that is too hot become an alert, MQTT messages and rows of a table. The cloud is killed while the
alert is active and started again; a rule that the broker refuses harms no other; the alert is called off once nothing
confirms it. Then `rule try` and `rule ls` must say what happened.
"""

import contextlib
import http.server
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from deltalake import DeltaTable

from judge_broker import CLOUD, GATEWAY, ROOT, Client, configure, password, wait
from process import free_port, running, wait_for_port
from report import Report

HOT = 20
CONFIG = """
[store]
url = "file://{lake}"
[mqtt]
url = "mqtt://127.0.0.1:{port}"
username = "_cloud"
password = "env:JUDGE_PASSWORD"
heartbeat = "1s"
max_backoff = "1s"
[serve]
pg_port = {pg}
http_port = {http}
[alerts]
resend = "5s"
ca = "{folder}/certs/ca.crt"
[[alerts.alertmanager]]
url = "http://127.0.0.1:{manager}"
[[alerts.webhook]]
url = "env:JUDGE_WEBHOOK"
token = "env:JUDGE_TOKEN"

[[rule]]
name = "hot"
sink = "alert"
key = ["site", "device_id"]
severity = "critical"
resolve_after = "15s"
select = \"\"\"
  SELECT site, device_id, max(value) AS value, device_id || ' is hot' AS summary
  FROM batch.readings WHERE value > 90 GROUP BY site, device_id\"\"\"
[[rule]]
name = "tell"
sink = "mqtt"
select = "SELECT device_id, ts, value FROM batch.readings WHERE value > 90"
[[rule]]
name = "refused"
sink = "mqtt"
topic = "somewhere/{{site}}"
select = "SELECT site, value FROM batch.readings WHERE value > 90"
[[rule]]
name = "keep"
sink = "table"
select = "SELECT site, device_id, ts, value FROM batch.readings WHERE value > 90"
"""


class Webhook(http.server.ThreadingHTTPServer):
    """Over TLS; keeps what it is sent."""

    def __init__(self, port, folder):
        self.taken = []
        super().__init__(("127.0.0.1", port), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "certs/server.crt", folder / "certs/server.key")
        self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def alerts(self, name="hot"):
        """What was told, in order."""
        told = [alert for _, body in list(self.taken) for alert in body["alerts"]]
        return [alert for alert in told if alert["labels"]["alertname"] == name]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.taken.append((self.headers.get("Authorization"), body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def of_manager(port, name="hot"):
    """The active alerts of a rule, by Alertmanager's own API."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v2/alerts", timeout=10) as answer:
        return [alert for alert in json.load(answer) if alert["labels"]["alertname"] == name]


def rows(lake, table):
    with contextlib.suppress(Exception):
        return DeltaTable(f"{lake}/rules/{table}").to_pyarrow_table().to_pylist()
    return []


def publish(client, first, n):
    for i in range(first, first + n):
        reading = {"device_id": "bearing", "device_type": "temperature", "unit": "Cel", "value": 95 + i / 100}
        # Microseconds apart: each is a reading of its own.
        reading["timestamp"] = time.time_ns() // 1000
        reason = client.publish(f"{ROOT}/{GATEWAY}/json", json.dumps(reading))
        assert reason is not None and not reason.is_failure, reason


def main(shipped, programs):
    report = Report("rules")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        broker_folder, lake = folder / "broker", folder / "lake"
        broker_folder.mkdir()
        lake.mkdir()
        port, tls_port, manager, hook, pg, http_port = (free_port() for _ in range(6))
        configure(shipped, broker_folder, port, tls_port)
        stack.enter_context(running(["mosquitto", "-c", broker_folder / "mosquitto.conf"], folder / "mosquitto.log"))
        (folder / "am.yml").write_text("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
        command = ["prometheus-alertmanager", f"--config.file={folder}/am.yml", f"--storage.path={folder}/am"]
        command += [f"--web.listen-address=127.0.0.1:{manager}", "--cluster.listen-address="]
        stack.enter_context(running(command, folder / "alertmanager.log"))
        report.check(wait_for_port(port, 20) and wait_for_port(manager, 20), "mosquitto and Alertmanager run")
        webhook = Webhook(hook, broker_folder)
        stack.callback(webhook.shutdown)

        config = folder / "cloud.toml"
        config.write_text(
            CONFIG.format(lake=lake, port=port, pg=pg, http=http_port, manager=manager, folder=broker_folder)
        )
        secrets = {"JUDGE_PASSWORD": password(CLOUD), "JUDGE_TOKEN": "s3cret"}
        secrets["JUDGE_WEBHOOK"] = f"https://localhost:{hook}/T0KEN"
        environment = {**os.environ, **secrets, "TAILRACE_LOG": "info"}
        program = [str(programs / "cloud-ingest")]
        log = folder / "cloud.log"

        def start():
            began = log.read_text().count("connected to the broker") if log.exists() else 0
            process = running([*program, "run", "--config", config], log, env=environment)
            process = stack.enter_context(process)
            up = wait(lambda: log.exists() and log.read_text().count("connected to the broker") > began, 60)
            report.check(up, "cloud-ingest is up", log.read_text()[-2000:])
            return process

        def ask(*arguments):
            done = subprocess.run(
                [*program, *arguments, "--config", config], capture_output=True, text=True, timeout=120, env=environment
            )
            return done.returncode, done.stdout, done.stderr

        cloud, device = start(), Client(port, GATEWAY)
        listener = Client(port, CLOUD)
        listener.subscribe(f"{ROOT}/_cloud/rules/#")
        publish(device, 0, HOT)
        report.check(wait(lambda: of_manager(manager), 60), "Alertmanager has the alert")
        for alert in of_manager(manager)[:1]:
            labels = alert["labels"]
            report.check(
                (labels["site"], labels["device_id"], labels["severity"]) == ("plant-1", "bearing", "critical"),
                "with its labels", alert,
            )
            report.check(alert["annotations"]["summary"] == "bearing is hot", "and its annotations", alert)
        report.check(wait(lambda: webhook.alerts(), 30), "the webhook is told over TLS")
        report.check({token for token, _ in webhook.taken} == {"Bearer s3cret"}, "with its token", webhook.taken)
        report.check(wait(lambda: len(rows(lake, "keep")) == HOT, 60), "each reading is a row", rows(lake, "keep"))
        report.check(wait(lambda: len(listener.messages) >= HOT, 30), "and a message", len(listener.messages))

        cloud.kill()
        cloud.wait()
        before = len(webhook.alerts())
        publish(device, HOT, HOT)
        cloud = start()
        report.check(wait(lambda: len(rows(lake, "keep")) == 2 * HOT, 60), "killed and started: no row is missing")
        report.check(wait(lambda: len(webhook.alerts()) > before, 30), "the webhook is told again")
        keys = {alert["key"] for alert in webhook.alerts()}
        report.check(len(keys) == 1, "under the same key", keys)
        report.check(len(of_manager(manager)) == 1, "the alert is still active", of_manager(manager))
        ids = {dict(m.properties.UserProperty)["id"] for m in listener.messages}
        told = wait(lambda: len({dict(m.properties.UserProperty)["id"] for m in listener.messages}) == 2 * HOT, 30)
        report.check(told, "each reading is one id on the broker, however often it came", len(ids))

        # Nothing is hot any more.
        ended = wait(lambda: webhook.alerts()[-1]["status"] == "resolved", 60)
        report.check(ended, "the webhook is told of the end", webhook.alerts())
        report.check(wait(lambda: not of_manager(manager), 30), "Alertmanager, too", of_manager(manager))
        recorded = sorted((row["at"], row["state"]) for row in rows(lake, "alerts") if row["rule"] == "hot")
        states = [state for _, state in recorded]
        report.check(states == ["firing", "resolved"], "both are recorded, once each", states)
        doubled = len(rows(lake, "keep")) - len({(r["device_id"], r["ts"]) for r in rows(lake, "keep")})
        report.check(doubled == 0, "no row is there twice", doubled)

        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        failing = 'tailrace_cloud_rule_failures_total{rule="refused",reason="sink"}'
        report.check(failing in metrics, "a rule that the broker refuses is counted", metrics)
        behind = [line for line in metrics.splitlines() if line.startswith("tailrace_cloud_rule_behind_plans")]
        zero = [line for line in behind if line.endswith(" 0")]
        report.check(len(zero) == len(behind) - 1, "it alone is behind", behind)
        text = log.read_text()
        report.check("NotAuthorized" in text and "refused" in text, "and named in the log", text[-2000:])
        report.check("T0KEN" not in text and "s3cret" not in text, "which holds no secrets")

        began = time.monotonic()
        cloud.send_signal(signal.SIGTERM)
        report.check(cloud.wait(60) == 0, "a clean stop", log.read_text()[-2000:])
        took = time.monotonic() - began
        report.check(took < 30, "that a sink which fails does not hold up", took)

        for layer in ("silver", "bronze"):
            status, out, err = ask("rule", "try", "keep", "--on", layer, "--json")
            tried = json.loads(out) if status == 0 else {}
            report.check(tried.get("table_rows") == 2 * HOT, f"rule try on {layer} finds the same", out + err)
        status, out, err = ask("rule", "ls", "--json")
        listed = {rule["name"]: rule for rule in json.loads(out)} if status == 0 else {}
        names = {"anomalies", "declared-losses", "hot", "keep", "refused", "tell"}
        report.check(set(listed) == names, "rule ls names them", out + err)
        if listed:
            newest = listed["keep"]["newest"]
            report.check(listed["keep"]["plan"] == newest > listed["refused"]["plan"], "and where they stand", out)
        status, out, err = ask("query", "select count(*) as n from rules.keep where value > 90")
        report.check(f"| {2 * HOT} " in out, "SQL reads the rule's table", out + err)
        config.write_text(config.read_text().replace("SELECT site, value", "SELECT site, valu"))
        status, out, err = ask("check")
        named = status != 0 and "rule.refused.select" in err and "valu" in err
        report.check(named, "a mistake is refused by name", err)
        for client in (device, listener):
            client.close()
    return report.finish()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))

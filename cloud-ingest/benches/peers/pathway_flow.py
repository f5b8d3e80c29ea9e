"""The same with Pathway: its connector reads MQTT and JSON. Its writer of Delta wants a licence key, so deltalake commits
what comes at each of its times. Pathway does not end by itself; the last row ends it.
"""

import os
from datetime import datetime

import pathway as pw
from deltalake import write_deltalake

from uplink import TOPIC, arguments, table


class Reading(pw.Schema):
    device_id: str
    timestamp: str
    value: float
    device_type: str | None
    unit: str | None


def main():
    port, folder, messages = arguments()
    uri = f"mqtt://127.0.0.1:{port}?client_id=pathway&clean_session=false"
    read = pw.io.mqtt.read(uri, TOPIC, schema=Reading, format="json", qos=1, autocommit_duration_ms=1000)
    rows, taken = [], 0

    def on_change(key, row, time, is_addition):
        # A row does not say which topic it came from.
        rows.append((datetime.fromisoformat(row["timestamp"]), "", "", row["device_id"], row["device_type"],
                     row["value"], row["unit"]))

    def on_time_end(time):
        nonlocal taken
        if rows:
            write_deltalake(folder, table(rows), mode="append", partition_by=["device_type"])
            taken += len(rows)
            rows.clear()
        if taken >= messages:
            os._exit(0)

    pw.io.subscribe(read, on_change=on_change, on_time_end=on_time_end)
    pw.run(monitoring_level=pw.MonitoringLevel.NONE)


if __name__ == "__main__":
    main()

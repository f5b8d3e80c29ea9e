"""What the peers share: a persistent MQTT session, and the columns of the table that they write."""

import sys
from datetime import datetime

import pyarrow as pa
from paho.mqtt.client import CallbackAPIVersion, Client, MQTTv5
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

TOPIC = "tailrace/v1/+/+/json"
WINDOW = 65_535
BATCH = 20_000  # readings in a commit
SCHEMA = pa.schema([
    ("ts", pa.timestamp("us", "UTC")), ("site", pa.string()), ("gateway_id", pa.string()), ("device_id", pa.string()),
    ("device_type", pa.string()), ("value", pa.float64()), ("unit", pa.string()),
])


def session(name, port, on_message=None, manual=True):
    """A client whose messages the broker keeps; connected, its loop not yet begun."""
    client = Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=MQTTv5)
    client.manual_ack_set(manual)
    client.on_message = on_message
    properties = Properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = 3600
    properties.ReceiveMaximum = WINDOW
    client.connect("127.0.0.1", port, keepalive=600, clean_start=False, properties=properties)
    return client


def subscribe(name, port):
    """Leaves a session behind for which the broker queues."""
    client = session(name, port)
    client.on_subscribe = lambda client, *_: client.disconnect()
    client.on_connect = lambda client, *_: client.subscribe(TOPIC, 1)
    client.loop_forever()


def reading(topic, reading):
    """A row of the table; silver takes no reading that is missing one of these either."""
    _, _, site, gateway, _ = topic.split("/")
    return (datetime.fromisoformat(reading["timestamp"]), site, gateway, reading["device_id"],
            reading.get("device_type"), float(reading["value"]), reading.get("unit"))


def table(rows):
    return pa.Table.from_arrays([pa.array(column, field.type) for column, field in zip(zip(*rows), SCHEMA)],
                                schema=SCHEMA)


def arguments():
    """Port of the broker, folder of the table, messages to take."""
    _, port, folder, messages = sys.argv
    return int(port), folder, int(messages)

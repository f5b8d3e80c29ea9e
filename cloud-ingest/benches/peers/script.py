"""A script as it is usually written for this: paho-mqtt takes messages, orjson reads them, pyarrow lays out columns,
deltalake commits; a message is acknowledged when its batch is committed. No duplicates are looked for.
"""

import orjson
from deltalake import write_deltalake

from uplink import BATCH, arguments, reading, session, table


def main():
    port, folder, messages = arguments()
    rows, held, taken = [], [], 0

    def on_message(client, _, message):
        nonlocal taken
        rows.append(reading(message.topic, orjson.loads(message.payload)))
        held.append(message.mid)
        taken += 1
        if len(rows) < BATCH and taken < messages:
            return
        write_deltalake(folder, table(rows), mode="append", partition_by=["device_type"])
        for mid in held:
            client.ack(mid, 1)
        rows.clear(), held.clear()
        if taken >= messages:
            client.disconnect()

    session("script", port, on_message).loop_forever()


if __name__ == "__main__":
    main()

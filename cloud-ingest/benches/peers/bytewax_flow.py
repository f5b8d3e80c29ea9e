"""The same as a Bytewax dataflow: a source on paho-mqtt, a map, a collect, a sink that commits."""

import queue
from datetime import timedelta

import bytewax.operators as op
import orjson
from bytewax.dataflow import Dataflow
from bytewax.inputs import DynamicSource, StatelessSourcePartition
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from bytewax.testing import run_main
from deltalake import write_deltalake

from uplink import BATCH, arguments, reading, session, table

AT_ONCE = 1_000


class Messages(StatelessSourcePartition):
    def __init__(self, port, messages):
        self.left, self.queue = messages, queue.SimpleQueue()
        self.client = session("bytewax", port, lambda _, __, message: self.queue.put((message.topic, message.payload)),
                              manual=False)
        self.client.loop_start()

    def next_batch(self):
        if self.left == 0:
            self.client.disconnect()
            raise StopIteration
        batch = []
        try:
            batch.append(self.queue.get(timeout=0.1))
            while len(batch) < min(AT_ONCE, self.left):
                batch.append(self.queue.get_nowait())
        except queue.Empty:
            pass
        self.left -= len(batch)
        return batch


class Source(DynamicSource):
    def __init__(self, *given):
        self.given = given

    def build(self, *_):
        return Messages(*self.given)


class Commits(StatelessSinkPartition):
    def __init__(self, folder):
        self.folder = folder

    def write_batch(self, batches):
        for _, rows in batches:
            write_deltalake(self.folder, table(rows), mode="append", partition_by=["device_type"])


class Sink(DynamicSink):
    def __init__(self, folder):
        self.folder = folder

    def build(self, *_):
        return Commits(self.folder)


def main():
    port, folder, messages = arguments()
    flow = Dataflow("json")
    taken = op.input("mqtt", flow, Source(port, messages))
    read = op.map("read", taken, lambda message: ("all", reading(message[0], orjson.loads(message[1]))))
    op.output("delta", op.collect("batch", read, timedelta(seconds=5), BATCH), Sink(folder))
    run_main(flow)


if __name__ == "__main__":
    main()

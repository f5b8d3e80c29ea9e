"""A line to an HTTP server on this machine that fails for a share of the requests, by a seed.

    with Faulty(upstream_port, share=0.1, seed=1) as line:
        ...  # clients use line.port
    print(line.counts)

Which request meets which fault depends on the order in which they come; how many do, on the share alone.
"""

import asyncio
import collections
import contextlib
import random
import socket
import struct
import threading

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
# fault: how often, relative to the others
FAULTS = {
    "503": 3,  # refused before anything is done
    "500": 1,
    "429": 1,
    "slow": 4,  # answered late
    "cut before": 2,  # the connection ends, and nothing is done
    "cut after": 3,  # it is done, and the connection ends instead of an answer
    "reset after": 3,  # the same, rudely
    "500 after": 3,  # it is done, and the answer says that it failed
    "hang after": 1,  # it is done, and nothing is answered at all
}


class Faulty:
    """Fails nothing while `share` is 0. `only` may name faults. `deaf` answers any PUT with 200 and does nothing."""

    def __init__(self, upstream, share=0.0, seed=0, only=None, deaf=False):
        self.upstream, self.share, self.deaf = upstream, share, deaf
        self.faults = {fault: FAULTS[fault] for fault in only or FAULTS}
        self.random = random.Random(seed)
        self.counts = collections.Counter()
        self.port = None
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.ready = threading.Event()

    def __enter__(self):
        self.thread.start()
        self.ready.wait()
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()

    def run(self):
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self.serve())

    async def serve(self):
        self.stop = asyncio.Event()
        server = await asyncio.start_server(self.client, "127.0.0.1", 0, limit=1 << 20)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        await self.stop.wait()
        server.close()
        waiting = asyncio.all_tasks() - {asyncio.current_task()}
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    def fault(self):
        self.counts["requests"] += 1
        if self.random.random() >= self.share:
            return None
        fault = self.random.choices(list(self.faults), list(self.faults.values()))[0]
        self.counts[fault] += 1
        return fault

    async def client(self, reader, writer):
        """One request; its connection ends with it."""
        with contextlib.suppress(OSError, EOFError, asyncio.IncompleteReadError):
            request = await read_request(reader)
            if self.deaf and request.startswith(b"PUT "):
                self.counts["deaf"] += 1
                await answer(writer, "200 OK", b"")
            else:
                await self.forward(self.fault(), request, reader, writer)
        writer.close()

    async def forward(self, fault, request, reader, writer):
        if fault == "cut before":
            return
        if fault in ("503", "500", "429"):
            await answer(writer, f"{fault} No", SLOW_DOWN)
            return
        if fault == "slow":
            await asyncio.sleep(self.random.uniform(0.05, 0.5))
        response = await self.ask(request)
        if fault == "500 after":
            await answer(writer, "500 Internal Server Error", b"<Error><Code>InternalError</Code></Error>")
        elif fault == "hang after":
            # Until the client has had enough.
            await reader.read(1)
        elif fault == "reset after":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        elif fault != "cut after":
            writer.write(response)
            await writer.drain()

    async def ask(self, request):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        try:
            writer.write(request)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()


async def read_request(reader):
    """A whole request that asks for the connection to end with its answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = [line for line in head[:-4].split(b"\r\n") if not line.lower().startswith(b"connection:")]
    length = 0
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            length = int(value)
        if name.strip().lower() == b"transfer-encoding":
            raise EOFError("chunked requests are not understood here")
    body = await reader.readexactly(length)
    return b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body


async def answer(writer, status, body):
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nETag: \"x\"\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()

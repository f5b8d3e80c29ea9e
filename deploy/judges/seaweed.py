"""A SeaweedFS as the judges start it: a server on this machine that speaks S3."""

import contextlib
import glob
import os
import sys
import time

from pyarrow import fs

from process import free_port, running, wait_for_port


def free_ports(n):
    """Ports with which those 10,000 above are free too: SeaweedFS listens on both."""
    ports = []
    while len(ports) < n:
        port = free_port()
        if not wait_for_port(port + 10_000, 0.01):
            ports.append(port)
    return ports


@contextlib.contextmanager
def seaweed(weed, data, key, secret, bucket):
    """Its port; what is in the folder `data` is there, and `bucket` too. Its log is beside the folder."""
    s3, filer, master, volume = ports = free_ports(4)
    # Without Iceberg and Lance there are no fixed ports.
    command = [weed, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}", "-volume.max=0"]
    command += ["-master.telemetry=false", "-master.electionTimeout=1s", "-s3", f"-s3.port={s3}", "-filer"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false", "-volume.preStopSeconds=0"]
    command += [f"-filer.port={filer}", f"-master.port={master}", f"-volume.port={volume}"]
    env = {**os.environ, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    log = data.with_name(f"{data.name}.log")
    try:
        with running(command, log, env=env) as process:
            if not wait_for_port(s3, 60, process):
                sys.exit(f"SeaweedFS did not start:\n{log.read_text()[-2000:]}")
            try:
                create_bucket(s3, key, secret, bucket)
                yield s3
            finally:
                # A clean stop takes it 20 s.
                process.kill()
    finally:
        for port in ports:
            for n in (port, port + 10_000):
                for socket in glob.glob(f"/tmp/seaweedfs-*-{n}.sock"):
                    with contextlib.suppress(OSError):
                        os.unlink(socket)


def client(port, key, secret):
    """Arrow's own client of it."""
    return fs.S3FileSystem(
        access_key=key, secret_key=secret, endpoint_override=f"127.0.0.1:{port}", scheme="http",
        region="us-east-1", allow_bucket_creation=True,
    )  # fmt: skip


def create_bucket(port, key, secret, bucket):
    """Once the filer and its volumes are there, which takes a moment longer than the port."""
    s3 = client(port, key, secret)
    deadline = time.monotonic() + 60
    while True:
        try:
            s3.create_dir(bucket)
            with s3.open_output_stream(f"{bucket}/ready") as f:
                f.write(b"x")
            s3.delete_file(f"{bucket}/ready")
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)

"""A real S3 API on the loopback: moto's server, which s3fs asks as it asks any other."""

import logging
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec

BUCKET = "bucket"


@contextmanager
def s3() -> Iterator[fsspec.AbstractFileSystem]:
    """An S3 with the empty bucket `bucket`, which this process and its children find by their environment."""
    from moto.server import ThreadedMotoServer  # slow to import
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    ours = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    S3FileSystem.clear_instance_cache()
    # moto keeps its objects for the life of the process
    urllib.request.urlopen(
        urllib.request.Request(f"{ours['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")
    )
    try:
        files = S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        files.mkdir(BUCKET)
        yield files
    finally:
        server.stop()
        S3FileSystem.clear_instance_cache()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def objects(files: fsspec.AbstractFileSystem, folder: str) -> dict[str, bytes]:
    """Every object below `bucket/folder`, by its name below it."""
    found = files.find(folder)
    return {name.removeprefix(f"{folder}/"): files.cat_file(name) for name in found}

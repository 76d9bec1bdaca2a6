"""Serve a search page for an index: `python -m clip4vla.web IDX --model M`, then http://127.0.0.1:7860 in a browser.

A text, a sound, a picture or a video asks. Nothing leaves the machine: the page asks no other host, and serves no file.
"""

import argparse
import importlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from clip4vla.cli import entry_point, path_word
from clip4vla.errors import UserError
from clip4vla.quick_imports import quick_imports

LIMIT = 20  # MB of an upload


@entry_point
def main() -> None:
    """Open the index, load the model, and serve the page."""
    args = arguments()
    with quick_imports():  # after the words are read: a typing error shows at once
        from clip4vla.search.index import Index, load_model
        from clip4vla.web.app import serve

    index, listener = Index.open(args.index), _listener(args.host, args.port)
    with without_proxies():
        importlib.import_module("gradio")  # its absence is reported before the model is loaded
    name = args.model or index.model
    model = load_model(name, args.device)
    index.must_fit(model, name)
    with without_proxies():
        serve(index, model, listener, args.max_upload, args.allowed_hosts)


@contextmanager
def without_proxies() -> Iterator[None]:
    """Hide the environment's proxies: the page asks no other host, and gradio's httpx refuses those that it does not know."""
    hidden = {name: os.environ.pop(name) for name in [*os.environ] if name.lower().endswith("_proxy")}
    try:
        yield
    finally:
        os.environ.update(hidden)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m clip4vla.web", description=__doc__.splitlines()[0])
    parser.add_argument(
        "index", type=path_word, metavar="IDX", help="a folder that python -m clip4vla.search build made"
    )
    parser.add_argument(
        "--model", type=path_word, help="a folder or a hub id; default: where the index was built with it"
    )
    parser.add_argument("--host", default="127.0.0.1", help="of another address than this, others see the page too")
    parser.add_argument(
        "--allowed-hosts", nargs="+", default=[], metavar="NAME", help="more hosts to answer to, as a proxy's"
    )
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--max-upload", type=int, default=LIMIT, metavar="MB", help="of a file that asks")
    return parser.parse_args()


def _listener(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}, port {port}: {error}: choose another --host or --port") from None


if __name__ == "__main__":
    main()

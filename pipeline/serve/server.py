"""`python -m pipeline serve`: verified bundles behind the API until Ctrl-C or SIGTERM."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import click
import uvicorn

from pipeline.bundle.release import CONTENT, Release
from pipeline.config.hybrid import load_hybrid
from pipeline.errors import ConfigError, ResourceError
from pipeline.serve.app import build
from pipeline.serve.bundles import Refused, verified
from pipeline.serve.engine import Engine
from pipeline.serve.guard import Door
from pipeline.serve.hybrid.manager import Manager
from pipeline.serve.local import Line, Local, Shelf, Source
from pipeline.serve.metrics import Reading

_LAST_SECONDS = 10  # that answers have to end once the server is to stop


def run(
    bundles: Sequence[Path],
    public_keys: Sequence[Path],
    host: str,
    port: int,
    queue: int,
    unverified: bool = False,
    hybrid: Path | None = None,
) -> None:
    """Serve `bundles` at `host`:`port`; `queue` requests may wait. `hybrid`: the policy by which a cloud is asked, too.

    Raises:
        BundleError: one does not verify under `public_keys` (none: those that signed on this machine), or all are
            refusals; beside bundles, a refusal is left out.
        ConfigError: two have one id, `Door.at` refuses the host, or `hybrid` or the key that it names is not there.
        EvaluationError: a tokenizer cannot be loaded.
        ResourceError: the port is taken.
    """
    door, policy = Door.at(host), load_hybrid(hybrid) if hybrid else None
    shelf, line = Shelf(sources(bundles, public_keys, unverified)), Line(queue)
    engines: dict[str, Engine] = {name: Local(name, shelf, line) for name in shelf.chats}
    if policy:
        engines = {name: Manager(engine, policy) for name, engine in engines.items()}
    listening = listen(host, port)
    config = uvicorn.Config(
        build(engines, door, gauges(line, shelf)), log_level="warning", server_header=False, access_log=False,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )  # fmt: skip
    place = f"[{host}]" if ":" in host else host
    click.echo(f"{', '.join(engines)} at http://{place}:{listening.getsockname()[1]} (Ctrl-C ends)", err=True)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def sources(bundles: Sequence[Path], public_keys: Sequence[Path], unverified: bool) -> dict[str, Source]:
    """What is served, by id: model/variant of a bundle, which is verified now and before it is loaded; the path of a
    model's folder that is served as it lies."""
    found: dict[str, Source] = {}
    for bundle in bundles:
        name, source = bundle.as_posix(), Source(bundle, lambda: None)
        if not unverified:
            try:
                report = verified(bundle, public_keys)
            except Refused as error:
                if bundle == bundles[-1] and not found:
                    raise
                click.echo(f"left out: {error}", err=True)
                continue
            click.echo(report.describe(), err=True)
            assert isinstance(report.document, Release)  # what else verifies is a refusal, which is a finding
            name = f"{report.document.model}/{report.document.variant}"
            source = Source(bundle / CONTENT, partial(verified, bundle, public_keys))
        if name in found:
            raise ConfigError(f"{bundle} is {name}, as {found[name].folder} is: serve one of them.")
        found[name] = source
    return found


def gauges(line: Line, shelf: Shelf) -> dict[str, Reading]:
    """What /metrics shows of them."""
    return {
        "waiting": ("Requests in line.", lambda: float(line.waiting)),
        "loaded": ("Models in memory.", lambda: float(shelf.loaded)),
    }


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on; port 0 is any that is free. Raises ResourceError where none is."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        raise ResourceError(f"the server cannot listen on {host} port {port}: {error}. Try another --port.") from None
    return listening

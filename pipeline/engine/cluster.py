"""The engine on Ray: units are its tasks. Scheduling, transport and retries are Ray's.

- A worker takes part if its processor's kernel class, its Python, its libraries, its copy of this code and the files
  that say what is read are those of this process; another one is refused by name before anything runs. The project lies
  under the same path there: on a shared file system, or as a clone with its own store, whose weights are compared with
  the digests of their download as they are read.
- A worker that dies costs the units that it was doing: Ray does each again, up to `_RETRIES` times.
- Ray's transport unpickles what it is sent, so whoever reaches a node runs code there: Ray runs on loopback, or every
  node has token authentication (RAY_AUTH_MODE=token). A worker that can see a signing key refuses to work.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.config.engine import EngineConfig
from pipeline.engine.units import R, U, in_order
from pipeline.errors import ConfigError, PipelineError, ResourceError
from pipeline.files import sha256_of
from pipeline.keys.closure import Closure, modules
from pipeline.machine import CORES, cores, kernel_class

INSTALL = "python -m pip install -r requirements-ray.txt -c constraints.txt"
_RETRIES = 5
# Of a model's folder, what says which bytes a worker would read there.
_INPUTS = (
    "source.json", "export/*", "calibration/moments.safetensors", "calibration/ranges.safetensors",
    "variants/*/plan.json", "evaluation/reference/*/section.json",
)  # fmt: skip
_SECRETS = "PIPELINE_SIGNING_KEY"  # variables that begin so hold a signing key, or say where it is
_AUTHENTICATION = "RAY_AUTH_MODE"
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0", on any system: Ray leaves 127.0.0.1 as it is


@dataclass(frozen=True)
class Terms:
    """What every worker is told before its first unit: the project's folder, its store, and the cores of a worker."""

    root: str
    store: str | None
    cores: int


class Cluster:
    """Ray's workers, as `pipeline.engine.Engine`: a cluster's, or those of this machine."""

    shared = False

    def __init__(self, config: EngineConfig):
        """
        Raises:
            ConfigError: Ray is not installed, or its nodes are reached by others without authentication.
            ResourceError: no worker may take part, or the cluster does not answer.
        """
        address = config.address or os.environ.get("RAY_ADDRESS")
        if address is None or _is_loopback(address.rpartition(":")[0]):
            os.environ.setdefault(_LOOPBACK, "0")
        try:
            import ray
        except ModuleNotFoundError:
            raise ConfigError(f"`engine: ray` needs the package ray: {INSTALL}. Or set `engine: threads`.") from None
        self._ray = ray
        if not ray.is_initialized():
            _connect(ray, address)
        self._terms = Terms(os.getcwd(), os.environ.get("PIPELINE_STORE"), config.cores)
        _require_closed(ray.nodes())
        cpus = self._accepted()
        self.workers = sum(int(count // config.cores) for count in cpus.values())
        if not self.workers:
            raise ResourceError(f"engine: ray: no node that may take part has {config.cores} cores for a worker.")
        pinned = {"ray.io/node-id": f"in({','.join(cpus)})"}
        self._do = ray.remote(_do).options(num_cpus=config.cores, max_retries=_RETRIES, label_selector=pinned)
        print(f"engine: ray: {self.workers} workers × {config.cores} cores on {len(cpus)} nodes", file=sys.stderr)

    def run(self, job: Callable[[U], R], units: Iterable[U | None], reduce: Callable[[U, R], object]) -> None:
        """As `Engine.run`; a barrier costs nothing here, since no unit's memory is this process's."""
        held, begun = self._ray.put(job), set[Any]()

        def begin(unit: U) -> Callable[[], R]:
            begun.add(task := self._do.remote(self._terms, [held], unit))
            return lambda: self._result(begun, task)

        try:
            in_order((unit for unit in units if unit is not None), begin, reduce, 2 * self.workers + 2)
        finally:
            for task in begun:
                self._ray.cancel(task)

    def _result(self, begun: set[Any], task: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(task)
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.RayError as error:
            raise ResourceError(
                f"engine: ray: a unit was lost {_RETRIES + 1} times ({type(error).__name__}: {str(error).strip()}). "
                f"What is recorded is kept. Give a worker more memory by raising `cores` in configs/engine.yaml; go on."
            ) from None
        finally:
            begun.discard(task)

    def _accepted(self) -> dict[str, float]:
        """Cores by the id of each node whose workers are as this process; the others are named."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        own, found = identity(), dict[str, float]()
        nodes = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        look = self._ray.remote(_look)
        tasks = [
            look.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            for node in nodes
        ]
        for node, task in zip(nodes, [task.remote(self._terms) for task in tasks], strict=True):
            try:
                why = _difference(own, self._result(set(), task))
            except PipelineError as error:
                why = str(error)
            if why:
                name = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
                print(f"engine: ray: worker {name} is refused: {why}", file=sys.stderr)
            else:
                found[node["NodeID"]] = node["Resources"]["CPU"]
        return found


def identity() -> dict[str, str]:
    """What decides the bytes that this process computes, by name: kernel class, Python, libraries, our own code, and
    the files that name what models' folders hold."""
    found = {"kernel class": kernel_class(), "Python": sys.version.split()[0], **Closure.of(*modules()).libraries()}
    inputs = (path for pattern in _INPUTS for path in Path("artifacts").glob(f"*/{pattern}"))
    return found | {str(path): sha256_of(path) for path in (*modules().values(), *inputs)}


def _difference(own: Mapping[str, str], other: Mapping[str, str]) -> str:
    """The first thing in which another identity differs, and how many more there are; "" for none."""
    names = [name for name in {**own, **other} if own.get(name) != other.get(name)]
    more = f", and {len(names) - 1} more differ" if names[1:] else ""
    return f"{names[0]} {other.get(names[0])} there, {own.get(names[0])} here{more}" if names else ""


def _connect(ray: Any, address: str | None) -> None:
    quiet: dict[str, Any] = {"logging_level": "warning", "log_to_driver": False}
    with _without_secrets():
        try:
            if address:
                ray.init(address=address, **quiet)
            else:  # "local": never the cluster that somebody else has started here
                own = {"num_cpus": cores(), "_node_ip_address": "127.0.0.1", "include_dashboard": False}
                ray.init(address="local", **own, **quiet)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            where = f"the cluster at {address} does not answer" if address else "a local Ray could not be started"
            raise ResourceError(f"engine: ray: {where}: {error}. `ray status` says more.") from None


@contextmanager
def _without_secrets() -> Iterator[None]:
    """Ray's own processes inherit the environment: they get it without signing keys."""
    secrets = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(_SECRETS)}
    try:
        yield
    finally:
        os.environ.update(secrets)


def _require_closed(nodes: Iterable[Mapping[str, Any]]) -> None:
    """Raise ConfigError for nodes that others reach and that do not ask for a token."""
    exposed = [node["NodeManagerAddress"] for node in nodes if not _is_loopback(node["NodeManagerAddress"])]
    if exposed and os.environ.get(_AUTHENTICATION) != "token":
        raise ConfigError(
            f"engine: ray: node {exposed[0]} is reached from other machines, and whoever reaches it runs code there. "
            f"Set {_AUTHENTICATION}=token here and where each `ray start` runs, with one token (`ray get-auth-token "
            f"--generate`)."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


# --- on a worker -----------------------------------------------------------------------------------------------------


def _look(terms: Terms) -> dict[str, str]:
    _enter(terms)
    return identity()


def _do(terms: Terms, held: list[Any], unit: Any) -> Any:
    """A unit's result; a generator's items as a list."""
    from threadpoolctl import threadpool_limits

    _enter(terms)
    with threadpool_limits(terms.cores, "blas"):
        found = _opened(held[0])(unit)
        return list(found) if isinstance(found, Iterator) else found


@lru_cache(1)
def _enter(terms: Terms) -> None:
    """Make this process a worker."""
    if secrets := [name for name in os.environ if name.startswith(_SECRETS)]:
        raise ResourceError(f"it has {secrets[0]} in its environment: start Ray there without signing keys")
    if not Path(terms.root).is_dir():
        raise ResourceError(f"it has no {terms.root}: share that folder, or clone the project there")
    os.chdir(terms.root)
    os.environ[CORES] = os.environ["NUMBA_NUM_THREADS"] = str(terms.cores)
    if terms.store:
        os.environ.setdefault("PIPELINE_STORE", terms.store)


@lru_cache(1)
def _opened(held: Any) -> Callable[[Any], Any]:
    """A job, as this process keeps it while its units come."""
    import ray

    return ray.get(held)

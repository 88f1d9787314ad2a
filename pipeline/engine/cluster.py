"""The engine on Ray: units are its tasks. Scheduling, transport and retries are Ray's.

- A worker takes part if its processor's kernel class, its Python, its libraries, its copy of this code and the files
  that say what is read are those of this process; another one is refused by name before anything runs. The project lies
  under the same path there, or where PIPELINE_ROOT says: on a shared file system, or as a clone with its own store,
  which gets what it lacks of the command's models from this process's node (`pipeline.engine.supply`).
- A worker that dies costs the units that it was doing: Ray does each again, up to `_RETRIES` times. A unit that lags
  while a worker is idle is begun a second time, and the first result counts.
- Ray's transport unpickles what it is sent, so whoever reaches a node runs code there: Ray runs on loopback, or every
  node has token authentication (RAY_AUTH_MODE=token). A worker that can see a signing key refuses to work.
"""

from __future__ import annotations

import atexit
import ipaddress
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from pipeline.config.engine import EngineConfig
from pipeline.config.models import DEVICE
from pipeline.engine.supply import Head, fetch, listed
from pipeline.engine.units import R, U, in_order
from pipeline.errors import ConfigError, PipelineError, ResourceError
from pipeline.files import sha256_of
from pipeline.keys.closure import PACKAGE, Closure, modules
from pipeline.machine import CORES, available_memory, cores, kernel_class
from pipeline.workspace import ARTIFACTS

INSTALL = "python -m pip install -r requirements-ray.txt -c constraints.txt"
_RETRIES = 5
_SLOW, _PATIENCE = 2, 5.0
"""A second try of a unit begins when a worker has been idle so many times as long as the longest unit took, and these
seconds at least: the worker whose result comes too late is ended, and another one takes seconds to start."""
# Of a model's folder, what says which bytes a worker would read there.
_INPUTS = (
    "source.json", "export/*", "calibration/moments.safetensors", "calibration/ranges.safetensors",
    "evaluation/reference/*/section.json",
)  # fmt: skip
_SECRETS = "PIPELINE_SIGNING_KEY"  # variables that begin so hold a signing key, or say where it is
_AUTHENTICATION = "RAY_AUTH_MODE"
_ROOT = "PIPELINE_ROOT"  # of a node's `ray start`: where the project lies there
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0", on any system: Ray leaves 127.0.0.1 as it is
# Of Ray's processes: deadlines for machines that are busy with other work, to which workers do not yield (they would,
# at niceness 15); and nothing is reported to Ray's makers.
_SETTINGS = {
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_gcs_server_port_wait_time_s": "300",
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_worker_niceness": "0",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_LOCAL: dict[str, Any] = {
    "node_ip_address": "127.0.0.1", "include_dashboard": False, "include_log_monitor": False, "no_monitor": True,
}  # fmt: skip
_PORTS = ("runtime_env_agent_port", "metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")


@dataclass(frozen=True)
class Terms:
    """What every worker is told before its first unit: the project's folder, its store, the cores of a worker, and the
    models and variants that are worked on."""

    root: str
    store: str | None
    cores: int
    models: tuple[str, ...]
    variants: tuple[str, ...]


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
        places = os.getcwd(), os.environ.get("PIPELINE_STORE")
        self._terms = Terms(*places, config.cores, _named("*/source.json", True), _named("*/variants/*/plan.json"))
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
        held, begun, longest = self._ray.put(job), dict[Future[Any], Any](), 0.0

        def submit(unit: U) -> Future[Any]:
            task = self._do.remote(self._terms, [held], unit)
            begun[found := task.future()] = task  # its result comes here as soon as it is made
            return found

        def result(unit: U, first: Future[Any]) -> R:
            nonlocal longest
            patience = max(_PATIENCE, _SLOW * longest) if longest else None
            found = self._earliest(first, begun, patience, partial(submit, unit))
            del begun[found]
            seconds, made = self._result(found.result)
            longest = max(longest, seconds)
            return made

        def begin(unit: U) -> Callable[[], R]:
            return partial(result, unit, submit(unit))

        try:
            for unit, made in in_order((unit for unit in units if unit is not None), begin, 2 * self.workers + 2):
                reduce(unit, made)
        finally:
            for task in begun.values():
                self._ray.cancel(task)

    def _earliest(
        self, first: Future[Any], begun: dict[Future[Any], Any], patience: float | None, again: Callable[[], Any]
    ) -> Future[Any]:
        """`first` when it is done, or `again`'s if that one is earlier: it begins when a worker is idle so long."""
        left = {one for one in begun if not one.done()}
        while first in left and len(left) >= self.workers:
            left = wait(left, return_when=FIRST_COMPLETED).not_done
        if first not in left or patience is None or wait([first], patience).done:
            return first
        tries = {first, again()}
        found = wait(tries, return_when=FIRST_COMPLETED).done.pop()
        [late] = tries - {found}
        self._ray.cancel(begun.pop(late), force=True)
        return found

    def _result(self, get: Callable[[], Any]) -> Any:
        errors = self._ray.exceptions
        try:
            return get()
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.RayError as error:
            raise ResourceError(
                f"engine: ray: a unit was lost {_RETRIES + 1} times ({type(error).__name__}: {str(error).strip()}). "
                f"What is recorded is kept. Give a worker more memory by raising `cores` in configs/engine.yaml; go on."
            ) from None

    def _accepted(self) -> dict[str, float]:
        """Cores by the id of each node whose workers are as this process; the others are named."""
        names = listed(self._terms.models, self._terms.variants)
        nodes = {node["NodeID"]: node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
        seen = self._looked(nodes, names)
        if lacking := [node for node, (why, lacks) in seen.items() if lacks and not why]:
            place = _at(self._ray.get_runtime_context().get_node_id())
            actor = self._ray.remote(Head).options(num_cpus=0, max_concurrency=4, scheduling_strategy=place)
            seen |= self._looked(lacking, names, actor.remote(self._terms.root, names))
        for node, (why, _) in seen.items():
            if why:
                name = f"{nodes[node]['NodeManagerAddress']} ({nodes[node]['NodeManagerHostname']})"
                print(f"engine: ray: worker {name} is refused: {why}", file=sys.stderr)
        return {node: nodes[node]["Resources"]["CPU"] for node, (why, _) in seen.items() if not why}

    def _looked(self, nodes: Iterable[str], names: list[str], head: Any = None) -> dict[str, tuple[str, list[str]]]:
        """Why each node cannot take part, "" if it can, and the files that it lacks: none that `head` gives it."""
        own, look, found = identity(self._terms), self._ray.remote(_look), dict[str, tuple[str, list[str]]]()
        tasks = {
            node: look.options(num_cpus=0, scheduling_strategy=_at(node)).remote(self._terms, names, head)
            for node in nodes
        }
        for node, task in tasks.items():
            try:
                there, lacks = self._result(partial(self._ray.get, task))
                found[node] = _difference(own, there | {name: own[name] for name in lacks if name in own}), lacks
            except PipelineError as error:
                found[node] = str(error), []
        return found


def identity(terms: Terms) -> dict[str, str]:
    """What decides the bytes that this process computes, by name: kernel class, Python, libraries, our own code, and
    the files that name what the models' folders hold. Of variants only the command's: others may be made meanwhile."""
    found = {"kernel class": kernel_class(), "Python": sys.version.split()[0], **Closure.of(*modules()).libraries()}
    found |= {path.relative_to(PACKAGE.parent).as_posix(): sha256_of(path) for path in modules().values()}
    patterns = (*_INPUTS, *(f"variants/{name}/plan.json" for name in terms.variants))
    inputs = (path for model in terms.models for pattern in patterns for path in (ARTIFACTS / model).glob(pattern))
    return found | {path.as_posix(): sha256_of(path) for path in inputs}


def _named(pattern: str, whole: bool = False) -> tuple[str, ...]:
    """The folders with such a file that the command names; where it names none, all if `whole`."""
    found = {path.parent.name for path in ARTIFACTS.glob(pattern)}
    return tuple(sorted(found & {*sys.argv} or (found if whole else ())))


def _at(node: str) -> Any:
    """Where Ray runs a task of that node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _difference(own: Mapping[str, str], other: Mapping[str, str]) -> str:
    """The first thing in which another identity differs, and how many more there are; "" for none."""
    names = [name for name in {**own, **other} if own.get(name) != other.get(name)]
    more = f", and {len(names) - 1} more differ" if names[1:] else ""
    return f"{names[0]} {other.get(names[0])} there, {own.get(names[0])} here{more}" if names else ""


def _connect(ray: Any, address: str | None) -> None:
    where = f"the cluster at {address} does not answer" if address else "a local Ray could not be started"
    try:
        if address is None:
            address = start({"num_cpus": cores(), "object_store_memory": int(0.3 * available_memory())}).address
        ray.init(address=address, logging_level="warning", log_to_driver=False)
    except Exception as error:  # Ray raises it as such
        raise ResourceError(f"engine: ray: {where}: {error}. `ray status` says more.") from None
    atexit.register(ray.shutdown)  # before the nodes go, which were started first


def start(*nodes: Mapping[str, Any]) -> Any:
    """Ray nodes on this machine's loopback, as a `ray.cluster_utils.Cluster` that ends with this process.

    `nodes` says what each one is given besides: `num_cpus`, `object_store_memory` (bytes), `env_vars`.
    """
    os.environ.update({_LOOPBACK: "0"} | _SETTINGS | os.environ)
    from ray._common.utils import get_default_ray_temp_dir
    from ray.cluster_utils import Cluster as Nodes

    found, session = Nodes(), f"session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}"
    with _without_secrets():
        for node in nodes:
            with ExitStack() as stack:
                free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in _PORTS]
                ports = {name: one.getsockname()[1] for name, one in zip(_PORTS, free, strict=True)}
            # A node gives its agent 15 seconds to write this file, which no setting changes, even with a given port.
            name = secrets.token_hex(28)
            path = Path(get_default_ray_temp_dir(), session, f"{_PORTS[-1]}_{name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(ports[_PORTS[-1]]))
            given = {**node, "env_vars": {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": name, **node.get("env_vars", {})}}
            found.add_node(**_LOCAL, **ports, **given, session_name=session)
    return found


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


def _look(terms: Terms, names: Sequence[str], head: Any) -> tuple[dict[str, str], list[str]]:
    """What this node is, and which files it lacks: those that `head` does not give."""
    _enter(terms)
    lacks = [name for name in names if not Path(name).exists()]
    if lacks and head:
        fetch(lacks, head)
        lacks = []
    return identity(terms), lacks


def _do(terms: Terms, held: list[Any], unit: Any) -> tuple[float, Any]:
    """The seconds that a unit took, and its result; a generator's items as a list."""
    from threadpoolctl import threadpool_limits

    started = time.perf_counter()
    _enter(terms)
    with threadpool_limits(terms.cores, "blas"):
        found = _opened(held[0])(unit)
        made = list(found) if isinstance(found, Iterator) else found
    return time.perf_counter() - started, made


@lru_cache(1)
def _enter(terms: Terms) -> None:
    """Make this process a worker."""
    if secrets := [name for name in os.environ if name.startswith(_SECRETS)]:
        raise ResourceError(f"it has {secrets[0]} in its environment: start Ray there without signing keys")
    root = os.environ.get(_ROOT, terms.root)
    if not Path(root).is_dir():
        raise ResourceError(f"it has no {root}: share that folder, or clone the project and name it in {_ROOT}")
    os.chdir(root)
    os.environ[CORES] = os.environ["NUMBA_NUM_THREADS"] = str(terms.cores)
    os.environ[DEVICE] = "cpu"  # a GPU is the head process's
    if terms.store:
        os.environ.setdefault("PIPELINE_STORE", terms.store)


@lru_cache(1)
def _opened(held: Any) -> Callable[[Any], Any]:
    """A job, as this process keeps it while its units come."""
    import ray

    return ray.get(held)

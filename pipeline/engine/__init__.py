"""A list of units of work, done here by threads or by workers elsewhere: the same results in the same order.

What a unit gives depends on its job and itself alone, and results are put together in the units' order, whoever was
faster: so bytes and digits are those of one thread for any number of workers. A unit is finished when its caller has
recorded it (`pipeline.partial`, `pipeline.journal`); no engine remembers anything. `pipeline.engine.cluster` is Ray.
"""

from __future__ import annotations

from functools import cache

from pipeline.config.engine import EngineConfig, load_engine
from pipeline.engine.units import Bundles, Engine, Here, Threads

__all__ = ["Bundles", "Engine", "Here", "Threads", "chosen", "narrow"]


def chosen(wide: bool = False) -> Engine:
    """The engine of configs/engine.yaml or PIPELINE_ENGINE; `wide`: for units that take all cores themselves.

    Raises ConfigError where it cannot be had, and ResourceError where no worker of the cluster may take part.
    """
    config = load_engine()
    if config.engine == "ray":
        return _cluster(config)
    return Here() if wide else Threads()


def narrow() -> Engine:
    """As `chosen`, for units of one core each wherever they are done: a worker of many cores does many at a time."""
    engine = chosen()
    return engine if engine.shared else Bundles(engine, load_engine().cores)


@cache
def _cluster(config: EngineConfig) -> Engine:
    """Of the whole process: workers keep what they have opened."""
    from pipeline.engine.cluster import Cluster

    return Cluster(config)

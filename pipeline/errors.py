"""Every failure a user can cause or must act on is one of these.

PipelineError
├── ConfigError        a configuration file says something impossible
├── SourceError        a checkpoint or dataset could not be fetched or is not what was pinned
├── CheckpointError    a checkpoint's files or tensors are not what its config promises
├── GraphError         a graph cannot be built or does not compute what the reference computes
├── PlanError          a recipe cannot be applied to a model
├── ResourceError      the machine lacks the disk or memory for a stage
├── EvaluationError    a measurement could not be made; never counted as a pass
└── BundleError        a bundle or its signature is not what it claims

A message says what failed, where (model, tensor, file), the numbers, and what to do. The command line prints it
as one paragraph and exits with status 1; anything else that escapes is a bug and shows its traceback.
"""


class PipelineError(Exception):
    """Base of all errors that are reported without a traceback."""


class ConfigError(PipelineError):
    """A configuration file says something impossible."""


class SourceError(PipelineError):
    """A checkpoint or dataset could not be fetched, or is not what was pinned."""


class CheckpointError(PipelineError):
    """A checkpoint's files or tensors are not what its config promises."""


class GraphError(PipelineError):
    """A graph cannot be built, or does not compute what the reference computes."""


class PlanError(PipelineError):
    """A recipe cannot be applied to a model."""


class ResourceError(PipelineError):
    """The machine lacks the disk or memory for a stage."""


class EvaluationError(PipelineError):
    """A measurement could not be made. Never counted as a pass."""


class BundleError(PipelineError):
    """A bundle or its signature is not what it claims."""

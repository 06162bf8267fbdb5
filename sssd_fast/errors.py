"""Errors that end a command: printed without a stack trace, exit status `exit_code`.

Messages name the thing, what was got, what is needed and what to do.
"""

from __future__ import annotations


class SssdError(Exception):
    """Base class: a problem the user can act on."""

    exit_code = 2


class ConfigError(SssdError):
    """Settings are unknown, of the wrong type or out of range; the message lists all of them."""


class DataError(SssdError):
    """Images, manifests or splits that cannot be used as they are."""


class CheckpointError(SssdError):
    """A checkpoint that is missing, damaged, or does not fit this run."""


class WeightsError(SssdError):
    """Weights that do not match the model well enough."""


class RunExistsError(SssdError):
    """The run folder already holds a run, and neither --resume nor --overwrite was given."""


class DependencyError(SssdError):
    """An optional package is missing; the message names the extra that installs it."""


class NumericsError(SssdError):
    """Loss or gradients stayed non-finite; training stopped before anything was damaged."""

    exit_code = 3


class EndedByMain(SssdError):
    """The main process of several has ended with an error, which it prints."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("the first process of this run ended; its own message has the reason")
        self.exit_code = exit_code


class Interrupted(SssdError):
    """A signal ended the run after a checkpoint; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum

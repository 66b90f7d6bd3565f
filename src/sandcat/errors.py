"""Every error that a user can cause. Each message says what was got, what is known, and what to do."""

import difflib


class SandcatError(Exception):
    """Base of all errors raised on purpose; the command line prints its one paragraph and exits with code 2."""


class UnsupportedModel(SandcatError, ValueError):
    """The model's family has no row in `families.ARCHITECTURES`, or a part of it has an unknown form."""


class BadRecipe(SandcatError, ValueError):
    """A method, an option or a value that does not exist."""


class PlanConflict(SandcatError, ValueError):
    """Two methods claim one slot of one site, or a plan is applied over another."""


class BudgetError(SandcatError, ValueError):
    """A target that no assignment of sparsities meets, or that there is nothing to measure with."""


class NothingMatched(SandcatError, ValueError):
    """A method whose selection of layers is empty for this model."""


class PlanError(SandcatError, ValueError):
    """A saved plan that this version cannot read or that does not fit the model."""


class CheckpointError(SandcatError, OSError):
    """A folder that cannot be read as a model, or cannot be written."""


class DataError(SandcatError, ValueError):
    """Text or tasks that are missing, empty, too short or unknown."""


class GenerationError(SandcatError, RuntimeError):
    """A cache that goes on with another prompt than its own, or a model that runs twice at once."""


class DeviceError(SandcatError, RuntimeError):
    """A device or dtype that this machine does not have."""


class ParityError(SandcatError, RuntimeError):
    """A kernel disagrees with its reference: nothing is timed or saved after this."""


def suggest(word: str, known: list[str]) -> str:
    """ "; did you mean ...?" if something close is known, else a full stop."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."

"""Every failure that a user can meet: what is wrong, where, what to do, and the exit code.

Raise the most specific class. Its text is one line, `cause (place). remedy`, fit to be shown
as it is; the command line prints it and leaves with `exit_code`.
"""

from typing import Any


class MimoError(Exception):
    """A failure that has a cause, mostly a place, and where one exists a remedy.

    Attributes:
        what: The cause, without a full stop at its end.
        where: The place: a file, a tensor, a kernel, an option. Empty if there is none.
        remedy: What to do about it, as a sentence or a command line. Empty if unknown.
        exit_code: The code with which the command line leaves.
    """

    exit_code: int = 1

    def __init__(self, what: str, *, where: object = "", remedy: str = "") -> None:
        """Describe the failure; `where` may be a path or anything else with a text form."""
        super().__init__(what)
        self.what = what
        self.where = str(where)
        self.remedy = remedy

    def __str__(self) -> str:
        """The whole message in one line, whatever its parts hold."""
        text = self.what
        if self.where:
            text += f" ({self.where})"
        if self.remedy:
            text = f"{text}. {self.remedy}"
        return " ".join(text.split())

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive the way between processes: a measuring child raises, its parent reports."""
        return _rebuild, (type(self), self.what, dict(self.__dict__))


def _rebuild(kind: type[MimoError], what: str, state: dict[str, Any]) -> MimoError:
    """Make an unpickled error without calling a subclass's own constructor."""
    error = kind.__new__(kind, what)
    error.__dict__.update(state)
    return error


class UsageError(MimoError):
    """The command or the call itself is wrong: an unknown option, a malformed SPEC."""

    exit_code = 2


class InputError(MimoError):
    """An input file is missing, damaged or of a kind that is not known; the message names it."""

    def __init__(self, what: str, *, file: object, remedy: str = "") -> None:
        """Describe what is wrong with `file`."""
        super().__init__(what, where=file, remedy=remedy)


class CheckpointWarning(UserWarning):
    """A checkpoint is usable, but something about it should be known; one sentence."""


class ArtifactWarning(RuntimeWarning):
    """An artifact runs, but something about it should be known; one sentence."""


class MissingExtra(MimoError):
    """A feature needs packages of an optional extra that is not installed."""

    def __init__(self, feature: str, *, extra: str = "compile", missing: str = "") -> None:
        """Say which `feature` needs which `extra`; `missing` is the package that was not found."""
        super().__init__(
            f"{feature} needs the [{extra}] extra",
            where=f"{missing} is not installed" if missing else "",
            remedy=f"Run: pip install 'mimo-compile[{extra}]'",
        )
        self.extra = extra


class ArtifactError(MimoError):
    """An artifact cannot be used: damaged, of another schema, or built for another machine."""

    exit_code = 3


class EnvironmentMismatch(ArtifactError):
    """What is installed or what the machine offers does not fit what is needed."""


class VerificationError(MimoError):
    """A compiled result differs from its reference by more than its bound."""

    exit_code = 4


class DeviceLost(MimoError):
    """The device stopped answering; everything measured so far is kept."""

    exit_code = 6

"""The exception hierarchy: one line of text, the exit code of the contract, safe to send on."""

import ast
import pickle
import sys
from pathlib import Path

import pytest

from mimo_compile import errors
from mimo_compile.errors import (
    ArtifactError,
    DeviceLost,
    EnvironmentMismatch,
    InputError,
    MimoError,
    MissingExtra,
    UsageError,
    VerificationError,
)

ALL = [
    (MimoError("it broke", where="kernel k0", remedy="Mend it."), 1),
    (UsageError("unknown objective 'speed'", where="--objective"), 2),
    (InputError("file ends early", file=Path("model.safetensors"), remedy="Copy it again."), 1),
    (MissingExtra("compile", missing="torch"), 1),
    (ArtifactError("schema 9 is newer than 1", where="a.mimo"), 3),
    (EnvironmentMismatch("needs avx512_vnni"), 3),
    (VerificationError("error 0.2 is above 0.1", where="layer 3"), 4),
    (DeviceLost("the GPU fell off the bus"), 6),
]


@pytest.mark.parametrize(("error", "code"), ALL, ids=lambda v: type(v).__name__)
def test_exit_code_and_one_line(error: MimoError, code: int) -> None:
    assert error.exit_code == code
    assert str(error).startswith(error.what)
    assert "\n" not in str(error)


@pytest.mark.parametrize("error", [error for error, _ in ALL], ids=lambda e: type(e).__name__)
def test_survives_the_way_between_processes(error: MimoError) -> None:
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is type(error)
    assert (str(twin), twin.args, twin.__dict__) == (str(error), error.args, error.__dict__)


def test_message_is_cause_place_remedy() -> None:
    assert str(ALL[0][0]) == "it broke (kernel k0). Mend it."
    assert str(ALL[2][0]) == "file ends early (model.safetensors). Copy it again."
    assert str(MimoError("it broke")) == "it broke"


def test_line_breaks_in_parts_do_not_break_the_line() -> None:
    error = MimoError("first\n  second", where="a\nb", remedy="do\tthis")
    assert str(error) == "first second (a b). do this"


def test_missing_extra_names_the_pip_line() -> None:
    assert "pip install 'mimo-compile[compile]'" in str(MissingExtra("tune"))
    assert "pip install 'mimo-compile[hf]'" in str(MissingExtra("this model", extra="hf"))


def test_each_class_of_the_module_is_tested_here() -> None:
    defined = {v for v in vars(errors).values() if isinstance(v, type)} - {MimoError}
    defined = {v for v in defined if issubclass(v, MimoError)}
    assert defined <= {type(error) for error, _ in ALL}


def test_imports_only_the_standard_library() -> None:
    tree = ast.parse(Path(errors.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names

"""What all verbs have in common: help at once, exit codes, one line for each error, JSON, signals."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import types
import warnings
from importlib import import_module
from pathlib import Path

import pytest

from mimo_compile.cli import VERBS, main
from mimo_compile.cli.console import Console, number, size, table
from mimo_compile.cli.options import joules, positive, seconds
from mimo_compile.errors import ArtifactWarning, DeviceLost, MissingExtra, VerificationError

HEAVY = {"torch", "tvm", "tvm_ffi", "xgboost", "numpy", "scipy", "networkx", "rich", "msgspec"}


def test_help_of_everything_is_instant_and_imports_nothing_heavy(tmp_path: Path) -> None:
    for arguments in (["--help"], *([verb, "--help"] for verb in VERBS)):
        code = f"""
import sys
from mimo_compile.cli import main
assert main({arguments!r}) == 0
assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)
"""
        best = float("inf")
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert done.returncode == 0, done.stderr
            spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
            best = min(best, spent)
            if best < 0.3:
                break
        assert best < 0.3, f"{arguments} takes {best:.2f} s of CPU"
        assert "example" in done.stdout and "mimo-compile" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_the_common_options(verb: str, cli) -> None:
    done = cli(verb, "--help")
    assert done.code == 0
    for option in ("--threads", "--seed", "--json", "--verbose"):
        assert option in done.out
    module = import_module(f"mimo_compile.cli.{verb}")
    assert module.__doc__ and f"mimo-compile {verb}" in module.EXAMPLE


def test_examples_of_the_help_parse(monkeypatch, shell_words) -> None:
    """Each example line goes through the real parser; only the work itself is left out."""
    for verb in VERBS:
        module = import_module(f"mimo_compile.cli.{verb}")
        seen = []
        monkeypatch.setattr(module, "run", lambda args, seen=seen: seen.append(args) or 0)
        lines = [line for line in module.EXAMPLE.splitlines() if line.strip()]
        for line in lines:
            assert main(shell_words(line)) == 0, line
        assert len(seen) == len(lines) > 0


def test_no_arguments_show_the_help_and_are_wrong_usage(cli) -> None:
    done = cli()
    assert done.code == 2 and "usage: mimo-compile VERB" in done.out
    assert cli("--version").out.startswith("mimo-compile 0.")
    assert json.loads(cli("--version", "--json").out)["version"].startswith("0.")
    assert cli("help", "run").out == cli("run", "--help").out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["tun"], "Did you mean 'tune'?"),
        (["zzz"], "Verbs are compile, tune"),
        (["run"], "OUT.mimo"),
        (["run", "x.mimo", "--prompt", "a", "--frobnicate"], "--frobnicate"),
        (["run", "x.mimo", "--prompt", "a", "--threads", "0"], "--threads 0"),
        (["verify", "x.mimo", "--seed", "-1"], "--seed -1 is negative"),
        (["compile", "tiny"], "-o/--output"),
        (["compile", "tiny", "-o", "x.bin"], "should end in .mimo"),
        (["compile", "tiny", "-o", "no/such/folder/x.mimo"], "does not exist"),
        (["compile", "tiny", "-o", "x.mimo", "--time", "soon"], "not a duration"),
        (["compile", "tiny", "-o", "x.mimo", "--time", "1m", "--trials", "3"], "not allowed with"),
        (["tune"], "needs either SRC or --op"),
        (["tune", "tiny", "--op", "embed:t=1"], "needs either SRC or --op"),
        (["tune", "--op", "mpgemm:m=1", "--quant", "w8a8"], "--quant goes with SRC"),
        (["tune", "--op", "embed:t=1,v=2,d=4", "--pages", "4"], "are for models"),
        (["tune", "--op", "embed:t=1,v=2,d=4", "--batch", "4"], "are for models"),
        (["bench", "conv"], "invalid choice"),
        (["bench", "mpgemm", "--suite", "nonsense"], "use one of quick"),
        (["bench", "mpgemm", "--peers", "abacus"], "unknown peer 'abacus'"),
        (["bench", "mpgemm", "--cache", "warm"], "hot, cold"),
        (["bench", "moe", "--op", "mpgemm:m=1,n=64,k=64"], "not a workload of bench moe"),
        (["bench", "model", "tiny", "--op", "mpgemm:m=1,n=64,k=64"], "takes no --op"),
        (["bench", "model", "x.mimo", "--batch", "3"], "leave it out"),
        (["inspect"], "either OUT.mimo or --op"),
        (["inspect", "x.mimo", "--asm"], "need --kernel"),
        (["inspect", "x.mimo", "--entry", "main"], "goes with --dot"),
        (["inspect", "x.mimo", "--dot", "--kernel", "k"], "does not go with --kernel"),
        (["inspect", "x.mimo", "--limit", "3"], "--limit goes with --op"),
        (["inspect", "--op", "mpgemm:m=1,n=64", "--limit", "3"], "needs k="),
        (["inspect", "--op", "mpgemm;m=1"], "malformed workload"),
        (["inspect", "--op", "frob:m=1"], "unknown op 'frob'"),
        (["db", "export"], "needs a FILE"),
        (["db", "prune"], "--keep N"),
        (["db", "export", "x.jsonl", "--keep", "3"], "belongs to db prune"),
        (["db", "salvage", "x.db"], "-o FILE"),
        (["targets", "extra"], "unrecognized arguments"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(cli, arguments, text) -> None:
    done = cli(*arguments)
    assert done.code == 2, done.err
    assert text in done.error
    assert done.out == ""


def test_failures_leave_with_their_own_codes(cli, monkeypatch) -> None:
    module = import_module("mimo_compile.cli.targets")
    cases = [
        (VerificationError("wrong"), 4), (DeviceLost("gone"), 6), (MissingExtra("compile"), 1),
        (PermissionError(13, "Permission denied", "x"), 1), (MemoryError(), 1), (ZeroDivisionError("x"), 1),
        (KeyboardInterrupt(), 130),
    ]  # fmt: skip
    for error, code in cases:

        def fail(args, error=error):
            raise error

        monkeypatch.setattr(module, "run", fail)
        done = cli("targets", "--json")
        assert done.code == code
        assert json.loads(done.out)["ok"] is False
        assert json.loads(done.out)["exit_code"] == code
        if code != 130:
            assert done.error


def test_bugs_name_themselves_and_show_their_traceback_only_on_request(cli, monkeypatch) -> None:
    module = import_module("mimo_compile.cli.targets")
    monkeypatch.setattr(module, "run", lambda args: {}["x"])
    done = cli("targets")
    assert done.code == 1 and "internal error: KeyError" in done.error and "-v -v" in done.error
    assert "Traceback" in cli("targets", "-vv").err
    assert "Traceback" in cli("targets", "--debug").err


def test_missing_extra_names_the_pip_line(cli, monkeypatch, tmp_path) -> None:
    from mimo_compile.cli import options

    real = options.find_spec
    monkeypatch.setattr(options, "find_spec", lambda n: None if n == "torch" else real(n))
    done = cli("compile", "tiny", "-o", tmp_path / "x.mimo")
    assert done.code == 1
    assert "torch is not installed" in done.error
    assert "pip install 'mimo-compile[compile]'" in done.error


def test_stdout_holds_json_alone(cli, monkeypatch) -> None:
    module = import_module("mimo_compile.cli.targets")

    def noisy(args):
        print("a library talks")
        args.console.say("for people")
        args.console.result({"ok": True, "nan": float("nan"), "path": Path("x"), "set": {2, 1}})
        return 0

    monkeypatch.setattr(module, "run", noisy)
    done = cli("targets", "--json")
    assert json.loads(done.out) == {"ok": True, "nan": None, "path": "x", "set": [1, 2]}
    assert "a library talks" in done.err
    plain = cli("targets")
    assert "for people" in plain.out and "a library talks" in plain.out


SLOW_VERB = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with it ignored
import mimo_compile.cli as cli
module = types.ModuleType("mimo_compile.cli.targets")
module.DESCRIPTION, module.EXAMPLE = "", "x"
module.add_arguments = lambda parser: None
def run(args):
    print("ready", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        if "swallow" in sys.argv:
            return 0  # a verb that keeps what it has and returns
        if "native" in sys.argv:
            raise RuntimeError  # what is left of it after a call of native code
        raise
module.run = run
sys.modules["mimo_compile.cli.targets"] = module
sys.exit(cli.main(["targets"]))
"""


def wait_until_asleep(pid: int, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < end, "the process does not come to rest"
        time.sleep(0.01)


@pytest.mark.parametrize("verb", ["raise", "swallow", "native"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_codes_and_without_noise(number, code, verb) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW_VERB, verb],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    wait_until_asleep(child.pid)  # in its work, not inside print any more
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert err == ""


def test_a_reader_that_leaves_is_no_error() -> None:
    code = """
import sys, types
import mimo_compile.cli as cli
module = types.ModuleType("mimo_compile.cli.targets")
module.DESCRIPTION, module.EXAMPLE = "", "x"
module.add_arguments = lambda parser: None
def run(args):
    for i in range(100000):
        args.console.stream(f"{i}\\n")
    return 0
module.run = run
sys.modules["mimo_compile.cli.targets"] = module
sys.exit(cli.main(["targets"]))
"""
    read, write = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert os.read(read, 10).startswith(b"0\n")
    os.close(read)
    _, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (0, "")


def test_values_of_options() -> None:
    assert [seconds(t) for t in ("90", "90s", "10m", "1h30m", "0.5s")] == [90, 90, 600, 5400, 0.5]
    assert [joules(t) for t in ("500J", "2kJ", "1500", "250mJ")] == [500, 2000, 1500, 0.25]
    assert positive("3") == 3
    for parse, bad in (
        (seconds, "-1"),
        (seconds, ""),
        (seconds, "0s"),
        (joules, "12W"),
        (positive, "0"),
    ):
        with pytest.raises(Exception, match=r"not|must"):
            parse(bad)


def test_tables_and_numbers() -> None:
    text = table([("a", 1.0, None), ("bb", 1234.5, 2)], ("name", "us", "n"))
    assert text.splitlines() == ["name     us  n", "a      1.00  -", "bb    1,234  2"]
    shown = [number(v) for v in (0.0, 0.0123, 12.34, 5e-7, 2e9, None, float("nan"))]
    assert shown == ["0", "0.0123", "12.3", "5.00e-07", "2.00e+09", "-", "nan"]
    assert [size(n) for n in (10, 2048, 5 << 20, 3 << 30)] == [
        "10 B",
        "2.0 KiB",
        "5.0 MiB",
        "3.0 GiB",
    ]


def test_console_refuses_to_write_json_twice_after_a_failure(capsys) -> None:
    console = Console(json=True)
    console.result({"ok": True})
    console.fail("late", 1)
    assert json.loads(capsys.readouterr().out) == {"ok": True}


def test_modules_of_verbs_follow_the_contract() -> None:
    for verb in VERBS:
        module = import_module(f"mimo_compile.cli.{verb}")
        assert isinstance(module, types.ModuleType)
        assert callable(module.add_arguments) and callable(module.run) and module.DESCRIPTION


def test_notes_are_one_plain_line(capsys) -> None:
    with Console(json=False).notes_shown():
        warnings.warn("x.mimo: all weights are zeros", ArtifactWarning, stacklevel=1)
    assert capsys.readouterr().err == "note: x.mimo: all weights are zeros\n"

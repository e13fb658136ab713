"""run, inspect and report on small artifacts; every damage is one line and the designed exit code."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import msgspec
import pytest
import runtime_samples

from mimo_compile.artifact import Artifact

Done = subprocess.CompletedProcess[bytes]
RUN = ["--prompt", "hello", "--max-new-tokens", "6"]
RUN_KEYS = {
    "text", "prompt_tokens", "new_tokens", "prefill_tokens_per_s", "decode_tokens_per_s", "joules_per_token",
    "joules_source",
}  # fmt: skip


def test_run_streams_text_and_reports(cli, decoder_file) -> None:
    plain = cli("run", decoder_file, *RUN)
    assert plain.code == 0
    assert "tokens/s" in plain.err and "joules not measured" in plain.err
    done = cli("run", decoder_file, *RUN, "--json")
    value = json.loads(done.out)
    assert done.code == 0 and value["ok"] and set(value) >= RUN_KEYS
    assert value["text"] == plain.out.removesuffix("\n")
    assert (
        value["prompt_tokens"] == 5 and value["joules_per_token"] is None and value["joules_reason"]
    )
    again = cli(
        "run", decoder_file, "--prompt", "hello", "--temperature", "1.0", "--seed", "3", "--json"
    )
    other = cli(
        "run", decoder_file, "--prompt", "hello", "--temperature", "1.0", "--seed", "3", "--json"
    )
    assert json.loads(again.out)["text"] == json.loads(other.out)["text"]


def test_several_prompts_give_the_texts_of_each(cli, decoder_file, tmp_path) -> None:
    prompts, batch = ["hello", "x = ", "import"], tmp_path / "batch.mimo"
    runtime_samples.decoder(runtime_samples.BATCH).save(batch)
    alone = [
        json.loads(cli("run", decoder_file, "--prompt", p, *RUN[2:], "--json").out)["text"]
        for p in prompts
    ]
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    for artifact in (decoder_file, batch):  # one after the other, and together
        value = json.loads(cli("run", artifact, *asked, *RUN[2:], "--json").out)
        assert (value["prompts"], value["texts"]) == (prompts, alone) and "text" not in value
        assert value["prompt_tokens"] == 15 and value["decode_tokens_per_s"] > 0
    plain = cli("run", batch, *asked, *RUN[2:])
    assert plain.out == "".join(f"{p}{t}\n\n" for p, t in zip(prompts, alone, strict=True))
    done = cli("run", batch, *asked, "--max-new-tokens", "45")
    assert done.code == 2 and "(prompt 0)" in done.err
    assert json.loads(cli("inspect", batch, "--json").out)["batch"] == runtime_samples.BATCH


def test_prompt_comes_from_a_file_too(cli, decoder_file, tmp_path) -> None:
    (tmp_path / "p.txt").write_text("hello")
    done = cli(
        "run", decoder_file, "--prompt-file", tmp_path / "p.txt", "--max-new-tokens", "6", "--json"
    )
    assert json.loads(done.out)["prompt"] == "hello"
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    assert cli("run", decoder_file, "--prompt-file", tmp_path / "p.txt").code == 2
    assert cli("run", decoder_file, "--prompt-file", tmp_path / "none").code == 1


def process(*arguments: object, stdin: bytes = b"", env: dict[str, str]) -> Done:
    """Run the command in a process of its own."""
    words = [a if isinstance(a, bytes) else str(a) for a in arguments]
    return subprocess.run(
        [sys.executable, "-m", "mimo_compile.cli", *words],
        input=stdin, capture_output=True, timeout=60, env={**os.environ, **env}, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("given", "code"), [("hällo".encode(), 0), (b"h\xff", 2)])
def test_prompts_are_utf_8_whatever_the_locale(decoder_file, given, code) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = ["run", decoder_file, "--max-new-tokens", "3", "--json"]
    for prompt in (["--prompt", given], ["--prompt-file", "-"]):
        done = process(*run, *prompt, stdin=given, env=plain)
        assert done.returncode == code, done.stderr
        value = json.loads(done.stdout)
        if code:
            assert "is not UTF-8 text" in value["error"]
        else:
            assert value["prompt"] == "hällo"


def test_text_goes_to_a_terminal_that_cannot_show_it(decoder_file) -> None:
    done = process(
        "run", decoder_file, "--prompt", "hello", "--temperature", "60", "--max-new-tokens", "40",
        env={"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\\u" in done.stdout or b"\\x" in done.stdout


def test_a_tokenizer_that_cannot_be_read_is_named(cli, decoder_file, tmp_path) -> None:
    found = Artifact.load(decoder_file)
    found.tokenizer = b"{}"
    path = found.save(tmp_path / "t.mimo")
    done = cli("run", path, *RUN)
    assert done.code == 3 and "tokenizer.json cannot be read" in done.error


def test_paths_that_are_no_text(cli, decoder_file, tmp_path) -> None:
    odd = tmp_path / os.fsdecode(b"a\xff.mimo")
    odd.write_bytes(decoder_file.read_bytes())
    assert cli("inspect", odd).code == 0
    assert cli("report", odd, "-o", tmp_path / "r.html").code == 0


def damage(path: Path, target: Path, member: str) -> Path:
    """Flip one byte in the middle of a member's data."""
    shutil.copy(path, target)
    with zipfile.ZipFile(path) as zip_:
        info = zip_.getinfo(member)
        start = info.header_offset
    data = bytearray(target.read_bytes())
    name, extra = (int.from_bytes(data[start + i : start + i + 2], "little") for i in (26, 28))
    data[start + 30 + name + extra + info.file_size // 2] ^= 0x10
    target.write_bytes(data)
    return target


@pytest.mark.parametrize(
    "member", ["manifest.json", "programs.json", "weights.safetensors", "tokenizer.json", "code"]
)
def test_a_flipped_byte_in_any_member_is_refused(cli, decoder_file, tmp_path, member) -> None:
    with zipfile.ZipFile(decoder_file) as zip_:
        names = zip_.namelist()
    name = (
        member
        if member in names
        else next(n for n in names if n.startswith(member) or n.endswith(".o"))
    )
    bad = damage(decoder_file, tmp_path / "bad.mimo", name)
    for verb in (["run", bad, *RUN], ["verify", bad]):
        done = cli(*verb)
        assert done.code == 3, (verb, done.err)
        assert "damaged" in done.error or "differ" in done.error
        assert "bad.mimo" in done.error
        assert done.out.strip() == ""


def test_other_artifacts_that_do_not_fit(cli, tmp_path, decoder_file, plain_file) -> None:
    sample = runtime_samples.decoder()
    target = sample.manifest.target
    amx = msgspec.structs.replace(target, features=("amx-int8", "no-such-feature"))
    sample.manifest = msgspec.structs.replace(sample.manifest, target=amx)
    sample.save(tmp_path / "amx.mimo")
    done = cli("run", tmp_path / "amx.mimo", *RUN)
    assert done.code == 3 and "no-such-feature" in done.error

    sample = runtime_samples.decoder()
    sample.manifest = msgspec.structs.replace(sample.manifest, schema=99)
    try:
        sample.save(tmp_path / "new.mimo")
    except Exception:
        pytest.fail("a newer schema must be writable to be tested")
    done = cli("run", tmp_path / "new.mimo", *RUN)
    assert done.code == 3 and "99" in done.error and "1" in done.error

    done = cli("run", plain_file, *RUN)
    assert done.code == 2 and "not a decoder" in done.error
    (tmp_path / "empty.mimo").write_bytes(b"")
    assert cli("run", tmp_path / "empty.mimo", *RUN).code == 3
    (tmp_path / "text.mimo").write_text("this is no artifact, whatever its name says" * 20)
    assert cli("run", tmp_path / "text.mimo", *RUN).code == 3
    cut = tmp_path / "cut.mimo"
    cut.write_bytes(decoder_file.read_bytes()[:-100])
    assert cli("run", cut, *RUN).code == 3
    assert cli("run", tmp_path / "missing.mimo", *RUN).code == 1
    long = cli("run", decoder_file, "--prompt", "x" * 500)
    assert long.code == 2 and "context" in long.error


def test_inspect_shows_an_artifact(cli, decoder_file) -> None:
    done = cli("inspect", decoder_file)
    assert done.code == 0
    for text in ("step_1", "head_1", "weights.safetensors", "requires", "; besides, workspace"):
        assert text in done.out
    value = json.loads(cli("inspect", decoder_file, "--json").out)
    assert value["ok"] and set(value["programs"]) == set(value["entries"])
    assert value["planned_bytes"] == {
        "weights": value["members"]["weights.safetensors"], "states": value["state_bytes"],
        "arena": max(entry["arena_bytes"] for entry in value["programs"].values()),
    }  # fmt: skip
    assert cli("inspect", decoder_file, "--kernel", "nothing").code == 2
    dot = cli("inspect", decoder_file, "--dot", "--entry", "step_4")
    assert dot.code == 0 and dot.out.startswith("digraph")
    assert cli("inspect", decoder_file, "--dot", "--entry", "step_5").code == 2


def test_report_of_an_artifact_without_records(cli, decoder_file, tmp_path) -> None:
    done = cli("report", decoder_file, "-o", tmp_path / "r.html")
    assert done.code == 0 and (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    assert cli("report", tmp_path / "none.db", "-o", tmp_path / "x.html").code == 1
    (tmp_path / "odd").write_text("neither")
    assert cli("report", tmp_path / "odd", "-o", tmp_path / "x.html").code == 1
    assert not (tmp_path / "x.html").exists()

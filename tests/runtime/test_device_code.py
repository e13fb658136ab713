"""The member with code of GPU kernels: what is written comes back, and what is wrong is refused."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from gpu_samples import TEXT, kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_compile._cuda import Launch, TensorMap
from mimo_compile.errors import ArtifactError
from mimo_compile.runtime.device_code import Argument, DeviceKernel, Made, Scratch, decode, encode

numbers = st.integers(-(2**31), 2**31 - 1)
reals = st.floats(width=32, allow_nan=False, allow_infinity=False)
maps = st.builds(
    TensorMap, st.just("x"), st.sampled_from(["bfloat16", "int8", "float32"]), st.integers(1, 8),
    st.integers(1, 8), st.integers(1, 256), st.integers(1, 256), st.sampled_from([0, 32, 64, 128]),
)  # fmt: skip
launches = st.builds(
    Launch, st.sampled_from(["a", "step_1"]), st.tuples(*[st.integers(1, 65535)] * 3),
    st.integers(1, 1024), st.lists(st.one_of(numbers, reals, maps, st.just("x"))).map(tuple),
    st.integers(0, 232448),
)  # fmt: skip


@settings(max_examples=30)
@given(st.lists(launches, min_size=1, max_size=3), st.binary(max_size=99), st.text(max_size=99))
def test_what_is_written_comes_back(given_launches, cubin, text):
    args = (Argument("x", "weight", (64, 8), "float32"), Argument("y", "output", (3,), "int8"))
    scratch = (Scratch("between", (5,), "uint16", 512, True),)
    kernel = DeviceKernel(args, tuple(given_launches), scratch)
    code = decode(encode("sm_80", {"k": Made(kernel, cubin, text), "l": Made(kernel, b"", "")}), "")
    assert code.table.kernels == {"k": kernel, "l": kernel}
    assert code.cubin("k") == cubin and code.text("k") == text and code.cubin("l") == b""
    for made, found in zip(given_launches, code.table.kernels["k"].launches, strict=True):
        kinds = [type(o) for o in made.operands]
        assert [type(o) for o in found.operands] == kinds, "1.0 is not 1"
    assert code.scratch_bytes == 522


def test_equal_codes_are_stored_once() -> None:
    code = decode(encode("sm_90a", kernels()), "here")
    assert len({*code.table.cubins.values()}) == len({*code.table.texts.values()}) == 1
    assert code.text("add") == TEXT


def changed(**facts: object) -> DeviceKernel:
    return msgspec.structs.replace(kernels()["add"].kernel, **facts)


def with_launch(**facts: object) -> DeviceKernel:
    launch = dataclasses.replace(kernels()["add"].kernel.launches[0], **facts)
    return changed(launches=(launch,))


WIDE = TensorMap("a", "bfloat16", 64, 64, 8, 8)
WRONG = {
    "two arrays of one name": changed(scratch=(Scratch("a", (1,), "int8", 0),)),
    "an array of complex64": changed(scratch=(Scratch("z", (1,), "complex64", 0),)),
    "off its boundary": changed(scratch=(Scratch("both", (1,), "int8", 64),)),
    "launches nothing": changed(launches=()),
    "launches 'a b'": with_launch(symbol="a b"),
    "a grid of": with_launch(grid=(0, 1, 1)),
    "blocks of 2048 threads": with_launch(threads=2048),
    "clusters of 9 blocks": with_launch(cluster=9),
    "'q', which is none of its arrays": with_launch(operands=("q",)),
    "which is no int32": with_launch(operands=(2**31,)),
    "given inf": with_launch(operands=(float("inf"),)),
    "map of 8192 bytes over the 256 of a": with_launch(operands=(WIDE,)),
    "map of elements of 'int64'": with_launch(operands=(dataclasses.replace(WIDE, dtype="int64"),)),
    "map of 0 x 64": with_launch(operands=(dataclasses.replace(WIDE, rows=0),)),
    "map of 'q'": with_launch(operands=(dataclasses.replace(WIDE, array="q"),)),
}


@pytest.mark.parametrize("text", WRONG)
def test_what_no_gpu_can_do_is_refused(text: str) -> None:
    made = dataclasses.replace(kernels()["add"], kernel=WRONG[text])
    with pytest.raises(ArtifactError, match=f"kernel add .*{text}|malformed"):
        encode("sm_90a", {"add": made})


def test_damaged_members_are_refused() -> None:
    data = encode("sm_90a", kernels())
    for bad, text in (
        (data[:5], "cut short"),
        (data[:100], "cut short"),
        (data[:-80], "lies outside of the member"),
        (data.replace(b'"arch"', b'"arhc"'), "malformed table"),
        (data.replace(b'"threads":32', b'"threads":xx'), "malformed JSON"),
    ):
        with pytest.raises(ArtifactError, match=text):
            decode(bad, "here")

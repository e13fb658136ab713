"""CUDA text to machine code with NVRTC, NVIDIA's compiler as a library: where nvcc is not installed.

It is one file of Python's own modules, since it is also a program, which `nvcc` runs as it runs nvcc: so a
compiler that crashes or takes too long takes nothing along. NVRTC knows no C++ library and none of the
host's headers; what of them kernels include is in here.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path

NAMES = ("libnvrtc.so.13", "libnvrtc.so.12")
"""Of the library, the best first."""
OPTIONS = (
    "-std=c++17", "-default-device", "--ptxas-options=-v", "--ptxas-options=--warn-on-spills",
    "--ptxas-options=--warn-on-local-memory-usage",
)  # fmt: skip
"""Functions of the device headers that name no place are the device's: NVRTC makes code for nothing else."""
_STDINT = """#pragma once
typedef signed char int8_t; typedef unsigned char uint8_t;
typedef short int16_t; typedef unsigned short uint16_t;
typedef int int32_t; typedef unsigned int uint32_t;
typedef long long int64_t; typedef unsigned long long uint64_t;
typedef unsigned long uintptr_t; typedef long intptr_t;
"""
HEADERS = {"stdint.h": _STDINT}
"""What NVRTC lacks of the host's headers, by name."""
_SIGNATURES = {
    "nvrtcVersion": (POINTER(c_int), POINTER(c_int)),
    "nvrtcCreateProgram": (
        POINTER(c_void_p), c_char_p, c_char_p, c_int, POINTER(c_char_p), POINTER(c_char_p),
    ),
    "nvrtcCompileProgram": (c_void_p, c_int, POINTER(c_char_p)),
    "nvrtcGetProgramLogSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetProgramLog": (c_void_p, c_char_p),
    "nvrtcGetCUBINSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetCUBIN": (c_void_p, c_char_p),
    "nvrtcGetPTXSize": (c_void_p, POINTER(c_size_t)),
    "nvrtcGetPTX": (c_void_p, c_char_p),
    "nvrtcGetErrorString": (c_int,),
}  # fmt: skip
_REFUSED = 6
"""NVRTC_ERROR_COMPILATION: the log says why."""


class Nvrtc:
    """The library."""

    def __init__(self, path: Path | str) -> None:
        """Load it.

        Raises:
            OSError: it cannot be loaded, or is no NVRTC that makes machine code.
        """
        # it looks for these by their names, of some releases not beside itself; not for another release's
        major = Path(path).name.removeprefix("libnvrtc.so.").partition(".")[0]
        for beside in sorted(Path(path).parent.glob(f"libnvrtc-builtins.so.{major}*")):
            with suppress(OSError):  # if it is the one that is needed, compiling says so
                ctypes.CDLL(str(beside))
        self._library = ctypes.CDLL(str(path))
        for name, kinds in _SIGNATURES.items():
            try:
                getattr(self._library, name).argtypes = kinds
            except AttributeError as error:
                raise OSError(f"{path} has no {name}") from error
        self._library.nvrtcGetErrorString.restype = c_char_p

    @property
    def release(self) -> tuple[int, int]:
        """Release of CUDA that it belongs to."""
        major, minor = c_int(), c_int()
        self._do("nvrtcVersion", byref(major), byref(minor))
        return major.value, minor.value

    def compile(self, text: str, options: list[str], kind: str) -> tuple[bytes | None, str]:
        """Compile a text.

        Args:
            text: CUDA C++.
            options: As on NVRTC's command line.
            kind: ``cubin`` or ``ptx``.

        Returns:
            What was made (None: the text was refused), and the log.

        Raises:
            OSError: NVRTC fails for another reason than the text.
        """
        program = c_void_p()
        names = (c_char_p * len(HEADERS))(*(n.encode() for n in HEADERS))
        bodies = (c_char_p * len(HEADERS))(*(b.encode() for b in HEADERS.values()))
        self._do(
            "nvrtcCreateProgram", byref(program), text.encode(), b"kernel.cu", len(HEADERS), bodies,
            names,
        )  # fmt: skip
        given = (c_char_p * len(options))(*(o.encode() for o in options))
        error = int(self._library.nvrtcCompileProgram(program, len(options), given))
        log = self._bytes(program, "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
        if error == _REFUSED:
            return None, log
        self._check("nvrtcCompileProgram", error)
        return self._bytes(program, f"nvrtcGet{kind.upper()}"), log

    def _bytes(self, program: c_void_p, function: str) -> bytes:
        size = c_size_t()
        self._do(f"{function}Size", program, byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._do(function, program, data)
        return data.raw

    def _do(self, function: str, *arguments: object) -> None:
        self._check(function, int(getattr(self._library, function)(*arguments)))

    def _check(self, function: str, error: int) -> None:
        if error:
            text = self._library.nvrtcGetErrorString(error).decode()
            raise OSError(f"NVRTC answers {function} with {text}")


def main(library: str, *arguments: str) -> int:
    """Compile a file as nvcc would: the log goes to standard error; return 0, or 1 if it was refused.

    Args:
        library: NVRTC.
        arguments: ``--version``, to print it; or source, where to write, kind and options.
    """
    if arguments == ("--version",):
        try:
            release, size = Nvrtc(library).release, Path(library).stat().st_size
        except OSError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        print(f"NVRTC release {release[0]}.{release[1]}, {size} bytes")
        return 0
    source, out, kind, *options = arguments
    try:
        made, log = Nvrtc(library).compile(Path(source).read_text(), options, kind)
    except OSError as error:
        made, log = None, f"error: {error}"
    sys.stderr.write(log)
    if made is None:
        return 1
    Path(out).write_bytes(made.rstrip(b"\0") if kind == "ptx" else made)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Kernels and whole models side by side: ours, their peers and the machine's roof in one interleaved run."""

from mimo_compile.bench.contest import Contestant, Row, compete
from mimo_compile.bench.machine import machine_facts
from mimo_compile.bench.suites import KINDS, suite

__all__ = ["KINDS", "Contestant", "Row", "compete", "machine_facts", "suite"]

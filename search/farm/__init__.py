"""Tuning on many machines: which action runs where, on what it runs, and a measurer on top of it.

An action is one build or one measurement. `scheduling` decides, from events alone; `coordinator` carries the
decisions out through an `Executor`; `measurer` is what a tuner sees; `ray_executor` is the executor for Ray.
"""

from __future__ import annotations

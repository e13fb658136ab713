"""Whole models side by side, each in a process of its own: who takes part and how it is run."""

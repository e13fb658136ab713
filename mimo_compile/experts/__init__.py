"""Load of experts: traces of it, forecasts, and where to put the experts for it. See docs/experts.md."""

"""Programs for machines that cannot be had: they are executed bit by bit, and their time is modelled."""

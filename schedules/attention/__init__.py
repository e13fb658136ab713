"""Attention over KV caches and the append that fills them; both share the cache layouts."""

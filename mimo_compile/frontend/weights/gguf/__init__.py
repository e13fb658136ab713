"""GGUF files: `reader` (the container), `blocks` (quantised types), `model` and `tokenizer` (metadata)."""

"""Whole models beside torch and llama.cpp: tokens/s, load time and memory at each number of bits.

Makes random checkpoints once, in Hugging Face's format: a Llama of the 1B class, one with the extents of
BitNet b1.58 3B, and a mixture of 256 experts (`--model flash1b`). Each cell (model, quantisation, threads)
is one `mimo-compile bench model`: some minutes, and a line of FOLDER/results.jsonl. Cells that are in it are
left out: run the same command again to go on.

    python benchmarks/end_to_end.py FOLDER --prepare                 # checkpoints, artifacts, files of peers
    python benchmarks/end_to_end.py FOLDER                           # all cells
    python benchmarks/end_to_end.py FOLDER --model llama1b --quant w2g64a8 --threads 1
    python benchmarks/end_to_end.py FOLDER --show
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

MODELS = {
    "llama1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32000,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0,
    },
    "bitnet3b": {
        "hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 100, "vocab_size": 32002,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    },
    "flash1b": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4,
        "hybrid_layer_pattern": (0, 1, 1, 1), "moe_layer_freq": (0, 1, 1, 1),
        "num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 192, "v_head_dim": 128,
        "swa_num_attention_heads": 16, "swa_num_key_value_heads": 2, "swa_head_dim": 192,
        "swa_v_head_dim": 128, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "moe_intermediate_size": 512, "mtp_layers": 1, "mtp_intermediate_size": 4096,
        "vocab_size": 32000, "partial_rotary_factor": 0.334, "rope_theta": 5000000.0,
    },
}  # fmt: skip
"""What differs between the checkpoints' ``config.json``; 1.1, 3.3 and 1.3 billion parameters, bfloat16.
`flash1b` is a MiMo-V2-Flash with the heads, windows and 256 experts of its kind and few layers."""
QUANTS = ("w8a8", "w4g64a8", "w2g64a8", "w1.58a8")
"""What cells are compiled as unless asked otherwise."""
THREADS = (1, 2)
KEY = ("model", "quant", "threads", "batch", "prompt_tokens", "new_tokens")
"""What cells of the results are told apart by."""


def llama(sizes):
    """Return ``config.json`` and a generator of shards, name to tensor, of a Llama."""
    import torch

    d, f, v = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    q = sizes["num_attention_heads"] * sizes["head_dim"]
    kv = sizes["num_key_value_heads"] * sizes["head_dim"]
    count, one = sizes["num_hidden_layers"], torch.ones(d, dtype=torch.bfloat16)

    def shards(matrix):
        for i in range(count):
            at = f"model.layers.{i}."
            yield {
                at + "input_layernorm.weight": one, at + "post_attention_layernorm.weight": one.clone(),
                at + "self_attn.q_proj.weight": matrix(q, d), at + "self_attn.k_proj.weight": matrix(kv, d),
                at + "self_attn.v_proj.weight": matrix(kv, d), at + "self_attn.o_proj.weight": matrix(d, q),
                at + "mlp.gate_proj.weight": matrix(f, d), at + "mlp.up_proj.weight": matrix(f, d),
                at + "mlp.down_proj.weight": matrix(d, f),
            }  # fmt: skip
        yield {
            "model.embed_tokens.weight": matrix(v, d), "lm_head.weight": matrix(v, d),
            "model.norm.weight": one,
        }  # fmt: skip

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", **sizes,
    }  # fmt: skip
    return config, count + 1, shards


def flash(sizes):
    """Return ``config.json`` and a generator of shards of a MiMo-V2-Flash; see `llama`."""
    import torch

    from mimo_compile.tiny.checkpoint import to_tensors
    from mimo_compile.tiny.training_config import TinyConfig
    from mimo_compile.tiny.training_model import TinyModel

    shape = TinyConfig(**sizes)
    with torch.device("meta"):
        extents = to_tensors(TinyModel(shape, torch.float32))
    parts = {}
    for name, tensor in extents.items():
        layer = name.removeprefix("model.layers.").split(".")[0]
        parts.setdefault(layer if layer.isdigit() else "rest", {})[name] = tensor

    def shards(matrix):
        for part in parts.values():
            yield {
                name: matrix(*tensor.shape).to(tensor.dtype)
                if tensor.ndim == 2
                else torch.full(
                    tensor.shape, float(name.endswith("norm.weight")), dtype=tensor.dtype
                )
                for name, tensor in part.items()
            }

    return shape.to_json(), len(parts), shards


def make_checkpoint(folder, name):
    """Write a random checkpoint of one of `MODELS`, unless it is there; return its folder."""
    import torch
    from safetensors.torch import save_file

    out = folder / name
    if (out / "config.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    config, count, shards = (flash if "n_routed_experts" in MODELS[name] else llama)(MODELS[name])
    random = torch.Generator().manual_seed(0)

    def matrix(n, k):
        return (torch.randn(n, k, generator=random) * k**-0.5).to(torch.bfloat16)

    where = {}
    for i, tensors in enumerate(shards(matrix)):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    (out / "config.json").write_text(json.dumps(config, indent=1))  # last: it marks the end
    return out


def artifact(folder, cell, source, settings):
    """Return the compiled model of a cell, made now unless it is there."""
    model, quant, threads = cell
    together = f"-b{settings.batch}" if settings.batch > 1 else ""
    path = folder / f"{model}-{quant}-{threads}{together}.mimo"
    if not path.exists():
        context = settings.prompt_tokens + settings.new_tokens
        command = [
            "compile",
            source,
            "--quant",
            quant,
            "--threads",
            threads,
            "--max-context",
            context,
            "--batch",
            settings.batch,
        ]
        cli([*command, "-o", path, *(["--db", settings.db] if settings.db else [])])
    return path


def cli(arguments):
    """Run a verb of the command line in a process of its own and return its JSON."""
    command = [sys.executable, "-m", "mimo_compile.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"failed: {' '.join(command)}")
    return json.loads(done.stdout)


def measure(folder, cell, settings):
    """Run one cell; with ``--prepare`` only so far that all files are there."""
    model, quant, threads = cell
    source = make_checkpoint(folder, model)
    compiled = artifact(folder, cell, source, settings)
    arguments = [
        "bench", "model", compiled, "--source", source, "--keep", folder / "peers", "--threads", threads,
        "--prompt-tokens", settings.prompt_tokens, "--new-tokens", settings.new_tokens,
        "--rounds", settings.rounds, "--peers", settings.peers,
    ]  # fmt: skip
    if settings.prepare:
        prepare_peers(folder, cell, source, settings)
        return None
    begin = time.time()
    found = cli(arguments)
    return {
        "model": model, "quant": quant, "threads": threads, "batch": settings.batch, "date": int(begin),
        "seconds": round(time.time() - begin, 1), **found,
    }  # fmt: skip


def prepare_peers(folder, cell, source, settings):
    """Write the files that peers run."""
    from mimo_compile.bench.model import find_entrants
    from mimo_compile.bench.models.entrant import ModelAsk
    from mimo_compile.bench.peers import parse_peers

    context = settings.prompt_tokens + settings.new_tokens
    ask = ModelAsk(source, cell[1], cell[2], context, folder / "peers")
    find_entrants(parse_peers(settings.peers), ask)


def ratio(ours, other, part):
    """Return ours / its of the medians, with the spread over the rounds' extremes; None: unknown."""
    rates = [row[f"{part}_tokens_per_s"] for row in (ours, other)]
    if None in rates:
        return "-"
    low, high = other[f"{part}_spread"]
    mine = ours[f"{part}_spread"]
    return f"{rates[0] / rates[1]:.2f}x ({mine[0] / high:.2f}..{mine[1] / low:.2f})"


def show(results):
    """Print the newest result of each cell as a Markdown table; ratios are ours / its."""
    cells = {tuple(r[name] for name in KEY): r for r in results}
    columns = (
        "model", "threads", "implementation", "prefill tok/s", "ours/its", "decode tok/s", "ours/its",
        "of read roof", "load s", "check s", "file MB", "resident MB", "own MB",
    )  # fmt: skip
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for (model, _, threads, *_), result in sorted(cells.items()):
        ours = result["rows"][0]
        for row in result["rows"]:
            share, check = row["decode_roof_share"], row["check_s"]
            line = [model, threads, row["impl"]]
            for part in ("prefill", "decode"):
                low, high = row[f"{part}_spread"]
                line.append(f"{row[f'{part}_tokens_per_s']:.1f} ({low:.1f}..{high:.1f})")
                line.append("" if row is ours else ratio(ours, row, part))
            line.append(f"{100 * share:.0f} %" if share else "")
            line += [f"{row['load_s']:.2f}", f"{check:.2f}" if check else ""]
            line += [
                f"{row[name] / 1e6:.0f}" if row[name] else ""
                for name in ("file_bytes", "rss_bytes", "anonymous_bytes")
            ]
            print("| " + " | ".join(map(str, line)) + " |")
    out = {
        f"- {r['model']} {r['quant']}: left out: {o['impl']}: {o['reason']}"
        for r in cells.values()
        for o in r["left_out"] + r["missing"]
    }
    print("\n".join(["", *sorted(out)]))
    loads = [r["machine"]["load"] for r in cells.values()]
    if loads:
        took = statistics.median(r["seconds"] for r in cells.values())
        print(
            f"- load of the machine {min(loads)} to {max(loads)}; a cell took {took:.0f} s (median)"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=MODELS, help="one model; default: all")
    parser.add_argument("--quant", help="one quantisation; default: " + ", ".join(QUANTS))
    parser.add_argument("--threads", type=int, help="default: 1 and 2")
    parser.add_argument("--peers", default="torch,llama.cpp")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        help="ours also generates so many texts together; default: 1",
    )
    parser.add_argument("--rounds", type=int, default=3, help="at most 5")
    parser.add_argument("--db", type=Path, help="tuning records; default: the user's")
    parser.add_argument(
        "--again", action="store_true", help="measure cells that are in the file, too"
    )
    parser.add_argument("--prepare", action="store_true", help="make all files, measure nothing")
    parser.add_argument("--show", action="store_true", help="print the table of the results")
    settings = parser.parse_args()
    file = settings.folder / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    results = [{"batch": 1, **json.loads(line)} for line in lines]
    if settings.show:
        show(results)
        return
    settings.folder.mkdir(parents=True, exist_ok=True)
    done = {tuple(r[name] for name in KEY) for r in results}
    for model in [settings.model] if settings.model else MODELS:
        for quant in [settings.quant] if settings.quant else QUANTS:
            for threads in [settings.threads] if settings.threads else THREADS:
                cell = (model, quant, threads)
                key = (*cell, settings.batch, settings.prompt_tokens, settings.new_tokens)
                if key in done and not (settings.again or settings.prepare):
                    continue
                print(*cell, file=sys.stderr, flush=True)
                if (result := measure(settings.folder, cell, settings)) is not None:
                    with file.open("a") as lines:
                        lines.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

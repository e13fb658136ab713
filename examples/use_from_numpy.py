"""Use an artifact without torch: load it, score text with numpy arrays, sample, generate.

python examples/use_from_numpy.py [OUT.mimo]

Without an argument it compiles the built-in model first, in a process of its own.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import mimo_compile as mc


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else compiled(Path(folder))
        use(path)
    assert "torch" not in sys.modules


def compiled(folder: Path) -> Path:
    path = folder / "tiny.mimo"
    command = ["compile", "tiny", "--quant", "w8a8", "-o", str(path)]
    subprocess.run([sys.executable, "-m", "mimo_compile.cli", *command], check=True)
    return path


def use(path: Path) -> None:
    model = mc.load(path)
    text = "import os\n\n\ndef main():\n    return os.path.join("
    ids = np.array(model.tokenizer.encode(text).ids, np.int32)
    scores = model.token_logprobs(ids)
    print(f"{len(ids)} tokens, perplexity {np.exp(-scores.mean()):.1f}")
    print(f"the least expected token: {model.tokenizer.decode([int(ids[1 + scores.argmin()])])!r}")

    session = model.session()
    hidden = session.append(ids)
    logits = next(iter(session.logits(hidden)))[0]
    print("next:", [model.tokenizer.decode([int(i)]) for i in np.argsort(-logits)[:5]])

    for temperature in (0.0, 0.8):
        pieces = model.generate(text, 24, temperature=temperature, seed=1)
        print(f"temperature {temperature}: {''.join(pieces)!r}")


if __name__ == "__main__":
    main()

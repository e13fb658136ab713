"""A small MiMo, trained on a random chain of tokens: how many drafts are kept, what swapped halves do."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

import mimo_compile as mc
from mimo_compile.frontend.huggingface import load_checkpoint
from mimo_compile.ir.formats import parse_scheme
from mimo_compile.runtime import Speculation, Stats

pytestmark = [pytest.mark.compile, pytest.mark.slow]
SYMBOLS, LIKELY, LENGTH = 48, 0.7, 32


def chains(count, generator):
    """Draw texts ``[count, LENGTH]``: each token has a likely successor, or any other follows."""
    after = torch.randperm(SYMBOLS, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(0, SYMBOLS, (count, LENGTH), generator=generator)
    likely = torch.rand((count, LENGTH), generator=generator) < LIKELY
    for i in range(1, LENGTH):
        ids[:, i] = torch.where(likely[:, i], after[ids[:, i - 1]], ids[:, i])
    return ids


class Draft(torch.nn.Module):
    """The published draft layer, to be trained beside the trunk."""

    def __init__(self, model):
        super().__init__()
        self.layer = Qwen2DecoderLayer(model.config, 0)
        for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
            setattr(self, name, torch.nn.RMSNorm(64, eps=1e-5))
        self.input_proj = torch.nn.Linear(128, 64, bias=False)

    def forward(self, model, hidden, embedded):
        """Logits of the tokens two further on: ``hidden`` (normed) and ``embedded`` ``[B, T, 64]``."""
        first = (torch.arange(embedded.shape[1]) > 0)[None, :, None]
        pair = [self.hidden_layernorm(hidden), self.token_layernorm(embedded * first)]
        u = self.input_proj(torch.cat(pair, -1))
        t = u.shape[1]
        positions = torch.arange(t)[None]
        z = self.layer(
            u,
            attention_mask=torch.full((t, t), float("-inf")).triu(1)[None, None],
            position_ids=positions,
            position_embeddings=model.model.rotary_emb(u, positions),
        )
        return model.lm_head(self.final_layernorm(z[0] if isinstance(z, tuple) else z))

    def tensors(self):
        """By the published names."""
        own = {name.removeprefix("layer."): value for name, value in self.state_dict().items()}
        return {f"model.mtp_layers.0.{name}": value.clone() for name, value in own.items()}


@pytest.fixture(scope="module")
def trained(tools, tmp_path_factory):
    """A folder with the trained model."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    model = tools.make_model(
        "qwen2", num_hidden_layers=2, tie_word_embeddings=False, rms_norm_eps=1e-5
    )
    draft = Draft(model)
    weights = [*model.parameters(), *draft.parameters()]
    for value in weights:
        value.requires_grad_(True)
        if value.dim() > 1:
            value.data.mul_(0.3)
    optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2)
    loss_of = torch.nn.functional.cross_entropy
    for _ in range(200):
        ids = chains(16, generator)
        hidden = model.model(ids, use_cache=False).last_hidden_state
        loss = loss_of(model.lm_head(hidden[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        ahead = draft(model, hidden[:, :-2], model.model.embed_tokens(ids[:, 1:-1]))
        loss = loss + loss_of(ahead.flatten(0, 1), ids[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    save_file(
        {**load_file(folder / "model.safetensors"), **draft.tensors()}, folder / "model.safetensors"
    )
    tools.edit_json(folder / "config.json", model_type="mimo", num_nextn_predict_layers=1)
    return folder


def test_drafts_are_kept_as_often_as_the_texts_allow(trained):
    module = mc.compile(trained, db=trained / "records.db", max_context=256, threads=1).module()
    start = chains(1, torch.Generator().manual_seed(9))[0, :12].tolist()
    for temperature, least, most in ((0.0, 0.9, 1.0), (1.0, LIKELY - 0.15, LIKELY + 0.15)):
        how = {"temperature": temperature, "seed": 3, "stop_at_eos": False}
        plain = list(module.generate_ids(start, 200, **how))
        stats = Stats()
        found = list(
            module.generate_ids(start, 200, speculative=Speculation(1), stats=stats, **how)
        )
        assert found == plain
        (head,) = stats.acceptance["heads"]
        assert head["judged"] > 80
        assert least <= head["accepted"] / head["judged"] <= most, temperature


def test_swapped_halves_are_noticed(trained, tmp_path):
    """A file whose halves stand the other way round is read without complaint; its drafts tell."""

    def kept(folder):
        decoder = load_checkpoint(folder, parse_scheme("none"), 256).decoder
        ids = chains(1, torch.Generator().manual_seed(9))[0, :12].tolist()
        ids += decoder.generate_greedy(ids, 100)
        hidden, logits = decoder.prefill(ids)
        drafts = decoder.draft(0, hidden[:-1], torch.tensor(ids[1:]), 0).argmax(-1)
        return float((drafts == logits.argmax(-1)[1:]).float()[12:].mean())

    assert kept(trained) > 0.9
    swapped = shutil.copytree(trained, tmp_path / "swapped", ignore=shutil.ignore_patterns("*.db*"))
    tensors = load_file(swapped / "model.safetensors")
    name = "model.mtp_layers.0.input_proj.weight"
    tensors[name] = torch.cat(tensors[name].chunk(2, 1)[::-1], 1).contiguous()
    save_file(tensors, swapped / "model.safetensors")
    assert kept(swapped) < 0.4

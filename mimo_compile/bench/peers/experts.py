"""Mixtures of experts of other makes: PyTorch's forms under `torch.compile`, and transformers' own block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mimo_compile.bench.peers.base import Ask, LeftOut, Peer, Variant
from mimo_compile.bench.peers.torch_attention import without_compiler

if TYPE_CHECKING:
    from mimo_compile.bench.peers.expert_forms import Setting


class ExpertPeer(Peer):
    """Base: takes part in `bench moe` alone, in float32 and bfloat16."""

    def prepare(self, ask: Ask) -> Callable[[], None]:
        """Return what sets the number of threads."""
        import torch

        return lambda: torch.set_num_threads(ask.hardware.threads)

    def variants(self, ask: Ask) -> Iterator[Variant | LeftOut]:
        """Offer all forms in both types; nothing for other ops."""
        if ask.workload.op != "moe":
            return
        from mimo_compile.bench.peers.expert_forms import TYPES, Setting

        for label in TYPES:
            yield from self.forms(Setting(ask, label))

    def forms(self, setting: Setting) -> Iterator[Variant | LeftOut]:
        """Offer the forms of one type."""
        raise NotImplementedError


class TorchCompile(ExpertPeer):
    """The forms of `expert_forms`, compiled by inductor before the clock starts.

    Of the loop, which the routing makes as long as it is, one expert is compiled; the others are whole.
    """

    name = "torch-compile"
    packages = ("torch",)
    remedy = "pip install 'mimo-compile[compile]'"
    no_models = "runs experts alone; torch runs whole models"

    def missing(self) -> LeftOut | None:
        """Return what is said without PyTorch, or without a C++ compiler, else None."""
        return super().missing() or without_compiler(self.name)

    def variants(self, ask: Ask) -> Iterator[Variant | LeftOut]:
        """Offer the forms in both types."""
        import torch

        # functions compiled for earlier workloads would count against the limit of recompilations
        torch._dynamo.reset()
        yield from super().variants(ask)

    def forms(self, setting: Setting) -> Iterator[Variant | LeftOut]:
        """Offer the forms of one type."""
        import torch

        from mimo_compile.bench.peers.expert_forms import gathered, grouped, looped, mlp

        expert = torch.compile(mlp, dynamic=True)
        yield _compiled(setting.variant("loop", looped(expert)))
        if setting.label == "bf16":
            yield _compiled(setting.variant("grouped", torch.compile(grouped, dynamic=False)))
        else:
            yield LeftOut(f"grouped {setting.label}", "torch compiles grouped_mm in bf16 alone")
        yield setting.left_out(f"gathered {setting.label}") or _compiled(
            setting.variant("gathered", torch.compile(gathered, dynamic=False))
        )


def _compiled(variant: Variant) -> Variant:
    """Return a variant that is compiled when its first argument set is made."""
    import torch

    make, call = variant.make, variant.call
    fresh = [True]

    def ready() -> Any:
        arguments = make()
        if fresh:
            fresh.clear()
            # workers that compile would outlive the comparison and keep cores busy
            with torch._inductor.config.patch(compile_threads=1):
                call(arguments)
        return arguments

    variant.make = ready
    return variant


class Transformers(ExpertPeer):
    """The experts of Qwen3-MoE in transformers, in each implementation that it has for CPUs."""

    name = "transformers"
    packages = ("transformers", "torch")
    remedy = "pip install 'mimo-compile[compile,hf]'"
    no_models = "runs experts alone; torch runs transformers' whole models"

    def forms(self, setting: Setting) -> Iterator[Variant | LeftOut]:
        """Offer the implementations in one type."""
        for name in ("eager", "batched_mm", "grouped_mm"):
            copied = setting.left_out(f"{name} {setting.label}") if name == "batched_mm" else None
            yield copied or _block(setting, name)


def _block(setting: Setting, implementation: str) -> Variant:
    """Return transformers' module over the weights that all peers share."""
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    p = setting.ask.params
    config = Qwen3MoeConfig(
        hidden_size=p["d"], moe_intermediate_size=p["f"], num_experts=p["e"], num_experts_per_tok=p["k"],
    )  # fmt: skip
    config._experts_implementation = implementation
    base = setting.sets(setting.weights)

    def make() -> Any:
        x, ids, share, w13, w2 = base()
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        module.gate_up_proj = torch.nn.Parameter(w13, requires_grad=False)
        module.down_proj = torch.nn.Parameter(w2, requires_grad=False)
        return module.eval(), x, ids, share

    def call(arguments: Any) -> Any:
        module, *given = arguments
        with torch.inference_mode():
            return module(*given)

    return setting.checked(f"{implementation} {setting.label}", make, call, setting.nbytes)

"""Kernel schedules: for each op and hardware family, a space of configs and config -> kernel."""

from __future__ import annotations

if __name__ != "mimo_compile.schedules":
    raise ImportError("import mimo_compile.schedules, not schedules")

from mimo_compile.ir.hardware import Hardware
from mimo_compile.ir.workload import Workload
from mimo_compile.plugins import Kind
from mimo_compile.schedules.base import Kernel, Schedule, Space

SCHEDULES: dict[str, dict[str, str]] = {
    "mpgemm": {
        "mpgemm.x86_amx": "mpgemm.x86_amx:X86Amx",
        "mpgemm.x86_panel_planes": "mpgemm.x86_panel:X86PanelPlanes",
        "mpgemm.x86_planes": "mpgemm.x86_dense:X86Planes",
        "mpgemm.x86_amx_bits": "mpgemm.x86_amx:X86AmxBits",
        "mpgemm.x86_panel_bits": "mpgemm.x86_panel:X86PanelBits",
        "mpgemm.x86_lut": "mpgemm.x86_lut:X86Lut",
        "mpgemm.x86_vnni": "mpgemm.x86_vnni:X86Vnni",
        "mpgemm.x86_strits": "mpgemm.x86_dense:X86SignedTrits",
        "mpgemm.x86_trits": "mpgemm.x86_dense:X86Trits",
        "mpgemm.x86_lut4": "mpgemm.x86_lut:X86Lut4",
        "mpgemm.x86_lut_shuffle": "mpgemm.x86_lut:X86LutShuffle",
        "mpgemm.x86_tl1": "mpgemm.x86_tl:X86Pairs",
        "mpgemm.x86_tl2": "mpgemm.x86_tl:X86Triples",
        "mpgemm.x86_amx_bf16": "mpgemm.x86_amx_bf16:X86AmxBf16",
        "mpgemm.x86_bf16": "mpgemm.x86_bf16:X86Bf16",
        "mpgemm.x86_portable": "mpgemm.x86_portable:X86Portable",
        "mpgemm.x86_float": "mpgemm.x86_float:X86Float",
        "mpgemm.x86_codebook": "mpgemm.x86_codebook:X86Codebook",
        "mpgemm.x86_codebook_planes": "mpgemm.x86_codebook:X86CodebookPlanes",
        "mpgemm.x86_codebook_columns": "mpgemm.x86_codebook_columns:X86CodebookColumns",
        "mpgemm.x86_complex": "mpgemm.x86_complex:X86Complex",
        "mpgemm.x86_fairy_masks": "mpgemm.x86_fairy_masks:X86FairyMasks",
        "mpgemm.cuda_gemv": "mpgemm.cuda_gemv:CudaGemv",
        "mpgemm.cuda_wgmma": "mpgemm.cuda_wgmma:CudaWgmma",
        "mpgemm.cuda_mma": "mpgemm.cuda_mma:CudaMma",
        "mpgemm.cuda_mma_codes": "mpgemm.cuda_codes:CudaCodes",
        "mpgemm.sim_lut_tensor_core": "simulated.lut_tensor_core:LutTensorCore",
        "mpgemm.sim_tensor_core": "simulated.tensor_core:TensorCore",
        "mpgemm.sim_roma": "simulated.roma:Roma",
    },
    "cached_attention": {
        "cached_attention.x86_flash": "attention.x86_flash:X86Flash",
        "cached_attention.x86_flash_pairs": "attention.x86_flash_pairs:X86FlashPairs",
        "cached_attention.x86_flash_amx": "attention.x86_flash_amx:X86FlashAmx",
        "cached_attention.x86_flash_groups": "attention.x86_flash_groups:X86FlashGroups",
        "cached_attention.x86_flash_float8": "attention.x86_flash_float8:X86FlashFloat8",
        "cached_attention.x86_int8": "attention.x86_int8:X86Int8",
        "cached_attention.x86_flash_rows": "attention.x86_rows:X86FlashRows",
        "cached_attention.x86_flash_rows_half": "attention.x86_rows:X86FlashRowsHalf",
        "cached_attention.cuda_decode": "attention.cuda_decode:CudaDecode",
        "cached_attention.cuda_prefill": "attention.cuda_prefill:CudaPrefill",
        "cached_attention.cuda_wgmma": "attention.cuda_wgmma:CudaFlashWgmma",
        "cached_attention.cuda_groups_decode": "attention.cuda_groups:CudaGroupsDecode",
        "cached_attention.cuda_groups_prefill": "attention.cuda_groups:CudaGroupsPrefill",
        "cached_attention.cuda_float8_decode": "attention.cuda_float8:CudaFloat8Decode",
        "cached_attention.cuda_float8_prefill": "attention.cuda_float8:CudaFloat8Prefill",
        "cached_attention.cuda_int8": "attention.cuda_int8:CudaInt8",
        "cached_attention.cuda_int8half": "attention.cuda_int8:CudaInt8Half",
    },
    "sparse_attention": {
        "sparse_attention.x86_lists": "attention.x86_lists:X86Lists",
        "sparse_attention.x86_lists_pairs": "attention.x86_lists:X86ListsPairs",
        "sparse_attention.x86_rows": "attention.x86_rows:X86Rows",
        "sparse_attention.x86_rows_half": "attention.x86_rows:X86RowsHalf",
        "sparse_attention.cuda_lists": "attention.cuda_lists:CudaLists",
    },
    "oracle_attention": {
        "oracle_attention.x86_fused": "attention.x86_oracle:X86Oracle",
        "oracle_attention.x86_fused_pairs": "attention.x86_oracle:X86OraclePairs",
        "oracle_attention.x86_twice": "attention.x86_oracle:X86OracleTwice",
        "oracle_attention.x86_twice_pairs": "attention.x86_oracle:X86OracleTwicePairs",
        "oracle_attention.cuda": "attention.cuda_oracle:CudaOracle",
    },
    "kv_append": {
        "kv_append.x86": "attention.x86_append:X86Append",
        "kv_append.x86_groups": "attention.x86_append_groups:X86AppendGroups",
        "kv_append.x86_float8": "attention.x86_append_float8:X86AppendFloat8",
        "kv_append.x86_pages": "attention.x86_append_pages:X86AppendPages",
        "kv_append.cuda": "attention.cuda_append:CudaAppend",
        "kv_append.cuda_groups": "attention.cuda_append_groups:CudaAppendGroups",
        "kv_append.cuda_float8": "attention.cuda_append_float8:CudaAppendFloat8",
    },
    "describe_blocks": {
        "describe_blocks.x86": "attention.x86_describe:X86Describe",
        "describe_blocks.cuda": "attention.cuda_describe:CudaDescribe",
    },
    "index_keys": {"index_keys.x86": "attention.x86_index_keys:X86IndexKeys"},
    "append_entries": {"append_entries.x86": "attention.x86_append_entries:X86AppendEntries"},
    "key_mean": {
        "key_mean.x86": "attention.x86_key_mean:X86KeyMean",
        "key_mean.cuda": "attention.cuda_key_mean:CudaKeyMean",
    },
    "gate_queries": {"gate_queries.x86": "attention.x86_gates:X86GateQueries"},
    "gate_keys": {"gate_keys.x86": "attention.x86_gates:X86GateKeys"},
    "score_blocks": {
        "score_blocks.x86": "attention.x86_score_blocks:X86ScoreBlocks",
        "score_blocks.cuda": "attention.cuda_score:CudaScore",
    },
    "score_keys": {"score_keys.x86": "attention.x86_score_keys:X86ScoreKeys"},
    "score_lowbit": {
        "score_lowbit.x86": "attention.x86_score_lowbit:X86ScoreLowbit",
        "score_lowbit.cuda": "attention.cuda_score_lowbit:CudaScoreLowbit",
    },
    "select_blocks": {
        "select_blocks.x86": "attention.x86_select:X86Select",
        "select_blocks.cuda": "attention.cuda_select:CudaSelect",
    },
    "moe": {
        "moe.x86_planes": "moe.x86_dense:X86MoePlanes",
        "moe.x86_lut": "moe.x86_lut:X86MoeLut",
        "moe.x86_strits": "moe.x86_dense:X86MoeSignedTrits",
        "moe.x86_vnni": "moe.x86_vnni:X86MoeVnni",
        "moe.x86_lut2": "moe.x86_lut:X86MoeLut2",
        "moe.x86_trits": "moe.x86_dense:X86MoeTrits",
        "moe.x86_lut_shuffle": "moe.x86_lut:X86MoeLutShuffle",
        "moe.x86_tl1": "moe.x86_lut:X86MoePairs",
        "moe.x86_tl2": "moe.x86_lut:X86MoeTriples",
        "moe.x86_bf16": "moe.x86_bf16:X86MoeBf16",
        "moe.x86_float": "moe.x86_float:X86MoeFloat",
        "moe.x86_codebook": "moe.x86_codebook:X86MoeCodebook",
        "moe.x86_complex": "moe.x86_complex:X86MoeComplex",
        "moe.cuda_gemv": "moe.cuda_gemv:CudaMoeGemv",
        "moe.cuda_wgmma": "moe.cuda_wgmma:CudaMoeWgmma",
        "moe.cuda_mma": "moe.cuda_mma:CudaMoeMma",
    },
    "route": {"route.x86": "moe.x86_route:X86Route", "route.cuda": "moe.cuda_route:CudaRoute"},
    "rms_norm": {
        "rms_norm.x86": "elementwise.x86_rms_norm:X86RmsNorm",
        "rms_norm.cuda": "elementwise.cuda_rms_norm:CudaRmsNorm",
    },
    "rope_table": {
        "rope_table.x86": "elementwise.x86_rope_table:X86RopeTable",
        "rope_table.cuda": "elementwise.cuda_rope_table:CudaRopeTable",
    },
    "swiglu": {
        "swiglu.x86": "elementwise.x86_swiglu:X86SwiGlu",
        "swiglu.cuda": "elementwise.cuda_swiglu:CudaSwiGlu",
    },
    "embed": {
        "embed.x86": "elementwise.x86_embed:X86Embed",
        "embed.cuda": "elementwise.cuda_embed:CudaEmbed",
    },
    "tir": {
        "tir.x86_rules": "generic.x86_rules:X86Rules",
        "tir.x86_trace": "generic.x86_trace:X86Trace",
        "tir.x86_meta": "generic.x86_meta:X86Meta",
        "tir.cuda": "generic.cuda_tir:CudaTir",
    },
}
"""Op -> schedule name -> where its class lives; modules are imported on use."""
SCHEDULES["lora_mpgemm"] = {
    f"lora_{name}": f"lora.x86:{name.partition('.')[2]}"
    for name in SCHEDULES["mpgemm"]
    if name.startswith("mpgemm.x86_")
} | {"lora_mpgemm.sim_roma": "simulated.roma:LoraRoma"}


_KIND = Kind("schedule", "mimo_compile.schedules", __name__)


def get_schedule(name: str) -> Schedule:
    """Return a schedule by name.

    Raises:
        UsageError: there is none of this name.
        EnvironmentMismatch: it is a plug-in's, which cannot be used.
    """
    own = {n: place for entries in SCHEDULES.values() for n, place in entries.items()}
    cls = _KIND.get(name, own)
    if not (isinstance(cls, type) and issubclass(cls, Schedule) and cls.name == name):
        raise _KIND.broken(name, f"{cls!r} is no Schedule named {name!r}", own)
    schedule: Schedule = cls()
    return schedule


def names_for(op: str) -> list[str]:
    """Return the names of an op's schedules in order of preference: ours, then those of plug-ins.

    A plug-in's name begins with its op: ``mpgemm.my_way``.
    """
    own = {n for entries in SCHEDULES.values() for n in entries}
    added = [n for n in _KIND.names(own) if n not in own and n.partition(".")[0] == op]
    return [*SCHEDULES.get(op, {}), *added]


def schedules_for(workload: Workload, hardware: Hardware) -> list[Schedule]:
    """Return the schedules that can compute a workload on the hardware, in order of preference."""
    found = (get_schedule(name) for name in names_for(workload.op))
    return [s for s in found if s.supports(workload, hardware)]


__all__ = [
    "SCHEDULES",
    "Kernel",
    "Schedule",
    "Space",
    "get_schedule",
    "names_for",
    "schedules_for",
]

"""Every CUDA schedule compiles for each architecture that it is for: no spills, expected instructions.

``pytest -m slow tests/schedules/test_cuda_every.py -s`` prints how many configs were compiled in which time.
"""

from __future__ import annotations

import time

import pytest
from cuda_functions import FUNCTIONS, parsed
from harness import sample_config

from mimo_compile.ir.counts import LAUNCH
from mimo_compile.ir.hardware import CUDA
from mimo_compile.schedules import SCHEDULES, get_schedule
from mimo_compile.schedules.cuda.nvcc import compile_device, find_tool
from mimo_compile.schedules.cuda.sass import instructions

RANDOM = 5
"""Legal configs beside the default, of an op's first workload; of each other there is one."""
WORKLOADS: dict[str, tuple[str, ...]] = {
    "cached_attention": (
        "cached_attention:t=1,h=32,kv=8,d=128,dv=128,cap=4096,c=bf16",
        "cached_attention:t=512,h=32,kv=8,d=128,dv=128,cap=4096,c=bf16",
        "cached_attention:t=3,h=6,kv=2,d=80,dv=72,cap=300,window=64,sink=1,c=bf16",
        "cached_attention:t=512,h=32,kv=8,d=128,dv=128,cap=4096,c=bf16,arith=int8",
        "cached_attention:t=512,h=32,kv=8,d=128,dv=128,cap=4096,c=bf16,arith=int8half",
        "cached_attention:t=3,h=6,kv=2,d=256,dv=144,cap=300,window=64,sink=1,c=bf16,arith=int8",
        "cached_attention:t=1,h=32,kv=8,d=128,dv=128,cap=4096,c=i4",
        "cached_attention:t=512,h=32,kv=8,d=128,dv=128,cap=4096,c=i8",
        "cached_attention:t=3,h=6,kv=2,d=192,dv=160,cap=320,sink=1,c=i2",
        "cached_attention:t=1,h=32,kv=8,d=128,dv=128,cap=4096,c=i1,page=64,pool=80",
        "cached_attention:t=512,h=32,kv=8,d=128,dv=128,cap=4096,c=i4,page=64,pool=80",
        "cached_attention:t=33,h=6,kv=2,d=96,dv=80,cap=320,c=i1",
        "cached_attention:t=1,h=32,kv=8,d=128,dv=128,cap=4096,c=e4m3",
        "cached_attention:t=512,h=32,kv=8,d=128,dv=128,cap=4096,c=e4m3",
        # as wide as heads may be
        "cached_attention:t=1,h=8,kv=2,d=256,dv=160,cap=4096,c=i4",
        "cached_attention:t=3,h=8,kv=2,d=256,dv=144,cap=4096,c=i8",
        "cached_attention:t=1,h=8,kv=2,d=576,dv=160,cap=4096,c=e4m3",
    ),
    "sparse_attention": (
        "sparse_attention:t=1,h=32,kv=8,d=128,dv=128,cap=8192,hs=8,block=64,kmax=32,c=bf16",
        "sparse_attention:t=2,h=6,kv=2,d=80,dv=72,cap=512,hs=2,block=16,kmax=6,c=bf16",
        "sparse_attention:t=2,h=12,kv=4,d=256,dv=256,cap=4096,hs=1,block=16,kmax=64,window=100,sink=1,c=bf16,page=16,pool=256",
    ),
    "oracle_attention": (
        "oracle_attention:t=512,h=32,kv=8,d=128,dv=128,cap=4096,block=64,c=bf16",
        "oracle_attention:t=1,h=32,kv=8,d=128,dv=128,cap=8192,block=64,c=bf16",
    ),
    "kv_append": (
        "kv_append:t=1,h=32,kv=8,d=128,dv=128,cap=4096,rot=128,c=bf16",
        "kv_append:t=16,h=6,kv=2,d=80,dv=72,cap=300,rot=40,norm=1,c=bf16",
        "kv_append:t=1,h=32,kv=8,d=128,dv=128,cap=4096,rot=128,c=i4",
        "kv_append:t=100,h=6,kv=2,d=80,dv=72,cap=320,rot=40,norm=1,c=i8",
        "kv_append:t=1,h=32,kv=8,d=128,dv=128,cap=4096,rot=128,c=i1,page=64,pool=80",
        "kv_append:t=1,h=32,kv=8,d=128,dv=128,cap=4096,rot=128,c=e4m3",
    ),
    "tir": FUNCTIONS,
    "describe_blocks": (
        "describe_blocks:t=1,kv=8,d=128,cap=65536,kind=bounds,size=16,c=bf16",
        "describe_blocks:t=3,kv=2,d=25,cap=70,kind=pool3,size=12,stride=5,c=bf16,e=bf16",
    ),
    "score_blocks": (
        "score_blocks:t=1,h=32,kv=8,d=128,cap=65536,kind=quest,agg=max,block=16",
        "score_blocks:t=2,h=4,kv=1,d=25,cap=70,kind=mean,agg=query,block=8,e=bf16",
    ),
    "key_mean": ("key_mean:t=4096,kv=8,d=128,cap=65536,c=bf16",),
    "score_lowbit": (
        "score_lowbit:t=4096,h=32,kv=8,d=128,cap=4096,block=32,rows=64,first=1,last=5,c=bf16,least=1024",
    ),
    "select_blocks": (
        "select_blocks:t=1,hs=8,cap=65536,block=16,k=64,last=1",
        "select_blocks:t=5,hs=2,cap=300,block=4,k=9,rows=2,first=1,last=2,b=2",
    ),
    "embed": ("embed:t=64,v=32000,d=4096,w=bf16", "embed:t=3,v=100,d=37"),
    "rms_norm": (
        "rms_norm:t=64,d=4096,residual=1",
        "rms_norm:t=1,d=4096",
        "rms_norm:t=3,d=70001",
    ),
    "rope_table": ("rope_table:t=64,rot=128", "rope_table:t=3,rot=22,b=2"),
    "swiglu": ("swiglu:t=64,f=14336", "swiglu:t=3,f=37"),
    "mpgemm": (
        "mpgemm:m=1,n=4096,k=4096,w=w4g128",
        "mpgemm:m=1,n=4096,k=4096,w=w2g64,a=a8",
        "mpgemm:m=512,n=4096,k=4096,w=bf16,a=abf16",
        "mpgemm:m=512,n=4096,k=4096,w=w8grow,a=a8",
        "mpgemm:m=512,n=4096,k=4096,w=w4g128,a=abf16",
        "mpgemm:m=7,n=200,k=384,w=w2g64,a=a8",
        "mpgemm:m=60,n=256,k=4096,w=f32",
        "mpgemm:m=1,n=4096,k=4096,w=fp8b128",
        "mpgemm:m=1,n=4096,k=4096,w=nf4",
        "mpgemm:m=1,n=4096,k=4096,w=w4zg128,a=a8",
        "mpgemm:m=512,n=4096,k=4096,w=fp8b128,a=abf16",
        "mpgemm:m=512,n=4096,k=4096,w=nf4,a=abf16",
        "mpgemm:m=512,n=4096,k=4096,w=w4zg128,a=abf16",
        "mpgemm:m=64,n=4096,k=4096,w=w4zg128,a=a8g64",
        # with defaults that leave few registers
        "mpgemm:m=512,n=4096,k=4096,w=nf4,a=af16",
        "mpgemm:m=512,n=4096,k=4096,w=w2g64,a=a8g64",
    ),
    "moe": (
        "moe:t=1,e=128,k=8,d=2048,f=768,w=w4g64,a=a8",
        "moe:t=512,e=128,k=8,d=2048,f=768,w=bf16,a=abf16",
        "moe:t=512,e=128,k=8,d=2048,f=768,w=w8,a=a8",
        "moe:t=64,e=128,k=8,d=2048,f=768,w=w4g64,a=abf16",
        "moe:t=12,e=5,k=2,d=200,f=66,w=f32,a=a16",
        "moe:t=1,e=128,k=8,d=2048,f=768,w=fp8b128,a=abf16",
    ),
    "route": (
        "route:t=1,e=256,k=8,scoring=sigmoid,bias=1",
        "route:t=64,e=160,k=6,groups=8,topgroups=3,factor=16.0",
    ),
}
"""Of each op with CUDA schedules; what a schedule does not support is left out."""
NAMES = [
    n for entries in SCHEDULES.values() for n in entries if n.partition(".")[2].startswith("cuda")
]


@pytest.mark.slow
@pytest.mark.skipif(find_tool("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("target", CUDA)
@pytest.mark.parametrize("name", NAMES)
def test_compiles(name: str, target: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # so that seconds are those of compiling
    schedule, hardware = get_schedule(name), CUDA[target]
    workloads = [parsed(text) for text in WORKLOADS.get(schedule.op, ())]
    assert any(schedule.supports(w, h) for w in workloads for h in CUDA.values()), "add a workload"
    supported = [w for w in workloads if schedule.supports(w, hardware)]
    if not supported:
        pytest.skip(f"has no kernels for {target}")
    begin, kernels = time.perf_counter(), {}
    for index, workload in enumerate(supported):
        seeds = range(RANDOM if index == 0 else 1)
        configs = [sample_config(schedule, workload, hardware, seed) for seed in seeds]
        for config in [schedule.space(workload, hardware).default, *configs]:
            kernel = schedule.lower(workload, config, hardware)
            kernels[kernel.name] = (kernel, f"{workload} {config}")
    assert len(kernels) > len(supported) or schedule.space(supported[0], hardware).size == 1
    read = set()
    for kernel, text in kernels.values():
        binary = compile_device(kernel, hardware)
        assert binary.local_bytes == 0, f"{text}: {binary.usage}"
        assert not [line for line in binary.warnings if "(C7" in line], f"{text}: {binary.warnings}"
        found = instructions(kernel, hardware, binary)
        assert not found.missing and not found.local, f"{text}: {found}"
        read.add(found.read)
    seconds = time.perf_counter() - begin
    print(
        f"\n{name} on {target}: {len(kernels)} configs of {len(supported)} workloads in {seconds:.1f} s, "
        f"{seconds / len(kernels):.1f} s each, instructions read from {', '.join(sorted(read))}"
    )


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("tir.")])
def test_each_launch_has_counts_of_its_own(name: str) -> None:
    """Else models would not hear of launches (`Schedule.told`)."""
    schedule, hardware = get_schedule(name), CUDA["cuda:sm_90a"]
    workloads = [parsed(text) for text in WORKLOADS.get(schedule.op, ())]
    for workload in [w for w in workloads if schedule.supports(w, hardware)][:2]:
        counts = schedule.told(workload, schedule.space(workload, hardware).default, hardware)
        for part in counts.parts or (counts,):
            assert set(LAUNCH) <= set(part.traits), f"{workload}: {part}"

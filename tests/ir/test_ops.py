"""Every op's definition agrees with itself and with independent computations."""

import numpy as np
import pytest
import torch

from mimo_compile.errors import UsageError
from mimo_compile.ir.ops import OPS, get_op, parse_workload
from mimo_compile.ir.ops.numerics import bf16_to_f32, f32_to_bf16, quantize_rows

WORKLOADS = [
    "mpgemm:m=4,n=32,k=128,w=w4g64,a=a8",
    "mpgemm:m=2,n=24,k=100,w=w4zg64,a=a8,bias=1",
    "mpgemm:m=2,n=32,k=128,w=bf16",
    "mpgemm:m=3,n=16,k=96,w=w1.58",
    "mpgemm:m=3,n=20,k=100,w=w4zg64,a=abf16",
    "mpgemm:m=3,n=20,k=100,w=bf16,a=abf16",
    "mpgemm:m=3,n=20,k=100,w=nf4,a=af16",
    "mpgemm:m=3,n=20,k=200,w=w4g64,a=a8g32",
    "lora_mpgemm:m=4,n=32,k=128,w=w4g64,a=a8,r=3,l=2",
    "lora_mpgemm:m=3,n=40,k=100,w=bf16,bias=1,r=2,d=fp8,parts=8+32",
    "cached_attention:t=4,h=4,kv=2,d=32,dv=16,cap=64,sink=1,len=40",
    "cached_attention:t=4,h=4,kv=2,d=32,dv=16,cap=64,window=16,sink=1",
    "sparse_attention:t=3,h=4,kv=2,d=32,dv=16,cap=70,hs=2,block=8,kmax=4,sink=1,len=45",
    "sparse_attention:t=5,h=4,kv=1,d=8,dv=8,cap=64,hs=1,block=1,kmax=9,rows=2,window=4,page=16,pool=6",
    "oracle_attention:t=3,h=4,kv=2,d=16,dv=8,cap=70,block=16,len=45",
    "select_blocks:t=3,hs=2,cap=200,block=8,k=6,first=1,last=2,len=150",
    "select_blocks:t=3,hs=4,cap=200,block=1,k=20,first=2,last=4,merge=rank",
    "select_blocks:t=5,hs=2,cap=200,block=8,rule=threshold,rows=4,last=1",
    "select_blocks:t=3,hs=2,cap=200,block=8,k=2,rule=mass,last=1,kmax=9",
    "select_blocks:t=3,hs=2,cap=200,block=8,k=20,positive=1",
    "score_keys:t=3,h=4,kv=2,d=16,cap=70,kind=oracle,agg=max,block=8,len=45",
    "score_keys:t=2,h=6,kv=2,d=16,cap=40,kind=logits,agg=mean,block=4",
    "score_keys:t=2,h=6,kv=2,d=16,cap=40,kind=logits",
    "score_keys:t=2,h=6,kv=2,d=16,cap=40,kind=channels,agg=mean,channels=5,guess=1,len=33",
    "score_blocks:t=3,h=4,kv=2,d=16,cap=70,kind=quest,agg=max,block=8,len=45",
    "score_blocks:t=3,h=6,kv=2,d=16,cap=70,kind=quest,agg=query,block=8,len=45",
    "score_blocks:t=5,h=6,kv=2,d=16,cap=40,kind=mean,block=4,rows=2",
    "score_blocks:t=3,h=6,kv=2,d=16,cap=40,kind=gate,block=4,soft=1,len=37",
    "score_blocks:t=3,h=6,kv=2,d=16,cap=90,kind=compressed,agg=sum,block=16,size=8,stride=4,len=77",
    "score_blocks:t=3,h=4,kv=1,d=16,cap=40,kind=indexer,agg=sum,block=1,len=37",
    "score_lowbit:t=21,h=4,kv=2,d=16,cap=70,block=4,rows=8,first=1,last=2,len=61",
    "score_lowbit:t=21,h=4,kv=2,d=16,cap=70,block=4,rows=8,first=1,last=2,len=61,every=3",
    "index_keys:t=9,kv=2,d=8,cap=70,span=4",
    "index_keys:t=9,kv=2,d=8,cap=70,span=16,c=bf16",
    "append_entries:t=9,kv=2,d=7,cap=70",
    "append_entries:t=9,kv=1,d=8,cap=70,e=bf16",
    "key_mean:t=9,kv=2,d=8,cap=70,len=50",
    "key_mean:t=9,kv=2,d=8,cap=70,len=50,c=bf16",
    "describe_blocks:t=9,kv=2,d=8,cap=70,kind=pool3,size=16,len=50",
    "describe_blocks:t=5,kv=2,d=8,cap=64,kind=mean,size=8,stride=4,len=50",
    "gate_queries:t=3,h=6,kv=2,d=16,g=24,rot=8,grot=12,norm=1,w=bf16",
    "gate_keys:t=20,kv=2,d=16,cap=70,size=8,g=24,rot=16,grot=24,norm=1,last=1,len=50,c=bf16",
    "sparse_attention:t=3,h=4,kv=2,d=32,dv=16,cap=70,hs=2,block=8,kmax=4,sink=1,len=45,c=bf16",
    "score_keys:t=3,h=4,kv=2,d=16,cap=70,kind=oracle,agg=max,block=8,len=45,c=bf16",
    "score_keys:t=2,h=6,kv=2,d=16,cap=40,kind=channels,agg=mean,channels=5,len=33,c=bf16",
    "score_keys:t=2,h=6,kv=2,d=16,cap=40,kind=channels,agg=mean,channels=5,len=33,span=8",
    "score_keys:t=2,h=6,kv=2,d=16,cap=40,kind=channels,agg=mean,channels=5,len=33,c=bf16,span=8",
    "score_lowbit:t=21,h=4,kv=2,d=16,cap=70,block=4,rows=8,first=1,last=2,len=61,c=bf16",
    "describe_blocks:t=9,kv=2,d=8,cap=70,kind=pool3,size=16,len=50,c=bf16",
    "kv_append:t=4,h=4,kv=2,d=32,dv=16,cap=64,rot=16,norm=1,vscale=0.5",
    "cached_attention:t=4,h=4,kv=2,d=32,dv=16,cap=64,sink=1,len=40,c=bf16",
    "kv_append:t=4,h=4,kv=2,d=32,dv=16,cap=64,rot=16,norm=1,vscale=0.5,c=bf16",
    "cached_attention:t=2,h=4,kv=2,d=32,dv=16,cap=64,window=16,sink=1,b=3",
    "cached_attention:t=1,h=4,kv=2,d=32,dv=16,cap=64,len=40,c=bf16,b=3,even=1",
    "kv_append:t=2,h=4,kv=2,d=32,dv=16,cap=64,rot=16,norm=1,vscale=0.5,c=bf16,b=3",
    "moe:t=4,e=8,k=2,d=64,f=64,w=w4g64,a=a8",
    "moe:t=4,e=8,k=2,d=64,f=64,w=bf16",
    "route:t=4,e=8,k=2,scoring=sigmoid,bias=1",
    "route:t=4,e=8,k=2,groups=4,topgroups=2",
    "rms_norm:t=2,d=64,residual=1",
    "rope_table:t=3,rot=16",
    "rope_table:t=2,rot=16,b=3",
    "swiglu:t=2,f=32",
    "embed:t=3,v=10,d=16,w=bf16",
]


def test_every_op_is_covered_here() -> None:
    assert {text.partition(":")[0] for text in WORKLOADS} == set(OPS)


@pytest.mark.parametrize("text", WORKLOADS)
def test_definition_is_consistent(text: str) -> None:
    workload = parse_workload(text)
    assert str(workload) == text
    op = get_op(workload.op)
    inputs = op.make_inputs(workload, np.random.default_rng(1))
    again = op.make_inputs(workload, np.random.default_rng(1))
    expected = op.reference(workload, inputs)
    bound = op.bound(workload, inputs, expected)
    outputs = {a.name for a in op.args(workload) if a.role == "output" or a.mutated}
    assert set(expected) == set(bound) == outputs
    for arg in op.args(workload):
        if arg.role != "output":
            assert inputs[arg.name].shape == arg.shape
            carried = "uint16" if arg.dtype == "bfloat16" else arg.dtype
            assert str(inputs[arg.name].dtype) == carried
            np.testing.assert_array_equal(inputs[arg.name], again[arg.name])
        if arg.name in expected:
            assert expected[arg.name].shape == bound[arg.name].shape == arg.shape
            finite = bound[arg.name][np.isfinite(expected[arg.name])]
            assert (finite >= 0).all()
    counts = op.counts(workload)
    assert sum(counts.bytes.values()) > 0


@pytest.mark.parametrize("text", [w for w in WORKLOADS if w.startswith(("mpgemm", "moe"))])
def test_bound_refuses_a_wrong_weight(text: str) -> None:
    """One weight code off by one must lie outside the bound."""
    workload = parse_workload(text)
    op = get_op(workload.op)
    inputs = op.make_inputs(workload, np.random.default_rng(2))
    expected = op.reference(workload, inputs)
    bound = op.bound(workload, inputs, expected)["y"]
    name = next(n for n in inputs if n.endswith(("codes", "w")))
    damaged = dict(inputs)
    damaged[name] = inputs[name].copy()
    flat = damaged[name].reshape(-1)
    if text.startswith("moe"):  # damage an expert that is used
        flat = damaged[name][inputs["ids"][0, 0]].reshape(-1)
    flat[:8] ^= 1 if damaged[name].dtype != np.uint16 else 0x40
    worst = np.abs(op.reference(workload, damaged)["y"] - expected["y"]) / bound
    assert worst.max() > 1


def test_eager_ops_equal_their_references() -> None:
    """The torch ops in float32 lie within the bounds that kernels must meet."""
    for text in WORKLOADS:
        workload = parse_workload(text)
        op, p = get_op(workload.op), get_op(workload.op).full(workload)
        inputs = op.make_inputs(workload, np.random.default_rng(3))
        t = {k: torch.from_numpy(v.copy()) for k, v in inputs.items()}
        for arg in op.args(workload):
            if arg.dtype == "bfloat16":
                t[arg.name] = t[arg.name].view(torch.bfloat16)
        expected = op.reference(workload, inputs)
        bound = op.bound(workload, inputs, expected)
        mimo = torch.ops.mimo
        if workload.op == "mpgemm" and p["w"] != "bf16":
            y = mimo.mpgemm(
                t["x"], t["codes"], t["scale"], t.get("zero"), t.get("bias"), p["w"], p["a"]
            )
            got, slack = {"y": y}, 64  # eager multiplies scaled values, so sums over K round
        elif workload.op == "cached_attention":
            out = mimo.cached_attention(
                t["q"],
                t["k_cache"],
                t["v_cache"],
                t["pos"],
                t.get("sink"),
                p["d"] ** -0.5,
                p["window"],
            )
            got, slack = {"out": out}, 1
        elif workload.op == "kv_append":
            q = mimo.kv_append(
                t["qkv"], t["table"], t["pos"], t["q_norm"], t["k_norm"], t["k_cache"], t["v_cache"],
                p["h"], p["eps"], p["vscale"],
            )  # fmt: skip
            got, slack = {"q": q, "k_cache": t["k_cache"], "v_cache": t["v_cache"]}, 1
        elif workload.op == "rms_norm":
            y, total = mimo.add_rms_norm(t["x"], t["residual"], t["weight"], p["eps"])
            got, slack = {"y": y, "total": total}, 1
        elif workload.op == "rope_table":
            got, slack = {"table": mimo.rope_table(t["pos"], t["inv_freq"], p["t"])}, 1
        elif workload.op == "swiglu":
            got, slack = {"y": mimo.swiglu(t["x"])}, 1
        elif workload.op == "sparse_attention":
            out, lse = mimo.sparse_attention(
                t["q"], t["k_cache"], t["v_cache"], t["pos"], t["idx"], t["cnt"], t.get("sink"),
                p["block"], p["rows"], p["d"] ** -0.5, p["window"], 0, t.get("pages"), p["cap"], p["page"],
            )  # fmt: skip
            got, slack = {"out": out, "lse": lse}, 1
        elif workload.op == "score_keys":
            score = mimo.score_keys(
                t["q"], t["k_cache"], t["pos"], t.get("peak"), t.get("guess"), p["kind"], p["agg"],
                p["block"], p["channels"], p["d"] ** -0.5, p["span"],
            )  # fmt: skip
            got, slack = {"score": score}, 1
        elif workload.op == "score_blocks":
            score = mimo.score_blocks(
                t["q"], t["desc"], t.get("weight"), t["pos"], p["kind"], p["agg"], bool(p["soft"]),
                p["block"], p["rows"], expected["score"].shape[2], *op.sizes(p), op.softmax_scale(p),
            )  # fmt: skip
            got, slack = {"score": score}, 1
        elif workload.op == "score_lowbit":
            score = mimo.score_lowbit(
                t["q"], t["k_cache"], t["pos"], t["q_mean"], t["k_mean"], p["bits"], p["block"],
                p["rows"], p["first"], p["last"], p["d"] ** -0.5, p["least"], p["every"],
            )  # fmt: skip
            got, slack = {"score": score}, 1
        elif workload.op == "index_keys":
            mimo.index_keys(t["k_cache"], t["pos"], t["k_copy"], t["peak"], p["span"])
            got, slack = {n: t[n] for n in ("k_copy", "peak")}, 1
        elif workload.op == "append_entries":
            mimo.append_entries(t["rows"], t["pos"], t["desc"])
            got, slack = {"desc": t["desc"]}, 1
        elif workload.op == "key_mean":
            got, slack = {"mean": mimo.key_mean(t["k_cache"], t["pos"])}, 1
        elif workload.op == "describe_blocks":
            stride = p["stride"] or p["size"]
            mimo.describe_blocks(t["k_cache"], t["pos"], t["desc"], p["kind"], p["size"], stride)
            got, slack = {"desc": t["desc"]}, 1
        elif workload.op == "gate_queries":
            out = mimo.gate_queries(
                t["q"], t["pos"], t["inv_freq"], t["gate_freq"], t["weight"].view(torch.bfloat16),
                t["norm"], p["eps"],
            )  # fmt: skip
            got, slack = {"out": out}, 1
        elif workload.op == "gate_keys":
            mimo.gate_keys(
                t["k_cache"], t["pos"], t["inv_freq"], t["gate_freq"], t["weight"], t["norm"],
                t["desc"], p["size"], bool(p["last"]), p["eps"],
            )  # fmt: skip
            got, slack = {"desc": t["desc"]}, 1
        elif workload.op == "select_blocks":
            idx, cnt = mimo.select_blocks(
                t["score"], t["pos"], t.get("value"), p["rule"], p["k"], p["share"], p["block"],
                p["rows"], p["first"], p["last"], p["merge"], expected["idx"].shape[2],
                bool(p["positive"]),
            )  # fmt: skip
            got, slack = {"idx": idx, "cnt": cnt}, 1
        else:
            continue
        for name, value in got.items():
            real, want = value.double().numpy(), expected[name]
            same = real == want  # infinities among them
            error = np.abs(np.where(same, 0.0, real) - np.where(same, 0.0, want))
            assert (error <= slack * bound[name]).all(), (text, name, error.max())


def test_row_quantisation_handles_zero_rows_and_ties() -> None:
    x = torch.tensor([[0.0, 0.0], [127.0, 0.5], [-127.0, 1.5], [1e-30, -1e-30]])
    q, scale = quantize_rows(x)
    assert q.tolist()[:3] == [[0, 0], [127, 0], [-127, 2]]
    assert scale[0] == 0
    assert q.abs().max() <= 127


def test_bf16_bits_round_to_nearest_even_as_torch() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 1e3
    wanted = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(bf16_to_f32(f32_to_bf16(values)), wanted)


@pytest.mark.parametrize(
    "text",
    [
        "nope:m=1",
        "mpgemm:m=1,n=2",
        "mpgemm:m=0,n=2,k=3",
        "mpgemm:m=1,n=2,k=3,w=f32,a=a8",
        "mpgemm:m=1,n=2,k=3,x=3",
        "cached_attention:t=1,h=3,kv=2,d=8,dv=8,cap=16",
        "cached_attention:t=4,h=2,kv=2,d=8,dv=8,cap=16,window=16",
        "route:t=1,e=4,k=5",
    ],
)
def test_bad_parameters_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_workload(text)


@pytest.mark.parametrize("extra", ["", ",window=64,sink=1"])
def test_attention_bound_refuses_a_missed_key(extra: str) -> None:
    """Leaving out the oldest visible key, of many, must lie outside the bound."""
    length = 100 if extra else 200
    text = f"cached_attention:t=1,h=4,kv=2,d=32,dv=16,cap=256{extra},len={length}"
    workload = parse_workload(text)
    op = get_op(workload.op)
    inputs = op.make_inputs(workload, np.random.default_rng(4))
    expected = op.reference(workload, inputs)
    bound = op.bound(workload, inputs, expected)["out"]
    oldest = length - 64 if extra else 0
    damaged = dict(inputs, v_cache=inputs["v_cache"].copy())
    damaged["v_cache"][oldest] = 0
    error = np.abs(op.reference(workload, damaged)["out"] - expected["out"])
    assert (error > bound).any(axis=-1).all(), "some head would not notice"


def test_rows_are_quantised_in_plain_float32_arithmetic() -> None:
    """One correctly rounded division for a row's factor: kernels must find the same codes near ties."""
    x = np.random.default_rng(0).standard_normal((20_000, 3)).astype(np.float32)
    factor = np.float32(127) / np.abs(x).max(-1, keepdims=True)
    q, scale = quantize_rows(torch.from_numpy(x))
    np.testing.assert_array_equal(q.numpy(), np.rint(x * factor).astype(np.int8))
    np.testing.assert_array_equal(scale.numpy(), np.abs(x).max(-1, keepdims=True) / np.float32(127))
    x = np.full((1, 4), 1.0, np.float32)
    x[0, 1:] = np.float32(7.6391253), np.float32(2.3759484), 0
    assert quantize_rows(torch.from_numpy(x))[0][0, 2] == 40

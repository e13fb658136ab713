"""Records by which two plans of one workload differ."""

from mimo_compile.ir.hardware import local_cpu
from mimo_compile.search.records import Record, Verdict, record_key, versions
from mimo_compile.search.space import JointSpace


def records_of(workload, first, second) -> list[Record]:
    """Two candidates: a fast one, and a slower one that takes next to no energy."""
    hardware, space = local_cpu(), JointSpace(workload, local_cpu())
    out = []
    for c, us, mj in ((first, 10.0, 900.0), (second, 10.2, 1.0)):
        version = space.schedules[c.schedule].version
        key = record_key(str(workload), c.schedule, version, c.config, hardware, "cold", versions())
        out.append(
            Record(
                key=key, workload=str(workload), schedule=c.schedule, config=c.config,
                schedule_version=version, hardware=hardware.id, threads=hardware.threads,
                features=tuple(sorted(hardware.features)), cache="cold", versions=versions(),
                verdict=Verdict.OK, latency_us=us, modelled_mj=mj,
            )
        )  # fmt: skip
    return out

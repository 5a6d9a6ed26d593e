"""Times the operations of revisions, each run in a process of its own; benchmarks.gate.comparison starts it.

Of dtm_fast it uses the public functions of the revision's dtm_fast.ops only, so that it can time revisions older than
itself.
"""

import importlib
import json
import math
import os
import sys
import time
import types
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.disturbance import Disturbance

Call = Callable[[], Any]
ON_A_GPU = ("bitmap_linear",)  # has no kernel for the CPU, and is not timed here
_SAMPLE = (
    0.002  # seconds: calls are timed in groups at least so long, so that the clock's own cost does not count
)
_VOCABULARY, _WIDTH = 49152, 576  # the head of SmolLM2-135M


@dataclass(frozen=True)
class Case:
    operation: str
    label: str
    prepare: Callable[[Any, torch.Generator], Call]
    """Takes dtm_fast.ops and a generator; makes the inputs, alike for every revision, and gives the call."""
    needs: tuple[str, ...] = ()
    """Names in dtm_fast.ops besides that of the operation."""

    @property
    def name(self) -> str:
        return f"{self.operation} {self.label}"


def _random_bytes(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _quantize_int8(rows: int, depth: int, dtype: torch.dtype) -> Case:
    def prepare(ops: Any, generator: torch.Generator) -> Call:
        x = torch.randn(rows, depth, generator=generator).to(dtype)
        return lambda: ops.quantize_int8(x)

    return Case("quantize_int8", f"({rows}, {depth}) {_short(dtype)}", prepare)


def _int8_linear(M: int, K: int, N: int, dtype: torch.dtype) -> Case:  # noqa: N803
    def prepare(ops: Any, generator: torch.Generator) -> Call:
        x = torch.randn(M, K, generator=generator).to(dtype)
        qweight = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=generator)
        scale = torch.rand(N, generator=generator) + 0.5
        return lambda: ops.int8_linear(x, qweight, scale)

    return Case("int8_linear", f"({M}, {K}, {N}) {_short(dtype)}", prepare)


def _masked_linear(M: int, K: int, N: int, dtype: torch.dtype, masks: int = 1) -> Case:  # noqa: N803
    def prepare(ops: Any, generator: torch.Generator) -> Call:
        x = torch.randn(M, K, generator=generator).to(dtype)
        weight = torch.randn(N, K, generator=generator).to(dtype)
        packed = _random_bytes(*((masks,) if masks > 1 else ()), N, K // 8, generator=generator)
        return lambda: ops.masked_linear(x, weight, packed)

    several = f" {masks} masks" if masks > 1 else ""
    return Case("masked_linear", f"({M}, {K}, {N}){several} {_short(dtype)}", prepare)


def _sparse_linear(M: int, K: int, N: int, density: float) -> Case:  # noqa: N803
    def prepare(ops: Any, generator: torch.Generator) -> Call:
        x = torch.randn(M, K, generator=generator)
        weight = ops.SparseWeight.pack(*_pruned(ops, N, K, density, generator))
        return lambda: ops.sparse_linear(x, weight)

    return Case("sparse_linear", f"({M}, {K}, {N}) density {density} float32", prepare, ("SparseWeight",))


def _pack_sparse(ops: Any, generator: torch.Generator) -> Call:
    weight, mask = _pruned(ops, 4096, 4096, 0.1, generator)

    def call() -> tuple[torch.Tensor, ...]:
        packed = ops.SparseWeight.pack(weight, mask)
        return packed.values, packed.columns

    return call


def _pruned(
    ops: Any,
    N: int,  # noqa: N803
    K: int,  # noqa: N803
    density: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] and a packed mask that keeps about so many of its entries."""
    kept = torch.rand(N, K, generator=generator) < density
    return torch.randn(N, K, generator=generator), ops.pack_mask(kept)


def _masked_ladder(M: int, K: int, N: int, masks: int) -> Case:  # noqa: N803
    def prepare(ops: Any, generator: torch.Generator) -> Call:
        x, weight = torch.randn(M, K, generator=generator), torch.randn(N, K, generator=generator)
        dropped = torch.linspace(0.1, 0.8, masks)[:, None, None]
        packed = ops.pack_mask(torch.rand(N, K, generator=generator) >= dropped)
        return lambda: ops.masked_linear(x, weight, packed, nested=True)

    return Case("masked_linear", f"({M}, {K}, {N}) {masks} nested masks float32", prepare)


def _token_divergence(positions: int, dtype: torch.dtype, certified: bool = False) -> Case:
    def prepare(ops: Any, generator: torch.Generator) -> Call:
        hidden = torch.randn(4, positions // 4, _WIDTH, generator=generator).to(dtype)
        head = torch.randn(_VOCABULARY, _WIDTH, generator=generator).to(dtype)
        reference = torch.randint(0, _VOCABULARY, hidden.shape[:2], generator=generator)
        if not certified:
            return lambda: ops.token_divergence(hidden, head, reference)
        certificate = ops.Certificate.build(hidden, head)
        near = (hidden + 0.03 * torch.randn(hidden.shape, generator=generator)).to(dtype)
        return lambda: ops.token_divergence(near, head, reference, certificate=certificate)

    label = f"{positions} positions{' certified' if certified else ''} {_short(dtype)}"
    return Case("token_divergence", label, prepare, ("Certificate",) if certified else ())


def _decoder_layer(arithmetic: str) -> Case:
    """A layer of SmolLM2-135M; where the machine has no kernel for the arithmetic, in float32."""

    def prepare(ops: Any, generator: torch.Generator) -> Call:
        of = ops.decoder_layer
        packed = getattr(ops, "layer_weights", of)  # older revisions have all in one file
        hidden, heads, kv_heads, head_dim, wide = _WIDTH, 9, 3, 64, 1536
        shape = packed.LayerShape(
            hidden, heads, kv_heads, head_dim, wide, eps=1e-5, attention_scale=head_dim**-0.5
        )
        columns, positions = (heads + 2 * kv_heads) * head_dim, 128
        weights = [
            torch.randn(N, K, generator=generator) * K**-0.5
            for N, K in ((columns, hidden), (hidden, heads * head_dim), (2 * wide, hidden), (hidden, wide))
        ]
        angles, norm = torch.rand(positions, head_dim, generator=generator), torch.ones(hidden)

        def layer(chosen: Any) -> Any:
            qkv, o, gate_up, down = (
                packed.Projection(packed.PackedMatrix.pack(each, chosen)) for each in weights
            )
            return packed.DecoderLayer(
                *(chosen, shape, norm, norm, None, None, angles.cos(), angles.sin()),
                (qkv,),
                o,
                (gate_up,),
                down,
            )

        x = torch.randn(4, positions, hidden, generator=generator)
        out, kv = torch.empty_like(x), torch.empty(4, positions, 2 * kv_heads * head_dim)
        chosen, exact = packed.Arithmetic[arithmetic], packed.Arithmetic.FLOAT32
        states = {
            name: torch.empty(4, positions, width) for name, width in shape.widths.items() if name != "input"
        }
        of.decoder_layer(layer(exact), x, out, kv, keep=of.States(**states))
        is_change = chosen == packed.Arithmetic.CHANGE and packed.has_arithmetic(chosen)
        base = of.States(input=x, **states) if is_change else of.States()
        entering = 0.1 * torch.randn(x.shape, generator=generator) if is_change else x
        timed = layer(chosen if is_change else exact)

        def call() -> torch.Tensor:
            of.decoder_layer(timed, entering, out, kv, base=base)
            return out

        return call

    return Case("decoder_layer", f"(4, 128, {_WIDTH}) {arithmetic.lower()}", prepare)


def _pack_mask(ops: Any, generator: torch.Generator) -> Call:
    mask = _random_bytes(4096, 4096, generator=generator) < 128
    return lambda: ops.pack_mask(mask)


def _unpack_mask(ops: Any, generator: torch.Generator) -> Call:
    packed = _random_bytes(4096, 512, generator=generator)
    return lambda: ops.unpack_mask(packed, 4096)


def _apply_mask(ops: Any, generator: torch.Generator) -> Call:
    weight = torch.randn(4096, 4096, generator=generator)
    packed = _random_bytes(4096, 512, generator=generator)
    return lambda: ops.apply_mask(weight, packed)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES = (
    _quantize_int8(2048, 1536, torch.float32),
    _quantize_int8(256, 4096, torch.bfloat16),
    _int8_linear(2048, 576, 1536, torch.float32),
    _int8_linear(256, 4096, 4096, torch.bfloat16),
    _int8_linear(16, 4096, 4096, torch.float32),
    _int8_linear(1, 4096, 4096, torch.float32),
    Case("pack_mask", "(4096, 4096)", _pack_mask),
    Case("unpack_mask", "(4096, 4096)", _unpack_mask),
    Case("apply_mask", "(4096, 4096) float32", _apply_mask),
    _masked_linear(2048, 576, 1536, torch.float32),
    _masked_linear(256, 4096, 4096, torch.bfloat16),
    _masked_linear(1, 4096, 4096, torch.float32),
    _masked_linear(256, 576, 1536, torch.float32, masks=8),
    _sparse_linear(2048, 576, 1536, 0.1),
    _sparse_linear(1, 4096, 4096, 0.1),
    Case("sparse_linear", "pack (4096, 4096) density 0.1", _pack_sparse, ("SparseWeight",)),
    _masked_ladder(256, 576, 1536, masks=8),
    _token_divergence(256, torch.float32),
    _token_divergence(256, torch.bfloat16),
    _token_divergence(256, torch.float32, certified=True),
    _decoder_layer("FLOAT32"),
    _decoder_layer("CHANGE"),
)


def load_ops(checkout: Path) -> Any:
    """dtm_fast.ops of the checkout, with its native code; leave with one line where that is not to be had."""
    # The package is entered without its __init__, whose other rooms (transformers, ...) are not timed.
    package = types.ModuleType("dtm_fast")
    package.__path__ = [str(checkout / "dtm_fast")]
    sys.modules["dtm_fast"] = package
    import dtm_fast.ops as ops

    with suppress(ModuleNotFoundError):  # older revisions have none
        importlib.import_module("dtm_fast.ops.decoder_layer")
    if "dtm_fast._cpu" not in sys.modules:
        ops.backend_info()  # loads it, if it can be
    for name in ("dtm_fast.ops", "dtm_fast._cpu"):
        module = sys.modules.get(name)
        if module is None:
            raise SystemExit(f"{name} was not loaded: {ops.backend_info()['native_cpu']['reason']}")
        if checkout not in Path(str(module.__file__)).resolve().parents:
            raise SystemExit(f"{name} was loaded from {module.__file__}, not from {checkout}")
    for operation, backends in ops.backend_info()["operations"].items():
        if operation not in ON_A_GPU and backends["cpu"]["backend"] == "reference":
            raise SystemExit(f"{operation} would run on its reference twin: {backends['cpu']['reason']}")
    return ops


def fastest(call: Call, seconds: float) -> float:
    """Seconds per call of the fastest sample: whatever else happens on a machine only makes calls slower."""

    def sample(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count

    count = max(1, math.ceil(_SAMPLE / max(sample(1), 1e-9)))
    end = time.monotonic() + seconds
    best = min(sample(count) for _ in range(3))
    while time.monotonic() < end:
        best = min(best, sample(count))
    return best


def tensors_of(result: Any) -> list[torch.Tensor]:
    return [each for each in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(each)]


def difference(result: list[torch.Tensor], expected: list[torch.Tensor]) -> str:
    """How far the head's result is from the base's, in words for the table."""
    if [(each.shape, each.dtype) for each in result] != [(each.shape, each.dtype) for each in expected]:
        return "ANOTHER SHAPE OR DTYPE"
    if all(torch.equal(a, b) for a, b in zip(result, expected, strict=True)):
        return "same bits"
    worst = max(_error(a, b) for a, b in zip(result, expected, strict=True))
    # Summing in another order moves bfloat16 results by up to 0.004, and near ties of booleans.
    return f"differs by {worst:.1e}" if worst <= 0.01 else f"DIFFERS BY {worst:.1e}"


def _error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Booleans: the share that differs; numbers: ‖result − expected‖ / ‖expected‖."""
    if result.dtype == torch.bool:
        return float((result ^ expected).double().mean())
    return float((result.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def run(case: Case, ops: Any, seconds: float) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """({"seconds": …} or {"missing": …} or {"error": …}, what it computed)."""
    missing = [name for name in (case.operation, *case.needs) if not hasattr(ops, name)]
    if missing:
        return {"missing": f"no ops.{missing[0]}"}, []
    try:
        call = case.prepare(ops, torch.Generator().manual_seed(1))
        result = tensors_of(call())
        return {"seconds": fastest(call, seconds)}, result
    except Exception as error:
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"}, []


def without_case(ops: Any) -> list[str]:
    """The operations of the revision that no case here times."""
    known = {case.operation for case in CASES} | {"backend_info", *ON_A_GPU}
    return [name for name in ops.__all__ if name.islower() and name not in known]


def chosen(operations: Iterable[str], names: Iterable[str]) -> list[Case]:
    operations, names = set(operations), set(names)
    return [
        case
        for case in CASES
        if (not operations or case.operation in operations) and (not names or case.name in names)
    ]


def measured(request: dict[str, Any]) -> dict[str, Any]:
    """One run of one revision, as benchmarks.gate.comparison asks for it."""
    if request["threads"] is not None:
        torch.set_num_threads(request["threads"])
    ops = load_ops(Path(request["checkout"]).resolve())
    # The first run writes its results, all others are compared with them.
    known = Path(request["results"])
    expected = torch.load(known) if known.exists() else None
    disturbance = Disturbance()
    cases, results = {}, {}
    for case in chosen(request["operations"], request["cases"]):
        cases[case.name], results[case.name] = run(case, ops, request["seconds"])
        if expected is not None and results[case.name] and expected.get(case.name):
            cases[case.name]["difference"] = difference(results[case.name], expected[case.name])
    others = disturbance()
    if expected is None:
        torch.save(results, known)
    return {
        "others": others,
        "isa": ops.backend_info()["cpu"]["isa_in_use"],
        "threads": torch.get_num_threads(),
        "without_case": without_case(ops),
        "cases": cases,
    }


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return measured(request)
    except (Exception, SystemExit) as error:
        reason = str(error) if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        return {"failed": reason}


def serve() -> None:
    """Answer every request, a line of JSON, by a line of JSON that a process forked for it writes.

    Forked, because importing torch takes longer than timing; torch has not started a thread before.
    """
    import torch._dynamo  # noqa: F401  # dtm_fast.ops imports it: a second

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed must not look like an answer
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answers.write(json.dumps(answer(json.loads(line))) + "\n")
            answers.flush()
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != 0:
            answers.write(json.dumps({"failed": f"its process ended with exit code {code}"}) + "\n")
            answers.flush()


if __name__ == "__main__":
    serve()

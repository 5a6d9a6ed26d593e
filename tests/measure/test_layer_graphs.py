"""Recorded layers, by a recorder that runs the work again on the same memory, as a graph does."""

import contextlib

import pytest
import torch
from measurements import assert_same, some

import dtm_fast as dtm
from dtm_fast.measure.layer_graphs import _MOST_SHAPES, CudaGraphs, LayerGraphs, Work

pytestmark = pytest.mark.once

UP = "model.layers.1.mlp.up_proj"


def again(work: Work) -> Work:
    work()  # as a warm-up does
    return work


def evaluator_of(model, probes, recorder=again) -> dtm.Evaluator:
    evaluator = dtm.Evaluator(model, probes, layers="torch")
    layers = evaluator._layers
    assert layers.shares(False) == (1.0,)
    assert layers._graphs is None  # of the CPU there are none
    layers._graphs = LayerGraphs(layers._layers, recorder)
    return evaluator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metrics", [(), ("sdt",)])
def test_recorded_layers_change_no_bit(llama, make_probes, draw_configuration, dtype, metrics):
    model = llama.to(dtype)
    probes = make_probes(model, 6)
    paths = dtm.components(model)
    configurations = [{}, *some(paths, draw_configuration, 15), *({path: dtm.Prune(0.5)} for path in paths)]
    ours, plain = evaluator_of(model, probes), dtm.Evaluator(model, probes, layers="torch")
    for _ in range(2):  # the second time all is recorded
        expected = plain.measure(configurations, metrics)
        for one, other in zip(ours.measure(configurations, metrics), expected, strict=True):
            assert_same(one, other)
    assert len({fdt for each in expected for fdt in each.fdt.tolist()}) > 2
    # Every layer but the first, which only treated configurations run; the last as each pass wants it.
    assert {number for number, *_ in ours._layers._graphs._replays} == set(range(1, ours._layers.depth))
    rebased, other = (each.rebased(configurations[3]) for each in (ours, plain))
    for one, two in zip(rebased.measure(configurations, ()), other.measure(configurations, ()), strict=True):
        assert_same(one, two)


def test_a_race_keeps_graphs_of_its_groups_and_no_more(llama, make_probes):
    probes = make_probes(llama, 9)
    ours, plain = evaluator_of(llama, probes), dtm.Evaluator(llama, probes, layers="torch")
    candidates = [{path: dtm.Prune(0.5)} for path in ours.decoder.components]
    for error in (0.0, 0.3):
        found, expected = (each.best(candidates, 3, error=error) for each in (ours, plain))
        for one, other in zip(found.best, expected.best, strict=True):
            assert_same(one, other)
    graphs, layers = ours._layers._graphs, ours._layers
    assert 1 < len(graphs._places) <= _MOST_SHAPES
    for rows in range(1, 10):
        x = torch.randn(rows, layers.positions, layers.shape.hidden)
        assert torch.equal(graphs.run(1, x, 0), layers._layers[1].run(x, {})[0])
    assert len(graphs._places) == _MOST_SHAPES


def test_what_a_run_returns_stays(llama, make_probes):
    layers = evaluator_of(llama, make_probes(llama, 3))._layers
    x, y = (torch.randn(3, layers.positions, layers.shape.hidden) for _ in range(2))
    layers._graphs.run(1, x, 0)
    first = layers._graphs.run(1, x, 0)
    kept = first.clone()
    assert not torch.equal(layers._graphs.run(1, y, 0), kept)
    assert torch.equal(first, kept)


def test_what_is_no_number_is_compared_too(llama, make_probes):
    layers = evaluator_of(llama, make_probes(llama, 3))._layers
    x = torch.full((3, layers.positions, layers.shape.hidden), torch.nan)
    assert layers._graphs.run(1, x, 0).isnan().all()
    assert layers._graphs.run(1, x, 0).isnan().all()
    assert not layers._graphs.why_not


def test_another_precision_of_products_is_recorded_anew(llama, make_probes):
    graphs = evaluator_of(llama, make_probes(llama, 3))._layers._graphs
    x = torch.randn(3, 19, 32)
    graphs.run(1, x, 0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        graphs.run(1, x, 0)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(graphs._replays) == 2


def wrong(work: Work) -> Work:
    return lambda: None


def refuse(work: Work) -> Work:
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("recorder", "why"),
    [
        (wrong, r"layer \d gives other bits as a graph than kernel by kernel"),
        (refuse, r"layer \d cannot be recorded: operation not permitted"),
    ],
)
def test_what_cannot_be_recorded_is_said_once_and_launched_as_before(llama, make_probes, recorder, why):
    probes = make_probes(llama, 4)
    ours, plain = evaluator_of(llama, probes, recorder), dtm.Evaluator(llama, probes, layers="torch")
    configurations = [{UP: dtm.Prune(0.5)}, {UP: dtm.Int8()}]
    with pytest.warns(UserWarning, match=f"layers are launched kernel by kernel: {why}") as warned:
        found = ours.measure(configurations, ())
    assert len(warned) == 1
    for one, other in zip(found, plain.measure(configurations, ()), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("runs", [0, 1, 2])
def test_the_streams_wait_for_each_other_also_where_recording_fails(monkeypatch, runs):
    """What a warm-up has begun writes memory that the caller's stream may be given next."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def capture_begin(self, **options: object) -> None:
            log.append("begin")

        def capture_end(self) -> None:
            log.append("end")

    main = Stream("main")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def work() -> None:
        if log.count("work") == runs:
            raise RuntimeError("out of memory")
        log.append("work")

    fails = pytest.raises(RuntimeError, match="out of memory") if runs < 2 else contextlib.nullcontext()
    with fails:
        CudaGraphs(torch.device("cuda"))(work)
    parts = {0: [], 1: ["work", "begin", "end"], 2: ["work", "begin", "work", "end"]}
    assert log == ["side waits for main", *parts[runs], "main waits for side"]

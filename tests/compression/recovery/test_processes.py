"""Trainings by several processes: what they leave is what one leaves, and one that dies ends all in a sentence."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import moe_compress
from moe_compress import api
from moe_compress.compression.recovery import stage as recovery_stage
from moe_compress.compression.recovery.assistance import Order, assist
from moe_compress.compression.recovery.distillation import DistillationRun
from moe_compress.compression.recovery.shared_out import add_gradients, shard_layer
from moe_compress.recipes.parser import parse
from moe_compress.run import processes
from moe_compress.run.context import Run, start
from moe_compress.run.launch import ElsewhereError, Launch, launched, require_known
from moe_compress.run.options import Options
from moe_compress.run.processes import Processes, joined, process_device
from support import processes as program
from support.pruned import refused as refused_in
from support.pruned import stored
from support.recovered import WORDS, gradients, reports, require_alike, training, windows_of
from support.slow import slow_after

DROP = "expert_drop score=weight_norm keep=4 + "
EVERYTHING = {"train": "all", "loss": "logits,labels:0.5,hidden:0.3,router:0.2"}
DISTILL = DROP + "distill train=all steps=5 batch=3 keep=2 loss=logits,hidden,router"
QUANTIZED = "quantize format=packed bits=2 method=rtn group_size=8 clip=max + "
SHARDED = {"ACCELERATE_USE_FSDP": "true"}


@dataclasses.dataclass(frozen=True)
class Alone(Processes):
    """One of several that hears nothing of the others: what `add` is given stays its own, but for `theirs`."""

    theirs: Sequence[Tensor] = ()

    def add(self, tensors: Sequence[Tensor]) -> None:
        for each, other in zip(tensors, self.theirs, strict=False):
            if each.shape == other.shape:
                each += other


@pytest.mark.parametrize("count", [2, 4])
def test_the_shares_of_a_step_add_up_to_it(count, lab, made, monkeypatch):
    """Of windows of which some are padded, and not all tokens count; of more processes than windows, too."""
    mask, said = torch.ones_like(WORDS, dtype=torch.bool), torch.ones_like(WORDS, dtype=torch.bool)
    mask[1, 6:], said[0, :7], said[1, 6:] = False, False, False
    student, text = made("mixtral", DROP.removesuffix(" + ")), windows_of(mask=mask, said=said)
    run = training(student, lab("mixtral"), text, EVERYTHING)
    expected = gradients(run)
    losses, moved = (
        dict.fromkeys(expected[0], 0.0),
        {name: torch.zeros_like(each) for name, each in expected[1].items()},
    )
    for rank in range(count):
        run.optimiser.adam.zero_grad()
        run.processes = Alone(rank, count)
        part, gradient = gradients(run)
        losses = {term: losses[term] + part[term] for term in losses}
        moved = {name: each + gradient[name] for name, each in moved.items()}
    assert losses == pytest.approx(expected[0], rel=1e-5)
    require_alike(moved, expected[1])


def test_a_parameter_without_a_gradient_in_any_process_has_none():
    """AdamW would otherwise move it by what it remembers; one that another process felt has that one's."""
    felt, unfelt, mine = (nn.Parameter(torch.ones(2)) for _ in range(3))
    mine.grad = torch.full((2,), 3.0)
    others = Alone(0, 2, theirs=[torch.tensor([0.5, 1.0, 0.0, 0.0])])
    losses = add_gradients(others, [felt, unfelt, mine], {"logits": 1.0})
    assert losses == {"logits": 1.5}
    assert unfelt.grad is None and felt.grad is not None and not felt.grad.any() and mine.grad.tolist() == [3.0, 3.0]


# --- layers that are shared out, in a group of one ----------------------------------------------------------


@pytest.fixture
def shared(monkeypatch) -> Iterator[None]:
    """Runs whose layers are shared out among this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh, real = init_device_mesh("cpu", (1,)), Run.__post_init__

    def with_mesh(self: Run) -> None:
        self.processes = Processes(mesh=mesh)
        real(self)

    monkeypatch.setattr(Run, "__post_init__", with_mesh)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("family", slow_after(1, ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "jamba"]))
def test_layers_that_are_shared_out_give_the_same_step(family, lab, made, request):
    student = made(family, DROP.removesuffix(" + "))
    expected = gradients(training(student, lab(family), windows_of(), EVERYTHING))
    request.getfixturevalue("shared")
    run = training(student, lab(family), windows_of(), EVERYTHING, recompute=True)
    run.processes = Processes(mesh=init_device_mesh("cpu", (1,)))
    losses, moved = gradients(run)
    kinds = {isinstance(each, DTensor) for name, each in moved.items() if ".layers." in name}
    assert True in kinds and losses == pytest.approx(expected[0], rel=1e-5)
    whole = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in moved.items()}
    require_alike(whole, expected[1])


def test_what_is_kept_of_shared_layers_is_that_of_one_process(lab, made, tmp_path, request):
    """The state of either goes on in the other, to the same weights."""
    plain = training(made("mixtral", DROP.removesuffix(" + ")), lab("mixtral"), windows_of(), steps=4, keep=2)
    plain.run(tmp_path / "plain")
    request.getfixturevalue("shared")

    def half(steps: int, state: Path) -> DistillationRun:
        run = training(made("mixtral", DROP.removesuffix(" + ")), lab("mixtral"), windows_of(), steps=4, keep=2)
        run.options = dataclasses.replace(run.options, steps=steps)
        run.run(state)
        return run

    half(2, tmp_path / "shared")
    found = half(4, tmp_path / "shared").optimiser.state()
    expected = plain.optimiser.state()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], each, rtol=1e-4, atol=1e-6) for name, each in expected.items())


class Layer(nn.Module):
    """A linear map in bf16, a router in fp32, and codes."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.router = nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 4)
        self.codes = nn.Parameter(torch.zeros(4, dtype=torch.int32), requires_grad=False)


def test_routers_in_fp32_and_codes_stay_whole(shared):
    layer, alone, mesh = Layer(), nn.Module(), init_device_mesh("cpu", (1,))
    alone.codes = layer.codes
    for each in (layer, alone):
        shard_layer(each, mesh)
    kinds = {name: isinstance(each, DTensor) for name, each in layer.named_parameters()}
    assert {name for name, is_shared in kinds.items() if is_shared} == {"map.weight", "map.bias"}
    assert not isinstance(alone, FSDPModule) and not isinstance(alone.codes, DTensor)


@pytest.mark.parametrize("bucket", [1, 5, 100])
def test_every_number_is_summed_once(bucket, monkeypatch):
    """Whatever goes together, and however it lies in memory."""
    monkeypatch.setattr(processes, "BUCKET", bucket)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))
    tensors = [torch.ones(2), torch.arange(6.0).view(2, 3).t(), torch.ones(1, dtype=torch.float64), torch.ones(2, 2)]
    expected = [2 * each for each in tensors]
    Processes(0, 2).add(tensors)
    assert all(torch.equal(each, other) for each, other in zip(tensors, expected, strict=True))


# --- launches -----------------------------------------------------------------------------------------------


def test_a_launch_is_what_torchrun_says():
    two = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert launched(two) == Launch(3, 4, 1, 2) and launched({**two, **SHARDED}).sharded
    assert launched({}) == launched({"RANK": "1", "WORLD_SIZE": "2"}) == Launch()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "distributed_type: DEEPSPEED is not supported: use MULTI_GPU or FSDP."),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision: bf16 would do nothing: say 'no'"),
    ],
)
def test_launches_of_which_nothing_would_come(environment, said):
    require_known({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true"})
    with pytest.raises(ValueError, match=said):
        require_known(environment)


def test_several_processes_do_not_share_a_gpu():
    with pytest.raises(ValueError, match=r"device=cuda:1: each of 2 processes takes a GPU of its own"):
        process_device("cuda:1", Launch(count=2))
    assert process_device("cpu", Launch(count=2)).type == "cpu"


def test_without_a_launch_nothing_is_joined():
    with joined("cpu") as processes:
        assert processes == Processes() and not dist.is_initialized()
    assert processes.first("a") == "a" and processes.all_say("b") == ["b"]


def test_an_error_of_another_process_is_said_by_the_first(monkeypatch):
    monkeypatch.setattr(Processes, "all_say", lambda self, what: [None, "no such folder"])
    with pytest.raises(ElsewhereError, match=r"^process 1: no such folder$"), Processes(0, 2).together():
        pass
    with pytest.raises(KeyError), Processes(0, 2).together():
        raise KeyError("own")


@dataclasses.dataclass(frozen=True)
class Ordered(Processes):
    """The second of two, which is given one order."""

    orders: list[Any] = dataclasses.field(default_factory=list)

    def first(self, what: Any = None) -> Any:
        return self.orders.pop()

    def all_say(self, what: Any) -> list[Any]:
        return [None, what]


def test_a_process_that_does_not_see_the_folders_says_so(lab, made, tmp_path):
    stage = parse(f"{DROP}router_kd steps=1", [], {}).stages[-1]
    here, gone = Path(str(lab("mixtral")["model"])), tmp_path / "gone"
    order = Order(stage, (gone, "student"), (here, "teacher"), [], windows_of(), Options(), tmp_path / "state")
    with pytest.raises(ElsewhereError, match=r"^process 1: .*gone is not there: all processes need the same folders"):
        assist(Ordered(1, 2, orders=[None, order]))
    assert assist(Ordered(1, 2, orders=[None])) is None


def test_a_state_that_not_all_see_is_not_gone_on_with(lab, made, tmp_path):
    run = training(made("mixtral", DROP.removesuffix(" + ")), lab("mixtral"), windows_of(), steps=1)
    run.processes = Ordered(1, 2)
    with pytest.raises(ElsewhereError, match=r"not all processes see .*state: folders that they share are needed"):
        run.run(tmp_path / "state")


def test_memory_is_that_of_all_processes_of_the_machine(lab, tmp_path, monkeypatch):
    """On the CPU they share it; layers that are shared out take a part each."""
    needed: list[int] = []
    monkeypatch.setattr(recovery_stage, "free_memory", lambda _device: 0)
    monkeypatch.setattr(recovery_stage, "gigabytes", lambda size: needed.append(size) or str(size))
    said = refused_in(f"{DROP}distill steps=1", lab("mixtral"), tmp_path)
    assert " times" not in said and "share layers out among GPUs (docs/training.md)" in said
    monkeypatch.setattr(recovery_stage, "free_memory", lambda _device: needed[0] + 1)
    monkeypatch.setattr(api, "start", lambda options, _: start(options, Processes(local=2)))
    assert f"takes {needed[0]}, 2 times (the model" in refused_in(f"{DROP}distill steps=1", lab("mixtral"), tmp_path)
    monkeypatch.setattr(api, "start", lambda options, _: start(options, Processes(count=4, local=2, mesh=object())))
    monkeypatch.setattr(recovery_stage, "_prepared", _reached)
    with pytest.raises(_ReachedError):
        moe_compress.compress(f"{DROP}distill steps=1", **{**lab("mixtral"), "out": str(tmp_path / "out")})


class _ReachedError(Exception):
    pass


def _reached(*_: Any) -> None:
    raise _ReachedError


# --- two processes ------------------------------------------------------------------------------------------


def words(sentence: str, options: Mapping[str, object], place: Path, name: str) -> list[str]:
    """A command."""
    given = {**options, "results": place, "out": place / name}
    return ["compress", sentence, *(f"{key}={value}" for key, value in given.items())]


def require_same(place: Path, name: str, sentence: str, options: Mapping[str, object]) -> None:
    """Curve and weights are within 1e-4 of those of one process."""
    one = moe_compress.compress(sentence, **{**options, "results": str(place / "one"), "out": str(place / f"{name}-1")})
    assert one.folder is not None
    found, expected = stored(place / name), stored(one.folder)
    assert found.keys() == expected.keys()
    for key, each in expected.items():
        assert torch.allclose(found[key].double(), each.double(), rtol=0, atol=1e-4), key
    two, alone = (reports(folder)[-1]["training"] for folder in (place / name, one.folder))
    assert two["processes"] == 2 and two["tokens"] == alone["tokens"] and "processes" not in alone
    for term, losses in alone["curve"].items():
        assert two["curve"][term] == pytest.approx(losses, abs=1e-4), term


def cases(lab: Any, wide_lab: Any, texts: Path) -> dict[str, tuple[str, dict[str, object], dict[str, str]]]:
    """name -> sentence, options, environment; rows are padded, so that the two have different numbers of tokens."""
    padded = {"data": str(texts / "domains.jsonl"), "pack": "false", "length": 20, "data_field": "text"}
    plain, wide = ({**each("mixtral"), **padded} for each in (lab, wide_lab))
    return {
        "routers": (f"{DROP}router_kd steps=3 batch=3", plain, {}),
        "kept": (f"{DROP}distill train=all steps=3 batch=3 cache=topk top=16", plain, {}),
        "codes": (f"{QUANTIZED}qad steps=3 batch=3 learns=codes", wide, {}),
        "shared": (f"{DISTILL} checkpoint_every=2", plain, SHARDED),
        "beside": (DISTILL, plain, {"ACCELERATE_USE_FSDP": "false"}),
        "shared codes": (f"{QUANTIZED}qad steps=3 batch=1", wide, SHARDED),
    }


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.parametrize(
    ("names", "starter"),
    slow_after(1, [("routers, kept, codes, shared", ()), ("beside, shared codes, routers", TORCHRUN)]),
)
def test_two_processes_leave_what_one_leaves(names, starter, lab, wide_lab, texts, tmp_path):
    """And only the first says anything, or writes."""
    chosen = {name: each for name, each in cases(lab, wide_lab, texts).items() if name in names.split(", ")}
    jobs = [(words(sentence, given, tmp_path, n), -1, env) for n, (sentence, given, env) in chosen.items()]
    done = program.launch(jobs, *starter)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"checkpoint: {tmp_path / name}" for name in chosen]
    said = [line for line in done.stderr.splitlines() if line.startswith(("plain checkpoint", "edited checkpoint"))]
    assert len(said) == len({*said}) == 2 * len(chosen)
    assert len([*(tmp_path / "logs").glob("*.jsonl")]) == len(chosen)
    for name, (sentence, given, _) in chosen.items():
        require_same(tmp_path, name, sentence, given)


def ended(job: tuple[list[str], int, dict[str, str]]) -> subprocess.CompletedProcess[str]:
    """A launch whose second process dies at a step."""
    done = program.launch([job])
    said = [line for line in done.stderr.splitlines() if "the same command goes on from whatever was kept" in line]
    assert done.returncode != 0 and len(said) == 1 and not done.stdout, done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith("[rank")], done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize(("point", "environment"), [(3, {}), (0, SHARDED)])
def test_a_process_that_dies_ends_all_and_the_command_goes_on(point, environment, lab, wide_lab, texts, tmp_path):
    sentence, given, _ = cases(lab, wide_lab, texts)["beside"]
    command = words(sentence, given, tmp_path, "out")
    ended((command, point, environment))
    assert not (tmp_path / "out").exists() and not (tmp_path / "failures").exists()
    done = program.launch([(command, -1, environment)])
    assert done.returncode == 0 and ("going on behind step" in done.stderr) == (point > 0), done.stderr
    require_same(tmp_path, "out", sentence, given)


@pytest.mark.slow
def test_a_mistake_is_said_once(lab, tmp_path):
    """Of the words, by both processes alike; of the loss, in the middle of a training."""
    jobs = [
        (words(f"{DROP}distill steps=0", lab("mixtral"), tmp_path, "a"), -1, {}),
        (words(f"{DROP}distill lr=1e30 warmup=0 steps=5", lab("mixtral"), tmp_path, "b"), -1, {}),
    ]
    said = [[line for line in program.launch([job]).stderr.splitlines() if "error: " in line] for job in jobs]
    assert [len(each) for each in said] == [1, 1]
    assert "distill.steps=0" in said[0][0] and "is no number" in said[1][0] and "Nothing is written." in said[1][0]
    assert json.dumps([each.name for each in tmp_path.glob("*.partial")]) == "[]"

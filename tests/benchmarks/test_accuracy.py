"""The arithmetic of the benchmark of accuracy, and a tiny run of it."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from evatune.pca import StreamingPCA


def test_components_stand_apart_by_gaps_on_both_sides(benchmark_script):
    stands_apart = benchmark_script("accuracy").stands_apart
    values = torch.tensor([100.0, 97.0, 96.0, 50.0, 0.0, 0.0], dtype=torch.float64)
    assert stands_apart(values).tolist() == [True, False, False, True, False, False]


def test_scores_of_known_components(benchmark_script):
    accuracy = benchmark_script("accuracy")
    values = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    vectors = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()).Q
    truth = {"values_d": values, "vectors_dd": vectors}
    scatter = (vectors * values) @ vectors.T
    right = accuracy.score(-vectors.T[:2], scatter, **truth)
    assert right["half"] == pytest.approx(0, abs=1e-12)
    assert right["cosine"] == pytest.approx(1)
    assert right["n_apart"] == 2
    assert all(accuracy.meets(right).values())

    wrong = accuracy.score(vectors.T[[0, 2]], scatter, **truth)  # the third in place of the second
    assert wrong["half"] == pytest.approx(0, abs=1e-12)
    assert wrong["all"] == pytest.approx(1 - 10 / 12)
    assert wrong["cosine"] == pytest.approx(0, abs=1e-12)
    assert accuracy.meets(wrong) == {"half": True, "all": False, "cosine": False}
    assert accuracy.meets(wrong | {"cosine": None})["cosine"]


def test_a_follower_scores_against_the_very_same_rows(benchmark_script):
    accuracy = benchmark_script("accuracy")
    follower = accuracy.Follower("q_proj", backends=["exact", "sketch-fixed"], n_components=4)
    rows = torch.randn(300, 12, generator=torch.Generator().manual_seed(1)) * torch.arange(12, 0, -1) + 50
    for batch in rows.split(100):
        follower.hook(torch.nn.Identity(), (batch.view(4, 25, 12),))
    assert follower.n_rows == 300
    assert follower.pcas["sketch-fixed"].tolerance is None
    assert isinstance(follower.pcas["exact"], StreamingPCA)
    facts = follower.scores()["exact"]
    assert facts["all"] == pytest.approx(0, abs=1e-5)
    assert facts["cosine"] > 0.999
    assert (facts["kind"], facts["backend"]) == ("q_proj", "exact")


def test_a_tiny_run_of_accuracy(benchmark_script, monkeypatch, tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    accuracy = benchmark_script("accuracy")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    batches = [{"input_ids": torch.randint(0, 64, (4, 32))} for _ in range(3)]
    monkeypatch.setattr(accuracy, "load", lambda path, dtype: LlamaForCausalLM(config).eval())
    monkeypatch.setattr(accuracy, "text_batches", lambda path, n: batches[:n])
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path)
    monkeypatch.setattr(accuracy, "IMAGES", tmp_path)
    monkeypatch.setattr(accuracy, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text("<!-- accuracy: begin -->\n<!-- accuracy: end -->\n")
    options = ["--batches", "3", "--components", "4", "--threads", "1"]

    monkeypatch.setattr(sys, "argv", ["accuracy.py", *options, "--layers", "1"])
    accuracy.main()
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]  # some layers only: nothing is written
    assert "of 4" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["accuracy.py", *options])
    accuracy.main()
    results = json.loads((tmp_path / "accuracy.json").read_text())
    assert list(results["backends"]) == ["auto", "sketch", "sketch-fixed"]
    assert {len(inputs) for inputs in results["backends"].values()} == {8}
    assert all(facts["all"] < 1e-4 for facts in results["backends"]["auto"].values())
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "8 of 8" in (tmp_path / "page.md").read_text()

    monkeypatch.setattr(sys, "argv", ["accuracy.py", *options, "--layers", "7"])
    with pytest.raises(SystemExit, match="q_proj"):
        accuracy.main()

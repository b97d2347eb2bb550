"""Spectra as a value: a mapping, a folder, a plan, a table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from evatune import EvaError, Spectra, Spectrum, Target
from evatune.settings import Reason
from evatune.spectra import FORMAT_VERSION

D, K = 24, 8


def spectrum(seed: int = 0, *, d: int = D, k: int = K, **facts: object) -> Spectrum:
    generator = torch.Generator().manual_seed(seed)
    values = (20 * torch.rand(k, generator=generator)).sort(descending=True).values
    n_rows = 1000 + seed
    return Spectrum(
        **{
            "components": torch.linalg.qr(torch.randn(d, k, generator=generator)).Q.T.contiguous(),
            "singular_values": values,
            "mean": torch.randn(d, generator=generator),
            "total_variance": float(values.square().sum()) / (n_rows - 1) * 1.1 + 1e-17 * seed,
            "n_rows": n_rows,
            "n_batches": 7,
            "stopped": Reason.CONVERGED,
            "backend": "sketch",
        }
        | facts
    )


@pytest.fixture
def spectra() -> Spectra:
    names = {"h.0.q": "h.0.q", "h.0.k": "h.0.q", "h.0.up": "h.0.up", "h.1.q": "h.1.q"}
    return Spectra(
        targets={
            name: Target(name=name, input=key, in_features=D, out_features=10 + i)
            for i, (name, key) in enumerate(names.items())
        },
        inputs={key: spectrum(seed) for seed, key in enumerate(dict.fromkeys(names.values()))},
        model_name="org/model",
        settings={"tau": 0.99, "rank": None, "dtype": None, "target_modules": ["q", "k"]},
        versions={"evatune": "0.1.0", "torch": "2"},
        seconds=1.25,
        history=[{"batch": 2, "rows": 512, "mean_gain": None}, {"batch": 3, "rows": 768, "mean_gain": 0.25}],
    )


@pytest.fixture
def folder(spectra, tmp_path):
    return spectra.save(tmp_path / "spectra")


def assert_same(first: Spectra, second: Spectra) -> None:
    assert first.targets == second.targets and list(first.targets) == list(second.targets)
    assert list(first.inputs) == list(second.inputs)
    for name in ("model_name", "settings", "versions", "seconds", "history"):
        assert getattr(first, name) == getattr(second, name), name
    for key, mine in first.inputs.items():
        theirs = second.inputs[key]
        for name in ("components", "singular_values", "mean"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))
        for name in ("total_variance", "n_rows", "n_batches", "stopped", "backend"):
            assert getattr(mine, name) == getattr(theirs, name)


def test_it_is_a_mapping_from_targets_in_the_order_of_the_model(spectra):
    assert list(spectra) == ["h.0.q", "h.0.k", "h.0.up", "h.1.q"] and len(spectra) == 4
    assert "h.0.k" in spectra and "h.9.q" not in spectra
    assert spectra["h.0.k"] is spectra["h.0.q"] is spectra.inputs["h.0.q"]
    assert dict(spectra.items())["h.1.q"] is spectra.inputs["h.1.q"]
    assert spectra.get("h.9.q") is None


def test_an_unknown_target_names_the_near_ones(spectra):
    with pytest.raises(KeyError, match=r"no target 'h\.0\.qq' in these spectra \(did you mean 'h\.0\.q'"):
        spectra["h.0.qq"]


def test_shares_of_variance(spectra):
    one = spectra["h.0.q"]
    torch.testing.assert_close(one.explained_variance, one.singular_values.square() / 999)
    torch.testing.assert_close(one.explained_variance_ratio, one.explained_variance / one.total_variance)
    constant = spectrum(singular_values=torch.zeros(K), total_variance=0.0)
    assert not constant.explained_variance_ratio.any() and torch.isfinite(constant.explained_variance).all()
    single = spectrum(n_rows=1, singular_values=torch.zeros(K), total_variance=0.0)
    assert not single.explained_variance.any()


def test_saved_and_loaded_spectra_are_equal_in_every_bit(spectra, folder):
    assert_same(Spectra.load(folder), spectra)
    assert_same(Spectra.load(str(folder)), spectra)
    assert sorted(path.name for path in folder.iterdir()) == ["spectra.json", "spectra.safetensors"]


def test_inputs_of_different_widths_and_counts_are_kept(spectra, tmp_path):
    mixed = replace(spectra, inputs=spectra.inputs | {"h.1.q": spectrum(5, d=40, k=3)})
    loaded = Spectra.load(mixed.save(tmp_path / "mixed"))
    assert_same(loaded, mixed)
    assert loaded.n_components == K


def test_parts_of_larger_tensors_are_saved(spectra, tmp_path):
    wide = torch.randn(2 * K, D)
    cut = replace(spectra, inputs=spectra.inputs | {"h.1.q": spectrum(components=wide[::2], mean=wide[0])})
    assert_same(Spectra.load(cut.save(tmp_path / "cut")), cut)


def test_a_plan_from_disk_is_the_plan_from_memory(spectra, folder):
    loaded = Spectra.load(folder)
    for settings in (
        {},
        {"metric": "paper"},
        {"metric": "raw", "use_rslora": True, "lora_alpha": 3},
        {"rank": {"h.0.q": 2, "h.0.k": 3, "h.0.up": 1, "h.1.q": 4}},
    ):
        assert loaded.plan(**{"rank": 4, "rho": 2.0} | settings) == spectra.plan(**{"rank": 4, "rho": 2.0} | settings)


def test_one_measurement_serves_every_rank_and_rho_up_to_what_was_kept(spectra):
    for rank, rho in ((1, 1.0), (1, 8.0), (2, 4.0), (4, 2.0), (8, 1.0)):
        plan = spectra.plan(rank, rho)
        assert plan.total == plan.budget == 4 * rank and max(plan.ranks.values()) <= round(rank * rho)
    with pytest.raises(EvaError, match=r"rank 5 with rho 2 needs 10 components, but 8 were kept of h\.0\.q"):
        spectra.plan(5, 2.0)


def test_targets_that_share_an_input_get_equal_ranks(spectra):
    plan = spectra.plan(4, 2.0)
    assert abs(plan.ranks["h.0.q"] - plan.ranks["h.0.k"]) <= 1
    assert plan.in_features == dict.fromkeys(spectra, D) and plan.out_features["h.0.k"] == 11


def test_the_summary_has_one_line_an_input(spectra):
    summary = spectra.summary()
    assert "h.0.q (+1)" in summary and "h.0.up" in summary and "h.0.k" not in summary
    assert "1,000" in summary and "converged" in summary and f"first {K}" in summary


def test_the_overview_counts_the_reasons_with_their_texts(spectra):
    ended = replace(spectra.inputs["h.1.q"], stopped=Reason.BATCH_CAP)
    first, _, *reasons, last = replace(spectra, inputs=spectra.inputs | {"h.1.q": ended}).overview().splitlines()
    assert first == "4 targets with 3 different inputs, 1,002 rows in 7 batches, 1 s"
    assert reasons == [f"     2 converged: {Reason.CONVERGED.text}", f"     1 batch cap: {Reason.BATCH_CAP.text}"]
    assert last.startswith(f"{K} components explain 90.9%")


def test_the_manifest_is_json_and_holds_no_tensor(spectra, folder):
    manifest = json.loads((folder / "spectra.json").read_text(encoding="utf-8"))
    assert manifest == json.loads(json.dumps(spectra.to_json()))
    assert manifest["format_version"] == FORMAT_VERSION and manifest["model_name"] == "org/model"
    assert manifest["inputs"]["h.0.q"]["n_rows"] == 1000 and manifest["inputs"]["h.0.q"]["stopped"] == "converged"
    assert [entry["name"] for entry in manifest["targets"]] == list(spectra)


def test_a_folder_that_exists_is_not_overwritten_unless_asked(spectra, folder):
    other = replace(spectra, model_name="other")
    with pytest.raises(EvaError, match="exists already; choose another output or allow overwriting"):
        other.save(folder)
    assert_same(Spectra.load(folder), spectra)
    other.save(folder, overwrite=True)
    assert_same(Spectra.load(folder), other)


def test_a_failure_while_writing_leaves_the_old_folder(spectra, folder, monkeypatch):
    broken = replace(spectra, settings={"function": print})  # which is no JSON
    with pytest.raises(TypeError, match="not JSON serializable"):
        broken.save(folder, overwrite=True)
    assert_same(Spectra.load(folder), spectra)
    with pytest.raises(TypeError, match="not JSON serializable"):
        broken.save(folder.parent / "new")
    assert [path.name for path in folder.parent.iterdir()] == ["spectra"], "nothing half-written is left"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_tensor_file_is_named(folder, share):
    path = folder / "spectra.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(EvaError, match=r"spectra\.safetensors is damaged or cut short: "):
        Spectra.load(folder)


def test_bytes_that_are_no_tensor_file_are_named(folder):
    (folder / "spectra.safetensors").write_bytes(b"\x80\x04pickle me")
    with pytest.raises(EvaError, match="is damaged or cut short: it is no file of tensors"):
        Spectra.load(folder)


def test_a_tensor_that_is_missing_is_named(folder):
    tensors = load_file(folder / "spectra.safetensors")
    del tensors["1.mean"]
    save_file(tensors, folder / "spectra.safetensors")
    with pytest.raises(EvaError, match=r"1\.mean"):
        Spectra.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b'"text"', b"{}", b"\xff\xfe\x00bad"], ids=repr)
def test_a_manifest_that_is_damaged_is_named(folder, content):
    (folder / "spectra.json").write_bytes(content)
    with pytest.raises(EvaError, match=r"spectra\.json is damaged .*; measure again"):
        Spectra.load(folder)


def test_every_entry_of_the_manifest_is_needed(folder):
    path = folder / "spectra.json"
    manifest = json.loads(path.read_text())
    for name in set(manifest) - {"format", "unreached", "weights"}:
        path.write_text(json.dumps({key: value for key, value in manifest.items() if key != name}))
        with pytest.raises(EvaError, match=r"spectra\.json is damaged"):
            Spectra.load(folder)
    manifest["targets"][1]["input"] = "h.7.q"
    path.write_text(json.dumps(manifest))
    with pytest.raises(EvaError, match=r"spectra\.json is damaged"):
        Spectra.load(folder)


def test_a_later_format_asks_for_an_update(folder):
    path = folder / "spectra.json"
    manifest = json.loads(path.read_text()) | {"format_version": FORMAT_VERSION + 1}
    path.write_text(json.dumps(manifest))
    with pytest.raises(EvaError, match=f"is of format {FORMAT_VERSION + 1}; update evatune to read it"):
        Spectra.load(folder)


@pytest.mark.parametrize("missing", ["spectra.json", "spectra.safetensors"])
def test_a_folder_without_one_of_its_files_is_no_spectra(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(EvaError, match=f"is not a folder of spectra: {missing} is missing"):
        Spectra.load(folder)


def test_a_folder_that_is_not_there_is_no_spectra(tmp_path):
    with pytest.raises(EvaError, match=r"nowhere is not a folder of spectra: spectra\.json is missing"):
        Spectra.load(tmp_path / "nowhere")

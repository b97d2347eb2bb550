"""Decisions, time series, and models that repeat, shorten or group positions."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.slow


def test_three_tokens_a_step(tiny, texts, check):
    samples = []
    generator = torch.Generator().manual_seed(0)
    for text in texts(lengths=(3, 9)):
        n = text["input_ids"].shape[1]
        samples.append(
            {
                "states": torch.randn(1, n, 11, generator=generator),
                "actions": torch.randn(1, n, 3, generator=generator),
                "returns_to_go": torch.randn(1, n, 1, generator=generator),
                "timesteps": torch.arange(n)[None],
                "attention_mask": text["attention_mask"],
            }
        )
    check(lambda: tiny("DecisionTransformerModel", state_dim=11, act_dim=3), samples, may_say=True)


PATCHED = {"context_length": 32, "num_input_channels": 3, "prediction_length": 4, "patch_length": 4, "patch_stride": 4}


@pytest.mark.parametrize("name", ["PatchTSTForPrediction", "PatchTSMixerForPrediction"])
def test_patches_of_series(name, tiny, images, check):
    check(lambda: tiny(name, **PATCHED), [{"past_values": series} for series in images(32, 3)])


@pytest.mark.parametrize("name", ["TimeSeriesTransformerModel", "InformerModel", "AutoformerModel"])
def test_series(name, tiny, images, check):
    sizes = {"prediction_length": 4, "context_length": 16, "num_time_features": 1, "lags_sequence": [1, 2, 3]}
    samples = [
        {
            "past_values": series[..., 0],
            "past_time_features": series[..., 1:],
            "past_observed_mask": torch.ones(1, 19),
            "future_values": future[..., 0],
            "future_time_features": future[..., 1:],
        }
        for series, future in zip(images(19, 2), images(4, 2, seed=3), strict=True)
    ]
    check(lambda: tiny(name, **sizes), samples, together=True)


def test_choices(tiny, texts, check):
    """A question has three answers, whose texts stand in a dimension of their own."""
    samples = [
        {name: tensor.expand(3, -1)[None].clone() for name, tensor in text.items()} for text in texts(lengths=(4, 10))
    ]

    def collate(batch):
        longest = max(sample["input_ids"].shape[2] for sample in batch)
        return {
            name: torch.cat([torch.nn.functional.pad(s[name], (0, longest - s[name].shape[2])) for s in batch])
            for name in batch[0]
        }

    check(lambda: tiny("BertForMultipleChoice"), samples, collate=collate, may_say=True)


def test_time_first(tiny, texts, check):
    check(lambda: tiny("XLNetLMHeadModel"), texts(lengths=(4, 9)), may_say=True)


def test_positions_shortened_by_pooling(tiny, texts, check):
    check(lambda: tiny("FunnelBaseModel", block_sizes=[1, 1]), texts(lengths=(4, 9)), may_say=True)


def before_the_window_ends(name, entering, sample):
    """Leave out what the model itself pads to a multiple of 8; its attention goes time first."""
    if entering.ndim < 3 or "decoder" in name:
        return None
    counted = torch.zeros(entering.shape[:2], dtype=torch.bool)
    positions = counted if len(counted) == 1 else counted.T
    positions[:, : sample["input_ids"].shape[1]] = True
    return counted


WINDOW = {"valid": before_the_window_ends, "unreached": r".*_global", "may_say": True}


def test_padding_to_a_window(tiny, texts, check):
    check(lambda: tiny("LongformerForMaskedLM", attention_window=8), texts(), **WINDOW)


def test_padding_to_a_window_before_a_decoder(tiny, texts, check):
    samples = [{**source, "labels": target["input_ids"]} for source, target in zip(texts(), texts(seed=1), strict=True)]
    check(lambda: tiny("LEDForConditionalGeneration", attention_window=8), samples, **WINDOW)


def test_one_vector_a_text(tiny, texts, check):
    check(lambda: tiny("DPRQuestionEncoder"), texts())


@pytest.mark.parametrize("name", ["FNetForMaskedLM", "ConvBertForMaskedLM"])
def test_model_that_reads_its_padding_is_measured_without(name, tiny, texts, check):
    check(lambda: tiny(name), texts(), may_say=True)

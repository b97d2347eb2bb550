"""Speech and sound: the encoder's frames are fewer than the samples that the mask of the batch speaks of."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.slow

FEATURES = {
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "layer",
}
WAVES: dict[str, dict] = {
    "Wav2Vec2ForCTC": {},
    "HubertForCTC": {},
    "WavLMForCTC": {},
    "UniSpeechForCTC": {},
    "UniSpeechSatForCTC": {},
    "Data2VecAudioForCTC": {},
    "Wav2Vec2ConformerForCTC": {"vocab_size": 32},
    "Wav2Vec2ForSequenceClassification": {},
}


@pytest.fixture
def waves(images):
    """Sounds of 200 to 800 samples."""
    lengths = [240, 800, 440, 620]
    return [
        {"input_values": wave[:, : lengths[i % 4]], "attention_mask": torch.ones(1, lengths[i % 4], dtype=torch.long)}
        for i, wave in enumerate(images(800))
    ]


@pytest.fixture
def spectrograms(images):
    """Features (time, 8) of 20 to 40 frames."""
    lengths = [24, 40, 32, 36]
    return [
        {
            "input_features": sound[:, : lengths[i % 4]],
            "attention_mask": torch.ones(1, lengths[i % 4], dtype=torch.long),
        }
        for i, sound in enumerate(images(40, 8))
    ]


def with_labels(samples, texts):
    return [{**sample, "labels": text["input_ids"]} for sample, text in zip(samples, texts(seed=1), strict=True)]


@pytest.mark.parametrize("name", WAVES)
def test_waves(name, tiny, waves, check):
    # WavLM hands these weights to a function of torch, past their modules.
    peft = {"exclude_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]} if name == "WavLMForCTC" else None
    check(lambda: tiny(name, **FEATURES, **WAVES[name]), waves, peft=peft, may_say=True)


def test_conformer(tiny, spectrograms, check):
    check(lambda: tiny("Wav2Vec2BertForCTC", feature_projection_input_dim=8, vocab_size=32), spectrograms, may_say=True)


def test_spectrogram_transformer(tiny, images, check):
    sizes = {"max_length": 32, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4}
    samples = [{"input_values": sound} for sound in images(32, 16)]
    check(lambda: tiny("ASTForAudioClassification", **sizes), samples)


def test_whisper(tiny, images, texts, check):
    sizes = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20, "decoder_start_token_id": 0}
    samples = with_labels([{"input_features": sound} for sound in images(8, 40)], texts)
    check(lambda: tiny("WhisperForConditionalGeneration", **sizes), samples)


def test_speech_to_text(tiny, spectrograms, texts, check):
    sizes = {"input_feat_per_channel": 8, "max_source_positions": 40, "max_target_positions": 20, "conv_channels": 16}
    build = lambda: tiny("Speech2TextForConditionalGeneration", **sizes, decoder_start_token_id=0)  # noqa: E731
    check(build, with_labels(spectrograms, texts), may_say=True)


def test_moonshine(tiny, waves, texts, check):
    waves = [{name: tensor.repeat(1, 4) for name, tensor in wave.items()} for wave in waves]
    build = lambda: tiny("MoonshineForConditionalGeneration", decoder_start_token_id=0, pad_token_id=0)  # noqa: E731
    check(build, with_labels(waves, texts), may_say=True)

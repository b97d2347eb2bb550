"""Decoders, encoders and encoder-decoders of text."""

from __future__ import annotations

from functools import partial

import pytest

pytestmark = pytest.mark.slow

DECODERS: dict[str, dict] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "Gemma2ForCausalLM": {},
    "Gemma3ForCausalLM": {},
    "PhiForCausalLM": {},
    "Phi3ForCausalLM": {},
    "GPT2LMHeadModel": {},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "GPTNeoXForCausalLM": {},
    "GPTJForCausalLM": {},
    "OPTForCausalLM": {},
    "BloomForCausalLM": {},
    "FalconForCausalLM": {},
    "MptForCausalLM": {},
    "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "CohereForCausalLM": {},
    "GlmForCausalLM": {},
    "GraniteForCausalLM": {},
    "PersimmonForCausalLM": {},
    "CodeGenForCausalLM": {},
    "GPTBigCodeForCausalLM": {},
    "XGLMForCausalLM": {},
    "BioGptForCausalLM": {},
    "SmolLM3ForCausalLM": {},
    "OpenAIGPTLMHeadModel": {},
    "ApertusForCausalLM": {},
    "LlamaForSequenceClassification": {"pad_token_id": 0},
    "Qwen2ForTokenClassification": {},
}
ENCODERS: dict[str, dict] = {
    "BertForMaskedLM": {},
    "BertForSequenceClassification": {},
    "RobertaForMaskedLM": {},
    "AlbertForMaskedLM": {},
    "DistilBertForSequenceClassification": {},
    "ElectraForMaskedLM": {},
    "DebertaForMaskedLM": {},
    "DebertaV2ForMaskedLM": {},
    "MPNetForMaskedLM": {},
    "MobileBertForMaskedLM": {},
    "SqueezeBertForMaskedLM": {},
    "ModernBertForMaskedLM": {},
    "NomicBertForMaskedLM": {},
    "XLMWithLMHeadModel": {},
    "RoFormerForMaskedLM": {},
    "RemBertForMaskedLM": {},
    "EsmForMaskedLM": {"vocab_size": 99, "pad_token_id": 1},
    "IBertForMaskedLM": {},
    "EuroBertForMaskedLM": {},
    "MegatronBertForMaskedLM": {},
    "LayoutLMForMaskedLM": {},
    "BertForTokenClassification": {},
    "BertForQuestionAnswering": {},
}
NEVER_CALLED = {"MobileBertForMaskedLM": r"cls\.predictions\.dense", "EsmForMaskedLM": r"esm\.contact_head.*"}
ENCODER_DECODERS: dict[str, dict] = {
    "T5ForConditionalGeneration": {"decoder_start_token_id": 0},
    "MT5ForConditionalGeneration": {},
    "UMT5ForConditionalGeneration": {},
    "LongT5ForConditionalGeneration": {"decoder_start_token_id": 0},
    "BartForConditionalGeneration": {},
    "MBartForConditionalGeneration": {},
    "PegasusForConditionalGeneration": {},
    "MarianMTModel": {"decoder_start_token_id": 0, "decoder_vocab_size": 99},
    "BlenderbotForConditionalGeneration": {},
    "M2M100ForConditionalGeneration": {},
    "PLBartForConditionalGeneration": {},
    "SwitchTransformersForConditionalGeneration": {"decoder_start_token_id": 0},
    "NllbMoeForConditionalGeneration": {"decoder_start_token_id": 0},
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name, tiny, texts, check):
    check(lambda: tiny(name, **DECODERS[name]), texts())


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name, tiny, texts, check):
    check(lambda: tiny(name, **ENCODERS[name]), texts(), unreached=NEVER_CALLED.get(name))


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder(name, tiny, texts, check):
    """Targets of other lengths than the sources, padded in the labels alone."""
    samples = [{**source, "labels": target["input_ids"]} for source, target in zip(texts(), texts(seed=1), strict=True)]
    check(lambda: tiny(name, **ENCODER_DECODERS[name]), samples)


def test_streams_that_look_at_the_length_of_the_batch(tiny, texts, check):
    """ProphetNet's predicting streams differ with the length of the padding, and the oracle takes none."""
    samples = [{**source, "labels": target["input_ids"]} for source, target in zip(texts(), texts(seed=1), strict=True)]
    sizes = {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "decoder_start_token_id": 0}
    build = partial(tiny, "ProphetNetForConditionalGeneration", **sizes)
    spectra = check(build, samples, may_say=True)
    assert spectra["prophetnet.decoder.layers.1.feed_forward.output"].n_rows == 3 * sum(
        sample["labels"].shape[1] for sample in samples
    )


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_encoder_decoder_of_equal_lengths(name, tiny, texts, check):
    sources, targets = texts(lengths=(8, 9)), texts(lengths=(4, 9), seed=1)
    samples = [{"input_ids": s["input_ids"], "labels": t["input_ids"]} for s, t in zip(sources, targets, strict=True)]
    check(lambda: tiny(name, decoder_start_token_id=0), samples)

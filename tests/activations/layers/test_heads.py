"""What counts as a model's head, and whether it is trained whole."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from evatune.activations.layers.heads import find_heads

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"vocab_size": 60}
IMAGE = SIZES | {"image_size": 32, "patch_size": 8, "num_labels": 3}
SEGFORMER = {
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "num_attention_heads": [1, 2],
    "num_encoder_blocks": 2,
    "sr_ratios": [2, 1],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
}
SPEECH = SIZES | {
    "vocab_size": 32,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 8,
}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
CASES = [
    ("LlamaForCausalLM", "LlamaConfig", TEXT, {"lm_head": False}),
    ("LlamaForSequenceClassification", "LlamaConfig", TEXT, {"score": True}),
    ("BertModel", "BertConfig", TEXT, {}),
    ("BertForMaskedLM", "BertConfig", TEXT, {"cls.predictions.decoder": False}),
    ("BertForSequenceClassification", "BertConfig", TEXT, {"classifier": True}),
    ("BertForTokenClassification", "BertConfig", TEXT, {"classifier": True}),
    ("BertForQuestionAnswering", "BertConfig", TEXT, {"qa_outputs": True}),
    ("BertForNextSentencePrediction", "BertConfig", TEXT, {"cls": True}),
    ("RobertaForSequenceClassification", "RobertaConfig", TEXT, {"classifier": True}),
    ("T5ForConditionalGeneration", "T5Config", T5, {"lm_head": False}),
    ("T5ForSequenceClassification", "T5Config", T5, {"classification_head": True}),
    ("ViTForImageClassification", "ViTConfig", IMAGE, {"classifier": True}),
    ("SegformerForSemanticSegmentation", "SegformerConfig", SEGFORMER, {"decode_head": True}),
    ("Wav2Vec2ForCTC", "Wav2Vec2Config", SPEECH, {"lm_head": True}),
    ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", SPEECH, {"projector": True, "classifier": True}),
    ("CLIPForImageClassification", "CLIPConfig", {"vision_config": IMAGE, "text_config": TEXT}, {"classifier": True}),
    ("CLIPModel", "CLIPConfig", {"vision_config": IMAGE, "text_config": TEXT}, {}),
]


@pytest.mark.parametrize(
    ("cls", "config", "settings", "heads"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_heads_of_transformers_classes(cls, config, settings, heads):
    model = getattr(transformers, cls)(getattr(transformers, config)(**settings))
    assert find_heads(model) == heads


class Plain(nn.Module):
    def __init__(self, **children):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.deep = nn.ModuleDict({"classifier": nn.Linear(8, 8)})
        for name, child in children.items():
            setattr(self, name, child)


def test_plain_modules_have_the_heads_that_libraries_name():
    assert find_heads(Plain()) == {}
    assert find_heads(Plain(classifier=nn.Linear(8, 3))) == {"classifier": True}
    assert find_heads(Plain(score=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)))) == {"score": True}
    assert find_heads(Plain(last=nn.Linear(8, 3))) == {}


def test_a_model_may_name_its_classifier():
    model = Plain(last=nn.Linear(8, 3), classifier=nn.Identity())
    model.get_classifier = lambda: model.last
    assert find_heads(model) == {"last": True}


def test_lists_of_heads_are_named_one_by_one():
    assert find_heads(Plain(classifier=nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 3)]))) == {
        "classifier.0": True,
        "classifier.1": True,
    }


def test_a_head_is_found_inside_compiled_parts():
    model = Plain(classifier=torch.compile(nn.Linear(8, 3), backend="eager"))
    assert find_heads(model) == {"classifier": True}

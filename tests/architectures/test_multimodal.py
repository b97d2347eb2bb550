"""Two kinds of input in one model: each has its own positions, and a mask of one says nothing of the other."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.slow

TOWERS: dict[str, dict] = {
    "CLIPModel": {},
    "AltCLIPModel": {},
    "ChineseCLIPModel": {},
    "BlipModel": {},
    "MetaClip2Model": {},
    "OwlViTModel": {},
    "FlavaModel": {},
}
# What these calls never reach: cross-attention, and projections for a loss.
NOT_REACHED = {"BlipModel": r".*\.crossattention\..*", "FlavaModel": r"(image|text)_projection"}
INSERTED: dict[str, tuple[int, dict]] = {
    "LlavaForConditionalGeneration": (16, {"image_token_index": 98}),
    "VipLlavaForConditionalGeneration": (16, {"image_token_index": 98, "vision_feature_layers": [-1, -2]}),
    "Gemma3ForConditionalGeneration": (4, {"image_token_index": 98, "mm_tokens_per_image": 4}),
    "AyaVisionForConditionalGeneration": (4, {"image_token_index": 98}),
}


@pytest.fixture
def captioned(images, texts):
    """Return a function that makes texts with images, each a batch of one."""

    def make(*, lengths=(4, 18), n_placeholders=0):
        samples = []
        for text, image in zip(texts(lengths=lengths), images(3, 16, 16), strict=True):
            placeholders = torch.full((1, n_placeholders), 98)
            ids = torch.cat([placeholders, text["input_ids"]], dim=1)
            samples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": image})
        return samples

    return make


@pytest.mark.parametrize("name", TOWERS)
def test_two_towers(name, tiny, captioned, check):
    """The longest text has as many tokens as the image has patches and a class token."""
    check(lambda: tiny(name, **TOWERS[name]), captioned(), unreached=NOT_REACHED.get(name))


def test_texts_of_one_length(tiny, captioned, check):
    """SigLIP takes the last position for the text, so its texts have no padding."""
    # PEFT's "all-linear" would wrap the output projection of an attention module, which is never called, alone.
    peft = {"exclude_modules": ["out_proj"]}
    check(lambda: tiny("SiglipModel"), captioned(lengths=(16, 17)), peft=peft)


@pytest.mark.parametrize("name", INSERTED)
def test_image_among_the_tokens(name, tiny, captioned, check):
    n_placeholders, settings = INSERTED[name]
    check(lambda: tiny(name, **settings), captioned(n_placeholders=n_placeholders))


def test_captions_from_cross_attention(tiny, captioned, check):
    # The head is tied to the embedding, which merging an adapter into it would change too.
    peft = {"exclude_modules": ["predictions.decoder"]}
    check(lambda: tiny("BlipForConditionalGeneration"), captioned(), peft=peft)


def test_image_before_the_text(tiny, captioned, check):
    check(lambda: tiny("GitForCausalLM"), captioned(), may_say=True)


def test_text_and_image_in_one_sequence(tiny, captioned, check):
    check(lambda: tiny("ViltModel"), captioned(), may_say=True)


@pytest.mark.parametrize("lengths", [(4, 13), (4, 7)])
def test_text_and_regions_in_one_sequence(lengths, tiny, texts, images, check):
    """VisualBERT: both have padding, and the longest text may have as many tokens as the image has regions."""
    samples = []
    for number, (text, regions) in enumerate(zip(texts(lengths=lengths), images(6, 32), strict=True)):
        seen = regions[:, : 3 + number % 4]
        samples.append({**text, "visual_embeds": seen, "visual_attention_mask": torch.ones(seen.shape[:2]).long()})
    check(lambda: tiny("VisualBertModel", visual_embedding_dim=32), samples)


def test_text_and_regions_in_cross_attention(tiny, texts, images, check):
    samples = [
        {**text, "visual_feats": regions, "visual_pos": regions[..., :4].sigmoid()}
        for text, regions in zip(texts(), images(5, 32), strict=True)
    ]
    sizes = {"visual_feat_dim": 32, "l_layers": 1, "x_layers": 1, "r_layers": 1}
    check(lambda: tiny("LxmertModel", **sizes), samples)


def test_patches_of_many_images(tiny, texts, check):
    """The patches of all images of a batch are the rows of one matrix."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for text in texts(lengths=(8, 14)):
        ids = text["input_ids"].clone()
        ids[:, 0], ids[:, 1:5] = 97, 98
        patches = torch.randn(16, 3 * 2 * 16, generator=generator)
        grid = torch.tensor([[1, 4, 4]])
        kinds = (ids == 98).int()
        samples.append({**text, "input_ids": ids, "pixel_values": patches, "image_grid_thw": grid})
        samples[-1]["mm_token_type_ids"] = kinds
    vision = {"depth": 2, "out_hidden_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision["deepstack_visual_indexes"] = [0]
    settings = {"image_token_id": 98, "vision_start_token_id": 97, "vision_config": vision}

    def collate(batch):
        pixels = torch.cat([sample["pixel_values"] for sample in batch])
        longest = max(sample["input_ids"].shape[1] for sample in batch)
        joined = {"pixel_values": pixels, "image_grid_thw": torch.cat([s["image_grid_thw"] for s in batch])}
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            rows = [torch.nn.functional.pad(s[name], (0, longest - s[name].shape[1])) for s in batch]
            joined[name] = torch.cat(rows)
        return joined

    check(lambda: tiny("Qwen3VLForConditionalGeneration", **settings), samples, collate=collate)

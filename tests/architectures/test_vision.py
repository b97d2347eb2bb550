"""Images and videos: every row counts, but those of padded patches."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.slow

SMALL_STAGES = {"depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
IMAGES: dict[str, dict] = {
    "ViTForImageClassification": {},
    "DeiTForImageClassification": {},
    "BeitForImageClassification": {},
    "SwinForImageClassification": {**SMALL_STAGES, "patch_size": 2},
    "Swinv2ForImageClassification": {**SMALL_STAGES, "patch_size": 2},
    "ConvNextForImageClassification": {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2},
    "Dinov2ForImageClassification": {},
    "Dinov2WithRegistersForImageClassification": {},
    "FocalNetForImageClassification": {"depths": [1, 1], "embed_dim": 16},
    "SiglipForImageClassification": {},
    "CLIPForImageClassification": {},
    "ViTMSNForImageClassification": {},
    "YolosModel": {"num_detection_tokens": 5},
    "DINOv3ViTModel": {},
    "VitDetModel": {},
    "PixtralVisionModel": {},
    "Aimv2VisionModel": {},
    "SamVisionModel": {},
    "MLCDVisionModel": {},
    "DPTModel": {},
    "SegformerForSemanticSegmentation": {
        "depths": [1, 1],
        "hidden_sizes": [8, 16],
        "num_attention_heads": [1, 2],
        "num_encoder_blocks": 2,
        "sr_ratios": [2, 1],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 16,
    },
    "PvtV2ForImageClassification": {
        "depths": [1, 1],
        "hidden_sizes": [8, 16],
        "num_attention_heads": [1, 2],
        "num_encoder_blocks": 2,
        "sr_ratios": [2, 1],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "mlp_ratios": [2, 2],
    },
}
VIDEOS: dict[str, dict] = {
    "TimesformerForVideoClassification": {"num_frames": 4},
    "VideoMAEForVideoClassification": {"num_frames": 4},
    "VivitForVideoClassification": {"num_frames": 4},
}


@pytest.mark.parametrize("name", IMAGES)
def test_image(name, tiny, images, check):
    samples = [{"pixel_values": image} for image in images(3, 16, 16)]
    check(lambda: tiny(name, **IMAGES[name]), samples, together=True)


@pytest.mark.parametrize("name", VIDEOS)
def test_video(name, tiny, images, check):
    samples = [{"pixel_values": video} for video in images(4, 3, 16, 16)]
    check(lambda: tiny(name, **VIDEOS[name]), samples, together=True)


def test_images_as_tokens(tiny, texts, check):
    samples = [{"input_ids": text["input_ids"]} for text in texts(lengths=(16, 17))]
    check(lambda: tiny("ImageGPTForImageClassification"), samples)


def test_images_of_several_sizes(tiny, check):
    """SigLIP 2 takes images as sequences of patches, padded to the largest."""
    generator, samples = torch.Generator().manual_seed(0), []
    for number in range(12):
        height, width = [(2, 3), (3, 3), (2, 2), (4, 2)][number % 4]
        patches = torch.randn(1, height * width, 3 * 4 * 4, generator=generator)
        mask, shape = torch.ones(patches.shape[:2]).long(), torch.tensor([[height, width]])
        samples.append({"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shape})
    # PEFT's "all-linear" would wrap the output projection of an attention module, which is never called, alone.
    check(lambda: tiny("Siglip2VisionModel", num_patches=16), samples, peft={"exclude_modules": ["out_proj"]})

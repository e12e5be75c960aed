"""The configurations of the public base models: what a dry run needs of them, without a download.

Facts, as constants: sizes of networks, autoencoders, text encoders and the schedules, as the
repositories of their makers have them. `open_folder` writes them out in diffusers' layout, without
weights and vocabularies, so that they are opened like any other folder. Numbers of weights follow
from them, and the tests compare these with the published ones.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

PLAN = ".without-weights"  # a file that such a folder is known by
CLIP_TOKENS = 77

# ---- the networks that are trained ----

_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "sd3-medium": {
        **_MEDIUM,
        "pos_embed_max_size": 192,
        "dual_attention_layers": [],
        "qk_norm": None,
    },
    "sd35-medium": _MEDIUM,
    "sd35-large": {
        **_MEDIUM,
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "dual_attention_layers": [],
    },
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "attention_head_dim": 8,  # heads, not their width
        "cross_attention_dim": 768,
        "norm_num_groups": 32,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "norm_num_groups": 32,
    },
}

# SDXL's, with a projection of ChatGLM's numbers before it.
UNETS["kolors"] = {
    **UNETS["sdxl"],
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "projection_class_embeddings_input_dim": 5632,
}

# Of every version; v1.0 and v1.1 are also told a style and the pictures' sizes.
HUNYUANDIT: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1408,
    "num_layers": 40,
    "num_attention_heads": 16,
    "attention_head_dim": 88,
    "mlp_ratio": 4.3637,
    "activation_fn": "gelu-approximate",
    "norm_type": "layer_norm",
    "learn_sigma": True,
    "cross_attention_dim": 1024,
    "cross_attention_dim_t5": 2048,
    "pooled_projection_dim": 1024,
    "text_len": 77,
    "text_len_t5": 256,
    "use_style_cond_and_image_meta_size": False,
}
# Where its schedule ends, by whether it is told them.
HUNYUANDIT_BETA_END = {False: 0.018, True: 0.03}

# ---- what stands beside them ----

VAE_SIZES: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
_LATENTS_16: dict[str, Any] = {
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}
VAES: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 512, "scaling_factor": 0.18215},
    "sdxl": {"sample_size": 1024, "scaling_factor": 0.13025},
    "kolors": {"sample_size": 1024, "scaling_factor": 0.13025},
    "hunyuandit": {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": False},
    **dict.fromkeys(TRANSFORMERS, _LATENTS_16),
}


@dataclass(frozen=True)
class Clip:
    """The sizes of a CLIP."""

    hidden: int
    layers: int
    projection: int
    activation: str

    def config(self, **more: Any) -> dict[str, Any]:
        """For transformers' `CLIPTextConfig`."""
        return {
            "vocab_size": 49_408,
            "hidden_size": self.hidden,
            "intermediate_size": 4 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(1, self.hidden // 64),
            "max_position_embeddings": CLIP_TOKENS,
            "hidden_act": self.activation,
            "projection_dim": self.projection,
            "bos_token_id": 0,
            "eos_token_id": 2,  # not the real one: transformers takes the first of the largest then
            "pad_token_id": 1,
            **more,
        }


CLIP_L = Clip(768, 12, 768, "quick_gelu")
CLIP_H = Clip(1024, 23, 512, "gelu")  # its 24th layer is not read
CLIP_G = Clip(1280, 32, 1280, "gelu")
_T5_XXL: dict[str, Any] = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "vocab_size": 32_128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10_240,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
# The text tower of Hunyuan-DiT's bilingual CLIP, and the encoder of mT5-XL.
_BERT: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 47_020,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
_MT5_XL: dict[str, Any] = {
    **_T5_XXL,
    "vocab_size": 250_112,
    "d_model": 2048,
    "d_ff": 5120,
    "num_heads": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
# ChatGLM3-6B's.
_CHATGLM: dict[str, Any] = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "padded_vocab_size": 65_024,
    "num_layers": 28,
    "hidden_size": 4096,
    "ffn_hidden_size": 13_696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "original_rope": True,
    "seq_length": 8192,
}

BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


# ---- whole models ----


@dataclass(frozen=True)
class Published:
    """A public base model without its weights."""

    name: str
    """the short one, which a dry run takes too"""
    title: str
    hub_ids: tuple[str, ...]
    """where its weights are; the first is the maker's own, or today's home"""
    index: Mapping[str, Any]
    """model_index.json"""
    parts: Mapping[str, Mapping[str, Any]] = field(repr=False)
    """configurations by folder"""
    variant: str | None = None
    """that of the weights, where there are no others"""


def _named(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"_class_name": kind, **config}


def _clip(clip: Clip, kind: str) -> dict[str, Any]:
    return clip.config(architectures=[kind], model_type="clip_text_model")


_PROJECTED, _PLAIN = "CLIPTextModelWithProjection", "CLIPTextModel"


def _parts(name: str) -> dict[str, dict[str, Any]]:
    """The configurations of a model, by folder."""
    vae = _named("AutoencoderKL", {**VAE_SIZES, **VAES[name]})
    blocks = len(VAE_SIZES["block_out_channels"])
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * blocks}
    vae |= {"up_block_types": ["UpDecoderBlock2D"] * blocks}
    vae.setdefault("latent_channels", 4)
    if name in TRANSFORMERS:
        return {
            "transformer": _named("SD3Transformer2DModel", TRANSFORMERS[name]),
            "vae": vae,
            "text_encoder": _clip(CLIP_L, _PROJECTED),
            "text_encoder_2": _clip(CLIP_G, _PROJECTED),
            "text_encoder_3": _T5_XXL,
            "scheduler": _named(
                "FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": 3.0}
            ),
        }
    if name == "hunyuandit":
        end = HUNYUANDIT_BETA_END[HUNYUANDIT["use_style_cond_and_image_meta_size"]]
        more = {"prediction_type": "v_prediction", "clip_sample": False, "beta_end": end}
        return {
            "transformer": _named("HunyuanDiT2DModel", HUNYUANDIT),
            "vae": vae,
            "text_encoder": _BERT,
            "text_encoder_2": _MT5_XL,
            "scheduler": _named("DDPMScheduler", {**BETAS, **more}),
        }
    unet = {"in_channels": 4, "out_channels": 4, **UNETS[name]}
    parts = {
        "unet": _named("UNet2DConditionModel", unet),
        "vae": vae,
        "text_encoder": _CHATGLM if name == "kolors" else _clip(CLIP_L, _PLAIN),
    }
    if name == "kolors":
        longer = {**BETAS, "beta_end": 0.014, "num_train_timesteps": 1100}
        parts["scheduler"] = _named("EulerDiscreteScheduler", longer)
    elif name == "sdxl":
        parts["text_encoder_2"] = _clip(CLIP_G, _PROJECTED)
        parts["scheduler"] = _named("EulerDiscreteScheduler", BETAS)
    else:
        more = {"set_alpha_to_one": False, "skip_prk_steps": True, "clip_sample": False}
        parts["scheduler"] = _named("PNDMScheduler", {**BETAS, **more})
    return parts


# By an encoder's model_type.
_TOKENIZERS = {
    "t5": ("transformers", "T5Tokenizer"),
    "bert": ("transformers", "BertTokenizer"),
    "chatglm": ("kolors", "ChatGLMTokenizer"),
}


def _published(
    name: str, title: str, pipeline: str, *hub_ids: str, variant: str | None = None
) -> Published:
    parts = _parts(name)
    index: dict[str, Any] = {"_class_name": pipeline}
    for part, config in parts.items():
        if "_class_name" in config:
            index[part] = ["diffusers", config["_class_name"]]
            continue
        kind = config["model_type"]
        library, tokenizer = _TOKENIZERS.get(kind, ("transformers", "CLIPTokenizer"))
        index[part] = [library, config["architectures"][0]]
        index[part.replace("text_encoder", "tokenizer")] = [library, tokenizer]
    return Published(name, title, hub_ids, index, parts, variant)


_SD3 = "StableDiffusion3Pipeline"
MODELS = {
    one.name: one
    for one in (
        _published(
            *("sd15", "SD1.5", "StableDiffusionPipeline"),
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "runwayml/stable-diffusion-v1-5",
        ),
        _published(
            *("sdxl", "SDXL", "StableDiffusionXLPipeline"),
            "stabilityai/stable-diffusion-xl-base-1.0",
        ),
        _published(
            *("kolors", "Kolors", "KolorsPipeline", "Kwai-Kolors/Kolors-diffusers"), variant="fp16"
        ),
        _published(
            *("hunyuandit", "Hunyuan-DiT v1.2", "HunyuanDiTPipeline"),
            "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers",
        ),
        _published(
            *("sd3-medium", "SD3-Medium", _SD3), "stabilityai/stable-diffusion-3-medium-diffusers"
        ),
        _published(
            *("sd35-medium", "SD3.5-Medium", _SD3), "stabilityai/stable-diffusion-3.5-medium"
        ),
        _published(*("sd35-large", "SD3.5-Large", _SD3), "stabilityai/stable-diffusion-3.5-large"),
    )
}
"""The models that are known without a download, by their short names."""


def find(name: str) -> Published | None:
    """The model of a short name or hub id, in any case of its letters; None if it is not known."""
    word = name.lower()
    names = ({one.name, *map(str.lower, one.hub_ids)} for one in MODELS.values())
    return next((one for one, own in zip(MODELS.values(), names, strict=True) if word in own), None)


# ---- as folders ----

_planning: ContextVar[bool] = ContextVar("planning", default=False)


@contextmanager
def planning(on: bool = True) -> Iterator[None]:
    """For a while known models are opened by their configurations alone: nothing is downloaded."""
    before = _planning.set(on)
    try:
        yield
    finally:
        _planning.reset(before)


def planned_folder(name: str) -> Path | None:
    """Where the configurations of a known model lie while `planning`; else None."""
    found = find(name) if _planning.get() else None
    return None if found is None else open_folder(found.name)


def has_no_weights(folder: Path) -> bool:
    """Whether a folder is one of these: configurations without weights and vocabularies."""
    return (folder / PLAN).is_file()


def open_folder(name: str) -> Path:
    """A model's configurations in diffusers' layout, in a folder that goes with the process."""
    folder = Path(_room().name) / name
    if not folder.is_dir():
        _write(folder, MODELS[name])
    return folder


@cache
def _room() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="dojo-configurations-")


def _write(folder: Path, model: Published) -> None:
    folder.mkdir()
    (folder / PLAN).touch()
    _write_json(folder / "model_index.json", model.index)
    for part, config in model.parts.items():
        (folder / part).mkdir()
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        _write_json(folder / part / file, config)
        if part.startswith("text_encoder"):
            tokenizer = folder / part.replace("text_encoder", "tokenizer")
            tokenizer.mkdir()
            settings = {"model_max_length": 512 if "d_model" in config else CLIP_TOKENS}
            _write_json(tokenizer / "tokenizer_config.json", settings)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

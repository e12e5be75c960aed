"""The pocket models as untrained modules: real diffusers and transformers classes, small sizes.

Three things that are hard to change once the weights exist (each was a trap in practice):
configurations of the text encoders say float32, because transformers takes the dtype from there
while diffusers' own models default to float32; CLIP-L and CLIP-G differ in width and CLIP-L's
projection is the identity, because single-file loaders tell them apart by that; T5 sees 24, 77 and
256 tokens in training, because the pipeline pads to 256 without a mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dojo.lazy import diffusers, torch, transformers
from dojo.pocket import text

CLIP_L_WIDTH = 64
CLIP_G_WIDTH = 96
T5_WIDTH = 192  # at least the two CLIPs together: their states are zero-padded to it
SHIFT = 3.0  # the scheduler's, as in SD3.5


def vae(latent_channels: int = 16) -> diffusers.AutoencoderKL:
    """SD3's autoencoder in small: 8x down, 16 channels, no quant convolutions."""
    # diffusers annotates these as tuples of one.
    widths: Any = (16, 32, 64, 96)
    down: Any = ("DownEncoderBlock2D",) * 4
    up: Any = ("UpDecoderBlock2D",) * 4
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=latent_channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=down,
        up_block_types=up,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def transformer() -> diffusers.SD3Transformer2DModel:
    """SD3.5-Medium's MMDiT in small: patch 2, qk-norm, dual attention in the first two layers."""
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=192,
        pooled_projection_dim=CLIP_L_WIDTH + CLIP_G_WIDTH,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )


def _clip_text_config(
    width: int, layers: int, activation: str, pad_token: str
) -> transformers.CLIPTextConfig:
    tokenizer: Any = text.clip_tokenizer(pad_token)
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=text.CLIP_LENGTH,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def clip_l() -> transformers.CLIPTextModelWithProjection:
    """SD3's first text encoder; its projection is the identity and stays so."""
    model = transformers.CLIPTextModelWithProjection(
        _clip_text_config(CLIP_L_WIDTH, 2, "quick_gelu", "<|endoftext|>")
    )
    with torch.no_grad():
        model.text_projection.weight.copy_(torch.eye(CLIP_L_WIDTH))
    model.text_projection.requires_grad_(False)
    return model


def clip_g() -> transformers.CLIPTextModelWithProjection:
    """SD3's second text encoder, wider than the first."""
    return transformers.CLIPTextModelWithProjection(_clip_text_config(CLIP_G_WIDTH, 3, "gelu", "!"))


def t5() -> transformers.T5EncoderModel:
    """SD3's third text encoder."""
    tokenizer = text.t5_tokenizer()
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=32,
        d_ff=2 * T5_WIDTH,
        num_layers=2,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    return transformers.T5EncoderModel(config)


def sd3_pipeline() -> diffusers.StableDiffusion3Pipeline:
    """An untrained pocket SD3 with every component that SD3.5 has."""
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae(),
        text_encoder=clip_l(),
        tokenizer=text.clip_tokenizer(),
        text_encoder_2=clip_g(),
        tokenizer_2=text.clip_tokenizer("!"),
        text_encoder_3=t5(),
        tokenizer_3=text.t5_tokenizer(),
    )


# ---- Stable Diffusion 1.5 ----

# The scheduler configuration of Stable Diffusion 1.5.
DDPM: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def sd15_vae() -> diffusers.AutoencoderKL:
    """SD1.5's autoencoder in small: 8x down, 4 channels, quant convolutions, no shift."""
    config = {**vae(4).config, "use_quant_conv": True, "use_post_quant_conv": True}
    made: Any = diffusers.AutoencoderKL.from_config({**config, "shift_factor": None})
    return made


def unet(**options: Any) -> diffusers.UNet2DConditionModel:
    """SD1.5's UNet in small: two levels, attention to the caption in the upper and the middle.

    Args:
        options: further options of UNet2DConditionModel, or other values of these.
    """
    down: Any = ("CrossAttnDownBlock2D", "DownBlock2D")
    up: Any = ("UpBlock2D", "CrossAttnUpBlock2D")
    widths: Any = (64, 80)
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": widths,
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": CLIP_L_WIDTH,
        "attention_head_dim": 4,  # which is the number of heads, as in SD1.5
        "norm_num_groups": 8,
    }
    return diffusers.UNet2DConditionModel(**{**config, **options})


def sd15_text_encoder() -> transformers.CLIPTextModel:
    """SD1.5's text encoder: the first of SD3's, as in the real models, without its projection."""
    return transformers.CLIPTextModel(
        _clip_text_config(CLIP_L_WIDTH, 2, "quick_gelu", "<|endoftext|>")
    )


def sd15_pipeline() -> diffusers.StableDiffusionPipeline:
    """An untrained pocket SD1.5."""
    scheduler: Any = diffusers.PNDMScheduler(**DDPM)
    return diffusers.StableDiffusionPipeline(
        unet=unet(),
        scheduler=scheduler,
        vae=sd15_vae(),
        text_encoder=sd15_text_encoder(),
        tokenizer=text.clip_tokenizer(),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


# ---- Stable Diffusion XL ----

_EULER = {key: DDPM[key] for key in DDPM if key not in ("set_alpha_to_one", "skip_prk_steps")}
TIME_ID_WIDTH = 32  # numbers by which the UNet is told each of the six sizes and offsets


def sdxl_unet() -> diffusers.UNet2DConditionModel:
    """SDXL's UNet with the levels of pocket-sd15's: text and sizes beside the time, linear
    projections around the attention."""
    return unet(
        cross_attention_dim=CLIP_L_WIDTH + CLIP_G_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=CLIP_G_WIDTH + 6 * TIME_ID_WIDTH,
    )


def sdxl_pipeline() -> diffusers.StableDiffusionXLPipeline:
    """An untrained pocket SDXL, with SDXL's scheduler and zeros for an empty prompt."""
    scheduler: Any = diffusers.EulerDiscreteScheduler(**_EULER, timestep_spacing="leading")
    return diffusers.StableDiffusionXLPipeline(
        unet=sdxl_unet(),
        scheduler=scheduler,
        vae=sd15_vae(),
        text_encoder=sd15_text_encoder(),
        tokenizer=text.clip_tokenizer(),
        text_encoder_2=clip_g(),
        tokenizer_2=text.clip_tokenizer("!"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


# ---- Kolors ----

GLM_WIDTH = 48
KOLORS_WIDTH = 40  # of what the UNet makes of ChatGLM's rows, which in Kolors too is narrower

# The scheduler configuration of Kolors: SDXL's, with a hundred more timesteps at the noisy end.
KOLORS: dict[str, Any] = {"beta_end": 0.014, "num_train_timesteps": 1100}


def glm(tokenizer: Any) -> Any:
    """ChatGLM3 in small: three layers, rotary positions, one group of keys for two heads.

    Args:
        tokenizer: of `text.glm_tokenizer`.
    """
    from diffusers.pipelines.kolors import ChatGLMModel

    kind: Any = ChatGLMModel
    model = kind(
        kind.config_class(
            num_layers=3,
            padded_vocab_size=tokenizer.vocab_size,
            hidden_size=GLM_WIDTH,
            ffn_hidden_size=64,
            kv_channels=24,
            num_attention_heads=2,
            seq_length=512,
            multi_query_attention=True,
            multi_query_group_num=1,
            add_qkv_bias=True,
            original_rope=True,  # asked for, though it has no default
            architectures=["ChatGLMModel"],
            dtype="float32",
        ),
        empty_init=False,
    )
    for name, param in model.named_parameters():  # the class leaves some as the memory was
        if "layernorm" in name:
            torch.nn.init.ones_(param)
        elif param.dim() == 1:
            torch.nn.init.zeros_(param)
        else:
            torch.nn.init.normal_(param, std=1.0 if "embedding" in name else param.shape[1] ** -0.5)
    torch.nn.init.zeros_(model.output_layer.weight)  # of the next token, which nothing asks for
    return model


def kolors_unet() -> diffusers.UNet2DConditionModel:
    """Kolors' UNet: SDXL's behind a projection of the text."""
    return unet(
        cross_attention_dim=KOLORS_WIDTH,
        encoder_hid_dim=GLM_WIDTH,
        encoder_hid_dim_type="text_proj",
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=GLM_WIDTH + 6 * TIME_ID_WIDTH,
    )


def kolors_pipeline(folder: Path) -> Any:
    """An untrained pocket Kolors.

    Args:
        folder: receives the tokenizer's file, which its class reads from a disk.
    """
    from diffusers import KolorsPipeline

    tokenizer = text.glm_tokenizer(folder)
    scheduler: Any = diffusers.EulerDiscreteScheduler(**_EULER | KOLORS, timestep_spacing="leading")
    return KolorsPipeline(
        unet=kolors_unet(),
        scheduler=scheduler,
        vae=sd15_vae(),
        text_encoder=glm(tokenizer),
        tokenizer=tokenizer,
        force_zeros_for_empty_prompt=False,
    )


# ---- CLIP ----


def clip() -> transformers.CLIPModel:
    """A two-tower CLIP for 64-pixel pictures, to be trained contrastively."""
    text_config = _clip_text_config(128, 3, "quick_gelu", "<|endoftext|>")
    vision_config = transformers.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        projection_dim=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        hidden_act="quick_gelu",
    )
    config = transformers.CLIPConfig(
        text_config=text_config.to_dict(),
        vision_config=vision_config.to_dict(),
        projection_dim=128,
        dtype="float32",
    )
    return transformers.CLIPModel(config)

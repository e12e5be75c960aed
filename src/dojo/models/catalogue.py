"""The public models, and the data sets beside them, that `dojo.download` fetches."""

from dataclasses import dataclass
from typing import Literal

SEE_PAGE = "see its page (none was found stated)"


@dataclass(frozen=True)
class File:
    """A file to fetch, known by its content where its home tells."""

    name: str
    size: int | None = None  # bytes
    # "sha256:..." of the content, or its beginning; or "git:...", git's own hash of it, for what
    # is not in LFS.
    checksum: str | None = None


@dataclass(frozen=True)
class Entry:
    """One thing that can be fetched."""

    name: str
    what: str
    kind: Literal["model", "dataset", "github", "web"]
    repo: str  # of the web: host and path above the files
    folder: str
    licence: str
    # Patterns of file names; `*` also crosses folders, as on the hub.
    allow: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    modelscope: str | None = None
    # What is not taken from there beside the above.
    modelscope_ignore: tuple[str, ...] = ("*.bin",)
    gated: bool = False
    size: int | None = None  # bytes, as the hub listed it; None: asked when needed
    files: tuple[File, ...] = ()

    @property
    def on_hub(self) -> bool:
        """Whether a hub lists its files; of others they stand here."""
        return self.kind in ("model", "dataset")


# Weights in formats that nothing here reads, and half-precision copies of what is there in full.
OTHER_FORMATS = ("*.msgpack", "*.h5", "*.ckpt", "*.onnx", "*.onnx_data", "*openvino*", "*fp16*")
# The licence is the one that the page or the repository states; sizes without a hub are from the
# hub's own file listings.
ENTRIES = (
    Entry(
        name="sd35-medium",
        what="Stable Diffusion 3.5 Medium, diffusers layout",
        kind="model",
        repo="stabilityai/stable-diffusion-3.5-medium",
        folder="models/stable-diffusion-3.5-medium",
        licence="Stability AI Community License (free below 1 M USD yearly revenue)",
        # Folder by folder: the root also holds the whole model once more as single files.
        allow=(
            "model_index.json",
            "LICENSE*",
            "README.md",
            "scheduler/*",
            "text_encoder/*",
            "text_encoder_2/*",
            "text_encoder_3/*",
            "tokenizer/*",
            "tokenizer_2/*",
            "tokenizer_3/*",
            "transformer/*",
            "vae/*",
        ),
        ignore=OTHER_FORMATS,
        modelscope="AI-ModelScope/stable-diffusion-3.5-medium",
        gated=True,
    ),
    Entry(
        name="sd15",
        what="Stable Diffusion 1.5, diffusers layout",
        kind="model",
        repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
        folder="models/stable-diffusion-v1-5",
        licence="CreativeML OpenRAIL-M",
        # The safety checker stays: a plain from_pretrained asks for it.
        allow=(
            "model_index.json",
            "README.md",
            "feature_extractor/*",
            "safety_checker/*",
            "scheduler/*",
            "text_encoder/*",
            "tokenizer/*",
            "unet/*",
            "vae/*",
        ),
        ignore=(*OTHER_FORMATS, "*non_ema*"),
        modelscope="AI-ModelScope/stable-diffusion-v1-5",
    ),
    Entry(
        name="sdxl",
        what="Stable Diffusion XL base 1.0, diffusers layout",
        kind="model",
        repo="stabilityai/stable-diffusion-xl-base-1.0",
        folder="models/stable-diffusion-xl-base-1.0",
        licence="CreativeML Open RAIL++-M",
        # Folder by folder: the root also holds the whole model once more as single files, and
        # beside vae/ lie further autoencoders.
        allow=(
            "model_index.json",
            "LICENSE*",
            "README.md",
            "scheduler/*",
            "text_encoder/*",
            "text_encoder_2/*",
            "tokenizer/*",
            "tokenizer_2/*",
            "unet/*",
            "vae/*",
        ),
        ignore=(*OTHER_FORMATS, "*.bin", "*flax*"),
        modelscope="AI-ModelScope/stable-diffusion-xl-base-1.0",
    ),
    Entry(
        name="sdxl-vae-fp16-fix",
        what="SDXL's autoencoder, tuned so that it does not overflow in fp16",
        kind="model",
        repo="madebyollin/sdxl-vae-fp16-fix",
        folder="models/sdxl-vae-fp16-fix",
        licence=SEE_PAGE,
        allow=("README.md", "config.json", "diffusion_pytorch_model.safetensors"),
        modelscope="AI-ModelScope/sdxl-vae-fp16-fix",
    ),
    Entry(
        name="kolors",
        what="Kolors with ChatGLM3, in half precision; from ModelScope in its authors' layout",
        kind="model",
        repo="Kwai-Kolors/Kolors-diffusers",
        folder="models/Kolors",
        licence="Kolors' own, free for research; commercial use after a registration, see its page",
        # No other weights than those of the variant fp16 are on the hub. ModelScope's text encoder
        # is a pickle, and the tokenizer lies beside it.
        allow=(
            "model_index.json",
            "LICENSE*",
            "MODEL_LICENSE*",
            "README.md",
            "scheduler/*",
            "text_encoder/*",
            "tokenizer/*",
            "unet/*",
            "vae/*",
        ),
        ignore=(*(one for one in OTHER_FORMATS if one != "*fp16*"), "*.py"),
        modelscope="Kwai-Kolors/Kolors",
        modelscope_ignore=(
            *("unet/*.bin", "vae/*.bin"),
            *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")),
        ),
    ),
    Entry(
        name="hunyuandit",
        what="Hunyuan-DiT v1.2, diffusers' layout; from ModelScope an earlier one, Tencent's",
        kind="model",
        repo="Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers",
        folder="models/HunyuanDiT",
        licence="Tencent Hunyuan Community License, see its page (not for the EU)",
        allow=(
            "model_index.json",
            "LICENSE*",
            "README.md",
            "scheduler/*",
            "text_encoder/*",
            "text_encoder_2/*",
            "tokenizer/*",
            "tokenizer_2/*",
            "transformer/*",
            "vae/*",
            *(f"t2i/{part}/*" for part in ("clip_text_encoder", "mt5", "sdxl-vae-fp16-fix")),
            "t2i/tokenizer/*",
            "t2i/model/pytorch_model_ema.pt",
        ),
        # There "fp16" is in the name of the autoencoder's folder.
        ignore=(*(one for one in OTHER_FORMATS if one != "*fp16*"), "*.fp16.*"),
        modelscope="modelscope/HunyuanDiT",
        modelscope_ignore=(),  # its weights are pickles
    ),
    Entry(
        name="clip-vit-l-14",
        what="CLIP ViT-L/14, the backbone of the aesthetic heads",
        kind="model",
        repo="openai/clip-vit-large-patch14",
        folder="models/clip-vit-large-patch14",
        licence=f"{SEE_PAGE}; OpenAI's code of CLIP is MIT",
        ignore=OTHER_FORMATS,
        modelscope="AI-ModelScope/clip-vit-large-patch14",
    ),
    Entry(
        name="aesthetics-predictor-v1",
        what="LAION's first aesthetic predictor: CLIP ViT-L/14 and a linear head",
        kind="model",
        repo="shunk031/aesthetics-predictor-v1-vit-large-patch14",
        folder="models/aesthetics-predictor-v1-vit-large-patch14",
        licence=SEE_PAGE,
        # Its code is not fetched: the weights are read without running anything from the hub.
        ignore=(*OTHER_FORMATS, "*.py"),
    ),
    Entry(
        name="improved-aesthetic-heads",
        what="the heads of the improved aesthetic predictor, to be used with clip-vit-l-14",
        kind="github",
        repo="christophschuhmann/improved-aesthetic-predictor",
        folder="models/improved-aesthetic-predictor",
        licence="Apache-2.0",
        size=11_144_405,
        files=(
            File(
                "sac+logos+ava1-l14-linearMSE.pth",
                3_714_759,
                "sha256:21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
            ),
            File(
                "ava+logos-l14-linearMSE.pth",
                3_714_759,
                "sha256:390a3aafaf3b37d57148f9b22f30556de38343064b7d915acfa80d3812b4c9ff",
            ),
            File(
                "ava+logos-l14-reluMSE.pth",
                3_714_887,
                "sha256:0af3254c651d55b7ea851429c20f26ec880bb0169805a4df85b814bd7966f3e4",
            ),
        ),
    ),
    Entry(
        name="pickscore",
        what="PickScore v1, the reward pickscore: a CLIP ViT-H/14 tuned on preferences",
        kind="model",
        repo="yuvalkirstain/PickScore_v1",
        folder="models/PickScore_v1",
        licence=f"{SEE_PAGE}; its code is MIT",
        ignore=OTHER_FORMATS,
    ),
    Entry(
        name="hpsv2.1",
        what="HPS v2.1, the reward hpsv2.1: a CLIP ViT-H/14 tuned on preferences",
        kind="model",
        repo="xswu/HPSv2",
        folder="models/HPSv2",
        licence="Apache-2.0",
        # Beside it lie version 2.0 and a file of 8 GB with the optimizer's state.
        allow=("HPS_v2.1_compressed.pt",),
    ),
    Entry(
        name="imagereward",
        what="ImageReward v1, the reward imagereward; it needs bert-tokenizer too",
        kind="model",
        repo="THUDM/ImageReward",
        folder="models/ImageReward",
        licence="Apache-2.0",
        allow=("ImageReward.pt",),
    ),
    Entry(
        name="bert-tokenizer",
        what="the tokenizer of ImageReward, without BERT's weights",
        kind="model",
        repo="google-bert/bert-base-uncased",
        folder="models/bert-base-uncased",
        licence="Apache-2.0",
        allow=("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    ),
    Entry(
        name="geneval-detector",
        what="the Mask2Former (Swin-S, COCO) of the reward geneval; it needs clip-vit-l-14 too",
        kind="web",
        repo="download.openmmlab.com/mmdetection/v2.0/mask2former/"
        "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco",
        folder="models/mask2former",
        licence="Apache-2.0",
        files=(
            File(  # OpenMMLab ends a name with the beginning of the content's hash
                "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
                checksum="sha256:743b7d99",
            ),
        ),
    ),
    Entry(
        name="hpsv3",
        what="HPS v3, the reward hpsv3, a tuned Qwen2-VL-7B; it needs qwen2-vl-tokenizer too",
        kind="model",
        repo="MizzenAI/HPSv3",
        folder="models/HPSv3",
        licence="MIT",
        allow=("HPSv3.safetensors",),
    ),
    Entry(
        name="qwen2-vl-tokenizer",
        what="configuration and tokenizer of HPS v3, without Qwen2-VL's weights",
        kind="model",
        repo="Qwen/Qwen2-VL-7B-Instruct",
        folder="models/Qwen2-VL-7B-Instruct",
        licence="Apache-2.0",
        allow=(
            "config.json",
            "merges.txt",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.json",
        ),
    ),
    Entry(
        name="dog-example",
        what="five photographs of one dog, for DreamBooth",
        kind="dataset",
        repo="diffusers/dog-example",
        folder="datas/dog-example",
        licence=f"{SEE_PAGE}; the file names say Alvan Nee, Unsplash",
        ignore=(".gitattributes",),
        size=5_600_000,
    ),
    Entry(
        name="pokemon",
        what="833 captioned Pokemon pictures (columns image, en_text, zh_text)",
        kind="dataset",
        repo="svjack/pokemon-blip-captions-en-zh",
        folder="datas/pokemon-blip-captions",
        licence="CC BY-NC-SA 4.0 as its page says; the figures are a registered brand",
        ignore=(".gitattributes",),
        size=99_700_000,
    ),
    Entry(
        name="naruto",
        what="1,221 captioned Naruto pictures (columns image, text)",
        kind="dataset",
        # Known as lambdalabs/naruto-blip-captions before the organisation took a shorter name.
        repo="lambda/naruto-blip-captions",
        folder="datas/naruto-blip-captions",
        licence=f"{SEE_PAGE}; the pictures come from a fan encyclopedia",
        ignore=(".gitattributes",),
        size=700_787_638,
    ),
    Entry(
        name="pick-a-pic-v2",
        what="preference pairs for DPO, with pictures; very large (v1: 204 GB), see --include",
        kind="dataset",
        repo="yuvalkirstain/pickapic_v2",
        folder="datas/pickapic_v2",
        licence=SEE_PAGE,
        ignore=(".gitattributes",),
    ),
)

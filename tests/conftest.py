"""What the tests share: an untrained pocket SD3, ten scenes with captions, a LoRA run's options."""

import gc
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before any import that reads them. The claims about equal bits are claims about the CPU.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Several workers of pytest-xdist fill the cores by themselves; more threads would wait in loops.
NUM_THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
if NUM_THREADS == 1:
    os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
# Runs write and flush thousands of small files, for which a disk takes its time.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from diffusers import (  # noqa: E402
    DDIMScheduler,
    EulerDiscreteScheduler,
    HunyuanDiT2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders import PeftAdapterMixin  # noqa: E402

from dojo.launch import interrupt  # noqa: E402

if TYPE_CHECKING:
    import train_lora_sd3

MakeArgs = Callable[..., "train_lora_sd3.Args"]

torch.set_num_threads(min(NUM_THREADS, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def default_dtype() -> Iterator[None]:
    """Loading in half precision changes torch's default for a moment: no test may leave it so."""
    yield
    left = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert left == torch.float32, f"torch's default dtype is {left} after the test"


@pytest.fixture(autouse=True, scope="module")
def settled_imports() -> None:
    """Takes what is loaded by now out of the garbage collection.

    Every run collects garbage when its text encoders go. Among a million objects of libraries
    that takes longer than a step of training.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Every test may open an Accelerator of its own; accelerate keeps the first one's state."""
    yield
    reset_accelerate()


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A script that is run as `__main__` in a test takes the signals; they are pytest's again.

    A later test that sends itself a signal would be ended by the watch of a run that is over.
    """
    before = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    yield
    if interrupt._watch is not None:
        interrupt._watch = None
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)


def reset_accelerate() -> None:
    """Forgets the Accelerator that was opened last, as a new process would."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained SD3 whose latents are shifted and scaled as the real ones."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny-sd3", "sd3")


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained SD1.5 whose latents are scaled as the real ones."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny-sd15", "sd15")


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an SD2: CLIP-H's activation, linear projections, v-prediction."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny-sd2", "sd2")


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained SDXL whose latents are scaled as the real ones."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny-sdxl", "sdxl")


@pytest.fixture(scope="session")
def tiny_kolors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained Kolors, in diffusers' layout."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny-kolors", "kolors")


@pytest.fixture(scope="session")
def tiny_hunyuandit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained Hunyuan-DiT v1.2, in diffusers' layout."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny-hunyuandit", "hunyuandit")


@pytest.fixture(scope="session")
def tiny_hunyuandit11(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a v1.1: it is told a style and sizes, and its schedule ends with less signal."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny-hunyuandit11", "hunyuandit11")


@pytest.fixture(scope="session")
def pocket_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `tiny_sd3` in the pocket model's size, which can learn something."""
    return make_tiny(tmp_path_factory.mktemp("models") / "untrained-sd3", "sd3", {})


@pytest.fixture(scope="session")
def pocket_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `tiny_sd15` in the pocket model's size, which can learn something."""
    return make_tiny(tmp_path_factory.mktemp("models") / "untrained-sd15", "sd15", {})


# What is smaller than in the pocket models: a run of a few steps takes half the time.
_SMALLER_UNET: dict[str, Any] = {"block_out_channels": (16, 32)}
SMALLER: dict[str, dict[str, Any]] = {
    "sd3": {
        **{"num_layers": 2, "dual_attention_layers": (0,), "attention_head_dim": 16},
        **{"num_attention_heads": 2, "caption_projection_dim": 32},
    },
    "sd15": _SMALLER_UNET,
    "sd2": _SMALLER_UNET,
    "sdxl": _SMALLER_UNET,
    "kolors": _SMALLER_UNET,
    "hunyuandit": {},
    "hunyuandit11": {},
}


def make_tiny(folder: Path, family: str, smaller: dict[str, Any] | None = None) -> Path:
    """Writes an untrained model of a family, smaller than the pocket model.

    Args:
        family: sd3, sd15, sd2 (made of sd15), sdxl, kolors, hunyuandit or hunyuandit11.
        smaller: what its network has otherwise than the pocket model's; unset: `SMALLER`.
    """
    from dojo.pocket import models

    torch.manual_seed(0)
    if family == "sd3":
        pipeline: Any = models.sd3_pipeline()
        # The pocket autoencoder's own 0 and 1 would hide a factor that is forgotten.
        pipeline.vae.register_to_config(shift_factor=0.0609, scaling_factor=1.5305)
    elif family == "sdxl":
        pipeline = tiny_sdxl_pipeline()
    elif family == "kolors":
        pipeline = tiny_kolors_pipeline(folder)
    elif family.startswith("hunyuandit"):
        pipeline = tiny_hunyuandit_pipeline(folder, told=family.endswith("11"))
    else:
        pipeline = models.sd15_pipeline()
        pipeline.vae.register_to_config(scaling_factor=0.18215)
    if family == "sd2":
        settings = {**pipeline.scheduler.config, "prediction_type": "v_prediction"}
        pipeline.scheduler = DDIMScheduler.from_config(settings)
        pipeline.unet = other_unet(pipeline.unet, use_linear_projection=True)
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    network = getattr(pipeline, part)
    other = SMALLER[family] if smaller is None else smaller
    setattr(pipeline, part, type(network).from_config({**network.config, **other}))
    pipeline.save_pretrained(folder)
    return folder


def load_adapter(pipeline: Any, base: Path, folder: Path) -> None:
    """Loads a LoRA as its model card says: by one call, or into a network that can have one.

    Args:
        base: of the pipeline.
    """
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.unload_lora_weights()
        pipeline.load_lora_weights(str(folder))
        return
    able: Any = type("Able", (HunyuanDiT2DModel, PeftAdapterMixin), {})
    pipeline.transformer = able.from_pretrained(base, subfolder="transformer")
    pipeline.transformer.load_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors")


def other_unet(unet: Any, **settings: Any) -> Any:
    """An untrained UNet like another one, but for some settings."""
    own = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    return UNet2DConditionModel.from_config({**own, **settings})


def tiny_sdxl_pipeline() -> Any:
    """An untrained SDXL of pocket parts: both CLIPs, the autoencoder, a UNet that is told sizes."""
    from dojo.pocket import models, text

    small = models.sd15_pipeline()
    unet = other_unet(
        small.unet,
        cross_attention_dim=models.CLIP_L_WIDTH + models.CLIP_G_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=models.CLIP_G_WIDTH + 6 * 32,
    )
    small.vae.register_to_config(scaling_factor=0.13025)
    settings: Any = {**small.scheduler.config, "timestep_spacing": "leading"}
    scheduler: Any = EulerDiscreteScheduler.from_config(settings)
    return StableDiffusionXLPipeline(
        unet=unet,
        scheduler=scheduler,
        vae=small.vae,
        text_encoder=small.text_encoder,
        tokenizer=small.tokenizer,
        text_encoder_2=models.clip_g(),
        tokenizer_2=text.clip_tokenizer("!"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


# What the tokenizer of the tiny Kolors learns its pieces from.
_TEXTS = (
    *("a red star on white", "two blue circles above a green square", "a photo of a cat"),
    *(
        "一颗红色的星星",
        "白色背景上的两个蓝色圆形",
        "绿色的正方形在黄色的三角形上方",
        "一只猫的照片，高质量",
    ),
)


def tiny_kolors_pipeline(folder: Path) -> Any:
    """An untrained Kolors: a ChatGLM of three layers, SDXL's UNet behind a projection.

    Args:
        folder: where its tokenizer.model is written first.
    """
    from diffusers import KolorsPipeline
    from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer

    from dojo.pocket import models

    small, width = models.sd15_pipeline(), 32
    tokenizer: Any = ChatGLMTokenizer(str(write_vocabulary(folder / "tokenizer")))
    kind: Any = ChatGLMModel
    encoder = kind(
        kind.config_class(
            num_layers=3,
            padded_vocab_size=tokenizer.vocab_size + 3,  # rounded up, as the real one's
            hidden_size=width,
            ffn_hidden_size=64,
            kv_channels=8,
            num_attention_heads=4,
            multi_query_attention=True,
            multi_query_group_num=2,
            add_qkv_bias=True,
            original_rope=True,  # asked for, though it has no default
            architectures=["ChatGLMModel"],
        ),
        empty_init=False,
    )
    for name, param in encoder.named_parameters():  # the class leaves what was in memory
        torch.nn.init.ones_(param) if "layernorm" in name else torch.nn.init.normal_(param, std=0.2)
    unet = other_unet(
        small.unet,
        cross_attention_dim=24,
        encoder_hid_dim=width,
        encoder_hid_dim_type="text_proj",
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=width + 6 * 8,
    )
    small.vae.register_to_config(scaling_factor=0.13025)
    settings: Any = {**small.scheduler.config, "timestep_spacing": "leading"}
    settings |= {"beta_end": 0.014, "num_train_timesteps": 1100}
    scheduler: Any = EulerDiscreteScheduler.from_config(settings)
    return KolorsPipeline(
        unet=unet, scheduler=scheduler, vae=small.vae, text_encoder=encoder, tokenizer=tokenizer
    )


def tiny_hunyuandit_pipeline(folder: Path, *, told: bool) -> Any:
    """An untrained Hunyuan-DiT of four blocks, with a BERT and an mT5 of two layers.

    Args:
        folder: where its vocabularies are written first.
        told: whether it is told a style and sizes, as v1.1 is.
    """
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import (
        BertConfig,
        BertModel,
        BertTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    from dojo.pocket import models

    small = models.sd15_pipeline()
    words = folder / "tokenizer" / "vocab.txt"
    words.parent.mkdir(parents=True, exist_ok=True)
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = dict.fromkeys([*"abcdefghijklmnopqrstuvwxyz", *sorted({*"".join(_TEXTS)} - {" "})])
    pieces = [f"##{letter}" for letter in letters]
    words.write_text("\n".join([*marks, *letters, *pieces]) + "\n", encoding="utf-8")
    tokenizer: Any = BertTokenizer.from_pretrained(words.parent)
    write_unigrams(folder / "tokenizer_2")
    tokenizer_2: Any = T5Tokenizer.from_pretrained(folder / "tokenizer_2", extra_ids=0)
    bert = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2) + 3,  # rounded up, as the real one's
            d_model=48,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    transformer = HunyuanDiT2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=4,
        mlp_ratio=4.3637,
        cross_attention_dim=32,
        cross_attention_dim_t5=48,
        pooled_projection_dim=16,
        use_style_cond_and_image_meta_size=told,
    )
    small.vae.register_to_config(scaling_factor=0.13025, force_upcast=False)
    absent: Any = None
    return HunyuanDiTPipeline(
        vae=small.vae,
        text_encoder=bert.eval(),
        tokenizer=tokenizer,
        text_encoder_2=t5.eval(),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.03 if told else 0.018,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=absent,
        feature_extractor=absent,
        requires_safety_checker=False,
    )


def write_unigrams(folder: Path) -> None:
    """Writes the spiece.model of an mT5 that knows a few words of English and Chinese."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_TEXTS * 4),
            model_writer=file,
            model_type="unigram",
            vocab_size=120,
            hard_vocab_limit=False,
            character_coverage=1.0,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            normalization_rule_name="nmt_nfkc",  # as T5's own
            num_threads=1,
            minloglevel=2,
        )


def write_vocabulary(folder: Path) -> Path:
    """Writes the tokenizer.model of a ChatGLM that knows a few words of English and Chinese."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_TEXTS * 4),
            model_writer=file,
            model_type="bpe",
            vocab_size=400,
            byte_fallback=True,
            character_coverage=1.0,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            num_threads=1,
            minloglevel=2,
        )
    return path


@pytest.fixture(scope="session")
def scene_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder with ten pocket scenes and metadata.jsonl; no two captions are equal."""
    return make_scenes(tmp_path_factory.mktemp("datas") / "scenes")


def make_scenes(folder: Path) -> Path:
    """Draws them."""
    from PIL import Image

    from dojo.pocket import scenes

    folder.mkdir()
    rng = random.Random(0)
    drawn: dict[str, scenes.Scene] = {}
    while len(drawn) < 10:
        drawn.setdefault(*scenes.sample(rng))
    rows = []
    for i, (caption, scene) in enumerate(drawn.items()):
        Image.fromarray(scenes.draw(scene)).save(folder / f"{i:02d}.png")
        rows.append(json.dumps({"file_name": f"{i:02d}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def lora_args(tiny_sd3: Path, scene_data: Path) -> MakeArgs:
    """`lora_args(tmp_path, *flags)`: train_lora_sd3's options for three small steps, then flags.

    The run writes to `tmp_path / "run"`, its cache lies in `tmp_path / "cache"`.
    """

    def make(folder: Path, *flags: str) -> "train_lora_sd3.Args":
        import train_lora_sd3

        own = lora_flags(folder, tiny_sd3, scene_data)
        return train_lora_sd3.cli.parse(train_lora_sd3.Args, None, [*own, *flags])

    return make


def lora_flags(folder: Path, model: Path, data: Path) -> list[str]:
    """The command line of a small LoRA run; what follows it wins."""
    return [*run_flags(folder, model, data), "--rank", "2"]


def run_flags(folder: Path, model: Path, data: Path | None) -> list[str]:
    """The command line of a small supervised run; what follows it wins."""
    flags = {
        "pretrained_model_name_or_path": model,
        **({"dataset_name": data} if data else {}),
        "output_dir": folder / "run",
        "latent_cache_dir": folder / "cache",
        "resolution": 64,
        "max_sequence_length": 24,
        "max_train_steps": 3,
        "train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "mixed_precision": "no",
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def rl_flags(folder: Path, model: Path) -> list[str]:
    """The command line of a small reinforcement learning; what follows it wins.

    Two epochs of four pictures of each of two prompts, two steps each.
    """
    flags = {
        "prompt_set": "pocket",
        "max_prompts": 6,
        "num_eval_prompts": 2,
        "reward": "jpeg_incompressibility",
        "num_prompts_per_epoch": 2,
        "group_size": 4,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "sample_steps": 4,
        "window_size": 2,
        "clip_range": 1e-3,
        "learning_rate": 1e-3,
        "rank": 2,
        "eval_sample_steps": 2,
        "seed": 0,
    }
    own = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [*run_flags(folder, model, None), *own]

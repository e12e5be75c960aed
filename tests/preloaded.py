"""What `tests.processes` forks from: all that a run imports, out of the garbage collection.

The package imports big libraries when they are first used, and both diffusers and transformers load
a class's module when it is first asked for: what is not named here, every process imports anew.
"""

import gc
import importlib

import accelerate
import datasets
import diffusers
import matplotlib.figure
import peft.tuners.tuners_utils
import pyarrow.compute
import pyarrow.parquet
import safetensors.torch
import scipy.ndimage
import torch._dynamo  # by an optimizer's first step
import torch.distributed.checkpoint.state_dict
import torchvision.transforms.functional
import transformers
from diffusers.pipelines import kolors

import dojo.methods.rl
import dojo.models.quantised
import dojo.pocket.verifier
import dojo.publish
import dojo.report
import dojo.rewards.__main__
import dojo.run.cost
import dojo.run.fused
import dojo.run.residence
import dojo.run.sharding
import dojo.run.split
import tests.processes
from tests.conftest import ROOT

LOADED = (
    accelerate.Accelerator,
    datasets.Dataset,
    diffusers.AutoencoderKL,
    diffusers.DDIMScheduler,
    diffusers.DDPMScheduler,
    diffusers.DiffusionPipeline,
    diffusers.EulerDiscreteScheduler,
    diffusers.FlowMatchEulerDiscreteScheduler,
    diffusers.KolorsPipeline,
    diffusers.SD3Transformer2DModel,
    diffusers.StableDiffusion3Pipeline,
    diffusers.StableDiffusionPipeline,
    diffusers.StableDiffusionXLPipeline,
    diffusers.UNet2DConditionModel,
    dojo.methods.rl,
    dojo.models.quantised,
    dojo.pocket.verifier,
    dojo.publish,
    dojo.report,
    dojo.rewards,
    dojo.run.cost,
    dojo.run.fused,
    dojo.run.residence,
    dojo.run.sharding,
    dojo.run.split,
    kolors.ChatGLMModel,
    kolors.ChatGLMTokenizer,
    matplotlib.figure.Figure,
    peft.LoraConfig,
    pyarrow.compute,
    pyarrow.parquet,
    safetensors.torch,
    scipy.ndimage,
    tests.processes,
    torch._dynamo,
    torch.distributed.checkpoint.state_dict,
    torchvision.transforms.functional,
    transformers.CLIPModel,
    transformers.CLIPTextModel,
    transformers.CLIPTextModelWithProjection,
    transformers.CLIPTokenizer,
    transformers.T5EncoderModel,
    transformers.T5Tokenizer,
    *(importlib.import_module(path.stem) for path in sorted(ROOT.glob("train_*.py"))),
)
gc.collect()
gc.freeze()

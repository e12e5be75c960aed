"""What `tests.processes` forks from: all that a run imports, out of the garbage collection."""

import gc

import diffusers
import transformers

import dojo.methods.rl
import dojo.pocket.verifier
import dojo.publish
import dojo.report
import dojo.rewards.__main__
import tests.processes

# Named, because both libraries load a class's module when it is first asked for.
LOADED = (
    dojo.methods.rl,
    dojo.pocket.verifier,
    dojo.publish,
    dojo.report,
    dojo.rewards,
    tests.processes,
    diffusers.AutoencoderKL,
    diffusers.DDPMScheduler,
    diffusers.FlowMatchEulerDiscreteScheduler,
    diffusers.SD3Transformer2DModel,
    diffusers.StableDiffusion3Pipeline,
    diffusers.StableDiffusionPipeline,
    diffusers.UNet2DConditionModel,
    transformers.CLIPModel,
    transformers.CLIPTextModelWithProjection,
    transformers.CLIPTokenizer,
    transformers.T5EncoderModel,
)
gc.collect()
gc.freeze()

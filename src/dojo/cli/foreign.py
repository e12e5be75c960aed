"""What other trainers, and we before, call an option, answered with ours, or why there is none.

A table of words and nothing else: `dojo.cli` asks it when a flag is unknown. The names are those
of diffusers' example scripts, kohya's sd-scripts, SimpleTuner, flow_grpo's configuration and
ddpo-pytorch's (`sample.` and `train.` stand before their names), TRL's DDPO (`sample_`, `train_`),
Diffusion-DPO and DiffSynth-Studio, as of 2026.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

# Our own name of before -> the flag, and its value, that it is now.
FORMER: Mapping[str, str] = {
    "use_lora": "finetune lora",
}

# Another trainer's name -> our flag with the same meaning.
RENAMED: Mapping[str, str] = {
    # kohya's sd-scripts
    "alpha_mask": "mask_from_alpha",
    "blocks_to_swap": "blocks_on_cpu",
    "bucket_reso_steps": "bucket_step",
    "caption_dropout_rate": "caption_dropout",
    "clip_g_dropout_rate": "clip_g_dropout",
    "clip_l_dropout_rate": "clip_l_dropout",
    "conditioning_data_dir": "mask_dir",
    "cpu_offload_checkpointing": "activations_on_cpu",
    "dataset_config": "data_config",
    "dataset_repeats": "repeats",
    "enable_bucket": "aspect_buckets",
    "flip_aug": "random_flip",
    "huggingface_repo_id": "hub_model_id",
    "huggingface_token": "hub_token",
    "init_word": "initializer_token",
    "learning_rate_te": "text_encoder_lr",
    "learning_rate_te1": "text_encoder_lr",
    "log_tracker_name": "tracker_project_name",
    "log_with": "report_to",
    "lr_scheduler_num_cycles": "lr_num_cycles",
    "lr_scheduler_power": "lr_power",
    "lr_scheduler_type": "lr_scheduler",
    "max_bucket_reso": "bucket_max",
    "max_data_loader_n_workers": "dataloader_num_workers",
    "max_train_epochs": "num_train_epochs",
    "min_bucket_reso": "bucket_min",
    "network_alpha": "lora_alpha",
    "network_dim": "rank",
    "network_dropout": "lora_dropout",
    "network_weights": "init_lora_weights_path",
    "optimizer_type": "optimizer",
    "placeholder_token": "new_tokens",
    "reg_data_dir": "class_data_dir",
    "resume": "resume_from_checkpoint",
    "sample_every_n_steps": "validation_steps",
    "sample_prompts": "validation_prompts_file",
    "save_every_n_steps": "checkpointing_steps",
    "save_last_n_steps": "checkpoints_total_limit",
    "save_last_n_steps_state": "checkpoints_total_limit",
    "save_precision": "save_dtype",
    "t5_dropout_rate": "t5_dropout",
    "t5xxl_max_token_length": "max_sequence_length",
    "token_abstraction": "new_tokens",
    "token_string": "new_tokens",
    "training_shift": "flow_shift",
    "unet_lr": "learning_rate",
    "validation_split": "eval_fraction",
    "debiased_estimation_loss": "debiased_estimation",
    "ip_noise_gamma": "input_perturbation",
    "min_snr_gamma": "snr_gamma",
    "vae": "pretrained_vae_model_name_or_path",
    "zero_terminal_snr": "rescale_betas_zero_snr",
    # diffusers' example scripts
    "dataset_split_name": "dataset_split",
    "lora_blocks": "lora_layers",
    "tokenizer_max_length": "max_sequence_length",
    "tracker_name": "tracker_project_name",
    "validation_images": "num_validation_images",
    "validation_prompts": "validation_prompt",
    # SimpleTuner
    "base_model_precision": "base_precision",
    "caption_dropout_probability": "caption_dropout",
    "checkpoint_step_interval": "checkpointing_steps",
    "flow_schedule_shift": "flow_shift",
    "init_lora": "init_lora_weights_path",
    "lora_rank": "rank",
    "max_workers": "dataloader_num_workers",
    "model_card_private": "hub_private_repo",
    "optimizer_beta1": "adam_beta1",
    "optimizer_beta2": "adam_beta2",
    "peft_lora_target_modules": "lora_layers",
    "tracker_run_name": "run_name",
    "user_prompt_library": "validation_prompts_file",
    "validation_guidance": "validation_guidance_scale",
    "validation_num_inference_steps": "validation_inference_steps",
    "validation_prompt_library": "validation_prompts_file",
    "validation_step_interval": "validation_steps",
    "weight_decay": "adam_weight_decay",
    # flow_grpo, DanceGRPO, ddpo-pytorch
    "eval_freq": "eval_every",
    "num_checkpoint_limit": "checkpoints_total_limit",
    "num_generations": "group_size",
    "pretrained.model": "pretrained_model_name_or_path",
    "prompt_fn": "prompt_set",
    "reward_fn": "reward",
    "sample.eval_num_steps": "eval_sample_steps",
    "sample.guidance_scale": "guidance_scale",
    "sample.noise_level": "noise_level",
    "sample.num_image_per_prompt": "group_size",
    "sample.num_steps": "sample_steps",
    "sample.test_batch_size": "eval_batch_size",
    "sample.train_batch_size": "sample_batch_size",
    "sampling_steps": "sample_steps",
    "save_freq": "checkpointing_steps",
    "train.adv_clip_max": "adv_clip_max",
    "train.batch_size": "train_batch_size",
    "train.beta": "beta",
    "train.clip_range": "clip_range",
    "train.ema": "use_ema",
    "train.gradient_accumulation_steps": "gradient_accumulation_steps",
    "train.learning_rate": "learning_rate",
    "train.lora_path": "init_lora_weights_path",
    "train.max_grad_norm": "max_grad_norm",
    "train.num_inner_epochs": "num_inner_epochs",
    "train.use_8bit_adam": "use_8bit_adam",
    "per_prompt_stat_tracking.buffer_size": "buffer_size",
    "per_prompt_stat_tracking.min_count": "buffer_min_count",
    "pretrained.revision": "revision",
    "resume_from": "resume_from_checkpoint",
    "sample.batch_size": "sample_batch_size",
    "sample.eta": "eta",
    # TRL's DDPO
    "negative_prompts": "negative_prompt",
    "per_prompt_stat_tracking_buffer_size": "buffer_size",
    "per_prompt_stat_tracking_min_count": "buffer_min_count",
    "pretrained_model": "pretrained_model_name_or_path",
    "pretrained_revision": "revision",
    "prompt_function": "prompt_set",
    "reward_function": "reward",
    "sample_eta": "eta",
    "sample_guidance_scale": "guidance_scale",
    "sample_num_steps": "sample_steps",
    "train_adam_beta1": "adam_beta1",
    "train_adam_beta2": "adam_beta2",
    "train_adam_epsilon": "adam_epsilon",
    "train_adam_weight_decay": "adam_weight_decay",
    "train_adv_clip_max": "adv_clip_max",
    "train_clip_range": "clip_range",
    "train_gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_learning_rate": "learning_rate",
    "train_max_grad_norm": "max_grad_norm",
    "train_num_inner_epochs": "num_inner_epochs",
    "train_use_8bit_adam": "use_8bit_adam",
    # Diffusion-DPO
    "split": "dataset_split",
    "unet_init": "pretrained_model_name_or_path",
    # DiffSynth-Studio
    "dataset_base_path": "train_data_dir",
    "dataset_num_workers": "dataloader_num_workers",
    "dataset_repeat": "repeats",
    "lora_checkpoint": "init_lora_weights_path",
    "lora_target_modules": "lora_layers",
    "num_epochs": "num_train_epochs",
    "output_path": "output_dir",
    "save_steps": "checkpointing_steps",
    "swanlab_project": "tracker_project_name",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "wandb_project": "tracker_project_name",
    "wandb_run_name": "run_name",
}

_ATTENTION = "attention is torch's scaled_dot_product_attention, fused where it can be, in any case"
_CACHED = "this is so by default: latents and text embeddings are cached on disk in"
_CACHES = f"{_CACHED} --latent_cache_dir (--no_cache_latents, --no_cache_text_embeddings)"
_NOISY = "not here: it belongs to noise prediction, and this script's objective has no place for it"
_TEMPLATES = "not here: captions are yours, by --instance_prompt or the data's own"
_VECTORS = "behind the word: --new_tokens WORD:4"
_LAUNCHER = "the launcher tells every process by itself: accelerate launch --num_processes N"
_SAFE = "results are safetensors in any case"
_STATE = "every checkpoint holds the state of the run, and --resume_from_checkpoint latest goes on"
_EPOCHS = "not here: count in optimizer steps, with"
_LOGS = "metrics and trackers' files are in --output_dir: metrics.jsonl and logs/"
_OWN_PARTS = (
    "not here: the parts are those of --pretrained_model_name_or_path (a folder, a hub id, or one "
    "file with --single_file_config)"
)

_GUIDED = "--guidance_scale above 1 samples and trains with guidance"
_PICTURES = "--num_prompts_per_epoch times --group_size are an epoch's pictures, over all processes"
_SCORERS = "--reward aesthetic; --list_rewards names all rewards, with sizes and licences"

# Another trainer's name -> what to do instead, or why it is not here.
_FRACTION = "--train_timesteps fraction --timestep_fraction takes so many of the steps"
ANSWERS: Mapping[str, str] = {
    # ddpo-pytorch, flow_grpo and TRL
    "train.timestep_fraction": _FRACTION,
    "train_timestep_fraction": _FRACTION,
    # kohya's sd-scripts
    "bucket_no_upscale": "--max_upscale 1 leaves out pictures that would be enlarged",
    "cache_latents": _CACHES,
    "cache_latents_to_disk": _CACHES,
    "cache_text_encoder_outputs": _CACHES,
    "cache_text_encoder_outputs_to_disk": _CACHES,
    "caption_extension": "not needed: .txt and .caption files beside the pictures are both found",
    "clip_g": _OWN_PARTS,
    "clip_l": _OWN_PARTS,
    "config_file": "--config FILE takes options from a file, by our names (docs/config.md); "
    "accelerate's own --config_file goes before the script's name",
    "fp8_base": "--base_precision fp8, in scripts that train adapters (int8 takes as much and is "
    "nearer)",
    "full_bf16": "--train_dtype bf16 (full fine-tuning); adapters stay float32",
    "full_fp16": "not here: float16 weights lose small updates; --train_dtype bf16 keeps them",
    "logging_dir": _LOGS,
    "masked_loss": "--mask_dir FOLDER or --mask_from_alpha switch it on",
    "mem_eff_attn": _ATTENTION,
    "multires_noise_iterations": _NOISY,
    "network_args": "--lora_layers chooses layers, --use_dora DoRA; LoHa and LoKr are not here",
    "network_module": "the script itself says it: train_lora_*.py trains LoRA, train_full_*.py all",
    "network_train_text_encoder_only": "not here: the network is trained in any case",
    "network_train_unet_only": "this is so, unless --train_text_encoder is given",
    "no_half_vae": "this is so: the autoencoder is float32 unless --vae_dtype says otherwise",
    "optimizer_args": "not here: --adam_beta1, --adam_beta2, --adam_weight_decay, --adam_epsilon",
    "output_name": "the result has diffusers' own names; its folder is --output_dir",
    "sample_at_first": "this is so: validation pictures are drawn before the first step",
    "sample_every_n_epochs": f"{_EPOCHS} --validation_steps",
    "save_every_n_epochs": f"{_EPOCHS} --checkpointing_steps",
    "save_model_as": f"{_SAFE}; --lora_format adds kohya's or ComfyUI's names",
    "save_state": _STATE,
    "save_state_on_train_end": _STATE,
    "sdpa": _ATTENTION,
    "t5xxl": _OWN_PARTS,
    "use_lion_optimizer": "--optimizer lion",
    "use_safetensors": _SAFE,
    "v2": "the model's own folder or file says it",
    "v_parameterization": "the model's own folder or file says it; --prediction_type v_prediction "
    "makes it of another one",
    "wandb_api_key": "set WANDB_API_KEY or run wandb login: a key on the command line is seen by "
    "every user of the machine",
    "xformers": _ATTENTION,
    # diffusers' example scripts
    "enable_npu_flash_attention": _ATTENTION,
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "image_interpolation_mode": "not here: pictures are resized by Lanczos' filter, antialiased",
    "local_rank": _LAUNCHER,
    "learnable_property": _TEMPLATES,
    "non_ema_revision": "not here: --revision is the model's",
    "num_vectors": _VECTORS,
    "num_vectors_per_token": _VECTORS,
    "offset_noise": "--noise_offset, in scripts that learn noise or v",
    "output_kohya_format": "--lora_format kohya",
    "pre_compute_text_embeddings": _CACHES,
    "run_validation": "--validation_prompt TEXT ... switches it on",
    "set_grads_to_none": "this is so in any case",
    "skip_save_text_encoder": "not needed: without --train_text_encoder no adapter of theirs is "
    "written",
    "text_encoder_use_attention_mask": "not here: padding is masked as the model's pipeline does",
    "tokenizer_name": _OWN_PARTS,
    "train_text_encoder_ti": "--new_tokens WORD ... switches it on",
    "train_text_encoder_ti_frac": "--token_steps N, a number of optimizer steps",
    "upcast_before_saving": "this is so: trained weights are saved in float32",
    "validation_epochs": f"{_EPOCHS} --validation_steps",
    "validation_scheduler": "not here: validation draws with the model's own scheduler",
    # SimpleTuner
    "checkpoint_epoch_interval": f"{_EPOCHS} --checkpointing_steps",
    "data_backend_config": "--dataset_name FOLDER, or --data_config FILE for several folders (its "
    "form is in docs/data.md)",
    "lora_type": "LoRA, with --use_dora DoRA; LyCORIS' kinds are not here",
    "lycoris_config": "not here: adapters are LoRA, with --use_dora DoRA",
    "model_family": "the script's own name says it, and --pretrained_model_name_or_path",
    "model_flavour": "--pretrained_model_name_or_path names the model",
    "model_type": "the script's own name says it: train_lora_*.py or train_full_*.py",
    "resolution_type": "not here: --resolution is a side in pixels",
    "validation_epoch_interval": f"{_EPOCHS} --validation_steps",
    # flow_grpo, ddpo-pytorch, TRL's DDPO
    "async_reward_computation": "this is so: pictures are scored while the next ones are sampled",
    "hf_hub_aesthetic_model_filename": _SCORERS,
    "hf_hub_aesthetic_model_id": _SCORERS,
    "hf_hub_model_id": "--hub_model_id, with --push_to_hub",
    "logdir": _LOGS,
    "per_prompt_stat_tracking": "train_ddpo_*.py: --buffer_size and --buffer_min_count; train_grpo_"
    "*.py compares a prompt's own group in any case",
    "sample.global_std": "--advantage_std says what a group's advantages are divided by",
    "sample.num_batches_per_epoch": _PICTURES,
    "sample_num_batches_per_epoch": _PICTURES,
    "train.cfg": _GUIDED,
    "train_cfg": _GUIDED,
    # Diffusion-DPO
    "dreamlike_pairs_only": "not here: filter the pairs' table beforehand",
    "hard_skip_resume": "not needed: a resumed run goes straight to its place in the data",
    # DiffSynth-Studio
    "dataset_metadata_path": "the table lies in the data's folder (metadata.csv, .jsonl, .parquet) "
    "and is found there",
    "enable_swanlab_log": "--report_to swanlab",
    "enable_tensorboard_log": "--report_to tensorboard",
    "enable_wandb_log": "--report_to wandb",
    "max_pixels": "--resolution N with --aspect_buckets keeps pictures at about N x N pixels",
    "model_id_with_origin_paths": "--pretrained_model_name_or_path takes a folder, a hub id or a "
    "file",
    "model_paths": "--pretrained_model_name_or_path takes a folder, a hub id or a file",
    "trainable_models": "the script's own name says it; --freeze keeps parts as they are",
    "use_gradient_checkpointing_offload": "--gradient_checkpointing with --activations_on_cpu",
}

# Flags that some scripts have: what to say where there is no such flag.
ELSEWHERE = {
    "base_precision": "not here: every weight is trained; --train_dtype bf16 takes 2 bytes",
    "blocks_on_cpu": "not here: every weight is trained; --train_dtype bf16, "
    "--gradient_checkpointing and --activations_on_cpu take less memory",
    "clip_skip": "not here: text encoders are asked as the model's own pipeline asks them",
    **dict.fromkeys(
        ("debiased_estimation", "huber_c", "huber_schedule", "input_perturbation", "max_timestep"),
        _NOISY,
    ),
    **dict.fromkeys(("min_timestep", "noise_offset", "snr_gamma"), _NOISY),
    "loss_type": "not here: the loss is the squared error",
    "prediction_type": "the model's own scheduler says it",
    "pretrained_vae_model_name_or_path": _OWN_PARTS,
    "train_text_encoder": "not here: the text encoders stay as they are",
}


def script_of(name: str, script: Path) -> str | None:
    """What to say about a flag that names a family of models, as Diffusion-DPO has one.

    Args:
        name: the flag without dashes in front.
        script: the one that was given it; a family's scripts end with its name.
    Returns:
        Which script of the same method is for that family; None where there is none.
    """
    if not (name.isidentifier() and script.name):
        return None
    other = script.with_name(f"{script.stem.rpartition('_')[0]}_{name}{script.suffix}")
    return f"a script's name says which model it is for: {other.name}" if other.is_file() else None


def answer(name: str, known: Collection[str]) -> str | None:
    """What to say about an unknown flag, or None where no other trainer is known to have it.

    Args:
        name: the flag without dashes in front, with underscores; flow_grpo's with its dots.
        known: this script's own flags.
    """
    plain = name.removeprefix("config.")
    if plain in FORMER and FORMER[plain].split()[0] in known:
        return f"this is now --{FORMER[plain]}"
    if plain in RENAMED:
        ours = RENAMED[plain]
        missing = "" if ours in known else " (which this script does not have)"
        return f"here it is --{ours}{missing}"
    if plain in ANSWERS or (plain in ELSEWHERE and plain not in known):
        return ANSWERS.get(plain) or ELSEWHERE[plain]
    # ml_collections' groups may stand before a name that is ours.
    last = name.rpartition(".")[2]
    return f"here it is --{last}" if last != name and last in known else None

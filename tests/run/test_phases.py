"""What each phase of a run holds: counted on the meta device, against files and hand counts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from dojo.data import shards
from dojo.models import int8, sd3
from dojo.run import cost, phases

BOTH: Any = ("autoencoder", "rewards")


def test_the_most_that_is_alive_at_a_time_is_counted() -> None:
    def chain() -> torch.Tensor:
        values = torch.empty(1000, device="meta")  # float32: 4,000 bytes each
        for _ in range(5):
            values = values + 1  # the one before goes when the next is there
        return values

    assert cost.live_bytes(chain) == 2 * 4000


def test_a_convolution_keeps_its_input_and_output() -> None:
    layer = nn.Conv2d(4, 8, 3, padding=1, bias=False, device="meta")
    pixels = torch.empty(2, 4, 16, 16, device="meta")
    # The input and the weights were there before.
    assert cost.live_bytes(lambda: layer(pixels)) == 2 * 8 * 16 * 16 * 4


def stored(folder: Path) -> int:
    """Numbers in the safetensors of a folder."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    return total


@pytest.fixture
def alone(tiny_sd3: Path) -> phases.Needs:
    """A run that encodes nothing and draws nothing."""
    config = sd3.open_model(sd3.ModelArgs(pretrained_model_name_or_path=str(tiny_sd3)))
    return phases.Needs(
        config=config,
        dtype=torch.bfloat16,
        vae_dtype=torch.float32,
        size=(64, 64),
        vae_stays=False,
    )


@pytest.fixture
def held(alone: phases.Needs) -> phases.Held:
    """A network whose training holds round numbers of bytes."""
    network = alone.config.meta_network()
    return phases.Held(network=network, kept=5000, activations=4000)


def sizes(needs: phases.Needs, held: phases.Held) -> dict[str, int]:
    return {phase.name: phase.size for phase in phases.compute(needs, held)}


def parts(needs: phases.Needs, held: phases.Held, name: str) -> dict[str, int]:
    return dict(next(one.parts for one in phases.compute(needs, held) if one.name == name))


def test_a_run_that_draws_nothing_reads_texts_and_trains(
    alone: phases.Needs, held: phases.Held
) -> None:
    assert list(sizes(alone, held)) == ["text cache", "training"]
    assert sizes(alone, held)["training"] == 9000
    on_cpu = replace(alone, text_on_cpu=True)
    assert sizes(on_cpu, held) == {"training": 9000}


def test_text_encoders_count_one_after_another(
    alone: phases.Needs, held: phases.Held, tiny_sd3: Path
) -> None:
    weights = {part: 2 * stored(tiny_sd3 / part) for part in sd3.TEXT_ENCODERS}
    found = parts(alone, held, "text cache")
    (part,) = set(found) - {"activations"}
    assert found[part] == weights[part]
    assert found["activations"] > 32 * alone.config.text_lengths[part] * 2  # 32 captions
    assert sizes(alone, held)["text cache"] < sum(weights.values()) + found["activations"]
    for other, own in weights.items():
        assert own + phases._reading(
            phases._encoder(alone.config, other),
            *(torch.bfloat16, 32, alone.config.text_lengths[other]),
        ) <= sum(found.values())


def test_a_shard_of_captions_is_read_at_a_time() -> None:
    assert phases.CAPTIONS == shards.SHARD_SIZE


def test_int8_takes_a_byte_a_weight_of_the_blocks_and_a_scale_a_row() -> None:
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
    )
    clip = CLIPTextModelWithProjection(config)
    total = sum(param.numel() for param in clip.parameters())
    inside = 3 * (4 * 16 * 16 + 2 * 16 * 48)
    rows = 3 * (4 * 16 + 48 + 16)
    assert phases.encoder_bytes(clip, torch.bfloat16) == 2 * total
    counted = 2 * (total - inside) + inside + 4 * rows
    assert int8.bytes_of(clip, torch.bfloat16) == counted
    half = nn.Sequential(clip).to(torch.bfloat16)
    stored = int8.as_asked(half.requires_grad_(False), "int8")
    assert sum(param.nbytes for param in stored.parameters()) == counted


def test_t5_keeps_a_part_that_half_precision_cannot_hold() -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=40, num_layers=2, num_heads=2)
    encoder = T5EncoderModel(config)
    total = sum(param.numel() for param in encoder.parameters())
    assert phases.encoder_bytes(encoder, torch.bfloat16) == 2 * total
    assert phases.encoder_bytes(encoder, torch.float16) == 2 * total + 2 * (2 * 16 * 40)


def test_the_latent_cache_holds_the_autoencoder_and_its_activations(
    alone: phases.Needs, held: phases.Held, tiny_sd3: Path
) -> None:
    needs = replace(alone, encoded=2)
    found = parts(needs, held, "latent cache")
    assert found["autoencoder"] == 4 * stored(tiny_sd3 / "vae")
    pixels = 2 * 3 * 64 * 64 * 4
    assert found["activations"] > pixels
    half = parts(replace(needs, vae_dtype=torch.bfloat16), held, "latent cache")
    assert half == {
        "autoencoder": found["autoencoder"] // 2,
        "activations": pytest.approx(found["activations"] / 2, rel=0.05),
    }


def test_what_a_step_encodes_lies_beside_all_that_is_kept(
    alone: phases.Needs, held: phases.Held
) -> None:
    needs = replace(alone, vae_stays=True, encoded=3, encoded_in_training=3)
    alone_with_it = parts(needs, held, "latent cache")
    assert alone_with_it["activations"] > held.activations
    found = parts(needs, held, "training")
    assert found == {"weights and state": held.kept, **alone_with_it}
    larger = replace(held, activations=2 * alone_with_it["activations"])
    assert parts(needs, larger, "training")["activations"] == larger.activations


@pytest.mark.parametrize("way", ["slicing", "tiling"])
def test_slices_and_tiles_hold_what_diffusers_holds(
    way: str, alone: phases.Needs, held: phases.Held
) -> None:
    vae: Any = AutoencoderKL.from_config({**alone.config.vae, "sample_size": 64})
    vae.to("meta")
    getattr(vae, f"enable_{way}")()
    size = 64 if way == "slicing" else 128
    config: Any = replace(alone.config, vae={**alone.config.vae, "sample_size": 64})  # pyright: ignore
    needs = replace(alone, config=config, size=(size, size), **{way: True})
    latents = torch.empty(4, vae.config.latent_channels, size // 8, size // 8, device="meta")
    real = cost.live_bytes(lambda: vae.decode(latents))
    plain = phases._autoencoder(needs, torch.float32)
    found = phases._decoding(plain, needs, 4)
    assert found == pytest.approx(real, rel=0.1)
    assert found < 0.5 * phases._decoding(plain, replace(needs, **{way: False}), 4)


def test_class_pictures_are_drawn_in_turns(alone: phases.Needs, held: phases.Held) -> None:
    needs = replace(alone, class_pictures=3)
    found = parts(needs, held, "class pictures")
    network = 2 * sum(param.numel() for param in held.network.parameters())
    turns = {"network", "autoencoder", *alone.config.text_lengths}
    assert len(turns & set(found)) == 1  # never two of them together
    assert sum(found.values()) >= network
    assert sizes(replace(needs, class_dtype=torch.float32), held)["class pictures"] > sum(
        found.values()
    )


@pytest.mark.parametrize("kind", [peft.LoraConfig, peft.LoHaConfig, peft.LoKrConfig])
def test_class_pictures_are_drawn_without_adapters(kind: Any) -> None:
    network = nn.Sequential(nn.Linear(8, 16))
    peft.inject_adapter_in_model(kind(r=2, target_modules=["0"]), network)
    assert sum(param.numel() for param in network.parameters()) > 8 * 16 + 16
    assert phases._own_weights(network) == 8 * 16 + 16


def test_class_pictures_are_told_by_text_encoders_where_and_as_a_run_has_them(
    alone: phases.Needs, held: phases.Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = replace(alone, class_pictures=3, text_bytes=lambda encoder, dtype: 10**9)
    found = parts(needs, held, "class pictures")
    assert 10**9 in found.values()
    monkeypatch.setattr(phases, "_encoders", None)  # nobody asks for them
    assert max(parts(replace(needs, text_on_cpu=True), held, "class pictures").values()) < 10**9


def test_a_validation_sends_the_network_away_while_it_decodes(
    alone: phases.Needs, held: phases.Held
) -> None:
    large = replace(held, leaving=10**9, kept=3 * 10**9)
    needs = replace(alone, decoded=1)
    vae = phases._autoencoder(alone, torch.float32)
    own, decoding = phases._bytes(vae), phases._decoding(vae, needs, 1)
    asking = phases._asking(needs, held, 2)
    found = sizes(needs, large)["validation"]
    assert found == max(3 * 10**9 + own + asking, 2 * 10**9 + own + decoding)
    stays = replace(needs, vae_stays=True)
    assert sizes(stays, large)["validation"] == 3 * 10**9 + own + max(asking, decoding)
    assert sizes(stays, large)["training"] == 3 * 10**9 + 4000 + own
    sharded = replace(large, leaving=0, whole=10**10)
    found = sizes(needs, sharded)
    assert found["validation"] == 13 * 10**9 + own + max(asking, decoding)
    assert found["training"] == 3 * 10**9 + 4000  # a block at a time, among the activations


def test_what_is_drawn_counts_at_its_own_size(alone: phases.Needs, held: phases.Held) -> None:
    needs = replace(alone, encoded=1, decoded=1)
    usual = sizes(needs, held)
    for side in (32, 128):
        other = (side, 64)
        found = sizes(replace(needs, drawn_size=other), held)
        assert found.pop("validation") == sizes(replace(needs, size=other), held)["validation"]
        assert found == {name: size for name, size in usual.items() if name != "validation"}


def test_rewards_stay_on_the_device_and_their_drawing_is_called_scoring(
    alone: phases.Needs, held: phases.Held
) -> None:
    scorer = nn.Linear(100, 100, bias=False)
    needs = replace(alone, decoded=3, rows=3, vae_stays=True)
    needs = replace(needs, scored=True, scorers=(scorer,))
    found = phases.compute(needs, held)
    assert [phase.name for phase in found] == ["text cache", "training", "scoring"]
    assert found[1].parts["rewards"] == found[2].parts["rewards"] == 40_000
    assert found[2].size < phases.compute(replace(needs, rows=300), held)[2].size


def test_what_is_loaded_before_the_texts_counts_there(
    alone: phases.Needs, held: phases.Held
) -> None:
    scorer = nn.Linear(100, 100, bias=False)
    needs = replace(alone, encoded=1, vae_stays=True, scorers=(scorer,))
    plain, both = sizes(needs, held), sizes(replace(needs, before_texts=BOTH), held)
    vae = phases._bytes(phases._autoencoder(needs, torch.float32))
    assert both["text cache"] - plain["text cache"] == vae + 40_000
    assert both["latent cache"] - plain["latent cache"] == 40_000  # the autoencoder once
    rewards = sizes(replace(needs, before_texts=["rewards"]), held)
    assert rewards["text cache"] - plain["text cache"] == 40_000
    assert "text cache" not in sizes(replace(needs, before_texts=BOTH, text_on_cpu=True), held)


def test_encoders_that_are_not_freed_count_in_training(
    alone: phases.Needs, held: phases.Held, tiny_sd3: Path
) -> None:
    needs = replace(alone, live_text=sd3.TEXT_ENCODERS)
    text = 2 * sum(stored(tiny_sd3 / part) for part in sd3.TEXT_ENCODERS)
    assert sizes(needs, held) == {"training": 9000 + text}


def test_the_largest_phase_decides_which_cards_are_large_enough() -> None:
    gib = 2**30
    said = phases.table(
        [
            phases.Phase("text cache", {"T5": round(10.4 * gib)}),
            phases.Phase("training", {"weights": 4 * gib, "activations": round(0.7 * gib)}),
        ]
    )
    assert "training     4.70  weights 4.00 + activations 0.70" in said[1].splitlines()
    assert "largest phase: text cache, 10.40 GiB" in said
    # 1.1 times 10.4 GiB and one for the context: 12.4.
    assert said[-1].startswith(
        "fits on a card of so many GB: 8 no, 10 no, 12 no, 16 yes, 24 yes, 48 yes, 80 yes"
    )
    assert phases.card_for(10.4) == 16
    assert phases.card_for(100) is None

"""The page to draw on, opened with what the options of demo.py say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dojo import web
from dojo.evaluate import easel


def open_page(
    script: str,
    args: Any,
    prompts: Sequence[str],
    load: Callable[[str, Sequence[str], Any], tuple[Any, Any, Any]],
) -> None:
    """Lets the user draw on a page in the browser, until Ctrl-C; writes nothing.

    Args:
        script: whose options these are, for the commands that the page tells.
        args: options of demo.py: model, LoRAs, seed, drawing, place and port.
        prompts: to choose from, those of `--prompt` first.
        load: of a model, its LoRAs and a device: a pipeline, its scheduler, and the one to draw
            with the LoRAs by.
    """
    base, loras = args.pretrained_model_name_or_path, args.lora_weights_path
    count = len(args.prompt)
    of_runs = [text for lora in loras for text in easel.prompts_of(lora)]
    shown = [*prompts[:count], *of_runs, *prompts[count:]]

    def told(wish: easel.Wish, tuned: bool) -> str:
        paths, scales = (loras, wish.scales) if tuned else ((), (1.0,))
        left_out = ("web", "port", "prompt_file", "num_images_per_prompt")
        one = replace(args, lora_weights_path=paths, lora_scale=scales, prompt=(wish.prompt,))
        one = replace(one, seed=wish.seed, drawing=wish.drawing)
        return easel.command(script, one, leave_out=left_out)

    def make() -> web.Page:
        from dojo.evaluate.easel_page import Page  # needs Starlette

        pipeline, _, tuned_scheduler = load(base, loras, args.place.find_device())
        drawer = easel.Easel(pipeline, tuned_scheduler, loras, told)
        scales = args.lora_scale * (len(loras) if len(args.lora_scale) == 1 else 1)
        return Page(drawer, base, args.drawing, shown, args.seed, scales)

    web.open_page(f"drawing with {base}", make, port=args.port)

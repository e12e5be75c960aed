"""The door of `python -m dojo.lora`, whose house is `dojo.finetune.lora`."""

from dojo.finetune.lora.__main__ import command

if __name__ == "__main__":
    command()

"""How fast training is: `python -m dojo.bench supervised`, `rl` and `limits`.

`supervised` and `rl` start a training script as a user would and read its own metrics; nothing is
trained here. `limits` counts what a step must compute, so that a measured speed has something to
stand by. The models have the sizes of the published ones and random weights: speed does not depend
on values.
"""

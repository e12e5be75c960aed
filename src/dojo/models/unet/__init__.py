"""What Stable Diffusion 1, 2 and XL share: a UNet that denoises, and a schedule of timesteps."""

"""What Stable Diffusion 1, 2, XL and Kolors share: a UNet that denoises, and a schedule."""

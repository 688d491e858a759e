"""Stable Diffusion and the networks that judge it, one network a file, in the public checkpoints' layouts."""

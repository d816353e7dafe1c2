"""The latent diffusion model: what it is told, its loss, its samplers, its training, and images drawn from it."""

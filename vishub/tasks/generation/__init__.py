"""Pictures from noise: class-conditional and text-to-image diffusion."""

"""Deblurring: a shaken photograph in, a sharper one out, and the blur that the model believes in."""

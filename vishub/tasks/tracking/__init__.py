"""Follow one target through a video, from its box in the first frame."""

"""Slide analysis: the class of a whole slide and where it shows, learnt task after task without forgetting."""

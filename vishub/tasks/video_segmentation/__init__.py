"""Where a lesion is in every frame of a clip. Research use only."""

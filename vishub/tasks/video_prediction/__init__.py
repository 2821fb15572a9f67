"""What comes next in a clip: the frames that follow the given ones."""

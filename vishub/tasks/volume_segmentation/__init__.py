"""Segmentation of volumes: a CT or MR scan in, the organ of every voxel out."""

"""What is in the picture: a model's scores for each class, with the names of the classes."""

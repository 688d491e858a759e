"""How weights/toy was made: a cartoon world drawn with Pillow, and the training of every network on it."""

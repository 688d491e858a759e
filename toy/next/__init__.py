"""The next toy world and its autoencoder. When all its networks are trained, it replaces toy/world.py and its parts."""

"""What a run needs besides the method: flags, precision, memory, processes, files. No equation stands here."""

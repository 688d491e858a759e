"""Every public file layout: configurations, tensors, single files. Reading is strict, writing is atomic."""

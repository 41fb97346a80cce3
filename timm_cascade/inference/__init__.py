"""How a batch runs through the backbone while its confident samples exit early."""

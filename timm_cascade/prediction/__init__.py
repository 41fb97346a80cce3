"""Labelling whole folders and data sets: work units, one part file each, resumable anywhere."""

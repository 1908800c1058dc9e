"""Offline preprocessing, `sora-data VERB`: from a folder of videos to clean, verified training shards."""

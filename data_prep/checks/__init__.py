"""Check a tree of shards: its folders, each shard, and a page of what is in it; data_prep/check.py is the command."""

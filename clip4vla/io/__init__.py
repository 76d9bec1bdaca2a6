"""Bytes on disks and object stores: written whole or not at all, read in ranges, loaded safely."""

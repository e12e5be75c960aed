"""Data that no disk has to hold: shards read ahead in an order that is arithmetic."""

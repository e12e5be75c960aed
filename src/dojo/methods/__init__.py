"""What the scripts of one method share beside their loops."""

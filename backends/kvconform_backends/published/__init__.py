"""Published cache designs as backends."""

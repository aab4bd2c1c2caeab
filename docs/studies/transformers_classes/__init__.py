"""``kvconform check`` on a tiny model of every causal language model class of transformers, and its page."""

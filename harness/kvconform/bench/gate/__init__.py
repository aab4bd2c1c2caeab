"""The regression gate on wall time: the bench with two arms and a decision rule."""

"""The part of the bench that runs in a worker process."""

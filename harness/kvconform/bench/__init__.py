"""Speed: what is timed, how, and what the times say. Nothing is timed that is not right."""

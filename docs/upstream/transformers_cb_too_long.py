"""transformers, continuous batching: one request that is longer than the cache ends the manager for all others.

    pip install torch transformers
    python transformers_cb_too_long.py

Expected: the long request fails by itself (GenerationOutput.error), and the short ones, which were served before, are
served again. It exits with 1 while the bug is there.
"""

import sys

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

PAGE, BLOCKS = 32, 16  # the cache holds 512 tokens; the model takes 4096


def main():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=4096, **sizes)).eval()
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(page_size=PAGE, num_blocks=BLOCKS, max_batch_tokens=64),
    )
    manager.start()

    def ask(name, length):
        manager.add_request([i % 256 for i in range(length)], request_id=name, max_new_tokens=4)
        output = manager.get_result(request_id=name, timeout=30)
        print(
            f"{name}: {None if output is None else output.error or output.generated_tokens}; running:",
            manager.is_running(),
        )
        return output is not None and output.error is None

    before = ask("short", 20)
    ask("longer than the cache", PAGE * BLOCKS + 1)
    after = ask("short again", 20)
    manager.stop(block=True)
    sys.exit(before and not after)


if __name__ == "__main__":
    main()

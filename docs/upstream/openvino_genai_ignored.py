"""OpenVINO GenAI, continuous batching: a prompt longer than the cache makes the pipeline ignore a short one beside it.

    pip install openvino-genai
    python openvino_genai_ignored.py MODEL      # a directory or a GGUF file that ContinuousBatchingPipeline reads

Expected: the long request is IGNORED, and the short one, which is served alone, is served. It exits with 1 while the
bug is there.
"""

import sys

import numpy as np
import openvino
import openvino_genai as genai

BLOCKS, BLOCK = 40, 32  # on the CPU a block has 32 tokens


def main(path):
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks, scheduler.max_num_batched_tokens = BLOCKS, 32
    scheduler.dynamic_split_fuse = True
    pipeline = genai.ContinuousBatchingPipeline(path, scheduler, "CPU", {})

    def serve(*lengths):
        handles = []
        for number, length in enumerate(lengths):
            config = genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = 4, True, False
            ids = np.array([[1 + (7 * i + number) % 200 for i in range(length)]], np.int64)
            handles.append(pipeline.add_request(number, openvino.Tensor(ids), config))
        while pipeline.has_non_finished_requests():
            pipeline.step()
        found = [handle.get_status() for handle in handles]
        print(lengths, "tokens:", *found)
        return found

    alone = serve(44)[0]
    beside = serve(BLOCKS * BLOCK + 1, 44)[1]
    sys.exit(alone != genai.GenerationStatus.IGNORED and beside == genai.GenerationStatus.IGNORED)


if __name__ == "__main__":
    main(sys.argv[1])

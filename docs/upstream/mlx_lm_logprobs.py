"""mlx-lm's server: with top_logprobs, an entry's own token is not the generated one.

    python -m mlx_lm server --model MODEL --port 8080
    python mlx_lm_logprobs.py http://127.0.0.1:8080 [PROMPT]

`_format_top_logprobs` takes the first of an unordered argpartition as the entry's own token. Expected, as in OpenAI's
API: the entry's token and logprob are those of the generated token, which at temperature 0 is the likeliest of the
top ones. It exits with 1 while the bug is there.
"""

import json
import sys
import urllib.request


def main(url, prompt="The answer is"):
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0.0, "logprobs": True, "top_logprobs": 10}
    sent = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(sent) as response:
        choice = json.load(response)["choices"][0]
    wrong = 0
    for place, entry in enumerate(choice["logprobs"]["content"]):
        best = max(entry["top_logprobs"], key=lambda one: one["logprob"])
        wrong += best["id"] != entry["id"]
        print(
            f"token {place}: own id {entry['id']} ({entry['logprob']:.3f}), likeliest {best['id']} "
            f"({best['logprob']:.3f})"
        )
    print(f"text: {choice['text']!r}; {wrong} of {place + 1} own tokens are not the generated ones")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), *sys.argv[2:])

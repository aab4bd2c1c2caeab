"""mlx-lm's server: one request with an empty prompt ends the generation thread, and every later request with it.

    python -m mlx_lm server --model MODEL --port 8080
    python mlx_lm_empty_prompt.py http://127.0.0.1:8080 [PROMPT]

Expected: the empty prompt is refused with HTTP 400, and the server goes on. It exits with 1 while the bug is there.
"""

import json
import sys
import urllib.error
import urllib.request


def main(url, prompt="The answer is"):
    def ask(text):
        body = json.dumps({"prompt": text, "max_tokens": 4, "temperature": 0.0}).encode()
        sent = urllib.request.Request(url + "/v1/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(sent, timeout=60) as response:
                said = json.load(response)["choices"][0]["text"]
        except OSError as error:  # an HTTP error, or a connection that is closed without an answer
            print(f"{text!r}: {error!r}")
            return False
        print(f"{text!r}: {said!r}")
        return True

    before = ask(prompt)
    ask("")
    sys.exit(before and not ask(prompt))


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), *sys.argv[2:])

"""Creates expected.npz: token ids and logits of SmolLM2-135M in transformers, from its GGUF file.

  python -m venv made
  made/bin/pip install "torch==2.13.0" "transformers==5.23.0" "gguf==0.19.0" accelerate
  made/bin/python tests/golden/smollm2/make.py SmolLM2-135M-Instruct.Q4_1.gguf

`./workspace smollm2` downloads the file to its cache folder.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

PARAGRAPH = (
  "The Eiffel Tower stands on the Champ de Mars in Paris, France. It was built between 1887 and "
  "1889 by the company of the engineer Gustave Eiffel as the entrance to the World's Fair, which "
  "celebrated one hundred years since the French Revolution. At 330 metres it was the tallest "
  "structure in the world until 1930, and it is still one of the most visited monuments on Earth."
)
# Digits, contractions, accents, other scripts, code, runs of spaces.
ODD_TEXT = (
  "It's 1234567 o'clock;  naïve café, 東京 🙂\n\tdef f(x):\n\n    return x**2  # π≈3.14159\r\n"
)


def main(path: pathlib.Path) -> None:
  read = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
  model = transformers.AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
  tokenizer = transformers.AutoTokenizer.from_pretrained(**read)
  tokens = tokenizer(PARAGRAPH).input_ids
  with torch.no_grad():
    logits = model(torch.tensor([tokens])).logits[0]
  log_p = torch.log_softmax(logits[:-1], -1)[torch.arange(len(tokens) - 1), tokens[1:]]
  print(f"{len(tokens)} tokens, perplexity {torch.exp(-log_p.mean()):.4f}")
  np.savez_compressed(
    pathlib.Path(__file__).parent / "expected.npz",
    paragraph=PARAGRAPH,
    tokens=np.array(tokens, np.int32),
    log_p=log_p.numpy(),
    last_logits=logits[-1, ::64].numpy(),  # Every 64th logit.
    odd_text=ODD_TEXT,
    odd_tokens=np.array(tokenizer(ODD_TEXT).input_ids, np.int32),
  )


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))

"""Prints a digest of what this machine computes for a fixed batch, with transformers alone.

Two machines with one digest give the same bits for the demo's model. Where the digest differs, bits
of a run made elsewhere prove nothing. Usage: `python tests/compat/probe.py`, in the repository.
"""

import hashlib
import os

os.environ["OMP_NUM_THREADS"] = "1"  # as in recipes/demo.yaml; before torch is imported

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

model = AutoModelForCausalLM.from_pretrained("demo/model", dtype=torch.float32)
ids = torch.arange(8 * 40).reshape(8, 40) % model.config.vocab_size
logits = model(input_ids=ids).logits
torch.logsumexp(logits, dim=-1).square().mean().backward()
digest = hashlib.sha256(logits.detach().numpy().tobytes())
for _, parameter in sorted(model.named_parameters()):
    digest.update(parameter.grad.numpy().tobytes())
print(digest.hexdigest())

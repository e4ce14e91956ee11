"""Writes decoder.safetensors: random weights, and the log-probabilities transformers computes from them.

python tests/golden/make_decoder_golden.py        needs transformers; the tests do not
"""

import json
import os
import sys

import torch
from safetensors.torch import save_file
from transformers import Ministral3Config, Ministral3ForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.dirname(os.path.dirname(HERE))]

from helpers import ROPES, random_state, random_tokens, text_fields

SIZES = dict(vocab_size=43, hidden_size=18, intermediate_size=25, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, head_dim=10)


def main() -> None:
    state = {n: t.bfloat16() for n, t in random_state(text_fields(**SIZES), seed=11).items()}
    tokens = random_tokens(50, SIZES["vocab_size"], seed=12)
    cases, out = [], {f"state.{name}": tensor for name, tensor in state.items()} | {"tokens": torch.tensor(tokens)}
    for rope in ROPES:
        fields = text_fields(rope, **SIZES, tie_word_embeddings=len(cases) % 2 == 1)
        raw = {name: value for name, value in fields.items() if name != "model_type"}
        raw["rope_parameters"] = dict(
            dict(llama_4_scaling_beta=0.0, original_max_position_embeddings=8192), **fields["rope_parameters"]
        )
        model = Ministral3ForCausalLM(Ministral3Config(**raw)).float().eval()
        names = {f"model.{n}" if not n.startswith("lm_head") else n: t.float() for n, t in state.items()}
        if fields["tie_word_embeddings"]:
            names["lm_head.weight"] = names["model.embed_tokens.weight"]
        model.load_state_dict(names)
        with torch.no_grad():
            out[f"logprobs.{len(cases)}"] = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        cases.append(fields)
    save_file(out, os.path.join(HERE, "decoder.safetensors"), metadata={"cases": json.dumps(cases)})


if __name__ == "__main__":
    main()

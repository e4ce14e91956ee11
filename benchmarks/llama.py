"""llama.cpp as a side of `compare.py`: the same weights as a BF16 GGUF file."""

import os
import time

import gguf
import llama_cpp
import torch
from safetensors import safe_open

from model import Config
from runtime.checkpoint import Checkpoint
from runtime.config import read_config


class LlamaCpp:
    def __init__(self, folder: str, scratch: str):
        path, config = os.path.join(scratch, "model.gguf"), read_config(folder)
        write_gguf(Checkpoint(folder), config, path)
        threads = torch.get_num_threads()
        self.llama = llama_cpp.Llama(path, n_ctx=8192, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(self, prompts: list[list[int]], count: int, pixels: list[torch.Tensor] = ()) -> tuple[float, float]:
        (prompt,), times, out = prompts, [time.perf_counter()], []
        self.llama.reset()
        tokens = prompt
        for _ in range(count):
            self.llama.eval(tokens)
            tokens = [self.llama.sample(temp=0.0, repeat_penalty=1.0)]
            out += tokens
            times.append(time.perf_counter())
        self.last = [out]
        return times[1] - times[0], times[-1] - times[1]


def write_gguf(checkpoint: Checkpoint, config: Config, path: str) -> None:
    """`checkpoint` as llama.cpp wants it: pairs of a rotation side by side, instead of half a head apart."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with safe_open(os.path.join(checkpoint.directory, "model.safetensors"), framework="pt") as file:
        for name in file.keys():
            weight = file.get_tensor(name)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                halves = weight.view(-1, 2, config.head_dim // 2, weight.shape[1])
                weight = halves.transpose(1, 2).reshape(weight.shape)
            target = names.get_name(name, try_suffixes=(".weight",))
            if weight.dim() == 1:
                writer.add_tensor(target, weight.float().numpy())
            else:
                data = weight.bfloat16().view(torch.uint8).numpy()
                writer.add_tensor(target, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

"""What the server that ranks are forked from (see processes.py) imports and computes, once for all of them."""

# ruff: noqa: F401
import numpy
import PIL.Image
import pytest
import safetensors.torch
import torch._dynamo  # the first tensor under a __torch_dispatch__ imports it

import generate
import train

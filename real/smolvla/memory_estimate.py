"""Memory of training.

    python -m real.smolvla.memory_estimate [--batch_size=64] [--cameras=2]

Runs one update of the expert on tensors without content (PyTorch's FakeTensorMode) and counts its allocations; only the
overhead of the allocator is not included. The sizes are those of lerobot/smolvla_base.
"""

import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from real.command_line import Parser
from real.smolvla.data import Rows
from real.smolvla.expert import Prefix
from real.smolvla.otql import Settings, Sft
from real.smolvla.tiny_model import SIZES, make_config, write_vlm
from utils.system.entry_point import run_main

LANGUAGE = 16  # Tokens of an instruction; "put the tape in the penholder" has about 8.


class Allocated(TorchDispatchMode):
    """Counter of the bytes of tensors made in the block and still alive: `now`, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in before and storage not in self._known:
                    self._known.add(storage)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _free(self, size: int) -> None:
        self.now -= size


def prefix_shape(policy: SmolVLAPolicy, language: int = LANGUAGE) -> tuple[int, ...]:
    """Returns the shape of an observation's prefix without the state token: [L, layers, 2, heads, width]."""
    vlm = policy.model.vlm_with_expert.config
    image, text = vlm.vision_config, vlm.text_config
    a_camera = (image.image_size // image.patch_size // vlm.scale_factor) ** 2
    tokens = a_camera * len(policy.config.image_features) + language
    return tokens, policy.model.vlm_with_expert.num_vlm_layers, 2, text.num_key_value_heads, text.head_dim


def update_peak(policy: SmolVLAPolicy, settings: Settings) -> dict[str, int]:
    """Returns purpose → bytes of one update of the expert at its peak; the policy may have fake tensors."""
    m, config = settings.batch_size, policy.config
    tokens = policy.get_parameter("model.vlm_with_expert.vlm.model.text_model.norm.weight").dtype
    width = config.output_features["action"].shape[0]
    rows = Rows(*(torch.zeros(1, 6), torch.zeros(1, width), torch.zeros(1, 2), *torch.zeros(3, 1, dtype=torch.bool)))
    unread: Any = None
    learner = Sft(policy, rows, unread, settings)
    shape = prefix_shape(policy)
    prefix = Prefix(torch.zeros(m, *shape, dtype=tokens), torch.ones(m, shape[0], dtype=torch.bool))
    window = {"actions": torch.zeros(m, config.chunk_size, width), "action_mask": torch.ones(m, config.chunk_size)}
    noise, times = torch.zeros(m, config.chunk_size, config.max_action_dim), torch.zeros(m)
    inputs = prefix, torch.zeros(m, dtype=torch.int64), noise, times, window
    learner.flow_step(0, *inputs)  # Creates the optimiser's state.
    with Allocated() as allocated:
        learner.flow_step(0, *inputs)
    trained = _bytes(learner.parameters.values())
    return {
        "frozen model": _bytes(each for each in policy.parameters() if not each.requires_grad),
        "expert": trained,
        "Adam": 2 * trained,
        "prefixes (s and s')": 4 * _bytes([prefix.tokens]),
        "gradient and activations": allocated.peak,
    }


def _bytes(tensors: Any) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def fake_policy(size: str, cameras: int, action_dim: int = 7) -> SmolVLAPolicy:
    """Returns a SmolVLA of a size with tensors without content; the frozen model in bfloat16, as on the hub."""
    with tempfile.TemporaryDirectory() as folder:
        write_vlm(Path(folder), size)
        policy = SmolVLAPolicy(make_config(Path(folder), [f"c{i}" for i in range(cameras)], 6, action_dim, size))
    for module in policy.model.vlm_with_expert.vlm.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(parameter.bfloat16(), requires_grad=False))
    return policy


def main(argv: Sequence[str]) -> None:
    """Prints a table of the memory by purpose."""
    parser = Parser("python -m real.smolvla.memory_estimate", __doc__)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--cameras", type=int, default=2)
    args = parser.parse_args(argv[1:])
    columns = [(bf16, parts) for bf16 in (False, True) for parts in (1, 2, 4)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy = fake_policy(args.size, args.cameras)
        one = 2 * torch.Size(prefix_shape(policy)).numel()
        tables = [
            update_peak(policy, Settings(batch_size=args.batch_size, accumulate=parts, bf16=bf16))
            for bf16, parts in columns
        ]
    print(f"GiB at batch {args.batch_size}, {args.cameras} cameras; a frame's prefix is {one / 2**20:.2f} MiB on disk")
    print("| | " + " | ".join(f"{'bf16' if bf16 else 'fp32'}, {parts} part(s)" for bf16, parts in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in (*tables[0], "sum"):
        sizes = [sum(table.values()) if name == "sum" else table[name] for table in tables]
        print(f"| {name} | " + " | ".join(f"{size / 2**30:.2f}" for size in sizes) + " |")


if __name__ == "__main__":
    run_main(main)

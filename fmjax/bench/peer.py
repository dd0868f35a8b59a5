"""The peer's side of a benchmark: transformers and torch, eager or compiled. The only file here
that imports them.

    python -m fmjax.bench.peer THREADS VARIANT DEVICE

A variant is "eager" or "compiled" (`torch.compile`), on a GPU followed by the attention kernel:
"compiled/flash". AdamW is torch's fused one; on a GPU, matrix products run in bf16 by autocast over
fp32 parameters, as in fmjax."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fmjax.bench import worker

if __name__ == "__main__":  # before torch starts its threads
    worker.pin(int(sys.argv[1]))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmjax.bench.workloads import Result

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


class Block(nn.Module):
    """A layer of GPT-2 as nanoGPT writes it: one projection to queries, keys and values, and
    torch's fused attention.
    """

    def __init__(self, width: int, heads: int, inner: int, dropout: float, epsilon: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, eps=epsilon) for _ in range(2))
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.mlp_proj = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        q, k, v = (
            part.view(rows, length, self.heads, -1).transpose(1, 2)
            for part in self.c_attn(self.ln_1(x)).split(width, dim=2)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(
            self.c_proj(seen.transpose(1, 2).reshape(rows, length, width)),
            self.dropout,
            self.training,
        )
        inner = F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        return x + F.dropout(self.mlp_proj(inner), self.dropout, self.training)


class Gpt(nn.Module):
    """GPT-2 in plain torch, with the weights of a Hugging Face folder and a head tied to the word
    table.
    """

    def __init__(self, reference: Any):
        super().__init__()
        c, body = reference.config, reference.transformer
        self.wte, self.wpe, self.ln_f = body.wte, body.wpe, body.ln_f
        self.dropout = c.embd_pdrop
        self.h = nn.ModuleList(
            Block(c.n_embd, c.n_head, c.n_inner, c.resid_pdrop, c.layer_norm_epsilon)
            for _ in range(c.n_layer)
        )
        for own, their in zip(self.h, body.h, strict=True):
            own.ln_1.load_state_dict(their.ln_1.state_dict())
            own.ln_2.load_state_dict(their.ln_2.state_dict())
            pairs = [(own.c_attn, their.attn.c_attn), (own.c_proj, their.attn.c_proj)]
            for linear, conv in [
                *pairs,
                (own.c_fc, their.mlp.c_fc),
                (own.mlp_proj, their.mlp.c_proj),
            ]:
                linear.load_state_dict({"weight": conv.weight.T, "bias": conv.bias})

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross-entropy."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = F.dropout(self.wte(input_ids) + self.wpe(places), self.dropout, self.training)
        for block in self.h:
            x = block(x)
        logits = self.ln_f(x) @ self.wte.weight.T
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), labels.view(-1))


class Peer:
    """One job at a time."""

    def __init__(self, threads: int, variant: str, device: str) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        transformers.logging.set_verbosity_error()
        self.device = "cuda" if device == "gpu" else "cpu"
        style, *rest = variant.split("/")
        self.compiled = style == "compiled"
        self.kernel = KERNELS[rest[0]] if rest else None

    def describe(self) -> Result:
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        }

    def open(self, folder: str, phase: str) -> Result:
        """Loads the model of a job, with the dropout of a phase."""
        torch._dynamo.reset()
        self.job, batches = worker.read_job(Path(folder), "peer")
        # Losses take int64, and conversion is not part of a step.
        self.batches = [
            {
                name: array.astype("int64") if array.dtype.kind == "i" else array
                for name, array in batch.items()
            }
            for batch in batches
        ]
        architecture = getattr(transformers, self.job["architecture"])
        options = dict(self.job["peer_dropout"][phase])
        model = architecture.from_pretrained(
            Path(folder) / "model", attn_implementation="sdpa", dtype=torch.float32, **options
        )
        self.kind = self.job["kind"]
        if self.kind == "train" and self.job["architecture"] == "GPT2LMHeadModel":
            model = Gpt(model)
        self.model = model.to(self.device).train(self.kind == "train")
        self.call: Any = self.loss if self.kind == "train" else self.hidden
        if self.compiled and self.kind != "generate":
            self.call = torch.compile(self.call, dynamic=True if self.job["dynamic"] else None)
        if self.kind == "train":
            self.optimizer = self.adamw()
        self.step = getattr(self, self.kind)
        return {}

    def adamw(self) -> Any:
        """Applies weight decay to all parameters except biases and norms, as our side does."""
        given = self.job["optimizer"]
        norms = {
            id(p)
            for m in self.model.modules()
            if "Norm" in type(m).__name__
            for p in m.parameters(recurse=False)
        }
        named = list(self.model.named_parameters())
        kept = [p for name, p in named if name.endswith("bias") or id(p) in norms]
        decayed = [p for name, p in named if not name.endswith("bias") and id(p) not in norms]
        groups = [
            {"params": decayed, "weight_decay": given["weight_decay"]},
            {"params": kept, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=given["learning_rate"], fused=True)

    def loss(self, batch: Any) -> torch.Tensor:
        found = self.model(**batch)
        return found if isinstance(found, torch.Tensor) else found.loss

    def hidden(self, batch: Any) -> torch.Tensor:
        return self.model(**batch).last_hidden_state

    def settings(self) -> Any:
        """Returns the contexts of a forward pass: bf16 on a GPU, and the attention kernel."""
        half = self.job["dtype"] == "bfloat16"
        return (
            torch.autocast(self.device, torch.bfloat16) if half else nullcontext(),
            sdpa_kernel(self.kernel) if self.kernel else nullcontext(),
        )

    def train(self, index: int) -> torch.Tensor:
        half, kernel = self.settings()
        with kernel:
            with half:
                loss = self.call(self.next(index))
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.inference_mode()
    def forward(self, index: int) -> torch.Tensor:
        half, kernel = self.settings()
        with half, kernel:
            found = self.call(self.next(index))
        if self.device == "cuda":
            torch.cuda.synchronize()
        return found

    @torch.inference_mode()
    def generate(self, index: int) -> torch.Tensor:
        half, kernel = self.settings()
        count = self.job["new_tokens"]
        options = {
            "max_new_tokens": count,
            "min_new_tokens": count,
            "num_beams": self.job["beams"],
            "do_sample": False,
        }
        if self.compiled:
            options["cache_implementation"] = "static"  # which transformers compiles by itself
        with half, kernel:
            return self.model.generate(**self.next(index), **options)

    def inputs(self, folder: str, **job: Any) -> Result:
        from fmjax.bench.peer_inputs import feed

        return feed(Path(folder), **job)

    def next(self, index: int) -> Any:
        batch = self.batches[index % len(self.batches)]
        return {name: torch.from_numpy(array).to(self.device) for name, array in batch.items()}

    def wait(self, result: torch.Tensor) -> Any:
        """Returns a step's result as JSON: a loss, the sum of magnitudes of hidden states, or the
        tokens.
        """
        if self.kind == "generate":
            return result.tolist()
        return float(result.abs().sum()) if self.kind == "forward" else float(result)


if __name__ == "__main__":
    worker.serve(lambda: Peer(int(sys.argv[1]), *sys.argv[2:]))

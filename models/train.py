"""Train the demo model: a small Llama on public-domain books, from the tokenizer to a half-precision checkpoint.

    python models/train.py BOOKS.txt.xz --out models/demo

BOOKS is UTF-8 text (plain or .xz), books separated by ``<|endoftext|>``. Every book whose index is in HELD_OUT stays
unseen: the first ones give ``calibration.txt``, the others ``heldout.txt``, and other pages of theirs choose the
checkpoint.

To save time the first part of the tokens trains half of the layers. The others are then inserted as copies whose
output projections are zero, so that the function is unchanged at that moment (block expansion, Wu et al. 2024,
"LLaMA Pro"), and everything is trained to the end. The learning rate is constant after warm-up and goes linearly to
zero over the last part (Hägele et al. 2024). Runs on the CPU in two to three hours on two cores; a run that is stopped
goes on from its last state.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

END = "<|endoftext|>"
HELD_OUT = {"calibration": (86, 23), "heldout": (111, 55, 76, 117)}
CALIBRATION_BYTES, HELD_OUT_BYTES, CHOOSING_BYTES = 64_000, 136_000, 120_000
VOCABULARY, LAYERS, SEQUENCE, BATCH = 3072, 4, 256, 16
TOKENS_PER_PARAMETER = 15.3
HALF_DEPTH_TOKENS_PER_PARAMETER = 4.0  # so many of them train half of the layers
COOL_DOWN = 0.2  # share of all tokens
WARM_UP_STEPS, PEAK_RATE = 300, 3e-3


def config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip


def excerpt(book: str, size: int, start: int = 2_000) -> str:
    """About `size` bytes of a book from whole paragraphs, after `start` characters (title page and contents)."""
    begin = book.find("\n\n", start) + 2
    end = book.rfind("\n\n", begin, begin + size)
    return book[begin:end].strip() + "\n"


def prepare(books: Path, out: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Write tokenizer.json and the held-out texts; return the tokens to train on and those that choose a checkpoint."""
    packed = books.read_bytes()
    library = (lzma.decompress(packed) if books.suffix == ".xz" else packed).decode("utf-8").split(END)
    held_out = {index for indices in HELD_OUT.values() for index in indices}
    training = [book.strip() for index, book in enumerate(library) if index not in held_out]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        training, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    )
    tokenizer.save(str(out / "tokenizer.json"))

    for name, total in (("calibration", CALIBRATION_BYTES), ("heldout", HELD_OUT_BYTES)):
        pieces = [excerpt(library[index], total // len(HELD_OUT[name])) for index in HELD_OUT[name]]
        (out / f"{name}.txt").write_text("\n".join(pieces), encoding="utf-8")
    unseen = [library[index] for index in HELD_OUT["heldout"] if len(library[index]) > 200_000]
    choosing = [excerpt(book, CHOOSING_BYTES // len(unseen), start=100_000) for book in unseen]

    def encode(texts: list[str]) -> torch.Tensor:
        ids = [np.array([0, *encoding.ids], dtype=np.int64) for encoding in tokenizer.encode_batch(texts)]
        return torch.from_numpy(np.concatenate(ids))

    return encode(training), encode(choosing)


def rate(seen: int, total: int, step: int) -> float:
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP_STEPS, (total - seen) / (COOL_DOWN * total))


def loss_of(model: Callable[..., Any], batch: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))


@torch.no_grad()
def held_out_loss(model: Callable[..., Any], tokens: torch.Tensor) -> float:
    rows = tokens[: (len(tokens) - 1) // SEQUENCE * SEQUENCE + 1].unfold(0, SEQUENCE + 1, SEQUENCE)
    rows = rows[: len(rows) // BATCH * BATCH]
    return float(np.mean([loss_of(model, rows[i : i + BATCH]).item() for i in range(0, len(rows), BATCH)]))


def expand(half: LlamaForCausalLM) -> LlamaForCausalLM:
    """Twice the layers, same function: each layer is followed by a copy of it that adds nothing yet."""
    weights = half.state_dict()
    grown = LlamaForCausalLM(config(LAYERS))
    state = grown.state_dict()
    for name in state:
        if not name.startswith("model.layers."):
            state[name] = weights[name]
            continue
        _, _, layer, rest = name.split(".", 3)
        state[name] = weights[f"model.layers.{int(layer) // 2}.{rest}"]
        if int(layer) % 2 == 1 and rest.startswith(("self_attn.o_proj", "mlp.down_proj")):
            state[name] = torch.zeros_like(state[name])
    grown.load_state_dict(state)
    return grown


def optimizer_of(model: LlamaForCausalLM) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)


def train(
    tokens: torch.Tensor,
    choosing: torch.Tensor,
    out: Path,
    state_file: Path,
    tokens_per_parameter: float,
    checkpoint: Path | None = None,
) -> None:
    parameters = sum(p.numel() for p in LlamaForCausalLM(config(LAYERS)).parameters())
    total = math.ceil(tokens_per_parameter * parameters)
    half_depth = HALF_DEPTH_TOKENS_PER_PARAMETER * parameters
    torch.manual_seed(0)
    seen, step, best, seconds = 0, 0, math.inf, 0.0
    model = LlamaForCausalLM(config(LAYERS // 2))
    optimizer = optimizer_of(model)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        seen, step, best, seconds = (state[key] for key in ("seen", "step", "best", "seconds"))
        if seen >= half_depth:
            model = LlamaForCausalLM(config(LAYERS))
            optimizer = optimizer_of(model)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    elif checkpoint is not None:
        model = LlamaForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float32)
        optimizer = optimizer_of(model)
        seen = json.loads((checkpoint / "training.json").read_text())["tokens"]
        step = seen // (BATCH * SEQUENCE)
    compiled = torch.compile(model)
    starts = len(tokens) - SEQUENCE - 1
    clock = time.monotonic()
    while seen < total:
        if model.config.num_hidden_layers < LAYERS and seen >= half_depth:
            model = expand(model)
            optimizer = optimizer_of(model)
            compiled = torch.compile(model)
        for group in optimizer.param_groups:
            group["lr"] = rate(seen, total, step)
        offsets = torch.randint(starts, (BATCH,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([tokens[i : i + SEQUENCE + 1] for i in offsets.tolist()])
        loss = loss_of(compiled, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen, step = seen + BATCH * SEQUENCE, step + 1
        if step % 250 == 0 or seen >= total:
            elapsed = seconds + time.monotonic() - clock
            unseen = held_out_loss(compiled, choosing)
            print(f"{step:6d} {seen / 1e6:6.2f}/{total / 1e6:.2f}M tokens, {elapsed / 60:5.1f} min, "
                  f"loss {loss.item():.4f}, held out {unseen:.4f}", flush=True)  # fmt: skip
            if unseen < best:
                best = unseen
                weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
                del weights["lm_head.weight"]  # tied: the same as the embedding
                save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
                model.config.save_pretrained(out)
                (out / "training.json").write_text(json.dumps(
                    {"parameters": parameters, "tokens": seen, "of": total, "minutes": round(elapsed / 60, 1),
                     "held_out_loss": round(best, 4), "torch": torch.__version__}, indent=2) + "\n")  # fmt: skip
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "seen": seen, "step": step,
                        "best": best, "seconds": elapsed}, state_file)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo")
    parser.add_argument("--state", type=Path, default=Path("training-state.pt"), help="where a stopped run goes on")
    parser.add_argument("--checkpoint", type=Path, help="a folder to go on from where there is no state: weights alone")
    parser.add_argument("--tokens-per-parameter", type=float, default=TOKENS_PER_PARAMETER)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokens, choosing = prepare(arguments.books, arguments.out)
    print(f"{len(tokens) / 1e6:.2f}M tokens to train on, {len(choosing)} to choose the checkpoint", flush=True)
    train(
        tokens, choosing, arguments.out, arguments.state, arguments.tokens_per_parameter, arguments.checkpoint
    )  # fmt: skip


if __name__ == "__main__":
    main()

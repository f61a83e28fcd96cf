r"""LMEye: a frozen language model asks a frozen CLIP about a picture (arXiv 2305.03701, version 1).

A static mapping hands the language model one picture token and hopes that it holds everything. LMEye lets the
model *ask*: it reads the question, its hidden state becomes a request, the request meets the picture inside
CLIP's own frozen text transformer, and what comes out is handed back as one more token (or Q).

    picture ──► frozen CLIP image tower ──► f ──► align, + img ──► <img>                           1. see
    [bos]Image:<img>\nQuestion: {question}<img-d> ──► frozen LM ──► h ──► request ──► r            2. ask
                             (in this pass <img-d> is the vector img_d)
    f ──► decompose ──► f₁ … f_N
    [SOS, f₁ … f_N, r, EOS] ──► frozen CLIP text transformer ──► v                                 3. interact
    <img-d> becomes transmit(v) + img_d, and the LM reads on: \nAnswer: {answer}[eos]              4. tell
    Captions have no question, so nothing is asked: [bos]Image:<img> {caption}[eos]

Trained: the four linear layers `align`, `request`, `decompose`, `transmit` and two vectors, `img` and `img_d`.
Frozen: every weight of the LM and of CLIP; gradients flow through the LM and CLIP's text transformer, not into them.
Phase 1 (`--stage 1`) trains `align` and `img` on captions, phase 2 the others on instructions: see `set_trained`.

Steps 2 and 4 are two passes of the LM in the paper, over one beginning. Attention is causal: nothing before <img-d>
depends on what stands there. So the beginning is run once, and its keys and values serve both (where `align` trains,
autograd adds up what both send back). Keys and values of <img-d> are dropped: step 4 runs it anew, and what follows.

Axes, in the shape comments of this file:
    B records   T tokens, T' of the answer   K choices   D width of the LM's embeddings   V size of its vocabulary
    C CLIP's joint space   W width of its text tower   S side of its pictures   N decomposed features   Q <img-d> slots
"""

import inspect
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import nn


@dataclass
class Settings:
    """What must be known to build a model. Each is a flag of train.py, too: `n_features` is `--n-features`."""
    preset: str = "opt-1.3b"  # a row of PRESETS, or a name for models of your own
    llm: str = "facebook/opt-1.3b"  # causal language model: a hub name or a local folder
    clip: str = "ViT-L-14:openai"  # as open_clip names it: NAME:TAG, NAME:FILE, hf-hub:ORG/NAME, local-dir:FOLDER
    interaction: str = "full"  # or static: no <img-d>, the picture token must do; norequest: the request is zero
    n_features: int = 5  # N, into how many words of CLIP's the picture is decomposed
    n_slots: int = 1  # Q, how many <img-d> slots carry the answer to the request back
    dropout: float = 0.5  # on the decomposed features
    precision: str = "auto"  # of the frozen weights: bf16, fp16 or fp32; auto: see device_and_dtype


PRESETS = {
    "mini": Settings("mini", "out/mini/llm", "local-dir:out/mini/clip", dropout=0.0),  # for a laptop, in minutes
    "opt-1.3b": Settings("opt-1.3b"),
    "bloomz-7b1": Settings("bloomz-7b1", "bigscience/bloomz-7b1", n_slots=5),
}
INTERACTIONS = ("full", "static", "norequest")
IMAGE, QUESTION, ANSWER = "Image:", "\nQuestion: ", "\nAnswer:"  # the template: for training, generation and scoring


class Tokens(NamedTuple):
    """Token ids with their masks (1 real, 0 padding). For captions `question` has no columns."""
    question: torch.Tensor  # (B, T) left-padded
    question_mask: torch.Tensor
    answer: torch.Tensor  # (B, T') right-padded, eos included
    answer_mask: torch.Tensor


# ---- The method ----------------------------------------------------------------------------------------------


class LMEye(nn.Module):
    """Four linear layers and two vectors between a frozen language model and a frozen CLIP.

    `f` is always the picture feature of `encode_image`, (B, C). `questions` is a list of B strings, or (except in
    `score`) None for captions: the answer then follows the picture at once, as in phase 1, and nothing is asked.
    """

    def __init__(self, settings, llm, tokenizer, clip, preprocess, clip_tokenizer):
        super().__init__()
        self.settings, self.preprocess = settings, preprocess
        self.tokenizer, self.clip_tokenizer = tokenizer, clip_tokenizer
        self.llm, self.clip = llm.requires_grad_(False).eval(), clip.requires_grad_(False).eval()
        self.text = getattr(clip, "text", clip)  # open_clip.CLIP keeps its text transformer flat, others in .text
        if getattr(self.text, "attn_mask", None) is None:
            raise UserError(f"--clip {settings.clip}: can't be used: its text transformer is not causal")
        accepted = inspect.signature(llm.base_model.forward).parameters
        self.takes_positions = "position_ids" in accepted
        self.cache_name = "past_key_values" if "past_key_values" in accepted else "cache"  # since transformers 5.24

        # [bos] where the model's own tokenizer writes one; SOS and EOS as CLIP's tokenizer frames an empty text.
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id in tokenizer("").input_ids else []
        self.register_buffer("image_ids", torch.tensor(bos + self.ids(IMAGE)), persistent=False)
        self.register_buffer("answer_ids", torch.tensor(self.ids(ANSWER)), persistent=False)
        self.register_buffer("sos_eos", clip_tokenizer([""])[0, :2].clone(), persistent=False)
        self.to(llm.device)

        N, Q = settings.n_features, settings.n_slots
        longest = len(self.text.positional_embedding) - 3  # beside SOS, the request and EOS
        if not (1 <= N <= longest and 1 <= Q <= 100 and 0 <= settings.dropout < 1 and settings.interaction in INTERACTIONS):
            raise UserError(f"out of range: --n-features (1 to {longest}), --n-slots (to 100), --dropout (to 1) or --interaction")
        words = self.embed(torch.linspace(0, len(tokenizer) - 1, 1000, device=self.device).long())  # some of them
        D, W = words.shape[1], self.text.positional_embedding.shape[1]
        C = self.encode_words(self.text.token_embedding(self.sos_eos)[None]).shape[1]
        self.align = nn.Linear(C, D)  # the picture, as a word of the language model
        self.request = nn.Linear(D, W)  # the model's state, as a word of CLIP's
        self.decompose = nn.Linear(C, N * W)  # the picture, as N words of CLIP's
        self.transmit = nn.Linear(C, D * Q)  # CLIP's answer, as Q words of the language model
        # Beyond its original limit Phi-3 rotates all keys anew, and cached ones are wrong; BLOOM was trained on 2,048 tokens.
        config = llm.config.get_text_config()
        self.context = (getattr(config, "original_max_position_embeddings", None)
                        or getattr(config, "max_position_embeddings", None) or 2048)
        self.max_text_tokens = self.context - len(self.image_ids) - 1 - Q - len(self.answer_ids)  # question and answer
        self.spread = words.float().std().item()  # of words' numbers: the two vectors begin as large
        self.img = nn.Parameter(self.spread * torch.randn(D))
        self.img_d = nn.Parameter(self.spread * torch.randn(D))
        self.dropout = nn.Dropout(settings.dropout)
        weights = []
        for p in (*llm.parameters(), *clip.parameters()):
            weights.append(p.detach().flatten()[::max(1, p.numel() // 2)][:2].float())  # the first and the middle one
        self.fingerprint = torch.cat(weights).cpu()  # tells models of one shape apart
        self.to(self.device).eval()

    # -- 1. see: the picture becomes one feature, the feature becomes the <img> token
    #       f = CLIP_image(picture)        <img> = align f + img

    @torch.no_grad()
    def encode_image(self, pixels):
        """Pixels (B, 3, S, S), as `preprocess` makes them → f (B, C): projected, not normalised, fp32."""
        pixels = self.to_device(pixels)[0].to(self.text.transformer.get_cast_dtype())  # that of both towers of CLIP
        return self.clip.encode_image(pixels).float()

    def see(self, f):
        return (self.align(f) + self.img)[:, None]  # (B, 1, D)

    # -- 2. ask: the last hidden state at <img-d> becomes a vector in the space of CLIP's words
    #       h = LM([bos] Image: <img> Question: … <img-d>), its last state        r = request h

    def ask(self, h):
        r = self.request(h.float())  # (B, D) → (B, W)
        return torch.zeros_like(r) if self.settings.interaction == "norequest" else r  # its place stays, but empty

    # -- 3. interact: request and picture meet as words of one sentence in CLIP's text transformer
    #       f₁ … f_N = decompose f        v = CLIP_text([SOS, f₁ … f_N, r, EOS]), at EOS, projected

    def interact(self, f, r):
        features = self.dropout(self.decompose(f)).unflatten(-1, (self.settings.n_features, -1))  # (B, N, W)
        sos, eos = self.text.token_embedding(self.sos_eos).expand(len(f), -1, -1).split(1, dim=1)  # (B, 1, W) each
        return self.encode_words(torch.cat([sos, features, r[:, None], eos], 1))  # v (B, C)

    def encode_words(self, words):
        """CLIP's text path from word vectors on, (B, T, W) → (B, C), with its mask cut to T. The state is read at the last
        place: there are no token ids to look for EOS among. Equals `clip.encode_text` where the words are the token
        embeddings of a text that ends with its EOS (`check_clip` in train.py compares)."""
        text, T = self.text, words.shape[1]
        x = (words + text.positional_embedding[:T]).to(text.transformer.get_cast_dtype())
        x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:T, :T])[:, -1])
        if isinstance(text.text_projection, nn.Linear):
            x = text.text_projection(x)
        elif text.text_projection is not None:
            x = x @ text.text_projection
        return x.float()

    # -- 4. tell: what came out stands in the place of <img-d>, and the language model reads on
    #       <img-d> = transmit v + img_d

    def tell(self, v):
        return self.transmit(v).unflatten(-1, (self.settings.n_slots, -1)) + self.img_d  # (B, Q, D)

    # -- The two passes of the language model

    def prefill(self, f, question, question_mask):
        """Steps 1 to 4 up to the answer → (x, mask, cache): the caller runs the LM over x (B, T, D) on top of the cache.
        With <img-d> the cache holds all that precedes it and x begins there; for captions and `static` there is no
        cache, and x is everything. `mask` covers both.
        """
        B, Q = len(f), self.settings.n_slots
        x = torch.cat([self.embed(self.image_ids).expand(B, -1, -1), self.see(f), self.embed(question)], 1)
        mask = F.pad(question_mask, (x.shape[1] - question.shape[1], 0), value=1)  # padding now lies behind <img>
        if question.shape[1] == 0:
            return x, mask, None  # a caption: the answer follows the picture at once

        order = mask.argsort(dim=1, stable=True)  # all padding to the left: inside, a sliding window would count it
        x, mask = x.take_along_dim(order[..., None], 1), mask.take_along_dim(order, 1)
        cache = None
        if self.settings.interaction != "static":
            slots, mask_with_slots = self.img_d.expand(B, Q, -1), F.pad(mask, (0, Q), value=1)
            if torch.is_grad_enabled():  # in two runs: the first needs no graph where align is frozen
                _, cache = self.run_llm(x, mask)
                h, cache = self.run_llm(slots, mask_with_slots, cache)
            else:  # one is faster
                h, cache = self.run_llm(torch.cat([x, slots], 1), mask_with_slots)
            cache.crop(-Q)  # forget <img-d>: the keys and values of all that precedes it serve the second pass
            v = self.interact(f, self.ask(h[:, -1]))  # the state at the last slot, which attends to the others
            x, mask = self.tell(v), mask_with_slots
        x = torch.cat([x, self.embed(self.answer_ids).expand(B, -1, -1)], 1)
        return x, F.pad(mask, (0, len(self.answer_ids)), value=1), cache

    def run_llm(self, x, mask, cache=None):
        """Run the frozen LM over embeddings x (B, T, D) → (last hidden states (B, T, D), cache with x appended). `mask`
        covers what the cache holds and x. Positions count real tokens only (BLOOM takes them from the mask itself)."""
        if cache is None:
            cache = transformers.DynamicCache()  # without a config: a cache with a sliding window can't be cropped
        options = {self.cache_name: cache}
        if self.takes_positions:
            options["position_ids"] = (mask.cumsum(1)[:, mask.shape[1] - x.shape[1]:] - 1).clamp(min=0)
        out = self.llm.base_model(inputs_embeds=x.to(self.llm.dtype), attention_mask=mask, use_cache=True, **options)
        return out.last_hidden_state, cache

    def logits(self, h):
        return self.llm.get_output_embeddings()(h).float()  # (…, V)

    # -- Loss

    def loss(self, f, questions, answers):
        """Cross-entropy of the answers and their eos, averaged over tokens; a scalar, fp32."""
        tokens = self.tokens(questions, answers)
        return self.loss_sum(f, tokens) / tokens.answer_mask.sum()

    def loss_sum(self, f, tokens):
        """The same, summed over tokens, from Tokens: what a training loop with accumulation needs."""
        labelled = tokens.answer_mask.flatten().nonzero()[:, 0]  # places in B·T'; on a GPU this would wait
        f, question, question_mask, answer, answer_mask, labelled = self.to_device(f, *tokens, labelled)
        x, mask, cache = self.prefill(f, question, question_mask)
        x_answer = torch.cat([x, self.embed(answer[:, :-1])], 1)
        h, _ = self.run_llm(x_answer, torch.cat([mask, answer_mask[:, :-1]], 1), cache)
        h = h[:, x.shape[1] - 1:].flatten(0, 1)  # (B·T', D): the state before each token of the answer
        return TokenLosses.apply(h[labelled], answer.flatten()[labelled], self.llm.get_output_embeddings()).sum()

    # -- Generation and scoring

    @torch.no_grad()
    def stream(self, f, questions=None, max_tokens=64, temperature=0.0, top_k=0, top_p=1.0, generator=None):
        """Yield the answers' tokens, (B,) at a time, at most max_tokens, until all rows end; an ended one repeats eos.
        temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens; `generator` makes sampling repeatable.
        """
        B, eos = len(f), self.tokenizer.eos_token_id
        f, question, question_mask = self.to_device(f, *self.tokens(questions, [""] * B)[:2])  # answers are yet to come
        x, mask, cache = self.prefill(f, question, question_mask)
        ended = torch.zeros(B, dtype=torch.bool, device=self.device)
        for _ in range(max_tokens):
            h, cache = self.run_llm(x, mask, cache)
            token = sample_token(self.logits(h[:, -1]), temperature, top_k, top_p, generator).masked_fill(ended, eos)
            yield token
            ended |= (token == eos) | (mask.sum(1) >= self.context - 1)  # or the context is full
            if ended.all():
                return
            x, mask = self.embed(token)[:, None], torch.cat([mask, (~ended).long()[:, None]], 1)

    def generate(self, f, questions=None, **options):
        """Answers to `questions` about the pictures `f`, or captions: a list of B strings. Options as `stream`."""
        tokens = torch.stack(list(self.stream(f, questions, **options)), 1)  # (B, T)
        return [self.decode(row) for row in tokens.tolist()]

    @torch.no_grad()
    def score(self, f, questions, choices):
        """Σ log p of each choice's tokens, without eos, after its question (read once): (B, K) for B lists of K."""
        B, K = len(choices), len(choices[0])
        if isinstance(questions, str) or any(len(row) != K or isinstance(row, str) for row in choices):
            raise UserError("score takes a list of questions and a list of choices for each, all of one length")
        every_choice = [choice for row in choices for choice in row]
        every_question = [question for question in questions for _ in range(K)]
        tokens = self.tokens(every_question, every_choice)  # (B·K, …); raises where a pair is too long
        if tokens.answer_mask.sum(1).min() < 2:
            raise UserError("score: a choice is empty, or has only letters that the tokenizer has no token for")
        scored = F.pad(tokens.answer_mask[:, 1:], (0, 1))  # a token counts if another follows it: not eos, not padding
        places = scored.flatten().nonzero()[:, 0]
        f, question, question_mask, ids, ids_mask, places = self.to_device(
            f, tokens.question[::K], tokens.question_mask[::K], tokens.answer, tokens.answer_mask, places)

        x, mask, cache = self.prefill(f, question, question_mask)
        first, cache = self.run_llm(x, mask, cache)
        cache.batch_repeat_interleave(K)
        mask = torch.cat([mask.repeat_interleave(K, 0), ids_mask[:, :-1]], 1)
        rest, _ = self.run_llm(self.embed(ids[:, :-1]), mask, cache)
        h = torch.cat([first[:, -1:].repeat_interleave(K, 0), rest], 1).flatten(0, 1)  # (B·K·T', D): before each token
        logp = torch.zeros(len(h), device=self.device)
        logp[places] = -TokenLosses.apply(h[places], ids.flatten()[places], self.llm.get_output_embeddings())
        return logp.view(B, K, -1).sum(2)

    # -- Text, tokens, embeddings

    def ids(self, text):
        """Token ids of a text, or of each of a list. What looks like a special token in it, "</s>", is read as text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def embed(self, ids):
        return self.llm.get_input_embeddings()(ids)  # (…, D)

    def token_ids(self, questions, answers):
        """Texts → two lists of lists of token ids: of the questions (empty for captions), of the answers with eos.
        Each part is tokenised by itself, so that a question's tokens can't depend on its answer's.
        """
        question_ids = [[] for _ in answers]
        if questions is not None:
            question_ids = self.ids([QUESTION + question for question in questions])
        answer_ids = self.ids([" " + answer for answer in answers])
        return question_ids, [ids + [self.tokenizer.eos_token_id] for ids in answer_ids]

    def tokens(self, questions, answers):
        """Texts → Tokens, on the CPU. UserError if a record exceeds the LM's context, or if the lists do not fit."""
        if isinstance(questions, str) or (questions is not None and len(questions) != len(answers)):
            raise UserError("a list with one question for each picture or answer is needed")
        question_ids, answer_ids = self.token_ids(questions, answers)
        longest = max(len(q) + len(a) for q, a in zip(question_ids, answer_ids))
        if longest > self.max_text_tokens:
            raise UserError(f"{longest} tokens, but the language model's context has room for {self.max_text_tokens}: "
                            "shorten question or answer")
        return Tokens(*pad(question_ids, side="left"), *pad(answer_ids))

    def decode(self, ids):
        """Token ids of an answer → text. (An ended answer repeats eos, which is left out.)"""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    @property
    def device(self):
        return self.image_ids.device  # also after `model.to(…)`

    def to_device(self, *tensors):
        """The same on the model's device. From pinned memory the copy to a GPU is asynchronous."""
        if self.device.type == "cuda":
            tensors = [tensor if tensor.is_cuda else tensor.pin_memory() for tensor in tensors]
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    # -- What is trained, saved and loaded

    def train(self, mode=True):
        """As nn.Module.train, but the frozen parts stay in eval: their dropout must not wake up."""
        super().train(mode)
        self.llm.eval()
        self.clip.eval()
        return self

    def adapter(self, stage):
        """{name: parameter} of all that a file of this stage holds, stage 1's as well; layers that are not used are left out."""
        parts = ["align", "img"]
        if stage == 2 and self.settings.interaction != "static":
            parts += ["decompose", "transmit", "img_d"]
            if self.settings.interaction == "full":
                parts.append("request")
        return {name: p for name, p in self.named_parameters() if name.split(".")[0] in parts}

    def set_trained(self, stage, train_align=False):
        """Make exactly the tensors of this stage trainable → {name: parameter}.
            stage 1            align, img
            stage 2, full      request, decompose, transmit, img_d (norequest: no request); train_align adds align, img
            stage 2, static    align, img: there is nothing else
        """
        trained = self.adapter(stage)
        if stage == 2 and self.settings.interaction != "static" and not train_align:
            for name in self.adapter(1):
                del trained[name]
        for name, p in self.named_parameters():
            p.requires_grad_(name in trained)
        return trained

    def save(self, path, stage):
        """Write the adapter to a safetensors file, with settings and stage in its metadata, atomically."""
        header = {"stage": stage, "settings": asdict(self.settings), "fingerprint": self.fingerprint.tolist()}
        tensors = {name: p.detach().cpu() for name, p in self.adapter(stage).items()}
        write_atomically(path, safetensors.torch.save(tensors, {"lmeye": json.dumps(header)}))

    def load(self, path):
        """Load an adapter into this model → its stage. UserError if it belongs to another model or shape."""
        stage, saved, weights, tensors = read_adapter(path)
        if weights.shape != self.fingerprint.shape or not torch.allclose(weights, self.fingerprint, 0.01, 1e-6):
            raise UserError(f"{path}: was trained with --llm {saved.llm} --clip {saved.clip}; the weights of --llm "
                            f"{self.settings.llm} --clip {self.settings.clip} are others")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        needed = {name: tuple(p.shape) for name, p in self.adapter(stage).items()}
        for name in shapes | needed:
            if shapes.get(name) != needed.get(name):
                raise UserError(f"{path}: holds {name} of shape {shapes.get(name)}, this model needs {needed.get(name)}")
        self.load_state_dict(tensors, strict=False)  # the frozen models stay as they are
        return stage

    @classmethod
    def from_settings(cls, settings):
        """Load both frozen models as the settings name them; the layers are new. In eval mode. UserError if that fails."""
        where = device_and_dtype(settings.precision)
        return cls(settings, *load_llm(settings.llm, *where), *load_clip(settings.clip, *where))


class TokenLosses(torch.autograd.Function):
    """The cross-entropy of each token: states h (n, D), targets (n,), the LM's frozen head → losses (n,), fp32.
    The logits of a whole batch would be the largest tensors of a step, and the head is frozen: so each chunk's gradient
    with respect to h is taken at once, and its logits are gone before the next chunk's are computed.
    """
    LOGITS = 25_000_000  # of a chunk, at most: 500 tokens of OPT's, 100 of BLOOM's

    @staticmethod
    def forward(ctx, h, targets, head):
        losses, gradients = [], []
        needed, chunk = ctx.needs_input_grad[0], max(1, TokenLosses.LOGITS // len(head.weight))
        for part, target in zip(h.split(chunk), targets.split(chunk)):
            with torch.set_grad_enabled(needed):
                part = part.detach().requires_grad_(needed)
                loss = F.cross_entropy(head(part).float(), target, reduction="none")
                if needed:
                    gradients.append(torch.autograd.grad(loss.sum(), part)[0])
            losses.append(loss.detach())
        if needed:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, weight):  # (n,): the gradient with respect to each loss
        gradient = ctx.saved_tensors[0]
        return (gradient * weight[:, None]).to(gradient.dtype), None, None


def sample_token(logits, temperature, top_k, top_p, generator):
    """Choose the next token from logits (B, V) → (B,)."""
    if temperature < 0.01:  # 0, or so near that it is taken for 0
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(-1, descending=True)
    p = logits.softmax(-1)
    if top_p < 1:  # at 1 rounding errors would drop the least likely ones
        p = p.masked_fill(p.cumsum(-1) - p > top_p, 0)  # the tokens before it already hold top_p
    if top_k:
        p[:, top_k:] = 0  # the likeliest come first
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


def pad(rows, side="right"):
    """Token ids of B texts of any lengths → (ids, mask), each (B, longest), with the padding at that side."""
    longest = max(len(row) for row in rows)
    ids, mask = np.zeros((2, len(rows), longest), np.int64)
    for i, row in enumerate(rows):
        places = slice(len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, places], mask[i, places] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


# ---- The frozen models ---------------------------------------------------------------------------------------


def device_and_dtype(precision):
    """(device, dtype of the frozen weights) for a `precision` setting; the device is a CUDA GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def load_llm(name, device, dtype):
    """(causal LM, tokenizer) from a hub name or local folder, by transformers. UserError if that fails, or if weights
    are missing (transformers would make them up at random) or compressed, or if the tokenizer does not fit."""
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith(("/", ".", "~"))):
        raise UserError(f"--llm {name}: no such folder, and not a hub name, ORGANISATION/NAME, as facebook/opt-1.3b is")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        llm, found = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, output_loading_info=True)
    except Exception as error:  # what a foreign folder or an absent network raises is not ours to foresee
        raise UserError(f"--llm {name}: can't be loaded ({reason(error, name)})") from error
    known = (*llm.state_dict(), *llm.base_model.state_dict())  # names of weights, with the prefix "model." and without
    scales = [key for key in found["unexpected_keys"] if key.startswith(known)]  # as fc1.weight_scale: it is compressed
    wrong = sorted(map(str, [*scales, *found["missing_keys"], *found["mismatched_keys"]]))
    if wrong:
        raise UserError(f"--llm {name}: {len(wrong)} weights are missing, of another shape or compressed: {', '.join(wrong[:3])}")
    ids, embeddings = set(tokenizer("Image: Question: Answer:").input_ids), len(llm.get_input_embeddings().weight)
    if ids <= set(tokenizer.all_special_ids) or tokenizer.eos_token_id is None or len(tokenizer) > embeddings:
        raise UserError(f"--llm {name}: its tokenizer does not fit: it has {len(tokenizer)} tokens, with {tokenizer.eos_token} "
                        f"as end of text, and the model {embeddings}; are all its files in the folder?")
    return llm.to(device), tokenizer


def load_clip(name, device, dtype):
    """(CLIP, preprocess: PIL picture → (3, S, S) pixels, tokenizer) by open_clip. UserError if that fails.
    OpenAI's weights were trained with QuickGELU and give silently different features without it (open_clip issue 771):
    a TAG knows, so it decides. With a FILE the name does: ViT-L-14-quickgelu:FILE for OpenAI's."""
    model, _, tag = name.partition(":")
    if model in ("local-dir", "hf-hub"):  # these have no tag
        model, tag = name, ""
    quick_gelu = bool(tag and (open_clip.get_pretrained_cfg(model, tag) or {}).get("quick_gelu"))
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    try:
        clip, preprocess = open_clip.create_model_from_pretrained(
            model, tag or None, precision=precision, device=device, force_quick_gelu=quick_gelu)
        return clip, preprocess, open_clip.get_tokenizer(model)
    except Exception as error:
        raise UserError(f"--clip {name}: can't be loaded ({reason(error, name.removeprefix('local-dir:'))})") from error


def reason(error, folder):
    """An error in one line; where a folder has git-lfs pointers (texts of a few lines) in place of weights, that."""
    for path in Path(folder).glob("*"):
        if path.is_file() and path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git-lfs"):
            return f"{path.name} is a git-lfs pointer in place of the file: run  git lfs pull  in {folder}"
    return f"{type(error).__name__}: {str(error)[:300]}"


# ---- Files, and errors ---------------------------------------------------------------------------------------

CHECKPOINT = "adapter.safetensors"  # in the folder of a run


def read_adapter(path):
    """An adapter file → (stage, Settings, fingerprint, {name: tensor}), nothing of it executed. UserError if it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["lmeye"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        settings = Settings(**header["settings"])
        settings.dropout = float(settings.dropout)  # JSON has no difference between 0 and 0.0
        usual = vars(Settings())
        wrong = [name for name in usual if type(getattr(settings, name)) is not type(usual[name])]
        if wrong or header["stage"] not in (1, 2) or settings.interaction not in INTERACTIONS:
            raise ValueError(f"its header is off: {', '.join(wrong) or 'stage or interaction'}")
        fingerprint = torch.tensor(header["fingerprint"], dtype=torch.float32).flatten()
        return header["stage"], settings, fingerprint, tensors
    except Exception as error:  # anything may stand in a file
        raise UserError(f"{path}: is not a checkpoint of this program ({type(error).__name__}: {error})") from error


def write_atomically(path, data):
    """Write bytes beside `path`, flush them to the disk, rename: a reader finds the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


class UserError(Exception):
    """A mistake of the user's, or of a file: printed on one line, without a traceback."""


def printable(text):
    """Text in one line, without what a terminal obeys: anything may stand in a file. (Joiners hold letters together.)"""
    return "".join(c for c in " ".join(text.split()) if c.isprintable() or c in "\u200c\u200d")


def run(main):
    """Run a program's `main()`: on a UserError, a file's error, a full GPU one line and status 2; on Ctrl-C 130."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # letters it lacks; each line at once
    try:
        main()
    except (UserError, OSError, UnicodeError, torch.OutOfMemoryError) as error:
        advice = "lower --max-batch-tokens, or take smaller models: " if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"{Path(sys.argv[0]).name}: {advice}{printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(printable(str(stop)) or "interrupted", file=sys.stderr)
        sys.exit(130)

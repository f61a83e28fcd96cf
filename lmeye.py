r"""LMEye: a frozen language model asks a frozen CLIP about a picture (arXiv 2305.03701, version 1).

A static mapping hands the language model one picture token and hopes that it holds everything. LMEye lets the
model *ask*: it reads the question, its hidden state becomes a request, the request meets the picture inside
CLIP's own frozen text transformer, and what comes out is handed back as one more token.

    picture ──► frozen CLIP image tower ──► f ──► align, + img ──► <img>                           1. see
    [bos]Image:<img>\nQuestion: {question}<img-d> ──► frozen LM ──► h ──► request ──► r            2. ask
                                      (so far = img_d)
    f ──► decompose ──► f₁ … f_N
    [SOS, f₁ … f_N, r, EOS] ──► frozen CLIP text transformer ──► v                                 3. interact
    <img-d> becomes transmit(v) + img_d, and the LM reads on: \nAnswer: {answer}[eos]              4. answer
    Captions have no question, so nothing is asked: [bos]Image:<img> {caption}[eos]

Trained: the four linear layers `align`, `request`, `decompose`, `transmit` and two vectors, `img` and `img_d`.
Frozen: every weight of the LM and of CLIP; gradients flow through the LM and CLIP's text transformer, not into them.
Phase 1 (`--stage 1`) trains `align` and `img` on captions, phase 2 the others on instructions: see `set_trained`.

Steps 2 and 4 are two passes of the LM over the same beginning. Attention is causal: nothing before <img-d> depends on
what stands there. So the keys and values of that beginning serve both passes, and autograd adds up what both send back
to them. Only those of <img-d> itself are dropped from the cache (the graph behind h keeps them), and the second pass
runs no more than <img-d> and what follows it.

Axes, in the shape comments of this file:
    B records   T tokens, T' of the answer   K choices   D width of the LM's embeddings   V size of its vocabulary
    C CLIP's joint space   W width of its text tower   S side of its pictures   N decomposed features   Q <img-d> slots
"""

import inspect
import json
import os
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import open_clip
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import nn


class UserError(Exception):
    """A mistake that the user can mend: told in one line, without a traceback."""


def printable(text):
    """Text in one line without control characters, which a terminal obeys: a file or a model may hold anything."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def run(main):
    """Run a program's `main()`: exit status 2 and one line on a UserError, 130 on Ctrl-C."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        main()
    except (UserError, OSError, UnicodeError, torch.OutOfMemoryError) as error:  # of the others their own words will do
        print(f"{Path(sys.argv[0]).name}: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, EOFError) as stop:  # Ctrl-C, or Ctrl-D at a question
        print(printable(str(stop)) or "interrupted", file=sys.stderr)
        sys.exit(130)


# ---- Settings and presets ------------------------------------------------------------------------------------


def setting(default, help, choices=None):
    """A dataclass field with its help text beside its default: the command-line flags are made from these."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """What must be known to build a model. Each field is a flag too: `n_features` is `--n-features`."""

    preset: str = setting("mini", "which pair of frozen models (default: opt-1.3b with a CUDA GPU, or where --llm or "
                                  "--clip is given, else mini)", choices=("mini", "opt-1.3b", "bloomz-7b1"))
    llm: str = setting("out/mini/llm", "causal language model: a hub name or a local folder")
    clip: str = setting("local-dir:out/mini/clip", "CLIP as open_clip names it: NAME:TAG, NAME:FILE, hf-hub:ORG/NAME "
                                                   "or local-dir:FOLDER")
    interaction: str = setting("full", "full: LMEye. static: no <img-d>, the picture token must do. norequest: as "
                                       "full, but the request is zero", choices=("full", "static", "norequest"))
    n_features: int = setting(5, "N, how many words of CLIP's the picture is decomposed into")
    n_slots: int = setting(1, "Q, how many <img-d> slots carry the answer to the request back")
    dropout: float = setting(0.5, "dropout on the decomposed features")
    precision: str = setting("auto", "of the frozen weights; auto: bf16 on a GPU that has it, else fp16; fp32 on a CPU",
                             choices=("auto", "bf16", "fp16", "fp32"))


OPENAI_CLIP = "ViT-L-14:openai"
PRESETS = {
    "mini": Settings(dropout=0.0),  # measured: in its few minutes of training, dropout only slows it down
    "opt-1.3b": Settings(preset="opt-1.3b", llm="facebook/opt-1.3b", clip=OPENAI_CLIP),
    "bloomz-7b1": Settings(preset="bloomz-7b1", llm="bigscience/bloomz-7b1", clip=OPENAI_CLIP, n_slots=5),
}


def add_flags(parser, names=None):
    """Give an argparse parser one flag for each field of Settings, or for those named (None: as the preset has it)."""
    for f in (f for f in fields(Settings) if names is None or f.name in names):
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, help=f.metadata["help"],
                            choices=f.metadata["choices"], metavar=None if f.metadata["choices"] else f.name.upper())


def settings_from(args):
    """Settings from parsed flags: the preset, then what was given. `args.out` is where `mini` has its models. Models
    other than the preset's make a preset of their own, named after them, as is its folder under `out`."""
    real = torch.cuda.is_available() or vars(args).get("llm") or vars(args).get("clip")
    preset = vars(args).get("preset") or ("opt-1.3b" if real else "mini")
    standard = PRESETS[preset]
    if preset == "mini":
        standard = replace(standard, llm=f"{args.out}/mini/llm", clip=f"local-dir:{args.out}/mini/clip")
    given = {f.name: vars(args)[f.name] for f in fields(Settings) if vars(args).get(f.name) is not None}
    settings = replace(standard, **given)
    if (settings.llm, settings.clip) != (standard.llm, standard.clip):
        settings.preset = f"{Path(settings.llm).name}+{Path(settings.clip.replace(':', '-')).name}"
    return settings


# ---- The frozen backbones ------------------------------------------------------------------------------------


def device_and_dtype(precision):
    """(device, dtype of the frozen weights) for a `precision` setting; the device is a CUDA GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def load_llm(name, device, dtype):
    """(causal LM, tokenizer) from a hub name or local folder, by transformers. UserError if that fails."""
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith(("/", ".", "~"))):
        raise UserError(f"--llm {name}: no such folder, and not a hub name, ORGANISATION/NAME, as facebook/opt-1.3b is")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        llm = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False).to(device)
    except Exception as error:  # what a foreign folder or an absent network raises is not ours to foresee
        raise UserError(f"--llm {name}: can't be loaded ({type(error).__name__}: {str(error)[:300]})") from error
    if tokenizer.eos_token_id is None or len(tokenizer) > len(llm.get_input_embeddings().weight):
        raise UserError(f"--llm {name}: {len(tokenizer)} tokens, end of text {tokenizer.eos_token}: no fitting tokenizer")
    for odd in ("logit_scale", "logits_scaling", "final_logit_softcapping", "state_size"):
        if getattr(llm.config, odd, None):
            raise UserError(f"--llm {name}: is of a kind that this program can't use (it has a {odd})")
    return llm, tokenizer


def load_clip(name, device, dtype):
    """(CLIP, preprocess: PIL picture → (3, S, S) pixels, tokenizer) by open_clip. UserError if that fails.

    OpenAI's weights and some others were trained with QuickGELU and give silently different features without
    it (open_clip issues 771 and 915): the tag knows, so it decides.
    """
    model, _, tag = (name, "", "") if name.startswith(("local-dir:", "hf-hub:")) else name.partition(":")
    quick_gelu = bool(tag and (open_clip.get_pretrained_cfg(model, tag) or {}).get("quick_gelu"))
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    try:
        clip, preprocess = open_clip.create_model_from_pretrained(
            model, tag or None, precision=precision, device=device, force_quick_gelu=quick_gelu)
        return clip, preprocess, open_clip.get_tokenizer(model)
    except Exception as error:
        raise UserError(f"--clip {name}: can't be loaded ({type(error).__name__}: {str(error)[:300]})") from error


# ---- The prompt: one template for training, generation and scoring -------------------------------------------

IMAGE, QUESTION, ANSWER = "Image:", "\nQuestion: ", "\nAnswer:"


def dialogue(turns):
    """Turns (question, answer, …, question) → one string for the place of a question: the first has no QUESTION."""
    return "".join(([QUESTION, ANSWER + " "][i % 2] if i else "") + turn for i, turn in enumerate(turns))


class Tokens(NamedTuple):
    """Token ids with their masks (1 real, 0 padding). For captions `question` has no columns."""
    question: torch.Tensor  # (B, T) left-padded
    question_mask: torch.Tensor
    answer: torch.Tensor  # (B, T') right-padded, eos included
    answer_mask: torch.Tensor


def pad(rows, left=False):
    """Lists of token ids of any lengths → (ids, mask), each (B, longest)."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.as_tensor(row), 1
    return ids, mask


# ---- LMEye ---------------------------------------------------------------------------------------------------


class LMEye(nn.Module):
    """Four linear layers and two vectors between a frozen language model and a frozen CLIP.

    `f` is always the picture feature of `encode_image`, (B, C). `questions` is a list of B strings, or None for
    captions: the answer then follows the picture at once, as in phase 1, and nothing is asked.
    """

    def __init__(self, settings, llm, tokenizer, clip, preprocess, clip_tokenizer):
        super().__init__()
        self.settings, self.preprocess = settings, preprocess
        self.tokenizer, self.clip_tokenizer = tokenizer, clip_tokenizer
        self.llm, self.clip = llm.requires_grad_(False).eval(), clip.requires_grad_(False).eval()
        self.text = getattr(clip, "text", clip)  # open_clip.CLIP keeps its text transformer flat, others in .text
        at_eos = getattr(self.text, "pool_type", getattr(clip, "text_pool_type", "")) in ("argmax", "eos")
        if not at_eos or getattr(self.text, "attn_mask", None) is None or getattr(self.text, "cls_emb", None) is not None:
            raise UserError(f"--clip {settings.clip}: needs a CLIP whose text transformer is causal and ends in EOS")

        D = llm.get_input_embeddings().weight.shape[1]
        W = self.text.positional_embedding.shape[1]
        C = clip.visual.output_dim
        N, Q = settings.n_features, settings.n_slots
        most = len(self.text.positional_embedding) - 3  # beside SOS, the request and EOS
        if not (1 <= N <= most and 1 <= Q <= 100 and 0 <= settings.dropout < 1):
            raise UserError(f"--n-features {N} must be 1 to {most} with this CLIP, --n-slots {Q} 1 to 100, --dropout "
                            f"{settings.dropout} from 0 to below 1")
        self.align = nn.Linear(C, D)  # the picture, as a word of the language model
        self.request = nn.Linear(D, W)  # the model's state, as a word of CLIP's
        self.decompose = nn.Linear(C, N * W)  # the picture, as N words of CLIP's
        self.transmit = nn.Linear(C, D * Q)  # what the words came to, as Q words of the language model
        spread = llm.get_input_embeddings().weight.float().std().item()  # the two vectors begin as words do
        self.img = nn.Parameter(spread * torch.randn(D))
        self.img_d = nn.Parameter(spread * torch.randn(D))
        self.dropout = nn.Dropout(settings.dropout)

        # [bos] where the model's own tokenizer writes one; SOS and EOS as CLIP's tokenizer frames an empty text.
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id in tokenizer("").input_ids else []
        self.register_buffer("image_ids", torch.tensor(bos + self.ids(IMAGE)), persistent=False)
        self.register_buffer("answer_ids", torch.tensor(self.ids(ANSWER)), persistent=False)
        self.register_buffer("sos_eos", clip_tokenizer([""])[0, :2].clone(), persistent=False)
        accepted = inspect.signature(llm.base_model.forward).parameters
        self.takes_positions = "position_ids" in accepted
        self.cache_name = "cache" if "cache" in accepted else "past_key_values"  # its name before transformers 5.24
        self.to(next(llm.parameters()).device).eval()

    @classmethod
    def from_settings(cls, settings):
        """Load both backbones as the settings name them; the layers are new. In eval mode. UserError if that fails."""
        device, dtype = device_and_dtype(settings.precision)
        llm, tokenizer = load_llm(settings.llm, device, dtype)
        return cls(settings, llm, tokenizer, *load_clip(settings.clip, device, dtype))

    def train(self, mode=True):
        """As nn.Module.train, but the frozen parts stay in eval: their dropout must not wake up."""
        super().train(mode)
        self.llm.eval(), self.clip.eval()
        return self

    @property
    def device(self):
        return self.img.device

    # -- 1. see: the picture becomes one feature, the feature becomes the <img> token
    #       f = CLIP_image(picture)        <img> = align f + img

    @torch.no_grad()
    def encode_image(self, pixels):
        """Pixels (B, 3, S, S), as `preprocess` makes them → f (B, C): projected, not normalised, fp32."""
        dtype = self.text.transformer.get_cast_dtype()  # the same in both towers of CLIP
        return self.clip.encode_image(pixels.to(self.device, dtype)).float()

    def see(self, f):
        return (self.align(f) + self.img)[:, None]  # (B, 1, D)

    # -- 2. ask: the last hidden state at <img-d> becomes a vector in the space of CLIP's words
    #       h = LM([bos] Image: <img> Question: … <img-d>), its last state        r = request h

    def ask(self, h):
        r = self.request(h.float())  # (B, D) → (B, W)
        return torch.zeros_like(r) if self.settings.interaction == "norequest" else r  # the slot is there, but empty

    # -- 3. interact: request and picture meet as words of one sentence in CLIP's text transformer
    #       f₁ … f_N = decompose f        v = CLIP_text([SOS, f₁ … f_N, r, EOS]), at EOS, projected

    def interact(self, f, r):
        features = self.dropout(self.decompose(f)).unflatten(-1, (self.settings.n_features, -1))  # (B, N, W)
        sos, eos = self.text.token_embedding(self.sos_eos).expand(len(f), -1, -1).split(1, dim=1)  # (B, 1, W) each
        return self.encode_words(torch.cat([sos, features, r[:, None], eos], 1))  # v (B, C)

    def encode_words(self, words):
        """CLIP's text path from word vectors on, (B, T, W) → (B, C). Equals `clip.encode_text` where the words are the
        token embeddings of a text that ends with its EOS.

        CLIP's mask is cut to T. The state is read at the last place explicitly: looking for EOS among token ids, which
        there are none of here, is how other code pools at a wrong place (transformers issue 24650, open_clip 1151).
        """
        text, T = self.text, words.shape[1]
        x = (words + text.positional_embedding[:T]).to(text.transformer.get_cast_dtype())
        x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask[:T, :T])[:, -1])
        projection = text.text_projection
        return (projection(x) if isinstance(projection, nn.Linear) else x @ projection).float()

    # -- 4. answer: what came out stands in the place of <img-d>, and the language model reads on
    #       <img-d> = transmit v + img_d

    def tell(self, v):
        return self.transmit(v).unflatten(-1, (self.settings.n_slots, -1)) + self.img_d  # (B, Q, D)

    # ---- Tokens, embeddings, the first pass, and where the second one starts -----------------------------

    def ids(self, text):  # or a list of texts
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def embed(self, ids):
        return self.llm.get_input_embeddings()(ids)  # (…, D)

    def read(self, x, mask, cache=None):
        """Run the frozen LM over embeddings x (B, T, D) → (last hidden states (B, T, D), cache with x appended). `mask`
        covers what the cache holds and x. Positions count real tokens only (BLOOM takes them from the mask itself)."""
        positions = {"position_ids": mask.cumsum(1)[:, -x.shape[1]:] - 1} if self.takes_positions else {}
        cache = transformers.DynamicCache() if cache is None else cache  # the model appends to it
        out = self.llm.base_model(inputs_embeds=x.to(self.llm.dtype), attention_mask=mask, use_cache=True, **positions,
                                  **{self.cache_name: cache})
        return out.last_hidden_state, cache

    def begin(self, f, question, question_mask):
        """Everything up to the answer → (x, mask, cache): the caller reads x (B, T, D) on top of the cache.

        With <img-d> the cache holds all that precedes it and x begins there; for captions and `static` there is no
        cache, and x is everything. `mask` covers both.
        """
        B, Q, f = len(f), self.settings.n_slots, f.to(self.device)
        question, question_mask = question.to(self.device), question_mask.to(self.device)
        x = torch.cat([self.embed(self.image_ids).expand(B, -1, -1), self.see(f), self.embed(question)], 1)
        mask = F.pad(question_mask, (x.shape[1] - question.shape[1], 0), value=1)  # padding lies behind <img>
        if question.shape[1] == 0:
            return x, mask, None  # a caption: the answer follows the picture at once

        cache = None
        if self.settings.interaction != "static":
            slots, with_slots = self.img_d.expand(B, Q, -1), F.pad(mask, (0, Q), value=1)
            if torch.is_grad_enabled():  # two reads: while align is frozen, the first one builds no graph
                _, cache = self.read(x, mask)
                h, cache = self.read(slots, with_slots, cache)
            else:  # one is faster
                h, cache = self.read(torch.cat([x, slots], 1), with_slots)
            cache.crop(-Q)  # forget <img-d>: the keys and values of all that precedes it serve the second pass
            v = self.interact(f, self.ask(h[:, -1]))  # either way the last slot: of several, it has read most
            x, mask = self.tell(v), with_slots
        x = torch.cat([x, self.embed(self.answer_ids).expand(B, -1, -1)], 1)
        return x, F.pad(mask, (0, len(self.answer_ids)), value=1), cache

    def logits(self, h):
        return self.llm.get_output_embeddings()(h).float()  # (…, V)

    # ---- Loss --------------------------------------------------------------------------------------------

    def token_ids(self, questions, answers):
        """Texts → two lists of lists of token ids: of the questions (empty for captions), of the answers with eos.

        Each part is tokenised by itself, so that a question's tokens can't depend on its answer's.
        """
        questions = self.ids([QUESTION + q for q in questions]) if questions else [[]] * len(answers)
        return questions, [ids + [self.tokenizer.eos_token_id] for ids in self.ids([" " + a for a in answers])]

    def tokens(self, questions, answers):
        """Texts → Tokens, on the CPU. UserError if a record exceeds the LM's context."""
        questions, answers = self.token_ids(questions, answers)
        longest = max(len(q) + len(a) for q, a in zip(questions, answers))
        if longest > self.room:
            raise UserError(f"{longest} tokens, but the context has room for {self.room}: shorten question or answer")
        return Tokens(*pad(questions, left=True), *pad(answers))

    @property
    def context(self):
        """How many tokens the LM can read at once (BLOOM has no limit of its own: 2,048, as it was trained)."""
        limits = [getattr(self.llm.config, name, None) for name in ("max_position_embeddings", "sliding_window")]
        return min(filter(None, limits), default=2048)

    @property
    def room(self):
        """How many of them are left for a question and its answer, beside the template and the slots."""
        return self.context - len(self.image_ids) - 1 - self.settings.n_slots - len(self.answer_ids)

    def loss(self, f, questions, answers):
        """Cross-entropy of the answers and their eos, averaged over tokens; a scalar, fp32."""
        tokens = self.tokens(questions, answers)
        return self.loss_sum(f, tokens) / tokens.answer_mask.sum()

    def loss_sum(self, f, tokens):
        """The same, summed over tokens, from Tokens: what a training loop with accumulation needs."""
        x, mask, cache = self.begin(f, tokens.question, tokens.question_mask)
        answer, answer_mask = tokens.answer.to(self.device), tokens.answer_mask.to(self.device)
        told = torch.cat([x, self.embed(answer[:, :-1])], 1)
        h, _ = self.read(told, torch.cat([mask, answer_mask[:, :-1]], 1), cache)
        h = h[:, x.shape[1] - 1:]  # (B, T', D): the state before each token of the answer
        real = answer_mask.bool()
        return F.cross_entropy(self.logits(h[real]), answer[real], reduction="sum")

    # ---- Generation and scoring --------------------------------------------------------------------------

    @torch.no_grad()
    def stream(self, f, questions=None, max_tokens=64, temperature=0.0, top_k=0, top_p=1.0, generator=None):
        """Yield the answers' tokens, (B,) at a time, at most max_tokens, until all rows end; an ended one repeats eos.

        temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens; `generator` makes sampling repeatable.
        """
        B, eos = len(f), self.tokenizer.eos_token_id
        asked = self.tokens(questions, [""] * B)  # the answers are yet to come
        x, mask, cache = self.begin(f, asked.question, asked.question_mask)
        ended = torch.zeros(B, dtype=torch.bool, device=self.device)
        for _ in range(max_tokens):
            h, cache = self.read(x, mask, cache)
            token = pick(self.logits(h[:, -1]), temperature, top_k, top_p, generator).masked_fill(ended, eos)
            yield token
            ended |= (token == eos) | (mask.sum(1) >= self.context - 1)  # or at the end of what it can read
            if ended.all():
                return
            x, mask = self.embed(token)[:, None], torch.cat([mask, ~ended[:, None]], 1)

    def generate(self, f, questions=None, **options):
        """Answers to `questions` about the pictures `f`, or captions: a list of B strings. Options as `stream`."""
        tokens = torch.stack(list(self.stream(f, questions, **options)), 1)  # (B, T)
        return [self.decode(row) for row in tokens.tolist()]

    def decode(self, ids):
        """Token ids, up to the first eos → text."""
        eos = self.tokenizer.eos_token_id
        return self.tokenizer.decode(ids[:ids.index(eos)] if eos in ids else ids, skip_special_tokens=True).strip()

    @torch.no_grad()
    def score(self, f, questions, choices):
        """Σ log p of each choice's tokens, without eos, after its question (read once): (B, K) for B lists of K."""
        B, K = len(choices), len(choices[0])
        asked = self.tokens(questions, [""] * B)
        told = self.tokens([q for q in questions for _ in range(K)], sum(choices, []))  # questions: for the length
        x, mask, cache = self.begin(f, asked.question, asked.question_mask)
        first, cache = self.read(x, mask, cache)
        cache.batch_repeat_interleave(K)
        ids, ids_mask = told.answer.to(self.device), told.answer_mask.to(self.device)  # (B·K, T')
        mask = torch.cat([mask.repeat_interleave(K, 0), ids_mask[:, :-1]], 1)
        rest, _ = self.read(self.embed(ids[:, :-1]), mask, cache)
        h = torch.cat([first[:, -1:].repeat_interleave(K, 0), rest[:, :-1]], 1)  # (B·K, T'-1, D): before each token
        real = ids_mask[:, 1:].bool()  # a token counts if another follows it: so not eos, not padding
        logp = torch.zeros(real.shape, device=self.device)
        logp[real] = -F.cross_entropy(self.logits(h[real]), ids[:, :-1][real], reduction="none")
        return logp.sum(1).view(B, K)

    # ---- The adapter: what is trained, saved and loaded --------------------------------------------------

    def adapter(self, stage):
        """{name: parameter} of what a model has after this stage; the layers that it does not use are left out."""
        parts = ["align", "img"]
        if stage == 2 and self.settings.interaction != "static":
            parts += ["decompose", "transmit", "img_d"]
            parts += ["request"] if self.settings.interaction == "full" else []
        return {name: p for name, p in self.named_parameters() if name.split(".")[0] in parts}

    def set_trained(self, stage, train_align=False):
        """Make exactly the tensors of this stage trainable → {name: parameter}.

            stage 1            align, img
            stage 2, full      request, decompose, transmit, img_d (norequest: no request); with train_align all six
            stage 2, static    align, img: there is nothing else
        """
        trained = self.adapter(stage)
        if stage == 2 and self.settings.interaction != "static" and not train_align:
            trained = {name: p for name, p in trained.items() if name not in self.adapter(1)}
        for name, p in self.named_parameters():
            p.requires_grad_(name in trained)
        return trained

    def fingerprint(self):
        """A few frozen weights of each backbone, to tell it from another of the same shape (to 2%: bf16 rounds)."""
        some = [w.detach().flatten()[::max(1, w.numel() // 8)][:8] for w in
                (self.llm.get_input_embeddings().weight, self.text.token_embedding.weight)]
        return torch.cat([w.float().cpu() for w in some])

    def save(self, path, stage):
        """Write the adapter to a safetensors file, with settings and stage in its metadata, atomically."""
        metadata = {"lmeye": json.dumps({"stage": stage, "settings": asdict(self.settings),
                                         "fingerprint": self.fingerprint().tolist()})}
        tensors = {name: p.detach().cpu() for name, p in self.adapter(stage).items()}
        write_atomically(path, safetensors.torch.save(tensors, metadata))

    def load(self, path):
        """Load an adapter into this model → its stage. UserError if it belongs to another model or shape."""
        stage, theirs, fingerprint, tensors = read_checkpoint(path)
        mine, weights = self.settings, self.fingerprint()
        if fingerprint.shape != weights.shape or not torch.allclose(fingerprint, weights, rtol=0.02, atol=1e-6):
            raise UserError(f"{path}: was trained with --llm {theirs.llm} --clip {theirs.clip}; the weights of "
                            f"--llm {mine.llm} --clip {mine.clip} are others")
        if stage == 2 and theirs.interaction != mine.interaction:
            raise UserError(f"{path}: was trained with --interaction {theirs.interaction}, not {mine.interaction}")
        expected = self.adapter(stage)
        for name in expected.keys() | tensors.keys():
            shapes = [tuple(t[name].shape) if name in t else "none" for t in (tensors, expected)]
            if shapes[0] != shapes[1]:
                raise UserError(f"{path}: holds {name} of shape {shapes[0]}, this model needs {shapes[1]}")
        with torch.no_grad():
            for name, p in expected.items():
                p.copy_(tensors[name])
        return stage


def pick(logits, temperature, top_k, top_p, generator):
    """Choose the next token from logits (B, V) → (B,)."""
    if temperature < 0.01:  # 0, or so near that the logits, divided by it, overflow
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(-1, descending=True)
    p = logits.softmax(-1)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    unlikely = p.cumsum(-1) - p > top_p  # the tokens before it already hold top_p
    p = p.masked_fill(unlikely | (rank >= (top_k or len(rank))), 0)
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


# ---- Adapter files -------------------------------------------------------------------------------------------

CHECKPOINT = "adapter.safetensors"  # in the folder of a run


def read_checkpoint(path):
    """An adapter file → (stage, Settings, fingerprint, {name: tensor}). UserError if it is none.

    Nothing in the file is executed, and what its settings name is not loaded from here.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["lmeye"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        stage, settings, fingerprint = header["stage"], Settings(**header["settings"]), header["fingerprint"]
        settings.dropout = float(settings.dropout)
        wrong = [f.name for f in fields(Settings) if type(value := getattr(settings, f.name)) is not f.type
                 or f.metadata["choices"] and f.name != "preset" and value not in f.metadata["choices"]]
        if wrong or stage not in (1, 2):
            raise ValueError(f"its header is off: {', '.join(wrong) or 'stage'}")
        return stage, settings, torch.tensor(fingerprint, dtype=torch.float32).flatten(), tensors
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
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

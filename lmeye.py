r"""LMEye: a frozen language model asks a frozen CLIP about a picture (arXiv 2305.03701, version 1).

Models like LLaVA turn a picture into tokens once, before the question is known. LMEye lets the language
model (LM) read the question first and then *ask* for what it needs:

    1. see        CLIP turns the picture into one vector f. <img>, a word of the prompt, is align(f) + img.
    2. ask        The LM reads  [bos]Image:<img>\nQuestion: {question}<img-d>  with a learned vector, img_d,
                  in the place called <img-d>. h is the LM's last state there. The request: r = request(h).
    3. interact   CLIP's own text transformer reads picture and request as if they were words, with
                  f_1 … f_N = decompose(f). What comes out is v = CLIP_text([SOS, f_1 … f_N, r, EOS]).
    4. tell       The LM reads the prompt again, now with transmit(v) + img_d in the place <img-d>, and then
                  \nAnswer: {answer} . The loss is on the tokens of {answer} and the [eos] that must follow.

Both models are frozen; four linear layers and two vectors are trained. Stage 1, the paper's phase 1, trains
`align` and `img` on captions, [bos]Image:<img> {caption}[eos], where nothing is asked. Stage 2 trains the
others on questions. "Frozen" means that weights don't change. It does not stop gradients: they pass from the
loss through the LM, `transmit` and CLIP's text transformer to `request`, and through the LM's first pass to
img_d.

Axes in the shape comments, with the sizes of OPT-1.3b and CLIP ViT-L/14:
    B   records of a batch                     T   tokens; T' those of answer and eos
    C   width of CLIP's features, 768          N   vectors that `decompose` makes, 5
    D   width of the LM, 2048                  Q   places <img-d>, 1
    W   width of CLIP's text side, 768         P   places <img>, 1
    V   rows of the LM's head, 50272           K   choices of a question

One question in numbers, "what is on the table?", with these models:
    f (1, 768)   <img> (1, 1, 2048)   prompt before <img-d> (1, 13, 2048)   h (1, 2048)   r (1, 768)
    words of CLIP (1, 8, 768)   v (1, 768)   <img-d> (1, 1, 2048)
Trained: align 1.57 M, request 1.57 M, decompose 2.95 M, transmit 1.57 M and two vectors: 7.68 M, of which
1.58 M in stage 1 and 6.10 M in stage 2. Frozen: 1.3 billion (OPT) and 0.43 billion (CLIP).
"""

import copy
import errno
import functools
import inspect
import json
import logging
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn


@dataclass
class Settings:
    """What a checkpoint stores so that its model can be rebuilt. Each is a flag of train.py, too."""
    preset: str = "opt-1.3b"  # a row of PRESETS, or a name for models of your own
    llm: str = "facebook/opt-1.3b"  # causal language model: a hub name or a local folder
    clip: str = "ViT-L-14:openai"  # open_clip's NAME:TAG, NAME:FILE, hf-hub:ORG/NAME, or a folder
    variant: str = "lmeye"  # or a control experiment. norequest: r is zero. static: there is no <img-d>
    n_features: int = 5  # N: vectors that `decompose` makes from the picture
    n_slots: int = 1  # Q: places <img-d>. All hold img_d in step 2; in step 4 each gets a vector of its own
    n_image_tokens: int = 1  # P: places <img>
    dropout: float = 0.5  # drops numbers of f_1 … f_N, in training
    precision: str = "auto"  # of the frozen weights: bf16, fp16, fp32, or auto (see device_and_dtype)


PRESETS = {
    "mini": Settings("mini", "out/mini/llm", "local-dir:out/mini/clip", dropout=0.0),
    "smollm2": Settings("smollm2", "out/smollm2/llm", "local-dir:out/mini/clip", dropout=0.0),
    "emoji": Settings("emoji", "out/smollm2/llm", "local-dir:out/emoji/clip", dropout=0.0),
    "opt-1.3b": Settings("opt-1.3b"),
    "bloomz-7b1": Settings("bloomz-7b1", "bigscience/bloomz-7b1", n_slots=5),
}
VARIANTS = ("lmeye", "norequest", "static")
IMAGE, QUESTION, ANSWER = "Image:", "\nQuestion: ", "\nAnswer:"  # an answer begins with its own space


# ---- The method, plainly -------------------------------------------------------------------------

def plain_loss(model, f, question, answer):
    """The method as section 3 of the paper tells it: two whole passes of the LM, nothing clever.

    Takes the feature f (1, C) of one picture, a question and an answer. Returns the loss, a scalar, and for
    `check_llm` the logits before each token of the answer (T', V) and h (1, D). The class below computes the
    same for a batch, faster; `check_llm` compares the two when a model is loaded. (The LM without its head is
    `llm.base_model`; it computes in its own dtype, the trained layers in fp32.)
    """
    def embed(ids):  # token ids → word vectors of the LM (1, T, D)
        return model.embed(torch.tensor([ids], dtype=torch.long, device=model.device))

    # 1. See: the picture becomes a word, between "[bos]Image:" and the question.
    opening = model.embed(model.image_words)[None]
    words = embed(model.question_ids([question])[0])
    prompt = torch.cat([opening, model.see(f), words], 1)

    # 2. Ask: the LM reads all that and then <img-d>. Its last state becomes the request.
    img_d = model.img_d.expand(1, model.settings.n_slots, -1)
    x = torch.cat([prompt, img_d], 1).to(model.llm.dtype)
    h = model.llm.base_model(inputs_embeds=x).last_hidden_state[:, -1]
    r = model.ask(h)

    # 3. Interact: CLIP's text transformer reads picture and request as one sentence.
    v = model.interact(f, r)

    # 4. Tell: `tell(v)` takes the place of <img-d>. The LM reads everything again, and then the answer.
    ids = model.answer_ids([answer])[0]  # ends with eos, so eos is never read
    answer_words = model.embed(model.answer_words)[None]  # "\nAnswer:"
    x = torch.cat([prompt, model.tell(v), answer_words, embed(ids[:-1])], 1).to(model.llm.dtype)
    logits = model.llm(inputs_embeds=x).logits[0, -len(ids):].float()  # each predicts the next token
    return F.cross_entropy(logits, torch.tensor(ids, device=model.device)), logits, h


# ---- The method, for batches ---------------------------------------------------------------------

class Tokens(NamedTuple):
    r"""Token ids of questions and answers, with masks: 1 for a token, 0 for padding. This is the whole
    text, where _ is a space that belongs to a token; the marked tokens carry the loss.

        [bos] Image : <img> \n Question : _what _color ? <img-d> \n Answer : _red [eos]
                                                                             ^^^^ ^^^^^
    """
    question: torch.Tensor  # (B, T) of "\nQuestion: …", padded on the left; None for captions, as is its mask
    question_mask: torch.Tensor
    answer: torch.Tensor  # (B, T') of " …" and eos, padded on the right
    answer_mask: torch.Tensor

    def lengths(self):
        """Tokens of each record, without padding: (B,)."""
        return self.answer_mask.sum(1) + (0 if self.question is None else self.question_mask.sum(1))


class LMEye(nn.Module):
    """Four linear layers and two vectors between a frozen language model and a frozen CLIP.

    `f` is always the picture feature of `encode_image`, (B, C). `questions`: B texts, or None for captions.
    """

    def __init__(self, settings, llm, tokenizer, clip, preprocess, clip_tokenizer):
        super().__init__()
        self.settings = settings
        self.preprocess = preprocess  # PIL picture → pixels (3, side, side)
        self.tokenizer, self.clip_tokenizer = tokenizer, clip_tokenizer
        self.llm = llm.requires_grad_(False).eval()
        self.llm_takes = set(inspect.signature(llm.base_model.forward).parameters)
        self.clip = clip.requires_grad_(False).eval()
        self.clip_text = getattr(clip, "text", clip)  # open_clip.CLIP has the text layers itself
        check_settings(self)

        # The fixed words. The prompt begins with what the LM's tokenizer puts before any text: [bos] as a
        # rule, or nothing. CLIP's tokenizer makes [SOS, EOS, 0 …] of "".
        whole, image_words = tokenizer(IMAGE).input_ids, self.ids_of([IMAGE])[0]
        before = whole[:whole.index(image_words[0])]
        self.register_buffer("image_words", torch.tensor(before + image_words), persistent=False)
        self.register_buffer("answer_words", torch.tensor(self.ids_of([ANSWER])[0]), persistent=False)
        self.register_buffer("sos_eos", clip_tokenizer([""])[0, :2].clone(), persistent=False)
        self.to(llm.device)
        some_ids = torch.linspace(0, len(tokenizer) - 1, 1000, device=llm.device).long()
        some_words = self.embed(some_ids).float()  # (1000, D), spread over the vocabulary
        sos_eos = self.clip_text.token_embedding(self.sos_eos)[None]  # (1, 2, W)
        D, W = some_words.shape[1], sos_eos.shape[2]
        C = self.encode_words(sos_eos).shape[1]  # open_clip has no common name for it, so it is measured
        N, Q, P = settings.n_features, settings.n_slots, settings.n_image_tokens

        # All that is trained.
        self.align = nn.Linear(C, P * D)  # CLIP's feature → word vectors of the LM
        self.request = nn.Linear(D, W)  # the LM's state → a word vector of CLIP
        self.decompose = nn.Linear(C, N * W)  # CLIP's feature → N word vectors of CLIP
        self.transmit = nn.Linear(C, Q * D)  # CLIP's text feature → word vectors of the LM
        self.word_std = some_words.std().item()
        self.img = nn.Parameter(self.word_std * torch.randn(D))  # as large as the LM's own word vectors
        self.img_d = nn.Parameter(self.word_std * torch.randn(D))
        self.dropout = nn.Dropout(settings.dropout)
        self.context = context_length(llm)
        self.max_text_tokens = self.context - len(self.image_words) - P - Q - len(self.answer_words)
        self.n_token_ids = max(tokenizer.get_vocab().values()) + 1  # the LM's head may have more rows
        self.to(llm.device).eval()

    # -- 1. See: the picture becomes a word of the language model
    @torch.no_grad()
    def encode_image(self, pixels):
        """Pixels (B, 3, side, side) from `preprocess` → f (B, C), fp32: CLIP's feature, not normalised."""
        dtype = self.clip_text.transformer.get_cast_dtype()  # both towers of CLIP compute in it
        return self.clip.encode_image(self.to_device(pixels)[0].to(dtype)).float()

    def see(self, f):
        """f (B, C) → the word vectors of <img> (B, P, D). The same `img` is added to each."""
        return self.align(f).unflatten(-1, (self.settings.n_image_tokens, -1)) + self.img

    # -- 2. Ask: the LM has read picture and question; its state says what it wants to know
    def ask(self, h):
        """The LM's last hidden state at <img-d>, h (B, D) → the request r (B, W)."""
        r = self.request(h.float())
        if self.settings.variant == "norequest":  # the control: r keeps its place, but nothing is asked
            r = torch.zeros_like(r)
        return r

    # -- 3. Interact: picture and request meet as the words of one CLIP sentence
    def interact(self, f, r):
        """f (B, C) and r (B, W) → v (B, C), what CLIP's text transformer makes of both.

        The order of the words decides what can happen, for each word sees only those before it: the request
        sees all features, the features never see the request, and EOS, where v is read, sees everything.
        """
        features = self.dropout(self.decompose(f)).unflatten(-1, (self.settings.n_features, -1))  # (B, N, W)
        sos, eos = self.clip_text.token_embedding(self.sos_eos).expand(len(f), -1, -1).split(1, dim=1)
        return self.encode_words(torch.cat([sos, features, r[:, None], eos], 1))

    def encode_words(self, words):
        """CLIP's text transformer over word vectors (B, T, W) → its text feature (B, C).

        This is `clip.encode_text` without the look-up of words: T places instead of 77, and the state is read
        at the last one, where EOS stands. `check_clip` compares the two.
        """
        text, T = self.clip_text, words.shape[1]
        x = (words + text.positional_embedding[:T]).to(text.transformer.get_cast_dtype())
        x = text.transformer(x, attn_mask=text.attn_mask[:T, :T])
        x = text.ln_final(x[:, -1])
        if isinstance(text.text_projection, nn.Linear):  # in open_clip it is a layer, a matrix or absent
            x = text.text_projection(x)
        elif text.text_projection is not None:
            x = x @ text.text_projection
        return x.float()

    # -- 4. Tell: what came out takes the place of <img-d>
    def tell(self, v):
        """v (B, C) → the word vectors that replace <img-d> (B, Q, D).

        img_d is used twice. In step 2 it fills the place <img-d>, so that the LM has where to ask; here it is
        what all replies of CLIP have in common, like the bias of `transmit`.
        """
        return self.transmit(v).unflatten(-1, (self.settings.n_slots, -1)) + self.img_d

    # -- Both passes of the language model
    def read_prompt(self, f, question, question_mask):
        """Steps 1 to 3 and the beginning of 4 → (x, mask, cache): what the LM has to read up to "Answer:".

        `plain_loss` reads the prompt twice, each time with another <img-d>. But attention is causal, so
        <img-d> can't change the states of the words before it. Their keys and values are kept in the cache,
        and step 4 goes on from there. (If `align` is trained, both passes give it gradients.) x (B, T, D)
        begins with the new <img-d>; without a cache (captions, `static`) with the first word. The mask covers
        the cache and x.
        """
        B, Q = len(f), self.settings.n_slots
        x = torch.cat([self.embed(self.image_words).expand(B, -1, -1), self.see(f)], 1)
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=self.device)
        if question is None:  # a caption follows the picture at once
            return x, mask, None
        x = torch.cat([x, self.embed(question)], 1)
        x, mask = padding_first(x, torch.cat([mask, question_mask], 1))

        cache = None
        if self.settings.variant != "static":  # in that control <img> must do alone
            img_d = self.img_d.expand(B, Q, -1)
            mask_with_slots = F.pad(mask, (0, Q), value=1)
            if torch.is_grad_enabled():  # in two calls: while `align` is frozen, the first needs no gradients
                _, cache = self.run_llm(x, mask)
                h, cache = self.run_llm(img_d, mask_with_slots, cache)
            else:  # the same in one call, which is faster
                h, cache = self.run_llm(torch.cat([x, img_d], 1), mask_with_slots)
            cache.crop(-Q)  # forget <img-d>, keep what stands before it
            v = self.interact(f, self.ask(h[:, -1]))  # at the last place <img-d>, which sees the others
            x, mask = self.tell(v), mask_with_slots
        x = torch.cat([x, self.embed(self.answer_words).expand(B, -1, -1)], 1)
        return x, F.pad(mask, (0, len(self.answer_words)), value=1), cache

    def run_llm(self, x, mask, cache=None):
        """The LM over word vectors x (B, T, D), behind what the cache holds → (states (B, T, D), cache).

        The mask covers the cache and x. A token's position is the number of tokens before it: padding does
        not count. (BLOOM takes no positions; it computes them from the mask.)
        """
        if cache is None:
            cache = transformers.DynamicCache()  # keeps all keys, also of sliding windows: it can be cropped
        options = {"past_key_values" if "past_key_values" in self.llm_takes else "cache": cache}
        if "position_ids" in self.llm_takes:
            options["position_ids"] = (mask.cumsum(1)[:, -x.shape[1]:] - 1).clamp(min=0)
        x = x.to(self.llm.dtype)
        output = self.llm.base_model(inputs_embeds=x, attention_mask=mask, use_cache=True, **options)
        return output.last_hidden_state, cache

    # -- The loss
    def forward(self, f, tokens):
        """f (B, C) and Tokens → the cross-entropy of all answers with their eos, fp32. It is summed, so that
        the losses of several batches can be added up before they are divided by the number of tokens."""
        h, targets = self.answer_states(f, tokens)
        return chunked_cross_entropy(h, targets, self.llm.get_output_embeddings()).sum()

    def answer_states(self, f, tokens):
        """→ (the LM's state before each of the n tokens of all answers (n, D), these tokens (n,))."""
        places = tokens.answer_mask.flatten().nonzero()[:, 0]  # `nonzero` on a GPU would make Python wait
        f, question, question_mask, answer, answer_mask, places = self.to_device(f, *tokens, places)
        x, mask, cache = self.read_prompt(f, question, question_mask)
        x_answer = torch.cat([x, self.embed(answer[:, :-1])], 1)
        h, _ = self.run_llm(x_answer, torch.cat([mask, answer_mask[:, :-1]], 1), cache)
        h = h[:, x.shape[1] - 1:].flatten(0, 1)  # (B·T', D): each state predicts the token that follows it
        return h[places], answer.flatten()[places]

    def loss(self, f, questions, answers):
        """f (B, C), B questions, B answers → the loss averaged over the answers' tokens."""
        tokens = self.tokenize(questions, answers)
        return self(f, tokens) / tokens.answer_mask.sum()

    # -- Answers, and the likelihood of given ones
    def logits(self, h):
        """States (…, D) → logits of the next token (…, V), fp32."""
        return self.llm.get_output_embeddings()(h).float()

    @torch.no_grad()
    def stream(self, f, questions=None, max_tokens=64, temperature=0.0, top_k=0, generator=None):
        """Yield the answers token by token, ids (B,) at a time; an answer that has ended repeats eos.

        Below a temperature of 0.01 the likeliest token is taken. Above, one is drawn, of the top_k likeliest
        only unless top_k is 0; a `generator` makes that repeatable. UserError if the numbers are not finite.
        """
        if max_tokens < 1:
            raise UserError("max_tokens has to be at least 1")
        eos = self.tokenizer.eos_token_id
        tokens = self.tokenize(questions, [""] * len(f))  # there are no answers yet, but an eos in each
        f, question, question_mask, room = self.to_device(
            f, tokens.question, tokens.question_mask, self.room(tokens))
        x, mask, cache = self.read_prompt(f, question, question_mask)
        ended = torch.zeros(len(f), dtype=torch.bool, device=self.device)
        for n in range(1, max_tokens + 1):
            h, cache = self.run_llm(x, mask, cache)
            logits = self.logits(h[:, -1])[:, :self.n_token_ids]
            if not logits.max().isfinite():  # the maximum is NaN if any is
                raise UserError("the model's logits are not finite: use --precision fp32, or bf16")
            token = choose_token(logits, temperature, top_k, generator).masked_fill(ended, eos)
            yield token
            ended |= (token == eos) | (n >= room)
            if ended.all():
                return
            x = self.embed(token)[:, None]
            mask = torch.cat([mask, (~ended).long()[:, None]], 1)

    def generate(self, f, questions=None, **options):
        """f (B, C) and B questions → a list of B answers, or captions. Options as for `stream`."""
        tokens = torch.stack(list(self.stream(f, questions, **options)), 1)  # (B, T)
        return [self.decode(row) for row in tokens.tolist()]

    @torch.no_grad()
    def score(self, f, questions, choices):
        """f (B, C), B questions, B lists of K texts → log p of each text as answer, (B, K): the sum over its
        tokens, without eos. For a mean, divide by their number."""
        lists = isinstance(questions, list) and all(isinstance(row, (list, tuple)) for row in choices)
        if not lists or len({len(row) for row in choices}) != 1 or not choices[0]:
            raise UserError("score takes a list of questions, and for each a list of K choices")
        K = len(choices[0])
        every_question = [question for question in questions for _ in range(K)]
        every_choice = [choice for row in choices for choice in row]
        tokens = self.tokenize(every_question, every_choice)  # (B·K, …)
        if tokens.answer_mask.sum(1).min() < 2 or not all(choice.strip() for choice in every_choice):
            raise UserError("score: a choice is empty, or the tokenizer has no token for its letters")
        h, targets = self.answer_states(f.repeat_interleave(K, 0), tokens)
        log_p = torch.zeros(tokens.answer.shape, device=self.device)
        losses = chunked_cross_entropy(h, targets, self.llm.get_output_embeddings())
        log_p[tokens.answer_mask > 0] = -losses
        log_p[tokens.answer == self.tokenizer.eos_token_id] = 0  # eos is no part of a choice
        return log_p.sum(1).view(-1, K)

    # -- Texts and tokens
    def ids_of(self, texts):
        """Token ids of each text. What looks like a special token in one, "</s>", is read as text, but for
        tokenizers that can't: data.py leaves such records out."""
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids

    def question_ids(self, questions):
        """Token ids of each question as the prompt has it."""
        return self.ids_of([QUESTION + question for question in questions])

    def answer_ids(self, answers):
        """Token ids of each answer or caption, with eos."""
        texts = [" " + answer for answer in answers]
        return [ids + [self.tokenizer.eos_token_id] for ids in self.ids_of(texts)]

    def tokenize(self, questions, answers):
        """Texts → Tokens, on the CPU. Each is tokenised by itself, so that a question's tokens can't depend
        on its answer's. UserError if a record exceeds the LM's context (captions are counted as if they had
        an <img-d>, too), or if the lists don't fit."""
        if isinstance(questions, str) or (questions is not None and len(questions) != len(answers)):
            raise UserError("a list with one question for each picture or answer is needed")
        question_ids = None if questions is None else self.question_ids(questions)
        tokens = collate(question_ids, self.answer_ids(answers))
        longest = tokens.lengths().max()
        if longest > self.max_text_tokens:
            raise UserError(f"{longest} tokens, but the language model's context has room for "
                            f"{self.max_text_tokens}: shorten question or answer")
        return tokens

    def room(self, tokens):
        """Tokens whose answers are eos alone → how many fit the LM's context in the place of each (B,)."""
        return self.max_text_tokens - tokens.lengths() + 1

    def decode(self, ids):
        """Token ids of an answer → text, without eos."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def embed(self, ids):
        """Token ids (…) → word vectors of the LM (…, D)."""
        return self.llm.get_input_embeddings()(ids)

    @property
    def device(self):
        return self.image_words.device

    def to_device(self, *tensors):
        """Tensors, or None → the same on the model's device. A GPU's copies from pinned memory don't wait."""
        if self.device.type == "cuda":
            tensors = [t if t is None or t.is_cuda else t.pin_memory() for t in tensors]
        return [None if t is None else t.to(self.device, non_blocking=True) for t in tensors]

    # -- What is trained, saved and loaded
    def train(self, mode=True):
        """As nn.Module.train, but the frozen models stay in eval mode, in which they have no dropout."""
        super().train(mode)
        self.llm.eval()
        self.clip.eval()
        return self

    def adapter(self, stage):
        """{name: parameter} of all that this stage uses, trained now or before: what a checkpoint holds."""
        parts = ["align", "img"]
        if stage == 2 and self.settings.variant != "static":
            parts += ["decompose", "transmit", "img_d"]
            if self.settings.variant == "lmeye":
                parts.append("request")
        return {name: p for name, p in self.named_parameters() if name.split(".")[0] in parts}

    def set_trained(self, stage, train_align=False):
        """Let exactly the tensors of this stage be trained → {name: parameter}.

            stage 1              align, img
            stage 2              request, decompose, transmit, img_d; with train_align align, img as well
            stage 2, norequest   the same without request
            stage 2, static      align, img: there is nothing else
        """
        trained = self.adapter(stage)
        if stage == 2 and self.settings.variant != "static" and not train_align:
            for name in self.adapter(1):
                del trained[name]
        for name, p in self.named_parameters():
            p.requires_grad_(name in trained)
        return trained

    def save(self, path, stage):
        """Write a checkpoint, atomically: safetensors, with stage, settings and `identity` as metadata."""
        header = {"stage": stage, "settings": asdict(self.settings), "identity": self.identity}
        tensors = {name: p.detach().cpu() for name, p in self.adapter(stage).items()}
        write_atomically(path, safetensors.torch.save(tensors, {"lmeye": json.dumps(header)}))

    @functools.cached_property
    @torch.no_grad()
    def identity(self):
        """Numbers by which a checkpoint knows its frozen models again, {what: list}: two of each weight, and
        of the frequencies that rotate positions; CLIP's activations; what both models make of a picture and
        a text, for a setting may change that behind the same weights."""
        weights = []
        rotations = [p for name, p in self.llm.named_buffers() if name.endswith("inv_freq")]
        functions = {type(module).__name__ for module in self.clip.modules()} & {"GELU", "QuickGELU"}
        for p in (*self.llm.parameters(), *rotations, *self.clip.parameters()):
            weights.append(p.detach().flatten()[::max(1, p.numel() // 2)][:2].float())
        ramp = Image.linear_gradient("L")
        picture = Image.merge("RGB", (ramp, ramp.rotate(90), Image.radial_gradient("L"))).resize((256, 128))
        pixels = self.preprocess(picture)[None]
        text = "Image: how many red things are there?\n3, or: none!"
        ids = [*self.image_words.tolist(), *self.ids_of([text])[0], self.tokenizer.eos_token_id]
        words = self.embed(torch.tensor([ids], device=self.device))
        states, _ = self.run_llm(words, torch.ones_like(words[:, :, 0], dtype=torch.long))
        text_feature = self.clip.encode_text(self.clip_tokenizer([text]).to(self.device))
        return {"tokens": ids, "activation functions": list(" ".join(sorted(functions)).encode()),
                "weights": torch.cat(weights).tolist(), "pixels": pixels[0, :, ::16, ::16].flatten().tolist(),
                "picture features": self.encode_image(pixels)[0].tolist(),
                "text features": text_feature[0].tolist(), "states": states[0, -1].tolist()}

    def load(self, path):
        """Load a checkpoint into this model → its stage. UserError if it belongs to other models."""
        stage, saved, theirs, tensors = read_adapter(path)
        if theirs.keys() != self.identity.keys():
            raise UserError(f"{path}: an earlier version of this program wrote it: train it again")
        for part, numbers in self.identity.items():
            numbers = np.array(numbers)
            if len(theirs[part]) != len(numbers):
                fits = False
            elif part in ("picture features", "text features", "states"):  # half precision moves these
                fits = np.linalg.norm(theirs[part] - numbers) < 0.1 * np.linalg.norm(numbers)
            else:  # number by number. Weights and pixels may differ by rounding to half precision
                rounding = 0.01 if part in ("weights", "pixels") else 0
                fits = np.allclose(theirs[part], numbers, rtol=rounding, atol=1e-6)
            if not fits:
                raise UserError(f"{path}: was trained with --llm {saved.llm} --clip {saved.clip}; the {part} "
                                f"of --llm {self.settings.llm} --clip {self.settings.clip} are others")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        needed = {name: tuple(p.shape) for name, p in self.adapter(stage).items()}
        for name in shapes | needed:
            if shapes.get(name) != needed.get(name):
                raise UserError(f"{path}: holds {name} of shape {shapes.get(name)}, not "
                                f"{needed.get(name)}: had its run another --variant, or other --n-… flags? "
                                "(Earlier runs are kept in folders that end in .1, .2, …)")
        self.load_state_dict(tensors, strict=False)  # the frozen models are not in the file
        return stage

    @classmethod
    def from_settings(cls, settings):
        """Load both frozen models and check that the method works with them. The layers are new."""
        where = device_and_dtype(settings.precision)
        model = cls(settings, *load_llm(settings.llm, *where), *load_clip(settings.clip, *where))
        check_clip(model)
        check_llm(model)
        model.identity  # is computed here once, before train.py frees CLIP's image tower
        return model


# ---- Helpers of the class ------------------------------------------------------------------------

def padding_first(x, mask):
    """Move the padding of x (B, T, D) and mask (B, T) to the far left. Questions are padded on their left, so
    it stands between <img> and question, where models with ALiBi or a sliding window would count it."""
    order = mask.argsort(dim=1, stable=True)
    return x.take_along_dim(order[..., None], 1), mask.take_along_dim(order, 1)


LOGITS_AT_ONCE = 25_000_000  # those of 500 tokens with OPT's vocabulary, of 100 with BLOOM's


def chunked_cross_entropy(h, targets, head):
    """States h (n, D), the tokens that follow (n,), the LM's frozen head → the loss of each (n,), fp32.

    The logits of a whole batch are the largest tensors of a step. But the head is frozen: all that must be
    kept of a chunk is g, the gradient of its losses with respect to its states. It is taken at once, and the
    logits are gone. What is then added to the losses is zero, but its gradient with respect to `part` is g:
    backward() goes on as if the logits were still there.
    """
    size = max(1, LOGITS_AT_ONCE // len(head.weight))
    losses = []
    for part, target in zip(h.split(size), targets.split(size)):
        x = part.detach().requires_grad_(part.requires_grad)
        loss = F.cross_entropy(head(x).float(), target, reduction="none")
        if part.requires_grad:
            (g,) = torch.autograd.grad(loss.sum(), x)
            zero = (part - part.detach()).float() * g.float()
            loss = loss.detach() + zero.sum(-1)
        losses.append(loss)
    return torch.cat(losses)


def choose_token(logits, temperature, top_k, generator):
    """Logits of the tokens that may come next (B, their number) → the token chosen (B,)."""
    if temperature < 0.01:  # dividing by less would overflow
        return logits.argmax(-1)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


def collate(question_ids, answer_ids):
    """Token ids of B questions (None for captions) and of B answers, lists of lists → Tokens."""
    questions = (None, None) if question_ids is None else pad(question_ids, "left")
    return Tokens(*questions, *pad(answer_ids, "right"))


def pad(rows, side):
    """Token ids of B texts of any lengths → (ids, mask), both (B, longest)."""
    longest = max(len(row) for row in rows)
    ids, mask = np.zeros((2, len(rows), longest), np.int64)
    for i, row in enumerate(rows):
        places = slice(len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, places], mask[i, places] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def context_length(llm):
    """The number of tokens that the LM can read. Beyond an original length, models with "longrope", as Phi-3,
    rotate keys differently, and those in the cache are wrong. So only the original length is used. (BLOOM
    names no length; it was trained on 2,048 tokens.)"""
    config = llm.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    original = getattr(config, "original_max_position_embeddings", None)
    for rope in (ropes, *ropes.values()):  # one for all layers, or one for each kind of layer
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            original = rope.get("original_max_position_embeddings") or original
    lengths = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    return min(filter(None, [original, *lengths]), default=2048)


# ---- The frozen models: loading them, and the check that the method works with them --------------

def device_and_dtype(precision):
    """(device, dtype of the frozen weights): a CUDA GPU if there is one. `auto` is bf16 on a GPU that has
    it, fp16 on others, fp32 on a CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "auto": torch.float32}
    if precision not in dtypes:
        raise UserError(f"--precision {precision}: it has to be auto, bf16, fp16 or fp32")
    return device, dtypes[precision]


def load_llm(name, device, dtype):
    """(causal LM, tokenizer) from a hub name or a local folder, by transformers. UserError if that fails, or
    where transformers would compute something else without a word, with weights made up or left out of a
    layer. What is left out elsewhere, and texts cut into other tokens, make a note."""
    # A name whose first part is a folder here is not asked for at the hub: it is a path with a slip.
    is_hub_name = name.count("/") == 1 and not Path(name).parent.is_dir()
    if not (Path(name).is_dir() or is_hub_name):
        raise UserError(f"--llm {name}: no such folder, and not a hub name as facebook/opt-1.3b is")
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        # In bf16 on a CPU, the attention that torch has fused makes a step 1.4 times as long.
        eager = device.type == "cpu" and dtype == torch.bfloat16
        llm, found = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, output_loading_info=True,
            attn_implementation="eager" if eager else None)
    except Exception as error:  # a foreign folder or a missing network may raise anything
        raise UserError(f"--llm {name}: can't be loaded ({why_not(error, name)})") from error

    if file_of(name, "adapter_config.json"):  # transformers would leave it out without a word
        raise UserError(f"--llm {name}: holds an adapter (PEFT, LoRA): merge it into the weights first")

    # transformers ignores weights that have no place in the model. Inside a layer that exists, this means
    # that it computes something else than it should: a bias that config.json does not name, the scales of
    # compressed weights, LoRA's matrices. (Names come with the base model's prefix or without it.)
    modules = dict((*llm.named_modules(), *llm.base_model.named_modules()))
    layers = tuple(f"{layer}." for layer, module in modules.items()
                   if layer and list(module.parameters(recurse=False)))
    ignored = sorted(found["unexpected_keys"])
    wrong = [key for key in ignored if key.startswith(layers) or is_layer_of_block(key, modules)]
    if getattr(llm.config, "quantization_config", None):  # computing with fewer bits is not exact
        wrong.append("quantization_config")
    wrong += sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if wrong:
        raise UserError(f"--llm {name}: {len(wrong)} weights are missing, of another shape, ignored by their "
                        f"layer or compressed: {', '.join(wrong[:3])}")
    if ignored:
        some = ", ".join(ignored[:3])
        print(f"note: --llm {name}: {len(ignored)} weights of the file are not used: {some}", file=sys.stderr)
    if getattr(llm.config, "auto_map", None):
        print(f"note: --llm {name}: its own code (auto_map) is not run, but transformers'", file=sys.stderr)

    # A tokenizer whose files are missing is made up by transformers: all words are unknown to it.
    ids = set(tokenizer(IMAGE + QUESTION + ANSWER).input_ids)
    embeddings = len(llm.get_input_embeddings().weight)
    if ids <= set(tokenizer.all_special_ids) or tokenizer.eos_token_id is None or len(tokenizer) > embeddings:
        raise UserError(f"--llm {name}: its tokenizer does not fit: it has {len(tokenizer)} tokens, with "
                        f"{tokenizer.eos_token} as end of text, the model {embeddings}; are all files there?")
    # For some kinds transformers ignores parts of tokenizer.json. The LM then reads tokens it rarely saw.
    # Compared are a start of the prompt, with [bos], a question and an answer, which begins with a space.
    file = file_of(name, "tokenizer.json")
    if file:
        as_written = tokenizers.Tokenizer.from_file(file)
        texts = [IMAGE, QUESTION + "Isn't it 12345 CUPS?\n Où, cafe\u0301?", " It's red."]
        if any(tokenizer(text).input_ids != as_written.encode(text).ids for text in texts):
            print(f"note: {file}: transformers cuts texts into other tokens than it says", file=sys.stderr)
    return llm.to(device), tokenizer


def file_of(name, file):
    """The path of a model's file, in its folder or as fetched from the hub, or None if it has none."""
    try:
        return transformers.utils.cached_file(name, file)
    except OSError:
        return None


def is_layer_of_block(key, modules):
    """Whether a weight belongs to a layer (q_norm) that a block of the model (layers.0.self_attn) lacks."""
    block = key.rsplit(".", 2)[0]
    return key.endswith(".weight") and block in modules and any(part.isdigit() for part in block.split("."))


def load_clip(name, device, dtype):
    """(CLIP, preprocess, tokenizer), by open_clip. UserError if that fails. OpenAI's weights need QuickGELU
    and give silently different features without it (open_clip issue 771). open_clip's list of TAGs tells;
    with a FILE the name must, as in ViT-L-14-quickgelu:FILE."""
    model, _, tag = name.partition(":")
    if Path(name).is_dir():
        model, tag = f"local-dir:{name}", ""
    elif model in ("local-dir", "hf-hub"):  # these have no tag
        model, tag = name, ""
    else:
        model = model.replace("/", "-")  # OpenAI writes ViT-L/14
        if model not in open_clip.list_models():
            raise UserError(f"--clip {name}: no such folder, nor a model of open_clip's, as ViT-B-32 is")
    quick_gelu = bool(tag and (open_clip.get_pretrained_cfg(model, tag) or {}).get("quick_gelu"))
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    try:
        clip, preprocess = open_clip.create_model_from_pretrained(
            model, tag or None, precision=precision, device=device, force_quick_gelu=quick_gelu)
        return clip, preprocess, open_clip.get_tokenizer(model)
    except Exception as error:
        folder = name.removeprefix("local-dir:")
        raise UserError(f"--clip {name}: can't be loaded ({why_not(error, folder)})") from error


def why_not(error, folder):
    """An error in one line, or its usual cause: git-lfs pointers, small texts, in the place of weights."""
    for path in Path(folder).glob("*"):
        small = path.is_file() and path.stat().st_size < 1000
        if small and path.read_bytes().startswith(b"version https://git-lfs"):
            return f"{path.name} is a git-lfs pointer in place of the file: run  git lfs pull  in {folder}"
    return f"{type(error).__name__}: {str(error)[:300]}"


def check_settings(model):
    """UserError if a setting is out of range, or if CLIP or the tokenizer lacks what the prompt needs."""
    settings = model.settings
    if getattr(model.clip_text, "attn_mask", None) is None:
        raise UserError(f"--clip {settings.clip}: can't be used: its text transformer is not causal")
    places = len(model.clip_text.positional_embedding)  # three are for SOS, the request and EOS
    most = {"n_features": places - 3, "n_slots": 100, "n_image_tokens": 100}
    for name, highest in most.items():
        if not 1 <= getattr(settings, name) <= highest:
            raise UserError(f"--{name.replace('_', '-')} has to be from 1 to {highest}")
    if not 0 <= settings.dropout < 1 or settings.variant not in VARIANTS:
        raise UserError("--dropout has to be from 0 to below 1, and --variant one of " + ", ".join(VARIANTS))
    if model.clip_tokenizer([""]).max() >= len(model.clip_text.token_embedding.weight):
        raise UserError(f"--clip {settings.clip}: its tokenizer does not fit: it has more tokens than the "
                        "model; does the configuration name the right one (hf_tokenizer_name)?")
    for text in (IMAGE, QUESTION, ANSWER):
        if not model.ids_of([text])[0]:
            raise UserError(f"--llm {settings.llm}: its tokenizer has no token for {text!r}, which it needs")


@torch.no_grad()
def check_clip(model):
    """UserError if CLIP's text path over word vectors is not what CLIP computes from a text."""
    ids = model.clip_tokenizer(["image: one two"]).to(model.device)  # (1, 77), padded
    length = (ids[0] == model.sos_eos[1]).int().argmax() + 1  # up to the first EOS
    mine = model.encode_words(model.clip_text.token_embedding(ids[:, :length]))
    if not same(mine, model.clip.encode_text(ids), model.clip_text.transformer.get_cast_dtype()):
        raise UserError(f"--clip {model.settings.clip}: this kind of CLIP can't be used: its text "
                        "transformer is not causal, or is not read at the end of a text")


def check_llm(model):
    """UserError unless LMEye's numbers are those that the language model gives by itself, see `find_fault`.

    Seen to fail: a head that is not all there is to the logits, padding that leaks into states, a cache that
    can't be shortened, attention that is not causal. The controls make no passes but those of `lmeye`, so it
    is checked in any case.
    """
    lmeye = copy.copy(model)  # the same weights, with other settings
    lmeye.settings = replace(model.settings, variant="lmeye")
    try:
        fault = find_fault(lmeye)
    except Exception as error:  # a foreign model may raise anything
        if is_memory_full(error):
            raise
        error = f"{type(error).__name__}: {printable(str(error))[:300]}"
        fault = f"it can't be run on vectors with a cache ({error})"
    if fault:
        raise UserError(f"--llm {model.settings.llm}: this kind of language model can't be used: {fault}")


@torch.enable_grad()  # also where a user has switched gradients off
def find_fault(model):
    """What is wrong with the language model, in words, or None.

    Compared are the head alone with the LM's own logits; then a padded batch of two, in passes with a cache,
    with `plain_loss`, by the state h and the logits. Not by the loss: while weights are small all logits are
    nearly equal, and the loss is about ln V, right or wrong.
    """
    llm, head = model.llm, model.llm.get_output_embeddings()
    questions = ["what color is it?", "is the background red? how many things are there?"]
    answers = ["red", "yes it is on a red background"]
    f = torch.randn(2, model.align.in_features, generator=torch.Generator().manual_seed(0)).to(model.device)
    with torch.no_grad():
        plain = [plain_loss(model, f[i:i + 1], questions[i], answers[i]) for i in range(2)]
    plain_logits = torch.cat([logits for _, logits, _ in plain])  # (n, V)
    plain_h = torch.cat([h for _, _, h in plain])  # (2, D)
    if not (plain_logits.isfinite().all() and plain_h.isfinite().all()):
        advice = ": fp16 ends at 65,504, so use --precision fp32, or bf16 on a GPU that has it"
        return "its states are not finite" + (advice if llm.dtype == torch.float16 else "")

    # Some models cap their logits softly (Gemma 2, by tanh). It shows only where logits are as large as those
    # of trained models, so what goes into the head is enlarged.
    size = 30 / plain_logits.std()
    x = model.embed(model.answer_words)[None].to(llm.dtype)
    with torch.no_grad(), head.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * size,)):
        mine = model.logits(llm.base_model(inputs_embeds=x).last_hidden_state)
        if not same(mine, llm(inputs_embeds=x).logits, llm.dtype):
            return "its head alone does not give its logits"

    asked = []  # the states at <img-d>
    with model.request.register_forward_pre_hook(lambda layer, inputs: asked.append(inputs[0].detach())):
        states, targets = model.answer_states(f, model.tokenize(questions, answers))
    logits = model.logits(states.detach())
    # What all logits of a token have in common changes no probability, and would hide differences.
    centred = [part - part.mean(-1, keepdim=True) for part in (logits, plain_logits)]
    if not (same(asked[0], plain_h, llm.dtype) and same(*centred, llm.dtype)):
        return "padding, its cache or later words change its numbers"
    loss = chunked_cross_entropy(states, targets, head).sum()
    gradients = torch.autograd.grad(loss, list(model.adapter(2).values()))
    return None if all(g.isfinite().all() for g in gradients) else "its gradients are not finite"


def same(mine, theirs, dtype):
    """Whether tensors differ by rounding only: |mine − theirs| / |theirs| is below a limit. Of right models
    it was seen up to 3e-6 in fp32 and 0.03 in half precision, of wrong ones from 0.49 on."""
    difference = (mine.float() - theirs.float()).norm() / theirs.float().norm()
    return difference.item() < (1e-3 if dtype == torch.float32 else 0.1)  # false for NaN


# ---- Files, and errors ---------------------------------------------------------------------------

CHECKPOINT = "adapter.safetensors"  # in the folder of a run


def read_adapter(path):
    """A checkpoint → (stage, Settings, identity, {name: tensor}); no code in it runs. UserError otherwise."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file: name an {CHECKPOINT}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["lmeye"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if "interaction" in header["settings"]:
            raise ValueError("an earlier version wrote it, with other names: train it again")
        settings = Settings(**header["settings"])
        settings.dropout = float(settings.dropout)  # in Python it may have been given as 0
        usual = vars(Settings())
        wrong = [name for name in usual if type(getattr(settings, name)) is not type(usual[name])]
        if wrong or header["stage"] not in (1, 2) or settings.variant not in VARIANTS:
            raise ValueError(f"its header is off: {', '.join(wrong) or 'stage or variant'}")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("some of its numbers are not finite")
        identity = {part: np.array(numbers, float) for part, numbers in header["identity"].items()}
        return header["stage"], settings, identity, tensors
    except Exception as error:  # anything may stand in a file
        error = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: can't be used as a checkpoint ({error})") from None


def write_atomically(path, data):
    """Write bytes beside `path`, flush them to the disk, rename: a reader finds the old file or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:  # that of a full disk does not name the file
        raise UserError(f"{path}: can't be written ({error.strerror})") from error


class UserError(Exception):
    """A mistake of the user's, or of a file: printed on one line, without a traceback."""


def printable(text):
    """Text in one line, without what a terminal would obey. (Joiners stay: they belong to letters.)"""
    return "".join(c for c in " ".join(text.split()) if c.isprintable() or c in "\u200c\u200d")


class Output:
    """Standard output or error. Where nobody reads it any more (`| head`, a `tee` that Ctrl-C ended, a closed
    terminal) nothing more is written, and no error ends the program, but that of a full disk."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:  # from now on, all goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if error.errno == errno.ENOSPC:
                raise


def is_memory_full(error):
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def show_library_notes():
    """Print what transformers and open_clip warn of, once each and in one line, and that open_clip resizes
    position embeddings. (transformers' list of missing weights is left out: load_llm refuses those.)"""
    told, handler = set(), logging.Handler()

    def emit(record):
        text = printable(record.getMessage())[:300]
        warns = record.levelno >= logging.WARNING and "LOAD REPORT" not in text
        if (warns or text.startswith("Resizing")) and text not in told:
            told.add(text)
            print(f"note: {text}", file=sys.stderr)

    handler.emit = emit
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("huggingface_hub").handlers.clear()  # it would say all a second time
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()
    transformers.logging.disable_progress_bar()


def run_main(main):
    """Run a program's `main()`. Mistakes of the user's, errors of files, and no memory left end it with one
    line and status 2, Ctrl-C with 130."""
    show_library_notes()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # a service has none
        if hasattr(stream, "reconfigure"):  # for letters that a terminal lacks
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Output(stream))
    try:
        main()
    except Exception as error:
        full = is_memory_full(error)
        if not (full or isinstance(error, (UserError, OSError, UnicodeError))):  # a mistake of this program
            raise
        advice = "out of memory; lower --max-batch-tokens, or take smaller models: " if full else ""
        print(f"{Path(sys.argv[0]).name}: {advice}{printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)  # as it is: it may hold a command
        sys.exit(130)

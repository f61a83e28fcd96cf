"""The models that evidence.py compares LMEye with, each by what it changes of lmeye.py's class.

    picture_tokens, SlotWithoutRequest   nothing is asked: more tokens alone, or the picture itself in the slot
    CurvedDecomposition … NoTextTransformer   the exercises of README.md, solved
    RequestTold … RequestToldAndThawed   one part is told what it would have to find out, or is trained as well
    CurvedPicture … q_former   other ways to bring a picture into a language model
    ChatTemplate   another frame around the same question

`tell_…` change the Dataset that a model is trained and measured on, where it has to know more than CLIP's feature, or
reads other tokens.
"""

import numpy as np
import torch
import torch.nn.functional as F

import data
from lmeye import LMEye


def two_layers(n_in, hidden, n_out):
    """Linear, GELU, Linear: a linear layer with a hidden one before it."""
    return torch.nn.Sequential(torch.nn.Linear(n_in, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, n_out))


# ---- Nothing is asked ----------------------------------------------------------------------------------------


def picture_tokens(n):
    """The class of `static` with n picture tokens, as many as `full` has with its slots: tells "more tokens" from
    "asking"."""
    class PictureTokens(LMEye):
        def __init__(self, *parts):
            super().__init__(*parts)
            self.align = torch.nn.Linear(self.align.in_features, n * self.align.out_features)
            self.max_text_tokens -= n - 1
            self.to(self.device).eval()

        def see(self, f):
            return self.align(f).unflatten(-1, (n, -1)) + self.img  # (B, n, D)

    return PictureTokens


class SlotWithoutRequest(LMEye):
    """A second static token, in the place of <img-d>: no request, no text transformer. It has what `full` has but for
    the asking: a token behind the question, where the miniature's language model was taught to read hints."""

    def interact(self, f, r):
        return f  # as `v`; both are of CLIP's joint space

    def adapter(self, stage):
        kept = super().adapter(stage)
        return {name: p for name, p in kept.items() if not name.startswith("decompose")}


# ---- The exercises of README.md, solved ----------------------------------------------------------------------


class CurvedDecomposition(LMEye):
    """Decompose with a hidden layer."""

    def __init__(self, *parts):
        super().__init__(*parts)
        C, NW = self.decompose.in_features, self.decompose.out_features
        self.decompose = two_layers(C, C, NW)
        self.to(self.device).eval()


class TwoRounds(LMEye):
    """Ask twice: the model reads what came back, and asks again from there."""

    def read_prompt(self, f, question, question_mask):
        x, mask, cache = super().read_prompt(f, question, question_mask)
        if question.shape[1] == 0:
            return x, mask, cache
        Q, A = self.settings.n_slots, len(self.answer_words)
        came_back, answer_follows = x.split([Q, A], 1)
        h, cache = self.run_llm(came_back, mask[:, :-A], cache)
        cache.crop(-Q)
        v = self.interact(f, self.ask(h[:, -1]))
        return torch.cat([self.tell(v), answer_follows], 1), mask, cache


class EarlierRequest(LMEye):
    """Read the request from the language model's first layer instead of its last."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.llm.get_decoder().layers[1].register_forward_pre_hook(self.keep)

    def keep(self, layer, inputs):
        self.state = inputs[0]  # (B, T, D): what the second layer reads is what the first one wrote

    def ask(self, h):
        return super().ask(self.state[:, -1])  # of the pass that has just ended at <img-d>: prefill asks right after it


class NoPictureToken(LMEye):
    """No picture in <img>: all must come by request."""

    def see(self, f):
        return self.img.expand(len(f), 1, -1)


class NoTextTransformer(LMEye):
    """`v` is the sum of the words. (Needs a CLIP whose text transformer is as wide as its joint space.)"""

    def encode_words(self, words):
        return words.sum(1)  # (B, W)


# ---- Oracles: one part is told, by a code that the Dataset brings along, or trained as well ------------------


class Told(LMEye):
    """f comes with a code behind it, (B, C + the code's width), as the `tell_…` make it: some part reads the code."""

    def read_prompt(self, f, question, question_mask):
        f, self.code = f.tensor_split([self.transmit.in_features], dim=1)  # kept for `see`, `ask`, `interact`, called below
        return super().read_prompt(f, question, question_mask)


class RequestTold(Told):
    """What is asked is told: a code of the question takes the place of the language model's state."""

    def ask(self, h):
        return super().ask(self.code)


class AnswerTold(Told, SlotWithoutRequest):
    """The answer is told: its code takes the place of `v`. Is the slot read?"""

    def interact(self, f, r):
        return self.code


class TextTransformerThawed(LMEye):
    """CLIP's text transformer is trained with the rest."""

    def adapter(self, stage):
        kept = super().adapter(stage)
        if stage == 2:
            for name, p in self.clip.named_parameters():
                if not name.startswith("visual") and name != "logit_scale":
                    kept[f"clip.{name}"] = p
        return kept


class RequestToldAndThawed(RequestTold, TextTransformerThawed):
    """Both: a request that is told, and a text transformer that is trained. (`decompose` is learned as ever.)"""


def tell_nothing(model, dataset):
    return dataset


def tell_by_words(dataset, part, vocabulary, width):
    """A Dataset with a code behind the feature of each record: of its question (`part` 0) or its answer (1). A code is the
    sum of its words' vectors, which are random, but always the same."""
    vectors = np.random.default_rng(0).normal(size=(vocabulary, width))
    codes = np.stack([vectors[texts[part]].sum(0) for texts in dataset.tokens])
    features = np.concatenate([dataset.features[dataset.picture], codes], 1).astype(np.float16)
    return dataset._replace(features=features, picture=np.arange(len(codes)))


def tell_question(model, dataset):
    return tell_by_words(dataset, 0, len(model.tokenizer), model.request.in_features)


def tell_answer(model, dataset):
    return tell_by_words(dataset, 1, len(model.tokenizer), model.align.in_features)


# ---- Other ways to bring a picture into a language model; `static` is the one of LLaVA -----------------------


class CurvedPicture(LMEye):
    """LLaVA-1.5: a hidden layer between the picture and its token."""

    def __init__(self, *parts):
        super().__init__(*parts)
        C, D = self.align.in_features, self.align.out_features
        self.align = two_layers(C, D, D)
        self.to(self.device).eval()


class RequestWithoutBias(LMEye):
    """A request that is made of the state alone: a bias, the same for every question, might drown what is asked."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.request = torch.nn.Linear(self.request.in_features, self.request.out_features, bias=False)
        self.to(self.device).eval()


def channels(model):
    """Of the map that `tell_patches` takes from CLIP's image tower."""
    return model.clip.visual.layer3[-1].conv3.out_channels


def tell_patches(model, dataset):
    """A Dataset with the map of the third of CLIP's four stages behind the feature of each picture: of its 4 × 4 places
    (16, E), flat."""
    used, row = np.unique(dataset.picture, return_inverse=True)
    images, maps = {}, []
    for picture, record in zip(dataset.picture, dataset.records):
        images[picture] = record.image

    def keep(stage, inputs, out):  # (B, E, 4, 4)
        maps.append(out.flatten(2).mT.flatten(1))

    with model.clip.visual.layer3.register_forward_hook(keep):
        for start in range(0, len(used), 256):
            pictures = [data.load_image(images[picture]) for picture in used[start:start + 256]]
            model.encode_image(torch.stack([model.preprocess(picture) for picture in pictures]))
    features = np.concatenate([dataset.features[used], torch.cat(maps).float().cpu().numpy()], 1).astype(np.float16)
    return dataset._replace(features=features, picture=row)


class WordOfEachPatch(Told):
    """LMEye whose words of CLIP's are made from the patches, one of each, in the place of the whole feature."""

    def __init__(self, *parts):
        super().__init__(*parts)
        N, W = self.settings.n_features, self.request.out_features
        of_patch = torch.nn.Linear(channels(self), W)
        self.decompose = torch.nn.Sequential(torch.nn.Unflatten(1, (N, -1)), of_patch, torch.nn.Flatten())
        self.to(self.device).eval()

    def interact(self, f, r):
        return super().interact(self.code, r)


def patch_tokens(n):
    """The class of `static` with n picture tokens made from the 16 patches: with n < 16, from means of neighbors."""
    class PatchTokens(Told):
        def __init__(self, *parts):
            super().__init__(*parts)
            self.align = torch.nn.Linear(channels(self), self.align.out_features)
            self.max_text_tokens -= n - 1
            self.to(self.device).eval()

        def see(self, f):
            patches = self.code.unflatten(1, (16, -1))  # (B, 16, E)
            return self.align(F.adaptive_avg_pool1d(patches.mT, n).mT) + self.img  # (B, n, D)

    return PatchTokens


class Queries(torch.nn.Module):
    """A small Q-Former: queries read each other (and words, if there are any), then the patches."""

    def __init__(self, n, patch_width, width):
        super().__init__()
        self.queries = torch.nn.Parameter(torch.randn(n, width))
        self.of_patch = torch.nn.Linear(patch_width, width)
        self.among = torch.nn.MultiheadAttention(width, 4, batch_first=True)
        self.of_picture = torch.nn.MultiheadAttention(width, 4, batch_first=True)
        self.curve = two_layers(width, 2 * width, width)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(4))

    def forward(self, patches, words, mask):
        """patches (B, 16, E), words (B, T, D) with their mask (B, T) → (B, n, D)."""
        x, n = self.queries.expand(len(patches), -1, -1), len(self.queries)
        with_words = self.norms[0](torch.cat([x, words], 1))
        left_out = F.pad(mask == 0, (n, 0), value=False)
        x = x + self.among(with_words[:, :n], with_words, with_words, left_out, need_weights=False)[0]
        patches = self.norms[1](self.of_patch(patches))
        x = x + self.of_picture(self.norms[2](x), patches, patches, need_weights=False)[0]
        return x + self.curve(self.norms[3](x))


def q_former(reads_question, n=2):
    """The class of `static` whose n picture tokens a small Q-Former makes from the patches, as in BLIP-2; if
    `reads_question`, with the question's words beside its queries, as in InstructBLIP."""
    class QFormer(Told):
        def __init__(self, *parts):
            super().__init__(*parts)
            self.align = Queries(n, channels(self), self.align.out_features)
            self.max_text_tokens -= n - 1
            self.to(self.device).eval()

        def read_prompt(self, f, question, question_mask):
            shown = question.shape[1] if reads_question else 0
            self.words = self.embed(question[:, :shown]), question_mask[:, :shown]
            return super().read_prompt(f, question, question_mask)

        def see(self, f):
            return self.align(self.code.unflatten(1, (16, -1)), *self.words) * self.spread + self.img  # (B, n, D)

    return QFormer


# ---- Another frame around the same question ------------------------------------------------------------------


class ChatTemplate(LMEye):
    """The language model's own chat template in the place of "Image: … Question: … Answer:", for one that was taught to
    chat: the user's message is picture, question and <img-d>. (One question to a picture, no earlier turns.)"""

    def __init__(self, *parts):
        super().__init__(*parts)
        here = "PICTURE AND QUESTION"
        message = self.tokenizer.apply_chat_template([{"role": "user", "content": here}], tokenize=False,
                                                     add_generation_prompt=True)
        for name, text in zip(("image_words", "answer_ids"), message.split(here)):
            ids = self.tokenizer(text, add_special_tokens=False).input_ids  # what looks like a special token here is one
            self.max_text_tokens -= len(ids) - len(getattr(self, name))
            setattr(self, name, torch.tensor(ids, device=self.device))

    def token_ids(self, questions, answers):
        question_ids = [[] for _ in answers]
        if questions is not None:
            question_ids = self.ids(["\n" + question for question in questions])
        return question_ids, [ids + [self.tokenizer.eos_token_id] for ids in self.ids(list(answers))]


def tell_in_own_tokens(model, dataset):
    """The same records in the tokens of this model, where it writes them in another way than `LMEye`."""
    questions = [record.question for record in dataset.records] if dataset.records[0].turns else None
    question_ids, answer_ids = model.token_ids(questions, [record.answer for record in dataset.records])
    return dataset._replace(tokens=list(zip(question_ids, answer_ids)))

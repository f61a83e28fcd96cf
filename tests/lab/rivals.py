"""The exercises of the lab book, solved: each is a class that changes one step of LMEye.

    python tests/lab/rivals.py --rival TwoRounds --stage 2 --preset mini

trains one of them: --rival names it, all other flags are those of train.py. (To go on after Ctrl-C, add it
to the command that is printed.) Phase 1 is LMEye's own. A run of LMEye that is in the way is renamed. Only
this script, with the flags of sample.py, asks a rival: sample.py would take its checkpoint for LMEye's.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import lmeye
import sample
import train
from lmeye import LMEye


class Rival(LMEye):
    """What all have in common."""

    @classmethod
    def from_settings(cls, settings):
        """As LMEye's, but unchecked: `check_llm` and `check_clip` would find that this is not LMEye."""
        where = lmeye.device_and_dtype(settings.precision)
        model = cls(settings, *lmeye.load_llm(settings.llm, *where), *lmeye.load_clip(settings.clip, *where))
        model.identity  # while CLIP's image tower is there
        return model


class CurvedDecomposition(Rival):
    """Decompose with a hidden layer: Linear, GELU, Linear."""

    def __init__(self, *parts):
        super().__init__(*parts)
        C, NW = self.decompose.in_features, self.decompose.out_features
        self.decompose = torch.nn.Sequential(torch.nn.Linear(C, C), torch.nn.GELU(), torch.nn.Linear(C, NW))
        self.to(self.device).eval()


class TwoRounds(Rival):
    """Ask twice: the model reads what came back, and asks again from there."""

    def read_prompt(self, f, question, question_mask):
        x, mask, cache = super().read_prompt(f, question, question_mask)
        if cache is None:  # a caption: nothing is asked
            return x, mask, cache
        Q, A = self.settings.n_slots, len(self.answer_words)
        came_back, answer_follows = x.split([Q, A], 1)
        h, cache = self.run_llm(came_back, mask[:, :-A], cache)
        cache.crop(-Q)  # the second answer takes the place of the first
        v = self.interact(f, self.ask(h[:, -1]))
        return torch.cat([self.tell(v), answer_follows], 1), mask, cache


class EarlierRequest(Rival):
    """Read the request from the language model's first layer instead of its last."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.llm.get_decoder().layers[1].register_forward_pre_hook(self.keep)

    def keep(self, layer, inputs):
        self.state = inputs[0]  # (B, T, D): what the second layer reads is what the first one wrote

    def ask(self, h):
        return super().ask(self.state[:, -1])  # of the pass that has just ended at <img-d>


class NoPictureToken(Rival):
    """No picture in <img>: all must come by request."""

    def see(self, f):
        return self.img.expand(len(f), self.settings.n_image_tokens, -1)


class NoTextTransformer(Rival):
    """`v` is the sum of the words. (Needs a CLIP whose text transformer is as wide as its joint space.)"""

    def encode_words(self, words):
        return words.sum(1)  # (B, W)


RIVALS = {kind.__name__: kind for kind in Rival.__subclasses__()}


def main():
    """Run train.py, or without --stage sample.py, with a rival in LMEye's place."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--rival", required=True, choices=RIVALS)
    args, flags = parser.parse_known_args()
    train.LMEye = sample.LMEye = RIVALS[args.rival]
    sys.argv[1:] = flags
    training = any(flag.startswith("--stage") for flag in flags)  # --stage 2, or --stage=2
    program = train if training else sample
    program.main()


if __name__ == "__main__":
    lmeye.run_main(main)

"""The exercises of README.md, solved: each is a class that changes one step of LMEye.

    python tests/lab/rivals.py --rival TwoRounds --stage 2 --preset mini --out out/two-rounds

trains one of them: --rival names it, and all other flags are those of train.py. Phase 1 is LMEye's own: with another
--out, name its adapter by --init.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import lmeye
import train
from lmeye import LMEye


class CurvedDecomposition(LMEye):
    """Decompose with a hidden layer: Linear, GELU, Linear."""

    def __init__(self, *parts):
        super().__init__(*parts)
        C, NW = self.decompose.in_features, self.decompose.out_features
        self.decompose = torch.nn.Sequential(torch.nn.Linear(C, C), torch.nn.GELU(), torch.nn.Linear(C, NW))
        self.to(self.device).eval()


class TwoRounds(LMEye):
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


class EarlierRequest(LMEye):
    """Read the request from the language model's first layer instead of its last."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.llm.get_decoder().layers[1].register_forward_pre_hook(self.keep)

    def keep(self, layer, inputs):
        self.state = inputs[0]  # (B, T, D): what the second layer reads is what the first one wrote

    def ask(self, h):
        return super().ask(self.state[:, -1])  # of the pass that has just ended at <img-d>


class NoPictureToken(LMEye):
    """No picture in <img>: all must come by request."""

    def see(self, f):
        return self.img.expand(len(f), self.settings.n_image_tokens, -1)


class NoTextTransformer(LMEye):
    """`v` is the sum of the words. (Needs a CLIP whose text transformer is as wide as its joint space.)"""

    def encode_words(self, words):
        return words.sum(1)  # (B, W)


RIVALS = {kind.__name__: kind for kind in LMEye.__subclasses__()}


def main():
    """Run train.py with a rival in LMEye's place."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--rival", required=True, choices=RIVALS)
    args, flags = parser.parse_known_args()
    train.LMEye = RIVALS[args.rival]
    sys.argv = [f"rivals.py --rival {args.rival}", *flags]
    train.main()


if __name__ == "__main__":
    lmeye.run_main(main)

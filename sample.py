"""Ask a trained LMEye about pictures, or measure it on a data set.

    python sample.py picture.jpg "what shape is it?"          the answer, as it is written
    python sample.py picture.jpg                              a chat about the picture: a question a line
    python sample.py a.jpg b.jpg c.jpg "what shape is it?"    a batch: a line of JSON for each picture
    python sample.py a.jpg b.jpg --questions questions.txt    each line of the file, asked about each picture
    python sample.py --data questions.json --images val.zip   an evaluation: a table, the answers, result files

The newest checkpoint below --out answers, unless --checkpoint names another. One that has only seen stage 1 writes
captions. Answers and tables go to the standard output, progress, errors and notes about answers to the standard error.
"""

import argparse
import glob
import json
import os
import re
import shlex
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import lmeye
from lmeye import CHECKPOINT, PRESETS, LMEye, UserError

MAX_TOKENS = 64  # of an answer: always in an evaluation, else unless told otherwise


def answer(model, f, question, options):
    """Print the answer to one question as it is written, and return it. No question: a caption. The last word is held
    back until the next one begins: a tokenizer may still join something to it."""
    ids, shown, text = [], "", ""
    for token in model.stream(f, [question] if question else None, **options):
        ids += token.tolist()
        text = lmeye.printable(model.decode(ids))
        whole_words = text.rpartition(" ")[0]
        if whole_words.startswith(shown):
            print(whole_words[len(shown):], end="", flush=True)
            shown = whole_words
    print(text[len(shown):] if text.startswith(shown) else f"\n{text}")
    return text


def chat(model, f, options):
    """Read questions, a line each, until an empty one; earlier turns are context, and each turn asks anew."""
    if sys.stdin is None:
        raise UserError("no question was given, and there is no standard input to read one from")
    turns, prompt = [], ("question (none: end) > " if sys.stdin.isatty() else "")
    while True:
        try:
            question = input(prompt).encode("utf-8", "replace").decode().strip()
        except EOFError:
            return
        if not question:
            return
        note_unknown_words(model, question)
        if not fits(model, question):
            print("note: this question is longer than the language model's context: shorten it", file=sys.stderr)
            continue
        while not fits(model, data.dialogue([*turns, question])):
            print("note: the context is full: asked without the earliest turn", file=sys.stderr)
            turns = turns[2:]
        turns += [question, answer(model, f, data.dialogue([*turns, question]), options)]


def fits(model, question):
    """Whether a question, with room for a token of an answer, fits the language model's context."""
    return len(model.question_ids([question])[0]) + 1 <= model.max_text_tokens


def note_unknown_words(model, text):
    """Tell which words the tokenizer has no token for. (Those of large models have one for any.)"""
    unknown = [word for word in text.split() if model.tokenizer.unk_token_id in model.ids_of([word])[0]]
    if unknown:
        print(f"note: the language model does not know: {lmeye.printable(' '.join(unknown))}", file=sys.stderr)


def batch(model, pictures, questions, options, max_batch_tokens):
    """Print a line of JSON for each answer to each question about each picture (no questions: for each caption). What can't
    be answered has an "error" in its line, and the others go on; UserError at the end if there was one."""
    features, asked, failed = {}, [], 0
    for path in tqdm(pictures, desc="pictures", disable=None):
        try:
            features[path] = model.encode_image(model.preprocess(data.load_image(path))[None])  # (1, C)
        except UserError as error:
            print(json_line({"image": path, "error": str(error)}), flush=True)
            failed += 1
    for path in [path for path in pictures if path in features]:
        for question in questions or [""]:
            if fits(model, question):
                asked.append((path, question))
            else:
                print(json_line({"image": path, "question": question, "error": "longer than the context"}), flush=True)
                failed += 1
    longest = max([len(model.ids_of([question])[0]) for _, question in asked], default=0)
    size = max(1, max_batch_tokens // (longest + options["max_tokens"]))
    for start in tqdm(range(0, len(asked), size), desc="answers", disable=None):
        part = asked[start:start + size]
        f = torch.cat([features[path] for path, _ in part])
        answers = model.generate(f, [question for _, question in part] if questions else None, **options)
        for (path, question), text in zip(part, answers):
            named = {"image": path, "question": question} if questions else {"image": path}
            print(json_line(named | {"answer": text}), flush=True)
    if failed:
        raise UserError(f"{failed} could not be answered: see \"error\" in their lines")


def json_line(row):
    """A dict as a line of JSON in which letters of all scripts stay readable, and what a terminal obeys is escaped."""
    text = json.dumps(row, ensure_ascii=False)
    return "".join(c if c == " " or lmeye.printable(c) else json.dumps(c)[1:-1] for c in text)


# ---- Evaluation ----------------------------------------------------------------------------------------------


def predict_and_score(model, dataset, name="answers", blind=False, max_batch_tokens=4096):
    """Let a model speak about the records of a Dataset → ({column: (R,) scores}, R texts), NaN where a column does not
    concern a record. With `blind`, it is shown other records' pictures: what it still gets right, it did not see."""
    model.eval()
    records, shown = dataset.records, data.shuffled(dataset) if blind else dataset
    scores, texts = defaultdict(lambda: np.full(len(records), np.nan)), [""] * len(records)
    for rows in tqdm(batches_by_length(model, dataset, max_batch_tokens), desc=name, disable=None):
        batch, f = [records[i] for i in rows], shown.f(rows)
        if batch[0].choices:
            said, marks = rank_choices(model, batch, f)
        else:
            questions = [record.question for record in batch] if batch[0].turns else None
            said = model.generate(f, questions, max_tokens=MAX_TOKENS)
            marks = [score_text(record, text) for record, text in zip(batch, said)]
        if not batch[0].turns:
            for mark, value in zip(marks, clip_score(model, dataset.f(rows), said).tolist()):
                mark["CLIPScore"] = value
        for i, text, mark in zip(rows, said, marks):
            texts[i] = text
            for column, score in mark.items():
                scores[column][i] = score
    for how in ("", ", per token"):
        if "Q→A" + how in scores and "QA→R" + how in scores:
            scores["Q→AR" + how] = both_right(records, scores["Q→A" + how], scores["QA→R" + how])
    return {column: scores[column] for column in sorted(scores, key=lambda c: (c == "all", c))}, texts  # "all" last


def batches_by_length(model, dataset, max_batch_tokens):
    """Rows of a Dataset in batches of one kind (captions, questions, choices) whose texts, with padding and answers, have
    at most max_batch_tokens; the largest of a kind come first: memory that does not suffice is found out early."""
    sizes = []  # of each record: its kind, and the tokens that it takes
    for record, (question, _) in zip(dataset.records, dataset.tokens):
        K, longest = len(record.choices), MAX_TOKENS
        if record.choices:
            longest = max(len(ids) for ids in model.answer_ids(record.choices))
        sizes.append(((K, len(record.turns) > 0), max(1, K) * (len(question) + longest)))
    batches, batch = [], []
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        kind, size = sizes[i]
        if batch and (kind != sizes[batch[0]][0] or (len(batch) + 1) * size > max_batch_tokens):
            batches.append(batch)
            batch = []
        batch.append(i)
    return [batch] + batches[::-1]


def score_text(record, text):
    """What a text scores against a record's answer → {column: score}: exact match (but for case), over all and by
    category; VQA's soft accuracy where the data has the answers of its annotators. Captions have no truth to match."""
    if not record.turns or not record.answer:
        return {}
    right = text.lower() == record.answer.strip().lower()
    scores = {record.category: right, "all": right}
    if len(record.answers) > 1:
        scores["VQA"] = scores[f"VQA, {record.category}"] = vqa_accuracy(text, record.answers)
    return scores


def rank_choices(model, records, f):
    """VCR: the likeliest choice of each record, by the sum and by the mean of its tokens' log p → (texts, [{column: right}])."""
    texts, marks = [], []
    logp = model.score(f, [r.question for r in records], [list(r.choices) for r in records]).cpu()  # (B, K)
    for record, sums in zip(records, logp):
        lengths = torch.tensor([len(ids) - 1 for ids in model.answer_ids(record.choices)])  # without eos
        likeliest, likeliest_per_token = record.choices[sums.argmax()], record.choices[(sums / lengths).argmax()]
        step = "Q→A" if len(record.turns) == 1 else "QA→R"  # the answer, or the reason for it
        texts.append(likeliest)
        marks.append({step: likeliest == record.answer, f"{step}, per token": likeliest_per_token == record.answer})
    return texts, marks


def both_right(records, answered, explained):
    """VCR's Q→AR, (R,): of the records that ask for a rationale, right where the answer was, too; one left out was not."""
    right = {}
    for record, score in zip(records, answered):
        if not np.isnan(score):
            right[record.key, record.image, record.turns[0]] = score
    answered = [right.get((record.key, record.image, record.turns[0]), 0.0) for record in records]
    return explained * np.array(answered)


@torch.no_grad()
def clip_score(model, f, captions):
    """2.5 · max(cos(picture, caption), 0) of each (Hessel et al., 2021), without their code's "A photo depicts"."""
    v = model.clip.encode_text(model.clip_tokenizer(captions).to(model.device)).float()  # (B, C)
    return 2.5 * F.cosine_similarity(f.to(v), v).clamp(min=0).cpu()


def vqa_accuracy(said, answers):
    """VQA's soft accuracy: for each annotator min(1, matches among the others / 3), averaged (Antol et al., 2015). As
    in the official scorer, texts are normalised only where the annotators differ."""
    normalize = normalize_vqa if len(set(answers)) > 1 else str.strip
    match = [normalize(a) == normalize(said) for a in answers]
    return sum(min(1, (sum(match) - m) / 3) for m in match) / len(match)


def normalize_vqa(text):
    """A text as the official scorer of VQA compares it: case, punctuation, numbers, articles, apostrophes left out."""
    before = text = text.lower()
    comma = re.search(r"\d,\d", text)
    for mark in ";/[]\"{}()=+\\_-><@`,?!":
        removed = comma or f"{mark} " in before or f" {mark}" in before
        text = text.replace(mark, "" if removed else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBER_WORDS.get(word, word) for word in text.split() if word not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


NUMBER_WORDS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
                "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
CONTRACTIONS = {"oclock": "o'clock", "maam": "ma'am", "yall": "y'all", "twas": "'twas"}
for ending, stems in {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could i might not should they we what where who would you", "'re": "there they what why you", "'m": "i",
    "'s": "he how that there what when where who why someone somebody something",
    "'d": "he how it there they where who you someone something",
    "'ll": "how it they what who why you someone somebody something",
}.items():
    for stem in stems.split():
        CONTRACTIONS[stem + ending.replace("'", "")] = stem + ending


def bootstrap_interval(scores, picture, draws=1000):
    """95% bootstrap interval of a mean: scores (R,), the picture of each (R,) → (low, high). Pictures are drawn with
    replacement, all their records with them: what is said about one picture goes together."""
    _, picture = np.unique(picture, return_inverse=True)
    total, count = np.bincount(picture, scores), np.bincount(picture)
    rng, means = np.random.default_rng(0), []
    for _ in range(draws):
        drawn = rng.integers(len(count), size=len(count))
        means.append(total[drawn].sum() / count[drawn].sum())
    return tuple(np.percentile(means, (2.5, 97.5)))


def evaluate(model, dataset, folder, skips=(), max_batch_tokens=4096):
    """Measure a model with the pictures and blind, print a table with 95% intervals, leave the answers in `folder`. VQA's
    questions among `skips` count as wrong in column VQA, and stand in vqa.json without an answer: its scorer wants all."""
    if len(set(dataset.picture)) == 1:
        print("note: of one picture no other can be shown, so blind sees it as well", file=sys.stderr)
    scores, texts = predict_and_score(model, dataset, "answers", False, max_batch_tokens)
    blind, _ = predict_and_score(model, dataset, "answers, blind", True, max_batch_tokens)
    missed = [skip.key for skip in skips if skip.key != ""]
    print(f"{'':20}{model.settings.variant:>20}{'blind':>24}    in percent, with 95% intervals")
    for column in scores:
        line = f"{column:20}"
        for values, width in ((scores[column], 20), (blind[column], 24)):
            known = ~np.isnan(values)
            values, picture = values[known], dataset.picture[known]
            if column == "VQA":
                values = np.concatenate([values, np.zeros(len(missed))])
                picture = np.concatenate([picture, -1 - np.arange(len(missed))])  # each of a picture of its own
            low, high = bootstrap_interval(values, picture)
            line += f"{100 * values.mean():.1f} ({100 * low:.1f}–{100 * high:.1f})".rjust(width)
        print(line)
    set_aside(folder)
    Path(folder).mkdir(parents=True)
    write_answers(dataset.records, texts, missed, Path(folder))
    print(f"  {folder}/: {', '.join(sorted(os.listdir(folder)))}")


def set_aside(path):
    """Rename what stands at `path`, if anything, to the first free of path.1, path.2, … → its new path, or None."""
    path, n = Path(path), 1
    while path.with_name(f"{path.name}.{n}").exists():
        n += 1
    return path.rename(path.with_name(f"{path.name}.{n}")) if path.exists() else None


def write_answers(records, texts, missed, folder):
    """Write all answers; where records have ids, also as VQA's and COCO's scorers want them (`missed`: not asked)."""
    lines, vqa, captions = [], [], {}
    for record, text in zip(records, texts):
        lines.append(json_line({"image": str(record.image), "question": record.question, "answer": text,
                                "truth": record.answer, "category": record.category}) + "\n")
        if data.vqa_key(record) != "":
            vqa.append({"question_id": record.key, "answer": text})
        if record.key != "" and not record.turns:
            captions[record.image] = {"image_id": record.key, "caption": text}
    Path(folder, "answers.jsonl").write_text("".join(lines), "utf-8")
    if vqa:
        vqa += [{"question_id": key, "answer": ""} for key in missed]
        Path(folder, "vqa.json").write_text(json.dumps(vqa), "utf-8")
    if captions:
        Path(folder, "captions.json").write_text(json.dumps(list(captions.values())), "utf-8")


# ---- Models from the command line ----------------------------------------------------------------------------


def settings_from(given, out):
    """Settings from {field: value or None}: those of the preset, then what was given. What a preset has below "out/" is
    looked for below `out`. Models other than the preset's are a preset of their own, named after them, as is its folder."""
    given = {name: value for name, value in given.items() if value is not None}
    real = "llm" in given or "clip" in given or torch.cuda.is_available()
    standard = PRESETS[given.get("preset") or ("opt-1.3b" if real else "mini")]
    standard = replace(standard, llm=below(out, standard.llm), clip=below(out, standard.clip))
    settings = replace(standard, **given)
    if (settings.llm, settings.clip) != (standard.llm, standard.clip):
        clip = settings.clip.removeprefix("local-dir:").removeprefix("hf-hub:").replace(":", "-")
        settings.preset = f"{Path(settings.llm).name}+{Path(clip).name}"
    return settings


def below(out, name):
    """A name with the folder `out` in place of a preset's "out/"; other names stay as they are."""
    return name.replace("out/", f"{out}/", 1) if name.startswith(("out/", "local-dir:out/")) else name


def newest(args):
    """The checkpoint below --out that was written last, of --llm and --clip if both are given. UserError if there is none."""
    model, out = "*", args.out or "out"
    if args.llm and args.clip:
        model = glob.escape(settings_from({"llm": args.llm, "clip": args.clip}, out).preset)
    found = sorted(Path(out).glob(f"{model}/*/{CHECKPOINT}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no checkpoint below {out}/: make one with  python train.py --stage 1  and then  --stage 2")
    return found[-1]


def load_trained(args, path):
    """(model with its adapter, stage). The checkpoint tells layers and preset; models of no preset, the user names."""
    _, saved, _, _ = lmeye.read_adapter(path)
    known = saved.preset in PRESETS
    if not known and not (args.llm and args.clip):
        flags = shlex.join(["--llm", saved.llm, "--clip", saved.clip])
        raise UserError(f"{path}: belongs to models of your own: name them with  {flags}")
    given = {"preset": saved.preset if known else None, "llm": args.llm, "clip": args.clip, "precision": args.precision,
             "n_features": saved.n_features, "n_slots": saved.n_slots, "n_image_tokens": saved.n_image_tokens, "variant": saved.variant}
    above = Path(path).resolve().parents  # a checkpoint is OUT/MODEL/RUN/adapter…
    model = LMEye.from_settings(settings_from(given, args.out or (above[2] if len(above) > 2 else "out")))
    return model, model.load(path)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", metavar="IMAGE… [QUESTION]", help="pictures, then a question, if any")
    parser.add_argument("--questions", metavar="FILE", help="a text file, a question a line")
    parser.add_argument("--data", action="append", metavar="PATH", help="evaluate on these records: as train.py's --data")
    parser.add_argument("--images", action="append", metavar="PATH", help="their pictures: as train.py's --images")
    parser.add_argument("--checkpoint", metavar="FILE", help=f"an {CHECKPOINT} (default: the newest below --out)")
    parser.add_argument("--out", help="where train.py wrote (default: out, or where --checkpoint is)")
    parser.add_argument("--llm", help="as for train.py, where its models were your own")
    parser.add_argument("--clip", help="as for train.py, where its models were your own")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), help="as for train.py (default: auto)")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help=f"the longest answer (default: {MAX_TOKENS})")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the K likeliest tokens only (0: from all)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default: 0)")
    parser.add_argument("--max-batch-tokens", type=int, default=4096, help="bounds the memory, as for train.py (default: 4096)")
    args = parser.parse_args()
    for name, low, high in (("max_tokens", 1, 10 ** 6), ("max_batch_tokens", 1, 10 ** 9), ("top_k", 0, 10 ** 6),
                            ("temperature", 0, 100), ("seed", 0, 10 ** 9)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name.replace('_', '-')} has to be from {low} to {high}")
    if bool(args.inputs) == bool(args.data) or (args.images and not args.data):
        parser.error("either pictures are needed, or --data with records to evaluate on, and --images of these")
    if args.data and (args.temperature or args.top_k or args.max_tokens != MAX_TOKENS or args.questions):
        parser.error("an evaluation takes the likeliest answers to what --data asks: no --questions, no flags of drawing")
    if args.top_k and not args.temperature:
        parser.error("--top-k needs a --temperature above 0: at 0 the likeliest token is taken")
    return args


def main():
    args = parse_args()
    pictures, questions = args.inputs, []
    if len(pictures) > 1 and not (os.path.exists(pictures[-1]) or pictures[-1].lower().endswith(data.ENDINGS)):
        pictures, questions = pictures[:-1], [pictures[-1].strip()]
    if args.questions:
        questions += [line.strip() for line in data.read_text(args.questions).splitlines() if line.strip()]
    if not all(data.is_text(question) for question in questions) or (args.questions and not questions):
        raise UserError("the question is empty or unreadable")
    one = len(pictures) == 1 and not args.questions
    if one:
        picture = data.load_image(pictures[0])  # a wrong one is told before models are loaded
    checkpoint = Path(args.checkpoint or newest(args))
    if args.data:
        stage = lmeye.read_adapter(checkpoint)[0]
        records, skips = data.read_records(args.data, args.images, stage, answered=False)
    model, stage = load_trained(args, checkpoint)
    if args.data:
        dataset = data.encode(model, records, skips, checkpoint.resolve().parent.parent / "features")
        print(f"data: {len(dataset.records):,} records to evaluate")
        data.report_skips(skips)
        evaluate(model, dataset, checkpoint.parent / "evaluation", skips, args.max_batch_tokens)
        return
    if stage == 1 and questions:
        print("note: this checkpoint has seen stage 1 only, captions; for answers, train stage 2", file=sys.stderr)
        questions = []
    if stage == 2 and not questions and not one:
        raise UserError("several pictures: behind them a question is needed, or --questions FILE")
    note_unknown_words(model, " ".join(questions))
    options = dict(max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k,
                   generator=torch.Generator(model.device).manual_seed(args.seed))
    if not one:
        batch(model, pictures, questions, options, args.max_batch_tokens)
        return
    f = model.encode_image(model.preprocess(picture)[None])
    if questions or stage == 1:
        answer(model, f, questions[0] if questions else None, options)
    else:
        chat(model, f, options)


if __name__ == "__main__":
    lmeye.run_main(main)

"""Ask a trained LMEye about a picture.

    python sample.py picture.jpg "what shape is it?"         the answer, as it is written
    python sample.py picture.jpg                             a chat, which remembers: a question a line
    python sample.py --data questions.json --images photos   an evaluation: a table, and all answers in a file

The newest checkpoint below --out answers, or the one that --checkpoint names. One of stage 1 writes captions.
"""

import os
import signal
import sys

if __name__ == "__main__":  # importing torch takes seconds; until that is done, this is what Ctrl-C does
    def leave(*_):
        print("interrupted", file=sys.stderr)
        os._exit(130)

    usual_interrupt = signal.signal(signal.SIGINT, leave)

import argparse
import contextlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import lmeye
from lmeye import CHECKPOINT, PRESETS, LMEye, UserError

MAX_TOKENS = 64  # of an answer: always in an evaluation, elsewhere unless --max-tokens says otherwise


def main():
    args = parse_args()
    checkpoint = Path(args.checkpoint or newest(args.out))
    if args.data:
        evaluate_file(args, checkpoint)
        return
    picture = data.load_image(args.picture)  # before the models: a wrong name is told at once
    model, stage = load_trained(checkpoint, args.llm, args.clip, args.precision)
    f = model.encode_image(model.preprocess(picture)[None])  # (1, C): all that LMEye gets of the picture
    options = {"max_tokens": args.max_tokens, "temperature": args.temperature, "top_k": args.top_k,
               "generator": torch.Generator(model.device).manual_seed(args.seed)}
    if stage == 1:  # it was never asked anything
        note("this checkpoint has seen stage 1 only and writes a caption; for answers, train stage 2")
        write_answer(model, f, None, options)
    elif args.question:
        note_unknown_words(model, args.question)
        write_answer(model, f, args.question, options)
    else:
        chat(model, f, options)


def write_answer(model, f, question, options):
    """Print the answer to one question as it is written, and return it. No question: a caption."""
    ids, shown, text = [], "", ""
    for token in model.stream(f, [question] if question else None, **options):
        ids += token.tolist()
        text = lmeye.printable(model.decode(ids))
        # The last word is held back until the next one begins: the tokenizer may still join something to it.
        whole_words = text.rpartition(" ")[0]
        if whole_words.startswith(shown):
            print(whole_words[len(shown):], end="", flush=True)
            shown = whole_words
    print(text[len(shown):] if text.startswith(shown) else f"\n{text}")
    if ids[-1] != model.tokenizer.eos_token_id:
        note(f"the answer was cut off after {len(ids)} tokens")
    return text


def chat(model, f, options):
    """Answer questions about one picture, a line each. Earlier turns are context, and each turn asks anew.

    On a terminal an empty line ends the chat. In a pipe it is skipped, and the chat ends with its input.
    """
    if sys.stdin is None:
        raise UserError("no question was given, and there is no standard input to read one from")
    if hasattr(sys.stdin, "reconfigure"):  # a byte that is no UTF-8 makes its line unreadable, no other
        sys.stdin.reconfigure(errors="surrogateescape")
    on_terminal, turns = sys.stdin.isatty(), []
    while True:
        try:
            line = input("question (an empty line ends) > " if on_terminal else "")
        except EOFError:
            return
        question = line.strip()
        if not question and on_terminal:
            return
        if not data.is_text(question):
            note("an empty or unreadable line was skipped")
            continue
        note_unknown_words(model, question)
        if not fits(model, question):
            note("this question is longer than the language model's context: shorten it")
            continue
        # The whole talk is the prompt: the model reads it up to the new question, and only then asks CLIP.
        while not fits(model, data.dialogue([*turns, question])):
            note("the context is full: asked without the earliest turn")
            turns = turns[2:]
        answer = write_answer(model, f, data.dialogue([*turns, question]), options)
        turns += [question, answer]


def fits(model, question):
    """Whether a question, with room for a token of an answer, fits the language model's context."""
    question_ids, answer_ids = model.question_ids([question])[0], model.answer_ids([""])[0]
    return len(question_ids) + len(answer_ids) <= model.max_text_tokens


def note_unknown_words(model, text):
    """Tell which words the tokenizer has no token for. (Those of large models have one for any.)"""
    words = text.split()
    unknown = [word for word, ids in zip(words, model.ids_of(words)) if data.lost(model, ids, word)]
    if unknown:
        note(f"the language model does not know: {' '.join(unknown)}")


def note(text):
    print(f"note: {lmeye.printable(text)}", file=sys.stderr)


# ---- Evaluation: what does the model answer, and what of it does it owe to the picture? --------------------


def evaluate_file(args, checkpoint):
    """`--data`: evaluate a checkpoint on a data file. The results are left beside the checkpoint."""
    stage = lmeye.read_adapter(checkpoint)[0]
    pictures = data.open_pictures(args.data, args.images)
    noted = Counter()  # what is used, but not as it stands
    records, skipped = data.read_records(args.data, pictures, stage, False, noted)
    model, _ = load_trained(checkpoint, args.llm, args.clip, args.precision)
    features = checkpoint.resolve().parent.parent / "features"  # where train.py keeps them, too
    dataset = data.encode(model, records, skipped, pictures, features, noted)
    with contextlib.redirect_stdout(sys.stderr):  # the table's reader may stop after a line: files come first
        print(f"data: {len(dataset.records):,} records to evaluate")
        data.report(skipped, noted)
    name = f"evaluation-{Path(args.data).stem}"
    if checkpoint.name != CHECKPOINT:  # as best.safetensors
        name += f"-{checkpoint.stem}"
    evaluate(model, dataset, checkpoint.parent / name, args.max_batch_tokens)


def evaluate(model, dataset, folder, max_batch_tokens=4096):
    """Measure a model on a Dataset; write answers.jsonl and scores.json into `folder`, then print a table.

    Returns the scores, {row: {"n": records, "percent": …, "interval": [low, high] or None, "blind": …}}: see
    `summarize`. Blind is the same model, shown other records' pictures: what is still right was not seen.
    """
    model.eval()
    if len(set(data.first_copies(dataset))) == 1:
        note("of one picture no other can be shown, so blind sees it as well")
    lines = [answer_line(model, record) for record in dataset.records]
    clip, n_cut_off = predict(model, dataset, lines, False, max_batch_tokens)
    blind_clip, _ = predict(model, dataset, lines, True, max_batch_tokens)
    scores = summarize(dataset, lines, clip, blind_clip)

    # Both files are written before anything is printed: a broken pipe loses nothing.
    folder = Path(folder)
    set_aside(folder)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    lmeye.write_atomically(folder / "answers.jsonl", text.encode("utf-8", "backslashreplace"))
    lmeye.write_atomically(folder / "scores.json", json.dumps(scores, indent=1).encode())
    print(*table_lines(scores, model.settings.variant), sep="\n")
    n_empty = sum(not line["answer"] for line in lines)
    for n, what in ((n_empty, "are empty"),
                    (n_cut_off, f"were cut off, at {MAX_TOKENS} tokens or the end of the context")):
        if n:
            print(f"  {n:,} answers {what}")
    print(f"  {folder}/: answers.jsonl, scores.json")
    return scores


def answer_line(model, record):
    """A record as a line of answers.jsonl, in which `predict` fills in what the model says."""
    line = {"id": record.id, "image": record.image, "question": record.turns[-1] if record.turns else None,
            "turns": list(record.turns), "answer": None, "blind": None, "truth": record.answer or None,
            "category": record.category, "right": None, "blind_right": None}
    if record.choices:
        choice_ids = zip(record.choices, model.answer_ids(record.choices))
        line["choices"] = [{"text": text, "tokens": len(ids) - 1} for text, ids in choice_ids]  # without eos
    return line


def predict(model, dataset, lines, blind, max_batch_tokens):
    """Let a model speak about all records; if `blind`, about other pictures than theirs.

    Fills in their lines: the answer (with choices, the likeliest), whether it is right, log p of each choice.
    Returns the CLIPScores of captions, {row of the Dataset: score}, and how many texts were cut off.
    """
    clip, n_cut_off = {}, 0
    shown = data.shuffled(dataset) if blind else dataset
    name, prefix = ("blind", "blind_") if blind else ("answer", "")
    for rows in tqdm(batches_by_length(model, dataset, max_batch_tokens), desc=name, disable=None):
        records, f = [dataset.records[i] for i in rows], shown.f(rows)
        questions = [record.question for record in records] if records[0].turns else None
        if records[0].choices:  # given answers are not written but ranked
            log_p = model.score(f, questions, [list(record.choices) for record in records]).cpu()  # (B, K)
            if not log_p.isfinite().all():
                raise UserError("the language model's logits are not finite: use --precision fp32, or bf16")
            texts = [record.choices[best] for record, best in zip(records, log_p.argmax(1))]
            for i, values in zip(rows, log_p.tolist()):
                for choice, value in zip(lines[i]["choices"], values):
                    choice[prefix + "logp"] = value
        else:
            texts, ended = answer_all(model, f, questions)
            n_cut_off += ended.count(False)
        if questions is None:  # a caption is compared with the record's own picture, also when blind
            clip |= zip(rows, clip_scores(model, dataset.f(rows), texts))
        for i, text in zip(rows, texts):
            lines[i][name] = text
            lines[i][prefix + "right"] = is_right(model, dataset.records[i], text)
    return clip, n_cut_off


def answer_all(model, f, questions):
    """f (B, C) and B questions, or None → (B answers, whether each ended by itself)."""
    tokens = torch.stack(list(model.stream(f, questions, MAX_TOKENS)), 1).cpu()  # (B, T)
    # An answer for which the context has no more room is continued with eos: this one is not its own.
    room = model.room(model.tokenize(questions, [""] * len(f)))
    places = torch.arange(tokens.shape[1])
    ended = ((tokens == model.tokenizer.eos_token_id) & (places < room[:, None])).any(1)
    return [model.decode(ids) for ids in tokens.tolist()], ended.tolist()


def batches_by_length(model, dataset, max_batch_tokens):
    """The rows of all records in batches of one kind: captions, questions, or questions with K choices.

    A batch has at most max_batch_tokens, padding and answers included, unless one record has more. Of a kind
    the longest come first: memory that does not suffice is found out early.
    """
    kinds, lengths = [], []  # of each record, what it is and how long question and answer are
    for record, (question, _) in zip(dataset.records, dataset.tokens):
        K, answer = len(record.choices), MAX_TOKENS
        if K:
            answer = max(len(ids) for ids in model.answer_ids(record.choices))
        kinds.append((K, len(record.turns) > 0))
        lengths.append((len(question) if record.turns else 0, answer))
    lengths = np.array(lengths)
    batches = []
    for i in sorted(range(len(kinds)), key=lambda i: (kinds[i], lengths[i].sum()), reverse=True):
        rows = [*batches[-1], i] if batches else [i]
        texts = len(rows) * max(1, kinds[i][0])  # each is padded to the longest question and longest answer
        fits = texts * lengths[rows].max(0).sum() <= max_batch_tokens
        if batches and kinds[i] == kinds[rows[0]] and fits:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def is_right(model, record, text):
    """Whether a text is a record's answer, but for case and the space around it; None for captions and
    unknown answers.

    Some tokenizers don't give back what they were given. So the truth as it comes back is right, too, unless
    words of it were lost.
    """
    if not record.turns or not record.answer:
        return None
    truths, ids = [record.answer], model.answer_ids([record.answer])[0]
    if not record.choices and not data.lost(model, ids[:-1], record.answer):
        truths.append(model.decode(ids))  # other spaces, or accents composed otherwise
    return plain(text) in [plain(truth) for truth in truths]


def plain(text):
    """A text without differences of case, of space around it, and of how Unicode writes its letters."""
    return unicodedata.normalize("NFC", text).casefold().strip()


@torch.no_grad()
def clip_scores(model, f, captions):
    """2.5 · max(cos(picture, caption), 0) of each (Hessel et al., 2021; their "A photo depicts" is left out);
    0 for an empty caption."""
    v = model.clip.encode_text(model.clip_tokenizer(captions).to(model.device)).float()  # (B, C)
    scores = 2.5 * F.cosine_similarity(f.to(v), v).clamp(min=0)
    return [score if caption.strip() else 0.0 for score, caption in zip(scores.tolist(), captions)]


OWN_ROWS = ("all, per token", "CLIPScore")


def summarize(dataset, lines, clip, blind_clip):
    """{row: scores} of the table: the percentage of right answers, in each category and in all; the same if
    choices are ranked by log p a token. Captions have "score", their CLIPScore, in the place of "percent"."""
    scores = defaultdict(list)  # of each row: (picture, score, score when blind) of each record that counts
    for i, (line, picture) in enumerate(zip(lines, data.first_copies(dataset))):
        name = line["category"]  # "all" where the data file has none
        if name in OWN_ROWS or name.startswith('"'):  # it must not be mixed into a row of this program
            name = f'"{name}"'
        if line["right"] is not None:
            for row in {name, "all"}:
                scores[row].append((picture, line["right"], line["blind_right"]))
            if "choices" in line:
                right = []
                for key in ("logp", "blind_logp"):
                    best = max(line["choices"], key=lambda choice: choice[key] / choice["tokens"])
                    right.append(plain(best["text"]) == plain(line["truth"]))
                scores["all, per token"].append((picture, *right))
        elif i in clip:
            scores["CLIPScore"].append((picture, clip[i], blind_clip[i]))

    names = sorted(scores, key=lambda name: (name in ("all", *OWN_ROWS), name))  # categories come first
    return {name: table_row(scores[name], is_share=name != "CLIPScore") for name in names}


def table_row(scores, is_share=True):
    """(picture, score, score when blind) of R records → their means with intervals, of shares in percent."""
    unit, times = ("percent", 100) if is_share else ("score", 1)  # CLIPScore is no share of anything
    picture, seen, blind = [np.array(column) for column in zip(*scores)]
    row = {"n": len(picture)}
    for key, interval_key, values in ((unit, "interval", seen), ("blind", "blind_interval", blind)):
        ends = interval(values, picture, is_share)
        row[key] = times * values.mean()
        row[interval_key] = [times * end for end in ends] if ends else None
    return row


def interval(scores, picture, is_share):
    """95% interval of a mean: scores (R,), the picture of each (R,) → (low, high), or None if n is below 10.

    Records of one picture may be right or wrong together. So n is the number of pictures, or less where some
    have more records than others: Kish's effective number (1965). Shares get Wilson's score interval (1927),
    which has a width at 0% and 100%, too; other scores the normal one, with Student's factor for 10.
    """
    records = np.unique(picture, return_counts=True)[1]
    n = records.sum() ** 2 / (records ** 2).sum()
    mean, z = scores.mean(), 1.96
    if n < 10:
        return None
    if not is_share:
        half = 2.26 * scores.std(ddof=1) / n ** 0.5
        return mean - half, mean + half
    # Wilson: all shares from which the one that was found is at most z standard errors away.
    middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (mean * (1 - mean) / n + (z / (2 * n)) ** 2) ** 0.5 / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)  # at the ends but for rounding


def table_lines(rows, title):
    """{name: its `table_row`} → a table as lines of text."""
    lines = [f"{'':20}{title:>22}{'blind':>22}{'records':>9}   (95% intervals; – below 10 pictures)"]
    for name, row in rows.items():
        unit, digits, sign = ("percent", 1, "%") if "percent" in row else ("score", 3, "")
        cells = ""
        for value, ends in ((row[unit], row["interval"]), (row["blind"], row["blind_interval"])):
            between = "–".join(f"{end:.{digits}f}" for end in ends) if ends else "–"
            cells += f"{value:.{digits}f}{sign} ({between})".rjust(22)
        lines.append(f"{lmeye.printable(name):20}{cells}{row['n']:9,}")
    return lines


def set_aside(path):
    """Rename what stands at `path`, if anything, to the first free of path.1, path.2, … → its new path."""
    path, n = Path(path), 1
    if not path.exists():
        return None
    while path.with_name(f"{path.name}.{n}").exists():
        n += 1
    note(f"{path}, of an earlier run, is now {path.name}.{n}")
    return path.rename(path.with_name(f"{path.name}.{n}"))


# ---- Models: which checkpoint answers, and which frozen models belong to it --------------------------------


def settings_from(given, out):
    """Settings from {field: value or None}: those of a preset, and in their place what was given.

    What a preset has below "out/" is looked for below `out`. Other models than the preset's are named after
    themselves, LLM+CLIP, as is the folder of their runs.
    """
    given = {name: value for name, value in given.items() if value is not None}
    large = "llm" in given or "clip" in given or torch.cuda.is_available()
    standard = PRESETS[given.get("preset") or ("opt-1.3b" if large else "mini")]
    standard = replace(standard, llm=below(out, standard.llm), clip=below(out, standard.clip))
    settings = replace(standard, **given)  # other models take the rest, as dropout, from the preset
    if (settings.llm, settings.clip) != (standard.llm, standard.clip):
        clip = settings.clip.removeprefix("local-dir:").replace(":", "-")
        settings.preset = f"{Path(settings.llm).name}+{Path(clip).name}"
    return settings


def below(out, name):
    """A name with the folder `out` in place of a preset's "out/"; other names stay as they are."""
    return name.replace("out/", f"{out}/", 1) if name.startswith(("out/", "local-dir:out/")) else name


def newest(out):
    """The checkpoint below `out` that was written last. UserError if there is none.

    One of stage 1 is taken only where there is none of stage 2, and a run that was put aside, as stage2.1,
    never.
    """
    found = Path(out).glob(f"*/*/{CHECKPOINT}")
    found = [path for path in found if not re.search(r"\.\d+$", path.parent.name)]
    if not found:
        raise UserError(f"no checkpoint below {Path(out).resolve()}: name another folder by --out, or make "
                        "one: python train.py --stage 1, then --stage 2")
    answering = [path for path in found if path.parent.name != "stage1"]
    return max(answering or found, key=lambda path: path.stat().st_mtime)


def load_trained(checkpoint, llm=None, clip=None, precision=None):
    """A checkpoint, with the frozen models that it names or with others → (LMEye, stage).

    It is OUT/MODEL/RUN/adapter.safetensors. A preset's folders are looked for below OUT. Others that are not
    found from here are looked for beside OUT, where training may have been started.
    """
    stage, settings, _, _ = lmeye.read_adapter(checkpoint)
    print(f"answers: {checkpoint}", file=sys.stderr)
    out = Path(checkpoint).resolve().parent.parent.parent
    for field, elsewhere in (("llm", llm), ("clip", clip)):
        name = getattr(settings, field)
        kind, colon, folder = name.rpartition(":")  # local-dir:FOLDER, NAME:FILE, or the folder alone
        if elsewhere:
            name = elsewhere
        elif settings.preset in PRESETS:  # OUT may have been moved since
            name = below(out, getattr(PRESETS[settings.preset], field))
        elif not os.path.exists(folder) and (out.parent / folder).exists():
            name = f"{kind}{colon}{out.parent / folder}"
        setattr(settings, field, name)
    settings.precision = precision or settings.precision
    try:
        model = LMEye.from_settings(settings)
    except UserError as error:
        raise UserError(f"{error}; a preset's models are looked for below {out}, others here and in "
                        f"{out.parent}; elsewhere they are named by --llm and --clip") from error
    return model, model.load(checkpoint)


# ---- The command line --------------------------------------------------------------------------------------


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='sample.py PICTURE ["QUESTION"] [flags], or sample.py --data FILE [--images PATH] [flags]')
    flag = parser.add_argument
    flag("inputs", nargs="*", metavar="PICTURE QUESTION", help="a picture, and a question in quotes")
    flag("--checkpoint", metavar="FILE", help=f"an {CHECKPOINT} (default: the newest below --out)")
    flag("--out", default="out", help="where train.py wrote (default: out)")
    flag("--llm", help="where the language model is, if no longer where the checkpoint was trained with it")
    flag("--clip", help="the same of CLIP")
    flag("--precision", choices=("auto", "bf16", "fp16", "fp32"), help="default: the flag of training")
    flag("--max-tokens", type=int, default=MAX_TOKENS, help=f"of an answer (default: {MAX_TOKENS})")
    flag("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    flag("--top-k", type=int, default=0, help="with a temperature: draw from the K likeliest tokens only")
    flag("--seed", type=int, default=0, help="with a temperature: of the drawing (default: 0)")
    flag("--data", metavar="PATH", help="records to evaluate, as for train.py; questions may lack an answer")
    flag("--images", metavar="PATH", help="with --data: a folder or zip (default: beside the file)")
    flag("--max-batch-tokens", type=int, default=4096, help="with --data: bounds the memory (default: 4096)")
    args = parser.parse_intermixed_args()  # flags may stand between picture and question

    for name in ("checkpoint", "out", "llm", "clip", "data", "images"):
        if getattr(args, name) == "":
            parser.error(f"--{name} has to name something")
    args.out = os.path.expanduser(args.out)
    if bool(args.inputs) == bool(args.data):
        parser.error("either a picture is needed, or --data")
    for name, low, high in (("max_tokens", 1, 10 ** 6), ("temperature", 0, 100), ("top_k", 0, 10 ** 6),
                            ("seed", 0, 10 ** 9), ("max_batch_tokens", 1, 10 ** 9)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name.replace('_', '-')} has to be from {low} to {high}")
    idle = ["images", "max_batch_tokens"]  # flags that do nothing here
    if args.data:
        idle = ["max_tokens", "temperature", "top_k", "seed"]  # an evaluation takes the likeliest answers
    elif not args.temperature:
        idle += ["top_k", "seed"]
    for name in idle:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} would do nothing here: --help says what it is for")
    if len(args.inputs) > 2:
        raise UserError('too many words: quote the question, as in  python sample.py cat.jpg "what is it?"')
    args.picture, args.question = (args.inputs + [None, None])[:2]
    if args.question is None:
        return args
    args.question = args.question.strip()  # as in data files
    if os.path.isfile(args.question):
        raise UserError(f"{args.question} is a file, not a question: ask about one picture at a time")
    if not data.is_text(args.question):
        raise UserError("the question is empty or unreadable")
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGINT, usual_interrupt)
    lmeye.run_main(main)

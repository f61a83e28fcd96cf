"""A published chat model, in small: a folder as SmolLM2-135M-Instruct's trains both phases like any other.

What sets it apart from OPT: its tokenizer writes no bos, its end of text is its padding as well, its
vocabulary has the tokens of a chat, its head is its table of embeddings, several heads of its attention share
keys and values, and it keeps its weights in bf16.
"""

import pytest
import tokenizers
import torch
import transformers
from conftest import run, tiny_model
from test_two_passes import plain_loss

import lmeye
from lmeye import LMEye, Settings, load_llm

ENDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def llm(home):
    """The model's folder, beside the pictures, captions and chats of `home`."""
    texts = [(home / name).read_text() for name in ("captions.jsonl", "chats.jsonl")]
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    words.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=ENDS, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=ENDS[1], eos_token=ENDS[2], pad_token=ENDS[2], unk_token=ENDS[0],
    ).save_pretrained(home / "chat")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=words.get_vocab_size(), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.2,
    )).to(torch.bfloat16).save_pretrained(home / "chat")
    return str(home / "chat")


def test_both_phases_train_on_it_and_it_answers(home, llm):
    models = ["--llm", "chat", "--clip", "local-dir:clip", "--out", "chats"]
    for stage, data in ((1, "captions.jsonl"), (2, "chats.jsonl")):
        result = run("train.py", "--stage", stage, "--data", data, *models, "--steps", 30, "--batch-size", 8,
                     "--lr", 1e-2, cwd=home)
        assert result.returncode == 0 and result.stderr == "", result.stderr
        n = stage  # captions, or questions, of a picture: of 20 pictures a tenth is held out
        assert f"data: {18 * n} records to train on, {2 * n} to validate on" in result.stdout
        rows = (home / "chats" / "chat+clip" / f"stage{stage}" / "log.csv").read_text().splitlines()[1:]
        assert float(rows[-1].split(",")[1]) < float(rows[0].split(",")[1])
    result = run("sample.py", "0.png", "what color is it?", "--max-tokens", 5, "--out", "chats", cwd=home)
    assert result.returncode == 0 and result.stdout.strip() and not any(end in result.stdout for end in ENDS)


def test_its_prompt_has_no_bos_its_answers_end_and_its_numbers_are_those_of_two_whole_passes(llm):
    base = tiny_model()
    llm, tokenizer = load_llm(llm, torch.device("cpu"), torch.float32)
    assert tokenizer("").input_ids == [] and tokenizer.eos_token_id == tokenizer.pad_token_id
    clip = base.clip, base.preprocess, base.clip_tokenizer
    model = LMEye(Settings(llm="a/b", dropout=0.0), llm, tokenizer, *clip)
    assert tokenizer.decode(model.image_words) == "Image:"
    questions, answers = ["what color is it?", "are they red or <|im_end|>?"], ["red", "no, blue circles"]
    tokens = model.tokenize(questions, answers)
    assert (tokens.question == 2).sum() == 0  # the end of a chat's turn that somebody typed is text
    lengths = [len(ids) for ids in model.answer_ids(answers)]
    assert tokens.answer_mask.sum(1).tolist() == lengths  # padding, the same token, is not learned,
    for row, length in zip(tokens.answer.tolist(), lengths):
        assert row[length - 1] == 2  # and the end is
    lmeye.check_llm(model)
    model.set_trained(2)
    f, questions = torch.randn(2, 24), ["what color is it?", "are they red or not?"]
    loss, plain = model.loss(f, questions, answers), plain_loss(model, f, questions, answers)
    assert abs(loss - plain) < 1e-5 * plain

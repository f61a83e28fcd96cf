"""Rows of runs over sets and seeds: which commands they are made by. And the exercises' own models."""

import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import ablation
import conftest
import pytest
import rivals
import torch
from conftest import fails_in_one_line, run, tiny_model

import lmeye
import sample
import train
from lmeye import LMEye

QUESTIONS, ANSWERS = ["what color is it?", "is the background red?"], ["red", "yes it is"]


# ---- The loop over sets, rows and seeds


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands that are run; each leaves what a later one looks for. Their flag --out says where."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def table(command):
        asked.append(command[2:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(ablation.subprocess, "run", table)

    def call(folder, program, *flags):
        flags = [str(flag) for flag in flags]
        asked.append(shlex.join([program, *flags]))
        if program == "train.py":
            variant = flags[flags.index("--variant") + 1] if "--variant" in flags else "lmeye"
            run = train.run_name(int(flags[flags.index("--stage") + 1]), variant, "--train-align" in flags)
            made = Path(folder, "mini", run, "evaluation")
        elif program == "sample.py":
            made = Path(flags[flags.index("--checkpoint") + 1]).parent / "evaluation-absent"
        else:
            made = Path(folder, "mini", "llm")
        made.mkdir(parents=True)
        Path(made, "scores.json").write_text("{}")

    monkeypatch.setattr(ablation, "call", call)
    return asked


def ablate(*flags):
    result = run("ablation.py", "--jobs", 1, "--out", "abl", *flags, cwd=Path.cwd())
    assert result.returncode == 0, result.stderr


def test_a_set_is_a_miniature_with_its_phase_1_and_a_row_starts_from_it(commands):
    ablate("--sets", 2, "--miniature", "--hint-share 0", "align=--train-align --lr 0.005")
    for i in range(2):
        out = f"abl/s{i}"
        mini = f"{out}/align/seed0/mini"
        assert commands[2 * i:2 * i + 2] == [
            f"tests/lab/miniature.py --out {out} --seed {i} --hint-share 0",
            f"train.py --preset mini --seed {i} --out {out} --resume --stage 1"]
        assert commands[2 * i + 4:2 * i + 6] == [
            f"train.py --preset mini --seed 0 --out {out}/align/seed0 --resume --stage 2 "
            f"--init {out}/mini/stage1/adapter.safetensors --train-align --lr 0.005",
            f"sample.py --checkpoint {mini}/stage2-align/adapter.safetensors "
            f"--data {out}/mini/absent.json --images {out}/mini/pictures.zip"]
        assert Path(mini, "llm", "scores.json").samefile(f"{out}/mini/llm/scores.json")
        assert not Path(mini, "stage1").exists()


def test_each_seed_has_a_run_of_its_own_and_the_tables_find_all(commands):
    ablate("--seeds", 2, "lmeye=", "no=--variant norequest")
    assert [shlex.split(command)[4] for command in commands[2:-2:2]] == ["0", "1"] * 2
    for patterns, evaluation in zip(commands[-2:], ("evaluation", "evaluation-absent")):
        assert patterns == [f"lmeye=abl/s*/lmeye/seed*/mini/stage2/{evaluation}",
                            f"no=abl/s*/no/seed*/mini/stage2-norequest/{evaluation}"]
        for pattern in patterns:
            assert len(list(Path.cwd().glob(pattern.partition("=")[2]))) == 2


def test_several_picture_tokens_take_a_phase_1_of_their_own(commands):
    ablate("two=--variant static --n-image-tokens 2 --lr 0.02")
    phase_1, phase_2 = commands[2:4]
    assert phase_1 == ("train.py --preset mini --seed 0 --out abl/s0/two/seed0 --resume "
                       "--stage 1 --n-image-tokens 2")
    assert "--init abl/s0/two/seed0/mini/stage1/adapter.safetensors --variant static" in phase_2


def test_what_is_complete_is_not_made_again_and_what_is_not_goes_on(commands):
    ablate("lmeye=")
    shutil.rmtree("abl/s0/lmeye/seed0/mini/stage2/evaluation")
    before = len(commands)
    ablate("lmeye=", "static=--variant=static")
    again, new, absent = commands[before:-2]
    assert "--out abl/s0/lmeye/seed0 --resume --stage 2" in again
    assert "--out abl/s0/static/seed0 --resume --stage 2" in new
    assert absent.startswith("sample.py --checkpoint abl/s0/static")


def test_a_row_of_other_flags_is_refused_and_the_old_one_kept(commands):
    ablate("lmeye=--lr 0.005")
    result = run("ablation.py", "--out", "abl", "lmeye=--lr 0.01", cwd=Path.cwd())
    assert fails_in_one_line(result) and "'--lr 0.005', not with '--lr 0.01'" in result.stderr


@pytest.mark.parametrize("flags", (["lmeye"], ["=--lr 1"], ["mini="], ["a/b="], ["--sets", 0, "a="]))
def test_a_row_without_a_usable_name_and_no_sets_are_refused(flags, commands):
    assert run("ablation.py", *flags, cwd=Path.cwd()).returncode == 2 and not commands


def test_a_program_that_fails_is_told_with_its_log(tmp_path):
    result = run("ablation.py", "--out", tmp_path, "--miniature=--nonsense", "lmeye=", cwd=tmp_path)
    assert fails_in_one_line(result) and "miniature.py ended with status 2" in result.stderr
    assert "--nonsense" in Path(tmp_path, "s0", "log.txt").read_text()


# ---- The exercises


def built(kind, base):
    """A model of a class of rivals.py's, from the parts of a tiny one."""
    torch.manual_seed(1)
    return kind(base.settings, base.llm, base.tokenizer, base.clip, base.preprocess, base.clip_tokenizer)


@pytest.mark.parametrize("kind", rivals.RIVALS.values())
def test_each_trains_what_it_uses_and_says_the_same_with_and_without_gradients(kind, monkeypatch):
    monkeypatch.setitem(conftest.CLIP_CONFIG, "embed_dim", 36)  # as wide as CLIP's text transformer
    model, f = built(kind, tiny_model()), torch.randn(2, 36)
    parameters = model.set_trained(2)
    loss = model.loss(f, QUESTIONS, ANSWERS)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
    with torch.no_grad():
        assert model.loss(f, QUESTIONS, ANSWERS).item() == pytest.approx(loss.item(), rel=1e-5)
    assert len(model.generate(f, QUESTIONS, max_tokens=3)) == 2
    assert model.loss(f, None, ANSWERS).isfinite()  # captions, of phase 1


def read_whole(model, f, slot):
    """The parts of the prompt up to <img-d>, for the first question, in one pass without a cache."""
    words = torch.tensor(model.ids_of(["\nQuestion: " + QUESTIONS[0]]))
    return torch.cat([model.embed(model.image_words)[None], model.see(f), model.embed(words), slot], 1)


def test_the_second_round_asks_from_what_came_back():
    """Against two rounds in whole passes, without a cache, for one record."""
    base = tiny_model()
    model, f = built(rivals.TwoRounds, base), torch.randn(1, 24)
    slot = model.img_d[None, None]
    for _ in range(2):
        h = model.llm.base_model(inputs_embeds=read_whole(model, f, slot)).last_hidden_state[:, -1]
        slot = model.tell(model.interact(f, model.ask(h)))
    x = torch.cat([read_whole(model, f, slot), model.embed(model.answer_words)[None]], 1)
    expected = model.llm(inputs_embeds=x).logits[0, -1].log_softmax(-1)[model.ids_of([" red"])[0]]
    assert model.score(f, QUESTIONS[:1], [["red"]]).item() == pytest.approx(expected.item(), abs=1e-4)
    once = built(LMEye, base)
    assert once.score(f, QUESTIONS[:1], [["red"]]).item() != pytest.approx(expected.item(), abs=1e-4)


def test_the_earlier_request_is_read_after_the_first_layer():
    model, f = built(rivals.EarlierRequest, tiny_model()), torch.randn(1, 24)
    asked = []
    model.request.register_forward_pre_hook(lambda layer, inputs: asked.append(inputs[0]))
    with torch.no_grad():
        model.generate(f, QUESTIONS[:1], max_tokens=2)
        x = read_whole(model, f, model.img_d[None, None])
        states = model.llm(inputs_embeds=x, output_hidden_states=True).hidden_states
    torch.testing.assert_close(asked[0], states[1][:, -1], rtol=1e-4, atol=1e-4)


def test_v_is_a_sum_of_words_and_img_is_without_a_picture(monkeypatch):
    monkeypatch.setitem(conftest.CLIP_CONFIG, "embed_dim", 36)
    words = torch.randn(2, 8, 36)
    assert torch.allclose(built(rivals.NoTextTransformer, tiny_model()).encode_words(words), words.sum(1))
    model = built(rivals.NoPictureToken, tiny_model())
    assert torch.equal(model.see(torch.randn(2, 36)), model.img.expand(2, 1, -1))


def test_the_rival_that_is_named_is_trained_and_asked(home, tmp_path, monkeypatch):
    for program in (train, sample):  # `main` puts the rival there: this puts LMEye back
        monkeypatch.setattr(program, "LMEye", LMEye)
    settings = lmeye.Settings("tiny", str(home / "llm"), str(home / "clip"))
    LMEye.from_settings(settings).save(tmp_path / "phase-1", 1)
    curved = ("rivals.py", "--rival", "CurvedDecomposition", "--out", tmp_path)
    result = run(*curved, "--stage", 2, "--llm", "llm", "--clip", "local-dir:clip", "--data", "chats.jsonl",
                 "--steps", 1, "--init", tmp_path / "phase-1", cwd=home)
    assert result.returncode == 0, result.stderr
    checkpoint, = tmp_path.glob(f"*/stage2/{lmeye.CHECKPOINT}")
    assert "decompose.2.weight" in lmeye.read_adapter(checkpoint)[3]
    result = run(*curved, "0.png", QUESTIONS[0], cwd=home)
    assert result.stdout.strip(), result.stderr

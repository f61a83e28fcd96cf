"""The cache of the first pass serves the second, and nothing changes by it.

The reference below is written anew from the paper: two whole passes over embeddings, one record at a time, no cache,
no mask, no padding, nothing but `inputs_embeds`.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, tiny_model

import lmeye
from lmeye import UserError, choose_token

QUESTIONS = ["what color is it?", "is the background red?", "how many things are there?"]
ANSWERS = ["red", "yes it is on a red background", "two small"]


def plain_prompt(model, f, question):
    """Embeddings (1, T, D) of everything up to the answer, for one record, by the two passes of the paper."""
    words, tokenizer, settings = model.llm.get_input_embeddings(), model.tokenizer, model.settings

    def embed(text):
        return words(torch.tensor([tokenizer(text, add_special_tokens=False).input_ids]))

    bos = words(torch.tensor([tokenizer("").input_ids], dtype=torch.long))  # of some models, none
    img = (f @ model.align.weight.T + model.align.bias).reshape(1, settings.n_image_tokens, -1) + model.img
    if question is None:
        return torch.cat([bos, embed("Image:"), img], 1)
    prefix = torch.cat([bos, embed("Image:"), img, embed("\nQuestion: " + question)], 1)
    if settings.variant == "static":
        return torch.cat([prefix, embed("\nAnswer:")], 1)
    slots = model.img_d.expand(1, settings.n_slots, -1)
    h = model.llm.base_model(inputs_embeds=torch.cat([prefix, slots], 1)).last_hidden_state[:, -1]
    request = h @ model.request.weight.T + model.request.bias
    if settings.variant == "norequest":
        request = torch.zeros_like(request)

    # CLIP's text transformer at its full length: what stands behind EOS cannot reach it.
    clip, N = model.clip, settings.n_features
    sos, eos = clip.token_embedding(torch.tensor([[model.sos_eos[0]]])), clip.token_embedding(model.sos_eos[1:][None])
    fine = (f @ model.decompose.weight.T + model.decompose.bias).reshape(1, N, -1)
    x = torch.cat([sos, fine, request[:, None], eos], 1)
    x = F.pad(x, (0, 0, 0, clip.context_length - N - 3)) + clip.positional_embedding
    x = clip.transformer(x, attn_mask=clip.attn_mask)
    v = clip.ln_final(x[:, N + 2]) @ clip.text_projection
    told = (v @ model.transmit.weight.T + model.transmit.bias).reshape(1, settings.n_slots, -1) + model.img_d
    return torch.cat([prefix, told, embed("\nAnswer:")], 1)


def plain_logits(model, f, question, ids):
    """Logits (len(ids) + 1, V) before each of the tokens `ids` of an answer and behind the last."""
    x = plain_prompt(model, f, question)
    answer = model.llm.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
    return model.llm(inputs_embeds=torch.cat([x, answer], 1)).logits[0, x.shape[1] - 1:]


def answer_ids(model, answer):
    return model.tokenizer(" " + answer, add_special_tokens=False).input_ids + [model.tokenizer.eos_token_id]


def plain_loss(model, f, questions, answers):
    total, count = 0, 0
    for i, (question, answer) in enumerate(zip(questions, answers)):
        ids = answer_ids(model, answer)
        total = total + F.cross_entropy(plain_logits(model, f[i:i + 1], question, ids[:-1]), torch.tensor(ids),
                                        reduction="sum")
        count += len(ids)
    return total / count


def plain_answers(model, f, questions, longest):
    """Greedy answers of at most `longest` tokens, each token by a whole pass."""
    answers = []
    for i, question in enumerate(questions):
        ids = []
        while len(ids) < longest and model.tokenizer.eos_token_id not in ids:
            ids.append(plain_logits(model, f[i:i + 1], question, ids)[-1].argmax().item())
        answers.append(model.decode(ids))
    return answers


def features(model, n=3):
    return torch.randn(n, model.clip.visual.output_dim, generator=torch.Generator().manual_seed(1))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        largest = theirs[name].abs().max()
        assert largest > 0, name
        assert torch.allclose(gradient, theirs[name], rtol=1e-3, atol=1e-4 * largest), name


def assert_equals_two_whole_passes(model, questions):
    """Loss, gradients and greedy answers of three records, for both stages."""
    f = features(model)
    for stage, asked in ((1, None), (2, questions)):
        trained = model.set_trained(stage, train_align=True)
        loss = model.loss(f, asked, ANSWERS)
        plain = plain_loss(model, f, asked or [None] * 3, ANSWERS)
        assert abs(loss - plain) < 1e-5 * plain
        mine = gradients(model, loss)
        assert mine.keys() == trained.keys()
        assert_same_gradients(mine, gradients(model, plain))
    with torch.no_grad():
        expected = plain_answers(model, f, questions, 6)
    assert model.generate(f, questions, max_tokens=6) == expected


@pytest.mark.parametrize("n_slots, n_image_tokens", ((1, 1), (3, 2)))
@pytest.mark.parametrize("variant", ("lmeye", "norequest", "static"))
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_gradients_and_answers_equal_those_of_two_whole_passes(family, variant, n_slots, n_image_tokens):
    model = tiny_model(family, variant=variant, n_slots=n_slots, n_image_tokens=n_image_tokens)
    assert_equals_two_whole_passes(model, QUESTIONS)
    # With `align` frozen, nothing below <img-d> is kept for the backward pass. The paths through <img-d> are.
    model.set_trained(2)
    f = features(model)
    mine = gradients(model, model.loss(f, QUESTIONS, ANSWERS))
    assert_same_gradients(mine, gradients(model, plain_loss(model, f, QUESTIONS, ANSWERS)))


@pytest.mark.parametrize("variant", ("lmeye", "norequest"))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_method_of_the_program_is_that_of_the_paper(family, variant):
    """`lmeye.plain_loss` is what a reader meets first, and what a model is compared with when it is loaded."""
    model = tiny_model(family, variant=variant, n_slots=3, n_image_tokens=2)
    model.set_trained(2, train_align=True)
    f = features(model)[:1]
    loss, _, _ = lmeye.plain_loss(model, f, QUESTIONS[1], ANSWERS[1])
    expected = plain_loss(model, f, QUESTIONS[1:2], ANSWERS[1:2])
    assert abs(loss - expected) < 1e-6 * expected
    assert_same_gradients(gradients(model, loss), gradients(model, expected))


@pytest.mark.parametrize("n_tokens", (1, 500))  # by which a step divides its loss; with 1 the factor is the largest
def test_the_gradient_of_a_scaled_loss_is_exact_where_half_precision_ends(n_tokens):
    """A scaler multiplies the loss by 65,536, which fp16 can't hold: the factor must meet the gradient in fp32."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 30, bias=False).half().requires_grad_(False)
    h = torch.randn(5, 8).half().requires_grad_()
    targets = torch.randint(30, (5,))
    (65_536 * lmeye.chunked_cross_entropy(h, targets, head).sum() / n_tokens).backward()
    exact = h.detach().float().requires_grad_()
    F.cross_entropy(exact @ head.weight.float().T, targets, reduction="sum").backward()
    assert torch.allclose(h.grad.float() * n_tokens / 65_536, exact.grad, rtol=5e-3, atol=1e-3)


def test_scores_equal_those_of_whole_passes():
    model = tiny_model()
    f = features(model)
    choices = [["red", "yes", "on a red background"]] * 2 + [["two small", "no", "one"]]
    scores = model.score(f, QUESTIONS, choices)
    for i, question in enumerate(QUESTIONS):
        for k, choice in enumerate(choices[i]):
            ids = answer_ids(model, choice)[:-1]  # without eos
            log_p = plain_logits(model, f[i:i + 1], question, ids)[:-1].log_softmax(-1)
            expected = log_p[range(len(ids)), ids].sum()
            torch.testing.assert_close(scores[i, k], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("questions, choices, told", [
    (QUESTIONS, [["red", "blue"], ["red", "blue", "green"], ["red"]], "a list of K choices"),  # two in the mean
    (QUESTIONS, ["yes", "no!", "one"], "a list of K choices"),  # else a string would be a list of letters
    ("how", [["red", "blue"]] * 3, "a list of K choices"),
    ([], [], "a list of K choices"),
    (QUESTIONS, [[], [], []], "a list of K choices"),
    (QUESTIONS, [["red", "blue"], ["red", ""], ["one", "two"]], "a choice is empty"),  # it would be the likeliest
])
def test_choices_that_cannot_be_ranked_are_refused(questions, choices, told):
    model = tiny_model()
    with pytest.raises(UserError, match=told):
        model.score(features(model), questions, choices)


def test_an_answer_of_no_tokens_is_refused():
    model = tiny_model()
    with pytest.raises(UserError, match="at least 1"):
        model.generate(features(model), QUESTIONS, max_tokens=0)


@pytest.mark.parametrize("questions", ("how", "what is it?", ["what?"], QUESTIONS + ["what?"]))
def test_a_question_for_each_picture_is_needed(questions):
    model = tiny_model()
    for ask in (model.generate, lambda f, texts: model.loss(f, texts, ANSWERS)):
        with pytest.raises(UserError, match="a list with one question for each"):
            ask(features(model), questions)


@pytest.mark.parametrize("name, wrong", [("variant", "Lmeye"), ("dropout", 1.0), ("n_features", 14), ("n_slots", 0)])
def test_settings_out_of_range_are_named(name, wrong):
    with pytest.raises(UserError, match="--" + name.replace("_", "-")):
        tiny_model(**{name: wrong})


def test_a_precision_of_no_known_name_is_refused():
    with pytest.raises(UserError, match="float16: it has to be"):
        lmeye.device_and_dtype("float16")


def test_a_model_is_checked_also_where_gradients_are_off():
    with torch.no_grad():
        lmeye.check_llm(tiny_model())


def test_a_choice_that_does_not_fit_behind_its_question_is_refused():
    model = tiny_model()  # its context has 64 tokens
    f, question, choice = features(model, 1), "two " * 30, "small " * 30
    long_question = model.score(f, [question], [["small", "red"]])
    long_choice = model.score(f, ["two"], [[choice, "red"]])
    both = model.score(f.expand(2, -1), [question, "two"], [["small", "red"], [choice, "red"]])
    assert torch.allclose(both, torch.cat([long_question, long_choice]), atol=1e-4)
    with pytest.raises(UserError, match="context"):
        model.score(f, [question], [[choice, "red"]])


def test_the_answer_cannot_alter_the_request_but_question_and_picture_do():
    model, requests = tiny_model(), []
    model.request.register_forward_hook(lambda layer, inputs, output: requests.append(output.detach()))
    one, another = features(model).split(1)[:2]
    color, size = ["what color is it?"], ["how big is it?"]
    model.loss(one, color, ["red"])
    model.loss(one, color, ["blue"])
    model.loss(one, size, ["red"])
    model.loss(another, color, ["red"])
    first, other_answer, other_question, other_picture = requests
    assert torch.equal(first, other_answer)
    assert not torch.allclose(first, other_question, atol=1e-2)
    assert not torch.allclose(first, other_picture, atol=1e-3)


def test_an_answer_is_not_cut_short_by_a_longer_question_in_its_batch():
    model = tiny_model()
    real, eos = model.logits, model.tokenizer.eos_token_id

    def never_ending(h):
        logits = real(h).clone()
        logits[..., eos] = -torch.inf
        return logits

    model.logits = never_ending
    f, questions = features(model, 2), ["red", "two " * 30]
    both = torch.stack(list(model.stream(f, questions, max_tokens=100)), 1)
    for i in (0, 1):
        alone = torch.cat(list(model.stream(f[i:i + 1], questions[i:i + 1], max_tokens=100)))
        assert len(alone) == 64 - plain_prompt(model, f[i:i + 1], questions[i]).shape[1]
        assert both[i].tolist() == alone.tolist() + [eos] * (both.shape[1] - len(alone))


def test_answers_of_numbers_that_overflow_are_told_and_not_left_empty():
    for bad in (float("nan"), float("inf")):
        model = tiny_model()
        model.transmit.weight.data[0, 0] = bad
        for temperature in (0.0, 1.0):
            with pytest.raises(UserError, match="not finite: use --precision fp32"):
                model.generate(features(model), QUESTIONS, temperature=temperature)


def test_ids_that_the_tokenizer_cannot_spell_are_never_chosen():
    """The head of many models has more rows than their tokenizer has tokens."""
    model = tiny_model()
    real = model.logits
    model.logits = lambda h: F.pad(real(h), (0, 40), value=100.0)
    f = features(model)
    assert model.generate(f, QUESTIONS, max_tokens=6) == tiny_model().generate(f, QUESTIONS, max_tokens=6)


@pytest.mark.parametrize("options, shares", [
    ((1.0, 0), (.1, .4, .2, .3)), ((0.5, 0), (1/30, 16/30, 4/30, 9/30)), ((1.0, 2), (0, 4/7, 0, 3/7)),
    ((0.5, 3), (0, 16/29, 4/29, 9/29)), ((1.0, 9), (.1, .4, .2, .3)), ((0.0, 0), (0, 1, 0, 0))])
def test_tokens_are_drawn_as_often_as_temperature_and_top_k_say(options, shares):
    logits = torch.tensor([.1, .4, .2, .3]).log().expand(20_000, -1)
    drawn = choose_token(logits, *options, torch.Generator().manual_seed(0)).bincount(minlength=4) / 20_000
    assert torch.allclose(drawn, torch.tensor(shares, dtype=torch.float32), atol=0.015)
    assert (drawn > 0).tolist() == [share > 0 for share in shares]


@pytest.mark.parametrize("n_slots", (1, 3))
def test_what_question_and_answer_leave_of_the_context_is_the_rest_of_the_prompt(n_slots):
    model = tiny_model(n_slots=n_slots)
    prompt = plain_prompt(model, features(model)[:1], "two red").shape[1]
    assert prompt - len(model.ids_of(["\nQuestion: two red"])[0]) == 64 - model.max_text_tokens

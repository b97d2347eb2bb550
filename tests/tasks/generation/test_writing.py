"""Written answers: a batch gives what each prompt gives alone, and each answer ends where it should."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from tests.on_device import IN_INFERENCE_MODE
from transformers import MambaConfig, MambaForCausalLM

from evatune.tasks.generation.example import Example
from evatune.tasks.generation.writing import Sampling, write_answers

pytestmark = pytest.mark.on_hardware(IN_INFERENCE_MODE)

PROMPTS = ("Is red true?", "one two three green blue red: ", "?", "Is blue false? two two two")


def asked(*prompts: str, stops=()) -> list[Example]:
    return [Example(pieces=((prompt, False), ("x", True)), stops=stops) for prompt in prompts]


def answers(model, tokenizer, examples, **options) -> dict[int, list[str]]:
    sampling = Sampling(**({"max_new_tokens": 12} | options.pop("sampling", {})))
    batches = write_answers(model, examples, tokenizer, sampling=sampling, **options)
    return dict(pair for batch in batches for pair in batch)


def test_a_batch_writes_what_each_prompt_gives_alone(model, tokenizer):
    together = answers(model, tokenizer, asked(*PROMPTS))
    alone = [answers(model, tokenizer, asked(prompt))[0] for prompt in PROMPTS]
    assert [together[index] for index in range(len(PROMPTS))] == alone
    assert len({text for (text,) in alone}) > 1
    with torch.no_grad():
        ids = tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    expected = tokenizer.decode(ids[0, len(tokenizer(PROMPTS[1])["input_ids"]) :], skip_special_tokens=True)
    assert together[1] == [expected]


def test_small_batches_give_the_same(model, tokenizer):
    assert answers(model, tokenizer, asked(*PROMPTS), batch_tokens=1) == answers(model, tokenizer, asked(*PROMPTS))


def test_an_answer_ends_before_its_string(model, tokenizer):
    (whole,) = answers(model, tokenizer, asked(PROMPTS[0]))[0]
    stop = whole[3:5]
    assert answers(model, tokenizer, asked(PROMPTS[0], stops=(stop,)))[0] == [whole[: whole.index(stop)]]


def test_other_prompts_take_the_place_of_answers_that_have_ended(model, tokenizer):
    """The batch stays full, and every answer is what it is alone."""
    long = {"max_new_tokens": 30}
    prompts = [f"{prompt}{'one ' * n}" for n in range(5) for prompt in PROMPTS]
    whole = answers(model, tokenizer, asked(*prompts), sampling=long)
    stops = [(text[n % 9 : n % 9 + 2],) if n % 3 else () for n, (text,) in sorted(whole.items())]
    examples = [asked(prompt, stops=stop)[0] for prompt, stop in zip(prompts, stops, strict=True)]
    alone = {n: answers(model, tokenizer, [example], sampling=long)[0] for n, example in enumerate(examples)}
    assert len({len(text) for (text,) in alone.values()}) > 4  # so they end at different times
    rows = []
    counting = model.register_forward_pre_hook(
        lambda module, args, options: rows.append(len(options["input_ids"])), with_kwargs=True
    )
    together = answers(model, tokenizer, examples, sampling=long, batch_tokens=300)
    counting.remove()
    assert together == alone
    assert len(rows) < 0.8 * 30 * len(prompts) / rows[0]  # batches one after the other take 30 passes each


def test_a_cache_of_other_states(tokenizer):
    """The states of a Mamba are no keys and values: answers are written batch by batch."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    model = MambaForCausalLM(config).eval()
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    begins = ids.shape[1]
    with torch.no_grad():
        for _ in range(20):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(ids[0, begins:], skip_special_tokens=True)
    stop = expected[3:5]
    examples = [*asked(PROMPTS[0], stops=(stop,)), *asked(PROMPTS[0])]
    found = answers(model, tokenizer, examples, sampling={"max_new_tokens": 20})
    assert found == {0: [expected[: expected.index(stop)]], 1: [expected]}


@pytest.mark.parametrize("longest", [3, 5, 8])
def test_a_generate_of_the_model_s_own_writes_what_it_wants(longest, tokenizer):
    """It may return the tokens alone, fewer than it might, or more."""
    words = tokenizer("red blue red blue one")["input_ids"][-5:]

    class Own(torch.nn.Linear):
        def generate(self, *, input_ids, **rest):
            return torch.cat([input_ids, torch.tensor([words] * len(input_ids))], dim=1)

    found = answers(Own(1, 1), tokenizer, asked(*PROMPTS), sampling={"max_new_tokens": longest})
    assert found == {place: [tokenizer.decode(words, skip_special_tokens=True)] for place in range(len(PROMPTS))}


def test_samples_depend_on_the_seed_alone(model, tokenizer):
    options = {"sampling": {"samples": 3, "temperature": 1.5, "seed": 4}}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = answers(model, tokenizer, asked(*PROMPTS), batch_tokens=1, **options)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is as it was
    assert first == answers(model, tokenizer, asked(*PROMPTS), batch_tokens=1, **options)
    assert all(len(texts) == 3 for texts in first.values())
    assert len({text for texts in first.values() for text in texts}) > 4
    rest = answers(model, tokenizer, asked(*PROMPTS), batch_tokens=1, skip={1}, **options)
    assert rest == {index: texts for index, texts in first.items() if index != 1}


def test_long_prompts_lose_their_beginning(model, tokenizer):
    ids = tokenizer("one two three green")["input_ids"]
    long = asked("one " * 50 + "two three green")
    assert len(ids) < 20
    assert answers(model, tokenizer, long, max_length=20)[0] != answers(model, tokenizer, long)[0]


def test_an_empty_prompt(model, tokenizer):
    assert len(answers(model, tokenizer, asked(""))[0]) == 1


def test_every_batch_is_sampled_with_a_seed_of_its_own(model, tokenizer):
    options = {"sampling": {"temperature": 1.5}, "batch_tokens": 1}
    first, second = answers(model, tokenizer, asked(PROMPTS[0], PROMPTS[0]), **options).values()
    assert first != second


OWN = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_p": 0.5, "suppress_tokens": list(range(3, 40))}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 4}])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_model_s_own_settings_change_nothing(adapted, sampling, model, tokenizer):
    base = copy.deepcopy(model)
    settings = peft.LoraConfig(r=1, task_type="CAUSAL_LM", target_modules=["q_proj"])
    asking = peft.get_peft_model(base, settings) if adapted else base
    expected = answers(model, tokenizer, asked(*PROMPTS), sampling=sampling)
    own = base.generation_config
    for name, value in OWN.items():
        setattr(own, name, value)
    kept = own.to_dict()
    assert answers(asking, tokenizer, asked(*PROMPTS), sampling=sampling) == expected
    assert base.generation_config is own and own.to_dict() == kept
